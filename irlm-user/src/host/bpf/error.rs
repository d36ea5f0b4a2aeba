//! What can go wrong between the classifiers and user space.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use irlm_common::{ABI_VERSION, MAX_FLOWS, MAX_PREFIXES};

/// Longest name for [`super::default_pin_dir`].
pub(super) const MAX_NAME: usize = 64;

/// Why the classifiers could not be loaded, attached, pinned, filled or read.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The binary carries no object.
    #[error(
        "this build of irlm has no eBPF object: build it with `cargo xtask`, which makes the object first"
    )]
    NoObject,
    /// The object is of another version of this source tree.
    #[error("the eBPF object is not of ABI {ABI_VERSION}: build it anew with `cargo xtask`")]
    Abi,
    /// The kernel or the loader refused the object.
    #[error(
        "eBPF object not loaded: {text}; needs root (or CAP_BPF and CAP_NET_ADMIN) and Linux 5.15 or later"
    )]
    Load {
        /// The whole chain of causes.
        text: String,
        /// The kernel's error number, if the kernel said no.
        os_error: Option<i32>,
    },
    /// The object lacks a program or a map that its ABI promises.
    #[error("eBPF object has no {0}: build it anew with `cargo xtask`")]
    Missing(&'static str),
    /// Neither TCX nor clsact took the programs.
    #[error("eBPF classifiers not attached to {iface}: {text}; check the interface's name with `ip link`")]
    Attach {
        /// The interface.
        iface: String,
        /// What both ways of attaching said.
        text: String,
    },
    /// The table of flows is full, or the kernel refused the entry.
    #[error("flow {local} - {remote} not registered with eBPF (at most {MAX_FLOWS} flows): {text}")]
    Flow {
        /// This host's end.
        local: SocketAddr,
        /// The other end.
        remote: SocketAddr,
        /// What the kernel said.
        text: String,
    },
    /// A policy that cannot be: the text says which value is out of range.
    #[error("tagging policy refused: {0}; the one before stays in force")]
    Policy(String),
    /// A policy that the kernel did not take.
    #[error("tagging policy not written: {0}; the one before stays in force")]
    PolicyWrite(String),
    /// The counters could not be read.
    #[error("eBPF counters not read: {0}")]
    Counters(String),
    /// An agent's name that cannot name a directory.
    #[error("{0:?} cannot name a pin directory: use up to {MAX_NAME} of A-Z a-z 0-9 _ - and .")]
    Name(String),
    /// A directory of pins that is not there, or not of this ABI.
    #[error("{}: {text}", path.display())]
    Pins {
        /// The directory or pin.
        path: PathBuf,
        /// What is wrong with it.
        text: String,
    },
    /// `BPF_PROG_TEST_RUN` did not run.
    #[error("eBPF program not run on a test packet: {0}")]
    Trial(String),
}

impl BpfError {
    /// True if this machine or build cannot do eBPF at all, so that trying again is no use: no object, no
    /// permission, no system call.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::NoObject => true,
            Self::Load { os_error, .. } => {
                matches!(os_error, Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EOPNOTSUPP))
            }
            _ => false,
        }
    }

    pub(super) fn too_many_prefixes(number: usize) -> Self {
        Self::Policy(format!("{number} rack prefixes, at most {MAX_PREFIXES}"))
    }
}

/// Longest text taken over from the loader: a verifier's log can fill a screen.
const MAX_TEXT: usize = 500;

/// An error with all its causes on one line; aya's errors keep the reason in `source`.
pub(in crate::host) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_TEXT).collect()
}

/// The first system error in the chain, as its number.
pub(super) fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        cause = error.source();
    }
    None
}

impl From<EbpfError> for BpfError {
    fn from(error: EbpfError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}

impl From<ProgramError> for BpfError {
    fn from(error: ProgramError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}

impl From<MapError> for BpfError {
    fn from(error: MapError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}
