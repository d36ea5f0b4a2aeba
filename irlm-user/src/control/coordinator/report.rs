//! How a group's move ended, for people and for programs: the same figures in the final table and in `--json`.

use super::plan::Plan;
use super::watch::{AgentView, Verdict, VmView};
use crate::control::api::{HostCounters, Method, PageCounts, VmStatus, Work};
use serde::Serialize;
use std::time::Duration;

/// How the whole ended; its number is the exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every VM is owned by its target.
    AllMoved,
    /// Some VM runs on at its source; the others moved.
    SomeStayed,
    /// Some VM is in doubt.
    InDoubt,
    /// Nothing was started: every VM runs where it did.
    NothingStarted,
}

impl Outcome {
    /// The program's exit code.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::AllMoved => 0,
            Self::SomeStayed => 2,
            Self::InDoubt => 3,
            Self::NothingStarted => 4,
        }
    }
}

/// One VM's move.
#[derive(Clone, Debug, Serialize)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// Its source host.
    pub source: String,
    /// Its target host.
    pub target: String,
    /// Where it is now.
    pub verdict: Verdict,
    /// Its last phase, as shown.
    pub phase: &'static str,
    /// From the start of its stream until it ran (or could have run) at the target, milliseconds.
    pub total_ms: Option<f64>,
    /// From its stop at the source until it could run at the target, milliseconds.
    pub downtime_ms: Option<f64>,
    /// Post-copy: from then until its last page had come, milliseconds.
    pub fill_ms: Option<f64>,
    /// Guest RAM, bytes.
    pub ram_bytes: u64,
    /// Bytes QEMU sent.
    pub stream_bytes: u64,
    /// Bytes of its own connection over the core link.
    pub wire_bytes: u64,
    /// Pages by what was sent for them.
    pub pages: PageCounts,
    /// Processor time of its own threads at both hosts, and how its contents were compressed.
    pub work: Work,
    /// Why it did not move, or is in doubt.
    pub error: Option<String>,
    /// The source agent's last word.
    pub source_status: Option<VmStatus>,
    /// The target agent's last word.
    pub target_status: Option<VmStatus>,
}

/// One host's part.
#[derive(Clone, Debug, Serialize)]
pub struct HostReport {
    /// Its name in the group.
    pub name: String,
    /// Whether its agent answered at the end.
    pub answers: bool,
    /// What it did.
    pub counters: HostCounters,
}

/// Sums over the group.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Totals {
    /// Bytes over the core link by the agents' count: the VMs' own connections and the pushes.
    pub wire_bytes: u64,
    /// Of these, pushes.
    pub push_bytes: u64,
    /// Bytes passed on inside the target rack.
    pub forwarded_bytes: u64,
    /// Bytes QEMU sent.
    pub stream_bytes: u64,
    /// Pages by what was sent for them.
    pub pages: PageCounts,
    /// Processor time of all hosts by stage, and how contents were compressed, those passed on included.
    pub work: Work,
    /// Processor seconds for each GiB of guest memory, all stages.
    pub cpu_s_per_gib: Option<f64>,
    /// Processor time that the source hosts spent hashing after preparation, pushes included, milliseconds.
    pub hash_ms: f64,
    /// Mean over the moved VMs, milliseconds.
    pub mean_total_ms: Option<f64>,
    /// Median over the moved VMs, milliseconds.
    pub median_downtime_ms: Option<f64>,
}

/// A group's move.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The group.
    pub group: String,
    /// How it was moved.
    pub method: Method,
    /// How it ended.
    pub outcome: Outcome,
    /// Preparation, milliseconds.
    pub prepare_ms: f64,
    /// From the start until the last VM was settled, milliseconds.
    pub group_ms: f64,
    /// The VMs, in the group file's order.
    pub vms: Vec<VmReport>,
    /// The hosts.
    pub hosts: Vec<HostReport>,
    /// Sums.
    pub totals: Totals,
    /// What went wrong on the way.
    pub problems: Vec<String>,
}

/// From the start until the last VM was settled. Counted by each source host's own clock from when it was told to start,
/// so that neither the pace at which agents are asked nor clocks that are apart show in it; `told` is what passed before
/// that, `watched` what this side saw, which is all there is if some VM's end is not known.
fn group_time(
    name: &str,
    vms: &[VmView],
    agents: &[AgentView],
    told: Duration,
    watched: Duration,
) -> Duration {
    let last = vms.iter().map(|v| {
        let s = v.source.status()?;
        let host = agents.iter().filter_map(|a| a.group(name)).find(|g| {
            g.vms.iter().any(|w| w.role == crate::control::api::Role::Source && w.name == v.name)
        })?;
        ns(host.started_ns, s.running_ns.max(s.filled_ns))
    });
    let longest = last.reduce(|a, b| Some(a?.max(b?))).flatten();
    longest.map_or(watched, |ns| told + Duration::from_nanos(ns))
}

fn ns(from: u64, to: u64) -> Option<u64> {
    (from != 0 && to > from).then(|| to - from)
}

fn ms(from: u64, to: u64) -> Option<f64> {
    ns(from, to).map(|ns| Duration::from_nanos(ns).as_secs_f64() * 1e3)
}

fn vm(v: &VmView) -> VmReport {
    let (s, t) = (v.source.status(), v.target.status());
    // One clock if it can be: hosts' clocks may be apart.
    let downtime = s.and_then(|s| s.downtime_ns).map(|n| Duration::from_nanos(n).as_secs_f64() * 1e3);
    let downtime = downtime.or_else(|| ms(s?.stopped_ns, t?.ready_ns));
    let started = s.map_or(0, |s| s.started_ns);
    let end = [s.map_or(0, |s| s.running_ns), t.map_or(0, |t| t.running_ns), t.map_or(0, |t| t.ready_ns)];
    let total = end.into_iter().find(|n| *n != 0).and_then(|end| ms(started, end));
    let moved = v.verdict == Verdict::Moved;
    VmReport {
        name: v.name.clone(),
        source: v.source_host.clone(),
        target: v.target_host.clone(),
        verdict: v.verdict,
        phase: v.phase_name(),
        total_ms: total.filter(|_| moved),
        downtime_ms: downtime.filter(|_| moved),
        fill_ms: [s, t].into_iter().flatten().find_map(|x| ms(x.running_ns, x.filled_ns)),
        ram_bytes: s.or(t).map_or(0, |x| x.ram_total),
        stream_bytes: s.or(t).map_or(0, |x| x.stream_bytes),
        wire_bytes: s.or(t).map_or(0, |x| x.wire_bytes),
        pages: s.or(t).map_or_else(PageCounts::default, |x| x.pages),
        work: s.into_iter().chain(t).fold(Work::default(), |mut all, x| {
            all.add(&x.work);
            all
        }),
        error: v.error().map(str::to_owned),
        source_status: s.cloned(),
        target_status: t.cloned(),
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => None,
        _ if n % 2 == 1 => Some(values[n / 2]),
        _ => Some((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

impl Report {
    /// The report of a group that was not started.
    #[must_use]
    pub fn nothing_started(plan: &Plan, prepare: Duration, problems: Vec<String>) -> Self {
        Self {
            group: plan.config.name.clone(),
            method: plan.method,
            outcome: Outcome::NothingStarted,
            prepare_ms: prepare.as_secs_f64() * 1e3,
            group_ms: 0.0,
            vms: vec![],
            hosts: vec![],
            totals: Totals::default(),
            problems,
        }
    }

    /// The report of what the agents' last words say.
    #[must_use]
    pub fn new(
        plan: &Plan,
        vms: &[VmView],
        agents: &[AgentView],
        prepare: Duration,
        told: Duration,
        group: Duration,
        problems: Vec<String>,
    ) -> Self {
        let group = group_time(&plan.config.name, vms, agents, told, group);
        let vms: Vec<VmReport> = vms.iter().map(vm).collect();
        let hosts: Vec<HostReport> = agents
            .iter()
            .map(|a| HostReport {
                name: a.name.clone(),
                answers: a.answers,
                counters: a.group(&plan.config.name).map(|g| g.host.clone()).unwrap_or_default(),
            })
            .collect();
        let any = |v: Verdict| vms.iter().any(|x| x.verdict == v);
        let outcome = if any(Verdict::InDoubt) || any(Verdict::Open) {
            Outcome::InDoubt
        } else if any(Verdict::Stayed) {
            Outcome::SomeStayed
        } else {
            Outcome::AllMoved
        };
        let mut t = Totals::default();
        let mut ram = 0;
        for v in &vms {
            t.wire_bytes += v.wire_bytes;
            t.stream_bytes += v.stream_bytes;
            t.pages.unique += v.pages.unique;
            t.pages.shared += v.pages.shared;
            t.pages.reference += v.pages.reference;
            t.pages.remote_reference += v.pages.remote_reference;
            t.pages.uniform += v.pages.uniform;
            t.pages.answered += v.pages.answered;
            t.pages.difference += v.pages.difference;
            t.pages.modelled += v.pages.modelled;
            t.work.add(&v.work);
            ram += v.ram_bytes;
            t.pages.hashed += v.pages.hashed;
            t.pages.kept += v.pages.kept;
            t.pages.held += v.pages.held;
            t.pages.spared += v.pages.spared;
            t.hash_ms += v.source_status.as_ref().map_or(0, |s| s.hash_ns) as f64 / 1e6;
        }
        for h in &hosts {
            t.push_bytes += h.counters.push_bytes;
            t.forwarded_bytes += h.counters.forwarded_bytes;
            t.work.add(&h.counters.work);
            t.hash_ms += h.counters.push_hash_ns as f64 / 1e6;
        }
        t.cpu_s_per_gib = (ram > 0).then(|| t.work.cpu_s() / (ram as f64 / f64::from(1 << 30)));
        t.wire_bytes += t.push_bytes;
        let totals: Vec<f64> = vms.iter().filter_map(|v| v.total_ms).collect();
        if !totals.is_empty() {
            t.mean_total_ms = Some(totals.iter().sum::<f64>() / totals.len() as f64);
        }
        t.median_downtime_ms = median(vms.iter().filter_map(|v| v.downtime_ms).collect());
        Self {
            group: plan.config.name.clone(),
            // Whoever only watches does not know what it was started with.
            method: agents.iter().find_map(|a| a.group(&plan.config.name)).map_or(plan.method, |g| g.method),
            outcome,
            prepare_ms: prepare.as_secs_f64() * 1e3,
            group_ms: group.as_secs_f64() * 1e3,
            vms,
            hosts,
            totals: t,
            problems,
        }
    }
}
