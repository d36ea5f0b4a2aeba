//! One VM's departure by plain QEMU: begun, watched to its end, and, once its QEMU has completed, told to the target until
//! that one has heard.

use super::{AGAIN, Note, Phase, RELEASE, Rate, Running, Side};
use crate::control::api::{GroupSpec, Reply, Request};
use crate::control::client::AgentClient;
use crate::control::journal::JournalState;
use crate::control::plain::{self, PlainError, SourceEnd};
use crate::core::handover::GuestState;
use crate::flow::{Moment, lock, unix_ns};
use crate::net::connection::Endpoint;
use crate::net::qmp::Qmp;
use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// `to`: whether over several channels, and where the target listens.
pub(super) fn depart(spec: &GroupSpec, side: &Side, mut note: Note, to: (bool, SocketAddr), rate: &Rate) {
    if side.cancel.load(Ordering::Acquire) {
        side.look(&mut None, note.setup);
        return side.set(|s| {
            s.phase = Phase::Cancelled;
            s.error = Some("the group was cancelled before this VM began to leave".to_owned());
        });
    }
    side.set(|s| s.phase = Phase::Migrating);
    let running = Running::new(rate);
    let mut qmp = None;
    let setup = note.setup;
    let begun = side.at_monitor(&mut qmp, setup, |q| begin(spec, side, &mut note, q, to, rate.part()));
    match begun {
        Ok(()) => finish(spec, side, note, qmp, (rate, running)),
        Err(e) => {
            side.put_back(&mut qmp, setup);
            side.look(&mut qmp, setup);
            note.try_write(side, JournalState::Aborted);
            side.fail(&e.to_string());
        }
    }
}

/// After a restart of the agent: its QEMU may have gone on, or have come to an end.
pub(super) fn again(spec: &GroupSpec, side: &Side, note: Note, rate: &Rate) {
    finish(spec, side, note, None, (rate, Running::new(rate)));
}

/// From its beginning on.
fn finish(
    spec: &GroupSpec,
    side: &Side,
    mut note: Note,
    mut qmp: Option<Qmp>,
    (rate, running): (&Rate, Running<'_>),
) {
    let end = watch(side, &mut qmp, &mut note, rate, Duration::from_millis(spec.timeouts.move_ms));
    drop(running);
    side.put_back(&mut qmp, note.setup);
    if let Ok(SourceEnd::Completed { stopped, info, .. }) = end {
        side.progress(&info);
        side.set(|s| {
            s.stopped_ns = stopped.map_or(0, |m| m.unix_ns);
            s.error = None;
            s.phase = Phase::GaveUp;
        });
        if note.write(side, JournalState::GaveUp, false) {
            release(spec, side, note, qmp, stopped);
        }
        return;
    }
    side.look(&mut qmp, note.setup);
    // Before the outcome is told: the group may be dropped then, and its records go with it.
    note.try_write(side, JournalState::Aborted);
    match end {
        Ok(SourceEnd::Failed { why }) => side.fail(&why),
        Err(e) => side.fail(&e.to_string()),
        Ok(_) => side.set(|s| {
            s.phase = Phase::Cancelled;
            s.error = Some("its migration was cancelled".to_owned());
        }),
    }
}

fn begin(
    spec: &GroupSpec,
    side: &Side,
    note: &mut Note,
    qmp: &mut Qmp,
    (multifd, to): (bool, SocketAddr),
    rate: Option<u64>,
) -> Result<(), PlainError> {
    note.record.guest = plain::look(qmp)?;
    *lock(&side.kept) = Some(side.found(qmp)?);
    if !note.write(side, JournalState::Started, false) {
        let path = qmp.path().display().to_string();
        return Err(PlainError::NotReady { path, what: "the group was dropped".to_owned() });
    }
    side.set(|s| s.phase = Phase::Migrating);
    let at = plain::start(qmp, multifd, to, spec.downtime_ms, rate)?;
    side.set(|s| s.started_ns = at);
    Ok(())
}

/// Until QEMU says how it ended, over a new connection where the monitor was lost; an error is an end too. What has not
/// ended within `longest` is cancelled.
pub(super) fn watch(
    side: &Side,
    qmp: &mut Option<Qmp>,
    note: &mut Note,
    rate: &Rate,
    longest: Duration,
) -> Result<SourceEnd, PlainError> {
    let setup = note.setup;
    let (began, late) = (Instant::now(), Cell::new(false));
    loop {
        let part = || {
            if began.elapsed() >= longest && !side.cancel.swap(true, Ordering::AcqRel) {
                late.set(true);
            }
            rate.part()
        };
        let guest = Cell::new(note.guest());
        let watched = side.at_monitor(qmp, setup, |q| {
            let end = plain::watch_source(q, &guest, &side.cancel, &part, &mut |i| {
                side.progress(i);
                // After a restart it cannot be seen any more once its migration has completed.
                note.left_as(side, guest.get());
            })?;
            if !matches!(end, SourceEnd::Completed { .. }) {
                // Its owner may begin one of his own at once, and is not to meet our settings.
                side.put_back_early(q);
                plain::run_on(q, guest.get())?;
            }
            Ok(end)
        });
        note.record.guest = guest.get();
        match watched {
            // A QEMU that is told to cancel may trip over its own closed stream first, and calls that failed.
            Ok(SourceEnd::Cancelled | SourceEnd::Failed { .. }) if late.get() => {
                return Err(PlainError::NotConverged { s: longest.as_secs() });
            }
            Ok(end) => return Ok(end),
            Err(e @ PlainError::NotResumed { .. }) => return Err(e),
            Err(e) if side.is_gone() => return Err(PlainError::Ended(Box::new(e))),
            // Its migration goes on, or has ended, without anybody looking.
            Err(e) => side.set(|s| s.error = Some(e.to_string())),
        }
        if side.is_forgotten() {
            return Err(PlainError::Forgotten);
        }
        std::thread::sleep(AGAIN);
    }
}

/// Whether somebody has continued the copy here, by hand, after it was given up; an error: that cannot be seen.
pub(super) fn claimed(
    side: &Side,
    qmp: &mut Option<Qmp>,
    setup: Duration,
) -> Result<Option<String>, PlainError> {
    match side.at_monitor(qmp, setup, |q| Ok(q.query_status()?.status)) {
        Ok(status) => Ok(GuestState::parse(&status).map(|_| status)),
        Err(_) if side.is_gone() => Ok(None),
        Err(e) => Err(e),
    }
}

/// Tells the target that it may run, until it has heard. This copy never runs again, unless somebody has it do so: then the
/// target is not told.
pub(super) fn release(
    spec: &GroupSpec,
    side: &Side,
    mut note: Note,
    mut qmp: Option<Qmp>,
    stopped: Option<Moment>,
) {
    // It was seen a moment ago, and every further look would be downtime.
    let mut fresh = stopped.is_some();
    let Some(target) = spec.targets.get(usize::from(side.vm.target)) else { return };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(r) => r,
        Err(e) => return side.in_doubt(&format!("control runtime: {e}")),
    };
    let at = Endpoint { addr: target.agent, security: note.security.clone() };
    let mut client = AgentClient::new(at, RELEASE + Duration::from_secs(5));
    let (group, token, vm) = (spec.name.clone(), spec.token, side.vm.ix);
    let request = Request::Released { group, token, vm, guest: note.guest() };
    let mut by_hand = None;
    while !side.is_forgotten() {
        if !std::mem::take(&mut fresh) {
            match claimed(side, &mut qmp, note.setup) {
                // What it has done since is not at its target, whatever becomes of it here.
                Ok(state) => by_hand = state.or(by_hand),
                Err(e) => {
                    side.in_doubt(&format!("given up, and how it stands here cannot be seen: {e}"));
                    std::thread::sleep(AGAIN);
                    continue;
                }
            }
        }
        if let Some(state) = &by_hand {
            side.in_doubt(&format!(
                "it was given up, and somebody has continued it here by hand (it was {state} here): it is not let run at its \
                 target; end the QEMU of the copy that is not the VM, and continue the other"
            ));
            std::thread::sleep(AGAIN);
            continue;
        }
        match runtime.block_on(client.call(&request)) {
            Ok(Reply::Done) => {
                let (now, downtime) = (unix_ns(), stopped.map(Moment::elapsed));
                if note.write(side, JournalState::Done, true) {
                    side.set(|s| {
                        s.running_ns = now;
                        s.downtime_ns = downtime.map(|d| d.as_nanos() as u64);
                        s.error = None;
                        s.phase = Phase::Done;
                    });
                }
                return;
            }
            Ok(_) => side.in_doubt("the target's agent answers something else"),
            Err(e) => side.in_doubt(&e.to_string()),
        }
        std::thread::sleep(AGAIN);
    }
}
