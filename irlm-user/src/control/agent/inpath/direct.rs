//! Whether this host's VMs leave without the agent in their path, and what is left to prepare then.
//!
//! Each source host says what its links give; the coordinator decides for the group, because a host that goes direct
//! carries and lends nothing, and others would wait for it. A host goes direct only if it is told to.

use super::super::{Code, Group, Refusal, Reply, Shared, Token, Work};
use super::side::SourceSide;
use crate::core::direct::{Direct, needed};
use crate::core::plan::HostPlan;
use crate::core::wire::messages::Purpose;
use crate::flow::source::prepare::PreparedVm;
use crate::flow::source::probe;
use crate::flow::{MoveError, Tagged, Traffic, lock};
use crate::net::greeting::Greeting;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes a second that no port is taken to give, where it does not say what it gives: 100 Gbit/s.
const FASTEST: f64 = 12.5e9;
/// How long target hosts may take to have made their VMs' memory, all together, before it is not waited for.
const READY: Duration = Duration::from_secs(30);
/// How long a host that could go direct waits to be told; then it does not. Longer than another host may take to measure.
const TOLD: Duration = Duration::from_secs(45);
impl Shared {
    /// The coordinator says which way the group's pages go. A host from which nothing leaves has nothing to do.
    pub(in super::super) fn route(&self, name: &str, token: Token, direct: bool) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if group.spec.token != token {
            let what = format!("group {name:?} is not known by that token");
            return Err(Refusal::new(Code::UnknownGroup, what));
        }
        if let Work::InPath(w) = &group.work
            && let Some(s) = &w.source
        {
            s.route.tell(direct);
        }
        Ok(Reply::Done)
    }
}

impl SourceSide {
    /// Says what the links give, and whether the group then goes direct.
    pub(super) fn goes_direct(&self, shared: &Shared, group: &Group) -> bool {
        let could = self.could_go_direct(shared, group);
        lock(&group.prepare).direct = Some(could);
        // Without this host the group does not go direct; and where it was asked for nothing is to be decided.
        let asked = group.spec.recipe.direct() == Direct::Always;
        let direct = could && (asked || self.route.wait(TOLD, || group.cancelled.load(Ordering::Acquire)));
        self.group.direct.store(direct, Ordering::Relaxed);
        direct
    }

    /// By what the link to each target host gives.
    fn could_go_direct(&self, shared: &Shared, group: &Group) -> bool {
        let qemus = self.vms.iter().all(|(s, _)| s.front.is_qemu());
        qemus
            && match group.spec.recipe.direct() {
                Direct::Never => false,
                Direct::Always => true,
                Direct::Auto => self.link_is_faster(shared, group),
            }
    }

    fn link_is_faster(&self, shared: &Shared, group: &Group) -> bool {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let needed = needed(group.spec.sources.len(), self.vms.len(), processors);
        let hello =
            Greeting::new(&self.group.name, self.group.token, Purpose::Probe { source: self.group.me });
        let tag = |ends| Tagged::of(&shared.tags, ends, Traffic::Control);
        let targets: BTreeSet<_> = self.vms.iter().map(|(s, _)| s.target).collect();
        let port = shared.link_mbit().map_or(FASTEST, |mbit| mbit as f64 * 1e6 / 8.0);
        if needed > port {
            return false;
        }
        let began = Instant::now();
        let ask_on = || began.elapsed() < READY && !self.scan.cancel.load(Ordering::Relaxed);
        let mut least = f64::INFINITY;
        for t in &targets {
            let addr = self.group.targets[usize::from(t.0)];
            match probe::measure(addr, &hello, shared.timeouts.peer, needed, &shared.security, &ask_on, tag) {
                Ok(rate) => least = least.min(rate),
                Err(e) => {
                    tracing::warn!("group {}: the link is not measured: {e}", self.group.name);
                    return false;
                }
            }
            if least < needed {
                break;
            }
        }
        let (gives, needed, name) = (least / 1e6, needed / 1e6, &self.group.name);
        tracing::info!(
            "group {name}: the link gives {gives:.0} MB/s; from {needed:.0} on QEMUs stream themselves"
        );
        !targets.is_empty() && gives >= needed
    }

    /// There is nothing to read, to register or to push.
    pub(super) fn prepare_direct(&self, shared: &Shared, group: &Group) -> Result<(), Refusal> {
        for (spec, _) in &self.vms {
            spec.front.greet(shared.timeouts.setup).map_err(MoveError::at(&spec.name))?;
        }
        // The plan is made when every source host has registered what it has.
        if group.spec.recipe.rack().is_some()
            && let Err(e) = self.register(shared, group, &[])
        {
            tracing::warn!("group {}: {e}", group.spec.name);
        }
        let ends = lock(&self.index).take().and_then(|client| client.ends());
        if let Some((local, remote)) = ends {
            shared.tags.remove(local, remote);
        }
        *lock(&self.prepared) = self.vms.iter().map(|_| PreparedVm::default()).collect();
        // Nothing is to come: nobody has left.
        let _ = self.part.planned(HostPlan::default(), |_| {});
        Ok(())
    }
}
