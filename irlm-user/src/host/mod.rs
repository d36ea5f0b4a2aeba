//! The kernel's and QEMU's insides: the only floor that may use `unsafe`, each with its proof.

/// Guest RAM, read from outside of QEMU.
pub mod ram;
/// Scheduling class of a thread.
pub mod sched;
//! The host floor: the one place that talks to the kernel about memory, schedulers and eBPF, and the only one that
//! may contain `unsafe`.

pub mod bpf;
