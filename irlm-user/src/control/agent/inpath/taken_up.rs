//! What a group does that is taken up from its records: nothing moves any more, words are said until both sides know the
//! outcome.

use super::super::{Role, Shared, put, recover};
use super::InPath;
use super::departure::settled;
use super::words::{source_journal, target_journal};
use crate::control::api::{GroupSpec, VmSpec};
use crate::control::journal::{JournalState, VmRecord};
use crate::core::handover::SourceState;
use crate::flow::lock;
use crate::flow::{arrival, source};
use std::sync::Arc;

/// What is said of a departure that the restart came before.
const BEFORE: &str = "the source agent was restarted before anything moved";

impl InPath {
    /// Takes up where each record says its VM stands.
    pub(in super::super) fn recover(
        &self,
        shared: &Arc<Shared>,
        spec: &GroupSpec,
        records: &[VmRecord],
    ) -> std::io::Result<()> {
        for (r, v) in records.iter().zip(&spec.vms).filter(|(r, _)| r.role == Role::Source) {
            self.recover_source(shared, r, v)?;
        }
        let arriving: Vec<_> = records.iter().filter(|r| r.role == Role::Target).collect();
        if arriving.is_empty() { Ok(()) } else { self.recover_target(shared, spec, &arriving) }
    }

    fn recover_source(&self, shared: &Arc<Shared>, rec: &VmRecord, v: &VmSpec) -> std::io::Result<()> {
        let mut rec = rec.clone();
        let found = |s: &Arc<super::side::SourceSide>| {
            let vm = s.vms.iter().find(|(spec, _)| spec.vm.0 == v.ix).cloned();
            Some((s.group.clone(), vm?))
        };
        let (Some((flow, (spec, handle))), Some(mut state)) =
            (self.source.as_ref().and_then(found), recover::source_state(rec.state))
        else {
            return Ok(());
        };
        if rec.settled {
            handle.settled_before(state == SourceState::Done);
            return Ok(());
        }
        if state == SourceState::Streaming && !rec.begun {
            // There is nothing to end or to undo. Its target waits, and is told so.
            state = SourceState::Aborted;
            rec.why = Some(BEFORE.into());
            handle.stays(BEFORE);
            if let Err(e) = put(shared, &mut rec, JournalState::Aborted) {
                tracing::warn!("{e}; the record says the same as long as nothing was begun");
            }
        }
        let agent = shared.clone();
        std::thread::Builder::new()
            .name(format!("irlm-src-{}", v.ix))
            .spawn(move || {
                let journal = source_journal(&agent, rec.clone());
                let before = source::runner::Before {
                    process: rec.process,
                    guest: rec.guest,
                    begun: rec.migration_begun,
                    settings: rec.settings.clone(),
                };
                source::vm::recover(&flow, &spec, state, before, &handle, journal);
                settled(&agent, rec, &handle);
            })
            .map(drop)
    }

    fn recover_target(
        &self,
        shared: &Arc<Shared>,
        spec: &GroupSpec,
        records: &[&VmRecord],
    ) -> std::io::Result<()> {
        let Some(t) = &self.target else { return Ok(()) };
        let paused = records.first().is_some_and(|r| r.leave_paused);
        // Nothing arrives in a group taken up after a restart; there is only what was loaded before.
        let flow = t.group(shared, spec, self.patience, paused, Default::default());
        for rec in records {
            let Some((ts, handle)) = t.vms.iter().find(|(s, _)| s.vm.0 == rec.ix) else { continue };
            let Some(state) = recover::target_state(rec.state) else { continue };
            flow.expect(ts.vm, handle);
            let journal = target_journal(shared, (*rec).clone());
            let (flow, ts, handle) = (flow.clone(), ts.clone(), handle.clone());
            let was = (state, rec.guest, rec.settled);
            let owned = [JournalState::Running, JournalState::Fetching, JournalState::Filled];
            let before = arrival::Before {
                process: rec.process,
                settings: rec.settings.clone(),
                told: owned.contains(&rec.state),
            };
            std::thread::Builder::new()
                .name(format!("irlm-dst-{}", rec.ix))
                .spawn(move || arrival::vm::recover(&flow, &ts, was, before, &handle, journal))?;
        }
        *lock(&t.group) = Some(flow);
        Ok(())
    }
}
