//! The tests on real guests.

use crate::cmd_test::Case;

// Guests whose QEMUs stream to each other.
mod direct;
// Guests of our own VMM with disks, cards and balloons.
mod devices;
// Things die in the middle.
mod failures;
// The handover's window, hit exactly.
mod handover;
// Guests of our own VMM.
mod kvm;
// The lab itself, with plain QEMU.
mod lab;
// A distribution's kernel under our own VMM.
mod linux;
// Multicast in the target rack.
mod multicast;
// Who owns a VM, whatever happens.
pub(crate) mod ownership;
// Guests of our own VMM that run before their pages are there.
mod postcopy;
// Every method moves guests.
mod moves;
// Other people's traffic.
mod others;
// Planned contents that are gone when they are to be carried.
mod voids;

/// Every test, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        lab::CASES,
        moves::CASES,
        multicast::CASES,
        voids::CASES,
        others::CASES,
        failures::CASES,
        handover::CASES,
        direct::CASES,
        kvm::CASES,
        postcopy::CASES,
        devices::CASES,
        linux::CASES,
        &ownership::cases(),
    ]
    .concat()
}

/// Where a lab tells what takes long.
fn say(line: &str) {
    println!("  {line}");
}
