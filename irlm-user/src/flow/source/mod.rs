//! The departure of VMs from a source host. One thread a VM (`vm`) owns the QEMU stream and the sending half of the
//! VM connection; a reader thread (`back`) and a monitor thread (`minder`) tell it things through its inbox.
//!
//! ```text
//! QEMU ──unix──► vm thread: tap → look → resolve → frame ──tcp──► target
//!                    ▲ inbox: needs, words, return path (back) · STOP, completed, failed (minder) · cancel (control)
//! ```
//!
//! There is no queue between QEMU and the wire: the vm thread reads, and writes what it read; when the link is slow,
//! QEMU is slow (docs/qemu-stream.md). Of a VM that our own VMM runs (`kvm`) the vm thread reads the memory itself.

// Reader of the VM connection.
mod back;
// Pages into frames.
mod batch;
// What a VM's pages come to.
mod book;
// What all VMs of a group share.
mod group;
// What is known of one VM, and told to its thread.
mod handle;
// The runner of each kind of VM.
mod kinds;
// VMs that our own VMM runs: dirty log, kept digests, rounds.
pub mod kvm;
// Contents that stand for many similar ones, lent and borrowed.
pub mod lend;
// Asking the index about contents that appeared after the plan.
pub mod late;
// VMs whose QEMUs stream to each other.
mod direct;
// Monitor thread: events, downtime limit, taking the VM back.
mod minder;
// How VMs write, seen from outside.
pub mod observe;
// Hashing guests from outside, registering, applying the plan.
pub mod prepare;
// What the link to a target host gives.
pub mod probe;
// Sending planned contents ahead of the streams.
pub mod push;
// VMs that QEMU runs.
mod qemu;
// The sending half of a VM connection.
mod out;
// What a departure needs of whoever runs its VM.
pub mod runner;
// Similar pages that a target host has.
pub mod similar;
// QEMU's stream into frames.
mod tap;
// One VM's departure.
pub mod vm;

pub use crate::core::handover::Decision;
pub use group::{DepartureOptions, Drill, SourceGroup, Squeezing};
pub(crate) use handle::{Input, Says, UNKNOWN};
pub use handle::{Left, Phase, SourceJournal, SourceNote, SourceSpec, SourceStatus, SourceVmShared};
