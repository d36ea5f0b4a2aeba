//! What the vm thread hears, from the target, from whoever runs the VM and from the agent, and how it carries out what
//! `core::handover` makes of that.

use super::super::kvm::serve::answer;
use super::super::runner::Ready;
use super::super::{Input, Phase, Says, SourceNote};
use super::{Vm, drill};
use crate::core::handover::departure::{Departure, Input as Event};
use crate::core::handover::{GuestState, SourceState, Standing, Took};
use crate::core::page_set::PageSet;
use crate::core::ram::holds_clock;
use crate::core::units::PAGE_SIZE;
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{Purpose, Word};
use crate::core::wire::paging::{Demand, decode_set};
use crate::flow::drive::{self, Departs};
use crate::flow::memory::Reading;
use crate::flow::squeeze::{Lane, Window};
use crate::flow::{MoveError, NOTSENT_LOWAT, Tagged, Traffic, lock, now, unix_ns};
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use crate::net::greeting::wait_hello_ok;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Vm<'_> {
    pub(super) fn hear(&mut self, input: Input) {
        if let Some(event) = self.taken_in(input) {
            self.tell(event);
        }
    }

    /// What the driver is to hear of it, if anything.
    fn taken_in(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Needs(needs) => {
                if !self.recovered {
                    self.answer(&needs);
                }
            }
            Input::Waiting(pages) => self.awaited = pages,
            Input::Paging(kind, meta) => {
                if let Err(e) = self.paging(kind, &meta) {
                    tracing::warn!("{}: {e}", self.spec.name);
                    self.hang_up();
                }
            }
            Input::ReturnPath(bytes) => {
                if self.driver.state() == SourceState::Streaming {
                    self.runner.return_path(&bytes);
                }
            }
            Input::Reconnected(conn, frames, tag) => return self.reconnected(conn, *frames, tag),
            Input::Lost(number, why) => return self.lost(number, why),
            Input::Word(w) => return Some(self.word(w)),
            Input::Memory(Ok(ram)) => return Some(Event::Memory(ram)),
            Input::Memory(Err(e)) => return Some(Event::NoMemory(e.to_string())),
            Input::Qemu(says) => return self.says(says),
            Input::Cancel(why) => return Some(Event::Abort(why)),
            Input::Settle(decision) => return Some(Event::Decided(decision)),
            Input::Forget => self.forgotten = true,
        }
        None
    }

    fn reconnected(&mut self, conn: Connection, frames: FrameBuf, tag: Tagged) -> Option<Event> {
        match self.adopt(conn, tag, frames) {
            Ok(()) => {
                // The other end's window may have gone with its agent: each frame by itself.
                self.link.lane =
                    Lane::new(self.group.options.compress, Window::default(), &self.group.squeezing.edge);
                (self.later.lacks, self.later.filling) = (None, false);
                Some(Event::Connected)
            }
            Err(e) => {
                tracing::warn!("{}: {e}", self.spec.name);
                None
            }
        }
    }

    fn lost(&mut self, number: u32, why: String) -> Option<Event> {
        if number != self.link.number {
            return None;
        }
        self.link.connected = false;
        self.link.conn = None;
        self.link.unheard.clone_from(&why);
        Some(Event::Lost(why))
    }

    /// The target says something.
    fn word(&mut self, w: Word) -> Event {
        tracing::debug!("{}: the target says {w:?}", self.spec.name);
        if matches!(w, Word::Memory(_)) {
            self.memory.heard.get_or_insert_with(Instant::now);
            // Who has loaded it all has it from a VM that stands still, whoever saw that or not.
            self.read_memory();
        }
        let streaming = self.driver.state() == SourceState::Streaming;
        if matches!(w, Word::Loaded(_)) && streaming {
            self.set_phase(Phase::HandingOver);
        }
        if matches!(w, Word::Loaded(_) | Word::Ready(_)) && streaming {
            drill("before giving up", self.group.options.drill.before_give_up_ms);
            if let Some(lost) = self.lost_meanwhile() {
                return lost;
            }
            if matches!(w, Word::Ready(_))
                && let Err(e) = self.runner.hold()
            {
                return Event::Abort(e.to_string());
            }
        }
        if w == Word::Runs && self.driver.state() == SourceState::Serving {
            let mut st = lock(&self.shared.status);
            st.runs_ns = if st.runs_ns == 0 { unix_ns() } else { st.runs_ns };
        }
        Event::Word(w)
    }

    /// Whoever runs the VM says something.
    fn says(&mut self, says: Says) -> Option<Event> {
        Some(match says {
            Says::Stopped(at) => {
                self.was_stopped(at);
                Event::Stopped
            }
            Says::Guest(guest) => {
                self.was_left(guest);
                Event::Guest(guest)
            }
            Says::Waits => {
                self.set_phase(Phase::HandingOver);
                self.read_memory();
                drill("before giving up", self.group.options.drill.before_give_up_ms);
                self.lost_meanwhile().unwrap_or(Event::Source(Standing::Waits))
            }
            Says::Completed => {
                tracing::debug!("{}: QEMU has completed", self.spec.name);
                Event::Source(Standing::Completed)
            }
            Says::Failed => Event::Source(Standing::Back(self.driver.guest())),
            // The memory is held here, whoever else has gone.
            Says::Died if self.later.serving.is_some() && self.driver.lost().is_none() => return None,
            Says::Died => {
                self.died = true;
                // What it wrote before it died may be all the target needs: that goes out first (`pump`).
                if self.streaming() && matches!(self.runner.ready(), Ready::Fd(_)) {
                    return None;
                }
                Event::Source(Standing::Gone)
            }
            // It may still run the VM: the stream is closed, and then it does.
            Says::Mute => Event::Mute,
        })
    }

    fn was_stopped(&mut self, at: u64) {
        tracing::debug!("{}: stopped", self.spec.name);
        // What is still to come is downtime.
        self.runner.stopped();
        self.streams_since = None;
        if let Some(tag) = &self.link.tag {
            tag.change(Traffic::Switchover);
        }
        let mut st = lock(&self.shared.status);
        if st.stopped_ns == 0 {
            st.stopped_ns = at;
        }
    }

    /// Its owner, or the guest, has made this of it.
    fn was_left(&mut self, guest: GuestState) {
        if self.driver.state() != SourceState::Streaming {
            return;
        }
        if guest.runs() {
            self.runs_on();
        }
        // An agent after this one must not continue what its owner has stopped. With each state it
        // is written again.
        if guest != self.driver.guest()
            && let Err(e) = (self.journal)(SourceNote::Guest(guest))
        {
            tracing::warn!("{}: {e}", self.spec.name);
        }
    }

    /// A VM is not given up to a target that is known to be gone: nobody could take it.
    fn lost_meanwhile(&self) -> Option<Event> {
        let lost = self.shared.lost.load(Ordering::Relaxed);
        lost.then(|| Event::Lost("the target was lost before the VM was given up".to_owned()))
    }

    /// Tells the driver what happened, and does what it wants done.
    pub(super) fn tell(&mut self, event: Event) {
        // Before anything that may give the VM up.
        if let Some(sent) = self.runner.tally() {
            self.driver.handle(Event::Sent(sent), now());
        }
        self.driver.handle(event, now());
        self.look_for_clocks();
        self.carry_out();
    }

    /// Has the memory of the stopped VM read, if it is to be compared; what it comes to is heard later.
    pub(super) fn read_memory(&mut self) {
        if !self.memory.asked || self.memory.reading.is_some() {
            return;
        }
        let memory = self.runner.ram().cloned().zip(self.group.marker(self.spec));
        let Some(memory) = memory else {
            return self.tell(Event::NoMemory("it cannot be read from outside".to_owned()));
        };
        let shared = self.shared.clone();
        let done = move |read| shared.inbox.post(Input::Memory(read));
        match Reading::start(&self.spec.name, memory, || (), done) {
            Ok(reading) => self.memory.reading = Some(reading),
            Err(e) => self.tell(Event::NoMemory(e.to_string())),
        }
    }

    /// Of pages that differ in memory: whether KVM has a clock in them.
    fn look_for_clocks(&mut self) {
        let Some(ram) = self.runner.ram() else { return };
        if self.driver.odd().is_empty() {
            return;
        }
        let (mut page, started) = ([0; PAGE_SIZE], self.runner.started());
        let mut clocks = self.driver.odd().to_vec();
        clocks.retain(|at| {
            let read = ram.find(&at.block).is_some_and(|b| ram.read_at(b, at.page, &mut page).is_ok());
            read && holds_clock(&page, started)
        });
        for at in &clocks {
            tracing::info!("{}: {at} differs: KVM has a clock of the guest there", self.spec.name);
        }
        self.driver.handle(Event::Clocks(clocks), now());
    }

    /// Notes how long the target waited for what this end's memory comes to.
    fn note_compared(&mut self) {
        if let Some((compared, ..)) = self.driver.same_memory()
            && let Some(heard) = self.memory.heard.take()
        {
            self.memory.waited = heard.elapsed();
            if !compared.alone.is_empty() {
                let names = compared.alone.join(", ");
                tracing::info!("{}: not compared in memory: {names}", self.spec.name);
            }
        }
    }

    pub(super) fn carry_out(&mut self) {
        self.note_compared();
        drive::depart(self);
        self.publish();
    }

    /// Post-copy: the VM is the target's, and its pages are sent from now on.
    pub(super) fn serve_pages(&mut self) -> Result<(), MoveError> {
        self.later.serving = self.runner.serve();
        let Some(serving) = &self.later.serving else {
            return Err(MoveError::Gone("its memory cannot be had".into()));
        };
        if let Some((conn, frames, tag)) = self.later.demand.take()
            && let Some(vm_conn) = self.link.conn.clone()
            && let Err(e) =
                answer(serving.clone(), self.group, self.shared.clone(), (conn, tag), frames, vm_conn)
        {
            tracing::warn!("{}: no thread for what is asked for: {e}", self.spec.name);
        }
        // What a vCPU waits for has a class of its own.
        if let Some(tag) = &self.link.tag {
            tag.change(Traffic::Bulk);
        }
        Ok(())
    }

    fn serve_again(&mut self) {
        if self.serve_pages().is_err() {
            self.tell(Event::PagesLost);
        }
    }

    /// Post-copy: the target asks for pages, or says after a lost connection what it lacks.
    pub(super) fn paging(&mut self, kind: Kind, meta: &[u8]) -> Result<(), MoveError> {
        if self.driver.state() != SourceState::Serving {
            return Ok(());
        }
        if self.later.serving.is_none() {
            self.shared.given_up.store(true, Ordering::Relaxed);
            self.serve_again();
        }
        let Some(serving) = &self.later.serving else { return Ok(()) };
        if kind == Kind::Demand {
            let demand = Demand::decode(meta)?;
            return serving.demand(&demand).map_err(MoveError::memory);
        }
        let lacks = self.later.lacks.get_or_insert_with(|| PageSet::empty(serving.pages()));
        if decode_set(kind, meta, lacks)?
            && let Some(lacks) = self.later.lacks.take()
        {
            tracing::info!("{}: the target lacks {} pages", self.spec.name, lacks.len());
            self.runner.resume(lacks);
            self.later.demand = self
                .dial_demand()
                .inspect_err(|e| tracing::info!("{}: no demand connection: {e}", self.spec.name))
                .ok();
            if let Some(conn) = &self.link.conn {
                let _ = crate::host::sockopt::set_notsent_lowat(conn, NOTSENT_LOWAT);
            }
            self.serve_again();
            self.later.filling = self.later.serving.is_some();
        }
        Ok(())
    }
}

impl Departs for Vm<'_> {
    fn driver(&mut self) -> &mut Departure {
        &mut self.driver
    }

    fn write(&mut self, state: SourceState, guest: GuestState) -> Result<(), MoveError> {
        (self.journal)(SourceNote::State(state, guest)).inspect_err(|e| {
            tracing::error!("{}: {e}", self.spec.name);
        })?;
        match state {
            SourceState::Serving => {
                self.shared.given_up.store(true, Ordering::Relaxed);
                drill("after giving up", self.group.options.drill.after_give_up_ms);
            }
            SourceState::GaveUp => {
                self.set_phase(Phase::InDoubt);
                drill("after giving up", self.group.options.drill.after_give_up_ms);
            }
            _ => {}
        }
        Ok(())
    }

    fn let_complete(&mut self) -> Result<Standing, MoveError> {
        self.runner.let_complete().inspect_err(|e| {
            tracing::warn!("{}: letting it go: {e}", self.spec.name);
        })
    }

    fn ask(&mut self) -> Result<Standing, MoveError> {
        self.runner.ask().inspect_err(|e| tracing::warn!("{}: {e}", self.spec.name))
    }

    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        self.memory.reading = None;
        let took = self.runner.take_back(guest).inspect_err(|e| {
            tracing::error!("{}: cannot see that the VM is as before: {e}", self.spec.name);
        })?;
        self.runner.restore();
        Ok(took)
    }

    fn say(&mut self, word: &Word) -> Result<(), MoveError> {
        if !self.link.connected {
            return Err(MoveError::refused("the target cannot be heard"));
        }
        let said = self.send(Kind::Word, &word.encode(), &[]);
        said.map_err(MoveError::from).inspect_err(|e| tracing::debug!("{}: {e}", self.spec.name))
    }

    fn serve(&mut self) -> Result<(), MoveError> {
        self.serve_pages()?;
        self.later.filling = true;
        Ok(())
    }

    fn call(&mut self) -> Result<(), MoveError> {
        let purpose = Purpose::Settle { source: self.group.me, vm: self.spec.vm };
        // A VM that is called about is paused.
        let called = self.dial(purpose, Traffic::Switchover).and_then(|(conn, tag)| {
            let (_, frames) = wait_hello_ok(&conn, self.group.timeouts.peer)?;
            Ok((conn, frames, tag))
        });
        match called {
            Ok((conn, frames, tag)) => {
                self.hear(Input::Reconnected(conn, Box::new(frames), tag));
                Ok(())
            }
            Err(e) => {
                tracing::debug!("{}: {e}", self.spec.name);
                self.link.unheard = e.to_string();
                Err(e)
            }
        }
    }

    fn finish(&mut self) {
        self.runner.restore();
    }
}
