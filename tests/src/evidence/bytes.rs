//! The points of compression and delta coding: bytes against every other method, in the small rack and in one of the
//! paper's shape, group times at several link speeds, and what it costs the processors.

// The target rack's own links.
mod multicast;

use super::{Only, Point, at_most};
use anyhow::{Context as _, Result};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::Method;
use irlm_tests::round::Round;
use irlm_tests::speeds::{self, AtSpeed, SPEEDS};
use std::path::Path;

/// How much of another method's bytes `irlm` may put on the core link.
type Bounds = &'static [(Method, f64)];

/// Hosts and guests a host of each rack, and the bounds there.
const RACKS: [((usize, usize), Bounds); 2] = [
    ((2, 2), &[(Method::Oc, 0.13), (Method::QemuMultifdZstd, 0.40)]),
    ((6, 4), &[(Method::Oc, 0.05), (Method::QemuMultifdZstd, 0.15), (Method::Gm, 0.35)]),
];

/// Moves at each speed; the median counts.
const TIMES: usize = 3;

pub(super) fn points(irlm: &Path, out: &Path, only: &Only) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    let cache = Cache::open()?;
    for (rack, bounds) in RACKS {
        let (hosts, guests) = rack;
        let name = format!("{hosts}x{guests}");
        let id = |m: Method| format!("1-bytes-{}-{name}", m.name());
        if bounds.iter().any(|(m, _)| only.wants(&id(*m))) {
            let all = speeds::measure(&cache, rack, &SPEEDS[..1], &every(), irlm, 1, 0)?;
            eprintln!("{}", speeds::table(&all));
            speeds::json(&all, &out.join(format!("bytes-{name}.json")))?;
            let at = all.first().context("nothing was moved")?;
            for (m, bound) in bounds {
                if *m == Method::Gm {
                    gang(&mut points, &id(*m), (&cache, rack, irlm), at, *bound, &name)?;
                } else {
                    bytes(&mut points, &id(*m), at, *m, ("", *bound), &name)?;
                }
            }
        }
    }
    let time = |s: &str| format!("2-time-{s}");
    let asked = SPEEDS.iter().filter(|s| only.wants(&time(s.name)) || only.wants("4-cpu"));
    let asked: Vec<_> = asked.copied().collect();
    if !asked.is_empty() {
        let all = speeds::measure(&cache, (2, 2), &asked, &every(), irlm, TIMES, 0)?;
        eprintln!("{}", speeds::table(&all));
        speeds::json(&all, &out.join("speeds.json"))?;
        speeds::picture(&all, &out.join("speeds.svg"))?;
        for at in &all {
            fastest(&mut points, &time(at.speed), at)?;
        }
        processors(&mut points, &all)?;
    }
    if only.wants("3-multicast") {
        multicast::point(&mut points, "3-multicast", irlm)?;
    }
    Ok(points)
}

fn every() -> [(Method, &'static str); 4] {
    Method::ALL.map(|m| (m, ""))
}

/// Gang migration is deduplication on each host. Ours has the same zstd, and differences from similar pages as well; without these, with zstd alone, it
/// is shown beside. The bound is of both.
fn gang(
    points: &mut Vec<Point>,
    id: &str,
    (cache, rack, irlm): (&Cache, (usize, usize), &Path),
    at: &AtSpeed,
    bound: f64,
    name: &str,
) -> Result<()> {
    bytes(points, id, at, Method::Gm, ("", bound), name)?;
    let plain = [(Method::Gm, "differences = false")];
    let mut all = speeds::measure(cache, rack, &SPEEDS[..1], &plain, irlm, 1, 0)?;
    let plain = all.first_mut().context("nothing was moved")?;
    plain.rounds.extend(at.rounds.iter().filter(|r| r.method == Method::Irlm.name()).cloned());
    bytes(points, &format!("{id}-zstd-alone"), plain, Method::Gm, (" without differences", bound), name)
}

fn bytes(
    points: &mut Vec<Point>,
    id: &str,
    at: &AtSpeed,
    other: Method,
    (which, bound): (&str, f64),
    rack: &str,
) -> Result<()> {
    let of = |m: Method| at.median(m.name(), |r| r.core.forward as f64).context("a method was not moved");
    let (mine, theirs) = (of(Method::Irlm)?, of(other)?);
    let how = format!(
        "interface counter of the core link, {rack} guests of 256 MiB from saved states, edge 100 Mbit/s; irlm {:.1} MB, {} {:.1} \
         MB; all memory identical",
        mine / 1e6,
        other.name(),
        theirs / 1e6
    );
    let what = format!("core-link bytes of irlm by {}{which}", other.name());
    at_most(points, id, &what, &how, mine / theirs, bound)
}

/// Point 2.
fn fastest(points: &mut Vec<Point>, id: &str, at: &AtSpeed) -> Result<()> {
    let of = |m: Method| at.median(m.name(), |r| r.group_ms).context("a method was not moved");
    let mine = of(Method::Irlm)?;
    let mut others = Vec::new();
    for m in [Method::Oc, Method::QemuMultifdZstd, Method::Gm] {
        others.push((of(m)?, m.name()));
    }
    let best = others.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0)).context("no other method")?;
    let how = format!(
        "2x2 guests of 256 MiB, {}, median of {TIMES} moves each in turn, ms: irlm {mine:.0}, {}",
        at.speed,
        others.iter().map(|(t, m)| format!("{m} {t:.0}")).collect::<Vec<_>>().join(", ")
    );
    let what = format!("group time of irlm by the fastest other method's ({})", best.1);
    at_most(points, id, &what, &how, mine / best.0, 1.0)
}

/// Point 4: there is nothing that it may not cost, but it is to be known.
fn processors(points: &mut Vec<Point>, all: &[AtSpeed]) -> Result<()> {
    for at in all {
        for m in Method::ALL {
            let of = |f: fn(&Round) -> f64| at.median(m.name(), f).context("a method was not moved");
            let value = Some(of(|r| r.cpu.per_gib(r.compared))?);
            let how = format!(
                "2x2 guests of 256 MiB, {}: agents and index {:.2} s, QEMUs {:.2} s without their guests' own, preparation \
                 included; median of {TIMES} moves; stages of irlm's agents, s: {}",
                at.speed,
                of(|r| r.cpu.agents)?,
                of(|r| r.cpu.qemus)?,
                stages(at, m)
            );
            let what = "seconds of processor time a GiB of guest memory".to_owned();
            let id = format!("4-cpu-{}-{}", m.name(), at.speed);
            Point { id, what, value, bound: None, holds: true, how }.print(points)?;
        }
    }
    Ok(())
}

/// What the agents' report says of their stages.
fn stages(at: &AtSpeed, m: Method) -> String {
    let sum = |key: &str| {
        at.median(m.name(), |r| {
            let hosts = r.report["hosts"].as_array().into_iter().flatten();
            let vms = r.report["vms"].as_array().into_iter().flatten();
            let all = hosts.map(|h| &h["counters"]["work"]).chain(vms.map(|v| &v["work"]));
            all.filter_map(|w| w[key].as_f64()).sum()
        })
    };
    let stages = ["hash", "compress", "decompress", "similar", "other"];
    let said = stages.iter().filter_map(|s| Some(format!("{s} {:.2}", sum(&format!("{s}_s"))?)));
    said.collect::<Vec<_>>().join(", ")
}
