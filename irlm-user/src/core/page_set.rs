//! A set of pages of one VM, one bit each, in the form in which a dirty log comes: so that a log is taken in a word at
//! a time, and walked in guest order.

use super::units::{BlockIx, PageAddr};

/// Pages of one VM. It holds a bit for each page of the VM and no others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<Vec<u64>>,
    /// Pages of each block.
    pages: Vec<u32>,
    len: u64,
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

    fn word(&self, addr: PageAddr) -> Option<(usize, usize, u64)> {
        let block = usize::from(addr.block.0);
        (addr.page < *self.pages.get(block)?).then(|| (block, addr.page as usize / 64, 1 << (addr.page % 64)))
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, addr: PageAddr) -> bool {
        self.word(addr).is_some_and(|(block, at, bit)| self.words[block][at] & bit != 0)
    }

    /// Adds a page; a page that the VM does not have is not added.
    pub fn insert(&mut self, addr: PageAddr) {
        if let Some((block, at, bit)) = self.word(addr) {
            let word = &mut self.words[block][at];
            self.len += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Takes a page out.
    pub fn remove(&mut self, addr: PageAddr) {
        if let Some((block, at, bit)) = self.word(addr) {
            let word = &mut self.words[block][at];
            self.len -= u64::from(*word & bit != 0);
            *word &= !bit;
        }
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

    /// The first page at or after `from`, in the order of blocks and pages.
    #[must_use]
    pub fn next(&self, from: PageAddr) -> Option<PageAddr> {
        let mut at = from.page as usize / 64;
        let mut mask = u64::MAX << (from.page % 64);
        for block in usize::from(from.block.0)..self.words.len() {
            for (i, word) in self.words[block].iter().enumerate().skip(at) {
                let word = word & std::mem::replace(&mut mask, u64::MAX);
                if word != 0 {
                    let page = i as u32 * 64 + word.trailing_zeros();
                    return Some(PageAddr { block: BlockIx(u16::try_from(block).ok()?), page });
                }
            }
            (at, mask) = (0, u64::MAX);
        }
        None
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
                if add { set.insert(addr) } else { set.remove(addr) }
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
    }
}
