//! What each control request does, from preparing a group to forgetting it.

use super::super::api::{
    BpfClass, BpfCounters, Code, Decision, GroupSpec, GroupStatus, HostCounters, Incoming, PreparePhase,
    PrepareStatus, Refusal, Reply, Request, Role, Token, Traffic,
};
use super::{Group, MAX_GROUPS, Shared, Work, inpath, observe, plain, share};
use crate::flow::pace::Pacer;
use crate::flow::{lock, unix_ns};
use crate::host::bpf::{Counters, Direction, FlowClass, Scope};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

impl Shared {
    pub(super) fn handle(self: &Arc<Self>, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::Hello => Ok(Reply::Hello {
                name: self.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                now_ns: unix_ns(),
                data: Some(self.config.data),
            }),
            Request::Prepare { spec } => self.prepare(*spec),
            Request::PrepareStatus { group } => Ok(Reply::Prepare(self.group(&group)?.prepare_status())),
            Request::Observe { spec, seconds, one_in } => self.observe(&spec, seconds, one_in),
            Request::Start { group, leave_paused, incoming } => self.start(&group, leave_paused, &incoming),
            Request::Status { group } => self.status(group.as_deref()),
            Request::Cancel { group } => {
                let group = self.group(&group)?;
                cancel(&group, "cancelled");
                Ok(Reply::Done)
            }
            Request::Settle { group, vm, decision } => self.settle(&group, &vm, decision),
            Request::Forget { group } => self.forget(&group),
            Request::Released { group, token, vm } => self.released(&group, token, vm),
            Request::PolicySet { text } => self.set_policy(&text),
            Request::PolicyShow => Ok(self.policy()),
            Request::BudgetShare { group, token, seq, bits } => self.take_share(&group, token, seq, bits),
            Request::BudgetClaim { group, token, term } => self.claim_share(&group, token, term),
        }
    }

    pub(super) fn group(&self, name: &str) -> Result<Arc<Group>, Refusal> {
        lock(&self.groups).get(name).cloned().ok_or_else(|| {
            Refusal::new(Code::UnknownGroup, format!("agent {} knows no group {name:?}", self.config.name))
        })
    }

    fn prepare(self: &Arc<Self>, spec: GroupSpec) -> Result<Reply, Refusal> {
        spec.check().map_err(|e| Refusal::new(Code::BadRequest, e))?;
        let old = lock(&self.groups).get(&spec.name).cloned();
        if let Some(old) = old {
            if old.spec.token == spec.token {
                return Ok(Reply::Prepare(old.prepare_status()));
            }
            if !old.is_over() {
                let what = format!("group {:?} is under way at agent {}", spec.name, self.config.name);
                return Err(Refusal::new(Code::Conflict, what));
            }
            self.drop_group(&old);
        }
        let pacer = Arc::new(Pacer::default());
        let group = Arc::new(Group {
            prepare: Mutex::new(PrepareStatus::new(PreparePhase::Preparing, None)),
            started: AtomicBool::new(false),
            started_ns: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            share: spec.share.map(|bits| share::Held::first(bits, spec.token)),
            pacer: pacer.clone(),
            work: if spec.method.in_path() {
                let work = inpath::InPath::new(self, &spec, &pacer)
                    .map_err(|e| Refusal::new(Code::Failed, format!("group {:?}: {e}", spec.name)))?;
                Work::InPath(work)
            } else {
                Work::Plain(plain::Plain::new(&spec))
            },
            spec,
        });
        {
            let mut groups = lock(&self.groups);
            if groups.len() >= MAX_GROUPS {
                let what = format!("agent {} keeps {MAX_GROUPS} groups: forget some", self.config.name);
                return Err(Refusal::new(Code::NotNow, what));
            }
            groups.insert(group.spec.name.clone(), group.clone());
        }
        let agent = self.clone();
        let preparing = group.clone();
        let run = move || {
            let end = match &preparing.work {
                Work::InPath(w) => w.prepare(&agent, &preparing),
                Work::Plain(w) => w.prepare(&agent, &preparing),
            };
            {
                let mut st = lock(&preparing.prepare);
                match end {
                    Ok(()) => st.phase = PreparePhase::Ready,
                    Err(e) => {
                        st.phase = PreparePhase::Failed;
                        st.problem = Some(e);
                    }
                }
            }
            agent.drop_if_unstarted(&preparing);
        };
        std::thread::Builder::new()
            .name("irlm-prepare".into())
            .spawn(run)
            .map_err(|e| Refusal::new(Code::Failed, format!("no thread to prepare on: {e}")))?;
        Ok(Reply::Prepare(group.prepare_status()))
    }

    /// A coordinator that died between preparing and starting must not leave a group behind for ever.
    fn drop_if_unstarted(&self, group: &Arc<Group>) {
        let until = Instant::now() + Duration::from_millis(group.spec.timeouts.prepare_ms);
        while !group.started.load(Ordering::Acquire) && !group.cancelled.load(Ordering::Acquire) {
            if Instant::now() > until {
                tracing::warn!("group {}: prepared, but nobody started it: dropped", group.spec.name);
                cancel(group, "nobody started it");
                let known = lock(&self.groups).get(&group.spec.name).cloned();
                if known.is_some_and(|g| Arc::ptr_eq(&g, group)) {
                    self.drop_group(group);
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn start(
        self: &Arc<Self>,
        name: &str,
        leave_paused: bool,
        incoming: &[Incoming],
    ) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let phase = lock(&group.prepare).phase;
        if phase != PreparePhase::Ready {
            let what = format!("group {name:?} is not prepared at agent {}", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        }
        if group.cancelled.load(Ordering::Acquire) {
            return Err(Refusal::new(Code::NotNow, format!("group {name:?} was cancelled")));
        }
        if group.started.swap(true, Ordering::AcqRel) {
            return Ok(Reply::Done);
        }
        group.started_ns.store(unix_ns(), Ordering::Release);
        // Before the first byte. If it cannot be had the group moves all the same, and says so.
        if let Err(e) = self.share_out() {
            lock(&group.prepare).problem.get_or_insert_default().push_str(&e);
        }
        let begun = match &group.work {
            Work::InPath(w) => w.start(self, &group, leave_paused),
            Work::Plain(w) => w.start(self, &group, leave_paused, incoming),
        };
        begun.map_err(|e| Refusal::new(Code::Failed, e))?;
        Ok(Reply::Done)
    }

    fn status(&self, name: Option<&str>) -> Result<Reply, Refusal> {
        let groups: Vec<Arc<Group>> = match name {
            Some(n) => vec![self.group(n)?],
            None => {
                let mut all: Vec<_> = lock(&self.groups).values().cloned().collect();
                all.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
                all
            }
        };
        let groups = groups.iter().map(|g| self.group_status(g)).collect();
        let samplers = observe::samplers(&self.tracer);
        Ok(Reply::Status { name: self.config.name.clone(), now_ns: unix_ns(), groups, samplers })
    }

    fn group_status(&self, group: &Group) -> GroupStatus {
        let mut host = match &group.work {
            Work::InPath(w) => w.host_counters(),
            Work::Plain(_) => HostCounters::default(),
        };
        host.bpf = self.bpf();
        GroupStatus {
            group: group.spec.name.clone(),
            method: group.spec.method,
            prepare: group.prepare_status(),
            vms: group.vms(),
            host,
            started_ns: group.started_ns.load(Ordering::Acquire),
            share: self.share_status(group),
        }
    }

    fn bpf(&self) -> Option<BpfCounters> {
        let c = self.classifier.counters().ok().filter(Counters::counted)?;
        let class = |class| {
            let get = |direction, scope| {
                let n = c.scoped(direction, scope, class);
                Traffic { packets: n.packets, bytes: n.bytes }
            };
            BpfClass {
                core_out: get(Direction::Egress, Scope::Core),
                core_in: get(Direction::Ingress, Scope::Core),
                rack_out: get(Direction::Egress, Scope::Rack),
                rack_in: get(Direction::Ingress, Scope::Rack),
            }
        };
        let total_in = c.total(Direction::Ingress);
        Some(BpfCounters {
            bulk: class(FlowClass::Bulk),
            switchover: class(FlowClass::Switchover),
            demand: class(FlowClass::Demand),
            control: class(FlowClass::Control),
            forward: class(FlowClass::Forward),
            other: class(FlowClass::Other),
            all_in: Traffic { packets: total_in.packets, bytes: total_in.bytes },
            dscp_not_written: c.oddities().dscp_not_written,
        })
    }

    fn settle(&self, name: &str, vm: &str, decision: Decision) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let found = match &group.work {
            Work::InPath(w) => w.settle(&group, vm, decision),
            Work::Plain(_) => {
                let what = "plain QEMU has no handover to settle: continue or quit the QEMU itself";
                return Err(Refusal::new(Code::NotNow, what));
            }
        };
        if found {
            return Ok(Reply::Done);
        }
        Err(Refusal::new(
            Code::UnknownGroup,
            format!("group {name:?} has no VM {vm:?} at agent {}", self.config.name),
        ))
    }

    fn forget(&self, name: &str) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if !group.is_over() {
            let what = format!(
                "group {name:?} is not over at agent {}: cancel or settle it first",
                self.config.name
            );
            return Err(Refusal::new(Code::NotNow, what));
        }
        self.drop_group(&group);
        Ok(Reply::Done)
    }

    fn drop_group(&self, group: &Group) {
        lock(&self.groups).remove(&group.spec.name);
        if let Work::InPath(w) = &group.work {
            w.forget();
            self.door.dismiss(&group.spec.name);
        }
        for v in &group.spec.vms {
            for role in [Role::Source, Role::Target] {
                if let Err(e) = self.journal.remove(&group.spec.name, &v.name, role) {
                    tracing::warn!("{e}");
                }
            }
        }
    }

    fn released(self: &Arc<Self>, name: &str, token: Token, vm: u16) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if group.spec.token != token {
            return Err(Refusal::new(
                Code::UnknownGroup,
                format!("group {name:?} is not known by that token"),
            ));
        }
        match &group.work {
            Work::Plain(w) => w.released(vm).map(|()| Reply::Done).map_err(|e| Refusal::new(Code::Failed, e)),
            Work::InPath(_) => {
                Err(Refusal::new(Code::NotNow, "this group's VMs are handed over by their agents"))
            }
        }
    }

    /// Ends what can still be ended, and gives the sources a moment to take their VMs back.
    pub(super) fn cancel_all(&self, why: &str) {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for g in &groups {
            cancel(g, why);
        }
        for _ in 0..100 {
            let busy = |g: &Arc<Group>| g.vms().iter().any(|v| v.role == Role::Source && !v.phase.is_final());
            if !groups.iter().any(|g| g.started.load(Ordering::Acquire) && busy(g)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn cancel(group: &Arc<Group>, why: &str) {
    group.cancelled.store(true, Ordering::Release);
    match &group.work {
        Work::InPath(w) => w.cancel(why),
        Work::Plain(w) => w.cancel(),
    }
}
