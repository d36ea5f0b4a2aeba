//! The arrival of VMs at a target host; mirror of `flow::source`. One thread a VM (`vm`) owns the receiving half of
//! the VM connection and the writing half of the QEMU stream; a reader thread (`back`) listens to QEMU's return path.
//! Push and peer connections have a thread each (`contents`); each peer host is served by a sender thread behind a
//! bounded queue of names (`peers`).
//!
//! ```text
//! source ──tcp──► vm thread: frames → records ─┬─► emit ──unix──► QEMU
//!                    ▲ inbox: wakes, SHUT …    └─► waiting list
//! push, peers ──tcp──► contents: hash → store ─► wakes · forward ─► peers ──tcp──► other target hosts
//! ```

// Reader of QEMU's return path, and heartbeats.
mod back;
// Multicast to the other target hosts.
pub mod cast;
// Push and peer connections: contents into the store.
pub(super) mod contents;
// Watching a QEMU that loads from another QEMU.
mod direct;
// Records into QEMU's stream.
mod emit;
// Why an arrival fails.
mod error;
// A VM that runs while its pages still come.
pub mod fetch;
// What all VMs of a group share.
mod group;
// What is known of one VM, and told to its thread.
mod handle;
// VMs for which our own VMM waits.
mod kvm;
// The loader of each kind of VM.
mod kinds;
// What an arrival needs of whoever loads its VM.
mod loader;
// What a VM connection brings, up to where it may be believed.
mod intake;
// Senders to other target hosts.
pub mod peers;
// A waiting QEMU's memory, made beforehand.
pub mod populate;
// VMs for which a QEMU waits.
mod qemu;
// What may be believed of what has come.
mod verified;
// One VM's arrival.
pub mod vm;

pub use group::{ArrivalOptions, GroupCounts, Member, TargetGroup};
pub(crate) use handle::{Call, Input};
pub use handle::{Phase, TargetJournal, TargetNote, TargetSpec, TargetStatus, TargetVmShared};
pub use loader::Before;
