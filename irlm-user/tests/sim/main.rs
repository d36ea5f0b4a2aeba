//! Two whole racks in one process under a virtual clock: many random schedules of delay, loss and death, with the
//! design's rules checked after every event. Everything that decides is `core`, every frame is encoded and decoded;
//! only sockets, threads and QEMU are models.
//!
//! `IRLM_SIM_RUNS` sets the schedules per profile, `IRLM_SIM_SEED` the first seed (or the one to narrate):
//! `IRLM_SIM_SEED=7 cargo test -p irlm-user --test sim -- --nocapture one_run`.

mod emit;
mod faults;
mod guest;
mod handover;
mod net;
mod rng;
mod source;
mod target;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;
use world::{Config, Profile, Tally, World};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Runs many schedules on all cores' worth of threads; stops at the first that breaks a rule.
fn schedules(profile: Profile, default: u64) -> Tally {
    let runs = number("IRLM_SIM_RUNS", default);
    let first = number("IRLM_SIM_SEED", 1);
    let start = Instant::now();
    let threads = 2;
    let tallies: Vec<Tally> = std::thread::scope(|s| {
        let work: Vec<_> = (0..threads)
            .map(|t| {
                s.spawn(move || {
                    let mut sum = Tally::default();
                    for seed in (first + t..first + runs).step_by(threads as usize) {
                        let mut w = World::new(seed, profile, false);
                        if let Err(e) = catch_unwind(AssertUnwindSafe(|| w.run())) {
                            eprintln!(
                                "{profile:?} schedule {seed} broke a rule {} ms in; to watch it: IRLM_SIM_SEED={seed} \
                                 IRLM_SIM_PROFILE={profile:?} cargo test -p irlm-user --test sim -- --nocapture one_run",
                                w.now / net::MS
                            );
                            std::panic::resume_unwind(e);
                        }
                        sum.add(&w.tally);
                    }
                    sum
                })
            })
            .collect();
        work.into_iter().map(|w| w.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    });
    let mut sum = Tally::default();
    tallies.iter().for_each(|t| sum.add(t));
    println!("{profile:?}: {runs} schedules in {:.1} s: {sum:?}", start.elapsed().as_secs_f64());
    sum
}

#[test]
fn clean_every_shared_content_crosses_once() {
    let t = schedules(Profile::Clean, 400);
    assert!(t.stayed == 0 && t.lost == 0 && t.needs == 0 && t.voids == 0, "{t:?}");
    assert!(
        t.planned > 0 && t.forwarded > 0 && t.references > 0 && t.differences > 0 && t.spared > 0,
        "{t:?}"
    );
    assert!(t.modelled > 0 && t.told > 0 && t.unkept == 0, "{t:?}");
}

#[test]
fn soft_nothing_that_carries_contents_only_can_fail_a_migration() {
    let t = schedules(Profile::Soft, 1000);
    assert!(t.stayed == 0 && t.lost == 0, "{t:?}");
    for (what, n) in [
        ("voids", t.voids),
        ("needs", t.needs),
        ("gone", t.gone),
        ("evicted", t.evicted),
        ("superseded", t.superseded),
        ("refused", t.refused),
        ("differences", t.differences),
        ("spared", t.spared),
        ("difference from a model", t.modelled),
        ("model that was not there", t.unkept),
        ("model that was forgotten", t.forgotten),
        ("difference from what was not there", t.unmade),
        ("content found late", t.late_known),
        ("compressed frames", t.squeezed),
    ] {
        assert!(n > 0, "no schedule had any {what}: {t:?}");
    }
}

/// Worlds where nothing goes wrong but that models may be lost, all or every other one.
#[test]
fn models_make_differences_and_a_lost_one_costs_no_page() {
    for lost in [0, 1, 2] {
        let mut t = Tally::default();
        for seed in 1..60 {
            let mut rng = rng::Rng::new(seed);
            let cfg = Config {
                sources: 3,
                vms: 6,
                models: 60,
                models_lost: lost,
                max_pages: 96,
                references: (1000, 500),
                slots: 1000,
                budget: 100_000,
                faults: 0,
                push_first: true,
                ..Config::random(Profile::Soft, &mut rng)
            };
            let mut w = World::with(cfg, rng, false);
            w.run();
            t.add(&w.tally);
        }
        assert!(t.migrated == 59 * 6 && t.modelled > 0 && t.told > 0, "{t:?}");
        match lost {
            0 => assert!(t.unkept < t.told / 4, "late ones only: {t:?}"),
            // Its own VMs may have brought one all the same.
            1 => assert!(t.unkept > t.told / 2 && t.forgotten > 0 && t.unmade > 0 && t.needs > 0, "{t:?}"),
            _ => assert!(0 < t.unkept && t.unkept < t.told && t.forgotten > 0, "{t:?}"),
        }
    }
}

/// Pages are harmed on their way in a manner that no check before finds: a bit is flipped, a page is lost, an older version
/// comes last.
fn harmed(profile: Profile, verify: bool) -> Tally {
    let mut t = Tally::default();
    for seed in 1..=number("IRLM_SIM_RUNS", 300) {
        let mut rng = rng::Rng::new(seed);
        let cfg = Config { harm: 400, verify, ..Config::random(profile, &mut rng) };
        let mut w = World::with(cfg, rng, false);
        if let Err(e) = catch_unwind(AssertUnwindSafe(|| w.run())) {
            eprintln!("{profile:?} schedule {seed} broke a rule {} ms in", w.now / net::MS);
            std::panic::resume_unwind(e);
        }
        t.add(&w.tally);
    }
    println!("{profile:?}, verify {verify}: {t:?}");
    t
}

#[test]
fn a_vm_with_a_harmed_page_stays_at_its_source_and_all_others_move() {
    let t = harmed(Profile::Soft, true);
    assert!(
        t.proof.differed > 100 && t.stayed == t.proof.differed && t.proof.ran_harmed == 0 && t.lost == 0,
        "{t:?}"
    );
    assert!(t.proof.proven == t.migrated && t.migrated > 100, "{t:?}");
    let t = harmed(Profile::Hard, true);
    assert!(t.proof.differed > 20 && t.stayed > 100 && t.proof.proven > 0, "{t:?}");
}

/// The counterpart: without the account they run.
#[test]
fn without_an_account_harmed_pages_run() {
    let t = harmed(Profile::Soft, false);
    assert!(
        t.proof.ran_harmed > 100
            && t.proof.ran_harmed == t.proof.differed
            && t.stayed == 0
            && t.proof.proven == 0,
        "{t:?}"
    );
}

#[test]
fn hard_one_copy_runs_whatever_breaks() {
    let t = schedules(Profile::Hard, 2000);
    assert!(t.stayed > 0 && t.migrated > 0 && t.doubts > 0 && t.restarts > 0 && t.given_back > 0, "{t:?}");
    assert!(t.failed > 0 && t.refusals > 0, "{t:?}");
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
