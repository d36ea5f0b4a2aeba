//! The plan's promises as properties over random registrations, its balance against the optimum, and its speed.

use super::*;
use crate::index::Limits;
use crate::index::tests::{digest, reg};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};

type Registered = Vec<(u16, u64, BTreeSet<u16>)>;

fn build(registered: &Registered, sources: u16, targets: u16) -> Index {
    let mut index = Index::new(Limits::default(), sources, targets);
    for (host, n, t) in registered {
        let t: Vec<u16> = t.iter().copied().collect();
        assert!(index.register(HostIx(*host), &[reg(*n, &t)])[0].is_some());
    }
    index
}

fn input(sources: HostSet, own: &[u64]) -> PlanInput {
    PlanInput { sources, own_unique_pages: own.to_vec() }
}

fn registered(hosts: u16, digests: u64, targets: u16) -> impl Strategy<Value = Registered> {
    prop::collection::vec(
        (0..hosts, 0..digests, prop::collection::btree_set(0..targets, 1..4)),
        0..(digests as usize * 3),
    )
}

/// What the host with most to carry has, where it registered none that it has alone.
fn heaviest(plan: &Plan, own: &[u64]) -> u64 {
    plan.loads().iter().zip(own).map(|(all, own)| own + (all - own) * SHARED).max().unwrap_or_default()
}

proptest! {
    #[test]
    fn every_need_is_served_once_by_one_holder(
        regs in registered(5, 20, 70),
        own in prop::collection::vec(0u64..10, 5),
        lost in prop::option::of(0u16..5),
        shuffle in any::<u64>(),
    ) {
        let index = build(&regs, 5, 70);
        let mut sources = HostSet::first(5);
        if let Some(h) = lost {
            sources.remove(HostIx(h));
        }
        let plan = share_plan(&index, &input(sources.clone(), &own));

        let mut model: BTreeMap<u64, BTreeMap<u16, BTreeSet<u16>>> = BTreeMap::new();
        for (h, n, t) in regs.iter().filter(|(h, ..)| Some(*h) != lost) {
            model.entry(*n).or_default().entry(*h).or_default().extend(t);
        }
        let mut loads = own.clone();
        let mut forwards = vec![0u64; 70];
        let mut seen: HashMap<Digest, (HostIx, TargetSet, usize)> = HashMap::new();
        for h in sources.iter() {
            for c in plan.host_plan(&index, h).unwrap().carry {
                prop_assert!(!c.forward.contains(c.first), "no target is served twice");
                forwards[usize::from(c.first.0)] += c.forward.len() as u64;
                let mut all = c.forward.clone();
                all.insert(c.first);
                prop_assert!(seen.insert(c.digest, (h, all, 0)).is_none(), "one carrier");
            }
        }
        for h in sources.iter() {
            for r in plan.host_plan(&index, h).unwrap().remote {
                let (carrier, all, others) = seen.get_mut(&r.digest).unwrap();
                prop_assert_eq!(r.carrier, *carrier);
                prop_assert!(r.targets.is_subset(all));
                *others += 1;
            }
        }
        let mut shared = 0;
        for (n, holders) in &model {
            let needed: BTreeSet<u16> = holders.values().flatten().copied().collect();
            if holders.len() < 2 && needed.len() < 2 {
                prop_assert!(!seen.contains_key(&digest(*n)), "host-local");
                loads[usize::from(*holders.keys().next().unwrap())] += 1;
                continue;
            }
            shared += 1;
            let (carrier, all, others) = seen.get_mut(&digest(*n)).unwrap();
            prop_assert!(holders.contains_key(&carrier.0), "the carrier is a holder");
            prop_assert_eq!(all.iter().map(|t| t.0).collect::<BTreeSet<_>>(), needed);
            prop_assert_eq!(*others, holders.len() - 1, "every other holder knows who carries");
            loads[usize::from(carrier.0)] += 1;
            let first = plan.host_plan(&index, *carrier).unwrap().carry
                .into_iter().find(|c| c.digest == digest(*n)).unwrap().first;
            prop_assert!(holders[&carrier.0].contains(&first.0), "the carrier's own VMs need it there");
        }
        prop_assert_eq!(plan.shared(), shared);
        prop_assert_eq!(plan.loads(), &loads[..]);
        prop_assert_eq!(plan.forwards(), &forwards[..]);
        prop_assert_eq!(lost.and_then(|h| plan.host_plan(&index, HostIx(h))), None);

        // Another order of arrival gives the same contents as shared, to the same hosts.
        let mut other = regs.clone();
        for i in (1..other.len()).rev() {
            other.swap(i, (shuffle.rotate_left(i as u32 % 64) % (i as u64 + 1)) as usize);
        }
        let index2 = build(&other, 5, 70);
        let plan2 = share_plan(&index2, &input(sources.clone(), &own));
        let sent = |i: &Index, p: &Plan| {
            let parts = sources.iter().flat_map(|h| p.host_plan(i, h).unwrap().carry);
            let mut all: Vec<_> = parts.map(|c| {
                let mut to = c.forward.clone();
                to.insert(c.first);
                (c.digest, to)
            }).collect();
            all.sort();
            all
        };
        prop_assert_eq!(sent(&index, &plan), sent(&index2, &plan2));
    }

    #[test]
    fn pieces_make_up_the_whole(regs in registered(3, 40, 5), size in 1usize..9) {
        let index = build(&regs, 3, 5);
        let plan = share_plan(&index, &input(HostSet::first(3), &[]));
        for h in 0..3 {
            let whole = plan.host_plan(&index, HostIx(h)).unwrap();
            let mut sum = HostPlan::default();
            let len = plan.part_len(HostIx(h)).unwrap();
            for from in (0..len).step_by(size) {
                let p = plan.piece(&index, HostIx(h), from, size);
                sum.carry.extend(p.carry);
                sum.remote.extend(p.remote);
            }
            prop_assert_eq!(sum, whole);
            prop_assert_eq!(plan.piece(&index, HostIx(h), len, size), HostPlan::default());
        }
    }

    #[test]
    fn contents_that_all_hold_level_the_edge_links(
        own in prop::collection::vec(0u64..300, 2..6), n in 0u64..200
    ) {
        let hosts = own.len() as u16;
        let regs: Registered =
            (0..n).flat_map(|d| (0..hosts).map(move |h| (h, d, BTreeSet::from([h])))).collect();
        let index = build(&regs, hosts, hosts);
        let plan = share_plan(&index, &input(HostSet::first(hosts), &own));
        let total: u64 = own.iter().sum::<u64>() + n * SHARED;
        let best = (total.div_ceil(u64::from(hosts))).max(own.iter().copied().max().unwrap());
        let got = heaviest(&plan, &own);
        prop_assert!(got < best + SHARED, "{got}, and {best} is the least: a content is not divided");
        prop_assert_eq!(plan.loads().iter().sum::<u64>(), own.iter().sum::<u64>() + n, "pages");
    }

    #[test]
    fn the_longest_edge_link_is_near_the_optimum(
        holders in prop::collection::vec(1u8..8, 0..9),
        own in prop::collection::vec(0u64..5, 3),
    ) {
        let regs: Registered = holders.iter().enumerate().flat_map(|(d, mask)| {
            (0..3u16).filter(move |h| mask >> h & 1 == 1).map(move |h| (h, d as u64, BTreeSet::from([0, 1])))
        }).collect();
        let index = build(&regs, 3, 2);
        let got = heaviest(&share_plan(&index, &input(HostSet::first(3), &own)), &own);
        let mut best = u64::MAX;
        for assignment in 0..3usize.pow(holders.len() as u32) {
            let (mut loads, mut a, mut ok) = (own.clone(), assignment, true);
            for mask in &holders {
                let h = a % 3;
                a /= 3;
                ok &= mask >> h & 1 == 1;
                loads[h] += SHARED;
            }
            if ok {
                best = best.min(loads.into_iter().max().unwrap());
            }
        }
        prop_assert!(got <= best + SHARED, "{got} on the longest link, {best} would do");
    }
}

#[test]
fn neighbours_have_one_carrier_and_one_first_target() {
    // Host 0 registers first, so its order is the order of the contents; host 1 knows them in another one.
    let targets = BTreeSet::from([0, 1]);
    let mut regs: Registered = (0..10_000).map(|d| (0, d, targets.clone())).collect();
    regs.extend((0..10_000).rev().map(|d| (1, d, targets.clone())));
    let index = build(&regs, 2, 2);
    let plan = share_plan(&index, &input(HostSet::first(2), &[]));
    let mut by_content = HashMap::new();
    for h in [HostIx(0), HostIx(1)] {
        for c in plan.host_plan(&index, h).unwrap().carry {
            by_content.insert(c.digest, (h, c.first));
        }
    }
    let changes = (1..10_000u64).filter(|d| by_content[&digest(*d)] != by_content[&digest(d - 1)]).count();
    assert!(changes <= 10_000 / RUN + 2, "{changes} changes");
    assert_eq!((plan.loads(), plan.forwards().iter().sum::<u64>()), (&[5000, 5000][..], 10_000));
    let most = plan.forwards().iter().max().unwrap();
    assert!(*most <= 5000 + RUN as u64, "{most} of 10,000 are passed on by one");
}

#[test]
fn forwarding_is_balanced_over_the_first_targets() {
    // One holder, four targets: each of them passes on as much as the others.
    let regs: Registered = (0..400).map(|d| (0, d, BTreeSet::from([0, 1, 2, 3]))).collect();
    let index = build(&regs, 1, 4);
    let plan = share_plan(&index, &input(HostSet::first(1), &[]));
    assert!(plan.forwards().iter().all(|n| n.abs_diff(300) <= 3 * 6), "runs of six: {:?}", plan.forwards());
    assert_eq!(plan.forwards().iter().sum::<u64>(), 1200);
}

/// CPU time of this thread: other work on the machine does not count.
fn cpu() -> std::time::Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    std::time::Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// Prints its figures; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: a million digests, worth its time only in a release build"]
fn a_million_digests() {
    let (n, hosts, targets) = (1_000_000u64, 6u16, 6u16);
    let mut index = Index::new(Limits::default(), hosts, targets);
    let fixed = index.heap_bytes();
    // Every third content is on three hosts, every third on two, the rest on one.
    let holds = |h: u16, d: u64| (0..d % 3 + 1).any(|k| ((d / 3 + k * 2) % 6) as u16 == h);
    let batches: Vec<(u16, Vec<_>)> = (0..hosts)
        .flat_map(|h| {
            let all: Vec<_> =
                (0..n).filter(|d| holds(h, *d)).map(|d| reg(d, &[h, (h + d as u16 % 2) % 6])).collect();
            all.chunks(8192).map(|c| (h, c.to_vec())).collect::<Vec<_>>()
        })
        .collect();
    let t = cpu();
    for (h, batch) in &batches {
        index.register(HostIx(*h), batch);
    }
    let register = cpu() - t;
    let t = cpu();
    let plan = share_plan(&index, &input(HostSet::first(hosts), &[0; 6]));
    let planned = cpu() - t;
    let t = cpu();
    let parts: usize = (0..hosts)
        .filter_map(|h| plan.host_plan(&index, HostIx(h)))
        .map(|p| p.carry.len() + p.remote.len())
        .sum();
    println!(
        "CPU time: register {register:?} ({} holders), plan {planned:?} ({} shared), parts {:?} ({parts}), {:.1} bytes a digest, loads {:?}, forwards {:?}",
        index.stats().holders,
        plan.shared(),
        cpu() - t,
        (index.heap_bytes() - fixed) as f64 / n as f64,
        plan.loads(),
        plan.forwards(),
    );
}
