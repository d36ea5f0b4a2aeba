//! Settings that could not be put back when their departure was over, because a migration of somebody else was
//! under way: its owner began it in the moment between. They are put back when it has ended. If it stands still
//! because of them it is let go on, as its owner meant it.
//!
//! A later departure of the same QEMU takes them over, so that it is never the one that is let go on, and puts
//! back what was there before both. What is pending is kept in a file as well: an agent that starts goes on with it.

use crate::flow::front::monitor;
use crate::flow::lock;
use crate::host::sched::Process;
use crate::net::qmp::settings::Settings;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// How long they are tried if nobody can say whether the QEMU still lives.
const BLIND: Duration = Duration::from_secs(3600);
/// The file in the agent's state directory; there only while something is pending.
const FILE: &str = "settings.pending";

/// Those that are tried, over all groups of this agent.
static PENDING: Mutex<Pendings> = Mutex::new(Pendings { list: Vec::new(), dir: None });

struct Pendings {
    list: Vec<Arc<Pending>>,
    /// Where they are written down, too.
    dir: Option<PathBuf>,
}

impl Pendings {
    /// Writes down what is left to do.
    fn keep(&self) -> io::Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let left = self.list.iter().filter(|p| !p.is_over());
        let left: Vec<Written> = left
            .map(|p| Written { path: p.path.clone(), process: p.process, found: p.found.clone() })
            .collect();
        let file = dir.join(FILE);
        if left.is_empty() {
            return match std::fs::remove_file(&file) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            };
        }
        let beside = dir.join(FILE).with_extension("tmp");
        let mut f = File::create(&beside)?;
        f.write_all(&serde_json::to_vec(&left)?)?;
        f.sync_all()?;
        std::fs::rename(&beside, &file)
    }

    fn keep_or_say(&self) {
        if let Err(e) = self.keep() {
            tracing::warn!("settings that are to be put back cannot be written down: {e}");
        }
    }
}

/// One of them, as it is written down.
#[derive(Serialize, Deserialize)]
struct Written {
    path: PathBuf,
    process: Option<Process>,
    found: Settings,
}

struct Pending {
    path: PathBuf,
    process: Option<Process>,
    timeout: Duration,
    found: Settings,
    /// Held over a try: whoever takes the settings over must not meet one that is under way.
    turn: Mutex<()>,
    /// They are put back, or somebody else's to put back.
    over: AtomicBool,
}

impl Pending {
    fn new(w: Written, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            path: w.path,
            process: w.process,
            timeout,
            found: w.found,
            turn: Mutex::default(),
            over: AtomicBool::new(false),
        })
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether it was still to do: from now on it is the caller's.
    fn take(&self) -> bool {
        let _turn = lock(&self.turn);
        !self.over.swap(true, Ordering::AcqRel)
    }

    /// One try; whether there is nothing left to do.
    fn attempt(&self) -> bool {
        let _turn = lock(&self.turn);
        if self.is_over() || self.process.is_some_and(Process::is_gone) {
            return true;
        }
        // A connection a try: a monitor serves one client, and a further departure may want it.
        let Ok(mut qmp) = monitor(&self.path, self.timeout, self.process) else { return false };
        let done = qmp.put_back_after(&self.found).is_ok();
        self.over.store(done, Ordering::Release);
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

/// Where what is pending is written down from now on; what an agent before this one has written there is gone on
/// with.
pub(crate) fn keep_in(dir: &Path, timeout: Duration) {
    lock(&PENDING).dir = Some(dir.to_owned());
    let text = match std::fs::read(dir.join(FILE)) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return tracing::warn!("{}: {e}", dir.join(FILE).display()),
    };
    match serde_json::from_slice::<Vec<Written>>(&text) {
        // All are known before any is written down anew: none is lost if this agent dies here.
        Ok(all) => {
            let all: Vec<_> = all.into_iter().map(|w| Pending::new(w, timeout)).collect();
            lock(&PENDING).list.extend(all.iter().cloned());
            all.into_iter().for_each(attend);
        }
        Err(e) => tracing::warn!("{}: {e}", dir.join(FILE).display()),
    }
}

/// Puts these back as soon as that can be done.
pub(crate) fn later(path: &Path, timeout: Duration, process: Option<Process>, found: Settings) {
    let pending = Pending::new(Written { path: path.to_owned(), process, found }, timeout);
    {
        let mut all = lock(&PENDING);
        all.list.push(pending.clone());
        all.keep_or_say();
    }
    attend(pending);
}

/// Tries until it is done, on a thread of its own.
fn attend(pending: Arc<Pending>) {
    let path = pending.path.clone();
    let tried = std::thread::Builder::new().name("irlm-restore".into()).spawn(move || {
        pending.run();
        let mut all = lock(&PENDING);
        all.list.retain(|p| !Arc::ptr_eq(p, &pending));
        all.keep_or_say();
    });
    if let Err(e) = tried {
        tracing::warn!("QMP {}: its migration settings are not put back: {e}", path.display());
    }
}

/// Takes over what is to be put back at this QEMU, if anything is: from now on it is the caller's.
pub(crate) fn take(path: &Path, process: Option<Process>) -> Option<Settings> {
    let same = |p: &Arc<Pending>| p.path == path && p.process == process;
    // No lock is held over a try but its own.
    let pending: Vec<_> = lock(&PENDING).list.iter().filter(|p| same(p)).cloned().collect();
    let taken = pending.iter().filter(|p| p.take()).map(|p| p.found.clone());
    // The first is how it was before all.
    taken.reduce(|first, mut later| {
        later.after(first);
        later
    })
}
