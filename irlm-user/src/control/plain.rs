//! The methods `oc` and `qemu-multifd-zstd`: plain QEMU from host to host, driven by the same agents over the same
//! monitors, so that a comparison measures the pages' way and nothing else. Blocking; one thread a VM.
//!
//! The order of a VM: the target agent calls [`listen`], the source agent [`look`], [`start`] and [`watch_source`]. With
//! `return-path` on, the source's QEMU completes only when the target's has loaded everything; completed, it never
//! runs again by itself. Then the source agent tells the target agent ([`super::api::Request::Released`]), and that
//! one calls [`run`]. If QEMU fails or is cancelled before that, it lets the guest run on at the source.
//!
//! What others do with these QEMUs is theirs: a migration under way is not begun upon, and settings are put back
//! ([`Kept`]).

// Settings, kept and put back.
mod kept;

use crate::core::handover::GuestState;
use crate::flow::{Moment, unix_ns};
use crate::net::qmp::{Event, MigrateInfo, MigrateStatus, Qmp, QmpError};
pub use kept::Kept;
use kept::OFF;
use serde_json::{Map, json};
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Channels of `qemu-multifd-zstd`: QEMU's default, and as many as the test machine has cores.
pub const MULTIFD_CHANNELS: u32 = 2;

/// `max-bandwidth`, bytes/s: far above any link (QEMU's own default would cap it at 128 MiB/s).
const NO_RATE_LIMIT: u64 = 100 << 30;

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(200);

/// How long a QEMU whose migration is watched may leave questions unanswered: its main loop also loads guests, and on a host
/// that is short of processors it comes to its monitor late. A QEMU that has ended is noticed at once.
const SILENT: Duration = Duration::from_secs(120);

/// How long a guest may take to run on after a failed or cancelled migration before it is told to.
const RESUME_GRACE: Duration = Duration::from_secs(5);

/// What went wrong around plain QEMU.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// The monitor failed or refused.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The target's QEMU does not say where it listens.
    #[error(
        "QMP {path}: QEMU does not tell its port after migrate-incoming; was it started with -incoming defer?"
    )]
    NoPort {
        /// The monitor socket.
        path: String,
    },
    /// A QEMU that is not as it must be before anything is done with it. Nothing was.
    #[error("QMP {path}: {what}")]
    NotReady {
        /// The monitor socket.
        path: String,
        /// What is, and what must be.
        what: String,
    },
    /// A guest that should run on at its source does not.
    #[error("QMP {path}: the guest is {status} after the migration ended without success: look at it")]
    NotResumed {
        /// The monitor socket.
        path: String,
        /// QEMU's run state.
        status: String,
    },
    /// Its guest writes faster than the link takes it.
    #[error("it writes faster than the link takes it: not converged within {s} s (timeouts.move_ms)")]
    NotConverged {
        /// Seconds that it had.
        s: u64,
    },
    /// Its process has ended.
    #[error("its QEMU has ended: {0}")]
    Ended(Box<Self>),
    /// Nobody waits for how it ends any more.
    #[error("the group was dropped while its QEMU did not answer")]
    Forgotten,
}

/// How a source's part ended.
#[derive(Clone, Debug)]
pub enum SourceEnd {
    /// Everything is loaded at the target; this QEMU is stopped for good.
    Completed {
        /// QEMU's STOP event; none was heard of a guest that did not run.
        stopped: Option<Moment>,
        /// QEMU's `completed` event, Unix nanoseconds.
        completed_ns: u64,
        /// The last `query-migrate`, with QEMU's own downtime.
        info: MigrateInfo,
    },
    /// It failed; the guest is in the state it was in before.
    Failed {
        /// QEMU's reason, or the best there is.
        why: String,
    },
    /// It was cancelled; the guest is in the state it was in before.
    Cancelled,
}

/// How a target's part ended.
#[derive(Clone, Debug)]
pub enum TargetEnd {
    /// Everything is loaded; the guest could run, but is paused.
    Loaded {
        /// QEMU's `completed` event, Unix nanoseconds.
        at_ns: u64,
    },
    /// It failed, and QEMU says so. (Most end when a stream breaks: then their monitor closes.)
    Failed {
        /// The reason.
        why: String,
    },
    /// Asked to stop waiting, before anything came.
    Cancelled,
}

fn configure(qmp: &mut Qmp, multifd: bool, return_path: bool) -> Result<(), QmpError> {
    let mut capabilities: Vec<(&str, bool)> = OFF.map(|c| (c, false)).into();
    capabilities.extend([("multifd", multifd), ("events", true)]);
    // The target opens the path when the source asks for it.
    capabilities.push(("return-path", return_path));
    qmp.set_capabilities(&capabilities)?;
    if multifd {
        let mut p = Map::new();
        p.insert("multifd-channels".into(), json!(MULTIFD_CHANNELS));
        p.insert("multifd-compression".into(), json!("zstd"));
        qmp.set_parameters(p)?;
    }
    Ok(())
}

fn not_ready(qmp: &Qmp, what: String) -> PlainError {
    PlainError::NotReady { path: qmp.path().display().to_string(), what }
}

/// Source: in which state the guest is; refused, with nothing changed, where a migration or a save is under way or has
/// been, because that is somebody else's.
pub fn look(qmp: &mut Qmp) -> Result<GuestState, PlainError> {
    use MigrateStatus as M;
    let migration = qmp.query_migrate()?.status;
    if !matches!(migration, M::None | M::Completed | M::Failed | M::Cancelled) {
        return Err(not_ready(qmp, "another migration is under way, which goes on: wait for its end".into()));
    }
    let status = qmp.query_status()?.status;
    GuestState::parse(&status).ok_or_else(|| {
        let what = match status.as_str() {
            "postmigrate" => "it has completed a migration (postmigrate): its guest is elsewhere".to_owned(),
            _ => format!("its guest is {status}, and cannot be moved so"),
        };
        not_ready(qmp, what)
    })
}

/// Target: makes the QEMU that waits with `-incoming defer` listen on a free port of `ip`, and tells which. It will not run
/// the guest by itself, with `-S` or without. One that was told so before, and to which nothing came, is used again.
pub fn listen(qmp: &mut Qmp, multifd: bool, ip: IpAddr) -> Result<SocketAddr, PlainError> {
    let status = qmp.query_status()?.status;
    let before = qmp.query_migrate()?;
    let waits = matches!(before.status, MigrateStatus::None | MigrateStatus::Setup);
    if status != "inmigrate" || !waits {
        let what = format!("it is {status}, and does not wait for a VM: start it with -incoming defer");
        return Err(not_ready(qmp, what));
    }
    // While it waits this is how it is told not to run what it loads.
    qmp.stop()?;
    configure(qmp, multifd, false)?;
    if let Some(port) = before.listen_port {
        return Ok(SocketAddr::new(ip, port));
    }
    // QEMU picks the port itself: a port found free from outside could be taken before QEMU has it.
    qmp.migrate_incoming(&format!("tcp:{}", SocketAddr::new(ip, 0)))?;
    match qmp.query_migrate()?.listen_port {
        Some(port) => Ok(SocketAddr::new(ip, port)),
        None => Err(PlainError::NoPort { path: qmp.path().display().to_string() }),
    }
}

/// Source: starts the migration to where the target listens. Gives the start, Unix nanoseconds. `downtime_ms`: the
/// downtime QEMU may plan for; `rate`: most that it sends, bytes a second.
pub fn start(
    qmp: &mut Qmp,
    multifd: bool,
    to: SocketAddr,
    downtime_ms: u64,
    rate: Option<u64>,
) -> Result<u64, QmpError> {
    configure(qmp, multifd, true)?;
    let mut p = Map::new();
    p.insert("max-bandwidth".into(), json!(rate.unwrap_or(NO_RATE_LIMIT)));
    p.insert("downtime-limit".into(), json!(downtime_ms));
    qmp.set_parameters(p)?;
    // Events of an earlier try must not be taken for this one's.
    qmp.drain_events()?;
    let at = unix_ns();
    qmp.migrate(&format!("tcp:{to}"))?;
    Ok(at)
}

/// Source: waits until the migration is over. `guest`: its state before; what its owner or the guest itself makes of
/// it meanwhile is its state from then on. `progress` is called about five times a second; `cancel` and `rate` are
/// looked at as often. A cancel that comes too late ends as completed. After any other end [`run_on`] is due.
pub fn watch_source(
    qmp: &mut Qmp,
    guest: &Cell<GuestState>,
    cancel: &AtomicBool,
    rate: &dyn Fn() -> Option<u64>,
    progress: &mut dyn FnMut(&MigrateInfo),
) -> Result<SourceEnd, PlainError> {
    let mut seen = Times::default();
    let mut asked = false;
    let mut told = rate();
    let mut heard = Instant::now();
    // Nobody may have looked for a while.
    left_as(qmp, guest)?;
    loop {
        let wanted = rate();
        if wanted != told {
            told = wanted;
            let mut p = Map::new();
            p.insert("max-bandwidth".into(), json!(wanted.unwrap_or(NO_RATE_LIMIT)));
            qmp.set_parameters(p)?;
        }
        if cancel.load(Ordering::Acquire) && !asked {
            asked = true;
            qmp.migrate_cancel()?;
        }
        let event = qmp.next_event(POLL)?;
        if let Some(e) = &event {
            seen.note(e);
            if matches!(
                &*e.name,
                "STOP" | "RESUME" | "SUSPEND" | "WAKEUP" | "GUEST_PANICKED" | "BLOCK_IO_ERROR"
            ) {
                left_as(qmp, guest)?;
            }
        }
        if event.is_some() && seen.over.is_none() {
            continue;
        }
        let Some(info) = patiently(&mut heard, qmp.query_migrate())? else { continue };
        progress(&info);
        // One of its owner's may be under way by now, or be over: what was heard is said of ours.
        let Some(status) = seen.lost.or(Some(info.status)).filter(|s| s.is_final()) else { continue };
        for e in qmp.drain_events()? {
            seen.note(&e);
        }
        return match status {
            MigrateStatus::Completed => Ok(SourceEnd::Completed {
                stopped: seen.stop,
                completed_ns: seen.over.unwrap_or_else(unix_ns),
                info,
            }),
            MigrateStatus::Cancelled => Ok(SourceEnd::Cancelled),
            _ => Ok(SourceEnd::Failed {
                why: info.error_desc.unwrap_or_else(|| {
                    "QEMU gives no reason; most often the target's QEMU ended or the link was cut".into()
                }),
            }),
        };
    }
}

/// Takes in how the VM was left, as long as that is not the migration's own doing.
fn left_as(qmp: &mut Qmp, guest: &Cell<GuestState>) -> Result<(), QmpError> {
    if let Some(left) = GuestState::parse(&qmp.query_status()?.status) {
        guest.set(left);
    }
    Ok(())
}

/// An answer, or none yet if QEMU is silent and was `heard` not too long ago.
fn patiently<T>(heard: &mut Instant, answer: Result<T, QmpError>) -> Result<Option<T>, QmpError> {
    match answer {
        Err(QmpError::Timeout { .. }) if heard.elapsed() < SILENT => Ok(None),
        Ok(x) => {
            *heard = Instant::now();
            Ok(Some(x))
        }
        Err(e) => Err(e),
    }
}

/// The moments of a migration, by QEMU's own stamps.
#[derive(Default)]
struct Times {
    stop: Option<Moment>,
    over: Option<u64>,
    /// How it ended, if not well.
    lost: Option<MigrateStatus>,
}

impl Times {
    fn note(&mut self, e: &Event) {
        let at = if e.at_ns == 0 { unix_ns() } else { e.at_ns };
        if e.name == "STOP" {
            self.stop = Some(Moment::heard(at));
        } else if let Some(status) = e.migration_status().filter(|s| s.is_final()) {
            // The first: a later one is another migration's.
            self.over.get_or_insert(at);
            if status != MigrateStatus::Completed {
                self.lost.get_or_insert(status);
            }
        }
    }
}

/// Source: after a failed or cancelled migration QEMU lets a guest run on that ran before; sees to it that it does.
/// What its owner or the guest itself made of it meanwhile stays, and so does what a migration of its owner's, begun
/// since, has made of it.
pub fn run_on(qmp: &mut Qmp, guest: GuestState) -> Result<(), PlainError> {
    if !guest.runs() {
        return Ok(());
    }
    let until = Instant::now() + RESUME_GRACE;
    loop {
        let s = qmp.query_status()?;
        // These are what the migration makes of a guest; any other state is somebody else's doing.
        if s.running {
            // A target announces its cards once it has loaded, whoever runs the guest then.
            qmp.announce_self();
            return Ok(());
        }
        if !matches!(s.status.as_str(), "finish-migrate" | "postmigrate") {
            return Ok(());
        }
        match qmp.query_migrate()?.status {
            // Its owner's has left it like this.
            MigrateStatus::Completed => return Ok(()),
            MigrateStatus::Setup | MigrateStatus::Active | MigrateStatus::Device => return Ok(()),
            _ => {}
        }
        if Instant::now() >= until {
            // Ours did not complete, and no other is there: this cannot make a second running copy.
            qmp.cont()?;
            let s = qmp.query_status()?;
            if s.running {
                qmp.announce_self();
                return Ok(());
            }
            return Err(PlainError::NotResumed { path: qmp.path().display().to_string(), status: s.status });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Target: waits until everything is loaded; a `cancel` ends that only as long as nothing has come. `progress` is called about five times a second.
pub fn watch_target(
    qmp: &mut Qmp,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(&MigrateInfo),
) -> Result<TargetEnd, PlainError> {
    let mut seen = Times::default();
    let mut heard = Instant::now();
    loop {
        let step = (|| {
            if let Some(e) = qmp.next_event(POLL)? {
                seen.note(&e);
                if seen.over.is_none() {
                    return Ok(None);
                }
            }
            qmp.query_migrate().map(Some)
        })();
        let info = match patiently(&mut heard, step) {
            Ok(None | Some(None)) => continue,
            Ok(Some(Some(info))) => info,
            // A QEMU of -incoming ends when its stream breaks; or its monitor was lost, and it loads on.
            Err(e) => return Err(e.into()),
        };
        progress(&info);
        match info.status {
            MigrateStatus::Completed => {
                return Ok(TargetEnd::Loaded { at_ns: seen.over.unwrap_or_else(unix_ns) });
            }
            MigrateStatus::Failed | MigrateStatus::Cancelled => {
                let why = info.error_desc.unwrap_or_else(|| "QEMU gives no reason".into());
                return Ok(TargetEnd::Failed { why });
            }
            // Once a stream has begun its source decides: it may complete at any moment, and then this is the VM.
            MigrateStatus::None | MigrateStatus::Setup if cancel.load(Ordering::Acquire) => {
                return Ok(TargetEnd::Cancelled);
            }
            _ => {}
        }
    }
}

/// Target: sees that a loaded guest stands still that is not owned here yet.
pub fn hold(qmp: &mut Qmp) -> Result<(), PlainError> {
    if qmp.query_status()?.running {
        tracing::warn!(
            "{}: its guest was let run before it was given to this host: stopped",
            qmp.path().display()
        );
        qmp.stop()?;
    }
    Ok(())
}

/// Target: lets the guest run, which is now owned here; gives the moment, Unix nanoseconds, once it is seen to run. Fine if
/// it runs already.
pub fn run(qmp: &mut Qmp) -> Result<u64, PlainError> {
    if qmp.query_status()?.running {
        return Ok(unix_ns());
    }
    qmp.drain_events()?;
    qmp.cont()?;
    let resumed = qmp.drain_events()?.into_iter().find(|e| e.name == "RESUME" && e.at_ns != 0);
    let now = qmp.query_status()?;
    if !now.running {
        return Err(not_ready(qmp, format!("its guest was continued and is {}", now.status)));
    }
    Ok(resumed.map_or_else(unix_ns, |e| e.at_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_only_moved_from_a_state_of_its_own_and_while_nobody_else_moves_it() {
        let looked = |status: &'static str, migration: &'static str| {
            let (_dir, path, _t) = crate::net::qmp::tests::serve(move |command, _| {
                Some(match command {
                    "query-status" => {
                        format!(r#"{{"return":{{"running":false,"status":"{status}"}},"id":$ID}}"#)
                    }
                    "query-migrate" => format!(r#"{{"return":{{"status":"{migration}"}},"id":$ID}}"#),
                    other => panic!("{other}: nothing is changed by looking"),
                })
            });
            let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
            look(&mut qmp).map_err(|e| e.to_string())
        };
        assert_eq!(looked("running", "none"), Ok(GuestState::Running));
        assert_eq!(looked("paused", "cancelled"), Ok(GuestState::Paused));
        assert_eq!(looked("shutdown", "failed"), Ok(GuestState::Shutdown));
        for under_way in
            ["setup", "active", "device", "pre-switchover", "cancelling", "postcopy-active", "colo"]
        {
            let e = looked("running", under_way).unwrap_err();
            assert!(e.contains("under way"), "{under_way}: {e}");
        }
        assert!(looked("postmigrate", "completed").unwrap_err().contains("elsewhere"));
        assert!(looked("save-vm", "none").unwrap_err().contains("save-vm"));
    }

    #[test]
    fn a_monitor_that_answers_late_is_waited_for_and_one_that_is_gone_is_not() {
        let timeout = || {
            let (path, command) = ("qmp".into(), "query-migrate".into());
            Err::<u8, _>(QmpError::Timeout { path, command, ms: 20_000 })
        };
        let mut heard = Instant::now();
        assert!(matches!(patiently(&mut heard, timeout()), Ok(None)));
        assert!(matches!(patiently(&mut heard, Ok(7)), Ok(Some(7))));
        let mut long_ago = Instant::now().checked_sub(SILENT).expect("the machine has run for longer");
        assert!(matches!(patiently(&mut long_ago, timeout()), Err(QmpError::Timeout { .. })));
        assert!(matches!(patiently(&mut long_ago, Ok(7)), Ok(Some(7))) && long_ago.elapsed() < SILENT);
        let gone = QmpError::Closed { path: "qmp".into(), command: "query-migrate".into() };
        assert!(patiently::<u8>(&mut heard, Err(gone)).is_err());
    }

    /// It is neither watched as ours, nor undone.
    #[test]
    fn a_migration_that_its_owner_begins_after_ours_has_failed_is_his() {
        for (theirs, state) in [("active", "running"), ("completed", "postmigrate")] {
            let asked = std::sync::atomic::AtomicUsize::new(0);
            let (_dir, path, _t) = crate::net::qmp::tests::serve(move |command, _| {
                Some(match command {
                    "query-status" => {
                        let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
                        let is = if first { "running" } else { state };
                        let answer = format!(r#"{{"return":{{"running":false,"status":"{is}"}},"id":$ID}}"#);
                        let event = r#"{"event":"MIGRATION","data":{"status":"failed"},"#;
                        let event = format!(r#"{event}"timestamp":{{"seconds":1,"microseconds":0}}}}"#);
                        if first { format!("{answer}\n{event}") } else { answer }
                    }
                    "query-migrate" => format!(r#"{{"return":{{"status":"{theirs}"}},"id":$ID}}"#),
                    other => panic!("{other}: it is somebody else's"),
                })
            });
            let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
            let guest = Cell::new(GuestState::Running);
            let mut looks = 0;
            // Watched as ours, theirs would be watched without end.
            let mut look = |_: &MigrateInfo| {
                looks += 1;
                assert!(looks < 20, "{theirs}: it is watched as ours");
            };
            let end = watch_source(&mut qmp, &guest, &AtomicBool::new(false), &|| None, &mut look);
            assert!(matches!(end, Ok(SourceEnd::Failed { .. })), "{theirs}: {end:?}");
            run_on(&mut qmp, guest.get()).unwrap();
        }
    }

    #[test]
    fn what_its_owner_makes_of_a_guest_midway_is_how_it_is_left() {
        // Run states as they are asked for, after which the migration ends so; and how the guest was left.
        for (states, ends, left) in [
            (&["running", "paused"][..], "completed", GuestState::Paused),
            (&["running", "finish-migrate"], "completed", GuestState::Running),
            (&["paused", "running"], "completed", GuestState::Running),
            (&["paused", "postmigrate"], "completed", GuestState::Paused),
            (&["running", "paused"], "failed", GuestState::Paused),
        ] {
            let asked = std::sync::atomic::AtomicUsize::new(0);
            let (_dir, path, _t) = crate::net::qmp::tests::serve(move |command, _| {
                Some(match command {
                    "query-status" => {
                        let n = asked.fetch_add(1, Ordering::Relaxed);
                        let is = states[n.min(states.len() - 1)];
                        let answer = format!(r#"{{"return":{{"running":false,"status":"{is}"}},"id":$ID}}"#);
                        let event = r#"{"event":"STOP","timestamp":{"seconds":1,"microseconds":0}}"#;
                        if n == 0 { format!("{answer}\n{event}") } else { answer }
                    }
                    "query-migrate" => format!(r#"{{"return":{{"status":"{ends}"}},"id":$ID}}"#),
                    other => panic!("{other}: nothing is changed by looking"),
                })
            });
            let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
            let guest = Cell::new(GuestState::Running);
            let end = watch_source(&mut qmp, &guest, &AtomicBool::new(false), &|| None, &mut |_| {});
            assert_eq!((end.is_ok(), guest.get()), (true, left), "{states:?} {ends}: {end:?}");
        }
    }
}
