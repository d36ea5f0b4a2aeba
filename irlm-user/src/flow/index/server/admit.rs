//! Who may ask the index for what: by the certificate that a caller has shown. In plain text everybody may.
//!
//! A group is whoever's who opened it, and a number of a source host is whichever agent's that says it first. Later callers
//! must be the same, also after those have left: a group's secret alone lets nobody take another one's place.

use super::group::{End, Phase, say};
use crate::core::identity::{Ask, Identity, Mapping, NoIdentity, Role, Subject, identify, may};
use crate::core::origin::Origin;
use crate::core::quota::Owner;
use crate::core::units::HostIx;
use crate::core::wire::index_msg::{ErrorCode, IndexMsg};
use crate::net::connection::Connection;

/// Whoever is at the other end.
pub(super) struct Caller {
    who: Option<Identity>,
    /// As whom it is counted.
    pub(super) owner: Owner,
}

fn refused(why: impl std::fmt::Display) -> End {
    say(ErrorCode::Refused, &why.to_string())
}

impl Caller {
    /// By the certificate that this connection has shown.
    pub(super) fn of(stream: &Connection, from: Origin, roles: &Mapping) -> Result<Self, End> {
        if !stream.is_secured() {
            return Ok(Self { who: None, owner: Owner::From(from) });
        }
        let leaf = stream.peer_certificates().first().ok_or(NoIdentity::Absent);
        let who = leaf.and_then(|leaf| identify(leaf, roles)).map_err(refused)?;
        Ok(Self { owner: who.owner(), who: Some(who) })
    }

    /// Whether it may say this. What only an index says is out of place, and nobody's to allow.
    pub(super) fn may(&self, msg: &IndexMsg) -> Result<(), End> {
        match (&self.who, Ask::of_index(msg)) {
            (Some(who), Some(ask)) => may(who, ask, Subject::default()).map_err(refused),
            _ => Ok(()),
        }
    }

    /// Takes a source host's number for the agent that calls, unless another one has it.
    pub(super) fn claim(&self, phase: &mut Phase, host: HostIx) -> Result<(), End> {
        let agent = self.who.iter().flat_map(|who| &who.roles).find_map(|r| match r {
            Role::Agent(host) => Some(host),
            _ => None,
        });
        let (Some(agent), Some(of)) = (agent, phase.agents.get_mut(usize::from(host.0))) else {
            return Ok(());
        };
        match of {
            Some(other) if other != agent => {
                Err(refused(format_args!("source host {} of the group is {other}, and not {agent}", host.0)))
            }
            taken => {
                taken.get_or_insert_with(|| agent.clone());
                Ok(())
            }
        }
    }
}
