//! Sets of pages of one VM, one bit each, in the form in which a dirty log comes: so that a log is taken in a word at a
//! time, walked in guest order, and split into runs. A set's size is that of the VM's blocks, from a list that was
//! checked; nothing a peer names later makes it grow.

use super::units::{BlockIx, PageAddr};

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

/// Pages of one VM. It holds a bit for each page of the VM and no others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<Vec<u64>>,
    /// Pages of each block.
    pages: Vec<u32>,
    len: u64,
}

/// The bits of `from..to` (at most one word's) within their word.
fn mask(from: u32, to: u32) -> u64 {
    let ones = u64::MAX >> (64 - (to - from));
    ones << (from % 64)
}

impl PageSet {
    /// No page of a VM whose blocks have so many pages.
    #[must_use]
    pub fn empty(pages: &[u32]) -> Self {
        let words = pages.iter().map(|n| vec![0; n.div_ceil(64) as usize]).collect();
        Self { words, pages: pages.to_vec(), len: 0 }
    }

    /// Every page of such a VM.
    #[must_use]
    pub fn full(pages: &[u32]) -> Self {
        let mut set = Self::empty(pages);
        for (block, n) in pages.iter().enumerate() {
            set.merge(block, &vec![u64::MAX; n.div_ceil(64) as usize]);
        }
        set
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Pages of each block of the VM.
    #[must_use]
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// A block's bits; none beyond the VM's blocks.
    #[must_use]
    pub fn words(&self, block: usize) -> &[u64] {
        self.words.get(block).map_or(&[], |w| w)
    }

    fn block(&self, block: BlockIx) -> Option<(&[u64], u32)> {
        let block = usize::from(block.0);
        Some((self.words.get(block)?, *self.pages.get(block)?))
    }

    /// Whether the VM has this page at all.
    #[must_use]
    pub fn covers(&self, addr: PageAddr) -> bool {
        self.covers_run(Run { addr, count: 1 })
    }

    /// Whether the VM has all pages of this run.
    #[must_use]
    pub fn covers_run(&self, run: Run) -> bool {
        let end = run.addr.page.checked_add(run.count);
        self.block(run.addr.block).is_some_and(|(_, pages)| end.is_some_and(|e| e <= pages))
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, addr: PageAddr) -> bool {
        self.block(addr.block).is_some_and(|(words, pages)| {
            addr.page < pages && words[addr.page as usize / 64] & (1 << (addr.page % 64)) != 0
        })
    }

    /// Adds a page, and says whether it was not in before; a page that the VM does not have is not added.
    pub fn insert(&mut self, addr: PageAddr) -> bool {
        self.insert_run(Run { addr, count: 1 }) == 1
    }

    /// Takes a page out, and says whether it was in.
    pub fn remove(&mut self, addr: PageAddr) -> bool {
        self.remove_run(Run { addr, count: 1 }) == 1
    }

    /// Adds the pages of `run` that the VM has; how many were not in before.
    pub fn insert_run(&mut self, run: Run) -> u64 {
        let n = self.each_word(run, |word, m| {
            let new = (m & !*word).count_ones();
            *word |= m;
            new
        });
        self.len += n;
        n
    }

    /// Takes the pages of `run` out; how many were in.
    pub fn remove_run(&mut self, run: Run) -> u64 {
        let n = self.each_word(run, |word, m| {
            let old = (m & *word).count_ones();
            *word &= !m;
            old
        });
        self.len -= n;
        n
    }

    fn each_word(&mut self, run: Run, mut f: impl FnMut(&mut u64, u64) -> u32) -> u64 {
        let block = usize::from(run.addr.block.0);
        let (Some(words), Some(pages)) = (self.words.get_mut(block), self.pages.get(block)) else { return 0 };
        let end = run.addr.page.saturating_add(run.count).min(*pages);
        let (mut at, mut n) = (run.addr.page, 0);
        while at < end {
            let to = end.min((at / 64 + 1) * 64);
            n += u64::from(f(&mut words[at as usize / 64], mask(at, to)));
            at = to;
        }
        n
    }

    /// Adds a block's bits; what lies beyond the block's end is left out.
    pub fn merge(&mut self, block: usize, bits: &[u64]) {
        let Some(n) = self.pages.get(block).copied() else { return };
        for (i, (word, more)) in self.words[block].iter_mut().zip(bits).enumerate() {
            let rest = n - i as u32 * 64;
            let new = more & !*word & if rest >= 64 { u64::MAX } else { (1 << rest) - 1 };
            self.len += u64::from(new.count_ones());
            *word |= new;
        }
    }

    /// Adds all pages of another set of the same VM.
    pub fn merge_all(&mut self, other: &Self) {
        if other.is_empty() {
            return;
        }
        for block in 0..other.words.len() {
            self.merge(block, &other.words[block]);
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        if self.len > 0 {
            self.words.iter_mut().for_each(|w| w.fill(0));
            self.len = 0;
        }
    }

    /// The first page of a block at or after `from` that is in the set, or is not.
    fn find(&self, block: BlockIx, from: u32, is_in: bool) -> Option<u32> {
        let (words, pages) = self.block(block)?;
        if from >= pages {
            return None;
        }
        let flip = if is_in { 0 } else { u64::MAX };
        let mut at = from as usize / 64;
        let mut word = (words[at] ^ flip) & (u64::MAX << (from % 64));
        while word == 0 {
            at += 1;
            word = *words.get(at)? ^ flip;
        }
        let page = at as u32 * 64 + word.trailing_zeros();
        (page < pages).then_some(page)
    }

    /// The first page at or after `from`, in the order of blocks and pages.
    #[must_use]
    pub fn next(&self, from: PageAddr) -> Option<PageAddr> {
        (from.block.0..u16::try_from(self.words.len()).unwrap_or(u16::MAX)).find_map(|block| {
            let start = if block == from.block.0 { from.page } else { 0 };
            let page = self.find(BlockIx(block), start, true)?;
            Some(PageAddr { block: BlockIx(block), page })
        })
    }

    /// Pages from `from` on that are in the set and follow each other, at most `most`; `from` must be in the set.
    #[must_use]
    pub fn run_at(&self, from: PageAddr, most: u32) -> Run {
        let end = self.block(from.block).map_or(from.page, |(_, pages)| {
            let most = from.page.saturating_add(most).min(pages);
            self.find(from.block, from.page, false).map_or(most, |e| e.min(most))
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

    /// All pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageAddr> + '_ {
        let mut from = Some(PageAddr { block: BlockIx(0), page: 0 });
        std::iter::from_fn(move || {
            let addr = self.next(from?)?;
            from = after(addr);
            Some(addr)
        })
    }
}

/// The page that follows; none after the last that can be named.
#[must_use]
pub fn after(addr: PageAddr) -> Option<PageAddr> {
    match addr.page.checked_add(1) {
        Some(page) => Some(PageAddr { page, ..addr }),
        None => Some(PageAddr { block: BlockIx(addr.block.0.checked_add(1)?), page: 0 }),
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
    fn it_holds_the_pages_of_the_vm_and_no_others() {
        let mut s = PageSet::full(&[70, 0, 3]);
        assert_eq!((s.len(), s.iter().count()), (73, 73));
        assert_eq!(s.iter().last(), Some(at(2, 2)));
        for beyond in [at(0, 70), at(1, 0), at(2, 3), at(3, 0)] {
            assert!(!s.contains(beyond), "{beyond:?}");
            s.insert(beyond);
            s.remove(beyond);
        }
        s.merge(7, &[1]);
        assert_eq!(s.len(), 73);
        s.clear();
        assert!(s.is_empty() && s.next(at(0, 0)).is_none());
    }

    #[test]
    fn a_block_of_no_pages_and_the_last_page_of_a_word_are_no_special_cases() {
        let mut s = PageSet::empty(&[0, 64, 65]);
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

    proptest! {
        #[test]
        fn it_is_what_a_set_of_numbers_would_be(
            ops in prop::collection::vec((0..3u16, 0..150u32, any::<bool>()), 0..300),
            words in prop::collection::vec(any::<u64>(), 3),
        ) {
            let pages = [130, 64, 1];
            let (mut set, mut model) = (PageSet::empty(&pages), BTreeSet::new());
            for (block, page, add) in ops {
                let addr = at(block, page);
                let _ = if add { set.insert(addr) } else { set.remove(addr) };
                if page < pages[usize::from(block)] {
                    if add { model.insert(addr); } else { model.remove(&addr); }
                }
            }
            set.merge(0, &words);
            for (i, w) in words.iter().enumerate() {
                for bit in (0..64).filter(|b| w & (1 << b) != 0) {
                    let page = i as u32 * 64 + bit;
                    if page < pages[0] { model.insert(at(0, page)); }
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!(set.iter().eq(model.iter().copied()));
            let mut other = PageSet::empty(&pages);
            other.insert(at(1, 63));
            other.merge_all(&set);
            model.insert(at(1, 63));
            prop_assert!(other.iter().eq(model.into_iter()));
        }

        #[test]
        fn runs_are_what_their_pages_would_be(ops in prop::collection::vec((any::<bool>(), 0..3u16, 0..300u32, 1..140u32), 0..60)) {
            let sizes = [200, 1, 300];
            let (mut s, mut model) = (PageSet::empty(&sizes), BTreeSet::new());
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
        }
    }
}
