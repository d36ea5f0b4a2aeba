//! Why a VM cannot do as asked: what all files of the VMM give back, so it is below them all.

use super::snapshot::SnapshotError;
use std::io;
use std::path::Path;

/// Why a VM cannot do as asked. Each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No KVM.
    #[error("/dev/kvm: {source} (no KVM on this host, or no permission: be root or in the group kvm)")]
    NoKvm {
        /// From the kernel.
        source: io::Error,
    },
    /// KVM is there and too old or too small.
    #[error("this host's KVM has no {what}{hint}")]
    Lacks {
        /// Which capability.
        what: &'static str,
        /// What to do without.
        hint: &'static str,
    },
    /// A call failed.
    #[error("KVM: {what}: {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// Guest memory cannot be had as asked.
    #[error("guest memory: {what}")]
    Memory {
        /// Why.
        what: String,
    },
    /// What to boot cannot be.
    #[error("cannot boot {path}: {what}")]
    Boot {
        /// The file.
        path: String,
        /// Why.
        what: String,
    },
    /// A disk or a network card that cannot be had.
    #[error("{name}: {what}")]
    Device {
        /// Which.
        name: String,
        /// Why.
        what: String,
    },
    /// The VM is not in the state for it.
    #[error("{what}")]
    Not {
        /// What it is, and what would be needed.
        what: String,
    },
    /// A vCPU does not leave the guest.
    #[error(
        "vCPU {vcpu} has not left the guest after {ms} ms (it may wait for a page); it stops as soon as it does"
    )]
    Stuck {
        /// Which.
        vcpu: u32,
        /// How long it was waited for.
        ms: u128,
    },
    /// Saved state that is not taken.
    #[error("saved state: {0}")]
    Snapshot(#[from] SnapshotError),
    /// A saved value that KVM does not take.
    #[error("saved state: vCPU {vcpu}: {what}")]
    Refused {
        /// Which.
        vcpu: u32,
        /// What it does not take.
        what: String,
    },
    /// userfaultfd.
    #[error("userfaultfd: {what}: {source}")]
    Userfault {
        /// What was tried.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
}

/// Short for this module's results.
pub type Result<T> = std::result::Result<T, KvmError>;

/// An error of kvm-ioctls, with what was tried.
pub(super) fn call<T>(what: &'static str, r: std::result::Result<T, kvm_ioctls::Error>) -> Result<T> {
    r.map_err(|e| KvmError::Call { what, source: io::Error::from_raw_os_error(e.errno()) })
}

/// An error of libc, with what was tried.
pub(super) fn last(what: &'static str) -> KvmError {
    KvmError::Call { what, source: io::Error::last_os_error() }
}

/// What is to be booted, and cannot be.
pub(super) fn cannot(path: &Path, what: &str) -> KvmError {
    KvmError::Boot { path: path.display().to_string(), what: what.into() }
}
