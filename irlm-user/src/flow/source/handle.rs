//! One VM that leaves: what it is, how it stands, what its thread is told, and what is written down
//! of it.

use crate::core::account::Proof;
use crate::core::handover::{Decision, GuestState, SourceState};
use crate::core::ram::Ram;
use crate::core::source::VmStats;
use crate::core::units::{HostIx, VmIx};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{NeedEntry, Word};
use crate::flow::inbox::Inbox;
use crate::flow::work::Work;
use crate::flow::{Front, MoveError, Tagged, lock, unix_ns};
use crate::host::sched::Process;
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use crate::net::qmp::settings::Settings;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// One VM that leaves.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    /// Its number in the group.
    pub vm: VmIx,
    /// Its name.
    pub name: String,
    /// Where it goes.
    pub target: HostIx,
    /// Its trust domain's number.
    pub domain: u16,
    /// Who runs it.
    pub front: Front,
}

/// Where a departure stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not begun.
    #[default]
    Waiting,
    /// Both ends are being set up.
    Connecting,
    /// Rounds of pages.
    Migrating,
    /// The VM is stopped; last pages and device state.
    Stopped,
    /// The target has loaded everything.
    HandingOver,
    /// The source has given up; the target has not said yet that it runs.
    InDoubt,
    /// The target runs it and still needs pages of the copy here.
    Serving,
    /// The attempt has ended, and the VM is being taken back: it is not known yet how it stands
    /// here.
    TakingBack,
    /// The target has it.
    Moved,
    /// It stayed here.
    Stayed,
}

/// A snapshot for whoever watches.
#[derive(Clone, Debug, Default)]
pub struct SourceStatus {
    /// Where it stands.
    pub phase: Phase,
    /// Page counters.
    pub stats: VmStats,
    /// Unix nanoseconds: begun (with the push of planned contents, if there is one), VM stopped (0
    /// until then), ended.
    pub started_ns: u64,
    /// When QEMU stopped the VM.
    pub stopped_ns: u64,
    /// When the outcome was known here.
    pub ended_ns: u64,
    /// Post-copy: when the target said that it runs the VM.
    pub runs_ns: u64,
    /// Why it stayed, if it did; or what it is waiting for, if in doubt.
    pub reason: String,
    /// Nobody here knows whether the target runs it, or how the copy here stands.
    pub in_doubt: bool,
    /// Whether an operator's word would be heard.
    pub may_be_decided: bool,
    /// How the copy here stands, once it was seen: in which state it was taken back, or that its
    /// process has ended.
    pub left: Option<Left>,
    /// What its owner had made of it when it was stopped.
    pub guest: GuestState,
    /// Whether both sides know the outcome.
    pub settled: bool,
    /// Guest RAM in bytes, once known.
    pub ram_bytes: u64,
    /// What is known of its pages, once it is.
    pub proof: Option<Proof>,
}

/// How the copy at the source stands when its move has ended without success.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// In this state, as was seen.
    Stands(GuestState),
    /// Its process has ended.
    Ended,
}

/// What whoever runs the VM says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Says {
    /// The VM was stopped, at this Unix time in nanoseconds.
    Stopped(u64),
    /// The VM is stopped, and QEMU waits for leave to hand it over.
    Waits,
    /// The migration is completed: the VM stays stopped.
    Completed,
    /// The migration has failed or was cancelled, and QEMU has let the VM go.
    Failed,
    /// QEMU is gone: its process has ended.
    Died,
    /// Its monitor cannot be heard, though its process is there or cannot be looked at.
    Mute,
    /// What the VM's owner, or the guest, has made of it.
    Guest(GuestState),
}

/// Messages to a vm thread.
#[derive(Debug)]
pub(crate) enum Input {
    Needs(Vec<NeedEntry>),
    /// Pages that wait for content at the target.
    Waiting(u32),
    /// Post-copy: a frame of what the target asks for, or lacks.
    Paging(Kind, Vec<u8>),
    Word(Word),
    /// What the memory of the stopped VM comes to; or why that cannot be known.
    Memory(Result<Ram, MoveError>),
    ReturnPath(Vec<u8>),
    /// The VM (or settle) connection number `.0` ended.
    Lost(u32, String),
    /// A settle connection stands, with what may have been said on it already.
    Reconnected(Connection, Box<FrameBuf>, Tagged),
    Qemu(Says),
    Cancel(String),
    /// An operator's word: settle by hand.
    Settle(Decision),
    /// The agent forgets the group: stop calling.
    Forget,
}

/// The handle on a departure.
#[derive(Debug)]
pub struct SourceVmShared {
    pub(crate) inbox: Inbox<Input>,
    pub(crate) status: Mutex<SourceStatus>,
    /// QEMU stream bytes taken, and bytes put on the wire, so far.
    pub stream_bytes: AtomicU64,
    /// See `stream_bytes`.
    pub wire_bytes: AtomicU64,
    /// What its departure costs.
    pub work: Work,
    /// Pages that may be held back and, of QEMU's stream, those that are ([`crate::core::hold`]).
    pub(crate) may_hold: AtomicU32,
    /// See `may_hold`.
    pub(crate) holds: AtomicU32,
    /// `Pages` frames that the target has taken in.
    pub(crate) taken: AtomicU32,
    /// Slots that the target could not fill, until the next batch hears of them; bounded by
    /// [`crate::core::wire::limits::MAX_UNKEPT`].
    pub(crate) unkept: Mutex<Vec<u32>>,
    /// When the target was last heard ([`crate::flow::now`]).
    pub(crate) heard: AtomicU64,
    /// Set when the reader has lost the connection, so that a blocked writer notices.
    pub(crate) lost: AtomicBool,
    /// Set on cancel, so that a blocked writer notices.
    pub(crate) cancelled: AtomicBool,
    /// Post-copy: the VM is the target's, so that a cancel comes too late.
    pub(crate) given_up: AtomicBool,
}

impl SourceVmShared {
    /// A handle for a departure that has not begun.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            inbox: Inbox::new()?,
            status: Mutex::default(),
            stream_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            work: Work::default(),
            may_hold: AtomicU32::new(UNKNOWN),
            holds: AtomicU32::new(0),
            taken: AtomicU32::new(0),
            unkept: Mutex::default(),
            heard: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        })
    }
    /// The VM's move begins, unless it has.
    pub fn starts_now(&self) {
        let mut st = lock(&self.status);
        if st.started_ns == 0 {
            st.started_ns = unix_ns();
        }
    }
    /// A snapshot.
    #[must_use]
    pub fn status(&self) -> SourceStatus {
        lock(&self.status).clone()
    }
    /// Its departure never began, and will not: it stays, for this reason. Nothing is to be settled
    /// with anybody.
    pub fn never_left(&self, why: &str) {
        let mut st = lock(&self.status);
        if st.phase == Phase::Waiting {
            st.phase = Phase::Stayed;
            st.reason = why.to_owned();
            st.ended_ns = unix_ns();
            st.settled = true;
        }
    }
    /// Ends the attempt, unless the VM has been given up already.
    pub fn cancel(&self, why: &str) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.inbox.post(Input::Cancel(why.to_owned()));
    }
    /// An operator decides for both sides.
    pub fn settle(&self, decision: Decision) {
        self.inbox.post(Input::Settle(decision));
    }
    /// A journal of before a restart says that this departure is over, for both sides.
    pub fn settled_before(&self, moved: bool) {
        let mut st = lock(&self.status);
        st.phase = if moved { Phase::Moved } else { Phase::Stayed };
        st.settled = true;
    }
    /// It does not leave, and its target need not hear of it: it never began.
    pub fn never_began(&self, why: &str) {
        self.stays(why);
        lock(&self.status).settled = true;
    }
    /// It does not leave; its target is still to hear of it.
    pub fn stays(&self, why: &str) {
        let mut st = lock(&self.status);
        st.phase = Phase::Stayed;
        why.clone_into(&mut st.reason);
    }
    /// Whether its target cannot be heard: the connection was lost, or there was none since the
    /// agent began.
    #[must_use]
    pub fn is_apart(&self) -> bool {
        use Ordering::Relaxed;
        self.lost.load(Relaxed) || self.heard.load(Relaxed) == 0
    }
    /// Stops calling a target that does not answer.
    pub fn forget(&self) {
        self.inbox.post(Input::Forget);
    }
}

/// What a departure has written down.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceNote {
    /// The handover's state, before it is acted on, and how the VM's owner, or the guest, has left
    /// it.
    State(SourceState, GuestState),
    /// Whoever runs the VM, so that after a restart its death can be told from a socket that does
    /// not answer.
    Process(Process),
    /// How the VM's owner, or the guest, has left it: only one that ran is continued if it stays.
    Guest(GuestState),
    /// What was found at whoever runs it, before any of it is changed.
    Settings(Settings),
    /// A migration is about to begin: from now on what is under way there is ours.
    Begun,
    /// It was refused: what is under way there is somebody else's.
    NotBegun,
}

/// How many pages may be held back is not known before the link is.
pub(crate) const UNKNOWN: u32 = u32::MAX;

/// Writes a note down, durably, before it returns.
pub type SourceJournal = Box<dyn FnMut(SourceNote) -> Result<(), MoveError> + Send>;
