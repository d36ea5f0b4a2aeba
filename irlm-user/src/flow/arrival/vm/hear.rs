//! What the arrival's thread hears, from whoever loads the VM and from the agent, and how it
//! carries out what `core::handover` makes of that. Mirror of `flow::source::vm::hear`.

use super::super::{Input, TargetNote, back};
use super::Vm;
use crate::core::account::Pages;
use crate::core::handover::arrival::{Arrival, Input as Event};
use crate::core::handover::{GuestState, Ran, TargetState};
use crate::core::ram::Ram;
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::Word;
use crate::flow::drive::{self, Arrives};
use crate::flow::memory::Reading;
use crate::flow::{MoveError, lock, now, unix_ns};
use std::sync::Arc;
use std::time::Instant;

/// What is said of one that did not stand still.
const RAN_EARLY: &str = "somebody has let it run here before its source had given it up: its copy here is not the VM, and was stopped";

fn unread(e: &MoveError) -> Event {
    Event::Failed(format!("the memory that was loaded cannot be read, so it is not compared: {e}"))
}

impl Vm<'_> {
    pub(super) fn hear(&mut self, input: Input) {
        let event = match input {
            Input::Wake(key) => {
                if let Err(e) = self.woken(key) {
                    self.fail(&e.to_string());
                }
                return;
            }
            Input::ReturnPath(bytes) => {
                let _ = back::say(&self.link.sender, Kind::ReturnPath, &[], &bytes);
                return;
            }
            Input::Loaded => {
                tracing::debug!("{}: loaded", self.spec.name);
                lock(&self.shared.status).loaded_ns = unix_ns();
                match self.stands_still() {
                    Err(event) => event,
                    Ok(()) if self.post.switched() => self.prepare(),
                    Ok(()) if self.group.options.verify == Pages::Ram => match self.read_memory() {
                        Ok(()) => return,
                        Err(e) => unread(&e),
                    },
                    Ok(()) => Event::Loaded(self.loader.tally()),
                }
            }
            Input::Memory(Err(e)) => unread(&e),
            Input::Memory(Ok(ram)) => match self.stands_still() {
                Err(event) => event,
                Ok(()) => {
                    tracing::debug!("{}: its memory was read in {} ms", self.spec.name, ram.took_ms);
                    self.driver.handle(Event::Memory(ram), now());
                    Event::Loaded(self.loader.tally())
                }
            },
            Input::NotHere(peer, digests) => {
                if let Some(fetch) = &mut self.post.fetch {
                    fetch.not_here(peer, &digests);
                }
                return;
            }
            Input::Demand(conn, frames, tag) => {
                self.demand(conn, *frames, tag);
                return;
            }
            Input::Stream(conn, tag, version) => {
                if let Err(e) = self.loader.take_stream(conn, tag, version) {
                    self.fail(&e.to_string());
                }
                return;
            }
            // Who watches the process may be sooner than who waits for its faults.
            Input::LoadFailed(why) => Event::Failed(self.with_what_lacks(why)),
            Input::Abort(why) => Event::Abort(why),
            Input::Settle(decision) => Event::Decided(decision),
            Input::Called(..) | Input::Forget => return,
        };
        self.tell(event);
    }

    /// Whether the loaded VM stands still, as nobody here may have let it run.
    fn stands_still(&mut self) -> Result<(), Event> {
        match self.loader.hold() {
            Ok(false) => Ok(()),
            Ok(true) => Err(Event::Failed(RAN_EARLY.to_owned())),
            Err(e) => Err(Event::Failed(format!("how it stands cannot be seen: {e}"))),
        }
    }

    /// Has the loaded memory read; what it comes to is heard later.
    fn read_memory(&mut self) -> Result<(), MoveError> {
        let begun = Instant::now();
        let memory = (Arc::new(self.loader.memory()?), self.group.marker(self.spec.vm));
        let (sender, shared) = (self.link.sender.clone(), self.shared.clone());
        // Whoever listened to the loading, and was heard meanwhile, is not there any more.
        let beat = move || drop(back::say(&sender, Kind::Heartbeat, &[], &[]));
        // Finding it is downtime too.
        let timed = move |ram| Ram { took_ms: begun.elapsed().as_millis() as u32, ..ram };
        let done = move |read: Result<Ram, _>| shared.inbox.post(Input::Memory(read.map(timed)));
        self.reading = Some(Reading::start(&self.spec.name, memory, beat, done)?);
        Ok(())
    }

    /// Tells the driver what happened, and does what it wants done.
    pub(super) fn tell(&mut self, event: Event) {
        self.driver.handle(event, now());
        self.carry_out();
    }

    pub(super) fn carry_out(&mut self) {
        drive::arrive(self);
        self.publish();
    }
}

impl Arrives for Vm<'_> {
    fn driver(&mut self) -> &mut Arrival {
        &mut self.driver
    }

    fn write(&mut self, state: TargetState, guest: GuestState) -> Result<(), MoveError> {
        (self.journal)(TargetNote::Guest(guest))?;
        (self.journal)(TargetNote::State(state)).inspect_err(|e| tracing::error!("{}: {e}", self.spec.name))
    }

    fn say(&mut self, word: &Word) -> Result<(), MoveError> {
        let said = back::say(&self.link.sender, Kind::Word, &word.encode(), &[]);
        said.map_err(MoveError::from).inspect_err(|e| tracing::debug!("{}: {e}", self.spec.name))
    }

    fn look(&mut self) -> Result<Option<bool>, MoveError> {
        self.loader.look()
    }

    fn run(&mut self, guest: GuestState) -> Result<Ran, MoveError> {
        {
            let mut st = lock(&self.shared.status);
            if st.ready_ns == 0 {
                st.ready_ns = unix_ns();
            }
        }
        let ran = self.loader.run(guest);
        match &ran {
            Ok(Ran::Runs) => {
                let mut st = lock(&self.shared.status);
                st.running_ns = if st.running_ns == 0 { unix_ns() } else { st.running_ns };
            }
            Ok(Ran::Paused) => {}
            Ok(other) => tracing::error!("{}: letting it run: Ok({other:?})", self.spec.name),
            Err(e) => tracing::error!("{}: letting it run: Err({:?})", self.spec.name, e.to_string()),
        }
        ran
    }

    fn settle(&mut self) -> Result<(), MoveError> {
        (self.journal)(TargetNote::Settled).inspect_err(|e| {
            tracing::warn!("{}: {e}; after a restart the VM may be continued once more", self.spec.name);
        })
    }

    fn end_stream(&mut self) {
        self.stream.ending = true;
    }

    fn discard(&mut self) -> Result<(), MoveError> {
        self.loader.discard().inspect_err(|e| {
            tracing::warn!("{}: discarding what waited for it: {e}", self.spec.name);
        })
    }

    fn finish(&mut self) {
        self.over();
    }
}
