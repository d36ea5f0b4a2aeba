//! The handover of each VM as its two agents carry it out, step by step, with a crash possible between any two.

use crate::guest::{SourceRun, TargetRun};
use crate::net::{Agent, CALLER, MS, TAKER};
use crate::world::{Ev, World};
use irlm_user::core::handover::{SourceEvent, SourceState, SourceStep, TargetEvent, TargetState, TargetStep};
use irlm_user::core::units::{HostIx, VmIx};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::Purpose;

impl World {
    pub(crate) fn source_event(&mut self, vm: u16, e: SourceEvent) {
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        let steps = d.h.on(e);
        self.take_steps(vm, steps);
    }

    pub(crate) fn take_steps(&mut self, vm: u16, steps: Vec<SourceStep>) {
        let life = self.source_life(vm);
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        d.steps.extend(steps);
        if !d.steps.is_empty() && !std::mem::replace(&mut d.busy, true) {
            self.after(0, 2 * MS, Ev::SourceStep { vm, life });
        }
    }

    /// One step of the handover; a crash may come before the next.
    pub(crate) fn source_step(&mut self, vm: u16, life: u32) {
        let host = self.vms[usize::from(vm)].source;
        if self.source_life(vm) != life || !self.up(Agent::Source(host)) {
            return;
        }
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        let Some(step) = d.steps.pop_front() else {
            d.busy = false;
            return;
        };
        let d = self.src(vm).vms.get(&vm);
        let deep = d.is_some_and(|d| matches!(d.h.state(), SourceState::GaveUp | SourceState::Aborted));
        if self.dies_before(Agent::Source(host), if deep { 6 } else { 20 }) {
            return;
        }
        self.after(0, 2 * MS, Ev::SourceStep { vm, life });
        self.say(|_| format!("vm{vm}: source does {step:?}"));
        self.aimed_fault(vm);
        match step {
            SourceStep::Write(s) => self.vms[usize::from(vm)].journal_s = Some(s),
            SourceStep::LetComplete => {
                let q = &mut self.vms[usize::from(vm)].q;
                let gen_ = q.gen_;
                match q.run {
                    SourceRun::Sent => {
                        q.shut = true;
                        self.after(0, 4 * MS, Ev::Completes { vm, gen_ });
                    }
                    SourceRun::Dead => self.source_event(vm, SourceEvent::QemuDied),
                    _ => self.source_event(vm, SourceEvent::QemuRuns),
                }
            }
            SourceStep::TakeBack => {
                if self.vms[usize::from(vm)].q.run == SourceRun::Completed {
                    self.tally.given_back += 1;
                }
                self.vms[usize::from(vm)].q.resume();
            }
            SourceStep::Say(w) => {
                for c in self.source_conns(vm) {
                    self.send(c, CALLER, Kind::Word, &w.encode(), &[]);
                }
            }
            SourceStep::Call => {
                let d = self.src(vm).vms.get_mut(&vm).expect("just seen");
                if !std::mem::replace(&mut d.calling, true) {
                    self.after(0, 10 * MS, Ev::CallAgain { vm, life });
                }
            }
            SourceStep::Finish => {
                let d = self.src(vm).vms.get_mut(&vm).expect("just seen");
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
        }
    }

    fn source_conns(&mut self, vm: u16) -> Vec<usize> {
        let Some(d) = self.src(vm).vms.get(&vm) else { return vec![] };
        let conns = [d.conn, d.settle];
        conns.into_iter().flatten().filter(|c| self.conns[*c].ok).collect()
    }

    /// Keeps calling the target until the outcome is known to both.
    pub(crate) fn call_again(&mut self, vm: u16, life: u32) {
        let (host, target) = (self.vms[usize::from(vm)].source, self.vms[usize::from(vm)].target);
        if self.source_life(vm) != life || !self.up(Agent::Source(host)) {
            return;
        }
        let Some(d) = self.src(vm).vms.get_mut(&vm) else { return };
        if d.h.settled() {
            d.calling = false;
            return;
        }
        let doubt = d.h.in_doubt();
        let old = d.settle;
        self.tally.doubts += u64::from(doubt);
        if let Some(c) = old.filter(|c| self.now > self.conns[*c].opened + 300 * MS) {
            self.close(c, CALLER);
        }
        if old.is_none_or(|c| !self.conns[c].live()) {
            let purpose = Purpose::Settle { source: HostIx(host), vm: VmIx(vm) };
            let c = self.open(Agent::Source(host), Agent::Target(target), purpose);
            self.src(vm).vms.get_mut(&vm).expect("just seen").settle = Some(c);
        }
        self.after(50 * MS, 150 * MS, Ev::CallAgain { vm, life });
    }

    pub(crate) fn qemu_completes(&mut self, vm: u16, gen_: u32) {
        let q = &mut self.vms[usize::from(vm)].q;
        if q.gen_ == gen_ && q.run == SourceRun::Sent {
            q.run = SourceRun::Completed;
            self.say(|_| format!("vm{vm}: source QEMU has completed"));
            if self.src(vm).up {
                self.source_event(vm, SourceEvent::QemuCompleted);
            }
        }
    }

    pub(crate) fn target_event(&mut self, vm: u16, e: TargetEvent) {
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        let steps = a.h.on(e);
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
        self.take_target_steps(vm, steps);
    }

    pub(crate) fn take_target_steps(&mut self, vm: u16, steps: Vec<TargetStep>) {
        let life = self.tgt(vm).life;
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        a.steps.extend(steps);
        if !a.steps.is_empty() && !std::mem::replace(&mut a.busy, true) {
            self.after(0, 2 * MS, Ev::TargetStep { vm, life });
        }
    }

    /// One step of the handover; a crash may come before the next.
    pub(crate) fn target_step(&mut self, vm: u16, life: u32) {
        if self.tgt(vm).life != life || !self.tgt(vm).up {
            return;
        }
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        let Some(step) = a.steps.pop_front() else {
            a.busy = false;
            return;
        };
        if self.dies_before(Agent::Target(self.vms[usize::from(vm)].target), 12) {
            return;
        }
        self.after(0, 2 * MS, Ev::TargetStep { vm, life });
        self.say(|_| format!("vm{vm}: target does {step:?}"));
        self.aimed_fault(vm);
        match step {
            TargetStep::Write(s) => {
                let v = &mut self.vms[usize::from(vm)];
                let whole = v.t.run == TargetRun::Loaded && v.journal_t == Some(TargetState::Loaded);
                let given = v.journal_s == Some(SourceState::GaveUp);
                assert!(
                    !(s == TargetState::Discarded && whole && given),
                    "rule 1: the loaded copy of vm{vm}, given up at its source, is discarded"
                );
                v.journal_t = Some(s);
            }
            TargetStep::Say(w) => {
                let Some(a) = self.tgt(vm).vms.get(&vm) else { return };
                for c in [a.conn, a.settle].into_iter().flatten() {
                    self.send(c, TAKER, Kind::Word, &w.encode(), &[]);
                }
            }
            TargetStep::Run => match self.vms[usize::from(vm)].t.run {
                TargetRun::Loaded => {
                    self.vms[usize::from(vm)].t.run = TargetRun::Running;
                    self.vms[usize::from(vm)].t.ran = true;
                    self.say(|_| format!("vm{vm}: runs at the target"));
                }
                TargetRun::Running => {}
                TargetRun::Incoming | TargetRun::Dead => {
                    let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
                    // After a restart nobody knows whether it had run.
                    if !a.recovered {
                        a.steps.clear();
                        self.target_event(vm, TargetEvent::NeverRan);
                    }
                }
            },
            TargetStep::Discard => {
                let v = &mut self.vms[usize::from(vm)];
                assert_ne!(v.t.run, TargetRun::Running, "rule 1: a running copy of vm{vm} is discarded");
                v.t.run = TargetRun::Dead;
            }
            TargetStep::EndStream => {
                // All that came has been written unless pages still wait, and those settle by themselves.
                let ends = self.tgt(vm).vms.get(&vm).is_some_and(|a| !a.tail && !a.fed);
                if ends && self.vms[usize::from(vm)].t.run == TargetRun::Incoming {
                    self.vms[usize::from(vm)].t.run = TargetRun::Dead;
                    self.target_event(vm, TargetEvent::QemuFailed("the stream ended early".to_owned()));
                }
            }
            TargetStep::Finish => {}
        }
    }
}
