//! The monitor client and the RAM reader against a real QEMU: what a fake cannot vouch for. Set IRLM_QEMU to choose
//! one; without any QEMU each test says that it is skipped, and why.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

use irlm_user::core::units::PAGE_SIZE;
use irlm_user::flow::front::{Front, source_refusals, target_refusals};
use irlm_user::host::ram::{GuestRam, Way};
use irlm_user::host::sched::peer_pid;
use irlm_user::net::qmp::{MigrateStatus, Qmp, QmpError, Version};
use serde_json::json;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A QEMU of 64 MiB under TCG with nothing but a BIOS; killed at the end.
struct Guest {
    child: Child,
    dir: tempfile::TempDir,
}

impl Guest {
    /// `None`, with the reason printed, where there is no QEMU.
    fn start(more: &[&str]) -> Option<Self> {
        Self::start_as(&[&["-S"], more].concat())
    }

    /// The same, not told to wait for anybody.
    fn start_as(more: &[&str]) -> Option<Self> {
        let qemu = std::env::var("IRLM_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
        let dir = tempfile::tempdir().unwrap();
        let monitor = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let child = Command::new(&qemu)
            .args(["-accel", "tcg", "-m", "64", "-display", "none", "-serial", "none", "-monitor", "none"])
            .args(["-nodefaults", "-qmp", &monitor])
            .args(more)
            .stdin(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self { child, dir }),
            Err(e) => {
                println!("skipped: cannot start {qemu}: {e} (install qemu-system-x86 or set IRLM_QEMU)");
                None
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    fn connect(&self) -> Qmp {
        connect(&self.socket())
    }

    /// Lets the BIOS run for a moment and stops it, so that there is something in RAM.
    fn warm(&self, q: &mut Qmp) {
        q.cont().unwrap();
        assert!(q.query_status().unwrap().running);
        std::thread::sleep(Duration::from_millis(700));
        q.stop().unwrap();
        let names: Vec<String> = q.drain_events().unwrap().into_iter().map(|e| e.name).collect();
        assert!(names.contains(&"RESUME".into()) && names.contains(&"STOP".into()), "{names:?}");
    }

    fn ram(&self, q: &mut Qmp) -> GuestRam {
        let pid = peer_pid(&*q).unwrap().unwrap();
        assert_eq!(pid, self.child.id());
        GuestRam::open(pid, &mut |c| q.hmp(c).map_err(Into::into)).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects once the socket is there.
fn connect(path: &Path) -> Qmp {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match Qmp::connect(path, Duration::from_secs(5)) {
            Ok(q) => return q,
            Err(QmpError::Connect { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => panic!("{e}"),
        }
    }
}

/// What QEMU itself says is at the page (GPA = block offset below 640 KiB and from 1 MiB up on a small PC).
fn page_by_monitor(q: &mut Qmp, page: u32) -> Vec<u8> {
    let text = q.hmp(&format!("xp /512gx {:#x}", page as usize * PAGE_SIZE)).unwrap();
    let words = text.lines().filter_map(|l| l.split_once(": ")).flat_map(|(_, w)| w.split_whitespace());
    words.flat_map(|w| u64::from_str_radix(&w[2..], 16).unwrap().to_le_bytes()).collect()
}

fn compare_with_monitor(q: &mut Qmp, ram: &GuestRam, block: usize) {
    let mut compared = 0;
    let mut page = vec![0; PAGE_SIZE];
    for p in ram.data_ranges(block).flatten().filter(|p| !(0xa0..0x100).contains(p)) {
        ram.read_at(block, p, &mut page).unwrap();
        if page.iter().any(|b| *b != 0) && compared < 40 {
            assert_eq!(page, page_by_monitor(q, p), "page {p:#x}");
            compared += 1;
        }
    }
    assert!(compared >= 3, "the BIOS left only {compared} pages");
    let known: u32 = ram.data_ranges(block).map(|r| r.end - r.start).sum();
    assert!(known < ram.blocks()[block].pages(), "no hole in {known} pages of an idle BIOS");
    println!("{compared} pages compared, {known} of {} known as data", ram.blocks()[block].pages());
}

#[test]
fn a_memfd_guest_is_read_from_its_descriptor() {
    let memfd = "memory-backend-memfd,id=m0,size=64M,share=on";
    let Some(g) = Guest::start(&["-machine", "pc,memory-backend=m0", "-object", memfd]) else { return };
    let mut q = g.connect();
    g.warm(&mut q);
    let ram = g.ram(&mut q);
    println!("QEMU {}: {:?}", q.version(), ram.blocks());
    let m0 = ram.find("m0").unwrap();
    assert_eq!((ram.blocks()[m0].way, ram.blocks()[m0].bytes), (Way::File, 64 << 20));
    compare_with_monitor(&mut q, &ram, m0);
}

#[test]
fn an_anonymous_guest_is_read_through_its_process() {
    let Some(g) = Guest::start(&["-machine", "q35", "-vga", "std"]) else { return };
    let mut q = g.connect();
    g.warm(&mut q);
    let ram = g.ram(&mut q);
    println!("QEMU {}: {:?}", q.version(), ram.blocks());
    let pc = ram.find("pc.ram").unwrap();
    assert_eq!(ram.blocks()[pc].way, Way::Process);
    compare_with_monitor(&mut q, &ram, pc);
}

#[test]
fn two_equal_memfds_are_not_taken_for_each_other() {
    let a = "memory-backend-memfd,id=na,size=32M,share=on";
    let b = "memory-backend-memfd,id=nb,size=32M,share=on";
    let more =
        ["-machine", "q35", "-object", a, "-object", b, "-numa", "node,memdev=na", "-numa", "node,memdev=nb"];
    let Some(g) = Guest::start(&more) else { return };
    let mut q = g.connect();
    let ram = g.ram(&mut q);
    println!("{:?}", ram.blocks());
    // A different mark in each node, written from outside.
    let fds = std::fs::read_dir(format!("/proc/{}/fd", g.child.id())).unwrap().flatten();
    let mut marked = 0;
    for fd in fds.map(|e| e.path()) {
        if std::fs::read_link(&fd).is_ok_and(|l| l.to_string_lossy().contains("memory-backend-memfd")) {
            let f = std::fs::OpenOptions::new().write(true).open(&fd).unwrap();
            f.write_all_at(&[marked + 1; PAGE_SIZE], 100 * PAGE_SIZE as u64).unwrap();
            marked += 1;
        }
    }
    assert_eq!(marked, 2);
    for (name, gpa_page) in [("na", 100), ("nb", 8192 + 100)] {
        let mut page = vec![0; PAGE_SIZE];
        ram.read_at(ram.find(name).unwrap(), 100, &mut page).unwrap();
        assert_eq!(page, page_by_monitor(&mut q, gpa_page), "{name}");
    }
}

#[test]
fn versions_capabilities_busy_monitors_and_death() {
    let Some(mut g) = Guest::start(&["-machine", "pc"]) else { return };
    let mut q = g.connect();
    assert!(q.version() >= Version { major: 7, minor: 2, micro: 0 }, "{}", q.version());
    q.set_capabilities(&[
        ("return-path", true),
        ("events", true),
        ("xbzrle", false),
        ("compress", false),
        ("block", false),
        ("no-such-thing", false),
    ])
    .unwrap();
    let on = q.enabled_capabilities().unwrap();
    assert!(on.contains(&"return-path".into()) && on.contains(&"events".into()), "{on:?}");
    assert!(matches!(q.set_capabilities(&[("no-such-thing", true)]), Err(QmpError::NoCapability { .. })));
    assert_eq!(q.query_migrate().unwrap().status, MigrateStatus::None);
    let second = Qmp::connect(g.socket(), Duration::from_millis(300)).unwrap_err();
    assert!(matches!(second, QmpError::Busy { .. }), "{second}");
    let refused = q.migrate("nonsense").unwrap_err();
    assert!(matches!(refused, QmpError::Refused { .. }), "{refused}");
    g.child.kill().unwrap();
    g.child.wait().unwrap();
    let dead = q.query_status().unwrap_err();
    assert!(dead.is_closed(), "{dead}");
}

#[test]
fn a_target_on_port_zero_tells_where_it_listens_and_quits_when_told() {
    let Some(mut g) = Guest::start(&["-machine", "pc", "-incoming", "defer"]) else { return };
    let mut q = g.connect();
    q.migrate_incoming("tcp:127.0.0.1:0").unwrap();
    let port = q.query_migrate().unwrap().listen_port.unwrap();
    assert!(std::net::TcpListener::bind(("127.0.0.1", port)).is_err(), "port {port} is not taken");
    q.quit().unwrap();
    g.child.wait().unwrap();
}

/// Waits until the migration is over, and QEMU has let the VM go; gives its word.
fn over(q: &mut Qmp) -> String {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let (m, s) = (q.query_migrate().unwrap(), q.query_status().unwrap());
        if m.status.is_final() && s.status != "finish-migrate" {
            return m.word;
        }
        assert!(Instant::now() < until, "{} {}", m.word, s.status);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Has the source stream to the target.
fn stream(source: &mut Qmp, target: &mut Qmp) {
    let (a, b) = UnixStream::pair().unwrap();
    source.give("irlm", a.as_fd()).unwrap();
    target.give("irlm", b.as_fd()).unwrap();
    drop((a, b));
    source.set_capabilities(&[("return-path", true)]).unwrap();
    target.migrate_incoming_and_stay("fd:irlm").unwrap();
    source.migrate("fd:irlm").unwrap();
}

#[test]
fn settings_are_as_they_were_found_after_a_migration_that_failed_and_one_that_was_cancelled() {
    let Some(g) = Guest::start_as(&["-machine", "pc"]) else { return };
    let mut q = g.connect();
    let set = json!({ "downtime-limit": 123, "max-bandwidth": 1 << 20 });
    q.set_parameters(set.as_object().unwrap().clone()).unwrap();
    q.set_capabilities(&[("xbzrle", true), ("auto-converge", true)]).unwrap();
    let (caps, params) = (q.capabilities().unwrap(), q.parameters().unwrap());
    let wanted = [("xbzrle", false), ("return-path", true), ("events", true), ("no-such-thing", false)];
    for cancel in [false, true] {
        let found = q.found(&wanted, &["downtime-limit", "max-bandwidth"]).unwrap();
        q.set_capabilities(&wanted).unwrap();
        // A cancel is not to come too late.
        let limit = if cancel { 1 << 16 } else { 1u64 << 44 };
        let set = json!({ "downtime-limit": 5, "max-bandwidth": limit });
        q.set_parameters(set.as_object().unwrap().clone()).unwrap();
        let (own, its) = UnixStream::pair().unwrap();
        q.give("irlm", its.as_fd()).unwrap();
        drop(its);
        q.migrate("fd:irlm").unwrap();
        if cancel {
            assert!(q.put_back(&found).is_err(), "not while it is under way");
            q.migrate_cancel().unwrap();
        }
        drop(own);
        assert_eq!(over(&mut q), if cancel { "cancelled" } else { "failed" });
        q.put_back(&found).unwrap();
        assert_eq!((q.capabilities().unwrap(), q.parameters().unwrap()), (caps.clone(), params.clone()));
        assert!(q.query_status().unwrap().running);
    }
}

#[test]
fn a_qemu_without_s_that_was_stopped_while_it_waits_does_not_run_when_it_has_loaded() {
    let Some(s) = Guest::start_as(&["-machine", "pc"]) else { return };
    let Some(t) = Guest::start_as(&["-machine", "pc", "-incoming", "defer"]) else { return };
    let (mut source, mut target) = (s.connect(), t.connect());
    target.stop().unwrap();
    assert_eq!(target.query_status().unwrap().status, "inmigrate");
    stream(&mut source, &mut target);
    assert_eq!(over(&mut source), "completed");
    assert_eq!(over(&mut target), "completed");
    std::thread::sleep(Duration::from_millis(300));
    let state = target.query_status().unwrap();
    assert!(!state.running && state.status == "paused", "{state:?}");
    target.cont().unwrap();
    assert!(target.query_status().unwrap().running);
}

#[test]
fn a_vm_whose_image_is_locked_is_refused_and_runs_when_the_lock_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=d0,format=raw,file={}", image.display());
    let disk = ["-machine", "pc", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0"];
    let waits = [&disk[..], &["-incoming", "defer", "-S"]].concat();
    let Some(s) = Guest::start_as(&disk) else { return };
    let mut source = s.connect();
    let Some(t) = Guest::start_as(&waits) else { return };
    let mut target = t.connect();
    target.set_capabilities(&[("late-block-activate", true)]).unwrap();
    stream(&mut source, &mut target);
    assert_eq!((over(&mut source), over(&mut target)), ("completed".into(), "completed".into()));
    // The source has let the image go, the target has not taken it.
    let mut holder = Guest::start(&disk).unwrap();
    let _there = holder.connect();
    let refused = target.cont().unwrap_err();
    assert!(matches!(&refused, QmpError::Refused { desc, .. } if desc.contains("lock")), "{refused}");
    assert!(!target.query_status().unwrap().running);
    holder.child.kill().unwrap();
    holder.child.wait().unwrap();
    target.cont().unwrap();
    assert!(target.query_status().unwrap().running);
}

#[test]
fn what_is_known_of_a_qemu_says_whether_it_may_leave_or_take_in() {
    let id = ["-machine", "pc", "-name", "web1", "-uuid", "5a1f6a1e-0000-4000-8000-000000000001"];
    let Some(s) = Guest::start_as(&id) else { return };
    let Some(t) = Guest::start_as(&[&id[..], &["-incoming", "defer"]].concat()) else { return };
    let Some(other) = Guest::start(&["-machine", "q35"]) else { return };
    let facts = |g: &Guest| {
        drop(g.connect());
        Front::Qmp(g.socket()).facts(Duration::from_secs(20)).unwrap()
    };
    let (a, b, c) = (facts(&s), facts(&t), facts(&other));
    println!("{a:?}");
    assert_eq!((a.identity.differs(&b.identity), a.identity.name.as_str()), (None, "web1"));
    assert_eq!((a.identity.memory, a.process.unwrap().pid), (64 << 20, s.child.id()));
    let unlike = a.identity.differs(&c.identity).unwrap();
    assert!(unlike.contains("UUID") && unlike.contains("name") && unlike.contains("machine"), "{unlike}");
    assert_eq!((source_refusals(&a).len(), target_refusals(&b).len()), (0, 0));
    assert_eq!((source_refusals(&b).len(), target_refusals(&a).len()), (1, 1));
    assert!(source_refusals(&c)[0].contains("never run"));
    // Somebody's own migration.
    let mut q = s.connect();
    let slow = json!({ "max-bandwidth": 1 << 16 });
    q.set_parameters(slow.as_object().unwrap().clone()).unwrap();
    let (_own, its) = UnixStream::pair().unwrap();
    q.give("theirs", its.as_fd()).unwrap();
    q.migrate("fd:theirs").unwrap();
    drop(q);
    let busy = source_refusals(&facts(&s));
    assert!(busy.len() == 1 && busy[0].contains("another migration"), "{busy:?}");
}
