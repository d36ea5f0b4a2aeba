//! The same guests moved by every method at several link speeds: what each puts on the core link, how long the group
//! takes, and what processor time it costs.

use crate::cache::Cache;
use crate::irlm::Method;
use crate::lab::{Lab, LabSpec};
use crate::net::Rates;
use crate::report::{Panel, panels};
use crate::round::{self, Plan, Round};
use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use std::path::Path;
use std::time::Duration;

/// A pair of link rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// For tables and names of points.
    pub name: &'static str,
    /// Between a host and its switch, Mbit/s.
    pub edge: Option<u64>,
    /// Between the racks, Mbit/s.
    pub core: Option<u64>,
}

/// From a rack whose hosts have a hundredth of what is usual today, where bytes are what counts, to one where nothing but
/// the processors limits.
pub const SPEEDS: [Speed; 3] = [
    Speed { name: "100-mbit", edge: Some(100), core: Some(1000) },
    Speed { name: "1-gbit", edge: Some(1000), core: Some(10_000) },
    Speed { name: "unshaped", edge: None, core: None },
];

/// Every method's round at one speed.
#[derive(Debug, serde::Serialize)]
pub struct AtSpeed {
    /// [`Speed::name`].
    pub speed: &'static str,
    /// In the order that was asked for; several of a method if it was moved several times.
    pub rounds: Vec<Round>,
}

impl AtSpeed {
    /// The median of a figure over a method's rounds; none if it was not moved.
    #[must_use]
    pub fn median(&self, method: &str, of: impl Fn(&Round) -> f64) -> Option<f64> {
        let mut all: Vec<f64> = self.rounds.iter().filter(|r| r.method == method).map(of).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    }
}

/// Moves `hosts` × `guests` guests by each method, `times` times at each speed, while each writes so many pages a second.
pub fn measure(
    cache: &Cache,
    (hosts, guests): (usize, usize),
    speeds: &[Speed],
    methods: &[(Method, &str)],
    irlm: &Path,
    times: usize,
    writers: u32,
) -> Result<Vec<AtSpeed>> {
    let mut out = Vec::new();
    for speed in speeds {
        let mut spec = LabSpec::new(cache, hosts, guests, 256);
        let rate = |mbit: Option<u64>| mbit.map(|m| m * 1_000_000);
        spec.rates = Rates { edge: rate(speed.edge), core: rate(speed.core) };
        let lab = Lab::new(cache.clone(), spec, &|line| eprintln!("{line}"))?;
        let mut rounds = Vec::new();
        // Methods in turn, so that what else the machine does falls on all alike.
        for _ in 0..times {
            for (method, extra) in methods {
                let plan = Plan {
                    method: *method,
                    irlm,
                    writers,
                    extra,
                    wait: Duration::from_secs(900),
                    others: None,
                };
                let r = round::run(&lab, &plan, &|_, _| {})
                    .with_context(|| format!("{} at {}", method.name(), speed.name))?;
                eprintln!(
                    "{} {hosts}x{guests}: {}: {:.1} MB on the core link, group {:.2} s, processors {:.1} s",
                    speed.name,
                    r.method,
                    r.core.forward as f64 / 1e6,
                    r.group_ms / 1e3,
                    r.cpu.agents + r.cpu.qemus
                );
                rounds.push(r);
            }
        }
        out.push(AtSpeed { speed: speed.name, rounds });
    }
    Ok(out)
}

/// A row for each speed and method: medians.
#[must_use]
pub fn table(all: &[AtSpeed]) -> String {
    let mut t = Table::new();
    t.load_style(presets::UTF8_BORDERS_ONLY);
    t.set_header([
        "link",
        "method",
        "core link\nMB",
        "of OC",
        "group\ns",
        "downtime ms\nmedian",
        "processors\ns a GiB",
    ]);
    for a in all {
        let bytes = |m: &str| a.median(m, |r| r.core.forward as f64);
        for m in Method::ALL.map(Method::name) {
            let Some(mine) = bytes(m) else { continue };
            let of = |f: fn(&Round) -> f64| a.median(m, f).unwrap_or_default();
            let cells = [
                a.speed.to_owned(),
                m.to_owned(),
                format!("{:.1}", mine / 1e6),
                bytes("oc").map_or_else(|| "-".into(), |oc| format!("{:.3}", mine / oc)),
                format!("{:.2}", of(|r| r.group_ms) / 1e3),
                format!("{:.0}", of(|r| r.downtime_median_ms)),
                format!("{:.2}", of(|r| r.cpu.per_gib(r.compared))),
            ];
            let right = |(n, c): (usize, String)| {
                Cell::new(c).set_alignment(if n < 2 { CellAlignment::Left } else { CellAlignment::Right })
            };
            t.add_row(cells.into_iter().enumerate().map(right));
        }
    }
    t.to_string()
}

/// Bytes at the first speed, and group times at each.
pub fn picture(all: &[AtSpeed], file: &Path) -> Result<()> {
    let names: Vec<&str> = Method::ALL
        .map(Method::name)
        .into_iter()
        .filter(|m| all.first().is_some_and(|a| a.median(m, |_| 0.0).is_some()))
        .collect();
    let values = |a: &AtSpeed, of: fn(&Round) -> f64| -> Vec<f64> {
        names.iter().map(|m| a.median(m, of).unwrap_or_default()).collect()
    };
    let mut drawn = Vec::new();
    if let Some(a) = all.first() {
        drawn.push((format!("MB on the core link, {}", a.speed), values(a, |r| r.core.forward as f64 / 1e6)));
    }
    for a in all {
        drawn.push((format!("group time, s, {}", a.speed), values(a, |r| r.group_ms / 1e3)));
    }
    let shown: Vec<Panel<'_>> = drawn
        .iter()
        .map(|(title, values)| Panel { title, names: &names, values, digits: 1, line: None })
        .collect();
    panels(&shown, file)
}

/// Everything, for programs.
pub fn json(all: &[AtSpeed], file: &Path) -> Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    std::fs::write(file, serde_json::to_string_pretty(all)?)
        .with_context(|| format!("write {}", file.display()))
}
