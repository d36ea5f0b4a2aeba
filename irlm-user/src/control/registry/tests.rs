//! The registry: which record counts, claims that meet, writes that fail, and what is kept how long.

use super::*;
use crate::control::api::Method;
use crate::control::journal::tests::{Faulty, RENAME, SYNC, WRITE, put_old, record};
use crate::host::sched::BootId;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const P: Process = Process { pid: 100, started: 1, boot_id: BootId::UNKNOWN };
const Q: Process = Process { pid: 200, started: 1, boot_id: BootId::UNKNOWN };

/// Of the processes in these tests only number 200 has ended.
fn gone(p: Process) -> bool {
    p.pid == 200
}

fn open(dir: &Path) -> Registry {
    Registry::over(Journal::open(dir).unwrap(), gone).unwrap()
}

fn rec(
    group: &str,
    run: u8,
    vm: &str,
    role: Role,
    state: JournalState,
    process: Option<Process>,
) -> VmRecord {
    VmRecord { token: Token([run; 32]), process, ..record(group, vm, role, state) }
}

fn ask<'a>(r: &'a VmRecord) -> Asker<'a> {
    Asker { group: &r.group, token: &r.token, vm: &r.vm }
}

#[test]
fn the_newest_record_about_a_process_counts_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    {
        let reg = open(dir.path());
        // Arrived here, and left again: the clock has gone back meanwhile.
        let mut came = rec("in", 1, "v", Role::Target, JournalState::Running, Some(P));
        came.at_ns = 90;
        reg.put(&mut came).unwrap();
        let mut left = rec("out", 2, "v", Role::Source, JournalState::Done, Some(P));
        left.at_ns = 10;
        reg.put(&mut left).unwrap();
        assert!(left.seq > came.seq);
    }
    let reg = open(dir.path());
    let (came, left) = (reg.last_run("in").remove(0), reg.last_run("out").remove(0));
    assert_eq!(reg.newest(&P), Some(left.clone()));
    assert!(!reg.act_on(&came), "it would be continued");
    assert!(reg.act_on(&left));
    let other = Process { started: 2, ..P };
    assert_eq!(reg.newest(&other), None);
    // The next record is newer than all that were read.
    let mut next = rec("x", 3, "w", Role::Source, JournalState::Started, Some(other));
    reg.put(&mut next).unwrap();
    assert!(next.seq > left.seq);
}

#[test]
fn what_may_be_done_with_a_process_is_what_its_newest_record_allows() {
    use JournalState as S;
    let me = rec("mine", 9, "v", Role::Source, S::Started, Some(P));
    let (src, dst) = (Role::Source, Role::Target);
    // (the newest record, settled; may leave, may arrive)
    let table = [
        (src, S::Started, false, "busy", "busy"),
        (src, S::GivingUp, false, "given up", "given up"),
        (src, S::GaveUp, false, "given up", "given up"),
        (src, S::Serving, false, "given up", "given up"),
        (src, S::TakingBack, false, "given up", "given up"),
        (src, S::Done, true, "already moved", "already moved"),
        (src, S::Aborted, false, "", "belongs here"),
        (src, S::Aborted, true, "", "belongs here"),
        (dst, S::Started, false, "not the VM", "busy"),
        (dst, S::Loaded, false, "not the VM", "busy"),
        (dst, S::Ready, false, "not the VM", "busy"),
        (dst, S::Refused, false, "not the VM", "busy"),
        (dst, S::Discarded, true, "not the VM", ""),
        (dst, S::Lost, false, "not the VM", "not the VM"),
        (dst, S::Running, false, "busy", "belongs here"),
        (dst, S::Running, true, "", "belongs here"),
        (dst, S::Fetching, false, "not whole", "belongs here"),
        (dst, S::Filled, true, "", "belongs here"),
    ];
    for (role, state, settled, leave, arrive) in table {
        let dir = tempfile::tempdir().unwrap();
        let reg = open(dir.path());
        let mut r = rec("other", 1, "v", role, state, Some(P));
        r.settled = settled;
        reg.put(&mut r).unwrap();
        for (as_role, expected) in [(src, leave), (dst, arrive)] {
            let said = match reg.standing(&Subject::of(&me), &ask(&me), as_role).allowed("v") {
                Ok(()) => String::new(),
                Err(e) => e.msg.replace("has it in hand", "busy"),
            };
            let fits = if expected.is_empty() { said.is_empty() } else { said.contains(expected) };
            assert!(fits, "{role:?} {state:?} {settled}, as {as_role:?}: {said:?}, not {expected:?}");
        }
    }
}

#[test]
fn its_own_claim_stands_against_no_group_but_against_its_other_vms() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let mine = rec("g", 1, "v", Role::Source, JournalState::Started, Some(P));
    let claimed = reg.claim(mine.clone()).unwrap();
    assert_eq!(reg.claim(mine.clone()).unwrap(), claimed);
    reg.may_leave(&Subject::of(&mine), &ask(&mine)).unwrap();
    // Two entries of one file that name one monitor.
    let twice = VmRecord { vm: "w".into(), ..mine.clone() };
    assert_eq!(reg.claim(twice).unwrap_err().code, Code::Conflict);
    // Another run of a file of that name.
    let again = VmRecord { token: Token([2; 32]), ..mine.clone() };
    assert_eq!(reg.claim(again.clone()).unwrap_err().code, Code::Conflict);
    reg.release("g", &mine.token, "v", Role::Source);
    assert_eq!(reg.newest(&P), None);
    reg.claim(again).unwrap();
}

#[test]
fn of_many_that_claim_one_process_at_a_time_one_gets_it() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let start = std::sync::Barrier::new(8);
    let got: Vec<bool> = std::thread::scope(|s| {
        let claims: Vec<_> = (0..8u8)
            .map(|n| {
                let role = if n % 2 == 0 { Role::Source } else { Role::Target };
                let r = rec("g", n, "v", role, JournalState::Started, Some(P));
                let (reg, start) = (&reg, &start);
                s.spawn(move || {
                    start.wait();
                    reg.claim(r).is_ok()
                })
            })
            .collect();
        claims.into_iter().map(|c| c.join().unwrap()).collect()
    });
    assert_eq!(got.iter().filter(|g| **g).count(), 1, "{got:?}");
    assert_eq!(reg.records(None).len(), 1);
}

#[test]
fn a_claim_with_which_something_was_begun_is_not_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let mut r = reg.claim(rec("g", 1, "v", Role::Source, JournalState::Started, Some(P))).unwrap();
    r.begun = true;
    reg.put(&mut r).unwrap();
    reg.release("g", &r.token, "v", Role::Source);
    assert_eq!(reg.newest(&P), Some(r));
}

#[test]
fn what_was_known_of_a_process_is_not_forgotten_by_a_later_record() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let mut r = rec("g", 1, "v", Role::Source, JournalState::Started, Some(P));
    r.begun = true;
    r.settings = Some(crate::net::qmp::settings::Settings::default());
    reg.put(&mut r).unwrap();
    let mut end = rec("g", 1, "v", Role::Source, JournalState::Done, None);
    reg.put(&mut end).unwrap();
    assert_eq!((end.process, end.begun, end.settings), (Some(P), true, r.settings));
    assert_eq!(reg.newest(&P).unwrap().state, JournalState::Done);
}

#[test]
fn a_record_that_could_not_be_written_is_not_believed_and_not_ruled_out() {
    for step in [WRITE, RENAME, SYNC] {
        let dir = tempfile::tempdir().unwrap();
        let at = Arc::new(AtomicU32::new(0));
        let journal = Journal::open(dir.path()).unwrap().on(|disk| Box::new(Faulty { disk, at: at.clone() }));
        let reg = Registry::over(journal, gone).unwrap();
        let mut r = rec("in", 1, "v", Role::Target, JournalState::Running, Some(P));
        r.settled = true;
        reg.put(&mut r).unwrap();
        let me = rec("out", 2, "v", Role::Source, JournalState::Started, Some(P));
        reg.may_leave(&Subject::of(&me), &ask(&me)).unwrap();
        // To be fetched after all, and perhaps on disk: it may not leave before that is known.
        at.store(step, Ordering::SeqCst);
        let mut fetching = VmRecord { state: JournalState::Fetching, settled: false, ..r.clone() };
        reg.put(&mut fetching).unwrap_err();
        let unsure = step != WRITE;
        assert_eq!(reg.may_leave(&Subject::of(&me), &ask(&me)).is_err(), unsure, "step {step}");
        assert!(reg.problem("in", &r.token, "v", Role::Target).unwrap().contains("cannot write"));
        // Nor is anybody let in meanwhile by a claim that is not on disk.
        let claim = rec("c", 3, "w", Role::Source, JournalState::Started, Some(Q));
        assert_eq!(reg.claim(claim).unwrap_err().code, Code::Failed);
        assert_eq!(reg.newest(&Q), None);
        at.store(0, Ordering::SeqCst);
        reg.put(&mut r).unwrap();
        reg.may_leave(&Subject::of(&me), &ask(&me)).unwrap();
        assert_eq!(reg.problem("in", &r.token, "v", Role::Target), None);
    }
}

#[test]
fn where_a_process_is_not_known_its_place_and_identity_stand_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let identity =
        |uuid: &str| Identity { uuid: uuid.into(), name: String::new(), machine: String::new(), memory: 1 };
    let mut r = rec("g", 1, "v", Role::Source, JournalState::Done, Some(P));
    r.identity = Some(identity("a"));
    reg.put(&mut r).unwrap();
    let mut me = rec("h", 2, "v", Role::Source, JournalState::Started, None);
    let moved = |me: &VmRecord| reg.may_leave(&Subject::of(me), &ask(me)).is_err();
    assert!(moved(&me));
    me.identity = Some(identity("a"));
    assert!(moved(&me));
    me.identity = Some(identity("b"));
    assert!(!moved(&me), "another VM at that place");
    me.identity = None;
    me.front = Front::Qmp("/run/other".into());
    assert!(!moved(&me));
    // The record's process has ended: whoever is there now is another.
    me.front = r.front.clone();
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    reg.put(&mut VmRecord { process: Some(Q), ..r }).unwrap();
    reg.may_leave(&Subject::of(&me), &ask(&me)).unwrap();
}

#[test]
fn history_is_bounded_and_what_lives_or_is_open_stays() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let day = 24 * 3600 * 1_000_000_000u64;
    let over = |vm: &str, process, at_ns| VmRecord {
        settled: true,
        at_ns,
        ..rec("g", 1, vm, Role::Source, JournalState::Done, process)
    };
    for mut r in [
        over("old", Some(Q), day),
        over("lives", Some(P), day),
        VmRecord { settled: false, ..over("open", Some(Q), day) },
        over("new", Some(Q), 99 * day),
    ] {
        reg.put(&mut r).unwrap();
    }
    reg.prune(100 * day);
    let mut names: Vec<_> = reg.records(None).into_iter().map(|r| r.vm).collect();
    names.sort();
    assert_eq!(names, ["lives", "new", "open"]);
    drop(reg);
    // At a start, which is long after all of them.
    let mut names: Vec<_> = open(dir.path()).records(None).into_iter().map(|r| r.vm).collect();
    names.sort();
    assert_eq!(names, ["lives", "open"]);
}

#[test]
fn records_of_an_earlier_version_get_the_new_form_and_older_rank() {
    let dir = tempfile::tempdir().unwrap();
    let old = put_old(dir.path(), "v", "aborted", false);
    {
        let reg = open(dir.path());
        assert!(!old.exists());
        let r = reg.last_run("g").remove(0);
        assert_eq!((r.seq, r.process), (0, Some(Process { pid: 5, started: 6, boot_id: BootId::UNKNOWN })));
        let mut later = rec("h", 2, "v", Role::Source, JournalState::Done, r.process);
        later.at_ns = 1;
        reg.put(&mut later).unwrap();
        assert!(!reg.act_on(&r), "it would be continued");
    }
    assert_eq!(open(dir.path()).records(None).len(), 2);
}

#[test]
fn a_closed_run_is_history_and_no_newer_than_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let mut r = rec("g", 1, "v", Role::Source, JournalState::Aborted, Some(P));
    reg.put(&mut r).unwrap();
    let mut later = rec("h", 2, "v", Role::Source, JournalState::Done, Some(P));
    reg.put(&mut later).unwrap();
    reg.close("g", &r.token, "forgotten");
    let closed = reg.last_run("g").remove(0);
    assert!(closed.is_over() && closed.why.as_deref() == Some("forgotten"));
    assert_eq!(reg.newest(&P), Some(later));
}

#[test]
fn the_last_word_about_a_place_outlives_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let mut first = rec("a", 1, "v", Role::Target, JournalState::Running, Some(Q));
    let mut last = rec("b", 2, "v", Role::Source, JournalState::Done, Some(Q));
    let mut other = rec("c", 3, "w", Role::Source, JournalState::Started, Some(P));
    other.front = Front::Qmp("/run/other".into());
    for r in [&mut first, &mut last, &mut other] {
        reg.put(r).unwrap();
    }
    assert_eq!((reg.last_at(&last.front), reg.lives(&last)), (Some(last.clone()), Some(false)));
    assert_eq!(reg.last_at(&other.front), Some(other));
    assert_eq!(reg.last_at(&Front::Vmm("/run/q".into())), None);
    assert_eq!((reg.last_of("v", Role::Source), reg.last_of("v", Role::Target)), (Some(last), Some(first)));
    assert_eq!(reg.last_of("w", Role::Target), None);
}

#[test]
fn a_qemu_that_a_plain_group_let_go_may_listen_already_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let reg = open(dir.path());
    let let_go = |method, role, process| {
        let r = VmRecord { method, ..rec("g", 1, "v", role, JournalState::Started, Some(process)) };
        reg.claim(r.clone()).unwrap();
        reg.release("g", &r.token, "v", role);
    };
    let_go(Method::Gm, Role::Target, P);
    let_go(Method::Oc, Role::Source, P);
    assert!(!reg.may_listen(&P));
    let_go(Method::Oc, Role::Target, P);
    assert!(reg.may_listen(&P) && reg.newest(&P).is_none());
    // One that began to wait and to which nothing came.
    let other = Process { pid: 300, ..P };
    let mut r = VmRecord {
        method: Method::Oc,
        ..rec("h", 2, "v", Role::Target, JournalState::Discarded, Some(other))
    };
    reg.put(&mut r).unwrap();
    assert!(reg.may_listen(&other));
    r.state = JournalState::Running;
    reg.put(&mut r).unwrap();
    assert!(!reg.may_listen(&other));
}
