//! A small virtual machine monitor on KVM: the front whose insides are ours, so that dirtied pages are known one by one and
//! a page that has not arrived can be waited for. Here is all of it that touches KVM; the process around it is
//! `control::vmm` and `irlm vmm` (decision 0007).
//!
//! A [`Machine`](machine::Machine) is memory in memfds (`memory`), vCPUs on threads of their own (`vcpu`), a serial
//! port (`devices`), disks, network cards and a balloon (`virtio`), a boot path (`boot`), a log of writes (`dirty`), and state that can
//! be saved and taken over (`state`, in the format of [`snapshot`]).

// What is in memory before the first instruction.
mod boot;
// The serial port and the few others that end a machine.
mod devices;
// Which pages were written.
mod dirty;
// Long mode as a 64-bit Linux kernel expects to find it.
mod linux;
// The whole of it.
pub mod machine;
// Guest memory in memfds.
pub mod memory;
// The tables that tell a kernel of its processors.
mod mptable;
// ioctls that kvm-ioctls does not have.
mod raw;
// One vCPU's dirty ring.
mod ring;
// The bytes of saved state.
pub mod snapshot;
// Saved state, taken from KVM and given to it.
mod state;
// Missing pages are asked for.
pub(crate) mod userfault;
// vCPU threads.
mod vcpu;
// Disks, network cards and the balloon.
mod virtio;

use std::io;

/// Most vCPUs of one VM.
pub const MAX_VCPUS: u32 = 64;

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
    Snapshot(#[from] snapshot::SnapshotError),
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
fn call<T>(what: &'static str, r: std::result::Result<T, kvm_ioctls::Error>) -> Result<T> {
    r.map_err(|e| KvmError::Call { what, source: io::Error::from_raw_os_error(e.errno()) })
}

/// An error of libc, with what was tried.
fn last(what: &'static str) -> KvmError {
    KvmError::Call { what, source: io::Error::last_os_error() }
}
