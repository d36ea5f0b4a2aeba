//! The index of one group, and the plan that is made of it: a content has one name and, in the plan, one carrier that
//! holds it; every target host that needs it gets it; no bound is passed.

use crate::ops::Ops;
use irlm_user::core::digest::Digest;
use irlm_user::core::index::{HostSet, Index, LateItem, Limits, Registration};
use irlm_user::core::plan::{HostPlan, PlanInput, share_plan};
use irlm_user::core::units::{HostIx, PageId};
use std::collections::{BTreeMap, BTreeSet};

const SOURCES: u16 = 3;
const TARGETS: u16 = 3;
const LIMITS: Limits = Limits { max_entries: 24, max_further_holders: 20, max_target_sets: 7, hash_seed: 1 };

/// What was registered, by digest: its name, and who has it for which target hosts.
#[derive(Default)]
struct Known(BTreeMap<u8, (PageId, BTreeMap<u16, BTreeSet<u16>>)>);

fn digest(n: u8) -> Digest {
    let mut bytes = [0; 20];
    // Several contents in one bucket.
    bytes[0] = n & 3;
    bytes[19] = n;
    Digest(bytes)
}

fn hosts(ops: &mut Ops<'_>) -> HostSet {
    let bits = ops.byte();
    (0..4).filter(|n| bits & 1 << n != 0).map(HostIx).collect()
}

pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let mut index = Index::new(LIMITS, SOURCES, TARGETS);
    let mut known = Known::default();
    let mut sealed = false;
    while !ops.is_over() {
        let source = HostIx(ops.below(4) as u16);
        let n = ops.byte() % 32;
        match ops.below(8) {
            0 if ops.rarely() && !sealed => {
                sealed = true;
                let sources = hosts(&mut ops);
                planned(&index, &known, &sources);
                index.seal(sources);
            }
            1 => {
                let target = HostIx(ops.below(4) as u16);
                let item = LateItem { digest: digest(n), target, kept: ops.byte() & 1 == 0 };
                let reply = index.late(source, &[item]).remove(0);
                assert!(reply.id.is_none() || sealed, "nothing is late before the plan");
                assert!(!item.kept || reply.delivered.contains(target));
                assert!(reply.delivered.highest().is_none_or(|h| h.0 < TARGETS || h == target));
                if let (Some(id), Some(before)) = (reply.id, known.0.get(&n)) {
                    assert_eq!(id, before.0, "a second name");
                }
            }
            _ => {
                let (targets, pages) = (hosts(&mut ops), 1);
                let one = Registration { digest: digest(n), targets: targets.clone(), pages };
                if let Some(id) = index.register(source, &[one]).remove(0) {
                    assert!(!sealed && source.0 < SOURCES && !targets.is_empty());
                    let entry = known.0.entry(n).or_insert_with(|| (id, BTreeMap::new()));
                    assert_eq!(entry.0, id, "a second name");
                    entry.1.entry(source.0).or_default().extend(targets.iter().map(|h| h.0));
                }
            }
        }
        let stats = index.stats();
        assert!(stats.entries <= LIMITS.max_entries.into());
        assert!(stats.holders <= u64::from(LIMITS.max_entries + LIMITS.max_further_holders));
    }
    let names: BTreeSet<PageId> = known.0.values().map(|k| k.0).collect();
    assert_eq!(names.len(), known.0.len(), "one name for two contents");
}

fn planned(index: &Index, known: &Known, sources: &HostSet) {
    let input = PlanInput { sources: sources.clone(), own_unique_pages: vec![3, 1] };
    let plan = share_plan(index, &input);
    let parts: Vec<HostPlan> =
        (0..SOURCES).map(|h| plan.host_plan(index, HostIx(h)).unwrap_or_default()).collect();
    for (n, (id, holders)) in &known.0 {
        let alive: BTreeMap<u16, &BTreeSet<u16>> =
            holders.iter().filter(|(h, _)| sources.contains(HostIx(**h))).map(|(h, t)| (*h, t)).collect();
        let needed: BTreeSet<u16> = alive.values().flat_map(|t| t.iter().copied()).collect();
        let shared = alive.len() >= 2 || needed.len() >= 2;
        let carried: Vec<(u16, BTreeSet<u16>)> = (0..)
            .zip(&parts)
            .flat_map(|(h, p)| p.carry.iter().map(move |c| (h, c)))
            .filter(|(_, c)| c.digest == digest(*n))
            .map(|(h, c)| {
                assert_eq!(c.id, *id);
                assert!(alive[&h].contains(&c.first.0), "first to a host that its own VMs do not go to");
                (h, c.forward.iter().map(|t| t.0).chain([c.first.0]).collect())
            })
            .collect();
        assert_eq!(carried.len(), usize::from(shared), "content {n} of {alive:?} carried by {carried:?}");
        if let Some((carrier, to)) = carried.first() {
            assert_eq!(*to, needed);
            for (h, _) in alive.iter().filter(|(h, _)| *h != carrier) {
                let remote = parts[usize::from(*h)].remote.iter().find(|r| r.digest == digest(*n));
                assert!(remote.is_some_and(|r| r.carrier.0 == *carrier));
            }
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let register: Vec<u8> = (0..8).flat_map(|n| [n % 3, n / 2, 5, 1 + n % 6]).collect();
    vec![[&register[..], &[0, 0, 0, 3, 7], &[1, 3, 1, 2, 0], &[0, 20, 1, 1, 1]].concat()]
}
