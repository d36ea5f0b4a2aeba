//! Rounds against writers under a virtual clock.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PAGES: &[u32] = &[200, 0, 70];
const WIRE: f64 = 4104.0 * 1000.0;

fn limits() -> Limits {
    Limits { downtime: 0.02, rounds: MAX_ROUNDS }
}

/// A VM with its log, and what its target has: versions of pages instead of contents.
struct World {
    memory: HashMap<PageAddr, u64>,
    log: BTreeSet<PageAddr>,
    target: HashMap<PageAddr, u64>,
    sent: HashMap<PageAddr, u32>,
    now: Nanos,
    wire: u64,
    rate: WireRate,
    version: u64,
}

impl World {
    fn new() -> Self {
        Self {
            memory: HashMap::new(),
            log: BTreeSet::new(),
            target: HashMap::new(),
            sent: HashMap::new(),
            now: Nanos(0),
            wire: 0,
            rate: WireRate::default(),
            version: 0,
        }
    }

    fn write(&mut self, addr: PageAddr) {
        self.version += 1;
        self.memory.insert(addr, self.version);
        self.log.insert(addr);
    }

    fn harvest(&mut self, p: &mut Precopy) {
        let mut bits: Vec<Vec<u64>> = PAGES.iter().map(|n| vec![0; n.div_ceil(64) as usize]).collect();
        for a in std::mem::take(&mut self.log) {
            bits[usize::from(a.block.0)][a.page as usize / 64] |= 1 << (a.page % 64);
        }
        for (block, words) in bits.iter().enumerate() {
            p.written(block, words);
        }
    }

    /// Sends up to `max` pages; `between` runs after the pages were taken and read.
    fn send(&mut self, p: &mut Precopy, max: usize, between: &mut dyn FnMut(&mut Self)) {
        let mut taken = Vec::new();
        p.take(max, &mut taken);
        let read: Vec<(PageAddr, u64)> =
            taken.iter().map(|a| (*a, self.memory.get(a).copied().unwrap_or(0))).collect();
        between(self);
        for (addr, version) in read {
            self.target.insert(addr, version);
            *self.sent.entry(addr).or_default() += 1;
            self.wire += 4104;
            self.now = Nanos(self.now.0 + (4104.0 / WIRE * 1e9) as u64);
        }
    }

    /// Runs to the end; `guest` is called at every step with the VM running.
    fn run(&mut self, p: &mut Precopy, window: usize, guest: &mut dyn FnMut(&mut Self)) -> Nanos {
        let mut down = None;
        for _ in 0..200_000 {
            match p.step(self.now) {
                Step::Send if down.is_some() => self.send(p, window, &mut |_| {}),
                Step::Send => self.send(p, window, guest),
                Step::Harvest => {
                    guest(self);
                    self.harvest(p);
                    let rate = self.rate.measure(self.now, self.wire);
                    p.harvested(self.now, rate, true);
                }
                Step::Wait(until) => {
                    assert!(until > self.now, "waits for the past");
                    self.now = until;
                    guest(self);
                }
                Step::Stop => {
                    guest(self);
                    down = Some(self.now);
                    self.harvest(p);
                    p.stopped();
                }
                Step::Over => {
                    let all = PAGES.iter().map(|n| u64::from(*n)).sum::<u64>();
                    assert_eq!(self.target.len() as u64, all, "a page never left");
                    for (addr, version) in &self.memory {
                        assert_eq!(self.target[addr], *version, "{addr:?}");
                    }
                    return Nanos(self.now.0 - down.expect("stopped").0);
                }
            }
        }
        panic!("no end: round {}, {} left", p.round(), p.remaining());
    }
}

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}

#[test]
fn an_idle_guest_is_sent_once_and_hardly_stopped() {
    let (mut w, mut p) = (World::new(), Precopy::new(PAGES, limits()));
    let down = w.run(&mut p, 16, &mut |_| {});
    assert!(w.sent.values().all(|n| *n == 1));
    assert!(down.0 < 1_000_000, "{down:?}");
    assert_eq!((p.held(), p.gave_in()), (0, false));
}

#[test]
fn a_hot_page_is_held_back_and_sent_last_and_leaves_when_it_calms_down() {
    let (mut w, mut p) = (World::new(), Precopy::new(PAGES, Limits { downtime: 0.0005, ..limits() }));
    let hot = at(2, 60);
    let mut beats = 0;
    w.run(&mut p, 16, &mut |w| {
        beats += 1;
        // Written all the time until the first round is long over.
        if beats < 60 {
            w.write(hot);
        }
    });
    assert!(w.sent[&hot] <= 2, "sent {} times", w.sent[&hot]);
    assert!(!p.gave_in(), "it calmed down, so it needed no force: round {}", p.round());

    let (mut w, mut p) = (World::new(), Precopy::new(PAGES, Limits { downtime: 0.0005, rounds: 8 }));
    // Enough hot pages that they never fit, for ever: the bound on rounds ends it.
    w.run(&mut p, 16, &mut |w| (0..40).for_each(|n| w.write(at(0, n))));
    assert!(p.gave_in());
    let most = (0..40).map(|n| w.sent[&at(0, n)]).max();
    assert!(most <= Some(4), "sent {most:?} times in {} rounds", p.round());
}

#[test]
fn it_stops_when_the_rest_fits_the_wire_and_not_before() {
    for (writes, fits) in [(2, true), (60, false)] {
        let (mut w, mut p) = (World::new(), Precopy::new(PAGES, limits()));
        let mut n = 0;
        let down = w.run(&mut p, 8, &mut |w| {
            for _ in 0..writes {
                n += 7;
                w.write(at(0, n % 200));
            }
        });
        assert_eq!(!p.gave_in(), fits, "{writes} pages at a time");
        if fits {
            // 20 ms, and what is written between the last harvest and the stop.
            assert!(down.0 < 30_000_000, "{down:?}");
        }
    }
}

#[test]
fn a_target_that_waits_holds_the_stop_back() {
    let (mut w, mut p) = (World::new(), Precopy::new(PAGES, limits()));
    while p.step(w.now) != Step::Stop {
        match p.step(w.now) {
            Step::Send => w.send(&mut p, 64, &mut |_| {}),
            Step::Wait(until) => w.now = until,
            _ => {
                w.harvest(&mut p);
                let rate = w.rate.measure(w.now, w.wire);
                p.harvested(w.now, rate, w.now.0 > 3_000_000_000);
            }
        }
    }
    assert!(w.now.0 > 3_000_000_000 && !p.gave_in());
}

#[test]
fn the_wire_is_as_fast_as_it_was_when_it_was_busy() {
    let mut r = WireRate::default();
    let ms = |n: u64| Nanos(n * 1_000_000);
    assert!(r.measure(ms(0), 0) == 0.0);
    assert!((r.measure(ms(100), 1_000_000) - 1e7).abs() < 1.0);
    assert!(r.measure(ms(150), 1_000_000) > 9.9e6, "within a beat nothing is concluded");
    let idle = r.measure(ms(1100), 1_000_000);
    assert!((9.0e6..1.0e7).contains(&idle), "{idle}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_newest_version_of_every_page_arrives_whoever_writes_when(
        writes in prop::collection::vec((0..2u16, 0..200u32, 0..12u8), 1..600),
        window in 1..100usize,
        downtime in prop::sample::select(vec![0.0, 0.001, 0.02, 0.5]),
        rounds in 1..12u32,
    ) {
        let (mut w, mut p) = (World::new(), Precopy::new(PAGES, Limits { downtime, rounds }));
        let mut writes = writes.into_iter().cycle();
        w.run(&mut p, window, &mut |w| {
            let Some((block, page, burst)) = writes.next() else { return };
            for n in 0..u32::from(burst) {
                let addr = if block == 0 { at(0, (page + n) % 200) } else { at(2, (page + n) % 70) };
                w.write(addr);
            }
        });
    }
}
