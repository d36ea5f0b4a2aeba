//! What lending comes to, for whoever watches.

use std::sync::atomic::AtomicU64;

/// Counted while contents are lent and borrowed.
#[derive(Debug, Default)]
pub struct Lending {
    /// Contents lent, each once.
    pub lent: AtomicU64,
    /// Bytes that went to other source hosts.
    pub bytes: AtomicU64,
    /// Contents borrowed.
    pub borrowed: AtomicU64,
    /// Contents that lenders have sent, or said they have not got any more.
    pub(super) came: AtomicU64,
}
