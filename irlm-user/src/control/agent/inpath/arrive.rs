//! The target side of a group: its VMs' arrivals, and what they share.

use super::super::purse::Share;
use super::super::{Group, GroupSpec, Role, Shared, record};
use super::side::hosts;
use super::side::{TargetSide, hashers, kept};
use super::words::target_journal;
use crate::control::config::MulticastConfig;
use crate::core::arrival::{Patience, TargetHost};
use crate::core::units::PAGE_SIZE;
use crate::flow::arrival::{self, TargetGroup, cast::CastConfig, peers::Peers};
use crate::flow::lock;
use std::sync::Arc;
use std::time::Duration;

/// Has contents that several hosts need go to them at once, if that can be had.
fn multicast(shared: &Shared, spec: &GroupSpec, flow: &Arc<TargetGroup>, m: MulticastConfig) {
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

impl TargetSide {
    pub(super) fn group(
        &self,
        shared: &Shared,
        spec: &GroupSpec,
        patience: Patience,
        leave_paused: bool,
        shares: [Share; 2],
    ) -> Arc<TargetGroup> {
        let budget_pages = usize::try_from(shares[0].bytes() / PAGE_SIZE as u64).unwrap_or(usize::MAX);
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
                verify: self.proxied.verify,
                leave_paused,
                security: shared.security.clone(),
                hosts: hosts(spec),
                hold_placing: Duration::from_millis(shared.drill.hold_placing_ms),
            },
        );
        flow.windows = shared.windows.clone();
        flow.keep(self.vms.iter().map(|(t, _)| (t.source, t.domain)), shares[1].bytes());
        *lock(&self.shares) = shares;
        Arc::new(flow)
    }

    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        group: &Arc<Group>,
        patience: Patience,
        leave_paused: bool,
    ) {
        let spec = &group.spec;
        let store = if self.vms.is_empty() { 0 } else { shared.config.store_mib << 20 };
        let shares = [shared.contents.take(store), kept(shared, &self.proxied, self.vms.len())];
        let flow = self.group(shared, spec, patience, leave_paused, shares);
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
            multicast(shared, spec, &flow, m);
        }
        *lock(&self.group) = Some(flow.clone());
        shared.door.admit(flow);
    }
}
