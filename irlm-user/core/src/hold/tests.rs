//! What is held, when it leaves, and that the newest version of every page always does.

use super::super::units::BlockIx;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn at(page: u32) -> PageAddr {
    PageAddr { block: BlockIx((page / 100) as u16), page: page % 100 }
}

fn content(version: u32) -> PageBytes {
    let mut bytes = [1; PAGE_SIZE];
    bytes[..4].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn version(bytes: &PageBytes) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// A round in which these pages come; which of them are held.
fn round(hold: &mut Hold, pages: &[u32], v: u32) -> Vec<bool> {
    pages.iter().map(|p| hold.page(at(*p), Some(&content(v)), false)).collect()
}

#[test]
fn a_page_that_comes_in_every_round_is_held_from_the_third_and_leaves_as_it_is_in_the_end() {
    let mut h = Hold::new(true);
    assert_eq!(round(&mut h, &[1, 2, 3, 150], 1), [false; 4], "everything comes once");
    assert_eq!(round(&mut h, &[1, 2, 150], 2), [false; 3], "once more says little");
    assert_eq!(round(&mut h, &[1, 3, 150], 3), [true, false, true]);
    assert_eq!(round(&mut h, &[1, 150], 4), [true; 2]);
    assert!(h.due().is_empty());
    h.stop();
    assert_eq!(round(&mut h, &[150], 5), [false], "the last version leaves at once");
    let left = h.all();
    assert_eq!(left.iter().map(|(a, b)| (*a, version(b))).collect::<Vec<_>>(), [(at(1), 4)]);
    assert!(h.is_empty());
    assert_eq!(
        (h.times(), h.spared()),
        (2, 3),
        "of page 1 versions 3 and of page 150 versions 3 and 4 were not sent"
    );
}

#[test]
fn a_hot_page_is_held_from_its_first_version_on_and_a_uniform_one_never() {
    let mut h = Hold::new(true);
    assert!(h.page(at(1), Some(&content(1)), true));
    assert!(!h.page(at(2), None, true));
    assert!(!h.page(at(1), None, true));
    assert!(h.all().is_empty(), "what was held of it is void");
    let mut off = Hold::new(false);
    assert!(!off.page(at(1), Some(&content(1)), true));
}

#[test]
fn what_has_calmed_down_leaves_and_what_is_too_much_does_not_stay() {
    let mut h = Hold::new(true);
    for v in 1..=3 {
        round(&mut h, &[1, 2, 3, 4], v);
    }
    assert_eq!(h.len(), 4);
    round(&mut h, &[2, 3, 4], 4);
    round(&mut h, &[2, 3], 5);
    assert!(
        h.due().is_empty(),
        "two rounds of rest are not more than some pages have between any two writes"
    );
    round(&mut h, &[2, 3], 6);
    let calm = h.due();
    assert_eq!(calm.iter().map(|(a, b)| (*a, version(b))).collect::<Vec<_>>(), [(at(1), 3)]);
    h.reuse(calm);
    assert_eq!(h.spare.len(), 1);
    h.allow(2);
    assert_eq!(h.due().iter().map(|(a, _)| *a).collect::<Vec<_>>(), [at(4)], "the least recent");
    assert!(!h.page(at(9), Some(&content(7)), true), "no room");
    assert!(h.page(at(2), Some(&content(7)), false), "but for what is there");
}

#[test]
fn the_allowance_is_a_share_of_what_goes_while_the_vm_may_stand_still() {
    assert_eq!(allowance(12.5e6, 0.3), 228);
    assert_eq!(allowance(1e12, 0.3), MAX_HELD);
    assert_eq!(allowance(0.0, 0.3), 0);
    assert_eq!(allowance(f64::NAN, 0.3), 0);
    const { assert!(SHARE <= 0.5) };
}

proptest! {
    /// Whatever comes, is allowed and is taken out in between: what left last of each page is what came last of it.
    #[test]
    fn the_newest_version_always_leaves(
        rounds in proptest::collection::vec(
            (proptest::collection::btree_map(0u32..300, (any::<bool>(), 0u8..8), 0..60), 0usize..50, any::<bool>()), 1..12),
        stop in 0usize..12,
    ) {
        let mut h = Hold::new(true);
        let (mut came, mut left) = (BTreeMap::new(), BTreeMap::new());
        for (n, (pages, allowed, look)) in rounds.iter().enumerate() {
            if n == stop {
                h.stop();
            }
            for (page, (hot, kind)) in pages {
                // One in eight is uniform: version 0.
                let bytes = (*kind > 0).then(|| content(n as u32 + 1));
                came.insert(at(*page), bytes.as_ref().map_or(0, version));
                if !h.page(at(*page), bytes.as_ref(), *hot) {
                    left.insert(at(*page), bytes.as_ref().map_or(0, version));
                }
            }
            prop_assert!(h.len() <= MAX_HELD);
            h.allow(*allowed);
            if *look {
                let due = h.due();
                left.extend(due.iter().map(|(a, b)| (*a, version(b))));
                h.reuse(due);
                prop_assert!(h.len() <= *allowed);
            }
        }
        left.extend(h.all().iter().map(|(a, b)| (*a, version(b))));
        prop_assert_eq!(came, left);
    }
}
