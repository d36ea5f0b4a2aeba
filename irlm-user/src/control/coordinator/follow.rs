//! Watching a group until all of it is settled. Every wait has an end: an agent that is silent, a VM of
//! which nothing moves any more, and a stream that its agents should have ended are waited for so long and
//! no longer, and the report says so.

use super::calls::{Interrupts, call_all, problems, wait_or};
use super::options::{Options, Scene};
use super::plan::Plan;
use super::watch::{AgentView, POLL, Verdict, VmView, Watch, Word, vm_views};
use crate::control::api::{Phase, Request};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long after a VM moved its agents may take to say the last of it: how long it was down, how it stands,
/// that all its pages came.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How long agents may take to end a stream whose time is over before the group is cancelled.
const OVERDUE: Duration = Duration::from_secs(60);

/// What the first interrupt means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// Cancel the group; the second stops watching.
    Cancel,
    /// Stop watching.
    Leave,
}

/// Whether both agents have it prepared, and nothing has begun.
pub(super) fn only_prepared(v: &VmView) -> bool {
    [&v.source, &v.target].iter().all(|w| w.phase() == Some(Phase::Prepared))
}

/// Whether both agents answer, and neither knows it.
pub(super) fn unknown(v: &VmView) -> bool {
    v.verdict != Verdict::Moved && [&v.source, &v.target].iter().all(|w| matches!(w, Word::Absent(_)))
}

/// Whether something is still to be said of a VM that is settled. A source that can tell its VM's downtime is
/// given a moment to do so, and either how its VM stands.
pub(super) fn words_to_come(v: &VmView) -> bool {
    match v.verdict {
        Verdict::Moved if v.already.is_some() => false,
        // A target agent that died right after the handover is started again by whoever keeps it. Its last
        // word may also be older than the source's: the pages that it lacked then have come.
        Verdict::Moved => {
            matches!(&v.source, Word::Now(s) if !s.phase.is_final())
                || v.target.phase().is_some_and(|p| !p.is_final())
                || v.state().is_empty()
        }
        Verdict::Stayed => matches!(&v.source, Word::Now(s) if s.state.is_empty()),
        _ => false,
    }
}

/// What can change of a VM while it moves, as its two agents say it.
#[derive(PartialEq, Eq)]
struct Trace([Option<(Phase, [u64; 5])>; 2]);

impl Trace {
    fn of(v: &VmView) -> Self {
        Self([&v.source, &v.target].map(|w| {
            let s = w.status()?;
            let pages = s.pages.answered + s.pages.demanded;
            Some((s.phase, [s.stream_bytes, s.wire_bytes, s.ram_remaining, s.waiting, pages]))
        }))
    }
}

/// Since when nothing has moved, of each VM and of the group.
pub(super) struct Stalls {
    traces: HashMap<String, (Trace, Instant)>,
    begun: HashMap<String, Instant>,
    any: Instant,
}

impl Stalls {
    pub(super) fn new(now: Instant) -> Self {
        Self { traces: HashMap::new(), begun: HashMap::new(), any: now }
    }

    /// Looks at the VMs, and gives each open one that is waited for no longer its reason.
    pub(super) fn look(&mut self, vms: &mut [VmView], options: &Options, now: Instant) {
        for v in vms.iter() {
            let trace = Trace::of(v);
            match self.traces.get_mut(&v.name) {
                Some((old, _)) if *old == trace => {}
                Some(old) => {
                    *old = (trace, now);
                    self.any = now;
                }
                None => drop(self.traces.insert(v.name.clone(), (trace, now))),
            }
            if matches!(v.source.phase(), Some(Phase::Migrating | Phase::Stopped)) {
                self.begun.entry(v.name.clone()).or_insert(now);
            }
        }
        for v in vms.iter_mut().filter(|v| v.verdict == Verdict::Open) {
            let since = self.traces.get(&v.name).map_or(now, |(_, since)| *since);
            let still = now.saturating_duration_since(since);
            let seconds = |d: Duration| d.as_secs_f64().round();
            // A source that is heard and still has its VM ends the move by itself, in its own time, and one whose turn
            // has not come waits for the others: silence of the target alone is no reason to stop asking it.
            let has = |p| matches!(p, Phase::Prepared | Phase::Pushing | Phase::Migrating | Phase::Stopped);
            let decides = matches!(&v.source, Word::Now(s) if has(s.phase));
            let waits = matches!(v.source.phase(), None | Some(Phase::Prepared | Phase::Pushing));
            let group = now.saturating_duration_since(self.any);
            let still = if waits && decides { group } else { still };
            let patience = if decides { options.stall_wait } else { options.doubt_wait };
            let silent = v.not_heard();
            v.reason = if still >= patience && silent.is_some() {
                silent.map(|who| format!("{who}; waited for {} s", seconds(patience)))
            } else {
                // One that has not begun waits for the others.
                let still = if waits { group } else { still };
                (still >= options.stall_wait).then(|| {
                    format!("nothing of it has moved for {} s, while both agents answer", seconds(still))
                })
            };
        }
    }

    /// Whether all that is still under way should have been ended by its agents.
    fn overdue(&self, vms: &[VmView], limit: Duration, now: Instant) -> bool {
        let mut open = vms.iter().filter(|v| v.is_awaited()).peekable();
        open.peek().is_some()
            && open.all(|v| {
                let begun = self.begun.get(&v.name);
                begun.is_some_and(|b| now.saturating_duration_since(*b) >= limit + OVERDUE)
            })
    }
}

/// How long something has been so without a break, by `now`.
fn timer(on: bool, since: &mut Option<Instant>, now: Instant) -> Duration {
    *since = on.then(|| since.unwrap_or(now));
    since.map_or(Duration::ZERO, |s| now.saturating_duration_since(s))
}

/// The most that the time of one look counts: who was stopped, or has not run for long, has not been listening, and
/// concludes nothing from what it did not hear meanwhile.
const LOOK: Duration = Duration::from_secs(1);

/// A clock that goes only while somebody looks.
pub(super) struct Looking {
    now: Instant,
    real: Instant,
}

impl Looking {
    pub(super) fn new(real: Instant) -> Self {
        Self { now: real, real }
    }

    /// The time of this look.
    pub(super) fn look(&mut self, real: Instant) -> Instant {
        self.now += real.saturating_duration_since(self.real).min(LOOK);
        self.real = real;
        self.now
    }
}

/// Watches until every VM is settled, or is in doubt for long enough, or is waited for no longer, or the
/// caller has asked twice to stop.
pub(super) async fn follow(
    plan: &Plan,
    options: &Options,
    watch: &Watch,
    stop: Stop,
    mut interrupts: Interrupts,
    show: &mut dyn FnMut(Scene<'_>),
) -> (Vec<VmView>, Vec<AgentView>) {
    let mut cancelled = false;
    let (mut settled_since, mut doubt_since, mut idle_since, mut unknown_since) = (None, None, None, None);
    let mut overdue_since = None;
    let mut clock = Looking::new(Instant::now());
    let mut stalls = Stalls::new(clock.now);
    let longest = Duration::from_millis(plan.config.timeouts.move_ms);
    loop {
        wait_or(POLL, &mut interrupts).await;
        let stops = *interrupts.borrow();
        let views = watch.views();
        let mut vms = vm_views(plan, &views);
        let now = clock.look(Instant::now());
        stalls.look(&mut vms, options, now);
        show(Scene::Moving(&vms, &views));
        let overdue = stop == Stop::Cancel && stalls.overdue(&vms, longest, now);
        if (stops > 0 || overdue) && !cancelled && stop == Stop::Cancel {
            cancelled = true;
            show(Scene::Say(if overdue {
                "cancelling: what is left has not come to its end in time (timeouts.move_ms)"
            } else {
                "cancelling: what has not been given up yet stays at its source (again: stop watching)"
            }));
            let group = &plan.config.name;
            let word = |_| Some(Request::Cancel { group: group.clone() });
            for p in problems(plan, &call_all(plan, options.call_timeout, word).await) {
                show(Scene::Say(&p));
            }
        }
        let open = vms.iter().any(VmView::is_awaited);
        let doubt = vms.iter().any(|v| v.verdict == Verdict::InDoubt);
        let words_to_come = vms.iter().any(words_to_come);
        let settled_for = timer(!open && !doubt, &mut settled_since, now);
        let doubt_for = timer(!open && doubt, &mut doubt_since, now);
        // Only prepared, nothing pushed: with a coordinator that is gone it stays so.
        let idle = stop == Stop::Leave
            && vms.iter().all(only_prepared)
            && views.iter().all(|a| a.group(&plan.config.name).is_none_or(|g| g.host.push_bytes == 0));
        let idle_for = timer(idle, &mut idle_since, now);
        let unknown_for = timer(stop == Stop::Leave && vms.iter().all(unknown), &mut unknown_since, now);
        let overdue_for = timer(overdue && cancelled, &mut overdue_since, now);
        if overdue_for >= options.doubt_wait {
            let why = "its agents have not ended its stream in time (timeouts.move_ms), nor when the group was cancelled";
            vms.iter_mut().filter(|v| v.is_awaited()).for_each(|v| v.reason = Some(why.to_owned()));
        }
        let settled = !open && !doubt && (!words_to_come || settled_for >= LAST_WORDS);
        if settled
            || doubt_for >= options.doubt_wait
            || idle_for >= options.doubt_wait
            || unknown_for >= LAST_WORDS
            || overdue_for >= options.doubt_wait
            || stops > u32::from(stop == Stop::Cancel)
        {
            vms.iter_mut().for_each(VmView::conclude);
            return (vms, views);
        }
    }
}
