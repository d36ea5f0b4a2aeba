//! After a restart: every VM whose newest record is not settled is taken up where the journal says it stands, and settled
//! with the other side as soon as that can be heard (invariant 1). A record that is not the newest about its process is
//! history: whatever it says, the VM has moved on. So are groups that are over; what they came to is answered from their
//! records (`history`).

use super::inpath::InPath;
use super::{Group, Shared, Work, keeper};
use crate::control::api::{
    GroupSpec, PreparePhase, PrepareStatus, Role, SourceSpec, TargetSpec, Token, VmSpec,
};
use crate::control::config::AgentConfig;
use crate::control::journal::{JournalState, VmRecord};
use crate::control::recipe::Recipe;
use crate::core::handover::{SourceState, TargetState};
use crate::flow::lock;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

/// What is done with what a restarted agent finds in its journal.
#[derive(Debug, Default, PartialEq)]
struct Found {
    /// Runs of groups to take up, each with its records.
    open: Vec<Vec<VmRecord>>,
    /// Records that are not settled, and never will be, because a newer one is about their process.
    overtaken: Vec<VmRecord>,
    /// Claims with which nothing was begun, where nobody else would hear of it.
    claims: Vec<VmRecord>,
}

/// Sorts records, the newest first, by what is to be done with them.
fn sort(records: Vec<VmRecord>, act_on: impl Fn(&VmRecord) -> bool) -> Found {
    let mut out = Found::default();
    let mut runs: Vec<(Token, Vec<VmRecord>)> = Vec::new();
    for r in records {
        // A source of ours tells its target that it never left.
        let quiet = r.role == Role::Target || !r.method.in_path();
        match r.is_over() {
            false if !act_on(&r) => out.overtaken.push(r),
            _ if quiet && r.state == JournalState::Started && !r.begun => out.claims.push(r),
            _ => match runs.iter_mut().find(|(t, of)| *t == r.token && of[0].group == r.group) {
                Some((_, of)) => of.push(r),
                None => runs.push((r.token, vec![r])),
            },
        }
    }
    let open = runs.into_iter().map(|(_, of)| of).filter(|of| of.iter().any(|r| !r.is_over()));
    out.open = open.collect();
    out.open.iter_mut().for_each(|of| of.sort_by_key(|r| r.ix));
    out
}

/// Starts what the journal asks for.
pub(super) fn recover(shared: &Arc<Shared>) {
    let found = sort(shared.registry.records(None), |r| shared.registry.act_on(r));
    for r in found.overtaken {
        tracing::warn!("group {}: {}: an old record ({:?}), not acted on", r.group, r.vm, r.state);
        shared.registry.shelve(r, "a newer record is about its process");
    }
    for r in found.claims {
        shared.registry.release(&r.group, &r.token, &r.vm, r.role);
    }
    for records in found.open {
        let name = records[0].group.clone();
        // Only one run of it can be over in part while another is open: the newest comes first.
        if lock(&shared.groups).contains_key(&name) {
            tracing::error!("group {name}: an earlier run of it is open too, and not taken up");
        } else if let Err(e) = group(shared, &name, &records) {
            tracing::error!("group {name}: cannot be taken up: {e}");
        }
    }
}

/// The place of a record's other side in `list`, which it joins if it is new. Place 0 is this agent's own.
fn place(list: &mut Vec<(SocketAddr, String)>, r: &VmRecord) -> u16 {
    let at = list[1..].iter().position(|(a, name)| *a == r.peer && *name == r.peer_host).map_or_else(
        || {
            list.push((r.peer, r.peer_host.clone()));
            list.len() - 1
        },
        |i| i + 1,
    );
    at as u16
}

/// The group as far as records of one run of it tell, of which there is one at least: each VM in the role that its record
/// has.
pub(super) fn spec_of(config: &AgentConfig, records: &[VmRecord]) -> GroupSpec {
    let own = |addr| vec![(addr, config.name.clone())];
    let (mut sources, mut targets) = (own(config.control), own(config.data));
    let vms: Vec<VmSpec> = records
        .iter()
        .map(|r| {
            let (source, target) = match r.role {
                Role::Source => (0, place(&mut targets, r)),
                Role::Target => (place(&mut sources, r), 0),
            };
            VmSpec {
                ix: r.ix,
                name: r.vm.clone(),
                source,
                target,
                tenant: r.tenant.clone(),
                source_front: r.front.clone(),
                target_front: r.front.clone(),
                identity: None,
            }
        })
        .collect();
    let has = |role| records.iter().any(|r| r.role == role).then_some(0);
    GroupSpec {
        share: None,
        name: records[0].group.clone(),
        token: records[0].token,
        method: records[0].method,
        recipe: Recipe::of_records(records[0].method),
        downtime_ms: 300,
        parallel: None,
        sources: sources
            .into_iter()
            .map(|(agent, name)| SourceSpec { name: name_or(name, agent), agent, data: None })
            .collect(),
        targets: targets
            .into_iter()
            .map(|(data, name)| TargetSpec { name: name_or(name, data), agent: data, data })
            .collect(),
        my_source: has(Role::Source),
        my_target: has(Role::Target),
        tenants: records.iter().map(|r| r.tenant.clone()).collect::<BTreeSet<_>>().into_iter().collect(),
        vms,
        timeouts: crate::control::config::GroupTimeouts::default(),
    }
}

/// What a host is called whose name was not written down.
fn name_or(name: String, addr: SocketAddr) -> String {
    if name.is_empty() { addr.to_string() } else { name }
}

fn group(shared: &Arc<Shared>, name: &str, records: &[VmRecord]) -> std::io::Result<()> {
    let open = records.iter().filter(|r| !r.is_over()).count();
    tracing::info!("group {name}: {} records, {open} of them open", records.len());
    let spec = spec_of(&shared.config, records);
    let work = if let Some(proxied) = spec.recipe.proxied() {
        let work = InPath::new(shared, (&spec, proxied), &Arc::default())?;
        work.recover(shared, &spec, records)?;
        if let Some(flow) = work.arrivals() {
            shared.door.admit(flow);
        }
        Work::InPath(work)
    } else {
        Work::Plain(super::plain::Plain::recover(shared, &spec, records)?)
    };
    lock(&shared.groups).insert(name.to_owned(), Arc::new(Group::taken_up(spec, work)));
    Ok(())
}

impl Group {
    /// One that goes on from records: what is left to say of its VMs is words.
    pub(super) fn taken_up(spec: GroupSpec, work: Work) -> Self {
        let problem = Some("the agent was restarted".to_owned());
        Self {
            share: None,
            pacer: Arc::default(),
            spec,
            owner: None,
            prepare: Mutex::new(PrepareStatus::new(PreparePhase::Failed, problem)),
            started: AtomicBool::new(true),
            begun: Mutex::new((true, true)),
            started_ns: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            gate: Mutex::new(()),
            kept: Mutex::new(keeper::Kept::default()),
            work,
        }
    }
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
        JournalState::TakingBack => SourceState::TakingBack,
        JournalState::Refused
        | JournalState::Lost
        | JournalState::Loaded
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
        JournalState::Refused => TargetState::Refused,
        JournalState::Lost => TargetState::Lost,
        JournalState::TakingBack
        | JournalState::GivingUp
        | JournalState::GaveUp
        | JournalState::Serving
        | JournalState::Done
        | JournalState::Aborted => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Method;
    use crate::control::journal::tests::record;

    fn rec(group: &str, vm: &str, role: Role, state: JournalState, settled: bool) -> VmRecord {
        VmRecord { settled, ..record(group, vm, role, state) }
    }

    #[test]
    fn only_what_is_open_and_newest_is_taken_up() {
        use JournalState as S;
        let moved = rec("g", "moved", Role::Source, S::Done, true);
        let doubt = VmRecord { ix: 2, ..rec("g", "doubt", Role::Source, S::GaveUp, false) };
        let over = rec("h", "over", Role::Target, S::Running, true);
        let old = rec("i", "old", Role::Source, S::Aborted, false);
        let claim = rec("k", "waits", Role::Target, S::Started, false);
        let plain = VmRecord { method: Method::Oc, ..rec("j", "p", Role::Source, S::Started, false) };
        let leaving = VmRecord { begun: true, vm: "q".into(), ..plain.clone() };
        let all = vec![
            claim.clone(),
            doubt.clone(),
            moved.clone(),
            over,
            old.clone(),
            plain.clone(),
            leaving.clone(),
        ];
        let found = sort(all, |r| r.vm != "old");
        // What is over in a group that is open still answers its questions.
        let expected = Found {
            open: vec![vec![moved, doubt], vec![leaving]],
            overtaken: vec![old],
            claims: vec![claim, plain],
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn each_vm_has_the_role_of_its_record() {
        let config: AgentConfig = toml::from_str(
            "name = \"a\"\ncontrol = \"127.0.0.1:1\"\ndata = \"127.0.0.1:2\"\nstate_dir = \"/x\"",
        )
        .unwrap();
        let source = record("g", "v", Role::Source, JournalState::GaveUp);
        let target = VmRecord { ix: 2, ..record("g", "w", Role::Target, JournalState::Loaded) };
        let spec = spec_of(&config, std::slice::from_ref(&source));
        assert_eq!((spec.my_source, spec.my_target), (Some(0), None), "it would be no source to `settle`");
        let both = spec_of(&config, &[source, target]);
        assert_eq!((both.my_source, both.my_target), (Some(0), Some(0)));
        assert_eq!((both.vms[0].source, both.vms[0].target), (0, 1));
        assert_eq!((both.vms[1].source, both.vms[1].target), (1, 0));
    }
}
