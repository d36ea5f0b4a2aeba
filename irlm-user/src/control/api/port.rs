//! What an agent says of its core-facing port: the policy in force, and what the kernel counted per class.

use serde::{Deserialize, Serialize};

/// What is in force on a host's core-facing port. Rates are bit/s.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyStatus {
    /// "off", "tag-only", "own" or "taken-over".
    pub mode: String,
    /// Why that, and not what was asked for.
    pub why: String,
    /// The port.
    pub iface: Option<String>,
    /// What the policy asks for: "off", "own" or "take-over".
    pub asked: Option<String>,
    /// Whether the policy came by `irlm policy set`, so that it is gone when the agent ends.
    pub live: bool,
    /// The link's rate.
    pub link: Option<u64>,
    /// Guaranteed to others.
    pub others: Option<u64>,
    /// What migration can never exceed.
    pub migration: Option<u64>,
    /// This host's share of the core link by the budgets of the groups that move now.
    pub share: Option<u64>,
    /// What holds the share: "tree" or "pacing".
    pub shared_by: Option<String>,
    /// The tree's classes, parents first; without our tree, what the policy says of each.
    pub classes: Vec<PolicyClass>,
}

/// One class of the port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyClass {
    /// "bulk".
    pub name: String,
    /// Its class id as `tc` writes it.
    pub id: String,
    /// Its parent's.
    pub parent: Option<String>,
    /// Guaranteed.
    pub rate: u64,
    /// Most it may use.
    pub ceil: u64,
    /// 0 is served first; leaves only.
    pub prio: Option<u32>,
    /// What its queue holds, bytes.
    pub queue: u32,
    /// DSCP its packets get.
    pub dscp: Option<u8>,
    /// Firewall mark its packets get.
    pub mark: Option<u32>,
    /// `skb->priority` its packets get.
    pub priority: Option<String>,
    /// Bytes sent, by the kernel's count.
    pub bytes: u64,
    /// Packets sent.
    pub packets: u64,
    /// Packets dropped.
    pub dropped: u64,
    /// Bytes that wait now.
    pub backlog: u64,
}
