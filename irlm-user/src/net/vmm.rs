//! The client of a VMM's control socket (`irlm vmm`): what an agent asks of a VM of its own front. A thin blocking one with a
//! deadline on every word, like [`super::qmp`]; bulk (bitmaps, saved state) travels as files beside the lines, so that a
//! large VM does not make long lines.

use line::FdLines;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use words::{
    Answer, Done, HarvestWords, MAX_SLOT_BYTES, MAX_SLOTS, MAX_STATE, MemoryWords, Request, SlotWords,
    StateWords, UserfaultWords,
};
pub use words::{BalloonWords, DirtyMode, State, Status, UffdMode};

// What comes with a line is looked at.
pub mod fds;
// Lines with descriptors.
pub mod line;
// What is said.
pub mod words;

/// How long a command may take unless [`Vmm::set_timeout`] says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Pages a bitmap word tells of.
const WORD_PAGES: u64 = 64;

/// What can go wrong on a VMM's control socket. Each names the socket and the command.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The socket is not there, or nobody listens on it.
    #[error("VMM {path}: cannot connect: {source} (is `irlm vmm --control {path}` running?)")]
    Connect {
        /// The control socket.
        path: String,
        /// From the kernel.
        source: io::Error,
    },
    /// The VMM closed the connection, or died.
    #[error("VMM {path}: {command}: the VMM closed the connection (it has ended, or serves too many)")]
    Closed {
        /// The control socket.
        path: String,
        /// The command under way.
        command: &'static str,
    },
    /// No answer in time.
    #[error("VMM {path}: {command}: no answer within {ms} ms")]
    Timeout {
        /// The control socket.
        path: String,
        /// The command under way.
        command: &'static str,
        /// How long it was waited for.
        ms: u128,
    },
    /// The socket failed.
    #[error("VMM {path}: {command}: {source}")]
    Io {
        /// The control socket.
        path: String,
        /// The command under way.
        command: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// The other side does not keep to the protocol.
    #[error("VMM {path}: {command}: the answer is not understood: {what} (another version?)")]
    Grammar {
        /// The control socket.
        path: String,
        /// The command under way.
        command: &'static str,
        /// What was wrong.
        what: String,
    },
    /// The VMM says no.
    #[error("VMM {path}: {command}: {why}")]
    Refused {
        /// The control socket.
        path: String,
        /// The command.
        command: &'static str,
        /// Its reason.
        why: String,
    },
}

impl VmmError {
    /// Whether the VMM is gone (as opposed to slow or unwilling).
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } | Self::Connect { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
            }
            _ => false,
        }
    }
}

/// Short for this module's results.
pub type Result<T> = std::result::Result<T, VmmError>;

/// One memory slot of the guest.
#[derive(Debug)]
pub struct Slot {
    /// Where the guest has it.
    pub guest_phys: u64,
    /// Its length.
    pub bytes: u64,
    /// Size of the host's pages behind it: 4096, 2 MiB or 1 GiB.
    pub page_bytes: u64,
    /// `slot0`, `slot1`, …: the RAM block's name on the wire.
    pub name: String,
    /// The memory itself; offset 0 is the slot's start. Its length is sealed, so it can be mapped without fear.
    pub fd: OwnedFd,
}

impl Slot {
    /// Words of the slot's dirty bitmap.
    #[must_use]
    pub fn bitmap_words(&self) -> usize {
        words_for(self.bytes)
    }
}

/// Words of a bitmap over so many bytes of memory.
fn words_for(bytes: u64) -> usize {
    (bytes / crate::core::units::PAGE_SIZE as u64).div_ceil(WORD_PAGES) as usize
}

/// What answers faults.
#[derive(Debug)]
pub struct Userfault {
    /// The userfaultfd, for poll (it does not block); all connections get the same one.
    pub fd: OwnedFd,
    /// How faults are answered.
    pub mode: UffdMode,
    /// Address of each slot's mapping in the VMM: what fault addresses are relative to.
    pub bases: Vec<u64>,
}

/// A connection to one VMM. Not shared: wrap it in a lock if two threads need it, or connect twice.
#[derive(Debug)]
pub struct Vmm {
    lines: FdLines,
    path: PathBuf,
    timeout: Duration,
    /// Bitmap words of each slot, once known.
    slot_words: Vec<usize>,
    /// Answers that were given up waiting for, and may still come.
    owed: usize,
}

impl Vmm {
    /// Connects to the VMM that listens on `path`, and asks for its status to be sure that it is one.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let stream = UnixStream::connect(&path)
            .map_err(|source| VmmError::Connect { path: path.display().to_string(), source })?;
        Self::over(stream, path, timeout)
    }

    /// The same over a connected stream.
    pub fn over(stream: UnixStream, path: PathBuf, timeout: Duration) -> Result<Self> {
        let mut vmm = Self { lines: FdLines::new(stream), path, timeout, slot_words: Vec::new(), owed: 0 };
        vmm.status()?;
        vmm.timeout = DEFAULT_TIMEOUT;
        Ok(vmm)
    }

    /// How long each later command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// How the VM is.
    pub fn status(&mut self) -> Result<Status> {
        self.ask::<Status>(&Request::Status, &[]).map(|a| a.0)
    }

    /// The guest's memory.
    pub fn memory(&mut self) -> Result<Vec<Slot>> {
        let request = Request::Memory;
        let (words, came) = self.ask::<MemoryWords>(&request, &[])?;
        if words.slots.len() != came.len() || came.is_empty() || came.len() > MAX_SLOTS {
            let what = format!("{} slots with {} descriptors", words.slots.len(), came.len());
            return Err(self.grammar(&request, what));
        }
        let mut out = Vec::with_capacity(came.len());
        for (s, fd) in words.slots.into_iter().zip(came) {
            let SlotWords { guest_phys, bytes, page_bytes, name } = s;
            let file = fds::memory(&fd).map_err(|e| self.grammar(&request, format!("{name}: {e}")))?;
            let page = crate::core::units::PAGE_SIZE as u64;
            let odd = bytes == 0 || bytes > MAX_SLOT_BYTES || bytes % page != 0;
            if odd || file < bytes {
                let what = format!("{name} has {bytes} bytes and its file {file}");
                return Err(self.grammar(&request, what));
            }
            out.push(Slot { guest_phys, bytes, page_bytes, name, fd });
        }
        self.slot_words = out.iter().map(Slot::bitmap_words).collect();
        Ok(out)
    }

    /// Stops the guest; returns when every vCPU has left it.
    pub fn pause(&mut self) -> Result<()> {
        self.tell(&Request::Pause)
    }

    /// Lets it run.
    pub fn resume(&mut self) -> Result<()> {
        self.tell(&Request::Resume)
    }

    /// Stops the guest for a move, if it runs; returns when every vCPU has left it.
    pub fn pause_for_move(&mut self) -> Result<()> {
        self.tell(&Request::PauseForMove)
    }

    /// Lets a guest run again that was stopped for a move. One that its owner has stopped, also meanwhile, stays as it is.
    pub fn release(&mut self) -> Result<()> {
        self.tell(&Request::Release)
    }

    /// Its VM goes on elsewhere: nobody's `resume` lets it run here, until [`Self::take_back`].
    pub fn give_up(&mut self) -> Result<()> {
        self.tell(&Request::GiveUp)
    }

    /// Its VM is here after all, paused. One that was not given up is left as it is.
    pub fn take_back(&mut self) -> Result<()> {
        self.tell(&Request::TakeBack)
    }

    /// Everything written from here on is reported.
    pub fn dirty_start(&mut self) -> Result<()> {
        self.tell(&Request::DirtyStart)
    }

    /// ORs the pages written since the last harvest into `slot_bits` (one vector a slot, one bit a 4 KiB page, lowest bit
    /// first) and returns how many they were. They are watched again before this returns: a write after a later read of
    /// the page is in the next harvest.
    pub fn dirty_harvest(&mut self, slot_bits: &mut Vec<Vec<u64>>) -> Result<u64> {
        if self.slot_words.is_empty() {
            self.memory()?;
        }
        let request = Request::DirtyHarvest;
        let (words, fds) = self.ask::<HarvestWords>(&request, &[])?;
        let file = self.one_file(&request, fds)?;
        slot_bits.resize(self.slot_words.len(), Vec::new());
        let mut chunk = [0; 32 << 10];
        let mut at = 0;
        for (bits, want) in slot_bits.iter_mut().zip(&self.slot_words) {
            bits.resize(*want, 0);
            let mut done = 0;
            while done < *want {
                let take = (want - done).min(chunk.len() / 8);
                let part = &mut chunk[..take * 8];
                file.read_exact_at(part, at).map_err(|e| self.io(&request, e))?;
                for (word, b) in bits[done..done + take].iter_mut().zip(part.chunks_exact(8)) {
                    *word |= u64::from_le_bytes(b.try_into().unwrap_or([0; 8]));
                }
                done += take;
                at += take as u64 * 8;
            }
        }
        Ok(words.pages)
    }

    /// No more notes.
    pub fn dirty_stop(&mut self) -> Result<()> {
        self.tell(&Request::DirtyStop)
    }

    /// All vCPU and VM state but RAM; the VM must be paused.
    pub fn save_state(&mut self) -> Result<Vec<u8>> {
        let request = Request::SaveState;
        let (words, fds) = self.ask::<StateWords>(&request, &[])?;
        let file = self.one_file(&request, fds)?;
        let bytes = words.bytes;
        if bytes > MAX_STATE || file.metadata().map_err(|e| self.io(&request, e))?.len() != bytes {
            return Err(
                self.grammar(&request, format!("a state of {bytes} bytes in a file of another length"))
            );
        }
        let mut out = vec![0; bytes as usize];
        file.read_exact_at(&mut out, 0).map_err(|e| self.io(&request, e))?;
        Ok(out)
    }

    /// Takes over a saved state; the VM must be incoming, and is paused then.
    pub fn load_state(&mut self, state: &[u8]) -> Result<()> {
        let request = Request::LoadState;
        let file = file_of(state).map_err(|e| self.io(&request, e))?;
        self.ask::<Done>(&request, &[file.as_fd()]).map(drop)
    }

    /// Registers the guest's mappings for faults on missing pages; the VM must not have run yet, or have been asked for this
    /// before (then it is the same descriptor).
    pub fn userfault(&mut self) -> Result<Userfault> {
        let request = Request::Userfault;
        let (words, mut came) = self.ask::<UserfaultWords>(&request, &[])?;
        match (came.pop(), came.is_empty()) {
            (Some(fd), true) => {
                fds::userfault(&fd).map_err(|e| self.grammar(&request, e.to_string()))?;
                Ok(Userfault { fd, mode: words.mode, bases: words.bases })
            }
            _ => Err(self.grammar(&request, "not exactly one descriptor".into())),
        }
    }

    /// All pages are there: the mappings are as they were before [`Vmm::userfault`].
    pub fn userfault_end(&mut self) -> Result<()> {
        self.tell(&Request::UserfaultEnd)
    }

    /// Tells the guest how much of its memory it shall give back.
    pub fn balloon(&mut self, bytes: u64) -> Result<()> {
        self.tell(&Request::Balloon { bytes })
    }

    /// Ends the VM. That the VMM closes the connection before it answers is fine.
    pub fn quit(&mut self) -> Result<()> {
        match self.tell(&Request::Quit) {
            Err(e) if e.is_closed() => Ok(()),
            other => other,
        }
    }

    fn tell(&mut self, request: &Request) -> Result<()> {
        self.ask::<Done>(request, &[]).map(drop)
    }

    fn ask<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>)> {
        let until = Instant::now() + self.timeout;
        let line = serde_json::to_string(request).map_err(|e| self.grammar(request, e.to_string()))?;
        self.lines.write(line, fds, until).map_err(|e| self.io(request, e))?;
        self.owed += 1;
        let (line, fds) = loop {
            match self.lines.read(Some(until)) {
                Ok(Some(got)) => {
                    self.owed -= 1;
                    if self.owed == 0 {
                        break got;
                    }
                }
                Ok(None) => return Err(VmmError::Closed { path: self.name(), command: request.word() }),
                Err(e) => return Err(self.io(request, e)),
            }
        };
        match serde_json::from_slice::<Answer<T>>(&line) {
            Ok(Answer::Ok(t)) => Ok((t, fds)),
            Ok(Answer::Error(why)) => {
                Err(VmmError::Refused { path: self.name(), command: request.word(), why })
            }
            Err(e) => Err(self.grammar(request, e.to_string())),
        }
    }

    fn one_file(&self, request: &Request, came: Vec<OwnedFd>) -> Result<File> {
        let mut came = came.into_iter();
        match (came.next(), came.next()) {
            (Some(fd), None) => {
                fds::regular(&fd).map_err(|e| self.grammar(request, e.to_string()))?;
                Ok(File::from(fd))
            }
            _ => Err(self.grammar(request, "not exactly one file with it".into())),
        }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn io(&self, request: &Request, source: io::Error) -> VmmError {
        let (path, command) = (self.name(), request.word());
        match source.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                VmmError::Timeout { path, command, ms: self.timeout.as_millis() }
            }
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => VmmError::Closed { path, command },
            _ => VmmError::Io { path, command, source },
        }
    }

    fn grammar(&self, request: &Request, what: String) -> VmmError {
        VmmError::Grammar { path: self.name(), command: request.word(), what }
    }
}

impl AsFd for Vmm {
    /// For `host::sched::peer_pid`: which process the VMM is.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lines.stream().as_fd()
    }
}

/// Bytes as an anonymous file, to ride on a line.
pub fn file_of(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create("irlm-vmm", MemfdFlags::CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}
