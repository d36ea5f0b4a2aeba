//! A group whose pages pass through the agents (`gm`, `irlm`): preparation and plan on the source side, the flows of
//! both sides, and what they say of themselves as the control protocol's words.

// The source side: index, plan, push, departures.
mod departure;
// Whether the agent would only be in the way.
mod direct;
// The plan's part, as it comes.
mod part;
// The handles on its VMs: what is decided about them, and what is given back when all are over.
mod handles;
// Reading the VMs, and watching where they write.
mod scan;
// What is taken up after a restart.
mod taken_up;
// Whose turn it is to leave.
mod turn;
// What both sides say of themselves.
mod words;

use super::{Group, GroupSpec, HostCounters, Role, Shared, StartPart, VmStatus, record};
use crate::control::api::PrepareStatus;
use crate::control::recipe::Proxied;
use crate::core::arrival::{Patience, TargetHost};
use crate::core::digest::Hasher;
use crate::core::forecast::Departure;
use crate::core::pair::PairTable;
use crate::core::units::{HostIx, PAGE_SIZE, VmIx};
use crate::flow::arrival::{self, TargetGroup, TargetSpec, TargetVmShared, cast::CastConfig, peers::Peers};
use crate::flow::index::client::IndexClient;
use crate::flow::lock;
use crate::flow::pace::Pacer;
use crate::flow::source::late::LateProgress;
use crate::flow::source::lend;
use crate::flow::source::prepare::{self, PrepareProgress, PreparedVm};
use crate::flow::source::push::PushProgress;
use crate::flow::source::similar::Similar;
use crate::flow::source::{DepartureOptions, SourceGroup, SourceSpec, SourceVmShared, Squeezing};
use crate::flow::squeeze::Workers;
use crate::flow::work::{Laps, Stage, Work};
use crate::host::sched;
use part::Part;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use words::{multicast_counters, source_status, target_journal, target_status};

/// Distinct digests a host remembers towards one target host: 256 GiB of distinct pages, some 3 GiB of table at the
/// worst. At the bound further contents travel as unique (`core::pair`).
const MAX_TABLE: usize = 1 << 26;

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

#[derive(Debug)]
struct SourceSide {
    group: Arc<SourceGroup>,
    vms: Vec<(SourceSpec, Arc<SourceVmShared>)>,
    prepared: Mutex<Vec<PreparedVm>>,
    /// Which way the group's pages go, once that is decided for all its source hosts.
    route: direct::Route,
    /// The index, from registration until the plan is asked for.
    index: Mutex<Option<IndexClient>>,
    /// What this host carries of the plan, and of what pages of others resemble.
    part: Part,
    scan: PrepareProgress,
    push: PushProgress,
    late: LateProgress,
    pushing: AtomicBool,
    /// How each VM writes, as far as preparation could see.
    writes: Mutex<Vec<Departure>>,
}

#[derive(Debug)]
struct TargetSide {
    proxied: Proxied,
    vms: Vec<(TargetSpec, Arc<TargetVmShared>)>,
    group: Mutex<Option<Arc<TargetGroup>>>,
    me: HostIx,
    /// Memory made beforehand, bytes.
    populated: AtomicU64,
}

pub(super) fn hashers(spec: &GroupSpec, proxied: &Proxied) -> Vec<Hasher> {
    spec.tenants.iter().map(|t| Hasher::new(proxied.digest, &spec.token.0, t)).collect()
}

/// Most bytes of contents that are kept for differences.
fn kept_bytes(shared: &Shared, proxied: &Proxied) -> u64 {
    if proxied.contents.differences() { shared.config.kept_mib << 20 } else { 0 }
}

/// Threads that may compress beside those of `vms` departing VMs, as far as so many leave at a time.
fn workers(shared: &Shared, spec: &GroupSpec, vms: usize) -> usize {
    let at_a_time = vms.min(usize::from(spec.parallel.unwrap_or(u16::MAX)).max(1));
    let spare = || std::thread::available_parallelism().map_or(0, |n| n.get().saturating_sub(at_a_time));
    shared.config.workers.map_or_else(spare, usize::from)
}

impl InPath {
    pub(super) fn new(
        shared: &Shared,
        (spec, proxied): (&GroupSpec, &Proxied),
        pacer: &Arc<Pacer>,
    ) -> std::io::Result<Self> {
        let domain = |tenant: &str| spec.tenants.iter().position(|t| t == tenant).unwrap_or(0) as u16;
        let source = match spec.my_source {
            None => None,
            Some(me) => {
                let me = HostIx(me);
                let mut vms = Vec::new();
                for v in spec.vms.iter().filter(|v| v.source == me.0) {
                    let s = SourceSpec {
                        vm: VmIx(v.ix),
                        name: v.name.clone(),
                        target: HostIx(v.target),
                        domain: domain(&v.tenant),
                        front: v.source_front.clone(),
                    };
                    vms.push((s, Arc::new(SourceVmShared::new()?)));
                }
                let group = Arc::new(SourceGroup {
                    name: spec.name.clone(),
                    token: spec.token.0,
                    me,
                    targets: spec.targets.iter().map(|t| t.data).collect(),
                    hashers: hashers(spec, proxied),
                    tables: spec.targets.iter().map(|_| Mutex::new(PairTable::new(me, MAX_TABLE))).collect(),
                    options: DepartureOptions {
                        downtime_ms: spec.downtime_ms,
                        longest: Duration::from_millis(spec.timeouts.move_ms),
                        compress: proxied.contents.across(),
                        hold_back: proxied.hold_back,
                        migration: proxied.migration,
                        drill: shared.drill.clone(),
                    },
                    timeouts: shared.timeouts,
                    tags: shared.tags.clone(),
                    pacer: pacer.clone(),
                    similar: Similar::new(
                        vms.iter().map(|(s, _)| (s.target, s.domain)),
                        kept_bytes(shared, proxied),
                    ),
                    lending: lend::Lending::new(spec.sources.iter().map(|s| s.data).collect()),
                    squeezing: Squeezing {
                        windows: shared.windows.clone(),
                        workers: Arc::new(Workers::new(workers(shared, spec, vms.len()))),
                        edge: Arc::default(),
                    },
                    direct: AtomicBool::new(false),
                    work: Work::default(),
                });
                Some(Arc::new(SourceSide {
                    group,
                    vms,
                    prepared: Mutex::default(),
                    route: direct::Route::default(),
                    index: Mutex::default(),
                    part: Part::default(),
                    scan: PrepareProgress::default(),
                    push: PushProgress::default(),
                    late: LateProgress::default(),
                    pushing: AtomicBool::new(false),
                    writes: Mutex::default(),
                }))
            }
        };
        let target = match spec.my_target {
            None => None,
            Some(me) => {
                let mut vms = Vec::new();
                for v in spec.vms.iter().filter(|v| v.target == me) {
                    let s = TargetSpec {
                        vm: VmIx(v.ix),
                        name: v.name.clone(),
                        source: HostIx(v.source),
                        domain: domain(&v.tenant),
                        front: v.target_front.clone(),
                    };
                    vms.push((s, Arc::new(TargetVmShared::new()?)));
                }
                Some(TargetSide {
                    proxied: proxied.clone(),
                    vms,
                    group: Mutex::new(None),
                    me: HostIx(me),
                    populated: AtomicU64::new(0),
                })
            }
        };
        let patience = Patience { running_ms: spec.timeouts.wait_ms, ..Patience::default() };
        Ok(Self { source, target, patience })
    }

    /// Runs on a thread of its own, at idle priority.
    pub(super) fn prepare(&self, shared: &Arc<Shared>, group: &Arc<Group>) -> Result<(), String> {
        if let Some(t) = &self.target {
            for (spec, _) in &t.vms {
                spec.front.greet(shared.timeouts.setup).map_err(|e| format!("{}: {e}", spec.name))?;
            }
            if shared.config.prepare.populate {
                for (spec, _) in &t.vms {
                    if group.cancelled.load(Ordering::Acquire) {
                        return Err("cancelled".into());
                    }
                    match arrival::populate::populate(&spec.front, shared.timeouts.setup) {
                        Ok(bytes) => drop(t.populated.fetch_add(bytes, Ordering::Relaxed)),
                        // It will be made as it comes.
                        Err(e) => tracing::warn!("{}: its memory is not made beforehand: {e}", spec.name),
                    }
                }
            }
            // From here on the link to this host may be measured.
            shared.door.expect(&group.spec.name, group.spec.token.0);
        }
        let Some(s) = &self.source else { return Ok(()) };
        if s.goes_direct(shared, group) {
            return s.prepare_direct(shared, group);
        }
        if shared.config.prepare.idle {
            match sched::idle_this_thread() {
                Ok(sched::GivesWay::Idle) => {}
                Ok(sched::GivesWay::Nice { refused }) => {
                    tracing::warn!("preparation runs at nice 19: the kernel refuses SCHED_IDLE ({refused})");
                }
                Err(e) => tracing::warn!("preparation runs at normal priority: {e}"),
            }
        }
        if group.spec.recipe.rack().is_some_and(|r| r.models) {
            shared.door.borrow_for(s.group.clone());
        }
        let mut problems = Vec::new();
        let mut opened = Vec::new();
        let mut total = 0;
        for (spec, _) in &s.vms {
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
                    spec.front.greet(shared.timeouts.setup).map_err(|e| format!("{}: {e}", spec.name))?;
                    problems.push(format!("{}: no dedup: {e}", spec.name));
                    opened.push(prepare::Opened::default());
                }
            }
        }
        s.scan.total.store(total, Ordering::Relaxed);
        let mut laps = Laps::begin();
        let prepared = s.scan_all(shared, &opened, &mut problems)?;
        laps.lap(&s.group.work, Stage::Hash);
        let pairs: Vec<_> = s.vms.iter().map(|(s, _)| s).zip(&prepared).collect();
        let needs = prepare::needs_by_digest(&pairs);
        lock(&group.prepare).distinct = needs.len() as u64;
        if group.spec.recipe.rack().is_some()
            && let Err(e) = s.register(shared, group, &needs)
        {
            // Losing the index costs bandwidth, never correctness.
            problems.push(format!("dedup inside this host only: {e}"));
        }
        laps.lap(&s.group.work, Stage::Other);
        if !problems.is_empty() {
            for p in &problems {
                tracing::warn!("group {}: {p}", group.spec.name);
            }
            lock(&group.prepare).problem = Some(problems.join("; "));
        }
        *lock(&s.prepared) = prepared;
        // The plan is made when the last host has registered. It is fetched as soon as it is there, so that the start
        // of the group does not wait for it, and this host is ready without it.
        s.part.expect();
        let (side, agent, own) = (s.clone(), shared.clone(), group.clone());
        std::thread::Builder::new()
            .name("irlm-plan".into())
            .spawn(move || side.plan_and_ask(&agent, &own))
            .map_err(|e| e.to_string())?;
        Ok(())
    }

    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        group: &Arc<Group>,
        leave_paused: bool,
        part: StartPart,
    ) -> Result<(), String> {
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
                    why
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

impl TargetSide {
    fn group(
        &self,
        shared: &Shared,
        spec: &GroupSpec,
        patience: Patience,
        leave_paused: bool,
        budget_pages: usize,
    ) -> Arc<TargetGroup> {
        let mut flow = TargetGroup::new(
            arrival::Member {
                name: spec.name.clone(),
                token: spec.token.0,
                me: self.me,
                hashers: hashers(spec, &self.proxied),
            },
            TargetHost::new(budget_pages, budget_pages.saturating_mul(4).saturating_add(1 << 20)),
            Peers::new(spec.targets.iter().map(|t| t.data).collect()),
            shared.timeouts,
            shared.tags.clone(),
            arrival::ArrivalOptions {
                patience,
                socket_dir: shared.sockets.clone(),
                compress: self.proxied.contents.passed_on(),
                leave_paused,
                hold_placing: Duration::from_millis(shared.drill.hold_placing_ms),
            },
        );
        flow.windows = shared.windows.clone();
        flow.keep(self.vms.iter().map(|(t, _)| (t.source, t.domain)), kept_bytes(shared, &self.proxied));
        Arc::new(flow)
    }

    fn start(&self, shared: &Arc<Shared>, group: &Arc<Group>, patience: Patience, leave_paused: bool) {
        let spec = &group.spec;
        let budget =
            usize::try_from((shared.config.store_mib << 20) / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        let flow = self.group(shared, spec, patience, leave_paused, budget);
        for (t, handle) in &self.vms {
            handle.comes_from(t.source);
            flow.expect(t.vm, handle);
            let Some(v) = spec.vms.iter().find(|v| v.ix == t.vm.0 && v.target == self.me.0) else { continue };
            let peer = spec.sources[usize::from(t.source.0)].agent;
            let rec = record(spec, v, Role::Target, peer, leave_paused);
            let journal = target_journal(shared, rec);
            let (flow, own, of) = (flow.clone(), t.clone(), handle.clone());
            let begun = std::thread::Builder::new()
                .name(format!("irlm-dst-{}", t.vm.0))
                .spawn(move || arrival::vm::run(&flow, &own, &of, journal));
            if let Err(e) = begun {
                // Nobody will wait for it, and its source is told when it calls.
                tracing::error!("{}: no thread: {e}", t.name);
                handle.never_began(&format!("no thread for it to arrive on: {e}"));
                shared.registry.release(&spec.name, &spec.token, &t.name, Role::Target);
            }
        }
        if let Some(m) = spec.recipe.rack().and_then(|r| r.multicast) {
            let bytes = |mbit: u64| mbit.saturating_mul(1_000_000 / 8);
            let half = shared.link_mbit().map_or(500, |mbit| mbit / 2);
            let config = CastConfig {
                group: m.group,
                mtu: m.mtu,
                floor: bytes(m.floor_mbit),
                ceiling: bytes(m.ceiling_mbit.unwrap_or(half)),
                drop_per_mille: shared.drill.drop_multicast,
                looped: false,
            };
            let hosts: Vec<_> = spec.targets.iter().map(|t| t.data).collect();
            if let Err(e) = flow.multicast(config, &hosts) {
                let name = &spec.name;
                tracing::warn!("group {name}: no multicast by {}: {e}; contents go by unicast", m.group);
            }
        }
        *lock(&self.group) = Some(flow.clone());
        shared.door.admit(flow);
    }
}
