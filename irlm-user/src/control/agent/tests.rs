//! An agent's requests and what it keeps, without QEMU: monitors that answer everything, or nothing.

use super::super::api::{Decision, HistoryRow, Request, StartPart, VmSpec};
use super::super::registry::Registry;
use super::keeper::KEEP;
use super::*;
use crate::control::journal::tests::record as journal_record;
use crate::control::recipe::{Rack, Recipe, Sharing};
use crate::flow::Front;
use crate::host::sched::{BootId, Process};
use crate::net::connection::Security;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

pub(super) fn agent(dir: &Path) -> Arc<Shared> {
    let text = format!(
        "name = \"a\"\ncontrol = \"127.0.0.1:1\"\ndata = \"127.0.0.1:2\"\nstate_dir = {dir:?}\nbpf = false\n\
         [prepare]\npopulate = false\nidle = false\n[allow]\nsockets = [\"/**\"]"
    );
    let config: AgentConfig = toml::from_str(&text).unwrap();
    let classifier = Classifier::disabled("test");
    let tagger = Box::new(share::PortTags(classifier.clone()));
    Arc::new(Shared {
        registry: Registry::open(dir).unwrap(),
        door: Arc::default(),
        keys: None,
        security: Security::Plain,
        timeouts: Timeouts {
            setup: Duration::from_millis(500),
            peer: Duration::from_millis(500),
            ..Timeouts::default()
        },
        tags: Arc::new(crate::flow::NoTags),
        shaper: Shaper::start(None, dir, None, tagger),
        classifier,
        tracer: crate::host::dirty::Tracer::disabled("test"),
        observing: Mutex::new(()),
        sockets: dir.join("sock"),
        windows: Arc::default(),
        contents: purse::Purse::new(config.contents_mib << 20),
        tables: purse::Purse::new(config.tables_mib << 20),
        sharing: Mutex::default(),
        groups: Mutex::default(),
        quota: GROUPS,
        recalled: Mutex::default(),
        drill: crate::flow::source::Drill::default(),
        config,
    })
}

/// Who asks in tests.
pub(super) fn nobody() -> Owner {
    Owner::Named("nobody".into())
}

impl Shared {
    pub(super) fn does(self: &Arc<Self>, request: Request) -> Result<Reply, Refusal> {
        self.handle(request, &nobody())
    }
}

/// A monitor that says yes to everything, to one after another.
fn monitor(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        while let Ok((mut s, _)) = listener.accept() {
            let version = r#"{"qemu":{"micro":0,"minor":0,"major":10},"package":""}"#;
            let greeting = format!(r#"{{"QMP":{{"version":{version},"capabilities":[]}}}}"#);
            if writeln!(s, "{greeting}").is_err() {
                continue;
            }
            for line in BufReader::new(s.try_clone().unwrap()).lines().map_while(Result::ok) {
                let v: serde_json::Value = serde_json::from_str(&line).unwrap();
                if writeln!(s, "{}", serde_json::json!({ "return": {}, "id": v["id"] })).is_err() {
                    break;
                }
            }
        }
    });
}

/// A group of one VM that leaves from `monitor`, from QEMU to QEMU.
pub(super) fn spec(name: &str, run: u8, monitor: &Path) -> GroupSpec {
    let mut spec = recover::spec_of(
        &toml::from_str(
            "name = \"a\"\ncontrol = \"127.0.0.1:1\"\ndata = \"127.0.0.1:2\"\nstate_dir = \"/x\"",
        )
        .unwrap(),
        &[journal_record(name, "v", Role::Source, JournalState::Started)],
    );
    spec.token = Token([run; 32]);
    let Recipe::Proxied(p) = &mut spec.recipe else { panic!("{:?}", spec.recipe) };
    p.sharing = Sharing::Rack(Rack {
        index: SocketAddr::from(([127, 0, 0, 1], 9)),
        models: false,
        direct: crate::core::direct::Direct::Always,
        multicast: None,
    });
    spec.vms[0] = VmSpec {
        source_front: Front::Qmp(monitor.into()),
        target_front: Front::Qmp(monitor.into()),
        ..spec.vms[0].clone()
    };
    spec
}

fn prepare(agent: &Arc<Shared>, spec: GroupSpec) -> Result<Reply, Refusal> {
    agent.does(Request::Prepare { spec: Box::new(spec) })
}

fn prepared(agent: &Arc<Shared>, name: &str) -> PrepareStatus {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match agent.does(Request::PrepareStatus { group: name.into() }) {
            Ok(Reply::Prepare(p)) if p.phase == PreparePhase::Preparing && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(Reply::Prepare(p)) => return p,
            other => panic!("{other:?}"),
        }
    }
}

fn code(answer: Result<Reply, Refusal>) -> Code {
    answer.unwrap_err().code
}

/// A process that has ended.
pub(super) fn gone() -> Option<Process> {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let p = Process::of(child.id()).unwrap_or(Process {
        pid: child.id(),
        started: 1,
        boot_id: BootId::default(),
    });
    child.wait().unwrap();
    Some(p)
}

fn put_record(agent: &Shared, role: Role, state: JournalState, settled: bool) -> VmRecord {
    let mut r = VmRecord { process: gone(), settled, ..journal_record("g", "v", role, state) };
    r.leave_paused = false;
    agent.registry.put(&mut r).unwrap();
    r
}

fn rows(agent: &Arc<Shared>, group: &str) -> Vec<HistoryRow> {
    match agent.does(Request::History { group: Some(group.into()) }) {
        Ok(Reply::History { rows, .. }) => rows,
        other => panic!("{other:?}"),
    }
}

fn phases(agent: &Arc<Shared>, group: &str) -> Vec<(Phase, Option<String>)> {
    match agent.does(Request::Status { group: Some(group.into()) }) {
        Ok(Reply::Status { groups, .. }) => {
            groups[0].vms.iter().map(|v| (v.phase, v.error.clone())).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn of_two_preparations_of_one_name_that_come_at_a_time_one_is_refused() {
    for _ in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let agent = agent(dir.path());
        let path = dir.path().join("q");
        let _never_greets = UnixListener::bind(&path).unwrap();
        let start = std::sync::Barrier::new(4);
        let answers: Vec<_> = std::thread::scope(|s| {
            let calls: Vec<_> = (0..4u8)
                .map(|run| {
                    let (agent, start, spec) = (&agent, &start, spec("g", run, &path));
                    s.spawn(move || {
                        start.wait();
                        prepare(agent, spec)
                    })
                })
                .collect();
            calls.into_iter().map(|c| c.join().unwrap()).collect()
        });
        let taken = answers.iter().filter(|a| a.is_ok()).count();
        let refused = answers.iter().filter(|a| a.as_ref().is_err_and(|e| e.code == Code::Conflict)).count();
        assert_eq!((taken, refused), (1, 3), "{answers:?}");
    }
}

#[test]
fn a_preparation_that_failed_leaves_nothing_and_the_next_one_just_works() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    prepare(&agent, spec("g", 1, &path)).unwrap();
    let failed = prepared(&agent, "g");
    assert_eq!(failed.phase, PreparePhase::Failed);
    assert!(failed.problem.unwrap().contains("q"));
    assert_eq!(agent.registry.records(None), []);
    monitor(&path);
    prepare(&agent, spec("g", 2, &path)).unwrap();
    assert_eq!(prepared(&agent, "g").phase, PreparePhase::Ready);
}

#[test]
fn of_a_group_of_which_one_vm_cannot_be_taken_in_hand_none_is() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    monitor(&path);
    let mut typo = spec("g", 1, &path);
    let front = Front::Qmp(dir.path().join("typo"));
    let v = typo.vms[0].clone();
    typo.vms.push(VmSpec {
        ix: v.ix + 1,
        name: "w".into(),
        source_front: front.clone(),
        target_front: front,
        ..v
    });
    prepare(&agent, typo).unwrap();
    let failed = prepared(&agent, "g");
    assert!(failed.phase == PreparePhase::Failed && failed.problem.unwrap().contains("typo"));
    assert_eq!(agent.registry.records(None), []);
    // Under another name, so that nothing but the claim could stand in its way.
    prepare(&agent, spec("other", 2, &path)).unwrap();
    assert_eq!(prepared(&agent, "other").phase, PreparePhase::Ready);
}

#[test]
fn two_groups_never_have_one_process_in_hand_and_what_is_not_started_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    monitor(&path);
    prepare(&agent, spec("one", 1, &path)).unwrap();
    assert_eq!(prepared(&agent, "one").phase, PreparePhase::Ready);
    prepare(&agent, spec("two", 2, &path)).unwrap();
    let refused = prepared(&agent, "two");
    let why = refused.problem.unwrap();
    assert!(refused.phase == PreparePhase::Failed && why.contains("\"one\" has it in hand"), "{why}");
    let cancel = Request::Cancel { group: "one".into() };
    agent.does(cancel.clone()).unwrap();
    assert_eq!(code(agent.does(cancel)), Code::NotNow, "it is over");
    prepare(&agent, spec("two", 3, &path)).unwrap();
    assert_eq!(prepared(&agent, "two").phase, PreparePhase::Ready);
    // Nobody starts it.
    let now = Instant::now();
    agent.look_after_groups(now);
    agent.look_after_groups(now + Duration::from_millis(spec("two", 3, &path).timeouts.prepare_ms + 1));
    assert_eq!(agent.registry.records(None), []);
    assert_eq!(code(agent.does(Request::PrepareStatus { group: "two".into() })), Code::UnknownGroup);
}

#[test]
fn a_vm_that_has_moved_is_not_prepared_again() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    monitor(&path);
    let mut moved = VmRecord {
        process: Some(Process::of(std::process::id()).unwrap()),
        settled: true,
        ..journal_record("before", "v", Role::Source, JournalState::Done)
    };
    agent.registry.put(&mut moved).unwrap();
    prepare(&agent, spec("again", 1, &path)).unwrap();
    let why = prepared(&agent, "again").problem.unwrap();
    assert!(why.contains("v: already moved"), "{why}");
    assert_eq!(agent.registry.records(None), [moved]);
}

#[test]
fn a_start_is_refused_when_the_claims_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    monitor(&path);
    prepare(&agent, spec("g", 1, &path)).unwrap();
    assert_eq!(prepared(&agent, "g").phase, PreparePhase::Ready);
    agent.registry.release("g", &Token([1; 32]), "v", Role::Source);
    let start = agent.does(Request::Start {
        group: "g".into(),
        leave_paused: false,
        incoming: vec![],
        part: StartPart::Both,
    });
    assert_eq!(code(start), Code::Conflict);
    assert!(!agent.group("g").unwrap().started.load(Ordering::Acquire));
}

/// Also where the group's own addresses are all allowed.
#[test]
fn a_start_is_refused_that_would_send_a_vm_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let path = dir.path().join("q");
    monitor(&path);
    let group = spec("g", 1, &path);
    prepare(&agent, group.clone()).unwrap();
    assert_eq!(prepared(&agent, "g").phase, PreparePhase::Ready);
    let addr = "127.0.0.77:17888".parse().unwrap();
    let start = agent.does(Request::Start {
        group: "g".into(),
        leave_paused: false,
        incoming: vec![Incoming { vm: group.vms[0].ix, addr }],
        part: StartPart::Both,
    });
    assert_eq!(code(start), Code::OffLimits);
    assert!(!agent.group("g").unwrap().started.load(Ordering::Acquire));
}

#[test]
fn a_group_that_is_over_is_answered_from_its_records() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    put_record(&agent, Role::Source, JournalState::Done, true);
    recover::recover(&agent);
    assert!(lock(&agent.groups).is_empty(), "it is history");
    assert_eq!(phases(&agent, "g"), [(Phase::Done, None)]);
    let row = rows(&agent, "g").remove(0);
    assert_eq!((row.outcome.as_str(), row.over, row.alive), ("moved", true, Some(false)));
    let of = |group: &str| group.to_owned();
    assert_eq!(code(agent.does(Request::Cancel { group: of("g") })), Code::NotNow);
    agent.does(Request::Forget { group: of("g") }).unwrap();
    for request in [
        Request::Cancel { group: of("x") },
        Request::Forget { group: of("x") },
        Request::History { group: Some(of("x")) },
        Request::Status { group: Some(of("x")) },
    ] {
        assert_eq!(code(agent.does(request)), Code::UnknownGroup);
    }
}

#[test]
fn a_decision_at_a_source_that_was_taken_up_is_carried_out_and_the_group_is_forgotten_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let r = put_record(&agent, Role::Source, JournalState::GaveUp, false);
    recover::recover(&agent);
    let settle = |decision| agent.does(Request::Settle { group: "g".into(), vm: "v".into(), decision });
    assert_eq!(code(settle(Decision::Run)), Code::UnknownGroup, "it is no target of it");
    match settle(Decision::Discard).unwrap() {
        Reply::Settled { done: true, line } => assert!(line.contains("given up"), "{line}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(agent.registry.get("g", &r.token, "v", Role::Source).unwrap().state, JournalState::Done);
    // Again: it is so. The contrary: too late.
    assert!(matches!(settle(Decision::Discard), Ok(Reply::Settled { done: true, .. })));
    assert_eq!(code(settle(Decision::Resume)), Code::NotNow);
    let until = Instant::now() + Duration::from_secs(10);
    while !agent.settled(&agent.group("g").unwrap()) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    let now = Instant::now();
    agent.look_after_groups(now);
    assert!(agent.group("g").is_ok(), "whoever watches still sees its counters");
    agent.look_after_groups(now + KEEP);
    assert!(agent.group("g").is_err());
    assert_eq!(phases(&agent, "g"), [(Phase::Done, None)]);
}

#[test]
fn groups_share_the_agents_memory_and_give_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let half_left = || agent.tables.take(u64::MAX).bytes() >> 20;
    let before = half_left();
    let spec = |name| {
        let mut spec = spec(name, 1, dir.path());
        spec.targets = vec![spec.targets[0].clone(); 2];
        spec
    };
    let works: Vec<_> = ["g", "h", "i"]
        .map(|name| {
            let spec = spec(name);
            inpath::InPath::new(&agent, (&spec, spec.recipe.proxied().unwrap()), &Arc::default()).unwrap()
        })
        .into();
    // Each took half of what there was: two target hosts want 6 GiB.
    assert_eq!((before, half_left()), (4096, 512));
    works[0].let_go();
    assert_eq!(half_left(), 512 + 2048);
    drop(works);
    assert_eq!(half_left(), before);
    // A store is of the same kind, and so is what is kept at both ends.
    let contents = agent.contents.take(agent.config.store_mib << 20);
    assert_eq!(contents.bytes() >> 20, 4096);
    assert!(agent.contents.take(agent.config.store_mib << 20).bytes() >> 20 < 4096);
}

#[test]
fn a_departure_that_never_began_is_over_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let r = put_record(&agent, Role::Source, JournalState::Started, false);
    assert!(!r.begun);
    recover::recover(&agent);
    let now = agent.registry.get("g", &r.token, "v", Role::Source).unwrap();
    assert_eq!(now.state, JournalState::Aborted);
    assert!(now.why.unwrap().contains("before anything moved"));
    assert_eq!(phases(&agent, "g")[0].0, Phase::Failed);
    // Its target is never heard: nobody calls it for ever.
    let now = Instant::now();
    agent.look_after_groups(now);
    agent.look_after_groups(now + Duration::from_secs(3601));
    agent.look_after_groups(now + Duration::from_secs(3602));
    agent.look_after_groups(now + Duration::from_secs(3602) + KEEP);
    assert!(agent.group("g").is_err());
}

#[test]
fn an_arrival_that_was_never_started_is_let_go_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    put_record(&agent, Role::Target, JournalState::Started, false);
    recover::recover(&agent);
    assert!(lock(&agent.groups).is_empty());
    assert_eq!(agent.registry.records(None), []);
}

#[test]
fn an_old_record_is_history_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let mut old = put_record(&agent, Role::Source, JournalState::Aborted, false);
    let mut newer = VmRecord {
        process: old.process,
        settled: true,
        ..journal_record("later", "v", Role::Source, JournalState::Done)
    };
    agent.registry.put(&mut newer).unwrap();
    recover::recover(&agent);
    assert!(lock(&agent.groups).is_empty(), "its VM would be continued");
    old.settled = true;
    old.why = Some("a newer record is about its process".into());
    assert_eq!(agent.registry.last_run("g"), [old]);
}

#[test]
fn a_source_that_comes_late_finds_its_group_taken_up_again() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let r = put_record(&agent, Role::Target, JournalState::Running, true);
    agent.answer_late_calls();
    let recall = |token: [u8; 32]| agent.recall("g", &crate::core::wire::keys::pass(&token));
    assert!(recall([9; 32]).is_none(), "a stranger");
    let flow = recall(r.token.0).unwrap();
    assert!(flow.vm(crate::core::units::VmIx(r.ix)).is_some());
    assert!(Arc::ptr_eq(&flow, &recall(r.token.0).unwrap()), "taken up twice");
    assert!(lock(&agent.groups).is_empty(), "its name is free for the next run");
    agent.drop_recalled(Instant::now() + KEEP);
    assert!(lock(&agent.recalled).is_empty());
}

#[test]
fn what_the_journal_cannot_write_is_told_in_status() {
    let dir = tempfile::tempdir().unwrap();
    let agent = agent(dir.path());
    let mut r = put_record(&agent, Role::Source, JournalState::GaveUp, false);
    recover::recover(&agent);
    // A directory in the place of the file that is written beside it.
    std::fs::create_dir(dir.path().join("g@v@source@07070707.tmp")).unwrap();
    agent.registry.put(&mut r).unwrap_err();
    let (_, error) = phases(&agent, "g").remove(0);
    assert!(error.unwrap().contains("cannot write the record"));
    std::fs::remove_dir(dir.path().join("g@v@source@07070707.tmp")).unwrap();
    agent.registry.put(&mut r).unwrap();
    let (_, error) = phases(&agent, "g").remove(0);
    assert!(error.is_none_or(|e| !e.contains("cannot write")));
    agent.group("g").iter().for_each(|g| agent.drop_group(g));
}
