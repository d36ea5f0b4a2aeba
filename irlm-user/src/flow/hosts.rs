//! The hosts of a group by name: a connection is made in the name of one, and its agent's certificate must bear it.

use crate::core::wire::messages::Purpose;

/// The hosts of a group by their names there, which their agents' certificates must bear.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Hosts {
    /// Source hosts.
    pub sources: Vec<String>,
    /// Target hosts.
    pub targets: Vec<String>,
}

impl Hosts {
    /// In whose name a connection is made; none: the group has no such host.
    pub(super) fn caller(&self, purpose: &Purpose) -> Option<&str> {
        let (list, host) = match purpose {
            Purpose::Peer { target, .. } => (&self.targets, target),
            Purpose::Vm { source, .. }
            | Purpose::Direct { source, .. }
            | Purpose::Stream { source, .. }
            | Purpose::Demand { source, .. }
            | Purpose::Settle { source, .. }
            | Purpose::Push { source, .. }
            | Purpose::Lend { source, .. }
            | Purpose::Probe { source, .. } => (&self.sources, source),
        };
        list.get(usize::from(host.0)).map(String::as_str)
    }
}
