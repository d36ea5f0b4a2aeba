//! What must survive a crash or a reboot of an agent: for each VM, how far its handover is. Each step is on disk,
//! synced, before it is acted on; otherwise an agent that dies between word and deed could let two copies run.
//!
//! One JSON file for each VM, role and run of a group, in the state directory: written beside, synced, renamed over, directory
//! synced. A file that cannot be read is reported by name and left alone; the others still load. What the records say
//! together is `control::registry`'s matter.

use super::api::{Identity, Method, Role, Token};
use super::config::valid_name;
use crate::core::handover::GuestState;
use crate::flow::{Front, MoveError};
use crate::host::sched::Process;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

// Directories that nobody else reads.
pub(super) mod private;

/// Version of the record's form.
const FORM: u32 = 2;
/// The form of earlier versions: one file for each VM and role, whatever the run; no `seq`, and no word of what was begun.
const OLD_FORM: u32 = 1;
/// Largest record read back, bytes; an honest one is below 8 KiB.
const MAX_RECORD: u64 = 64 << 10;
/// Between the parts of a file name: a byte that no name may hold.
const SEPARATOR: char = '@';

/// A record that could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("journal {path}: {what}: {source}")]
pub struct JournalError {
    /// The file or directory.
    pub path: String,
    /// What was tried, and what to do.
    pub what: &'static str,
    /// Why not.
    pub source: io::Error,
    /// It may be on disk all the same.
    pub maybe: bool,
}

impl From<JournalError> for MoveError {
    fn from(e: JournalError) -> Self {
        Self::Journal { maybe: e.maybe, source: e.into() }
    }
}

/// How far the handover of a VM is, at this side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalState {
    /// Pages move; the source owns the VM.
    Started,
    /// Target: all is loaded. The source still owns it.
    Loaded,
    /// Source: about to give up; whether the target heard of it is not known.
    GivingUp,
    /// Source: given up; never runs again here unless an operator says so.
    GaveUp,
    /// Target: owns the VM, and runs it (or leaves it paused as asked).
    Running,
    /// Source: has heard that the target runs.
    Done,
    /// Source: owns the VM, and it runs on here.
    Aborted,
    /// Target: the copy is thrown away.
    Discarded,
    /// Source, post-copy: given up, and its pages are still needed.
    Serving,
    /// Target, post-copy: the state is loaded, pages are still to come. The source still owns it.
    Ready,
    /// Target, post-copy: owns the VM and runs it, pages are still to come.
    Fetching,
    /// Target, post-copy: owns the VM, and all of it is here.
    Filled,
    /// Source: given up, refused by the target's QEMU, and being taken back.
    TakingBack,
    /// Target: loaded, and its QEMU refuses to run it.
    Refused,
    /// Target: its process has ended when it was not whole, or was never seen to run.
    Lost,
}

impl JournalState {
    /// Whether nothing of it is open.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Running | Self::Done | Self::Aborted | Self::Discarded | Self::Filled | Self::Lost
        )
    }
}

// bounds: one record, which is one file
/// What is kept of one VM at one side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The group's name.
    pub group: String,
    /// The group's secret, so that the two agents know each other again.
    pub token: Token,
    /// How it was moved.
    pub method: Method,
    /// The VM's name.
    pub vm: String,
    /// The VM's number in the group.
    pub ix: u16,
    /// Which side this is.
    pub role: Role,
    /// How far.
    pub state: JournalState,
    /// Counts up over all records of the host: of two about one process the higher one is the newer. 0 in records of an
    /// earlier version.
    #[serde(default)]
    pub seq: u64,
    /// Where the other side's agent is: its data address at the source, its control address at the target.
    pub peer: SocketAddr,
    /// The other side's host by its name in the group, which its agent's certificate must bear; empty in records of an
    /// earlier version.
    #[serde(default)]
    pub peer_host: String,
    /// Its trust domain.
    #[serde(default)]
    pub tenant: String,
    /// Who runs it at this side.
    pub front: Front,
    /// Target: do not let it run when it is ours.
    #[serde(default)]
    pub leave_paused: bool,
    /// This side's QEMU or VMM, to tell its death from a socket that does not answer, and it from a later one at that
    /// path.
    #[serde(default)]
    pub process: Option<Process>,
    /// Who the VM says it is.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Source: something was asked of its QEMU or VMM, so that there is something to end or to undo.
    #[serde(default)]
    pub begun: bool,
    /// Source: a migration was begun, so that what is under way at its QEMU is ours.
    #[serde(default)]
    pub migration_begun: bool,
    /// What its owner, or the guest itself, had last made of it.
    #[serde(default)]
    pub guest: GuestState,
    /// What was found before anything was set, to be put back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<crate::net::qmp::settings::Settings>,
    /// Nothing is left to do for it, not even after a restart: source: both sides know; target: continued (or left
    /// paused as asked), or discarded.
    #[serde(default)]
    pub settled: bool,
    /// When its move started, Unix nanoseconds.
    pub started_ns: u64,
    /// When this record was written, Unix nanoseconds.
    pub at_ns: u64,
    /// Why it was aborted or is in doubt.
    #[serde(default)]
    pub why: Option<String>,
}

impl VmRecord {
    /// Whether nothing of it is open, here or at the other side.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state.is_final() && self.settled
    }
}

#[derive(Serialize, Deserialize)]
struct OnDisk<R> {
    form: u32,
    record: R,
}

/// What [`Journal::load_all`] found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Readable records.
    pub records: Vec<VmRecord>,
    /// Of these, the files of those in the form of an earlier version, with their places in `records`.
    pub old: Vec<(usize, PathBuf)>,
    /// Files that are not readable; they are left where they are.
    pub corrupt: Vec<JournalError>,
}

/// What the journal asks of the file system: a seam, so that tests can have each step fail.
pub trait Disk: std::fmt::Debug + Send + Sync {
    /// Writes a file, readable by its owner alone; on return its content is on disk, its name need not be.
    fn write(&self, path: &Path, text: &[u8]) -> io::Result<()>;
    /// Gives it its name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes it.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// On return the names in the directory are on disk.
    fn sync_names(&self) -> io::Result<()>;
}

/// The file system itself.
#[derive(Debug)]
struct RealDisk {
    /// The state directory, for its fsync.
    dir: File,
}

impl Disk for RealDisk {
    fn write(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        // The record holds the group's secret.
        let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        f.write_all(text)?;
        f.sync_all()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
    fn sync_names(&self) -> io::Result<()> {
        self.dir.sync_all()
    }
}

/// The state directory of one agent, locked for it.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    disk: Box<dyn Disk>,
    /// Holds the lock; the kernel gives it back when the agent ends, however it ends.
    _lock: File,
}

impl Journal {
    /// Opens (and creates) the state directory, locks it against a second agent, and removes half-written files.
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        let at = |path: &Path, what| {
            let path = path.to_owned();
            move |e: io::Error| fail(&path, what, e)
        };
        private::directory(dir).map_err(at(dir, "cannot have the state directory for itself"))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(at(&lock_path, "cannot create the lock file"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            fail(&lock_path, "another agent uses this state_dir: stop it or give this one its own", e.into())
        })?;
        let handle = File::open(dir).map_err(at(dir, "cannot open the state directory"))?;
        for entry in std::fs::read_dir(dir).map_err(at(dir, "cannot list the state directory"))? {
            let path = entry.map_err(at(dir, "cannot list the state directory"))?.path();
            if path.extension().is_some_and(|e| e == "tmp") {
                // Never renamed, so never acted on.
                std::fs::remove_file(&path).map_err(at(&path, "cannot remove a half-written record"))?;
            }
        }
        Ok(Self { dir: dir.to_owned(), disk: Box::new(RealDisk { dir: handle }), _lock: lock })
    }

    /// The same on another disk.
    #[cfg(test)]
    pub(super) fn on(self, disk: impl FnOnce(Box<dyn Disk>) -> Box<dyn Disk>) -> Self {
        Self { disk: disk(self.disk), ..self }
    }

    /// Writes the record; on return it is on disk. It replaces the VM's earlier one of the same role and run.
    pub fn put(&self, r: &VmRecord) -> Result<(), JournalError> {
        let path = self.path(r)?;
        let tmp = path.with_extension("tmp");
        let mut text = serde_json::to_vec(&OnDisk { form: FORM, record: r })
            .map_err(|e| fail(&path, "cannot encode the record", e.into()))?;
        text.push(b'\n');
        let what = "cannot write the record (disk full?)";
        self.disk.write(&tmp, &text).map_err(|e| {
            // What it takes is given back; if not now, then at the next start.
            let _ = self.disk.remove(&tmp);
            fail(&path, what, e)
        })?;
        // From here on a crash may show either.
        let named = self.disk.rename(&tmp, &path).and_then(|()| self.disk.sync_names());
        named.map_err(|e| JournalError { maybe: true, ..fail(&path, what, e) })
    }

    /// Removes these records; fine if they are not there.
    pub fn remove<'a>(&self, records: impl IntoIterator<Item = &'a VmRecord>) -> Result<(), JournalError> {
        for r in records {
            self.remove_file(&self.path(r)?)?;
        }
        self.disk.sync_names().map_err(|e| fail(&self.dir, "cannot sync the state directory", e))
    }

    /// Removes a file of the state directory.
    pub fn remove_file(&self, path: &Path) -> Result<(), JournalError> {
        match self.disk.remove(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(fail(path, "cannot remove the record", e)),
            _ => Ok(()),
        }
    }

    /// Reads all records back.
    pub fn load_all(&self) -> Result<Loaded, JournalError> {
        let list = |e| fail(&self.dir, "cannot list the state directory", e);
        let mut out = Loaded::default();
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match self.load(&path) {
                Ok((form, r)) => found.push((r, (form == OLD_FORM).then_some(path))),
                Err(source) => out.corrupt.push(fail(
                    &path,
                    "unreadable record: look at the VM on both hosts, settle it by hand, then move this file away",
                    source,
                )),
            }
        }
        found.sort_by(|(a, _), (b, _)| (&a.group, a.ix, a.seq).cmp(&(&b.group, b.ix, b.seq)));
        for (i, (r, old)) in found.into_iter().enumerate() {
            out.records.push(r);
            out.old.extend(old.map(|path| (i, path)));
        }
        Ok(out)
    }

    fn load(&self, path: &Path) -> io::Result<(u32, VmRecord)> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut text = Vec::new();
        File::open(path)?.take(MAX_RECORD + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_RECORD {
            return Err(bad(format!("longer than {MAX_RECORD} bytes")));
        }
        let on_disk: OnDisk<serde_json::Value> =
            serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if !(OLD_FORM..=FORM).contains(&on_disk.form) {
            return Err(bad(format!(
                "form {}, this program reads forms {OLD_FORM} and {FORM}",
                on_disk.form
            )));
        }
        let was_paused = on_disk.record["was_paused"] == true;
        let mut r: VmRecord = serde_json::from_value(on_disk.record).map_err(|e| bad(e.to_string()))?;
        let named = if on_disk.form == OLD_FORM {
            // It does not say whether anything was begun; and of the guest only whether it was paused.
            (r.begun, r.migration_begun) = (true, true);
            r.guest = if was_paused { GuestState::Paused } else { GuestState::Running };
            self.named(&r.group, &r.vm, r.role, None)
        } else {
            self.path(&r)
        };
        let named = named.map_err(|e| e.source)?;
        if named != path {
            return Err(bad(format!("it is the record of {}", named.display())));
        }
        Ok((on_disk.form, r))
    }

    fn path(&self, r: &VmRecord) -> Result<PathBuf, JournalError> {
        self.named(&r.group, &r.vm, r.role, Some(&r.token))
    }

    fn named(
        &self,
        group: &str,
        vm: &str,
        role: Role,
        token: Option<&Token>,
    ) -> Result<PathBuf, JournalError> {
        if !valid_name(group) || !valid_name(vm) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, format!("{group:?}, {vm:?}"));
            return Err(fail(&self.dir, "a group or VM name that cannot be in a file name", source));
        }
        let role = match role {
            Role::Source => "source",
            Role::Target => "target",
        };
        let run = token.map_or_else(String::new, |t| format!("{SEPARATOR}{}", run_of(t)));
        Ok(self.dir.join(format!("{group}{SEPARATOR}{vm}{SEPARATOR}{role}{run}.json")))
    }
}

/// What tells the runs of one group apart where people read it: the first hex digits of its secret, which tell nothing of
/// the rest.
#[must_use]
pub fn run_of(token: &Token) -> String {
    let [a, b, c, d, ..] = token.0;
    format!("{a:02x}{b:02x}{c:02x}{d:02x}")
}

fn fail(path: &Path, what: &'static str, source: io::Error) -> JournalError {
    JournalError { path: path.display().to_string(), what, source, maybe: false }
}

#[cfg(test)]
pub(super) mod tests;
