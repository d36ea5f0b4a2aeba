//! What an agent says of groups that it need not keep any more: one row for each VM and role.

use super::Role;
use crate::control::terms::Method;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// What became of a VM at one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryRow {
    /// The group.
    pub group: String,
    /// Which run of it: the first digits of its secret.
    pub run: String,
    /// How it was moved.
    pub method: Method,
    /// The VM.
    pub vm: String,
    /// Which side this host was.
    pub role: Role,
    /// What it came to, in words.
    pub outcome: String,
    /// Nothing of it is open.
    pub over: bool,
    /// The other side's agent.
    pub peer: SocketAddr,
    /// When its move started, Unix nanoseconds of the agent's clock.
    pub started_ns: u64,
    /// When that was written down.
    pub at_ns: u64,
    /// Whether the process that ran it, or waited for it, lives; absent if that cannot be known.
    #[serde(default)]
    pub alive: Option<bool>,
    /// Whether the copy here is in doubt, so that an operator's word about it would be heard
    /// ([`super::Request::Settle`]); absent from agents of an earlier version.
    #[serde(default)]
    pub doubt: Option<bool>,
    /// Why it stayed, or is in doubt.
    #[serde(default)]
    pub why: Option<String>,
}
