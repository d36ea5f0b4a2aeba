//! The monitor of a departing VM's QEMU. While it migrates a thread has it (the *minder*): while QEMU's
//! migration thread writes its last pages it holds QEMU's big lock, so a QMP command sent by the thread that
//! reads the stream could wait for itself. A monitor serves one client, so whatever is asked meanwhile is
//! asked through that thread; before, after, and in a recovery a connection is made for each question.
//!
//! Everything that is changed there is written down as it was found before it is changed, and put back at the
//! end.

use super::{Input, Says, SourceNote, SourceVmShared};
use crate::core::handover::{GuestState, Standing, Took};
use crate::flow::error::unless_refused;
use crate::flow::front::{monitor, process_of, qemu, restorer, source_refusals};
use crate::flow::source::runner::{Before, Note};
use crate::flow::{After, MoveError, lock};
use crate::host::sched::Process;
use crate::net::qmp::settings::Settings;
use crate::net::qmp::{Event, MigrateStatus, Qmp, QmpError};
use serde_json::{Map, Value, json};
use stand::{Job, standing, take_back};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tuner::Tuner;

// How QEMU stands, and taking its VM back.
mod stand;
// The downtime limit.
mod tuner;

/// Who takes QEMU's stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Into {
    /// This agent.
    Agent,
    /// The target's QEMU.
    Qemu,
}

/// Capabilities that must be off, because their streams cannot be rewritten or gain nothing through IRLM.
const OFF: &[&str] = &[
    "xbzrle",
    "compress",
    "multifd",
    "postcopy-ram",
    "x-ignore-shared",
    "mapped-ram",
    "background-snapshot",
    "x-colo",
    "block",
    "dirty-bitmaps",
    "rdma-pin-all",
    "zero-copy-send",
];

/// Parameters that are set.
const PARAMETERS: [&str; 2] = ["max-bandwidth", "downtime-limit"];

/// How often a QEMU that streams by itself is asked how far it is.
const ASK: Duration = Duration::from_millis(200);
/// How long QEMU may wait for leave to hand its VM over before its monitor is listened to again.
const LEAVE: Duration = Duration::from_secs(30);
/// How long an exit that closed the monitor may take.
const EXIT: Duration = Duration::from_secs(3);
/// How long a failed migration may take to let its VM go before that is told all the same.
const LET_GO: Duration = Duration::from_secs(10);
/// How long the minder's thread may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// For how long a departure itself tries to put settings back.
const RESTORE: Duration = Duration::from_secs(1);

/// Unlimited, for QEMU: its default of 128 MiB/s would be the bottleneck; the wire paces the stream.
const MAX_BANDWIDTH: u64 = 1 << 44;

/// What this departure has to do with its QEMU, for its own thread and the minder's.
#[derive(Debug)]
struct Ours {
    /// A migration was begun here, or by an agent before this one.
    begun: AtomicBool,
    /// It was heard to fail: what is under way since is somebody else's.
    failed: AtomicBool,
    /// It has been seen to be over, and its VM to be back.
    over: AtomicBool,
    /// It is an earlier agent's, and where its stream went has not been looked at yet.
    inherited: AtomicBool,
    /// Its stream went to an agent that has died: it cannot be under way any more.
    cut: AtomicBool,
    /// [`GuestState::code`]: what the owner has made of the VM.
    guest: AtomicU8,
    /// The settings are being put back: nothing is set any more.
    quiet: AtomicBool,
}

impl Ours {
    /// The same, of an earlier agent's too. Only one that goes to another QEMU waits before it hands over.
    fn job_at(&self, qmp: &mut Qmp) -> Result<Job, QmpError> {
        if self.inherited.load(Ordering::Relaxed) {
            let waits = qmp.capabilities()?.get("pause-before-switchover") == Some(&true);
            self.cut.store(!waits, Ordering::Relaxed);
            self.inherited.store(false, Ordering::Relaxed);
        }
        Ok(self.job())
    }
    fn stands(&self, qmp: &mut Qmp) -> Result<Standing, MoveError> {
        let job = self.job_at(qmp)?;
        standing(qmp, job, self.guest())
    }
    fn job(&self) -> Job {
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        match (is(&self.begun) && !is(&self.over), is(&self.failed), is(&self.cut)) {
            (false, _, _) => Job::None,
            (true, true, _) => Job::Failed,
            (true, false, true) => Job::Cut,
            (true, false, false) => Job::UnderWay,
        }
    }
    fn guest(&self) -> GuestState {
        GuestState::from_code(self.guest.load(Ordering::Relaxed)).unwrap_or_default()
    }
    fn set_guest(&self, guest: GuestState) {
        self.guest.store(guest.code(), Ordering::Relaxed);
    }
}

/// The monitor of a departing VM's QEMU.
pub(super) struct Monitor {
    path: PathBuf,
    timeout: Duration,
    shared: Arc<SourceVmShared>,
    process: Option<Process>,
    ours: Arc<Ours>,
    found: Option<Settings>,
    minder: Option<Minder>,
}

impl Monitor {
    /// `before`: what the journal knows of a departure that an agent before this one began.
    pub(super) fn new(path: &Path, timeout: Duration, shared: &Arc<SourceVmShared>, before: Before) -> Self {
        let ours = Ours {
            begun: AtomicBool::new(before.begun),
            failed: AtomicBool::new(false),
            over: AtomicBool::new(false),
            inherited: AtomicBool::new(before.begun),
            cut: AtomicBool::new(false),
            guest: AtomicU8::new(before.guest.code()),
            quiet: AtomicBool::new(false),
        };
        Self {
            path: path.to_owned(),
            timeout,
            shared: shared.clone(),
            process: before.process,
            ours: Arc::new(ours),
            found: before.settings,
            minder: None,
        }
    }

    /// Whether its VM may be migrated now.
    pub(super) fn may_leave(&self) -> Result<(), MoveError> {
        let mut qmp = Qmp::connect(&self.path, self.timeout)?;
        unless_refused(&source_refusals(&qemu::facts(&mut qmp)?))
    }

    /// Sets QEMU up for a migration by IRLM, if it may be migrated at all.
    pub(super) fn set_up(
        &mut self,
        downtime_ms: u64,
        into: Into,
        note: &mut Note<'_>,
    ) -> Result<Qmp, MoveError> {
        let mut qmp = Qmp::connect(&self.path, self.timeout)?;
        let facts = qemu::facts(&mut qmp)?;
        let refusals = source_refusals(&facts);
        let Some(guest) = facts.guest().filter(|_| refusals.is_empty()) else {
            return Err(MoveError::Refused(refusals.join("; ")));
        };
        self.process = process_of(&qmp);
        if let Some(p) = self.process {
            note(SourceNote::Process(p))?;
        }
        note(SourceNote::Guest(guest))?;
        self.ours.set_guest(guest);
        self.shared.inbox.post(Input::Qemu(Says::Guest(guest)));
        let mut caps: Vec<(&str, bool)> = OFF.iter().map(|c| (*c, false)).collect();
        // An agent in the path holds SHUT back instead.
        caps.extend([
            ("return-path", true),
            ("events", true),
            ("pause-before-switchover", into == Into::Qemu),
        ]);
        let mut found = qmp.found(&caps, &PARAMETERS)?;
        if let Some(before) = restorer::take(&self.path, self.process) {
            found.after(before);
        }
        note(SourceNote::Settings(found.clone()))?;
        self.found = Some(found);
        qmp.set_capabilities(&caps)?;
        let mut p = Map::new();
        p.insert("max-bandwidth".into(), json!(MAX_BANDWIDTH));
        p.insert("downtime-limit".into(), json!(downtime_ms));
        qmp.set_parameters(p)?;
        Ok(qmp)
    }

    /// When its QEMU was started, in seconds of Unix time; 0: not known.
    pub(super) fn started(&self) -> u64 {
        self.process.and_then(Process::started_at).unwrap_or(0)
    }

    /// Begins the migration, to where QEMU has been given a connection; from now on the minder has the
    /// monitor.
    pub(super) fn begin(
        &mut self,
        mut qmp: Qmp,
        name: &str,
        (downtime_ms, into): (u64, Into),
        note: &mut Note<'_>,
    ) -> Result<(), MoveError> {
        note(SourceNote::Begun)?;
        self.ours.begun.store(true, Ordering::Relaxed);
        self.ours.inherited.store(false, Ordering::Relaxed);
        if let Err(e) = qmp.migrate(&format!("fd:{name}")) {
            let e = MoveError::from(e);
            if e.after() == After::Kept {
                // Its owner was quicker, with a migration or a save of their own: that goes on.
                self.ours.begun.store(false, Ordering::Relaxed);
                note(SourceNote::NotBegun)?;
            }
            return Err(e);
        }
        let (shared, ours) = (self.shared.clone(), self.ours.clone());
        let found = self.found.clone().unwrap_or_default();
        let mind = Mind::new(qmp, self.process, downtime_ms, shared, ours, (into, found));
        self.minder = Some(Minder::start(mind).map_err(MoveError::at("no thread for its monitor"))?);
        Ok(())
    }

    /// Lets QEMU hand over the VM that it has stopped.
    pub(super) fn go_on(&mut self) -> Result<Standing, MoveError> {
        let ours = self.ours.clone();
        self.ask(move |qmp| match qmp.migrate_continue() {
            Ok(()) => Ok(Standing::UnderWay),
            Err(e @ QmpError::Refused { .. }) => match ours.stands(qmp)? {
                Standing::Waits => Err(e.into()),
                // It has gone on already, or is over.
                other => Ok(other),
            },
            Err(e) => Err(e.into()),
        })
        .map(|s| s.unwrap_or(Standing::Gone))
    }

    /// How QEMU stands. Not while it may be writing its last pages to the thread that asks.
    pub(super) fn standing(&mut self) -> Result<Standing, MoveError> {
        let ours = self.ours.clone();
        self.ask(move |qmp| ours.stands(qmp)).map(|s| s.unwrap_or(Standing::Gone))
    }

    /// Sees that the VM is the source's again. A stream that this agent reads must have been closed.
    pub(super) fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        let (ours, found) = (self.ours.clone(), self.found.clone().unwrap_or_default());
        let took = self.ask(move |qmp| {
            let job = ours.job_at(qmp)?;
            let stands = take_back(qmp, job, guest, &found)?;
            // What QEMU still says of it is no news.
            ours.over.store(true, Ordering::Relaxed);
            Ok(stands)
        })?;
        Ok(took.map_or(Took::Gone, Took::Stands))
    }

    /// Puts back what was found. What cannot be put back now is put back later.
    pub(super) fn restore(&mut self) {
        self.put_back();
        // The monitor is its owner's again; whoever wants something of it calls anew.
        self.minder = None;
    }

    fn put_back(&mut self) {
        let Some(found) = self.found.clone().filter(|f| !f.is_empty()) else { return };
        self.ours.quiet.store(true, Ordering::Relaxed);
        let until = Instant::now() + RESTORE;
        loop {
            let again = found.clone();
            match self.ask(move |qmp| Ok(qmp.put_back_after(&again)?)) {
                Ok(_) => {
                    self.found = None;
                    return;
                }
                Err(e) if Instant::now() > until => {
                    tracing::warn!(
                        "its migration settings are not as they were found: {e}; it is tried again"
                    );
                    self.found = None;
                    restorer::later(&self.path, self.timeout, self.process, found);
                    return;
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Asks, by whoever has the monitor; nothing if QEMU's process has ended.
    fn ask<T: Send + 'static>(
        &mut self,
        what: impl Fn(&mut Qmp) -> Result<T, MoveError> + Clone + Send + 'static,
    ) -> Result<Option<T>, MoveError> {
        let by_minder = self.minder.as_ref().and_then(|m| m.order(what.clone()));
        let mut reached = true;
        let answer = by_minder.unwrap_or_else(|| {
            // Its thread ends with its connection; there may be a new one to be had.
            self.minder = None;
            let qmp = monitor(&self.path, self.timeout, self.process);
            what(&mut qmp.inspect_err(|_| reached = false)?)
        });
        answer.map(Some).or_else(|e| {
            // Whether it is gone is for its process to say.
            let closed = !reached || matches!(&e, MoveError::Qmp(e) if e.is_closed());
            let exits = if closed { EXIT } else { Duration::ZERO };
            if self.process.is_some_and(|p| p.wait_gone(exits)) { Ok(None) } else { Err(e) }
        })
    }
}

/// Something to do with the monitor.
type Order = Box<dyn FnOnce(&mut Mind) + Send>;

/// The handle on the minder's thread; dropping it ends the thread.
struct Minder {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Minder {
    fn start(mind: Mind) -> std::io::Result<Self> {
        let (tx, rx) = channel();
        let thread = std::thread::Builder::new().name("irlm-minder".into()).spawn(move || mind.run(&rx))?;
        Ok(Self { orders: Some(tx), thread: Some(thread) })
    }

    /// Asks through the thread; nothing if it has ended.
    fn order<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Qmp) -> Result<T, MoveError> + Send + 'static,
    ) -> Option<Result<T, MoveError>> {
        let (tx, rx) = channel();
        let order = Box::new(move |mind: &mut Mind| {
            mind.catch_up();
            let _ = tx.send(what(&mut mind.qmp));
        });
        self.orders.as_ref()?.send(order).ok()?;
        match rx.recv_timeout(ANSWER) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => {
                Some(Err(MoveError::Unsettled("QEMU's monitor does not answer".into())))
            }
            Err(RecvTimeoutError::Disconnected) => None,
        }
    }
}

impl Drop for Minder {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(t) = self.thread.take() {
            let _ = t.join();
        }
    }
}

struct Mind {
    qmp: Qmp,
    process: Option<Process>,
    shared: Arc<SourceVmShared>,
    ours: Arc<Ours>,
    into: Into,
    found: Settings,
    tuner: Tuner,
    /// When QEMU was asked last how far it is.
    asked: Instant,
    /// Since when the migration is said to have failed, while the VM has not been let go.
    failing: Option<Instant>,
}

impl Mind {
    fn new(
        qmp: Qmp,
        process: Option<Process>,
        downtime_ms: u64,
        shared: Arc<SourceVmShared>,
        ours: Arc<Ours>,
        (into, found): (Into, Settings),
    ) -> Self {
        let mut tuner = Tuner::new(downtime_ms);
        // What no agent slows needs no scaling.
        tuner.done = into == Into::Qemu;
        Self { qmp, process, shared, ours, into, found, tuner, asked: Instant::now(), failing: None }
    }

    fn say(&self, says: Says) {
        self.shared.inbox.post(Input::Qemu(says));
    }

    fn run(mut self, orders: &Receiver<Order>) {
        let mut wait = Duration::ZERO;
        loop {
            match orders.recv_timeout(std::mem::take(&mut wait)) {
                Ok(order) => order(&mut self),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            match self.qmp.next_event(Duration::from_millis(20)) {
                Ok(Some(e)) => {
                    if self.hear(&e) {
                        // The VM stands still until the answer comes.
                        wait = LEAVE;
                    }
                }
                Ok(None) => {}
                Err(e) if e.is_closed() => {
                    let died = self.process.is_some_and(|p| p.wait_gone(EXIT));
                    self.say(if died { Says::Died } else { Says::Mute });
                    return;
                }
                Err(e) => tracing::warn!("{e}"),
            }
            self.see_failed();
            if self.into == Into::Qemu && self.asked.elapsed() >= ASK {
                self.look();
            }
            self.tune();
        }
    }

    /// Hears what was said before something is asked: whose migration is under way depends on it.
    fn catch_up(&mut self) {
        while let Ok(Some(e)) = self.qmp.next_event(Duration::ZERO) {
            self.hear(&e);
        }
    }

    fn tune(&mut self) {
        if self.ours.quiet.load(Ordering::Relaxed) {
            return;
        }
        let Some(ms) = self.tuner.step(&self.shared) else { return };
        let mut p = Map::new();
        p.insert("downtime-limit".into(), Value::from(ms));
        // Only an optimisation; and QEMU may be busy switching over just now.
        self.qmp.set_timeout(Duration::from_millis(500));
        if let Err(e) = self.qmp.set_parameters(p) {
            tracing::debug!("{e}");
        }
        self.qmp.set_timeout(Duration::from_secs(10));
    }

    /// How far a QEMU is that streams by itself.
    fn look(&mut self) {
        self.asked = Instant::now();
        let Ok(info) = self.qmp.query_migrate() else { return };
        self.shared.stream_bytes.store(info.transferred, Ordering::Relaxed);
        self.shared.wire_bytes.store(info.transferred, Ordering::Relaxed);
        let mut st = lock(&self.shared.status);
        st.ram_bytes = info.ram_total;
        st.stats.uniform = info.zero_pages;
        st.stats.unique = info.normal_pages;
    }

    /// Whether QEMU waits for an answer now.
    fn hear(&mut self, e: &Event) -> bool {
        match e.name.as_str() {
            "STOP" => {
                self.tuner.done = true;
                // At once: what is said next may have to wait for QEMU's last pages.
                self.say(Says::Stopped(e.at_ns));
                self.see_guest();
            }
            "SHUTDOWN" => {
                self.tuner.done = true;
                self.see_guest();
            }
            "RESUME" | "SUSPEND" | "WAKEUP" | "GUEST_PANICKED" | "BLOCK_IO_ERROR" | "WATCHDOG" => {
                self.see_guest();
            }
            _ => {}
        }
        // Once it has failed, or was taken back, what is said is of somebody else's migration.
        if matches!(self.ours.job(), Job::None | Job::Failed) {
            return false;
        }
        match e.migration_status() {
            Some(MigrateStatus::Completed) => {
                self.say(Says::Completed);
                if self.into == Into::Qemu {
                    self.look();
                }
            }
            Some(MigrateStatus::Failed | MigrateStatus::Cancelled) => {
                self.ours.failed.store(true, Ordering::Relaxed);
                // At once: its owner may begin one of his own now. Whether it was done is seen at the end.
                self.ours.quiet.store(true, Ordering::Relaxed);
                if let Err(e) = self.qmp.put_back(&self.found) {
                    tracing::debug!("{e}");
                }
                self.failing = Some(Instant::now());
            }
            Some(MigrateStatus::PreSwitchover) if self.into == Into::Qemu => {
                self.say(Says::Waits);
                return true;
            }
            _ => {}
        }
        false
    }

    /// What somebody, or the guest itself, has made of the VM. A state that the migration gave it is nobody's
    /// wish; an owner who stops it in the very moment in which QEMU does cannot be told from QEMU.
    fn see_guest(&mut self) {
        let status = match self.qmp.query_status() {
            Ok(s) => s.status,
            Err(e) => {
                tracing::debug!("{e}");
                return;
            }
        };
        let Some(guest) = GuestState::parse(&status).filter(|g| *g != self.ours.guest()) else { return };
        self.ours.set_guest(guest);
        if guest.runs() {
            self.tuner.done = self.into == Into::Qemu;
        }
        self.say(Says::Guest(guest));
    }

    /// Tells of a migration that has failed when QEMU has let the VM go; it says so some time before.
    fn see_failed(&mut self) {
        let Some(since) = self.failing else { return };
        if self.ours.job() == Job::None {
            self.failing = None;
            return;
        }
        let over = match (self.qmp.query_migrate(), self.qmp.query_status()) {
            // It may be somebody else's that is not final.
            (Ok(m), Ok(s)) => {
                let back = GuestState::parse(&s.status).is_some();
                back || (m.status.is_final() && s.status != "finish-migrate")
            }
            _ => false,
        };
        if over || since.elapsed() > LET_GO {
            self.failing = None;
            self.say(Says::Failed);
        }
    }
}

#[cfg(test)]
mod tests;
