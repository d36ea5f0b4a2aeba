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

pub use arrival::Arrival;
pub use departure::Departure;
pub use standing::{GuestState, Ran, Standing, Took};

use serde::{Deserialize, Serialize};

/// How an operator settles a VM in doubt by hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// The target's copy is the one (the source's stays paused for good).
    Target,
    /// The source's copy is the one (the target's must have been discarded).
    Source,
}

/// What the source's journal holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The VM is the source's; its stream may be under way.
    Streaming,
    /// The target has loaded everything, or the two QEMUs see to it that it has before the source's completes; QEMU is
    /// being told that it may complete.
    GivingUp,
    /// QEMU has completed: the VM stays paused here for good; the target may run it.
    GaveUp,
    /// The target runs it and we know.
    Done,
    /// The attempt failed; the VM is the source's.
    Aborted,
    /// Post-copy: the VM stays paused here for good and the target may run it, but its pages are still needed.
    Serving,
    /// It was given up, and the target's QEMU refuses to run it: it is being taken back.
    TakingBack,
}

/// What the target's journal holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// The target QEMU is being filled.
    Filling,
    /// Everything is loaded; the VM is paused, and the source's until it says otherwise.
    Loaded,
    /// This is the running copy.
    Running,
    /// The target copy has been discarded.
    Discarded,
    /// Post-copy: the state is loaded and faults are caught; the VM is paused, and the source's until it says otherwise.
    Ready,
    /// Post-copy: this is the running copy, and some of its pages are still at the source.
    Fetching,
    /// Post-copy: this is the running copy, and it is whole.
    Filled,
    /// Loaded, and its QEMU refuses to run it: it never runs here unless the source says that its copy is gone.
    Refused,
    /// This was the VM, or may have been, and its process has ended before it was whole or was seen to run.
    Lost,
}
