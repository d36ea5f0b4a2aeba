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

use super::prepare::PreparedVm;
use super::runner::{Before, PumpError, Ready, Runner, Saw};
use super::tap::Out;
use super::{SourceGroup, SourceNote, SourceSpec, SourceVmShared};
use crate::core::handover::SourceEvent;
use crate::core::migration::Migration;
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::source::SourceVm;
use crate::flow::front::vmm;
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::vmm::State;
use guest::{Guest, GuestError, run_on};
use send::Sender;
use serve::Serving;
use std::path::Path;
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
        Self { group, spec, shared, guest, sender: None, before, looked: Instant::now(), dead: false }
    }

    fn process(&self) -> Option<Process> {
        self.guest.as_ref().map_or(self.before.process, |g| g.process())
    }
}

impl From<GuestError> for PumpError {
    fn from(e: GuestError) -> Self {
        match e {
            GuestError::Gone(_) => Self::Died(e.to_string()),
            GuestError::Failed(why) => Self::Failed(why),
        }
    }
}

impl Runner for Kvm<'_> {
    fn set_up(&mut self, note: &mut dyn FnMut(SourceNote) -> Result<(), String>) -> Result<(), String> {
        let guest = match self.guest.take() {
            Some(g) => g,
            None => Arc::new(Guest::open(self.spec.front.socket(), self.group.timeouts.setup)?),
        };
        if let Some(p) = guest.process() {
            note(SourceNote::Process(p))?;
        }
        if !guest.was_running() {
            note(SourceNote::WasPaused)?;
        }
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

    fn vm(&mut self) -> Option<&mut SourceVm> {
        self.sender.as_mut().map(Sender::vm)
    }

    fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.guest.as_ref().map(|g| g.blocks())
    }

    fn ram(&self) -> Option<&Arc<GuestRam>> {
        self.guest.as_ref().map(|g| g.ram())
    }

    fn return_path(&mut self, _bytes: &[u8]) {
        // A QEMU's; a VMM of ours says nothing on its own.
    }

    fn let_complete(&mut self) -> Option<SourceEvent> {
        let guest = self.guest.as_ref()?;
        // It is paused, and from here on only `take_back` or an operator runs it again.
        Some(match guest.state() {
            Ok(State::Paused | State::Ended) => {
                guest.stop_log();
                SourceEvent::QemuCompleted
            }
            Ok(_) => SourceEvent::QemuRuns,
            Err(GuestError::Gone(_)) => SourceEvent::QemuDied,
            Err(GuestError::Failed(e)) => {
                tracing::warn!("{}: {e}", self.spec.name);
                SourceEvent::QemuRuns
            }
        })
    }

    fn take_back(&mut self) -> Result<(), String> {
        self.sender = None;
        if let Some(guest) = &self.guest {
            return guest.take_back().map_err(|e| e.to_string());
        }
        let mut vmm = vmm(self.spec.front.socket(), self.group.timeouts.setup, self.before.process)?;
        run_on(&mut vmm, !self.before.was_paused).map_err(|e| e.to_string())
    }

    fn may_switch(&self) -> bool {
        self.group.migration != Migration::PreCopy
    }

    fn serve(&mut self) -> Option<Arc<Serving>> {
        if self.guest.is_none() {
            let guest = Guest::again(self.spec.front.socket(), self.group.timeouts.setup, self.before)
                .inspect_err(|e| tracing::error!("{}: its memory cannot be had: {e}", self.spec.name))
                .ok()?;
            self.guest = Some(Arc::new(guest));
        }
        let guest = self.guest.clone()?;
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

/// After a restart: whether the VM stands still, so that it may count as given up once the target has loaded it.
pub(super) fn completed(path: &Path, timeout: Duration, process: Option<Process>) -> Result<bool, String> {
    let mut vmm = vmm(path, timeout, process)?;
    let status = vmm.status().map_err(|e| e.to_string())?;
    Ok(matches!(status.state, State::Paused | State::Ended))
}

#[cfg(test)]
mod tests;
