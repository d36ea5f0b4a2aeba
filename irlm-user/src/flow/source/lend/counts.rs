//! With whom contents are lent and borrowed, and what that comes to.

use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;

/// Where the other source hosts are, and what is counted while contents are lent and borrowed.
#[derive(Debug, Default)]
pub struct Lending {
    /// Data address of each source host, where it is known.
    pub sources: Vec<Option<SocketAddr>>,
    /// Contents lent, each once.
    pub lent: AtomicU64,
    /// Bytes that went to other source hosts.
    pub bytes: AtomicU64,
    /// Contents borrowed.
    pub borrowed: AtomicU64,
    /// Contents that lenders have sent, or said they have not got any more.
    pub(super) came: AtomicU64,
}

impl Lending {
    /// Nothing yet. `sources`: data address of each source host, where it is known.
    #[must_use]
    pub fn new(sources: Vec<Option<SocketAddr>>) -> Self {
        Self { sources, ..Self::default() }
    }
}
