//! The methods `oc` and `qemu-multifd-zstd`: plain QEMU from host to host, driven by the same agents over the same
//! monitors, so that a comparison measures the pages' way and nothing else. Blocking; one thread a VM.
//!
//! The order of a VM: the target agent calls [`listen`], the source agent [`start`] and [`watch_source`]. With
//! `return-path` on, the source's QEMU completes only when the target's has loaded everything; completed, it never
//! runs again by itself. Then the source agent tells the target agent ([`super::api::Request::Released`]), and that
//! one calls [`run`]. If QEMU fails or is cancelled before that, it lets the guest run on at the source.

use crate::flow::unix_ns;
use crate::net::qmp::{Event, MigrateInfo, MigrateStatus, Qmp, QmpError};
use serde_json::{Map, json};
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

/// Capabilities that must be off so that runs compare: each changes what or how QEMU sends. `multifd` is set apart.
const OFF: [&str; 13] = [
    "xbzrle",
    "compress",
    "auto-converge",
    "rdma-pin-all",
    "postcopy-ram",
    "x-colo",
    "block",
    "zero-blocks",
    "pause-before-switchover",
    "background-snapshot",
    "zero-copy-send",
    "x-ignore-shared",
    "dirty-limit",
];

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
    /// A guest that should run on at its source does not.
    #[error("QMP {path}: the guest is {status} after the migration ended without success: look at it")]
    NotResumed {
        /// The monitor socket.
        path: String,
        /// QEMU's run state.
        status: String,
    },
}

/// How a source's part ended.
#[derive(Clone, Debug)]
pub enum SourceEnd {
    /// Everything is loaded at the target; this QEMU is stopped for good.
    Completed {
        /// QEMU's STOP event, Unix nanoseconds.
        stopped_ns: u64,
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
    /// It failed, or QEMU ended (as it does when a stream breaks).
    Failed {
        /// The reason.
        why: String,
    },
    /// Asked to stop waiting.
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

/// Target: makes the QEMU that waits with `-incoming defer` listen on a free port of `ip`, and tells which.
pub fn listen(qmp: &mut Qmp, multifd: bool, ip: IpAddr) -> Result<SocketAddr, PlainError> {
    configure(qmp, multifd, false)?;
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

/// Source: waits until the migration is over. `was_running`: whether the guest ran before, so that it runs on after
/// a failure. `progress` is called about five times a second; `cancel` and `rate` are looked at as often. A cancel that
/// comes too late ends as completed.
pub fn watch_source(
    qmp: &mut Qmp,
    was_running: bool,
    cancel: &AtomicBool,
    rate: &dyn Fn() -> Option<u64>,
    progress: &mut dyn FnMut(&MigrateInfo),
) -> Result<SourceEnd, PlainError> {
    let mut seen = Times::default();
    let mut asked = false;
    let mut told = rate();
    let mut heard = Instant::now();
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
        }
        if event.is_some() && seen.over.is_none() {
            continue;
        }
        let Some(info) = patiently(&mut heard, qmp.query_migrate())? else { continue };
        progress(&info);
        if !info.status.is_final() {
            continue;
        }
        for e in qmp.drain_events()? {
            seen.note(&e);
        }
        return match info.status {
            MigrateStatus::Completed => Ok(SourceEnd::Completed {
                stopped_ns: seen.stop.unwrap_or(0),
                completed_ns: seen.over.unwrap_or_else(unix_ns),
                info,
            }),
            status => {
                run_on(qmp, was_running)?;
                Ok(match status {
                    MigrateStatus::Cancelled => SourceEnd::Cancelled,
                    _ => SourceEnd::Failed {
                        why: info.error_desc.unwrap_or_else(|| {
                            "QEMU gives no reason; most often the target's QEMU ended or the link was cut"
                                .into()
                        }),
                    },
                })
            }
        };
    }
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
    stop: Option<u64>,
    over: Option<u64>,
}

impl Times {
    fn note(&mut self, e: &Event) {
        let at = if e.at_ns == 0 { unix_ns() } else { e.at_ns };
        if e.name == "STOP" {
            self.stop = Some(at);
        } else if e.migration_status().is_some_and(MigrateStatus::is_final) {
            self.over = Some(at);
        }
    }
}

/// After a failed or cancelled migration QEMU lets the guest run on by itself; sees to it that it does.
fn run_on(qmp: &mut Qmp, was_running: bool) -> Result<(), PlainError> {
    if !was_running {
        return Ok(());
    }
    let until = Instant::now() + RESUME_GRACE;
    loop {
        let s = qmp.query_status()?;
        if s.running {
            return Ok(());
        }
        if Instant::now() >= until {
            // Only a migration that did not complete gets here, so this cannot make a second running copy.
            qmp.cont()?;
            let s = qmp.query_status()?;
            if s.running {
                return Ok(());
            }
            return Err(PlainError::NotResumed { path: qmp.path().display().to_string(), status: s.status });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Target: waits until everything is loaded. `progress` is called about five times a second.
pub fn watch_target(
    qmp: &mut Qmp,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(&MigrateInfo),
) -> Result<TargetEnd, PlainError> {
    let mut seen = Times::default();
    let mut heard = Instant::now();
    loop {
        if cancel.load(Ordering::Acquire) {
            return Ok(TargetEnd::Cancelled);
        }
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
            // A QEMU of -incoming ends when its stream breaks.
            Err(e) if e.is_closed() => return Ok(TargetEnd::Failed { why: e.to_string() }),
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
            _ => {}
        }
    }
}

/// Target: lets the guest run, which is now owned here; gives the moment, Unix nanoseconds. Fine if it runs already.
pub fn run(qmp: &mut Qmp) -> Result<u64, QmpError> {
    if qmp.query_status()?.running {
        return Ok(unix_ns());
    }
    qmp.drain_events()?;
    qmp.cont()?;
    let resumed = qmp.drain_events()?.into_iter().find(|e| e.name == "RESUME" && e.at_ns != 0);
    Ok(resumed.map_or_else(unix_ns, |e| e.at_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
