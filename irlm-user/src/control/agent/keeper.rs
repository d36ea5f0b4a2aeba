//! What becomes of groups by themselves: one that nobody starts lets its VMs go; one that is over gives its memory back at
//! once and is forgotten a little later; what it came to stays in the registry (`history`). One thread looks after all of
//! them.

use super::{Group, PreparePhase, Role, Shared, Work, put};
use crate::control::api::{Phase, VmStatus};
use crate::control::journal::JournalState;
use crate::flow::{lock, unix_ns};
use crate::obs::rare;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often groups are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a group that is over is kept as it was, with its counters, for whoever still watches it.
pub(super) const KEEP: Duration = Duration::from_secs(60);
/// How long contents must have stopped to come before what is stored of them is given back: other target hosts may need
/// some.
const QUIET: Duration = Duration::from_secs(5);

/// How long a target is called that waits for a departure which never began: by then it has given up by itself.
const CALLED: Duration = Duration::from_secs(3600);
/// How long a prepared group waits to be started, at most, whatever its file says.
const UNSTARTED: Duration = Duration::from_secs(86_400);

/// What the keeper has noted of a group.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Since when it is ready and waits for its start, or was seen to have started.
    ready: Option<Instant>,
    /// Since when it is over.
    over: Option<Instant>,
    let_go: bool,
}

impl Shared {
    /// Looks after the groups until `stop`.
    pub(super) fn keep_groups(&self, stop: &AtomicBool) {
        let mut said = None;
        while !stop.load(Ordering::Relaxed) {
            self.look_after_groups(Instant::now());
            // What expires is said also where nobody connects.
            if let Some(keys) = &self.keys {
                keys.look();
            }
            self.say_other_name(&mut said);
            rare::flush();
            std::thread::sleep(LOOK);
        }
    }

    /// Says, once for each certificate that comes into use, that it is not that of the host's agent.
    fn say_other_name(&self, said: &mut Option<String>) {
        let line = self.other_name();
        if line != *said {
            line.iter().for_each(|l| tracing::warn!("{l}"));
            *said = line;
        }
    }

    pub(super) fn look_after_groups(&self, now: Instant) {
        let groups: Vec<Arc<Group>> = lock(&self.groups).values().cloned().collect();
        for g in groups {
            if g.started.load(Ordering::Acquire) {
                self.look_after(&g, now);
            } else {
                self.await_start(&g, now);
            }
        }
        self.drop_recalled(now);
    }

    /// A coordinator that died between preparing and starting must not leave a group behind for ever.
    fn await_start(&self, group: &Arc<Group>, now: Instant) {
        let patience = Duration::from_millis(group.spec.timeouts.prepare_ms).min(UNSTARTED);
        let phase = group.phase();
        if phase == PreparePhase::Preparing {
            return;
        }
        let mut kept = lock(&group.kept);
        if group.is_over() {
            // Its end may still be asked for.
            let over = *kept.over.get_or_insert(now);
            drop(kept);
            if now.duration_since(over) >= KEEP {
                self.drop_group(group);
            }
            return;
        }
        let ready = *kept.ready.get_or_insert(now);
        drop(kept);
        if now.duration_since(ready) > patience {
            tracing::warn!("group {}: prepared, but nobody started it: dropped", group.spec.name);
            self.cancel_group(group, "nobody started it");
            // It may have been started just now.
            if !group.started.load(Ordering::Acquire) {
                self.drop_group(group);
            }
        }
    }

    fn look_after(&self, group: &Arc<Group>, now: Instant) {
        let vms = group.vms();
        self.note_ends(group, &vms);
        let first = *lock(&group.kept).ready.get_or_insert(now);
        if now.duration_since(first) > CALLED {
            self.end_calls(group);
        }
        if !self.settled(group) {
            lock(&group.kept).over = None;
            return;
        }
        let (over, fresh) = {
            let mut kept = lock(&group.kept);
            let fresh = !kept.let_go;
            (*kept.over.get_or_insert(now), fresh)
        };
        if let Work::InPath(w) = &group.work
            && fresh
            && w.is_quiet(QUIET)
        {
            w.let_go();
            lock(&group.kept).let_go = true;
        }
        if now.duration_since(over) >= KEEP {
            tracing::info!("group {}: over, and forgotten; `irlm history` knows it", group.spec.name);
            self.drop_group(group);
        }
    }

    /// Targets of departures that never began need not be told any more.
    fn end_calls(&self, group: &Group) {
        let mut records = self.registry.records(Some(&group.spec.name));
        records.retain(|r| r.token == group.spec.token && r.role == Role::Source && !r.is_over());
        for r in records.into_iter().filter(|r| r.state == JournalState::Aborted && !r.begun) {
            self.registry.shelve(r, "its target was never heard");
        }
    }

    /// Sees that the record of a VM whose end is known says so, where no thread of its own writes it.
    fn note_ends(&self, group: &Group, vms: &[VmStatus]) {
        let spec = &group.spec;
        for v in vms.iter().filter(|v| v.phase.is_final()) {
            let Some(mut r) = self.registry.get(&spec.name, &spec.token, &v.name, v.role) else { continue };
            if r.is_over() {
                continue;
            }
            match &group.work {
                // It never left.
                Work::InPath(_) if v.role == Role::Source && r.state == JournalState::Started && !r.begun => {
                    self.registry.release(&spec.name, &spec.token, &v.name, v.role);
                }
                Work::InPath(_) => {}
                // Plain QEMU: nobody has to be told anything any more.
                Work::Plain(_) => {
                    r.settled = true;
                    r.why.clone_from(&v.error);
                    r.leave_paused = v.phase == Phase::LeftPaused;
                    let state = match (v.role, v.phase) {
                        (Role::Source, Phase::Done) => JournalState::Done,
                        (Role::Source, _) => JournalState::Aborted,
                        (Role::Target, Phase::Running | Phase::LeftPaused) => JournalState::Running,
                        (Role::Target, Phase::Lost) => JournalState::Lost,
                        (Role::Target, _) => JournalState::Discarded,
                    };
                    if let Err(e) = put(self, &mut r, state) {
                        tracing::warn!("{e}");
                    }
                }
            }
        }
    }

    /// Forgets a group: its threads end, its connections and memory go. What its records say stays.
    pub(super) fn drop_group(&self, group: &Arc<Group>) {
        {
            let mut groups = lock(&self.groups);
            // Another run of it may have taken its name meanwhile, at the door too.
            if groups.get(&group.spec.name).is_some_and(|g| Arc::ptr_eq(g, group)) {
                groups.remove(&group.spec.name);
                self.door.dismiss(&group.spec.name);
            }
        }
        self.end(group);
        self.registry.prune(unix_ns());
    }

    /// Ends what a group has that is no group of the agent any more.
    pub(super) fn end(&self, group: &Group) {
        if let Work::InPath(w) = &group.work {
            w.forget();
            w.let_go();
        }
        if !group.started.load(Ordering::Acquire) {
            self.release(group);
        }
        self.registry.close(
            &group.spec.name,
            &group.spec.token,
            "forgotten before both sides had heard of it",
        );
    }
}
