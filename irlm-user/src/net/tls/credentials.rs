//! The handle that a program keeps: looks whether its files were replaced, and swaps the configurations. Connections
//! that stand go on with what they were made with.

use super::files::{CRL, Stamp, TlsError};
use super::set::{Expiry, Set, Use};
use super::words::day;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{ClientConfig, ServerConfig};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// The files are looked at no more often.
const LOOK: Duration = Duration::from_secs(1);
/// A bad new set that has not changed is tried again so often: its time may come.
const RETRY: Duration = Duration::from_secs(60);
const DAY: i64 = 86_400;

/// The certificates of one directory. Cloning is cheap, and all clones are one.
#[derive(Clone, Debug)]
pub struct Credentials(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    wants: Use,
    /// In use, with the number of the look that found it.
    current: RwLock<(u64, Arc<Set>)>,
    looks: AtomicU64,
    began: Instant,
    /// Milliseconds after `began` when the files may be looked at again.
    due_ms: AtomicU64,
    state: Mutex<State>,
}

/// No file is touched while it is locked.
#[derive(Debug)]
struct State {
    /// Of the set in use.
    stamp: Stamp,
    bad: Option<Bad>,
    /// What was last said of a certificate's expiry, by fingerprint; those in use only.
    warned: HashMap<String, i64>,
}

/// A new set that cannot be used.
#[derive(Debug)]
struct Bad {
    stamp: Stamp,
    at: Instant,
    what: String,
    /// It was looked at twice: nobody is in the middle of replacing files.
    said: bool,
}

impl Credentials {
    /// Reads and checks a directory.
    ///
    /// # Errors
    /// The first file that is missing, damaged, readable by others, expired, or does not fit the others.
    pub fn open(dir: &Path, wants: Use) -> Result<Self, TlsError> {
        Self::open_at(dir, wants, UnixTime::now())
    }

    /// As [`Self::open`], with this host's own certificates checked as of `now`.
    pub(super) fn open_at(dir: &Path, wants: Use, now: UnixTime) -> Result<Self, TlsError> {
        let stamp = Stamp::of(dir);
        let set = Set::load(dir, wants, now)?;
        set.remarks.iter().for_each(|r| warn!("{r}"));
        let this = Self(Arc::new(Inner {
            dir: dir.to_owned(),
            wants,
            current: RwLock::new((0, Arc::new(set))),
            looks: AtomicU64::new(0),
            began: Instant::now(),
            due_ms: AtomicU64::new(LOOK.as_millis() as u64),
            state: Mutex::new(State { stamp, bad: None, warned: HashMap::new() }),
        }));
        this.warn_of_expiry(now.as_secs().cast_signed());
        Ok(this)
    }

    /// For connections that are taken.
    ///
    /// # Errors
    /// If the directory was opened for clients only.
    pub fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        self.look();
        self.set().server.clone().ok_or_else(|| TlsError::new(&self.0.dir, "was opened for a client only"))
    }

    /// For connections that are made.
    ///
    /// # Errors
    /// If the directory was opened for servers only.
    pub fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        self.look();
        self.set().client.clone().ok_or_else(|| TlsError::new(&self.0.dir, "was opened for a server only"))
    }

    /// The certificate with which this program calls others; `None`: it was opened for a server only.
    #[must_use]
    pub fn client_leaf(&self) -> Option<CertificateDer<'static>> {
        self.set().client_leaf.clone()
    }

    /// Until when each certificate in use is valid.
    #[must_use]
    pub fn expiry(&self) -> Vec<Expiry> {
        self.set().expiry.clone()
    }

    /// Why what is in the directory now is not in use; for status.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.state(|s| s.bad.as_ref().filter(|b| b.said).map(|b| b.what.clone()))
    }

    /// Looks whether files were replaced and whether something expires, at most once a second. A daemon's timer calls
    /// it, so that what expires is said also where nobody connects.
    pub fn look(&self) {
        let now = self.0.began.elapsed().as_millis() as u64;
        let due = self.0.due_ms.load(Ordering::Relaxed);
        let next = now + LOOK.as_millis() as u64;
        let mine = || self.0.due_ms.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if now >= due && mine() {
            self.look_now(UnixTime::now(), false);
        }
    }

    /// Reads the directory again whatever its files' times are: somebody asked for it.
    ///
    /// # Errors
    /// If what is there cannot be used. What was in use stays.
    pub fn reload(&self) -> Result<(), TlsError> {
        match self.look_now(UnixTime::now(), true) {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    /// What is wrong with the files, if they were read.
    pub(super) fn look_now(&self, now: UnixTime, asked: bool) -> Option<TlsError> {
        let number = self.0.looks.fetch_add(1, Ordering::Relaxed) + 1;
        let seconds = now.as_secs().cast_signed();
        let stamp = Stamp::of(&self.0.dir);
        let clock = self.set().redo_at.is_some_and(|at| seconds >= at);
        let wanted = self.state(|s| {
            let known_bad =
                s.bad.as_ref().is_some_and(|b| b.stamp == stamp && b.said && b.at.elapsed() < RETRY);
            if s.stamp == stamp && !clock {
                s.bad = None;
                return asked;
            }
            asked || !known_bad
        });
        let error = if wanted {
            match Set::load(&self.0.dir, self.0.wants, now).and_then(|set| self.still_revokes(set)) {
                Ok(set) => {
                    self.swap(number, set, stamp);
                    None
                }
                Err(e) => {
                    self.keep(&e, stamp, asked);
                    Some(e)
                }
            }
        } else {
            None
        };
        self.warn_of_expiry(seconds);
        error
    }

    /// The set, unless its revocation lists are gone: nobody is to be let in again by a file that was lost.
    fn still_revokes(&self, set: Set) -> Result<Set, TlsError> {
        if set.lists == 0 && self.set().lists > 0 {
            let what = "was there and is gone: put it back, or restart this program to do without it";
            return Err(TlsError::new(self.0.dir.join(CRL), what));
        }
        Ok(set)
    }

    fn swap(&self, number: u64, set: Set, stamp: Stamp) {
        let set = Arc::new(set);
        let before = {
            let mut current = self.0.current.write().unwrap_or_else(PoisonError::into_inner);
            // Somebody who looked later has been faster.
            if current.0 > number {
                return;
            }
            std::mem::replace(&mut *current, (number, Arc::clone(&set))).1
        };
        self.state(|s| {
            s.stamp = stamp;
            s.bad = None;
        });
        if before.expiry != set.expiry {
            info!("{}: new certificates are in use; connections that stand go on", self.0.dir.display());
        }
        if set.lists < before.lists {
            let (file, new, old) = (self.0.dir.join(CRL), set.lists, before.lists);
            warn!("{}: {old} revocation lists were in use, and {new} are now", file.display());
        }
        set.remarks.iter().filter(|r| !before.remarks.contains(r)).for_each(|r| warn!("{r}"));
    }

    fn keep(&self, e: &TlsError, stamp: Stamp, asked: bool) {
        let what = e.to_string();
        let say = self.state(|s| {
            let again = s.bad.as_ref().filter(|b| b.stamp == stamp);
            let said_before = again.is_some_and(|b| b.said && b.what == what);
            let said = asked || again.is_some();
            s.bad = Some(Bad { stamp, at: Instant::now(), what: what.clone(), said });
            said && !said_before
        });
        if say {
            warn!("the new certificates are not used, and the old ones stay in use: {what}");
        }
    }

    /// Says 30 days before, a week before, and then every day, that a certificate expires or has expired.
    fn warn_of_expiry(&self, now: i64) {
        self.due_lines(now).iter().for_each(|l| warn!("{l}"));
    }

    /// What is to be said of expiry now, and has not been.
    pub(super) fn due_lines(&self, now: i64) -> Vec<String> {
        let all = self.expiry();
        self.state(|s| {
            s.warned.retain(|print, _| all.iter().any(|e| e.fingerprint == *print));
            let mut lines = Vec::new();
            for e in &all {
                let Some(level) = warning_level(e.not_after - now) else { continue };
                if s.warned.insert(e.fingerprint.clone(), level) != Some(level) {
                    lines.push(expiry_line(&self.0.dir, e, now));
                }
            }
            lines
        })
    }

    fn set(&self) -> Arc<Set> {
        Arc::clone(&self.0.current.read().unwrap_or_else(PoisonError::into_inner).1)
    }

    fn state<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Which warning is due with so many seconds left: another number is another warning.
pub(super) fn warning_level(left: i64) -> Option<i64> {
    match left {
        ..0 => Some(left.div_euclid(DAY)),
        0..=604_800 => Some(left / DAY),
        604_801..=2_592_000 => Some(30),
        _ => None,
    }
}

fn expiry_line(dir: &Path, e: &Expiry, now: i64) -> String {
    let file = dir.join(&e.file);
    let (file, who, when) = (file.display(), &e.subject, day(e.not_after));
    let left = e.not_after - now;
    if left < 0 {
        return format!(
            "{file}: the certificate {who:?} HAS EXPIRED on {when} and counts for nothing: replace it; no restart is needed"
        );
    }
    let (n, unit) = if left < DAY { (left / 3600, "hours") } else { (left / DAY, "days") };
    format!(
        "{file}: the certificate {who:?} expires on {when}, in {n} {unit}: replace it; no restart is needed"
    )
}
