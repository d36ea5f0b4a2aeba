//! What a waiting page waits for, and what there cannot be more of.

use crate::digest::Digest;
use crate::units::{HostIx, PageId, VmIx};

/// What a waiting page waits for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Key {
    /// Content of this digest.
    Digest(Digest),
    /// The digest that this source host's id stands for.
    Id(HostIx, PageId),
}

/// Something a VM waits for has changed: it is to call [`TargetVm::woken`](super::TargetVm::woken).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wake {
    /// Who waits.
    pub vm: VmIx,
    /// For what.
    pub key: Key,
}

/// What a host has reached its bound of.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum TargetError {
    /// More ids than the store could ever serve.
    #[error("more than {0} page ids bound: the peer names contents without end")]
    TooManyIds(usize),
    /// The waiting list is full.
    #[error("more than {0} pages wait for content: the peer refers to contents without end")]
    TooManyWaiting(usize),
    /// The source said that a newer version was on its way, and ended RAM without it.
    #[error("page {page} of block {block} was said to be sent anew, but RAM ended without it")]
    BrokenPromise {
        /// Block number.
        block: u16,
        /// Page number.
        page: u32,
    },
}
