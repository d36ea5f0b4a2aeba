//! What post-copy adds to the wire: both sides of its caps, and that sets of any shape come out as they went in. Golden
//! bytes and damage are with those of the other kinds.

use super::*;
use crate::wire::limits::MAX_META;
use proptest::collection::vec;
use proptest::prelude::*;

const SIZES: [u32; 2] = [SPAN_PAGES + 20, 40];

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}
/// Whether a decode failed for being above a cap (and not for any other reason).
fn too_long<T: std::fmt::Debug>(r: Result<T, WireError>) -> bool {
    match r {
        Ok(_) => false,
        Err(WireError::TooLong { .. }) => true,
        Err(e) => panic!("neither fine nor too long: {e}"),
    }
}

#[test]
fn both_sides_of_the_paging_caps() {
    for (n, over) in [(MAX_DEMAND, false), (MAX_DEMAND + 1, true)] {
        let d = Demand { urgent: 0, pages: vec![at(0, 0); n] };
        assert_eq!(too_long(Demand::decode(&d.encode())), over);
    }
    let more_urgent_than_pages = Demand { urgent: 2, pages: vec![at(0, 0)] }.encode();
    let what = "number of urgent pages";
    assert_eq!(Demand::decode(&more_urgent_than_pages), Err(WireError::Bad { kind: Kind::Demand, what }));
    for (n, over) in [(MAX_HURRY, false), (MAX_HURRY + 1, true)] {
        let m = encode_digests(&vec![Digest([1; DIGEST_LEN]); n]);
        assert_eq!(too_long(decode_digests(Kind::Hurry, &m)), over);
    }
    let set = |m: &[u8]| decode_set(Kind::Lacks, m, &mut PageSet::empty(&SIZES));
    let span = |block: u16, first: u32, pages: u32, rest: &[u8]| {
        let mut m = vec![1, 1];
        m.extend(block.to_le_bytes());
        m.extend(first.to_le_bytes());
        put_varint(&mut m, pages);
        m.extend(rest);
        m
    };
    assert_eq!(set(&span(0, 0, SPAN_PAGES, &[0, 0])), Ok(true));
    assert!(too_long(set(&span(0, 0, SPAN_PAGES + 1, &[0, 0]))));
    for (n, over) in [(MAX_SPANS, false), (MAX_SPANS + 1, true)] {
        let mut m = vec![0];
        put_varint(&mut m, n as u32);
        m.extend(span(1, 3, 1, &[0, 0])[2..].repeat(n));
        assert_eq!(too_long(set(&m)), over);
    }
    let bad = |m: &[u8], what| assert_eq!(set(m), Err(WireError::Bad { kind: Kind::Lacks, what }), "{m:?}");
    bad(&[2, 0], "last flag");
    bad(&span(1, 0, 0, &[0, 0]), "span");
    bad(&span(1, 39, 2, &[0, 0]), "span");
    bad(&span(1, u32::MAX, 2, &[0, 0]), "span");
    bad(&span(2, 0, 1, &[0, 0]), "span");
    bad(&span(1, 0, 40, &[2]), "form of a span");
    bad(&span(1, 0, 40, &[0, 1, 0, 41]), "run");
    bad(&span(1, 0, 40, &[0, 1, 5, 0]), "run");
    bad(&span(1, 0, 40, &[0, 2, 0, 20, 1, 20]), "run");
    bad(&span(1, 0, 40, &[0, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]), "run");
    bad(&span(1, 0, 39, &[1, 0, 0, 0, 0, 0x80]), "bits past the end of a span");
}

/// Every other page of a large VM: the worst shape there is costs a bit a page, split over as many frames as it needs.
#[test]
fn a_set_of_any_shape_travels_in_a_bit_a_page() {
    let sizes = [1 << 22, 100_000];
    let mut set = PageSet::empty(&sizes);
    for (block, size) in (0u16..).zip(sizes) {
        (0..size).step_by(2).for_each(|p| {
            set.insert(at(block, p));
        });
    }
    let frames = encode_set(&set);
    let bytes: usize = frames.iter().map(Vec::len).sum();
    assert!(frames.iter().all(|f| f.len() <= MAX_META));
    let pages: u32 = sizes.iter().sum();
    assert!(bytes * 8 < pages as usize * 102 / 100, "{bytes} bytes for {pages} pages");
    let mut got = PageSet::empty(&sizes);
    for (i, f) in frames.iter().enumerate() {
        assert_eq!(decode_set(Kind::Switch, f, &mut got), Ok(i + 1 == frames.len()));
    }
    assert_eq!(got, set);
}

proptest! {
    #[test]
    fn sets_and_demands_come_out_as_they_went_in(
        runs in vec((0..2u16, 0..SPAN_PAGES + 20, 1..600u32), 0..40),
        pages in vec((any::<u16>(), any::<u32>()), 0..50),
        digests in vec(any::<[u8; DIGEST_LEN]>(), 0..20),
    ) {
        let mut set = PageSet::empty(&SIZES);
        for (block, page, count) in runs {
            set.insert_run(Run { addr: at(block, page), count });
        }
        let mut got = PageSet::empty(&SIZES);
        for f in encode_set(&set) {
            decode_set(Kind::Switch, &f, &mut got).unwrap();
        }
        prop_assert_eq!(got, set);
        let pages: Vec<_> = pages.into_iter().map(|(b, p)| at(b, p)).collect();
        let digests: Vec<_> = digests.into_iter().map(Digest).collect();
        let d = Demand { urgent: pages.len() / 2, pages };
        prop_assert_eq!(Demand::decode(&d.encode()), Ok(d));
        prop_assert_eq!(decode_digests(Kind::NotHere, &encode_digests(&digests)), Ok(digests));
    }
}
