//! One VM that arrives: what it is, how it stands, what its thread is told, and what is written
//! down of it.

use super::fetch::latency::FaultWaits;
use crate::core::arrival::{Key, VmStats};
use crate::core::digest::Digest;
use crate::core::handover::{Decision, GuestState, TargetState};
use crate::core::postcopy::arrival::FillStats;
use crate::core::ram::Ram;
use crate::core::units::{HostIx, VmIx};
use crate::flow::inbox::Inbox;
use crate::flow::work::Work;
use crate::flow::{Front, MoveError, Tagged, lock};
use crate::host::sched::Process;
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use crate::net::qmp::settings::Settings;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, OnceLock};

/// One VM that arrives.
#[derive(Clone, Debug)]
pub struct TargetSpec {
    /// Its number in the group.
    pub vm: VmIx,
    /// Its name.
    pub name: String,
    /// Where it comes from.
    pub source: HostIx,
    /// Its trust domain's number.
    pub domain: u16,
    /// Who waits for it.
    pub front: Front,
}

/// Where an arrival stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No connection from its source yet.
    #[default]
    Waiting,
    /// Pages come in.
    Filling,
    /// All is loaded; the source has not given up yet.
    Loaded,
    /// Loaded, and the source cannot be heard.
    InDoubt,
    /// This is the VM now, and some of its pages are still at its source.
    Fetching,
    /// This is the VM now.
    Running,
    /// The copy was discarded.
    Discarded,
    /// This was the VM, or may have been, and its process has ended.
    Lost,
}

/// A snapshot for whoever watches.
#[derive(Clone, Debug, Default)]
pub struct TargetStatus {
    /// Where it stands.
    pub phase: Phase,
    /// Waiting-list counters.
    pub stats: VmStats,
    /// Pages that wait now.
    pub waiting: u64,
    /// Unix nanoseconds: QEMU has loaded everything; the VM could run here; it does.
    pub loaded_ns: u64,
    /// See `loaded_ns`.
    pub ready_ns: u64,
    /// See `loaded_ns`; 0 if it was left paused.
    pub running_ns: u64,
    /// Post-copy: when its last page came; counters; how long its vCPUs waited.
    pub filled_ns: u64,
    /// See `filled_ns`.
    pub fill: FillStats,
    /// See `filled_ns`.
    pub faults: FaultWaits,
    /// Why it was discarded, if it was; or what it waits for.
    pub reason: String,
    /// Nobody here knows whether this is the VM, or it is and cannot be seen to run.
    pub in_doubt: bool,
    /// Whether an operator's word would be heard.
    pub may_be_decided: bool,
    /// In which state it is to be here.
    pub guest: GuestState,
    /// It was seen to run, or to stand as it is to stand.
    pub ran: bool,
}

/// On what kind of connection a source calls; a VM connection is to be answered with this wire
/// version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Vm(u16),
    /// The pages go from QEMU to QEMU.
    Direct(u16),
    Settle,
}

/// Messages to a vm thread.
#[derive(Debug)]
pub(crate) enum Input {
    Wake(Key),
    ReturnPath(Vec<u8>),
    /// All is loaded.
    Loaded,
    /// What its memory comes to, where that is to be compared; or why that cannot be known.
    Memory(Result<Ram, MoveError>),
    /// It cannot be, or what was loaded is lost.
    LoadFailed(String),
    /// The source calls.
    Called(Connection, Tagged, Call),
    /// The connection on which the source's QEMU streams, to be answered with this wire version.
    Stream(Connection, Tagged, u16),
    /// Another target host does not have what it was asked to hurry with.
    NotHere(HostIx, Vec<Digest>),
    /// Post-copy: the source's demand connection, with what it may have said on it.
    Demand(Connection, Box<FrameBuf>, Tagged),
    Abort(String),
    Settle(Decision),
    Forget,
}

/// The handle on an arrival.
#[derive(Debug)]
pub struct TargetVmShared {
    pub(crate) inbox: Inbox<Input>,
    pub(crate) status: Mutex<TargetStatus>,
    /// Bytes given to whoever loads it so far.
    pub loaded_bytes: AtomicU64,
    /// What its arrival costs.
    pub work: Work,
    /// The source host that it comes from, by the group's list; not known of a group taken up after
    /// a restart.
    source: OnceLock<HostIx>,
}

impl TargetVmShared {
    /// A handle for an arrival that has not begun.
    pub fn new() -> std::io::Result<Self> {
        let inbox = Inbox::new()?;
        Ok(Self {
            inbox,
            status: Mutex::default(),
            loaded_bytes: AtomicU64::new(0),
            work: Work::default(),
            source: OnceLock::new(),
        })
    }
    /// Pages of this VM are taken from this source host and from no other.
    pub fn comes_from(&self, source: HostIx) {
        let _ = self.source.set(source);
    }
    /// Whether pages of this VM are taken from that source host.
    pub(in crate::flow) fn may_come_from(&self, source: HostIx) -> bool {
        self.source.get().is_none_or(|s| *s == source)
    }
    /// A snapshot.
    #[must_use]
    pub fn status(&self) -> TargetStatus {
        lock(&self.status).clone()
    }
    /// Ends the attempt, unless all is loaded already (then the source decides).
    pub fn cancel(&self, why: &str) {
        self.inbox.post(Input::Abort(why.to_owned()));
    }
    /// An operator decides for both sides.
    pub fn settle(&self, decision: Decision) {
        self.inbox.post(Input::Settle(decision));
    }
    /// It does not arrive: nobody waits for it.
    pub fn never_began(&self, why: &str) {
        let mut st = lock(&self.status);
        st.phase = Phase::Discarded;
        why.clone_into(&mut st.reason);
    }
    /// Whether its source cannot be heard, as far as that matters: all is loaded, or pages do not
    /// come.
    #[must_use]
    pub fn is_apart(&self) -> bool {
        let st = lock(&self.status);
        st.phase == Phase::InDoubt || st.phase == Phase::Fetching && !st.reason.is_empty()
    }
    /// Ends the thread, whatever it waits for.
    pub fn forget(&self) {
        self.inbox.post(Input::Forget);
    }
}

/// What an arrival has written down.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetNote {
    /// The handover's state, before it is acted on.
    State(TargetState),
    /// The QEMU or VMM that waits for the VM, so that after a restart no other one is taken for it.
    Process(Process),
    /// In which state the VM is to be here; written with the next state.
    Guest(GuestState),
    /// What was found at it, before any of it is changed.
    Settings(Settings),
    /// The VM has been continued (or left paused as asked): nothing is left to do after a restart.
    Settled,
}

/// Writes a note down, durably, before it returns.
pub type TargetJournal = Box<dyn FnMut(TargetNote) -> Result<(), MoveError> + Send>;
