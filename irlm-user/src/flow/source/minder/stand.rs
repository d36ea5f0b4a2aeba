//! How a source's QEMU stands to the migration that was begun on it, and taking its VM back from that. Both
//! say only what was seen on its monitor, and neither touches what somebody else has begun.

use crate::core::handover::{GuestState, Standing};
use crate::flow::MoveError;
use crate::net::qmp::settings::Settings;
use crate::net::qmp::{MigrateStatus, Qmp, QmpError};
use std::time::{Duration, Instant};

/// How long a VM may take to be seen as it is to be.
const TAKES: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(20);

/// What is known of the migration that a departure, or an agent before it, has begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Job {
    /// None was begun, or its VM was seen to be back.
    None,
    /// It may be under way.
    UnderWay,
    /// It may have completed, but cannot be under way: its stream went to an agent that has died.
    Cut,
    /// It was heard to fail, or to be cancelled.
    Failed,
}

impl Job {
    /// Whether a migration that is under way is somebody else's.
    fn has_ended(self) -> bool {
        matches!(self, Self::Cut | Self::Failed)
    }
}

/// A run state that QEMU's migration gives a VM: nobody's wish.
pub(super) fn is_migrations(status: &str) -> bool {
    matches!(status, "postmigrate" | "finish-migrate")
}

/// How QEMU stands. `guest`: how the owner has left the VM, as far as is known.
pub(super) fn standing(qmp: &mut Qmp, job: Job, guest: GuestState) -> Result<Standing, MoveError> {
    let info = qmp.query_migrate()?;
    let state = qmp.query_status()?;
    let seen = GuestState::parse(&state.status);
    let strange = || MoveError::Unsettled(format!("its QEMU is {} (migration: {})", state.status, info.word));
    if job == Job::None {
        return seen.map(Standing::Back).ok_or_else(strange);
    }
    match (info.status, seen) {
        // An owner's own, begun since.
        (status, Some(seen)) if job.has_ended() && status.is_busy() => Ok(Standing::Back(seen)),
        (MigrateStatus::Completed, None) if job == Job::Failed => Ok(Standing::Back(GuestState::Paused)),
        (status, None) if job == Job::Failed && status.is_busy() => Ok(Standing::Back(guest)),
        (MigrateStatus::PreSwitchover, _) if job.has_ended() => Ok(Standing::UnderWay),
        (MigrateStatus::PreSwitchover, _) => Ok(Standing::Waits),
        // Only somebody's `cont` leads out of `postmigrate`.
        (MigrateStatus::Completed, Some(seen)) => Ok(Standing::Back(seen)),
        (MigrateStatus::Completed, None) if is_migrations(&state.status) => Ok(Standing::Completed),
        (MigrateStatus::None | MigrateStatus::Failed | MigrateStatus::Cancelled, Some(seen)) => {
            Ok(Standing::Back(seen))
        }
        // A VM that did not run when its migration failed is left like this.
        (MigrateStatus::Failed | MigrateStatus::Cancelled, None) if state.status == "postmigrate" => {
            Ok(Standing::Back(guest))
        }
        // It is said to be over before QEMU has let the VM go (seen with 10.0).
        (MigrateStatus::Failed | MigrateStatus::Cancelled, None) if is_migrations(&state.status) => {
            Ok(Standing::UnderWay)
        }
        (status, _) if status.is_busy() => Ok(Standing::UnderWay),
        _ => Err(strange()),
    }
}

/// Sees that the VM is the source's again, as its owner has left it; gives the state in which it was seen. A
/// migration of somebody else is left alone, and so is a VM which stands as somebody wanted it to. `found`: the
/// settings that were changed, which may be what such a migration waits for.
pub(super) fn take_back(
    qmp: &mut Qmp,
    job: Job,
    guest: GuestState,
    found: &Settings,
) -> Result<GuestState, MoveError> {
    let begun = job != Job::None;
    let until = Instant::now() + TAKES;
    let mut cancelled = false;
    let mut refusal = String::new();
    loop {
        let info = qmp.query_migrate()?;
        let state = qmp.query_status()?;
        let seen = GuestState::parse(&state.status);
        let theirs = job.has_ended() && info.status.is_busy();
        if theirs {
            let _ = qmp.let_pass(found);
        }
        if job == Job::Failed && info.status == MigrateStatus::Completed && seen.is_none() {
            // So its owner's own migration, or save, has left it.
            return Ok(GuestState::Paused);
        }
        let busy = begun && info.status.is_busy() && !theirs;
        if busy && !cancelled {
            // `cancelled` and `failed` are final, `cancelling` and `failing` are not: it is asked until then.
            match qmp.migrate_cancel() {
                Ok(()) => cancelled = true,
                Err(e @ QmpError::Refused { .. }) => refusal = format!(": {e}"),
                Err(e) => return Err(e.into()),
            }
        } else if !busy {
            match seen {
                Some(seen) => {
                    // A target announces its cards once it has loaded, whoever runs the guest then.
                    if begun && seen.runs() {
                        qmp.announce_self();
                    }
                    return Ok(seen);
                }
                None if !begun => {
                    let why = format!("nothing was begun there, and its QEMU is {}", state.status);
                    return Err(MoveError::Refused(why));
                }
                None if !is_migrations(&state.status) => {
                    return Err(MoveError::Refused(format!("its QEMU is {}: not touched", state.status)));
                }
                None if theirs => {}
                None if guest.runs() => match qmp.cont() {
                    Ok(()) => refusal.clear(),
                    // Of one that is not finalized yet, or of a disk's lock that somebody still has.
                    Err(e @ QmpError::Refused { .. }) => refusal = format!(": {e}"),
                    Err(e) => return Err(e.into()),
                },
                // It does not run, which is all that its owner wanted.
                None if state.status == "postmigrate" => return Ok(guest),
                None => {}
            }
        }
        if Instant::now() > until {
            let still = format!("QEMU is still {} (migration: {}){refusal}", state.status, info.word);
            return Err(MoveError::Unsettled(still));
        }
        std::thread::sleep(AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::qmp::tests::serve;
    use std::sync::{Arc, Mutex};

    /// A QEMU by its two words, and what it was told to do.
    #[derive(Default)]
    struct Fake {
        migration: &'static str,
        status: &'static str,
        /// So many more times `cont` is refused.
        refuses: u32,
        told: Vec<String>,
    }

    fn with<T>(fake: Fake, ask: impl FnOnce(&mut Qmp) -> T) -> (T, Vec<String>) {
        let world = Arc::new(Mutex::new(fake));
        let w = world.clone();
        let (_dir, path, t) = serve(move |command, _| {
            let mut w = w.lock().unwrap();
            let done = r#"{"return":{},"id":$ID}"#.to_owned();
            Some(match command {
                "query-migrate" => {
                    let now = format!(r#"{{"return":{{"status":"{}"}},"id":$ID}}"#, w.migration);
                    // What does not last goes on by itself.
                    w.migration = match w.migration {
                        "cancelling" => "cancelled",
                        "failing" => "failed",
                        as_it_is => as_it_is,
                    };
                    now
                }
                "query-status" => {
                    let running = w.status == "running";
                    format!(r#"{{"return":{{"running":{running},"status":"{}"}},"id":$ID}}"#, w.status)
                }
                "announce-self" => {
                    w.told.push(command.to_owned());
                    done
                }
                "migrate_cancel" => {
                    w.told.push(command.to_owned());
                    w.migration = "cancelling";
                    done
                }
                "migrate-continue" => {
                    w.told.push(command.to_owned());
                    (w.migration, w.status) = ("completed", "postmigrate");
                    done
                }
                "cont" => {
                    w.told.push(command.to_owned());
                    if w.refuses > 0 {
                        w.refuses -= 1;
                        let desc = "Migration is not finalized yet";
                        return Some(format!(
                            r#"{{"error":{{"class":"GenericError","desc":"{desc}"}},"id":$ID}}"#
                        ));
                    }
                    w.status = "running";
                    done
                }
                _ => return None,
            })
        });
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        let answer = ask(&mut qmp);
        drop(qmp);
        t.join().unwrap();
        let told = std::mem::take(&mut world.lock().unwrap().told);
        (answer, told)
    }

    fn took(
        migration: &'static str,
        status: &'static str,
        job: Job,
        guest: GuestState,
    ) -> (String, Vec<String>) {
        let fake = Fake { migration, status, ..Fake::default() };
        let found = Settings {
            capabilities: [("pause-before-switchover".to_owned(), false)].into(),
            ..Settings::default()
        };
        let (took, told) = with(fake, |q| take_back(q, job, guest, &found));
        (took.map_or_else(|e| e.to_string(), |g| g.name().to_owned()), told)
    }

    /// QEMU 10.0 says that a migration has failed some time before it lets the VM go.
    #[test]
    fn a_vm_is_taken_back_from_a_migration_that_is_not_finalized_yet() {
        let fake = Fake { migration: "failed", status: "finish-migrate", refuses: 2, ..Fake::default() };
        let nothing = Settings::default();
        let (took, told) = with(fake, |q| take_back(q, Job::UnderWay, GuestState::Running, &nothing));
        let told = told.join(" ");
        assert_eq!((took.unwrap(), &*told), (GuestState::Running, "cont cont cont announce-self"));
    }

    #[test]
    fn only_what_was_begun_here_is_cancelled_and_continued() {
        let no: Vec<String> = vec![];
        let run = GuestState::Running;
        assert_eq!(took("active", "running", Job::None, run), ("running".into(), no.clone()));
        let (why, told) = took("completed", "postmigrate", Job::None, run);
        assert!(why.contains("nothing was begun") && told.is_empty(), "{why} {told:?}");
        // Its switches may have heard of it from a target that had loaded.
        for (migration, status, told) in [
            ("active", "running", "migrate_cancel announce-self"),
            ("pre-switchover", "finish-migrate", "migrate_cancel cont announce-self"),
            ("completed", "postmigrate", "cont announce-self"),
        ] {
            let told: Vec<String> = told.split(' ').map(str::to_owned).collect();
            assert_eq!(took(migration, status, Job::UnderWay, run), ("running".into(), told));
        }
        assert_eq!(took("failing", "running", Job::UnderWay, run).0, "running", "failing is not the end");
    }

    /// Begun by its owner after ours had failed, or after the agent had died to which ours went.
    #[test]
    fn a_migration_of_its_owner_is_neither_cancelled_nor_waited_for() {
        let run = GuestState::Running;
        for job in [Job::Cut, Job::Failed] {
            let told = vec!["announce-self".to_owned()];
            assert_eq!(took("active", "running", job, run), ("running".into(), told), "{job:?}");
        }
        // It stands still because of a setting that is not put back yet; then it completes.
        let told = vec!["migrate-continue".to_owned()];
        assert_eq!(took("pre-switchover", "finish-migrate", Job::Failed, run), ("paused".into(), told));
        assert_eq!(took("completed", "postmigrate", Job::Failed, run), ("paused".into(), vec![]));
        // Ours may have completed into an agent that died then.
        let (state, told) = took("completed", "postmigrate", Job::Cut, run);
        assert_eq!((&*state, &*told.join(" ")), ("running", "cont announce-self"));
    }

    #[test]
    fn a_vm_that_its_owner_stopped_is_not_continued() {
        for (status, guest) in [
            ("paused", GuestState::Running),
            ("paused", GuestState::Paused),
            ("shutdown", GuestState::Running),
            ("postmigrate", GuestState::Paused),
        ] {
            let (state, told) = took("cancelled", status, Job::UnderWay, guest);
            let as_seen = GuestState::parse(status).unwrap_or(guest).name();
            assert_eq!((state.as_str(), told.len()), (as_seen, 0), "{status}");
        }
        let (why, told) = took("none", "prelaunch", Job::UnderWay, GuestState::Running);
        assert!(why.contains("prelaunch") && told.is_empty(), "{why}");
    }

    #[test]
    fn how_it_stands_is_said_by_qemus_two_words() {
        use Standing::{Back, Completed, UnderWay, Waits};
        let (run, paused) = (GuestState::Running, GuestState::Paused);
        let (none, ours, cut, failed) = (Job::None, Job::UnderWay, Job::Cut, Job::Failed);
        for (migration, status, job, is) in [
            ("setup", "running", ours, Some(UnderWay)),
            ("active", "running", ours, Some(UnderWay)),
            ("device", "finish-migrate", ours, Some(UnderWay)),
            ("pre-switchover", "finish-migrate", ours, Some(Waits)),
            ("completed", "finish-migrate", ours, Some(Completed)),
            ("completed", "postmigrate", ours, Some(Completed)),
            ("completed", "running", ours, Some(Back(run))),
            ("failing", "finish-migrate", ours, Some(UnderWay)),
            ("failed", "finish-migrate", ours, Some(UnderWay)),
            ("failed", "running", ours, Some(Back(run))),
            ("failed", "postmigrate", ours, Some(Back(GuestState::Suspended))),
            ("cancelling", "running", ours, Some(UnderWay)),
            ("cancelled", "paused", ours, Some(Back(paused))),
            ("none", "running", ours, Some(Back(run))),
            ("none", "inmigrate", ours, None),
            ("active", "running", none, Some(Back(run))),
            ("completed", "postmigrate", none, None),
            ("active", "running", cut, Some(Back(run))),
            ("active", "finish-migrate", cut, Some(UnderWay)),
            ("completed", "postmigrate", cut, Some(Completed)),
            ("active", "running", failed, Some(Back(run))),
            ("pre-switchover", "finish-migrate", failed, Some(Back(GuestState::Suspended))),
            ("completed", "postmigrate", failed, Some(Back(paused))),
            ("failed", "finish-migrate", failed, Some(UnderWay)),
        ] {
            let fake = Fake { migration, status, ..Fake::default() };
            let (said, told) = with(fake, |q| standing(q, job, GuestState::Suspended));
            assert_eq!((said.ok(), told.len()), (is, 0), "{migration} {status} {job:?}");
        }
    }
}
