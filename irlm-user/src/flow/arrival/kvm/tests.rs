//! A VMM that a VM arrives at, on a false control socket.

use super::*;
use crate::core::arrival::TargetHost;
use crate::core::digest::{Algorithm, Hasher};
use crate::core::units::{HostIx, VmIx};
use crate::flow::arrival::peers::Peers;
use crate::flow::arrival::{ArrivalOptions, Member};
use crate::flow::{Front, NoTags, Timeouts, lock};
use crate::net::vmm::fds::tests::sealed;
use crate::net::vmm::line::FdLines;
use crate::net::vmm::words::{Answer, MemoryWords, Request, SlotWords};
use crate::net::vmm::{DirtyMode, Status};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::sync::Mutex;

/// A VMM by its words.
#[derive(Debug)]
struct Is {
    state: State,
    told: Vec<&'static str>,
    refuses: bool,
    memory: File,
}

/// One that waits, and the directory of its socket.
fn vmm_that_waits() -> (Arc<Mutex<Is>>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("v")).unwrap();
    let memory = sealed(1 << 20);
    let is = Arc::new(Mutex::new(Is { state: State::Incoming, told: vec![], refuses: false, memory }));
    let served = is.clone();
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let served = served.clone();
            std::thread::spawn(move || {
                let mut lines = FdLines::new(client);
                while let Ok(Some((line, _))) = lines.read(None) {
                    let request: Request = serde_json::from_slice(&line).unwrap();
                    let (text, fd) = answer(&mut lock(&served), &request);
                    let fds: Vec<_> = fd.iter().map(|f| f.as_fd()).collect();
                    if lines.write(text, &fds, Instant::now() + Duration::from_secs(5)).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (is, dir)
}

fn answer(is: &mut Is, request: &Request) -> (String, Option<File>) {
    let text = |v: serde_json::Value| (serde_json::to_string(&Answer::Ok(v)).unwrap(), None);
    match request {
        Request::Status => {
            let status = Status {
                state: is.state,
                why: None,
                vcpus: 1,
                ram_bytes: 1 << 20,
                dirty: DirtyMode::Bitmap,
                dirty_on: false,
                ring_full: 0,
                ring_lost: 0,
                uffd: false,
                balloon: None,
                pid: 1,
                version: String::new(),
            };
            text(serde_json::to_value(status).unwrap())
        }
        Request::Memory => {
            let slot = SlotWords { guest_phys: 0, bytes: 1 << 20, page_bytes: 4096, name: "slot0".into() };
            let (line, _) = text(serde_json::to_value(MemoryWords { slots: vec![slot] }).unwrap());
            (line, Some(is.memory.try_clone().unwrap()))
        }
        Request::Resume if is.refuses => (r#"{"error":"a disk is gone"}"#.to_owned(), None),
        other => {
            is.told.push(other.word());
            match other {
                Request::Resume => is.state = State::Running,
                Request::Pause => is.state = State::Paused,
                _ => {}
            }
            text(serde_json::json!({}))
        }
    }
}

fn group(dir: &std::path::Path) -> (TargetGroup, TargetSpec, Arc<TargetVmShared>) {
    let group = TargetGroup::new(
        Member {
            name: "g".into(),
            token: [1; 32],
            me: HostIx(0),
            hashers: vec![Hasher::new(Algorithm::Blake3, &[1; 32], "")],
        },
        TargetHost::new(1000, 1000),
        Peers::new(vec!["127.0.0.1:1".parse().unwrap()]),
        Timeouts::default(),
        Arc::new(NoTags),
        ArrivalOptions { socket_dir: dir.to_owned(), ..ArrivalOptions::default() },
    );
    let (vm, source, front) = (VmIx(0), HostIx(0), Front::Vmm(dir.join("v")));
    let spec = TargetSpec { vm, name: "vm".into(), source, domain: 0, front };
    (group, spec, Arc::new(TargetVmShared::new().unwrap()))
}

#[test]
fn what_is_said_of_a_vm_that_is_to_run_is_what_was_seen() {
    let (is, dir) = vmm_that_waits();
    let (group, spec, shared) = group(dir.path());
    let mut kvm = Kvm::new(&group, &spec, &shared, &Before::default());
    assert_eq!(kvm.meet().unwrap().unwrap().pid, std::process::id());
    assert!(kvm.run(GuestState::Running).unwrap_err().to_string().contains("Incoming"));
    lock(&is).state = State::Paused;
    assert!(kvm.meet().unwrap_err().to_string().contains("is there already"));
    assert_eq!(kvm.run(GuestState::Paused).unwrap(), Ran::Paused);
    lock(&is).refuses = true;
    let Ran::Refused(why) = kvm.run(GuestState::Running).unwrap() else { panic!("it was refused") };
    assert!(why.contains("a disk is gone") && !kvm.told, "{why}");
    lock(&is).refuses = false;
    assert_eq!(kvm.run(GuestState::Running).unwrap(), Ran::Runs);
    assert_eq!(kvm.run(GuestState::Running).unwrap(), Ran::Runs, "asked twice, done once");
    assert_eq!(lock(&is).told, ["resume"]);
    // Not this host's, it is stopped, and left to who let it run.
    kvm.discard().unwrap();
    assert_eq!(lock(&is).state, State::Paused);
    assert_eq!(lock(&is).told, ["resume", "pause"]);
    let own = kvm.process.unwrap();
    kvm.process = Some(Process { started: own.started + 1, ..own });
    kvm.vmm = None;
    assert_eq!(kvm.run(GuestState::Running).unwrap(), Ran::Gone { told: true });
    kvm.discard().unwrap();
    assert_eq!(lock(&is).told, ["resume", "pause"]);
}

#[test]
fn a_vmm_into_which_nothing_was_written_is_left_waiting() {
    let (is, dir) = vmm_that_waits();
    let (group, spec, shared) = group(dir.path());
    let mut kvm = Kvm::new(&group, &spec, &shared, &Before::default());
    kvm.discard().unwrap();
    kvm.meet().unwrap();
    let before = Before { process: kvm.process, ..Before::default() };
    for mut kvm in [kvm, Kvm::new(&group, &spec, &shared, &before)] {
        kvm.discard().unwrap();
    }
    assert!(lock(&is).told.is_empty());
    lock(&is).memory.write_all_at(b"a page", 8192).unwrap();
    // The process that plays it does not end.
    let e = Kvm::new(&group, &spec, &shared, &before).discard().unwrap_err();
    assert!(e.to_string().contains("has not yet"), "{e}");
    assert_eq!(lock(&is).told, ["quit"]);
}
