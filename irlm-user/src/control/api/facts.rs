//! What an agent sees of a group's VMs before anything is done to them: who they are, how they stand, and
//! what would be refused. Both ends of a VM say it, and the coordinator compares.

use super::Role;
use crate::host::sched::Process;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Who a VM is. Equal at both ends, or one VM's memory would go to another's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// QEMU's `-uuid`; all zeros where none was given. Empty where the front has none.
    #[serde(default)]
    pub uuid: String,
    /// QEMU's `-name`; empty where none was given.
    #[serde(default)]
    pub name: String,
    /// Its machine with version, as QEMU calls it.
    #[serde(default)]
    pub machine: String,
    /// Guest memory, bytes; 0 if it is not known.
    #[serde(default)]
    pub memory: u64,
}

impl Identity {
    /// What the two ends of one VM say that does not agree, a line each; what one of them does not say is
    /// not compared.
    #[must_use]
    pub fn differences(&self, target: &Self) -> Vec<String> {
        let mut out = Vec::new();
        let mut text = |what: &str, s: &str, t: &str, how: &str| {
            if !s.is_empty() && !t.is_empty() && s != t {
                out.push(format!("its {what} is {s:?} at the source and {t:?} at the target: {how}"));
            }
        };
        text("UUID", &self.uuid, &target.uuid, "the two sockets are of different VMs, or -uuid differs");
        text("name", &self.name, &target.name, "the two sockets are of different VMs, or -name differs");
        text("machine", &self.machine, &target.machine, "start the target with the source's -machine");
        if self.memory != 0 && target.memory != 0 && self.memory != target.memory {
            out.push(format!(
                "it has {} bytes of memory at the source and {} at the target: start the target with the source's -m",
                self.memory, target.memory
            ));
        }
        out
    }
}

/// A VM that has left its source in an earlier run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// The group with which it left.
    pub group: String,
    /// The data address of the agent that has it now.
    pub to: SocketAddr,
    /// When, Unix nanoseconds.
    pub at_ns: u64,
}

/// What a host's newest record says of a VM. The two ends of one move agree on group, VM and run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnRecord {
    /// The group.
    pub group: String,
    /// The VM's name in it.
    pub vm: String,
    /// Tells runs of a group of that name apart. Made of the run's secret, which it does not give away.
    #[serde(default)]
    pub run: u64,
    /// What became of it, in words.
    #[serde(default)]
    pub says: String,
    /// The socket of the process that it is about.
    #[serde(default)]
    pub socket: String,
    /// It is not over: the VM is being moved, or in doubt.
    #[serde(default)]
    pub open: bool,
    /// The process that it is about has ended.
    #[serde(default)]
    pub ended: bool,
    /// The VM has left that host for this one.
    #[serde(default)]
    pub left_for: Option<SocketAddr>,
}

/// One VM at one end, looked at without touching it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmFacts {
    /// Its number.
    pub ix: u16,
    /// Its name in the group.
    pub name: String,
    /// Which end.
    pub role: Role,
    /// The process that runs it or waits for it.
    #[serde(default)]
    pub process: Option<Process>,
    /// Who it says it is.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Its run state in QEMU's words; `ended` once its process was seen to have ended; empty if it is not
    /// known.
    #[serde(default)]
    pub state: String,
    /// What this host's newest record about that process says.
    #[serde(default)]
    pub history: Option<String>,
    /// The newest record about that process, else of that place, else of that VM.
    #[serde(default)]
    pub record: Option<OnRecord>,
    /// Source: the newest record says that it has left.
    #[serde(default)]
    pub moved: Option<Moved>,
    /// Target: the newest record says that it arrived here and belongs here; the group with which it came.
    #[serde(default)]
    pub arrived: Option<String>,
    /// Memory of the host that the process holds, bytes; without huge pages.
    #[serde(default)]
    pub resident: u64,
    /// Why it cannot be moved, a line each.
    #[serde(default)]
    pub refusals: Vec<String>,
}

impl VmFacts {
    /// With nothing found yet.
    #[must_use]
    pub fn new(ix: u16, name: &str, role: Role) -> Self {
        Self {
            ix,
            name: name.to_owned(),
            role,
            process: None,
            identity: None,
            state: String::new(),
            history: None,
            record: None,
            moved: None,
            arrived: None,
            resident: 0,
            refusals: Vec::new(),
        }
    }
}

/// What an agent sees of a group beforehand.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Preflight {
    /// Its VMs, both ends.
    #[serde(default)]
    pub vms: Vec<VmFacts>,
    /// What is wrong with the host itself, a line each.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Memory that the host can still give, bytes, if it is known.
    #[serde(default)]
    pub available: Option<u64>,
    /// The hosts whose agent it is to other agents, by the certificate with which it calls them; none: it calls in plain
    /// text, or is of a version that does not say.
    #[serde(default)]
    pub agent_of: Option<Vec<String>>,
}
