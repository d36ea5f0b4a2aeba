//! A VM that our own VMM runs, seen from its agent: its memory files, its dirty log, and what is still known of its
//! pages. It is opened by preparation and serves push and departure too, because what the log says must reach all three:
//! each harvest clears it.
//!
//! The lock is held over a harvest, and has to be: two harvests at a time would each believe the other's pages clean.
//! It is asked for by at most three threads (preparation or observation, push, departure).

use crate::core::digest::Digest;
use crate::core::kept::{Digests, Kept};
use crate::core::page_set::PageSet;
use crate::core::qemu::{BlockList, RamBlock};
use crate::core::units::PageAddr;
use crate::flow::front::{process_of, vmm};
use crate::flow::lock;
use crate::flow::source::runner::Before;
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::vmm::{State, Vmm, VmmError};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a VMM whose connection broke may take to end.
const ENDING: Duration = Duration::from_secs(3);

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Its process has ended, and the VM with it.
    #[error("the source VMM is gone: {0}")]
    Gone(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// What is asked of a VMM while its VM departs; tests put something else in its place.
pub trait Control: Send + std::fmt::Debug {
    /// Whether the guest runs.
    fn state(&mut self) -> Result<State, VmmError>;
    /// See [`Vmm::dirty_harvest`].
    fn harvest(&mut self, bits: &mut Vec<Vec<u64>>) -> Result<u64, VmmError>;
    /// No more log.
    fn stop_log(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::pause`].
    fn pause(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::resume`].
    fn resume(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::save_state`].
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;
}

impl Control for Vmm {
    fn state(&mut self) -> Result<State, VmmError> {
        self.status().map(|s| s.state)
    }
    fn harvest(&mut self, bits: &mut Vec<Vec<u64>>) -> Result<u64, VmmError> {
        self.dirty_harvest(bits)
    }
    fn stop_log(&mut self) -> Result<(), VmmError> {
        self.dirty_stop()
    }
    fn pause(&mut self) -> Result<(), VmmError> {
        Vmm::pause(self)
    }
    fn resume(&mut self) -> Result<(), VmmError> {
        Vmm::resume(self)
    }
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        self.save_state()
    }
}

/// What is known of a page that has just been read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) enum Known {
    /// It has this digest, and not been written until after it was read.
    Digest(Digest),
    /// It has been written about when it was read: it is sent later.
    Written,
    /// Only what was read.
    Nothing,
}

#[derive(Debug)]
struct Log {
    control: Box<dyn Control>,
    /// Of one harvest; reused.
    bits: Vec<Vec<u64>>,
    kept: Kept,
    /// Written, and not yet taken by [`Guest::take_written`].
    written: PageSet,
}

impl Log {
    fn harvest(&mut self) -> Result<u64, VmmError> {
        self.bits.iter_mut().for_each(|b| b.fill(0));
        let n = self.control.harvest(&mut self.bits)?;
        for (block, bits) in self.bits.iter().enumerate() {
            self.kept.written(block, bits);
            self.written.merge(block, bits);
        }
        Ok(n)
    }
}

/// The VM, with its dirty log on.
#[derive(Debug)]
pub struct Guest {
    ram: Arc<GuestRam>,
    blocks: Arc<BlockList>,
    pages: Vec<u32>,
    process: Option<Process>,
    was_running: bool,
    log: Mutex<Log>,
}

impl Guest {
    /// Reaches the VM and turns its dirty log on: everything written from here on is known.
    pub fn open(socket: &Path, timeout: Duration) -> Result<Self, String> {
        let mut vmm = vmm(socket, timeout, None)?;
        let process = process_of(&vmm);
        let status = vmm.status().map_err(|e| e.to_string())?;
        if !matches!(status.state, State::Running | State::Paused) {
            return Err(format!(
                "VMM {}: the VM is {:?}: only one that runs or is paused can leave",
                socket.display(),
                status.state
            ));
        }
        let slots = vmm.memory().map_err(|e| e.to_string())?;
        vmm.dirty_start().map_err(|e| e.to_string())?;
        let blocks = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        Self::new(Box::new(vmm), blocks, process, status.state == State::Running)
            .map_err(|e| format!("VMM {}: {e}", socket.display()))
    }

    /// A VM that stands still here and runs elsewhere: its memory, without a log.
    pub(super) fn again(socket: &Path, timeout: Duration, before: Before) -> Result<Self, String> {
        let mut vmm = vmm(socket, timeout, before.process)?;
        let slots = vmm.memory().map_err(|e| e.to_string())?;
        let blocks = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        Self::new(Box::new(vmm), blocks, before.process, !before.was_paused)
    }

    /// A VM with these memory files, whose log is on.
    pub fn new(
        control: Box<dyn Control>,
        blocks: Vec<(String, u64, File)>,
        process: Option<Process>,
        was_running: bool,
    ) -> Result<Self, String> {
        let list =
            blocks.iter().map(|(name, bytes, _)| RamBlock { name: name.as_str().into(), used_bytes: *bytes });
        // A stream's section and footers are QEMU's.
        let list = BlockList::new(0, false, list.collect()).map_err(|e| e.to_string())?;
        let pages: Vec<u32> = list.blocks().iter().map(RamBlock::pages).collect();
        let bits = pages.iter().map(|n| vec![0; n.div_ceil(64) as usize]).collect();
        let log = Log { control, bits, kept: Kept::nothing(&pages), written: PageSet::empty(&pages) };
        Ok(Self {
            ram: Arc::new(GuestRam::of_files(blocks)),
            blocks: Arc::new(list),
            pages,
            process,
            was_running,
            log: Mutex::new(log),
        })
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its slots, as the wire has them.
    pub(in super::super) fn blocks(&self) -> &Arc<BlockList> {
        &self.blocks
    }

    /// Pages of each slot.
    #[must_use]
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The VMM's process, if it can be seen from here.
    #[must_use]
    pub fn process(&self) -> Option<Process> {
        self.process
    }

    /// Whether the VM ran when it was opened.
    pub(in super::super) fn was_running(&self) -> bool {
        self.was_running
    }

    /// An error, with whether it means the VM's end; waits a little for an end under way.
    fn judge(&self, e: &VmmError) -> GuestError {
        let until = Instant::now() + ENDING;
        while e.is_closed()
            && let Some(p) = self.process
        {
            if p.is_gone() {
                return GuestError::Gone(e.to_string());
            }
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        GuestError::Failed(e.to_string())
    }

    /// Looks at the log; returns how many pages it named. Pages read after this returns are covered by the next harvest.
    pub fn harvest(&self) -> Result<u64, GuestError> {
        let result = lock(&self.log).harvest();
        result.map_err(|e| self.judge(&e))
    }

    /// Gives what has been written since the last call, as far as it was harvested.
    pub fn take_written(&self, mut give: impl FnMut(usize, &[u64])) {
        let mut log = lock(&self.log);
        if !log.written.is_empty() {
            (0..self.pages.len()).for_each(|block| give(block, log.written.words(block)));
            log.written.clear();
        }
    }

    /// Digests that preparation took, all since the log is on.
    pub fn learn(&self, digests: Digests) {
        lock(&self.log).kept.learn(digests);
    }

    /// Whether the page has been written since the log is on, as far as it was harvested.
    #[must_use]
    pub fn is_stale(&self, addr: PageAddr) -> bool {
        lock(&self.log).kept.is_stale(addr)
    }

    /// What is known of pages that *have been read already*: `running` makes sure of it by a harvest, if any digest is to be
    /// believed.
    pub(in super::super) fn known(
        &self,
        addrs: &[PageAddr],
        running: bool,
        out: &mut Vec<Known>,
    ) -> Result<(), GuestError> {
        let mut log = lock(&self.log);
        if running && addrs.iter().any(|a| log.kept.get(*a).is_some()) {
            let result = log.harvest();
            result.map_err(|e| self.judge(&e))?;
        }
        out.clear();
        out.extend(addrs.iter().map(|a| match log.kept.get(*a) {
            Some(d) => Known::Digest(d),
            None if running && log.written.contains(*a) => Known::Written,
            None => Known::Nothing,
        }));
        Ok(())
    }

    /// Digests that are kept of pages of a VM that stands still and whose log has been harvested since.
    pub(in super::super) fn kept(&self, addrs: &[PageAddr], out: &mut Vec<Option<Digest>>) {
        let log = lock(&self.log);
        out.clear();
        out.extend(addrs.iter().map(|a| log.kept.get(*a)));
    }

    /// Stops the VM; returns when no vCPU runs. The log must be harvested once more after that.
    pub(in super::super) fn pause(&self) -> Result<(), GuestError> {
        let result = lock(&self.log).control.pause();
        result.map_err(|e| self.judge(&e))
    }

    /// All state but RAM.
    pub(in super::super) fn save(&self) -> Result<Vec<u8>, GuestError> {
        let result = lock(&self.log).control.save();
        result.map_err(|e| self.judge(&e))
    }

    /// Whether the guest runs.
    pub(in super::super) fn state(&self) -> Result<State, GuestError> {
        let result = lock(&self.log).control.state();
        result.map_err(|e| self.judge(&e))
    }

    /// Turns the log off; where that cannot be had it only costs the guest some speed.
    pub(in super::super) fn stop_log(&self) {
        if let Err(e) = lock(&self.log).control.stop_log() {
            tracing::debug!("dirty log: {e}");
        }
    }

    /// Lets the VM run as before its move.
    pub(in super::super) fn take_back(&self) -> Result<(), GuestError> {
        self.stop_log();
        let mut log = lock(&self.log);
        let result = run_on(&mut *log.control, self.was_running);
        drop(log);
        result.map_err(|e| self.judge(&e))
    }
}

/// Sees that a VM runs, if it is to; whatever state its move left it in.
pub(super) fn run_on(control: &mut dyn Control, should_run: bool) -> Result<(), VmmError> {
    match control.state()? {
        State::Paused | State::Pausing if should_run => control.resume(),
        _ => Ok(()),
    }
}
