//! What each control request does, from preparing a group to forgetting it.

use super::super::api::{
    BpfClass, BpfCounters, Code, GroupSpec, GroupStatus, HostCounters, Incoming, Phase, PreparePhase,
    PrepareStatus, Refusal, Reply, Request, Role, StartPart, Token, Traffic, VmStatus,
};
use super::continued::with_word;
use super::{Group, Shared, Work, inpath, observe, plain, share};
use crate::core::handover::GuestState;
use crate::core::quota::{Full, Owner};
use crate::flow::pace::Pacer;
use crate::flow::{lock, unix_ns};
use crate::host::bpf::{Counters, Direction, FlowClass, Scope};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

impl Shared {
    /// Does what `by` asks for.
    pub(super) fn handle(self: &Arc<Self>, request: Request, by: &Owner) -> Result<Reply, Refusal> {
        match request {
            Request::Hello => Ok(Reply::Hello {
                name: self.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                now_ns: unix_ns(),
                data: Some(self.config.data),
                you: None,
            }),
            Request::Preflight { spec, vms_only } => self.preflight(&spec, vms_only, by),
            Request::Prepare { spec } => self.prepare(*spec, by),
            Request::PrepareStatus { group } => Ok(Reply::Prepare(self.group(&group)?.prepare_status())),
            Request::Observe { spec, seconds, one_in } => self.observe(&spec, seconds, one_in),
            Request::Start { group, leave_paused, incoming, part } => {
                self.start(&group, leave_paused, &incoming, part)
            }
            Request::Route { group, token, direct } => self.route(&group, token, direct),
            Request::Status { group } => self.status(group.as_deref()),
            Request::Cancel { group } => self.cancel(&group),
            Request::Settle { group, vm, decision } => self.settle(&group, &vm, decision),
            Request::Forget { group } => self.forget(&group),
            Request::History { group } => self.history(group.as_deref()),
            Request::Released { group, token, vm, guest } => self.released(&group, token, vm, guest),
            Request::PolicySet { text } => self.set_policy(&text),
            Request::PolicyShow => Ok(self.policy()),
            Request::BudgetShare { group, token, seq, bits } => self.take_share(&group, token, seq, bits),
            Request::BudgetClaim { group, token, term } => self.claim_share(&group, token, term),
        }
    }

    pub(super) fn group(&self, name: &str) -> Result<Arc<Group>, Refusal> {
        lock(&self.groups).get(name).cloned().ok_or_else(|| self.unknown(name))
    }

    fn prepare(self: &Arc<Self>, spec: GroupSpec, by: &Owner) -> Result<Reply, Refusal> {
        self.usable(&spec)?;
        let pacer = Arc::new(Pacer::default());
        let group = Arc::new(Group {
            owner: Some(by.clone()),
            prepare: Mutex::new(PrepareStatus::new(PreparePhase::Preparing, None)),
            started: AtomicBool::new(false),
            begun: Mutex::default(),
            started_ns: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            gate: Mutex::default(),
            kept: Mutex::default(),
            share: spec.share.map(|bits| share::Held::first(bits, spec.token)),
            pacer: pacer.clone(),
            work: match spec.recipe.proxied() {
                Some(proxied) => {
                    let work = inpath::InPath::new(self, (&spec, proxied), &pacer)
                        .map_err(|e| Refusal::new(Code::Failed, format!("group {:?}: {e}", spec.name)))?;
                    Work::InPath(work)
                }
                None => Work::Plain(plain::Plain::new(&spec)),
            },
            spec,
        });
        let old = match self.take_on(&group)? {
            Taken::Already(status) => return Ok(Reply::Prepare(*status)),
            Taken::On(old) => old,
        };
        for old in old {
            self.end(&old);
        }
        let (agent, preparing) = (self.clone(), group.clone());
        let run = move || agent.prepare_group(&preparing);
        if let Err(e) = std::thread::Builder::new().name("irlm-prepare".into()).spawn(run) {
            lock(&group.prepare).phase = PreparePhase::Failed;
            self.drop_group(&group);
            return Err(Refusal::new(Code::Failed, format!("no thread to prepare on: {e}")));
        }
        Ok(Reply::Prepare(group.prepare_status()))
    }

    /// Gives the group its name at this agent, unless another one has it that is not over: looked at and done under one
    /// lock, so that of several that come at a time one gets it.
    fn take_on(&self, group: &Arc<Group>) -> Result<Taken, Refusal> {
        let name = &group.spec.name;
        let mut groups = lock(&self.groups);
        let mut ended = Vec::from_iter(groups.get(name).cloned());
        if let Some(old) = ended.first() {
            if old.spec.token == group.spec.token {
                return Ok(Taken::Already(Box::new(old.prepare_status())));
            }
            if !old.is_over() {
                let what = format!("group {name:?} is under way at agent {}", self.config.name);
                return Err(Refusal::new(Code::Conflict, what));
            }
            // Before the new one is expected there.
            self.door.dismiss(name);
        } else if let Some(by) = &group.owner {
            let over = self.room(&groups, by).map_err(|what| Refusal::new(Code::NotNow, what))?;
            if let Some(old) = over.and_then(|name| groups.remove(&name)) {
                self.door.dismiss(&old.spec.name);
                ended.push(old);
            }
        }
        groups.insert(name.clone(), group.clone());
        Ok(Taken::On(ended))
    }

    /// Whether `by` may have one group more, and which one is forgotten for it. It is one that is over.
    fn room(&self, groups: &HashMap<String, Arc<Group>>, by: &Owner) -> Result<Option<String>, String> {
        let Err(full) = self.quota.admits(by, groups.values().map(|g| g.owner.as_ref())) else {
            return Ok(None);
        };
        let own = matches!(full, Full::Own(_));
        let counts = |g: &&Arc<Group>| !own || g.owner.as_ref() == Some(by);
        // Of those that are over the one that was begun first.
        let over = groups.values().filter(counts).filter(|g| self.may_go(g));
        let oldest = over.min_by_key(|g| g.started_ns.load(Ordering::Acquire));
        oldest.map(|g| Some(g.spec.name.clone())).ok_or_else(|| {
            let agent = &self.config.name;
            match full {
                Full::Own(n) => {
                    format!("agent {agent} keeps {n} groups for {by}: cancel those that are not needed")
                }
                Full::All(n) => format!("agent {agent} keeps {n} groups: an operator can cancel some"),
            }
        })
    }

    /// Whether nothing of it is left to be done here, nor to be said to the other side.
    fn may_go(&self, group: &Group) -> bool {
        group.is_over() && (!group.started.load(Ordering::Acquire) || self.settled(group))
    }

    /// Why `by` may not have one group more just now.
    pub(super) fn no_room(&self, by: &Owner) -> Option<String> {
        self.room(&lock(&self.groups), by).err()
    }

    fn prepare_group(self: &Arc<Self>, group: &Arc<Group>) {
        let seen = self.still_as_seen(&group.spec).and_then(|()| self.claim(group));
        let end = seen.and_then(|()| match &group.work {
            Work::InPath(w) => w.prepare(self, group),
            Work::Plain(w) => w.prepare(self, group),
        });
        let _gate = lock(&group.gate);
        let failed = end.is_err();
        {
            let mut st = lock(&group.prepare);
            match end {
                Ok(()) => st.phase = PreparePhase::Ready,
                Err(e) => {
                    st.phase = PreparePhase::Failed;
                    st.problem = Some(e.msg);
                }
            }
        }
        if failed || group.cancelled.load(Ordering::Acquire) {
            // Nobody will start it: what its threads wait for does not come.
            if let Work::InPath(w) = &group.work {
                w.cancel("it was not prepared");
            }
            self.release(group);
        }
    }

    fn start(
        self: &Arc<Self>,
        name: &str,
        leave_paused: bool,
        incoming: &[Incoming],
        part: StartPart,
    ) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let _gate = lock(&group.gate);
        if group.phase() != PreparePhase::Ready {
            let what = format!("group {name:?} is not prepared at agent {}", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        }
        if group.cancelled.load(Ordering::Acquire) {
            return Err(Refusal::new(Code::NotNow, format!("group {name:?} was cancelled")));
        }
        self.claims_stand(&group.spec)?;
        self.may_leave_to(&group.spec, incoming)?;
        let Some(part) = group.begin(part) else { return Ok(Reply::Done) };
        // An agent that is both is told twice: its time runs from the first word.
        if !group.started.swap(true, Ordering::AcqRel) {
            group.started_ns.store(unix_ns(), Ordering::Release);
            // Before the first byte. If it cannot be had the group moves all the same, and says so.
            if let Err(e) = self.share_out() {
                lock(&group.prepare).problem.get_or_insert_default().push_str(&e.to_string());
            }
        }
        let begun = match &group.work {
            Work::InPath(w) => w.start(self, &group, leave_paused, part),
            Work::Plain(w) => w.start(self, leave_paused, incoming, part),
        };
        begun.map(|()| Reply::Done)
    }

    fn status(&self, name: Option<&str>) -> Result<Reply, Refusal> {
        let groups = match name {
            Some(n) => match self.group(n) {
                Ok(g) => vec![self.group_status(&g)],
                Err(_) => vec![self.status_of_old(n)?],
            },
            None => {
                let mut all: Vec<_> = lock(&self.groups).values().cloned().collect();
                all.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
                all.iter().map(|g| self.group_status(g)).collect()
            }
        };
        let samplers = observe::samplers(&self.tracer);
        let (name, keys) = (self.config.name.clone(), self.keys_status());
        Ok(Reply::Status { name, now_ns: unix_ns(), groups, samplers, keys })
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
            vms: self.vms(group),
            host,
            started_ns: group.started_ns.load(Ordering::Acquire),
            share: self.share_status(group),
        }
    }

    /// The VMs, with what the journal could not write of them: what is not written is not done.
    fn vms(&self, group: &Group) -> Vec<VmStatus> {
        let mut vms = group.vms();
        for v in &mut vms {
            if v.phase.is_final()
                && let Some(r) = self.registry.get(&group.spec.name, &group.spec.token, &v.name, v.role)
            {
                *v = self.with_end(with_word(v.clone(), &r), &r);
            }
            let unwritten = self.registry.problem(&group.spec.name, &group.spec.token, &v.name, v.role);
            if let Some(what) = unwritten.filter(|u| v.error.as_ref().is_none_or(|e| !e.contains(u))) {
                v.error = Some(v.error.take().map_or_else(|| what.clone(), |e| format!("{e}; {what}")));
            }
        }
        vms
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

    fn cancel(&self, name: &str) -> Result<Reply, Refusal> {
        let over = || {
            let what =
                format!("group {name:?} is over at agent {}: there is nothing to cancel", self.config.name);
            Err(Refusal::new(Code::NotNow, what))
        };
        match self.group(name) {
            Ok(group) if group.is_over() => over(),
            Ok(group) => {
                self.cancel_group(&group, "cancelled");
                Ok(Reply::Done)
            }
            Err(_) if !self.registry.last_run(name).is_empty() => over(),
            Err(unknown) => Err(unknown),
        }
    }

    fn forget(&self, name: &str) -> Result<Reply, Refusal> {
        let group = match self.group(name) {
            Ok(group) => group,
            // Forgotten by itself, or before.
            Err(_) if !self.registry.last_run(name).is_empty() => return Ok(Reply::Done),
            Err(unknown) => return Err(unknown),
        };
        if !group.is_over() {
            let open = open_vms(&group.vms());
            let what = format!("group {name:?} is not over at agent {}: {open}", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        }
        self.drop_group(&group);
        Ok(Reply::Done)
    }

    fn released(
        self: &Arc<Self>,
        name: &str,
        token: Token,
        vm: u16,
        guest: GuestState,
    ) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if group.spec.token != token {
            return Err(Refusal::new(
                Code::UnknownGroup,
                format!("group {name:?} is not known by that token"),
            ));
        }
        match &group.work {
            Work::Plain(w) => w.released(vm, guest).map(|()| Reply::Done),
            Work::InPath(_) => {
                Err(Refusal::new(Code::NotNow, "this group's VMs are handed over by their agents"))
            }
        }
    }

    /// Ends what can still be ended, and gives the sources a moment to take their VMs back.
    pub(super) fn cancel_all(&self, why: &str) {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for g in &groups {
            self.cancel_group(g, why);
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

/// What is not over, and what can be done about it.
fn open_vms(vms: &[VmStatus]) -> String {
    const SHOWN: usize = 8;
    let open: Vec<&VmStatus> = vms.iter().filter(|v| !v.phase.is_final()).collect();
    let names = open.iter().take(SHOWN).map(|v| format!("{} ({})", v.name, v.phase.name()));
    let mut names: Vec<String> = names.collect();
    if open.len() > SHOWN {
        names.push(format!("and {} more", open.len() - SHOWN));
    }
    let has = |is: fn(Phase) -> bool| open.iter().any(|v| is(v.phase));
    let mut todo = Vec::new();
    if has(|p| !p.is_past_cancelling()) || open.is_empty() {
        todo.push("cancel it first");
    }
    if has(|p| matches!(p, Phase::GaveUp | Phase::Fetching)) {
        todo.push("wait for what has been given up, its target decides");
    }
    if has(|p| p == Phase::InDoubt) {
        todo.push("what is in doubt is settled when its agents hear each other, or by `irlm settle`");
    }
    let todo = todo.join("; ");
    if names.is_empty() { todo } else { format!("{}: {todo}", names.join(", ")) }
}

/// What came of taking a group on.
enum Taken {
    /// It had been before: how far its preparation is.
    Already(Box<PrepareStatus>),
    /// Now, in the place of these, which were over.
    On(Vec<Arc<Group>>),
}

#[cfg(test)]
mod tests {
    use super::super::tests::{agent, spec};
    use super::*;
    use crate::control::journal::tests::record;
    use crate::control::journal::{JournalState, VmRecord};
    use crate::core::quota::Quota;

    fn vm(name: &str, phase: Phase) -> VmStatus {
        let r = VmRecord { vm: name.into(), ..record("g", "v", Role::Source, JournalState::Started) };
        VmStatus { phase, ..super::super::history::status_of(&r) }
    }

    /// Groups of no VMs are the cheapest ones to fill an agent with.
    #[test]
    fn one_caller_cannot_use_up_the_groups_of_an_agent() {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(dir.path());
        Arc::get_mut(&mut agent).unwrap().quota = Quota::new(8, 4);
        let empty = |name: &str| GroupSpec { vms: Vec::new(), ..spec(name, 1, &dir.path().join("q")) };
        let ask = |by: &Owner, name: &str, dry: bool| {
            let spec = Box::new(empty(name));
            let request =
                if dry { Request::Preflight { spec, vms_only: false } } else { Request::Prepare { spec } };
            agent.handle(request, by)
        };
        let named = |name: &str| Owner::Named(name.into());
        let (greedy, ann) = (named("greedy"), Owner::Operator("ann".into()));
        let is_full = |by: &Owner| {
            let refused = ask(by, "more", false).unwrap_err();
            assert!(refused.code == Code::NotNow && refused.msg.contains("groups"), "{refused}");
            let Reply::Preflight(p) = ask(by, "more", true).unwrap() else { panic!() };
            assert!(p.problems.iter().any(|l| refused.msg.contains(l)), "{:?}: {refused}", p.problems);
            refused.msg
        };
        for name in ["g1", "g2"] {
            ask(&greedy, name, false).unwrap();
        }
        // Nor take memory for VMs that they do not have.
        let left = |of: &Arc<super::super::purse::Purse>| of.take(u64::MAX).bytes() * 2;
        let (contents, tables) = (agent.config.contents_mib << 20, agent.config.tables_mib << 20);
        assert_eq!((left(&agent.contents), left(&agent.tables)), (contents, tables));
        assert!(is_full(&greedy).contains("2 groups for greedy"));
        for n in 0..5 {
            ask(&named(&format!("c{n}")), &format!("h{n}"), false).unwrap();
        }
        assert!(is_full(&named("late")).contains("7 groups"));
        ask(&ann, "rescue", false).unwrap();
        assert!(is_full(&ann).contains("cancel some"));
        // What is over makes room: first of one's own, and where all are full of anybody's.
        agent.handle(Request::Cancel { group: "g1".into() }, &ann).unwrap();
        ask(&greedy, "g3", false).unwrap();
        assert_eq!(agent.group("g1").map(|g| g.spec.name.clone()).unwrap_err().code, Code::UnknownGroup);
        assert!(is_full(&greedy).contains("for greedy"));
        agent.handle(Request::Cancel { group: "h0".into() }, &ann).unwrap();
        ask(&ann, "second", false).unwrap();
        assert_eq!(lock(&agent.groups).len(), 8);
    }

    #[test]
    fn what_is_not_over_is_named_with_what_can_be_done() {
        let said = |vms: &[VmStatus]| open_vms(vms);
        let doubt = said(&[vm("over", Phase::Done), vm("kv", Phase::InDoubt)]);
        assert!(doubt.contains("kv (in doubt)") && doubt.contains("irlm settle"), "{doubt}");
        assert!(!doubt.contains("over (") && !doubt.contains("cancel"), "{doubt}");
        let given = said(&[vm("kv", Phase::GaveUp)]);
        assert!(given.contains("kv (gave up)") && given.contains("wait"), "{given}");
        assert!(!given.contains("settle") && !given.contains("cancel"), "{given}");
        assert!(said(&[vm("kv", Phase::Migrating)]).contains("cancel it first"));
        assert_eq!(said(&[]), "cancel it first");
        let many: Vec<_> = (0..20).map(|n| vm(&format!("v{n}"), Phase::Migrating)).collect();
        assert!(said(&many).contains("and 12 more"));
    }
}
