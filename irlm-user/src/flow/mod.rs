//! The floor of plain threads and blocking I/O: what moves pages, or answers the threads that do.

/// The rack index's server and its client.
pub mod index;
