//! Facts as they are refused or taken, against states that real QEMUs are in, and a monitor that answers
//! like one.

use super::super::tests::{agent, gone, spec as of_one};
use super::*;
use crate::control::api::{Method, Request, Token};
use crate::control::journal::tests::record as journal_record;
use crate::control::recipe::{Proxied, Recipe, Sharing};
use std::io::{BufRead as _, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};

fn spec() -> GroupSpec {
    let text = "name='g'\nindex='127.0.0.1:9'\n[[source]]\nname='s'\nagent='127.0.0.1:1'\n[[source]]\nname='s2'\n\
                agent='127.0.0.1:3'\ndata='127.0.0.1:4'\n[[target]]\nname='t'\nagent='127.0.0.1:5'\ndata='127.0.0.1:6'\n\
                [[target]]\nname='t2'\nagent='127.0.0.1:7'\ndata='127.0.0.1:8'\n[[vm]]\nname='v'\nsource='s'\ntarget='t'\n\
                source_qmp='/a'\ntarget_qmp='/b'\n";
    let config = crate::control::config::GroupConfig::parse(text).unwrap();
    let plan = crate::control::coordinator::plan::Plan::new(config, None).unwrap();
    plan.agents.iter().find(|a| a.name == "s").unwrap().spec.clone()
}

/// The same, past the agents.
fn always(spec: &GroupSpec) -> GroupSpec {
    let mut spec = spec.clone();
    if let Recipe::Proxied(Proxied { sharing: Sharing::Rack(r), .. }) = &mut spec.recipe {
        r.direct = Direct::Always;
    }
    spec
}

/// The same, by plain QEMU.
fn plain(spec: &GroupSpec) -> GroupSpec {
    GroupSpec { method: Method::Oc, recipe: Recipe::Plain { multifd: false }, ..spec.clone() }
}

/// The same, with memory compared.
fn in_ram(spec: &GroupSpec) -> GroupSpec {
    let mut spec = spec.clone();
    if let Recipe::Proxied(p) = &mut spec.recipe {
        p.verify = Pages::Ram;
    }
    spec
}

#[test]
fn memory_that_is_to_be_compared_must_be_readable() {
    let (spec, me) = (spec(), Process::of(std::process::id()).unwrap());
    let (qemu, vmm) = (Front::Qmp("/a".into()), Front::Vmm("/a".into()));
    let nobody = Process { pid: u32::MAX, ..me };
    assert_eq!(unreadable(&qemu, Some(me), &in_ram(&spec)), None);
    for process in [None, Some(nobody)] {
        let says = unreadable(&qemu, process, &in_ram(&spec));
        assert!(says.is_some_and(|s| s.contains("pages = \"ram\"")), "{process:?}");
        // Nobody asked, or it hands its memory out.
        assert_eq!(unreadable(&qemu, process, &spec), None);
        assert_eq!(unreadable(&qemu, process, &plain(&in_ram(&spec))), None);
        assert_eq!(unreadable(&vmm, process, &in_ram(&spec)), None);
    }
}

fn at(state: &str, migration: &str) -> Facts {
    Facts { state: state.into(), migration: migration.into(), ..Facts::default() }
}

#[test]
fn a_source_is_refused_unless_its_owner_has_it_and_nobody_moves_it() {
    let spec = spec();
    for good in
        [at("running", ""), at("paused", "failed"), at("shutdown", "none"), at("running", "completed")]
    {
        assert_eq!(refusals(Role::Source, &good, &spec), Vec::<String>::new(), "{good:?}");
    }
    for (bad, says) in [
        (at("postmigrate", "completed"), "IRLM knows nothing of"),
        (at("inmigrate", ""), "\"inmigrate\""),
        (at("save-vm", ""), "\"save-vm\""),
        (at("running", "active"), "somebody else's migration"),
        (at("running", "cancelling"), "somebody else's migration"),
        (
            Facts { blocked: vec!["device 0000:00:05.0/vfio".into()], ..at("running", "") },
            "cannot migrate: device",
        ),
        (Facts { jobs: vec!["snapshot-save s".into()], ..at("running", "") }, "a job of its QEMU"),
        (Facts { lacks_pages: true, ..at("running", "") }, "whole"),
        (Facts { virtio_mem: true, ..at("running", "") }, "direct = \"always\""),
    ] {
        let lines = refusals(Role::Source, &bad, &spec);
        assert!(lines.len() == 1 && lines[0].contains(says), "{bad:?}: {lines:?}");
    }
    let mem = Facts { virtio_mem: true, ..at("running", "") };
    let direct = always(&spec);
    let oc = plain(&spec);
    assert!(refusals(Role::Source, &mem, &direct).is_empty() && refusals(Role::Source, &mem, &oc).is_empty());
    // A mirror of its disks may belong to a plain move.
    let job = Facts { jobs: vec!["mirror d0".into()], ..at("running", "") };
    assert!(refusals(Role::Source, &job, &plain(&self::spec())).is_empty());
    // All of it, not only the first.
    let both =
        Facts { virtio_mem: true, blocked: vec!["x".into(), "y".into()], ..at("postmigrate", "active") };
    assert_eq!(refusals(Role::Source, &both, &self::spec()).len(), 5);
}

#[test]
fn a_target_is_refused_unless_it_waits_and_nobody_feeds_it() {
    let spec = spec();
    assert!(refusals(Role::Target, &at("inmigrate", ""), &spec).is_empty());
    for bad in [at("running", ""), at("paused", ""), at("inmigrate", "setup"), at("inmigrate", "active")] {
        let lines = refusals(Role::Target, &bad, &spec);
        assert!(lines.len() == 1 && lines[0].contains("-S -incoming defer"), "{bad:?}: {lines:?}");
        assert!(!lines[0].contains("start"), "nobody is to replace the one that is there: {lines:?}");
    }
}

#[test]
fn a_target_that_somebody_else_told_where_to_listen_is_refused_by_every_method() {
    let spec = spec();
    let direct = always(&spec);
    let oc = plain(&spec);
    let listens = |migration: &str, ours| Facts { listens: true, ours, ..at("inmigrate", migration) };
    // QEMU 7.2 has no status for it, later ones say `setup`.
    for migration in ["", "setup"] {
        for spec in [&spec, &direct, &oc] {
            let lines = refusals(Role::Target, &listens(migration, false), spec);
            assert!(lines.len() == 1 && lines[0].contains("migrate-incoming"), "{migration:?}: {lines:?}");
        }
        // What an earlier plain group told it, the next one uses; in the path it cannot be told twice.
        assert!(refusals(Role::Target, &listens(migration, true), &oc).is_empty());
        assert_eq!(refusals(Role::Target, &listens(migration, true), &spec).len(), 1);
    }
    assert_eq!(refusals(Role::Target, &listens("active", true), &oc).len(), 1, "it is being fed");
}

/// How an agent whose newest record of `front` is this source's sees the VM `vm` there.
fn seen_at_source(record: &VmRecord, vm: &str) -> VmFacts {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let mut spec = of_one("again", 1, record.front.socket());
    (spec.my_source, spec.my_target) = (Some(0), None);
    (spec.vms[0].source_front, spec.vms[0].target_front) = (record.front.clone(), record.front.clone());
    spec.vms[0].name = vm.into();
    agent.registry.put(&mut record.clone()).unwrap();
    let answer = agent.does(Request::Preflight { spec: Box::new(spec), vms_only: false });
    match answer.unwrap() {
        Reply::Preflight(mut p) => p.vms.remove(0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vm_whose_old_process_was_ended_has_moved_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody");
    for front in [Front::Qmp(path.clone()), Front::Vmm(path)] {
        let done = VmRecord {
            process: gone(),
            settled: true,
            front,
            ..journal_record("ga", "web", Role::Source, JournalState::Done)
        };
        let seen = seen_at_source(&done, "web");
        let moved = Moved { group: "ga".into(), to: done.peer, at_ns: done.at_ns };
        assert_eq!((&*seen.state, seen.moved), ("ended", Some(moved)));
        assert_eq!(seen.refusals, Vec::<String>::new());
        let record = seen.record.unwrap();
        assert!(record.ended && !record.open && record.left_for == Some(done.peer), "{record:?}");
        // Another VM that is to be found there is not this one.
        let other = seen_at_source(&done, "db");
        assert!(other.moved.is_none() && other.refusals.len() == 1, "{other:?}");
        for state in [JournalState::Started, JournalState::Aborted, JournalState::Serving] {
            let seen = seen_at_source(&VmRecord { state, ..done.clone() }, "web");
            assert!(seen.moved.is_none() && !seen.refusals.is_empty(), "{state:?}: {seen:?}");
        }
    }
}

#[test]
fn the_old_copy_of_a_moved_vm_is_asked_how_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let _qemu = qemu(&path);
    let me = Process::of(std::process::id()).ok();
    let record = journal_record("ga", "web", Role::Source, JournalState::Done);
    let seen = seen_at_source(&VmRecord { process: me, front: Front::Qmp(path), ..record }, "web");
    assert_eq!((seen.moved.is_some(), &*seen.state, seen.process), (true, "running", me));
    assert_eq!(seen.identity.map(|i| i.name), Some("web1".to_owned()));
}

#[test]
fn records_of_one_run_are_told_from_those_of_another_and_give_no_secret_away() {
    let r = journal_record("g", "v", Role::Source, JournalState::GaveUp);
    let t = VmRecord { role: Role::Target, state: JournalState::Running, ..r.clone() };
    let (s, d) = (on_record(&r, Some(true)), on_record(&t, Some(true)));
    assert!(s.open && !d.open && s.left_for.is_none());
    assert_eq!((&s.group, &s.vm, s.run), (&d.group, &d.vm, d.run));
    let other = VmRecord { token: Token([8; 32]), ..t };
    assert_ne!(on_record(&other, None).run, d.run);
    assert_ne!(d.run, u64::from_be_bytes([7; 8]));
}

#[test]
fn a_monitor_that_does_not_greet_may_be_held_or_its_qemu_may_hang() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let _never_accepts = UnixListener::bind(&path).unwrap();
    assert!(!nobody_listens(&Front::Qmp(path.clone())) && nobody_listens(&Front::Qmp(dir.path().join("x"))));
    let why = gather(&Front::Qmp(path), Duration::from_millis(50)).unwrap_err().to_string();
    assert!(why.contains("another client") && why.contains("hangs"), "{why}");
}

#[test]
fn two_ends_that_are_not_one_vm_differ_in_words() {
    let one =
        Identity { uuid: "u1".into(), name: "web1".into(), machine: "pc-q35-7.2".into(), memory: 1 << 30 };
    assert!(one.differences(&one).is_empty());
    let unnamed = Identity { name: String::new(), ..one.clone() };
    assert!(one.differences(&unnamed).is_empty(), "what is not said is not compared");
    let other =
        Identity { uuid: "u2".into(), name: "db1".into(), machine: "pc-i440fx".into(), memory: 2 << 30 };
    let lines = one.differences(&other);
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines[1].contains("\"web1\"") && lines[1].contains("\"db1\""), "{lines:?}");
}

#[test]
fn the_ports_that_will_be_needed_are_asked_for_and_no_others() {
    let names = |s: &GroupSpec| ports(s).into_iter().map(|(what, _)| what).collect::<Vec<_>>();
    let all = spec();
    assert_eq!(
        names(&all),
        [
            "data port 127.0.0.1:6 of target host t",
            "data port 127.0.0.1:8 of target host t2",
            "data port 127.0.0.1:4 of source host s2",
            "index 127.0.0.1:9"
        ]
    );
    let direct = always(&all);
    assert_eq!(names(&direct), ["data port 127.0.0.1:6 of target host t", "index 127.0.0.1:9"]);
    let oc = plain(&all);
    assert_eq!(names(&oc), ["control port 127.0.0.1:5 of target host t"]);
    let target = GroupSpec { my_source: None, my_target: Some(0), ..all };
    assert_eq!(names(&target), ["data port 127.0.0.1:8 of target host t2"]);
}

#[test]
fn a_journal_that_takes_no_record_is_said_and_nothing_of_the_probe_stays() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(journal_takes(dir.path()), Ok(()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let gone = dir.path().join("gone");
    let e = journal_takes(&gone).unwrap_err().msg;
    assert!(e.contains("cannot be written") && e.contains("gone"), "{e}");
}

/// Answers one client like the monitor of a QEMU whose VM runs, and gives what it was asked.
fn qemu(path: &Path) -> std::thread::JoinHandle<Vec<String>> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let mut asked = Vec::new();
        // Who only looks who listens asks nothing.
        while asked.is_empty() {
            let (mut s, _) = listener.accept().unwrap();
            let version = r#"{"qemu":{"major":7,"minor":2,"micro":0}}"#;
            if writeln!(s, r#"{{"QMP":{{"version":{version},"capabilities":[]}}}}"#).is_err() {
                continue;
            }
            answer(&mut s, &mut asked);
        }
        asked
    })
}

fn answer(s: &mut UnixStream, asked: &mut Vec<String>) {
    for line in BufReader::new(s.try_clone().unwrap()).lines() {
        let Ok(line) = line else { break };
        let v: Value = serde_json::from_str(&line).unwrap();
        let command = v["execute"].as_str().unwrap().to_owned();
        let answer = match &*command {
            "query-status" => r#"{"running":true,"status":"running"}"#,
            "query-migrate" => r#"{"blocked-reasons":["no"],"socket-address":[{"type":"inet","port":"1"}]}"#,
            "query-uuid" => r#"{"UUID":"1-2"}"#,
            "query-name" => r#"{"name":"web1"}"#,
            "qom-get" => r#""pc-q35-7.2-machine""#,
            "query-memory-size-summary" => r#"{"base-memory":1024,"plugged-memory":999}"#,
            "query-memory-devices" => {
                r#"[{"type":"dimm","data":{"size":512}},{"type":"virtio-mem","data":{"size":487}}]"#
            }
            _ => "{}",
        };
        writeln!(s, r#"{{"return":{answer},"id":{}}}"#, v["id"]).unwrap();
        asked.push(command);
    }
}

#[test]
fn a_qemu_says_who_it_is_and_is_only_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let qemu = qemu(&path);
    let facts = gather(&Front::Qmp(path), Duration::from_secs(5)).unwrap();
    let identity = Identity {
        uuid: "1-2".into(),
        name: "web1".into(),
        machine: "pc-q35-7.2-machine".into(),
        memory: 1536,
    };
    assert_eq!((facts.identity, facts.virtio_mem, facts.blocked), (identity, true, vec!["no".to_owned()]));
    assert!(facts.listens, "it was told where its VM comes from");
    assert_eq!(facts.process, Process::of(std::process::id()).ok());
    let asked = qemu.join().unwrap();
    assert!(
        asked.iter().all(|c| c.starts_with("query-") || c == "qom-get" || c == "qmp_capabilities"),
        "{asked:?}"
    );
}
