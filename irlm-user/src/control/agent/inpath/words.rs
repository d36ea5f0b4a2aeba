//! What departures and arrivals say of themselves, in the words of the control protocol and of the journal.

use super::super::{Phase, Role, Shared, VmStatus, blank, put};
use crate::control::api::{MulticastCounters, PageCounts, VmSpec};
use crate::control::journal::{JournalState, VmRecord};
use crate::core::handover::{SourceState, TargetState};
use crate::core::units::PAGE_SIZE;
use crate::flow::arrival::cast::CastCounts;
use crate::flow::arrival::{self, TargetNote, TargetVmShared};
use crate::flow::source::{self, SourceNote, SourceVmShared};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Why a VM of a group that was cancelled in time is where it was.
pub(super) const NEVER_LEFT: &str = "the group was cancelled before this VM began to leave";

pub(in super::super) fn source_status(
    v: &VmSpec,
    h: &SourceVmShared,
    (cancelled, leaves): (bool, bool),
    pushing: bool,
) -> VmStatus {
    let mut st = h.status();
    let phase = match st.phase {
        // Once the group leaves here, whether this VM still does is decided where they leave.
        source::Phase::Waiting if cancelled && !leaves => {
            st.reason = NEVER_LEFT.to_owned();
            Phase::Cancelled
        }
        source::Phase::Waiting if pushing => Phase::Pushing,
        source::Phase::Waiting => Phase::Prepared,
        source::Phase::Connecting | source::Phase::Migrating => Phase::Migrating,
        source::Phase::Stopped | source::Phase::HandingOver => Phase::Stopped,
        _ if st.in_doubt => Phase::InDoubt,
        source::Phase::InDoubt | source::Phase::Serving => Phase::GaveUp,
        source::Phase::TakingBack => Phase::Stopped,
        source::Phase::Moved => Phase::Done,
        source::Phase::Stayed if cancelled => Phase::Cancelled,
        source::Phase::Stayed => Phase::Failed,
    };
    let state = match (st.phase, st.left) {
        (source::Phase::Stayed, Some(source::Left::Ended)) => "ended",
        // One in doubt was continued by somebody's hand.
        (source::Phase::Stayed | source::Phase::InDoubt, Some(source::Left::Stands(guest))) => guest.name(),
        (source::Phase::Connecting | source::Phase::Migrating, _) => st.guest.name(),
        _ => "",
    };
    let runs = match phase {
        _ if st.runs_ns != 0 => st.runs_ns,
        Phase::Done => st.ended_ns,
        _ => 0,
    };
    let stream = h.stream_bytes.load(Ordering::Relaxed);
    VmStatus {
        state: state.to_owned(),
        stream_bytes: stream,
        wire_bytes: h.wire_bytes.load(Ordering::Relaxed),
        ram_total: st.ram_bytes,
        ram_remaining: st.ram_bytes.saturating_sub(
            (st.stats.uniform
                + st.stats.unique
                + st.stats.shared
                + st.stats.references
                + st.stats.remote_references)
                * PAGE_SIZE as u64,
        ),
        pages: PageCounts {
            unique: st.stats.unique,
            shared: st.stats.shared,
            reference: st.stats.references,
            remote_reference: st.stats.remote_references,
            uniform: st.stats.uniform,
            answered: st.stats.answered,
            hashed: st.stats.hashed,
            kept: st.stats.kept,
            held: st.stats.held,
            spared: st.stats.spared,
            difference: st.stats.differences,
            modelled: st.stats.modelled,
            demanded: st.stats.demanded,
        },
        work: h.work.snapshot().into(),
        hash_ns: st.stats.hash_ns,
        verified: st.proof,
        started_ns: st.started_ns,
        stopped_ns: st.stopped_ns,
        running_ns: runs,
        filled_ns: if phase == Phase::Done && st.runs_ns != 0 { st.ended_ns } else { 0 },
        downtime_ns: (runs > 0 && st.stopped_ns > 0).then(|| runs.saturating_sub(st.stopped_ns)),
        error: (!st.reason.is_empty()).then_some(st.reason),
        ..blank(v, Role::Source, phase)
    }
}

pub(in super::super) fn target_status(
    v: &VmSpec,
    h: &TargetVmShared,
    cancelled: bool,
    leave_paused: bool,
) -> VmStatus {
    let st = h.status();
    let phase = match st.phase {
        arrival::Phase::Waiting if cancelled => Phase::Cancelled,
        arrival::Phase::Waiting => Phase::Prepared,
        arrival::Phase::Filling => Phase::Migrating,
        arrival::Phase::Loaded => Phase::Loaded,
        arrival::Phase::InDoubt => Phase::InDoubt,
        arrival::Phase::Running if leave_paused || !st.guest.runs() => Phase::LeftPaused,
        arrival::Phase::Running => Phase::Running,
        arrival::Phase::Fetching => Phase::Fetching,
        arrival::Phase::Lost => Phase::Lost,
        arrival::Phase::Discarded if cancelled => Phase::Cancelled,
        arrival::Phase::Discarded => Phase::Failed,
    };
    let state = match st.phase {
        arrival::Phase::Running | arrival::Phase::Fetching if !st.guest.runs() => st.guest.name(),
        arrival::Phase::Running | arrival::Phase::Fetching if leave_paused => "paused",
        arrival::Phase::Running | arrival::Phase::Fetching => "running",
        arrival::Phase::InDoubt if st.ran => "running",
        arrival::Phase::Lost => "ended",
        _ => "",
    };
    VmStatus {
        state: state.to_owned(),
        work: h.work.snapshot().into(),
        stream_bytes: h.loaded_bytes.load(Ordering::Relaxed),
        waiting: st.waiting,
        filled_ns: st.filled_ns,
        faults: (st.fill.placed > 0 || st.faults.all.count > 0).then_some(st.faults),
        ready_ns: st.ready_ns,
        running_ns: st.running_ns,
        error: (!st.reason.is_empty()).then_some(st.reason),
        ..blank(v, Role::Target, phase)
    }
}

pub(in super::super) fn multicast_counters(m: &CastCounts) -> MulticastCounters {
    MulticastCounters {
        hearers: m.hearers as u64,
        sent_pages: m.sent.contents,
        sent_bytes: m.sent.bytes,
        repaired_bytes: m.sent.repair_bytes,
        control_bytes: m.sent.other_bytes + m.report_bytes,
        unheard_pages: m.unheard,
        handed_pages: m.sent.handed,
        received_pages: m.contents,
        received_bytes: m.received_bytes,
        duplicates: m.heard.duplicates,
        others: m.heard.others,
        refused: m.foreign + m.heard.refused + m.sent.refused,
        dropped: m.dropped,
        rate: m.rate * 8,
    }
}

fn journal_source(state: SourceState) -> JournalState {
    match state {
        SourceState::Streaming => JournalState::Started,
        SourceState::GivingUp => JournalState::GivingUp,
        SourceState::GaveUp => JournalState::GaveUp,
        SourceState::Done => JournalState::Done,
        SourceState::Aborted => JournalState::Aborted,
        SourceState::Serving => JournalState::Serving,
        SourceState::TakingBack => JournalState::TakingBack,
    }
}

fn journal_target(state: TargetState) -> JournalState {
    match state {
        TargetState::Filling => JournalState::Started,
        TargetState::Loaded => JournalState::Loaded,
        TargetState::Running => JournalState::Running,
        TargetState::Discarded => JournalState::Discarded,
        TargetState::Ready => JournalState::Ready,
        TargetState::Fetching => JournalState::Fetching,
        TargetState::Filled => JournalState::Filled,
        TargetState::Refused => JournalState::Refused,
        TargetState::Lost => JournalState::Lost,
    }
}

/// Writes the notes of a departure into its record.
pub(in super::super) fn source_journal(shared: &Arc<Shared>, mut record: VmRecord) -> source::SourceJournal {
    let shared = shared.clone();
    Box::new(move |note| {
        let mut state = record.state;
        match note {
            SourceNote::State(now, guest) => {
                record.guest = guest;
                // Its thread is about to ask something of whoever runs it.
                record.begun |= now == SourceState::Streaming;
                state = journal_source(now);
            }
            SourceNote::Process(process) => record.process = Some(process),
            SourceNote::Guest(guest) => record.guest = guest,
            SourceNote::Settings(found) => record.settings = Some(found),
            SourceNote::Begun => record.migration_begun = true,
            SourceNote::NotBegun => record.migration_begun = false,
        }
        Ok(put(&shared, &mut record, state)?)
    })
}

/// Writes the notes of an arrival into its record.
pub(in super::super) fn target_journal(shared: &Arc<Shared>, mut record: VmRecord) -> arrival::TargetJournal {
    let shared = shared.clone();
    Box::new(move |note| {
        let mut state = record.state;
        match note {
            TargetNote::State(now) => {
                // From here on something may be loaded into whoever waits.
                record.begun = true;
                record.settled = matches!(now, TargetState::Discarded | TargetState::Filled);
                state = journal_target(now);
            }
            TargetNote::Process(process) => record.process = Some(process),
            TargetNote::Settings(found) => record.settings = Some(found),
            TargetNote::Guest(guest) => {
                // Written with the state that follows.
                record.guest = guest;
                return Ok(());
            }
            TargetNote::Settled => {
                record.settled = true;
                state = JournalState::Running;
            }
        }
        Ok(put(&shared, &mut record, state)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Front, lock};

    #[test]
    fn a_vm_is_in_doubt_if_its_driver_says_so_and_not_because_there_is_a_reason() {
        let front = Front::Qmp("/run/q".into());
        let v = VmSpec {
            ix: 0,
            name: "v".into(),
            source: 0,
            target: 0,
            tenant: String::new(),
            source_front: front.clone(),
            target_front: front,
            identity: None,
        };
        let vm = SourceVmShared::new().unwrap();
        let says = |phase, in_doubt| {
            {
                let mut st = lock(&vm.status);
                (st.phase, st.in_doubt, st.reason) = (phase, in_doubt, "the link was cut".into());
            }
            let st = source_status(&v, &vm, (false, false), false);
            assert_eq!(st.error.as_deref(), Some("the link was cut"));
            st.phase
        };
        assert_eq!(says(source::Phase::Serving, false), Phase::GaveUp);
        assert_eq!(says(source::Phase::Serving, true), Phase::InDoubt);
        assert_eq!(says(source::Phase::Stayed, false), Phase::Failed);
        assert_eq!(says(source::Phase::Moved, false), Phase::Done);
    }
}
