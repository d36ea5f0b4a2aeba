//! Digests that preparation took of a VM whose writes are logged page by page: a page that the log does not name since
//! still has that content, so it need not be hashed again when it leaves. No stream proxy can know that of its guest.
//!
//! The order that makes it true, kept by `flow::source::kvm`: the log is on before the first page is read; a page is
//! read, then the log is harvested, and only what that harvest does not name is what its digest says.

use super::digest::Digest;
use super::page_set::PageSet;
use super::units::PageAddr;
use std::sync::Arc;

/// Pages that are not uniform with their digests, by block, ascending.
pub type Digests = Arc<Vec<Vec<(u32, Digest)>>>;

/// What is still known of a VM's pages.
#[derive(Debug)]
pub struct Kept {
    digests: Digests,
    stale: PageSet,
}

impl Kept {
    /// Nothing is known of a VM with so many pages in each block.
    #[must_use]
    pub fn nothing(pages: &[u32]) -> Self {
        Self { digests: Digests::default(), stale: PageSet::empty(pages) }
    }

    /// Preparation is over. Digests of pages that have been written since the log is on are not believed, whenever in
    /// between they were taken.
    pub fn learn(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// The log names these pages of a block.
    pub fn written(&mut self, block: usize, bits: &[u64]) {
        self.stale.merge(block, bits);
    }

    /// The page's digest, unless it has been written since.
    #[must_use]
    pub fn get(&self, addr: PageAddr) -> Option<Digest> {
        let block = self.digests.get(usize::from(addr.block.0))?;
        let at = block.binary_search_by_key(&addr.page, |(page, _)| *page).ok()?;
        (!self.stale.contains(addr)).then(|| block[at].1)
    }

    /// Whether the log has named the page.
    #[must_use]
    pub fn is_stale(&self, addr: PageAddr) -> bool {
        self.stale.contains(addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockIx;

    #[test]
    fn a_digest_is_kept_until_its_page_is_written_and_never_believed_again() {
        let at = |page| PageAddr { block: BlockIx(1), page };
        let d = |n| Digest([n; 20]);
        let mut kept = Kept::nothing(&[10, 100]);
        // Written while preparation was still reading.
        kept.written(1, &[1 << 5]);
        assert_eq!(kept.get(at(3)), None);
        kept.learn(Arc::new(vec![vec![], vec![(3, d(3)), (5, d(5)), (70, d(70))]]));
        assert_eq!((kept.get(at(3)), kept.get(at(70))), (Some(d(3)), Some(d(70))));
        assert_eq!((kept.get(at(5)), kept.get(at(4)), kept.get(at(1000))), (None, None, None));
        kept.written(1, &[0, 1 << 6]);
        kept.written(9, &[u64::MAX]);
        assert_eq!((kept.get(at(3)), kept.get(at(70))), (Some(d(3)), None));
        assert!(kept.is_stale(at(70)) && !kept.is_stale(at(3)));
    }
}
