//! Pages that are held back: whatever comes, is allowed and is taken out in between, what leaves of a page is its newest
//! version, and no more are held than are allowed.

use crate::ops::Ops;
use irlm_user::core::hold::{Hold, MAX_HELD};
use irlm_user::core::units::{BlockIx, PAGE_SIZE, PageAddr, PageBytes};
use std::collections::BTreeMap;

type Taken = Vec<(PageAddr, Box<PageBytes>)>;

pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let mut hold = Hold::new(!ops.rarely());
    // By page: the newest version that came, and the one that left last.
    let (mut came, mut left) = (BTreeMap::new(), BTreeMap::new());
    let mut version = 0u8;
    let leave = |hold: &mut Hold, taken: Taken, left: &mut BTreeMap<PageAddr, u8>| {
        assert!(taken.is_sorted_by_key(|t| t.0));
        left.extend(taken.iter().map(|(a, b)| (*a, b[0])));
        hold.reuse(taken);
    };
    while !ops.is_over() {
        match ops.below(16) {
            0 => {
                let allowed = usize::from(ops.byte() % 32);
                hold.allow(allowed);
                let due = hold.due();
                leave(&mut hold, due, &mut left);
                assert!(hold.len() <= allowed);
            }
            1 => {
                let due = hold.due();
                leave(&mut hold, due, &mut left);
            }
            2 if ops.rarely() => hold.stop(),
            3 => hold.allow(MAX_HELD * 2),
            _ => {
                let addr = PageAddr { block: BlockIx(ops.below(2) as u16), page: ops.below(40) as u32 };
                version = version.wrapping_add(1);
                let content = [version; PAGE_SIZE];
                came.insert(addr, version);
                if !hold.page(addr, (version & 7 != 0).then_some(&content), ops.rarely()) {
                    left.insert(addr, version);
                }
            }
        }
        assert!(hold.len() <= MAX_HELD);
    }
    let rest = hold.all();
    leave(&mut hold, rest, &mut left);
    assert!(hold.is_empty());
    assert_eq!(came, left, "something else left than what came last");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let round: Vec<u8> = (0..12).flat_map(|p| [7, 0, p, 3]).collect();
    let mut long = vec![0];
    for n in 0..6 {
        long.extend(&round[..(12 - n) * 4]);
        long.extend([1, 0, 5]);
    }
    vec![long]
}
