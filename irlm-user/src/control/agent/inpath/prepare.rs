//! Preparation of a group at one host: its VMs' memory is made where they arrive, and read and hashed where they leave;
//! the index is told what is there.

use super::super::{Group, Shared};
use super::side::hosts;
use super::side::{SourceSide, TargetSide};
use crate::control::api::Refusal;
use crate::flow::lock;
use crate::flow::source::prepare;
use crate::flow::work::{Laps, Stage};
use crate::flow::{MoveError, arrival};
use crate::host::sched;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl TargetSide {
    /// Sees that somebody waits for each VM, and makes its memory.
    pub(super) fn prepare(&self, shared: &Shared, group: &Group) -> Result<(), Refusal> {
        for (spec, _) in &self.vms {
            spec.front.greet(shared.timeouts.setup).map_err(MoveError::at(&spec.name))?;
        }
        if shared.config.prepare.populate {
            for (spec, _) in &self.vms {
                if group.cancelled.load(Ordering::Acquire) {
                    return Err(Refusal::failed("cancelled"));
                }
                match arrival::populate::populate(&spec.front, shared.timeouts.setup) {
                    Ok(bytes) => drop(self.populated.fetch_add(bytes, Ordering::Relaxed)),
                    // It will be made as it comes.
                    Err(e) => tracing::warn!("{}: its memory is not made beforehand: {e}", spec.name),
                }
            }
        }
        // From here on the link to this host may be measured.
        shared.door.expect(&group.spec.name, group.spec.token.0, hosts(&group.spec));
        Ok(())
    }
}

/// What is read is read on processor time that nobody else wants.
fn give_way() {
    match sched::idle_this_thread() {
        Ok(sched::GivesWay::Idle) => {}
        Ok(sched::GivesWay::Nice { refused }) => {
            tracing::warn!("preparation runs at nice 19: the kernel refuses SCHED_IDLE ({refused})");
        }
        Err(e) => tracing::warn!("preparation runs at normal priority: {e}"),
    }
}

impl SourceSide {
    /// Runs on a thread of its own, at idle priority.
    pub(super) fn prepare(self: &Arc<Self>, shared: &Arc<Shared>, group: &Arc<Group>) -> Result<(), Refusal> {
        if self.goes_direct(shared, group) {
            return self.prepare_direct(shared, group);
        }
        if shared.config.prepare.idle {
            give_way();
        }
        if group.spec.recipe.rack().is_some_and(|r| r.models) {
            shared.door.borrow_for(self.group.clone());
        }
        let mut problems = Vec::new();
        let opened = self.open_all(shared, &mut problems)?;
        let mut laps = Laps::begin();
        let prepared = self.scan_all(shared, &opened, &mut problems)?;
        laps.lap(&self.group.work, Stage::Hash);
        let pairs: Vec<_> = self.vms.iter().map(|(s, _)| s).zip(&prepared).collect();
        let needs = prepare::needs_by_digest(&pairs);
        lock(&group.prepare).distinct = needs.len() as u64;
        if group.spec.recipe.rack().is_some()
            && let Err(e) = self.register(shared, group, &needs)
        {
            // Losing the index costs bandwidth, never correctness.
            problems.push(format!("dedup inside this host only: {e}"));
        }
        laps.lap(&self.group.work, Stage::Other);
        if !problems.is_empty() {
            for p in &problems {
                tracing::warn!("group {}: {p}", group.spec.name);
            }
            lock(&group.prepare).problem = Some(problems.join("; "));
        }
        *lock(&self.prepared) = prepared;
        // The plan is made when the last host has registered. It is fetched as soon as it is there, so that the start
        // of the group does not wait for it, and this host is ready without it.
        self.part.expect();
        let (side, agent, own) = (self.clone(), shared.clone(), group.clone());
        std::thread::Builder::new()
            .name("irlm-plan".into())
            .spawn(move || side.plan_and_ask(&agent, &own))
            .map_err(Refusal::failed)?;
        Ok(())
    }

    /// Opens the VMs' memory, and counts their pages. One that cannot be opened moves without dedup.
    fn open_all(&self, shared: &Shared, problems: &mut Vec<String>) -> Result<Vec<prepare::Opened>, Refusal> {
        let mut opened = Vec::new();
        let mut total = 0;
        for (spec, _) in &self.vms {
            // Somebody must answer: without that the VM cannot be migrated at all.
            match prepare::open(spec, shared.timeouts.setup) {
                Ok(vm) => {
                    let ram = vm.ram.as_deref();
                    total += ram
                        .into_iter()
                        .flat_map(|ram| (0..ram.blocks().len()).flat_map(|b| ram.data_ranges(b)))
                        .map(|r| u64::from(r.end - r.start))
                        .sum::<u64>();
                    opened.push(vm);
                }
                Err(e) => {
                    spec.front.greet(shared.timeouts.setup).map_err(MoveError::at(&spec.name))?;
                    problems.push(format!("{}: no dedup: {e}", spec.name));
                    opened.push(prepare::Opened::default());
                }
            }
        }
        self.scan.total.store(total, Ordering::Relaxed);
        Ok(opened)
    }
}
