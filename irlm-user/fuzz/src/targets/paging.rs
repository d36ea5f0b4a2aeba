//! Frames of post-copy from a hostile peer, as both sides take them: nothing panics, a set never grows beyond the VM, what
//! is decoded is what encoding it gives, and no page is placed or sent that the VM does not have or that is settled.

use irlm_user::core::digest::Digest;
use irlm_user::core::postcopy::{Fill, PageSet, Patience, Put, Run, Serve};
use super::frames::{at, frame};
use irlm_user::core::arrival::TargetHost;
use irlm_user::core::units::{BlockIx, HostIx, Nanos, PAGE_SIZE, PageAddr, PageId, VmIx};
use irlm_user::core::wire::frame::{HEADER_LEN, Header, Kind};
use irlm_user::core::wire::pages::{Form, PagesBuilder, Records};
use irlm_user::core::wire::paging::{Demand, decode_digests, decode_set, encode_digests, encode_set};

const SIZES: [u32; 2] = [10_000, 33];

fn due() -> PageSet {
    let mut due = PageSet::empty(&SIZES);
    due.insert_run(Run { addr: PageAddr { block: BlockIx(0), page: 100 }, count: 3000 });
    due.insert_run(Run { addr: PageAddr { block: BlockIx(1), page: 0 }, count: 33 });
    due
}

pub(crate) fn target(data: &[u8]) {
    let mut host = TargetHost::new(16, 4096);
    let mut fill = Fill::new(VmIx(0), HostIx(0), due(), &[HostIx(1)], Patience::default());
    let mut serve = Serve::new(due());
    let (mut rest, mut now) = (data, Nanos(0));
    while let Some((head, after)) = rest.split_first_chunk::<HEADER_LEN>() {
        let Ok(h) = Header::decode(head) else { return };
        let Some((payload, next)) = after.split_at_checked(h.payload_len()) else { return };
        let (meta, body) = payload.split_at(h.meta_len as usize);
        rest = next;
        now = now.plus_ms(1);
        match h.kind {
            Kind::Switch | Kind::Lacks => {
                let mut set = PageSet::empty(&SIZES);
                if decode_set(h.kind, meta, &mut set).is_ok() {
                    let mut again = PageSet::empty(&SIZES);
                    for m in encode_set(&set) {
                        decode_set(h.kind, &m, &mut again).expect("what was encoded here");
                    }
                    assert_eq!(again, set);
                    assert!(set.len() <= SIZES.iter().map(|n| u64::from(*n)).sum());
                    serve.resume(set);
                }
            }
            Kind::Demand => {
                if let Ok(d) = Demand::decode(meta) {
                    assert_eq!(Demand::decode(&d.encode()).as_ref(), Ok(&d));
                    if serve.demand(&d).is_ok() {
                        while let Some((a, _)) = serve.next_wanted() {
                            assert!(due().covers(a));
                        }
                    }
                    d.pages.iter().for_each(|a| {
                        fill.fault(&host, *a, now);
                    });
                }
            }
            Kind::Hurry | Kind::NotHere => {
                if let Ok(list) = decode_digests(h.kind, meta) {
                    assert_eq!(decode_digests(h.kind, &encode_digests(&list)).as_ref(), Ok(&list));
                    list.iter().for_each(|d: &Digest| fill.not_here(HostIx(1), d, now));
                }
            }
            Kind::Pages => {
                let bodies = body.as_chunks::<PAGE_SIZE>().0;
                let (mut puts, mut wakes, mut content) = (Vec::new(), Vec::new(), 0);
                for record in Records::new(meta) {
                    let Ok(record) = record else { break };
                    let shared = bodies.get(content);
                    if fill
                        .record(&mut host, record, &mut content, shared, now, &mut puts, &mut wakes)
                        .is_err()
                    {
                        break;
                    }
                }
                wakes.into_iter().for_each(|w| fill.woken(&mut host, w.key, now));
                for put in puts {
                    let (Put::Zero(a) | Put::Filled(a, _) | Put::Body(a, _)) = put;
                    assert!(due().contains(a), "{a:?} was not due");
                    if fill.wants(a) {
                        fill.placed(&mut host, a, now);
                        assert!(!fill.wants(a));
                    }
                }
            }
            _ => {}
        }
        let asks = fill.asks(&mut host, now, 3);
        assert!(asks.demand.pages.iter().all(|a| fill.wants(*a)));
        let (mut addrs, mut bytes) = (Vec::new(), Vec::new());
        fill.take_ready(&mut host, 8, &mut addrs, &mut bytes);
        addrs.into_iter().for_each(|a| {
            fill.placed(&mut host, a, now);
        });
        assert!(fill.lacking() <= due().len());
    }
}

/// A switch, pages in several forms, and what is asked for.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (d, id) = (|b| Digest([b; 20]), PageId { bucket: 3, index: 300 });
    let mut pages = PagesBuilder::default();
    pages.uniform(at(1, 0), 0);
    pages.unique(at(0, 100), None);
    pages.shared(at(0, 105), id, &d(0xaa), Form::Whole);
    pages.reference(at(0, 106), id);
    pages.remote(at(0, 107), id, &d(0xbb));
    let demand = Demand { urgent: 1, pages: vec![at(1, 2), at(0, 107), at(0, 109)] };
    let asks = frame(Kind::Demand, &demand.encode(), &[]);
    let sent = frame(Kind::Pages, pages.meta(), &[5; 2 * PAGE_SIZE]);
    let hurry = frame(Kind::NotHere, &encode_digests(&[d(0xbb)]), &[]);
    let switch: Vec<u8> = encode_set(&due()).iter().flat_map(|m| frame(Kind::Switch, m, &[])).collect();
    vec![[&switch[..], &asks, &sent, &hurry, &asks].concat(), sent, asks, switch]
}
