//! How pages leave and how needs are answered: a stale hint may cost bandwidth, and never names a content that is
//! not the page's.

use super::*;
use crate::digest::Algorithm;
use crate::units::{HostIx, PAGE_SIZE};
use crate::wire::pages::{Record, Records};

fn hasher() -> Hasher {
    Hasher::new(Algorithm::Blake3, &[1; 32], "t")
}
fn page(n: u32) -> PageBytes {
    let mut p = [0xa5; PAGE_SIZE];
    p[..4].copy_from_slice(&n.to_le_bytes());
    p
}
fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}
/// Block 0 can be read from outside, block 1 cannot.
fn vm() -> SourceVm {
    SourceVm::new(hasher(), vec![BlockInfo::new(true), BlockInfo::new(false)])
}
/// How one page leaves.
fn look(vm: &mut SourceVm, addr: PageAddr, bytes: &PageBytes) -> Leaving {
    let mut pages = [(addr, None, Some(bytes))];
    vm.look(&mut pages);
    pages[0].1.expect("it leaves somehow")
}
/// One page leaves; the record it becomes and whether its content follows.
fn leave(vm: &mut SourceVm, table: &mut PairTable, addr: PageAddr, bytes: &PageBytes) -> (Record, bool) {
    let mut frame = PagesBuilder::default();
    let leaving = look(vm, addr, bytes);
    let way = vm.decide(table, leaving);
    way.put(addr, Form::Whole, &mut frame);
    let follows = way.has_content();
    assert_eq!(frame.contents(), usize::from(follows));
    let mut records = Records::new(frame.meta());
    let r = records.next().expect("one record").expect("good");
    assert!(records.next().is_none());
    (r, follows)
}

#[test]
fn each_kind_of_page_leaves_as_its_record() {
    let (mut v, mut t) = (vm(), PairTable::new(HostIx(2), 100));
    let digest = hasher().page(&page(1));
    let addr = at(0, 9);
    let unique = (Record::Unique { addr, count: 1 }, true);
    let zero = leave(&mut v, &mut t, addr, &[0; PAGE_SIZE]);
    assert_eq!(zero, (Record::Uniform { addr, count: 1, fill: 0 }, false));
    assert_eq!(leave(&mut v, &mut t, addr, &page(1)), unique);
    let id = PageId::local(HostIx(2), 0);
    assert_eq!(leave(&mut v, &mut t, addr, &page(1)), (Record::Shared { addr, id, digest }, true));
    assert_eq!(leave(&mut v, &mut t, addr, &page(1)), (Record::Ref { addr, id }, false));
    let (planned, digest) = (PageId { bucket: 1, index: 2 }, hasher().page(&page(2)));
    t.planned(digest, planned);
    let (r, _) = leave(&mut v, &mut t, addr, &page(2));
    assert_eq!(r, Record::Remote { addr, id: planned, digest });
    let s = v.stats;
    assert_eq!((s.uniform, s.unique, s.shared, s.references, s.remote_references), (1, 1, 1, 1, 1));
    assert_eq!(s.hashed, 4);
}

#[test]
fn a_block_that_cannot_be_read_takes_no_part() {
    let (mut v, mut t) = (vm(), PairTable::new(HostIx(0), 100));
    for addr in [at(1, 0), at(1, 1), at(1, 2), at(2, 0)] {
        assert_eq!(leave(&mut v, &mut t, addr, &page(1)), (Record::Unique { addr, count: 1 }, true));
    }
    assert!(t.is_empty(), "nothing is named that could be asked for in vain");
    assert!(!leave(&mut v, &mut t, at(1, 3), &[7; PAGE_SIZE]).1);
    assert!(v.readable(BlockIx(0)) && !v.readable(BlockIx(1)) && !v.readable(BlockIx(2)));
}

#[test]
fn a_lone_page_saves_its_hash_once_whatever_it_holds_by_now() {
    let mut block = BlockInfo::new(true);
    for p in [0, 63, 64, 1000] {
        block.set_lone(p);
    }
    let mut v = SourceVm::new(hasher(), vec![block]);
    for p in [0, 63, 64, 1000] {
        assert_eq!(look(&mut v, at(0, p), &page(5)), Leaving::Plain, "page {p}");
        assert_eq!(
            look(&mut v, at(0, p), &page(5)),
            Leaving::Hashed(hasher().page(&page(5))),
            "page {p} again"
        );
    }
    for p in [1, 62, 65, 999, 1001, u32::MAX] {
        assert!(matches!(look(&mut v, at(0, p), &page(5)), Leaving::Hashed(_)), "page {p}");
    }
    // A lone page that became zero stays the few bytes it is, and keeps its bit.
    v.blocks[0].set_lone(7);
    assert_eq!(look(&mut v, at(0, 7), &[0; PAGE_SIZE]), Leaving::Uniform(0));
    assert_eq!(look(&mut v, at(0, 7), &page(5)), Leaving::Plain);
}

#[test]
fn a_batch_is_looked_at_page_by_page() {
    let mut v = vm();
    v.blocks[0].set_lone(2);
    let mut contents: Vec<PageBytes> = (0..20).map(page).collect();
    contents[0] = [0; PAGE_SIZE];
    let mut pages: Vec<Outgoing<'_>> =
        contents.iter().zip(0..).map(|(p, n)| (at(u16::from(n == 5), n), None, Some(p))).collect();
    // Known to be uniform, with its content or without; and a name that is known already.
    let kept = Leaving::Hashed(hasher().page(&page(99)));
    pages.extend([(at(0, 50), Some(Leaving::Uniform(0)), None), (at(0, 51), Some(kept), None)]);
    v.look(&mut pages);
    for ((addr, leaving, _), n) in pages.iter().zip(0..) {
        let want = match addr.page {
            0 => Leaving::Uniform(0),
            2 | 5 => Leaving::Plain,
            50 => Leaving::Uniform(0),
            51 => kept,
            _ => Leaving::Hashed(hasher().page(&page(n))),
        };
        assert_eq!(*leaving, Some(want), "page {}", addr.page);
    }
    assert_eq!(v.stats.hashed, 17);
}

#[test]
fn a_need_is_answered_by_what_the_page_holds_now() {
    let (mut v, mut t) = (vm(), PairTable::new(HostIx(0), 100));
    let digest = hasher().page(&page(1));
    let by_digest = Want::Digest(digest);
    assert_eq!(v.answer(&t, by_digest, Some(&page(1))), Some(digest));
    assert_eq!(v.answer(&t, by_digest, Some(&page(2))), None, "written since");
    assert_eq!(v.answer(&t, by_digest, None), None, "cannot be read");

    let id = PageId { bucket: 1, index: 2 };
    let by_id = Want::Id(id);
    assert_eq!(v.answer(&t, by_id, Some(&page(1))), None, "no such name given");
    t.planned(digest, id);
    leave(&mut v, &mut t, at(0, 0), &page(1));
    assert_eq!(v.answer(&t, by_id, Some(&page(1))), Some(digest));
    assert_eq!(v.answer(&t, by_id, Some(&page(2))), None, "written since");
    assert_eq!(v.answer(&t, Want::Id(PageId { bucket: 1, index: 3 }), Some(&page(1))), None);
    assert_eq!((v.stats.answered, v.stats.gone), (2, 5));
}

/// What a page becomes against `refs`: its record, its form, and its content as it stands in the body.
fn form(
    vm: &mut SourceVm,
    refs: &mut References,
    addr: PageAddr,
    bytes: &PageBytes,
) -> (Record, Form, PageBytes) {
    let mut table = PairTable::new(HostIx(0), 100);
    let leaving = look(vm, addr, bytes);
    let mut way = vm.decide(&mut table, leaving);
    let (mut out, mut tell) = ([0; PAGE_SIZE], Vec::new());
    let form = vm.form(
        refs,
        (Lane { vm: 1, frame: 0 }, Nanos(0)),
        addr,
        &mut way,
        Sketch::of(bytes),
        bytes,
        &mut out,
        &mut tell,
    );
    assert_eq!(tell, [], "no models");
    let mut frame = PagesBuilder::default();
    way.put(addr, form, &mut frame);
    let mut records = Records::new(frame.meta());
    let record = records.next().expect("one record").expect("good");
    assert_eq!(records.form(), form);
    (record, form, if let Form::Less(_) = form { out } else { *bytes })
}

#[test]
fn a_content_leaves_as_the_difference_from_a_similar_one_if_it_can_be_asked_for() {
    let (mut v, mut refs) = (vm(), References::new(10, 500));
    let first: PageBytes = std::array::from_fn(|i| (i / 3) as u8 ^ (i >> 8) as u8);
    let (record, kept, _) = form(&mut v, &mut refs, at(0, 1), &first);
    assert_eq!((record, kept), (Record::Unique { addr: at(0, 1), count: 1 }, Form::Kept(0)));
    let mut second = first;
    second[100] ^= 0xFF;
    let (record, less, body) = form(&mut v, &mut refs, at(0, 2), &second);
    assert_eq!(record, Record::Named { addr: at(0, 2), digest: hasher().page(&second) });
    assert_eq!(less, Form::Less(0));
    let mut again = body;
    crate::delta::plus(&mut again, &first);
    assert!(again == second && body.iter().filter(|b| **b != 0).count() == 1);
    // A page that preparation saw nowhere else has no digest before it needs one.
    let mut lone = BlockInfo::new(true);
    lone.set_lone(3);
    v.set_blocks(vec![lone, BlockInfo::new(false)]);
    let (record, ..) = form(&mut v, &mut refs, at(0, 3), &second);
    assert_eq!(record, Record::Named { addr: at(0, 3), digest: hasher().page(&second) });
    // What cannot be read again cannot be asked for, so it leaves whole.
    let (record, whole, _) = form(&mut v, &mut refs, at(1, 0), &second);
    assert_eq!((record, whole), (Record::Unique { addr: at(1, 0), count: 1 }, Form::Kept(1)));
    assert_eq!((v.stats.differences, v.stats.hashed, refs.counts.kept), (2, 3, 2));
}

#[test]
fn a_page_that_resembles_a_model_leaves_with_what_stands_in_its_slot() {
    let (mut v, mut refs) = (vm(), References::new(10, 500));
    let model: PageBytes = std::array::from_fn(|i| (i / 3) as u8 ^ (i >> 8) as u8);
    assert!(refs.adopt(Sketch::of(&model), &model, hasher().page(&model), Nanos(0)));
    let (mut out, mut tell) = ([0; PAGE_SIZE], Vec::new());
    let mut leaves = |vm_ix, n: usize, tell: &mut Vec<(u32, Digest)>| {
        let mut page = model;
        page[n] ^= 0xFF;
        let mut way = Way::Unique(None);
        let when = (Lane { vm: vm_ix, frame: 0 }, Nanos(0));
        let form =
            v.form(&mut refs, when, at(0, n as u32), &mut way, Sketch::of(&page), &page, &mut out, tell);
        assert_eq!((form, way), (Form::Less(0), Way::Unique(Some(hasher().page(&page)))));
    };
    leaves(1, 100, &mut tell);
    leaves(1, 200, &mut tell);
    assert_eq!(tell, [(0, hasher().page(&model))], "told once for both");
    leaves(2, 300, &mut tell);
    assert_eq!(tell.len(), 2, "and on another connection once more");
    assert_eq!((v.stats.differences, v.stats.modelled), (3, 3));
}
