//! What an arrival needs of whoever loads its VM. What two hosts say to each other about a VM, its waiting list and who
//! owns it is the same for every front (`vm`); where pages go, and how a loaded VM is run or thrown away, is not. Mirror of
//! `flow::source::runner`.

use super::back::Sender;
use super::emit::OutError;
use super::fetch::Faults;
use super::handle::TargetNote;
use crate::core::account::Tally;
use crate::core::arrival::Output;
use crate::core::handover::{GuestState, Ran};
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::flow::{MoveError, Tagged};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::connection::Connection;
use crate::net::qmp::settings::Settings;

/// Why something could not be given to the loader.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("{0}")]
    Out(#[from] OutError),
    #[error("to the target QEMU: {0}")]
    Qemu(std::io::Error),
    #[error("{0}")]
    Failed(#[from] MoveError),
}

/// Writes a note down, durably, before it returns.
pub(super) type Note<'a> = dyn FnMut(TargetNote) -> Result<(), MoveError> + 'a;

/// What the journal knows of an arrival that began before a restart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Before {
    /// The process that waited for the VM.
    pub process: Option<Process>,
    /// What was found there and changed.
    pub settings: Option<Settings>,
    /// It may have been told to run.
    pub told: bool,
}

/// Whoever loads an arriving VM. Owned by the arrival's thread; pages are given to it as [`Output`] and are on their way
/// once [`Loader::write`] returns. After an error the VM is still its source's, unless the method says otherwise.
///
/// That all is loaded, or cannot be, comes through the inbox (`Input::Loaded`, `Input::LoadFailed`).
pub(super) trait Loader {
    /// Where pages go. An error before the VM's blocks are known.
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError>;

    /// Finds out who waits for the VM, and sees that it does wait; whose process it is, if that can be seen.
    /// One that was not seen to wait is never ended. Failure: nobody waits, or not for a VM, and nothing was changed.
    fn meet(&mut self) -> Result<Option<Process>, MoveError>;

    /// Its source has called: opens up for what comes. `sender` is the way back, on which somebody must be
    /// heard from now on ([`crate::flow::HEARTBEAT`]), whatever the loading waits for. What a restart must
    /// know is noted before it is done. Failure: what waits may have been told to load, and can only be discarded.
    fn set_up(&mut self, sender: &Sender, note: &mut Note<'_>) -> Result<(), MoveError>;

    /// As [`Loader::set_up`], for a VM whose source's QEMU streams to the one here: the loading begins with
    /// [`Loader::take_stream`].
    fn set_up_direct(&mut self, _: &Sender, _: &mut Note<'_>) -> Result<(), MoveError> {
        Err(MoveError::refused("only a QEMU takes its stream from another QEMU"))
    }

    /// Gives QEMU the connection that it loads from. Success: the other end has its answer, and may begin. Failure: it has
    /// none, and does not.
    fn take_stream(&mut self, _: Connection, _: Tagged, _version: u16) -> Result<(), MoveError> {
        Err(MoveError::refused("no QEMU waits for a stream"))
    }

    /// Whether it has been set up, and not ended.
    fn is_open(&self) -> bool;

    /// The source's blocks. Here and in the next ones a failure ends the loading: what came is worth nothing.
    fn blocks(&mut self, list: BlockList) -> Result<(), LoadError>;

    /// Bytes that are no pages, before RAM is complete; in their place among the pages.
    fn verbatim(&mut self, bytes: &[u8]) -> Result<(), LoadError>;

    /// All pages are there.
    fn end_ram(&mut self);

    /// Writes what was given; `body` is the frame's body that the pages refer to.
    fn write(&mut self, body: &[u8]) -> Result<(), LoadError>;

    /// What the pages come to that were written; nothing if they are not accounted for.
    fn tally(&mut self) -> Option<Tally>;

    /// The memory of the loaded VM, as whoever runs it has it. Failure: it cannot be read from here.
    fn memory(&mut self) -> Result<GuestRam, MoveError>;

    /// Bytes after RAM.
    fn state(&mut self, bytes: &[u8]) -> Result<(), LoadError>;

    /// Nothing more will come; what has come may be enough.
    fn end_stream(&mut self);

    /// Post-copy: the state is loaded, or an agent before this one saw to that. Pages in `due` are thrown away; from now on
    /// every touch of a page that is not there is told, and the vCPU waits. Failure: the VM must not run.
    fn catch_faults(&mut self, _due: Option<&PageSet>) -> Result<Faults, MoveError> {
        Err(MoveError::refused("only a VM of `irlm vmm` can run before its pages are there"))
    }

    /// Post-copy: all pages are there. Failure: the VM runs on, with a fault for each page that it touches first.
    fn end_faults(&mut self) -> Result<(), MoveError> {
        Ok(())
    }

    /// After a restart: whether everything is loaded; `None`: its process has ended. Failure: it does not answer, and nothing changed.
    fn look(&mut self) -> Result<Option<bool>, MoveError>;

    /// Sees that a loaded VM stands still that was not given to this host yet, and stops it if not; whether it had been let
    /// run by somebody's hand. Failure: it may run.
    fn hold(&mut self) -> Result<bool, MoveError>;

    /// Lets the VM run, if its owner had it running and nobody asked for it to be left paused. Failure: what came of it is
    /// not known, or nobody answers. It may run here, and nowhere else until that is known.
    fn run(&mut self, guest: GuestState) -> Result<Ran, MoveError>;

    /// Ends what waits for the VM, and sees that its process is gone. What was never fed is left waiting, as it was found; one
    /// that somebody has let run is only stopped, and left to them. Failure: it is still there, or that cannot be seen.
    fn discard(&mut self) -> Result<(), MoveError>;

    /// The arrival is over and the VM stays: what was changed for it is put back as it was found.
    fn restore(&mut self) {}

    /// The arrival is over: what is held for it can go.
    fn close(&mut self);
}
