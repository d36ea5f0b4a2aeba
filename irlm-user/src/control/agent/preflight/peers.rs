//! What other agents take this one for. A handshake alone does not tell: in TLS 1.3 the caller's is over before its
//! certificate was looked at, and its role is looked at later still.

use super::super::Shared;
use crate::control::api::{GroupSpec, Reply, Request, VmSpec};
use crate::control::client::{AgentClient, CallError};
use crate::net::connection::Endpoint;
use std::io::ErrorKind;
use std::net::SocketAddr;

/// An agent that this one will call.
#[derive(Debug)]
pub(super) struct Peer<'a> {
    host: &'a str,
    agent: SocketAddr,
    /// As whose agent this one calls it.
    caller: &'a str,
}

/// The agents of target hosts that this one will call for the group.
pub(super) fn called(spec: &GroupSpec) -> Vec<Peer<'_>> {
    let source = spec.my_source.and_then(|me| spec.sources.get(usize::from(me))).map(|s| &*s.name);
    let target = spec.my_target.and_then(|me| spec.targets.get(usize::from(me))).map(|t| &*t.name);
    let Some(caller) = source.or(target) else { return Vec::new() };
    let is_called = |ix: usize| {
        let mine = |v: &VmSpec| usize::from(v.target) == ix && Some(v.source) == spec.my_source;
        let me = spec.my_target.is_some_and(|m| usize::from(m) == ix);
        !me && (spec.recipe.rack().is_some() || spec.vms.iter().any(mine))
    };
    let targets = spec.targets.iter().enumerate().filter(|(ix, _)| is_called(*ix));
    targets.map(|(_, t)| Peer { host: &t.name, agent: t.agent, caller }).collect()
}

impl Shared {
    /// Why another agent will not take this one for what it is in the group. One that is not reached here may be reached where
    /// it has to be, so that says nothing.
    pub(super) fn disbelieved_by(&self, peer: &Peer<'_>) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
        let at = Endpoint { addr: peer.agent, security: self.security.clone() };
        let mut client = AgentClient::new(at, self.timeouts.peer);
        let (host, name) = (peer.host, peer.caller);
        let answer = runtime.block_on(client.call(&Request::Hello));
        match answer {
            Ok(Reply::Hello { you: Some(hosts), .. }) if hosts.iter().all(|h| h != name) => {
                let is = if hosts.is_empty() { "that of no host".into() } else { hosts.join(", ") };
                Some(format!(
                    "host {host} takes the agent of {name} for {is}: look at [roles] in the agent.toml of {host}, and at the \
                     certificate of {name}"
                ))
            }
            Err(CallError::Refused { refusal, .. }) => {
                Some(format!("host {host} does not let the agent of {name} in: {refusal}"))
            }
            Err(CallError::Unreachable { source, .. }) if source.kind() == ErrorKind::InvalidData => {
                Some(format!("host {host} does not let the agent of {name} in: {source}"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{Signals, port, tests::agent};
    use super::*;
    use crate::core::identity::Role;
    use crate::net::connection::Security;
    use crate::net::connection::tests::credentials_of;
    use crate::net::gate::Sizes;
    use crate::net::tls::Credentials;
    use std::sync::Arc;

    fn with(dir: &std::path::Path, keys: &Credentials, roles: &str) -> Arc<Shared> {
        let mut agent = agent(dir);
        let own = Arc::get_mut(&mut agent).unwrap();
        (own.security, own.keys) = (Security::Tls(Arc::new(keys.clone())), Some(keys.clone()));
        own.config.roles = toml::from_str(roles).unwrap();
        agent
    }

    /// The control port of an agent of t1, until the tests end.
    fn serves(agent: Arc<Shared>) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                port::serve(agent, listener, Sizes::default(), Signals::new().unwrap()).await.unwrap();
            });
        });
        addr
    }

    #[test]
    fn an_agent_hears_before_a_move_what_another_takes_it_for() {
        let dir = tempfile::tempdir().unwrap();
        let keys = credentials_of(&[Role::Agent("s1".into()), Role::Agent("t1".into())]);
        let caller = with(&dir.path().join("s1"), &keys[0], "");
        let says = |agent, as_host| caller.disbelieved_by(&Peer { host: "t1", agent, caller: as_host });
        let believes = serves(with(&dir.path().join("t1"), &keys[1], ""));
        assert_eq!(says(believes, "s1"), None);
        let other = says(believes, "s9").unwrap();
        assert!(other.contains("host t1 takes the agent of s9 for s1: look at [roles]"), "{other}");
        // Its URIs count for nothing there, and nothing else stands for it.
        let strict = serves(with(&dir.path().join("t2"), &keys[1], "uris = false"));
        let none = says(strict, "s1").unwrap();
        assert!(
            none.contains("host t1 does not let the agent of s1 in: ") && none.contains("role"),
            "{none}"
        );
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_eq!(says(nobody, "s1"), None, "who is not reached is no matter here");
    }
}
