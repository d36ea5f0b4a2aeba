//! The handover of each VM: the drivers that ship (`core::handover`), and models of what carries their actions out. Each
//! action may fail, with or without having been done, and an agent may die before it, or after it and before its driver
//! hears of it.

use crate::guest::{SourceRun, TargetRun};
use crate::net::{Agent, CALLER, MS, TAKER};
use crate::world::{Ev, World};
use irlm_user::core::handover::arrival::{self, Input as ArrivalInput};
use irlm_user::core::handover::departure::{self, Input as DepartureInput};
use irlm_user::core::handover::{GuestState, Ran, SourceState, Standing, TargetState, Took};
use irlm_user::core::units::{HostIx, Nanos, VmIx};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::Purpose;

/// What became of an action that fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fails {
    No,
    /// It was not done.
    Undone,
    /// It was done, and nobody says so.
    Unheard,
}

impl World {
    /// Whether the next action fails.
    fn fails(&mut self) -> Fails {
        if self.cfg.failing == 0 || !self.rng.one_in(self.cfg.failing) {
            return Fails::No;
        }
        self.tally.failed += 1;
        self.last_fault = self.now;
        if self.rng.one_in(2) { Fails::Undone } else { Fails::Unheard }
    }

    pub(crate) fn source_event(&mut self, vm: u16, e: DepartureInput) {
        let now = Nanos(self.now);
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        d.h.handle(e, now);
        self.drive_source(vm);
    }

    /// The departure is looked at soon.
    pub(crate) fn drive_source(&mut self, vm: u16) {
        let life = self.source_life(vm);
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        if !std::mem::replace(&mut d.busy, true) {
            self.after(0, 2 * MS, Ev::SourceStep { vm, life });
        }
    }

    /// One action of the departure; a crash may come before it, in it and after it.
    pub(crate) fn source_step(&mut self, vm: u16, life: u32) {
        let host = self.vms[usize::from(vm)].source;
        if self.source_life(vm) != life || !self.up(Agent::Source(host)) {
            return;
        }
        let now = Nanos(self.now);
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        d.busy = false;
        let Some(action) = d.h.poll(now) else {
            if let Some(at) = d.h.wake() {
                self.at(at.0.max(self.now + 1), Ev::SourceStep { vm, life });
            }
            return;
        };
        let deep =
            matches!(d.h.state(), SourceState::GaveUp | SourceState::Aborted | SourceState::TakingBack);
        if self.dies_before(Agent::Source(host), if deep { 6 } else { 20 }) {
            return;
        }
        self.say(|_| format!("vm{vm}: source does {action:?}"));
        self.aimed_fault(vm);
        let outcome = self.source_does(vm, action);
        if self.dies_before(Agent::Source(host), if deep { 12 } else { 40 }) {
            return;
        }
        if let Some(d) = self.src(vm).vms.get_mut(&vm) {
            d.h.done(outcome, now);
        }
        self.drive_source(vm);
    }

    fn source_does(&mut self, vm: u16, action: departure::Action) -> departure::Outcome {
        use departure::{Action, Outcome};
        // What only the agent's own memory knows of cannot fail.
        let fails = if action == Action::Finish { Fails::No } else { self.fails() };
        let failed = || Outcome::Failed("it failed".to_owned());
        if fails == Fails::Undone {
            if action == Action::LetComplete {
                // A stream that SHUT cannot be written to is broken, and QEMU resumes by itself.
                let gen_ = self.vms[usize::from(vm)].q.gen_;
                self.after(0, 20 * MS, Ev::Resumes { vm, gen_ });
            }
            if matches!(action, Action::Say(_)) {
                // What cannot be sent was sent on a connection that is dead; who reads it will know.
                self.source_conns(vm).into_iter().for_each(|c| self.break_conn(c));
            }
            if matches!(action, Action::Write(..)) && self.rng.one_in(2) {
                return Outcome::NotWritten("the disk is full".into());
            }
            return failed();
        }
        let outcome = match action {
            Action::Write(s, guest) => {
                assert_eq!(guest, GuestState::Running);
                self.vms[usize::from(vm)].journal_s = Some(s);
                Outcome::Done
            }
            Action::LetComplete => {
                let q = &mut self.vms[usize::from(vm)].q;
                let gen_ = q.gen_;
                if q.run == SourceRun::Sent {
                    q.shut = true;
                    self.after(0, 4 * MS, Ev::Completes { vm, gen_ });
                }
                Outcome::Stands(self.standing(vm))
            }
            Action::Ask => Outcome::Stands(self.standing(vm)),
            Action::TakeBack(guest) => {
                assert_eq!(guest, GuestState::Running);
                let v = &mut self.vms[usize::from(vm)];
                assert!(!v.t.ran, "rule 1: vm{vm} is taken back after it ran at its target");
                if v.q.run == SourceRun::Completed {
                    self.tally.given_back += 1;
                }
                v.q.resume();
                match v.q.run {
                    SourceRun::Dead => Outcome::Took(Took::Gone),
                    _ => Outcome::Took(Took::Stands(GuestState::Running)),
                }
            }
            Action::Say(w) => {
                for c in self.source_conns(vm) {
                    self.send(c, CALLER, Kind::Word, &w.encode(), &[]);
                }
                Outcome::Done
            }
            Action::Serve => panic!("nothing here runs before its pages came"),
            Action::Call => {
                self.call(vm);
                Outcome::Done
            }
            Action::Finish => {
                self.source_finishes(vm);
                Outcome::Done
            }
        };
        if fails == Fails::Unheard { failed() } else { outcome }
    }

    fn standing(&self, vm: u16) -> Standing {
        match self.vms[usize::from(vm)].q.run {
            SourceRun::Running => Standing::Back(GuestState::Running),
            SourceRun::Active | SourceRun::Final | SourceRun::Sent => Standing::UnderWay,
            SourceRun::Completed => Standing::Completed,
            SourceRun::Dead => Standing::Gone,
        }
    }

    fn source_finishes(&mut self, vm: u16) {
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        let done = d.h.state() == SourceState::Done;
        let conns = [d.conn.take(), d.settle.take()];
        if done && self.vms[usize::from(vm)].q.run != SourceRun::Dead {
            let v = &self.vms[usize::from(vm)];
            assert!(v.lost || v.t.run == TargetRun::Running, "rule 1: vm{vm} runs nowhere");
            self.vms[usize::from(vm)].q.die();
        }
        for c in conns.into_iter().flatten() {
            self.close(c, CALLER);
        }
    }

    fn source_conns(&mut self, vm: u16) -> Vec<usize> {
        let Some(d) = self.src(vm).vms.get(&vm) else { return vec![] };
        let conns = [d.conn, d.settle];
        conns.into_iter().flatten().filter(|c| self.conns[*c].ok).collect()
    }

    /// Calls the target.
    fn call(&mut self, vm: u16) {
        let (host, target) = (self.vms[usize::from(vm)].source, self.vms[usize::from(vm)].target);
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        let (doubt, old) = (d.h.in_doubt(), d.settle);
        self.tally.doubts += u64::from(doubt);
        if let Some(c) = old.filter(|c| self.now > self.conns[*c].opened + 300 * MS) {
            self.close(c, CALLER);
        }
        if old.is_none_or(|c| !self.conns[c].live()) {
            let purpose = Purpose::Settle { source: HostIx(host), vm: VmIx(vm) };
            let c = self.open(Agent::Source(host), Agent::Target(target), purpose);
            if let Some(d) = self.src(vm).vms.get_mut(&vm) {
                d.settle = Some(c);
            }
        }
    }

    pub(crate) fn qemu_resumes(&mut self, vm: u16, gen_: u32) {
        let q = &mut self.vms[usize::from(vm)].q;
        if q.gen_ == gen_ && q.migrating() && !q.shut {
            q.resume();
            self.say(|_| format!("vm{vm}: source QEMU resumes by itself"));
            if self.src(vm).up {
                self.source_event(vm, DepartureInput::Source(Standing::Back(GuestState::Running)));
            }
        }
    }

    pub(crate) fn qemu_completes(&mut self, vm: u16, gen_: u32) {
        let q = &mut self.vms[usize::from(vm)].q;
        if q.gen_ == gen_ && q.run == SourceRun::Sent {
            q.run = SourceRun::Completed;
            self.say(|_| format!("vm{vm}: source QEMU has completed"));
            if self.src(vm).up {
                self.source_event(vm, DepartureInput::Source(Standing::Completed));
            }
        }
    }

    pub(crate) fn target_event(&mut self, vm: u16, e: ArrivalInput) {
        let now = Nanos(self.now);
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        a.h.handle(e, now);
        self.drive_target(vm);
    }

    /// Who waits for a copy that is not to be.
    fn leave_if_gone(&mut self, vm: u16) {
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        let gone = a.h.state() == TargetState::Discarded && !std::mem::replace(&mut a.left, true);
        if gone {
            let (t, domain) = (self.vms[usize::from(vm)].target, self.vms[usize::from(vm)].domain);
            let agent = &mut self.targets[usize::from(t)];
            let voids = match agent.vms.get_mut(&vm) {
                Some(a) => a.core.leave(&mut agent.host),
                None => vec![],
            };
            for (digest, rest) in voids {
                self.pass_void(t, domain, digest, &rest);
            }
        }
    }

    /// The arrival is looked at soon.
    pub(crate) fn drive_target(&mut self, vm: u16) {
        self.leave_if_gone(vm);
        let life = self.tgt(vm).life;
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        if !std::mem::replace(&mut a.busy, true) {
            self.after(0, 2 * MS, Ev::TargetStep { vm, life });
        }
    }

    /// One action of the arrival; a crash may come before it, in it and after it.
    pub(crate) fn target_step(&mut self, vm: u16, life: u32) {
        if self.tgt(vm).life != life || !self.tgt(vm).up {
            return;
        }
        let now = Nanos(self.now);
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        a.busy = false;
        let Some(action) = a.h.poll(now) else {
            if let Some(at) = a.h.wake() {
                self.at(at.0.max(self.now + 1), Ev::TargetStep { vm, life });
            }
            return;
        };
        let target = Agent::Target(self.vms[usize::from(vm)].target);
        if self.dies_before(target, 12) {
            return;
        }
        self.say(|_| format!("vm{vm}: target does {action:?}"));
        self.aimed_fault(vm);
        let outcome = self.target_does(vm, action);
        if self.dies_before(target, 24) {
            return;
        }
        if let Some(a) = self.tgt(vm).vms.get_mut(&vm) {
            a.h.done(outcome, now);
        }
        self.drive_target(vm);
    }

    fn target_does(&mut self, vm: u16, action: arrival::Action) -> arrival::Outcome {
        use arrival::{Action, Outcome};
        let own = matches!(action, Action::Finish | Action::EndStream);
        let fails = if own { Fails::No } else { self.fails() };
        let failed = || Outcome::Failed("it failed".to_owned());
        if fails == Fails::Undone {
            if let (Action::Say(_), Some(a)) = (&action, self.tgt(vm).vms.get(&vm)) {
                let conns = [a.conn, a.settle];
                conns.into_iter().flatten().for_each(|c| self.break_conn(c));
            }
            return failed();
        }
        let outcome = match action {
            Action::Write(s, guest) => {
                assert_eq!(guest, GuestState::Running);
                let v = &mut self.vms[usize::from(vm)];
                v.journal_t = Some(s);
                v.wrote_loaded |= s == TargetState::Loaded;
                Outcome::Done
            }
            Action::Say(w) => {
                let Some(a) = self.tgt(vm).vms.get(&vm) else { return failed() };
                for c in [a.conn, a.settle].into_iter().flatten() {
                    self.send(c, TAKER, Kind::Word, &w.encode(), &[]);
                }
                Outcome::Done
            }
            Action::Look => Outcome::Looked(match self.vms[usize::from(vm)].t.run {
                TargetRun::Dead => None,
                run => Some(run != TargetRun::Incoming),
            }),
            Action::Run(_) => Outcome::Ran(self.target_runs(vm)),
            Action::Settle => {
                self.vms[usize::from(vm)].settled_t = true;
                Outcome::Done
            }
            Action::Discard => {
                let v = &mut self.vms[usize::from(vm)];
                assert_ne!(v.t.run, TargetRun::Running, "rule 1: a running copy of vm{vm} is discarded");
                let given = matches!(v.journal_s, Some(SourceState::GaveUp | SourceState::TakingBack));
                assert!(
                    v.t.run != TargetRun::Loaded || !v.wrote_loaded || !given || v.q.runs(),
                    "rule 1: the loaded copy of vm{vm}, given up at its source, is discarded"
                );
                v.t.run = TargetRun::Dead;
                Outcome::Done
            }
            Action::EndStream => {
                // All that came has been written unless pages still wait, and those settle by themselves.
                let ends = self.tgt(vm).vms.get(&vm).is_some_and(|a| !a.tail && !a.fed);
                if ends && self.vms[usize::from(vm)].t.run == TargetRun::Incoming {
                    self.vms[usize::from(vm)].t.run = TargetRun::Dead;
                    self.target_event(vm, ArrivalInput::Failed("the stream ended early".to_owned()));
                }
                Outcome::Done
            }
            Action::Finish => Outcome::Done,
        };
        if fails == Fails::Unheard { failed() } else { outcome }
    }

    /// What comes of letting the VM run: somebody may hold its disk for a while.
    fn target_runs(&mut self, vm: u16) -> Ran {
        let now = self.now;
        let locks = self.cfg.locks > 0 && self.rng.one_in(self.cfg.locks);
        let (far, near) = (self.rng.range(0, 6_000 * MS), self.rng.one_in(2));
        let v = &mut self.vms[usize::from(vm)];
        let told = std::mem::replace(&mut v.told, true);
        match v.t.run {
            TargetRun::Loaded => {
                if !told && locks {
                    v.locked = now + if near { far / 20 } else { far };
                }
                if now < v.locked {
                    self.tally.refusals += 1;
                    self.last_fault = now;
                    return Ran::Refused("somebody has its disk".to_owned());
                }
                assert!(
                    v.q.gave() && !v.q.left_behind,
                    "rule 1: a copy of vm{vm} runs that its source has left behind"
                );
                // Nobody knows any more what was loaded and what was sent: its agent was started anew, and its source is gone.
                let forgotten = v.killed_in.is_some() && self.targets[usize::from(v.target)].life > 0;
                assert!(
                    !v.differs || !self.cfg.verify || forgotten,
                    "rule 2: vm{vm} runs with pages that are not what was sent"
                );
                self.tally.proof.ran_harmed += u64::from(v.differs);
                v.t.run = TargetRun::Running;
                v.t.ran = true;
                self.say(|_| format!("vm{vm}: runs at the target"));
                Ran::Runs
            }
            TargetRun::Running => Ran::Runs,
            TargetRun::Incoming => Ran::Refused("it is not loaded".to_owned()),
            TargetRun::Dead => Ran::Gone { told },
        }
    }
}
