//! The monitor thread of one departing VM. It alone speaks QMP during the migration: while QEMU's migration thread
//! writes its last pages it holds QEMU's big lock, so a QMP command sent by the thread that reads the stream could wait
//! for itself.
//!
//! It also keeps QEMU's switchover decision honest. QEMU stops the VM when what remains fits `downtime-limit` at the
//! rate its stream was taken; references let the stream run faster than the link, but the last pages are mostly new
//! content, which does not. So `downtime-limit` is scaled by the rate at which content goes over stream rate
//! (docs/decisions/0002).

use super::{Input, SourceVmShared};
use crate::core::hold;
use crate::flow::lock;
use crate::host::sched::Process;
use crate::net::qmp::{MigrateStatus, Qmp, QmpError};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What QEMU says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Says {
    /// The VM was stopped, at this Unix time in nanoseconds.
    Stopped(u64),
    /// The VM is stopped, and QEMU waits for leave to hand it over.
    Waits,
    /// The migration is completed: the VM stays stopped.
    Completed,
    /// The migration failed or was cancelled.
    Failed,
    /// QEMU is gone: its process has ended.
    Died,
    /// Its monitor cannot be heard, though its process is there or cannot be looked at.
    Mute,
}

/// Commands to the minder.
enum Order {
    /// See that the VM runs again; answer when it does (or cannot).
    TakeBack(Sender<Result<(), String>>),
    /// Let QEMU hand the VM over, for which it waits; answer when it was told.
    GoOn(Sender<Result<(), String>>),
}

/// Who takes QEMU's stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Into {
    /// This agent.
    Agent,
    /// The target's QEMU.
    Qemu,
}

/// The handle; dropping it ends the thread.
pub(super) struct Minder {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
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

/// How often a QEMU that streams by itself is asked how far it is.
const ASK: Duration = Duration::from_millis(200);
/// How long QEMU may wait for leave to hand its VM over before its monitor is listened to again.
const LEAVE: Duration = Duration::from_secs(30);

/// Unlimited, for QEMU: its default of 128 MiB/s would be the bottleneck; the wire paces the stream.
const MAX_BANDWIDTH: u64 = 1 << 44;

/// Sets the source QEMU up for a migration through IRLM. Returns whether the VM was running.
pub(super) fn set_up(qmp: &mut Qmp, downtime_ms: u64, into: Into) -> Result<bool, QmpError> {
    let mut caps: Vec<(&str, bool)> = OFF.iter().map(|c| (*c, false)).collect();
    // An agent in the path holds SHUT back instead.
    caps.extend([("return-path", true), ("events", true), ("pause-before-switchover", into == Into::Qemu)]);
    qmp.set_capabilities(&caps)?;
    let mut p = Map::new();
    p.insert("max-bandwidth".into(), json!(MAX_BANDWIDTH));
    p.insert("downtime-limit".into(), json!(downtime_ms));
    qmp.set_parameters(p)?;
    Ok(qmp.query_status()?.running)
}

impl Minder {
    pub(super) fn start(
        qmp: Qmp,
        process: Option<Process>,
        was_running: bool,
        downtime_ms: u64,
        shared: &Arc<SourceVmShared>,
        into: Into,
    ) -> Self {
        let (tx, rx) = channel();
        let shared = shared.clone();
        let asked = Instant::now();
        let mind = Mind { qmp, process, was_running, downtime_ms, shared, quiet: false, into, asked };
        let thread = std::thread::Builder::new().name("irlm-minder".into()).spawn(move || mind.run(&rx)).ok();
        Self { orders: Some(tx), thread }
    }

    /// Sees that the VM runs again. The stream must have been closed.
    pub(super) fn take_back(&self) -> Result<(), String> {
        self.order(Order::TakeBack)
    }

    /// Lets QEMU hand over the VM that it has stopped.
    pub(super) fn go_on(&self) -> Result<(), String> {
        self.order(Order::GoOn)
    }

    fn order(&self, order: impl FnOnce(Sender<Result<(), String>>) -> Order) -> Result<(), String> {
        let (tx, rx) = channel();
        self.orders
            .as_ref()
            .and_then(|o| o.send(order(tx)).ok())
            .ok_or("the monitor thread has ended, because QEMU did")?;
        rx.recv_timeout(Duration::from_secs(30)).map_err(|_| "QEMU's monitor does not answer".to_owned())?
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

/// Brings the VM back to life at the source, whatever state its migration is in. Also used after a restart.
pub(crate) fn take_back(qmp: &mut Qmp, should_run: bool) -> Result<(), String> {
    let until = Instant::now() + Duration::from_secs(20);
    let mut cancelled = false;
    let mut refusal = String::new();
    loop {
        let migrating = qmp.query_migrate().map_err(|e| e.to_string())?.status;
        let state = qmp.query_status().map_err(|e| e.to_string())?;
        let busy = !matches!(migrating, MigrateStatus::None) && !migrating.is_final();
        // What a migration leaves behind; any other paused state is somebody else's wish.
        let left = matches!(state.status.as_str(), "postmigrate" | "finish-migrate");
        if busy && !cancelled {
            cancelled = true;
            qmp.migrate_cancel().map_err(|e| e.to_string())?;
        } else if !busy && (!left || !should_run) {
            return Ok(());
        } else if !busy {
            match qmp.cont() {
                Ok(()) => refusal.clear(),
                // A migration is said to be over before its thread has left the VM alone (seen with QEMU 10.0).
                Err(e @ QmpError::Refused { .. }) => refusal = format!(": {e}"),
                Err(e) => return Err(e.to_string()),
            }
        }
        if Instant::now() > until {
            return Err(format!("QEMU is still {} ({migrating:?}){refusal}", state.status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a QEMU whose monitor was closed has ended; waits a little for an exit under way.
fn died(process: Option<Process>) -> bool {
    let until = Instant::now() + Duration::from_secs(3);
    while let Some(p) = process {
        if p.is_gone() {
            return true;
        }
        if Instant::now() > until {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// What QEMU's migration has come to, asked after a restart.
pub(crate) fn completed(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let state = qmp.query_status()?;
    Ok(!state.running && qmp.query_migrate()?.status == MigrateStatus::Completed)
}

struct Mind {
    qmp: Qmp,
    process: Option<Process>,
    was_running: bool,
    downtime_ms: u64,
    shared: Arc<SourceVmShared>,
    /// Nothing more to report.
    quiet: bool,
    into: Into,
    /// When QEMU was asked last how far it is.
    asked: Instant,
}

impl Mind {
    fn say(&self, says: Says) {
        self.shared.inbox.post(Input::Qemu(says));
    }

    fn run(mut self, orders: &Receiver<Order>) {
        let mut tuner = Tuner::new(self.downtime_ms);
        // What no agent slows needs no scaling.
        tuner.done = self.into == Into::Qemu;
        let mut wait = Duration::ZERO;
        loop {
            match orders.recv_timeout(std::mem::take(&mut wait)) {
                Ok(Order::TakeBack(answer)) => {
                    self.quiet = true;
                    let _ = answer.send(take_back(&mut self.qmp, self.was_running));
                }
                Ok(Order::GoOn(answer)) => {
                    let _ = answer.send(self.qmp.migrate_continue().map_err(|e| e.to_string()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            match self.qmp.next_event(Duration::from_millis(20)) {
                Ok(Some(e)) => {
                    if self.hear(&e, &mut tuner) {
                        // The VM stands still until the answer comes.
                        wait = LEAVE;
                    }
                }
                Ok(None) => {}
                Err(e) if e.is_closed() => {
                    self.say(if died(self.process) { Says::Died } else { Says::Mute });
                    return;
                }
                Err(e) => tracing::warn!("{e}"),
            }
            if self.into == Into::Qemu && self.asked.elapsed() >= ASK {
                self.look();
            }
            if let Some(ms) = tuner.step(&self.shared) {
                let mut p = Map::new();
                p.insert("downtime-limit".into(), Value::from(ms));
                // Only an optimisation; and QEMU may be busy switching over just now.
                self.qmp.set_timeout(Duration::from_millis(500));
                if let Err(e) = self.qmp.set_parameters(p) {
                    tracing::debug!("{e}");
                }
                self.qmp.set_timeout(Duration::from_secs(10));
            }
        }
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
    fn hear(&mut self, e: &crate::net::qmp::Event, tuner: &mut Tuner) -> bool {
        if e.name == "STOP" {
            tuner.done = true;
            self.say(Says::Stopped(e.at_ns));
        }
        if e.name == "SHUTDOWN" {
            tuner.done = true;
        }
        match e.migration_status() {
            Some(MigrateStatus::Completed) if !self.quiet => {
                self.say(Says::Completed);
                if self.into == Into::Qemu {
                    self.look();
                }
            }
            Some(MigrateStatus::Failed | MigrateStatus::Cancelled) if !self.quiet => self.say(Says::Failed),
            Some(MigrateStatus::PreSwitchover) if !self.quiet && self.into == Into::Qemu => {
                self.say(Says::Waits);
                return true;
            }
            _ => {}
        }
        false
    }
}

/// What was counted by the time of a look, or between two.
#[derive(Clone, Copy, Default)]
struct Counts {
    /// Bytes taken from QEMU, and put on the wire.
    stream: u64,
    wire: u64,
    /// Contents as they were, and what they came to on the wire.
    raw: u64,
    small: u64,
}

/// Scales the downtime limit by the rate of content over stream rate.
struct Tuner {
    limit_ms: u64,
    set_ms: u64,
    at: Instant,
    seen: Counts,
    /// The fastest the wire has been, decaying slowly: it is only meaningful when the link was busy.
    capacity: f64,
    /// The fastest that content has been, decaying likewise: the link is not all that may bound it.
    content: f64,
    /// What is left of content on the wire, of late: what compressed well before says little of the last pages.
    leaves: f64,
    /// The fastest the stream has been of late: after a pause QEMU may see that rate again at any moment.
    fastest: f64,
    done: bool,
}

impl Tuner {
    const EVERY: Duration = Duration::from_millis(250);

    fn new(limit_ms: u64) -> Self {
        Self {
            limit_ms,
            set_ms: limit_ms,
            at: Instant::now(),
            seen: Counts::default(),
            capacity: 0.0,
            content: 0.0,
            leaves: 1.0,
            fastest: 0.0,
            done: false,
        }
    }

    /// A new limit to set, if it differs enough from the one in force.
    fn step(&mut self, shared: &SourceVmShared) -> Option<u64> {
        let dt = self.at.elapsed();
        if self.done || dt < Self::EVERY {
            return None;
        }
        let (raw, small) = shared.work.contents();
        let now = Counts {
            stream: shared.stream_bytes.load(Ordering::Relaxed),
            wire: shared.wire_bytes.load(Ordering::Relaxed),
            raw,
            small,
        };
        let was = std::mem::replace(&mut self.seen, now);
        let passed = Counts {
            stream: now.stream - was.stream,
            wire: now.wire - was.wire,
            raw: now.raw - was.raw,
            small: now.small - was.small,
        };
        self.at = Instant::now();
        let holds = shared.holds.load(Ordering::Relaxed) > 0;
        let ms = self.judge(passed, dt.as_secs_f64(), holds);
        if let Some(rate) = self.rate() {
            let pages = hold::allowance(rate, self.limit_ms as f64 / 1e3);
            shared.may_hold.store(u32::try_from(pages).unwrap_or(0), Ordering::Relaxed);
        }
        ms
    }

    /// Bytes of content a second that go through, if that is known.
    fn rate(&self) -> Option<f64> {
        (self.capacity > 0.0).then(|| (self.capacity / self.leaves).min(self.content.max(self.capacity)))
    }

    fn judge(&mut self, n: Counts, seconds: f64, holds: bool) -> Option<u64> {
        self.capacity = (n.wire as f64 / seconds).max(self.capacity * 0.98);
        self.content = (n.raw as f64 / seconds).max(self.content * 0.98);
        self.fastest = (n.stream as f64 / seconds).max(self.fastest * 0.9);
        if n.raw > 0 {
            let now = (n.small as f64 / n.raw as f64).clamp(0.001, 1.0);
            // Worse counts at once, better only as it lasts.
            self.leaves = if now > self.leaves { now } else { self.leaves * 0.7 + now * 0.3 };
        }
        let rate = self.rate().filter(|_| self.fastest > 0.0)?;
        // What is held back leaves while the VM stands still, too.
        let rest = if holds { 1.0 - hold::SHARE } else { 1.0 };
        let scale = (rate / self.fastest).min(1.0) * rest;
        let ms = ((self.limit_ms as f64 * scale) as u64).max(self.limit_ms.min(10));
        if ms.abs_diff(self.set_ms) * 5 < self.set_ms {
            return None;
        }
        self.set_ms = ms;
        Some(ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::qmp::tests::serve;
    use std::sync::atomic::AtomicU32;

    /// QEMU 10.0 says that a migration has failed some time before it lets the VM go.
    #[test]
    fn a_vm_is_taken_back_from_a_migration_that_is_not_finalized_yet() {
        let conts = Arc::new(AtomicU32::new(0));
        let seen = conts.clone();
        let (_dir, path, fake) = serve(move |command, _| {
            let running = seen.load(Ordering::Relaxed) > 2;
            Some(match command {
                "query-migrate" => r#"{"return":{"status":"failed"},"id":$ID}"#.to_owned(),
                "query-status" if running => {
                    r#"{"return":{"running":true,"status":"running"},"id":$ID}"#.to_owned()
                }
                "query-status" => {
                    r#"{"return":{"running":false,"status":"finish-migrate"},"id":$ID}"#.to_owned()
                }
                "cont" => {
                    seen.fetch_add(1, Ordering::Relaxed);
                    r#"{"error":{"class":"GenericError","desc":"Migration is not finalized yet"},"id":$ID}"#
                        .to_owned()
                }
                _ => return None,
            })
        });
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        take_back(&mut qmp, true).unwrap();
        assert_eq!(conts.load(Ordering::Relaxed), 3);
        drop(qmp);
        fake.join().unwrap();
    }

    /// A second in which so many MB were taken from QEMU and sent, of them so many of content, before and after.
    fn second(t: &mut Tuner, stream: f64, wire: f64, raw: f64, small: f64) -> Option<u64> {
        let [stream, wire, raw, small] = [stream, wire, raw, small].map(|mb| (mb * 1e6) as u64);
        t.judge(Counts { stream, wire, raw, small }, 1.0, false)
    }

    #[test]
    fn the_limit_follows_the_wire_not_the_references() {
        let mut t = Tuner::new(300);
        assert_eq!(
            second(&mut t, 12.0, 12.0, 12.0, 12.0),
            None,
            "stream as fast as the wire: the limit stands"
        );
        let ms = second(&mut t, 120.0, 1.0, 0.5, 0.5).unwrap();
        assert!((20..=40).contains(&ms), "references ten times as fast: {ms} ms");
        let ms = second(&mut t, 0.0, 0.0, 0.0, 0.0);
        assert!(ms.is_none_or(|ms| ms < 60), "a held stream may burst at any moment");
        let ms = (0..40).filter_map(|_| second(&mut t, 12.0, 11.8, 11.8, 11.8)).last().unwrap();
        assert!(ms > 240, "content again, for long: {ms} ms");
        for _ in 0..1000 {
            second(&mut t, 1e6, 1e-6, 0.0, 0.0);
        }
        assert_eq!(t.set_ms, 10, "never below what any QEMU needs to stop at all");
    }

    #[test]
    fn what_is_held_back_is_taken_off_the_limit() {
        let mut t = Tuner::new(400);
        let n = Counts { stream: 12_000_000, wire: 12_000_000, raw: 12_000_000, small: 12_000_000 };
        assert_eq!(t.judge(n, 1.0, true), Some(300));
        assert_eq!(t.judge(n, 1.0, false), Some(400));
        assert_eq!(t.rate(), Some(12e6));
    }

    #[test]
    fn compressed_content_counts_as_what_it_was() {
        // 36 MB/s of content go as 12 MB/s: the stream is no faster than its content, so the limit stands.
        let mut t = Tuner::new(300);
        for _ in 0..20 {
            second(&mut t, 36.0, 12.0, 36.0, 12.0);
        }
        assert!(t.set_ms > 240, "{} ms", t.set_ms);
        // References on top do not go that fast.
        second(&mut t, 360.0, 12.0, 30.0, 10.0);
        assert!((20..=40).contains(&t.set_ms), "{} ms", t.set_ms);
        // Content that does not shrink: the link takes a third of it, whatever it took before.
        let mut t = Tuner::new(300);
        for _ in 0..20 {
            second(&mut t, 36.0, 12.0, 36.0, 12.0);
        }
        second(&mut t, 12.0, 12.0, 12.0, 12.0);
        assert!((90..=130).contains(&t.set_ms), "{} ms", t.set_ms);
        // A link that is never the bound: content goes as fast as it goes, not as fast as the link would take it.
        let mut t = Tuner::new(300);
        second(&mut t, 1000.0, 1000.0, 1000.0, 1000.0);
        for _ in 0..200 {
            second(&mut t, 400.0, 120.0, 300.0, 100.0);
        }
        assert!((200..=240).contains(&t.set_ms), "{} ms", t.set_ms);
    }
}
