//! Who owns the VM (invariant 1): the two sides of one VM's handover as pure drivers, [`departure`] and [`arrival`].
//! `flow::drive` carries their actions out; simulations do so with models of QEMUs, journals and links.
//!
//! ```text
//! source                                             target
//! Streaming ── VM stops, RAM and state are sent ───► Filling
//!     │                     ◄── Loaded ───────────── QEMU has loaded all: write Loaded, say it
//! write GivingUp, let QEMU complete (return path SHUT 0)
//!     │ QEMU: completed
//! write GaveUp, say it ── GivenUp ─────────────────► write Running, continue the VM, see it run
//!     │                     ◄── Runs ─────────────── say it
//! write Done
//! ```
//!
//! If the target's QEMU refuses to run it (another process has its disk, for instance), the target commits itself never to, so
//! that the source can take its copy back:
//!
//! ```text
//! GaveUp                                             Running: cont is refused, for two seconds
//!     │                     ◄── Refused ──────────── write Refused, say it
//! write TakingBack, continue the VM, see it run
//! write Aborted, say it ── Aborted ────────────────► write Discarded, quit
//! or: its process is gone ── Gone ─────────────────► write Running, continue the VM, for ever
//! ```
//!
//! With post-copy (`core::postcopy`) the VM runs at the target before its pages are all there, and the source's copy is
//! needed until they are:
//!
//! ```text
//! source                                             target
//! Streaming ── stopped; which pages are due, state ► Filling
//!     │                     ◄── Ready ────────────── state loaded, faults are caught: write Ready, say it
//! write Serving, say it ── GivenUp ────────────────► write Fetching, run the VM
//!     │                     ◄── Runs ─────────────── say it
//!     │ sends pages         ◄── Filled ───────────── the last page is there: write Filled, say it
//! write Done
//! ```
//!
//! Where the two QEMUs stream to each other (`docs/decisions/0014-direct.md`) the source gives up as soon as its QEMU has stopped
//! the VM and waits (`pause-before-switchover`): that QEMU completes only when the target's has said SHUT 0, so the target's agent
//! may hear `GivenUp` before it has seen *loaded*.
//!
//! Stock QEMU resumes the source by itself if its migration stream breaks before SHUT 0 arrived (docs/qemu-stream.md),
//! so up to *QEMU: completed* every failure leaves the VM with the source; the source says `GivenUp` only after its QEMU
//! has confirmed that it stays stopped, or has died. A side that hears nothing after its last word is *in doubt*: it keeps its VM
//! paused and keeps asking (the source calls, on a settle connection) until the other side answers.

// What a driver has still to do.
mod agenda;
// The target side.
pub mod arrival;
// The source side.
pub mod departure;
// What is known of a VM's two copies.
mod standing;
// What the journals hold.
mod state;

pub use arrival::Arrival;
pub use departure::Departure;
pub use standing::{GuestState, Ran, Standing, Took};
pub use state::{Decision, SourceState, TargetState};
