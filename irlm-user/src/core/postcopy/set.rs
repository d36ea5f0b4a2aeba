//! Sets of guest pages as bits, one a page: which pages are still to come, which are there. The size of every block
//! is fixed when the set is made, from a block list that was checked; nothing a peer names later makes it grow.

use crate::core::units::{BlockIx, PageAddr};

/// Pages that follow each other in one block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Run {
    /// The first.
    pub addr: PageAddr,
    /// How many, at least 1.
    pub count: u32,
}

impl Run {
    /// Whether the page is one of them.
    #[must_use]
    pub fn contains(self, addr: PageAddr) -> bool {
        addr.block == self.addr.block && addr.page.checked_sub(self.addr.page).is_some_and(|n| n < self.count)
    }
    /// Its pages.
    pub fn pages(self) -> impl Iterator<Item = PageAddr> {
        (0..self.count).map(move |i| PageAddr { page: self.addr.page + i, ..self.addr })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Bits {
    pages: u32,
    words: Vec<u64>,
}

/// A set of pages of one VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageSet {
    blocks: Vec<Bits>,
    len: u64,
}

/// The bits of `from..to` (at most one word's) within their word.
fn mask(from: u32, to: u32) -> u64 {
    let ones = u64::MAX >> (64 - (to - from));
    ones << (from % 64)
}

impl PageSet {
    /// An empty set over blocks of so many pages each.
    #[must_use]
    pub fn new(pages: &[u32]) -> Self {
        let bits = |&pages: &u32| Bits { pages, words: vec![0; (pages as usize).div_ceil(64)] };
        Self { blocks: pages.iter().map(bits).collect(), len: 0 }
    }

    /// A set that a bitmap a block says, bit 0 of word 0 being page 0. Bits past a block's end are not in it.
    #[must_use]
    pub fn of_words(pages: &[u32], words: &[Vec<u64>]) -> Self {
        let mut set = Self::new(pages);
        for (bits, from) in set.blocks.iter_mut().zip(words) {
            let n = bits.words.len().min(from.len());
            bits.words[..n].copy_from_slice(&from[..n]);
            let rest = bits.pages % 64;
            if rest != 0
                && let Some(last) = bits.words.last_mut()
            {
                *last &= mask(0, rest);
            }
        }
        set.len = set.blocks.iter().flat_map(|b| &b.words).map(|w| u64::from(w.count_ones())).sum();
        set
    }

    /// Pages of each block.
    #[must_use]
    pub fn sizes(&self) -> Vec<u32> {
        self.blocks.iter().map(|b| b.pages).collect()
    }

    /// The bitmap of a block.
    #[must_use]
    pub fn words(&self, block: BlockIx) -> &[u64] {
        self.blocks.get(usize::from(block.0)).map_or(&[], |b| &b.words)
    }

    /// Pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the VM has this page at all.
    #[must_use]
    pub fn covers(&self, addr: PageAddr) -> bool {
        self.blocks.get(usize::from(addr.block.0)).is_some_and(|b| addr.page < b.pages)
    }

    /// Whether the VM has all pages of this run.
    #[must_use]
    pub fn covers_run(&self, run: Run) -> bool {
        let end = run.addr.page.checked_add(run.count);
        self.blocks.get(usize::from(run.addr.block.0)).is_some_and(|b| end.is_some_and(|e| e <= b.pages))
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, addr: PageAddr) -> bool {
        self.covers(addr)
            && self.blocks[usize::from(addr.block.0)].words[addr.page as usize / 64] & (1 << (addr.page % 64))
                != 0
    }

    /// Puts the page in; whether it was not in before. A page the VM does not have is never in.
    pub fn insert(&mut self, addr: PageAddr) -> bool {
        self.insert_run(Run { addr, count: 1 }) == 1
    }

    /// Takes the page out; whether it was in.
    pub fn remove(&mut self, addr: PageAddr) -> bool {
        self.remove_run(Run { addr, count: 1 }) == 1
    }

    /// Puts the pages of `run` in that the VM has; how many were not in before.
    pub fn insert_run(&mut self, run: Run) -> u64 {
        let n = self.each_word(run, |w, m| {
            let new = (m & !*w).count_ones();
            *w |= m;
            new
        });
        self.len += n;
        n
    }

    /// Takes the pages of `run` out; how many were in.
    pub fn remove_run(&mut self, run: Run) -> u64 {
        let n = self.each_word(run, |w, m| {
            let old = (m & *w).count_ones();
            *w &= !m;
            old
        });
        self.len -= n;
        n
    }

    fn each_word(&mut self, run: Run, mut f: impl FnMut(&mut u64, u64) -> u32) -> u64 {
        let Some(b) = self.blocks.get_mut(usize::from(run.addr.block.0)) else { return 0 };
        let end = run.addr.page.saturating_add(run.count).min(b.pages);
        let (mut at, mut n) = (run.addr.page, 0);
        while at < end {
            let to = end.min((at / 64 + 1) * 64);
            n += u64::from(f(&mut b.words[at as usize / 64], mask(at, to)));
            at = to;
        }
        n
    }

    /// The first page of the set at or after `from`: in its block, then in the blocks after it.
    #[must_use]
    pub fn next(&self, from: PageAddr) -> Option<PageAddr> {
        (from.block.0..u16::try_from(self.blocks.len()).unwrap_or(u16::MAX)).find_map(|block| {
            let start = if block == from.block.0 { from.page } else { 0 };
            let page = self.blocks[usize::from(block)].find(start, true)?;
            Some(PageAddr { block: BlockIx(block), page })
        })
    }

    /// Pages from `from` on that are in the set and follow each other, at most `most`; `from` must be in the set.
    #[must_use]
    pub fn run_at(&self, from: PageAddr, most: u32) -> Run {
        let end = self.blocks.get(usize::from(from.block.0)).map_or(from.page, |b| {
            let most = from.page.saturating_add(most).min(b.pages);
            b.find(from.page, false).map_or(most, |e| e.min(most))
        });
        Run { addr: from, count: end.saturating_sub(from.page) }
    }

    /// The set as runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        let mut at = Some(PageAddr { block: BlockIx(0), page: 0 });
        std::iter::from_fn(move || {
            let run = self.run_at(self.next(at?)?, u32::MAX);
            at = Some(PageAddr { block: run.addr.block, page: run.addr.page + run.count });
            Some(run)
        })
    }

    /// Puts all pages of `other` in that this VM has too.
    pub fn extend(&mut self, other: &Self) {
        other.runs().for_each(|r| {
            self.insert_run(r);
        });
    }
}

impl Bits {
    /// The first page at or after `from` that is in the set (or is not).
    fn find(&self, from: u32, set: bool) -> Option<u32> {
        if from >= self.pages {
            return None;
        }
        let flip = if set { 0 } else { u64::MAX };
        let first = from as usize / 64;
        let mut word = (self.words[first] ^ flip) & (u64::MAX << (from % 64));
        let mut at = first;
        while word == 0 {
            at += 1;
            word = *self.words.get(at)? ^ flip;
        }
        let page = at as u32 * 64 + word.trailing_zeros();
        (page < self.pages).then_some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn at(block: u16, page: u32) -> PageAddr {
        PageAddr { block: BlockIx(block), page }
    }

    #[test]
    fn a_block_of_no_pages_and_the_last_page_of_a_word_are_no_special_cases() {
        let mut s = PageSet::new(&[0, 64, 65]);
        assert!(!s.insert(at(0, 0)) && !s.insert(at(1, 64)) && !s.insert(at(3, 0)));
        assert!(s.insert(at(1, 63)) && s.insert(at(2, 64)) && !s.insert(at(2, 64)));
        let run = |b, p| Run { addr: at(b, p), count: 1 };
        assert_eq!(s.runs().collect::<Vec<_>>(), [run(1, 63), run(2, 64)]);
        assert_eq!(s.insert_run(Run { addr: at(2, 0), count: u32::MAX }), 64);
        assert_eq!((s.len(), s.run_at(at(2, 3), 10).count, s.run_at(at(2, 3), u32::MAX).count), (66, 10, 62));
        assert!(
            !s.covers_run(Run { addr: at(2, 60), count: 6 })
                && s.covers_run(Run { addr: at(2, 60), count: 5 })
        );
        assert!(!s.covers_run(Run { addr: at(2, 60), count: u32::MAX }));
    }

    #[test]
    fn bits_past_a_blocks_end_are_not_pages() {
        let s = PageSet::of_words(&[3, 64], &[vec![u64::MAX, 7], vec![u64::MAX]]);
        assert_eq!(s.len(), 67);
        assert_eq!(s.words(BlockIx(0)), [7]);
    }

    proptest! {
        #[test]
        fn it_is_a_set(ops in prop::collection::vec((any::<bool>(), 0..3u16, 0..300u32, 1..140u32), 0..60)) {
            let sizes = [200, 1, 300];
            let (mut s, mut model) = (PageSet::new(&sizes), BTreeSet::new());
            for (put, block, page, count) in ops {
                let run = Run { addr: at(block, page), count };
                let mut n = 0;
                for a in run.pages().filter(|a| a.page < sizes[usize::from(a.block.0)]) {
                    n += u64::from(if put { model.insert(a) } else { model.remove(&a) });
                }
                prop_assert_eq!(if put { s.insert_run(run) } else { s.remove_run(run) }, n);
            }
            prop_assert_eq!(s.len(), model.len() as u64);
            let all: Vec<_> = s.runs().flat_map(Run::pages).collect();
            prop_assert_eq!(&all, &model.iter().copied().collect::<Vec<_>>());
            for (block, pages) in (0u16..).zip(sizes) {
                for page in 0..pages {
                    prop_assert_eq!(s.contains(at(block, page)), model.contains(&at(block, page)));
                    prop_assert_eq!(s.next(at(block, page)), model.range(at(block, page)..).next().copied());
                }
            }
            let words: Vec<Vec<u64>> = (0..3).map(|b| s.words(BlockIx(b)).to_vec()).collect();
            prop_assert_eq!(PageSet::of_words(&sizes, &words), s);
        }
    }
}
