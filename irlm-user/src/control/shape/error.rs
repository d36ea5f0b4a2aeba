//! Why the port does not do what a policy or a budget says, and what is in force then.

use crate::control::config::Mistake;
use crate::net::tc::TcError;
use std::io;

/// Why the port does not do what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// The policy's text is wrong; nothing was changed.
    #[error(transparent)]
    Policy(#[from] Mistake),
    /// The port is not ours to shape, or not there; nothing was changed.
    #[error("{0}")]
    Port(String),
    /// The kernel refused a step; what was done before it was undone, as far as that goes.
    #[error(transparent)]
    Kernel(#[from] TcError),
    /// The eBPF programs did not take the tags; the old ones are in force.
    #[error("{0}")]
    Tags(String),
    /// The record of what was on the port before cannot be kept or removed.
    #[error("{path}: {source}")]
    Record {
        /// The file.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// What was on the port before is not there again; the record of it stays, and the next start tries again.
    #[error("{0}")]
    NotRestored(String),
    /// A new policy was not taken.
    #[error("{0}; the old policy stays")]
    OldPolicyStays(#[source] Box<ShapeError>),
}
