//! What an agent holds of a group's source side and of its target side.

use super::super::purse::Share;
use super::super::{GroupSpec, Shared};
use super::part::Part;
use super::route::Route;
use crate::control::recipe::Proxied;
use crate::core::digest::Hasher;
use crate::core::forecast::Departure;
use crate::core::pair::PairTable;
use crate::core::units::{HostIx, VmIx};
use crate::flow::arrival::{TargetGroup, TargetSpec, TargetVmShared};
use crate::flow::hosts::Hosts;
use crate::flow::index::client::IndexClient;
use crate::flow::pace::Pacer;
use crate::flow::source::late::LateProgress;
use crate::flow::source::lend;
use crate::flow::source::prepare::{PrepareProgress, PreparedVm};
use crate::flow::source::push::PushProgress;
use crate::flow::source::similar::Similar;
use crate::flow::source::{DepartureOptions, SourceGroup, SourceSpec, SourceVmShared, Squeezing};
use crate::flow::squeeze::Workers;
use crate::flow::work::Work;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Distinct digests a host remembers towards one target host: 256 GiB of distinct pages. At the bound further contents
/// travel as unique (`core::pair`).
const MAX_TABLE: usize = 1 << 26;
/// Bytes that one takes, at the worst: a table that grows is there twice for a moment.
const ENTRY: u64 = 48;

/// The VMs that leave a host, and what they leave with.
#[derive(Debug)]
pub(super) struct SourceSide {
    pub(super) group: Arc<SourceGroup>,
    pub(super) vms: Vec<(SourceSpec, Arc<SourceVmShared>)>,
    pub(super) prepared: Mutex<Vec<PreparedVm>>,
    /// Which way the group's pages go, once that is decided for all its source hosts.
    pub(super) route: Route,
    /// The index, from registration until the plan is asked for.
    pub(super) index: Mutex<Option<IndexClient>>,
    /// What this host carries of the plan, and of what pages of others resemble.
    pub(super) part: Part,
    pub(super) scan: PrepareProgress,
    pub(super) push: PushProgress,
    pub(super) late: LateProgress,
    pub(super) pushing: AtomicBool,
    /// How each VM writes, as far as preparation could see.
    pub(super) writes: Mutex<Vec<Departure>>,
    /// What it has of the agent's memory: for tables, and for contents kept for differences.
    pub(super) shares: Mutex<[Share; 2]>,
}

/// The VMs that reach a host.
#[derive(Debug)]
pub(super) struct TargetSide {
    pub(super) proxied: Proxied,
    pub(super) vms: Vec<(TargetSpec, Arc<TargetVmShared>)>,
    pub(super) group: Mutex<Option<Arc<TargetGroup>>>,
    pub(super) me: HostIx,
    /// Memory made beforehand, bytes.
    pub(super) populated: AtomicU64,
    /// What it has of the agent's memory: for the store, and for contents kept for differences.
    pub(super) shares: Mutex<[Share; 2]>,
}

/// A trust domain's number.
fn domain(spec: &GroupSpec, tenant: &str) -> u16 {
    spec.tenants.iter().position(|t| t == tenant).unwrap_or(0) as u16
}

pub(in super::super) fn hashers(spec: &GroupSpec, proxied: &Proxied) -> Vec<Hasher> {
    spec.tenants.iter().map(|t| Hasher::new(proxied.digest, &spec.token.0, t)).collect()
}

/// Memory for contents that are kept for differences, if there are VMs here.
pub(super) fn kept(shared: &Shared, proxied: &Proxied, vms: usize) -> Share {
    let useful = vms > 0 && proxied.contents.differences();
    let wanted = if useful { shared.config.kept_mib << 20 } else { 0 };
    shared.contents.take(wanted)
}

/// How many digests each table holds of so many in all: by how many VMs go to its target host.
fn tables(digests: u64, targets: usize, vms: &[(SourceSpec, Arc<SourceVmShared>)]) -> Vec<usize> {
    let all = vms.len().max(1) as u64;
    let part = |t: usize| {
        let here = vms.iter().filter(|(s, _)| usize::from(s.target.0) == t).count() as u64;
        usize::try_from(digests / all * here).unwrap_or(usize::MAX).min(MAX_TABLE)
    };
    (0..targets).map(part).collect()
}

/// Threads that may compress beside those of `vms` departing VMs, as far as so many leave at a time.
fn workers(shared: &Shared, spec: &GroupSpec, vms: usize) -> usize {
    let at_a_time = vms.min(usize::from(spec.parallel.unwrap_or(u16::MAX)).max(1));
    let spare = || std::thread::available_parallelism().map_or(0, |n| n.get().saturating_sub(at_a_time));
    shared.config.workers.map_or_else(spare, usize::from)
}

/// The names by which the group's hosts are known to each other.
pub(super) fn hosts(spec: &GroupSpec) -> Arc<Hosts> {
    Arc::new(Hosts {
        sources: spec.sources.iter().map(|h| h.name.clone()).collect(),
        targets: spec.targets.iter().map(|h| h.name.clone()).collect(),
    })
}

fn source_group(
    shared: &Shared,
    (spec, proxied): (&GroupSpec, &Proxied),
    (me, vms): (HostIx, &[(SourceSpec, Arc<SourceVmShared>)]),
    pacer: &Arc<Pacer>,
    shares: &[Share; 2],
) -> Arc<SourceGroup> {
    let most = tables(shares[0].bytes() / ENTRY, spec.targets.len(), vms);
    Arc::new(SourceGroup {
        name: spec.name.clone(),
        token: spec.token.0,
        me,
        targets: spec.targets.iter().map(|t| t.data).collect(),
        hashers: hashers(spec, proxied),
        tables: most.into_iter().map(|most| Mutex::new(PairTable::new(me, most))).collect(),
        options: DepartureOptions {
            downtime_ms: spec.downtime_ms,
            longest: Duration::from_millis(spec.timeouts.move_ms),
            compress: proxied.contents.across(),
            hold_back: proxied.hold_back,
            verify: proxied.verify,
            migration: proxied.migration,
            security: shared.security.clone(),
            hosts: hosts(spec),
            drill: shared.drill.clone(),
        },
        timeouts: shared.timeouts,
        tags: shared.tags.clone(),
        pacer: pacer.clone(),
        similar: Similar::new(vms.iter().map(|(s, _)| (s.target, s.domain)), shares[1].bytes()),
        lending: lend::Lending::new(spec.sources.iter().map(|s| s.data).collect()),
        squeezing: Squeezing {
            windows: shared.windows.clone(),
            workers: Arc::new(Workers::new(workers(shared, spec, vms.len()))),
            edge: Arc::default(),
        },
        direct: AtomicBool::new(false),
        work: Work::default(),
    })
}

impl SourceSide {
    /// For source host number `me` of the group.
    pub(super) fn new(
        shared: &Shared,
        (spec, proxied): (&GroupSpec, &Proxied),
        me: u16,
        pacer: &Arc<Pacer>,
    ) -> std::io::Result<Arc<Self>> {
        let me = HostIx(me);
        let mut vms = Vec::new();
        for v in spec.vms.iter().filter(|v| v.source == me.0) {
            let s = SourceSpec {
                vm: VmIx(v.ix),
                name: v.name.clone(),
                target: HostIx(v.target),
                domain: domain(spec, &v.tenant),
                front: v.source_front.clone(),
            };
            vms.push((s, Arc::new(SourceVmShared::new()?)));
        }
        // Without VMs here there is nothing to remember.
        let wanted = if vms.is_empty() { 0 } else { spec.targets.len() as u64 * MAX_TABLE as u64 * ENTRY };
        let shares = [shared.tables.take(wanted), kept(shared, proxied, vms.len())];
        Ok(Arc::new(Self {
            group: source_group(shared, (spec, proxied), (me, &vms), pacer, &shares),
            shares: Mutex::new(shares),
            vms,
            prepared: Mutex::default(),
            route: Route::default(),
            index: Mutex::default(),
            part: Part::default(),
            scan: PrepareProgress::default(),
            push: PushProgress::default(),
            late: LateProgress::default(),
            pushing: AtomicBool::new(false),
            writes: Mutex::default(),
        }))
    }
}

impl TargetSide {
    /// For target host number `me` of the group.
    pub(super) fn new(spec: &GroupSpec, proxied: &Proxied, me: u16) -> std::io::Result<Self> {
        let mut vms = Vec::new();
        for v in spec.vms.iter().filter(|v| v.target == me) {
            let s = TargetSpec {
                vm: VmIx(v.ix),
                name: v.name.clone(),
                source: HostIx(v.source),
                domain: domain(spec, &v.tenant),
                front: v.target_front.clone(),
            };
            vms.push((s, Arc::new(TargetVmShared::new()?)));
        }
        Ok(Self {
            proxied: proxied.clone(),
            vms,
            group: Mutex::new(None),
            me: HostIx(me),
            populated: AtomicU64::new(0),
            shares: Mutex::default(),
        })
    }
}
