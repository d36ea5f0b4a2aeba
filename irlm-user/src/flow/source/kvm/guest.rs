//! A VM that our own VMM runs, seen from its agent: its memory files, its dirty log, and what is still known of its
//! pages. It is opened by preparation and serves push and departure too, because what the log says must reach all three:
//! each harvest clears it.
//!
//! The lock is held over a harvest, and has to be: two harvests at a time would each believe the other's pages clean.
//! It is asked for by at most three threads (preparation or observation, push, departure).

use crate::core::digest::Digest;
use crate::core::handover::GuestState;
use crate::core::kept::{Digests, Kept};
use crate::core::page_set::PageSet;
use crate::core::qemu::{BlockList, RamBlock};
use crate::core::units::PageAddr;
use crate::flow::front::{control, process_of, source_refusals, vmm};
use crate::flow::source::runner::Before;
use crate::flow::{MoveError, lock};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::vmm::{State, Vmm, VmmError};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a VMM whose connection broke may take to end.
const ENDING: Duration = Duration::from_secs(3);

/// What is asked of a VMM while its VM departs; tests put something else in its place.
pub trait Control: Send + std::fmt::Debug {
    /// Whether the guest runs.
    fn state(&mut self) -> Result<State, VmmError>;
    /// See [`Vmm::dirty_harvest`].
    fn harvest(&mut self, bits: &mut Vec<Vec<u64>>) -> Result<u64, VmmError>;
    /// No more log.
    fn stop_log(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::pause_for_move`].
    fn pause_for_move(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::release`].
    fn release(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::give_up`].
    fn give_up(&mut self) -> Result<(), VmmError>;
    /// See [`Vmm::take_back`].
    fn take_back(&mut self) -> Result<(), VmmError>;
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
    fn pause_for_move(&mut self) -> Result<(), VmmError> {
        Vmm::pause_for_move(self)
    }
    fn release(&mut self) -> Result<(), VmmError> {
        Vmm::release(self)
    }
    fn give_up(&mut self) -> Result<(), VmmError> {
        Vmm::give_up(self)
    }
    fn take_back(&mut self) -> Result<(), VmmError> {
        Vmm::take_back(self)
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
    /// Never locked with another one inside.
    left: Mutex<Left>,
    log: Mutex<Log>,
}

/// Who has stopped the VM, if anybody has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Left {
    /// How its owner has left it.
    by_owner: GuestState,
    /// It was stopped here, to be moved.
    stopped: bool,
}

impl Guest {
    /// Reaches the VM and turns its dirty log on: everything written from here on is known.
    pub fn open(socket: &Path, timeout: Duration) -> Result<Self, MoveError> {
        let mut vmm = control(socket, timeout, None)?;
        let process = process_of(&vmm);
        let facts = vmm::facts(&mut vmm, &socket.display().to_string())?;
        let refusals = source_refusals(&facts);
        let Some(guest) = facts.guest().filter(|_| refusals.is_empty()) else {
            return Err(MoveError::Refused(refusals.join("; ")));
        };
        let slots = vmm.memory()?;
        vmm.dirty_start()?;
        let blocks = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        Self::new(Box::new(vmm), blocks, process, guest)
            .map_err(MoveError::at(format_args!("VMM {}", socket.display())))
    }

    /// A VM that stands still here and runs elsewhere: its memory, without a log.
    pub(super) fn again(socket: &Path, timeout: Duration, before: &Before) -> Result<Self, MoveError> {
        let mut vmm = control(socket, timeout, before.process)?;
        let slots = vmm.memory()?;
        let blocks = slots.into_iter().map(|s| (s.name, s.bytes, File::from(s.fd))).collect();
        let this = Self::new(Box::new(vmm), blocks, before.process, before.guest)?;
        lock(&this.left).stopped = before.begun;
        Ok(this)
    }

    /// A VM with these memory files, whose log is on.
    pub fn new(
        control: Box<dyn Control>,
        blocks: Vec<(String, u64, File)>,
        process: Option<Process>,
        guest: GuestState,
    ) -> Result<Self, MoveError> {
        let list =
            blocks.iter().map(|(name, bytes, _)| RamBlock { name: name.as_str().into(), used_bytes: *bytes });
        // A stream's section and footers are QEMU's.
        let list = BlockList::new(0, false, list.collect())?;
        let pages: Vec<u32> = list.blocks().iter().map(RamBlock::pages).collect();
        let bits = pages.iter().map(|n| vec![0; n.div_ceil(64) as usize]).collect();
        let log = Log { control, bits, kept: Kept::nothing(&pages), written: PageSet::empty(&pages) };
        Ok(Self {
            ram: Arc::new(GuestRam::of_files(blocks)),
            blocks: Arc::new(list),
            pages,
            process,
            left: Mutex::new(Left { by_owner: guest, stopped: false }),
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

    /// How its owner has left it, as far as was seen.
    pub(in super::super) fn by_owner(&self) -> GuestState {
        lock(&self.left).by_owner
    }

    /// Looks how its owner has left it by now; an error if it cannot be moved like that.
    pub(in super::super) fn look(&self) -> Result<GuestState, MoveError> {
        let state = self.state()?;
        let mut left = lock(&self.left);
        if !left.stopped {
            left.by_owner = vmm::guest(state).ok_or_else(|| {
                MoveError::Refused(format!("the VM is {state:?}: it cannot leave like that"))
            })?;
        }
        Ok(left.by_owner)
    }

    /// Whether it was stopped here, to be moved.
    pub(in super::super) fn is_stopped(&self) -> bool {
        lock(&self.left).stopped
    }

    /// An error, with whether it means the VM's end; waits a little for an end under way.
    fn judge(&self, e: VmmError) -> MoveError {
        let until = Instant::now() + ENDING;
        while e.is_closed()
            && let Some(p) = self.process
        {
            if p.is_gone() {
                return MoveError::Gone(format!("the source VMM is gone: {e}"));
            }
            if Instant::now() > until {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        e.into()
    }

    /// Looks at the log; returns how many pages it named. Pages read after this returns are covered by the next harvest.
    pub fn harvest(&self) -> Result<u64, MoveError> {
        let result = lock(&self.log).harvest();
        result.map_err(|e| self.judge(e))
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
    ) -> Result<(), MoveError> {
        let mut log = lock(&self.log);
        if running && addrs.iter().any(|a| log.kept.get(*a).is_some()) {
            let result = log.harvest();
            result.map_err(|e| self.judge(e))?;
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

    /// Stops the VM, unless its owner has; returns when no vCPU runs. The log must be harvested once more
    /// after that.
    pub(in super::super) fn pause(&self) -> Result<(), MoveError> {
        if !self.look()?.runs() {
            return Ok(());
        }
        // Before it is done: what times out may still happen.
        lock(&self.left).stopped = true;
        let result = lock(&self.log).control.pause_for_move();
        result.map_err(|e| self.judge(e))
    }

    /// All state but RAM.
    pub(in super::super) fn save(&self) -> Result<Vec<u8>, MoveError> {
        let result = lock(&self.log).control.save();
        result.map_err(|e| self.judge(e))
    }

    /// From here on it goes on elsewhere, whoever resumes it here. Whether it could be: not if it runs, or has run since its
    /// state was saved, by its owner's hand.
    pub(in super::super) fn give_up(&self) -> Result<bool, MoveError> {
        let result = lock(&self.log).control.give_up();
        match result {
            Ok(()) => Ok(true),
            Err(e @ VmmError::Refused { .. }) => {
                tracing::warn!("{e}");
                // Who has had it run since it was stopped here has also stopped it.
                lock(&self.left).stopped = false;
                Ok(false)
            }
            Err(e) => Err(self.judge(e)),
        }
    }

    /// Whether the guest runs.
    pub(in super::super) fn state(&self) -> Result<State, MoveError> {
        let result = lock(&self.log).control.state();
        result.map_err(|e| self.judge(e))
    }

    /// Turns the log off; where that cannot be had it only costs the guest some speed.
    pub(in super::super) fn stop_log(&self) {
        if let Err(e) = lock(&self.log).control.stop_log() {
            tracing::debug!("dirty log: {e}");
        }
    }

    /// Sees that the VM is as its owner has left it, if it was stopped here; gives how it was seen.
    pub(in super::super) fn take_back(&self, guest: GuestState) -> Result<GuestState, MoveError> {
        self.stop_log();
        let resume = guest.runs() && self.is_stopped();
        let mut log = lock(&self.log);
        let result = take_back(&mut *log.control, resume, guest);
        drop(log);
        match result {
            Ok(_) | Err(MoveError::Refused(_) | MoveError::Unsettled(_)) => lock(&self.left).stopped = false,
            Err(MoveError::Vmm(e)) => return Err(self.judge(e)),
            Err(_) => {}
        }
        result
    }
}

/// How long a VM may take to be seen as it is to be.
const TAKES: Duration = Duration::from_secs(5);

/// Sees that a VM stands as `guest` says, and has it run again if it may be resumed; gives how it was seen. One that its
/// owner has paused, also while nobody watched, stays paused.
/// Refused, or unsettled: it answers, and is in no state that its owner could have wanted.
pub(super) fn take_back(
    control: &mut dyn Control,
    resume: bool,
    guest: GuestState,
) -> Result<GuestState, MoveError> {
    let until = Instant::now() + TAKES;
    let mut released = false;
    loop {
        let state = control.state()?;
        match state {
            State::GivenUp => control.take_back()?,
            State::Paused if resume && !released => {
                control.release()?;
                released = true;
            }
            // It was not paused for the move, or not for that alone.
            State::Paused if resume => return Ok(GuestState::Paused),
            // A state that this VMM has no word for is one of a VM that does not run.
            State::Paused if !guest.runs() => return Ok(guest),
            State::Incoming => {
                return Err(MoveError::refused("its VMM waits for a VM, and holds none"));
            }
            _ => {
                if let Some(seen) = vmm::guest(state) {
                    return Ok(seen);
                }
            }
        }
        if Instant::now() > until {
            return Err(MoveError::Unsettled(format!("the VM is still {state:?}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
