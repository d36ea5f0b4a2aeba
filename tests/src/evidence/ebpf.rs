//! The points of the kernel half: each part in a file of its own, all with the same signature.

// Dirty-page sampling against a guest whose writes are known.
mod dirty;
// What other people's traffic loses while a rack is evacuated.
mod others;
// The HTB tree, the group's budget, and what is left behind.
mod shape;
// DSCP on the wire, hostile packets, nanoseconds a packet.
mod tags;

use super::{Only, Point};
use anyhow::Result;
use std::path::Path;

type Part = fn(&Path, &Path, &mut Vec<Point>) -> Result<()>;

/// The other parts, with the beginnings of their points' names.
const PARTS: &[(&[&str], Part)] =
    &[(&["3-"], shape::budgets), (&["5-"], shape::trees), (&["4-"], dirty::points)];

pub(super) fn points(irlm: &Path, out: &Path, only: &Only) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    others::points(irlm, out, only, &mut points)?;
    tags::points(irlm, only, &mut points)?;
    for (names, part) in PARTS {
        if names.iter().any(|n| only.wants(n)) {
            part(irlm, out, &mut points)?;
        }
    }
    Ok(points)
}
