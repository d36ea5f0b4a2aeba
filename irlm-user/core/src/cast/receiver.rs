//! What one target host has heard of the others' blocks: puts blocks together, notices what is missing, and says so to
//! its sender, neither too early (packets overtake each other, and somebody else's question may bring the answer) nor
//! too often.

use super::{HELD_BYTES, MS, RING_BLOCKS, after, earlier, since};
use crate::units::{HostIx, Nanos};
use crate::wire::cast::{Data, Fragments, MAX_MISSES, Miss, Report, fragments};
use std::collections::{BTreeMap, VecDeque};

/// A gap counts as a loss after so long: what only overtook has come by then.
const REORDER: u64 = 4 * MS;
/// Questions are spread over so long, so that of many receivers that miss the same one asks first, and its repair
/// answers the others'.
const SPREAD: u64 = 8 * MS;
/// What is due within so long goes into the same report.
const TOGETHER: u64 = 4 * MS;
/// How long a repair may take before it is known how long it does.
const FIRST_WAIT: u64 = 120 * MS;
const LEAST_WAIT: u64 = 30 * MS;
const MOST_WAIT: u64 = 400 * MS;
/// A report without a question says what was completed, so long after the first of it or after so many blocks.
const ACK_WITHIN: u64 = 40 * MS;
const ACK_BLOCKS: u32 = 24;
/// Bytes of misses in one report, so that it is one small packet.
const REPORT_BYTES: usize = 1100;

/// Counters.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Blocks put together.
    pub blocks: u64,
    /// Fragments that were here already, or that nobody here needs any more.
    pub duplicates: u64,
    /// Fragments of blocks that other hosts need.
    pub others: u64,
    /// Datagrams that say what cannot be: old ones sent again, or blocks beyond any ring.
    pub refused: u64,
    /// Fragments let go at the bound.
    pub crowded: u64,
    /// Blocks of which something was asked for.
    pub asked: u64,
}

#[derive(Debug)]
struct Part {
    total: u32,
    size: u16,
    got: Fragments,
    left: u16,
    /// The highest fragment that came, and one.
    top: u16,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Complete, or not to be waited for.
    done: bool,
    part: Option<Box<Part>>,
    /// When what is missing is asked for; none: nothing is known to be missing.
    due: Option<Nanos>,
    asked: u8,
    asked_at: Nanos,
}

/// One sender's blocks.
#[derive(Debug)]
struct Heard {
    /// Every block below this one is done.
    below: u32,
    /// The blocks from there to the newest that is known of.
    slots: VecDeque<Slot>,
    announced: u32,
    reports: u32,
    /// When to report, question or not.
    due: Option<Nanos>,
    done_since: u32,
    /// Nanoseconds from a question to its answer.
    wait: u64,
}

/// One host's ear.
#[derive(Debug)]
pub struct Receiver {
    me: HostIx,
    hosts: u16,
    from: BTreeMap<HostIx, Heard>,
    held: usize,
    limit: usize,
    random: u64,
    /// Counters.
    pub stats: Stats,
}

impl Receiver {
    /// Host `me` of `hosts`; at most `limit` bytes of incomplete blocks ([`HELD_BYTES`]). `seed` spreads questions.
    #[must_use]
    pub fn new(me: HostIx, hosts: u16, limit: usize, seed: u64) -> Self {
        let limit = limit.min(HELD_BYTES);
        Self { me, hosts, from: BTreeMap::new(), held: 0, limit, random: seed, stats: Stats::default() }
    }

    /// Bytes of incomplete blocks.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// SplitMix64, below `n`.
    fn random(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }

    fn known(&self, from: HostIx) -> bool {
        from != self.me && from.0 < self.hosts
    }

    /// A sender said that it is there and what its next new block is.
    pub fn announce(&mut self, from: HostIx, count: u32, next: u32, now: Nanos) {
        if !self.known(from) {
            self.stats.refused += 1;
            return;
        }
        let (spread, gap) = (self.random(SPREAD), self.random(SPREAD));
        let f = self.from.entry(from).or_insert_with(|| Heard {
            // What was sent before was for others: no sender counts on a host that it has not heard of.
            below: next,
            slots: VecDeque::new(),
            announced: 0,
            reports: 0,
            due: None,
            done_since: 0,
            wait: FIRST_WAIT,
        });
        if count <= f.announced {
            self.stats.refused += 1;
            return;
        }
        f.announced = count;
        let ahead = next.saturating_sub(f.below) as usize;
        if ahead > RING_BLOCKS {
            // No sender goes so far ahead of a host it counts on: what this one waited for has been handed over.
            self.held -= f.slots.drain(..).filter_map(|s| s.part).map(|p| p.bytes.len()).sum::<usize>();
            f.below = next;
            f.due = Some(now);
            return;
        }
        f.due = earlier(f.due, Some(after(now, spread)));
        // Everything below `next` has been sent.
        while f.slots.len() < ahead {
            f.slots.push_back(Slot::default());
        }
        for slot in f.slots.iter_mut().take(ahead) {
            if let Some(p) = &mut slot.part {
                p.top = p.count();
            }
            if !slot.done && slot.due.is_none() {
                slot.due = Some(after(now, REORDER + gap));
            }
        }
    }

    /// A fragment came. Returns the block's bytes if it is complete, and this host needs it.
    pub fn data(&mut self, from: HostIx, d: &Data<'_>, now: Nanos) -> Option<Vec<u8>> {
        if !self.known(from) {
            self.stats.refused += 1;
            return None;
        }
        let gap = after(now, REORDER + self.random(SPREAD));
        // Nothing is for this host before it has heard the sender announce itself.
        let Some(f) = self.from.get_mut(&from) else {
            self.stats.others += 1;
            return None;
        };
        let Some(at) = d.block.checked_sub(f.below).map(|n| n as usize) else {
            self.stats.duplicates += 1;
            return None;
        };
        if at >= RING_BLOCKS {
            self.stats.refused += 1;
            return None;
        }
        if at >= f.slots.len() {
            f.reach(at, gap);
        }
        let last = at + 1 == f.slots.len();
        let slot = &mut f.slots[at];
        if slot.done {
            self.stats.duplicates += 1;
            return None;
        }
        if !d.hosts.contains(self.me) {
            self.stats.others += 1;
            self.held -= slot.part.take().map_or(0, |p| p.bytes.len());
            slot.done = true;
            self.advance(from, now);
            return None;
        }
        let part = match &mut slot.part {
            Some(p) if (p.total, p.size) != (d.total, d.size) => {
                self.stats.refused += 1;
                return None;
            }
            Some(p) => p,
            none => {
                if self.held + d.total as usize > self.limit {
                    self.stats.crowded += 1;
                    slot.due = slot.due.or(Some(gap));
                    return None;
                }
                self.held += d.total as usize;
                none.insert(Box::new(Part::new(d.total, d.size)))
            }
        };
        if !part.insert(d, last) {
            self.stats.duplicates += 1;
            return None;
        }
        if slot.asked > 0 {
            // From the newest question: of several, the answer to an older one makes the time too short, never too long.
            let took = since(now, slot.asked_at);
            f.wait = (f.wait * 7 + (2 * took).clamp(LEAST_WAIT, MOST_WAIT)) / 8;
        }
        if part.left > 0 {
            if usize::from(part.count() - part.left) < usize::from(part.top) {
                slot.due = slot.due.or(Some(gap));
            } else if last {
                slot.due = None;
            }
            return None;
        }
        let bytes = slot.part.take().map(|p| p.bytes)?;
        self.held -= bytes.len();
        slot.done = true;
        self.stats.blocks += 1;
        self.advance(from, now);
        Some(bytes)
    }

    /// The sender said that these blocks are not to be waited for.
    pub fn skip(&mut self, from: HostIx, blocks: &[u32], now: Nanos) {
        let Some(f) = self.from.get_mut(&from) else {
            self.stats.refused += 1;
            return;
        };
        for b in blocks {
            let at = b.checked_sub(f.below).map(|n| n as usize);
            if let Some(slot) = at.and_then(|n| f.slots.get_mut(n)) {
                self.held -= slot.part.take().map_or(0, |p| p.bytes.len());
                slot.done = true;
            }
        }
        self.advance(from, now);
    }

    /// Something was done: moves the window on, and sees to it that the sender hears of it.
    fn advance(&mut self, from: HostIx, now: Nanos) {
        let Some(f) = self.from.get_mut(&from) else { return };
        while f.slots.front().is_some_and(|s| s.done) {
            f.slots.pop_front();
            f.below += 1;
        }
        f.done_since += 1;
        let within = if f.done_since >= ACK_BLOCKS { 0 } else { ACK_WITHIN };
        f.due = earlier(f.due, Some(after(now, within)));
    }

    /// When [`Self::reports`] has something to say next.
    #[must_use]
    pub fn wake_at(&self) -> Option<Nanos> {
        self.from
            .values()
            .fold(None, |t, f| f.slots.iter().fold(earlier(t, f.due), |t, s| earlier(t, s.open())))
    }

    /// What is to be said now, to whom.
    pub fn reports(&mut self, now: Nanos, out: &mut Vec<(HostIx, Report)>) {
        let mut spread = self.random(SPREAD);
        for (host, f) in &mut self.from {
            let due = f.slots.iter().fold(f.due, |t, s| earlier(t, s.open()));
            if due.is_none_or(|t| t > now) {
                continue;
            }
            f.reports += 1;
            f.due = None;
            f.done_since = 0;
            let mut r = Report { count: f.reports, below: f.below, end: f.below, misses: Vec::new() };
            let (mut bytes, mut whole) = (0, true);
            for (n, slot) in f.slots.iter_mut().enumerate() {
                let block = f.below + n as u32;
                if slot.done {
                    r.end = if whole { block + 1 } else { r.end };
                    continue;
                }
                if slot.due.is_none_or(|t| t > after(now, TOGETHER)) {
                    // Nothing is said of this one, so the acknowledgement ends before it; questions go on.
                    whole = false;
                    continue;
                }
                let missing = slot.part.as_ref().map(|p| p.missing());
                if missing.is_some_and(|m| m.is_empty()) {
                    (slot.due, whole) = (None, false);
                    continue;
                }
                let cost = 5 + missing.map_or(0, |m| m.iter().last().map_or(0, |n| usize::from(n) / 8 + 1));
                if r.misses.len() >= MAX_MISSES || bytes + cost > REPORT_BYTES {
                    // In the next report, soon.
                    f.due = Some(after(now, TOGETHER));
                    break;
                }
                bytes += cost;
                self.stats.asked += u64::from(slot.asked == 0);
                slot.asked = slot.asked.saturating_add(1);
                slot.asked_at = now;
                let wait = (f.wait << u32::from(slot.asked - 1).min(3)).min(2 * MOST_WAIT);
                slot.due = Some(after(now, wait + spread));
                r.misses.push(Miss { block, fragments: missing });
                r.end = if whole { block + 1 } else { r.end };
            }
            out.push((*host, r));
            spread = spread.rotate_left(7) % SPREAD;
        }
    }
}

impl Slot {
    /// When it has something to ask.
    fn open(&self) -> Option<Nanos> {
        self.due.filter(|_| !self.done)
    }
}

impl Heard {
    /// A newer block came, the one at `at`: whatever is missing of the older ones should have come.
    fn reach(&mut self, at: usize, gap: Nanos) {
        for slot in self.slots.iter_mut().filter(|s| !s.done) {
            if let Some(p) = &mut slot.part {
                p.top = p.count();
            }
            slot.due = slot.due.or(Some(gap));
        }
        while self.slots.len() < at {
            self.slots.push_back(Slot { due: Some(gap), ..Slot::default() });
        }
        self.slots.push_back(Slot::default());
    }
}

impl Part {
    fn new(total: u32, size: u16) -> Self {
        let (got, bytes) = (Fragments::default(), vec![0; total as usize]);
        Self { total, size, got, left: fragments(total, size) as u16, top: 0, bytes }
    }

    /// Fragments of the whole block.
    fn count(&self) -> u16 {
        fragments(self.total, self.size) as u16
    }

    /// Takes a fragment in, `last` if of the newest known block. Returns whether it is new.
    fn insert(&mut self, d: &Data<'_>, last: bool) -> bool {
        if !self.got.insert(d.fragment) {
            return false;
        }
        self.left -= 1;
        // An announcement or a newer block may have said that all has been sent.
        self.top = self.top.max(if last { d.fragment + 1 } else { self.count() });
        let place = usize::from(d.fragment) * usize::from(d.size);
        self.bytes[place..place + d.payload.len()].copy_from_slice(d.payload);
        true
    }

    /// What should have come and has not.
    fn missing(&self) -> Fragments {
        let mut m = Fragments::first(self.top);
        m.subtract(&self.got);
        m
    }
}
