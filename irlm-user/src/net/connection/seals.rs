//! The seals of a connection in plain text: what must be known for them, and whose they are.

use super::{Connection, lock};
use crate::core::seal::{Opener, Sealer};
use crate::core::wire::keys;
use crate::core::wire::messages::Purpose;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Which end of a connection this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The one that called.
    Caller,
    /// The one that was called.
    Taker,
}

/// Hello has been said, and HelloOk has not.
struct Said {
    secret: [u8; 32],
    hello: Vec<u8>,
    end: End,
}

/// Since HelloOk.
#[derive(Debug)]
struct Made {
    sealer: Mutex<Sealer>,
    opener: Opener,
}

/// Of one connection.
#[derive(Default)]
pub(super) struct Seals {
    said: Mutex<Option<Said>>,
    made: OnceLock<Made>,
}

impl std::fmt::Debug for Seals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seals({:?})", self.made)
    }
}

impl Connection {
    /// Hello was said, or heard: once HelloOk is, frames are sealed by keys that hang on both and on the group's secret. Not
    /// under TLS, which sees to that, not where two QEMUs talk, which know nothing of seals, and not where frames mean nothing
    /// and only their speed counts.
    pub fn said_hello(&self, secret: [u8; 32], hello: Vec<u8>, purpose: &Purpose, end: End) {
        if !self.is_secured() && !matches!(purpose, Purpose::Stream { .. } | Purpose::Probe { .. }) {
            *lock(&self.0.seals.said) = Some(Said { secret, hello, end });
        }
    }

    /// HelloOk has these bytes: it and what follows is sealed, in both directions. What opens the other end's frames, if
    /// they are sealed.
    pub(in crate::net) fn seal_with(&self, ok: &[u8]) -> Option<Opener> {
        let Said { secret, hello, end } = lock(&self.0.seals.said).take()?;
        let (caller, taker) = keys::seals(&secret, &hello, ok);
        let (own, other) = if end == End::Caller { (caller, taker) } else { (taker, caller) };
        let made = Made { sealer: Mutex::new(Sealer::new(own)), opener: Opener::new(other) };
        self.0.seals.made.set(made).ok()?;
        self.opener()
    }

    /// Whether frames are sealed.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.0.seals.made.get().is_some()
    }

    /// Who seals what leaves, if it is sealed. Whoever has it sends, so that frames leave in the order of their numbers.
    pub(in crate::net) fn sealer(&self) -> Option<MutexGuard<'_, Sealer>> {
        self.0.seals.made.get().map(|m| lock(&m.sealer))
    }

    /// What opens the frames that come from the first one on, if they are sealed.
    pub(in crate::net) fn opener(&self) -> Option<Opener> {
        self.0.seals.made.get().map(|m| m.opener.clone())
    }
}
