//! The handover of a VM whose QEMUs stream to each other (decision 0014): the two real state machines, two model QEMUs, and
//! whatever may go wrong between any two steps. Never do two copies run, never does a copy run that the source's guest has left
//! behind, and when all that died is back there is one that runs, unless a QEMU died with the only one.
//!
//! `IRLM_SIM_RUNS` sets the schedules, `IRLM_SIM_SEED` the first seed.

// Schedules from a seed.
#[path = "../sim/rng.rs"]
mod rng;
// What they happen in.
mod world;

use world::{Tally, World, number};

fn schedules(runs: u64, faults: u32) -> Tally {
    let mut sum = Tally::default();
    let first = number("IRLM_SIM_SEED", 1);
    for seed in first..first + number("IRLM_SIM_RUNS", runs) {
        let world = World::new(seed, faults);
        let t = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run())).unwrap_or_else(|e| {
            eprintln!("schedule {seed} with {faults} faults");
            std::panic::resume_unwind(e)
        });
        sum.moved += t.moved;
        sum.stayed += t.stayed;
        sum.lost += t.lost;
        sum.early += t.early;
        sum.resumed_after_waiting += t.resumed_after_waiting;
        sum.recovered += t.recovered;
        sum.failed += t.failed;
    }
    println!("{faults} faults at most: {sum:?}");
    sum
}

#[test]
fn a_vm_moves_if_nothing_happens() {
    let t = schedules(500, 0);
    assert!(t.moved == number("IRLM_SIM_RUNS", 500) && t.stayed == 0 && t.lost == 0, "{t:?}");
    assert!(t.early > 0, "no target heard of giving up before it saw all loaded: {t:?}");
}

/// One schedule with its story told: `IRLM_SIM_SEED`, `IRLM_SIM_FAULTS`, `IRLM_SIM_STORY=1`.
#[test]
fn one_run() {
    World::new(number("IRLM_SIM_SEED", 1), number("IRLM_SIM_FAULTS", 4) as u32).run();
}

#[test]
fn one_copy_runs_whatever_happens() {
    for faults in [1, 2, 4, 8] {
        let t = schedules(20_000, faults);
        assert!(t.moved > 0 && t.stayed > 0 && t.recovered > 0 && t.resumed_after_waiting > 0, "{t:?}");
        assert!(t.failed > 0, "{t:?}");
        assert!(t.lost < t.moved + t.stayed, "{t:?}");
    }
}
