//! After a restart: every VM whose record is not settled is taken up where the journal says it stands, and settled
//! with the other side as soon as that can be heard (DESIGN rule 1). Settled records only serve to answer questions.

use super::inpath::InPath;
use super::{Group, Shared, Work};
use crate::control::api::{GroupSpec, PreparePhase, PrepareStatus, Role, SourceSpec, TargetSpec, VmSpec};
use crate::control::journal::{JournalError, JournalState, VmRecord};
use crate::core::handover::{SourceState, TargetState};
use crate::flow::lock;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

/// Reads the journal and starts what it asks for.
pub(super) fn recover(shared: &Arc<Shared>) -> Result<(), JournalError> {
    let loaded = shared.journal.load_all()?;
    for e in &loaded.corrupt {
        tracing::error!("{e}");
    }
    let mut groups: BTreeMap<String, Vec<VmRecord>> = BTreeMap::new();
    for r in loaded.records {
        groups.entry(r.group.clone()).or_default().push(r);
    }
    for (name, records) in groups {
        if let Err(e) = group(shared, &name, &records) {
            tracing::error!("group {name}: cannot be taken up: {e}");
        }
    }
    Ok(())
}

/// The place of `peer` in `list`, which it joins if it is new. Place 0 is this agent's own.
fn place(list: &mut Vec<SocketAddr>, peer: SocketAddr) -> u16 {
    let at = list[1..].iter().position(|a| *a == peer).map_or_else(
        || {
            list.push(peer);
            list.len() - 1
        },
        |i| i + 1,
    );
    at as u16
}

fn group(shared: &Arc<Shared>, name: &str, records: &[VmRecord]) -> std::io::Result<()> {
    let Some(first) = records.first() else { return Ok(()) };
    let open = records.iter().filter(|r| !r.settled).count();
    tracing::info!("group {name}: {} records, {open} of them open", records.len());
    let (mut sources, mut targets) = (vec![shared.config.control], vec![shared.config.data]);
    let vms: Vec<VmSpec> = records
        .iter()
        .map(|r| {
            let (source, target) = match r.role {
                Role::Source => (0, place(&mut targets, r.peer)),
                Role::Target => (place(&mut sources, r.peer), 0),
            };
            VmSpec {
                ix: r.ix,
                name: r.vm.clone(),
                source,
                target,
                tenant: String::new(),
                source_front: r.front.clone(),
                target_front: r.front.clone(),
            }
        })
        .collect();
    let spec = GroupSpec {
        share: None,
        name: name.to_owned(),
        token: first.token,
        method: first.method,
        digest: crate::core::digest::Algorithm::default(),
        compress: crate::core::squeeze::Mode::default(),
        direct: crate::core::direct::Direct::default(),
        differences: false,
        hold_back: false,
        models: false,
        migration: crate::core::migration::Migration::default(),
        downtime_ms: 300,
        parallel: None,
        index: None,
        sources: sources.iter().map(|a| SourceSpec { name: a.to_string(), agent: *a, data: None }).collect(),
        targets: targets.iter().map(|a| TargetSpec { name: a.to_string(), agent: *a, data: *a }).collect(),
        my_source: Some(0),
        my_target: Some(0),
        tenants: vec![String::new()],
        vms,
        multicast: None,
        timeouts: crate::control::config::GroupTimeouts::default(),
    };
    let pacer = Arc::default();
    let work = InPath::new(shared, &spec, &pacer)?;
    work.recover(shared, &spec, records)?;
    let group = Group {
        // What is left to say of these VMs is words.
        share: None,
        pacer,
        spec,
        prepare: Mutex::new(PrepareStatus::new(PreparePhase::Failed, Some("the agent was restarted".into()))),
        started: AtomicBool::new(true),
        started_ns: AtomicU64::new(0),
        cancelled: AtomicBool::new(false),
        work: Work::InPath(work),
    };
    lock(&shared.groups).insert(name.to_owned(), Arc::new(group));
    Ok(())
}

/// The handover's state in a source record; `None` for one that cannot be of a source.
pub(super) fn source_state(s: JournalState) -> Option<SourceState> {
    Some(match s {
        JournalState::Started => SourceState::Streaming,
        JournalState::GivingUp => SourceState::GivingUp,
        JournalState::GaveUp => SourceState::GaveUp,
        JournalState::Done => SourceState::Done,
        JournalState::Aborted => SourceState::Aborted,
        JournalState::Serving => SourceState::Serving,
        JournalState::Loaded
        | JournalState::Running
        | JournalState::Discarded
        | JournalState::Ready
        | JournalState::Fetching
        | JournalState::Filled => return None,
    })
}

/// The handover's state in a target record; `None` for one that cannot be of a target.
pub(super) fn target_state(s: JournalState) -> Option<TargetState> {
    Some(match s {
        JournalState::Started => TargetState::Filling,
        JournalState::Loaded => TargetState::Loaded,
        JournalState::Running => TargetState::Running,
        JournalState::Discarded => TargetState::Discarded,
        JournalState::Ready => TargetState::Ready,
        JournalState::Fetching => TargetState::Fetching,
        JournalState::Filled => TargetState::Filled,
        JournalState::GivingUp
        | JournalState::GaveUp
        | JournalState::Serving
        | JournalState::Done
        | JournalState::Aborted => return None,
    })
}

impl InPath {
    fn recover(&self, shared: &Arc<Shared>, spec: &GroupSpec, records: &[VmRecord]) -> std::io::Result<()> {
        for (r, v) in records.iter().zip(&spec.vms) {
            match r.role {
                Role::Source => {
                    if let Some(state) = source_state(r.state) {
                        self.recover_source(shared, r, v, state)?;
                    }
                }
                Role::Target => {}
            }
        }
        let arriving: Vec<_> = records.iter().filter(|r| r.role == Role::Target).collect();
        if arriving.is_empty() { Ok(()) } else { self.recover_target(shared, spec, &arriving) }
    }
}
