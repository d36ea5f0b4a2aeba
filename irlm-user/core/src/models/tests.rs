//! What is promised of models, over random and over hostile reports.

use super::*;
use crate::index::tests::{digest, reg};
use crate::index::{Limits, Registration};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// One content of a report: its number, domain, target host, and sketch.
type Told = (u64, u16, u16, [u32; FEATURES]);

/// An index with these reports' contents registered, each by its host, and the plan made over `sources`.
fn sealed(told: &[Vec<Told>], sources: HostSet) -> Index {
    let mut index = Index::new(Limits { hash_seed: 5, ..Limits::default() }, told.len() as u16, 8);
    for (h, told) in (0u16..).zip(told) {
        let regs: Vec<Registration> = told.iter().map(|(n, _, t, _)| reg(*n, &[*t])).collect();
        assert!(index.register(HostIx(h), &regs).iter().all(Option::is_some));
    }
    index.seal(sources);
    index
}

fn item((n, _, target, features): &Told) -> SketchItem {
    let sketch = Sketch::from_features(*features);
    SketchItem { digest: digest(*n), target: HostIx(*target), sketch }
}

fn report(index: &Index, told: &[Vec<Told>], max: u32) -> Sketches {
    let mut sketches = Sketches::new(max, 5);
    for (h, told) in (0u16..).zip(told) {
        told.iter().for_each(|t| sketches.add(index, HostIx(h), t.1, &[item(t)]));
    }
    sketches
}

/// All parts, with everybody having room.
fn parts(told: &[Vec<Told>]) -> Vec<HostModels> {
    let hosts = told.len() as u16;
    let index = sealed(told, HostSet::first(hosts));
    let models = choose(&report(&index, told, MAX_SKETCHES), &vec![Some(u32::MAX); told.len()]);
    (0..hosts).map(|h| models.of(&index, HostIx(h))).collect()
}

fn hosts(h: &[u16]) -> HostSet {
    h.iter().copied().map(HostIx).collect()
}

fn seen(lend: &[Lend]) -> Vec<(Digest, HostIx, HostSet, HostSet)> {
    lend.iter().map(|l| (l.carry.digest, l.carry.first, l.carry.forward.clone(), l.to.clone())).collect()
}

#[test]
fn a_content_that_others_resemble_is_lent_to_them() {
    let a = [1, 2, 3, 4, 5, 6, 7, 8];
    let told = vec![
        vec![(0, 0, 0, a), (1, 0, 0, [9; 8])],
        // Like it by half; on the same target host.
        vec![(2, 0, 0, [1, 2, 3, 4, 0, 0, 0, 0])],
        vec![
            (3, 0, 3, [0, 0, 0, 0, 0, 0, 7, 8]),
            // The same numbers elsewhere in the sketch are something else, and one in common is too few.
            (4, 0, 4, [2, 1, 4, 3, 6, 5, 8, 7]),
            (5, 0, 5, [1, 0, 0, 0, 0, 0, 0, 90]),
        ],
    ];
    let got = parts(&told);
    assert_eq!(seen(&got[0].lend), [(digest(0), HostIx(0), hosts(&[3]), hosts(&[1, 2]))]);
    assert_eq!(got[0].borrows, 0);
    assert_eq!((got[1].lend.len(), got[1].borrows), (0, 1));
    assert_eq!((got[2].lend.len(), got[2].borrows), (0, 1));
}

#[test]
fn the_leader_with_most_in_common_gets_it() {
    let told = vec![
        vec![(0, 0, 0, [1, 2, 3, 0, 0, 0, 0, 0]), (1, 0, 0, [0, 0, 0, 4, 5, 6, 7, 8])],
        vec![(2, 0, 1, [1, 2, 3, 4, 5, 6, 7, 0])],
    ];
    assert_eq!(seen(&parts(&told)[0].lend), [(digest(1), HostIx(0), hosts(&[1]), hosts(&[1]))]);
}

#[test]
fn members_on_the_own_host_need_nothing() {
    let told = vec![vec![(0, 0, 0, [1; 8]), (1, 0, 5, [1; 8])], vec![(2, 0, 1, [2; 8])]];
    assert!(parts(&told).iter().all(|p| *p == HostModels::default()));
}

#[test]
fn domains_are_never_compared() {
    let told = vec![vec![(0, 0, 0, [1; 8])], vec![(1, 1, 0, [1; 8])]];
    assert!(parts(&told).iter().all(|p| *p == HostModels::default()));
}

#[test]
fn the_most_wanted_go_first_and_who_has_no_room_is_left_out() {
    let told = vec![
        vec![(0, 0, 0, [1; 8]), (1, 0, 0, [2; 8])],
        vec![(2, 0, 1, [1; 8]), (3, 0, 1, [2; 8])],
        vec![(4, 0, 2, [2; 8])],
    ];
    let index = sealed(&told, HostSet::first(3));
    let sketches = report(&index, &told, MAX_SKETCHES);
    let lent = |rooms: [Option<u32>; 3]| {
        let models = choose(&sketches, &rooms);
        let borrows: Vec<u32> = (0..3).map(|h| models.borrows(HostIx(h))).collect();
        (seen(&models.of(&index, HostIx(0)).lend), borrows)
    };
    let wanted = |to: &[u16]| (digest(1), HostIx(0), hosts(to), hosts(to));
    let other = (digest(0), HostIx(0), hosts(&[1]), hosts(&[1]));
    assert_eq!(lent([Some(9), Some(9), Some(9)]), (vec![other, wanted(&[1, 2])], vec![0, 2, 1]));
    assert_eq!(lent([Some(0), Some(1), Some(9)]), (vec![wanted(&[1, 2])], vec![0, 1, 1]));
    assert_eq!(lent([Some(0), Some(0), Some(9)]), (vec![wanted(&[2])], vec![0, 0, 1]));
    assert_eq!(lent([Some(0), None, Some(9)]), (vec![wanted(&[2])], vec![0, 0, 1]), "never asked");
    assert_eq!(lent([Some(9), Some(0), Some(0)]), (vec![], vec![0, 0, 0]));
    // Without the first host the second one's content leads.
    let models = choose(&sketches, &[None, Some(9), Some(9)]);
    assert_eq!(seen(&models.of(&index, HostIx(1)).lend), [(digest(3), HostIx(1), hosts(&[2]), hosts(&[2]))]);
}

#[test]
fn what_is_not_the_reporters_alone_by_the_plan_is_ignored() {
    let mut index = Index::new(Limits::default(), 3, 4);
    assert!(
        index.register(HostIx(0), &[reg(0, &[0]), reg(1, &[0]), reg(2, &[0, 1]), reg(3, &[0])])[0].is_some()
    );
    assert!(index.register(HostIx(1), &[reg(1, &[0]), reg(4, &[0])])[0].is_some());
    assert!(index.register(HostIx(2), &[reg(3, &[0]), reg(5, &[0])])[0].is_some());
    let say = |index: &Index, host: u16, n: u64, target: u16| {
        let mut s = Sketches::new(9, 0);
        s.add(index, HostIx(host), 0, &[item(&(n, 0, target, [1; 8]))]);
        assert_eq!(s.ignored() + u64::from(s.len()), 1);
        !s.is_empty()
    };
    assert!(!say(&index, 0, 0, 0), "no plan yet");
    index.seal(hosts(&[0, 1]));
    index.late(HostIx(0), &[crate::index::LateItem { digest: digest(6), target: HostIx(0), kept: true }]);
    assert!(say(&index, 0, 0, 0));
    assert!(!say(&index, 1, 0, 0), "another's");
    assert!(!say(&index, 0, 0, 1), "goes elsewhere");
    assert!(!say(&index, 0, 1, 0), "two have it");
    assert!(!say(&index, 0, 2, 0), "two need it");
    assert!(say(&index, 0, 3, 0), "who else had it was given up");
    assert!(!say(&index, 2, 5, 0), "given up");
    assert!(!say(&index, 0, 6, 0), "late");
    assert!(!say(&index, 0, 7, 0), "unknown");
    assert!(!say(&index, 9, 0, 0), "no such host");
    let mut s = Sketches::new(1, 0);
    s.add(&index, HostIx(0), 0, &[item(&(0, 0, 0, [0; 8]))]);
    assert!(s.is_empty(), "nothing to compare");
    s.add(&index, HostIx(0), 0, &[item(&(0, 0, 0, [1; 8])), item(&(0, 0, 0, [2; 8]))]);
    s.add(&index, HostIx(1), 0, &[item(&(4, 0, 0, [1; 8]))]);
    assert_eq!((s.len(), s.ignored()), (1, 3), "reported twice; no room");
}

#[test]
fn hosts_take_turns_in_leading() {
    // Every content of one host has its like at the same place of the other's report.
    let told: Vec<Vec<Told>> =
        (0..2).map(|h| (0..320).map(|n| (h * 1000 + n, 0, h as u16, [n as u32 + 1; 8])).collect()).collect();
    let got = parts(&told);
    assert_eq!([got[0].lend.len(), got[1].lend.len()], [3 * RUN, 2 * RUN]);
    let numbers: Vec<usize> = got[1]
        .lend
        .iter()
        .filter_map(|l| told[1].iter().position(|t| digest(t.0) == l.carry.digest))
        .collect();
    assert!(numbers.is_sorted(), "in the order of the report");
}

#[test]
fn hostile_reports_are_only_numbers() {
    // All alike: one model, and one content borrowed by each other host.
    let all = |features: [u32; FEATURES]| -> Vec<Vec<Told>> {
        (0..3).map(|h| (0..500).map(|n| (h * 1000 + n, 0, h as u16, features)).collect()).collect()
    };
    let got = parts(&all([7; 8]));
    assert_eq!(seen(&got[0].lend), [(digest(0), HostIx(0), hosts(&[1, 2]), hosts(&[1, 2]))]);
    assert_eq!([got[0].borrows, got[1].borrows, got[2].borrows], [0, 1, 1]);
    assert!(parts(&all([0; 8])).iter().all(|p| *p == HostModels::default()));
    // One number each: never enough.
    assert!(parts(&all([7, 0, 0, 0, 0, 0, 0, 0])).iter().all(|p| *p == HostModels::default()));
    assert!(choose(&Sketches::new(0, 0), &[]).is_empty());
}

fn told() -> impl Strategy<Value = Vec<Vec<Told>>> {
    let one = (0u16..2, 0u16..8, prop::array::uniform8(0u32..4));
    prop::collection::vec(prop::collection::vec(one, 0..90), 4).prop_map(|hosts| {
        let numbered = (0u64..).zip(hosts).map(|(h, told)| {
            (0u64..).zip(told).map(|(n, (domain, target, f))| (h * 1000 + n, domain, target, f)).collect()
        });
        numbered.collect()
    })
}

proptest! {
    #[test]
    fn promises_hold(
        told in told(),
        rooms in prop::collection::vec(prop::option::of(prop_oneof![0u32..6, Just(u32::MAX)]), 4),
        lost in prop::option::of(0u16..4),
        max in prop_oneof![Just(MAX_SKETCHES), 0u32..200],
    ) {
        let mut sources = HostSet::first(4);
        lost.iter().for_each(|h| sources.remove(HostIx(*h)));
        let index = sealed(&told, sources.clone());
        // Whoever reports everything twice changes nothing.
        let mut sketches = report(&index, &told, max);
        let len = sketches.len();
        told[0].iter().for_each(|t| sketches.add(&index, HostIx(0), t.1, &[item(t)]));
        prop_assert_eq!(sketches.len(), len);
        prop_assert!(len <= max);
        let models = choose(&sketches, &rooms);
        let again = choose(&report(&index, &told, max), &rooms);

        let by_digest: BTreeMap<Digest, (u16, &Told)> = (0u16..)
            .zip(&told)
            .flat_map(|(h, t)| t.iter().map(move |t| (digest(t.0), (h, t))))
            .collect();
        let mut borrowed = [0; 4];
        let mut lent = BTreeSet::new();
        for h in 0..4u16 {
            let part = models.of(&index, HostIx(h));
            prop_assert_eq!(&part, &again.of(&index, HostIx(h)), "deterministic");
            prop_assert_eq!(part.lend.len(), models.lends(HostIx(h)));
            let pieces: Vec<Lend> =
                (0..part.lend.len()).step_by(3).flat_map(|i| models.piece(&index, HostIx(h), i, 3)).collect();
            prop_assert_eq!(&pieces, &part.lend);
            let mut before = None;
            for l in &part.lend {
                let (holder, leader) = by_digest[&l.carry.digest];
                prop_assert!(lent.insert(l.carry.digest), "lent once");
                prop_assert_eq!(holder, h, "who lends has it");
                prop_assert_eq!(l.carry.first, HostIx(leader.2));
                prop_assert!(before < Some(leader.0), "in the order of the report");
                before = Some(leader.0);
                prop_assert!(!l.to.is_empty() && !l.to.contains(HostIx(h)));
                prop_assert!(!l.carry.forward.contains(l.carry.first));
                let mut may = BTreeSet::new();
                for b in l.to.iter() {
                    borrowed[usize::from(b.0)] += 1;
                    prop_assert!(sources.contains(b) && rooms[usize::from(b.0)].is_some());
                    let like: Vec<u16> = told[usize::from(b.0)]
                        .iter()
                        .filter(|t| t.1 == leader.1)
                        .filter(|t| t.3.iter().zip(&leader.3).filter(|(a, b)| **a != 0 && a == b).count() >= MIN_SHARED)
                        .map(|t| t.2)
                        .collect();
                    prop_assert!(!like.is_empty(), "a borrower has something like it, in its domain");
                    may.extend(like);
                }
                prop_assert!(l.carry.forward.iter().all(|t| may.contains(&t.0)), "borrowers' targets only");
            }
            if !part.lend.is_empty() {
                prop_assert!(sources.contains(HostIx(h)) && rooms[usize::from(h)].is_some());
            }
        }
        for (h, n) in (0u16..).zip(borrowed) {
            prop_assert_eq!(models.borrows(HostIx(h)), n);
            prop_assert!(n <= rooms[usize::from(h)].unwrap_or(0));
        }
        prop_assert_eq!(models.len(), lent.len());
    }
}

/// Prints its figures; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: a million sketches"]
fn a_million_sketches() {
    for (what, kinds) in [("nothing alike", u32::MAX), ("ten of a kind", 100_000), ("all alike", 1)] {
        let told: Vec<Vec<Told>> = (0..4u64)
            .map(|h| {
                (0..250_000u64)
                    .map(|n| {
                        let kind = ((h * 250_000 + n) % u64::from(kinds)) as u32;
                        let f = std::array::from_fn(|i| (kind * 8 + i as u32).wrapping_mul(0x9E37_79B1) | 1);
                        (h * 1_000_000 + n, 0, h as u16, f)
                    })
                    .collect()
            })
            .collect();
        let index = sealed(&told, HostSet::first(4));
        let sketches = report(&index, &told, MAX_SKETCHES);
        let t = std::time::Instant::now();
        let models = choose(&sketches, &[Some(u32::MAX); 4]);
        println!("{what}: {} sketches, {} models, {:?}", sketches.len(), models.len(), t.elapsed());
    }
}
