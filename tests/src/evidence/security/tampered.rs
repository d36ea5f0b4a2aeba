//! Point 3: whatever a man in the middle does to what passes, no changed page runs.

use super::super::{Only, Point, at_most};
use crate::cases::ownership::tampered::{Outcome, Way, somewhere, trials};
use crate::cmd_test::Bench;
use anyhow::Result;
use irlm_tests::cache::Cache;
use irlm_tests::middle::Harm;
use std::path::Path;

/// Flips in plain text, each in a move of its own.
const FLIPS: u64 = 500;
/// Trials of each other harm, and of each under TLS.
const OTHERS: u64 = 20;

pub(super) fn points(points: &mut Vec<Point>, irlm: &Path, only: &Only) -> Result<()> {
    let cache = Cache::open()?;
    let qemu = cache.qemu("7.2");
    let bench = Bench { cache, irlm: irlm.to_path_buf(), qemu: qemu.clone(), qemu_target: qemu };
    let what = "guests that ran with other bytes than they had";
    if only.wants("3-flips-plain") {
        let out = trials(&bench, Way::Plain, FLIPS, |n| somewhere(n, Harm::Flip))?;
        let how = said(&format!("{FLIPS} moves in plain text, one flipped bit in each"), out);
        at_most(points, "3-flips-plain", what, &how, out.wrong as f64, 0.0)?;
    }
    for (way, name, harms) in
        [(Way::Plain, "3-others-plain", &Harm::ALL[1..]), (Way::Tls, "3-all-tls", &Harm::ALL[..])]
    {
        if !only.wants(name) {
            continue;
        }
        let kinds = harms.len() as u64;
        let out = trials(&bench, way, OTHERS * kinds, |n| somewhere(n, harms[(n % kinds) as usize]))?;
        let how = said(&format!("{OTHERS} moves of each of {harms:?}, {way:?}"), out);
        at_most(points, name, what, &how, out.wrong as f64, 0.0)?;
    }
    Ok(())
}

fn said(what: &str, o: Outcome) -> String {
    format!(
        "{what}: {} stayed at their source, {} moved with the bytes that they had, {} with others; {} were over before",
        o.caught, o.right, o.wrong, o.missed
    )
}
