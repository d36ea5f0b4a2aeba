//! Calling a group's agents, all at once, and waiting beside whoever may interrupt.

use super::plan::Plan;
use crate::control::api::{GroupSpec, Reply, Request, VmFacts};
use crate::control::client::{AgentClient, CallError};
use crate::flow::unix_ns;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::watch::Receiver;
use tokio::task::JoinSet;

/// What is said of a group that somebody has stopped in time.
pub(super) const CANCELLED: &str = "cancelled before anything moved";

/// How far the clocks of an agent and of this host may be apart before it is said.
const CLOCK_SKEW: Duration = Duration::from_millis(500);

/// How often the caller asked to stop: once cancels, twice stops watching.
pub type Interrupts = Receiver<u32>;

/// Calls every agent at once, each with its own request (`None`: not called); answers in the agents' order.
pub(super) async fn call_all(
    plan: &Plan,
    timeout: Duration,
    request: impl Fn(usize) -> Option<Request>,
) -> Vec<Option<Result<Reply, CallError>>> {
    let mut calls = JoinSet::new();
    for i in 0..plan.agents.len() {
        let Some(request) = request(i) else { continue };
        let mut client = AgentClient::new(plan.at(i), timeout);
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

/// The lines for calls that were not answered well.
pub(super) fn problems(plan: &Plan, answers: &[Option<Result<Reply, CallError>>]) -> Vec<String> {
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
pub(super) async fn greet(
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
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await?
}

/// What agent `i` is told: its part, with what the agents have said of where they are reached.
pub(super) fn spec_for(plan: &Plan, i: usize, doors: &[Option<SocketAddr>]) -> GroupSpec {
    let mut spec = plan.agents[i].spec.clone();
    for source in &mut spec.sources {
        let agent = plan.agents.iter().position(|a| a.addr == source.agent);
        let door = agent.and_then(|n| doors.get(n).copied().flatten());
        source.data = source.data.or(door);
    }
    spec
}

/// Sleeps, or wakes early on the next interrupt.
pub(super) async fn wait_or(time: Duration, interrupts: &mut Interrupts) {
    tokio::select! {
        () = tokio::time::sleep(time) => {}
        // The sender lives as long as the program; if it is gone there is nothing to wake for.
        () = changed(interrupts) => {}
    }
}

pub(super) async fn changed(interrupts: &mut Interrupts) {
    if interrupts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What the agents of VMs that are not known to them see of these, for whoever watches: a VM's agent that
/// has restarted and had written nothing down.
pub(super) fn vms_only(spec: &GroupSpec) -> Request {
    Request::Preflight { spec: Box::new(spec.clone()), vms_only: true }
}

/// The facts in an answer to that.
pub(super) fn facts(answer: Result<Reply, CallError>) -> Option<Vec<VmFacts>> {
    match answer {
        Ok(Reply::Preflight(p)) => Some(p.vms),
        _ => None,
    }
}
