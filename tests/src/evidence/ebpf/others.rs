//! What other people's UDP and TCP traffic loses on the core link while a rack is evacuated, with shaping and without.

use super::super::{Point, unmeasured};
use anyhow::Result;
use std::path::Path;

pub(super) fn points(_irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    unmeasured(points, "1-others", "loss of other traffic with shaping on", "nothing measures it yet")?;
    Ok(())
}
