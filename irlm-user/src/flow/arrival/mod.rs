//! The arrival of VMs at a target host; mirror of `flow::source`. One thread a VM (`vm`) owns the receiving half of
//! the VM connection and the writing half of the QEMU stream; a reader thread (`back`) listens to QEMU's return path.
//! Push and peer connections have a thread each (`contents`); each peer host is served by a sender thread behind a
//! bounded queue of names (`peers`).
//!
//! ```text
//! source ──tcp──► vm thread: frames → records ─┬─► emit ──unix──► QEMU
//!                    ▲ inbox: wakes, SHUT …    └─► waiting list
//! push, peers ──tcp──► contents: hash → store ─► wakes · forward ─► peers ──tcp──► other target hosts
//! ```

// Reader of QEMU's return path, and heartbeats.
mod back;
// Multicast to the other target hosts.
pub mod cast;
// Push and peer connections: contents into the store.
mod contents;
// Accepts connections and tells them apart.
pub mod door;
// Watching a QEMU that loads from another QEMU.
mod direct;
// Records into QEMU's stream.
mod emit;
// VMs for which our own VMM waits.
mod kvm;
// What an arrival needs of whoever loads its VM.
mod loader;
// A VM that runs while its pages still come.
pub mod fetch;
// What a VM connection brings, up to where it may be believed.
mod intake;
// Senders to other target hosts.
pub mod peers;
// A waiting QEMU's memory, made beforehand.
pub mod populate;
// VMs for which a QEMU waits.
mod qemu;
// One VM's arrival.
pub mod vm;

use super::inbox::Inbox;
use super::squeeze::{Edge, Windows};
use super::work::Work;
use super::{FlowTags, Front, Tagged, Timeouts, lock};
use crate::core::arrival::{HostStats, Key, Patience, TargetHost, VmStats, Wake};
use crate::core::delta::Slots;
use crate::core::digest::{Digest, Hasher};
use crate::core::handover::{Decision, GuestState, TargetState};
use crate::core::postcopy::arrival::FillStats;
use crate::core::squeeze::Mode;
use crate::core::units::{HostIx, PAGE_SIZE, VmIx};
use crate::host::sched::Process;
use crate::net::conn::FrameBuf;
use crate::net::qmp::settings::Settings;
pub use loader::Before;
use std::collections::{HashMap, HashSet};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// What all VMs of one group that arrive at this host share.
#[derive(Debug)]
pub struct TargetGroup {
    /// Group name.
    pub name: String,
    /// Group secret.
    pub token: [u8; 32],
    /// This host's number among the target hosts.
    pub me: HostIx,
    /// One hasher a trust domain.
    pub hashers: Vec<Hasher>,
    /// Store, bindings, who waits for what.
    pub host: Mutex<TargetHost>,
    /// Senders to the other target hosts.
    pub peers: peers::Peers,
    /// Multicast to them, where there is any.
    cast: OnceLock<Arc<cast::Cast>>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// When a waiting page asks its own source.
    pub patience: Patience,
    /// Who is told of connections.
    pub tags: Arc<dyn FlowTags>,
    /// Where files are made that last as long as an arrival (post-copy: which pages are due).
    pub socket_dir: PathBuf,
    /// How contents are compressed that are passed on.
    pub compress: Mode,
    /// Windows for streams that come compressed.
    pub windows: Arc<Windows>,
    /// What is known of the link to the other target hosts.
    pub(super) edge: Arc<Edge>,
    /// Leave the VMs paused when they have been handed over, for somebody else to continue.
    pub leave_paused: bool,
    /// Drill: for so long what is in the store is placed only where a vCPU waits for it.
    pub hold_placing: Duration,
    /// Counters.
    pub counts: GroupCounts,
    /// Contents kept for differences, by source host and trust domain.
    slots: HashMap<(HostIx, u16), Mutex<Slots>>,
    vms: Mutex<HashMap<VmIx, Arc<TargetVmShared>>>,
}

/// Counters of one group at one target host.
#[derive(Debug, Default)]
pub struct GroupCounts {
    /// Contents refused because they did not hash to their digest.
    pub refused: AtomicU64,
    /// Contents that came with a forward list, each once.
    pub to_forward: AtomicU64,
    /// Contents queued for other target hosts, once for each.
    pub forwarded: AtomicU64,
    /// Bytes of them as they were sent, compressed where that paid.
    pub forwarded_wire: AtomicU64,
    /// What push and peer connections cost this host; contents passed on are in it.
    pub work: Work,
    /// When a push or peer connection last brought contents ([`super::now`]).
    pub last_content: AtomicU64,
}

impl TargetGroup {
    /// A group with no VM yet.
    #[must_use]
    #[expect(clippy::too_many_arguments, reason = "called once, by the agent; each is a field")]
    pub fn new(
        name: String,
        token: [u8; 32],
        me: HostIx,
        hashers: Vec<Hasher>,
        host: TargetHost,
        peers: peers::Peers,
        timeouts: Timeouts,
        tags: Arc<dyn FlowTags>,
        socket_dir: PathBuf,
        leave_paused: bool,
    ) -> Self {
        Self {
            name,
            token,
            me,
            hashers,
            host: Mutex::new(host),
            peers,
            cast: OnceLock::new(),
            timeouts,
            patience: Patience::default(),
            tags,
            socket_dir,
            compress: Mode::Auto,
            windows: Arc::default(),
            edge: Arc::default(),
            leave_paused,
            hold_placing: Duration::ZERO,
            counts: GroupCounts::default(),
            slots: HashMap::new(),
            vms: Mutex::default(),
        }
    }

    /// Multicasts from now on what two or more other target hosts need.
    pub fn multicast(
        self: &Arc<Self>,
        config: cast::CastConfig,
        hosts: &[std::net::SocketAddr],
    ) -> std::io::Result<()> {
        let cast = cast::Cast::start(self, config, hosts)?;
        if let Err(second) = self.cast.set(cast) {
            second.close();
        }
        Ok(())
    }

    /// What was multicast, if anything could be.
    #[must_use]
    pub fn multicast_counts(&self) -> Option<cast::CastCounts> {
        self.cast.get().map(|c| c.counts())
    }

    /// Forwards nothing more than what is queued.
    pub fn close(&self) {
        if let Some(c) = self.cast.get() {
            c.close();
        }
        self.peers.close();
    }

    /// Keeps contents for differences among the VMs that come from these source hosts, each with its trust domain, in
    /// `bytes` of memory altogether.
    pub fn keep(&mut self, lines: impl IntoIterator<Item = (HostIx, u16)>, bytes: u64) {
        let lines: HashSet<_> = lines.into_iter().collect();
        let pages = bytes / PAGE_SIZE as u64 / lines.len().max(1) as u64;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        self.slots = lines.into_iter().map(|line| (line, Mutex::new(Slots::new(pages)))).collect();
    }

    fn slots(&self, source: HostIx, domain: u16) -> Option<&Mutex<Slots>> {
        self.slots.get(&(source, domain))
    }

    /// Bytes of memory taken for contents that are kept.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.slots.values().map(|s| lock(s).bytes() as u64).sum()
    }

    /// Gives back the memory of what was stored and kept: no VM of the group waits for a content any more.
    pub fn let_go(&self) {
        {
            let mut host = lock(&self.host);
            let stats = host.stats;
            *host = TargetHost::new(1, 1 << 20);
            host.stats = stats;
        }
        for s in self.slots.values() {
            *lock(s) = Slots::new(0);
        }
    }

    /// Lets wakes and connections find this VM.
    pub fn expect(&self, vm: VmIx, shared: &Arc<TargetVmShared>) {
        lock(&self.vms).insert(vm, shared.clone());
    }

    /// The VM's handle, if it is expected here.
    #[must_use]
    pub fn vm(&self, vm: VmIx) -> Option<Arc<TargetVmShared>> {
        lock(&self.vms).get(&vm).cloned()
    }

    /// Passes wakes on.
    fn wake(&self, wakes: &[Wake]) {
        if wakes.is_empty() {
            return;
        }
        let vms = lock(&self.vms);
        for w in wakes {
            if let Some(vm) = vms.get(&w.vm) {
                vm.inbox.post(Input::Wake(w.key));
            }
        }
    }

    /// A target host does not have these contents.
    fn not_here(&self, peer: HostIx, digests: &[Digest]) {
        for vm in lock(&self.vms).values() {
            vm.inbox.post(Input::NotHere(peer, digests.to_vec()));
        }
    }

    /// Host counters, contents and bytes in the store, contents evicted.
    #[must_use]
    pub fn stats(&self) -> (HostStats, usize, u64) {
        let h = lock(&self.host);
        (h.stats, h.store.len(), h.store.evicted())
    }

    /// Contents refused, and contents forwarded.
    #[must_use]
    pub fn counted(&self) -> (u64, u64) {
        (self.counts.refused.load(Ordering::Relaxed), self.counts.forwarded.load(Ordering::Relaxed))
    }
}

impl Drop for TargetGroup {
    /// One that was dropped without a close leaves no threads behind either.
    fn drop(&mut self) {
        self.close();
    }
}

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
    pub faults: fetch::latency::FaultWaits,
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

/// On what kind of connection a source calls; a VM connection is to be answered with this wire version.
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
    /// It cannot be, or what was loaded is lost.
    LoadFailed(String),
    /// The source calls.
    Called(TcpStream, Tagged, Call),
    /// The connection on which the source's QEMU streams, to be answered with this wire version.
    Stream(TcpStream, Tagged, u16),
    /// Another target host does not have what it was asked to hurry with.
    NotHere(HostIx, Vec<Digest>),
    /// Post-copy: the source's demand connection, with what it may have said on it.
    Demand(TcpStream, Box<FrameBuf>, Tagged),
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
    /// The source host that it comes from, by the group's list; not known of a group taken up after a restart.
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
    fn may_come_from(&self, source: HostIx) -> bool {
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
    /// Whether its source cannot be heard, as far as that matters: all is loaded, or pages do not come.
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
pub type TargetJournal = Box<dyn FnMut(TargetNote) -> Result<(), String> + Send>;
