//! The policy's promises hold for every policy that passes its checks, not only for the examples.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

pub(super) fn draft(link: u64, others: u64) -> Draft {
    Draft {
        shaping: Shaping::Own,
        link_mbit: link,
        others_mbit: others,
        rack_prefixes: vec![("10.77.1.0".parse().unwrap(), 24)],
        classes: vec![],
    }
}

fn by_minor(tree: &[HtbClass]) -> HashMap<u16, HtbClass> {
    tree.iter().map(|c| (c.minor, *c)).collect()
}

#[test]
fn the_numbers_of_one_tree() {
    let p = Policy::new(&draft(10_000, 3000)).unwrap();
    let t = by_minor(&p.tree(Some(400 * MBIT)));
    assert_eq!(t.len(), 9);
    assert_eq!((t[&minor::LINE].rate, t[&minor::LINE].ceil), (9800 * MBIT, 9800 * MBIT));
    assert_eq!(t[&minor::MIGRATION].ceil, 6800 * MBIT);
    assert_eq!(t[&minor::CORE].ceil, 400 * MBIT);
    let others = t[&minor::OTHERS];
    assert_eq!((others.rate, others.ceil), (3000 * MBIT, 9800 * MBIT));
    // 20 ms of 9.8 Gbit/s, 5 ms of 3 Gbit/s.
    assert_eq!((others.queue, others.burst), (24_500_000, 1_875_000));
    assert_eq!(t[&Class::Switchover.minor()].rate, 136 * MBIT);
    assert_eq!(t[&Class::Bulk.minor()].ceil, 400 * MBIT);
    assert_eq!(t[&Class::Forward.minor()].ceil, 6800 * MBIT);
    assert_eq!(Class::Bulk.classid(), 0x1f1a_0040);
    assert_eq!(t[&Class::Bulk.minor()].queue_handle(), 0x1f1e_0000);
}

#[test]
fn the_order_is_strict_and_every_leaf_has_its_own_priority() {
    let prio = Class::ALL.map(Class::prio);
    assert!(prio.is_sorted() && prio[0] == 0);
    let mut all: Vec<u32> = prio.into_iter().chain([OTHERS_PRIO]).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn each_mistake_names_its_key() {
    let mut cases: Vec<(Draft, &str)> = vec![
        (draft(0, 0), "port.link_mbit"),
        (draft(MAX_MBIT + 1, 0), "port.link_mbit"),
        (draft(100, 101), "port.others_mbit"),
        (draft(100, 98), "port.others_mbit = 98 leaves nothing"),
    ];
    let mut with = |class, c: ClassDraft, want| {
        let mut d = draft(1000, 300);
        d.classes.push((class, c));
        cases.push((d, want));
    };
    with(Class::Bulk, ClassDraft { dscp: Some(Some(64)), ..ClassDraft::default() }, "class.bulk.dscp is 64");
    with(Class::Demand, ClassDraft { ceil_mbit: Some(0), ..ClassDraft::default() }, "class.demand.ceil_mbit");
    let low = ClassDraft { min_mbit: Some(50), ceil_mbit: Some(40), ..ClassDraft::default() };
    with(Class::Control, low, "class.control: min_mbit = 50 is above its ceiling of 40");
    with(
        Class::Bulk,
        ClassDraft { min_mbit: Some(681), ..ClassDraft::default() },
        "class.bulk: min_mbit = 681",
    );
    let mut d = draft(1000, 300);
    for class in [Class::Bulk, Class::Forward] {
        d.classes.push((class, ClassDraft { min_mbit: Some(400), ..ClassDraft::default() }));
    }
    cases.push((d, "add up to 800 Mbit/s, and 680 are left"));
    for (addr, len) in [("10.77.1.1", 24), ("10.0.0.0", 33), ("fd77::1", 64), ("fd77::", 129)] {
        let mut d = draft(1000, 0);
        d.rack_prefixes = vec![(addr.parse().unwrap(), len)];
        cases.push((d, "port.rack_prefixes"));
    }
    let mut d = draft(1000, 0);
    d.rack_prefixes = vec![("10.0.0.0".parse().unwrap(), 8); MAX_PREFIXES + 1];
    cases.push((d, "65 prefixes"));
    for (d, want) in cases {
        let e = Policy::new(&d).unwrap_err().to_string();
        assert!(e.contains(want) && !e.contains('\n'), "{want}: {e}");
    }
}

#[test]
fn packets_are_given_what_the_policy_says() {
    let mut d = draft(1000, 300);
    let keep =
        ClassDraft { dscp: Some(None), mark: Some(7), priority: Some(0x1_0010), ..ClassDraft::default() };
    d.classes.push((Class::Demand, keep));
    let p = Policy::new(&d).unwrap();
    let m = markings(Some(&p), true).core;
    assert_eq!(m[4], Mark { dscp: Some(46), priority: Some(0x1f1a_0010), mark: None });
    assert_eq!(m[5], Mark { dscp: None, priority: Some(0x1f1a_0020), mark: Some(7) });
    assert_eq!(m[0], Mark::default());
    // Without our tree the operator's own class is named.
    assert_eq!(markings(Some(&p), false).core[5].priority, Some(0x1_0010));
    assert_eq!(markings(Some(&p), false).rack[1].priority, Some(0x1f1a_0040));
    assert_eq!(markings(None, false), Marks::default());
    // Pages that stay in the rack do not pass below the budget.
    let rack = markings(Some(&p), true).rack;
    assert_eq!((rack[1].priority, rack[1].dscp), (Some(Class::Forward.classid()), Some(8)));
    assert_eq!(rack[4], m[4]);
}

fn any_draft() -> impl Strategy<Value = Draft> {
    let class = (any::<bool>(), proptest::option::of(0..4000u64), proptest::option::of(1..20_000u64));
    (1..200_000u64, 0..200_000u64, proptest::collection::vec(class, 5)).prop_map(|(link, others, classes)| {
        let mut d = draft(link, others % (link + 1));
        for (class, (there, min_mbit, ceil_mbit)) in Class::ALL.into_iter().zip(classes) {
            if there {
                d.classes.push((class, ClassDraft { min_mbit, ceil_mbit, ..ClassDraft::default() }));
            }
        }
        d
    })
}

proptest! {
    #[test]
    fn every_tree_keeps_its_promises(d in any_draft(), budget in proptest::option::of(0..400_000_000_000u64)) {
        let Ok(p) = Policy::new(&d) else { return Ok(()) };
        let tree = p.tree(budget);
        let t = by_minor(&tree);
        let migration = t[&minor::MIGRATION];
        // What others are promised is beyond migration's reach, and the link is not sold twice.
        prop_assert!(migration.ceil + p.others <= p.line());
        prop_assert!(p.line() <= p.link * 98 / 100);
        prop_assert!(t[&minor::OTHERS].rate >= p.others && t[&minor::OTHERS].ceil == p.line().max(MIN_RATE));
        if let Some(b) = budget {
            prop_assert!(t[&minor::CORE].ceil <= b.max(MIN_RATE));
        }
        for c in &tree {
            prop_assert!(c.rate >= MIN_RATE && c.rate <= c.ceil, "{c:?}");
            prop_assert!(c.burst as u64 >= MIN_BURST && c.quantum >= 3028);
            let Some(parent) = t.get(&c.parent) else { prop_assert_eq!(c.minor, minor::LINE); continue };
            prop_assert!(tree.iter().position(|x| x.minor == parent.minor) < tree.iter().position(|x| x.minor == c.minor));
            prop_assert!(c.ceil <= parent.ceil.max(MIN_RATE), "{c:?} below {parent:?}");
            // Leaves may send at their rate whatever their parents say: the sum must fit, but for the kernel's least.
            let sum: u64 = tree.iter().filter(|x| x.parent == parent.minor).map(|x| x.rate).sum();
            prop_assert!(sum <= parent.ceil + 5 * MIN_RATE, "{sum} below {parent:?}");
        }
        for class in Class::ALL {
            prop_assert_eq!(t[&class.minor()].prio, class.prio());
            prop_assert!(t[&class.minor()].queue >= MIN_QUEUE as u32);
        }
    }
}
