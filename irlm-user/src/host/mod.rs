//! The kernel's and QEMU's insides: the only floor that may use `unsafe`, each with its proof.

// eBPF programs: loading, attaching, reading their counters.
pub mod bpf;
// A network namespace of one's own.
pub mod netns;
// Guest RAM, read from outside of QEMU.
pub mod ram;
// Scheduling class of a thread.
pub mod sched;
// TCP options.
pub mod sockopt;
