//! What the group's coordinator does: learn who is there, prepare, start, watch, report. It decides nothing
//! about a VM's ownership (the VM's two agents do) and keeps nothing: it may die at any moment and be
//! re-attached by `irlm status --follow`.

// The group's budget, divided while the group moves.
mod budget;
// Calling its agents.
mod calls;
// What would happen, before it does.
pub mod forecast;
// What the caller gives, and is shown.
mod options;
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

use super::api::{Phase, Request};
use calls::{CANCELLED, blocking, call_all, changed};
pub use calls::{Interrupts, tell_all};
use follow::{Stop, follow};
pub use options::{GroupIndex, OpenIndex, Options, Scene};
use plan::Plan;
pub use preflight::preflight;
use prepare::{Accepted, Started, let_go, start};
use report::{Outcome, Report, Times, VmReport};
use std::time::{Duration, Instant};
use watch::{Verdict, VmView, Watch};

/// How long a VM must be in doubt before the coordinator reports it so and ends; its agents go on.
pub const DOUBT_WAIT: Duration = Duration::from_secs(30);

/// How long nothing of a VM may move, while both its agents answer, before it is waited for no longer.
pub const STALL_WAIT: Duration = Duration::from_secs(300);

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

#[cfg(test)]
mod tests;
