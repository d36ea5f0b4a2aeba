//! Post-copy: a VM runs at its target while some of its pages still are at its source. Which page is where, who is
//! asked for it and when, and what a page that comes may still be written to; without I/O and without a clock.
//!
//! At the switch the source names the pages that are *due*. Every other page stays as the target has it: what came in
//! earlier rounds, or zeros. From then on each page of the VM is in one of these states:
//!
//! ```text
//!   due ──record with content──────────────────────────────────────► here
//!    │ └─record "uniform zero"─────────────────────────────────────► settled (zeros; nothing to write)
//!    │
//!    └─reference─► held ──content in the store─► ready ──placed────► here
//!                   │ └─deadline, void, no holder─► demanded of the source ─► here
//!    any ──the guest gives the page away (REMOVE)─► settled: zeros at its next touch, and nothing late is written there
//! ```
//!
//! A fault is answered from, in this order: what is here already (another fault or the filling was faster: the vCPU is
//! only woken), settled pages, the store, the target host that is to forward the content (it is asked to hurry, and
//! after a deadline the next that may have it), the VM's source.
//!
//! Nothing is lost with a connection: the target keeps its states, the vCPUs wait, and when the source is back it is told
//! what is lacking. The source's copy stands still from the switch on, so it can send any page again.

// What is sent next, at the source.
pub mod source;
// Where each page is, at the target.
pub mod arrival;

pub use super::page_set::{PageSet, Run};
pub use arrival::{Answer, Asks, Fill, Origin, Patience, Put};
pub use source::Serve;

#[cfg(test)]
mod tests;
