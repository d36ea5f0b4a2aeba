//! A VM that has left its source in an earlier run. If its target has it, it counts as moved. If not, or if
//! its old copy runs as well, the line says what was seen at both ends: whoever reads it must not end the
//! copy that is the VM.

use crate::control::api::{Moved, VmFacts};
use crate::control::config::VmConfig;
use crate::core::handover::GuestState;
use std::net::SocketAddr;

/// Both ends of a row that has left its source.
struct Ends<'a> {
    row: &'a VmConfig,
    gone: &'a Moved,
    source: &'a VmFacts,
    target: &'a VmFacts,
}

/// What its target's process says of it if it has it, else the line. `addresses`: where the target's agent is
/// by the file.
pub(super) fn judge(
    row: &VmConfig,
    source: &VmFacts,
    target: &VmFacts,
    addresses: &[SocketAddr],
) -> Result<String, String> {
    let head = format!("vm {} ({} to {})", row.name, row.source, row.target);
    let Some(gone) = &source.moved else { return Err(format!("{head}: it has not left")) };
    let ends = Ends { row, gone, source, target };
    // The records count, not where the file says that the agent is. Older agents tell none.
    let known = source.record.is_some() && target.record.is_some();
    let same = if known { ends.same_move() } else { addresses.contains(&gone.to) };
    let arrived = target.process.is_some() && target.arrived.as_deref() == Some(&*gone.group);
    if !(same && arrived) {
        return Err(format!("{head}: {}", ends.absent()));
    }
    if runs(source) {
        return Err(format!("{head}: {}", ends.twice()));
    }
    Ok(target.state.clone())
}

fn runs(f: &VmFacts) -> bool {
    GuestState::parse(&f.state).is_some_and(GuestState::runs)
}

/// Its process, for a person who looks for it.
fn process(f: &VmFacts) -> String {
    f.process.map_or_else(String::new, |p| format!(" (process {})", p.pid))
}

impl Ends<'_> {
    /// Whether the newest records of both ends are of one run that moved one VM.
    fn same_move(&self) -> bool {
        let (Some(s), Some(t)) = (&self.source.record, &self.target.record) else { return false };
        (&s.group, &s.vm, s.run) == (&t.group, &t.vm, t.run)
    }

    /// How a person pauses the copy at the source.
    fn pause(&self) -> String {
        match (&self.row.source_qmp, &self.row.source_vmm) {
            (Some(path), _) => format!("`stop` on QEMU's monitor {}", path.display()),
            (None, Some(path)) => format!("`pause` on the control socket {}", path.display()),
            (None, None) => "on its monitor".to_owned(),
        }
    }

    /// Both are there, and the old one runs.
    fn twice(&self) -> String {
        let (s, t, gone) = (&self.row.source, &self.row.target, self.gone);
        let what = match &*self.target.state {
            "running" => {
                format!("TWO COPIES RUN, at {s}{} and at {t}{}", process(self.source), process(self.target))
            }
            "" => format!(
                "its old copy runs at {s}{}, and {t} does not say what its own does",
                process(self.source)
            ),
            state => format!("its old copy runs at {s}{}, and at {t} it is {state}", process(self.source)),
        };
        format!(
            "{what}. By the records the VM is at {t}, where group {} has moved it: pause the copy at {s} by hand, at once ({})",
            gone.group,
            self.pause()
        )
    }

    /// Its target does not have it.
    fn absent(&self) -> String {
        let gone = self.gone;
        let open = self.target.record.as_ref().is_some_and(|r| r.open && !r.ended);
        if open && (self.same_move() || self.source.record.is_none()) {
            let group = &gone.group;
            return format!(
                "group {group} is moving it right now, or is in doubt about it: wait, and see `irlm status`"
            );
        }
        let settled = self.source.record.as_ref().is_none_or(|r| !r.open);
        let settled = if settled { "" } else { " (not settled, see `irlm status`)" };
        format!(
            "it has left {} with group {} for {}{settled}; {}; {}; {}",
            self.row.source,
            gone.group,
            gone.to,
            self.at_target(),
            self.at_source(),
            self.advice()
        )
    }

    /// A VM that is in the target's very process, of which nothing is written there.
    fn unrecorded(&self) -> bool {
        self.target.history.is_none()
            && self.target.process.is_some()
            && GuestState::parse(&self.target.state).is_some()
    }

    fn went_on(&self) -> Option<(SocketAddr, &str)> {
        let r = self.target.record.as_ref()?;
        let vm = self.source.record.as_ref().map_or(&self.row.name, |s| &s.vm);
        r.left_for.filter(|_| r.vm == *vm).map(|to| (to, &*r.group))
    }

    /// Whether that is the target's socket in the file.
    fn at_its_row(&self, socket: &str) -> bool {
        let row = self.row.target_qmp.as_ref().or(self.row.target_vmm.as_ref());
        row.is_some_and(|path| path.display().to_string() == socket)
    }

    /// The process that it went to was seen to have ended.
    fn ended_there(&self) -> bool {
        self.target.record.as_ref().is_some_and(|r| r.ended) && self.same_move()
    }

    fn at_target(&self) -> String {
        let (t, f) = (&self.row.target, self.target);
        if self.unrecorded() {
            let same = match (&self.source.identity, &f.identity) {
                (Some(a), Some(b)) if a.differences(b).is_empty() => ", by all it says of itself this one",
                _ => "",
            };
            return format!(
                "host {t} has no record of it, but in what its row names there{} a VM is {}{same}",
                process(f),
                f.state
            );
        }
        if let Some((to, group)) = self.went_on() {
            return format!("it went on from host {t} to {to} with group {group}");
        }
        if self.ended_there() {
            let now = if f.process.is_some() { ", and another one is at its socket" } else { "" };
            return format!("the process that had it at host {t} has ended{now}");
        }
        match (&f.record, &f.history) {
            (Some(r), _) if self.same_move() => {
                let elsewhere =
                    if self.at_its_row(&r.socket) { String::new() } else { format!(", at {}", r.socket) };
                format!("host {t} does not have it now where its row says ({}{elsewhere})", r.says)
            }
            (Some(r), Some(says)) => {
                format!(
                    "host {t} does not have it now (its process there: {says}, vm {} of group {})",
                    r.vm, r.group
                )
            }
            (None, Some(says)) => format!("host {t} does not have it now ({says})"),
            (_, None) => format!("host {t} does not have it now, and knows nothing of it"),
        }
    }

    fn at_source(&self) -> String {
        let (s, f) = (&self.row.source, self.source);
        match &*f.state {
            "" => format!("how its old copy at {s} stands is not known"),
            "ended" => format!("its old process at {s} has ended"),
            _ if runs(f) => {
                format!("IT RUNS AT {s} now{}: somebody has continued it there by hand", process(f))
            }
            state => format!("its old copy at {s} is {state}"),
        }
    }

    fn advice(&self) -> &'static str {
        let held = GuestState::parse(&self.source.state).is_some() || self.source.state == "postmigrate";
        if runs(self.source) && self.unrecorded() && runs(self.target) {
            "two copies may run: see which one is the VM, pause the other by hand, at once, and take its row out of the file"
        } else if self.unrecorded() {
            "leave that process as it is, and take its row out of the file"
        } else if runs(self.source) && self.ended_there() {
            "if that copy is to be the VM from now on, say so: `irlm settle FILE VM --run-at source`; then it can be moved again"
        } else if runs(self.source) {
            "leave it as it is, and take its row out of the file: IRLM does not move what has left by its records"
        } else if held && self.ended_there() {
            "no copy of it runs at either: the old one is as it was when it left, and the VM's disks may have changed since: look \
             before you `cont` it, say then `irlm settle FILE VM --run-at source`, or take its row out of the file"
        } else {
            "take its row out of the file"
        }
    }
}
