//! The journal on a disk that can fail, and files that are damaged or of an earlier version.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a [`Faulty`] disk fails at.
pub(in super::super) const WRITE: u32 = 1;
pub(in super::super) const RENAME: u32 = 2;
pub(in super::super) const SYNC: u32 = 3;

/// A disk that fails at one step while it is told to.
#[derive(Debug)]
pub(in super::super) struct Faulty {
    pub(in super::super) disk: Box<dyn Disk>,
    pub(in super::super) at: Arc<AtomicU32>,
}

impl Faulty {
    fn check(&self, step: u32) -> io::Result<()> {
        if self.at.load(Ordering::SeqCst) == step { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Disk for Faulty {
    fn write(&self, path: &Path, text: &[u8]) -> io::Result<()> {
        self.check(WRITE)?;
        self.disk.write(path, text)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check(RENAME)?;
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_names(&self) -> io::Result<()> {
        self.check(SYNC)?;
        self.disk.sync_names()
    }
}

pub(in super::super) fn record(group: &str, vm: &str, role: Role, state: JournalState) -> VmRecord {
    VmRecord {
        group: group.into(),
        token: Token([7; 32]),
        method: Method::Irlm,
        vm: vm.into(),
        ix: 1,
        role,
        state,
        seq: 0,
        peer_host: String::new(),
        tenant: String::new(),
        peer: "127.0.0.1:1".parse().unwrap(),
        front: Front::Qmp("/run/q".into()),
        identity: None,
        begun: false,
        migration_begun: false,
        guest: GuestState::Running,
        settings: None,
        leave_paused: true,
        settled: false,
        process: None,
        started_ns: 1,
        at_ns: 2,
        why: None,
    }
}

#[test]
fn the_last_word_is_read_back_and_roles_names_and_runs_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let j = Journal::open(dir.path()).unwrap();
    let again =
        VmRecord { token: Token([8; 32]), seq: 9, ..record("a", "b-c", Role::Source, JournalState::Done) };
    let all = [
        record("a", "b-c", Role::Source, JournalState::GaveUp),
        again.clone(),
        record("a-b", "c", Role::Source, JournalState::Started),
        VmRecord {
            settings: Some(crate::net::qmp::settings::Settings::default()),
            guest: GuestState::Panicked,
            begun: true,
            ..record("a-b", "c", Role::Target, JournalState::Loaded)
        },
    ];
    for r in &all {
        j.put(&VmRecord { state: JournalState::Started, ..r.clone() }).unwrap();
        j.put(r).unwrap();
    }
    let mut got = j.load_all().unwrap();
    got.records.sort_by_key(|r| (r.group.clone(), r.role == Role::Target, r.seq));
    assert_eq!((got.records.as_slice(), got.corrupt.len(), got.old.len()), (&all[..], 0, 0));
    assert!(dir.path().join("a@b-c@source@08080808.json").exists());
    j.remove([&again]).unwrap();
    j.remove([&again]).unwrap();
    assert_eq!(j.load_all().unwrap().records.len(), 3);
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
    let p = |n: &str| dir.path().join(format!("g@{n}@source@07070707.json"));
    {
        let j = Journal::open(dir.path()).unwrap();
        for vm in ["ok", "cut", "form", "moved"] {
            j.put(&record("g", vm, Role::Source, JournalState::GaveUp)).unwrap();
        }
    }
    let text = std::fs::read_to_string(p("cut")).unwrap();
    std::fs::write(p("cut"), &text[..text.len() / 2]).unwrap();
    std::fs::write(p("form"), text.replace("\"form\":2", "\"form\":9")).unwrap();
    std::fs::rename(p("moved"), p("other")).unwrap();
    std::fs::write(p("big"), vec![b' '; MAX_RECORD as usize + 9]).unwrap();
    std::fs::write(p("half").with_extension("tmp"), "{").unwrap();
    let j = Journal::open(dir.path()).unwrap();
    let got = j.load_all().unwrap();
    assert_eq!(got.records.iter().map(|r| r.vm.as_str()).collect::<Vec<_>>(), ["ok"]);
    let mut bad: Vec<String> = got.corrupt.iter().map(ToString::to_string).collect();
    bad.sort();
    assert_eq!(bad.len(), 4, "{bad:?}");
    for (e, name) in bad.iter().zip(["big", "cut", "form", "other"]) {
        assert!(e.contains(&format!("g@{name}@source")) && e.contains("by hand"), "{e}");
    }
    assert!(!p("half").with_extension("tmp").exists() && p("cut").exists());
}

/// A record as version 1 of the form had it, under the name it had.
pub(in super::super) fn put_old(dir: &Path, vm: &str, state: &str, was_paused: bool) -> PathBuf {
    let token = "07".repeat(32);
    let text = format!(
        r#"{{"form":1,"record":{{"group":"g","token":"{token}","method":"irlm","vm":"{vm}","ix":1,"role":"source",
        "state":"{state}","peer":"127.0.0.1:1","front":{{"qmp":"/run/q"}},"leave_paused":true,
        "process":{{"pid":5,"started":6}},"was_paused":{was_paused},"settled":false,"started_ns":1,"at_ns":2,"why":null}}}}"#
    );
    let path = dir.join(format!("g@{vm}@source.json"));
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn records_of_an_earlier_version_are_read_and_taken_to_have_begun() {
    let dir = tempfile::tempdir().unwrap();
    let path = put_old(dir.path(), "v", "started", true);
    let got = Journal::open(dir.path()).unwrap().load_all().unwrap();
    assert_eq!(got.corrupt.len(), 0, "{:?}", got.corrupt);
    let r = &got.records[0];
    assert_eq!((r.state, r.seq, r.begun, r.guest), (JournalState::Started, 0, true, GuestState::Paused));
    assert_eq!(got.old, [(0, path)]);
}

#[test]
fn a_failed_write_says_whether_it_may_be_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let at = Arc::new(AtomicU32::new(0));
    let j = Journal::open(dir.path()).unwrap().on(|disk| Box::new(Faulty { disk, at: at.clone() }));
    let r = record("g", "v", Role::Source, JournalState::Started);
    for (step, maybe, there) in [(WRITE, false, 0), (RENAME, true, 0), (SYNC, true, 1)] {
        at.store(step, Ordering::SeqCst);
        let e = j.put(&r).unwrap_err();
        assert_eq!((e.maybe, j.load_all().unwrap().records.len()), (maybe, there), "step {step}: {e}");
    }
    at.store(0, Ordering::SeqCst);
    j.put(&r).unwrap();
}
