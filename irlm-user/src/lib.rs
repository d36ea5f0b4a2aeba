//! IRLM as a library: one module a floor; imports point only downward (ARCHITECTURE.md, `cargo xtask tidy`).

/// Pure logic: no I/O, no clock, no unsafe.
pub mod core;
/// Plain threads that move pages and answer for them.
pub mod flow;
