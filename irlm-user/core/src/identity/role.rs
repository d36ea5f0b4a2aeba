//! Roles, and who has them.

use crate::quota::Owner;
use std::fmt;

/// Longest name of a host, bytes; as in group.toml.
pub const MAX_HOST_NAME: usize = 64;
/// Longest name of a person or program, bytes.
pub const MAX_PERSON_NAME: usize = 64;
/// Longest trust-domain label, bytes; as in group.toml.
pub const MAX_TENANT_NAME: usize = 64;
/// Most trust domains that one certificate lists.
pub const MAX_TENANTS: usize = 32;

/// Trust domains that a coordinator may move.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tenants {
    /// Whichever there are.
    All,
    /// These labels; `""` is the label of VMs that have none. At most [`MAX_TENANTS`].
    Listed(Vec<String>),
}

impl Tenants {
    /// Whether this label is among them.
    #[must_use]
    pub fn has(&self, tenant: &str) -> bool {
        match self {
            Self::All => true,
            Self::Listed(list) => list.iter().any(|t| t == tenant),
        }
    }
}

/// What somebody may act as.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Role {
    /// May ask for everything that people and programs ask for.
    Operator,
    /// May move VMs of these trust domains.
    Coordinator(Tenants),
    /// May look.
    Viewer,
    /// The agent of this host (its name in group.toml).
    Agent(String),
    /// A rack's index server: answers, and asks for nothing.
    Index,
}

impl Role {
    /// Its name in URIs, logs and configuration.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Coordinator(_) => "coordinator",
            Self::Viewer => "viewer",
            Self::Agent(_) => "agent",
            Self::Index => "index",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Coordinator(Tenants::All) => f.write_str("coordinator of all tenants"),
            Self::Coordinator(Tenants::Listed(list)) => {
                let list: Vec<String> = list.iter().map(|t| format!("{t:?}")).collect();
                write!(f, "coordinator of {}", list.join(", "))
            }
            Self::Agent(host) => write!(f, "agent of {host}"),
            role => f.write_str(role.name()),
        }
    }
}

/// Who a peer is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// For logs: the name in its first URI, else its certificate's subject.
    pub name: String,
    /// What it may act as; never empty. One certificate may serve a host's agent and its rack's index.
    pub roles: Vec<Role>,
}

impl Identity {
    /// Whether it is the agent of this host.
    #[must_use]
    pub fn is_agent(&self, host: &str) -> bool {
        self.roles.iter().any(|r| matches!(r, Role::Agent(h) if h == host))
    }

    /// As whom it is counted where a caller's part is bounded.
    #[must_use]
    pub fn owner(&self) -> Owner {
        let name = self.name.clone();
        if self.roles.contains(&Role::Operator) { Owner::Operator(name) } else { Owner::Named(name) }
    }

    /// Whether it is an index server.
    #[must_use]
    pub fn is_index(&self) -> bool {
        self.roles.contains(&Role::Index)
    }

    /// Whether it may see what concerns these trust domains: for answers that hold more than one group's.
    #[must_use]
    pub fn may_see<'a>(&self, mut tenants: impl Iterator<Item = &'a str> + Clone) -> bool {
        self.roles.iter().any(|r| match r {
            Role::Operator | Role::Viewer => true,
            Role::Coordinator(mine) => tenants.clone().next().is_some() && tenants.all(|t| mine.has(t)),
            Role::Agent(_) | Role::Index => false,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles: Vec<String> = self.roles.iter().map(ToString::to_string).collect();
        write!(f, "{} ({})", self.name, roles.join(", "))
    }
}

/// Whether `name` can name a host: as in group.toml.
pub(super) fn valid_host(name: &str) -> bool {
    (1..=MAX_HOST_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b))
}

/// Whether `name` can name a person or a program.
pub(super) fn valid_person(name: &str) -> bool {
    (1..=MAX_PERSON_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@".contains(&b))
}
