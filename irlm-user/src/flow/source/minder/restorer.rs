//! Settings that could not be put back when their departure was over, because a migration of somebody else was under way:
//! its owner began it in the moment between. They are put back when it has ended. If it stands still because of them it is
//! let go on, as its owner meant it.
//!
//! A later departure of the same QEMU takes them over, so that it is never the one that is let go on, and puts back what
//! was there before both.

use crate::flow::front::monitor;
use crate::flow::lock;
use crate::host::sched::Process;
use crate::net::qmp::settings::Settings;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// How long they are tried if nobody can say whether the QEMU still lives.
const BLIND: Duration = Duration::from_secs(3600);

/// Those that are tried, over all groups of this agent.
static PENDING: Mutex<Vec<Arc<Pending>>> = Mutex::new(Vec::new());

struct Pending {
    path: PathBuf,
    process: Option<Process>,
    timeout: Duration,
    /// Nothing once they are put back, or somebody else's to put back.
    found: Mutex<Option<Settings>>,
}

impl Pending {
    /// One try; whether there is nothing left to do.
    fn attempt(&self) -> bool {
        let mut found = lock(&self.found);
        let Some(settings) = &*found else { return true };
        if self.process.is_some_and(Process::is_gone) {
            return true;
        }
        // A connection a try: a monitor serves one client, and a further departure may want it.
        let Ok(mut qmp) = monitor(&self.path, self.timeout, self.process) else { return false };
        let done = qmp.put_back_after(settings).is_ok();
        if done {
            *found = None;
        }
        done
    }

    fn run(&self) {
        let until = self.process.is_none().then(|| Instant::now() + BLIND);
        while !self.attempt() {
            if until.is_some_and(|u| Instant::now() > u) {
                let path = self.path.display();
                tracing::warn!("QMP {path}: its migration settings could not be put back");
                return;
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// Puts these back as soon as that can be done.
pub(super) fn later(path: &Path, timeout: Duration, process: Option<Process>, found: Settings) {
    let pending = Pending { path: path.to_owned(), process, timeout, found: Mutex::new(Some(found)) };
    let pending = Arc::new(pending);
    lock(&PENDING).push(pending.clone());
    let tried = std::thread::Builder::new().name("irlm-restore".into()).spawn(move || {
        pending.run();
        lock(&PENDING).retain(|p| !Arc::ptr_eq(p, &pending));
    });
    if let Err(e) = tried {
        tracing::warn!("QMP {}: its migration settings are not put back: {e}", path.display());
    }
}

/// Takes over what is to be put back at this QEMU, if anything is: from now on it is the caller's.
pub(super) fn take(path: &Path, process: Option<Process>) -> Option<Settings> {
    let same = |p: &Arc<Pending>| p.path == path && p.process == process;
    // No lock is held over a try but its own.
    let pending: Vec<_> = lock(&PENDING).iter().filter(|p| same(p)).cloned().collect();
    let mut taken: Option<Settings> = None;
    for settings in pending.iter().filter_map(|p| lock(&p.found).take()) {
        match &mut taken {
            // The first is how it was before all.
            Some(first) => {
                let mut later = settings;
                later.after(std::mem::take(first));
                *first = later;
            }
            None => taken = Some(settings),
        }
    }
    taken
}
