//! What the newest record about a process allows to be done with it.

use crate::control::api::{Code, Refusal, Role, Token};
use crate::control::journal::{JournalState, VmRecord};
use std::net::SocketAddr;

/// How a process stands by the newest record about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nothing stands against it.
    Free,
    /// Its VM has been given up to another host.
    Moved {
        /// The group with which it left.
        group: String,
        /// The data address of the agent there.
        to: SocketAddr,
        /// When, Unix nanoseconds.
        at_ns: u64,
        /// Whether the other side is known to have it; else that is still being settled.
        known: bool,
    },
    /// Another group has it in hand.
    Busy {
        /// Which.
        group: String,
    },
    /// It runs here, and pages of it are still at its source.
    Fetching {
        /// The group with which it came.
        group: String,
    },
    /// It is a VM that belongs here, so that nothing may be loaded into it.
    Owned {
        /// The group that said so last.
        group: String,
    },
    /// It holds a copy, or a part of one, that is not the VM.
    NotItsOwner {
        /// The group that put it there.
        group: String,
    },
}

/// Who asks: a VM of a run of a group.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The group's name.
    pub group: &'a str,
    /// Its secret: another run of a group of that name is another group.
    pub token: &'a Token,
    /// The VM's name: one process is not two VMs of a group.
    pub vm: &'a str,
}

impl Asker<'_> {
    pub(super) fn owns(&self, r: &VmRecord) -> bool {
        r.group == self.group && r.token == *self.token && r.vm == self.vm
    }
}

impl Standing {
    /// Of a process that is to leave this host, by the newest record about it.
    pub(super) fn leaving(r: &VmRecord, asker: &Asker<'_>) -> Self {
        use JournalState as S;
        let group = r.group.clone();
        match (r.role, r.state) {
            (Role::Source, S::Started) if asker.owns(r) => Self::Free,
            (Role::Source, S::Started) => Self::Busy { group },
            // It was seen to be back as its owner had it before that was written.
            (Role::Source, S::Aborted) => Self::Free,
            (Role::Source, _) => Self::Moved { group, to: r.peer, at_ns: r.at_ns, known: r.state == S::Done },
            (Role::Target, S::Filled) => Self::Free,
            (Role::Target, S::Running) if r.settled => Self::Free,
            // Not seen to run yet.
            (Role::Target, S::Running) => Self::Busy { group },
            (Role::Target, S::Fetching) => Self::Fetching { group },
            (Role::Target, _) => Self::NotItsOwner { group },
        }
    }

    /// Of a process that is to be filled here, by the newest record about it.
    pub(super) fn arriving(r: &VmRecord, asker: &Asker<'_>) -> Self {
        use JournalState as S;
        let group = r.group.clone();
        match (r.role, r.state) {
            (Role::Target, S::Started) if asker.owns(r) => Self::Free,
            (_, S::Started) | (Role::Target, S::Loaded | S::Ready | S::Refused) => Self::Busy { group },
            // It was never fed, and left waiting: one that was fed has been ended.
            (Role::Target, S::Discarded) => Self::Free,
            (Role::Target, S::Running | S::Filled | S::Fetching) | (Role::Source, S::Aborted) => {
                Self::Owned { group }
            }
            (Role::Target, _) => Self::NotItsOwner { group },
            (Role::Source, _) => Self::Moved { group, to: r.peer, at_ns: r.at_ns, known: r.state == S::Done },
        }
    }

    /// The refusal for this VM; nothing if there is none.
    pub fn allowed(self, vm: &str) -> Result<(), Refusal> {
        let refuse = |code, what: String| Err(Refusal::new(code, format!("{vm}: {what}")));
        match self {
            Self::Free => Ok(()),
            Self::Moved { group, to, known: true, .. } => {
                refuse(Code::NotNow, format!("already moved: to {to}, with group {group:?}"))
            }
            Self::Moved { group, to, .. } => refuse(
                Code::NotNow,
                format!("given up to {to} by group {group:?}, which is not settled yet (see `irlm status`)"),
            ),
            Self::Busy { group } => refuse(Code::Conflict, format!("group {group:?} has it in hand")),
            Self::Fetching { group } => refuse(
                Code::NotNow,
                format!("pages of it are still at its source: it is not whole (group {group:?})"),
            ),
            Self::Owned { group } => refuse(
                Code::NotNow,
                format!(
                    "a VM that belongs here runs in that process (group {group:?}): nothing can arrive in it"
                ),
            ),
            Self::NotItsOwner { group } => refuse(
                Code::NotNow,
                format!("that process holds a copy of group {group:?} that is not the VM"),
            ),
        }
    }
}

/// What a record says, in words for people.
#[must_use]
pub fn outcome(r: &VmRecord) -> &'static str {
    use JournalState as S;
    match (r.role, r.state) {
        (Role::Source, S::Started) => "leaving",
        (Role::Source, S::GivingUp | S::GaveUp) => "given up, not settled",
        (Role::Source, S::Serving) => "given up, and its pages are sent",
        (Role::Source, S::TakingBack) => "being taken back",
        (Role::Source, S::Done) => "moved",
        (Role::Source, S::Aborted) => "stayed",
        (Role::Target, S::Started) => "arriving",
        (Role::Target, S::Loaded | S::Ready) => "loaded, not settled",
        (Role::Target, S::Running) if r.leave_paused => "arrived, left paused",
        (Role::Target, S::Running) if r.settled => "arrived",
        (Role::Target, S::Running) => "arrived, not seen to run",
        (Role::Target, S::Fetching) => "arrived, and its pages are fetched",
        (Role::Target, S::Filled) => "arrived",
        (Role::Target, S::Refused) => "loaded, and refused by its QEMU",
        (Role::Target, S::Discarded) => "thrown away",
        (Role::Target, S::Lost) => "lost",
        (Role::Source, _) | (Role::Target, _) => "not understood",
    }
}
