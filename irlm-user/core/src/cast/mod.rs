//! Multicast in the target rack, without sockets and without a clock: contents that two or more target hosts need
//! leave the host that got them once, in blocks cut into datagrams (`core::wire::cast`); each receiver says what it has
//! and what it misses, and the sender makes up for it (docs/multicast.md).
//!
//! ```text
//! block: pending at each host that needs it
//!   ├─ reported as had ────────────────────────────► done there
//!   ├─ reported as missed ─► repaired, to one or all ─► … at most TRIES times, then
//!   └─ host silent, or missed once too often ───────► handed over: its contents go by unicast, and a skip
//! ```
//!
//! Bounds: a sender keeps [`RING_BLOCKS`] blocks and [`RING_BYTES`], and takes no new one at the bound; a receiver keeps
//! incomplete blocks of [`HELD_BYTES`] in all, and lets the newest fragment go at the bound, to be asked for again.

// What a block is made of.
pub mod block;
// How fast a sender may send.
pub mod rate;
// What one host has heard of the others' blocks.
pub mod receiver;
// What one host has sent.
pub mod sender;

use super::units::Nanos;

/// Contents in one block.
pub const BLOCK_CONTENTS: usize = 64;
/// Blocks a sender keeps until all who need them have said that they have them.
pub const RING_BLOCKS: usize = 256;
/// Bytes of those blocks: 130 ms of a 1 Gbit/s link.
pub const RING_BYTES: usize = 16 << 20;
/// Bytes of incomplete blocks, of all senders, at one receiver.
pub const HELD_BYTES: usize = 32 << 20;

const MS: u64 = 1_000_000;

fn after(t: Nanos, ns: u64) -> Nanos {
    Nanos(t.0.saturating_add(ns))
}

fn since(now: Nanos, t: Nanos) -> u64 {
    now.0.saturating_sub(t.0)
}

/// The earlier of two times of which either may not be set.
fn earlier(a: Option<Nanos>, b: Option<Nanos>) -> Option<Nanos> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests;
