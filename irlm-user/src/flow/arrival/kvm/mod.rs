//! An arriving VM for which our own VMM waits (`irlm vmm --incoming`): pages are written into its memory files, its state is
//! handed to it when nothing waits any more. Mirror of `flow::source::kvm`.

// Pages into memory files.
mod memory;

use super::back::{self, Sender};
use super::emit::OutError;
use super::fetch::Faults;
use super::loader::{Before, LoadError, Loader, Note};
use super::{Input, TargetGroup, TargetSpec, TargetVmShared};
use crate::core::account::Tally;
use crate::core::arrival::Output;
use crate::core::handover::{GuestState, Ran};
use crate::core::page_set::PageSet;
use crate::core::qemu::{BlockList, RamBlock};
use crate::core::vm_state;
use crate::flow::MoveError;
use crate::flow::error::unless_refused;
use crate::flow::front::{control, target_refusals, vmm};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::vmm::{Slot, State, Vmm, VmmError};
use memory::Memory;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a VMM may take to end when it was told to, or its VM to be seen to run.
const TAKES: Duration = Duration::from_secs(5);

/// A VMM of ours.
pub(super) struct Kvm<'a> {
    group: &'a TargetGroup,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    vmm: Option<Vmm>,
    /// The VMM that was seen to wait for this VM; none other is ever touched.
    process: Option<Process>,
    /// It may have been told to run.
    told: bool,
    /// Somebody has let it run before it was given to this host.
    ran_early: bool,
    memory: Option<Memory>,
    state: vm_state::Gather,
    /// Its loaded state was accepted.
    loaded: bool,
    open: bool,
}

impl<'a> Kvm<'a> {
    pub(super) fn new(
        group: &'a TargetGroup,
        spec: &'a TargetSpec,
        shared: &'a Arc<TargetVmShared>,
        before: &Before,
    ) -> Self {
        Self {
            group,
            spec,
            shared,
            vmm: None,
            process: before.process,
            told: before.told,
            ran_early: false,
            memory: None,
            state: vm_state::Gather::default(),
            loaded: false,
            open: false,
        }
    }

    /// Asks something; a connection that failed is not used again.
    fn ask<T>(&mut self, what: impl FnOnce(&mut Vmm) -> Result<T, VmmError>) -> Result<T, MoveError> {
        let had = match self.vmm.take() {
            Some(v) => v,
            None => control(self.spec.front.socket(), self.group.timeouts.peer, self.process)?,
        };
        let result = what(self.vmm.insert(had)).map_err(MoveError::from);
        if result.as_ref().is_err_and(MoveError::is_mute) {
            self.vmm = None;
        }
        result
    }

    fn state_now(&mut self) -> Result<State, MoveError> {
        Ok(self.ask(Vmm::status)?.state)
    }

    fn run_it(&mut self, leave: bool) -> Result<Ran, MoveError> {
        match self.state_now()? {
            State::Running => return Ok(Ran::Runs),
            State::Paused if leave => return Ok(Ran::Paused),
            State::Paused | State::Ended => {}
            state @ (State::Incoming | State::Pausing | State::GivenUp) => {
                return Err(MoveError::Refused(format!("its VM is {state:?}")));
            }
        }
        let before = std::mem::replace(&mut self.told, true);
        let until = Instant::now() + TAKES;
        let refused = match self.ask(Vmm::resume) {
            Ok(()) => None,
            Err(e @ MoveError::Vmm(VmmError::Refused { .. })) => Some(e.to_string()),
            Err(e) => return Err(e),
        };
        loop {
            let state = self.state_now()?;
            match (state, &refused) {
                (State::Running, _) => return Ok(Ran::Runs),
                (_, Some(why)) => {
                    self.told = before;
                    return Ok(Ran::Refused(why.clone()));
                }
                _ if Instant::now() > until => {
                    let why = format!("it was told to run, and its VM is {state:?}");
                    return Err(MoveError::Unsettled(why));
                }
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Whether it waits as it was found: nothing has been written into its memory.
    fn is_untouched(&mut self) -> Result<bool, MoveError> {
        if self.state_now()? != State::Incoming {
            return Ok(false);
        }
        let slots = self.ask(Vmm::memory)?;
        let empty = |s: Slot| File::from(s.fd).metadata().is_ok_and(|m| m.blocks() == 0);
        Ok(slots.into_iter().all(empty))
    }

    fn discard_it(&mut self) -> Result<bool, MoveError> {
        if self.is_untouched()? {
            return Ok(false);
        }
        self.hold()?;
        match self.state_now()? {
            // By somebody's hand, who may want to look at what it did.
            State::Running | State::Pausing => {
                Err(MoveError::refused("it runs, which it must not: left alone"))
            }
            State::Paused if self.ran_early => Ok(false),
            State::GivenUp => Err(MoveError::refused("it has moved on to another host: left alone")),
            State::Incoming | State::Paused | State::Ended => {
                self.ask(Vmm::quit)?;
                Ok(true)
            }
        }
    }
}

impl Loader for Kvm<'_> {
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError> {
        let memory = self.memory.as_mut().ok_or(OutError::NoBlocks)?;
        Ok(memory)
    }

    fn meet(&mut self) -> Result<Option<Process>, MoveError> {
        let mut met = control(self.spec.front.socket(), self.group.timeouts.setup, None)?;
        let facts = vmm::facts(&mut met, &self.spec.front.to_string())?;
        unless_refused(&target_refusals(&facts))?;
        self.process = facts.process;
        Ok(self.process)
    }

    fn set_up(&mut self, sender: &Sender, _: &mut Note<'_>) -> Result<(), MoveError> {
        let at = self.spec.front.to_string();
        let facts = self.ask(|v| vmm::facts(v, &at))?;
        unless_refused(&target_refusals(&facts))?;
        let slots = self.ask(Vmm::memory)?;
        self.memory = Some(Memory::new(slots).map_err(MoveError::at(&at))?);
        let (sender, shared, process) = (sender.clone(), self.shared.clone(), self.process);
        std::thread::Builder::new()
            .name(format!("irlm-rp-{}", self.spec.name))
            .spawn(move || back::watch(process, &sender, &shared))?;
        self.open = true;
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.open
    }

    fn blocks(&mut self, list: BlockList) -> Result<(), LoadError> {
        let at = self.spec.front.to_string();
        let memory = self.memory.as_mut().ok_or(OutError::NoBlocks)?;
        memory.fits(&list).map_err(MoveError::at(at))?;
        memory.account_in(self.group.account(self.spec.vm, list.blocks().iter().map(RamBlock::pages)));
        Ok(())
    }

    fn verbatim(&mut self, _bytes: &[u8]) -> Result<(), LoadError> {
        Err(LoadError::Failed(MoveError::refused(
            "the source sent something else than pages before its RAM ended: is it a QEMU?",
        )))
    }

    fn end_ram(&mut self) {}

    fn write(&mut self, body: &[u8]) -> Result<(), LoadError> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        let n = memory.write(body).map_err(MoveError::at("into the VM's memory"))?;
        self.shared.loaded_bytes.fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    fn tally(&mut self) -> Option<Tally> {
        self.memory.as_mut().and_then(Memory::tally)
    }

    fn memory(&mut self) -> Result<GuestRam, MoveError> {
        let memory = self.memory.as_ref().ok_or_else(|| MoveError::refused("it has no memory"))?;
        Ok(memory.to_read()?)
    }

    fn state(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        self.shared.loaded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let whole = self.state.take(bytes).map_err(MoveError::memory)?;
        let Some(state) = whole.filter(|_| !self.loaded).map(<[u8]>::to_vec) else { return Ok(()) };
        self.ask(|v| v.load_state(&state))?;
        self.loaded = true;
        self.shared.inbox.post(Input::Loaded);
        Ok(())
    }

    fn end_stream(&mut self) {
        if !self.loaded {
            let why = "the source VMM died before all of the VM was sent";
            self.shared.inbox.post(Input::LoadFailed(why.into()));
        }
    }

    fn catch_faults(&mut self, due: Option<&PageSet>) -> Result<Faults, MoveError> {
        if let (Some(memory), Some(due)) = (&mut self.memory, due) {
            memory.punch(due).map_err(MoveError::at("throwing away older versions of pages"))?;
        }
        let slots = self.ask(Vmm::memory)?;
        let userfault = self.ask(Vmm::userfault)?;
        let slots = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        Ok(Faults { slots, userfault })
    }

    fn end_faults(&mut self) -> Result<(), MoveError> {
        self.ask(Vmm::userfault_end)
    }

    fn look(&mut self) -> Result<Option<bool>, MoveError> {
        if self.process.is_some_and(Process::is_gone) {
            return Ok(None);
        }
        Ok(Some(self.ask(Vmm::status)?.state != State::Incoming))
    }

    fn hold(&mut self) -> Result<bool, MoveError> {
        let runs = matches!(self.state_now()?, State::Running);
        if runs {
            self.ask(Vmm::pause)?;
        }
        self.ran_early |= runs;
        Ok(runs)
    }

    fn run(&mut self, guest: GuestState) -> Result<Ran, MoveError> {
        let ran = self.run_it(!guest.runs() || self.group.options.leave_paused);
        if ran.is_err() && self.process.is_some_and(Process::is_gone) {
            return Ok(Ran::Gone { told: self.told });
        }
        ran
    }

    fn discard(&mut self) -> Result<(), MoveError> {
        self.open = false;
        // Never seen to wait, so never touched: it may be anybody's.
        let Some(process) = self.process else { return Ok(()) };
        if process.is_gone() {
            return Ok(());
        }
        match self.discard_it() {
            Ok(false) => Ok(()),
            Ok(true) if process.wait_gone(TAKES) => Ok(()),
            Ok(true) => Err(MoveError::Unsettled("it was told to end, and has not yet".into())),
            Err(_) if process.is_gone() => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn close(&mut self) {
        self.open = false;
        self.memory = None;
        self.state = vm_state::Gather::default();
    }
}

#[cfg(test)]
mod tests;
