//! From the first word to an agent until the streams may begin: every agent prepares, the group's way and
//! share plan are decided once for all, targets are started before sources. Whatever fails on the way,
//! nothing is left behind.

use super::calls::{CANCELLED, Interrupts, blocking, call_all, problems, spec_for, wait_or};
use super::options::{GroupIndex, Options, Scene};
use super::plan::Plan;
use super::watch::POLL;
use crate::control::api::{Incoming, PreparePhase, PrepareStatus, Reply, Request, StartPart};
use crate::control::client::CallError;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How often source hosts are asked whether they still plan: at first, later as often as anything else.
const LEND_POLL: Duration = Duration::from_millis(20);

/// Whether an agent has taken the group on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Accepted {
    /// It was not asked, or has refused: a group of that name there is somebody else's.
    No,
    /// It has.
    Yes,
    /// It was asked, and its answer has not come.
    Unheard,
}

/// A group whose sources have been told to begin.
pub(super) struct Started {
    /// How long preparation took.
    pub prepare: Duration,
    /// From then until the sources were told.
    pub told: Duration,
    /// When preparation was over.
    pub at: Instant,
    /// What went wrong, and stops nothing.
    pub problems: Vec<String>,
}

/// Lets go of what was prepared, at the agents that have taken the group on and at no other.
pub(super) async fn let_go(
    plan: &Plan,
    options: &Options,
    accepted: &[Accepted],
    doors: &[Option<SocketAddr>],
) {
    // Only the agent knows whether it has heard. The same words again change nothing there, and it says
    // whose group it is.
    let again = |i: usize| {
        let spec = || Box::new(spec_for(plan, i, doors));
        (accepted[i] == Accepted::Unheard).then(|| Request::Prepare { spec: spec() })
    };
    let heard = call_all(plan, options.call_timeout, again).await;
    let ours = |i: usize| accepted[i] == Accepted::Yes || matches!(heard.get(i), Some(Some(Ok(_))));
    let name = &plan.config.name;
    for word in [Request::Cancel { group: name.clone() }, Request::Forget { group: name.clone() }] {
        call_all(plan, options.call_timeout, |i| ours(i).then(|| word.clone())).await;
    }
}

/// Prepares, and starts. After an error every agent in `accepted` is still to be let go, and `index` to be
/// closed.
pub(super) async fn start(
    plan: &Plan,
    options: &Options,
    doors: &[Option<SocketAddr>],
    index: &mut Option<Box<dyn GroupIndex>>,
    accepted: &mut [Accepted],
    interrupts: &mut Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> Result<Started, Vec<String>> {
    let began = Instant::now();
    let until = began + Duration::from_millis(plan.config.timeouts.prepare_ms);
    show(Scene::Say("preparing"));
    let states = prepare(plan, options, doors, accepted, (until, interrupts), show).await?;
    let mut notes: Vec<String> = say(plan, &states, PreparePhase::Ready);
    if let Some(mut open) = index.take() {
        // Without a plan the hosts still deduplicate on their own: it costs bandwidth, so it is said, and
        // we go on.
        let planned = blocking(move || {
            let line = open.plan_now();
            Ok((open, line))
        });
        match planned.await {
            Ok((open, line)) => {
                *index = Some(open);
                match line {
                    Ok(line) => {
                        show(Scene::Say(&line));
                        lend(plan, options, until, interrupts).await?;
                    }
                    Err(e) => notes.push(format!("index: no share plan: {e}")),
                }
            }
            Err(e) => notes.push(format!("index: {e}")),
        }
    }
    let (prepare, at) = (began.elapsed(), Instant::now());
    show(Scene::Say("starting"));
    let incoming: Vec<Incoming> = states.iter().flatten().flat_map(|s| s.incoming.iter().copied()).collect();
    let word = |part| Request::Start {
        group: plan.config.name.clone(),
        leave_paused: options.leave_paused,
        incoming: incoming.clone(),
        part,
    };
    // No source begins before all targets are ready, also where one agent is both.
    let targets = |i: usize| plan.agents[i].spec.my_target.map(|_| word(StartPart::Targets));
    let answers = call_all(plan, options.call_timeout, targets).await;
    let bad = problems(plan, &answers);
    if !bad.is_empty() {
        // Nothing has moved yet, and nothing will.
        return Err(bad);
    }
    let told = at.elapsed();
    let sources = |i: usize| plan.agents[i].spec.my_source.map(|_| word(StartPart::Sources));
    let answers = call_all(plan, options.call_timeout, sources).await;
    let bad = problems(plan, &answers);
    // Refused by all: nothing moves. An agent whose answer has not come may have begun.
    if !answers.iter().flatten().any(|a| !matches!(a, Err(CallError::Refused { .. }))) {
        return Err(bad);
    }
    notes.extend(bad);
    Ok(Started { prepare, told, at, problems: notes })
}

/// What agents in that phase say of their preparation.
fn say(plan: &Plan, states: &[Option<PrepareStatus>], phase: PreparePhase) -> Vec<String> {
    let with = plan.agents.iter().zip(states).filter_map(|(a, s)| Some((a, s.as_ref()?)));
    with.filter(|(_, s)| s.phase == phase)
        .filter_map(|(a, s)| Some(format!("host {}: {}", a.name, s.problem.as_deref()?)))
        .collect()
}

/// Brings every agent to the point where the group can start; notes in `accepted` which have taken the
/// group on.
async fn prepare(
    plan: &Plan,
    options: &Options,
    doors: &[Option<SocketAddr>],
    accepted: &mut [Accepted],
    (until, interrupts): (Instant, &mut Interrupts),
    show: &mut dyn FnMut(Scene<'_>),
) -> Result<Vec<Option<PrepareStatus>>, Vec<String>> {
    let group = &plan.config.name;
    let (mut asked, mut routed) = (false, false);
    loop {
        if *interrupts.borrow() > 0 {
            return Err(vec![CANCELLED.into()]);
        }
        let request = |i: usize| {
            Some(match asked {
                false => Request::Prepare { spec: Box::new(spec_for(plan, i, doors)) },
                true => Request::PrepareStatus { group: group.clone() },
            })
        };
        let answers = call_all(plan, options.call_timeout, request).await;
        if !asked {
            for (a, answer) in accepted.iter_mut().zip(&answers) {
                *a = match answer {
                    Some(Ok(_)) => Accepted::Yes,
                    Some(Err(CallError::Refused { .. })) => Accepted::No,
                    _ => Accepted::Unheard,
                };
            }
            asked = true;
        }
        let bad = problems(plan, &answers);
        if !bad.is_empty() {
            return Err(bad);
        }
        let status = |a| match a {
            Some(Ok(Reply::Prepare(p))) => Some(p),
            _ => None,
        };
        let states: Vec<Option<PrepareStatus>> = answers.into_iter().map(status).collect();
        show(Scene::Preparing(&states));
        if states.iter().flatten().any(|s| s.phase == PreparePhase::Failed) {
            return Err(say(plan, &states, PreparePhase::Failed));
        }
        if let (false, Some(direct)) = (routed, route(plan, &states)) {
            routed = true;
            let word = |i: usize| {
                let token = plan.token;
                plan.agents[i].spec.my_source.map(|_| Request::Route { group: group.clone(), token, direct })
            };
            let bad = problems(plan, &call_all(plan, options.call_timeout, word).await);
            if !bad.is_empty() {
                return Err(bad);
            }
            continue;
        }
        if states.iter().all(|s| s.as_ref().is_some_and(|s| s.phase == PreparePhase::Ready)) {
            return Ok(states);
        }
        if Instant::now() >= until {
            return Err(late(plan, &states));
        }
        wait_or(POLL, interrupts).await;
    }
}

/// The group's way, once every source host with a VM has said what its links give, or will not say: all or
/// none go direct, because a host that does is of no use to the others' plan. None while it is not known,
/// or not measured anywhere.
pub(super) fn route(plan: &Plan, states: &[Option<PrepareStatus>]) -> Option<bool> {
    let mut said = Vec::new();
    for (a, s) in plan.agents.iter().zip(states) {
        if !a.spec.vms.iter().any(|v| Some(v.source) == a.spec.my_source) {
            continue;
        }
        let s = s.as_ref()?;
        if s.direct.is_none() && s.phase == PreparePhase::Preparing {
            return None;
        }
        said.push(s.direct);
    }
    said.iter().any(Option::is_some).then(|| said.iter().all(|d| *d == Some(true)))
}

/// The lines for agents that are not ready in time.
fn late(plan: &Plan, states: &[Option<PrepareStatus>]) -> Vec<String> {
    let ms = plan.config.timeouts.prepare_ms;
    let late = plan.agents.iter().zip(states);
    late.filter(|(_, s)| s.as_ref().is_none_or(|s| s.phase != PreparePhase::Ready))
        .map(|(a, _)| format!("host {}: not ready within {ms} ms (timeouts.prepare_ms)", a.name))
        .collect()
}

/// Waits, until then at most, for source hosts that fetch their part of the plan and lend each other
/// contents: what they say is not needed, but better had before the first page leaves. An agent that does
/// not answer now will be asked to start.
async fn lend(
    plan: &Plan,
    options: &Options,
    until: Instant,
    interrupts: &mut Interrupts,
) -> Result<(), Vec<String>> {
    let mut pause = LEND_POLL;
    loop {
        if *interrupts.borrow() > 0 {
            return Err(vec![CANCELLED.into()]);
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
