//! The forecast against its own properties, and against pre-copy loops played page by page.

use super::*;
use proptest::prelude::*;

const MB: f64 = 1e6;

/// A pre-copy loop as QEMU does it: a bitmap, rounds over what it had at the round's start, pages written by chance
/// within a working set. Gives rounds, seconds, and the last remainder's seconds; `None` if it does not end.
fn play(pages: usize, rate: f64, set: usize, bandwidth: f64, limit: f64) -> Option<(u32, f64, f64)> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut draw = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let page = PAGE_WIRE_BYTES / bandwidth;
    let mut dirty = vec![true; pages];
    let (mut seconds, mut due) = (0.0, 0.0);
    for round in 1..200 {
        let now: Vec<usize> = (0..pages).filter(|p| dirty[*p]).collect();
        if now.len() as f64 * page <= limit {
            let rest = now.len() as f64 * page;
            return Some((round, seconds + rest, rest));
        }
        dirty.fill(false);
        for _ in now {
            seconds += page;
            due += page * rate;
            while due >= 1.0 {
                due -= 1.0;
                dirty[draw() as usize % set] = true;
            }
        }
    }
    None
}

#[test]
fn a_played_migration_goes_as_forecast() {
    // pages, rate, working set, bytes a second, downtime limit.
    let cases = [
        (20_000, 0.0, 1, 50.0 * MB, 0.3),
        (20_000, 2_000.0, 8_000, 50.0 * MB, 0.05),
        (20_000, 9_000.0, 8_000, 50.0 * MB, 0.15),
        (20_000, 6_000.0, 20_000, 50.0 * MB, 0.05),
        (20_000, 30_000.0, 2_000, 50.0 * MB, 0.3),
        (20_000, 30_000.0, 8_000, 50.0 * MB, 0.1),
        (20_000, 14_000.0, 20_000, 50.0 * MB, 0.05),
    ];
    for (pages, rate, set, bandwidth, limit) in cases {
        let w = Writes { rate, working_set: set as f64 };
        let f = forecast(pages as f64, &w, bandwidth, limit).unwrap();
        let real = play(pages, rate, set, bandwidth, limit);
        assert_eq!(f.converges, real.is_some(), "{w:?}: {f:?}, played {real:?}");
        let Some((rounds, seconds, downtime)) = real else { continue };
        assert!(rounds.abs_diff(f.rounds) <= 1 + rounds / 5, "{w:?}: {f:?}, played {real:?}");
        assert!((seconds - f.seconds).abs() <= 0.05 * seconds, "{w:?}: {f:?}, played {real:?}");
        assert!(downtime <= limit && f.downtime <= limit);
    }
}

#[test]
fn a_working_set_is_found_from_what_was_seen() {
    let all = 100_000.0;
    for (rate, set) in [(5_000.0, 1_000.0), (5_000.0, 40_000.0), (50_000.0, 20_000.0)] {
        let w = Writes { rate, working_set: set };
        let fit = Writes::fit(rate, w.dirty_after(5.0), 5.0, all);
        assert!((fit.working_set - set).abs() < 0.01 * set, "{fit:?}");
    }
    // A new page with every write: as large as it can be.
    assert_eq!(Writes::fit(1000.0, 5000.0, 5.0, all).working_set, all);
    // No time, no writes, no sense: no panic, nothing beyond the memory.
    for (r, d, s) in [(0.0, 0.0, 0.0), (f64::NAN, 1e9, -1.0), (f64::INFINITY, f64::NAN, f64::INFINITY)] {
        let fit = Writes::fit(r, d, s, all);
        assert!(fit.rate == 0.0 && (0.0..=all).contains(&fit.working_set), "{fit:?}");
    }
}

#[test]
fn nothing_is_forecast_without_bandwidth() {
    let w = Writes { rate: 1.0, working_set: 1.0 };
    assert!([0.0, -1.0, f64::NAN, f64::INFINITY].iter().all(|b| forecast(1.0, &w, *b, 0.3).is_none()));
}

fn d(needs: f64, pages: f64) -> Departure {
    Departure { needs, pages }
}

/// The order in which VMs start if each ends before the next may start, and how many were leaving beside it.
fn started(all: &[Departure], bandwidth: f64, places: usize) -> Vec<(usize, usize)> {
    let mut waiting: Vec<usize> = (0..all.len()).collect();
    let (mut leaving, mut out): (Vec<usize>, Vec<_>) = (vec![], vec![]);
    while !waiting.is_empty() {
        let ds = |v: &[usize]| v.iter().map(|i| all[*i]).collect::<Vec<_>>();
        match next(&ds(&waiting), &ds(&leaving), bandwidth, places) {
            Some(i) => {
                let vm = waiting.remove(i);
                out.push((vm, leaving.len()));
                leaving.push(vm);
            }
            None => {
                leaving.remove(0);
            }
        }
    }
    out
}

#[test]
fn what_needs_much_goes_first_and_with_few_beside_it() {
    let all = [d(1.0, 9.0), d(90.0, 5.0), d(0.0, 7.0), d(50.0, 5.0), d(50.0, 6.0), d(500.0, 1.0)];
    let order = started(&all, 100.0, 3);
    let first: Vec<usize> = order.iter().map(|o| o.0).collect();
    // 90 fits beside 1 and 0; the fifties fit together once 90 has gone; 500 never fits and goes last, alone.
    assert_eq!(first, [1, 0, 2, 4, 3, 5]);
    assert_eq!(order.last(), Some(&(5, 0)));
}

#[test]
fn without_figures_the_file_s_order_and_its_places_stand() {
    let all = [d(0.0, 1.0), d(0.0, 9.0), d(0.0, 5.0)];
    assert_eq!(started(&all, 0.0, 8), [(0, 0), (1, 1), (2, 2)]);
    assert_eq!(started(&all, 100.0, 2), [(0, 0), (1, 1), (2, 1)]);
    // Places of 0 would move nothing.
    assert_eq!(started(&all, 0.0, 0).len(), 3);
}

proptest! {
    #[test]
    fn never_negative_and_monotone_in_bandwidth(
        pages in 0.0f64..1e6, rate in 0.0f64..1e6, set in 0.0f64..1e6,
        bandwidth in 1.0f64..1e9, more in 1.0f64..10.0, limit in 0.001f64..5.0,
    ) {
        let w = Writes { rate, working_set: set };
        let slow = forecast(pages, &w, bandwidth, limit).unwrap();
        let fast = forecast(pages, &w, bandwidth * more, limit).unwrap();
        for f in [slow, fast] {
            prop_assert!(f.seconds >= 0.0 && f.downtime >= 0.0 && f.bytes >= 0.0 && f.rounds >= 1);
            prop_assert!(f.seconds.is_finite() && f.downtime.is_finite());
            prop_assert!(!f.converges || f.downtime <= limit);
        }
        prop_assert!(fast.converges >= slow.converges);
        if slow.converges {
            prop_assert!(fast.seconds <= slow.seconds * (1.0 + 1e-9));
            prop_assert!(fast.rounds <= slow.rounds);
            prop_assert!(fast.bytes <= slow.bytes * (1.0 + 1e-9));
        }
    }

    /// Converges if and only if the rounds, played by the model without end, come below the limit.
    #[test]
    fn it_converges_exactly_if_the_rounds_do(
        rate in 1.0f64..1e5, set in 1.0f64..1e5, bandwidth in 1e5f64..1e9, limit in 0.01f64..2.0,
    ) {
        let w = Writes { rate, working_set: set };
        // On the edge itself the rounds take for ever to tell.
        prop_assume!((w.needs(limit) / bandwidth - 1.0).abs() > 0.02);
        let mut left = set.max(1e5);
        for _ in 0..MAX_ROUNDS {
            left = w.dirty_after(left * PAGE_WIRE_BYTES / bandwidth);
        }
        let ends = left * PAGE_WIRE_BYTES / bandwidth <= limit;
        prop_assert_eq!(forecast(set.max(1e5), &w, bandwidth, limit).unwrap().converges, ends);
    }

    #[test]
    fn every_vm_leaves_once_and_within_its_places(
        needs in proptest::collection::vec(0.0f64..200.0, 1..20), bandwidth in 0.0f64..150.0, places in 1usize..6,
    ) {
        let all: Vec<Departure> = needs.iter().map(|n| d(*n, 1.0)).collect();
        let order = started(&all, bandwidth, places);
        let mut seen: Vec<usize> = order.iter().map(|o| o.0).collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..all.len()).collect::<Vec<_>>());
        prop_assert!(order.iter().all(|o| o.1 < places));
    }
}
