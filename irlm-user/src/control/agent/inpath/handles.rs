//! The handles on a group's VMs: an operator's decisions, what their threads say, and the memory that is given back when all
//! are over.

use super::super::Role;
use super::super::settle::Told;
use super::InPath;
use crate::control::api::Decision;
use crate::flow::arrival::{self, TargetGroup, TargetVmShared};
use crate::flow::source::{self, SourceVmShared};
use crate::flow::{lock, now};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

impl InPath {
    fn leaving(&self, vm: &str) -> Option<&Arc<SourceVmShared>> {
        self.source.as_ref()?.vms.iter().find(|(spec, _)| spec.name == vm).map(|(_, h)| h)
    }

    fn arriving(&self, vm: &str) -> Option<&Arc<TargetVmShared>> {
        self.target.as_ref()?.vms.iter().find(|(spec, _)| spec.name == vm).map(|(_, h)| h)
    }

    /// Has the copy that this host has of the VM in that role decided about.
    pub(in super::super) fn settle(&self, vm: &str, role: Role, decision: Decision) {
        use source::Decision as D;
        match (role, decision) {
            (Role::Source, Decision::Resume) => self.decide_leaving(vm, D::Source),
            (Role::Source, Decision::Discard) => self.decide_leaving(vm, D::Target),
            (Role::Target, Decision::Run) => self.decide_arriving(vm, D::Target),
            (Role::Target, Decision::Discard) => self.decide_arriving(vm, D::Source),
            (Role::Source, Decision::Run) | (Role::Target, Decision::Resume) => {}
        }
    }

    fn decide_leaving(&self, vm: &str, decision: source::Decision) {
        if let Some(h) = self.leaving(vm) {
            h.settle(decision);
        }
    }

    fn decide_arriving(&self, vm: &str, decision: source::Decision) {
        if let Some(h) = self.arriving(vm) {
            h.settle(decision);
        }
    }

    /// Whether the other side of the VM cannot be heard.
    pub(in super::super) fn is_apart(&self, vm: &str, role: Role) -> bool {
        match role {
            Role::Source => self.leaving(vm).is_none_or(|h| h.is_apart()),
            Role::Target => self.arriving(vm).is_none_or(|h| h.is_apart()),
        }
    }

    /// What a VM's thread says of it.
    pub(in super::super) fn told(&self, vm: &str, role: Role) -> Option<Told> {
        match role {
            Role::Source => self.leaving(vm).map(|h| {
                let st = h.status();
                Told {
                    runs: matches!(st.left, Some(source::Left::Stands(_))),
                    over: matches!(st.phase, source::Phase::Moved | source::Phase::Stayed),
                    in_doubt: st.in_doubt,
                    there: st.runs_ns > 0,
                    reason: st.reason,
                }
            }),
            Role::Target => self.arriving(vm).map(|h| {
                let st = h.status();
                let over = [arrival::Phase::Running, arrival::Phase::Discarded, arrival::Phase::Lost];
                Told {
                    runs: st.running_ns > 0,
                    over: over.contains(&st.phase),
                    in_doubt: st.in_doubt,
                    there: false,
                    reason: st.reason,
                }
            }),
        }
    }

    /// The arrivals, once they have begun.
    pub(in super::super) fn arrivals(&self) -> Option<Arc<TargetGroup>> {
        lock(&self.target.as_ref()?.group).clone()
    }

    /// Whether nothing is pushed any more, and no content has come for so long.
    pub(in super::super) fn is_quiet(&self, time: Duration) -> bool {
        let last = self.arrivals().map_or(0, |g| g.counts.last_content.load(Ordering::Relaxed));
        let quiet = last == 0 || now().0.saturating_sub(last) >= time.as_nanos() as u64;
        quiet && !self.pushes()
    }

    /// Gives back what was stored and kept for VMs that are all over.
    pub(in super::super) fn let_go(&self) {
        if let Some(s) = &self.source {
            s.group.let_go();
            lock(&s.prepared).clear();
            *lock(&s.shares) = Default::default();
        }
        if let Some(g) = self.arrivals() {
            g.let_go();
        }
        if let Some(t) = &self.target {
            *lock(&t.shares) = Default::default();
        }
    }
}
