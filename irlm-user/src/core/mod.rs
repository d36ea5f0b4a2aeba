//! The pure floor: what is decided, kept free of sockets, clocks and unsafe code, so that two whole racks run in
//! one process under a virtual clock.
#![forbid(unsafe_code)]

/// Content hashes and the zero/uniform test.
pub mod digest;
/// Page size, page addresses, host and VM numbers.
pub mod units;
