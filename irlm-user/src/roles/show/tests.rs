//! What people read of a move.

use super::report::{early, hints, rows, summary, verdict, verified};
use super::status::phase_words;
use super::*;
use crate::control::api::{Phase, Role, VmStatus};
use crate::control::config::GroupConfig;
use crate::control::coordinator::report::{Report, Times};
use crate::control::coordinator::watch::{Word, judge};
use serde_json::json;

fn plan() -> Plan {
    let text = "name='g'\nmethod='oc'\n[[source]]\nname='s'\nagent='127.0.0.1:1'\n[[target]]\nname='t'\n\
                agent='127.0.0.1:2'\ndata='127.0.0.1:2'\n[[vm]]\nname='v'\nsource='s'\ntarget='t'\n\
                source_qmp='/a'\ntarget_qmp='/b'\n";
    Plan::new(GroupConfig::parse(text).unwrap(), None).unwrap()
}

fn says(role: Role, phase: Phase, state: &str) -> VmStatus {
    let status = json!({
        "ix": 0, "name": "v", "role": role, "phase": phase, "state": state,
        "ram_total": 1 << 20, "wire_bytes": 505 << 10, "waiting": 49,
    });
    serde_json::from_value(status).unwrap()
}

fn view(source: Word, target: Word) -> VmView {
    let (name, source_host, target_host) = ("v".into(), "s".into(), "t".into());
    let verdict = judge(&source, &target);
    VmView { name, source_host, target_host, source, target, verdict, already: None, reason: None }
}

fn report(v: VmView, prepare: Option<Duration>) -> Report {
    let whole = prepare.is_some();
    let times = Times { prepare, told: Duration::ZERO, watched: Duration::from_secs(3), whole };
    Report::new(&plan(), &[v], &[], times, vec![])
}

/// The report of a VM of which the agents say this, and what is said of it.
fn told(source: (Phase, &str), target: (Phase, &str)) -> (Report, String) {
    let s = Word::Now(says(Role::Source, source.0, source.1));
    let t = Word::Now(says(Role::Target, target.0, target.1));
    let r = report(view(s, t), Some(Duration::ZERO));
    let now = verdict(&r.vms[0], r.outcome);
    (r, now)
}

#[test]
fn what_was_verified_is_said_and_why_not() {
    for (proof, says) in [
        (json!({"pages": 65536}), "verified: 65536 pages of v are at their target as they were sent"),
        (
            json!({"before": 7}),
            "verified: 7 pages of v were at their target as they were sent before they ran",
        ),
        (
            json!({"ram": {"pages": 65536, "passed": 0, "clocks": 0, "unread": 0, "ms": 70}}),
            "verified: 65536 pages of v were the same in memory at both hosts while it was stopped, for 70 ms of its downtime; no agent \
             saw them pass",
        ),
        (
            json!({"ram": {"pages": 8, "passed": 9, "clocks": 2, "unread": 5, "ms": 1}}),
            "verified: 8 pages of v were the same in memory at both hosts while it was stopped, for 1 ms of its downtime; 9 are at their \
             target as they were sent; 2 of them differ, because KVM has clocks of the guest there; 5 pages were not compared",
        ),
        (json!("not-in-path"), "not verified: v: no agent saw the pages"),
        (json!("off"), "not verified: v: [verify] pages is \"off\""),
        (json!("lost"), "not verified: v: an agent was started anew"),
    ] {
        for (source, target, moved) in
            [(Phase::Done, Phase::Running, true), (Phase::Failed, Phase::Failed, false)]
        {
            let s = VmStatus {
                verified: serde_json::from_value(proof.clone()).unwrap(),
                ..self::says(Role::Source, source, "")
            };
            let t = self::says(Role::Target, target, "");
            let lines = verified(&report(view(Word::Now(s), Word::Now(t)), None));
            assert_eq!(lines.len(), usize::from(moved), "{lines:?}");
            assert!(lines.iter().all(|l| l.starts_with(says)), "{lines:?}");
        }
    }
}

#[test]
fn a_moved_vm_is_told_in_its_qemu_s_words() {
    use Phase::{Done, LeftPaused, Running};
    for (phase, state, now, status) in [
        (LeftPaused, "internal-error", "internal-error at t", "internal-error"),
        (LeftPaused, "shutdown", "shutdown at t", "shutdown"),
        (LeftPaused, "paused", "left paused at t", "left paused"),
        (LeftPaused, "", "moved to t", "left paused"),
        (Running, "paused", "paused at t", "paused"),
        (Running, "running", "running at t", "running"),
        (Running, "ended", "ended at t", "ended"),
    ] {
        assert_eq!(told((Done, ""), (phase, state)).1, now, "{phase:?} {state}");
        assert_eq!(phase_words(&says(Role::Target, phase, state)), status, "{phase:?} {state}");
    }
    assert_eq!(phase_words(&says(Role::Source, Phase::Failed, "shutdown")), "failed, shutdown");
    assert_eq!(phase_words(&says(Role::Source, Done, "postmigrate")), "done");
    assert_eq!(phase_words(&says(Role::Source, Done, "running")), "done, its old copy runs");
}

#[test]
fn pages_are_lacking_only_while_they_come() {
    use Phase::{Done, Fetching, GaveUp};
    let said = |source, waiting| {
        let (mut r, _) = told((source, ""), (Fetching, "running"));
        r.vms[0].target_status.as_mut().unwrap().waiting = waiting;
        early(&r.vms[0]).unwrap()
    };
    assert_eq!(said(GaveUp, 49), "! v is at t and lacks 49 pages of its source");
    assert_eq!(said(GaveUp, 1), "! v is at t and lacks 1 page of its source");
    for (source, waiting) in [(Done, 49), (Done, 0), (GaveUp, 0)] {
        let line = said(source, waiting);
        assert!(!line.contains("lacks") && line.contains("has yet to say"), "{line}");
    }
}

#[test]
fn a_copy_is_left_for_an_operator_only_where_there_is_one() {
    let (r, _) = told((Phase::GaveUp, ""), (Phase::Lost, "ended"));
    assert!(hints(&r)[0].contains("The copy of v that s gave up is paused there"), "{:?}", hints(&r));
    for (source, target) in [(Phase::Failed, Phase::Failed), (Phase::GaveUp, Phase::Lost)] {
        let (r, _) = told((source, "ended"), (target, ""));
        assert_eq!(hints(&r), ["Lost: no copy of it runs."]);
    }
}

#[test]
fn what_an_earlier_run_moved_has_dashes_and_what_nobody_saw_is_not_told() {
    let already = Some("running".to_owned());
    let v = VmView { already, verdict: Verdict::Moved, ..view(Word::Pending, Word::Pending) };
    let r = report(v, Some(Duration::from_millis(5)));
    let row = rows(&r).to_string();
    assert!(row.contains("already moved, running at t") && !row.contains("0 B"), "{row}");
    assert!(summary(&r).ends_with("; earlier runs had moved all of it"), "{}", summary(&r));
    // Who follows has seen no preparation, and no end that nobody told.
    let s = Word::Now(says(Role::Source, Phase::Done, ""));
    let t = Word::Now(says(Role::Target, Phase::Running, "running"));
    let line = summary(&report(view(s, t), None));
    assert!(line.ends_with("1 moved, 0 stayed, 0 in doubt"), "{line}");
}
