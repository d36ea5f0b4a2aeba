//! The per-host daemon: listens for control requests, keeps the groups it takes part in, starts their flows, and
//! settles after a restart what its journal holds. It plans nothing: what to move where comes from the coordinator,
//! which may die at any time; a group that was started goes on without it.
//!
//! Threads: one tokio runtime for control connections; requests are handled on its blocking pool, because they speak
//! QMP; everything that moves pages has threads of its own (`flow`).

// Who may ask for what.
mod admit;
// Taking VMs' processes in hand for a group, and letting them go.
mod claims;
// A VM that left, and was continued here by hand.
mod continued;
// What is known of groups that the agent does not keep any more.
mod history;
// Methods `gm` and `irlm`: preparation, push, VM threads.
mod inpath;
// Groups that are over, or that nobody starts.
mod keeper;
// Watching how VMs write.
mod observe;
// What is there before anything is done.
mod preflight;
// Methods `oc` and `qemu-multifd-zstd`.
mod plain;
// The control port: who is on it, and for how long.
mod port;
// Memory that all groups have in common.
mod purse;
// What a restarted agent does with its journal.
mod recover;
// What each request does.
mod requests;
// An operator's word on a VM in doubt.
mod settle;
// The port's policy, and the groups' shares of the core link.
mod share;
// Whose requests are being performed.
mod turns;

use super::api::{
    Code, GroupSpec, HostCounters, Incoming, Phase, PreparePhase, PrepareStatus, Refusal, Reply, Role,
    StartPart, Token, VmStatus,
};
use super::config::{AgentConfig, ConfigError};
use super::journal::{JournalError, JournalState, VmRecord, private};
use super::registry::Registry;
use super::shape::Shaper;
use crate::core::quota::{Owner, Quota};
use crate::flow::door::{self, Door};
use crate::flow::pace::Pacer;
use crate::flow::squeeze::Windows;
use crate::flow::{FlowTags, Timeouts, Traffic, lock, unix_ns};
use crate::host::bpf::{Classifier, FlowClass};
use crate::host::descriptors;
use crate::net::connection::Security;
use crate::net::gate::Sizes;
use crate::net::tls::{Credentials, TlsError, Use};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Groups an agent keeps at once, and what one caller may have of them. Groups that are over make room for others.
const GROUPS: Quota = Quota::new(1024, 4);

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A port cannot be had.
    #[error(
        "cannot listen on {addr} ({what}): {source}; is another agent running, or the address not this host's?"
    )]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Which port.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// The policy file cannot be used.
    #[error(transparent)]
    Policy(#[from] ConfigError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The socket directory cannot be made.
    #[error("{path}: cannot make the socket directory: {source}")]
    Sockets {
        /// The directory.
        path: String,
        /// From the kernel.
        source: io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The runtime failed.
    #[error("control runtime: {0}")]
    Runtime(io::Error),
}

// bounds: one of each of the agent's parts
/// What all groups of an agent share.
#[derive(Debug)]
struct Shared {
    config: AgentConfig,
    registry: Registry,
    door: Arc<Door>,
    /// How connections are secured.
    security: Security,
    /// The certificates that this is done with.
    keys: Option<Credentials>,
    timeouts: Timeouts,
    tags: Arc<dyn FlowTags>,
    classifier: Classifier,
    tracer: crate::host::dirty::Tracer,
    /// Held by the one observation that is under way.
    observing: Mutex<()>,
    sockets: PathBuf,
    windows: Arc<Windows>,
    /// For contents that are stored and kept, and for tables of what was sent.
    contents: Arc<purse::Purse>,
    tables: Arc<purse::Purse>,
    shaper: Shaper,
    /// Held while shares are put in force, so that an older sum never comes after a newer one; what went wrong last.
    sharing: Mutex<Option<String>>,
    groups: Mutex<HashMap<String, Arc<Group>>>,
    /// How many of them there may be.
    quota: Quota,
    /// Groups that are over and were taken up again, because a source has something left to settle.
    recalled: Mutex<Vec<history::Recalled>>,
    drill: crate::flow::source::Drill,
}

/// One group at this agent.
#[derive(Debug)]
struct Group {
    spec: GroupSpec,
    /// Who had it prepared; none: it was taken up from records.
    owner: Option<Owner>,
    prepare: Mutex<PrepareStatus>,
    started: AtomicBool,
    /// Which roles were started: arriving VMs, leaving ones.
    begun: Mutex<(bool, bool)>,
    /// When, Unix nanoseconds.
    started_ns: AtomicU64,
    cancelled: AtomicBool,
    /// Held while it is decided whether the group starts or its claims are let go: never both.
    gate: Mutex<()>,
    /// What the keeper has noted of it.
    kept: Mutex<keeper::Kept>,
    /// This host's part of the group's budget, if it has one.
    share: Option<share::Held>,
    pacer: Arc<Pacer>,
    work: Work,
}

/// What moves the group.
#[derive(Debug)]
enum Work {
    InPath(inpath::InPath),
    Plain(plain::Plain),
}

impl Group {
    /// What of `part` has not begun yet, which has from now on.
    fn begin(&self, part: StartPart) -> Option<StartPart> {
        let mut begun = lock(&self.begun);
        let (targets, sources) = (part.targets() && !begun.0, part.sources() && !begun.1);
        begun.0 |= targets;
        begun.1 |= sources;
        match (targets, sources) {
            (true, true) => Some(StartPart::Both),
            (true, false) => Some(StartPart::Targets),
            (false, true) => Some(StartPart::Sources),
            (false, false) => None,
        }
    }

    /// Whether nothing of it is open here.
    fn is_over(&self) -> bool {
        if !self.started.load(Ordering::Acquire) {
            return self.cancelled.load(Ordering::Acquire) || self.phase() == PreparePhase::Failed;
        }
        self.vms().iter().all(|v| v.phase.is_final())
    }

    fn phase(&self) -> PreparePhase {
        lock(&self.prepare).phase
    }

    fn prepare_status(&self) -> PrepareStatus {
        let mut st = lock(&self.prepare).clone();
        if let Work::InPath(w) = &self.work {
            w.progress(&mut st);
        }
        st
    }

    fn vms(&self) -> Vec<VmStatus> {
        match &self.work {
            Work::InPath(w) => w.vms(self),
            Work::Plain(w) => w.vms(self),
        }
    }
}

/// Tags flows for the eBPF classifier.
#[derive(Debug)]
struct BpfTags(Classifier);

impl FlowTags for BpfTags {
    fn add(&self, local: SocketAddr, remote: SocketAddr, class: Traffic) {
        // Losing eBPF costs tagging and counting only (invariant 5).
        if let Err(e) = self.0.add_flow(local, remote, class_of(class)) {
            tracing::debug!("eBPF: {e}");
        }
    }
    fn change(&self, local: SocketAddr, remote: SocketAddr, class: Traffic) {
        if let Err(e) = self.0.set_class(local, remote, class_of(class)) {
            tracing::debug!("eBPF: {e}");
        }
    }
    fn remove(&self, local: SocketAddr, remote: SocketAddr) {
        if let Err(e) = self.0.remove_flow(local, remote) {
            tracing::debug!("eBPF: {e}");
        }
    }
    fn add_datagrams(&self, local: SocketAddr, remote: SocketAddr, class: Traffic) {
        if let Err(e) = self.0.add_udp_flow(local, remote, class_of(class)) {
            tracing::debug!("eBPF: {e}");
        }
    }
    fn remove_datagrams(&self, local: SocketAddr, remote: SocketAddr) {
        if let Err(e) = self.0.remove_udp_flow(local, remote) {
            tracing::debug!("eBPF: {e}");
        }
    }
}

fn class_of(traffic: Traffic) -> FlowClass {
    match traffic {
        Traffic::Bulk => FlowClass::Bulk,
        Traffic::Control => FlowClass::Control,
        Traffic::Forward => FlowClass::Forward,
        Traffic::Switchover => FlowClass::Switchover,
        Traffic::Demand => FlowClass::Demand,
    }
}

/// Runs the agent until it is told to end (SIGINT, SIGTERM). Migrations under way end with their VMs at the source.
pub fn run(config: AgentConfig, drill: crate::flow::source::Drill) -> Result<(), AgentError> {
    let listen = |addr, what| {
        std::net::TcpListener::bind(addr).map_err(|source| AgentError::Listen { addr, what, source })
    };
    let sizes = Sizes::of(descriptors::raise());
    let policy = match &config.policy {
        Some(file) => Some(super::policy::load(file)?.0),
        None => None,
    };
    let registry = Registry::open(&config.state_dir)?;
    let data = listen(config.data, "data")?;
    let control = listen(config.control, "control")?;
    let sockets = config.state_dir.join("sock");
    private::directory(&sockets)
        .map_err(|source| AgentError::Sockets { path: sockets.display().to_string(), source })?;
    let keys = config.tls.as_ref().map(|dir| Credentials::open(dir, Use::Both)).transpose()?;
    let security = keys.clone().map_or(Security::Plain, |k| Security::Tls(Arc::new(k)));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    // Before anything is changed that must be changed back: a signal that comes now is heard in `serve`.
    let signals = {
        let _inside = runtime.enter();
        Signals::new().map_err(AgentError::Runtime)?
    };
    let classifier = classifier(&config);
    let tagger = Box::new(share::PortTags(classifier.clone()));
    let shaper = Shaper::start(config.core_iface.as_deref(), &config.state_dir, policy, tagger);
    let timeouts = Timeouts { peer: Duration::from_millis(config.timeouts.peer_ms), ..Timeouts::default() };
    let shared = Arc::new(Shared {
        tags: Arc::new(BpfTags(classifier.clone())),
        classifier,
        tracer: observe::tracer(&config),
        observing: Mutex::new(()),
        registry,
        door: Arc::new(Door::secured(security.clone(), config.roles.clone()).sized(sizes)),
        keys,
        security,
        timeouts,
        sockets,
        windows: Arc::default(),
        contents: purse::Purse::new(config.contents_mib << 20),
        tables: purse::Purse::new(config.tables_mib << 20),
        shaper,
        sharing: Mutex::default(),
        groups: Mutex::default(),
        quota: GROUPS,
        recalled: Mutex::default(),
        drill,
        config,
    });
    crate::flow::front::restorer::keep_in(&shared.config.state_dir, shared.timeouts.setup);
    recover::recover(&shared);
    shared.answer_late_calls();
    let stop = Arc::new(AtomicBool::new(false));
    let (door, tags, halt) = (shared.door.clone(), shared.tags.clone(), stop.clone());
    let doorman = thread("irlm-door", move || door::serve(&data, &door, &tags, timeouts, &halt))?;
    let (own, halt) = (shared.clone(), stop.clone());
    let keeper = thread("irlm-shares", move || own.keep_shares(&halt))?;
    let (own, halt) = (shared.clone(), stop.clone());
    let sweeper = thread("irlm-keeper", move || own.keep_groups(&halt))?;
    tracing::info!(
        "agent {}: control {}, data {}",
        shared.config.name,
        shared.config.control,
        shared.config.data
    );
    let result = runtime.block_on(port::serve(shared.clone(), control, sizes, signals));
    shared.cancel_all("the agent was stopped");
    runtime.shutdown_timeout(Duration::from_secs(2));
    stop.store(true, Ordering::Relaxed);
    let _ = (doorman.join(), keeper.join(), sweeper.join());
    // Threads of groups may still hold handles; the port must be free, and what is pinned gone, before the process is.
    shared.shaper.stop();
    shared.classifier.shut_down();
    shared.tracer.shut_down();
    result.map_err(AgentError::Runtime)
}

/// The port's classifier, as far as the configuration asks for one.
fn classifier(config: &AgentConfig) -> Classifier {
    match (&config.core_iface, config.bpf) {
        (Some(iface), true) => {
            let pins = crate::host::bpf::default_pin_dir(&config.name).ok();
            Classifier::attach_or_disabled(iface, pins.as_deref())
        }
        (None, true) => Classifier::disabled("no core_iface in the configuration"),
        (_, false) => Classifier::disabled("bpf = false in the configuration"),
    }
}

/// One of the agent's own threads.
fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>, AgentError> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(AgentError::Runtime)
}

/// What tells the agent to end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }
}

/// A fresh journal record of one side of a VM.
fn record(
    spec: &GroupSpec,
    vm: &super::api::VmSpec,
    role: Role,
    peer: SocketAddr,
    leave_paused: bool,
) -> VmRecord {
    VmRecord {
        group: spec.name.clone(),
        token: spec.token,
        method: spec.method,
        vm: vm.name.clone(),
        ix: vm.ix,
        role,
        state: JournalState::Started,
        peer,
        peer_host: match role {
            Role::Source => spec.targets.get(usize::from(vm.target)).map(|h| h.name.clone()),
            Role::Target => spec.sources.get(usize::from(vm.source)).map(|h| h.name.clone()),
        }
        .unwrap_or_default(),
        tenant: vm.tenant.clone(),
        front: match role {
            Role::Source => vm.source_front.clone(),
            Role::Target => vm.target_front.clone(),
        },
        seq: 0,
        process: None,
        identity: None,
        begun: false,
        migration_begun: false,
        guest: crate::core::handover::GuestState::default(),
        settings: None,
        leave_paused,
        settled: false,
        started_ns: unix_ns(),
        at_ns: unix_ns(),
        why: None,
    }
}

/// Puts a record with a new state.
fn put(shared: &Shared, record: &mut VmRecord, state: JournalState) -> Result<(), JournalError> {
    record.state = state;
    record.at_ns = unix_ns();
    shared.registry.put(record)
}

/// A status with nothing known yet.
fn blank(vm: &super::api::VmSpec, role: Role, phase: Phase) -> VmStatus {
    VmStatus {
        ix: vm.ix,
        name: vm.name.clone(),
        role,
        phase,
        stream_bytes: 0,
        wire_bytes: 0,
        ram_total: 0,
        ram_remaining: 0,
        pages: super::api::PageCounts::default(),
        work: super::api::Work::default(),
        waiting: 0,
        started_ns: 0,
        stopped_ns: 0,
        ready_ns: 0,
        running_ns: 0,
        total_ns: None,
        fill_ns: None,
        state: String::new(),
        downtime_ns: None,
        filled_ns: 0,
        faults: None,
        hash_ns: 0,
        verified: None,
        error: None,
    }
}

#[cfg(test)]
mod tests;
