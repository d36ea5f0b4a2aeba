//! A connection to whoever runs a VM, and whose process it is.

use crate::flow::MoveError;
use crate::host::ram::GuestRam;
use crate::host::sched::{self, Process};
use crate::net::qmp::Qmp;
use crate::net::vmm::Vmm;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// The process behind a monitor or control connection.
pub(in crate::flow) fn process_of(socket: &impl AsFd) -> Option<Process> {
    sched::peer_pid(socket.as_fd()).ok().flatten().and_then(|pid| Process::of(pid).ok())
}

/// The number of the process behind a monitor. Refused where it is in a process namespace that is not visible from here.
pub(in crate::flow) fn visible_pid(path: &Path, qmp: &Qmp) -> Result<u32, MoveError> {
    let pid = sched::peer_pid(qmp.as_fd()).map_err(MoveError::at(path.display()))?;
    let why = || format!("{}: QEMU's process is not visible from here", path.display());
    pid.ok_or_else(|| MoveError::Refused(why()))
}

/// A QEMU's memory, as its monitor says where it is.
pub(in crate::flow) fn memory_of(qmp: &mut Qmp) -> Result<GuestRam, MoveError> {
    let pid = visible_pid(qmp.path(), qmp)?;
    Ok(GuestRam::open(pid, &mut |line| qmp.hmp(line).map_err(Into::into))?)
}

/// A connection to the monitor of the QEMU that was there when the journal was written: after a
/// restart another VM's QEMU may listen at the same path, and must not be continued, cancelled or
/// ended for this one.
pub(in crate::flow) fn monitor(
    path: &Path,
    timeout: Duration,
    expected: Option<Process>,
) -> Result<Qmp, MoveError> {
    let qmp = Qmp::connect(path, timeout)?;
    match expected {
        Some(p) if process_of(&qmp) != Some(p) => Err(MoveError::Stranger(format!(
            "QMP {}: another QEMU than the one of before listens there: left alone",
            path.display()
        ))),
        _ => Ok(qmp),
    }
}

/// The same for a VMM of our own.
pub(in crate::flow) fn control(
    path: &Path,
    timeout: Duration,
    expected: Option<Process>,
) -> Result<Vmm, MoveError> {
    let vmm = Vmm::connect(path, timeout)?;
    match expected {
        Some(p) if process_of(&vmm) != Some(p) => Err(MoveError::Stranger(format!(
            "VMM {}: another VMM than the one of before listens there: left alone",
            path.display()
        ))),
        _ => Ok(vmm),
    }
}
