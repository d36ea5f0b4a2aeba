//! The words of the control protocol: one JSON object a line, over TCP, from the coordinator (and other commands) to
//! agents, and between agents where plain QEMU needs a word of them. Versioned; a reader ignores fields it does not
//! know and answers requests it does not know with an error, so that agents can be upgraded one by one.
//!
//! Request: `{"v":1,"req":{"do":"status","group":"rack-7"}}`. Reply: `{"v":1,"ok":{"is":"status",…}}` or
//! `{"v":1,"err":{"code":"unknown-group","msg":"…"}}`. Times are Unix nanoseconds of the agent's own clock; 0 or
//! absent means "not yet".

// What went by multicast.
mod multicast;
// What is said of a port's policy.
mod port;
// What moving pages cost.
mod work;

pub use multicast::MulticastCounters;
pub use port::{PolicyClass, PolicyStatus};
pub use sampling::{HostWrites, SamplerStatus, VmWrites};
pub use work::Work;

use crate::control::config::{GroupTimeouts, MulticastConfig};
use crate::core::digest::Algorithm;
use crate::core::direct::Direct;
use crate::core::migration::Migration;
use crate::core::squeeze::Mode;
use crate::flow::Front;
use crate::flow::target::fetch::latency::FaultWaits;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::SocketAddr;

// How VMs write.
pub mod sampling;

/// Version of this protocol; a request of another version is refused by name.
pub const VERSION: u32 = 1;

/// Longest line on a control connection, bytes: a `prepare` of 8192 VMs on one host is below 3 MiB.
pub const MAX_LINE: usize = 4 << 20;

/// How a group is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Plain QEMU pre-copy, IRLM not in the path.
    Oc,
    /// Plain QEMU with two zstd-compressed channels.
    QemuMultifdZstd,
    /// Gang migration: each content once per source host.
    Gm,
    /// Each content once per rack.
    #[default]
    Irlm,
}

impl Method {
    /// Whether pages pass through the agents (as opposed to plain QEMU).
    #[must_use]
    pub fn in_path(self) -> bool {
        matches!(self, Self::Gm | Self::Irlm)
    }

    /// The name used in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Oc => "oc",
            Self::QemuMultifdZstd => "qemu-multifd-zstd",
            Self::Gm => "gm",
            Self::Irlm => "irlm",
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The group's secret: keys its digests and opens its connections. Drawn by the coordinator; 64 hex digits on the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use std::fmt::Write as _;
        let hex = self.0.iter().fold(String::with_capacity(64), |mut out, b| {
            let _ = write!(out, "{b:02x}");
            out
        });
        s.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        let mut out = [0; 32];
        if s.len() != 64 || !s.is_ascii() {
            return Err(serde::de::Error::custom("a token is 64 hex digits"));
        }
        for (i, b) in out.iter_mut().enumerate() {
            *b = u8::from_str_radix(&s[2 * i..2 * i + 2], 16)
                .map_err(|_| serde::de::Error::custom("a token is 64 hex digits"))?;
        }
        Ok(Self(out))
    }
}

/// A source host, as every agent of the group knows it. Its number is its place in the list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Its name in the group.
    pub name: String,
    /// Its agent's control address.
    pub agent: SocketAddr,
}

/// A target host, as every agent of the group knows it. Its number is its place in the list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetSpec {
    /// Its name in the group.
    pub name: String,
    /// Its agent's control address.
    pub agent: SocketAddr,
    /// Its agent's data address.
    pub data: SocketAddr,
}

/// A VM that leaves or reaches the agent's host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its number in the whole group.
    pub ix: u16,
    /// Its name.
    pub name: String,
    /// Number of its source host.
    pub source: u16,
    /// Number of its target host.
    pub target: u16,
    /// Its trust domain.
    #[serde(default)]
    pub tenant: String,
    /// Who runs it on the source host.
    pub source_front: Front,
    /// Who waits for it on the target host; of the same kind.
    pub target_front: Front,
}

/// What one agent must know of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// The group's name.
    pub name: String,
    /// Its secret.
    pub token: Token,
    /// How it is moved.
    pub method: Method,
    /// The page digest.
    #[serde(default)]
    pub digest: Algorithm,
    /// How page contents are compressed (methods `gm` and `irlm`).
    #[serde(default)]
    pub compress: Mode,
    /// Whether QEMUs may stream to each other (method `irlm`).
    #[serde(default)]
    pub direct: Direct,
    /// Whether pages that are written all the time are held back (methods `gm` and `irlm`).
    #[serde(default)]
    pub hold_back: bool,
    /// How VMs move that our own VMM runs (methods `gm` and `irlm`).
    #[serde(default)]
    pub migration: Migration,
    /// Longest downtime QEMU may plan for, milliseconds.
    pub downtime_ms: u64,
    /// Most VMs that leave a source host at a time; none: no bound.
    #[serde(default)]
    pub parallel: Option<u16>,
    /// The index server (method `irlm`).
    #[serde(default)]
    pub index: Option<SocketAddr>,
    /// All source hosts.
    pub sources: Vec<SourceSpec>,
    /// All target hosts.
    pub targets: Vec<TargetSpec>,
    /// The agent's own number among the source hosts, if it is one.
    #[serde(default)]
    pub my_source: Option<u16>,
    /// The agent's own number among the target hosts, if it is one.
    #[serde(default)]
    pub my_target: Option<u16>,
    /// The group's trust domains, sorted; a domain's number is its place.
    #[serde(default)]
    pub tenants: Vec<String>,
    /// The VMs that leave or reach the agent's host.
    pub vms: Vec<VmSpec>,
    /// Source hosts of a group with a budget: this host's first share of the core link, bit/s.
    #[serde(default)]
    pub share: Option<u64>,
    /// IP multicast in the target rack, if the group uses any.
    #[serde(default)]
    pub multicast: Option<MulticastConfig>,
    /// How long is waited.
    #[serde(default)]
    pub timeouts: GroupTimeouts,
}

impl GroupSpec {
    /// Checks what serde cannot: names, numbers, caps. An agent calls it before it acts on a `prepare`.
    pub fn check(&self) -> Result<(), String> {
        use crate::control::config::{MAX_HOSTS, MAX_SOCKET_PATH, MAX_TENANT, MAX_VMS, valid_name};
        if !valid_name(&self.name) {
            return Err(format!("group name {:?} is not usable", self.name));
        }
        if self.sources.len() > MAX_HOSTS || self.targets.len() > MAX_HOSTS || self.vms.len() > MAX_VMS {
            return Err(format!("more than {MAX_HOSTS} hosts on a side or {MAX_VMS} VMs"));
        }
        let (sources, targets) = (self.sources.len(), self.targets.len());
        let beyond = |me: Option<u16>, n: usize| me.is_some_and(|i| usize::from(i) >= n);
        if beyond(self.my_source, sources) || beyond(self.my_target, targets) {
            return Err("the agent's own host number is not in the list".into());
        }
        if let Some(m) = &self.multicast {
            m.check()?;
        }
        let mut seen = std::collections::HashSet::new();
        for v in &self.vms {
            let known = usize::from(v.source) < sources && usize::from(v.target) < targets;
            let mine = Some(v.source) == self.my_source || Some(v.target) == self.my_target;
            let socket = |f: &Front| {
                let path = f.socket();
                path.is_absolute() && path.as_os_str().len() <= MAX_SOCKET_PATH
            };
            if !valid_name(&v.name)
                || !known
                || !mine
                || v.tenant.len() > MAX_TENANT
                || !socket(&v.source_front)
                || !socket(&v.target_front)
                || v.source_front.is_qemu() != v.target_front.is_qemu()
                || !(v.source_front.is_qemu() || self.method.in_path())
                || !self.tenants.contains(&v.tenant)
                || !seen.insert(v.ix)
            {
                return Err(format!("VM {:?} (number {}) is not usable", v.name, v.ix));
            }
        }
        Ok(())
    }
}

/// Where a plain QEMU on the target host waits for its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The VM's number.
    pub vm: u16,
    /// Where its QEMU listens.
    pub addr: SocketAddr,
}

/// What an operator decides about a VM in doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Target: run it. The operator has made sure that the source's copy is gone or paused for good.
    Run,
    /// Target: throw the copy away. Source: this copy is given up.
    Discard,
    /// Source: run it on. The operator has made sure that the target's copy does not and will not run.
    Resume,
}

/// What can be asked of an agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Who are you? Answer: [`Reply::Hello`].
    Hello,
    /// Learn the group, reach the monitors, start reading guests (method `irlm`), open the target monitors (plain
    /// methods). Answer: [`Reply::Prepare`], at once; asking again with the same token changes nothing.
    Prepare {
        /// The group.
        spec: Box<GroupSpec>,
    },
    /// How far is the preparation? Answer: [`Reply::Prepare`].
    PrepareStatus {
        /// The group.
        group: String,
    },
    /// Watch for so many seconds how this host's VMs of the group write; moves nothing, keeps nothing. Answer, after that
    /// time: [`Reply::Observed`].
    Observe {
        /// The group.
        spec: Box<GroupSpec>,
        /// For how long, at most [`sampling::MAX_SECONDS`].
        seconds: u32,
        /// One dirtying in so many is looked at by place.
        #[serde(default = "one")]
        one_in: u32,
    },
    /// Push and migrate. Sent to target hosts first. Answer: [`Reply::Done`].
    Start {
        /// The group.
        group: String,
        /// Leave arrived VMs paused (the target owns them; someone else lets them run).
        #[serde(default)]
        leave_paused: bool,
        /// Plain methods: where the targets listen.
        #[serde(default)]
        incoming: Vec<Incoming>,
    },
    /// How does it stand? Answer: [`Reply::Status`].
    Status {
        /// One group, or all.
        #[serde(default)]
        group: Option<String>,
    },
    /// Stop everything of the group that has not been given up yet; those VMs run on at the source. Answer:
    /// [`Reply::Done`].
    Cancel {
        /// The group.
        group: String,
    },
    /// An operator's word on a VM in doubt. Answer: [`Reply::Done`].
    Settle {
        /// The group.
        group: String,
        /// The VM's name.
        vm: String,
        /// What to do.
        decision: Decision,
    },
    /// Drop a finished group and its records. Refused while a VM of it is neither here nor there. Answer:
    /// [`Reply::Done`].
    Forget {
        /// The group.
        group: String,
    },
    /// From the source agent to the target agent, plain methods: the source's QEMU has completed and will not run
    /// again; the target may. May be repeated. Answer: [`Reply::Done`] once the target runs (or is left paused).
    Released {
        /// The group.
        group: String,
        /// Its secret: only the group's own agents say this word.
        token: Token,
        /// The VM's number.
        vm: u16,
    },
    /// Another policy for the port from now on. It lasts until the agent ends; then its file counts again. If it
    /// cannot be had the old one stays. Answer: [`Reply::Policy`].
    PolicySet {
        /// The text of a policy file.
        text: String,
    },
    /// What is in force on the port? Answer: [`Reply::Policy`].
    PolicyShow,
    /// From the group's coordinator: this host's share of the group's budget on the core link. Of two shares the one
    /// of the higher number counts, whenever it comes. Answer: [`Reply::Share`], once it is in force.
    BudgetShare {
        /// The group.
        group: String,
        /// The group's secret, or that of the last [`Request::BudgetClaim`]: only one divides.
        token: Token,
        /// Counts up with every share that the coordinator sends this host.
        seq: u64,
        /// The share, bit/s.
        bits: u64,
    },
    /// From whoever divides the group's budget, every second, and from who takes over from one that has not been heard
    /// for 4 s: this host is to listen to shares of this term and with this secret, and to no others. Answer:
    /// [`Reply::Share`]; [`Code::NotNow`] if somebody else divides.
    BudgetClaim {
        /// The group.
        group: String,
        /// What the shares will bear: the group's secret from its own coordinator, else a fresh one.
        token: Token,
        /// 0 for the coordinator that starts the group; one more for each that takes over.
        term: u32,
    },
}

/// Which side of a VM's move an agent speaks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The host it leaves.
    Source,
    /// The host it reaches.
    Target,
}

/// Where a VM stands, as one of its two agents sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Known, monitor reached, nothing moved.
    Prepared,
    /// Source: planned contents are being pushed; the VM's own stream has not started.
    Pushing,
    /// Pages move; the source runs it.
    Migrating,
    /// Source: QEMU has stopped it for the last pages.
    Stopped,
    /// Target: everything is loaded; not yet allowed to run.
    Loaded,
    /// Source: given up, paused for good; the target has not yet said that it runs.
    GaveUp,
    /// Target: it runs here, and some of its pages are still at its source.
    Fetching,
    /// Target: it runs here. Final.
    Running,
    /// Target: it is owned here and left paused as asked. Final.
    LeftPaused,
    /// Source: the target has said that it runs. Final.
    Done,
    /// Source: it did not move and runs on here. Target: did not arrive, discarded. Final.
    Failed,
    /// As failed, because someone asked for it. Final.
    Cancelled,
    /// Paused on both sides: the agents lost each other between the words of the handover and keep trying.
    InDoubt,
}

impl Phase {
    /// Whether it changes no more (a VM in doubt still does).
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Running | Self::LeftPaused | Self::Done | Self::Failed | Self::Cancelled)
    }

    /// For tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::Pushing => "pushing",
            Self::Migrating => "migrating",
            Self::Stopped => "stopped",
            Self::Loaded => "loaded",
            Self::GaveUp => "gave up",
            Self::Fetching => "fetching",
            Self::Running => "running",
            Self::LeftPaused => "left paused",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in doubt",
        }
    }
}

/// Pages of a VM's stream by what was sent for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PageCounts {
    /// Sent in full, not shared.
    pub unique: u64,
    /// Sent in full, and kept in the target's store.
    pub shared: u64,
    /// Sent as a reference to a content this host has sent before.
    pub reference: u64,
    /// Sent as a reference to a content that another host carries.
    pub remote_reference: u64,
    /// Sent as one byte.
    pub uniform: u64,
    /// Sent in full because the target asked (rule 4).
    pub answered: u64,
    /// Of all these, hashed as they left.
    pub hashed: u64,
    /// Left under a digest kept from preparation, because the VM's dirty log says that it still holds.
    pub kept: u64,
    /// How often a page was held back because it was being written to.
    pub held: u64,
    /// Versions of held pages that were never sent, because a newer one came.
    #[serde(default)]
    pub spared: u64,
    /// Of `unique` and `shared`, those sent as their difference from a similar content.
    #[serde(default)]
    pub difference: u64,
    /// Post-copy: sent because a vCPU waited for them, or soon would.
    pub demanded: u64,
}

/// One VM, by one of its two agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its number.
    pub ix: u16,
    /// Its name.
    pub name: String,
    /// Which side speaks.
    pub role: Role,
    /// Where it stands.
    pub phase: Phase,
    /// Source: bytes taken from QEMU. Target: bytes given to QEMU. Plain methods: as QEMU counts.
    #[serde(default)]
    pub stream_bytes: u64,
    /// Bytes of the VM's own connection over the core link; plain methods: as QEMU counts.
    #[serde(default)]
    pub wire_bytes: u64,
    /// Guest RAM, bytes.
    #[serde(default)]
    pub ram_total: u64,
    /// Guest RAM still to go, bytes, as far as known.
    #[serde(default)]
    pub ram_remaining: u64,
    /// Pages by kind.
    #[serde(default)]
    pub pages: PageCounts,
    /// What its move cost this host, as far as it is this VM's own.
    #[serde(default)]
    pub work: Work,
    /// Target: pages that wait for their content now.
    #[serde(default)]
    pub waiting: u64,
    /// When its stream started.
    #[serde(default)]
    pub started_ns: u64,
    /// When the source stopped it (QEMU's STOP event).
    #[serde(default)]
    pub stopped_ns: u64,
    /// Target: when everything was loaded, so that it could run.
    #[serde(default)]
    pub ready_ns: u64,
    /// Target: when it ran. Source: when it heard so.
    #[serde(default)]
    pub running_ns: u64,
    /// Source: from its stop until the word came that the target can run or runs: by one clock, and at most one core
    /// link delay too long. Absent until known.
    #[serde(default)]
    pub downtime_ns: Option<u64>,
    /// Post-copy: when its last page had come.
    #[serde(default)]
    pub filled_ns: u64,
    /// Target, post-copy: how long its vCPUs waited for pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultWaits>,
    /// Source: processor time of hashing pages as they left, nanoseconds.
    #[serde(default)]
    pub hash_ns: u64,
    /// Why it failed or is in doubt.
    #[serde(default)]
    pub error: Option<String>,
}

/// How far a preparation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PreparePhase {
    /// Guests are being read.
    Preparing,
    /// Ready to start.
    Ready,
    /// Cannot; see the problem.
    Failed,
}

/// An agent's preparation of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareStatus {
    /// How far.
    pub phase: PreparePhase,
    /// Pages to read (as far as known).
    #[serde(default)]
    pub pages_total: u64,
    /// Pages read, holes included.
    #[serde(default)]
    pub pages_done: u64,
    /// Distinct digests found.
    #[serde(default)]
    pub distinct: u64,
    /// Pages left out because their VMs write to them all the time.
    #[serde(default)]
    pub hot: u64,
    /// Plain methods: where this host's QEMUs listen.
    #[serde(default)]
    pub incoming: Vec<Incoming>,
    /// Why it failed, or what could not be read beforehand.
    #[serde(default)]
    pub problem: Option<String>,
}

/// Packets and bytes of one class of traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes as the interface counts them.
    pub bytes: u64,
}

/// One class of traffic at a host's core-facing port, by where its other end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BpfClass {
    /// Leaving for the core link.
    pub core_out: Traffic,
    /// Arriving over the core link.
    pub core_in: Traffic,
    /// Leaving for a host of the same rack.
    pub rack_out: Traffic,
    /// Arriving from a host of the same rack.
    pub rack_in: Traffic,
}

impl BpfClass {
    /// Bytes in both directions, wherever the other end is.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.core_out.bytes + self.core_in.bytes + self.rack_out.bytes + self.rack_in.bytes
    }
}

/// What the eBPF classifier of a host's core-facing port counted since its maps were made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BpfCounters {
    /// Unique contents and references.
    pub bulk: BpfClass,
    /// The last round and the device state of stopped VMs.
    pub switchover: BpfClass,
    /// Pages that running VMs wait for.
    pub demand: BpfClass,
    /// Control.
    pub control: BpfClass,
    /// Contents from target host to target host.
    pub forward: BpfClass,
    /// Everything else.
    pub other: BpfClass,
    /// All that reached the host, of every class: comparable with the interface's own counter.
    pub all_in: Traffic,
    /// Packets of a class with a DSCP into which it could not be written.
    pub dscp_not_written: u64,
}

impl BpfCounters {
    /// The classes that carry VMs over the core link.
    #[must_use]
    pub const fn of_vms(&self) -> [&BpfClass; 3] {
        [&self.bulk, &self.switchover, &self.demand]
    }
}

/// What a host did for a group as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostCounters {
    /// Source: QEMUs stream to each other.
    #[serde(default)]
    pub direct: bool,
    /// Target hosts: memory of waiting QEMUs that was made while the group was prepared, bytes.
    #[serde(default)]
    pub populated_bytes: u64,
    /// Source: planned contents still to be pushed.
    pub push_left: u64,
    /// Source: planned contents pushed.
    pub push_sent: u64,
    /// Source: planned contents that were stale, and sent as void.
    pub push_void: u64,
    /// Source: pages hashed again before they were pushed.
    pub push_hashed: u64,
    /// Source: contents pushed under a digest kept from preparation.
    pub push_kept: u64,
    /// Source: processor time of that hashing, nanoseconds.
    pub push_hash_ns: u64,
    /// Contents that appeared after the plan and were asked of the index.
    #[serde(default)]
    pub late_asked: u64,
    /// Of them, by target host, those that others bring.
    #[serde(default)]
    pub late_known: u64,
    /// Source: bytes of its push connections.
    pub push_bytes: u64,
    /// What preparation and pushes (source), contents from pushes and peers and passing them on (target) cost.
    pub work: Work,
    /// Target: pages passed on to other target hosts, once for each.
    pub forwarded_pages: u64,
    /// Target: bytes passed on to other target hosts, compressed where that paid.
    pub forwarded_bytes: u64,
    /// Target: contents that came with the names of target hosts to pass them on to, each once.
    pub shared_pages: u64,
    /// Target: what went by multicast, if the group uses any; its bytes are in `forwarded_bytes` too.
    pub multicast: Option<MulticastCounters>,
    /// Target: contents in the store.
    pub store_pages: u64,
    /// Target: bytes of the store.
    pub store_bytes: u64,
    /// Bytes of contents kept so that similar pages travel as differences; at the source a copy of what it sent.
    #[serde(default)]
    pub kept_bytes: u64,
    /// Counted by eBPF, if it is loaded.
    pub bpf: Option<BpfCounters>,
}

/// A group, by one agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub group: String,
    /// How it is moved.
    pub method: Method,
    /// Its preparation.
    pub prepare: PrepareStatus,
    /// Its VMs at this host, both roles.
    pub vms: Vec<VmStatus>,
    /// What the host did for it.
    #[serde(default)]
    pub host: HostCounters,
    /// When the host was told to start, Unix nanoseconds by its own clock; 0: not yet.
    #[serde(default)]
    pub started_ns: u64,
    /// Its part of the group's budget.
    #[serde(default)]
    pub share: Option<ShareStatus>,
}

/// A source host's part of its group's budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareStatus {
    /// Number of the share.
    pub seq: u64,
    /// Bit/s.
    pub bits: u64,
    /// Most the host could use by its policy, bit/s.
    #[serde(default)]
    pub limit: Option<u64>,
    /// Whether a class tree keeps it (else TCP's pacing, or QEMU's own limit).
    pub tree: bool,
    /// Milliseconds since whoever divides the budget was last heard.
    #[serde(default)]
    pub silent_ms: u64,
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// The host's name by its own configuration.
        name: String,
        /// The program's version.
        version: String,
        /// The agent's clock, so that a caller can tell how far clocks are apart.
        now_ns: u64,
    },
    /// To [`Request::Prepare`] and [`Request::PrepareStatus`].
    Prepare(PrepareStatus),
    /// To [`Request::Observe`].
    Observed(HostWrites),
    /// To [`Request::Status`].
    Status {
        /// The host's name by its own configuration.
        name: String,
        /// The agent's clock.
        now_ns: u64,
        /// The groups it knows.
        groups: Vec<GroupStatus>,
        /// How it watches VMs' writes, the best first.
        #[serde(default)]
        samplers: Vec<SamplerStatus>,
    },
    /// To [`Request::PolicySet`] and [`Request::PolicyShow`].
    Policy(Box<PolicyStatus>),
    /// To [`Request::BudgetShare`] and [`Request::BudgetClaim`]: what is in force.
    Share {
        /// The highest number heard.
        seq: u64,
        /// Its share, bit/s.
        bits: u64,
    },
    /// Done, or taken in hand.
    Done,
}

fn one() -> u32 {
    1
}

/// Why a request was not done, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// Another version of the protocol.
    Version,
    /// A request this agent has never heard of.
    UnknownRequest,
    /// Not understood.
    BadRequest,
    /// No such group or VM here.
    UnknownGroup,
    /// A group of that name with another token is under way.
    Conflict,
    /// Not at this point.
    NotNow,
    /// It was tried, and failed.
    Failed,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

/// A request that was not done: one line for people, one code for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people: what, where, what to do.
    pub msg: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into() }
    }
}

/// The line (without its newline) for a request.
#[must_use]
pub fn encode_request(r: &Request) -> String {
    serde_json::json!({ "v": VERSION, "req": r }).to_string()
}

/// The line (without its newline) for a reply.
#[must_use]
pub fn encode_reply(r: &Result<Reply, Refusal>) -> String {
    match r {
        Ok(ok) => serde_json::json!({ "v": VERSION, "ok": ok }),
        Err(err) => serde_json::json!({ "v": VERSION, "err": err }),
    }
    .to_string()
}

/// Reads a request line.
pub fn decode_request(line: &[u8]) -> Result<Request, Refusal> {
    let bad = |what: String| Refusal::new(Code::BadRequest, what);
    let mut v: Value = serde_json::from_slice(line).map_err(|e| bad(format!("not JSON: {e}")))?;
    if v["v"] != VERSION {
        let what = format!("control protocol version {} here, {} asked", VERSION, v["v"]);
        return Err(Refusal::new(Code::Version, what));
    }
    let req = v["req"].take();
    let name = req["do"].as_str().unwrap_or("").to_owned();
    serde_json::from_value(req).map_err(|e| {
        // Internally tagged enums say so when the tag is none of theirs.
        if e.to_string().starts_with("unknown variant") && e.to_string().contains(&format!("`{name}`")) {
            Refusal::new(Code::UnknownRequest, format!("this agent does not know the request {name:?}"))
        } else {
            bad(format!("request {name:?}: {e}"))
        }
    })
}

/// Reads a reply line; the outer error is a line that is no reply.
pub fn decode_reply(line: &[u8]) -> Result<Result<Reply, Refusal>, String> {
    let mut v: Value = serde_json::from_slice(line).map_err(|e| format!("not JSON: {e}"))?;
    if let Some(err) = v.get_mut("err") {
        return serde_json::from_value(err.take()).map(Err).map_err(|e| e.to_string());
    }
    if v["v"] != VERSION {
        return Err(format!("control protocol version {}, not {VERSION}", v["v"]));
    }
    serde_json::from_value(v["ok"].take()).map(Ok).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests;
