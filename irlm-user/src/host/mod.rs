//! The kernel's and QEMU's insides: the only floor that may use `unsafe`, each with its proof.

// eBPF programs: loading, attaching, reading their counters.
pub mod bpf;
// How many files this process may have open.
pub mod descriptors;
// Which pages of a guest are dirtied: loading, attaching, reading; and looking at contents.
pub mod dirty;
// A virtual machine monitor of our own.
pub mod kvm;
// A network namespace of one's own.
pub mod netns;
// Guest RAM, read from outside of QEMU.
pub mod ram;
// Scheduling class of a thread.
pub mod sched;
// TCP options.
pub mod sockopt;
// Page faults of a VMM, answered from here.
pub mod uffd;
