//! Watches a QEMU that loads its VM straight from the source's QEMU (mirror of `flow::source::direct`): its monitor is heard
//! for the end of the loading, and the source hears meanwhile that this side is there.

use super::back::{Sender, say};
use super::{Input, TargetVmShared};
use crate::core::wire::frame::Kind;
use crate::flow::{HEARTBEAT, Tagged, lock};
use crate::net::qmp::{MigrateStatus, Qmp};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an event is waited for before somebody who wants the monitor is looked for.
const LISTEN: Duration = Duration::from_millis(20);

/// The thread that has the monitor while QEMU loads.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Qmp>,
    /// Of QEMU's connection.
    _tag: Tagged,
}

impl Watch {
    pub(super) fn start(
        qmp: Qmp,
        tag: Tagged,
        sender: &Sender,
        shared: &Arc<TargetVmShared>,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (own, sender, shared) = (stop.clone(), sender.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name("irlm-load".into())
            .spawn(move || listen(qmp, &own, &sender, &shared))?;
        Ok(Self { stop, thread, _tag: tag })
    }

    /// Ends the watching; gives the monitor back.
    pub(super) fn end(self) -> Option<Qmp> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok()
    }
}

/// That a VM could not be loaded, in QEMU's own words if it has any.
pub(super) fn could_not_load(why: Option<String>) -> String {
    match why {
        Some(why) => format!("the target QEMU could not load the VM: {why}"),
        None => "the target QEMU could not load the VM".to_owned(),
    }
}

fn listen(mut qmp: Qmp, stop: &AtomicBool, sender: &Sender, shared: &TargetVmShared) -> Qmp {
    let mut beat = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if beat.elapsed() >= HEARTBEAT {
            beat = Instant::now();
            // A source that was lost may call again.
            let _ = say(sender, Kind::Heartbeat, &[], &[]);
        }
        let input = match qmp.next_event(LISTEN) {
            Ok(Some(e)) => match e.migration_status() {
                Some(MigrateStatus::Completed) => Input::Loaded,
                Some(MigrateStatus::Failed | MigrateStatus::Cancelled) => {
                    let why = qmp.query_migrate().ok().and_then(|m| m.error_desc);
                    Input::LoadFailed(could_not_load(why))
                }
                _ => continue,
            },
            Ok(None) => continue,
            Err(e) if e.is_closed() => {
                // What dies later is found when the VM is to run.
                if lock(&shared.status).loaded_ns == 0 {
                    shared.inbox.post(Input::LoadFailed(
                        "the target QEMU ended before all was loaded: its own log says why".into(),
                    ));
                }
                break;
            }
            Err(e) => {
                tracing::warn!("{e}");
                continue;
            }
        };
        shared.inbox.post(input);
    }
    qmp
}
