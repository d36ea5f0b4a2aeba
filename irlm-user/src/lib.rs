//! IRLM as a library: one module a floor; imports point only downward (ARCHITECTURE.md, `cargo xtask tidy`).

// Agents, groups and what they say to each other.
pub mod control;
/// Pure logic, a crate of its own: no I/O, no clock, no unsafe.
pub use irlm_core as core;
// The data plane: threads, bounded queues, vectored I/O.
pub mod flow;
// The kernel's and QEMU's insides; the only floor with unsafe code.
pub mod host;
// Sockets and what is spoken on them.
pub mod net;
// Logging and human-readable figures; usable by every floor but core.
pub mod obs;
// One module a role of the program.
pub mod roles;
