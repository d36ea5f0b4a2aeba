//! What each target host keeps of this host's VMs, so that similar pages can be sent as differences (`core::sketch`): one
//! table for each target host and trust domain, shared by the VMs that go there, because what is similar is mostly in
//! another VM (docs/decisions/0010).
//!
//! Models, which other source hosts lend before the streams begin, wait here until the tables that they are for are made.
//!
//! Bound: the bytes given at creation. A table that has not been made takes none of its share, and no more models wait for
//! it than half of the share holds. Locks, in this order: models → a table.

use crate::core::digest::Digest;
use crate::core::sketch::{References, SETTLE_MS, Sketch, most_slots};
use crate::core::units::{HostIx, PAGE_SIZE, PageBytes};
use crate::flow::{lock, now};
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

/// The tables of one group. A table is made when its target host has said how much it keeps.
#[derive(Debug, Default)]
pub struct Similar {
    tables: HashMap<(HostIx, u16), Mutex<Option<References>>>,
    /// Slots that this host has memory for, a table.
    most: u32,
    models: Mutex<Models>,
    /// Models that this host takes in all.
    room: u32,
}

#[derive(Debug, Default)]
struct Models {
    /// Those that tables still wait for, in the order in which they came.
    waiting: Vec<Model>,
    /// All that came.
    known: HashSet<Digest>,
    /// Tables that nothing waits for any more.
    settled: HashSet<(HostIx, u16)>,
    /// How many wait for a table.
    counts: HashMap<(HostIx, u16), u32>,
}

#[derive(Debug)]
struct Model {
    domain: u16,
    digest: Digest,
    sketch: Sketch,
    bytes: Box<PageBytes>,
    /// Target hosts whose tables for this trust domain are to have it.
    targets: Vec<HostIx>,
}

impl Similar {
    /// Gives back its memory; nothing leaves as a difference any more.
    pub fn let_go(&self) {
        for t in self.tables.values() {
            *lock(t) = None;
        }
        *lock(&self.models) = Models::default();
    }

    /// Tables for VMs that go to these target hosts, each with its trust domain, in `bytes` of memory altogether.
    #[must_use]
    pub fn new(lines: impl IntoIterator<Item = (HostIx, u16)>, bytes: u64) -> Self {
        let tables: HashMap<_, _> = lines.into_iter().map(|line| (line, Mutex::default())).collect();
        // The names of as many models as there is room for take a 256th part at most.
        let most = most_slots((bytes - bytes / 256) / tables.len().max(1) as u64);
        let room = if tables.is_empty() { 0 } else { bytes / 4 / PAGE_SIZE as u64 };
        Self { tables, most, models: Mutex::default(), room: u32::try_from(room).unwrap_or(u32::MAX) }
    }

    /// The target host keeps so many contents.
    pub(super) fn granted(&self, target: HostIx, domain: u16, slots: u32) {
        let Some(table) = self.tables.get(&(target, domain)) else { return };
        let slots = slots.min(self.most);
        let models = &mut *lock(&self.models);
        if slots > 0 {
            let mut table = lock(table);
            let at = now();
            let fresh = table.is_none();
            let table = table.get_or_insert_with(|| References::new(slots, SETTLE_MS));
            for m in
                models.waiting.iter().filter(|m| fresh && m.domain == domain && m.targets.contains(&target))
            {
                table.adopt(m.sketch, &m.bytes, m.digest, at);
            }
        }
        models.settle(target, domain);
    }

    /// Pages of models that this host has room for, in all that it ever takes.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.room
    }

    /// Takes a content that another source host lends, and that the caller has compared with its digest, for pages of this
    /// trust domain that go to these target hosts. Whether any of their tables has it now, or will have it when it is made.
    pub fn model(&self, domain: u16, digest: Digest, targets: &[HostIx], bytes: &PageBytes) -> bool {
        let sketch = Sketch::of(bytes);
        let models = &mut *lock(&self.models);
        if sketch.is_empty() || models.known.len() >= self.room as usize || models.known.contains(&digest) {
            return false;
        }
        let (at, mut taken, mut waits) = (now(), false, Vec::new());
        for target in targets {
            let line = (*target, domain);
            let Some(table) = self.tables.get(&line).filter(|_| !waits.contains(target)) else { continue };
            if let Some(table) = &mut *lock(table) {
                taken |= table.adopt(sketch, bytes, digest, at);
            } else if !models.settled.contains(&line) {
                let count = models.counts.entry(line).or_default();
                if *count < self.most / 2 {
                    *count += 1;
                    waits.push(*target);
                }
            }
        }
        if !waits.is_empty() {
            taken = true;
            models.waiting.push(Model { domain, digest, sketch, bytes: Box::new(*bytes), targets: waits });
        }
        if taken {
            models.known.insert(digest);
        }
        taken
    }

    /// The target host has not got the models of these slots.
    pub(super) fn unkept(&self, target: HostIx, domain: u16, slots: &[u32]) {
        if let Some(table) = self.table(target, domain)
            && let Some(references) = &mut *lock(table)
        {
            references.forget(slots);
        }
    }

    /// The table for pages of this trust domain that go there.
    pub(super) fn table(&self, target: HostIx, domain: u16) -> Option<&Mutex<Option<References>>> {
        self.tables.get(&(target, domain))
    }

    /// Bytes of memory taken, but for the names of models.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let waiting = lock(&self.models).waiting.len() * (size_of::<Model>() + PAGE_SIZE);
        let tables: usize = self.tables.values().map(|t| lock(t).as_ref().map_or(0, References::bytes)).sum();
        (waiting + tables) as u64
    }
}

impl Models {
    /// This table has what waited for it, or never will.
    fn settle(&mut self, target: HostIx, domain: u16) {
        self.counts.remove(&(target, domain));
        if !self.settled.insert((target, domain)) {
            return;
        }
        self.waiting.retain_mut(|m| {
            if m.domain == domain {
                m.targets.retain(|t| *t != target);
            }
            !m.targets.is_empty()
        });
        if self.waiting.is_empty() {
            self.waiting = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::sketch::Lane;

    #[test]
    fn memory_is_divided_and_never_more_than_the_receiver_keeps() {
        let lines = [(HostIx(0), 0), (HostIx(1), 0), (HostIx(1), 3), (HostIx(0), 0)];
        let s = Similar::new(lines, 64 << 20);
        s.granted(HostIx(1), 3, u32::MAX);
        s.granted(HostIx(1), 0, 7);
        s.granted(HostIx(0), 0, 0);
        s.granted(HostIx(9), 9, 100);
        let slots = |t, d| {
            let table = s.table(HostIx(t), d)?;
            lock(table).as_ref().map(References::slots)
        };
        let third = slots(1, 3).expect("granted");
        assert!((4000..6000).contains(&third), "{third} of 4 KiB and a little in 21 MiB");
        assert!(References::most_bytes(third) as u64 <= (64 << 20) / 3);
        assert_eq!((slots(1, 0), slots(0, 0), slots(9, 9)), (Some(7), None, None));
        s.granted(HostIx(1), 0, 50);
        assert_eq!(slots(1, 0), Some(7), "the first word counts");
        assert!(Similar::new([], 64 << 20).table(HostIx(0), 0).is_none());
        assert_eq!((s.room(), Similar::new([], 64 << 20).room()), (16 << 20 >> 12, 0));
    }

    fn noise(seed: u32) -> PageBytes {
        let mut p = [0; PAGE_SIZE];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut p);
        p
    }
    fn digest(n: u32) -> Digest {
        let mut d = [0; 20];
        d[..4].copy_from_slice(&n.to_le_bytes());
        Digest(d)
    }
    /// Whether the table finds this page, and what it then has to tell of it.
    fn found(s: &Similar, target: u16, domain: u16, n: u32) -> Option<Option<Digest>> {
        let mut table = lock(s.table(HostIx(target), domain)?);
        let table = table.as_mut()?;
        let lane = Lane { vm: 1, frame: 0 };
        let (slot, bytes) = table.find(&Sketch::of(&noise(n)), lane, now())?;
        assert!(*bytes == noise(n) && table.is_model(slot));
        Some(table.used(slot, lane, now()))
    }
    fn adopted(s: &Similar, target: u16, domain: u16) -> Option<u64> {
        lock(s.table(HostIx(target), domain)?).as_ref().map(|t| t.counts.adopted)
    }

    #[test]
    fn models_wait_for_the_tables_that_they_are_for_and_then_take_no_memory() {
        let [one, two, other] = [HostIx(1), HostIx(2), HostIx(7)];
        let s = Similar::new([(one, 0), (two, 0), (one, 3)], 8 << 20);
        let empty = s.bytes();
        assert!(s.model(0, digest(1), &[one, two, one, other], &noise(1)));
        assert!(s.model(0, digest(2), &[two], &noise(2)));
        assert!(!s.model(0, digest(2), &[one], &noise(2)), "it is known");
        assert!(!s.model(0, digest(3), &[other], &noise(3)) && !s.model(9, digest(3), &[one], &noise(3)));
        assert!(!s.model(0, digest(4), &[one], &[0; PAGE_SIZE]), "nothing resembles it");
        let waiting = s.bytes();
        assert!(waiting >= empty + 2 * PAGE_SIZE as u64);
        s.granted(one, 0, 1000);
        s.granted(one, 3, 1000);
        assert_eq!(
            (adopted(&s, 1, 0), adopted(&s, 2, 0), adopted(&s, 1, 3)),
            (Some(1), None, Some(0)),
            "each where it is for, in its trust domain"
        );
        assert_eq!(found(&s, 1, 0, 1), Some(Some(digest(1))));
        assert_eq!(found(&s, 1, 0, 1), Some(None), "told once");
        assert_eq!(found(&s, 1, 0, 2), None);
        s.granted(two, 0, 1000);
        assert_eq!(found(&s, 2, 0, 1), Some(Some(digest(1))));
        assert_eq!(found(&s, 2, 0, 2), Some(Some(digest(2))));
        assert!(lock(&s.models).waiting.is_empty());
        // Whoever comes when a table is there is taken into it; a second grant takes nothing in anew.
        assert!(s.model(0, digest(5), &[two], &noise(5)));
        s.granted(two, 0, 1000);
        assert_eq!((adopted(&s, 2, 0), found(&s, 2, 0, 5)), (Some(3), Some(Some(digest(5)))));
        assert!(lock(&s.models).waiting.is_empty());
    }

    #[test]
    fn no_more_models_are_taken_than_there_is_room_for() {
        let lines: Vec<(HostIx, u16)> = (0..9).map(|t| (HostIx(t), 0)).collect();
        let bytes = 32 << 20;
        let s = Similar::new(lines.clone(), bytes);
        let each = s.most / 2;
        let took = (0..each + 9).filter(|n| s.model(0, digest(*n), &[HostIx(0)], &noise(*n))).count();
        assert_eq!(took as u32, each, "as many as its table would take");
        let targets: Vec<HostIx> = (0..9).map(HostIx).collect();
        let took = (5000..5000 + s.room()).filter(|n| s.model(0, digest(*n), &targets, &noise(*n))).count();
        assert_eq!(took as u32, s.room().min(2 * each) - each);
        assert!(s.bytes() <= bytes);
        for (t, _) in &lines[1..8] {
            s.granted(*t, 0, u32::MAX);
            assert!(s.bytes() <= bytes, "{} of {bytes}", s.bytes());
        }
        // A host that keeps nothing: what waited for it alone is let go.
        s.granted(HostIx(8), 0, 0);
        assert_eq!(lock(&s.models).waiting.len() as u32, each);
        s.granted(HostIx(0), 0, 0);
        assert!(lock(&s.models).waiting.is_empty());
        assert!(!s.model(0, digest(9000), &[HostIx(0), HostIx(8)], &noise(1)), "nobody will have it");
        assert_eq!(adopted(&s, 3, 0), Some(u64::from(s.room().min(2 * each) - each)));
    }
}
