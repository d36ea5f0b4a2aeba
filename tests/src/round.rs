//! One method, from restored guests to services that answer on the target, with everything that the table shows.

use crate::irlm::{Irlm, Method};
use crate::lab::{Guests, Lab};
use crate::net::CoreBytes;
use crate::others::{Load, Others, Seen};
use crate::profile::spent;
use crate::ram::Census;
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// What one round came to.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Round {
    /// The method's name.
    pub method: String,
    /// Bytes on the core link, preparation and control included, by interface counters.
    pub core: CoreBytes,
    /// From the start of `irlm evacuate` to its end, ms, as the lab sees it.
    pub wall_ms: f64,
    /// Time of the whole group as reported, ms.
    pub group_ms: f64,
    /// Time of the preparation as reported, ms.
    pub prepare_ms: f64,
    /// Mean of the guests' total times, ms.
    pub mean_ms: f64,
    /// Median of the guests' downtimes, ms.
    pub downtime_median_ms: f64,
    /// Longest downtime, ms.
    pub downtime_max_ms: f64,
    /// Processor time, preparation included.
    pub cpu: Cpu,
    /// Guest memory found identical on both sides, bytes.
    pub compared: u64,
    /// Guests whose service answered on the target.
    pub services: usize,
    /// What could have been shared when the guests started.
    pub census: Census,
    /// What other people's traffic came to meanwhile, if there was any; its bytes are in `core` as well.
    pub others: Option<Seen>,
    /// The report of `irlm evacuate`, whole.
    pub report: Value,
}

/// Seconds of processor time.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Cpu {
    /// The agents and the index.
    pub agents: f64,
    /// The QEMUs of both sides, but for what their guests computed.
    pub qemus: f64,
}

impl Cpu {
    fn now(irlm: &Irlm<'_>, guests: &Guests) -> Self {
        let agents = irlm.agents.values().chain(&irlm.index).map(|p| spent(p.pid())).sum();
        Self { agents, qemus: guests.spent() }
    }

    fn since(self, before: Self) -> Self {
        Self { agents: self.agents - before.agents, qemus: self.qemus - before.qemus }
    }

    /// Both together, for each GiB of guest memory.
    #[must_use]
    pub fn per_gib(self, ram_bytes: u64) -> f64 {
        (self.agents + self.qemus) / (ram_bytes as f64 / f64::from(1 << 30))
    }
}

impl Round {
    /// A count of the report, summed over the guests.
    #[must_use]
    pub fn sum(&self, key: &str) -> Option<u64> {
        let vms = self.report["vms"].as_array()?;
        let of = |v: &Value| v[key].as_u64().or_else(|| v["pages"][key].as_u64());
        vms.iter().map(of).try_fold(0, |a, b| Some(a + b?))
    }
}

impl Round {
    /// A count of the report, summed over the hosts.
    #[must_use]
    pub fn hosts(&self, key: &str) -> Option<u64> {
        let hosts = self.report["hosts"].as_array()?;
        hosts.iter().map(|h| h["counters"][key].as_u64()).try_fold(0, |a, b| Some(a + b?))
    }
}

impl Round {
    /// What contents came to on the wire, as a share of what they were, those passed on included.
    #[must_use]
    pub fn sent_as(&self) -> Option<f64> {
        let work = &self.report["totals"]["work"];
        let (raw, wire) = (work["raw_bytes"].as_f64()?, work["wire_bytes"].as_f64()?);
        (raw > 0.0).then(|| wire / raw)
    }
}

impl Round {
    /// Bytes of pages that left the source hosts, as their eBPF programs counted them at the port.
    #[must_use]
    pub fn bpf_core_out(&self) -> Option<u64> {
        let hosts = self.report["hosts"].as_array()?;
        // What a target host sends back over the core link is the other direction.
        let sources = hosts.iter().filter(|h| h["name"].as_str().is_some_and(|n| n.starts_with('s')));
        let of = |h: &Value, class: &str| h["counters"]["bpf"][class]["core_out"]["bytes"].as_u64();
        let all: Vec<u64> = sources
            .filter_map(|h| ["bulk", "switchover", "demand"].iter().map(|class| of(h, class)).sum())
            .collect();
        (!all.is_empty()).then(|| all.iter().sum())
    }
}

/// How a round is run.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// The method.
    pub method: Method,
    /// The program under test.
    pub irlm: &'a Path,
    /// Pages a second that each guest writes meanwhile; 0 for none.
    pub writers: u32,
    /// Put at the top of the group file.
    pub extra: &'a str,
    /// Longest time for the whole group.
    pub wait: Duration,
    /// Other people's traffic while the group moves.
    pub others: Option<Load>,
}

/// Runs one round. `progress` is told the core link's forward bytes and the time as it goes on.
pub fn run(lab: &Lab, plan: &Plan<'_>, progress: &dyn Fn(u64, Duration)) -> Result<Round> {
    let mut guests = lab.start_guests()?;
    let census = guests.census()?;
    if plan.writers > 0 {
        guests.start_writers(plan.writers, 2048)?;
    }
    let mut irlm = Irlm::start(lab, plan.irlm, &guests, plan.extra)?;
    let json = lab.top().join("report.json");
    let _ = std::fs::remove_file(&json);
    let others = plan.others.map(|load| Others::start(lab, load)).transpose()?;
    let before = lab.net.core_bytes()?;
    let cpu = Cpu::now(&irlm, &guests);
    let start = Instant::now();
    let mut evacuate = irlm.evacuate(plan.method, &json, true)?;
    let code = loop {
        if let Some(code) = evacuate.ended()? {
            break code;
        }
        if start.elapsed() > plan.wait {
            bail!("{} took longer than {:?}\n{}", plan.method.name(), plan.wait, irlm.logs());
        }
        progress(lab.net.core_bytes()?.since(before).forward, start.elapsed());
        std::thread::sleep(Duration::from_millis(250));
    };
    let end = Instant::now();
    let wall_ms = start.elapsed().as_secs_f64() * 1e3;
    let core = lab.net.core_bytes()?.since(before);
    let cpu = Cpu::now(&irlm, &guests).since(cpu);
    if code != 0 {
        bail!("irlm evacuate ended with {code}: {}\n{}{}", evacuate.said(), irlm.logs(), guests.said());
    }
    let others = others.map(|o| o.stop(start, end)).transpose()?.map(|o| o.0);
    let text = std::fs::read_to_string(&json).context("read the report of irlm evacuate")?;
    let report: Value = serde_json::from_str(&text).context("the report of irlm evacuate")?;
    let mut compared = 0;
    for p in &mut guests.pairs {
        compared += lab.compare(p).with_context(|| plan.method.name())?.bytes;
    }
    for p in &mut guests.pairs {
        p.resume_and_check()?;
    }
    irlm.agents.clear();
    let vms = report["vms"].as_array().context("the report has no vms")?;
    if vms.len() != guests.pairs.len() {
        bail!("the report has {} guests of {}", vms.len(), guests.pairs.len());
    }
    let ms = |key: &str| -> Result<Vec<f64>> {
        vms.iter()
            .map(|v| v[key].as_f64().with_context(|| format!("the report has no {key} in {v}")))
            .collect()
    };
    let mut downtimes = ms("downtime_ms")?;
    downtimes.sort_by(f64::total_cmp);
    Ok(Round {
        method: plan.method.name().into(),
        core,
        wall_ms,
        group_ms: report["group_ms"].as_f64().unwrap_or(wall_ms),
        prepare_ms: report["prepare_ms"].as_f64().unwrap_or_default(),
        mean_ms: ms("total_ms")?.iter().sum::<f64>() / vms.len() as f64,
        downtime_median_ms: median(&downtimes),
        downtime_max_ms: downtimes.last().copied().unwrap_or_default(),
        cpu,
        compared,
        services: guests.pairs.len(),
        census,
        others,
        report,
    })
}

/// The median of sorted values; the mean of the middle two if their number is even.
fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(&[1.0, 2.0, 9.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[1.0, 2.0, 4.0, 9.0]) - 3.0).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }
}
