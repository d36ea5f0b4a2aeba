//! The target host's table digest → content, shared by all VMs of the group that arrive there.
//!
//! Bound: a number of pages given at creation. At the bound the oldest content makes room; whoever still needs it
//! asks its own source (`core::arrival`), so the bound costs bandwidth and never correctness (invariant 4).

use super::digest::Digest;
use super::units::{PAGE_SIZE, PageBytes};
use std::collections::HashMap;

/// Pages in one arena chunk: 2 MiB, so that a store grows in steps the kernel can back with huge pages.
const CHUNK_PAGES: usize = 512;

/// Content-addressed page memory with a fixed budget.
#[derive(Debug)]
pub struct Store {
    map: HashMap<Digest, u32>,
    /// Digest held by each slot; slots are filled in order and reused in a ring, which makes eviction first-in-first-out.
    slots: Vec<Digest>,
    chunks: Vec<Box<[u8]>>,
    budget: usize,
    hand: usize,
    evicted: u64,
}

impl Store {
    /// A store of at most `budget_pages` (at least 1) pages. Memory is taken as it fills.
    #[must_use]
    pub fn new(budget_pages: usize) -> Self {
        let budget = budget_pages.clamp(1, u32::MAX as usize);
        Self { map: HashMap::new(), slots: Vec::new(), chunks: Vec::new(), budget, hand: 0, evicted: 0 }
    }

    /// Puts in a content that the caller has verified to hash to `digest`. Returns whether it is new.
    pub fn insert(&mut self, digest: Digest, bytes: &PageBytes) -> bool {
        if self.map.contains_key(&digest) {
            return false;
        }
        let slot = if self.slots.len() < self.budget {
            if self.slots.len() == self.chunks.len() * CHUNK_PAGES {
                let pages = CHUNK_PAGES.min(self.budget - self.slots.len());
                self.chunks.push(vec![0; pages * PAGE_SIZE].into_boxed_slice());
            }
            self.slots.push(digest);
            self.slots.len() - 1
        } else {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.budget;
            let old = std::mem::replace(&mut self.slots[slot], digest);
            self.map.remove(&old);
            self.evicted += 1;
            slot
        };
        self.map.insert(digest, slot as u32);
        let at = (slot % CHUNK_PAGES) * PAGE_SIZE;
        self.chunks[slot / CHUNK_PAGES][at..at + PAGE_SIZE].copy_from_slice(bytes);
        true
    }

    /// The content with this digest, if it is here.
    #[must_use]
    pub fn get(&self, digest: &Digest) -> Option<&PageBytes> {
        let slot = *self.map.get(digest)? as usize;
        let at = (slot % CHUNK_PAGES) * PAGE_SIZE;
        self.chunks[slot / CHUNK_PAGES][at..at + PAGE_SIZE].first_chunk()
    }

    /// Contents held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }
    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
    /// Contents that had to make room so far.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn d(n: u32) -> Digest {
        let mut b = [0; 20];
        b[..4].copy_from_slice(&n.to_le_bytes());
        Digest(b)
    }
    fn page(n: u32) -> PageBytes {
        let mut p = [0; PAGE_SIZE];
        for w in p.chunks_exact_mut(4) {
            w.copy_from_slice(&n.to_le_bytes());
        }
        p
    }

    #[test]
    fn keeps_the_newest_and_never_exceeds_its_budget() {
        for budget in [1usize, 3, CHUNK_PAGES, CHUNK_PAGES + 7] {
            let mut s = Store::new(budget);
            for n in 0..(2 * budget + 5) as u32 {
                assert!(s.insert(d(n), &page(n)));
                assert!(!s.insert(d(n), &page(n)));
                assert!(s.len() <= budget);
                assert_eq!(s.get(&d(n)), Some(&page(n)));
                if let Some(old) = (n as usize).checked_sub(budget) {
                    assert_eq!(s.get(&d(old as u32)), None);
                    assert_eq!(s.get(&d(old as u32 + 1)), Some(&page(old as u32 + 1)));
                }
            }
            assert_eq!(s.evicted() as usize, budget + 5);
        }
    }
}
