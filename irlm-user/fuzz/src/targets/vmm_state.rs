//! Saved state of `irlm vmm` travels between hosts: no bytes may make its reader panic or keep more than it was given,
//! and what it takes must be exactly what was saved. A wrong hash stops nearly every input at the door, so each is
//! also tried with a right one.

use irlm_user::host::kvm::snapshot::{Snapshot, seal};

/// Header before, hash behind the sections.
const HEADER: usize = 24;
const HASH: usize = 32;

pub(crate) fn target(data: &[u8]) {
    let inner = data.get(HEADER..data.len().saturating_sub(HASH)).unwrap_or(data);
    for bytes in [data.to_vec(), seal(data), seal(inner)] {
        match Snapshot::decode(&bytes) {
            Ok(s) => assert_eq!(s.encode(), bytes, "something else than what was saved"),
            Err(e) => assert!(!e.to_string().contains('\n')),
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![include_bytes!("../../../tests/data/vmm/2-vcpus.state").to_vec()]
}
