//! What has come and may be believed, between those who check it and those who act on it.

use crate::core::delta::Missing;
use crate::core::units::PageBytes;
use crate::core::wire::pages::Placed;

/// A `Pages` frame that may be believed.
#[derive(Debug)]
pub(super) struct Verified<'s> {
    /// Its records.
    pub(super) records: &'s [Placed],
    /// The contents that they announce.
    pub(super) contents: &'s [PageBytes],
    /// Those that could not be made of what they refer to.
    pub(super) missing: Missing,
}

impl Verified<'_> {
    /// Content number `n`, if it is here.
    pub(super) fn content(&self, n: usize) -> Option<&PageBytes> {
        self.contents.get(n).filter(|_| !self.missing.contains(n))
    }
}
