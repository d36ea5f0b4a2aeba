//! Random numbers of our own, so that a seed printed today gives the same schedule after every dependency update.

use std::collections::VecDeque;

/// SplitMix64, behind choices that somebody else has made.
pub(crate) struct Rng(u64, VecDeque<u8>);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15, VecDeque::new())
    }
    /// The first choices are these; what follows is always the same.
    #[allow(dead_code, reason = "fuzz targets read schedules, tests draw them")]
    pub(crate) fn reading(choices: &[u8]) -> Self {
        Self(0, choices.iter().copied().collect())
    }
    /// What follows is drawn, whatever was still to be read.
    #[allow(dead_code, reason = "fuzz targets read schedules, tests draw them")]
    pub(crate) fn draw(&mut self) {
        self.1.clear();
    }
    pub(crate) fn next(&mut self) -> u64 {
        if let Some(chosen) = self.1.pop_front() {
            return chosen.into();
        }
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `n`; 0 if `n` is 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.next() % n }
    }
    /// From `a` up to and without `b`.
    pub(crate) fn range(&mut self, a: u64, b: u64) -> u64 {
        a + self.below(b.saturating_sub(a))
    }
    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub(crate) fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
    /// One of the items; the slice must not be empty.
    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.index(items.len())]
    }
}
