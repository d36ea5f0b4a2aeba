//! One VM's arrival by plain QEMU: watched until all is loaded, kept paused until its source has let go of it, then run
//! for as long as that takes.

use super::{AGAIN, Note, Phase, Side};
use crate::control::journal::JournalState;
use crate::control::plain::{self, PlainError, TargetEnd};
use crate::core::handover::GuestState;
use crate::flow::lock;
use crate::net::qmp::{MigrateStatus, Qmp};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often it is looked whether a QEMU that waits for its source's word still lives.
const LOOK: Duration = Duration::from_millis(200);

/// From where the record says on.
pub(super) fn arrive(side: &Side, mut note: Note) {
    let mut qmp = lock(&side.qmp).take();
    let setup = note.setup;
    if note.record.state != JournalState::Running {
        if !load(side, &mut note, &mut qmp) {
            return side.put_back(&mut qmp, setup);
        }
        let Some(guest) = released(side) else { return side.put_back(&mut qmp, setup) };
        note.record.guest = guest;
        if !note.write(side, JournalState::Running, false) {
            return;
        }
    }
    let guest = note.guest();
    own(side, &mut note, &mut qmp, guest);
    side.put_back(&mut qmp, setup);
}

/// Whether all has come.
fn load(side: &Side, note: &mut Note, qmp: &mut Option<Qmp>) -> bool {
    if !note.write(side, JournalState::Started, false) {
        return false;
    }
    let setup = note.setup;
    loop {
        let watched = side.at_monitor(qmp, setup, |q| {
            plain::watch_target(q, &side.cancel, &mut |i| {
                side.set(|s| {
                    s.stream_bytes = i.transferred;
                    // Until then its source may never begin, and whoever sees that lets it go.
                    let waits = matches!(i.status, MigrateStatus::None | MigrateStatus::Setup);
                    s.phase = if waits { Phase::Prepared } else { Phase::Migrating };
                });
            })
        });
        match watched {
            Ok(TargetEnd::Loaded { at_ns }) => {
                // Somebody's `cont` may have come before its source's word.
                if let Err(e) = side.at_monitor(qmp, setup, plain::hold) {
                    side.set(|s| s.error = Some(format!("how it stands cannot be seen: {e}")));
                    std::thread::sleep(AGAIN);
                    continue;
                }
                if !note.write(side, JournalState::Loaded, false) {
                    return false;
                }
                side.set(|s| {
                    s.phase = Phase::Loaded;
                    s.error = None;
                    s.ready_ns = at_ns;
                });
                return true;
            }
            Ok(TargetEnd::Failed { why }) => {
                note.try_write(side, JournalState::Discarded);
                side.fail(&why);
                return false;
            }
            Ok(TargetEnd::Cancelled) => {
                note.try_write(side, JournalState::Discarded);
                side.set(|s| {
                    s.phase = Phase::Cancelled;
                    s.error = Some("nothing has come, and its QEMU goes on waiting".to_owned());
                });
                return false;
            }
            Err(e) if side.is_gone() => {
                note.try_write(side, JournalState::Discarded);
                side.fail(&format!("its QEMU has ended: {e}"));
                return false;
            }
            // The monitor is lost or mute; its QEMU may load on.
            Err(e) => side.set(|s| s.error = Some(e.to_string())),
        }
        if side.is_forgotten() {
            return false;
        }
        std::thread::sleep(AGAIN);
    }
}

/// Waits for the source's word; until then this copy may not run. None if it is not to come.
fn released(side: &Side) -> Option<GuestState> {
    let mut looked = Instant::now();
    loop {
        if let Some(guest) = *lock(&side.released) {
            return Some(guest);
        }
        if side.is_forgotten() {
            return None;
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if side.is_gone() {
                let cancelled = side.cancel.load(Ordering::Acquire);
                side.fail("its QEMU has ended before the source let go of it");
                if cancelled {
                    side.set(|s| s.phase = Phase::Cancelled);
                }
                return None;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// This is the VM now: lets it run, unless it is to stay paused.
fn own(side: &Side, note: &mut Note, qmp: &mut Option<Qmp>, guest: GuestState) {
    if note.record.leave_paused || !guest.runs() {
        if note.write(side, JournalState::Running, true) {
            side.look(qmp, note.setup);
            side.set(|s| {
                s.phase = Phase::LeftPaused;
                s.error = None;
            });
        }
        return;
    }
    let setup = note.setup;
    loop {
        match side.at_monitor(qmp, setup, plain::run) {
            Ok(at) => {
                if note.write(side, JournalState::Running, true) {
                    side.look(qmp, setup);
                    side.set(|s| {
                        s.running_ns = at;
                        s.error = None;
                        s.phase = Phase::Running;
                    });
                }
                return;
            }
            Err(e) if side.is_gone() => {
                side.fail(&format!("this was the VM, and its QEMU has ended: {e}"));
                return side.set(|s| {
                    s.state = "ended".to_owned();
                    s.phase = Phase::Lost;
                });
            }
            Err(PlainError::NotReady { what, .. }) => {
                side.in_doubt(&format!("this is the VM, and it does not run: {what}"));
            }
            Err(e) => side.in_doubt(&format!("this is the VM, and it cannot be continued yet: {e}")),
        }
        if side.is_forgotten() {
            return;
        }
        std::thread::sleep(AGAIN);
    }
}
