//! A departing VM that our own VMM runs (`irlm vmm`): there is no stream; the agent reads its memory files itself, in
//! the order and at the times that `core::precopy` says, with the VMM's dirty log at hand.
//!
//! ```text
//! memfd ─read─► window ─harvest─► kept digest | hash ─► batch ─► frames (as of a QEMU's stream)
//!                 ▲ core::precopy: round, held back, stop           state after RamEnd as Verbatim
//! ```

// The VM, its log, and what is known of its pages.
pub mod guest;
// Pages and state into frames.
mod send;
// Post-copy: pages that are asked for.
pub(in super::super) mod serve;

use super::out::Out;
use super::prepare::PreparedVm;
use super::runner::{Before, Note, PumpError, Ready, Runner, Saw};
use super::{Input, Says, SourceGroup, SourceNote, SourceSpec, SourceVmShared};
use crate::core::account::Tally;
use crate::core::handover::{GuestState, Standing, Took};
use crate::core::migration::Migration;
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::source::SourceVm;
use crate::flow::front::{control, vmm};
use crate::flow::{After, MoveError};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::vmm::{State, Vmm};
use guest::{Guest, take_back};
use send::Sender;
use serve::Serving;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often it is looked whether the VMM is still there.
const LOOK: Duration = Duration::from_millis(250);

/// A VM of our own VMM.
pub(super) struct Kvm<'a> {
    group: &'a SourceGroup,
    spec: &'a SourceSpec,
    shared: &'a Arc<SourceVmShared>,
    guest: Option<Arc<Guest>>,
    sender: Option<Sender>,
    before: Before,
    /// This departure has noted that it begins.
    begun: bool,
    /// All has been sent, and it is given up.
    let_go: bool,
    looked: Instant,
    dead: bool,
}

impl<'a> Kvm<'a> {
    pub(super) fn new(
        group: &'a SourceGroup,
        spec: &'a SourceSpec,
        shared: &'a Arc<SourceVmShared>,
        prepared: PreparedVm,
        before: Before,
    ) -> Self {
        let guest = prepared.guest;
        let begun = before.begun;
        let (sender, looked) = (None, Instant::now());
        Self { group, spec, shared, guest, sender, before, begun, let_go: false, looked, dead: false }
    }

    fn process(&self) -> Option<Process> {
        self.guest.as_ref().map_or(self.before.process, |g| g.process())
    }

    /// Asks a VMM of which nothing is held, on a connection of its own; nothing if its process has ended.
    fn ask_anew<T>(
        &self,
        what: impl FnOnce(&mut Vmm) -> Result<T, MoveError>,
    ) -> Result<Option<T>, MoveError> {
        let asked = control(self.spec.front.socket(), self.group.timeouts.setup, self.before.process)
            .and_then(|mut v| what(&mut v));
        match asked {
            Ok(t) => Ok(Some(t)),
            Err(_) if self.before.process.is_some_and(Process::is_gone) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Runner for Kvm<'_> {
    fn set_up(&mut self, note: &mut Note<'_>) -> Result<(), MoveError> {
        let guest = match self.guest.take() {
            Some(g) => g,
            None => Arc::new(Guest::open(self.spec.front.socket(), self.group.timeouts.setup)?),
        };
        if let Some(p) = guest.process() {
            note(SourceNote::Process(p))?;
        }
        // Preparation was some time ago.
        let left = guest.look()?;
        note(SourceNote::Guest(left))?;
        self.shared.inbox.post(Input::Qemu(Says::Guest(left)));
        note(SourceNote::Begun)?;
        self.begun = true;
        self.sender = Some(Sender::new(self.group, self.spec, self.shared, guest.clone()));
        self.guest = Some(guest);
        Ok(())
    }

    fn ready(&self) -> Ready<'_> {
        self.sender.as_ref().map_or(Ready::Never, Sender::ready)
    }

    fn pump(&mut self, out: &mut Out<'_>, awaited: u32) -> Result<Saw, PumpError> {
        match &mut self.sender {
            Some(s) => s.pump(out, awaited <= super::qemu::GATE_PAGES),
            None => Ok(Saw::default()),
        }
    }

    fn gated(&self, _awaited: u32) -> bool {
        // Only the stop waits for the target: until then there is always something better to send.
        false
    }

    fn tally(&self) -> Option<Tally> {
        self.sender.as_ref().and_then(Sender::tally)
    }

    fn vm(&mut self) -> Option<&mut SourceVm> {
        self.sender.as_mut().map(Sender::vm)
    }

    fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.guest.as_ref().map(|g| g.blocks())
    }

    fn ram(&self) -> Option<&Arc<GuestRam>> {
        self.guest.as_ref().map(|g| g.ram())
    }

    fn started(&self) -> u64 {
        self.process().and_then(Process::started_at).unwrap_or(0)
    }

    fn return_path(&mut self, _bytes: &[u8]) {
        // A QEMU's; a VMM of ours says nothing on its own.
    }

    fn let_complete(&mut self) -> Result<Standing, MoveError> {
        self.let_go = true;
        let standing = self.ask()?;
        if let (Standing::Completed, Some(guest)) = (standing, &self.guest) {
            guest.stop_log();
        }
        Ok(standing)
    }

    fn hold(&mut self) -> Result<(), MoveError> {
        let Some(guest) = &self.guest else { return Ok(()) };
        if guest.give_up()? {
            return Ok(());
        }
        Err(MoveError::refused("its owner has had it run since it was stopped for its move"))
    }

    fn ask(&mut self) -> Result<Standing, MoveError> {
        let gone = |e: MoveError| if e.after() == After::Final { Ok(Standing::Gone) } else { Err(e) };
        let state = match &self.guest {
            Some(guest) => match guest.state() {
                Ok(state) => state,
                Err(e) => return gone(e),
            },
            None => match self.ask_anew(|v| Ok(v.status()?.state))? {
                Some(state) => state,
                None => return Ok(Standing::Gone),
            },
        };
        let stopped = self.guest.as_ref().map_or(self.begun, |g| g.is_stopped());
        match (state, vmm::guest(state)) {
            (State::GivenUp, _) => Ok(Standing::Completed),
            // Stopped here, or by its owner before: it does not run again, whoever resumes it, unless it is taken back.
            (State::Paused, _) if stopped || self.let_go => {
                let given = match &self.guest {
                    Some(guest) => guest.give_up(),
                    None => match self.ask_anew(|v| Ok(v.give_up()?)) {
                        Ok(Some(())) => Ok(true),
                        Ok(None) => return Ok(Standing::Gone),
                        Err(e) => {
                            tracing::warn!("{}: {e}", self.spec.name);
                            Ok(false)
                        }
                    },
                };
                match given {
                    Ok(true) => Ok(Standing::Completed),
                    Ok(false) => Ok(Standing::Back(GuestState::Paused)),
                    Err(e) => gone(e),
                }
            }
            // It never runs again, wherever that is.
            (State::Ended, _) if self.begun => Ok(Standing::Completed),
            (_, Some(guest)) => Ok(Standing::Back(guest)),
            (state, None) => Err(MoveError::Unsettled(format!("its VM is {state:?}"))),
        }
    }

    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        self.sender = None;
        self.let_go = false;
        if let Some(held) = &self.guest {
            return match held.take_back(guest) {
                Ok(stands) => Ok(Took::Stands(stands)),
                Err(e) if e.after() == After::Final => Ok(Took::Gone),
                Err(e) => Err(e),
            };
        }
        let resume = self.begun && guest.runs();
        let stands = self.ask_anew(|v| take_back(v, resume, guest))?;
        Ok(stands.map_or(Took::Gone, Took::Stands))
    }

    fn restore(&mut self) {
        if let Some(guest) = &self.guest {
            guest.stop_log();
        }
    }

    fn may_switch(&self) -> bool {
        self.group.options.migration != Migration::PreCopy
    }

    fn serve(&mut self) -> Option<Arc<Serving>> {
        if self.guest.is_none() {
            let guest = Guest::again(self.spec.front.socket(), self.group.timeouts.setup, &self.before)
                .inspect_err(|e| tracing::error!("{}: its memory cannot be had: {e}", self.spec.name))
                .ok()?;
            self.guest = Some(Arc::new(guest));
        }
        let guest = self.guest.clone()?;
        // It is the target's by now, whatever the VMM would let its owner do.
        match guest.give_up() {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!("{}: its VMM may let it run: do not resume what has left", self.spec.name);
            }
            Err(e) => tracing::warn!("{}: {e}: do not resume what has left", self.spec.name),
        }
        guest.stop_log();
        if self.sender.is_none() {
            self.sender = Some(Sender::new(self.group, self.spec, self.shared, guest));
        }
        self.sender.as_mut().map(Sender::serve)
    }

    fn resume(&mut self, lacks: PageSet) {
        if let Some(s) = &mut self.sender {
            s.resume(lacks);
        }
    }

    fn found_dead(&mut self) -> bool {
        if self.dead || self.looked.elapsed() < LOOK {
            return false;
        }
        self.looked = Instant::now();
        self.dead = self.process().is_some_and(Process::is_gone);
        self.dead
    }
}

#[cfg(test)]
mod tests;
