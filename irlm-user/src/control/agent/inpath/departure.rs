//! The source side of a group: registering with the index, taking the plan, the push, and the VMs' departures.

use super::super::{Group, Role, Shared, put, record};
use super::side::SourceSide;
use super::turn::Turn;
use super::words::{NEVER_LEFT, source_journal};
use super::{MODELS_WAIT, PLAN_WAIT, PUSHED_TENTHS};
use crate::control::journal::{JournalState, VmRecord};
use crate::core::digest::Digest;
use crate::core::forecast::{Departure, next};
use crate::core::index::{Registration, TargetSet};
use crate::core::migration::Migration;
use crate::core::plan::{Carry, HostPlan};
use crate::core::units::HostIx;
use crate::core::wire::keys;
use crate::flow::index::client::{IndexClient, IndexError};
use crate::flow::source::prepare::{self, PreparedVm};
use crate::flow::source::{self, SourceSpec, SourceVmShared, late, lend, push};
use crate::flow::{Traffic, lock};
use crate::net::connection::Endpoint;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

impl SourceSide {
    pub(super) fn register(
        &self,
        shared: &Shared,
        group: &Group,
        needs: &[(Digest, Vec<HostIx>, u32)],
    ) -> Result<(), IndexError> {
        let Some(addr) = group.spec.recipe.rack().map(|r| r.index) else { return Ok(()) };
        let g = &self.group;
        let at = Endpoint { addr, security: shared.security.clone() };
        let mut client =
            IndexClient::connect(at, &g.name, &keys::index(&g.token), g.me, shared.timeouts.peer)?;
        if let Some((local, remote)) = client.ends() {
            shared.tags.add(local, remote, Traffic::Control);
        }
        let batch: Vec<Registration> = needs
            .iter()
            .map(|(digest, targets, pages)| {
                let mut set = TargetSet::default();
                for t in targets {
                    set.insert(*t);
                }
                Registration { digest: *digest, targets: set, pages: *pages }
            })
            .collect();
        let ids = client.register(&batch)?;
        let unnamed = ids.iter().filter(|i| i.is_none()).count() as u64;
        client.done(unnamed)?;
        *lock(&self.index) = Some(client);
        Ok(())
    }

    /// Waits for this host's part of the share plan and makes hints of it; then asks the index about contents that
    /// appear after it, as long as VMs stream. Without the plan there is dedup inside this host only.
    pub(super) fn plan_and_ask(&self, shared: &Shared, group: &Group) {
        let mut client = lock(&self.index).take();
        let ends = client.as_ref().and_then(IndexClient::ends);
        let planned = self.take_plan(client.as_mut(), shared, group);
        self.part.complete();
        if let Some(client) = client.as_mut().filter(|_| planned) {
            let streaming = |(_, vm): &(SourceSpec, Arc<SourceVmShared>)| {
                use source::Phase as P;
                matches!(vm.status().phase, P::Waiting | P::Connecting | P::Migrating | P::Stopped)
            };
            let over = || group.cancelled.load(Ordering::Acquire) || !self.vms.iter().any(streaming);
            late::ask(&self.group, client, &self.late, over);
        }
        if let Some((local, remote)) = ends {
            shared.tags.remove(local, remote);
        }
    }

    /// Whether the plan came in time.
    fn take_plan(&self, client: Option<&mut IndexClient>, shared: &Shared, group: &Group) -> bool {
        let mut planned = false;
        if let Some(client) = client {
            // The group may leave meanwhile and take what was prepared along.
            let prepared = lock(&self.prepared).clone();
            let deadline = Instant::now() + Duration::from_millis(group.spec.timeouts.prepare_ms);
            match client.plan(deadline) {
                Ok(plan) => {
                    let promise = |plan: &HostPlan| {
                        prepare::apply_plan(&self.group, plan);
                        late::begin(&self.group);
                    };
                    match self.part.planned(plan, promise) {
                        Ok(()) => {
                            planned = true;
                            self.models(client, shared, group);
                        }
                        Err(late) => self.withdraw(&prepared, &late),
                    }
                }
                Err(e) => {
                    let why = format!("dedup inside this host only: {e}");
                    tracing::warn!("group {}: {why}", group.spec.name);
                    lock(&group.prepare).problem.get_or_insert_default().push_str(&why);
                }
            }
        }
        for ((spec, _), p) in self.vms.iter().zip(&mut *lock(&self.prepared)) {
            let table = lock(&self.group.tables[usize::from(spec.target.0)]);
            p.settle_hints(|d| table.is_lone(d));
        }
        planned
    }

    /// The group has left without its plan, which other hosts know: what this host was to carry does not come.
    fn withdraw(&self, prepared: &[PreparedVm], plan: &HostPlan) {
        tracing::warn!(
            "group {}: the share plan came when the group had left: {} contents are not carried",
            self.group.name,
            plan.carry.len()
        );
        let vms: Vec<_> = self.vms.iter().map(|(s, _)| s).zip(prepared).collect();
        push::withdraw::all(&self.group, &vms, &plan.carry);
    }

    /// Has the index choose contents that stand for many similar ones, lends those that are here and waits for those of
    /// others. What is this host's to carry of them joins its plan. Without them there are fewer differences.
    fn models(&self, client: &mut IndexClient, shared: &Shared, group: &Group) {
        if !group.spec.recipe.rack().is_some_and(|r| r.models) {
            return;
        }
        let prepared = lock(&self.prepared).clone();
        let vms: Vec<_> = self.vms.iter().map(|(s, _)| s).zip(&prepared).collect();
        let go_on = || !group.cancelled.load(Ordering::Acquire) && !group.started.load(Ordering::Acquire);
        let room = self.group.similar.room();
        let sketches = if room == 0 {
            std::collections::BTreeMap::new()
        } else {
            lend::sketches(&self.group, &vms, shared.config.prepare.rate_mib_s << 20, &go_on)
        };
        let told = sketches.iter().try_for_each(|(domain, items)| client.sketches(*domain, items));
        let models = match told.and_then(|()| client.models(room, Instant::now() + MODELS_WAIT)) {
            Ok(m) => m,
            Err(e) => {
                tracing::warn!("group {}: no contents are lent: {e}", group.spec.name);
                return;
            }
        };
        let carry: Vec<Carry> = models.lend.iter().map(|l| l.carry.clone()).collect();
        let promise = |carry: &[Carry]| {
            prepare::apply_plan(&self.group, &HostPlan { carry: carry.to_vec(), remote: Vec::new() });
        };
        if !self.part.models(carry, promise) {
            return;
        }
        let until = Instant::now() + MODELS_WAIT;
        lend::lend(&self.group, &vms, &models.lend, &|| go_on() && Instant::now() < until);
        let until = Instant::now() + PLAN_WAIT;
        if !lend::wait_borrowed(&self.group, models.borrows, &|| go_on() && Instant::now() < until) {
            tracing::warn!("group {}: not all contents came that others lend", group.spec.name);
        }
    }

    /// Models and plan, as far as they come within [`PLAN_WAIT`].
    fn planned(&self) -> (Vec<Carry>, HostPlan) {
        let part = self.part.take(PLAN_WAIT);
        if part.is_none() && self.part.is_awaited() {
            let group = &self.group.name;
            tracing::warn!("group {group}: no share plan in time: dedup inside this host only");
        }
        part.unwrap_or_default()
    }

    /// Push, then the VMs: one after another (`core::stagger`), so many at a time as the group wants and the link bears
    /// (`core::forecast::next`).
    pub(super) fn run(self: &Arc<Self>, shared: &Arc<Shared>, group: &Arc<Group>) {
        let places = usize::from(group.spec.parallel.unwrap_or(u16::MAX)).max(1);
        // What is pushed is pages of VMs that leave at once: their time runs.
        if places >= self.vms.len() {
            self.vms.iter().for_each(|(_, vm)| vm.starts_now());
        }
        let (models, plan) = self.planned();
        let prepared = std::mem::take(&mut *lock(&self.prepared));
        let prepared = Arc::new(prepared);
        let pushes = !(models.is_empty() && plan.carry.is_empty());
        let push = pushes.then(|| self.start_push(prepared.clone(), models, plan)).flatten();
        if let Some(push) = &push {
            self.pushing.store(true, Ordering::Relaxed);
            let go_on = || !self.mostly_pushed() && !group.cancelled.load(Ordering::Acquire);
            while !push.is_finished() && go_on() {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.pushing.store(false, Ordering::Relaxed);
        }
        tracing::debug!("group {}: the streams begin", self.group.name);
        let bandwidth = shared.bandwidth(group).map_or(0.0, |bits| bits as f64 / 8.0);
        let writes = lock(&self.writes).clone();
        let load = |i: usize| writes.get(i).copied().unwrap_or_default();
        let mut waiting: Vec<usize> = (0..self.vms.len().min(prepared.len())).collect();
        let mut begun: Vec<(usize, Arc<SourceVmShared>)> = Vec::new();
        // A VM whose outcome stands makes room, though its thread may still be telling the target.
        let over =
            |h: &SourceVmShared| matches!(h.status().phase, source::Phase::Moved | source::Phase::Stayed);
        // VMs that a gang migration moves leave together: that is what it is. With post-copy all are to run at their
        // targets as soon as may be.
        let pre_copy = self.group.options.migration == Migration::PreCopy;
        // Nor is there anything to learn from the first for those that leave without this agent.
        let direct = self.group.direct.load(Ordering::Relaxed);
        let staggered = group.spec.recipe.rack().is_some() && pre_copy && !direct;
        let mut turn = Turn::default();
        while !waiting.is_empty() {
            if group.cancelled.load(Ordering::Acquire) {
                for i in waiting {
                    self.vms[i].1.never_left(NEVER_LEFT);
                }
                return;
            }
            let before = begun.len();
            begun.retain(|(_, h)| !over(h));
            if begun.len() != before {
                turn.changed();
            }
            if staggered && !turn.comes(begun.iter().map(|(_, h)| h)) {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            let here: Vec<Departure> = waiting.iter().map(|i| load(*i)).collect();
            let leaving: Vec<Departure> = begun.iter().map(|(i, _)| load(*i)).collect();
            let Some(n) = next(&here, &leaving, bandwidth, places) else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            let i = waiting.remove(n);
            if self.leaves(shared, group, i, prepared[i].for_stream()) {
                begun.push((i, self.vms[i].1.clone()));
                turn.changed();
            }
        }
    }

    /// Has VM `i` leave, on a thread of its own; whether it does. The others go on in any case.
    fn leaves(self: &Arc<Self>, shared: &Arc<Shared>, group: &Group, i: usize, vm: PreparedVm) -> bool {
        let (spec, handle) = self.vms[i].clone();
        let Some(v) = group.spec.vms.iter().find(|v| v.ix == spec.vm.0) else {
            handle.never_left("the group's list of VMs has not got it");
            return false;
        };
        let peer = self.group.targets[usize::from(spec.target.0)];
        let rec = record(&group.spec, v, Role::Source, peer, false);
        let (agent, flow) = (shared.clone(), self.group.clone());
        // It may end before it is connected to.
        let claim = shared.registry.get(&group.spec.name, &group.spec.token, &v.name, Role::Source);
        let process = claim.and_then(|c| c.process);
        tracing::debug!("{}: leaves", spec.name);
        let own = handle.clone();
        let run = move || {
            source::vm::run(&flow, &spec, (vm, process), &own, source_journal(&agent, rec.clone()));
            settled(&agent, rec, &own);
        };
        let begun = std::thread::Builder::new().name(format!("irlm-src-{}", v.ix)).spawn(run);
        if let Err(e) = &begun {
            tracing::error!("{}: no thread: {e}", v.name);
            handle.never_left(&format!("it did not begin to leave: no thread for it at its source: {e}"));
        }
        begun.is_ok()
    }

    /// Begins to push; on a thread of its own, if one is to be had, else it has been done on return.
    fn start_push(
        self: &Arc<Self>,
        prepared: Arc<Vec<PreparedVm>>,
        models: Vec<Carry>,
        plan: HostPlan,
    ) -> Option<std::thread::JoinHandle<()>> {
        self.push.total.store((models.len() + plan.carry.len()) as u64, Ordering::Relaxed);
        let work = Arc::new((prepared, models, plan));
        let (own, theirs) = (self.clone(), work.clone());
        std::thread::Builder::new()
            .name("irlm-push".into())
            .spawn(move || own.push_all(&theirs))
            .inspect_err(|e| {
                // Others' VMs refer to what this host was to carry.
                tracing::error!("no thread to push on, so the streams wait for the push: {e}");
                self.push_all(&work);
            })
            .ok()
    }

    fn push_all(&self, (prepared, models, plan): &(Arc<Vec<PreparedVm>>, Vec<Carry>, HostPlan)) {
        let pairs: Vec<_> = self.vms.iter().map(|(s, _)| s).zip(prepared.iter()).collect();
        tracing::debug!("group {}: the push begins", self.group.name);
        push::push(&self.group, &pairs, (models, plan), &self.push);
        tracing::debug!("group {}: the push is over", self.group.name);
    }

    /// Whether the streams may begin beside the rest of the push: early enough that no link idles between the two,
    /// late enough that what the first pages refer to has mostly arrived.
    fn mostly_pushed(&self) -> bool {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let done = get(&self.push.sent) + get(&self.push.void);
        done * 10 >= get(&self.push.total) * PUSHED_TENTHS
    }
}

/// After a departure's thread has ended: if both sides know the outcome, a restart has nothing to do for it.
pub(in super::super) fn settled(shared: &Shared, mut rec: VmRecord, handle: &SourceVmShared) {
    let st = handle.status();
    if !st.settled {
        return;
    }
    rec.settled = true;
    let state = if st.phase == source::Phase::Moved { JournalState::Done } else { JournalState::Aborted };
    if let Err(e) = put(shared, &mut rec, state) {
        tracing::warn!("{e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_never_left_stays_with_the_reason_and_one_that_leaves_is_not_told_so() {
        let vm = SourceVmShared::new().unwrap();
        vm.never_left("no thread");
        let st = vm.status();
        assert_eq!((st.phase, st.reason.as_str(), st.settled), (source::Phase::Stayed, "no thread", true));
        let vm = SourceVmShared::new().unwrap();
        lock(&vm.status).phase = source::Phase::Migrating;
        vm.never_left("no thread");
        assert_eq!((vm.status().phase, vm.status().settled), (source::Phase::Migrating, false));
    }
}
