//! What both journals hold, and an operator's word.

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
    /// The target has loaded everything, or the two QEMUs see to it that it has before the source's
    /// completes; QEMU is being told that it may complete.
    GivingUp,
    /// QEMU has completed: the VM stays paused here for good; the target may run it.
    GaveUp,
    /// The target runs it and we know.
    Done,
    /// The attempt failed; the VM is the source's.
    Aborted,
    /// Post-copy: the VM stays paused here for good and the target may run it, but its pages are
    /// still needed.
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
    /// Post-copy: the state is loaded and faults are caught; the VM is paused, and the source's
    /// until it says otherwise.
    Ready,
    /// Post-copy: this is the running copy, and some of its pages are still at the source.
    Fetching,
    /// Post-copy: this is the running copy, and it is whole.
    Filled,
    /// Loaded, and its QEMU refuses to run it: it never runs here unless the source says that its
    /// copy is gone.
    Refused,
    /// This was the VM, or may have been, and its process has ended before it was whole or was seen
    /// to run.
    Lost,
}
