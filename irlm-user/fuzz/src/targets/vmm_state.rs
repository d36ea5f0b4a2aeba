//! Saved state of `irlm vmm` travels between hosts: no bytes may make its reader panic or keep more than it was given,
//! and what it takes must be exactly what was saved. A wrong hash stops nearly every input at the door, so each is
//! also tried with a right one.
#![cfg_attr(fuzzing, no_main)]

use irlm_user::host::kvm::snapshot::{Snapshot, seal};

/// Header before, hash behind the sections.
const HEADER: usize = 24;
const HASH: usize = 32;

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| target(data));

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    irlm_user_fuzz::main(target)
}

fn target(data: &[u8]) {
    let inner = data.get(HEADER..data.len().saturating_sub(HASH)).unwrap_or(data);
    for bytes in [data.to_vec(), seal(data), seal(inner)] {
        match Snapshot::decode(&bytes) {
            Ok(s) => assert_eq!(s.encode(), bytes, "something else than what was saved"),
            Err(e) => assert!(!e.to_string().contains('\n')),
        }
    }
}
