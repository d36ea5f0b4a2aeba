//! The waiting list's promises one by one: what is superseded is never written, whoever waits is woken by name or by
//! digest, and every way in which a content can fail to come ends in a question, a newer version or an error.

use super::*;
use crate::digest::{Algorithm, Hasher};
use crate::units::{BlockIx, PAGE_SIZE};

const SRC: HostIx = HostIx(3);
const VM: VmIx = VmIx(1);
const OTHER: VmIx = VmIx(2);
const SOON: Patience = Patience { running_ms: 100, stopped_ms: 10 };

fn page(n: u32) -> PageBytes {
    let mut p = [0xa5; PAGE_SIZE];
    p[..4].copy_from_slice(&n.to_le_bytes());
    p
}
fn digest(n: u32) -> Digest {
    Hasher::new(Algorithm::Blake3, &[1; 32], "t").page(&page(n))
}
fn id(n: u32) -> PageId {
    PageId { bucket: 7, index: n }
}
fn at(page: u32) -> PageAddr {
    PageAddr { block: BlockIx(0), page }
}
fn ms(n: u64) -> Nanos {
    Nanos(0).plus_ms(n)
}
fn remote(p: u32, content: u32) -> Record {
    Record::Remote { addr: at(p), id: id(content), digest: digest(content) }
}
fn reference(p: u32, content: u32) -> Record {
    Record::Ref { addr: at(p), id: id(content) }
}
fn need(p: u32, content: u32) -> NeedEntry {
    NeedEntry { addr: at(p), want: Want::Digest(digest(content)) }
}

/// What came out, in order.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Out {
    Uniform(PageAddr, u32, u8),
    Body(PageAddr, usize),
    Stored(PageAddr, u32),
}
#[derive(Default)]
struct Log(Vec<Out>);
impl Output for Log {
    type Error = TargetError;
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), TargetError> {
        self.0.push(Out::Uniform(addr, count, fill));
        Ok(())
    }
    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), TargetError> {
        self.0.push(Out::Body(addr, content));
        Ok(())
    }
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), TargetError> {
        let n = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        assert_eq!(*bytes, page(n));
        self.0.push(Out::Stored(addr, n));
        Ok(())
    }
}

/// One host, two VMs of the same source host, and what they wrote.
struct World {
    host: TargetHost,
    vms: [TargetVm; 2],
    out: [Log; 2],
    wakes: Vec<Wake>,
    body: usize,
}
impl World {
    fn new(budget: usize) -> Self {
        Self {
            host: TargetHost::new(budget, 64),
            vms: [TargetVm::new(VM, SRC, 64), TargetVm::new(OTHER, SRC, 64)],
            out: Default::default(),
            wakes: Vec::new(),
            body: 0,
        }
    }
    fn record(&mut self, vm: usize, r: Record, now: Nanos) -> Result<(), TargetError> {
        let shared = match r {
            Record::Shared { id, .. } => Some(page(id.index)),
            _ => None,
        };
        let (v, out) = (&mut self.vms[vm], &mut self.out[vm]);
        v.record(&mut self.host, r, &mut self.body, shared.as_ref(), now, out, &mut self.wakes)
    }
    fn run_wakes(&mut self, now: Nanos) {
        while let Some(w) = self.wakes.pop() {
            let vm = usize::from(w.vm == OTHER);
            self.vms[vm].woken(&mut self.host, w.key, now, &mut self.out[vm]).expect("bounded");
        }
    }
    fn content(&mut self, n: u32) -> Vec<HostIx> {
        self.host.content(true, digest(n), &page(n), &mut self.wakes)
    }
    fn due(&mut self, vm: usize, now: Nanos) -> Vec<NeedEntry> {
        self.vms[vm].due(now, SOON)
    }
}

#[test]
fn gone_for_an_older_want_leaves_the_newer_wait_alone() {
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    assert_eq!(w.due(0, ms(100)), vec![need(5, 1)]);
    // The newer version overtakes the answer, which then is about the older one.
    w.record(0, remote(5, 2), ms(101)).unwrap();
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(None));
    assert_eq!(w.vms[0].ram_end(ms(102)), Ok(()));
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(None), "after RAM end too");
    w.content(2);
    w.run_wakes(ms(103));
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 2)]);
    assert!(w.vms[0].complete());
}

#[test]
fn a_newer_record_of_any_kind_takes_the_page_off_the_list() {
    let newer = [
        Record::Uniform { addr: at(4), count: 3, fill: 0 },
        Record::Unique { addr: at(3), count: 3 },
        Record::Shared { addr: at(5), id: id(9), digest: digest(9) },
        reference(5, 8),
        remote(5, 8),
    ];
    for r in newer {
        let mut w = World::new(8);
        w.content(8);
        w.host.bind(SRC, id(8), digest(8), &mut w.wakes).unwrap();
        w.record(0, remote(5, 1), ms(0)).unwrap();
        assert_eq!(w.vms[0].waiting(), 1);
        w.record(0, r, ms(1)).unwrap();
        assert_eq!((w.vms[0].waiting(), w.vms[0].stats.superseded), (0, 1), "{r:?}");
        let written = w.out[0].0.clone();
        assert_eq!(w.content(1), vec![]);
        w.run_wakes(ms(2));
        assert_eq!(w.out[0].0, written, "the older content must not follow {r:?}");
        assert_eq!(w.due(0, ms(1000)), vec![]);
    }
}

#[test]
fn a_page_of_a_run_elsewhere_does_not_touch_a_wait() {
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    let other_block = PageAddr { block: BlockIx(1), page: 5 };
    w.record(0, Record::Uniform { addr: other_block, count: 1, fill: 0 }, ms(0)).unwrap();
    w.record(0, Record::Uniform { addr: at(6), count: 9, fill: 0 }, ms(0)).unwrap();
    w.record(0, Record::Uniform { addr: at(0), count: 5, fill: 0 }, ms(0)).unwrap();
    assert_eq!(w.vms[0].waiting(), 1);
}

#[test]
fn a_page_known_by_name_only_is_woken_by_the_name_and_then_by_the_content() {
    let mut w = World::new(8);
    w.record(0, reference(5, 1), ms(0)).unwrap();
    w.record(0, reference(6, 1), ms(0)).unwrap();
    w.content(1);
    assert!(w.wakes.is_empty(), "the content alone says nothing about the name");
    w.host.bind(SRC, id(1), digest(1), &mut w.wakes).unwrap();
    assert_eq!(w.wakes, vec![Wake { vm: VM, key: Key::Id(SRC, id(1)) }]);
    w.run_wakes(ms(1));
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 1), Out::Stored(at(6), 1)]);

    let mut w = World::new(8);
    w.record(0, reference(5, 1), ms(0)).unwrap();
    // Another source host's name of the same look is another name.
    w.host.bind(HostIx(9), id(1), digest(2), &mut w.wakes).unwrap();
    assert!(w.wakes.is_empty());
    // The other VM of this source host brings the name.
    w.record(1, remote(0, 1), ms(1)).unwrap();
    w.run_wakes(ms(1));
    assert!(w.out[0].0.is_empty() && w.vms[0].waiting() == 1);
    w.content(1);
    w.run_wakes(ms(2));
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 1)]);
    assert_eq!(w.out[1].0, vec![Out::Stored(at(0), 1)]);
}

#[test]
fn a_name_is_asked_for_as_a_name_and_the_answer_teaches_it() {
    let mut w = World::new(1);
    w.record(0, reference(5, 1), ms(0)).unwrap();
    assert_eq!(w.due(0, ms(99)), vec![]);
    assert_eq!(w.due(0, ms(100)), vec![NeedEntry { addr: at(5), want: Want::Id(id(1)) }]);
    assert_eq!(w.due(0, ms(500)), vec![], "asked once");
    let (v, out) = (&mut w.vms[0], &mut w.out[0]);
    let owed = v.answered(&mut w.host, Some(id(1)), digest(1), &page(1), ms(500), out, &mut w.wakes).unwrap();
    assert!(owed.is_empty() && w.wakes.is_empty());
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 1)]);
    w.record(0, reference(6, 1), ms(501)).unwrap();
    assert_eq!(w.out[0].0.len(), 2, "a hit from now on");
}

#[test]
fn a_void_makes_waiters_ask_now_and_serves_the_others_when_it_comes() {
    let rest = [HostIx(4), HostIx(6)];
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    assert_eq!(w.host.void(digest(1), &rest, &mut w.wakes), VoidAction::Asking);
    assert_eq!(
        w.host.void(digest(1), &[], &mut w.wakes),
        VoidAction::Asking,
        "a late copy of it changes nothing"
    );
    w.run_wakes(ms(1));
    assert_eq!(w.due(0, ms(1)), vec![need(5, 1)]);
    assert_eq!(w.content(1), rest.to_vec());
    w.run_wakes(ms(2));
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 1)]);
    assert_eq!(w.host.void(digest(1), &rest, &mut w.wakes), VoidAction::Forward);
}

#[test]
fn a_voided_content_that_comes_as_a_shared_record_is_owed_too() {
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    assert_eq!(w.host.void(digest(1), &[HostIx(4)], &mut w.wakes), VoidAction::Asking);
    w.record(1, Record::Shared { addr: at(0), id: id(1), digest: digest(1) }, ms(1)).unwrap();
    assert_eq!(w.vms[1].take_owed(), vec![(digest(1), vec![HostIx(4)])]);
    assert_eq!(w.vms[1].take_owed(), vec![]);
}

#[test]
fn a_void_that_nobody_here_waits_for_is_passed_on_and_remembered() {
    let mut w = World::new(8);
    assert_eq!(w.host.void(digest(1), &[HostIx(4)], &mut w.wakes), VoidAction::PassOn);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    assert_eq!(w.due(0, ms(0)), vec![need(5, 1)], "no deadline to wait for");
    assert_eq!(w.content(1), vec![], "the others have their void");
}

#[test]
fn a_void_goes_on_when_its_last_waiter_cannot_be_served_here() {
    let mut w = World::new(8);
    for vm in [0, 1] {
        w.record(vm, remote(5, 1), ms(0)).unwrap();
    }
    w.host.void(digest(1), &[HostIx(4)], &mut w.wakes);
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(None), "the other VM still asks");
    assert_eq!(w.vms[1].leave(&mut w.host), vec![(digest(1), vec![HostIx(4)])]);
    assert_eq!(w.vms[1].waiting(), 0);

    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.host.void(digest(1), &[HostIx(4)], &mut w.wakes);
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(Some((digest(1), vec![HostIx(4)]))));
}

#[test]
fn content_that_was_evicted_before_its_waiter_came_round_is_asked_for_again() {
    let mut w = World::new(1);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.content(1);
    w.content(2);
    w.run_wakes(ms(1));
    assert_eq!(w.due(0, ms(1)), vec![need(5, 1)]);
    // Again, now with a question under way.
    w.content(1);
    w.content(2);
    w.run_wakes(ms(2));
    assert_eq!(w.due(0, ms(2)), vec![need(5, 1)]);
    let (v, out) = (&mut w.vms[0], &mut w.out[0]);
    v.answered(&mut w.host, None, digest(1), &page(1), ms(3), out, &mut w.wakes).unwrap();
    w.content(2);
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 1)]);
}

#[test]
fn gone_asks_for_the_next_page_and_the_last_one_must_come_anew() {
    let mut w = World::new(8);
    for p in [5, 6] {
        w.record(0, remote(p, 1), ms(0)).unwrap();
    }
    assert_eq!(w.due(0, ms(100)), vec![need(5, 1)]);
    w.vms[0].gone(&mut w.host, need(5, 1)).unwrap();
    assert_eq!(w.due(0, ms(100)), vec![need(6, 1)]);
    w.vms[0].gone(&mut w.host, need(6, 1)).unwrap();
    w.content(1);
    w.run_wakes(ms(101));
    assert!(w.out[0].0.is_empty(), "what the guest has written over must not come any more");
    assert_eq!((w.vms[0].waiting(), w.vms[0].awaited()), (2, 0));
    w.record(0, Record::Unique { addr: at(5), count: 2 }, ms(102)).unwrap();
    assert_eq!(w.vms[0].ram_end(ms(103)), Ok(()));
    assert!(w.vms[0].complete());
}

#[test]
fn superseding_the_page_that_was_asked_asks_for_another() {
    let mut w = World::new(8);
    for p in [5, 6] {
        w.record(0, remote(p, 1), ms(0)).unwrap();
    }
    assert_eq!(w.due(0, ms(100)), vec![need(5, 1)]);
    w.record(0, Record::Unique { addr: at(5), count: 1 }, ms(101)).unwrap();
    assert_eq!(w.due(0, ms(101)), vec![need(6, 1)]);
}

#[test]
fn a_broken_promise_is_an_error_whenever_it_shows() {
    let broken = Err(TargetError::BrokenPromise { block: 0, page: 5 });
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.due(0, ms(100));
    w.vms[0].gone(&mut w.host, need(5, 1)).unwrap();
    assert_eq!(w.vms[0].ram_end(ms(101)), broken);

    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.due(0, ms(100));
    assert_eq!(w.vms[0].ram_end(ms(101)), Ok(()));
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)).map(|_| ()), broken);
}

#[test]
fn once_ram_has_ended_patience_is_short() {
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.record(0, remote(6, 2), ms(45)).unwrap();
    w.vms[0].ram_end(ms(50)).unwrap();
    assert!(!w.vms[0].complete());
    assert_eq!(w.due(0, ms(59)), vec![]);
    assert_eq!(w.due(0, ms(60)).len(), 2);
    // Never later than it would have been without the end.
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    w.vms[0].ram_end(ms(95)).unwrap();
    assert_eq!(w.due(0, ms(100)), vec![need(5, 1)]);
}

#[test]
fn one_question_holds_for_all_pages_of_a_content_and_a_call_has_its_cap() {
    let n = MAX_NEEDS as u32 + 5;
    let mut host = TargetHost::new(1, 2 * MAX_NEEDS);
    let mut vm = TargetVm::new(VM, SRC, 4 * MAX_NEEDS);
    let (mut out, mut wakes, mut body) = (Log::default(), Vec::new(), 0);
    for p in 0..2 * n {
        let r = remote(p, p % n);
        vm.record(&mut host, r, &mut body, None, ms(0), &mut out, &mut wakes).unwrap();
    }
    assert_eq!(vm.due(ms(100), SOON).len(), MAX_NEEDS);
    assert_eq!(vm.due(ms(100), SOON).len(), 5);
    assert_eq!(vm.stats.asked, u64::from(n));
}

#[test]
fn names_waits_and_voids_have_bounds() {
    let mut host = TargetHost::new(1, 2);
    let (mut out, mut wakes, mut body) = (Log::default(), Vec::new(), 0);
    for n in [1, 2] {
        host.bind(SRC, id(n), digest(n), &mut wakes).unwrap();
    }
    host.bind(SRC, id(1), digest(3), &mut wakes).unwrap();
    assert_eq!(host.bind(SRC, id(3), digest(3), &mut wakes), Err(TargetError::TooManyIds(2)));

    let mut vm = TargetVm::new(VM, SRC, 2);
    let mut refer = |p| vm.record(&mut host, reference(p, 1), &mut body, None, ms(0), &mut out, &mut wakes);
    assert_eq!(refer(0), Ok(()));
    assert_eq!(refer(1), Ok(()));
    assert_eq!(refer(1), Ok(()), "the same page again is no further wait");
    assert_eq!(refer(2), Err(TargetError::TooManyWaiting(2)));

    for n in 10..20 {
        assert_eq!(host.void(digest(n), &[HostIx(1)], &mut wakes), VoidAction::PassOn);
    }
    assert!(host.owed.len() <= 2);
    // At the bound, who waits still asks at once.
    host.void(digest(3), &[HostIx(1)], &mut wakes);
    assert!(wakes.contains(&Wake { vm: VM, key: Key::Digest(digest(3)) }));
}

#[test]
fn an_arrival_that_has_left_awaits_nothing() {
    let mut w = World::new(8);
    for p in [5, 6] {
        w.record(0, remote(p, p), ms(0)).unwrap();
    }
    w.vms[0].gone(&mut w.host, need(5, 5)).unwrap();
    assert_eq!((w.vms[0].waiting(), w.vms[0].awaited()), (2, 1));
    w.vms[0].leave(&mut w.host);
    assert_eq!((w.vms[0].waiting(), w.vms[0].awaited()), (0, 0));
    assert!(w.host.waiters.is_empty());
}

#[test]
fn a_content_that_cannot_be_made_is_asked_for_at_once_or_taken_from_where_it_is() {
    let mut w = World::new(8);
    let unmade = |w: &mut World, r: Record, now| {
        let (v, out) = (&mut w.vms[0], &mut w.out[0]);
        v.record(&mut w.host, r, &mut w.body, None, now, out, &mut w.wakes)
    };
    let named = |p, content| Record::Named { addr: at(p), digest: digest(content) };
    let shared = |p, content| Record::Shared { addr: at(p), id: id(content), digest: digest(content) };
    unmade(&mut w, named(5, 1), ms(0)).unwrap();
    unmade(&mut w, shared(6, 2), ms(0)).unwrap();
    assert_eq!(w.body, 2, "both had a place in the body");
    let mut asked = w.due(0, ms(1));
    asked.sort_by_key(|n| n.addr);
    assert_eq!(asked, [need(5, 1), need(6, 2)], "long before any deadline");
    assert!(w.due(0, ms(99)).is_empty());
    // The second is known by its name all the same.
    w.record(1, reference(7, 2), ms(2)).unwrap();
    w.content(2);
    w.run_wakes(ms(3));
    assert_eq!(
        (w.out[0].0.clone(), w.out[1].0.clone()),
        (vec![Out::Stored(at(6), 2)], vec![Out::Stored(at(7), 2)])
    );
    // What is here already needs no question; a newer version takes the place of one that waits.
    unmade(&mut w, named(8, 2), ms(4)).unwrap();
    unmade(&mut w, named(5, 3), ms(4)).unwrap();
    assert_eq!(w.due(0, ms(5)), [need(5, 3)]);
    w.vms[0].answered(&mut w.host, None, digest(3), &page(3), ms(6), &mut w.out[0], &mut w.wakes).unwrap();
    assert_eq!(w.out[0].0[1..], [Out::Stored(at(8), 2), Out::Stored(at(5), 3)]);
    assert_eq!((w.vms[0].waiting(), w.vms[0].stats.unmade), (0, 4));
}
