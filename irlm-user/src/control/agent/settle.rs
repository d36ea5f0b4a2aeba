//! An operator's word on a VM in doubt: refused unless the copy at this host is in doubt, answered by what it came to.

use super::continued::has_left;
use super::inpath::InPath;
use super::{Code, Refusal, Reply, Role, Shared, Work};
use crate::control::api::Decision;
use crate::control::journal::{JournalState, VmRecord};
use crate::flow::{lock, unix_ns};
use std::time::{Duration, Instant};

/// How long is waited for what a decision comes to.
const WAIT: Duration = Duration::from_secs(10);
/// A step of a handover under way is over sooner; one that takes longer is in doubt, whether or not the other side is heard.
const LONG_NS: u64 = 5_000_000_000;

/// What a decision would do to a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Judged {
    /// Nothing is left to do: this is how it is.
    Already(String),
    /// It may not be decided here.
    Refused(String),
    /// It is in doubt.
    Decides,
}

/// How the copy of a record stands.
#[derive(Clone, Copy, Debug)]
struct Copy<'a> {
    record: &'a VmRecord,
    /// The other side cannot be heard.
    apart: bool,
    /// Since the record was written.
    for_ns: u64,
    /// Its thread says so: the target has said that it lost the VM, or its own QEMU does not answer.
    doubt: bool,
    /// The target has said that it runs there.
    there: bool,
    /// Its process has ended.
    ended: bool,
}

impl Copy<'_> {
    fn in_doubt(&self) -> bool {
        use JournalState as S;
        let long = self.for_ns > LONG_NS;
        match (self.record.role, self.record.state) {
            (Role::Source, S::GivingUp | S::TakingBack) => self.apart || long,
            // A target that is heard and runs it keeps it, unless it says that it has lost it.
            (Role::Source, S::GaveUp | S::Serving) => self.apart || self.doubt || (long && !self.there),
            // A source that is heard decides about it.
            (Role::Target, S::Loaded | S::Ready | S::Fetching) => self.apart,
            (Role::Target, S::Refused | S::Lost) => true,
            (Role::Target, S::Running) => !self.record.settled,
            (Role::Source | Role::Target, _) => false,
        }
    }

    /// The decision is carried out: this is how it is.
    fn done(&self, decision: Decision) -> Option<String> {
        use JournalState as S;
        let (r, vm) = (self.record, &self.record.vm);
        let as_found = if r.guest.runs() { "runs" } else { "stays as its owner left it" };
        match (decision, r.role, r.state) {
            (Decision::Resume, Role::Source, S::Aborted) => Some(format!("{vm} {as_found} there")),
            (Decision::Discard, Role::Source, S::Done) => Some(format!("its copy of {vm} is given up")),
            (Decision::Discard, Role::Target, S::Discarded) => {
                Some(format!("its copy of {vm} is thrown away"))
            }
            (Decision::Discard, Role::Target, S::Lost) => Some(format!("its copy of {vm} has ended")),
            (Decision::Discard, Role::Target, S::Running | S::Filled) if self.ended => {
                Some(format!("its copy of {vm} has ended"))
            }
            (Decision::Run, Role::Target, S::Running) if r.settled && r.leave_paused => {
                Some(format!("{vm} is there, left paused"))
            }
            (Decision::Run, Role::Target, S::Running) if r.settled => Some(format!("{vm} {as_found} there")),
            (Decision::Run, Role::Target, S::Filled) => Some(format!("{vm} {as_found} there")),
            _ => None,
        }
    }

    fn judge(&self, decision: Decision) -> Judged {
        if let Some(line) = self.done(decision) {
            return Judged::Already(line);
        }
        let (r, vm) = (self.record, &self.record.vm);
        if (decision, r.role, r.state) == (Decision::Discard, Role::Target, JournalState::Running) {
            let says = crate::control::registry::outcome(r);
            return Judged::Refused(format!(
                "{vm} is not thrown away: this copy is the VM ({says}); let it run here, or end its process"
            ));
        }
        // It runs, whatever it lacks.
        let runs = decision == Decision::Discard && self.record.state == JournalState::Fetching;
        if self.in_doubt() && !runs {
            return Judged::Decides;
        }
        let says = crate::control::registry::outcome(self.record);
        Judged::Refused(format!("{vm} is not in doubt here ({says}): there is nothing to decide"))
    }
}

/// The side that a decision is for.
fn side(decision: Decision, records: &[VmRecord]) -> Option<&VmRecord> {
    let of = |role| records.iter().find(|r| r.role == role);
    match decision {
        Decision::Run => of(Role::Target),
        Decision::Resume => of(Role::Source),
        // By what this host is for that VM, whatever it is for others.
        Decision::Discard => of(Role::Target).or_else(|| of(Role::Source)),
    }
}

/// How the copy of a record stands, by the group that has it in hand if one has.
fn copy_of<'a>(record: &'a VmRecord, work: Option<&InPath>, lives: Option<bool>) -> Copy<'a> {
    let told = work.and_then(|w| w.told(&record.vm, record.role));
    Copy {
        record,
        apart: work.is_none_or(|w| w.is_apart(&record.vm, record.role)),
        for_ns: unix_ns().saturating_sub(record.at_ns),
        doubt: told.as_ref().is_some_and(|t| t.in_doubt),
        there: told.is_some_and(|t| t.there),
        ended: lives == Some(false),
    }
}

/// What is to be known of a VM that is taken back after its target may have run it.
fn aged(before: &VmRecord, decision: Decision) -> &'static str {
    if decision == Decision::Resume && before.state == JournalState::Serving {
        ", as it was when it was given up: what it did at its target since is lost"
    } else {
        ""
    }
}

impl Shared {
    /// Whether an operator's word about the copy of this record would be heard.
    pub(super) fn may_be_settled(&self, r: &VmRecord) -> bool {
        let group = lock(&self.groups).get(&r.group).cloned();
        match group.as_deref().filter(|g| g.spec.token == r.token).map(|g| &g.work) {
            Some(Work::InPath(w)) => copy_of(r, Some(w), self.registry.lives(r)).in_doubt(),
            _ => false,
        }
    }

    pub(super) fn settle(&self, name: &str, vm: &str, decision: Decision) -> Result<Reply, Refusal> {
        let group = lock(&self.groups).get(name).cloned();
        let token = group.as_ref().map(|g| g.spec.token);
        let record = || {
            let mut records = self.registry.last_run(name);
            records.retain(|r| r.vm == vm && token.is_none_or(|t| r.token == t));
            side(decision, &records).cloned()
        };
        if let Some(left) = record().filter(|r| decision == Decision::Resume && has_left(r)) {
            return self.continued(left);
        }
        let work = match group.as_deref().map(|g| &g.work) {
            Some(Work::Plain(_)) => {
                let what = "plain QEMU has no handover to settle: continue or quit the QEMU itself";
                return Err(Refusal::new(Code::NotNow, what));
            }
            Some(Work::InPath(w)) => Some(w),
            None => None,
        };
        let Some(first) = record() else {
            let known = group.is_some() || !self.registry.last_run(name).is_empty();
            let what = format!(
                "group {name:?} has no VM {vm:?} at agent {} that could be settled so",
                self.config.name
            );
            return Err(if known { Refusal::new(Code::UnknownGroup, what) } else { self.unknown(name) });
        };
        // It is written before it is done, and before `status` says it.
        let is_so = |r: &VmRecord| {
            let back = r.role == Role::Source && r.is_over();
            back || work.and_then(|w| w.told(vm, r.role)).is_none_or(|t| t.carries_out(decision))
        };
        match (copy_of(&first, work, self.registry.lives(&first)).judge(decision), work) {
            (Judged::Already(line), _) if is_so(&first) => return Ok(Reply::Settled { line, done: true }),
            (Judged::Already(_), _) => {}
            (Judged::Refused(what), _) => return Err(Refusal::new(Code::NotNow, what)),
            (Judged::Decides, None) => {
                let what = format!("{vm} is not in hand at agent {} any more", self.config.name);
                return Err(Refusal::new(Code::NotNow, what));
            }
            (Judged::Decides, Some(work)) => work.settle(vm, first.role, decision),
        }
        let until = Instant::now() + WAIT;
        loop {
            let now = record().unwrap_or_else(|| first.clone());
            if let Some(line) =
                copy_of(&now, work, self.registry.lives(&now)).done(decision).filter(|_| is_so(&now))
            {
                let line = line + aged(&first, decision);
                return Ok(Reply::Settled { line, done: true });
            }
            let status = work.and_then(|w| w.told(vm, now.role));
            if decision == Decision::Run && status.as_ref().is_some_and(|s| s.runs) {
                return Ok(Reply::Settled { line: format!("{vm} runs there"), done: true });
            }
            if Instant::now() > until {
                let why = status.map(|s| s.reason).filter(|r| !r.is_empty());
                let unwritten = self.registry.problem(name, &now.token, vm, now.role);
                let why = unwritten.or(why).unwrap_or_else(|| "nothing has been heard of it yet".into());
                let what = match decision {
                    Decision::Run => "does not run there yet",
                    Decision::Discard => "is not given up there yet",
                    Decision::Resume => "is not taken back there yet",
                };
                return Ok(Reply::Settled { line: format!("{vm} {what}: {why}"), done: false });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What a VM's thread says of it.
#[derive(Debug)]
pub(super) struct Told {
    /// It was seen here as it is to be: it runs, or stands as its owner left it.
    pub(super) runs: bool,
    /// Its phase is final: `status` says what the record says.
    pub(super) over: bool,
    /// Nobody knows here whose it is.
    pub(super) in_doubt: bool,
    /// Source: the target has said that it runs there.
    pub(super) there: bool,
    pub(super) reason: String,
}

impl Told {
    /// Whether its thread has done what its record says after that decision.
    fn carries_out(&self, decision: Decision) -> bool {
        self.over && (decision != Decision::Resume || self.runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::journal::tests::record;

    fn judge(role: Role, state: JournalState, settled: bool, apart: bool, decision: Decision) -> Judged {
        let mut r = record("g", "v", role, state);
        (r.settled, r.leave_paused) = (settled, false);
        Copy { record: &r, apart, for_ns: 0, doubt: false, there: false, ended: false }.judge(decision)
    }

    #[test]
    fn what_was_served_to_a_target_that_lost_it_may_run_at_its_source() {
        use JournalState as S;
        let serving = record("g", "v", Role::Source, S::Serving);
        let judge = |for_ns, doubt, there| {
            Copy { record: &serving, apart: false, for_ns, doubt, there, ended: false }
                .judge(Decision::Resume)
        };
        let refused = |j| matches!(j, Judged::Refused(_));
        assert_eq!(judge(0, true, true), Judged::Decides, "the target has said that it lost it");
        assert!(refused(judge(0, false, true)));
        assert!(refused(judge(LONG_NS + 1, false, true)), "it runs there, by its target's own word");
        assert_eq!(judge(LONG_NS + 1, false, false), Judged::Decides, "no word comes");
        assert!(aged(&serving, Decision::Resume).contains("when it was given up"));
        assert_eq!(aged(&serving, Decision::Discard), "");
        assert_eq!(aged(&record("g", "v", Role::Source, S::GaveUp), Decision::Resume), "");
    }

    #[test]
    fn a_copy_that_is_the_vm_is_not_thrown_away() {
        use JournalState as S;
        for (state, settled) in [(S::Running, false), (S::Running, true), (S::Fetching, false)] {
            for apart in [false, true] {
                let judged = judge(Role::Target, state, settled, apart, Decision::Discard);
                assert!(matches!(judged, Judged::Refused(_)), "{state:?}: {judged:?}");
            }
        }
        assert_eq!(judge(Role::Target, S::Refused, false, false, Decision::Discard), Judged::Decides);
        // Nor need it be, once its process has ended.
        let r = record("g", "v", Role::Target, S::Running);
        let copy = Copy { record: &r, apart: true, for_ns: 0, doubt: false, there: false, ended: true };
        assert!(matches!(copy.judge(Decision::Discard), Judged::Already(_)));
    }

    #[test]
    fn it_is_settled_when_status_says_so_too() {
        let told = |over, runs| Told { runs, over, in_doubt: false, there: false, reason: String::new() };
        assert!(!told(false, true).carries_out(Decision::Discard), "written, and not done yet");
        assert!(told(true, false).carries_out(Decision::Discard));
        assert!(!told(true, false).carries_out(Decision::Resume), "not back yet");
        assert!(told(true, true).carries_out(Decision::Resume));
    }

    #[test]
    fn only_a_copy_in_doubt_is_decided_about() {
        use Decision::{Discard, Resume, Run};
        use JournalState as S;
        let (src, dst) = (Role::Source, Role::Target);
        // In the middle of a move there is no copy that could be decided about.
        for (role, state, decision) in [
            (src, S::Started, Discard),
            (src, S::Started, Resume),
            (dst, S::Started, Run),
            (dst, S::Started, Discard),
            (dst, S::Discarded, Run),
            (src, S::Done, Resume),
            (src, S::Aborted, Discard),
            (dst, S::Filled, Discard),
        ] {
            let judged = judge(role, state, true, true, decision);
            assert!(matches!(judged, Judged::Refused(_)), "{role:?} {state:?} {decision:?}: {judged:?}");
        }
        for (role, state, decision) in [
            (src, S::GivingUp, Resume),
            (src, S::GaveUp, Discard),
            (src, S::Serving, Discard),
            (src, S::TakingBack, Resume),
            (dst, S::Loaded, Run),
            (dst, S::Ready, Discard),
        ] {
            let judged = judge(role, state, false, true, decision);
            assert_eq!(judged, Judged::Decides, "{role:?} {state:?} {decision:?}");
            let heard = judge(role, state, false, false, decision);
            assert!(matches!(heard, Judged::Refused(_)), "under way: {role:?} {state:?}: {heard:?}");
        }
        for state in [S::Refused, S::Running] {
            assert_eq!(judge(dst, state, false, false, Run), Judged::Decides);
        }
    }

    #[test]
    fn what_was_decided_before_is_said_again() {
        use JournalState as S;
        for (role, state, decision, says) in [
            (Role::Source, S::Done, Decision::Discard, "given up"),
            (Role::Source, S::Aborted, Decision::Resume, "runs there"),
            (Role::Target, S::Discarded, Decision::Discard, "thrown away"),
            (Role::Target, S::Running, Decision::Run, "runs there"),
        ] {
            match judge(role, state, true, false, decision) {
                Judged::Already(line) => assert!(line.contains(says), "{line}"),
                other => panic!("{state:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_copy_is_given_up_at_a_host_that_is_source_and_target_by_what_it_is_for_that_vm() {
        let source = record("g", "v", Role::Source, JournalState::GaveUp);
        assert_eq!(side(Decision::Discard, std::slice::from_ref(&source)), Some(&source));
        assert_eq!(side(Decision::Run, &[source]), None);
    }
}
