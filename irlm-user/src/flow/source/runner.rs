//! What a departure needs of whoever runs its VM. All that two hosts say to each other about a VM, who owns it and what
//! happens when somebody dies is the same for every front (`vm`); where pages come from, and how a VM is stopped and
//! taken back, is not.

use super::SourceNote;
use super::kvm::serve::Serving;
use super::out::Out;
use crate::core::account::Tally;
use crate::core::handover::{GuestState, Standing, Took};
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::source::SourceVm;
use crate::flow::{After, MoveError};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::qmp::settings::Settings;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

/// When there is something to pump.
#[derive(Debug)]
pub(super) enum Ready<'a> {
    /// When this can be read.
    Fd(BorrowedFd<'a>),
    /// From then on.
    At(Instant),
    /// No more.
    Never,
}

/// What a pump step saw.
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Saw {
    /// All that will ever come has been sent: QEMU closed its end.
    pub(super) eof: bool,
    /// The VM was stopped in this step.
    pub(super) stopped: bool,
    /// Post-copy: and the target has been told which pages are still to come.
    pub(super) switched: bool,
}

/// Why pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum PumpError {
    /// The target cannot be reached.
    #[error("to the target: {0}")]
    Send(std::io::Error),
    /// Whoever runs the VM is gone for good, and what it left is not enough.
    #[error("{0}")]
    Died(String),
    /// Anything else: the attempt is over, the VM is not.
    #[error("{0}")]
    Failed(MoveError),
}

impl From<MoveError> for PumpError {
    fn from(e: MoveError) -> Self {
        match e.after() {
            After::Final => Self::Died(e.to_string()),
            After::Kept | After::InDoubt => Self::Failed(e),
        }
    }
}

/// Writes a note down, durably, before it returns.
pub(super) type Note<'a> = dyn FnMut(SourceNote) -> Result<(), MoveError> + 'a;

/// Whoever runs a departing VM. Owned by the departure's thread. After an error the VM is still the source's, unless the
/// method says otherwise.
pub(super) trait Runner {
    /// Before the target is called, which then begins something that cannot be begun twice: whether the VM may leave now.
    /// Nothing is changed, whatever comes of it.
    fn may_leave(&mut self) -> Result<(), MoveError> {
        Ok(())
    }

    /// Begins. The target is ready. What a restart must know is noted first.
    ///
    /// Success: from here on there is something to pump. Failure: a migration may have begun, if [`SourceNote::Begun`] was noted
    /// and [`SourceNote::NotBegun`] was not; [`Self::take_back`] ends it.
    fn set_up(&mut self, note: &mut Note<'_>) -> Result<(), MoveError>;

    /// When to pump next.
    fn ready(&self) -> Ready<'_>;

    /// Sends some of what there is. `awaited` pages wait for content at the target. A failure ends the stream: what was sent
    /// of it is worth nothing, and [`PumpError`] says whether the VM is lost too.
    fn pump(&mut self, out: &mut Out<'_>, awaited: u32) -> Result<Saw, PumpError>;

    /// Whether pumping must wait because so many pages wait at the target.
    fn gated(&self, awaited: u32) -> bool;

    /// Whether pages pass the agent.
    fn in_path(&self) -> bool {
        true
    }

    /// What the pages come to that were sent, once all were that the target must have before it may run the VM; nothing if
    /// they are not accounted for.
    fn tally(&self) -> Option<Tally> {
        None
    }

    /// The page decisions, once there is something to pump.
    fn vm(&mut self) -> Option<&mut SourceVm>;

    /// The blocks, once they are known.
    fn blocks(&self) -> Option<&Arc<BlockList>>;

    /// The VM's RAM, if it can be read beside the stream.
    fn ram(&self) -> Option<&Arc<GuestRam>>;

    /// When whoever runs the VM was started, in seconds of Unix time; 0: not known.
    fn started(&self) -> u64 {
        0
    }

    /// Bytes of the target's return path.
    fn return_path(&mut self, bytes: &[u8]);

    /// Gives the VM up: it will not run here again unless it is taken back. How that stands now; what follows comes through
    /// the inbox. Failure: it may have been told.
    fn let_complete(&mut self) -> Result<Standing, MoveError>;

    /// Post-copy: the target is ready to run it. Success: from here on its owner cannot have it run here. Failure: they have
    /// had, or that is not known, so that what the target holds may be older.
    fn hold(&mut self) -> Result<(), MoveError> {
        Ok(())
    }

    /// How whoever runs the VM stands to this migration. Not while pages of a QEMU are pumped: it may be
    /// writing its last ones to the very thread that asks, and then answers nobody. Failure: nothing was seen.
    fn ask(&mut self) -> Result<Standing, MoveError>;

    /// Ends the attempt, if this departure began one, and sees that the VM is as its owner has left it. May come twice, also
    /// for a VM that was given up. Failure: it may still stand still.
    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError>;

    /// The departure is over: what was changed for it is put back as it was found.
    fn restore(&mut self) {}

    /// Post-copy: whether this departure may need a demand connection.
    fn may_switch(&self) -> bool {
        false
    }

    /// Post-copy: the VM is the target's, so that [`Self::pump`] sends its pages; nothing if they cannot be had any more.
    fn serve(&mut self) -> Option<Arc<Serving>> {
        None
    }

    /// Post-copy, on a new connection: what the target lacks is what is left to send, all of it as contents.
    fn resume(&mut self, _lacks: PageSet) {}

    /// Whether whoever runs the VM has been found dead since the last call.
    fn found_dead(&mut self) -> bool;

    /// The VM was stopped: what is still to come is downtime.
    fn stopped(&mut self) {}
}

/// What the journal knows of a departure that began before a restart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Before {
    /// The process that ran the VM.
    pub process: Option<Process>,
    /// How its owner had left it.
    pub guest: GuestState,
    /// A migration was begun, or is as good as begun: what is under way there is ours.
    pub begun: bool,
    /// What was found there and changed.
    pub settings: Option<Settings>,
}
