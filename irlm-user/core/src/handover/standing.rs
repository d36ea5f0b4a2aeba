//! What is known of a VM's two copies: how its owner has left it, and what came of asking a QEMU or VMM to let it go,
//! to take it back or to run it. Answers say only what was seen; whatever is not known is an error, and asked again.

use serde::{Deserialize, Serialize};

/// What a VM's owner, or the guest itself, last made of it, in the words of QEMU's run states (`qapi/run-state.json`).
/// Only a running VM is ever continued: any other state was somebody's wish or the guest's own end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestState {
    /// Its vCPUs run.
    #[default]
    Running,
    /// Its owner has stopped it.
    Paused,
    /// The guest sleeps until it is woken.
    Suspended,
    /// The guest has shut down, and its QEMU was told to stay.
    Shutdown,
    /// A disk failed, and it was stopped for that.
    IoError,
    /// The guest has panicked.
    #[serde(rename = "guest-panicked")]
    Panicked,
    /// Its watchdog has stopped it.
    Watchdog,
    /// QEMU has stopped it for an error of its own.
    InternalError,
}

impl GuestState {
    /// All, by their code on the wire, which counts from 0.
    pub const ALL: [Self; 8] = [
        Self::Running,
        Self::Paused,
        Self::Suspended,
        Self::Shutdown,
        Self::IoError,
        Self::Panicked,
        Self::Watchdog,
        Self::InternalError,
    ];

    /// QEMU's word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Shutdown => "shutdown",
            Self::IoError => "io-error",
            Self::Panicked => "guest-panicked",
            Self::Watchdog => "watchdog",
            Self::InternalError => "internal-error",
        }
    }

    /// The state of this name; none for what a migration makes of a VM (`inmigrate`, `finish-migrate`, `postmigrate`)
    /// and for what does not last.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.name() == name)
    }

    /// Its code on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        Self::ALL.iter().position(|s| *s == self).map_or(0, |i| i as u8)
    }

    /// The state of this code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Whether the VM is to run.
    #[must_use]
    pub fn runs(self) -> bool {
        self == Self::Running
    }
}

/// How a source's QEMU or VMM stands to the migration that was begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It goes on.
    UnderWay,
    /// The VM is stopped, and it waits for leave to hand it over (`pre-switchover`).
    Waits,
    /// It has handed the VM over, and never runs it again by itself.
    Completed,
    /// No migration of ours is left: the VM is the source's, in this state.
    Back(GuestState),
    /// Its process has ended, as its pidfd or /proc says.
    Gone,
}

/// What came of taking a VM back at its source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Took {
    /// It stands there in this state. `Running`: it was seen to run.
    Stands(GuestState),
    /// Its process has ended.
    Gone,
}

/// What came of letting an arrived VM run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ran {
    /// It runs.
    Runs,
    /// It is left paused: as was asked for, or as its owner had it.
    Paused,
    /// Its QEMU answers and refuses, and the VM surely does not run.
    Refused(String),
    /// Its process has ended.
    Gone {
        /// It had been told to run, so that it may have.
        told: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::GuestState;

    #[test]
    fn a_guest_s_state_is_the_same_by_its_name_and_by_its_code() {
        for s in GuestState::ALL {
            assert_eq!(GuestState::parse(s.name()), Some(s));
            assert_eq!(GuestState::from_code(s.code()), Some(s));
            assert_eq!(serde_json::to_value(s).unwrap(), s.name());
        }
        for none in ["inmigrate", "postmigrate", "finish-migrate", "prelaunch", ""] {
            assert_eq!(GuestState::parse(none), None, "{none}");
        }
        assert_eq!(GuestState::from_code(8), None);
    }
}
