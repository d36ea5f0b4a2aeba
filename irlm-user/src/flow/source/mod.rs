//! The departure of VMs from a source host. One thread a VM (`vm`) owns the QEMU stream and the sending half of the
//! VM connection; a reader thread (`back`) and a monitor thread (`minder`) tell it things through its inbox.
//!
//! ```text
//! QEMU ──unix──► vm thread: tap → look → resolve → frame ──tcp──► target
//!                    ▲ inbox: needs, words, return path (back) · STOP, completed, failed (minder) · cancel (control)
//! ```
//!
//! There is no queue between QEMU and the wire: the vm thread reads, and writes what it read; when the link is slow,
//! QEMU is slow (docs/qemu-stream.md). Of a VM that our own VMM runs (`kvm`) the vm thread reads the memory itself.

// Reader of the VM connection.
mod back;
// Pages into frames.
mod batch;
// VMs that our own VMM runs: dirty log, kept digests, rounds.
pub mod kvm;
// Contents that stand for many similar ones, lent and borrowed.
pub mod lend;
// Asking the index about contents that appeared after the plan.
pub mod late;
// VMs whose QEMUs stream to each other.
mod direct;
// Monitor thread: events, downtime limit, taking the VM back.
mod minder;
// How VMs write, seen from outside.
pub mod observe;
// Hashing guests from outside, registering, applying the plan.
pub mod prepare;
// What the link to a target host gives.
pub mod probe;
// Sending planned contents ahead of the streams.
pub mod push;
// VMs that QEMU runs.
mod qemu;
// What a departure needs of whoever runs its VM.
pub mod runner;
// Similar pages that a target host has.
pub mod similar;
// QEMU's stream into frames.
mod tap;
// One VM's departure.
pub mod vm;

use super::inbox::Inbox;
use super::pace::Pacer;
use super::squeeze::{Edge, Windows, Workers};
use super::work::Work;
use super::{FlowTags, Front, Tagged, Timeouts};
use crate::core::digest::Hasher;
pub use crate::core::handover::Decision;
use crate::core::handover::{GuestState, SourceState};
use crate::core::migration::Migration;
use crate::core::pair::PairTable;
use crate::core::source::VmStats;
use crate::core::squeeze::Mode;
use crate::core::units::{HostIx, VmIx};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{NeedEntry, Word};
use crate::host::sched::Process;
use crate::net::conn::FrameBuf;
use crate::net::qmp::settings::Settings;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What all VMs of one group that leave this host share.
#[derive(Debug)]
pub struct SourceGroup {
    /// Group name.
    pub name: String,
    /// Group secret.
    pub token: [u8; 32],
    /// This host's number among the source hosts.
    pub me: HostIx,
    /// Data address of each target host.
    pub targets: Vec<SocketAddr>,
    /// Data address of each source host, where it is known.
    pub sources: Vec<Option<SocketAddr>>,
    /// One hasher a trust domain.
    pub hashers: Vec<Hasher>,
    /// Dedup table towards each target host.
    pub tables: Vec<Mutex<PairTable>>,
    /// Downtime limit that QEMU is given, milliseconds.
    pub downtime_ms: u64,
    /// How long a VM may stream before it is stopped; then its attempt ends.
    pub longest: Duration,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Who is told of connections.
    pub tags: Arc<dyn FlowTags>,
    /// Who keeps the connections below the group's share of the core link, where the port does not.
    pub pacer: Arc<Pacer>,
    /// How contents are compressed.
    pub compress: Mode,
    /// Whether QEMUs stream to each other, because this host's link is faster than its agent; known once it was measured.
    pub direct: AtomicBool,
    /// Whether pages that are written all the time are held back (`core::hold`).
    pub hold_back: bool,
    /// When VMs run at their target, as far as whoever runs them can do it.
    pub migration: Migration,
    /// What target hosts keep, for differences.
    pub similar: similar::Similar,
    /// What is lent to other source hosts, and borrowed.
    pub lending: lend::Lending,
    /// Windows for compression.
    pub windows: Arc<Windows>,
    /// Threads that may compress beside those of the VMs.
    pub workers: Arc<Workers>,
    /// What is known of the link to the target hosts.
    pub edge: Arc<Edge>,
    /// What preparation and push cost.
    pub work: Work,
    /// Points where a drill holds the handover (tests, operators' exercises).
    pub drill: Drill,
}

/// What drills and tests ask for: holding a departure's handover at a named point, so that a failure can be caused
/// exactly there, writing down what was sent, losing datagrams. All off in earnest.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Drill {
    /// Milliseconds between the target's `loaded` word and the source's next step.
    pub before_give_up_ms: u64,
    /// Milliseconds between the source's giving up and its saying so.
    pub after_give_up_ms: u64,
    /// Where the digests of the newest version sent of every page are written, one file a VM (`tap`).
    pub audit: Option<PathBuf>,
    /// Target hosts: of a thousand multicast datagrams that arrive so many are let go.
    pub drop_multicast: u32,
    /// Post-copy: milliseconds that the filling waits after the source has given up, so that all comes that is asked for and
    /// nothing else.
    pub hold_filling_ms: u64,
    /// Post-copy, at the target: milliseconds for which what is in the store is placed only where a vCPU waits for it.
    pub hold_placing_ms: u64,
    /// Hash every page that leaves under a digest kept from preparation, and end the attempt if one was stale.
    pub prove_digests: bool,
}

#[cfg(test)]
impl SourceGroup {
    /// A group of source host 0 with one trust domain, which goes nowhere.
    pub(crate) fn bare() -> Self {
        Self {
            name: "g".into(),
            token: [1; 32],
            me: HostIx(0),
            targets: Vec::new(),
            sources: Vec::new(),
            hashers: vec![Hasher::new(crate::core::digest::Algorithm::Blake3, &[1; 32], "")],
            tables: Vec::new(),
            downtime_ms: 2,
            longest: Duration::from_secs(3600),
            timeouts: Timeouts::default(),
            tags: Arc::new(super::NoTags),
            pacer: Arc::default(),
            compress: Mode::Off,
            direct: AtomicBool::new(false),
            hold_back: true,
            migration: Migration::PreCopy,
            similar: similar::Similar::default(),
            lending: lend::Lending::default(),
            windows: Arc::default(),
            workers: Arc::default(),
            edge: Arc::default(),
            work: Work::default(),
            drill: Drill::default(),
        }
    }
}

impl SourceGroup {
    /// Gives back the memory of what was known of the target hosts: no VM of the group leaves any more.
    pub fn let_go(&self) {
        for t in &self.tables {
            *super::lock(t) = PairTable::new(self.me, 1);
        }
        self.similar.let_go();
    }

    /// Where this VM's audit goes, if there is one.
    fn audit(&self, spec: &SourceSpec) -> Option<PathBuf> {
        self.drill.audit.as_ref().map(|f| {
            let mut file = f.clone().into_os_string();
            file.push(format!(".{}", spec.name));
            file.into()
        })
    }
}

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
    /// The attempt has ended, and the VM is being taken back: it is not known yet how it stands here.
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
    /// Unix nanoseconds: begun (with the push of planned contents, if there is one), VM stopped (0 until then), ended.
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
    /// How the copy here stands, once it was seen: in which state it was taken back, or that its process has ended.
    pub left: Option<Left>,
    /// What its owner had made of it when it was stopped.
    pub guest: GuestState,
    /// Whether both sides know the outcome.
    pub settled: bool,
    /// Guest RAM in bytes, once known.
    pub ram_bytes: u64,
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

/// Messages to a vm thread.
#[derive(Debug)]
pub(crate) enum Input {
    Needs(Vec<NeedEntry>),
    /// Pages that wait for content at the target.
    Waiting(u32),
    /// Post-copy: a frame of what the target asks for, or lacks.
    Paging(Kind, Vec<u8>),
    Word(Word),
    ReturnPath(Vec<u8>),
    /// The VM (or settle) connection number `.0` ended.
    Lost(u32, String),
    /// A settle connection stands, with what may have been said on it already.
    Reconnected(TcpStream, Box<FrameBuf>, Tagged),
    Qemu(minder::Says),
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
    /// When the target was last heard ([`super::now`]).
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
        let mut st = super::lock(&self.status);
        if st.started_ns == 0 {
            st.started_ns = super::unix_ns();
        }
    }
    /// A snapshot.
    #[must_use]
    pub fn status(&self) -> SourceStatus {
        super::lock(&self.status).clone()
    }
    /// Its departure never began, and will not: it stays, for this reason. Nothing is to be settled with anybody.
    pub fn never_left(&self, why: &str) {
        let mut st = super::lock(&self.status);
        if st.phase == Phase::Waiting {
            st.phase = Phase::Stayed;
            st.reason = why.to_owned();
            st.ended_ns = super::unix_ns();
            st.settled = true;
        }
    }
    /// Ends the attempt, unless the VM has been given up already.
    pub fn cancel(&self, why: &str) {
        self.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
        self.inbox.post(Input::Cancel(why.to_owned()));
    }
    /// An operator decides for both sides.
    pub fn settle(&self, decision: Decision) {
        self.inbox.post(Input::Settle(decision));
    }
    /// A journal of before a restart says that this departure is over, for both sides.
    pub fn settled_before(&self, moved: bool) {
        let mut st = super::lock(&self.status);
        st.phase = if moved { Phase::Moved } else { Phase::Stayed };
        st.settled = true;
    }
    /// It does not leave, and its target need not hear of it: it never began.
    pub fn never_began(&self, why: &str) {
        self.stays(why);
        super::lock(&self.status).settled = true;
    }
    /// It does not leave; its target is still to hear of it.
    pub fn stays(&self, why: &str) {
        let mut st = super::lock(&self.status);
        st.phase = Phase::Stayed;
        why.clone_into(&mut st.reason);
    }
    /// Whether its target cannot be heard: the connection was lost, or there was none since the agent began.
    #[must_use]
    pub fn is_apart(&self) -> bool {
        use std::sync::atomic::Ordering::Relaxed;
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
    /// The handover's state, before it is acted on, and how the VM's owner, or the guest, has left it.
    State(SourceState, GuestState),
    /// Whoever runs the VM, so that after a restart its death can be told from a socket that does not answer.
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
pub type SourceJournal = Box<dyn FnMut(SourceNote) -> Result<(), String> + Send>;
