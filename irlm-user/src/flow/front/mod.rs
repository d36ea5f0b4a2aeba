//! Who runs a VM, and how it is reached. Both ends of a move are of one kind.

// What can be known of a VM beforehand, and what it says about moving it.
mod facts;
// Of a QEMU.
pub(in crate::flow) mod qemu;
// Its process, and a connection to it.
mod reach;
// Settings of a QEMU that cannot be put back at once.
pub(crate) mod restorer;
// Of a VMM of our own.
pub(in crate::flow) mod vmm;

pub use facts::{Facts, Identity, source_refusals, target_refusals};
pub(in crate::flow) use reach::{control, memory_of, monitor, process_of, visible_pid};

use super::MoveError;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A VM's front: what runs it, and the socket by which that is reached.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Front {
    /// A QEMU, by a monitor socket of its own for the agent.
    Qmp(PathBuf),
    /// `irlm vmm`, by its control socket.
    Vmm(PathBuf),
}

impl Front {
    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        match self {
            Self::Qmp(path) | Self::Vmm(path) => path,
        }
    }

    /// Whether it is a QEMU.
    #[must_use]
    pub fn is_qemu(&self) -> bool {
        matches!(self, Self::Qmp(_))
    }

    /// The same front at another socket.
    #[must_use]
    pub fn at(&self, socket: PathBuf) -> Self {
        match self {
            Self::Qmp(_) => Self::Qmp(socket),
            Self::Vmm(_) => Self::Vmm(socket),
        }
    }

    /// Sees that somebody answers there.
    pub fn greet(&self, timeout: Duration) -> Result<(), MoveError> {
        match self {
            Self::Qmp(path) => monitor(path, timeout, None).map(drop),
            Self::Vmm(path) => control(path, timeout, None).map(drop),
        }
    }

    /// What can be seen of the VM and whoever runs it, on a connection of its own: nothing is changed, and
    /// the connection is closed again, because a QEMU's monitor serves one client.
    pub fn facts(&self, timeout: Duration) -> Result<Facts, MoveError> {
        match self {
            Self::Qmp(path) => {
                let mut qmp = monitor(path, timeout, None)?;
                qmp.set_timeout(timeout);
                Ok(qemu::facts(&mut qmp)?)
            }
            Self::Vmm(path) => {
                let mut vmm = control(path, timeout, None)?;
                vmm.set_timeout(timeout);
                Ok(vmm::facts(&mut vmm, &path.display().to_string())?)
            }
        }
    }
}

impl std::fmt::Display for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.socket().display().fmt(f)
    }
}
