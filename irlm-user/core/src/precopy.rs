//! Pre-copy of a VM whose dirty log is at hand: which page is sent when, when a round ends, and when the VM is stopped.
//! QEMU decides this for its own guests; this is for the KVM front.
//!
//! Two things are done differently. A page that is written again and again is *held back*: sending it early only sends
//! it twice. It leaves when it has calmed down, or in the last round. And the VM is stopped by what the wire carries, not
//! by how fast records are made, because the last pages are mostly new content (docs/decisions/0002).
//!
//! What makes the newest version arrive: the caller takes a page, reads it, and only then harvests the log again. So
//! whatever was written after the reading is named by a later harvest, and the last harvest is made when no vCPU runs.

use super::forecast::PAGE_WIRE_BYTES;
use super::page_set::{PageSet, after};
use super::units::{BlockIx, Nanos, PageAddr};
use std::collections::HashMap;

/// How often the log is looked at to see which pages are hot, at least: short against a second, long against what a
/// harvest costs.
pub const BEAT_MS: u64 = 100;
/// Between two harvests at the ends of short rounds.
const SHORT_MS: u64 = 10;
/// Of so many beats …
const RECENT: u32 = 4;
/// … a page written in so many is hot.
const MOST: u32 = 3;
/// Rounds after which the VM is stopped, whatever is left: it will not get less. As in Xen, which has had the
/// same bound for twenty years; a round is at least a beat long where nothing but hot pages is left.
pub const MAX_ROUNDS: u32 = 30;

/// What the departure does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Take pages and send them.
    Send,
    /// Harvest the log, tell [`Precopy::written`] what it names, then call [`Precopy::harvested`].
    Harvest,
    /// Nothing until then.
    Wait(Nanos),
    /// Stop the VM, harvest, tell what that names, and call [`Precopy::stopped`].
    Stop,
    /// All pages are out and the VM is stopped.
    Over,
}

/// What a departure must fit.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// Longest downtime to plan for, seconds.
    pub downtime: f64,
    /// Rounds while the VM runs.
    pub rounds: u32,
}

/// In which of the last beats a page was written.
#[derive(Clone, Copy, Debug)]
struct Beats {
    history: u32,
    at: u32,
}

impl Beats {
    fn at(self, beat: u32) -> u32 {
        self.history.checked_shl(beat.saturating_sub(self.at)).unwrap_or(0)
    }
}

/// One VM's rounds. Bound: three bits a page, and an entry for each page that was ever seen written.
#[derive(Debug)]
pub struct Precopy {
    limits: Limits,
    /// Of this round, still to be taken; all of it lies at or behind `cursor`.
    todo: PageSet,
    cursor: PageAddr,
    /// Written since it was taken, or held back.
    next: PageSet,
    /// Written since the last beat.
    since: PageSet,
    beats: HashMap<PageAddr, Beats>,
    beat: u32,
    beat_at: Option<Nanos>,
    harvested_at: Option<Nanos>,
    round: u32,
    held: u64,
    stop: bool,
    stopped: bool,
}

impl Precopy {
    /// A VM whose blocks have so many pages; the first round has all of them.
    #[must_use]
    pub fn new(pages: &[u32], limits: Limits) -> Self {
        Self {
            limits,
            todo: PageSet::full(pages),
            cursor: PageAddr { block: BlockIx(0), page: 0 },
            next: PageSet::empty(pages),
            since: PageSet::empty(pages),
            beats: HashMap::new(),
            beat: 0,
            beat_at: None,
            harvested_at: None,
            round: 1,
            held: 0,
            stop: false,
            stopped: false,
        }
    }

    /// The log names these pages of a block.
    pub fn written(&mut self, block: usize, bits: &[u64]) {
        if !self.stopped {
            self.since.merge(block, bits);
        }
        // What is still to be taken is read after this harvest anyway.
        let fresh: Vec<u64> = bits.iter().zip(self.todo.words(block)).map(|(b, t)| b & !t).collect();
        self.next.merge(block, &fresh);
    }

    /// What to do at `now`.
    #[must_use]
    pub fn step(&self, now: Nanos) -> Step {
        if self.stopped {
            return if self.todo.is_empty() { Step::Over } else { Step::Send };
        }
        if self.stop {
            return Step::Stop;
        }
        let due = |ms| self.harvested_at.map_or(now, |at| at.plus_ms(ms));
        if now >= due(BEAT_MS) {
            return Step::Harvest;
        }
        if !self.todo.is_empty() {
            return Step::Send;
        }
        // A round of nothing but hot pages is a beat long; one that sent something ends when it is through.
        let until = due(if self.cursor.page == 0 && self.cursor.block.0 == 0 { BEAT_MS } else { SHORT_MS });
        if now >= until { Step::Harvest } else { Step::Wait(until) }
    }

    /// The log was harvested: ends the round if it is through, and decides whether the VM can be stopped. `rate` is what
    /// the wire carries, bytes a second; 0 if that is not known yet. `may_stop`: nothing at the target speaks against it.
    pub fn harvested(&mut self, now: Nanos, rate: f64, may_stop: bool) {
        self.harvested_at = Some(now);
        if self.beat_at.is_none_or(|at| now >= at.plus_ms(BEAT_MS)) {
            self.beat_at = Some(now);
            self.mark();
        }
        if self.todo.is_empty() {
            self.turn();
        }
        let fits = self.remaining() as f64 * PAGE_WIRE_BYTES <= self.limits.downtime * rate;
        self.stop = may_stop && self.round > 1 && (fits || self.round > self.limits.rounds);
    }

    /// A beat: pages written since the last one.
    fn mark(&mut self) {
        self.beat = self.beat.wrapping_add(1);
        let (beats, beat) = (&mut self.beats, self.beat);
        for addr in self.since.iter() {
            let b = beats.entry(addr).or_insert(Beats { history: 0, at: beat });
            *b = Beats { history: b.at(beat) | 1, at: beat };
        }
        self.since.clear();
    }

    /// The next round: what was written, but for what is hot.
    fn turn(&mut self) {
        self.round += 1;
        self.cursor = PageAddr { block: BlockIx(0), page: 0 };
        std::mem::swap(&mut self.todo, &mut self.next);
        let hot: Vec<PageAddr> = self.todo.iter().filter(|a| self.is_hot(*a)).collect();
        self.held += hot.len() as u64;
        for addr in hot {
            self.todo.remove(addr);
            self.next.insert(addr);
        }
    }

    /// Whether the page was written in most of the recent beats.
    #[must_use]
    pub fn is_hot(&self, addr: PageAddr) -> bool {
        let recent = self.beats.get(&addr).map_or(0, |b| b.at(self.beat) & ((1 << RECENT) - 1));
        recent.count_ones() >= MOST
    }

    /// Takes up to `max` pages to be read and sent, in guest order. Hot ones among them are held back while the VM runs.
    pub fn take(&mut self, max: usize, out: &mut Vec<PageAddr>) {
        while out.len() < max {
            let Some(addr) = self.todo.next(self.cursor) else { return };
            self.todo.remove(addr);
            self.cursor = after(addr).unwrap_or(addr);
            if !self.stopped && self.is_hot(addr) {
                self.held += 1;
                self.next.insert(addr);
            } else {
                out.push(addr);
            }
        }
    }

    /// No vCPU runs any more, and the harvest made after that was told: all that is left leaves now.
    pub fn stopped(&mut self) {
        self.stopped = true;
        self.todo.merge_all(&self.next);
        self.next.clear();
        self.cursor = PageAddr { block: BlockIx(0), page: 0 };
    }

    /// The pages still to be sent, which are nobody's any more then.
    pub fn take_all(&mut self) -> PageSet {
        self.stopped();
        let none = PageSet::empty(self.todo.pages());
        std::mem::replace(&mut self.todo, none)
    }

    /// Pages still to be sent, as far as the log was harvested.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.todo.len() + self.next.len()
    }

    /// The round, from 1.
    #[must_use]
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Whether every page has been taken once, but for hot ones.
    #[must_use]
    pub fn first_round(&self) -> bool {
        self.round == 1
    }

    /// How often a page was held back.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held
    }

    /// Whether the bound on rounds, not what was left, made it stop.
    #[must_use]
    pub fn gave_in(&self) -> bool {
        self.stop && self.round > self.limits.rounds
    }
}

/// What the wire carries: the fastest of late, because only a busy link shows its rate.
#[derive(Clone, Copy, Debug, Default)]
pub struct WireRate {
    from: Option<(Nanos, u64)>,
    fastest: f64,
}

impl WireRate {
    /// `bytes` have been put on the wire in all; returns bytes a second, 0 if not known yet.
    pub fn measure(&mut self, now: Nanos, bytes: u64) -> f64 {
        let Some((at, before)) = self.from else {
            self.from = Some((now, bytes));
            return 0.0;
        };
        if now >= at.plus_ms(BEAT_MS) {
            let seconds = (now.0 - at.0) as f64 / 1e9;
            self.fastest = (bytes.saturating_sub(before) as f64 / seconds).max(self.fastest * 0.98);
            self.from = Some((now, bytes));
        }
        self.fastest
    }
}

#[cfg(test)]
mod tests;
