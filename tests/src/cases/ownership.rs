//! Who owns a VM, on ordinary afternoons: the same file run twice, two lines swapped, disks locked or full, somebody else at
//! the same QEMU. Light guests on real QEMUs, real agents, and a sentry that looks at every copy all the time.

use crate::cmd_test::{Case, Need};

// The same file run again.
mod again;
// A copy that somebody continues on its own monitor.
mod by_hand;
// The source's disk after a late failure, and a target that is refused its own.
mod disk;
// Waits that end.
mod endings;
// Who a process is.
mod identity;
// What is in memory at both hosts.
mod in_ram;
// Journals that cannot be written.
mod journal;
// Guests that start in a moment.
mod light;
// The state that a VM's owner gave it.
mod paused;
// What is refused beforehand.
mod preflight;
// Old records.
mod records;
// What a report calls things.
mod report;
// A lab with light guests in it.
mod rig;
// Two copies are never seen to run.
mod sentry;
// QEMU's settings, as found.
mod settings;
// An operator's decision.
mod settle;
// Somebody changes what passes.
pub(crate) mod tampered;
// Starts that fail, and two groups at once.
mod start;

/// Every case of this kind.
pub(super) fn cases() -> Vec<Case> {
    [
        again::CASES,
        by_hand::CASES,
        disk::CASES,
        endings::CASES,
        identity::CASES,
        in_ram::CASES,
        journal::CASES,
        paused::CASES,
        preflight::CASES,
        records::CASES,
        report::CASES,
        settings::CASES,
        settle::CASES,
        start::CASES,
        tampered::CASES,
    ]
    .concat()
}

/// What these need: no guest image is booted.
const CHOSEN: &[Need] = &[Need::Irlm, Need::ChosenQemu];
/// Those of our own VMM.
const KVM: &[Need] = &[Need::Irlm, Need::ChosenQemu, Need::Kvm];

/// Lines of a group file: an agent stands in the stream, QEMUs stream to each other, and plain QEMU.
const PATH: &str = "method = \"irlm\"\ndirect = \"never\"";
const DIRECT: &str = "method = \"irlm\"\ndirect = \"always\"";
const OC: &str = "method = \"oc\"";

/// Points at which an agent holds a guest: its option, and what it says.
const BEFORE: (&str, &str) = ("--drill-before-give-up", "drill: holding before giving up");
const AFTER: (&str, &str) = ("--drill-after-give-up", "drill: holding after giving up");
