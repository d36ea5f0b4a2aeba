//! The minder and what is asked through it, on a false QEMU.

use super::*;
use crate::net::qmp::fake::FakeQemu;

/// A departure whose QEMU runs its VM, and what it has written down.
struct Bench {
    qemu: FakeQemu,
    monitor: Monitor,
    shared: Arc<SourceVmShared>,
    notes: Vec<SourceNote>,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(status: &str, before: Before) -> Self {
        let (qemu, dir, path) = FakeQemu::start(status);
        let shared = Arc::new(SourceVmShared::new().unwrap());
        let monitor = Monitor::new(&path, Duration::from_secs(5), &shared, before);
        Self { qemu, monitor, shared, notes: Vec::new(), _dir: dir }
    }

    fn set_up(&mut self, into: Into) -> Result<Qmp, MoveError> {
        let notes = &mut self.notes;
        self.monitor.set_up(300, into, &mut |n| {
            notes.push(n);
            Ok(())
        })
    }

    fn begin(&mut self, into: Into) {
        let qmp = self.set_up(into).unwrap();
        let notes = &mut self.notes;
        let mut note = |n| {
            notes.push(n);
            Ok(())
        };
        self.monitor.begin(qmp, "irlm", (300, into), &mut note).unwrap();
    }

    /// What it hears next from the minder, other than how fast it is.
    fn hears(&self) -> Says {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            match self.shared.inbox.take() {
                Some(Input::Qemu(says)) => return says,
                Some(other) => panic!("{other:?}"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        panic!("nothing was said");
    }

    /// Its capabilities and parameters.
    fn found(&self) -> (Value, Value) {
        let is = self.qemu.is();
        (is.capabilities.clone(), is.parameters.clone())
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.qemu.is().told)
    }
}

const RUN: GuestState = GuestState::Running;

#[test]
fn what_is_found_is_written_down_before_it_is_changed_and_put_back_at_the_end() {
    let mut b = Bench::new("running", Before::default());
    let (caps, params) = b.found();
    let qemu = b.qemu.clone();
    let mut notes = Vec::new();
    let set_up = b.monitor.set_up(300, Into::Agent, &mut |n| {
        if let SourceNote::Settings(_) = &n {
            assert_eq!(qemu.is().capabilities, caps, "noted first");
        }
        notes.push(n);
        Ok(())
    });
    drop(set_up.unwrap());
    assert!(matches!(&notes[..], [SourceNote::Process(_), SourceNote::Guest(RUN), SourceNote::Settings(_)]));
    assert_eq!(b.qemu.is().capabilities["multifd"], false);
    assert_eq!(b.qemu.is().parameters["downtime-limit"], 300);
    b.monitor.restore();
    assert_eq!(b.found(), (caps.clone(), params.clone()));

    // By an agent after this one, which has nothing but the record; and after a first try that failed.
    b.set_up(Into::Agent).map(drop).unwrap();
    let Some(SourceNote::Settings(found)) = b.notes.pop() else { panic!("{:?}", b.notes) };
    let before = Before { settings: Some(found), begun: true, ..Before::default() };
    let mut later = Monitor::new(&b.monitor.path.clone(), Duration::from_secs(5), &b.shared, before);
    let refusing = b.qemu.clone();
    refusing.is().refuses.push(("migrate-set-capabilities", "There's a migration process in progress"));
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        refusing.is().refuses.clear();
    });
    later.restore();
    assert_eq!(b.found(), (caps, params));
}

#[test]
fn settings_are_put_back_through_the_thread_that_has_the_monitor_and_stay_so() {
    let mut b = Bench::new("running", Before::default());
    let params = b.qemu.is().parameters.clone();
    b.begin(Into::Agent);
    b.qemu.migration("cancelled");
    b.monitor.restore();
    // What would have been a reason to set another downtime limit.
    for _ in 0..30 {
        b.shared.stream_bytes.fetch_add(50_000_000, Ordering::Relaxed);
        b.shared.wire_bytes.fetch_add(1_000_000, Ordering::Relaxed);
        b.shared.work.sent(0, 0, 1_000_000, 1_000_000);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(b.qemu.is().parameters, params);
}

/// A departure to another QEMU has failed, and its owner was quicker with a save than this program with the settings.
fn in_the_way() -> (Bench, (Value, Value)) {
    let mut b = Bench::new("running", Before::default());
    let found = b.found();
    b.begin(Into::Qemu);
    assert_eq!(b.qemu.is().capabilities["pause-before-switchover"], true);
    b.qemu.is().refuses.push(("migrate-set-capabilities", "There's a migration process in progress"));
    (b, found)
}

#[test]
fn an_owner_s_save_that_stands_still_because_of_our_settings_is_freed_and_they_are_put_back_after_it() {
    let (mut b, found) = in_the_way();
    b.qemu.migration("active");
    b.monitor.restore();
    let frees = |t: &String| t == "migrate_cancel" || t == "migrate-continue";
    assert!(!b.told().iter().any(frees), "it has not stopped yet");
    b.qemu.migration("pre-switchover");
    let until = Instant::now() + Duration::from_secs(10);
    while !b.qemu.is().told.iter().any(frees) {
        assert!(Instant::now() < until, "it waits for leave that its owner does not know of");
        std::thread::sleep(Duration::from_millis(5));
    }
    // It would wait for a return path next.
    assert!(b.told().contains(&"migrate_cancel".to_owned()));
    b.qemu.is().refuses.clear();
    while b.found() != found {
        assert!(Instant::now() < until, "they are not put back");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn settings_are_put_back_as_soon_as_a_migration_has_failed() {
    let mut b = Bench::new("running", Before::default());
    let found = b.found();
    b.begin(Into::Qemu);
    b.qemu.migration("failed");
    let until = Instant::now() + Duration::from_secs(10);
    while b.found() != found {
        assert!(Instant::now() < until, "they wait for the departure's end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_later_departure_takes_over_what_is_to_be_put_back_and_is_not_let_go_on() {
    let (mut b, found) = in_the_way();
    b.qemu.migration("active");
    b.monitor.restore();
    // It has ended, and the next departure is there at once.
    b.qemu.migration("none");
    let mut later =
        Monitor::new(&b.monitor.path.clone(), Duration::from_secs(5), &b.shared, Before::default());
    let qmp = {
        b.qemu.is().refuses.clear();
        later.set_up(300, Into::Qemu, &mut |n| {
            b.notes.push(n);
            Ok(())
        })
    };
    drop(qmp.unwrap());
    b.qemu.is().told.clear();
    b.qemu.migration("pre-switchover");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(b.told(), Vec::<String>::new(), "it is this one's to let go on");
    b.qemu.migration("cancelled");
    later.restore();
    assert_eq!(b.found(), found);
}

#[test]
fn nothing_is_changed_at_a_qemu_whose_vm_cannot_leave() {
    for (status, migration) in [("postmigrate", "completed"), ("running", "active"), ("inmigrate", "none")] {
        let mut b = Bench::new(status, Before::default());
        b.qemu.is().migration = migration.into();
        let e = b.set_up(Into::Agent).map(drop).unwrap_err();
        assert!(e.to_string().contains(if migration == "active" { "active" } else { "it " }), "{e}");
        b.monitor.restore();
        assert_eq!((b.told().len(), b.notes.len()), (0, 0), "{status}");
    }
}

#[test]
fn it_is_written_down_that_a_migration_begins_before_it_does() {
    let mut b = Bench::new("running", Before::default());
    let qmp = b.set_up(Into::Agent).unwrap();
    let qemu = b.qemu.clone();
    let full = b.monitor.begin(qmp, "irlm", (300, Into::Agent), &mut |n| {
        assert_eq!(n, SourceNote::Begun);
        assert!(!qemu.is().told.contains(&"migrate".to_owned()));
        Err(MoveError::Journal { source: "disk full".into(), maybe: false })
    });
    assert_eq!(full.unwrap_err().to_string(), "disk full");
    assert!(!b.told().contains(&"migrate".to_owned()), "what is not written is not done");
    // So somebody else's is not cancelled for it.
    b.qemu.is().migration = "active".into();
    assert_eq!(b.monitor.take_back(RUN).unwrap(), Took::Stands(RUN));
    assert!(!b.told().contains(&"migrate_cancel".to_owned()));
}

/// Its owner's own, begun between the look and ours.
#[test]
fn a_migration_that_qemu_refuses_to_begin_is_not_ours_to_cancel() {
    let mut b = Bench::new("running", Before::default());
    let qmp = b.set_up(Into::Agent).unwrap();
    b.qemu.is().migration = "active".into();
    b.qemu.is().refuses.push(("migrate", "There's a migration process in progress"));
    let mut notes = Vec::new();
    let refused = b.monitor.begin(qmp, "irlm", (300, Into::Agent), &mut |n| {
        notes.push(n);
        Ok(())
    });
    assert!(refused.unwrap_err().to_string().contains("in progress"));
    assert_eq!(notes, [SourceNote::Begun, SourceNote::NotBegun]);
    assert_eq!(b.monitor.take_back(RUN).unwrap(), Took::Stands(RUN));
    assert!(!b.told().contains(&"migrate_cancel".to_owned()));
}

#[test]
fn a_migration_that_failed_is_told_when_its_vm_is_free_and_not_before() {
    let mut b = Bench::new("running", Before::default());
    b.begin(Into::Agent);
    assert_eq!(b.hears(), Says::Guest(RUN));
    b.qemu.becomes("finish-migrate", "STOP");
    assert_eq!(b.hears(), Says::Stopped(5_000_000_000));
    b.qemu.migration("failing");
    b.qemu.migration("failed");
    std::thread::sleep(Duration::from_millis(300));
    assert!(b.shared.inbox.is_empty(), "QEMU still has the VM");
    b.qemu.becomes("running", "RESUME");
    assert_eq!(b.hears(), Says::Failed);
    assert!(b.shared.inbox.is_empty(), "that it runs is what it did before");
}

#[test]
fn what_its_owner_makes_of_a_vm_in_the_middle_is_told_and_what_the_migration_does_is_not() {
    let mut b = Bench::new("paused", Before::default());
    b.begin(Into::Agent);
    assert_eq!(b.hears(), Says::Guest(GuestState::Paused));
    b.qemu.becomes("running", "RESUME");
    assert_eq!(b.hears(), Says::Guest(RUN));
    b.qemu.becomes("suspended", "SUSPEND");
    assert_eq!(b.hears(), Says::Guest(GuestState::Suspended));
    b.qemu.becomes("running", "WAKEUP");
    assert_eq!(b.hears(), Says::Guest(RUN));
    for (status, event, is) in [
        ("guest-panicked", "GUEST_PANICKED", GuestState::Panicked),
        ("io-error", "BLOCK_IO_ERROR", GuestState::IoError),
        ("watchdog", "WATCHDOG", GuestState::Watchdog),
        ("shutdown", "SHUTDOWN", GuestState::Shutdown),
    ] {
        b.qemu.becomes(status, event);
        assert_eq!(b.hears(), Says::Guest(is));
    }
    b.qemu.becomes("paused", "STOP");
    assert!(matches!(b.hears(), Says::Stopped(_)));
    assert_eq!(b.hears(), Says::Guest(GuestState::Paused));
    b.qemu.becomes("running", "RESUME");
    assert_eq!(b.hears(), Says::Guest(RUN));
    b.qemu.becomes("running", "RESET");
    b.qemu.becomes("finish-migrate", "STOP");
    assert!(matches!(b.hears(), Says::Stopped(_)));
    b.qemu.migration("completed");
    b.qemu.becomes("postmigrate", "ANY");
    assert_eq!(b.hears(), Says::Completed, "QEMU's own stop is nobody's wish, and a reset changes nothing");
    assert_eq!(b.monitor.standing().unwrap(), Standing::Completed);
}

#[test]
fn leave_that_is_refused_says_what_stands_and_one_that_is_not_answered_nothing() {
    let mut b = Bench::new("running", Before::default());
    b.begin(Into::Qemu);
    assert_eq!(b.hears(), Says::Guest(RUN));
    b.qemu.becomes("finish-migrate", "STOP");
    assert!(matches!(b.hears(), Says::Stopped(_)));
    b.qemu.migration("pre-switchover");
    assert_eq!(b.hears(), Says::Waits);
    b.qemu.is().refuses.push(("migrate-continue", "no"));
    assert!(b.monitor.go_on().unwrap_err().to_string().contains("no"), "it waits, and was not told");
    b.qemu.is().migration = "device".into();
    assert_eq!(b.monitor.go_on().unwrap(), Standing::UnderWay, "it was told before");
    b.qemu.migration("failed");
    assert!(!matches!(b.monitor.go_on(), Ok(Standing::Back(_))), "QEMU still has the VM");
    b.qemu.becomes("running", "RESUME");
    assert_eq!(b.monitor.go_on().unwrap(), Standing::Back(RUN));
    b.qemu.is().refuses.clear();
    b.qemu.is().mute.push("migrate-continue");
    let ours = b.monitor.ours.clone();
    let short = b.monitor.ask(move |q| {
        q.set_timeout(Duration::from_millis(100));
        let r = q.migrate_continue();
        q.set_timeout(Duration::from_secs(10));
        assert_ne!(ours.job(), Job::None);
        Ok(r?)
    });
    assert!(short.unwrap_err().to_string().contains("no reply"), "a time-out is no answer");
}

#[test]
fn a_qemu_is_gone_when_its_process_has_ended_and_only_then() {
    let mut b = Bench::new("running", Before::default());
    b.begin(Into::Agent);
    let path = b.monitor.path.clone();
    let own = b.monitor.process.unwrap();
    for (process, is) in [(Process { started: own.started + 1, ..own }, Some(Standing::Gone)), (own, None)] {
        let before = Before { process: Some(process), begun: true, ..Before::default() };
        // Nobody listens there.
        let mut m = Monitor::new(&path.with_extension("none"), Duration::from_millis(200), &b.shared, before);
        assert_eq!(m.standing().ok(), is);
        assert_eq!(m.take_back(RUN).ok(), is.map(|_| Took::Gone));
    }
}

#[test]
fn an_agent_after_this_one_takes_back_what_its_record_says_was_begun() {
    for begun in [true, false] {
        let mut b = Bench::new("postmigrate", Before { begun, ..Before::default() });
        b.qemu.is().migration = "completed".into();
        let took = b.monitor.take_back(RUN);
        let told = b.told();
        assert_eq!(told.contains(&"cont".to_owned()), begun, "{told:?}");
        assert_eq!(took.is_ok(), begun, "{took:?}");
        if begun {
            assert_eq!(took.unwrap(), Took::Stands(RUN));
            // The operator's own, afterwards.
            b.qemu.is().migration = "active".into();
            assert_eq!(b.monitor.take_back(RUN).unwrap(), Took::Stands(RUN));
            assert!(!b.told().contains(&"migrate_cancel".to_owned()));
        }
    }
}

/// An agent has died in the middle of a move. Into it no migration can be under way any more, into another QEMU one can.
#[test]
fn a_migration_that_goes_on_after_an_agent_died_is_its_owners_unless_it_went_to_another_qemu() {
    for direct in [false, true] {
        let mut b = Bench::new("running", Before { begun: true, ..Before::default() });
        b.qemu.is().migration = "active".into();
        b.qemu.is().capabilities["pause-before-switchover"] = direct.into();
        assert_eq!(b.monitor.take_back(RUN).unwrap(), Took::Stands(RUN));
        assert_eq!(b.told().contains(&"migrate_cancel".to_owned()), direct);
    }
}
