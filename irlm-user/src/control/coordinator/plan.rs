//! The group as its agents are told of it: numbers instead of names, one [`GroupSpec`] an agent.

use crate::control::api::{GroupSpec, Method, SourceSpec, TargetSpec, Token, VmSpec};
use crate::control::config::GroupConfig;
use crate::control::recipe::{Recipe, RecipeError};
use crate::core::budget::equal_share;
use crate::net::connection::{Endpoint, Security};
use std::net::SocketAddr;

/// A group, a method, a fresh secret: what one `irlm evacuate` is about.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The group file.
    pub config: GroupConfig,
    /// What its way of moving is called.
    pub method: Method,
    /// How it is moved.
    pub recipe: Recipe,
    /// The group's secret.
    pub token: Token,
    /// The agents, each once, target hosts first.
    pub agents: Vec<AgentPlan>,
    /// VMs of the file that have moved already; no agent is told of them.
    pub moved: Vec<AlreadyMoved>,
    /// How agents and index are called.
    pub security: Security,
}

/// A VM that an earlier run has moved: it is left as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct AlreadyMoved {
    /// Its number in the group.
    pub ix: u16,
    /// What its target's QEMU says of it now.
    pub state: String,
}

/// One agent's part.
#[derive(Clone, Debug)]
pub struct AgentPlan {
    /// Its host's name in the group.
    pub name: String,
    /// Its control address.
    pub addr: SocketAddr,
    /// What it is told.
    pub spec: GroupSpec,
}

impl Plan {
    /// Draws the secret and numbers everything in the group file's order.
    pub fn new(config: GroupConfig, method: Option<Method>) -> Result<Self, RecipeError> {
        let method = method.or(config.method).unwrap_or_default();
        let recipe = Recipe::resolve(&config, method)?;
        Ok(Self::number(config, (method, recipe), Token(rand::random())))
    }

    /// For watching and cancelling only: hosts and VMs are numbered, nothing is drawn or demanded.
    #[must_use]
    pub fn to_watch(config: GroupConfig) -> Self {
        let method = config.method.unwrap_or_default();
        Self::number(config, (method, Recipe::of_records(method)), Token([0; 32]))
    }

    fn number(config: GroupConfig, (method, recipe): (Method, Recipe), token: Token) -> Self {
        let sources: Vec<SourceSpec> = config
            .source
            .iter()
            .map(|h| SourceSpec { name: h.name.clone(), agent: h.agent, data: h.data })
            .collect();
        let targets: Vec<TargetSpec> = config
            .target
            .iter()
            .map(|h| TargetSpec { name: h.name.clone(), agent: h.agent, data: h.data })
            .collect();
        let number = |i: Option<usize>| i.and_then(|i| u16::try_from(i).ok());
        // The names were checked when the file was read.
        let source = |name: &str| number(config.source.iter().position(|h| h.name == name));
        let target = |name: &str| number(config.target.iter().position(|h| h.name == name));
        let vms: Vec<VmSpec> = config
            .vm
            .iter()
            .enumerate()
            .filter_map(|(i, v)| {
                let (source_front, target_front) = v.fronts()?;
                Some(VmSpec {
                    ix: number(Some(i))?,
                    name: v.name.clone(),
                    source: source(&v.source)?,
                    target: target(&v.target)?,
                    tenant: v.tenant.clone(),
                    source_front,
                    target_front,
                    identity: None,
                })
            })
            .collect();
        let mut tenants: Vec<String> = vms.iter().map(|v| v.tenant.clone()).collect();
        tenants.sort();
        tenants.dedup();
        let mut addresses: Vec<(SocketAddr, String)> = Vec::new();
        let all =
            targets.iter().map(|t| (t.agent, &t.name)).chain(sources.iter().map(|s| (s.agent, &s.name)));
        for (addr, name) in all {
            match addresses.iter_mut().find(|(a, _)| *a == addr) {
                // One host on both sides.
                Some((_, known)) if known != name => *known = format!("{known}/{name}"),
                Some(_) => {}
                None => addresses.push((addr, name.clone())),
            }
        }
        let agents = addresses
            .into_iter()
            .map(|(addr, name)| {
                let my_source = number(sources.iter().position(|s| s.agent == addr));
                let my_target = number(targets.iter().position(|t| t.agent == addr));
                let mine = |v: &&VmSpec| Some(v.source) == my_source || Some(v.target) == my_target;
                let spec = GroupSpec {
                    name: config.name.clone(),
                    token,
                    method,
                    recipe: recipe.clone(),
                    downtime_ms: config.downtime_ms,
                    parallel: config.parallel,
                    sources: sources.clone(),
                    targets: targets.clone(),
                    my_source,
                    my_target,
                    tenants: tenants.clone(),
                    vms: vms.iter().filter(mine).cloned().collect(),
                    share: config
                        .budget_mbit
                        .filter(|_| my_source.is_some())
                        .map(|mbit| equal_share(mbit * 1_000_000, sources.len())),
                    timeouts: config.timeouts,
                };
                AgentPlan { name, addr, spec }
            })
            .collect();
        Self { config, method, recipe, token, agents, moved: vec![], security: Security::Plain }
    }

    /// Where agent number `i` is called.
    #[must_use]
    pub fn at(&self, i: usize) -> Endpoint {
        Endpoint { addr: self.agents[i].addr, security: self.security.clone() }
    }

    /// The agent of source host `name`.
    #[must_use]
    pub fn source_agent(&self, name: &str) -> Option<usize> {
        let addr = self.config.source.iter().find(|h| h.name == name)?.agent;
        self.agents.iter().position(|a| a.addr == addr)
    }

    /// The agent of target host `name`.
    #[must_use]
    pub fn target_agent(&self, name: &str) -> Option<usize> {
        let addr = self.config.target.iter().find(|h| h.name == name)?.agent;
        self.agents.iter().position(|a| a.addr == addr)
    }
}
