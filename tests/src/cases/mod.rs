//! The tests on real guests.

use crate::cmd_test::Case;

/// The lab itself, with plain QEMU.
mod lab;

/// Every test, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [lab::CASES].concat()
}
