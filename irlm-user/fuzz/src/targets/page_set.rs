//! A set of a VM's pages against the simplest one there is.

use crate::ops::Ops;
use irlm_user::core::page_set::{PageSet, Run, after};
use irlm_user::core::units::{BlockIx, PageAddr};
use std::collections::BTreeSet;

const SIZES: [u32; 3] = [130, 1, 64];

pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let (mut set, mut model) = (PageSet::empty(&SIZES), BTreeSet::new());
    while !ops.is_over() {
        let op = ops.below(8);
        let addr = PageAddr { block: BlockIx(ops.below(3) as u16), page: ops.below(132) as u32 };
        let size = SIZES[usize::from(addr.block.0)];
        assert_eq!(set.covers(addr), addr.page < size);
        if addr.page >= size {
            assert!(!set.contains(addr));
            continue;
        }
        let run = Run { addr, count: (ops.below(140) as u32).min(size - addr.page) };
        match op {
            0 => assert_eq!(set.insert(addr), model.insert(addr)),
            1 => assert_eq!(set.remove(addr), model.remove(&addr)),
            2 => {
                let new = run.pages().filter(|p| model.insert(*p)).count();
                assert_eq!(set.insert_run(run), new as u64);
            }
            3 => {
                let gone = run.pages().filter(|p| model.remove(p)).count();
                assert_eq!(set.remove_run(run), gone as u64);
            }
            4 => assert_eq!(set.next(addr), model.range(addr..).next().copied()),
            5 => {
                let run = set.run_at(addr, run.count.max(1));
                assert!(run.pages().all(|p| model.contains(&p)));
            }
            6 => {
                let mut other = PageSet::full(&SIZES);
                other.remove_run(run);
                set.merge_all(&other);
                model.extend(other.iter());
            }
            _ => assert_eq!(after(addr), Some(PageAddr { page: addr.page + 1, ..addr })),
        }
        assert_eq!(set.len(), model.len() as u64);
        assert_eq!(set.contains(addr), model.contains(&addr));
    }
    assert!(set.iter().eq(model.iter().copied()));
    assert!(set.runs().flat_map(Run::pages).eq(model.iter().copied()));
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![vec![2, 0, 5, 100, 3, 0, 60, 5, 0, 2, 63, 0, 6, 0, 3, 9, 5, 0, 64, 66, 4, 1, 0, 0, 7, 0, 1, 1]]
}
