//! What the vm thread hears, from the target, from whoever runs the VM and from the agent, and how it carries out what
//! `core::handover` makes of that.

use super::super::kvm::serve::answer;
use super::super::minder::Says;
use super::super::runner::Ready;
use super::super::{Input, Phase, SourceNote};
use super::{CALL_FIRST, Vm, drill};
use crate::core::handover::{SourceEvent, SourceHandover, SourceState, SourceStep};
use crate::core::page_set::PageSet;
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::Word;
use crate::core::wire::paging::{Demand, decode_set};
use crate::flow::squeeze::{Lane, Window};
use crate::flow::{NOTSENT_LOWAT, Traffic, lock, unix_ns};
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Vm<'_> {
    pub(super) fn hear(&mut self, input: Input) {
        let event = match input {
            Input::Needs(needs) => {
                if !self.recovered {
                    self.answer(&needs);
                }
                return;
            }
            Input::Waiting(pages) => {
                self.awaited = pages;
                return;
            }
            Input::Paging(kind, meta) => {
                if let Err(e) = self.paging(kind, &meta) {
                    tracing::warn!("{}: {e}", self.spec.name);
                    self.hang_up();
                }
                return;
            }
            Input::ReturnPath(bytes) => {
                if self.handover.state() == SourceState::Streaming {
                    self.runner.return_path(&bytes);
                }
                return;
            }
            Input::Reconnected(conn, frames, tag) => match self.adopt(conn, tag, *frames) {
                Ok(()) => {
                    // The other end's window may have gone with its agent: each frame by itself.
                    self.lane = Lane::new(self.group.compress, Window::default(), &self.group.edge);
                    (self.lacks, self.filling) = (None, false);
                    SourceEvent::Reconnected
                }
                Err(e) => {
                    tracing::warn!("{}: {e}", self.spec.name);
                    return;
                }
            },
            Input::Lost(number, why) => {
                if number != self.conn_number {
                    return;
                }
                self.connected = false;
                self.conn = None;
                if self.handover.state() == SourceState::Streaming {
                    SourceEvent::Abort(why)
                } else {
                    if self.handover.in_doubt() {
                        lock(&self.shared.status).reason =
                            format!("in doubt: given up, but the target has not said that it runs ({why})");
                    }
                    SourceEvent::Lost
                }
            }
            Input::Word(w) => {
                tracing::debug!("{}: the target says {w:?}", self.spec.name);
                if w == Word::Loaded {
                    self.set_phase(Phase::HandingOver);
                    drill("before giving up", self.group.drill.before_give_up_ms);
                }
                if w == Word::Ready && self.handover.state() == SourceState::Streaming {
                    drill("before giving up", self.group.drill.before_give_up_ms);
                }
                if w == Word::Runs && self.handover.state() == SourceState::Serving {
                    let mut st = lock(&self.shared.status);
                    st.runs_ns = if st.runs_ns == 0 { unix_ns() } else { st.runs_ns };
                }
                SourceEvent::Word(w)
            }
            Input::Qemu(Says::Stopped(at)) => {
                tracing::debug!("{}: stopped", self.spec.name);
                // What is still to come is downtime.
                self.runner.stopped();
                if let Some(tag) = &self.tag {
                    tag.change(Traffic::Switchover);
                }
                let mut st = lock(&self.shared.status);
                if st.stopped_ns == 0 {
                    st.stopped_ns = at;
                }
                return;
            }
            Input::Qemu(Says::Waits) => {
                self.set_phase(Phase::HandingOver);
                drill("before giving up", self.group.drill.before_give_up_ms);
                SourceEvent::QemuWaits
            }
            Input::Qemu(Says::Completed) => {
                tracing::debug!("{}: QEMU has completed", self.spec.name);
                SourceEvent::QemuCompleted
            }
            Input::Qemu(Says::Failed) => SourceEvent::QemuRuns,
            // The memory is held here, whoever else has gone.
            Input::Qemu(Says::Died) if self.serving.is_some() => return,
            Input::Qemu(Says::Died) => {
                self.died = true;
                // What it wrote before it died may be all the target needs: that goes out first (`pump`).
                if self.streaming() && matches!(self.runner.ready(), Ready::Fd(_)) {
                    return;
                }
                SourceEvent::QemuDied
            }
            // It may still run the VM: the stream is closed, and then it does.
            Input::Qemu(Says::Mute) => SourceEvent::Abort("the source QEMU's monitor was closed".into()),
            Input::Cancel(why) => SourceEvent::Abort(why),
            Input::Settle(decision) => {
                self.settle(decision);
                return;
            }
            Input::Forget => {
                self.finished = true;
                return;
            }
        };
        let steps = self.handover.on(event);
        self.carry_out(steps);
    }

    pub(super) fn carry_out(&mut self, steps: Vec<SourceStep>) {
        for step in steps {
            match step {
                SourceStep::Write(state) => {
                    if let Err(e) = (self.journal)(SourceNote::State(state)) {
                        // Not written down, so not done: before SHUT the VM is still ours.
                        tracing::error!("{}: {e}", self.spec.name);
                        if state == SourceState::GivingUp {
                            self.handover = SourceHandover::new();
                            let why = format!("the journal cannot be written: {e}");
                            let steps = self.handover.on(SourceEvent::Abort(why));
                            self.carry_out(steps);
                            return;
                        }
                    }
                    if state == SourceState::Serving {
                        self.shared.given_up.store(true, Ordering::Relaxed);
                        drill("after giving up", self.group.drill.after_give_up_ms);
                        self.serve();
                        self.filling = self.serving.is_some();
                    }
                    if state == SourceState::GaveUp {
                        self.set_phase(Phase::InDoubt);
                        drill("after giving up", self.group.drill.after_give_up_ms);
                    }
                }
                SourceStep::LetComplete => {
                    if let Some(event) = self.runner.let_complete() {
                        let steps = self.handover.on(event);
                        self.carry_out(steps);
                    }
                }
                SourceStep::TakeBack => self.take_back(),
                SourceStep::Say(word) => {
                    if self.connected
                        && let Err(e) = self.send(Kind::Word, &word.encode(), &[])
                    {
                        tracing::debug!("{}: {e}", self.spec.name);
                    }
                }
                SourceStep::Call => self.call = Some((Instant::now() + CALL_FIRST, CALL_FIRST)),
                SourceStep::Finish => self.finished = true,
            }
        }
        self.publish();
    }

    /// Post-copy: the VM is the target's, and its pages are sent from now on.
    pub(super) fn serve(&mut self) {
        self.serving = self.runner.serve();
        let Some(serving) = &self.serving else {
            let steps = self.handover.on(SourceEvent::PagesLost);
            self.carry_out(steps);
            return;
        };
        if let Some((conn, frames, tag)) = self.demand.take()
            && let Some(vm_conn) = self.conn.as_ref().and_then(|c| c.try_clone().ok())
            && let Err(e) =
                answer(serving.clone(), self.group, self.shared.clone(), (conn, tag), frames, vm_conn)
        {
            tracing::warn!("{}: no thread for what is asked for: {e}", self.spec.name);
        }
        // What a vCPU waits for has a class of its own.
        if let Some(tag) = &self.tag {
            tag.change(Traffic::Bulk);
        }
    }

    /// Post-copy: the target asks for pages, or says after a lost connection what it lacks.
    pub(super) fn paging(&mut self, kind: Kind, meta: &[u8]) -> Result<(), String> {
        if self.handover.state() != SourceState::Serving {
            return Ok(());
        }
        if self.serving.is_none() {
            self.shared.given_up.store(true, Ordering::Relaxed);
            self.serve();
        }
        let Some(serving) = &self.serving else { return Ok(()) };
        if kind == Kind::Demand {
            let demand = Demand::decode(meta).map_err(|e| e.to_string())?;
            return serving.demand(&demand).map_err(|e| e.to_string());
        }
        let lacks = self.lacks.get_or_insert_with(|| PageSet::empty(serving.pages()));
        if decode_set(kind, meta, lacks).map_err(|e| e.to_string())?
            && let Some(lacks) = self.lacks.take()
        {
            tracing::info!("{}: the target lacks {} pages", self.spec.name, lacks.len());
            self.runner.resume(lacks);
            self.demand = self
                .dial_demand()
                .inspect_err(|e| tracing::info!("{}: no demand connection: {e}", self.spec.name))
                .ok();
            if let Some(conn) = &self.conn {
                let _ = crate::host::sockopt::set_notsent_lowat(conn, NOTSENT_LOWAT);
            }
            self.serve();
            self.filling = self.serving.is_some();
        }
        Ok(())
    }

    pub(super) fn take_back(&mut self) {
        if let Err(e) = self.runner.take_back() {
            tracing::error!("{}: cannot see that the VM runs again: {e}", self.spec.name);
            lock(&self.shared.status).reason = format!("cannot see that the VM runs again: {e}");
        }
    }
}
