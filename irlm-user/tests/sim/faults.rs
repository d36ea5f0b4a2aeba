//! What goes wrong, at random times, and what is looked at when nothing does any more.

use crate::guest::{SourceRun, TargetRun};
use crate::net::{Agent, MS};
use crate::world::{Ev, Profile, World};
use irlm_user::core::handover::arrival::Input as ArrivalInput;
use irlm_user::core::handover::departure::Input as DepartureInput;
use irlm_user::core::handover::{SourceState, Standing, TargetState};
use irlm_user::core::wire::messages::Purpose;

impl World {
    pub(crate) fn fault(&mut self) {
        self.faults_left -= 1;
        self.last_fault = self.now;
        let soft = self.cfg.profile == Profile::Soft;
        match self.rng.below(if soft { 5 } else { 12 }) {
            0 => {
                self.index_up = false;
                self.say(|_| "FAULT index dies".to_owned());
            }
            1 => {
                let t = self.rng.below(self.cfg.targets.into()) as u16;
                self.targets[usize::from(t)].hostile = true;
                self.say(|_| format!("FAULT target {t} sends wrong bytes to peers"));
            }
            2 => self.odd_void(),
            3 | 4 => self.break_one(true),
            5 | 6 => self.break_one(false),
            7 => {
                let h = self.rng.below(self.cfg.sources.into()) as u16;
                self.agent_dies(Agent::Source(h));
            }
            8 => {
                let t = self.rng.below(self.cfg.targets.into()) as u16;
                self.agent_dies(Agent::Target(t));
            }
            9 => {
                let vm = self.rng.below(self.cfg.vms.into()) as u16;
                if self.rng.one_in(4) { self.kill_source_qemu(vm) } else { self.kill_target_qemu(vm) }
            }
            10 => self.cut_core(),
            _ => {
                let vm = self.rng.below(self.cfg.vms.into()) as u16;
                self.say(|_| format!("FAULT vm{vm} is cancelled"));
                self.source_event(vm, DepartureInput::Abort("cancelled".to_owned()));
            }
        }
    }

    /// Breaks a connection; a harmless one carries contents only.
    fn break_one(&mut self, harmless: bool) {
        let live: Vec<usize> = (0..self.conns.len())
            .filter(|c| self.conns[*c].live())
            .filter(|c| {
                let contents = matches!(self.conns[*c].purpose, Purpose::Push { .. } | Purpose::Peer { .. });
                contents == harmless
            })
            .collect();
        if !live.is_empty() {
            let c = *self.rng.pick(&live);
            self.say(|w| format!("FAULT connection breaks: {:?}", w.conns[c].purpose));
            self.break_conn(c);
        }
    }

    /// Something breaks soon after a step of the VM's handover, before the next or a few later.
    pub(crate) fn aimed_fault(&mut self, vm: u16) {
        if self.aimed_left > 0 && self.rng.one_in(14) {
            self.aimed_left -= 1;
            self.faults_left += 1;
            self.after(0, 4 * MS, Ev::Aimed(vm));
        }
    }

    /// An agent dies between two steps, exactly there, once in so many. Whether it did.
    pub(crate) fn dies_before(&mut self, a: Agent, one_in: u64) -> bool {
        let dies = self.aimed_left > 0 && self.rng.one_in(one_in);
        if dies {
            self.aimed_left -= 1;
            self.last_fault = self.now;
            self.agent_dies(a);
        }
        dies
    }

    pub(crate) fn aimed(&mut self, vm: u16) {
        self.faults_left -= 1;
        self.last_fault = self.now;
        let v = &self.vms[usize::from(vm)];
        let (source, target) = (Agent::Source(v.source), Agent::Target(v.target));
        match self.rng.below(9) {
            0 | 1 => self.agent_dies(source),
            2 | 3 => self.agent_dies(target),
            4 => {
                self.agent_dies(source);
                self.agent_dies(target);
            }
            5 => self.kill_target_qemu(vm),
            6 => self.kill_source_qemu(vm),
            7 => self.cut_core(),
            _ => {
                if let Some(c) = self.departure(vm).and_then(|d| d.conn) {
                    self.say(|_| format!("FAULT connection of vm{vm} breaks"));
                    self.break_conn(c);
                }
            }
        }
    }

    fn agent_dies(&mut self, a: Agent) {
        if !self.up(a) {
            return;
        }
        self.say(|_| format!("FAULT {a:?} agent dies"));
        match a {
            Agent::Source(h) => self.kill_source(h),
            Agent::Target(t) => self.kill_target(t),
        }
        self.after(5 * MS, 900 * MS, Ev::Restart(a));
    }

    fn cut_core(&mut self) {
        if !std::mem::replace(&mut self.core_up, false) {
            return;
        }
        self.say(|_| "FAULT core link is cut".to_owned());
        for c in 0..self.conns.len() {
            if self.conns[c].core() && self.conns[c].live() {
                self.break_conn(c);
            }
        }
        self.after(5 * MS, 900 * MS, Ev::LinkUp);
    }

    fn kill_source_qemu(&mut self, vm: u16) {
        let state = self.departure(vm).map(|d| d.h.state());
        let v = &mut self.vms[usize::from(vm)];
        if v.q.run == SourceRun::Dead || v.lost {
            return;
        }
        v.killed_in = state.or(v.journal_s).or(Some(SourceState::Aborted));
        v.q.die();
        self.say(|_| format!("FAULT source QEMU of vm{vm} dies"));
        self.source_event(vm, DepartureInput::Source(Standing::Gone));
    }

    fn kill_target_qemu(&mut self, vm: u16) {
        let v = &mut self.vms[usize::from(vm)];
        if v.t.run == TargetRun::Running && self.rng.one_in(2) {
            // The guest crashes where it belongs by now: that is all that may happen to it.
            v.t.run = TargetRun::Dead;
            v.lost = true;
            self.say(|_| format!("FAULT target QEMU of vm{vm} dies, running"));
            self.target_event(vm, ArrivalInput::Failed("killed".to_owned()));
            return;
        }
        // Told to run, and nobody there who knows whether it has.
        let ambiguous = v.journal_t == Some(TargetState::Running) && !self.targets[usize::from(v.target)].up;
        if !matches!(v.t.run, TargetRun::Incoming | TargetRun::Loaded) || ambiguous {
            return;
        }
        v.t.run = TargetRun::Dead;
        v.target_killed = true;
        self.say(|_| format!("FAULT target QEMU of vm{vm} dies"));
        self.target_event(vm, ArrivalInput::Failed("killed".to_owned()));
    }

    pub(crate) fn restart(&mut self, a: Agent) {
        self.last_fault = self.now;
        self.tally.restarts += 1;
        self.say(|_| format!("{a:?} agent is back"));
        match a {
            Agent::Source(h) => self.restart_source(h),
            Agent::Target(t) => self.restart_target(t),
        }
    }

    pub(crate) fn vm_settled(&self, vm: u16) -> bool {
        self.source_settled(vm) && (self.vms[usize::from(vm)].passed_over || self.target_settled(vm))
    }

    pub(crate) fn describe_vm(&self, vm: u16) -> String {
        let v = &self.vms[usize::from(vm)];
        format!(
            "vm{vm}: source {:?} {:?} {:?}, target {:?} {:?} {:?}",
            v.q.run,
            self.departure(vm).map(|d| &d.h),
            v.journal_s,
            v.t.run,
            self.arrival(vm).map(|a| &a.h),
            v.journal_t,
        )
    }

    /// Rule 1 at the end: one runs, the other is gone, and no side doubts it.
    pub(crate) fn check_vm_end(&mut self, vm: u16) {
        let told = self.describe_vm(vm);
        let v = &self.vms[usize::from(vm)];
        let (at_source, at_target) = (v.q.run == SourceRun::Running, v.t.run == TargetRun::Running);
        if self.departure(vm).is_some_and(|d| d.h.behind()) {
            assert!(v.q.run == SourceRun::Dead && !at_target && v.killed_in.is_some(), "{told}");
            self.tally.lost += 1;
            return;
        }
        // Nobody knows whether it had run: it stays paused at its source, for an operator.
        if self.arrival(vm).is_some_and(|a| a.h.state() == TargetState::Lost) && !v.lost {
            assert!(!at_source && v.t.run == TargetRun::Dead && (v.told || v.target_killed), "{told}");
            self.tally.lost += 1;
            return;
        }
        if v.lost || (v.killed_in.is_some() && !at_target) {
            assert!(v.t.run != TargetRun::Loaded || v.differs, "a loaded copy is left in doubt: {told}");
            self.tally.lost += 1;
            return;
        }
        assert!(at_source != at_target, "one copy runs: {told}");
        assert!(self.departure(vm).is_none_or(|d| !d.h.in_doubt()), "in doubt: {told}");
        assert!(self.arrival(vm).is_none_or(|a| !a.h.in_doubt()), "in doubt: {told}");
        if at_target {
            assert_eq!(v.journal_t, Some(TargetState::Running), "{told}");
            assert_eq!(v.journal_s, Some(SourceState::Done), "{told}");
            assert_eq!(v.q.run, SourceRun::Dead, "{told}");
            self.tally.migrated += 1;
            let proven = self.departure(vm).is_some_and(|d| d.h.proven().is_some());
            self.tally.proof.proven += u64::from(proven);
            let told_all = v.killed_in.is_none() && self.life(Agent::Source(v.source)) == 0;
            assert!(
                proven || !self.cfg.verify || !told_all,
                "it moved, and nobody has proven its pages: {told}"
            );
        } else {
            assert!(matches!(v.journal_s, None | Some(SourceState::Aborted)), "{told}");
            assert_ne!(v.t.run, TargetRun::Loaded, "{told}");
            let why = self.cfg.profile == Profile::Hard || v.differs;
            assert!(why, "nothing has failed, and yet it stayed: {told}");
            self.tally.stayed += 1;
        }
    }

    /// Nothing went wrong and nothing went stale: what is shared crossed the core link once.
    pub(crate) fn check_crossings(&self) {
        for (d, s) in self.sightings() {
            let n = self.crossed.get(&d).copied().unwrap_or(0);
            if s.hosts.len() > 1 || s.targets.len() > 1 {
                assert_eq!(n, 1, "{d:?} is shared between hosts and crossed {n} times");
            } else {
                // Pages may have been written over before their first sending.
                assert!(n <= 1, "{d:?} is on {} pages of one host and crossed {n} times", s.pages);
            }
        }
    }
}
