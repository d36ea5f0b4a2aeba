//! The host floor: the one place that talks to the kernel about memory, schedulers and eBPF, and the only one that
//! may contain `unsafe`.

pub mod bpf;
