//! The point of `evidence security` that is measured without the lab: what the fuzzers find.

use crate::ctx::Ctx;
use crate::point::{Measure, Point, at_least};
use crate::task_fuzz;
use anyhow::Result;
use std::time::Duration;

/// It.
pub(crate) const POINTS: &[Measure] = &[("5-fuzz", fuzz)];

/// Executions of all parsers together that there must be.
const EXECUTIONS: u64 = 10_000_000;
/// They are given no longer. An idle machine needs one round of five minutes.
const MOST: Duration = Duration::from_secs(25 * 60);

fn fuzz(ctx: &Ctx) -> Result<Point> {
    let came = task_fuzz::parsers(ctx, EXECUTIONS, MOST)?;
    let total: u64 = came.values().map(|c| c.executions).sum();
    let findings: usize = came.values().map(|c| c.findings.len()).sum();
    let each: Vec<String> = came.iter().map(|(name, c)| format!("{name} {}", c.executions)).collect();
    let how = format!("cargo xtask fuzz, parsers only: {}; findings: {findings}", each.join(", "));
    let what = "executions of the parsers' fuzz targets, guided by coverage; a finding breaks the point";
    let mut point = at_least("5-fuzz", what, (total as f64, EXECUTIONS as f64), how);
    point.holds &= findings == 0;
    Ok(point)
}

/// What is asked of the lab, if anything is, and which points are measured here.
pub(crate) fn parts(only: &[String]) -> (Option<Vec<String>>, Vec<&'static Measure>) {
    let named = |p: &String, m: &Measure| m.0.starts_with(p.as_str());
    let here = POINTS.iter().filter(|m| only.is_empty() || only.iter().any(|p| named(p, m)));
    // The lab refuses a name that none of its points has.
    let rest: Vec<String> = only.iter().filter(|p| !POINTS.iter().any(|m| named(p, m))).cloned().collect();
    ((only.is_empty() || !rest.is_empty()).then_some(rest), here.collect())
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn what_only_names_is_measured_where_it_can_be() {
        let of = |only: &[&str]| {
            let (lab, here) = parts(&only.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
            (lab, here.len())
        };
        assert_eq!(of(&[]), (Some(vec![]), 1));
        assert_eq!(of(&["5-fuzz"]), (None, 1));
        assert_eq!(of(&["5"]), (None, 1));
        assert_eq!(of(&["1-", "5-"]), (Some(vec!["1-".to_owned()]), 1));
        assert_eq!(of(&["2"]), (Some(vec!["2".to_owned()]), 0));
    }
}
