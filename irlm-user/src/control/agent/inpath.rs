//! A group whose pages pass through the agents (`gm`, `irlm`): preparation and plan on the source side, the flows of
//! both sides, and what they say of themselves as the control protocol's words.

// The target side: arrivals, and what they share.
mod arrive;
// The source side: index, plan, push, departures.
mod departure;
// Whether the agent would only be in the way.
mod direct;
// The plan's part, as it comes.
mod part;
// The handles on its VMs: what is decided about them, and what is given back when all are over.
mod handles;
// Preparation of both sides.
mod prepare;
// Which way its pages go.
mod route;
// Reading the VMs, and watching where they write.
mod scan;
// What both sides hold.
mod side;
// What is taken up after a restart.
mod taken_up;
// Whose turn it is to leave.
mod turn;
// What both sides say of themselves.
mod words;

use super::{Group, GroupSpec, HostCounters, Shared, StartPart, VmStatus};
use crate::control::api::{PrepareStatus, Refusal};
use crate::control::recipe::Proxied;
use crate::core::arrival::Patience;
use crate::core::units::PAGE_SIZE;
use crate::flow::lock;
use crate::flow::pace::Pacer;
use side::{SourceSide, TargetSide};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use words::{multicast_counters, source_status, target_status};

/// Tenths of the push that are done before the streams begin (docs/decisions/0001).
const PUSHED_TENTHS: u64 = 6;
/// How long the group's start waits for the share plan before it goes on without, and a host that is ready for contents that
/// others lend.
const PLAN_WAIT: Duration = Duration::from_secs(10);
/// How long a source host waits until all others have said what their pages look like, and how long it lends then.
const MODELS_WAIT: Duration = Duration::from_secs(60);

/// Both sides of the group at this agent.
#[derive(Debug)]
pub(super) struct InPath {
    source: Option<Arc<SourceSide>>,
    target: Option<TargetSide>,
    patience: Patience,
}

impl InPath {
    pub(super) fn new(
        shared: &Shared,
        (spec, proxied): (&GroupSpec, &Proxied),
        pacer: &Arc<Pacer>,
    ) -> std::io::Result<Self> {
        let source =
            spec.my_source.map(|me| SourceSide::new(shared, (spec, proxied), me, pacer)).transpose()?;
        let target = spec.my_target.map(|me| TargetSide::new(spec, proxied, me)).transpose()?;
        let patience = Patience { running_ms: spec.timeouts.wait_ms, ..Patience::default() };
        Ok(Self { source, target, patience })
    }

    /// Runs on a thread of its own.
    pub(super) fn prepare(&self, shared: &Arc<Shared>, group: &Arc<Group>) -> Result<(), Refusal> {
        if let Some(t) = &self.target {
            t.prepare(shared, group)?;
        }
        self.source.as_ref().map_or(Ok(()), |s| s.prepare(shared, group))
    }

    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        group: &Arc<Group>,
        leave_paused: bool,
        part: StartPart,
    ) -> Result<(), Refusal> {
        if let Some(t) = self.target.as_ref().filter(|_| part.targets()) {
            t.start(shared, group, self.patience, leave_paused);
        }
        if let Some(s) = self.source.as_ref().filter(|_| part.sources()) {
            let (own, agent, of) = (s.clone(), shared.clone(), group.clone());
            std::thread::Builder::new()
                .name("irlm-source".into())
                .spawn(move || own.run(&agent, &of))
                .map_err(|e| {
                    let why = format!("no thread to start it on: {e}");
                    s.vms.iter().for_each(|(_, vm)| vm.never_began(&why));
                    Refusal::failed(why)
                })?;
        }
        Ok(())
    }

    pub(super) fn cancel(&self, why: &str) {
        if let Some(s) = &self.source {
            s.scan.cancel.store(true, Ordering::Relaxed);
            s.push.cancel.store(true, Ordering::Relaxed);
            for (_, vm) in &s.vms {
                vm.cancel(why);
            }
        }
        if let Some(t) = &self.target {
            for (_, vm) in &t.vms {
                vm.cancel(why);
            }
        }
    }

    pub(super) fn forget(&self) {
        if let Some(s) = &self.source {
            for (_, vm) in &s.vms {
                vm.forget();
            }
        }
        if let Some(t) = &self.target {
            for (_, vm) in &t.vms {
                vm.forget();
            }
        }
    }

    /// How far the preparation is.
    pub(super) fn progress(&self, st: &mut PrepareStatus) {
        if let Some(s) = &self.source {
            st.pages_total = s.scan.total.load(Ordering::Relaxed);
            st.pages_done = s.scan.pages.load(Ordering::Relaxed);
            st.hot = s.scan.hot.load(Ordering::Relaxed);
            st.planning = s.part.is_awaited();
        }
    }

    /// Whether planned contents are still being pushed, for other hosts' VMs too.
    pub(super) fn pushes(&self) -> bool {
        self.source.as_ref().is_some_and(|s| s.push.left() > 0)
    }

    pub(super) fn host_counters(&self) -> HostCounters {
        let mut c = HostCounters::default();
        if let Some(s) = &self.source {
            c.direct = s.group.direct.load(Ordering::Relaxed);
            c.push_left = s.push.left();
            c.push_sent = s.push.sent.load(Ordering::Relaxed);
            c.push_void = s.push.void.load(Ordering::Relaxed);
            c.late_asked = s.late.asked.load(Ordering::Relaxed);
            c.late_known = s.late.known.load(Ordering::Relaxed);
            c.push_bytes = s.push.bytes.load(Ordering::Relaxed);
            c.kept_bytes = s.group.similar.bytes();
            c.lent = s.group.lending.lent.load(Ordering::Relaxed);
            c.lent_bytes = s.group.lending.bytes.load(Ordering::Relaxed);
            c.borrowed = s.group.lending.borrowed.load(Ordering::Relaxed);
            c.work = s.group.work.snapshot().into();
            c.push_hashed = s.push.hashed.load(Ordering::Relaxed);
            c.push_kept = s.push.kept.load(Ordering::Relaxed);
            c.push_hash_ns = s.push.hash_ns.load(Ordering::Relaxed);
        }
        if let Some(t) = &self.target {
            c.populated_bytes = t.populated.load(Ordering::Relaxed);
        }
        if let Some(t) = &self.target
            && let Some(g) = &*lock(&t.group)
        {
            let (_, pages, _) = g.stats();
            c.store_pages = pages as u64;
            c.store_bytes = pages as u64 * PAGE_SIZE as u64;
            (_, c.forwarded_pages) = g.counted();
            c.forwarded_bytes = g.counts.forwarded_wire.load(Ordering::Relaxed);
            c.shared_pages = g.counts.to_forward.load(Ordering::Relaxed);
            c.multicast = g.multicast_counts().map(|m| multicast_counters(&m));
            c.forwarded_bytes += c.multicast.map_or(0, |m| m.sent_bytes + m.repaired_bytes);
            c.kept_bytes += g.kept_bytes();
            c.work.add(&g.counts.work.snapshot().into());
        }
        c
    }

    pub(super) fn vms(&self, group: &Group) -> Vec<VmStatus> {
        let mut out = Vec::new();
        let cancelled = group.cancelled.load(Ordering::Acquire);
        let leaves = lock(&group.begun).1;
        for v in &group.spec.vms {
            if let Some(s) = &self.source
                && let Some((_, h)) = s.vms.iter().find(|(spec, _)| spec.vm.0 == v.ix)
            {
                let pushing = s.pushing.load(Ordering::Relaxed);
                out.push(source_status(v, h, (cancelled, leaves), pushing));
            }
            if let Some(t) = &self.target
                && let Some((_, h)) = t.vms.iter().find(|(spec, _)| spec.vm.0 == v.ix)
            {
                let paused = lock(&t.group).as_ref().is_some_and(|g| g.options.leave_paused);
                out.push(target_status(v, h, cancelled, paused));
            }
        }
        out
    }
}
