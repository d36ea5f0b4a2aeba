//! What must survive a crash or a reboot of an agent: for each VM, how far its handover is. Each step is on disk,
//! synced, before it is acted on; otherwise an agent that dies between word and deed could let two copies run.
//!
//! One JSON file a VM and role in the state directory: written beside, synced, renamed over, directory synced. A
//! file that cannot be read is reported by name and left alone; the others still load.

use super::api::{Method, Role, Token};
use super::config::valid_name;
use crate::flow::Front;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Version of the record's form.
const FORM: u32 = 1;
/// Largest record read back, bytes; an honest one is below 2 KiB.
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
}

impl JournalState {
    /// Whether nothing of it is open.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Running | Self::Done | Self::Aborted | Self::Discarded | Self::Filled)
    }
}

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
    /// Where the other side's agent is: its data address at the source, its control address at the target.
    pub peer: SocketAddr,
    /// Who runs it at this side.
    pub front: Front,
    /// Target: do not let it run when it is ours.
    #[serde(default)]
    pub leave_paused: bool,
    /// This side's QEMU or VMM, to tell its death from a socket that does not answer, and it from a later one at that
    /// path.
    #[serde(default)]
    pub process: Option<crate::host::sched::Process>,
    /// Source: it was paused before its move began, and is not to be continued if it stays.
    #[serde(default)]
    pub was_paused: bool,
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
    /// Files that are not; they are left where they are.
    pub corrupt: Vec<JournalError>,
}

/// The state directory of one agent, locked for it.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    /// For fsync of the directory itself.
    handle: File,
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
        std::fs::create_dir_all(dir).map_err(at(dir, "cannot create the state directory"))?;
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
        Ok(Self { dir: dir.to_owned(), handle, _lock: lock })
    }

    /// Writes the record; on return it is on disk. It replaces the VM's earlier one of the same role.
    pub fn put(&self, r: &VmRecord) -> Result<(), JournalError> {
        let path = self.path(&r.group, &r.vm, r.role)?;
        let tmp = path.with_extension("tmp");
        let mut text = serde_json::to_vec(&OnDisk { form: FORM, record: r })
            .map_err(|e| fail(&path, "cannot encode the record", e.into()))?;
        text.push(b'\n');
        let write = || -> io::Result<()> {
            // The record holds the group's secret.
            let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
            f.write_all(&text)?;
            f.sync_all()?;
            std::fs::rename(&tmp, &path)?;
            self.handle.sync_all()
        };
        write().map_err(|e| fail(&path, "cannot write the record (disk full?)", e))
    }

    /// Removes the VM's record of that role; fine if there is none.
    pub fn remove(&self, group: &str, vm: &str, role: Role) -> Result<(), JournalError> {
        let path = self.path(group, vm, role)?;
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(fail(&path, "cannot remove the record", e)),
            Ok(()) => {
                self.handle.sync_all().map_err(|e| fail(&self.dir, "cannot sync the state directory", e))
            }
        }
    }

    /// Reads all records back.
    pub fn load_all(&self) -> Result<Loaded, JournalError> {
        let list = |e| fail(&self.dir, "cannot list the state directory", e);
        let mut out = Loaded::default();
        for entry in std::fs::read_dir(&self.dir).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match self.load(&path) {
                Ok(r) => out.records.push(r),
                Err(source) => out.corrupt.push(fail(
                    &path,
                    "unreadable record: look at the VM on both hosts, settle it by hand, then move this file away",
                    source,
                )),
            }
        }
        out.records.sort_by(|a, b| (&a.group, a.ix).cmp(&(&b.group, b.ix)));
        Ok(out)
    }

    fn load(&self, path: &Path) -> io::Result<VmRecord> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut text = Vec::new();
        File::open(path)?.take(MAX_RECORD + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MAX_RECORD {
            return Err(bad(format!("longer than {MAX_RECORD} bytes")));
        }
        let on_disk: OnDisk<serde_json::Value> =
            serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        if on_disk.form != FORM {
            return Err(bad(format!("form {}, this program reads form {FORM}", on_disk.form)));
        }
        let r: VmRecord = serde_json::from_value(on_disk.record).map_err(|e| bad(e.to_string()))?;
        let named = self.path(&r.group, &r.vm, r.role).map_err(|e| e.source)?;
        if named != path {
            return Err(bad(format!("it is the record of {}", named.display())));
        }
        Ok(r)
    }

    fn path(&self, group: &str, vm: &str, role: Role) -> Result<PathBuf, JournalError> {
        if !valid_name(group) || !valid_name(vm) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, format!("{group:?}, {vm:?}"));
            return Err(fail(&self.dir, "a group or VM name that cannot be in a file name", source));
        }
        let role = match role {
            Role::Source => "source",
            Role::Target => "target",
        };
        Ok(self.dir.join(format!("{group}{SEPARATOR}{vm}{SEPARATOR}{role}.json")))
    }
}

fn fail(path: &Path, what: &'static str, source: io::Error) -> JournalError {
    JournalError { path: path.display().to_string(), what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(group: &str, vm: &str, role: Role, state: JournalState) -> VmRecord {
        VmRecord {
            group: group.into(),
            token: Token([7; 32]),
            method: Method::Irlm,
            vm: vm.into(),
            ix: 1,
            role,
            state,
            peer: "127.0.0.1:1".parse().unwrap(),
            front: Front::Qmp("/run/q".into()),
            was_paused: false,
            leave_paused: true,
            settled: false,
            process: None,
            started_ns: 1,
            at_ns: 2,
            why: None,
        }
    }

    #[test]
    fn the_last_word_is_read_back_and_roles_and_names_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let j = Journal::open(dir.path()).unwrap();
        let all = [
            record("a", "b-c", Role::Source, JournalState::GaveUp),
            record("a-b", "c", Role::Source, JournalState::Started),
            record("a-b", "c", Role::Target, JournalState::Loaded),
        ];
        for r in &all {
            j.put(&VmRecord { state: JournalState::Started, ..r.clone() }).unwrap();
            j.put(r).unwrap();
        }
        let mut got = j.load_all().unwrap();
        got.records.sort_by_key(|r| (r.group.clone(), r.role == Role::Target));
        assert_eq!((got.records.as_slice(), got.corrupt.len()), (&all[..], 0));
        j.remove("a", "b-c", Role::Source).unwrap();
        j.remove("a", "b-c", Role::Source).unwrap();
        assert_eq!(j.load_all().unwrap().records.len(), 2);
        assert!(j.put(&record("../x", "y", Role::Source, JournalState::Done)).is_err());
    }

    #[test]
    fn a_second_agent_is_kept_out_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::open(dir.path()).unwrap();
        let e = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("another agent"), "{e}");
        drop(first);
        Journal::open(dir.path()).unwrap();
    }

    #[test]
    fn damaged_files_are_named_and_the_others_load() {
        let dir = tempfile::tempdir().unwrap();
        let p = |n: &str| dir.path().join(n);
        {
            let j = Journal::open(dir.path()).unwrap();
            for vm in ["ok", "cut", "form", "moved"] {
                j.put(&record("g", vm, Role::Source, JournalState::GaveUp)).unwrap();
            }
        }
        let text = std::fs::read_to_string(p("g@cut@source.json")).unwrap();
        std::fs::write(p("g@cut@source.json"), &text[..text.len() / 2]).unwrap();
        std::fs::write(p("g@form@source.json"), text.replace("\"form\":1", "\"form\":9")).unwrap();
        std::fs::rename(p("g@moved@source.json"), p("g@other@source.json")).unwrap();
        std::fs::write(p("g@big@source.json"), vec![b' '; MAX_RECORD as usize + 9]).unwrap();
        std::fs::write(p("g@half@source.tmp"), "{").unwrap();
        let j = Journal::open(dir.path()).unwrap();
        let got = j.load_all().unwrap();
        assert_eq!(got.records.iter().map(|r| r.vm.as_str()).collect::<Vec<_>>(), ["ok"]);
        let mut bad: Vec<String> = got.corrupt.iter().map(ToString::to_string).collect();
        bad.sort();
        assert_eq!(bad.len(), 4, "{bad:?}");
        for (e, name) in bad.iter().zip(["big", "cut", "form", "other"]) {
            assert!(e.contains(&format!("g@{name}@source.json")) && e.contains("by hand"), "{e}");
        }
        assert!(!p("g@half@source.tmp").exists() && p("g@cut@source.json").exists());
    }
}
