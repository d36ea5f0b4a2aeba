//! Everything that can be known to fail, looked at before anything is prepared: `irlm evacuate` and its
//! `--dry-run` run this same code, so that both refuse the same. Each agent says what is there; here both
//! ends of a VM are compared. No QEMU is touched, and all reasons are told, one line each.

use super::calls::{blocking, call_all, greet, problems, spec_for};
use super::options::{GroupIndex, OpenIndex, Scene};
use super::plan::{AgentPlan, AlreadyMoved, Plan};
use crate::control::api::{Identity, Preflight, Reply, Request, Role, VmFacts};
use crate::net::tls::CLIENT;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

/// What an agent may take to look, beyond a call's usual time: a monitor that is held by somebody else is
/// waited for.
const LOOK: Duration = Duration::from_secs(40);

// What is said of a VM that has left its source in an earlier run.
mod gone;

/// A group that may start.
pub(super) struct Cleared {
    /// The plan, in which VMs that have moved already are marked, and each other VM has its identity.
    pub plan: Plan,
    /// Where each agent takes data connections.
    pub doors: Vec<Option<SocketAddr>>,
    /// The group at its index, opened.
    pub index: Option<Box<dyn GroupIndex>>,
    /// What to know of.
    pub notes: Vec<String>,
}

/// Looks at everything, and moves nothing. The lines are what to know of.
///
/// # Errors
/// One line for each reason why the group would not start.
pub async fn preflight(
    plan: &Plan,
    timeout: Duration,
    open_index: Option<OpenIndex>,
) -> Result<Vec<String>, Vec<String>> {
    let cleared = check(plan, timeout, open_index, &mut |_| {}).await?;
    let mut notes = cleared.notes;
    if let Some(open) = cleared.index
        && let Err(e) = blocking(move || open.close()).await
    {
        notes.push(format!("index: {e}"));
    }
    let name = |m: &AlreadyMoved| plan.config.vm.get(usize::from(m.ix)).map_or("?", |v| &*v.name).to_owned();
    notes.extend(cleared.plan.moved.iter().map(|m| format!("{}: already moved, and left as it is", name(m))));
    Ok(notes)
}

/// The same, and leaves the group's name taken at its index.
pub(super) async fn check(
    plan: &Plan,
    timeout: Duration,
    open_index: Option<OpenIndex>,
    show: &mut dyn FnMut(Scene<'_>),
) -> Result<Cleared, Vec<String>> {
    let (notes, doors) = greet(plan, timeout).await?;
    for n in &notes {
        show(Scene::Say(n));
    }
    let request = |i| Some(Request::Preflight { spec: Box::new(spec_for(plan, i, &doors)), vms_only: false });
    let answers = call_all(plan, timeout + LOOK, request).await;
    let mut refused = problems(plan, &answers);
    refused.extend(data_addresses(plan, &doors));
    let mut found = Vec::new();
    for (a, answer) in plan.agents.iter().zip(answers) {
        found.push(match answer {
            Some(Ok(Reply::Preflight(p))) => *p,
            Some(Err(_)) => Preflight::default(),
            _ => {
                refused.push(format!("host {}: its agent does not say what is there", a.name));
                Preflight::default()
            }
        });
    }
    let judged = judge(plan, &found);
    refused.extend(judged.refused);
    let mut index = None;
    if let Some(open) = open_index.filter(|_| plan.recipe.rack().is_some()) {
        let whole = plan.clone();
        match blocking(move || open(&whole)).await {
            Ok(opened) => index = Some(opened),
            Err(e) => refused.push(format!("index: {e}")),
        }
    }
    if refused.is_empty() {
        let plan = cleared(plan, &judged.moved, &judged.identities);
        return Ok(Cleared { plan, doors, index, notes });
    }
    if let Some(open) = index
        && let Err(e) = blocking(move || open.close()).await
    {
        refused.push(format!("index: {e}"));
    }
    Err(refused)
}

/// The plan whose agents are not told of the VMs that have moved already, but who the other end's VM is of
/// each other.
fn cleared(plan: &Plan, moved: &[AlreadyMoved], identities: &HashMap<(u16, Role), Identity>) -> Plan {
    let mut plan = plan.clone();
    for a in &mut plan.agents {
        let (me, mine) = (a.spec.my_source, &mut a.spec.vms);
        mine.retain(|v| !moved.iter().any(|m| m.ix == v.ix));
        for v in mine {
            let other = if me == Some(v.source) { Role::Target } else { Role::Source };
            v.identity = identities.get(&(v.ix, other)).cloned();
        }
    }
    plan.moved = moved.to_vec();
    plan
}

/// What follows from what the agents have found.
#[derive(Debug, Default)]
struct Judged {
    refused: Vec<String>,
    moved: Vec<AlreadyMoved>,
    identities: HashMap<(u16, Role), Identity>,
}

/// The addresses of a target host's agent: with the plain methods agents know each other by their control
/// addresses.
fn known_by(plan: &Plan, target: &str) -> Vec<SocketAddr> {
    let hosts = plan.config.target.iter().filter(|t| t.name == target);
    hosts.flat_map(|t| [t.data, t.agent]).collect()
}

/// Targets whose data address in the group file is not where their agent listens for data. `doors`: where
/// each agent says that it does. That something listens there says nothing: it may be another agent, its
/// control port, or the index.
fn data_addresses(plan: &Plan, doors: &[Option<SocketAddr>]) -> Vec<String> {
    let mut out = Vec::new();
    // QEMUs that stream to each other are told their addresses by their agents.
    let hosts = plan.config.target.iter().filter(|_| plan.recipe.proxied().is_some());
    for t in hosts {
        let Some(own) = plan.target_agent(&t.name) else { continue };
        let Some(door) = doors.get(own).copied().flatten() else { continue };
        let (name, data) = (&t.name, t.data);
        if data.port() != door.port() {
            let port = door.port();
            out.push(format!("target {name}: data = {data}, but its agent listens for data on port {port}"));
            continue;
        }
        let other = plan.agents.iter().zip(doors).find(|(_, d)| **d == Some(data));
        if let Some((other, _)) = other.filter(|_| door != data) {
            let whose = &other.name;
            out.push(format!("target {name}: data = {data}, but that is the agent of host {whose}"));
        } else if plan.config.index == Some(data) {
            out.push(format!("target {name}: data = {data}, but that is the index"));
        }
    }
    out
}

fn judge(plan: &Plan, found: &[Preflight]) -> Judged {
    let mut out = Judged::default();
    for (a, p) in plan.agents.iter().zip(found) {
        out.refused.extend(p.problems.iter().map(|l| format!("host {}: {l}", a.name)));
        out.refused.extend(same_process(&a.name, &p.vms));
        out.refused.extend(other_hosts_certificate(plan, a, p));
    }
    let fact = |agent: Option<usize>, ix: usize, role| {
        let vms = &found.get(agent?)?.vms;
        vms.iter().find(|f| usize::from(f.ix) == ix && f.role == role)
    };
    let mut needs: BTreeMap<usize, u64> = BTreeMap::new();
    for (ix, v) in plan.config.vm.iter().enumerate() {
        let target_agent = plan.target_agent(&v.target);
        let source = fact(plan.source_agent(&v.source), ix, Role::Source);
        let target = fact(target_agent, ix, Role::Target);
        // An agent that did not answer has been said already.
        let (Some(source), Some(target)) = (source, target) else { continue };
        if source.moved.is_some() {
            match gone::judge(v, source, target, &known_by(plan, &v.target)) {
                Ok(state) => out.moved.push(AlreadyMoved { ix: source.ix, state }),
                Err(line) => out.refused.push(line),
            }
            continue;
        }
        for (host, f) in [(&v.source, source), (&v.target, target)] {
            out.refused.extend(f.refusals.iter().map(|l| format!("vm {} at host {host}: {l}", v.name)));
            if let Some(who) = &f.identity {
                out.identities.insert((f.ix, f.role), who.clone());
            }
        }
        if let (Some(s), Some(t)) = (&source.identity, &target.identity) {
            let lines = s.differences(t);
            let where_ = format!("vm {} ({} to {})", v.name, v.source, v.target);
            out.refused.extend(lines.iter().map(|l| format!("{where_}: {l}")));
            // What its source holds of the host's memory it will hold at the target, less what is there
            // already.
            let most = if s.memory == 0 { source.resident } else { source.resident.min(s.memory) };
            if let Some(agent) = target_agent {
                *needs.entry(agent).or_default() += most.saturating_sub(target.resident);
            }
        }
    }
    for (agent, need) in needs {
        let (Some(a), Some(free)) = (plan.agents.get(agent), found.get(agent).and_then(|p| p.available))
        else {
            continue;
        };
        if need > free {
            out.refused.push(format!(
                "host {}: its VMs will need {} MiB more than it holds for them, and {} MiB are free",
                a.name,
                need >> 20,
                free >> 20
            ));
        }
    }
    out
}

/// The names of an agent's host that its certificate does not have. Other agents take from it only what concerns the
/// hosts that are named there.
fn other_hosts_certificate(plan: &Plan, a: &AgentPlan, found: &Preflight) -> Vec<String> {
    let Some(hosts) = &found.agent_of else { return Vec::new() };
    let source = a.spec.my_source.and_then(|i| plan.config.source.get(usize::from(i))).map(|s| &s.name);
    let target = a.spec.my_target.and_then(|i| plan.config.target.get(usize::from(i))).map(|t| &t.name);
    let names: BTreeSet<&String> = source.into_iter().chain(target).collect();
    let line = |name: &&String| {
        let issue = format!(
            "issue one that says irlm:agent/{name} (`irlm cert issue CA --out DIR --host {name} --ip IP`)"
        );
        match &hosts[..] {
            [] => format!(
                "host {name}: its agent's certificate ({CLIENT}) is no agent's: {issue}, or map one of its names in [roles]"
            ),
            hosts => format!(
                "host {name}: its agent's certificate ({CLIENT}) is that of the agent of {}: {issue}, or call the host so \
                 in the group's file",
                hosts.join(", ")
            ),
        }
    };
    names.iter().filter(|name| !hosts.contains(name)).map(line).collect()
}

/// Rows of one host that are one process: two monitor sockets of one QEMU. A starter that has made the
/// sockets of several QEMUs itself is named for all of them, so that the VMs must be the same, too.
fn same_process(host: &str, vms: &[VmFacts]) -> Vec<String> {
    let mut out = Vec::new();
    for (n, f) in vms.iter().enumerate() {
        let same = |o: &&VmFacts| o.process.is_some() && o.process == f.process && o.identity == f.identity;
        let Some((other, p)) = vms[..n].iter().find(same).zip(f.process) else { continue };
        let what = |f: &VmFacts| match f.role {
            Role::Source => format!("vm {} (source)", f.name),
            Role::Target => format!("vm {} (target)", f.name),
        };
        out.push(format!(
            "host {host}: {} and {} are one process, {}: give each row the socket of its own VM",
            what(other),
            what(f),
            p.pid
        ));
    }
    out
}

#[cfg(test)]
mod tests;
