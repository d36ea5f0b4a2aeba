//! Where a page comes from and in which order it is asked for, case by case, and the rule that each content leaves once.

use super::*;
use crate::arrival::{Key, TargetError, TargetHost};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::units::{BlockIx, HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, PageId, VmIx};
use crate::wire::pages::Record;
use crate::wire::paging::Demand;
use proptest::prelude::*;
use std::collections::HashMap;

const SIZES: [u32; 2] = [400, 100];
const PATIENCE: Patience = Patience { hurry_ms: 10, held_ms: 100, again_ms: 500 };
const SOURCE: HostIx = HostIx(0);

fn at(page: u32) -> PageAddr {
    PageAddr { block: BlockIx(0), page }
}
fn run(page: u32, count: u32) -> Run {
    Run { addr: at(page), count }
}
fn ms(n: u64) -> Nanos {
    Nanos(n * 1_000_000)
}
fn bytes(n: u8) -> PageBytes {
    let mut b = [n; PAGE_SIZE];
    b[0] = !n;
    b
}
fn digest(n: u8) -> Digest {
    Hasher::new(Algorithm::Blake3, &[1; 32], "").page(&bytes(n))
}

struct T {
    host: TargetHost,
    fill: Fill,
    puts: Vec<Put>,
}

impl T {
    /// Pages 10 to 19 and 50 to 59 are due; contents may come from target hosts 1 and 2.
    fn new() -> Self {
        let mut due = PageSet::empty(&SIZES);
        due.insert_run(run(10, 10));
        due.insert_run(run(50, 10));
        let fill = Fill::new(VmIx(0), SOURCE, due, &[HostIx(1), HostIx(2)], PATIENCE);
        Self { host: TargetHost::new(100, 1000), fill, puts: Vec::new() }
    }
    fn fault(&mut self, page: u32, now: Nanos) -> Answer {
        self.fill.fault(&self.host, at(page), now)
    }
    fn record(&mut self, record: Record, now: Nanos) -> Vec<Put> {
        self.puts.clear();
        self.fill.record(&mut self.host, record, &mut 0, None, now, &mut self.puts, &mut vec![]).unwrap();
        self.puts.clone()
    }
    fn remote(&mut self, page: u32, n: u8, now: Nanos) {
        let id = PageId { bucket: 0, index: n.into() };
        self.record(Record::Remote { addr: at(page), id, digest: digest(n) }, now);
    }
    fn asks(&mut self, now: Nanos) -> Asks {
        self.fill.asks(&mut self.host, now, PATIENCE.held_ms)
    }
    /// A content comes into the store; who waits for it is woken.
    fn content(&mut self, n: u8, now: Nanos) {
        let mut wakes = Vec::new();
        self.host.content(true, digest(n), &bytes(n), &mut wakes);
        for w in wakes {
            self.fill.woken(&mut self.host, w.key, now);
        }
    }
    fn placed(&mut self, page: u32, now: Nanos) -> Option<u64> {
        self.fill.placed(&mut self.host, at(page), now)
    }
    fn ready(&mut self) -> Vec<PageAddr> {
        let (mut addrs, mut b) = (Vec::new(), Vec::new());
        self.fill.take_ready(&mut self.host, 99, &mut addrs, &mut b);
        assert_eq!(b.len(), addrs.len() * PAGE_SIZE);
        addrs
    }
}

#[test]
fn a_fault_is_answered_from_the_nearest_place() {
    let mut t = T::new();
    assert_eq!(t.fault(5, ms(0)), Answer::Settled);
    assert_eq!(t.fault(400, ms(0)), Answer::Outside);
    assert_eq!(t.fault(10, ms(0)), Answer::Wait, "at the source");
    assert_eq!(t.record(Record::Unique { addr: at(10), count: 1 }, ms(1)), [Put::Body(at(10), 0)]);
    assert_eq!(t.placed(10, ms(3)), Some(3_000_000));
    assert_eq!(t.fault(10, ms(4)), Answer::Here, "read late: the page has been placed meanwhile");

    t.content(7, ms(4));
    t.remote(11, 7, ms(4));
    assert_eq!(t.fault(11, ms(5)), Answer::Store(Key::Digest(digest(7))));
    assert_eq!(t.placed(11, ms(5)), Some(0));
    assert_eq!(t.record(Record::Uniform { addr: at(12), count: 2, fill: 0 }, ms(5)), []);
    assert_eq!(t.fault(13, ms(5)), Answer::Settled, "zeros need no writing");
    assert_eq!(
        t.record(Record::Uniform { addr: at(14), count: 1, fill: 9 }, ms(5)),
        [Put::Filled(at(14), 9)]
    );
    assert_eq!(t.fill.lacking(), 20 - 4);
}

#[test]
fn a_page_that_is_being_forwarded_is_hurried_from_holder_to_holder_and_then_demanded() {
    let mut t = T::new();
    t.remote(50, 3, ms(0));
    t.remote(51, 3, ms(0));
    assert_eq!(t.asks(ms(1)), Asks::default(), "nobody waits for it");
    assert_eq!(t.fault(50, ms(1)), Answer::Wait);
    assert_eq!(t.asks(ms(1)).hurry, [(HostIx(1), digest(3))]);
    assert_eq!(t.asks(ms(10)), Asks::default());
    assert_eq!(t.asks(ms(11)).hurry, [(HostIx(2), digest(3))], "the first host is dead or slow");
    t.fill.not_here(HostIx(1), &digest(3), ms(12));
    assert_eq!(t.asks(ms(12)), Asks::default(), "a late answer of the first says nothing about the second");
    t.fill.not_here(HostIx(2), &digest(3), ms(13));
    let asks = t.asks(ms(13));
    assert_eq!((asks.demand.urgent, asks.demand.pages), (1, vec![at(50)]), "page 51 goes on waiting");
    assert_eq!(t.fill.stats.passed_over, 2);
    assert_eq!(t.record(Record::Unique { addr: at(50), count: 1 }, ms(14)), [Put::Body(at(50), 0)]);
    assert_eq!(t.placed(50, ms(15)), Some(14_000_000));
    // The content comes after all.
    t.content(3, ms(20));
    assert_eq!(t.ready(), [at(51)]);
    assert_eq!(t.fill.origin(at(51)), Origin::Forward);
    assert_eq!(t.placed(51, ms(20)), None);
    assert_eq!(t.asks(ms(2000)), Asks::default());
}

#[test]
fn a_forwarded_content_that_a_vcpu_waits_for_is_placed_before_others() {
    let mut t = T::new();
    t.remote(50, 3, ms(0));
    t.content(4, ms(0));
    (51..55).for_each(|p| t.remote(p, 4, ms(0)));
    t.fault(50, ms(1));
    t.content(3, ms(2));
    assert_eq!(t.ready()[0], at(50));
}

#[test]
fn a_page_held_too_long_or_voided_or_evicted_falls_back_to_the_source() {
    let mut t = T::new();
    t.remote(50, 3, ms(0));
    assert_eq!(t.asks(ms(99)).demand.pages, []);
    let asks = t.asks(ms(100));
    assert_eq!((asks.demand.urgent, asks.demand.pages), (0, vec![at(50)]));

    t.remote(51, 4, ms(100));
    t.fault(51, ms(100));
    let mut wakes = Vec::new();
    t.host.void(digest(4), &[], &mut wakes);
    t.fill.woken(&mut t.host, wakes[0].key, ms(101));
    assert_eq!(t.asks(ms(101)).demand, Demand { urgent: 1, pages: vec![at(51)] });

    t.host = TargetHost::new(1, 1000);
    t.content(5, ms(101));
    t.remote(52, 5, ms(101));
    t.content(6, ms(102));
    assert_eq!(t.ready(), [], "evicted by then");
    assert_eq!(t.asks(ms(102)).demand.pages, [at(52)]);
    assert!(t.fill.wants(at(50)) && t.fill.wants(at(51)) && t.fill.wants(at(52)));
}

#[test]
fn an_id_nobody_knows_is_asked_of_the_source_and_a_full_list_too() {
    let mut t = T::new();
    let id = PageId { bucket: 9, index: 9 };
    t.record(Record::Ref { addr: at(50), id }, ms(0));
    t.fault(50, ms(1));
    let asks = t.asks(ms(1));
    assert_eq!((asks.hurry.len(), asks.demand.urgent, asks.demand.pages), (0, 1, vec![at(50)]));

    let mut t = T::new();
    t.fill = t.fill.with_max_held(1);
    t.remote(50, 1, ms(0));
    t.remote(51, 2, ms(0));
    assert_eq!(t.asks(ms(0)).demand.pages, [at(51)]);
    assert_eq!(t.fill.lacking(), 20);
}

#[test]
fn what_the_guest_gives_away_is_zeros_and_nothing_late_is_written_there() {
    let mut t = T::new();
    t.remote(50, 3, ms(0));
    t.placed(10, ms(0));
    t.fault(11, ms(1));
    assert_eq!(t.asks(ms(1)).demand.pages[0], at(11));
    assert_eq!(t.fill.removed(&mut t.host, run(10, 5)), [at(11)], "who waits gets zeros");
    assert_eq!(t.fill.answered(at(11), ms(2)), Some(1_000_000));
    assert_eq!(t.fill.removed(&mut t.host, run(50, 1)), []);
    assert_eq!(t.record(Record::Unique { addr: at(10), count: 5 }, ms(3)), [], "the answer comes too late");
    t.content(3, ms(3));
    assert_eq!(t.ready(), []);
    for page in [10, 11, 14, 50] {
        assert_eq!(t.fault(page, ms(4)), Answer::Settled, "page {page}");
    }
    assert_eq!(t.fill.stats.late, 5);
}

#[test]
fn faults_that_follow_each_other_widen_the_window_and_scattered_ones_narrow_it() {
    let mut due = PageSet::empty(&SIZES);
    due.insert_run(run(0, 400));
    let mut t = T::new();
    t.fill = Fill::new(VmIx(0), SOURCE, due, &[], PATIENCE);
    let mut ahead = |page: u32| {
        t.fault(page, ms(0));
        let d = t.asks(ms(0)).demand;
        assert_eq!((d.urgent, d.pages[0]), (1, at(page)));
        d.pages.len() - 1
    };
    assert_eq!(ahead(0), 4);
    assert_eq!(ahead(5), 8);
    assert_eq!(ahead(14), 16);
    assert_eq!(ahead(300), 8);
    assert_eq!(ahead(200), 4);
    assert_eq!(ahead(100), 2);
}

#[test]
fn a_page_asked_for_ahead_is_asked_for_anew_when_a_vcpu_waits_for_it() {
    let mut t = T::new();
    t.fault(10, ms(0));
    assert!(t.asks(ms(0)).demand.pages.contains(&at(11)));
    t.fault(11, ms(1));
    let d = t.asks(ms(1)).demand;
    assert_eq!((d.urgent, d.pages[0]), (1, at(11)));
    t.fault(11, ms(2));
    assert_eq!(t.asks(ms(2)).demand.urgent, 0, "a second vCPU that waits for it changes nothing");
    // A source that does not answer is asked again.
    let again = t.asks(ms(501)).demand;
    assert!(again.pages[..again.urgent].contains(&at(10)) && again.pages[..again.urgent].contains(&at(11)));
}

#[test]
fn a_lost_source_costs_time_only() {
    let mut t = T::new();
    t.remote(50, 3, ms(0));
    t.fault(10, ms(0));
    assert_eq!(t.asks(ms(0)).demand.urgent, 1);
    t.fill.lost();
    t.fault(12, ms(1));
    t.fault(50, ms(1));
    let asks = t.asks(ms(5000));
    assert_eq!((asks.demand.pages.len(), asks.hurry.len()), (0, 1), "other target hosts are still there");
    t.asks(ms(5010));
    t.asks(ms(5020));
    assert_eq!(t.asks(ms(5030)).hurry.len(), 1, "and are asked again in turn");
    let lacks = t.fill.reconnected();
    assert_eq!(lacks.len(), t.fill.lacking());
    assert!(lacks.contains(at(50)) && lacks.contains(at(10)));
    let d = t.asks(ms(5031)).demand;
    assert!(d.pages[..d.urgent].contains(&at(10)) && d.pages[..d.urgent].contains(&at(12)));
}

#[test]
fn what_was_asked_for_on_a_connection_that_another_replaces_is_asked_for_again() {
    let mut t = T::new();
    t.fault(10, ms(0));
    t.asks(ms(0));
    // The source calls before this side has seen that the last connection is lost.
    t.fill.reconnected();
    let again = t.asks(ms(1)).demand;
    assert!(again.urgent > 0 && again.pages[..again.urgent].contains(&at(10)), "{again:?}");
}

#[test]
fn pages_that_waited_at_the_switch_go_on_waiting() {
    let mut t = T::new();
    let key = Key::Digest(digest(3));
    t.fill
        .take_over(&mut t.host, vec![(at(90), Some(key)), (at(10), Some(key)), (at(11), None)], ms(0))
        .unwrap();
    assert_eq!(t.fill.lacking(), 21, "10 and 11 are due anew");
    t.content(3, ms(1));
    assert_eq!(t.ready(), [at(90)]);
    let broken = t.fill.take_over(&mut t.host, vec![(at(91), None)], ms(0));
    assert_eq!(broken, Err(TargetError::BrokenPromise { block: 0, page: 91 }));
}

#[test]
fn the_source_sends_what_is_waited_for_first_and_then_goes_on_from_there() {
    let mut all = PageSet::empty(&SIZES);
    all.insert_run(run(0, 400));
    let mut s = Serve::new(all);
    s.begin_with([at(300), at(301)]);
    let fill = |s: &mut Serve, n| {
        let mut v = Vec::new();
        s.fill(n, &mut v);
        v.iter().map(|a| a.page).collect::<Vec<_>>()
    };
    assert_eq!(fill(&mut s, 3), [300, 301, 0], "the forward order first");
    s.demand(&Demand { urgent: 1, pages: vec![at(100), at(101), at(102)] }).unwrap();
    s.demand(&Demand { urgent: 2, pages: vec![at(7), at(102)] }).unwrap();
    let next: Vec<_> = std::iter::from_fn(|| s.next_wanted()).map(|(a, u)| (a.page, u)).collect();
    assert_eq!(next, [(100, true), (7, true), (102, true), (101, false)]);
    assert_eq!(fill(&mut s, 2), [103, 104], "from the last fault on");
    s.demand(&Demand { urgent: 1, pages: vec![at(103)] }).unwrap();
    assert_eq!(s.next_wanted(), None, "has been sent");
    s.left_by_name(at(104));
    s.demand(&Demand { urgent: 1, pages: vec![at(104)] }).unwrap();
    assert_eq!(s.next_wanted(), Some((at(104), true)), "only its name has");
    let nowhere = Demand { urgent: 0, pages: vec![at(1), at(400)] };
    assert_eq!(s.demand(&nowhere), Err(source::NoSuchPage { block: 0, page: 400 }));
    assert!(!s.wanted());
    let mut lacks = PageSet::empty(&SIZES);
    lacks.insert(at(0));
    s.resume(lacks);
    assert_eq!(fill(&mut s, 9), [0]);
    assert_eq!(s.left(), 0);
}

proptest! {
    /// Whatever is asked for in whatever order, and however often the target starts over: between two starts no content
    /// leaves twice, and in the end all have left.
    #[test]
    fn every_content_leaves_once(
        come in prop::collection::vec((0..380u32, 1..40u32), 1..8),
        ops in prop::collection::vec((0..8u8, prop::collection::vec(0..400u32, 0..12), 0..9usize), 0..60),
    ) {
        let mut due = PageSet::empty(&SIZES);
        come.iter().for_each(|(p, n)| { due.insert_run(run(*p, (*n).min(400 - p))); });
        let mut s = Serve::new(due.clone());
        let mut sent: HashMap<PageAddr, u32> = HashMap::new();
        let mut named = PageSet::empty(&SIZES);
        for (op, pages, n) in ops {
            match op {
                0..=3 => {
                    let pages: Vec<_> = pages.into_iter().map(at).collect();
                    s.demand(&Demand { urgent: n.min(pages.len()), pages }).unwrap();
                }
                4 | 5 => {
                    if let Some((a, _)) = s.next_wanted() {
                        *sent.entry(a).or_default() += 1;
                    }
                }
                6 => {
                    let mut v = Vec::new();
                    s.fill(n, &mut v);
                    for a in v {
                        prop_assert!(due.contains(a), "the filling sends what is due only");
                        if a.page % 3 == 0 && named.insert(a) {
                            s.left_by_name(a);
                        } else {
                            *sent.entry(a).or_default() += 1;
                        }
                    }
                }
                _ => {
                    // A start over: what has not arrived is lacking, here every page that was not sent.
                    if n == 0 {
                        let mut lacks = due.clone();
                        sent.keys().for_each(|a| { lacks.remove(*a); });
                        s.resume(lacks.clone());
                        due = lacks;
                        named = PageSet::empty(&SIZES);
                        sent.clear();
                    }
                }
            }
            prop_assert!(sent.values().all(|n| *n == 1), "{sent:?}");
        }
        while let Some((a, _)) = s.next_wanted() {
            *sent.entry(a).or_default() += 1;
        }
        let mut v = Vec::new();
        s.fill(1000, &mut v);
        v.into_iter().for_each(|a| *sent.entry(a).or_default() += 1);
        prop_assert!(sent.values().all(|n| *n == 1));
        prop_assert!(due.runs().flat_map(Run::pages).all(|a| sent.contains_key(&a) || named.contains(a)));
    }
}

#[test]
fn pages_that_leave_by_name_ahead_of_the_filling_leave_once_and_may_be_asked_for() {
    let mut due = PageSet::empty(&SIZES);
    for page in [3, 4, 5, 60] {
        due.insert(PageAddr { block: BlockIx(0), page });
    }
    let mut serve = Serve::new(due);
    let mut seen = Vec::new();
    let next = serve.peek(PageAddr { block: BlockIx(0), page: 4 }, 2, &mut seen);
    assert_eq!(seen.iter().map(|a| a.page).collect::<Vec<_>>(), [4, 5]);
    seen.truncate(1);
    serve.by_name(seen[0]);
    seen.clear();
    assert_eq!(serve.peek(next.unwrap(), 10, &mut seen), None, "there is no more");
    assert_eq!(seen.iter().map(|a| a.page).collect::<Vec<_>>(), [60]);
    let mut rest = Vec::new();
    serve.fill(10, &mut rest);
    assert_eq!(rest.iter().map(|a| a.page).collect::<Vec<_>>(), [3, 5, 60]);
    let four = PageAddr { block: BlockIx(0), page: 4 };
    serve.demand(&Demand { pages: vec![four], urgent: 1 }).unwrap();
    assert_eq!(serve.next_wanted(), Some((four, true)));
    assert_eq!((serve.next_wanted(), serve.left()), (None, 0));
}

/// The store ends with its agent: a page whose content was only there came back as zeros after the agent's restart.
#[test]
fn what_the_next_agent_must_fill_includes_pages_whose_content_is_in_the_store() {
    let mut t = T::new();
    t.host.content(true, digest(7), &bytes(7), &mut vec![]);
    let key = Key::Digest(digest(7));
    t.fill.take_over(&mut t.host, vec![(at(90), Some(key))], ms(0)).unwrap();
    assert!(!t.fill.lacks().contains(at(90)), "its source need not send it");
    assert!(t.fill.absent().contains(at(90)) && t.fill.absent().contains(at(10)));
    assert!(!t.fill.absent().contains(at(91)));
}
