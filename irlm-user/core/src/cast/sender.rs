//! What one target host has sent to the others by multicast: which block is still missing where, what is repaired and
//! how, and when a host is better served by unicast.

use super::rate::Rate;
use super::{MS, RING_BLOCKS, RING_BYTES, after, earlier, since};
use crate::digest::Digest;
use crate::index::HostSet;
use crate::units::{HostIx, Nanos};
use crate::wire::cast::{
    Cast, CastKey, Data, Fragments, MAX_BLOCK, MAX_DATAGRAM, MAX_FRAGMENTS, MAX_SKIPS, Report, data_overhead,
    encode, fragments,
};
use std::collections::{BTreeMap, VecDeque};

/// After so many questions for the same block a host gets its contents by unicast.
const TRIES: u8 = 6;
/// How long others may ask for the same before it is repaired: one that asks alone is answered alone.
const GATHER: u64 = 6 * MS;
/// A question for what was repaired for all so shortly before was on its way when the repair was.
const MENDED: u64 = 20 * MS;
/// A host from which something is still to be heard, and is not for so long, is served by unicast.
const SILENT: u64 = 1_200 * MS;
/// A host that has not been heard for so long does not count as hearing.
const FORGOTTEN: u64 = 7_000 * MS;
/// The first announcement after a burst, and how far apart later ones are while something is to be heard, and when not.
const ANNOUNCE: u64 = 8 * MS;
const ANNOUNCE_ASKING: u64 = 160 * MS;
const ANNOUNCE_IDLE: u64 = 2_000 * MS;
/// Blocks that wait for their first fragment to leave: one is sent while the next is compressed.
const WAITING: usize = 2;
/// Bytes of IP and UDP and Ethernet around a datagram, for the pace.
const AROUND: usize = 42;

/// Counters.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Blocks sent.
    pub blocks: u64,
    /// Contents in them.
    pub contents: u64,
    /// Fragments sent for the first time.
    pub fragments: u64,
    /// Bytes of them, as datagrams.
    pub bytes: u64,
    /// Fragments sent again, to all or to one.
    pub repairs: u64,
    /// Bytes of them.
    pub repair_bytes: u64,
    /// Bytes of announcements and skips.
    pub other_bytes: u64,
    /// Contents handed over to unicast, once for each host.
    pub handed: u64,
    /// Reports that say what cannot be: old ones sent again, or of blocks that were never sent.
    pub refused: u64,
}

/// Contents that a host is to get by unicast after all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Handed {
    /// Who.
    pub host: HostIx,
    /// Their trust domain.
    pub domain: u16,
    /// What.
    pub digests: Vec<Digest>,
}

/// What to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Send the datagram to the group.
    Group,
    /// Send it to one host.
    To(HostIx),
    /// Nothing before this time, or before something happens.
    Wait(Nanos),
}

#[derive(Debug)]
struct Peer {
    heard: Nanos,
    /// Reports heard of it.
    count: u32,
    /// It has every block below this one.
    below: u32,
    hears: bool,
    /// Fragments it said it missed since the rate was looked at.
    lost: u64,
    skips: Vec<u32>,
}

#[derive(Debug)]
struct Block {
    domain: u16,
    digests: Vec<Digest>,
    hosts: HostSet,
    /// Those that have not said that they have it.
    pending: HostSet,
    bytes: Vec<u8>,
    size: u16,
    /// Fragments sent so far, and when the first was.
    sent: u16,
    since: Nanos,
    /// To be sent again, from when on, and who asked.
    repair: Fragments,
    repair_at: Option<Nanos>,
    asked_by: HostSet,
    /// Sent again to all, and when last.
    mended: Fragments,
    mended_at: Nanos,
    tries: BTreeMap<HostIx, u8>,
}

impl Block {
    fn count(&self) -> u16 {
        fragments(self.bytes.len() as u32, self.size) as u16
    }
    fn whole(&self) -> bool {
        self.sent >= self.count()
    }
}

/// One host's mouth.
#[derive(Debug)]
pub struct Sender {
    me: HostIx,
    hosts: u16,
    key: CastKey,
    payload: usize,
    rate: Rate,
    peers: BTreeMap<HostIx, Peer>,
    /// Number of the oldest block in the ring, and of the next new one.
    first: u32,
    ring: VecDeque<Block>,
    ring_bytes: usize,
    announced: u32,
    announce_at: Nanos,
    announce_gap: u64,
    handed: Vec<Handed>,
    /// Counters.
    pub stats: Stats,
}

impl Sender {
    /// Host `me` of `hosts`, whose datagrams have at most `payload` bytes, MAC included.
    #[must_use]
    pub fn new(me: HostIx, hosts: u16, key: CastKey, payload: usize, rate: Rate, now: Nanos) -> Self {
        let payload = payload.clamp(MAX_BLOCK / MAX_FRAGMENTS + 200, MAX_DATAGRAM);
        Self {
            me,
            hosts,
            key,
            payload,
            rate,
            peers: BTreeMap::new(),
            first: 0,
            ring: VecDeque::new(),
            ring_bytes: 0,
            announced: 0,
            announce_at: now,
            announce_gap: ANNOUNCE,
            handed: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Hosts that hear this one.
    #[must_use]
    pub fn hearers(&self) -> HostSet {
        self.peers.iter().filter(|(_, p)| p.hears).map(|(h, _)| *h).collect()
    }

    /// Bytes a second now.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate.rate()
    }

    /// Bytes of blocks kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.ring_bytes
    }

    fn next(&self) -> u32 {
        self.first + self.ring.len() as u32
    }

    /// Whether another block may be given now.
    #[must_use]
    pub fn takes(&self) -> bool {
        let behind = self.peers.values().filter(|p| p.hears).map(|p| p.below).min();
        let ahead = self.next() - behind.unwrap_or(self.first).min(self.first);
        self.ring_bytes + MAX_BLOCK <= RING_BYTES
            && (ahead as usize) < RING_BLOCKS
            && self.ring.iter().rev().take(WAITING).filter(|b| b.sent == 0).count() < WAITING
    }

    /// A block for `hosts`; what it holds is `digests`. Those that do not hear any more are served by unicast.
    pub fn push(&mut self, domain: u16, digests: Vec<Digest>, hosts: HostSet, bytes: Vec<u8>, now: Nanos) {
        debug_assert!(bytes.len() <= MAX_BLOCK && !bytes.is_empty());
        self.stats.blocks += 1;
        self.stats.contents += digests.len() as u64;
        self.ring_bytes += bytes.len();
        let size = (self.payload - data_overhead(&hosts)) as u16;
        let mut pending = hosts.clone();
        for host in hosts.iter().filter(|h| self.peers.get(h).is_none_or(|p| !p.hears)) {
            pending.remove(host);
            self.stats.handed += digests.len() as u64;
            self.handed.push(Handed { host, domain, digests: digests.clone() });
        }
        self.ring.push_back(Block {
            domain,
            digests,
            pending,
            hosts,
            bytes,
            size,
            sent: 0,
            since: now,
            repair: Fragments::default(),
            repair_at: None,
            asked_by: HostSet::new(),
            mended: Fragments::default(),
            mended_at: now,
            tries: BTreeMap::new(),
        });
        self.tidy();
    }

    /// A receiver says what it has.
    pub fn report(&mut self, from: HostIx, r: &Report, now: Nanos) {
        let next = self.next();
        if from == self.me || from.0 >= self.hosts || r.below > next || r.end > next {
            self.stats.refused += 1;
            return;
        }
        let p = self.peers.entry(from).or_insert_with(|| Peer {
            heard: now,
            count: 0,
            below: 0,
            hears: false,
            lost: 0,
            skips: Vec::new(),
        });
        if r.count <= p.count {
            self.stats.refused += 1;
            return;
        }
        (p.count, p.heard, p.below, p.hears) = (r.count, now, p.below.max(r.below), true);
        for (n, b) in (self.first..).zip(self.ring.iter_mut()) {
            if n < r.end && (n < r.below || !r.misses.iter().any(|m| m.block == n)) {
                b.pending.remove(from);
            }
        }
        for m in &r.misses {
            let at = m.block.checked_sub(self.first).map(|n| n as usize);
            let block = at.map(|n| self.ring.get_mut(n));
            let block = match block {
                // Never sent: the number is made up.
                Some(None) => {
                    self.stats.refused += 1;
                    continue;
                }
                Some(Some(b)) if b.pending.contains(from) => b,
                // Not for this host, or handed over, or so old that all who needed it have it.
                _ => {
                    if p.skips.len() < MAX_SKIPS && !p.skips.contains(&m.block) {
                        p.skips.push(m.block);
                    }
                    continue;
                }
            };
            let mut lost = Fragments::first(block.sent);
            if let Some(fragments) = &m.fragments {
                lost.intersect_with(fragments);
            }
            let tries = block.tries.entry(from).or_default();
            if *tries == 0 {
                p.lost += lost.len() as u64;
            }
            if since(now, block.mended_at) < MENDED {
                lost.subtract(&block.mended);
            }
            if lost.is_empty() {
                continue;
            }
            *tries += 1;
            if *tries > TRIES {
                block.pending.remove(from);
                self.stats.handed += block.digests.len() as u64;
                let (domain, digests) = (block.domain, block.digests.clone());
                self.handed.push(Handed { host: from, domain, digests });
                p.skips.push(m.block);
                continue;
            }
            block.repair.union_with(&lost);
            block.asked_by.insert(from);
            block.repair_at.get_or_insert(after(now, GATHER));
        }
        self.tidy();
    }

    /// Lets go what everybody has. Whoever sees that something of it is missing is told to skip it.
    fn tidy(&mut self) {
        for b in &mut self.ring {
            if b.pending.is_empty() && !b.bytes.is_empty() {
                self.ring_bytes -= b.bytes.len();
                b.bytes = Vec::new();
                (b.repair, b.repair_at) = (Fragments::default(), None);
            }
        }
        while self.ring.front().is_some_and(|b| b.pending.is_empty() && b.bytes.is_empty()) {
            self.ring.pop_front();
            self.first += 1;
        }
    }

    /// Contents that go by unicast after all, since the last call.
    pub fn take_handed(&mut self) -> Vec<Handed> {
        std::mem::take(&mut self.handed)
    }

    /// This host needs no multicast from here on: everything that is not known to have arrived is handed over.
    pub fn give_up(&mut self) {
        let all: Vec<HostIx> = self.peers.keys().copied().collect();
        all.into_iter().for_each(|h| self.deaf(h));
    }

    /// Serves a host by unicast until it is heard again.
    fn deaf(&mut self, host: HostIx) {
        if let Some(p) = self.peers.get_mut(&host) {
            p.hears = false;
        }
        for b in &mut self.ring {
            if b.pending.contains(host) {
                b.pending.remove(host);
                self.stats.handed += b.digests.len() as u64;
                self.handed.push(Handed { host, domain: b.domain, digests: b.digests.clone() });
            }
        }
        self.tidy();
    }

    /// The next datagram to send, written to `out`, or how long to wait.
    pub fn step(&mut self, now: Nanos, out: &mut Vec<u8>) -> Step {
        self.look(now);
        if let Some((host, p)) = self.peers.iter_mut().find(|(_, p)| !p.skips.is_empty()) {
            let host = *host;
            let blocks = std::mem::take(&mut p.skips);
            encode(&self.key, self.me, &Cast::Skip(blocks), out);
            self.stats.other_bytes += out.len() as u64;
            return Step::To(host);
        }
        // In the middle of a block there is nothing to announce.
        let midst = self.ring.iter().any(|b| b.sent > 0 && !b.whole());
        if now >= self.announce_at && !midst {
            self.announced += 1;
            // Blocks of which nothing was sent yet are not to be asked for.
            let unsent =
                self.ring.iter().rev().take_while(|b| b.sent == 0 && !b.bytes.is_empty()).count() as u32;
            let cast = Cast::Announce { count: self.announced, next: self.next() - unsent };
            encode(&self.key, self.me, &cast, out);
            self.stats.other_bytes += out.len() as u64;
            let next = self.next() - unsent;
            let asking = self.peers.values().any(|p| p.hears && p.below < next);
            let most = if asking { ANNOUNCE_ASKING } else { ANNOUNCE_IDLE };
            self.announce_gap = (self.announce_gap * 2).min(most);
            self.announce_at = after(now, self.announce_gap);
            return Step::Group;
        }
        let mut next = Some(self.announce_at).filter(|_| !midst);
        let paced = self.rate.wait(now);
        match (paced, self.repair(now), self.fresh()) {
            (Some(t), Some(at), _) => next = earlier(next, Some(t.max(at))),
            (Some(t), None, Some(_)) => next = earlier(next, Some(t)),
            (None, Some(at), _) if at <= now => {
                if let Some(step) = self.send_repair(now, out) {
                    return step;
                }
            }
            (None, at, Some(block)) => {
                next = earlier(next, at);
                if let Some(step) = self.send_fresh(block, now, out) {
                    return step;
                }
            }
            (_, at, None) => next = earlier(next, at),
        }
        // Peers fall silent without telling.
        Step::Wait(next.unwrap_or(Nanos(u64::MAX)).max(after(now, 1)).min(after(now, SILENT / 4)))
    }

    /// When the next repair is due.
    fn repair(&self, now: Nanos) -> Option<Nanos> {
        // One that is due now is enough.
        let mut due = None;
        for t in self.ring.iter().filter_map(|b| b.repair_at) {
            due = earlier(due, Some(t));
            if t <= now {
                break;
            }
        }
        due
    }

    /// The block whose next fragment has not been sent yet.
    fn fresh(&self) -> Option<usize> {
        self.ring.iter().position(|b| !b.bytes.is_empty() && !b.whole())
    }

    fn send_repair(&mut self, now: Nanos, out: &mut Vec<u8>) -> Option<Step> {
        let at = self.ring.iter().position(|b| b.repair_at.is_some_and(|t| t <= now))?;
        let number = self.first + at as u32;
        let b = &mut self.ring[at];
        let Some(fragment) = b.repair.lowest() else {
            (b.repair_at, b.asked_by) = (None, HostSet::new());
            return self.send_repair(now, out);
        };
        b.repair.remove(fragment);
        // One that asks alone is answered alone: the others' links are spared.
        let alone = b.asked_by.iter().next().filter(|_| b.asked_by.len() == 1);
        if alone.is_none() {
            if since(now, b.mended_at) >= MENDED {
                b.mended = Fragments::default();
            }
            b.mended.insert(fragment);
            b.mended_at = now;
        }
        if b.repair.is_empty() {
            (b.repair_at, b.asked_by) = (None, HostSet::new());
        }
        let (bytes, step) =
            (b.write(&self.key, self.me, number, fragment, out), alone.map_or(Step::Group, Step::To));
        self.rate.sent(bytes + AROUND);
        self.stats.repairs += 1;
        self.stats.repair_bytes += bytes as u64;
        Some(step)
    }

    fn send_fresh(&mut self, at: usize, now: Nanos, out: &mut Vec<u8>) -> Option<Step> {
        let number = self.first + at as u32;
        let b = self.ring.get_mut(at)?;
        let fragment = b.sent;
        b.sent += 1;
        if fragment == 0 {
            b.since = now;
        }
        let bytes = b.write(&self.key, self.me, number, fragment, out);
        self.rate.sent(bytes + AROUND);
        self.stats.fragments += 1;
        self.stats.bytes += bytes as u64;
        // The burst's end is announced unless more follows.
        (self.announce_at, self.announce_gap) = (after(now, ANNOUNCE), ANNOUNCE);
        Some(Step::Group)
    }

    /// Looks after the rate, and after peers that have fallen silent.
    fn look(&mut self, now: Nanos) {
        let worst = self.peers.values().map(|p| p.lost).max().unwrap_or(0);
        if self.rate.look(worst, now) {
            self.peers.values_mut().for_each(|p| p.lost = 0);
        }
        let silent: Vec<HostIx> = self
            .peers
            .iter()
            .filter(|(h, p)| {
                let oldest = self.ring.iter().find(|b| b.sent > 0 && b.pending.contains(**h));
                let keeps_waiting = oldest.is_some_and(|b| since(now, b.since.max(p.heard)) > SILENT);
                let far_behind = (self.next() - p.below) as usize >= RING_BLOCKS / 2;
                let limit = if far_behind { SILENT } else { FORGOTTEN };
                p.hears && (keeps_waiting || since(now, p.heard) > limit)
            })
            .map(|(h, _)| *h)
            .collect();
        silent.into_iter().for_each(|h| self.deaf(h));
    }
}

impl Block {
    fn write(&self, key: &CastKey, me: HostIx, block: u32, fragment: u16, out: &mut Vec<u8>) -> usize {
        let from = usize::from(fragment) * usize::from(self.size);
        let to = self.bytes.len().min(from + usize::from(self.size));
        let data = Data {
            block,
            total: self.bytes.len() as u32,
            size: self.size,
            fragment,
            hosts: self.hosts.clone(),
            payload: self.bytes.get(from..to).unwrap_or_default(),
        };
        encode(key, me, &Cast::Data(data), out);
        out.len()
    }
}
