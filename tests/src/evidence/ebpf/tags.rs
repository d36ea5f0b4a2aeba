//! DSCP as packets on the core link carry it, hostile packets, and the cost of a packet.

use super::super::{Point, unmeasured};
use anyhow::Result;
use std::path::Path;

pub(super) fn points(_irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    unmeasured(points, "2-dscp", "DSCP of each class on the core link", "nothing measures it yet")?;
    unmeasured(
        points,
        "6-hostile",
        "packets changed that are no migration packets",
        "nothing measures it yet",
    )?;
    Ok(())
}
