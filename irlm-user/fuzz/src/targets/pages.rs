//! `Pages` frames are a peer's: no records may make a receiver panic, keep more than its slots, or take a content for
//! one that it does not hash to, whatever they refer to and however often.

use irlm_user::core::delta::{Slots, restore};
use irlm_user::core::digest::{Algorithm, Hasher};
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use irlm_user::core::wire::limits::MAX_FRAME_PAGES;
use irlm_user::core::wire::pages::{Form, PageBatch, Record};

/// What a receiver of this target grants.
const SLOTS: u32 = 300;

/// The input is a frame's meta part; its contents are made of the same bytes.
pub(crate) fn target(meta: &[u8]) {
    let hasher = Hasher::new(Algorithm::Blake3, &[7; 32], "fuzz");
    let mut batch = PageBatch::default();
    if batch.read(meta).is_err() {
        assert!(batch.records().is_empty() && batch.contents() == 0);
        return;
    }
    let n = batch.contents();
    assert!(n <= MAX_FRAME_PAGES);
    let page = |n: usize| -> PageBytes {
        std::array::from_fn(|i| meta.get((i / 7 + n * 13) % meta.len().max(1)).copied().unwrap_or(1))
    };
    let body: Vec<PageBytes> = (0..n).map(page).collect();
    let (mut slots, mut scratch) = (Slots::new(SLOTS), Vec::new());
    for _ in 0..2 {
        let Ok((contents, missing)) = restore(&batch, &body, &mut slots, &hasher, &mut scratch) else { continue };
        assert_eq!(contents.len(), body.len());
        for p in batch.records() {
            let at = (p.first + p.contents).saturating_sub(1);
            match (&p.record, &p.form) {
                (Record::Named { digest, .. } | Record::Shared { digest, .. }, Form::Less(_)) => {
                    assert!(missing.contains(at) || hasher.page(&contents[at]) == *digest);
                }
                _ => assert!(!missing.contains(at) || matches!(p.record, Record::Uniform { .. } | Record::Ref { .. } | Record::Remote { .. } | Record::Keep { .. })),
            }
        }
    }
    assert!(slots.bytes() <= (SLOTS as usize).next_multiple_of(64) * PAGE_SIZE + SLOTS as usize);
    assert!(scratch.capacity() <= 2 * MAX_FRAME_PAGES);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        include_bytes!("../../../tests/data/pages/differences").to_vec(),
        include_bytes!("../../../tests/data/pages/models").to_vec(),
        include_bytes!("../../../tests/data/pages/references").to_vec(),
    ]
}
