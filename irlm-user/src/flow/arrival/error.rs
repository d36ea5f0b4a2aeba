//! Why an arrival fails, on this side.

use super::emit::OutError;
use super::fetch::FetchError;
use super::loader::LoadError;
use crate::core::arrival::TargetError;
use crate::core::qemu::BlockListError;
use crate::core::wire::frame::WireError;

/// Device state held back while pages still wait. At the bound the arrival fails.
pub(super) const MAX_HELD: usize = 256 << 20;

/// Why an arrival failed, on this side.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArrivalError {
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Out(#[from] OutError),
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("a content does not hash to the digest its source gave")]
    Digest,
    #[error("more than {} MiB of device state while pages still wait", MAX_HELD >> 20)]
    Held,
    #[error("the source's block list is not valid: {0}")]
    Blocks(#[from] BlockListError),
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Fetch(#[from] FetchError),
}
