//! IRLM as a library: one module a floor; imports point only downward (ARCHITECTURE.md, `cargo xtask tidy`).

/// Pure logic: no I/O, no clock, no unsafe.
pub mod core;
/// The kernel's doors: eBPF, guest RAM, scheduling. The only floor with `unsafe`.
pub mod host;
