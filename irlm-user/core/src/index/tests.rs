//! The index against a plain map of what was registered, its bounds, and its cost in bytes.

use super::*;
use crate::units::PAGE_SIZE;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashSet};

pub(crate) fn digest(n: u64) -> Digest {
    let mut d = [0; DIGEST_LEN];
    d.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..DIGEST_LEN]);
    Digest(d)
}

pub(crate) fn reg(n: u64, targets: &[u16]) -> Registration {
    Registration { digest: digest(n), targets: targets.iter().copied().map(HostIx).collect(), pages: 1 }
}

#[test]
fn an_id_is_the_first_bits_and_the_position_in_their_bucket() {
    let mut index = Index::new(Limits::default(), 1, 1);
    let mut batch = vec![reg(1, &[0]), reg(2, &[0]), reg(3, &[0]), reg(1, &[0])];
    for r in &mut batch[..3] {
        r.digest.0[..4].copy_from_slice(&0x0070_0005u32.to_be_bytes());
    }
    batch[3].digest = batch[0].digest;
    batch[2].digest.0[3] = 6;
    let ids: Vec<_> =
        index.register(HostIx(0), &batch).into_iter().flatten().map(|p| (p.bucket, p.index)).collect();
    let bucket = 0x0070_0005 % BUCKETS;
    assert_eq!(ids, [(bucket, 0), (bucket, 1), (bucket + 1, 0), (bucket, 0)]);
}

proptest! {
    #[test]
    fn remembers_every_holder_and_every_target(
        ops in prop::collection::vec((0u16..5, 0u64..12, prop::collection::btree_set(0u16..90, 1..4)), 0..120)
    ) {
        let mut index = Index::new(Limits { hash_seed: 7, ..Limits::default() }, 5, 90);
        let mut model: BTreeMap<u64, BTreeMap<u16, BTreeSet<u16>>> = BTreeMap::new();
        let mut ids: BTreeMap<u64, PageId> = BTreeMap::new();
        for (host, n, targets) in &ops {
            let targets_vec: Vec<u16> = targets.iter().copied().collect();
            let id = index.register(HostIx(*host), &[reg(*n, &targets_vec)])[0].unwrap();
            prop_assert_eq!(*ids.entry(*n).or_insert(id), id);
            model.entry(*n).or_default().entry(*host).or_default().extend(targets);
        }
        prop_assert_eq!(ids.values().collect::<HashSet<_>>().len(), ids.len());
        prop_assert_eq!(index.stats().entries, model.len() as u64);
        prop_assert_eq!(index.stats().holders, model.values().map(|m| m.len() as u64).sum::<u64>());
        for (n, holders) in &model {
            let e = index.find(&digest(*n)).unwrap();
            prop_assert_eq!(index.id(e), ids[n]);
            let got: BTreeMap<u16, BTreeSet<u16>> =
                index.holders(e).map(|(h, t)| (h.0, t.iter().map(|t| t.0).collect())).collect();
            prop_assert_eq!(&got, holders);
        }
    }
}

#[test]
fn at_its_bounds_contents_stay_host_local() {
    let limits = Limits { max_entries: 2, max_further_holders: 1, max_target_sets: 2, hash_seed: 0 };
    let mut index = Index::new(limits, 3, 4);
    let a = index.register(HostIx(0), &[reg(1, &[0]), reg(2, &[0]), reg(3, &[0])]);
    assert_eq!(a.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false], "entries");
    let b = index.register(HostIx(1), &[reg(1, &[0]), reg(2, &[0])]);
    assert_eq!(b.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false], "further holders");
    let c = index.register(HostIx(0), &[reg(1, &[1]), reg(2, &[2])]);
    assert_eq!(c, [None, None], "{{0,1}} would be the third set, as is {{2}}");
    let e = index.find(&digest(1)).unwrap();
    let first: Vec<_> = index.holders(e).map(|(h, t)| (h.0, t.len())).collect();
    assert_eq!(first, [(0, 1), (1, 1)], "a refused registration changes nothing");
    assert_eq!(index.stats().refused, 4);
}

#[test]
fn strangers_and_empty_sets_get_no_id() {
    let mut index = Index::new(Limits::default(), 2, 2);
    assert_eq!(index.register(HostIx(2), &[reg(1, &[0])]), [None]);
    assert_eq!(index.register(HostIx(0), &[reg(1, &[2])]), [None]);
    assert_eq!(index.register(HostIx(0), &[reg(1, &[])]), [None]);
    assert_eq!(index.stats(), IndexStats { refused: 3, ..IndexStats::default() });
}

#[test]
fn late_content_is_delivered_where_the_plan_or_anybody_brought_it() {
    let set = |t: &[u16]| t.iter().copied().map(HostIx).collect::<TargetSet>();
    let mut index = Index::new(Limits::default(), 3, 8);
    index.register(HostIx(0), &[reg(1, &[0]), reg(2, &[1]), reg(4, &[1])]);
    index.register(HostIx(1), &[reg(1, &[3])]);
    index.register(HostIx(2), &[reg(4, &[6])]);
    let item = |n, target, kept| LateItem { digest: digest(n), target: HostIx(target), kept };
    let kept =
        |index: &mut Index, host, n, target| index.late(HostIx(host), &[item(n, target, true)]).remove(0);
    assert_eq!(kept(&mut index, 0, 9, 0).id, None, "before the plan nothing is late");
    // Host 2 was given up: content 4 is then host 0's alone.
    index.seal(HostSet::first(2));
    assert_eq!(index.register(HostIx(2), &[reg(7, &[0])]), [None], "sealed");

    let asked = index.late(HostIx(2), &[item(1, 5, false)]).remove(0);
    assert_eq!((asked.id.is_some(), asked.delivered), (true, set(&[0, 3])), "a question keeps nothing");
    let shared = kept(&mut index, 2, 1, 5);
    assert_eq!(shared.delivered, set(&[0, 3, 5]), "planned targets count");
    assert!(shared.id.is_some());
    assert_eq!(kept(&mut index, 2, 1, 6).delivered, set(&[0, 3, 5, 6]));
    assert_eq!(kept(&mut index, 2, 2, 5).delivered, set(&[5]), "host-local is no promise");
    assert_eq!(kept(&mut index, 1, 4, 0).delivered, set(&[0]), "nor is a lost holder's");

    let unknown = index.late(HostIx(1), &[item(20, 1, false)]).remove(0);
    assert_eq!((unknown.id, unknown.delivered.len()), (None, 0));
    let fresh = index.late(HostIx(0), &[item(20, 1, true), item(20, 2, true)]);
    assert_eq!((&fresh[0].delivered, &fresh[1].delivered), (&set(&[1]), &set(&[1, 2])));
    assert_eq!(fresh[0].id, fresh[1].id);
    assert_eq!(kept(&mut index, 1, 20, 4).delivered, set(&[1, 2, 4]));
    assert_eq!(kept(&mut index, 1, 20, 8).id, None, "no such target host");
    assert_eq!(index.planned_entries(), 3);
}

#[test]
fn an_entry_costs_what_the_module_says() {
    let mut index = Index::new(Limits::default(), 2, 4);
    let fixed = index.heap_bytes();
    let n = 100_000u64;
    for host in 0..2 {
        for at in (0..n).step_by(8192) {
            let batch: Vec<_> = (at..(at + 8192).min(n)).map(|i| reg(i, &[host])).collect();
            index.register(HostIx(host), &batch);
        }
    }
    let chunks = 2 * 16384 * 48;
    let each = (index.heap_bytes() - fixed - chunks) as f64 / n as f64;
    println!("{each:.1} bytes a digest with two holders, {:.4} of the page", each / PAGE_SIZE as f64);
    assert!(each < 48.0 + 11.4 + 1.0, "{each}");
}
