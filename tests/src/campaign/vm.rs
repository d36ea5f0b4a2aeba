//! One VM of a run: its copies, the threads that look at each of them all the time, and what its owner wants.

use super::copy::{Copy, Eye, Guest, Place};
use super::history::{GONE, History, Seen};
use super::schedule::Schedule;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at a copy.
const LOOK: Duration = Duration::from_millis(6);

/// What is known and wanted of a VM, by all threads.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) history: History,
    /// Its owner has stopped it, and not let it run again.
    pub(super) paused: bool,
    /// He wants it to run again, and could not have it so while it moved.
    pub(super) back: bool,
    /// Why nothing more can be asked of it than that never two copies run: the schedule killed what it ran in.
    pub(super) excused: Option<String>,
    /// What somebody did to the owner's own things.
    pub(super) theirs: Option<String>,
}

/// One VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) guest: Guest,
    /// Number of its source host, and of its target host.
    pub(super) host: usize,
    /// The first is the source.
    pub(super) copies: Vec<Copy>,
    pub(super) known: Arc<Mutex<Known>>,
    /// QEMU's settings as they were found.
    pub(super) settings: Value,
    /// When the schedule killed a copy first.
    pub(super) killed_at: Option<Duration>,
    eyes: Vec<JoinHandle<()>>,
    closed: Arc<AtomicBool>,
    epoch: Instant,
}

/// Where a VM is, by what was last seen of its copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// Exactly this copy runs.
    Runs(usize),
    /// This copy stands still, and no other is its owner's.
    Stands(usize),
    /// Two run, or none that anybody could name.
    Unclear,
    /// No copy is left that can run.
    Nowhere,
}

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a thread that panicked left half-written is at worst a look that is missing.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Of the last states of a VM's copies: where it is.
pub(super) fn whereabouts(last: &[&str]) -> Whereabouts {
    let running: Vec<usize> = (0..last.len()).filter(|&n| last[n] == "running").collect();
    match running[..] {
        [one] => return Whereabouts::Runs(one),
        [] => {}
        _ => return Whereabouts::Unclear,
    }
    // States in which a copy could go on. A target that waits for its state could not.
    let stands = |s: &&str| matches!(*s, "paused" | "prelaunch" | "postmigrate" | "finish-migrate");
    let all: Vec<usize> = (0..last.len()).filter(|&n| stands(&last[n])).collect();
    match all[..] {
        [] => Whereabouts::Nowhere,
        [one] => Whereabouts::Stands(one),
        // The newest that was not moved away, if it is the only one.
        _ => match all.iter().filter(|&&n| last[n] == "paused").collect::<Vec<_>>()[..] {
            [one] => Whereabouts::Stands(*one),
            _ => Whereabouts::Unclear,
        },
    }
}

impl Vm {
    /// Starts the source, filled, and runs it.
    pub(super) fn start(
        s: &Schedule,
        vm: usize,
        place: Place<'_>,
        epoch: Instant,
        paused: bool,
    ) -> Result<Self> {
        let mut this = Self {
            guest: Guest::new(s, vm),
            host: s.host_of(vm),
            copies: Vec::new(),
            known: Arc::default(),
            settings: Value::Null,
            killed_at: None,
            eyes: Vec::new(),
            closed: Arc::default(),
            epoch,
        };
        this.add(s, place)?;
        let source = &this.copies[0];
        source.owner().connect()?.cont().context("run the source")?;
        this.settings = source.settings()?;
        if paused {
            // Not before it has begun, or it could not be told from one that never did.
            let until = Instant::now() + Duration::from_secs(10);
            while source.count() == Some(0) && Instant::now() < until {
                std::thread::sleep(LOOK);
            }
            source.owner().connect()?.stop().context("pause the source")?;
            lock(&this.known).paused = true;
        }
        Ok(this)
    }

    /// Starts a further copy, and a thread that looks at it.
    pub(super) fn add(&mut self, s: &Schedule, place: Place<'_>) -> Result<()> {
        let number = self.copies.len();
        let what = match number {
            0 => "the source".to_owned(),
            1 => "the target".to_owned(),
            n => format!("target {n}"),
        };
        let started = Copy::start(s, &self.guest, place, number);
        let copy = started.with_context(|| format!("{what} of {}", self.guest.name))?;
        let eye = copy.eye()?;
        lock(&self.known).history.add(&format!("{what} of {}", self.guest.name));
        self.copies.push(copy);
        let (known, closed, epoch) = (Arc::clone(&self.known), Arc::clone(&self.closed), self.epoch);
        let look = move || watch(&eye, number, &known, &closed, epoch);
        self.eyes.push(std::thread::Builder::new().name("eye".into()).spawn(look)?);
        Ok(())
    }

    pub(super) fn name(&self) -> &str {
        &self.guest.name
    }

    pub(super) fn whereabouts(&self) -> Whereabouts {
        whereabouts(&lock(&self.known).history.last())
    }

    /// Waits a moment until it is seen there, after it was stopped for a look and let run again.
    pub(super) fn until_seen(&self, place: Whereabouts) {
        let until = Instant::now() + Duration::from_secs(3);
        while self.whereabouts() != place && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
    }

    /// What was last seen of its copies, for people.
    pub(super) fn last(&self) -> String {
        lock(&self.known).history.last().join(" / ")
    }

    pub(super) fn note(&self, what: String) {
        lock(&self.known).history.note(self.epoch.elapsed(), what);
    }

    pub(super) fn excused(&self) -> bool {
        lock(&self.known).excused.is_some()
    }

    /// The schedule kills a copy: notes what that excuses.
    pub(super) fn kill(&mut self, number: usize, postcopy: bool) {
        let Some(copy) = self.copies.get_mut(number) else { return };
        if !copy.alive() {
            return;
        }
        copy.proc.kill();
        self.killed_at.get_or_insert(self.epoch.elapsed());
        let mut known = lock(&self.known);
        let ran = known.history.ran(1);
        let source_runs = known.history.last().first() == Some(&"running");
        let why = match (number, ran) {
            (0, false) => Some("its source was killed before it ran anywhere else"),
            (0, true) => postcopy.then_some("its source was killed, and with it pages may have been"),
            (_, true) => Some("the copy that ran was killed"),
            // Given up or not, told to run or not: only its agents can know.
            (_, false) => (!source_runs).then_some("its target was killed while the source stood still"),
        };
        if let Some(why) = why {
            known.excused.get_or_insert_with(|| why.to_owned());
        }
    }

    /// Ends all copies and the threads that look at them.
    pub(super) fn end(&mut self) {
        self.closed.store(true, Ordering::Release);
        for c in &mut self.copies {
            let _ = c.proc.signal(rustix::process::Signal::CONT);
            c.proc.kill();
        }
        for eye in self.eyes.drain(..) {
            let _ = eye.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.end();
    }
}

/// Looks at a copy until it is gone or nobody wants to know any more.
fn watch(eye: &Eye, number: usize, known: &Mutex<Known>, closed: &AtomicBool, epoch: Instant) {
    let mut hand = None;
    while !closed.load(Ordering::Acquire) {
        let asked = epoch.elapsed();
        hand = hand.or_else(|| eye.open().ok());
        let state = hand.as_mut().map(super::copy::Hand::state);
        let count = eye.count();
        let answered = epoch.elapsed();
        match state {
            Some(Ok(state)) => {
                let seen = Seen { asked, answered, state, count };
                lock(known).history.see(number, &seen);
            }
            _ if closed.load(Ordering::Acquire) => return,
            _ if eye.gone() => {
                let seen = Seen { asked, answered, state: GONE.into(), count: None };
                return lock(known).history.see(number, &seen);
            }
            // Silent: it counts as what it was last seen as.
            _ => hand = None,
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Whereabouts::{Nowhere, Runs, Stands, Unclear};

    #[test]
    fn where_a_vm_is_follows_from_its_copies() {
        for (last, want) in [
            (vec!["running", "inmigrate"], Runs(0)),
            (vec!["running", "gone"], Runs(0)),
            (vec!["postmigrate", "running"], Runs(1)),
            (vec!["gone", "running"], Runs(1)),
            (vec!["running", "running"], Unclear),
            (vec!["paused", "inmigrate"], Stands(0)),
            (vec!["paused", "incoming"], Stands(0)),
            (vec!["postmigrate", "paused"], Stands(1)),
            (vec!["postmigrate", "gone"], Stands(0)),
            (vec!["paused", "paused"], Unclear),
            (vec!["gone", "gone"], Nowhere),
            (vec!["gone", "inmigrate"], Nowhere),
            (vec!["gone", "shutdown"], Nowhere),
            (vec!["running", "gone", "incoming"], Runs(0)),
            (vec!["postmigrate", "gone", "running"], Runs(2)),
        ] {
            assert_eq!(whereabouts(&last), want, "{last:?}");
        }
    }
}
