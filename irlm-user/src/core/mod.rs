//! The pure floor: what is decided, kept free of sockets, clocks and unsafe code, so that two whole racks run in
//! one process under a virtual clock.
#![forbid(unsafe_code)]

/// Content hashes and the zero/uniform test.
pub mod digest;
/// The rack index: digest to holders, and the page ids it gives out.
pub mod index;
/// The share plan: who carries which shared content, to whom.
pub mod plan;
/// Page size, page addresses, host and VM numbers.
pub mod units;
/// What agents, index and coordinator say to each other.
pub mod wire;
