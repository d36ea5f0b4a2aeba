//! A QEMU that a VM arrives at, on a false monitor.

use super::*;
use crate::core::arrival::TargetHost;
use crate::core::digest::{Algorithm, Hasher};
use crate::core::units::{HostIx, VmIx};
use crate::flow::arrival::Input;
use crate::flow::arrival::peers::Peers;
use crate::flow::arrival::{ArrivalOptions, Member};
use crate::flow::{Front, NoTags, Timeouts};
use crate::net::qmp::fake::FakeQemu;

/// An arrival at a QEMU, as the agent has it.
struct Bench {
    qemu: FakeQemu,
    group: Arc<TargetGroup>,
    spec: TargetSpec,
    shared: Arc<TargetVmShared>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(status: &str, leave_paused: bool) -> Self {
        let (qemu, dir, path) = FakeQemu::start(status);
        let group = TargetGroup::new(
            Member {
                name: "g".into(),
                token: [1; 32],
                me: HostIx(0),
                hashers: vec![Hasher::new(Algorithm::Blake3, &[1; 32], "")],
            },
            TargetHost::new(1000, 1000),
            Peers::new(vec!["127.0.0.1:1".parse().unwrap()]),
            Timeouts::default(),
            Arc::new(NoTags),
            ArrivalOptions { socket_dir: dir.path().to_owned(), leave_paused, ..ArrivalOptions::default() },
        );
        let (vm, source) = (VmIx(0), HostIx(0));
        let spec = TargetSpec { vm, name: "vm".into(), source, domain: 0, front: Front::Qmp(path) };
        let shared = Arc::new(TargetVmShared::new().unwrap());
        Self { qemu, group: Arc::new(group), spec, shared, _dir: dir }
    }

    fn loader(&self) -> Qemu<'_> {
        Qemu::new(&self.group, &self.spec, &self.shared, Before::default())
    }

    /// One whose VM has been loaded.
    fn loaded(&self) -> Qemu<'_> {
        let mut loader = self.loader();
        loader.meet().unwrap();
        loader.set_up(&Sender::default(), &mut |_| Ok(())).unwrap();
        self.qemu.is().status = "paused".into();
        self.qemu.is().migration = "completed".into();
        loader
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.qemu.is().told)
    }
}

const RUN: GuestState = GuestState::Running;

#[test]
fn only_a_qemu_that_waits_is_met_and_no_other_is_ever_touched() {
    for status in ["running", "paused", "postmigrate"] {
        let b = Bench::new(status, false);
        let mut loader = b.loader();
        assert!(loader.meet().unwrap_err().to_string().contains(if status == "running" {
            "runs there"
        } else {
            status
        }));
        loader.discard().unwrap();
        loader.restore();
        assert!(b.told().is_empty());
    }
    // The counterpart: it waits, and becomes somebody else's in the meantime.
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loader();
    assert_eq!(loader.meet().unwrap().unwrap().pid, std::process::id());
    b.qemu.is().migration = "active".into();
    assert!(
        loader.set_up(&Sender::default(), &mut |_| Ok(())).unwrap_err().to_string().contains("told already")
    );
    assert!(b.told().is_empty());
}

#[test]
fn a_qemu_is_kept_from_running_by_itself_before_its_stream_begins() {
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loader();
    loader.meet().unwrap();
    let found = b.qemu.is().capabilities.clone();
    let (qemu, was) = (b.qemu.clone(), found.clone());
    let mut noted = 0;
    loader
        .set_up(&Sender::default(), &mut |n| {
            assert!(matches!(n, TargetNote::Settings(_)));
            assert_eq!(qemu.is().capabilities, was, "noted before it is changed");
            noted += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!((noted, &b.qemu.is().capabilities["late-block-activate"]), (1, &true.into()));
    assert!(b.qemu.is().stays_paused);
    assert_eq!(b.told(), ["migrate-set-capabilities", "getfd", "stop", "migrate-incoming"]);
    b.qemu.is().status = "paused".into();
    loader.restore();
    assert_eq!(b.qemu.is().capabilities, found);
}

#[test]
fn what_is_said_of_a_vm_that_is_to_run_is_what_was_seen() {
    // It runs already, whoever had it so.
    let b = Bench::new("inmigrate", true);
    let mut loader = b.loaded();
    b.qemu.is().status = "running".into();
    assert_eq!(loader.run(RUN).unwrap(), Ran::Runs);
    // It is left as was asked for.
    b.qemu.is().status = "paused".into();
    assert_eq!(loader.run(RUN).unwrap(), Ran::Paused);
    drop(loader);
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loaded();
    assert_eq!(loader.run(GuestState::Paused).unwrap(), Ran::Paused);
    assert!(!b.told().contains(&"cont".to_owned()), "its owner had paused it");
    // It cannot run before it is there: QEMU would keep the wish.
    b.qemu.is().status = "inmigrate".into();
    assert!(loader.run(RUN).unwrap_err().to_string().contains("not loaded"));
    assert!(!b.told().contains(&"cont".to_owned()));
    // Refused, then not.
    b.qemu.is().status = "paused".into();
    b.qemu.is().refuses.push(("cont", "Failed to get \"write\" lock"));
    assert_eq!(loader.run(RUN).unwrap(), Ran::Refused("Failed to get \"write\" lock".into()));
    assert!(!loader.told, "it surely did not run");
    b.qemu.is().refuses.clear();
    assert_eq!(loader.run(RUN).unwrap(), Ran::Runs);
    assert_eq!(b.told().iter().filter(|c| *c == "cont").count(), 1);
}

#[test]
fn a_qemu_that_does_not_answer_is_neither_gone_nor_refusing() {
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loaded();
    b.qemu.is().mute.push("cont");
    let short = |q: &mut Qmp| {
        q.set_timeout(Duration::from_millis(100));
        Ok(())
    };
    loader.ask(short).unwrap();
    let e = loader.run(RUN).unwrap_err().to_string();
    assert!(e.contains("no reply") && loader.told, "{e}");
    // Its process, when it has ended, says whether it may have run.
    let own = loader.process.unwrap();
    loader.process = Some(Process { started: own.started + 1, ..own });
    assert_eq!(loader.run(RUN).unwrap(), Ran::Gone { told: true });
    loader.told = false;
    assert_eq!(loader.run(RUN).unwrap(), Ran::Gone { told: false });
    loader.discard().unwrap();
}

#[test]
fn only_what_was_fed_and_never_ran_is_ended() {
    // It waits as it was found.
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loader();
    loader.meet().unwrap();
    loader.discard().unwrap();
    assert!(b.told().is_empty());
    // An agent after this one has but the record.
    let before = Before { process: loader.process, ..Before::default() };
    drop(loader);
    Qemu::new(&b.group, &b.spec, &b.shared, before.clone()).discard().unwrap();
    assert!(b.told().is_empty());
    for (status, migration, ends) in [
        ("postmigrate", "completed", false),
        ("finish-migrate", "active", false),
        ("shutdown", "completed", true),
        ("inmigrate", "failed", true),
        ("paused", "completed", true),
    ] {
        b.qemu.is().status = status.into();
        b.qemu.is().migration = migration.into();
        // The process that plays QEMU does not end.
        let e = Qemu::new(&b.group, &b.spec, &b.shared, before.clone()).discard().unwrap_err().to_string();
        assert_eq!(b.told().contains(&"quit".to_owned()), ends, "{status} {migration}: {e}");
        assert!(e.contains(if ends { "has not yet" } else { "left alone" }), "{e}");
    }
}

/// Somebody's `cont` by hand.
#[test]
fn a_vm_that_was_not_given_yet_is_stopped_when_it_runs_and_never_ended() {
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loaded();
    b.qemu.is().status = "paused".into();
    assert!(!loader.hold().unwrap());
    assert!(!b.told().contains(&"cont".to_owned()));
    b.qemu.is().status = "running".into();
    b.qemu.is().migration = "completed".into();
    assert!(loader.hold().unwrap(), "it ran");
    assert_eq!(b.qemu.is().status, "paused");
    loader.discard().unwrap();
    // Nor if it does so while its arrival is being given up.
    b.qemu.is().status = "running".into();
    let before = Before { process: loader.process, ..Before::default() };
    drop(loader);
    Qemu::new(&b.group, &b.spec, &b.shared, before).discard().unwrap();
    assert_eq!(b.qemu.is().status, "paused");
    assert!(!b.told().contains(&"quit".to_owned()), "left to who let it run");
}

#[test]
fn a_load_that_failed_is_told_in_qemus_own_words() {
    let b = Bench::new("inmigrate", false);
    let mut loader = b.loader();
    loader.meet().unwrap();
    b.qemu.is().error = Some("Unknown ramblock \"m1\"".into());
    // What plays QEMU closes its end of the stream at once.
    loader.set_up(&Sender::default(), &mut |_| Ok(())).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let why = loop {
        match b.shared.inbox.take() {
            Some(Input::LoadFailed(why)) => break why,
            Some(other) => panic!("{other:?}"),
            None => assert!(Instant::now() < until),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(why.contains("Unknown ramblock"), "{why}");
}
