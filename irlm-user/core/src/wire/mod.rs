//! The wire between agents, as pure encoding and decoding; `docs/wire.md` is its public description and carries a hash
//! of these files.

// Datagrams of the target rack's multicast.
pub mod cast;
// Frame header, kinds, errors and field readers.
pub mod frame;
// Agent and coordinator to index server, and back.
pub mod index_msg;
// Keys derived from a group's secret.
pub mod keys;
// Caps on everything a peer may send.
pub mod limits;
// Meta parts of all frames but `Pages`.
pub mod messages;
// Records of `Pages` frames.
pub mod pages;
// Post-copy: sets of pages, and what is wanted first.
pub mod paging;

#[cfg(test)]
mod tests;
