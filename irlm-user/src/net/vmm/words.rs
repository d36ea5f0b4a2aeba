//! The words of a VMM's control socket (docs/vmm.md): one request a line, one answer a line; both sides use these types,
//! so that they cannot drift apart.

use serde::{Deserialize, Serialize};

/// Most memory slots one VM may have; each is a descriptor on one message, of which the kernel takes 253.
pub const MAX_SLOTS: usize = 128;
/// Longest saved state taken. A large one (4 vCPUs) has 40 KiB; wide vector registers and many vCPUs bring a few MiB.
pub const MAX_STATE: u64 = 64 << 20;
/// Largest slot: 2^32 pages, as the wire numbers them.
pub const MAX_SLOT_BYTES: u64 = 1 << 44;

/// What can be asked of a VMM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// How the VM is; never waits for anything.
    Status,
    /// The slots; their memfds ride on the answer, in the same order.
    Memory,
    /// Stops all vCPUs; the answer comes when the last has left the guest.
    Pause,
    /// Lets them run.
    Resume,
    /// The same as `pause`, for a move. One that its owner has paused stays his.
    PauseForMove,
    /// Lets them run again that were paused for a move, unless their owner has paused them since.
    Release,
    /// Its VM goes on elsewhere: from here on `resume` is refused. It must be paused.
    GiveUp,
    /// Its VM is here after all: it is paused, and can be resumed.
    TakeBack,
    /// From here on writes are noted, for this connection.
    DirtyStart,
    /// What was written since the last time; the bitmaps ride on the answer as one file.
    DirtyHarvest,
    /// No more notes.
    DirtyStop,
    /// All state but RAM, as a file on the answer.
    SaveState,
    /// The same, as a file on the request.
    LoadState,
    /// Missing pages are to be asked for; the userfaultfd rides on the answer.
    Userfault,
    /// All pages are there.
    UserfaultEnd,
    /// How much of its memory the guest shall give back.
    Balloon {
        /// Whole pages of 4 KiB; none: it may have all.
        bytes: u64,
    },
    /// Ends the VM and its process.
    Quit,
}

impl Request {
    /// Its word on the socket, for messages.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Memory => "memory",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::PauseForMove => "pause-for-move",
            Self::Release => "release",
            Self::GiveUp => "give-up",
            Self::TakeBack => "take-back",
            Self::DirtyStart => "dirty-start",
            Self::DirtyHarvest => "dirty-harvest",
            Self::DirtyStop => "dirty-stop",
            Self::SaveState => "save-state",
            Self::LoadState => "load-state",
            Self::Userfault => "userfault",
            Self::UserfaultEnd => "userfault-end",
            Self::Balloon { .. } => "balloon",
            Self::Quit => "quit",
        }
    }
}

/// An answer: what was asked for, or one line that says why not.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer<T> {
    /// Done.
    Ok(T),
    /// Not done, and nothing changed unless the line says so.
    Error(String),
}

/// Nothing more to say than that it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Done {}

/// Whether the guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// They have been told to stop, and some is still in the guest.
    Pausing,
    /// They do not run; they can.
    Paused,
    /// Its VM goes on elsewhere ([`Request::GiveUp`]): they do not run, and may not.
    GivenUp,
    /// It waits for its state (`--incoming`), and has never run here.
    Incoming,
    /// It will not run again: it was shut down, or it broke ([`Status::why`]).
    Ended,
}

/// How writes are noted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyMode {
    /// KVM's bitmap, cleared page by page.
    Bitmap,
    /// KVM's ring, one a vCPU.
    Ring,
}

/// What faults on missing pages look like, and how they are answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UffdMode {
    /// Write the page into the memfd, then UFFDIO_CONTINUE. Registered for MINOR **and** MISSING: a page that is not in
    /// the file yet faults as missing, one that is there and not mapped as minor; the answer is the same.
    Minor,
    /// UFFDIO_COPY (UFFDIO_ZEROPAGE where the kernel offers it).
    Missing,
}

/// Answer to [`Request::Status`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Whether the guest runs.
    pub state: State,
    /// Why it ended, if it has.
    pub why: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// All slots together.
    pub ram_bytes: u64,
    /// How writes are noted.
    pub dirty: DirtyMode,
    /// Whether somebody has that done now.
    pub dirty_on: bool,
    /// How often a vCPU stopped for a full ring since the start.
    pub ring_full: u64,
    /// How often a ring had overflowed, so that all pages were reported as written.
    pub ring_lost: u64,
    /// Whether missing pages are asked for.
    pub uffd: bool,
    /// How its balloon stands, if it has one.
    #[serde(default)]
    pub balloon: Option<BalloonWords>,
    /// The VMM's process, in its own PID namespace.
    pub pid: u32,
    /// Of the program.
    pub version: String,
}

/// A balloon, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BalloonWords {
    /// What the guest shall give.
    pub asked: u64,
    /// What it says it has given.
    pub given: u64,
    /// What was taken out of its memory here, free pages that it reported included.
    pub released: u64,
}

/// One slot, as it is written on the socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotWords {
    /// Where the guest has it.
    pub guest_phys: u64,
    /// Its length.
    pub bytes: u64,
    /// Size of the host's pages behind it: 4096, 2 MiB or 1 GiB.
    pub page_bytes: u64,
    /// `slot0`, `slot1`, …: the RAM block's name on the wire.
    pub name: String,
}

/// Answer to [`Request::Memory`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemoryWords {
    /// By guest address; as many descriptors ride on the line.
    pub slots: Vec<SlotWords>,
}

/// Answer to [`Request::DirtyHarvest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HarvestWords {
    /// How many pages were written since the last harvest.
    pub pages: u64,
}

/// Answer to [`Request::SaveState`], and argument of nothing: the file's length is the state's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateWords {
    /// Length of the state.
    pub bytes: u64,
}

/// Answer to [`Request::Userfault`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UserfaultWords {
    /// How faults are answered.
    pub mode: UffdMode,
    /// Address of each slot's mapping in the VMM: what fault addresses are relative to.
    pub bases: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_are_as_documented() {
        let all = [
            Request::Status,
            Request::Memory,
            Request::Pause,
            Request::Resume,
            Request::GiveUp,
            Request::TakeBack,
            Request::DirtyStart,
            Request::DirtyHarvest,
            Request::DirtyStop,
            Request::SaveState,
            Request::LoadState,
            Request::Userfault,
            Request::UserfaultEnd,
            Request::Quit,
        ];
        for r in all {
            let line = serde_json::to_string(&r).unwrap();
            assert_eq!(line, format!("{{\"command\":\"{}\"}}", r.word()));
            assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), r);
        }
        let line = serde_json::to_string(&Request::Balloon { bytes: 4096 }).unwrap();
        assert_eq!(line, "{\"command\":\"balloon\",\"bytes\":4096}");
        for bad in ["{}", "[]", "{\"command\":\"dance\"}", "\"pause\""] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
        let ok = serde_json::to_string(&Answer::Ok(Done {})).unwrap();
        let no = serde_json::to_string(&Answer::<Done>::Error("why".into())).unwrap();
        assert_eq!([ok.as_str(), no.as_str()], ["{\"ok\":{}}", "{\"error\":\"why\"}"]);
    }
}
