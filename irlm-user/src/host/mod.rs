//! The kernel's and QEMU's insides: the only floor that may use `unsafe`, each with its proof.

// eBPF programs: loading, attaching, reading their counters.
pub mod bpf;
// Guest RAM, read from outside of QEMU.
pub mod ram;
// Scheduling class of a thread.
pub mod sched;
// TCP options.
pub mod sockopt;
