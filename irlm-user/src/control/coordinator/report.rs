//! How a group's move ended, for people and for programs: the same figures in the final table and in
//! `--json`.

use super::plan::Plan;
use super::watch::{ALREADY, AgentView, Verdict, VmView};
use crate::control::api::{HostCounters, Method, PageCounts, VmStatus, Work};
use crate::core::account::Proof;
use serde::Serialize;
use std::time::Duration;

/// How the whole ended; its number is the exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Every VM is owned by its target.
    AllMoved,
    /// Some VM stayed at its source; the others moved.
    SomeStayed,
    /// Some VM is in doubt, or was not watched to its end, or its old copy runs beside the one that moved.
    InDoubt,
    /// Some VM's process has ended while it was its owner's, or since it moved: no copy of it runs.
    SomeLost,
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
            Self::SomeLost => 5,
        }
    }
}

// bounds: one row of a report
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
    /// What its process at its owner's side says of it now: QEMU's run state, `ended` if the process has
    /// ended; empty if it is not known.
    pub state: String,
    /// It belongs to its target, and its old copy was seen to run at its source.
    pub old_copy_runs: bool,
    /// Its process has ended since it moved, and no copy of it runs.
    pub ended_since: bool,
    /// It was lost at its target, and the copy that its source gave up stands there.
    pub copy_at_source: bool,
    /// Some of its times are differences of hosts' wall clocks, because no steadier one was told: a clock
    /// that was set meanwhile shows in them.
    pub wall_clock: bool,
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
    /// What is known of its pages, if it moved.
    pub verified: Option<Proof>,
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
    /// Preparation, milliseconds. Who only follows does not know it.
    pub prepare_ms: Option<f64>,
    /// From the start until the last VM was settled, milliseconds; 0 if nothing was moved. Who only follows
    /// knows it if the agents say when every VM was settled.
    pub group_ms: Option<f64>,
    /// The VMs, in the group file's order.
    pub vms: Vec<VmReport>,
    /// The hosts.
    pub hosts: Vec<HostReport>,
    /// Sums.
    pub totals: Totals,
    /// What went wrong on the way.
    pub problems: Vec<String>,
}

/// How long it took, by the coordinator's own clock, which does not step.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Preparation, if it was seen.
    pub prepare: Option<Duration>,
    /// From then until the sources were told to begin.
    pub told: Duration,
    /// From the end of preparation, or from when watching began, until it ended.
    pub watched: Duration,
    /// It was watched from its start: nothing in it can have taken longer.
    pub whole: bool,
}

impl Times {
    /// A time that can be true.
    fn within(&self, ns: u64) -> Option<Duration> {
        let d = Duration::from_nanos(ns);
        (!self.whole || d <= self.watched).then_some(d)
    }
}

/// From the start until the last VM was settled. Counted by each source host's own clock from when it was
/// told to start, so that neither the pace at which agents are asked nor clocks that are apart show in it.
/// What this side saw is all there is if some VM's end is not known, or a host's clock was set meanwhile; and
/// who did not see the start knows nothing then.
fn group_time(name: &str, vms: &[VmView], agents: &[AgentView], times: &Times) -> Option<Duration> {
    if !vms.is_empty() && vms.iter().all(|v| v.already.is_some()) {
        return Some(Duration::ZERO);
    }
    let last = vms.iter().filter(|v| v.already.is_none()).map(|v| {
        let s = v.source.status()?;
        let host = agents.iter().filter_map(|a| a.group(name)).find(|g| {
            g.vms.iter().any(|w| w.role == crate::control::api::Role::Source && w.name == v.name)
        })?;
        ns(host.started_ns, s.running_ns.max(s.filled_ns))
    });
    let longest = last.reduce(|a, b| Some(a?.max(b?))).flatten().and_then(|ns| times.within(ns));
    longest.map(|d| (times.told + d).min(times.watched.max(d))).or(times.whole.then_some(times.watched))
}

fn ns(from: u64, to: u64) -> Option<u64> {
    (from != 0 && to > from).then(|| to - from)
}

fn millis(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

/// A VM's time: by a clock of one host that does not step, else by wall clocks.
struct Clocks<'a> {
    times: &'a Times,
    /// A wall clock was all there was.
    wall: bool,
}

impl Clocks<'_> {
    fn take(&mut self, steady: Option<u64>, wall: Option<u64>) -> Option<f64> {
        if let Some(ns) = steady {
            return self.times.within(ns).map(millis);
        }
        let ms = wall.and_then(|ns| self.times.within(ns)).map(millis);
        self.wall |= ms.is_some();
        ms
    }
}

fn vm(v: &VmView, times: &Times) -> VmReport {
    let (s, t) = (v.source.status(), v.target.status());
    let steady = |of: fn(&VmStatus) -> Option<u64>| s.and_then(of).or_else(|| t.and_then(of));
    let mut clocks = Clocks { times, wall: false };
    let moved = v.verdict == Verdict::Moved;
    let apart = |from: fn(&VmStatus) -> u64, to: fn(&VmStatus) -> u64| ns(from(s?), to(t?));
    let downtime = clocks.take(
        steady(|x| x.downtime_ns).filter(|_| moved),
        apart(|s| s.stopped_ns, |t| t.ready_ns).filter(|_| moved),
    );
    let started = s.map_or(0, |s| s.started_ns);
    let end = [s.map_or(0, |s| s.running_ns), t.map_or(0, |t| t.running_ns), t.map_or(0, |t| t.ready_ns)];
    let end = end.into_iter().find(|n| *n != 0).and_then(|end| ns(started, end));
    let total = clocks.take(steady(|x| x.total_ns).filter(|_| moved), end.filter(|_| moved));
    let filled = [s, t].into_iter().flatten().find_map(|x| ns(x.running_ns, x.filled_ns));
    let fill = clocks.take(steady(|x| x.fill_ns), filled);
    VmReport {
        name: v.name.clone(),
        source: v.source_host.clone(),
        target: v.target_host.clone(),
        verdict: v.verdict,
        phase: v.phase_name(),
        state: v.state().to_owned(),
        old_copy_runs: v.old_copy_runs(),
        ended_since: v.ended_since() && !v.old_copy_runs(),
        copy_at_source: v.copy_at_source(),
        wall_clock: clocks.wall,
        total_ms: total,
        downtime_ms: downtime,
        fill_ms: fill,
        ram_bytes: s.or(t).map_or(0, |x| x.ram_total),
        stream_bytes: s.or(t).map_or(0, |x| x.stream_bytes),
        wire_bytes: s.or(t).map_or(0, |x| x.wire_bytes),
        pages: s.or(t).map_or_else(PageCounts::default, |x| x.pages),
        work: s.into_iter().chain(t).fold(Work::default(), |mut all, x| {
            all.add(&x.work);
            all
        }),
        verified: s.and_then(|s| s.verified).filter(|_| moved),
        error: v.error(),
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
            prepare_ms: Some(millis(prepare)),
            group_ms: Some(0.0),
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
        times: Times,
        problems: Vec<String>,
    ) -> Self {
        let group = group_time(&plan.config.name, vms, agents, &times);
        let vms: Vec<VmReport> = vms.iter().map(|v| vm(v, &times)).collect();
        // Where nothing was left to move no agent was asked: what they know of this name is an earlier run's.
        let asked = vms.is_empty() || vms.iter().any(|v| v.phase != ALREADY);
        let of_agent = |a: &AgentView| a.group(&plan.config.name).filter(|_| asked).cloned();
        let hosts: Vec<HostReport> = agents
            .iter()
            .map(|a| HostReport {
                name: a.name.clone(),
                answers: a.answers,
                counters: of_agent(a).map(|g| g.host).unwrap_or_default(),
            })
            .collect();
        let any = |v: Verdict| vms.iter().any(|x| x.verdict == v);
        let outcome = if any(Verdict::Lost) || vms.iter().any(|v| v.ended_since) {
            Outcome::SomeLost
        } else if any(Verdict::InDoubt) || any(Verdict::Open) || vms.iter().any(|v| v.old_copy_runs) {
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
            t.pages.add(&v.pages);
            t.work.add(&v.work);
            ram += v.ram_bytes;
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
            method: agents.iter().find_map(of_agent).map_or(plan.method, |g| g.method),
            outcome,
            prepare_ms: times.prepare.map(millis),
            group_ms: group.map(millis),
            vms,
            hosts,
            totals: t,
            problems,
        }
    }
}
