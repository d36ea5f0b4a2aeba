//! Post-copy of one VM under a virtual clock: its vCPUs touch, write and give away pages at the target while those still
//! come from its source and from other target hosts, over connections that break, between agents, hosts and VMMs that die.
//! Everything that decides is `core`, every frame is encoded and decoded; the kernel, the VMMs and the wire are models.
//!
//! `IRLM_SIM_RUNS` sets the schedules a profile, `IRLM_SIM_SEED` the first seed (or the one to narrate):
//! `IRLM_SIM_SEED=7 cargo test -p irlm-user --test postcopy -- --nocapture one_run`.

mod guest;
#[path = "../sim/rng.rs"]
mod rng;
mod source;
mod target;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{Profile, Tally, World};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn schedules(profile: Profile, default: u64) -> Tally {
    let (runs, first) = (number("IRLM_SIM_RUNS", default), number("IRLM_SIM_SEED", 1));
    let mut sum = Tally::default();
    for seed in first..first + runs {
        let mut w = World::new(seed, profile, false);
        if let Err(e) = catch_unwind(AssertUnwindSafe(|| w.run())) {
            eprintln!(
                "{profile:?} schedule {seed} broke a rule {} ms in; to watch it: IRLM_SIM_SEED={seed} \
                 IRLM_SIM_PROFILE={profile:?} cargo test -p irlm-user --test postcopy -- --nocapture one_run",
                w.now / world::MS
            );
            std::panic::resume_unwind(e);
        }
        sum.add(&w.tally);
    }
    println!("{profile:?}: {runs} schedules: {sum:?}");
    sum
}

#[test]
fn clean_every_page_comes_once_and_the_guest_sees_what_it_wrote() {
    let t = schedules(Profile::Clean, 300);
    assert!(t.moved == t.runs && t.stayed == 0 && t.lost == 0, "{t:?}");
    assert!(t.faults > 0 && t.forwarded > 0 && t.from_source > 0 && t.given_away > 0, "{t:?}");
}

#[test]
fn soft_what_only_carries_pages_costs_time_only() {
    let t = schedules(Profile::Soft, 700);
    assert!(t.moved == t.runs && t.stayed == 0 && t.lost == 0, "{t:?}");
    for (what, n) in [
        ("contents refused", t.refused),
        ("hosts passed over", t.passed_over),
        ("lost connections", t.lost_connections),
        ("late contents", t.late),
        ("layout changes in the way", t.changing),
        ("evicted contents", t.evicted),
    ] {
        assert!(n > 0, "no schedule had any {what}: {t:?}");
    }
}

#[test]
fn hard_one_copy_is_the_vm_and_what_is_missing_is_named() {
    let t = schedules(Profile::Hard, 2500);
    for (what, n) in [
        ("VM moved", t.moved),
        ("VM that stayed", t.stayed),
        ("target that died", t.lost),
        ("source gone for good", t.pages_lost),
        ("restart", t.restarts),
        ("doubt", t.doubts),
        ("VM given back", t.given_back),
        ("action that failed", t.failed),
    ] {
        assert!(n > 0, "no schedule had any {what}: {t:?}");
    }
}

/// One schedule with its story told.
#[test]
fn one_run() {
    let profile = match std::env::var("IRLM_SIM_PROFILE").as_deref() {
        Ok("Clean") => Profile::Clean,
        Ok("Soft") => Profile::Soft,
        _ => Profile::Hard,
    };
    World::new(number("IRLM_SIM_SEED", 1), profile, true).run();
}
