//! The points of the kernel half: each part in a file of its own, all with the same signature.

// Dirty-page sampling against a guest whose writes are known.
mod dirty;
// What other people's traffic loses while a rack is evacuated.
mod others;
// The HTB tree, the group's budget, and what is left behind.
mod shape;
// DSCP on the wire, hostile packets, nanoseconds a packet.
mod tags;

use super::Point;
use anyhow::Result;
use std::path::Path;

pub(super) fn points(irlm: &Path, out: &Path) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for part in [others::points, tags::points, shape::points, dirty::points] {
        part(irlm, out, &mut points)?;
    }
    Ok(points)
}
