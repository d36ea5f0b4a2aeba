//! Racks of hosts that multicast to each other under a virtual clock, over links that lose, delay, double and damage
//! packets, and hosts that fall silent.

use super::rate::Rate;
use super::receiver::Receiver;
use super::sender::{Sender, Step};
use super::{HELD_BYTES, MS, RING_BLOCKS, RING_BYTES, after};
use crate::digest::Digest;
use crate::index::HostSet;
use crate::units::{HostIx, Nanos};
use crate::wire::cast::{Cast, CastKey, Data, Report, decode, encode};
use proptest::prelude::*;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// What happens to a packet, in thousandths, and how long it takes.
#[derive(Clone, Copy, Debug)]
struct Link {
    lost: u64,
    doubled: u64,
    damaged: u64,
    /// Microseconds, and up to so many more, so that packets overtake each other.
    delay: u64,
    jitter: u64,
}

const CLEAN: Link = Link { lost: 0, doubled: 0, damaged: 0, delay: 200, jitter: 0 };

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

struct Host {
    sender: Sender,
    receiver: Receiver,
    /// Blocks still to be given to the sender.
    queue: Vec<(HostSet, Vec<u8>)>,
    /// Hears nothing from here on.
    dead: Option<Nanos>,
    got: BTreeMap<Digest, u32>,
}

/// When a packet arrives, its number, where, and its bytes.
type InAir = (u64, u64, usize, Vec<u8>);

struct Rack {
    key: CastKey,
    hosts: Vec<Host>,
    link: Link,
    random: Random,
    now: Nanos,
    air: BinaryHeap<Reverse<InAir>>,
    sent: u64,
    /// (who, what) was handed over to unicast.
    handed: BTreeSet<(u16, Digest)>,
    /// Who needs what, and who sends it.
    needs: BTreeMap<(u16, Digest), u16>,
    refused: u64,
    recorded: Vec<(usize, Vec<u8>)>,
}

fn digest(bytes: &[u8]) -> Digest {
    let mut d = [0; 20];
    d.copy_from_slice(&blake3::hash(bytes).as_bytes()[..20]);
    Digest(d)
}

impl Rack {
    fn new(hosts: u16, link: Link, seed: u64) -> Self {
        let key = CastKey::new(&[9; 32]);
        let host = |me: u16| Host {
            sender: Sender::new(
                HostIx(me),
                hosts,
                key.clone(),
                1472,
                Rate::new(500_000, 12_500_000, Nanos(0)),
                Nanos(0),
            ),
            receiver: Receiver::new(HostIx(me), hosts, HELD_BYTES, seed ^ u64::from(me)),
            queue: Vec::new(),
            dead: None,
            got: BTreeMap::new(),
        };
        Self {
            hosts: (0..hosts).map(host).collect(),
            key,
            link,
            random: Random(seed),
            now: Nanos(0),
            air: BinaryHeap::new(),
            sent: 0,
            handed: BTreeSet::new(),
            needs: BTreeMap::new(),
            refused: 0,
            recorded: Vec::new(),
        }
    }

    /// Gives host `from` blocks of random bytes for random sets of other hosts.
    fn load(&mut self, from: u16, blocks: usize, length: u64) {
        let n = self.hosts.len() as u64;
        for _ in 0..blocks {
            let length = 1 + self.random.below(length);
            // No two alike: whoever gets both would have got one twice.
            let number = [from.to_be_bytes(), (self.needs.len() as u16).to_be_bytes()].concat();
            let random = (0..length).map(|_| self.random.below(256) as u8);
            let bytes: Vec<u8> = number.into_iter().chain(random).collect();
            let mut hosts: HostSet =
                (0..n as u16).filter(|h| *h != from && self.random.below(4) > 0).map(HostIx).collect();
            while hosts.len() < 2 {
                let h = self.random.below(n) as u16;
                if h != from {
                    hosts.insert(HostIx(h));
                }
            }
            self.needs.extend(hosts.iter().map(|h| ((h.0, digest(&bytes)), from)));
            self.hosts[usize::from(from)].queue.push((hosts, bytes));
        }
    }

    fn post(&mut self, to: usize, bytes: &[u8]) {
        let mut copies = 1;
        if self.random.below(1000) < self.link.lost {
            copies = 0;
        } else if self.random.below(1000) < self.link.doubled {
            copies = 2;
        }
        for _ in 0..copies {
            let mut bytes = bytes.to_vec();
            if self.random.below(1000) < self.link.damaged {
                let at = self.random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << self.random.below(8);
            }
            let at = self.now.0 + (self.link.delay + self.random.below(self.link.jitter + 1)) * 1000;
            self.sent += 1;
            self.air.push(Reverse((at, self.sent, to, bytes)));
        }
    }

    fn arrive(&mut self, to: usize, bytes: &[u8]) {
        let now = self.now;
        let host = &mut self.hosts[to];
        if host.dead.is_some_and(|t| now >= t) {
            return;
        }
        let mut bytes = bytes.to_vec();
        let Ok((from, cast)) = decode(&self.key, &mut bytes) else {
            self.refused += 1;
            return;
        };
        match cast {
            Cast::Data(d) => {
                if let Some(block) = host.receiver.data(from, &d, now) {
                    *host.got.entry(digest(&block)).or_default() += 1;
                }
            }
            Cast::Announce { count, next } => host.receiver.announce(from, count, next, now),
            Cast::Report(r) => host.sender.report(from, &r, now),
            Cast::Skip(blocks) => host.receiver.skip(from, &blocks, now),
        }
        assert!(host.receiver.held() <= HELD_BYTES && host.sender.kept() <= RING_BYTES);
    }

    /// One round over the hosts; when something happens next.
    fn turn(&mut self) -> Nanos {
        let mut next = after(self.now, 50 * MS);
        for i in 0..self.hosts.len() {
            let now = self.now;
            if self.hosts[i].dead.is_some_and(|t| now >= t) {
                continue;
            }
            loop {
                let host = &mut self.hosts[i];
                // As the threads do: nothing is sent before it is known who hears, and what too few hear goes by unicast.
                while host.sender.takes() && now.0 >= 300 * MS {
                    let Some((hosts, bytes)) = host.queue.pop() else { break };
                    let hearers = host.sender.hearers();
                    let (mut mine, d) = (HostSet::new(), digest(&bytes));
                    for h in hosts.iter() {
                        if hearers.contains(h) {
                            mine.insert(h);
                        } else {
                            self.handed.insert((h.0, d));
                        }
                    }
                    if !mine.is_empty() {
                        host.sender.push(0, vec![d], mine, bytes, now);
                    }
                }
                for h in host.sender.take_handed() {
                    self.handed.extend(h.digests.iter().map(|d| (h.host.0, *d)));
                }
                let mut out = Vec::new();
                match host.sender.step(now, &mut out) {
                    Step::Wait(t) => {
                        next = next.min(t);
                        break;
                    }
                    Step::To(h) => self.post(usize::from(h.0), &out),
                    Step::Group => {
                        if self.recorded.len() < 2000 {
                            self.recorded.push((i, out.clone()));
                        }
                        (0..self.hosts.len()).filter(|to| *to != i).for_each(|to| self.post(to, &out));
                    }
                }
            }
            let mut reports = Vec::new();
            self.hosts[i].receiver.reports(now, &mut reports);
            for (to, r) in reports {
                let mut out = Vec::new();
                encode(&self.key, HostIx(i as u16), &Cast::Report(r), &mut out);
                self.post(usize::from(to.0), &out);
            }
            next = self.hosts[i].receiver.wake_at().map_or(next, |t| next.min(t));
        }
        next
    }

    /// Runs until everything needed has come or was handed over, and everybody knows.
    fn run(&mut self, seconds: u64) {
        let over = Nanos(seconds * 1000 * MS);
        while self.now < over {
            let next = self.turn();
            let arrival = self.air.peek().map(|a| Nanos(a.0.0));
            self.now = arrival.map_or(next, |a| a.min(next)).max(self.now);
            while self.air.peek().is_some_and(|a| a.0.0 <= self.now.0) {
                let Some(Reverse((_, _, to, bytes))) = self.air.pop() else { break };
                self.arrive(to, &bytes);
            }
            let quiet =
                self.hosts.iter().all(|h| h.dead.is_some() || (h.queue.is_empty() && h.sender.kept() == 0));
            if self.now.0 > 500 * MS && quiet && self.missing().is_empty() {
                return;
            }
        }
        panic!("still missing after {seconds} s: {:?}", self.missing().len());
    }

    fn missing(&self) -> Vec<(u16, Digest)> {
        let dead = |h: u16| self.hosts[usize::from(h)].dead.is_some();
        let here = |(h, d): (u16, Digest), from: u16| {
            let host = &self.hosts[usize::from(h)];
            dead(h) || dead(from) || host.got.contains_key(&d) || self.handed.contains(&(h, d))
        };
        self.needs.iter().filter(|(n, from)| !here(**n, **from)).map(|(n, _)| *n).collect()
    }

    /// Nobody got anything twice, or what it does not need.
    fn check(&self) {
        for (h, host) in (0u16..).zip(&self.hosts) {
            for (d, times) in &host.got {
                assert_eq!(*times, 1, "host {h} was given a block twice");
                assert!(self.needs.contains_key(&(h, *d)), "host {h} was given what is not for it");
            }
        }
    }

    /// Fragments sent again by fragments.
    fn repaired(&self) -> f64 {
        let sum = |f: fn(&Sender) -> u64| self.hosts.iter().map(|h| f(&h.sender)).sum::<u64>() as f64;
        sum(|s| s.stats.repairs) / sum(|s| s.stats.fragments)
    }
}

#[test]
fn a_clean_network_repairs_nothing_and_hands_nothing_over() {
    let mut rack = Rack::new(4, CLEAN, 1);
    (0..4).for_each(|h| rack.load(h, 60, 60_000));
    rack.run(60);
    rack.check();
    assert!(rack.handed.is_empty() && rack.repaired() < 1e-9, "{} {}", rack.handed.len(), rack.repaired());
}

#[test]
fn one_percent_of_loss_costs_about_as_much() {
    let link = Link { lost: 10, jitter: 300, ..CLEAN };
    let mut rack = Rack::new(4, link, 2);
    (0..4).for_each(|h| rack.load(h, 100, 100_000));
    rack.run(120);
    rack.check();
    assert!(rack.handed.is_empty(), "{} handed over", rack.handed.len());
    // Three receivers lose 1 % each; a few repairs are lost themselves.
    assert!((0.01..0.045).contains(&rack.repaired()), "{}", rack.repaired());
}

#[test]
fn who_falls_silent_is_served_by_unicast_and_stops_nobody() {
    let mut rack = Rack::new(4, Link { lost: 10, ..CLEAN }, 3);
    rack.load(0, 400, 100_000);
    rack.hosts[2].dead = Some(Nanos(900 * MS));
    rack.run(60);
    rack.check();
    assert!(rack.handed.iter().all(|(h, _)| *h == 2) && !rack.handed.is_empty());
    assert!(rack.now.0 < 20_000 * MS, "{:?}", rack.now);
}

#[test]
fn who_hears_no_multicast_is_never_counted_on() {
    let mut rack = Rack::new(3, CLEAN, 4);
    rack.hosts[1].dead = Some(Nanos(0));
    rack.load(0, 20, 50_000);
    rack.run(20);
    assert!(rack.handed.iter().all(|(h, _)| *h == 1));
    assert!(!rack.hosts[0].sender.hearers().contains(HostIx(1)));
}

#[test]
fn what_is_sent_again_by_others_changes_nothing() {
    let mut rack = Rack::new(3, CLEAN, 5);
    rack.load(0, 50, 50_000);
    rack.run(20);
    let (got, old) = (rack.hosts[1].got.clone(), std::mem::take(&mut rack.recorded));
    let before = rack.hosts[1].receiver.stats;
    old.iter().filter(|(from, _)| *from == 0).for_each(|(_, bytes)| rack.arrive(1, bytes));
    assert_eq!(rack.hosts[1].got, got);
    let stats = rack.hosts[1].receiver.stats;
    assert!(stats.duplicates > before.duplicates && stats.refused > before.refused, "{stats:?}");
    assert_eq!(rack.hosts[1].receiver.held(), 0);
    // And nobody answers: no question comes of it.
    let mut reports = Vec::new();
    rack.hosts[1].receiver.reports(after(rack.now, 1000 * MS), &mut reports);
    assert!(reports.iter().all(|(_, r)| r.misses.is_empty()), "{reports:?}");
}

#[test]
fn members_that_lie_are_held_within_the_bounds() {
    let (mut r, now) = (Receiver::new(HostIx(0), 3, 100_000, 1), Nanos(0));
    let page = [0u8; 1000];
    let data =
        |block, total, hosts: HostSet| Data { block, total, size: 1000, fragment: 0, hosts, payload: &page };
    let mine = HostSet::one(HostIx(0));
    // Not announced, not a host, itself: nothing is kept.
    for from in [1, 0, 3, 900] {
        assert!(r.data(HostIx(from), &data(0, 90_000, mine.clone()), now).is_none());
    }
    r.announce(HostIx(1), 1, 0, now);
    // Beyond any ring.
    r.data(HostIx(1), &data(RING_BLOCKS as u32, 90_000, mine.clone()), now);
    assert_eq!(r.held(), 0);
    // The bound holds over all blocks; the same block with another length is refused.
    for block in 0..20 {
        r.data(HostIx(1), &data(block, 90_000, mine.clone()), now);
        r.data(HostIx(1), &data(block, 10_000, mine.clone()), now);
        assert!(r.held() <= 100_000);
    }
    assert!(r.stats.crowded > 0 && r.stats.refused > 0);
    // What was held for a block that turns out not to be for this host, or is to be skipped, is let go.
    r.skip(HostIx(1), &[0], now);
    (1..20).for_each(|b| {
        r.data(HostIx(1), &data(b, 90_000, HostSet::one(HostIx(2))), now);
    });
    assert_eq!(r.held(), 0);
    // A sender does not believe reports of blocks that it never sent, of itself, or of hosts that are none.
    let rate = Rate::new(1, 1000, now);
    let mut s = Sender::new(HostIx(0), 3, CastKey::new(&[0; 32]), 1472, rate, now);
    let report = |count, below, end| Report { count, below, end, misses: Vec::new() };
    for (from, r) in [(1, report(1, 1, 1)), (1, report(1, 0, 1)), (0, report(1, 0, 0)), (3, report(1, 0, 0))]
    {
        s.report(HostIx(from), &r, now);
    }
    assert!(s.hearers().is_empty() && s.stats.refused == 4);
    s.report(HostIx(1), &report(1, 0, 0), now);
    s.report(HostIx(1), &report(1, 0, 0), now);
    assert_eq!((s.hearers(), s.stats.refused), (HostSet::one(HostIx(1)), 5));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    // bounds: proptest draws each of them
    /// Whatever the links do, every block gets to every host that needs it exactly once, or is handed over.
    #[test]
    fn everything_arrives_once_or_is_handed_over(
        seed in any::<u64>(),
        hosts in 3u16..7,
        lost in 0u64..400,
        doubled in 0u64..300,
        damaged in 0u64..200,
        jitter in 0u64..20_000,
        blocks in 1usize..60,
        length in 1u64..60_000,
        dies in prop::option::of(0u64..3000),
    ) {
        let mut rack = Rack::new(hosts, Link { lost, doubled, damaged, delay: 100, jitter }, seed);
        for h in 0..hosts {
            rack.load(h, blocks / usize::from(h + 1), length);
        }
        rack.hosts[1].dead = dies.map(|ms| Nanos(ms * MS));
        rack.run(600);
        rack.check();
    }
}
