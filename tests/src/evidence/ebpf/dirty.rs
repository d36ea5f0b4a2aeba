//! Dirty-page sampling: rates and hot pages against a guest whose writes are known.

use super::super::{Point, unmeasured};
use anyhow::Result;
use std::path::Path;

pub(super) fn points(_irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    unmeasured(
        points,
        "4-sampling",
        "dirty rate and hot set as the guest made them",
        "nothing measures it yet",
    )?;
    Ok(())
}
