//! What an agent says of a group: where each VM stands, how far preparation is, what the host has counted.

use super::{MulticastCounters, Work};
use crate::control::terms::Method;
use crate::core::account::Proof;
use crate::flow::arrival::fetch::latency::FaultWaits;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a plain QEMU on the target host waits for its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incoming {
    /// The VM's number.
    pub vm: u16,
    /// Where its QEMU listens.
    pub addr: SocketAddr,
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
    /// Target: its process ended when it belonged here and was not whole, or when nobody saw whether it ran. The source's
    /// paused copy is left for an operator. Final.
    Lost,
    /// Paused on both sides: the agents lost each other between the words of the handover and keep trying. Or it runs at
    /// its target, and lacks pages that nobody has any more.
    InDoubt,
}

/// Said of a VM that arrived, and has moved on since.
pub const LEFT_AGAIN: &str = "it has left this host again, and its process here has ended";

impl Phase {
    /// Whether it changes no more (a VM in doubt still does).
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Running | Self::LeftPaused | Self::Done | Self::Failed | Self::Cancelled | Self::Lost
        )
    }

    /// Whether a cancel comes too late, and it is not over either: it goes on, or has to be settled.
    #[must_use]
    pub fn is_past_cancelling(self) -> bool {
        matches!(self, Self::GaveUp | Self::Fetching | Self::InDoubt)
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
            Self::Lost => "lost",
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
    /// Of `difference`, those from a content that another source host carries.
    #[serde(default)]
    pub modelled: u64,
    /// Post-copy: sent because a vCPU waited for them, or soon would.
    pub demanded: u64,
}

impl PageCounts {
    /// Adds another VM's. A counter that is forgotten here does not compile.
    pub fn add(&mut self, other: &Self) {
        let Self {
            unique,
            shared,
            reference,
            remote_reference,
            uniform,
            answered,
            hashed,
            kept,
            held,
            spared,
            difference,
            modelled,
            demanded,
        } = *other;
        self.unique += unique;
        self.shared += shared;
        self.reference += reference;
        self.remote_reference += remote_reference;
        self.uniform += uniform;
        self.answered += answered;
        self.hashed += hashed;
        self.kept += kept;
        self.held += held;
        self.spared += spared;
        self.difference += difference;
        self.modelled += modelled;
        self.demanded += demanded;
    }
}

// bounds: one answer of the control protocol
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
    /// What its process at this side says of it now: QEMU's run state, `ended` if the process has ended; empty if nobody has
    /// looked.
    #[serde(default)]
    pub state: String,
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
    /// Source: from its stop until the word came that the target can run or runs: by one clock that does not step, and at
    /// most one core link delay too long. Absent until known.
    #[serde(default)]
    pub downtime_ns: Option<u64>,
    /// From the start of its stream until it ran or could run, by one clock that does not step. Absent until known.
    #[serde(default)]
    pub total_ns: Option<u64>,
    /// Post-copy: from when it ran until its last page had come, by one clock that does not step. Absent until known.
    #[serde(default)]
    pub fill_ns: Option<u64>,
    /// Post-copy: when its last page had come.
    #[serde(default)]
    pub filled_ns: u64,
    /// Target, post-copy: how long its vCPUs waited for pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultWaits>,
    /// Source: processor time of hashing pages as they left, nanoseconds.
    #[serde(default)]
    pub hash_ns: u64,
    /// Source: what is known of its pages, once it is.
    #[serde(default)]
    pub verified: Option<Proof>,
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
    /// Source: the host is ready, and better waited for: it fetches its part of the plan, or lends contents and borrows some.
    #[serde(default)]
    pub planning: bool,
    /// Source, where the group may go direct by what is measured: whether this host's links are faster than its agent. Absent
    /// if it was not measured.
    #[serde(default)]
    pub direct: Option<bool>,
    /// Plain methods: where this host's QEMUs listen.
    #[serde(default)]
    pub incoming: Vec<Incoming>,
    /// Why it failed, or what could not be read beforehand.
    #[serde(default)]
    pub problem: Option<String>,
}

impl PrepareStatus {
    /// In this phase, with nothing read yet.
    #[must_use]
    pub fn new(phase: PreparePhase, problem: Option<String>) -> Self {
        Self {
            phase,
            pages_total: 0,
            pages_done: 0,
            distinct: 0,
            hot: 0,
            planning: false,
            direct: None,
            incoming: Vec::new(),
            problem,
        }
    }
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

// bounds: one answer of the control protocol
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
    /// Source: contents lent to other source hosts, each once, whoever got them.
    #[serde(default)]
    pub lent: u64,
    /// Source: bytes that went to other source hosts for that.
    #[serde(default)]
    pub lent_bytes: u64,
    /// Source: contents that other source hosts lent.
    #[serde(default)]
    pub borrowed: u64,
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
