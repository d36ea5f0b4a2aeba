//! Dirty-page sampling: rates and hot pages against a guest whose writes are known.

use super::super::{Point, at_most, unmeasured};
use crate::cmd_bench;
use anyhow::{Context as _, Result};
use irlm_tests::cache::Cache;
use irlm_tests::sampling::{self, Guest, Mode};
use std::collections::HashSet;
use std::path::Path;

const RATE: (&str, &str) = ("4-rate", "dirty rate off the guest's own count");
const RECALL: (&str, &str) = ("4-hot-set", "part of the hot set that is not found");
const COST: (&str, &str) = ("cost-sampling", "nanoseconds that a dirtied page costs, each seen one by one");

pub(super) fn points(_irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    let tracer = match sampling::tracer() {
        Ok(tracer) => tracer,
        Err(why) => {
            for (id, what) in [RATE, RECALL, COST] {
                unmeasured(points, id, what, &why)?;
            }
            return Ok(());
        }
    };
    let cache = Cache::open()?;
    let by = tracer.best(true).name();
    for version in ["7.2", "10.0"] {
        for one_in in [1, 64] {
            let guest = Guest::start(&cache.qemu(version), &sampling::sweep())?;
            let (truth, seen) = guest.observe(&tracer, 5, one_in)?;
            let rate = seen.heat.dirty_rate();
            let how = format!(
                "QEMU {version}, {by}, 1 in {one_in}, 5 s: guest {truth:.0} pages/s, seen {rate:.0}; {:?}",
                seen.totals
            );
            let id = format!("{}-qemu-{version}-1-in-{one_in}", RATE.0);
            at_most(points, &id, RATE.1, &how, (rate / truth - 1.0).abs(), 0.10)?;
        }
        let payload = sampling::hot_set();
        let guest = Guest::start(&cache.qemu(version), &payload)?;
        let (truth, seen) = guest.observe(&tracer, 8, 1)?;
        let found: HashSet<_> = seen.heat.hot_pages().into_iter().collect();
        let hit = payload.hot.clone().filter(|p| found.contains(&guest.page(*p))).count();
        let recall = hit as f64 / payload.hot.len() as f64;
        let how = format!(
            "QEMU {version}, {by}, 8 s, guest {truth:.0} writes/s: recall {recall:.3}, {} pages found hot",
            found.len()
        );
        at_most(points, &format!("{}-qemu-{version}", RECALL.0), RECALL.1, &how, 1.0 - recall, 0.05)?;
    }
    let (costs, word) = cmd_bench::dirty(&cache, &tracer, 3, 4)?;
    let of = |mode| costs.iter().find(|(m, _)| *m == mode).map(|(_, c)| *c).context("a mode is missing");
    let (off, pages) = (of(Mode::Off)?, of(Mode::Pages)?);
    let share = pages.nanos * off.rate / 1e7;
    let all: Vec<String> =
        costs.iter().map(|(m, c)| format!("{} {:.0} pages/s {:.0} ns", m.name(), c.rate, c.nanos)).collect();
    let (id, what) = (COST.0.to_owned(), COST.1.to_owned());
    let how = format!("{by}; {share:.2} % of a vCPU's time at the guest's rate; {word}; {}", all.join(", "));
    Point { id, what, value: Some(pages.nanos), bound: None, holds: true, how }.print(points)
}
