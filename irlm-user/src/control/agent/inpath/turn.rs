//! Whose turn it is to leave a source host, seen from the VMs under way: how far they are, and what they leave idle
//! (`core::stagger`).

use crate::core::stagger::{Load, WATCHED, another};
use crate::core::units::PAGE_SIZE;
use crate::flow::source::SourceVmShared;
use crate::host::sched::idle_time;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What the VMs under way had used up when they began to be watched.
struct Mark {
    at: Instant,
    idle: Duration,
    used: Duration,
    held: Duration,
}

/// Watches the VMs under way.
#[derive(Default)]
pub(super) struct Turn {
    mark: Option<Mark>,
    load: Option<Load>,
}

impl Turn {
    /// The VMs under way are others now: what was seen so far says nothing of them.
    pub(super) fn changed(&mut self) {
        *self = Self::default();
    }

    /// Whether a further VM leaves beside these.
    pub(super) fn comes<'a>(
        &mut self,
        leaving: impl Iterator<Item = &'a Arc<SourceVmShared>> + Clone,
    ) -> bool {
        self.look(leaving.clone());
        another(leaving.map(|vm| passed(vm)), self.load)
    }

    fn look<'a>(&mut self, leaving: impl Iterator<Item = &'a Arc<SourceVmShared>>) {
        // Without the processors' idle time there is no saying, and VMs leave when the ones before are nearly through.
        let Ok(idle) = idle_time() else { return };
        let (mut used, mut held) = (Duration::ZERO, Duration::ZERO);
        for vm in leaving {
            let (u, h) = vm.work.held();
            (used, held) = (used + u, held + h);
        }
        let now = Mark { at: Instant::now(), idle, used, held };
        let Some(mark) = &self.mark else {
            self.mark = Some(now);
            return;
        };
        let seconds = (now.at - mark.at).as_secs_f64();
        if seconds >= WATCHED {
            let since = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64();
            let used = since(now.used, mark.used);
            // Nothing was sent: neither did the link hold anybody up.
            let held = if used > 0.0 { since(now.held, mark.held) / used } else { 0.0 };
            self.load = Some(Load { held, idle: since(now.idle, mark.idle) / seconds });
            self.mark = Some(now);
        }
    }
}

/// Which part of its pages a VM has sent.
fn passed(vm: &SourceVmShared) -> f64 {
    let st = vm.status();
    let s = &st.stats;
    let sent = s.uniform + s.unique + s.shared + s.references + s.remote_references;
    if st.ram_bytes == 0 { 0.0 } else { sent as f64 * PAGE_SIZE as f64 / st.ram_bytes as f64 }
}
