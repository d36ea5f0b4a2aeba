//! What a target's agent does with a QEMU whose source has let go of it, against a monitor that refuses, and a journal that
//! cannot be written.

use super::*;
use crate::control::api::Method;
use crate::control::api::{Token, VmSpec};
use crate::flow::Front;
use crate::net::qmp::tests::serve;
use std::path::PathBuf;

/// What was done and written, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// A QEMU that has loaded everything, is paused, and refuses to be continued so many times.
fn loaded(log: &Log, refusals: u64) -> (tempfile::TempDir, PathBuf) {
    let (log, running) = (log.clone(), AtomicBool::new(false));
    let left = AtomicU64::new(refusals);
    let (dir, path, _) = serve(move |command, _| {
        let fine = r#"{"return":{},"id":$ID}"#.to_owned();
        Some(match command {
            "query-migrate" => r#"{"return":{"status":"completed"},"id":$ID}"#.to_owned(),
            "query-status" => {
                let runs = running.load(Ordering::Relaxed);
                let status = if runs { "running" } else { "paused" };
                format!(r#"{{"return":{{"running":{runs},"status":"{status}"}},"id":$ID}}"#)
            }
            "cont" if left.load(Ordering::Relaxed) > 0 => {
                left.fetch_sub(1, Ordering::Relaxed);
                lock(&log).push("refused".into());
                r#"{"error":{"class":"GenericError","desc":"Failed to get write lock"},"id":$ID}"#.to_owned()
            }
            "cont" => {
                running.store(true, Ordering::Relaxed);
                lock(&log).push("cont".into());
                fine
            }
            _ => fine,
        })
    });
    (dir, path)
}

/// A QEMU whose guest writes faster than the link takes it: it streams until it is cancelled, or five seconds.
fn endless(log: &Log) -> (tempfile::TempDir, PathBuf) {
    let (log, began, cancelled) = (log.clone(), Instant::now(), AtomicBool::new(false));
    let (dir, path, _) = serve(move |command, _| {
        Some(match command {
            "query-migrate" => {
                let status = match cancelled.load(Ordering::Relaxed) {
                    true => "cancelled",
                    false if began.elapsed() > Duration::from_secs(5) => "failed",
                    false => "active",
                };
                format!(r#"{{"return":{{"status":"{status}"}},"id":$ID}}"#)
            }
            "query-status" => r#"{"return":{"running":true,"status":"running"},"id":$ID}"#.to_owned(),
            other => {
                lock(&log).push(other.to_owned());
                cancelled.store(other == "migrate_cancel", Ordering::Relaxed);
                r#"{"return":{},"id":$ID}"#.to_owned()
            }
        })
    });
    (dir, path)
}

fn side(path: &std::path::Path) -> Arc<Side> {
    let front = Front::Qmp(path.to_owned());
    let vm = VmSpec {
        ix: 0,
        name: "v".into(),
        source: 0,
        target: 0,
        tenant: String::new(),
        source_front: front.clone(),
        target_front: front,
        identity: None,
    };
    Arc::new(Side::new(&vm, Role::Target))
}

/// A journal that fails when it is to write a state it is told, the first two times.
fn note(side: &Side, log: &Log, fails: Option<JournalState>) -> Note {
    let record = VmRecord {
        group: "g".into(),
        token: Token([7; 32]),
        method: Method::Oc,
        vm: "v".into(),
        ix: 0,
        role: Role::Target,
        state: JournalState::Started,
        peer: "127.0.0.1:1".parse().unwrap(),
        front: side.vm.target_front.clone(),
        seq: 0,
        peer_host: String::new(),
        tenant: String::new(),
        identity: None,
        begun: false,
        migration_begun: false,
        guest: GuestState::Running,
        settings: None,
        leave_paused: false,
        settled: false,
        process: None,
        started_ns: 1,
        at_ns: 2,
        why: None,
    };
    let (log, mut left) = (log.clone(), 2);
    let put: Write = Box::new(move |record, state| {
        if fails == Some(state) && left > 0 {
            left -= 1;
            lock(&log).push("disk full".into());
            return Err(JournalError {
                path: "v.json".into(),
                what: "disk full",
                source: std::io::ErrorKind::StorageFull.into(),
                maybe: false,
            });
        }
        record.state = state;
        lock(&log).push(format!("{state:?}{}", if record.settled { " settled" } else { "" }));
        Ok(())
    });
    Note { record, put, setup: Duration::from_secs(5), security: Security::Plain }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn error(side: &Side) -> String {
    lock(&side.status).error.clone().unwrap_or_default()
}

#[test]
fn a_refused_cont_is_said_as_what_it_is_and_tried_again() {
    let log = Log::default();
    let (_dir, path) = loaded(&log, 2);
    let side = side(&path);
    let note = note(&side, &log, None);
    *lock(&side.released) = Some(GuestState::Running);
    std::thread::scope(|s| {
        s.spawn(|| arrive::arrive(&side, note));
        until("the refusal", || {
            error(&side).contains("in doubt: this is the VM") && error(&side).contains("write lock")
        });
        assert_eq!(lock(&side.status).phase, Phase::InDoubt);
        until("the VM", || lock(&side.status).phase == Phase::Running);
    });
    assert_eq!(error(&side), "");
    assert_eq!(
        *lock(&log),
        ["Started", "Loaded", "Running", "refused", "refused", "cont", "Running settled"]
    );
}

#[test]
fn a_vm_is_not_continued_before_that_is_written_down() {
    let log = Log::default();
    let (_dir, path) = loaded(&log, 0);
    let side = side(&path);
    let note = note(&side, &log, Some(JournalState::Running));
    *lock(&side.released) = Some(GuestState::Running);
    std::thread::scope(|s| {
        s.spawn(|| arrive::arrive(&side, note));
        until("the failure", || error(&side).contains("written down: journal v.json: disk full"));
        until("the VM", || lock(&side.status).phase == Phase::Running);
    });
    let want = ["Started", "Loaded", "disk full", "disk full", "Running", "cont", "Running settled"];
    assert_eq!(*lock(&log), want);
}

#[test]
fn a_vm_that_its_owner_had_paused_is_not_continued_and_one_in_doubt_ends_with_its_group() {
    let log = Log::default();
    let (_dir, path) = loaded(&log, 0);
    let paused = side(&path);
    *lock(&paused.released) = Some(GuestState::Paused);
    arrive::arrive(&paused, note(&paused, &log, None));
    assert_eq!(lock(&paused.status).phase, Phase::LeftPaused);
    assert_eq!(*lock(&log), ["Started", "Loaded", "Running", "Running settled"]);
    let log = Log::default();
    let (_dir, path) = loaded(&log, u64::MAX);
    let refused = side(&path);
    *lock(&refused.released) = Some(GuestState::Running);
    std::thread::scope(|s| {
        s.spawn(|| arrive::arrive(&refused, note(&refused, &log, None)));
        until("the refusal", || error(&refused).contains("in doubt"));
        refused.forgotten.store(true, Ordering::Release);
    });
    assert_eq!(lock(&refused.status).phase, Phase::InDoubt);
}

#[test]
fn a_cancel_ends_nothing_once_all_has_come() {
    let log = Log::default();
    let (_dir, path) = loaded(&log, 0);
    let side = side(&path);
    side.cancel.store(true, Ordering::Release);
    let note = note(&side, &log, None);
    std::thread::scope(|s| {
        s.spawn(|| arrive::arrive(&side, note));
        until("the end of loading", || lock(&side.status).phase == Phase::Loaded);
        // The source had completed before it heard of the cancel.
        *lock(&side.released) = Some(GuestState::Running);
        until("the VM", || lock(&side.status).phase == Phase::Running);
    });
    assert!(lock(&log).contains(&"cont".to_owned()));
}

#[test]
fn a_move_that_does_not_end_in_its_time_is_cancelled_and_says_so() {
    let log = Log::default();
    let (_dir, path) = endless(&log);
    let side = side(&path);
    let mut note = note(&side, &log, None);
    let end = depart::watch(&side, &mut None, &mut note, &Rate::default(), Duration::from_secs(1));
    let why = end.unwrap_err().to_string();
    assert!(why.contains("not converged within 1 s"), "{why}");
    assert_eq!(*lock(&log), ["migrate_cancel", "announce-self"]);
}

/// Somebody's `cont` by hand at a source that has completed: its target is not told to run.
#[test]
fn a_vm_that_was_continued_where_it_left_is_seen_before_it_is_said_again_that_it_left() {
    for (status, seen) in [("postmigrate", None), ("running", Some("running")), ("paused", Some("paused"))] {
        let (_dir, path, _) = serve(move |command, _| {
            assert_eq!(command, "query-status");
            let runs = status == "running";
            Some(format!(r#"{{"return":{{"running":{runs},"status":"{status}"}},"id":$ID}}"#))
        });
        let side = side(&path);
        let found = depart::claimed(&side, &mut None, Duration::from_secs(5)).unwrap();
        assert_eq!(found.as_deref(), seen);
    }
}

/// Its owner's own migration is in the way, and an agent that starts meanwhile has nothing but the file.
#[test]
fn settings_that_cannot_be_put_back_at_once_are_put_back_later_and_by_the_next_agent() {
    use crate::net::qmp::fake::FakeQemu;
    let busy = ("migrate-set-parameters", "There's a migration process in progress");
    let (qemu, _dir, path) = FakeQemu::start("running");
    let settings = || {
        let is = qemu.is();
        (is.capabilities.clone(), is.parameters.clone())
    };
    let found = settings();
    let side = side(&path);
    let mut qmp = side.connect(Duration::from_secs(5)).unwrap();
    *lock(&side.kept) = Some(side.found(&mut qmp).unwrap());
    let change = || {
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        qmp.set_parameters([("downtime-limit".to_owned(), 4321.into())].into_iter().collect()).unwrap();
        qemu.is().refuses.push(busy);
    };
    let put_back = |what: &str| {
        qemu.is().refuses.clear();
        until(what, || settings() == found);
    };
    drop(qmp);
    change();
    let state = tempfile::tempdir().unwrap();
    restorer::keep_in(state.path(), Duration::from_secs(5));
    side.put_back(&mut None, Duration::from_secs(5));
    assert_ne!(settings(), found, "it refuses");
    let file = state.path().join("settings.pending");
    let left = std::fs::read(&file).expect("it is written down");
    put_back("by the agent that changed them");
    until("the file is removed", || !file.exists());
    change();
    std::fs::write(&file, left).unwrap();
    restorer::keep_in(state.path(), Duration::from_secs(5));
    put_back("by the agent after it");
}
