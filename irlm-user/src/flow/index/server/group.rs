//! A group of the index server: what it holds, and how a connection of it ends.

use crate::core::index::Index;
use crate::core::models::{Models, Sketches};
use crate::core::plan::Plan;
use crate::core::quota::Owner;
use crate::core::units::HostIx;
use crate::core::wire::index_msg::{ErrorCode, IndexMsg, Token};
use crate::flow::index::ConnError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

/// A group's index and how far it is.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) token: Token,
    /// Who opened it.
    pub(super) owner: Owner,
    pub(super) source_hosts: u16,
    pub(super) target_hosts: u16,
    pub(super) phase: Mutex<Phase>,
    /// Told when the plan is made, models are chosen, or the group closed.
    pub(super) turned: Condvar,
    pub(super) index: RwLock<Index>,
    /// Nothing once models are being chosen.
    pub(super) sketches: Mutex<Option<Sketches>>,
}

#[derive(Debug)]
pub(super) struct Phase {
    /// By source host: its own pages, once it has said that it is done.
    pub(super) done: Vec<Option<u64>>,
    pub(super) plan: Option<Arc<Plan>>,
    /// A thread is making the plan, without holding the lock: others' waits keep their deadlines.
    pub(super) planning: bool,
    /// By source host: how many contents it can borrow, once it has asked for models.
    pub(super) asked: Vec<Option<u32>>,
    pub(super) models: Option<Arc<Models>>,
    /// By source host: the agent that has its number, by certificate.
    pub(super) agents: Vec<Option<String>>,
    /// By source host: connections that stand. Nobody waits for a host that has none.
    pub(super) live: Vec<u32>,
    /// A thread is choosing models, likewise without the lock.
    pub(super) choosing: bool,
    pub(super) closed: bool,
    /// Connections of its coordinator that are open.
    pub(super) coordinators: u32,
    pub(super) last_word: Instant,
}

/// Ends a connection: with a word to the peer, or without.
pub(super) enum End {
    Say(ErrorCode, String),
    Conn(ConnError),
}

impl From<ConnError> for End {
    fn from(e: ConnError) -> Self {
        match e {
            ConnError::Wire(e) => Self::Say(ErrorCode::Protocol, e.to_string()),
            e => Self::Conn(e),
        }
    }
}

pub(super) fn say(code: ErrorCode, text: &str) -> End {
    End::Say(code, text.to_owned())
}

pub(super) fn out_of_place(msg: &IndexMsg) -> End {
    End::Say(ErrorCode::Protocol, format!("{} is out of place here", msg.name()))
}

pub(super) fn stopping() -> End {
    say(ErrorCode::Stopping, "the index is going down")
}

pub(super) fn closed() -> End {
    say(ErrorCode::Closed, "the group was closed or has expired")
}

impl Group {
    pub(super) fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether some source host has ever joined it.
    pub(super) fn is_joined(&self) -> bool {
        let phase = self.phase();
        phase.live.iter().any(|n| *n > 0) || phase.done.iter().any(Option::is_some)
    }

    pub(super) fn close(&self) {
        self.phase().closed = true;
        self.turned.notify_all();
    }

    pub(super) fn check_targets(&self, mut targets: impl Iterator<Item = HostIx>) -> Result<(), End> {
        match targets.find(|t| t.0 >= self.target_hosts) {
            None => Ok(()),
            Some(t) => {
                let text = format!("no target host {}: the group has {}", t.0, self.target_hosts);
                Err(End::Say(ErrorCode::Protocol, text))
            }
        }
    }

    /// A source host has registered all it will. Whether all have.
    pub(super) fn done(&self, host: HostIx, own_unique_pages: u64) -> bool {
        let mut phase = self.phase();
        if let Some(d) = phase.done.get_mut(usize::from(host.0)) {
            *d = Some(own_unique_pages);
        }
        phase.done.iter().all(Option::is_some)
    }
}

/// A source host's connection stands while this lives.
pub(super) struct Here<'a>(&'a Group, usize);

impl<'a> Here<'a> {
    pub(super) fn new(group: &'a Group, host: HostIx) -> Self {
        let at = usize::from(host.0);
        if let Some(n) = group.phase().live.get_mut(at) {
            *n += 1;
        }
        Self(group, at)
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        if let Some(n) = self.0.phase().live.get_mut(self.1) {
            *n = n.saturating_sub(1);
        }
        // Others may wait for this host's word.
        self.0.turned.notify_all();
    }
}
