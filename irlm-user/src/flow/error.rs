//! Why a step of a move was not done: what failed, by its type, and what may be done next ([`After`]).
//!
//! A step is what the drivers of the handover ask for ([`super::drive`]), or a part of that. Its error says in one line
//! for people what went wrong; programs ask for [`MoveError::after`] and [`MoveError::is_mute`].

use crate::core::qemu::BlockListError;
use crate::core::wire::frame::WireError;
use crate::host::dirty::DirtyError;
use crate::host::ram::RamError;
use crate::host::uffd::UffdError;
use crate::net::conn::NetError;
use crate::net::qmp::QmpError;
use crate::net::vmm::VmmError;
use std::error::Error;
use std::fmt::Display;
use std::io;

/// What is known of a step that failed, and so what may be done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// It was not done. The VM is as it was, and whose it was: the step may be tried again, or the attempt ended.
    Kept,
    /// It may have been done. How things stand must be asked before anything is done that depends on it.
    InDoubt,
    /// It can never be done: whoever held what it needs is gone.
    Final,
}

/// Why a step of a move was not done.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The journal did not take a note.
    #[error("{source}")]
    Journal {
        /// In the journal's words.
        source: Box<dyn Error + Send + Sync>,
        /// It may be on disk all the same.
        maybe: bool,
    },
    /// On a QEMU's monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// On the control socket of a VMM of ours.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Another process than the one that was seen before listens there. It is left alone.
    #[error("{0}")]
    Stranger(String),
    /// The VM's process, or its memory, is gone for good.
    #[error("{0}")]
    Gone(String),
    /// On a connection to another agent.
    #[error(transparent)]
    Peer(#[from] NetError),
    /// Another agent said what the protocol does not allow.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The VM's memory cannot be found, read, watched or filled.
    #[error("{0}")]
    Memory(Box<dyn Error + Send + Sync>),
    /// The system did not give what was asked of it. What was being written to a connection may have left in part.
    #[error(transparent)]
    System(#[from] io::Error),
    /// The VM, whoever runs it, or the group is not as this step needs it. Nothing was touched.
    #[error("{0}")]
    Refused(String),
    /// It was told to do it, and is not seen to have done it.
    #[error("{0}")]
    Unsettled(String),
    /// Any of them, with where it was.
    #[error("{at}: {source}")]
    At {
        /// A VM, a socket, or what was being done.
        at: String,
        /// What went wrong there.
        source: Box<Self>,
    },
}

impl MoveError {
    /// Of the VM's memory.
    pub(in crate::flow) fn memory(e: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Memory(e.into())
    }

    /// A refusal in one line.
    pub(in crate::flow) fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }

    /// For [`Result::map_err`]: the same, with where it was.
    pub fn at<E: Into<Self>>(at: impl Display) -> impl FnOnce(E) -> Self {
        move |e| Self::At { at: at.to_string(), source: Box::new(e.into()) }
    }

    /// What is known of the step, and so what may be done next.
    #[must_use]
    pub fn after(&self) -> After {
        match self {
            Self::Qmp(
                QmpError::Refused { .. }
                | QmpError::NoCapability { .. }
                | QmpError::Connect { .. }
                | QmpError::Busy { .. },
            )
            | Self::Vmm(VmmError::Refused { .. } | VmmError::Connect { .. })
            | Self::Peer(NetError::Connect { .. } | NetError::Declined { .. })
            | Self::Journal { maybe: false, .. }
            | Self::Stranger(_)
            | Self::Wire(_)
            | Self::Memory(_)
            | Self::Refused(_) => After::Kept,
            Self::Qmp(_)
            | Self::Vmm(_)
            | Self::Peer(_)
            | Self::Journal { .. }
            | Self::System(_)
            | Self::Unsettled(_) => After::InDoubt,
            Self::Gone(_) => After::Final,
            Self::At { source, .. } => source.after(),
        }
    }

    /// Whether whoever runs the VM did not answer: that connection is not to be used again, and its process may be ending.
    pub(in crate::flow) fn is_mute(&self) -> bool {
        match self {
            Self::Qmp(e) => !matches!(e, QmpError::Refused { .. }),
            Self::Vmm(e) => !matches!(e, VmmError::Refused { .. }),
            Self::Stranger(_) | Self::Gone(_) => true,
            Self::At { source, .. } => source.is_mute(),
            _ => false,
        }
    }
}

impl From<RamError> for MoveError {
    fn from(e: RamError) -> Self {
        Self::memory(e)
    }
}

impl From<DirtyError> for MoveError {
    fn from(e: DirtyError) -> Self {
        Self::memory(e)
    }
}

impl From<UffdError> for MoveError {
    fn from(e: UffdError) -> Self {
        Self::memory(e)
    }
}

impl From<BlockListError> for MoveError {
    fn from(e: BlockListError) -> Self {
        Self::memory(e)
    }
}

/// Goes on only if nothing was found that forbids it.
pub(in crate::flow) fn unless_refused(refusals: &[String]) -> Result<(), MoveError> {
    if refusals.is_empty() { Ok(()) } else { Err(MoveError::Refused(refusals.join("; "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_may_be_done_next_wherever_it_was() {
        let (path, command) = (String::new, || "cont".to_owned());
        let said_no = QmpError::Refused { path: path(), command: command(), class: path(), desc: path() };
        let journal = |maybe| MoveError::Journal { source: "full".into(), maybe };
        let silent = NetError::Silent { peer: path(), ms: 1 };
        for (e, after, mute) in [
            (said_no.into(), After::Kept, false),
            (QmpError::Busy { path: path(), ms: 1 }.into(), After::Kept, true),
            (QmpError::Timeout { path: path(), command: command(), ms: 1 }.into(), After::InDoubt, true),
            (QmpError::Closed { path: path(), command: command() }.into(), After::InDoubt, true),
            (VmmError::Refused { path: path(), command: "pause", why: path() }.into(), After::Kept, false),
            (VmmError::Timeout { path: path(), command: "pause", ms: 1 }.into(), After::InDoubt, true),
            (silent.into(), After::InDoubt, false),
            (io::Error::from(io::ErrorKind::BrokenPipe).into(), After::InDoubt, false),
            (journal(false), After::Kept, false),
            (journal(true), After::InDoubt, false),
            (MoveError::refused("it runs"), After::Kept, false),
            (MoveError::Stranger(path()), After::Kept, true),
            (MoveError::Unsettled(path()), After::InDoubt, false),
            (MoveError::Gone(path()), After::Final, true),
        ] {
            assert_eq!((e.after(), e.is_mute()), (after, mute), "{e:?}");
            let line = format!("v1: {e}");
            let e = MoveError::at("v1")(e);
            assert_eq!((e.after(), e.is_mute(), e.to_string()), (after, mute, line), "{e:?}");
        }
    }
}
