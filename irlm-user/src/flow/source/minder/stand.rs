//! How a source's QEMU stands to the migration that was begun on it, and taking its VM back from that. Both
//! say only what was seen on its monitor, and neither touches what somebody else has begun.

use crate::core::handover::{GuestState, Standing};
use crate::net::qmp::{MigrateStatus, Qmp, QmpError};
use std::time::{Duration, Instant};

/// How long a VM may take to be seen as it is to be.
const TAKES: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(20);

/// Why a monitor gave no answer that counts.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    /// The connection is closed: its QEMU may have ended.
    pub(super) closed: bool,
    pub(super) why: String,
}

impl From<QmpError> for Trouble {
    fn from(e: QmpError) -> Self {
        Self { closed: e.is_closed(), why: e.to_string() }
    }
}

impl From<String> for Trouble {
    fn from(why: String) -> Self {
        Self { closed: false, why }
    }
}

/// A run state that QEMU's migration gives a VM: nobody's wish.
pub(super) fn is_migrations(status: &str) -> bool {
    matches!(status, "postmigrate" | "finish-migrate")
}

/// How QEMU stands. `begun`: whether it was this departure, or an agent before it, that began a migration;
/// `guest`: how the owner has left the VM, as far as is known.
pub(super) fn standing(qmp: &mut Qmp, begun: bool, guest: GuestState) -> Result<Standing, Trouble> {
    let info = qmp.query_migrate()?;
    let state = qmp.query_status()?;
    let seen = GuestState::parse(&state.status);
    let strange = || Trouble::from(format!("its QEMU is {} (migration: {})", state.status, info.word));
    if !begun {
        return seen.map(Standing::Back).ok_or_else(strange);
    }
    match (info.status, seen) {
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
/// migration that was not `begun` here is left alone, and so is a VM which stands as somebody wanted it to.
pub(super) fn take_back(qmp: &mut Qmp, begun: bool, guest: GuestState) -> Result<GuestState, Trouble> {
    let until = Instant::now() + TAKES;
    let mut cancelled = false;
    let mut refusal = String::new();
    loop {
        let info = qmp.query_migrate()?;
        let state = qmp.query_status()?;
        let seen = GuestState::parse(&state.status);
        let busy = begun && info.status.is_busy();
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
                    return Err(format!("nothing was begun there, and its QEMU is {}", state.status).into());
                }
                None if !is_migrations(&state.status) => {
                    return Err(format!("its QEMU is {}: not touched", state.status).into());
                }
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
            return Err(format!("QEMU is still {} (migration: {}){refusal}", state.status, info.word).into());
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
        begun: bool,
        guest: GuestState,
    ) -> (String, Vec<String>) {
        let fake = Fake { migration, status, ..Fake::default() };
        let (took, told) = with(fake, |q| take_back(q, begun, guest));
        (took.map_or_else(|e| e.why, |g| g.name().to_owned()), told)
    }

    /// QEMU 10.0 says that a migration has failed some time before it lets the VM go.
    #[test]
    fn a_vm_is_taken_back_from_a_migration_that_is_not_finalized_yet() {
        let fake = Fake { migration: "failed", status: "finish-migrate", refuses: 2, ..Fake::default() };
        let (took, told) = with(fake, |q| take_back(q, true, GuestState::Running));
        let told = told.join(" ");
        assert_eq!((took.unwrap(), &*told), (GuestState::Running, "cont cont cont announce-self"));
    }

    #[test]
    fn only_what_was_begun_here_is_cancelled_and_continued() {
        let no: Vec<String> = vec![];
        let run = GuestState::Running;
        assert_eq!(took("active", "running", false, run), ("running".into(), no.clone()));
        let (why, told) = took("completed", "postmigrate", false, run);
        assert!(why.contains("nothing was begun") && told.is_empty(), "{why} {told:?}");
        // Its switches may have heard of it from a target that had loaded.
        for (migration, status, told) in [
            ("active", "running", "migrate_cancel announce-self"),
            ("pre-switchover", "finish-migrate", "migrate_cancel cont announce-self"),
            ("completed", "postmigrate", "cont announce-self"),
        ] {
            let told: Vec<String> = told.split(' ').map(str::to_owned).collect();
            assert_eq!(took(migration, status, true, run), ("running".into(), told));
        }
        assert_eq!(took("failing", "running", true, run).0, "running", "failing is not the end");
    }

    #[test]
    fn a_vm_that_its_owner_stopped_is_not_continued() {
        for (status, guest) in [
            ("paused", GuestState::Running),
            ("paused", GuestState::Paused),
            ("shutdown", GuestState::Running),
            ("postmigrate", GuestState::Paused),
        ] {
            let (state, told) = took("cancelled", status, true, guest);
            let as_seen = GuestState::parse(status).unwrap_or(guest).name();
            assert_eq!((state.as_str(), told.len()), (as_seen, 0), "{status}");
        }
        let (why, told) = took("none", "prelaunch", true, GuestState::Running);
        assert!(why.contains("prelaunch") && told.is_empty(), "{why}");
    }

    #[test]
    fn how_it_stands_is_said_by_qemus_two_words() {
        use Standing::{Back, Completed, UnderWay, Waits};
        let (run, paused) = (GuestState::Running, GuestState::Paused);
        for (migration, status, begun, is) in [
            ("setup", "running", true, Some(UnderWay)),
            ("active", "running", true, Some(UnderWay)),
            ("device", "finish-migrate", true, Some(UnderWay)),
            ("pre-switchover", "finish-migrate", true, Some(Waits)),
            ("completed", "finish-migrate", true, Some(Completed)),
            ("completed", "postmigrate", true, Some(Completed)),
            ("completed", "running", true, Some(Back(run))),
            ("failing", "finish-migrate", true, Some(UnderWay)),
            ("failed", "finish-migrate", true, Some(UnderWay)),
            ("failed", "running", true, Some(Back(run))),
            ("failed", "postmigrate", true, Some(Back(GuestState::Suspended))),
            ("cancelling", "running", true, Some(UnderWay)),
            ("cancelled", "paused", true, Some(Back(paused))),
            ("none", "running", true, Some(Back(run))),
            ("none", "inmigrate", true, None),
            ("active", "running", false, Some(Back(run))),
            ("completed", "postmigrate", false, None),
        ] {
            let fake = Fake { migration, status, ..Fake::default() };
            let (said, told) = with(fake, |q| standing(q, begun, GuestState::Suspended));
            assert_eq!((said.ok(), told.len()), (is, 0), "{migration} {status} {begun}");
        }
    }
}
