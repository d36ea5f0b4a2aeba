//! What one agent is told of a group: how it is moved, who takes part, which VMs leave or reach its host.

use super::Identity;
use crate::control::recipe::Recipe;
use crate::control::terms::{GroupTimeouts, Method, Mistake, Token};
use crate::flow::Front;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A source host, as every agent of the group knows it. Its number is its place in the list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceSpec {
    /// Its name in the group.
    pub name: String,
    /// Its agent's control address.
    pub agent: SocketAddr,
    /// Its agent's data address, as the other source hosts reach it, if it is known.
    #[serde(default)]
    pub data: Option<SocketAddr>,
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
    /// Who the VM is by what the other end's agent has seen of it, once it was looked at; an agent refuses what differs.
    #[serde(default)]
    pub identity: Option<Identity>,
}

/// What one agent must know of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// The group's name.
    pub name: String,
    /// Its secret.
    pub token: Token,
    /// What its way of moving is called in records and reports. An agent that knows no recipes misses the old key, and
    /// refuses.
    #[serde(rename = "called")]
    pub method: Method,
    /// How it is moved.
    pub recipe: Recipe,
    /// Longest downtime QEMU may plan for, milliseconds.
    pub downtime_ms: u64,
    /// Most VMs that leave a source host at a time; none: no bound.
    #[serde(default)]
    pub parallel: Option<u16>,
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
    /// How long is waited.
    #[serde(default)]
    pub timeouts: GroupTimeouts,
}

impl GroupSpec {
    /// Checks what serde cannot: names, numbers, caps. An agent calls it before it acts on a `prepare`.
    pub fn check(&self) -> Result<(), Mistake> {
        use crate::control::terms::{MAX_HOSTS, MAX_NAME, MAX_SOCKET_PATH, MAX_TENANT, MAX_VMS, valid_name};
        if !valid_name(&self.name) {
            return Err(format!("group name {:?} is not usable", self.name).into());
        }
        if self.sources.len() > MAX_HOSTS || self.targets.len() > MAX_HOSTS || self.vms.len() > MAX_VMS {
            return Err(format!("more than {MAX_HOSTS} hosts on a side or {MAX_VMS} VMs").into());
        }
        let (sources, targets) = (self.sources.len(), self.targets.len());
        let beyond = |me: Option<u16>, n: usize| me.is_some_and(|i| usize::from(i) >= n);
        if beyond(self.my_source, sources) || beyond(self.my_target, targets) {
            return Err("the agent's own host number is not in the list".into());
        }
        if let Some(m) = self.recipe.rack().and_then(|r| r.multicast) {
            m.check()?;
        }
        let hosts = self.sources.iter().map(|s| &s.name).chain(self.targets.iter().map(|t| &t.name));
        // Whoever is known by a record alone may be called by an address.
        if let Some(name) = hosts.into_iter().find(|n| n.len() > MAX_NAME || n.contains(char::is_control)) {
            return Err(format!("host name {name:?} is not usable").into());
        }
        let mut domains = std::collections::HashSet::new();
        if self.tenants.len() > MAX_VMS || !self.tenants.iter().all(|t| domains.insert(t)) {
            return Err(format!("more than {MAX_VMS} tenants, or one of them twice").into());
        }
        let too_long = |t: &&String| t.len() > MAX_TENANT || t.contains(char::is_control);
        if let Some(tenant) = self.tenants.iter().find(too_long) {
            return Err(format!("tenant {tenant:?} is not usable").into());
        }
        let mut seen = std::collections::HashSet::new();
        for v in &self.vms {
            let known = usize::from(v.source) < sources && usize::from(v.target) < targets;
            let mine = Some(v.source) == self.my_source || Some(v.target) == self.my_target;
            let socket = |f: &Front| {
                let path = f.socket();
                let plain = path.to_str().is_some_and(|p| !p.contains(char::is_control));
                plain && path.is_absolute() && path.as_os_str().len() <= MAX_SOCKET_PATH
            };
            if !valid_name(&v.name)
                || !known
                || !mine
                || v.tenant.len() > MAX_TENANT
                || !socket(&v.source_front)
                || !socket(&v.target_front)
                || v.source_front.is_qemu() != v.target_front.is_qemu()
                || !self.recipe.takes(&v.source_front)
                || !self.tenants.contains(&v.tenant)
                || !seen.insert(v.ix)
            {
                return Err(format!("VM {:?} (number {}) is not usable", v.name, v.ix).into());
            }
        }
        Ok(())
    }
}
