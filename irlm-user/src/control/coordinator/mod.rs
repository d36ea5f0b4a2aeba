//! What the group's coordinator does: learn who is there, prepare, start, watch, report. It decides nothing
//! about a VM's ownership (the VM's two agents do) and keeps nothing: it may die at any moment and be
//! re-attached by `irlm status --follow`.

// The group's budget, divided while the group moves.
mod budget;
// What would happen, before it does.
pub mod forecast;
// The group as its agents are told of it.
pub mod plan;
// How it ended.
pub mod report;
// Watching to the end.
mod follow;
// What is looked at before anything is prepared.
mod preflight;
// From the first word to the streams.
mod prepare;
// Watching, and what may be concluded.
pub mod watch;

use super::api::{Phase, PrepareStatus, Reply, Request};
use super::client::{AgentClient, CallError};
use crate::flow::unix_ns;
use follow::{Stop, follow};
use plan::Plan;
pub use preflight::preflight;
use prepare::{Accepted, Started, let_go, start};
use report::{Outcome, Report, Times, VmReport};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;
use watch::{AgentView, Verdict, VmView, Watch};

/// How long a VM must be in doubt before the coordinator reports it so and ends; its agents go on.
pub const DOUBT_WAIT: Duration = Duration::from_secs(30);

/// What is said of a group that somebody has stopped in time.
const CANCELLED: &str = "cancelled before anything moved";

/// How long nothing of a VM may move, while both its agents answer, before it is waited for no longer.
pub const STALL_WAIT: Duration = Duration::from_secs(300);

/// How far the clocks of an agent and of this host may be apart before it is said.
const CLOCK_SKEW: Duration = Duration::from_millis(500);

/// The group at its index server, as the coordinator needs it; all blocking.
pub trait GroupIndex: Send {
    /// Has the share plan made over all source hosts that have registered; a line for the log.
    fn plan_now(&mut self) -> Result<String, String>;
    /// Has the group forgotten.
    fn close(self: Box<Self>) -> Result<(), String>;
}

/// Opens the group at its index server; blocking. A seam, so that the coordinator is tested without a server.
pub type OpenIndex = Arc<dyn Fn(&Plan) -> Result<Box<dyn GroupIndex>, String> + Send + Sync>;

/// How a group is moved, beside its plan.
pub struct Options {
    /// Arrived VMs stay paused.
    pub leave_paused: bool,
    /// Longest wait for one answer of one agent.
    pub call_timeout: Duration,
    /// How long a VM may be in doubt before it is reported so, and an agent silent before it is waited for
    /// no longer.
    pub doubt_wait: Duration,
    /// How long nothing at all may move before it is waited for no longer.
    pub stall_wait: Duration,
    /// Opens the group at the index, if the method has one.
    pub open_index: Option<OpenIndex>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("leave_paused", &self.leave_paused).finish_non_exhaustive()
    }
}

/// How often the caller asked to stop: once cancels, twice stops watching.
pub type Interrupts = Receiver<u32>;

/// What there is to show.
#[derive(Debug)]
pub enum Scene<'a> {
    /// One line for the log.
    Say(&'a str),
    /// Preparations, in the order of the plan's agents.
    Preparing(&'a [Option<PrepareStatus>]),
    /// The VMs and the agents now.
    Moving(&'a [VmView], &'a [AgentView]),
}

/// Calls every agent at once, each with its own request (`None`: not called); answers in the agents' order.
async fn call_all(
    plan: &Plan,
    timeout: Duration,
    request: impl Fn(usize) -> Option<Request>,
) -> Vec<Option<Result<Reply, CallError>>> {
    let mut calls = JoinSet::new();
    for (i, a) in plan.agents.iter().enumerate() {
        let Some(request) = request(i) else { continue };
        let mut client = AgentClient::new(a.addr, timeout);
        calls.spawn(async move { (i, client.call(&request).await) });
    }
    let mut out: Vec<_> = plan.agents.iter().map(|_| None).collect();
    while let Some(done) = calls.join_next().await {
        // A task that panicked leaves its place empty, which counts as no answer.
        if let Ok((i, answer)) = done {
            out[i] = Some(answer);
        }
    }
    out
}

/// Says one thing to every agent of the plan, and gives the lines for those that did not do it.
pub async fn tell_all(plan: &Plan, timeout: Duration, request: &Request) -> Vec<String> {
    let answers = call_all(plan, timeout, |_| Some(request.clone())).await;
    problems(plan, &answers)
}

/// Watches a group that someone else started (or a coordinator that died did), as [`run`] does after its
/// start.
pub async fn attach(
    plan: &Plan,
    options: &Options,
    interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Report {
    let began = Instant::now();
    let watch = Watch::start(plan, options.call_timeout);
    let dividing = budget::divide_while_it_moves(plan, watch.look(), budget::First::Other);
    let (vms, views) = follow(plan, options, &watch, Stop::Leave, interrupts, show).await;
    drop(dividing);
    let times = Times { prepare: None, told: Duration::ZERO, watched: began.elapsed(), whole: false };
    let report = Report::new(plan, &vms, &views, times, vec![]);
    let hint = if vms.iter().all(follow::unknown) {
        "no agent knows a group of this name: it was not started, or it is over and was forgotten (`irlm history`)"
    } else if vms.iter().all(follow::only_prepared) {
        "prepared, and not started: whoever prepared it may be gone; `irlm cancel` lets it go"
    } else {
        return report;
    };
    // Of what no agent knows or sees there is nothing to say.
    let told = |v: &VmReport| v.verdict != Verdict::Open || v.source_status.is_some();
    let vms = report.vms.into_iter().filter(told).collect();
    Report { outcome: Outcome::NothingStarted, problems: vec![hint.to_owned()], vms, ..report }
}

/// Moves the group, and reports. `show` is called for every scene, about five times a second.
pub async fn run(
    plan: &Plan,
    options: &Options,
    mut interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Report {
    let began = Instant::now();
    let looked = tokio::select! {
        r = preflight::check(plan, options.call_timeout, options.open_index.clone(), show) => r,
        // The index frees the name when its connection ends.
        () = changed(&mut interrupts) => Err(vec![CANCELLED.to_owned()]),
    };
    let preflight::Cleared { plan, doors, mut index, mut notes } = match looked {
        Ok(cleared) => cleared,
        Err(problems) => return Report::nothing_started(plan, began.elapsed(), problems),
    };
    let plan = &plan;
    let mut accepted = vec![Accepted::No; plan.agents.len()];
    let moving = plan.agents.iter().any(|a| !a.spec.vms.is_empty());
    let started = if moving {
        start(plan, options, &doors, &mut index, &mut accepted, &mut interrupts, show).await
    } else {
        Ok(Started { prepare: began.elapsed(), told: Duration::ZERO, at: Instant::now(), problems: vec![] })
    };
    let started = match started {
        Ok(started) => started,
        Err(mut problems) => {
            let_go(plan, options, &accepted, &doors).await;
            problems.extend(close(index).await);
            return Report::nothing_started(plan, began.elapsed(), problems);
        }
    };
    notes.extend(started.problems);
    let watch = Watch::start(plan, options.call_timeout);
    let dividing = moving.then(|| budget::divide_while_it_moves(plan, watch.look(), budget::First::This));
    let (vms, views) = follow(plan, options, &watch, Stop::Cancel, interrupts, show).await;
    drop(dividing);
    tidy_up(plan, options, &vms).await;
    let closed = close(index).await;
    // Of an index that was lost before it has been said.
    if !notes.iter().any(|n| n.starts_with("index: ")) {
        notes.extend(closed);
    }
    let (prepare, told, watched) = (Some(started.prepare), started.told, started.at.elapsed());
    Report::new(plan, &vms, &views, Times { prepare, told, watched, whole: true }, notes)
}

/// Has the index forget the group; the line is what went wrong.
async fn close(index: Option<Box<dyn GroupIndex>>) -> Option<String> {
    let open = index?;
    blocking(move || open.close()).await.err().map(|e| format!("index: {e}"))
}

/// Where a VM has stayed, its target may still wait for its stream: no stream will come.
async fn tidy_up(plan: &Plan, options: &Options, vms: &[VmView]) {
    if vms.iter().any(|v| matches!(v.verdict, Verdict::Open | Verdict::InDoubt)) {
        return;
    }
    let waits = |v: &&VmView| v.verdict != Verdict::Moved && v.target.phase() == Some(Phase::Prepared);
    let hosts: Vec<Option<usize>> =
        vms.iter().filter(waits).map(|v| plan.target_agent(&v.target_host)).collect();
    let group = &plan.config.name;
    let request = |i| hosts.contains(&Some(i)).then(|| Request::Cancel { group: group.clone() });
    // An agent that does not answer drops by itself what nobody feeds.
    call_all(plan, options.call_timeout, request).await;
}

/// The lines for calls that were not answered well.
fn problems(plan: &Plan, answers: &[Option<Result<Reply, CallError>>]) -> Vec<String> {
    let named = plan.agents.iter().zip(answers);
    named
        .filter_map(|(a, r)| match r {
            Some(Err(e)) => Some(format!("host {}: {e}", a.name)),
            _ => None,
        })
        .collect()
}

/// Asks every agent who it is. The lines are what to know of (clocks apart, versions mixed); also where
/// each agent takes data connections.
///
/// # Errors
/// The lines name the agents that do not answer.
async fn greet(
    plan: &Plan,
    timeout: Duration,
) -> Result<(Vec<String>, Vec<Option<SocketAddr>>), Vec<String>> {
    let asked = unix_ns();
    let answers = call_all(plan, timeout, |_| Some(Request::Hello)).await;
    let answered = unix_ns();
    let bad = problems(plan, &answers);
    if !bad.is_empty() {
        return Err(bad);
    }
    let (mut notes, mut doors) = (Vec::new(), Vec::new());
    let ours = env!("CARGO_PKG_VERSION");
    for (a, r) in plan.agents.iter().zip(answers) {
        let Some(Ok(Reply::Hello { version, now_ns, data, .. })) = r else {
            return Err(vec![format!("host {}: agent {} does not say who it is", a.name, a.addr)]);
        };
        doors.push(data.filter(|d| d.port() != 0).map(|mut d| {
            if d.ip().is_unspecified() {
                d.set_ip(a.addr.ip());
            }
            d
        }));
        if version != ours {
            notes.push(format!("host {}: agent is version {version}, this is {ours}", a.name));
        }
        let skew = u64::try_from(CLOCK_SKEW.as_nanos()).unwrap_or(u64::MAX);
        if now_ns.saturating_add(skew) < asked || now_ns > answered.saturating_add(skew) {
            notes.push(format!(
                "host {}: its clock is more than 0.5 s off; times across hosts will be too",
                a.name
            ));
        }
    }
    Ok((notes, doors))
}

/// Runs blocking work of the index beside the coordinator.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string()).flatten()
}

/// What agent `i` is told: its part, with what the agents have said of where they are reached.
fn spec_for(plan: &Plan, i: usize, doors: &[Option<SocketAddr>]) -> super::api::GroupSpec {
    let mut spec = plan.agents[i].spec.clone();
    for source in &mut spec.sources {
        let agent = plan.agents.iter().position(|a| a.addr == source.agent);
        let door = agent.and_then(|n| doors.get(n).copied().flatten());
        source.data = source.data.or(door);
    }
    spec
}

/// Sleeps, or wakes early on the next interrupt.
async fn wait_or(time: Duration, interrupts: &mut Interrupts) {
    tokio::select! {
        () = tokio::time::sleep(time) => {}
        // The sender lives as long as the program; if it is gone there is nothing to wake for.
        () = changed(interrupts) => {}
    }
}

async fn changed(interrupts: &mut Interrupts) {
    if interrupts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests;
