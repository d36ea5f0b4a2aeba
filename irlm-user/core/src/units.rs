//! One place for page arithmetic and for the small numbers that name hosts, VMs, blocks and pages, so that none of
//! them is ever a bare integer that could be mistaken for another.

/// Bytes in a guest page (x86; QEMU's target page).
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_BITS: u32 = 12;

/// Content of one guest page.
pub type PageBytes = [u8; PAGE_SIZE];

/// A host's number in its group: source and target hosts are counted apart, each from 0, in the group file's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostIx(pub u16);

/// A VM's number in its group, from 0, in the group file's order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VmIx(pub u16);

/// A RAM block's number in the order of the stream's block list (QEMU docs/devel/migration).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockIx(pub u16);

/// A guest page: block and page number in it (byte offset / 4096). 2^32 pages are 16 TiB a block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageAddr {
    /// Which block.
    pub block: BlockIx,
    /// Which page of it.
    pub page: u32,
}

/// The short name of a shared content, valid in one group: position `index` in hash bucket `bucket` of the rack
/// index (paper §2.4), or, for content that only one source host knows, [`PageId::local`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageId {
    /// Hash bucket of the index, below 2^31; the top bit marks a host-local id.
    pub bucket: u32,
    /// Position in the bucket.
    pub index: u32,
}

impl PageId {
    /// The `n`-th id given out by source host `host` itself, without asking the index.
    #[must_use]
    pub fn local(host: HostIx, n: u32) -> Self {
        Self { bucket: 0x8000_0000 | u32::from(host.0), index: n }
    }
}

/// A time on the caller's clock, in nanoseconds from an arbitrary start. `core` never reads a clock itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// `self + ms` milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1_000_000)))
    }
}
