//! What the group's coordinator does: learn who is there, prepare, start, watch, report. It decides nothing about a
//! VM's ownership (the VM's two agents do) and keeps nothing: it may die at any moment and be re-attached by
//! `irlm status --follow`.

// The group's budget, divided while the group moves.
mod budget;
// What would happen, before it does.
pub mod forecast;
// The group as its agents are told of it.
pub mod plan;
// How it ended.
pub mod report;
// Watching, and what may be concluded.
pub mod watch;

use super::api::{Incoming, Phase, PreparePhase, PrepareStatus, Reply, Request};
use super::client::{AgentClient, CallError};
use crate::flow::unix_ns;
use plan::Plan;
use report::{Outcome, Report};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;
use watch::{AgentView, POLL, Verdict, VmView, Watch, vm_views};

/// How long a VM must be in doubt before the coordinator reports it so and ends; its agents go on.
pub const DOUBT_WAIT: Duration = Duration::from_secs(30);

/// How long after a VM moved its source may take to say how long it was down.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How often source hosts are asked whether they still plan: at first, later as often as anything else.
const LEND_POLL: Duration = Duration::from_millis(20);

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
    /// How long a VM may be in doubt before it is reported so.
    pub doubt_wait: Duration,
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

/// Watches a group that someone else started (or a coordinator that died did), as [`run`] does after its start.
pub async fn attach(
    plan: &Plan,
    options: &Options,
    interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Report {
    let began = Instant::now();
    let agents: Vec<_> = plan.agents.iter().map(|a| (a.name.clone(), a.addr)).collect();
    let watch = Watch::start(&agents, Some(&plan.config.name), options.call_timeout);
    let dividing = budget::divide_while_it_moves(plan, watch.look(), budget::First::Other);
    let (vms, views) = follow(plan, options, &watch, Stop::Leave, interrupts, show).await;
    drop(dividing);
    let report = Report::new(plan, &vms, &views, Duration::ZERO, Duration::ZERO, began.elapsed(), vec![]);
    if vms.iter().all(only_prepared) {
        let hint =
            "prepared, and not started: whoever prepared it may be gone; `irlm cancel` lets it go".to_owned();
        return Report { outcome: Outcome::NothingStarted, problems: vec![hint], ..report };
    }
    report
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

/// Asks every agent who it is. The lines are problems to know of (clocks apart, versions mixed).
///
/// # Errors
/// The lines name the agents that do not answer.
pub async fn preflight(plan: &Plan, timeout: Duration) -> Result<Vec<String>, Vec<String>> {
    Ok(greet(plan, timeout).await?.0)
}

/// The same, and where each agent takes data connections.
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

/// Moves the group, and reports. `show` is called for every scene, about five times a second.
pub async fn run(
    plan: &Plan,
    options: &Options,
    mut interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Report {
    let began = Instant::now();
    let mut accepted = vec![false; plan.agents.len()];
    let prepared = match prepare(plan, options, &mut accepted, &mut interrupts, show).await {
        Ok(p) => p,
        Err(problems) => {
            // What was prepared is let go, and only that: an agent that refused may be busy with a group of that
            // name that somebody else has started.
            let name = &plan.config.name;
            for word in [Request::Cancel { group: name.clone() }, Request::Forget { group: name.clone() }] {
                call_all(plan, options.call_timeout, |i| accepted[i].then(|| word.clone())).await;
            }
            return Report::nothing_started(plan, began.elapsed(), problems);
        }
    };
    let prepare_time = began.elapsed();
    let began = Instant::now();
    let mut problems = prepared.problems;
    let index = prepared.index;
    show(Scene::Say("starting"));
    let start = |incoming: &[Incoming]| Request::Start {
        group: plan.config.name.clone(),
        leave_paused: options.leave_paused,
        incoming: incoming.to_vec(),
    };
    // Targets first, so that no source meets a closed door; an agent that is both is told once, as a target.
    let is_target = |i: usize| plan.agents[i].spec.my_target.is_some();
    let mut told = Duration::ZERO;
    for targets in [true, false] {
        told = began.elapsed();
        let request = |i| (is_target(i) == targets).then(|| start(&prepared.incoming));
        let answers = call_all(plan, options.call_timeout, request).await;
        problems.extend(self::problems(plan, &answers));
    }
    let agents: Vec<_> = plan.agents.iter().map(|a| (a.name.clone(), a.addr)).collect();
    let watch = Watch::start(&agents, Some(&plan.config.name), options.call_timeout);
    let dividing = budget::divide_while_it_moves(plan, watch.look(), budget::First::This);
    let (vms, views) = follow(plan, options, &watch, Stop::Cancel, interrupts, show).await;
    drop(dividing);
    if let Some(open) = index
        && let Err(e) = blocking(move || open.close()).await
    {
        problems.push(format!("index: {e}"));
    }
    Report::new(plan, &vms, &views, prepare_time, told, began.elapsed(), problems)
}

/// Runs blocking work of the index beside the coordinator.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string()).flatten()
}

struct Prepared {
    index: Option<Box<dyn GroupIndex>>,
    incoming: Vec<Incoming>,
    problems: Vec<String>,
}

/// Brings every agent to the point where the group can start; notes in `accepted` which have taken the group on.
async fn prepare(
    plan: &Plan,
    options: &Options,
    accepted: &mut [bool],
    interrupts: &mut Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Result<Prepared, Vec<String>> {
    let (mut problems, doors) = greet(plan, options.call_timeout).await?;
    for p in &problems {
        show(Scene::Say(p));
    }
    let mut index = None;
    if let Some(open) = options.open_index.clone().filter(|_| plan.method == super::api::Method::Irlm) {
        let whole = plan.clone();
        index = Some(blocking(move || open(&whole)).await.map_err(|e| vec![format!("index: {e}")])?);
    }
    show(Scene::Say("preparing"));
    let until = Instant::now() + Duration::from_millis(plan.config.timeouts.prepare_ms);
    let mut asked = false;
    loop {
        if *interrupts.borrow() > 0 {
            return Err(vec!["cancelled before anything moved".into()]);
        }
        let group = &plan.config.name;
        let request = |i: usize| {
            Some(match asked {
                false => Request::Prepare { spec: Box::new(spec_for(plan, i, &doors)) },
                true => Request::PrepareStatus { group: group.clone() },
            })
        };
        let answers = call_all(plan, options.call_timeout, request).await;
        if !asked {
            for (a, answer) in accepted.iter_mut().zip(&answers) {
                *a = matches!(answer, Some(Ok(_)));
            }
            asked = true;
        }
        let bad = self::problems(plan, &answers);
        if !bad.is_empty() {
            return Err(bad);
        }
        let states: Vec<Option<PrepareStatus>> = answers
            .into_iter()
            .map(|a| match a {
                Some(Ok(Reply::Prepare(p))) => Some(p),
                _ => None,
            })
            .collect();
        show(Scene::Preparing(&states));
        let say = |phase| {
            let with = plan.agents.iter().zip(&states).filter_map(|(a, s)| Some((a, s.as_ref()?)));
            with.filter(move |(_, s)| s.phase == phase)
                .filter_map(|(a, s)| Some(format!("host {}: {}", a.name, s.problem.as_deref()?)))
        };
        if states.iter().flatten().any(|s| s.phase == PreparePhase::Failed) {
            return Err(say(PreparePhase::Failed).collect());
        }
        if states.iter().all(|s| s.as_ref().is_some_and(|s| s.phase == PreparePhase::Ready)) {
            problems.extend(say(PreparePhase::Ready));
            let incoming = states.iter().flatten().flat_map(|s| s.incoming.iter().copied()).collect();
            if let Some(mut open) = index.take() {
                // Without a plan the hosts still deduplicate on their own: it costs bandwidth, so it is said, and we go on.
                match blocking(move || open.plan_now().map(|line| (open, line))).await {
                    Ok((open, line)) => {
                        show(Scene::Say(&line));
                        index = Some(open);
                        lend(plan, options, until, interrupts).await?;
                    }
                    Err(e) => problems.push(format!("index: no share plan: {e}")),
                }
            }
            return Ok(Prepared { index, incoming, problems });
        }
        if Instant::now() >= until {
            let late = plan.agents.iter().zip(&states);
            return Err(late
                .filter(|(_, s)| s.as_ref().is_none_or(|s| s.phase != PreparePhase::Ready))
                .map(|(a, _)| {
                    let ms = plan.config.timeouts.prepare_ms;
                    format!("host {}: not ready within {ms} ms (timeouts.prepare_ms)", a.name)
                })
                .collect());
        }
        wait_or(POLL, interrupts).await;
    }
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

/// Waits, until then at most, for source hosts that fetch their part of the plan and lend each other contents: what they say is
/// not needed, but better had before the first page leaves. An agent that does not answer now will be asked to start.
async fn lend(
    plan: &Plan,
    options: &Options,
    until: Instant,
    interrupts: &mut Interrupts,
) -> Result<(), Vec<String>> {
    let mut pause = LEND_POLL;
    loop {
        if *interrupts.borrow() > 0 {
            return Err(vec!["cancelled before anything moved".into()]);
        }
        let ask = |i: usize| {
            let group = plan.config.name.clone();
            plan.agents[i].spec.my_source.map(|_| Request::PrepareStatus { group })
        };
        let answers = call_all(plan, options.call_timeout, ask).await;
        let busy =
            |a: &Option<Result<Reply, CallError>>| matches!(a, Some(Ok(Reply::Prepare(p))) if p.planning);
        if !answers.iter().any(busy) || Instant::now() >= until {
            return Ok(());
        }
        wait_or(pause, interrupts).await;
        pause = (pause * 2).min(POLL);
    }
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

fn only_prepared(v: &VmView) -> bool {
    [&v.source, &v.target].iter().all(|w| w.phase() == Some(Phase::Prepared))
}

/// What the first interrupt means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// Cancel the group; the second stops watching.
    Cancel,
    /// Stop watching.
    Leave,
}

/// Watches until every VM is settled, or is in doubt for long enough, or the caller has asked twice to stop.
async fn follow(
    plan: &Plan,
    options: &Options,
    watch: &Watch,
    stop: Stop,
    mut interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> (Vec<VmView>, Vec<AgentView>) {
    let mut cancelled = false;
    let mut settled_since: Option<Instant> = None;
    let mut doubt_since: Option<Instant> = None;
    let mut idle_since: Option<Instant> = None;
    loop {
        wait_or(POLL, &mut interrupts).await;
        let stops = *interrupts.borrow();
        let views = watch.views();
        let mut vms = vm_views(plan, &views);
        show(Scene::Moving(&vms, &views));
        if stops > 0 && !cancelled && stop == Stop::Cancel {
            cancelled = true;
            show(Scene::Say(
                "cancelling: what has not been given up yet stays at its source (again: stop watching)",
            ));
            let group = &plan.config.name;
            let answers =
                call_all(plan, options.call_timeout, |_| Some(Request::Cancel { group: group.clone() }))
                    .await;
            for p in problems(plan, &answers) {
                show(Scene::Say(&p));
            }
        }
        let open = vms.iter().any(|v| v.verdict == Verdict::Open);
        let doubt = vms.iter().any(|v| v.verdict == Verdict::InDoubt);
        // A source that can still tell its VM's downtime is given a moment to do so.
        let words_to_come = vms.iter().any(|v| {
            v.verdict == Verdict::Moved && matches!(&v.source, watch::Word::Now(s) if !s.phase.is_final())
        });
        let timer = |on: bool, since: &mut Option<Instant>| {
            *since = on.then(|| since.unwrap_or_else(Instant::now));
            since.map_or(Duration::ZERO, |s| s.elapsed())
        };
        let settled_for = timer(!open && !doubt, &mut settled_since);
        let doubt_for = timer(!open && doubt, &mut doubt_since);
        // Only prepared, nothing pushed: with a coordinator that is gone it stays so.
        let idle = stop == Stop::Leave
            && vms.iter().all(only_prepared)
            && views.iter().all(|a| a.group(&plan.config.name).is_none_or(|g| g.host.push_bytes == 0));
        let idle_for = timer(idle, &mut idle_since);
        let settled = !open && !doubt && (!words_to_come || settled_for >= LAST_WORDS);
        if settled
            || doubt_for >= options.doubt_wait
            || idle_for >= options.doubt_wait
            || stops > u32::from(stop == Stop::Cancel)
        {
            for v in &mut vms {
                v.conclude();
            }
            return (vms, views);
        }
    }
}

#[cfg(test)]
mod tests;
