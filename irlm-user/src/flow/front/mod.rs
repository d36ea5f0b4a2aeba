//! Who runs a VM, and how it is reached. Both ends of a move are of one kind.

// What can be known of a VM beforehand, and what it says about moving it.
mod facts;
// Of a QEMU.
pub(in crate::flow) mod qemu;
// Settings of a QEMU that cannot be put back at once.
pub(crate) mod restorer;
// Of a VMM of our own.
pub(in crate::flow) mod vmm;

pub use facts::{Facts, Identity, source_refusals, target_refusals};

use crate::host::sched::{self, Process};
use crate::net::qmp::Qmp;
use crate::net::vmm::Vmm;
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
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
    pub fn greet(&self, timeout: Duration) -> Result<(), String> {
        match self {
            Self::Qmp(path) => monitor(path, timeout, None).map(drop),
            Self::Vmm(path) => control(path, timeout, None).map(drop),
        }
    }

    /// What can be seen of the VM and whoever runs it, on a connection of its own: nothing is changed, and
    /// the connection is closed again, because a QEMU's monitor serves one client.
    pub fn facts(&self, timeout: Duration) -> Result<Facts, String> {
        match self {
            Self::Qmp(path) => {
                let mut qmp = monitor(path, timeout, None)?;
                qmp.set_timeout(timeout);
                qemu::facts(&mut qmp).map_err(|e| e.to_string())
            }
            Self::Vmm(path) => {
                let mut vmm = control(path, timeout, None)?;
                vmm.set_timeout(timeout);
                vmm::facts(&mut vmm, &path.display().to_string()).map_err(|e| e.to_string())
            }
        }
    }
}

impl std::fmt::Display for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.socket().display().fmt(f)
    }
}

/// The process behind a monitor or control connection.
pub(in crate::flow) fn process_of(socket: &impl AsFd) -> Option<Process> {
    sched::peer_pid(socket.as_fd()).ok().flatten().and_then(|pid| Process::of(pid).ok())
}

/// A connection to the monitor of the QEMU that was there when the journal was written: after a restart another VM's
/// QEMU may listen at the same path, and must not be continued, cancelled or ended for this one.
pub(in crate::flow) fn monitor(
    path: &Path,
    timeout: Duration,
    expected: Option<Process>,
) -> Result<Qmp, String> {
    let qmp = Qmp::connect(path, timeout).map_err(|e| e.to_string())?;
    match expected {
        Some(p) if process_of(&qmp) != Some(p) => Err(format!(
            "QMP {}: another QEMU than the one of before listens there: left alone",
            path.display()
        )),
        _ => Ok(qmp),
    }
}

/// The same for a VMM of our own.
pub(in crate::flow) fn control(
    path: &Path,
    timeout: Duration,
    expected: Option<Process>,
) -> Result<Vmm, String> {
    let vmm = Vmm::connect(path, timeout).map_err(|e| e.to_string())?;
    match expected {
        Some(p) if process_of(&vmm) != Some(p) => Err(format!(
            "VMM {}: another VMM than the one of before listens there: left alone",
            path.display()
        )),
        _ => Ok(vmm),
    }
}
