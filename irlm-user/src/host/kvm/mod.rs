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
// Why a VM cannot do as asked.
mod error;
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

pub use error::{KvmError, Result};
use error::{call, last};

/// Most vCPUs of one VM.
pub const MAX_VCPUS: u32 = 64;
