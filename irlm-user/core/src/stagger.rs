//! When a further VM leaves a host beside those under way (decision 0013).
//!
//! A page that resembles one of another VM of the host leaves as its difference, if the target host has that other page by
//! then (decision 0010): VMs that leave one after another need fewer bytes than VMs that leave at once, and on a link
//! that one of them can fill no more time either. So the next one leaves when those under way are nearly through. Where
//! they leave the link *and* a processor idle, it leaves at once.

/// Part of its pages that a VM has sent when the next one leaves: early enough that its last rounds and its handover, in
/// which the link has pauses, fall into the next one's first round.
pub const NEARLY: f64 = 0.8;
/// How long the VMs under way are watched before they are said to leave something idle, seconds: some frames of each, and
/// several of the kernel's ticks.
pub const WATCHED: f64 = 0.15;
/// Part of the senders' time that the link holds them up from which on it counts as full.
const FULL: f64 = 0.3;
/// Idle processors that a further VM can use: its QEMU and its sender are hardly ever busy at the same time.
const SPARE: f64 = 1.0;

/// What the VMs under way leave idle, over [`WATCHED`] or longer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Load {
    /// Part of the senders' time that the link held them up.
    pub held: f64,
    /// Processors of the host that were idle.
    pub idle: f64,
}

/// Whether a further VM leaves. `passed` says of each VM under way which part of its pages it has sent, above 1 if it sent
/// some again; `load` is none while too little was seen.
#[must_use]
pub fn another(passed: impl IntoIterator<Item = f64>, load: Option<Load>) -> bool {
    passed.into_iter().all(|p| p >= NEARLY) || load.is_some_and(|l| l.held < FULL && l.idle >= SPARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_one_leaves_when_all_are_nearly_through_or_something_is_idle() {
        let load = |held, idle| Some(Load { held, idle });
        assert!(another([], None), "the first one");
        assert!(another([0.8, 3.0], load(1.0, 0.0)));
        assert!(!another([0.8, 0.1], None), "not before anything was seen");
        assert!(another([0.0, 0.1], load(0.1, 1.5)));
        assert!(!another([0.1], load(0.9, 7.0)), "the link is full");
        assert!(!another([0.1], load(0.0, 0.4)), "the processors are busy");
        assert!(!another([f64::NAN], None), "nothing is known");
    }
}
