//! An arriving VM for which our own VMM waits (`irlm vmm --incoming`): pages are written into its memory files, its state is
//! handed to it when nothing waits any more. Mirror of `flow::source::kvm`.

// Pages into memory files.
mod memory;

use super::back::{self, Sender};
use super::emit::OutError;
use super::fetch::Faults;
use super::loader::{LoadError, Loader};
use super::{Input, TargetGroup, TargetSpec, TargetVmShared};
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::target::Output;
use crate::core::vm_state;
use crate::flow::front::{process_of, vmm};
use crate::host::sched::Process;
use crate::net::vmm::{State, Vmm};
use memory::Memory;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A VMM of ours.
pub(super) struct Kvm<'a> {
    group: &'a TargetGroup,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    vmm: Option<Vmm>,
    /// The VMM that waits (or waited) for this VM; none other is ever touched.
    process: Option<Process>,
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
        process: Option<Process>,
    ) -> Self {
        Self {
            group,
            spec,
            shared,
            vmm: None,
            process,
            memory: None,
            state: vm_state::Gather::default(),
            loaded: false,
            open: false,
        }
    }

    fn vmm(&mut self) -> Result<&mut Vmm, String> {
        if self.vmm.is_none() {
            self.vmm = Some(vmm(self.spec.front.socket(), self.group.timeouts.peer, self.process)?);
        }
        self.vmm.as_mut().ok_or_else(|| "no control connection".to_owned())
    }

    /// Asks something; a connection that failed is not used again.
    fn ask<T>(
        &mut self,
        what: impl FnOnce(&mut Vmm) -> Result<T, crate::net::vmm::VmmError>,
    ) -> Result<T, String> {
        let result = self.vmm().and_then(|v| what(v).map_err(|e| e.to_string()));
        if result.is_err() {
            self.vmm = None;
        }
        result
    }
}

impl Loader for Kvm<'_> {
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError> {
        let memory = self.memory.as_mut().ok_or(OutError::NoBlocks)?;
        Ok(memory)
    }

    fn meet(&mut self) -> Result<Option<Process>, String> {
        let met = vmm(self.spec.front.socket(), self.group.timeouts.setup, None)?;
        self.process = process_of(&met);
        Ok(self.process)
    }

    fn set_up(&mut self, sender: &Sender) -> Result<(), String> {
        let at = self.spec.front.to_string();
        let status = self.ask(Vmm::status)?;
        if status.state != State::Incoming {
            return Err(format!(
                "{at}: the target VMM is {:?}, not waiting for a VM: start it with --incoming",
                status.state
            ));
        }
        let slots = self.ask(Vmm::memory)?;
        self.memory = Some(Memory::new(slots).map_err(|e| format!("{at}: {e}"))?);
        let (sender, shared, process) = (sender.clone(), self.shared.clone(), self.process);
        std::thread::Builder::new()
            .name(format!("irlm-rp-{}", self.spec.name))
            .spawn(move || back::watch(process, &sender, &shared))
            .map_err(|e| e.to_string())?;
        self.open = true;
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.open
    }

    fn blocks(&mut self, list: BlockList) -> Result<(), LoadError> {
        let at = self.spec.front.to_string();
        let memory = self.memory.as_mut().ok_or(OutError::NoBlocks)?;
        memory.fits(&list).map_err(|e| LoadError::Failed(format!("{at}: {e}")))
    }

    fn verbatim(&mut self, _bytes: &[u8]) -> Result<(), LoadError> {
        Err(LoadError::Failed(
            "the source sent something else than pages before its RAM ended: is it a QEMU?".into(),
        ))
    }

    fn end_ram(&mut self) {}

    fn write(&mut self, body: &[u8]) -> Result<(), LoadError> {
        let Some(memory) = &mut self.memory else { return Ok(()) };
        let n = memory.write(body).map_err(|e| LoadError::Failed(format!("into the VM's memory: {e}")))?;
        self.shared.loaded_bytes.fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    fn state(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        self.shared.loaded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let whole = self.state.take(bytes).map_err(|e| LoadError::Failed(e.to_string()))?;
        let Some(state) = whole.filter(|_| !self.loaded).map(<[u8]>::to_vec) else { return Ok(()) };
        self.ask(|v| v.load_state(&state)).map_err(LoadError::Failed)?;
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

    fn catch_faults(&mut self, due: Option<&PageSet>) -> Result<Faults, String> {
        if let (Some(memory), Some(due)) = (&mut self.memory, due) {
            memory.punch(due).map_err(|e| format!("throwing away older versions of pages: {e}"))?;
        }
        let slots = self.ask(Vmm::memory)?;
        let userfault = self.ask(Vmm::userfault)?;
        let slots = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        Ok(Faults { slots, userfault })
    }

    fn end_faults(&mut self) -> Result<(), String> {
        self.ask(Vmm::userfault_end)
    }

    fn alive(&mut self) -> Result<(), String> {
        self.ask(Vmm::status).map(drop)
    }

    fn run(&mut self) -> Result<(), String> {
        match self.ask(Vmm::status)?.state {
            State::Running => Ok(()),
            _ => self.ask(Vmm::resume),
        }
    }

    fn discard(&mut self) -> Result<(), String> {
        self.open = false;
        if self.process.is_none() {
            return Err("its VMM was never met".to_owned());
        }
        match self.ask(Vmm::status)?.state {
            State::Running | State::Pausing => Err("it runs, which it must not: left alone".to_owned()),
            State::Incoming | State::Paused | State::Ended => self.ask(Vmm::quit),
        }
    }

    fn close(&mut self) {
        self.open = false;
        self.memory = None;
        self.state = vm_state::Gather::default();
    }
}
