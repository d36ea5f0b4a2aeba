//! Finds, for a page that leaves, the most similar page that its target host has: a *sketch* is a few small numbers,
//! such that pages that share much share some of them; a bounded table leads from each number to the page that had
//! it last (docs/decisions/0010 compares kinds of sketches).
//!
//! [`References`] is one source host's memory of what it has told one target host to keep (`core::delta::Slots` there):
//! the same contents in the same places. It decides alone what is kept where.
//!
//! Bound: the number of slots given at creation; about 4.2 KiB each, taken as they fill. When all are full, the content
//! that makes room is the first in a circle that was not referred to since the circle came by last (second chance), and
//! none that was kept or referred to too lately to have settled: a page that refers to it may still be on its way on
//! another connection. If there is none within a few steps, nothing is kept.
//!
//! Some contents are *models*: another source host has lent them, and brings them to the target host's store itself. Up
//! to half of the slots hold them. The target host hears of one, by digest, when a page first refers to it, and on each
//! connection anew until it is certain to have heard; if it says that it has no such content the model is forgotten.

use super::delta::{CHUNK_PAGES, MAX_SLOTS, Slots};
use super::digest::Digest;
use super::units::{Nanos, PAGE_SIZE, PageBytes};
use std::collections::HashMap;

/// Numbers in a sketch.
pub const FEATURES: usize = 8;
/// Bits of each 8-byte word that are looked at: relocation, of the kernel or of a process, moves addresses by whole pages
/// and leaves these alone.
const STEADY: u64 = 0xFFF;
/// How long what was sent on one connection is given to arrive before another connection's pages refer to it, unless the
/// target host has said before that it did. A page that comes too early all the same is asked for by the target.
pub const SETTLE_MS: u64 = 500;
/// Slots looked at to find one that can make room.
const STEPS: usize = 64;

/// What is compared of a page. 0 stands for no number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sketch([u32; FEATURES]);

impl Sketch {
    /// The sketch of a page: what is steady in each aligned pair of words, unless it is zero, is hashed with its place;
    /// the hash's top bits choose one of the numbers, for which the rest competes to be the least.
    #[must_use]
    pub fn of(page: &PageBytes) -> Self {
        let mut least = [u32::MAX; FEATURES];
        let (pairs, _) = page.as_chunks::<16>();
        for (place, pair) in (0u64..).zip(pairs) {
            let pair = u128::from_le_bytes(*pair);
            let seen = pair as u64 & STEADY | ((pair >> 64) as u64 & STEADY) << 12;
            if seen != 0 {
                let h = (seen | place << 32).wrapping_mul(0x9FB2_1C65_1E98_DF25);
                let h = (h ^ h >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93);
                let f = &mut least[(h >> 61) as usize];
                *f = (*f).min((h >> 16) as u32);
            }
        }
        Self(least.map(|f| if f == u32::MAX { 0 } else { f | 1 }))
    }

    /// Its numbers; 0 stands for none.
    #[must_use]
    pub fn features(&self) -> [u32; FEATURES] {
        self.0
    }

    /// The sketch with these numbers, as another host made it.
    #[must_use]
    pub fn from_features(features: [u32; FEATURES]) -> Self {
        Self(features)
    }

    /// Whether nothing can be compared: the page is all zeros.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; FEATURES]
    }
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    sketch: Sketch,
    /// The connection it was sent on, by its VM's number, and in which of its frames.
    lane: Lane,
    kept: Nanos,
    used: Nanos,
    /// Referred to since the circle came by last.
    again: bool,
    /// Its place among the models, or [`NONE`].
    model: u32,
}

/// Of a content that is no model.
const NONE: u32 = u32::MAX;

/// What is known of a model.
#[derive(Clone, Copy, Debug)]
struct Model {
    slot: u32,
    digest: Digest,
    told: Option<Told>,
}

/// When a target host was told of a model: first, and on which connection last.
#[derive(Clone, Copy, Debug)]
struct Told {
    lane: Lane,
    at: Nanos,
    last: u16,
}

/// A connection, by its VM's number, and how many frames with pages it has seen: the one that leaves next has this number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lane {
    /// Which connection.
    pub vm: u16,
    /// Frames before.
    pub frame: u32,
}

/// Counters of one table.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Contents kept.
    pub kept: u64,
    /// Contents that made room.
    pub evicted: u64,
    /// Times something similar was found.
    pub found: u64,
    /// Models taken in.
    pub adopted: u64,
    /// Times the target host was told of one.
    pub told: u64,
    /// Models that it turned out not to have.
    pub forgotten: u64,
}

/// What one target host keeps for one trust domain of this source host.
#[derive(Debug)]
pub struct References {
    bytes: Slots,
    kept: Vec<Kept>,
    models: Vec<Model>,
    /// By the low bits of a number: the slot, plus one, whose sketch had it last. What another number's slot has
    /// overwritten is found by the remaining numbers, or not.
    table: Vec<u32>,
    slots: u32,
    settle_ms: u64,
    /// By connection: frames that the target host has taken in.
    taken: HashMap<u16, u32>,
    hand: usize,
    /// Counters.
    pub counts: Counts,
}

impl References {
    /// A table of `slots` contents, each of which settles within `settle_ms` ([`SETTLE_MS`]).
    #[must_use]
    pub fn new(slots: u32, settle_ms: u64) -> Self {
        Self {
            settle_ms,
            taken: HashMap::new(),
            bytes: Slots::new(slots),
            kept: Vec::new(),
            models: Vec::new(),
            table: Vec::new(),
            slots,
            hand: 0,
            counts: Counts::default(),
        }
    }

    fn place(&self, i: usize, feature: u32) -> usize {
        (feature.wrapping_mul(0x9E37_79B1).rotate_left(i as u32 * 4 + 7) as usize) & (self.table.len() - 1)
    }

    /// The target host has taken in the first `frames` frames of this connection.
    pub fn taken(&mut self, vm: u16, frames: u32) {
        self.taken.insert(vm, frames);
    }

    /// Whether what was said in frame `said`, at a time, is certain to be known when a page on `lane` arrives, or as good as certain.
    fn settled(&self, (said, at): (Lane, Nanos), lane: Lane, now: Nanos) -> bool {
        let taken = || self.taken.get(&said.vm).is_some_and(|n| said.frame < *n);
        said.vm == lane.vm || taken() || now >= at.plus_ms(self.settle_ms)
    }

    /// The slot whose content shares most numbers with `sketch`, and that content. `lane` is the connection the page
    /// leaves on: what was sent before on the same one is there, what was sent on another must have been taken in, or have had time.
    /// A model may be told of in the same frame ([`Self::used`]).
    pub fn find(&mut self, sketch: &Sketch, lane: Lane, now: Nanos) -> Option<(u32, &PageBytes)> {
        if self.table.is_empty() {
            return None;
        }
        let mut found = [(0u32, 0u32); FEATURES];
        let mut n = 0;
        for (i, f) in sketch.0.iter().enumerate().filter(|(_, f)| **f != 0) {
            let Some(slot) = self.table[self.place(i, *f)].checked_sub(1) else { continue };
            let k = &self.kept[slot as usize];
            if k.sketch.0[i] != *f || (k.model == NONE && !self.settled((k.lane, k.kept), lane, now)) {
                continue;
            }
            if let Some((_, votes)) = found[..n].iter_mut().find(|(s, _)| *s == slot) {
                *votes += 1;
            } else {
                found[n] = (slot, 1);
                n += 1;
            }
        }
        let (slot, _) = found[..n].iter().copied().max_by_key(|(_, votes)| *votes)?;
        self.counts.found += 1;
        self.bytes.get(slot).map(|b| (slot, b))
    }

    /// The page that is sent now, in the frame that leaves next on `lane`, refers to this slot. If a digest comes back, the
    /// frame must tell the target host that the content of that digest stands in the slot.
    pub fn used(&mut self, slot: u32, lane: Lane, now: Nanos) -> Option<Digest> {
        let k = self.kept.get_mut(slot as usize)?;
        k.used = now;
        k.again = true;
        let at = k.model as usize;
        let model = *self.models.get(at)?;
        let told = match model.told {
            Some(t) if t.last == lane.vm || self.settled((t.lane, t.at), lane, now) => return None,
            // It settles from the first time on, however often others repeat it.
            Some(t) => Told { last: lane.vm, ..t },
            None => Told { lane, at: now, last: lane.vm },
        };
        self.models[at].told = Some(told);
        self.counts.told += 1;
        Some(model.digest)
    }

    /// Whether a slot holds a model.
    #[must_use]
    pub fn is_model(&self, slot: u32) -> bool {
        self.kept.get(slot as usize).is_some_and(|k| k.model != NONE)
    }

    /// A content leaves in full on connection `lane`: the slot in which the target host is to keep it, if any.
    pub fn keep(&mut self, sketch: Sketch, bytes: &PageBytes, lane: Lane, now: Nanos) -> Option<u32> {
        let k = Kept { sketch, lane, kept: now, used: now, again: false, model: NONE };
        let slot = self.put(k, bytes, now)?;
        self.counts.kept += 1;
        Some(slot)
    }

    /// Takes in a model, which the target host hears of when a page first refers to it. Not if half of the slots hold
    /// models, or nothing can make room.
    pub fn adopt(&mut self, sketch: Sketch, bytes: &PageBytes, digest: Digest, now: Nanos) -> bool {
        if self.models.len() * 2 >= self.slots as usize {
            return false;
        }
        let lane = Lane { vm: 0, frame: 0 };
        let k = Kept { sketch, lane, kept: now, used: now, again: false, model: NONE };
        let Some(slot) = self.put(k, bytes, now) else { return false };
        self.kept[slot as usize].model = self.models.len() as u32;
        self.models.push(Model { slot, digest, told: None });
        self.counts.adopted += 1;
        true
    }

    /// The target host has no such contents as it was told that these slots hold: no page refers to them any more.
    pub fn forget(&mut self, slots: &[u32]) {
        for slot in slots {
            let Some(k) = self.kept.get_mut(*slot as usize) else { continue };
            // What it has not been told of yet is not what it means.
            if self.models.get(k.model as usize).is_some_and(|m| m.told.is_some()) {
                k.sketch = Sketch([0; FEATURES]);
                k.again = false;
                self.unmodel(*slot);
                self.counts.forgotten += 1;
            }
        }
    }

    /// A slot's content is no model any more.
    fn unmodel(&mut self, slot: u32) {
        let at = std::mem::replace(&mut self.kept[slot as usize].model, NONE) as usize;
        if at < self.models.len() {
            self.models.swap_remove(at);
            if let Some(moved) = self.models.get(at) {
                self.kept[moved.slot as usize].model = at as u32;
            }
        }
    }

    /// Puts a content where there is room.
    fn put(&mut self, k: Kept, bytes: &PageBytes, now: Nanos) -> Option<u32> {
        let sketch = k.sketch;
        if sketch.is_empty() {
            return None;
        }
        let slot = self.room(now)?;
        if (slot as usize) < self.kept.len() {
            self.unmodel(slot);
            self.kept[slot as usize] = k;
            self.counts.evicted += 1;
        } else {
            self.kept.push(k);
        }
        self.bytes.keep(slot, bytes);
        if self.table.is_empty() {
            // Twice the numbers there can be, so that few are overwritten.
            self.table = vec![0; (self.slots as usize * FEATURES * 2).next_power_of_two()];
        }
        for (i, f) in sketch.0.iter().enumerate().filter(|(_, f)| **f != 0) {
            let at = self.place(i, *f);
            self.table[at] = slot + 1;
        }
        Some(slot)
    }

    fn room(&mut self, now: Nanos) -> Option<u32> {
        if self.kept.len() < self.slots as usize {
            return Some(self.kept.len() as u32);
        }
        for _ in 0..STEPS.min(self.kept.len()) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.kept.len();
            let k = &mut self.kept[slot];
            if now < k.kept.max(k.used).plus_ms(self.settle_ms) {
                continue;
            }
            if !std::mem::take(&mut k.again) {
                return Some(slot as u32);
            }
        }
        None
    }

    /// Slots.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Bytes of memory taken, but for the few that each connection's word takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.bytes()
            + self.kept.capacity() * size_of::<Kept>()
            + self.models.capacity() * size_of::<Model>()
            + self.table.len() * size_of::<u32>()
            + size_of::<Self>()
    }

    /// Most bytes a table of `slots` takes.
    #[must_use]
    pub fn most_bytes(slots: u32) -> usize {
        let n = slots as usize;
        // A vector that grows may be twice as long as it must be.
        n.next_multiple_of(CHUNK_PAGES) * PAGE_SIZE
            + n
            + 2 * n.max(2) * size_of::<Kept>()
            + n.max(1).next_multiple_of(2).max(4) * size_of::<Model>()
            + n.max(1) * FEATURES * 4 * size_of::<u32>()
            + size_of::<Self>()
    }
}

/// Slots of a table that takes at most so many bytes.
#[must_use]
pub fn most_slots(bytes: u64) -> u32 {
    let each = (References::most_bytes(1 << 16) >> 16) as u64 + 1;
    let spare = (CHUNK_PAGES * PAGE_SIZE + size_of::<References>()) as u64;
    u32::try_from(bytes.saturating_sub(spare) / each).unwrap_or(u32::MAX).min(MAX_SLOTS)
}

#[cfg(test)]
mod tests;
