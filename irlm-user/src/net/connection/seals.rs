//! The seals of a connection in plain text: what must be known for them, and whose they are.

use crate::core::seal::{Opener, Sealer};
use crate::core::wire::keys;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

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

impl Seals {
    /// Hello was said, or heard.
    pub(super) fn said_hello(&self, secret: [u8; 32], hello: Vec<u8>, end: End) {
        *lock(&self.said) = Some(Said { secret, hello, end });
    }

    /// HelloOk has these bytes. Nothing, if Hello was not to be followed by seals.
    pub(super) fn make(&self, ok: &[u8]) -> Option<Opener> {
        let Said { secret, hello, end } = lock(&self.said).take()?;
        let (caller, taker) = keys::seals(&secret, &hello, ok);
        let (own, other) = if end == End::Caller { (caller, taker) } else { (taker, caller) };
        let made = Made { sealer: Mutex::new(Sealer::new(own)), opener: Opener::new(other) };
        self.made.set(made).ok()?;
        self.opener()
    }

    pub(super) fn are_made(&self) -> bool {
        self.made.get().is_some()
    }

    pub(super) fn sealer(&self) -> Option<MutexGuard<'_, Sealer>> {
        self.made.get().map(|m| lock(&m.sealer))
    }

    pub(super) fn opener(&self) -> Option<Opener> {
        self.made.get().map(|m| m.opener.clone())
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
