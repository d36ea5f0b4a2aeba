//! What is known of groups that the agent does not keep any more: answered from the registry's records. A source that comes
//! back late to settle a VM finds its group taken up again from them.

use super::inpath::InPath;
use super::keeper::KEEP;
use super::{Group, Role, Shared, blank, recover};
use crate::control::api::{
    Code, GroupStatus, HistoryRow, HostCounters, LEFT_AGAIN, Phase, PreparePhase, PrepareStatus, Refusal,
    Reply, VmSpec, VmStatus,
};
use crate::control::journal::{JournalState, VmRecord, run_of};
use crate::control::registry::outcome;
use crate::core::wire::keys::pass;
use crate::flow::arrival::TargetGroup;
use crate::flow::lock;
use std::sync::Arc;
use std::time::Instant;

/// Rows of one answer: it is one line of the control protocol.
const MAX_ROWS: usize = 5_000;
/// Groups that are taken up again at a time, for late calls; further calls are declined, and come again.
const MAX_RECALLED: usize = 64;

/// A group that was taken up again for late calls.
#[derive(Debug)]
pub(super) struct Recalled {
    group: Arc<Group>,
    flow: Arc<TargetGroup>,
    /// When it was called last.
    called: Instant,
}

/// Where a VM stands by its record alone.
pub(super) fn phase_of(r: &VmRecord) -> Phase {
    use JournalState as S;
    match (r.role, r.state) {
        (Role::Source, S::Done) => Phase::Done,
        (Role::Source, S::Aborted | S::Started) => Phase::Failed,
        (Role::Source, S::Serving) => Phase::GaveUp,
        (Role::Target, S::Running) if r.leave_paused => Phase::LeftPaused,
        (Role::Target, S::Running) if r.settled => Phase::Running,
        (Role::Target, S::Filled) => Phase::Running,
        (Role::Target, S::Fetching) => Phase::Fetching,
        (Role::Target, S::Lost) => Phase::Lost,
        (Role::Target, S::Discarded | S::Started) => Phase::Failed,
        (Role::Source | Role::Target, _) => Phase::InDoubt,
    }
}

/// A VM by its record alone: nothing was counted.
pub(super) fn status_of(r: &VmRecord) -> VmStatus {
    let v = VmSpec {
        ix: r.ix,
        name: r.vm.clone(),
        source: 0,
        target: 0,
        tenant: String::new(),
        source_front: r.front.clone(),
        target_front: r.front.clone(),
        identity: r.identity.clone(),
    };
    let phase = phase_of(r);
    let moved = matches!(phase, Phase::Done | Phase::Running);
    VmStatus {
        started_ns: r.started_ns,
        running_ns: if moved { r.at_ns } else { 0 },
        error: r.why.clone().filter(|_| !moved),
        ..blank(&v, r.role, phase)
    }
}

/// What is said of a VM whose move is over and whose process has ended; nothing if it is no news, or another
/// group's to tell. `newest`: no later group had that process in hand.
fn ended(role: Role, phase: Phase, newest: impl Fn() -> bool) -> Option<&'static str> {
    match (role, phase) {
        (Role::Target, Phase::Running | Phase::LeftPaused) if newest() => {
            Some("its process has ended after it had moved here")
        }
        (Role::Target, Phase::Running | Phase::LeftPaused) => Some(LEFT_AGAIN),
        (Role::Source, Phase::Failed | Phase::Cancelled) if newest() => {
            Some("its process has ended since it stayed here")
        }
        // An old copy ends once its VM has moved.
        _ => None,
    }
}

/// One VM of a group of before.
fn row(shared: &Shared, r: &VmRecord) -> HistoryRow {
    HistoryRow {
        group: r.group.clone(),
        run: run_of(&r.token),
        method: r.method,
        vm: r.vm.clone(),
        role: r.role,
        outcome: outcome(r).to_owned(),
        over: r.is_over(),
        peer: r.peer,
        started_ns: r.started_ns,
        at_ns: r.at_ns,
        alive: shared.registry.lives(r),
        doubt: Some(!r.is_over() && shared.may_be_settled(r)),
        why: r.why.clone(),
    }
}

impl Shared {
    pub(super) fn unknown(&self, name: &str) -> Refusal {
        Refusal::new(Code::UnknownGroup, format!("agent {} knows no group {name:?}", self.config.name))
    }

    /// What the records say of a group, or of all.
    pub(super) fn history(&self, group: Option<&str>) -> Result<Reply, Refusal> {
        let mut records = self.registry.records(group);
        if let (Some(name), true) = (group, records.is_empty())
            && !lock(&self.groups).contains_key(name)
        {
            return Err(self.unknown(name));
        }
        let left_off = records.len().saturating_sub(MAX_ROWS) as u64;
        records.truncate(MAX_ROWS);
        let rows = records.iter().map(|r| row(self, r)).collect();
        Ok(Reply::History { name: self.config.name.clone(), rows, left_off })
    }

    /// The status of a VM that is over, with what became of its process since: `ended` if it lives no more. Only
    /// the process list is asked.
    pub(super) fn with_end(&self, mut v: VmStatus, r: &VmRecord) -> VmStatus {
        if v.state == "ended" || self.registry.lives(r) != Some(false) {
            return v;
        }
        let Some(what) = ended(v.role, v.phase, || self.registry.act_on(r)) else { return v };
        "ended".clone_into(&mut v.state);
        v.error = Some(v.error.take().map_or_else(|| what.to_owned(), |e| format!("{e}; {what}")));
        v
    }

    /// The last run of a group that is not kept any more, as its status.
    pub(super) fn status_of_old(&self, name: &str) -> Result<GroupStatus, Refusal> {
        let records = self.registry.last_run(name);
        let first = records.first().ok_or_else(|| self.unknown(name))?;
        Ok(GroupStatus {
            group: name.to_owned(),
            method: first.method,
            prepare: PrepareStatus::new(PreparePhase::Ready, None),
            vms: records.iter().map(|r| self.with_end(status_of(r), r)).collect(),
            host: HostCounters::default(),
            started_ns: records.iter().map(|r| r.started_ns).min().unwrap_or_default(),
            share: None,
        })
    }

    /// Has the door ask here for groups that are not kept any more.
    pub(super) fn answer_late_calls(self: &Arc<Self>) {
        let agent = Arc::downgrade(self);
        self.door.recall_by(Box::new(move |group, opens| agent.upgrade()?.recall(group, opens)));
    }

    /// The arrivals of a run of a group that is not kept any more: all they do is say how it ended.
    /// `opens` is what its secret opens connections with.
    pub(super) fn recall(self: &Arc<Self>, name: &str, opens: &[u8; 32]) -> Option<Arc<TargetGroup>> {
        let mut recalled = lock(&self.recalled);
        if let Some(r) = recalled.iter_mut().find(|r| r.flow.name == name && pass(&r.flow.token) == *opens) {
            r.called = Instant::now();
            return Some(r.flow.clone());
        }
        let mut records = self.registry.records(Some(name));
        records.retain(|r| {
            pass(&r.token.0) == *opens && r.role == Role::Target && r.is_over() && r.method.in_path()
        });
        if records.is_empty() || recalled.len() >= MAX_RECALLED {
            return None;
        }
        let spec = recover::spec_of(&self.config, &records);
        let work = InPath::new(self, (&spec, spec.recipe.proxied()?), &Arc::default()).ok()?;
        let taken_up = work.recover(self, &spec, &records);
        if let Err(e) = taken_up {
            tracing::warn!("group {name}: cannot be taken up: {e}");
            work.forget();
            return None;
        }
        let flow = work.arrivals()?;
        let group = Arc::new(Group::taken_up(spec, super::Work::InPath(work)));
        recalled.push(Recalled { group, flow: flow.clone(), called: Instant::now() });
        Some(flow)
    }

    /// Lets go what has not been called for a while.
    pub(super) fn drop_recalled(&self, now: Instant) {
        let mut recalled = lock(&self.recalled);
        recalled.retain(|r| {
            let keep = now.saturating_duration_since(r.called) < KEEP;
            if !keep {
                r.flow.close();
                if let super::Work::InPath(w) = &r.group.work {
                    w.forget();
                }
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::journal::tests::record;

    #[test]
    fn a_group_of_before_is_told_by_its_records() {
        use JournalState as S;
        let table = [
            (Role::Source, S::Done, Phase::Done),
            (Role::Source, S::Aborted, Phase::Failed),
            (Role::Source, S::GaveUp, Phase::InDoubt),
            (Role::Target, S::Running, Phase::Running),
            (Role::Target, S::Filled, Phase::Running),
            (Role::Target, S::Discarded, Phase::Failed),
            (Role::Target, S::Loaded, Phase::InDoubt),
        ];
        for (role, state, phase) in table {
            let mut r = record("g", "v", role, state);
            (r.leave_paused, r.settled, r.why) = (false, true, Some("why".into()));
            let st = status_of(&r);
            assert_eq!((st.phase, st.role), (phase, role), "{state:?}");
            let moved = matches!(phase, Phase::Done | Phase::Running);
            assert_eq!((st.running_ns > 0, st.error.is_none()), (moved, moved), "{state:?}");
        }
        let paused = VmRecord { settled: true, ..record("g", "v", Role::Target, S::Running) };
        assert_eq!(status_of(&paused).phase, Phase::LeftPaused);
    }

    #[test]
    fn a_vm_whose_process_has_ended_is_not_said_to_run() {
        let said = |role, phase, newest| ended(role, phase, || newest);
        for phase in [Phase::Running, Phase::LeftPaused] {
            assert!(said(Role::Target, phase, true).unwrap().contains("after it had moved"), "{phase:?}");
            assert_eq!(said(Role::Target, phase, false), Some(LEFT_AGAIN));
        }
        for phase in [Phase::Failed, Phase::Cancelled] {
            assert!(said(Role::Source, phase, true).unwrap().contains("stayed"), "{phase:?}");
            assert_eq!(said(Role::Source, phase, false), None, "it left with another group");
            assert_eq!(said(Role::Target, phase, true), None, "it never was the VM");
        }
        for phase in [Phase::Done, Phase::GaveUp, Phase::InDoubt, Phase::Migrating] {
            assert_eq!(said(Role::Source, phase, true), None, "{phase:?}");
        }
    }
}
