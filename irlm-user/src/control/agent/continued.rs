//! A VM that left, whose target lost it afterwards, and whose old copy somebody has continued by hand: on its operator's
//! word it belongs here again. IRLM itself never continues an old copy: its memory is as it was when it left, and its disks
//! may have changed since. Whether the target has lost it is what `irlm settle` asks before it says that word.

use super::preflight::gather;
use super::{Code, Refusal, Reply, Role, Shared};
use crate::control::api::{Phase, VmStatus};
use crate::control::journal::{JournalState, VmRecord};
use crate::core::handover::GuestState;
use crate::flow::{Front, unix_ns};

/// What is said of such a VM from then on.
const WHY: &str = "continued here by hand after it had moved, and settled so";

/// Whether the record says that its VM has left.
pub(super) fn has_left(r: &VmRecord) -> bool {
    (r.role, r.state) == (Role::Source, JournalState::Done)
}

/// How the VM stands by that word, if it was said after the status of its thread was final.
pub(super) fn with_word(mut v: VmStatus, r: &VmRecord) -> VmStatus {
    if (v.role, v.phase, r.state) == (Role::Source, Phase::Done, JournalState::Aborted) {
        v.phase = Phase::Failed;
        r.guest.name().clone_into(&mut v.state);
        v.running_ns = 0;
        v.error.clone_from(&r.why);
    }
    v
}

impl Shared {
    /// Takes the old copy for the VM again, if it runs and nothing newer is known of its process. It is written before it is
    /// said, and nothing is done to the process.
    pub(super) fn continued(&self, mut r: VmRecord) -> Result<Reply, Refusal> {
        let vm = r.vm.clone();
        let refuse = |what: String| Err(Refusal::new(Code::NotNow, format!("{vm} {what}")));
        let elsewhere = format!("has left with group {} for {}", r.group, r.peer);
        if !self.registry.act_on(&r) {
            return refuse(format!("{elsewhere}, and a later group has had its process in hand since"));
        }
        if self.registry.lives(&r) != Some(true) {
            return refuse(format!("{elsewhere}, and its old process has ended: there is no copy here"));
        }
        let found = match gather(&r.front, self.timeouts.setup) {
            Ok(found) => found,
            Err(e) => {
                return refuse(format!("{elsewhere}, and its old copy does not say how it stands: {e}"));
            }
        };
        let state = GuestState::parse(&found.state).filter(|s| s.runs());
        let Some(state) = state.filter(|_| found.process == r.process) else {
            let advice = match r.front {
                Front::Qmp(_) => {
                    ". If it is to be the VM all the same, `cont` it on its own monitor, and say this again"
                }
                // One that has given its VM up does not run it again.
                Front::Vmm(_) => "",
            };
            return refuse(format!(
                "{elsewhere}, and its old copy here is {}: IRLM does not continue it, because its memory is as it was when it \
                 left, and its disks may have changed since{advice}",
                found.state
            ));
        };
        (r.state, r.settled, r.guest) = (JournalState::Aborted, true, state);
        (r.at_ns, r.why) = (unix_ns(), Some(WHY.to_owned()));
        if let Err(e) = self.registry.put(&mut r) {
            return Err(Refusal::new(Code::Failed, format!("{vm}: {e}")));
        }
        tracing::warn!("{vm}: {WHY} (group {})", r.group);
        let line =
            format!("{vm} runs there, as its old copy was continued: what it did at its target is lost");
        Ok(Reply::Settled { line, done: true })
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::status_of;
    use super::*;
    use crate::control::journal::tests::record;

    #[test]
    fn what_is_written_after_the_end_is_what_is_said() {
        let left = record("g", "v", Role::Source, JournalState::Done);
        let back = VmRecord {
            state: JournalState::Aborted,
            why: Some(WHY.into()),
            guest: GuestState::Suspended,
            ..left.clone()
        };
        assert!(has_left(&left) && !has_left(&back));
        assert!(!has_left(&record("g", "v", Role::Target, JournalState::Running)));
        let moved = status_of(&left);
        assert_eq!(with_word(moved.clone(), &left), moved);
        let now = with_word(moved, &back);
        assert_eq!((now.phase, &*now.state, now.running_ns), (Phase::Failed, "suspended", 0));
        assert_eq!(now.error.as_deref(), Some(WHY));
    }
}
