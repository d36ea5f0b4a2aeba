//! The per-host daemon: listens for control requests, keeps the groups it takes part in, starts their flows, and
//! settles after a restart what its journal holds. It plans nothing: what to move where comes from the coordinator,
//! which may die at any time; a group that was started goes on without it.
//!
//! Threads: one tokio runtime for control connections; requests are handled on its blocking pool, because they speak
//! QMP; everything that moves pages has threads of its own (`flow`).

// Methods `gm` and `irlm`: preparation, push, VM threads.
mod inpath;
// Watching how VMs write.
mod observe;
// Methods `oc` and `qemu-multifd-zstd`.
mod plain;
// What a restarted agent does with its journal.
mod recover;
// The port's policy, and the groups' shares of the core link.
mod share;

use super::api::{
    Code, Decision, GroupSpec, GroupStatus, HostCounters, Incoming, Method, Phase, PreparePhase,
    PrepareStatus, Refusal, Reply, Request, Role, Token, VmStatus, decode_request, encode_reply,
};
use super::config::{AgentConfig, ConfigError};
use super::journal::{Journal, JournalError, JournalState, VmRecord};
use super::lines::Lines;
use super::shape::Shaper;
use crate::flow::pace::Pacer;
use crate::flow::squeeze::Windows;
use crate::flow::target::door::{self, Door};
use crate::flow::{FlowTags, Timeouts, Traffic, lock, unix_ns};
use crate::host::bpf::{Classifier, Counters, Direction, FlowClass, Scope};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Control connections served at once; a further one is closed at once.
const MAX_CONTROL: usize = 256;
/// A control connection may be silent for so long.
const CONTROL_IDLE: Duration = Duration::from_secs(600);
/// A reply must be taken within this.
const CONTROL_WRITE: Duration = Duration::from_secs(10);
/// Groups an agent keeps at once; finished ones count until they are forgotten.
const MAX_GROUPS: usize = 1024;

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
    /// The runtime failed.
    #[error("control runtime: {0}")]
    Runtime(io::Error),
}

/// What all groups of an agent share.
#[derive(Debug)]
struct Shared {
    config: AgentConfig,
    journal: Journal,
    door: Arc<Door>,
    timeouts: Timeouts,
    tags: Arc<dyn FlowTags>,
    classifier: Classifier,
    tracer: crate::host::dirty::Tracer,
    /// Held by the one observation that is under way.
    observing: Mutex<()>,
    sockets: PathBuf,
    windows: Arc<Windows>,
    shaper: Shaper,
    /// Held while shares are put in force, so that an older sum never comes after a newer one; what went wrong last.
    sharing: Mutex<Option<String>>,
    groups: Mutex<HashMap<String, Arc<Group>>>,
    drill: crate::flow::source::Drill,
}

/// One group at this agent.
#[derive(Debug)]
struct Group {
    spec: GroupSpec,
    prepare: Mutex<PrepareStatus>,
    started: AtomicBool,
    /// When, Unix nanoseconds.
    started_ns: AtomicU64,
    cancelled: AtomicBool,
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
    /// Whether nothing of it is open here.
    fn is_over(&self) -> bool {
        let vms = self.vms();
        if !self.started.load(Ordering::Acquire) {
            return self.cancelled.load(Ordering::Acquire);
        }
        vms.iter().all(|v| v.phase.is_final())
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
        // Losing eBPF costs tagging and counting only (DESIGN rule 5).
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
    let policy = match &config.policy {
        Some(file) => Some(super::policy::load(file)?.0),
        None => None,
    };
    let journal = Journal::open(&config.state_dir)?;
    let data = listen(config.data, "data")?;
    let control = listen(config.control, "control")?;
    let sockets = config.state_dir.join("sock");
    std::fs::create_dir_all(&sockets)
        .map_err(|source| AgentError::Sockets { path: sockets.display().to_string(), source })?;
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
    let classifier = match (&config.core_iface, config.bpf) {
        (Some(iface), true) => {
            let pins = crate::host::bpf::default_pin_dir(&config.name).ok();
            Classifier::attach_or_disabled(iface, pins.as_deref())
        }
        (None, true) => Classifier::disabled("no core_iface in the configuration"),
        (_, false) => Classifier::disabled("bpf = false in the configuration"),
    };
    let tagger = Box::new(share::PortTags(classifier.clone()));
    let shaper = Shaper::start(config.core_iface.as_deref(), &config.state_dir, policy, tagger);
    let timeouts = Timeouts { peer: Duration::from_millis(config.timeouts.peer_ms), ..Timeouts::default() };
    let shared = Arc::new(Shared {
        tags: Arc::new(BpfTags(classifier.clone())),
        classifier,
        tracer: observe::tracer(&config),
        observing: Mutex::new(()),
        journal,
        door: Arc::new(Door::default()),
        timeouts,
        sockets,
        windows: Arc::default(),
        shaper,
        sharing: Mutex::default(),
        groups: Mutex::default(),
        drill,
        config,
    });
    recover::recover(&shared)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (door, tags, halt) = (shared.door.clone(), shared.tags.clone(), stop.clone());
    let doorman = std::thread::Builder::new()
        .name("irlm-door".into())
        .spawn(move || door::serve(&data, &door, &tags, timeouts, &halt))
        .map_err(AgentError::Runtime)?;
    let (own, halt) = (shared.clone(), stop.clone());
    let keeper = std::thread::Builder::new()
        .name("irlm-shares".into())
        .spawn(move || own.keep_shares(&halt))
        .map_err(AgentError::Runtime)?;
    tracing::info!(
        "agent {}: control {}, data {}",
        shared.config.name,
        shared.config.control,
        shared.config.data
    );
    let result = runtime.block_on(serve(shared.clone(), control, signals));
    shared.cancel_all("the agent was stopped");
    runtime.shutdown_timeout(Duration::from_secs(2));
    stop.store(true, Ordering::Relaxed);
    let _ = (doorman.join(), keeper.join());
    // Threads of groups may still hold handles; the port must be free, and what is pinned gone, before the process is.
    shared.shaper.stop();
    shared.classifier.shut_down();
    result.map_err(AgentError::Runtime)
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

async fn serve(shared: Arc<Shared>, control: std::net::TcpListener, mut signals: Signals) -> io::Result<()> {
    control.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(control)?;
    let places = Arc::new(tokio::sync::Semaphore::new(MAX_CONTROL));
    loop {
        let accepted = tokio::select! {
            a = listener.accept() => a,
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.terminate.recv() => return Ok(()),
        };
        let stream = match accepted {
            Ok((s, _)) => s,
            Err(e) => {
                tracing::warn!("control port: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!("control port: more than {MAX_CONTROL} connections; one was closed");
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            if let Err(e) = converse(&shared, stream).await {
                tracing::debug!("control: {e}");
            }
            drop(place);
        });
    }
}

async fn converse(shared: &Arc<Shared>, stream: tokio::net::TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let ends = (stream.local_addr()?, stream.peer_addr()?);
    shared.tags.add(ends.0, ends.1, Traffic::Control);
    let mut lines = Lines::new(stream);
    let result = async {
        while let Some(line) = lines.read(CONTROL_IDLE).await? {
            let agent = shared.clone();
            let reply = tokio::task::spawn_blocking(move || {
                decode_request(&line).and_then(|request| agent.handle(request))
            })
            .await
            .unwrap_or_else(|e| Err(Refusal::new(Code::Failed, format!("the request failed inside: {e}"))));
            lines.write(encode_reply(&reply), CONTROL_WRITE).await?;
        }
        Ok(())
    }
    .await;
    shared.tags.remove(ends.0, ends.1);
    result
}

impl Shared {
    fn handle(self: &Arc<Self>, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::Hello => Ok(Reply::Hello {
                name: self.config.name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                now_ns: unix_ns(),
                data: Some(self.config.data),
            }),
            Request::Prepare { spec } => self.prepare(*spec),
            Request::PrepareStatus { group } => Ok(Reply::Prepare(self.group(&group)?.prepare_status())),
            Request::Observe { spec, seconds, one_in } => self.observe(&spec, seconds, one_in),
            Request::Start { group, leave_paused, incoming } => self.start(&group, leave_paused, &incoming),
            Request::Status { group } => self.status(group.as_deref()),
            Request::Cancel { group } => {
                let group = self.group(&group)?;
                cancel(&group, "cancelled");
                Ok(Reply::Done)
            }
            Request::Settle { group, vm, decision } => self.settle(&group, &vm, decision),
            Request::Forget { group } => self.forget(&group),
            Request::Released { group, token, vm } => self.released(&group, token, vm),
            Request::PolicySet { text } => self.set_policy(&text),
            Request::PolicyShow => Ok(self.policy()),
            Request::BudgetShare { group, token, seq, bits } => self.take_share(&group, token, seq, bits),
            Request::BudgetClaim { group, token, term } => self.claim_share(&group, token, term),
        }
    }

    fn group(&self, name: &str) -> Result<Arc<Group>, Refusal> {
        lock(&self.groups).get(name).cloned().ok_or_else(|| {
            Refusal::new(Code::UnknownGroup, format!("agent {} knows no group {name:?}", self.config.name))
        })
    }

    fn prepare(self: &Arc<Self>, spec: GroupSpec) -> Result<Reply, Refusal> {
        spec.check().map_err(|e| Refusal::new(Code::BadRequest, e))?;
        let old = lock(&self.groups).get(&spec.name).cloned();
        if let Some(old) = old {
            if old.spec.token == spec.token {
                return Ok(Reply::Prepare(old.prepare_status()));
            }
            if !old.is_over() {
                let what = format!("group {:?} is under way at agent {}", spec.name, self.config.name);
                return Err(Refusal::new(Code::Conflict, what));
            }
            self.drop_group(&old);
        }
        let pacer = Arc::new(Pacer::default());
        let group = Arc::new(Group {
            prepare: Mutex::new(PrepareStatus {
                phase: PreparePhase::Preparing,
                pages_total: 0,
                pages_done: 0,
                distinct: 0,
                hot: 0,
                planning: false,
                incoming: Vec::new(),
                problem: None,
            }),
            started: AtomicBool::new(false),
            started_ns: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            share: spec.share.map(|bits| share::Held::first(bits, spec.token)),
            pacer: pacer.clone(),
            work: if spec.method.in_path() {
                let work = inpath::InPath::new(self, &spec, &pacer)
                    .map_err(|e| Refusal::new(Code::Failed, format!("group {:?}: {e}", spec.name)))?;
                Work::InPath(work)
            } else {
                Work::Plain(plain::Plain::new(&spec))
            },
            spec,
        });
        {
            let mut groups = lock(&self.groups);
            if groups.len() >= MAX_GROUPS {
                let what = format!("agent {} keeps {MAX_GROUPS} groups: forget some", self.config.name);
                return Err(Refusal::new(Code::NotNow, what));
            }
            groups.insert(group.spec.name.clone(), group.clone());
        }
        let agent = self.clone();
        let preparing = group.clone();
        let run = move || {
            let end = match &preparing.work {
                Work::InPath(w) => w.prepare(&agent, &preparing),
                Work::Plain(w) => w.prepare(&agent, &preparing),
            };
            {
                let mut st = lock(&preparing.prepare);
                match end {
                    Ok(()) => st.phase = PreparePhase::Ready,
                    Err(e) => {
                        st.phase = PreparePhase::Failed;
                        st.problem = Some(e);
                    }
                }
            }
            agent.drop_if_unstarted(&preparing);
        };
        std::thread::Builder::new()
            .name("irlm-prepare".into())
            .spawn(run)
            .map_err(|e| Refusal::new(Code::Failed, format!("no thread to prepare on: {e}")))?;
        Ok(Reply::Prepare(group.prepare_status()))
    }

    /// A coordinator that died between preparing and starting must not leave a group behind for ever.
    fn drop_if_unstarted(&self, group: &Arc<Group>) {
        let until = Instant::now() + Duration::from_millis(group.spec.timeouts.prepare_ms);
        while !group.started.load(Ordering::Acquire) && !group.cancelled.load(Ordering::Acquire) {
            if Instant::now() > until {
                tracing::warn!("group {}: prepared, but nobody started it: dropped", group.spec.name);
                cancel(group, "nobody started it");
                let known = lock(&self.groups).get(&group.spec.name).cloned();
                if known.is_some_and(|g| Arc::ptr_eq(&g, group)) {
                    self.drop_group(group);
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn start(
        self: &Arc<Self>,
        name: &str,
        leave_paused: bool,
        incoming: &[Incoming],
    ) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let phase = lock(&group.prepare).phase;
        if phase != PreparePhase::Ready {
            let what = format!("group {name:?} is not prepared at agent {}", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        }
        if group.cancelled.load(Ordering::Acquire) {
            return Err(Refusal::new(Code::NotNow, format!("group {name:?} was cancelled")));
        }
        if group.started.swap(true, Ordering::AcqRel) {
            return Ok(Reply::Done);
        }
        group.started_ns.store(unix_ns(), Ordering::Release);
        // Before the first byte. If it cannot be had the group moves all the same, and says so.
        if let Err(e) = self.share_out() {
            lock(&group.prepare).problem.get_or_insert_default().push_str(&e);
        }
        let begun = match &group.work {
            Work::InPath(w) => w.start(self, &group, leave_paused),
            Work::Plain(w) => w.start(self, &group, leave_paused, incoming),
        };
        begun.map_err(|e| Refusal::new(Code::Failed, e))?;
        Ok(Reply::Done)
    }

    fn status(&self, name: Option<&str>) -> Result<Reply, Refusal> {
        let groups: Vec<Arc<Group>> = match name {
            Some(n) => vec![self.group(n)?],
            None => {
                let mut all: Vec<_> = lock(&self.groups).values().cloned().collect();
                all.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
                all
            }
        };
        let groups = groups.iter().map(|g| self.group_status(g)).collect();
        let samplers = observe::samplers(&self.tracer);
        Ok(Reply::Status { name: self.config.name.clone(), now_ns: unix_ns(), groups, samplers })
    }

    fn group_status(&self, group: &Group) -> GroupStatus {
        let mut host = match &group.work {
            Work::InPath(w) => w.host_counters(),
            Work::Plain(_) => HostCounters::default(),
        };
        host.bpf = self.bpf();
        GroupStatus {
            group: group.spec.name.clone(),
            method: group.spec.method,
            prepare: group.prepare_status(),
            vms: group.vms(),
            host,
            started_ns: group.started_ns.load(Ordering::Acquire),
            share: self.share_status(group),
        }
    }

    fn bpf(&self) -> Option<super::api::BpfCounters> {
        use super::api::{BpfClass, BpfCounters, Traffic};
        let c = self.classifier.counters().ok().filter(Counters::counted)?;
        let class = |class| {
            let get = |direction, scope| {
                let n = c.scoped(direction, scope, class);
                Traffic { packets: n.packets, bytes: n.bytes }
            };
            BpfClass {
                core_out: get(Direction::Egress, Scope::Core),
                core_in: get(Direction::Ingress, Scope::Core),
                rack_out: get(Direction::Egress, Scope::Rack),
                rack_in: get(Direction::Ingress, Scope::Rack),
            }
        };
        let total_in = c.total(Direction::Ingress);
        Some(BpfCounters {
            bulk: class(FlowClass::Bulk),
            switchover: class(FlowClass::Switchover),
            demand: class(FlowClass::Demand),
            control: class(FlowClass::Control),
            forward: class(FlowClass::Forward),
            other: class(FlowClass::Other),
            all_in: Traffic { packets: total_in.packets, bytes: total_in.bytes },
            dscp_not_written: c.oddities().dscp_not_written,
        })
    }

    fn settle(&self, name: &str, vm: &str, decision: Decision) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let found = match &group.work {
            Work::InPath(w) => w.settle(&group, vm, decision),
            Work::Plain(_) => {
                let what = "plain QEMU has no handover to settle: continue or quit the QEMU itself";
                return Err(Refusal::new(Code::NotNow, what));
            }
        };
        if found {
            return Ok(Reply::Done);
        }
        Err(Refusal::new(
            Code::UnknownGroup,
            format!("group {name:?} has no VM {vm:?} at agent {}", self.config.name),
        ))
    }

    fn forget(&self, name: &str) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if !group.is_over() {
            let what = format!(
                "group {name:?} is not over at agent {}: cancel or settle it first",
                self.config.name
            );
            return Err(Refusal::new(Code::NotNow, what));
        }
        self.drop_group(&group);
        Ok(Reply::Done)
    }

    fn drop_group(&self, group: &Group) {
        lock(&self.groups).remove(&group.spec.name);
        if let Work::InPath(w) = &group.work {
            w.forget();
            self.door.dismiss(&group.spec.name);
        }
        for v in &group.spec.vms {
            for role in [Role::Source, Role::Target] {
                if let Err(e) = self.journal.remove(&group.spec.name, &v.name, role) {
                    tracing::warn!("{e}");
                }
            }
        }
    }

    fn released(self: &Arc<Self>, name: &str, token: Token, vm: u16) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if group.spec.token != token {
            return Err(Refusal::new(
                Code::UnknownGroup,
                format!("group {name:?} is not known by that token"),
            ));
        }
        match &group.work {
            Work::Plain(w) => w.released(vm).map(|()| Reply::Done).map_err(|e| Refusal::new(Code::Failed, e)),
            Work::InPath(_) => {
                Err(Refusal::new(Code::NotNow, "this group's VMs are handed over by their agents"))
            }
        }
    }

    /// Ends what can still be ended, and gives the sources a moment to take their VMs back.
    fn cancel_all(&self, why: &str) {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for g in &groups {
            cancel(g, why);
        }
        for _ in 0..100 {
            let busy = |g: &Arc<Group>| g.vms().iter().any(|v| v.role == Role::Source && !v.phase.is_final());
            if !groups.iter().any(|g| g.started.load(Ordering::Acquire) && busy(g)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn cancel(group: &Arc<Group>, why: &str) {
    group.cancelled.store(true, Ordering::Release);
    match &group.work {
        Work::InPath(w) => w.cancel(why),
        Work::Plain(w) => w.cancel(),
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
        front: match role {
            Role::Source => vm.source_front.clone(),
            Role::Target => vm.target_front.clone(),
        },
        was_paused: false,
        leave_paused,
        settled: false,
        process: None,
        started_ns: unix_ns(),
        at_ns: unix_ns(),
        why: None,
    }
}

/// Puts a record with a new state.
fn put(shared: &Shared, record: &mut VmRecord, state: JournalState) -> Result<(), String> {
    record.state = state;
    record.at_ns = unix_ns();
    shared.journal.put(record).map_err(|e| e.to_string())
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
        downtime_ns: None,
        filled_ns: 0,
        faults: None,
        hash_ns: 0,
        error: None,
    }
}

/// Whether a method needs the index.
fn uses_index(method: Method) -> bool {
    method == Method::Irlm
}
