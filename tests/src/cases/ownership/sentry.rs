//! Looks at all copies of all VMs all the time, by monitors of its own: rule 1 is never broken while it watches, and how each
//! copy's state changed can be told afterwards.

use irlm_tests::qmp::Qmp;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often every copy is looked at.
const EVERY: Duration = Duration::from_millis(10);

struct Copy {
    vm: String,
    place: String,
    path: PathBuf,
    eye: Option<Qmp>,
    state: String,
}

#[derive(Default)]
struct Seen {
    copies: Vec<Copy>,
    lines: Vec<String>,
    two: Option<String>,
}

/// The watch; it ends when this is dropped.
pub(super) struct Sentry {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Sentry {
    pub(super) fn start() -> Self {
        let (seen, over) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let (theirs, stop) = (Arc::clone(&seen), Arc::clone(&over));
        let worker = std::thread::spawn(move || {
            let began = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                lock(&theirs).look(began);
                std::thread::sleep(EVERY);
            }
        });
        Self { seen, over, worker: Some(worker) }
    }

    /// From now on this copy is one of those of which only one may run.
    pub(super) fn watch(&self, vm: &str, place: &str, path: PathBuf) {
        let state = "not seen".into();
        let copy = Copy { vm: vm.into(), place: place.into(), path, eye: None, state };
        lock(&self.seen).copies.push(copy);
    }

    /// The line for two running copies, if there ever were.
    pub(super) fn two(&self) -> Option<String> {
        lock(&self.seen).two.clone()
    }

    /// Whether this copy was ever seen in this state.
    pub(super) fn saw(&self, vm: &str, place: &str, state: &str) -> bool {
        let line = format!(" {vm} at {place}: {state}");
        lock(&self.seen).lines.iter().any(|l| l.ends_with(&line))
    }

    /// How the states changed.
    pub(super) fn lines(&self) -> Vec<String> {
        lock(&self.seen).lines.clone()
    }
}

impl Drop for Sentry {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(w) = self.worker.take() {
            let _ = w.join();
        }
    }
}

impl Seen {
    fn look(&mut self, began: Instant) {
        for c in &mut self.copies {
            let now = c.ask();
            if now != c.state {
                self.lines.push(format!(
                    "{:6} ms {} at {}: {now}",
                    began.elapsed().as_millis(),
                    c.vm,
                    c.place
                ));
                c.state = now;
            }
        }
        let mut running: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, c) in self.copies.iter().enumerate().filter(|(_, c)| c.state == "running") {
            running.entry(&c.vm).or_default().push(i);
        }
        let suspects: Vec<Vec<usize>> = running.into_values().filter(|r| r.len() > 1).collect();
        for several in suspects {
            // Between the questions it may have moved: two copies ran only if the first still does.
            let still = several.iter().all(|i| self.copies[*i].ask() == "running");
            if still && self.two.is_none() {
                let places: Vec<&str> = several.iter().map(|i| &*self.copies[*i].place).collect();
                let vm = &self.copies[several[0]].vm;
                let ms = began.elapsed().as_millis();
                self.two = Some(format!("{vm}: TWO copies run after {ms} ms, at {}", places.join(" and ")));
            }
        }
    }
}

impl Copy {
    fn ask(&mut self) -> String {
        if self.eye.is_none() {
            self.eye = Qmp::connect(&self.path, Duration::ZERO).ok();
        }
        match self.eye.as_mut().map(Qmp::status) {
            Some(Ok(state)) => state,
            Some(Err(_)) | None => {
                self.eye = None;
                "ended".into()
            }
        }
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}
