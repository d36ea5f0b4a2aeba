//! The HTB tree on the core-facing port: the budget it keeps, and that nothing of it stays behind.

use super::super::{Point, unmeasured};
use anyhow::Result;
use std::path::Path;

pub(super) fn points(_irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    unmeasured(points, "3-budget", "core-link rate off the budget", "nothing measures it yet")?;
    unmeasured(points, "5-trees", "an operator's own tree before and after", "nothing measures it yet")?;
    Ok(())
}
