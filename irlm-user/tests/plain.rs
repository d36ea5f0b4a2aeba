//! The plain-QEMU methods with two real QEMUs: what is loaded is what was sent, and whatever ends early ends with the
//! guest running on at its source. Set IRLM_QEMU (and IRLM_QEMU_TARGET) to choose them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

use irlm_user::control::plain::{
    Kept, SourceEnd, TargetEnd, listen, look, run, start, watch_source, watch_target,
};
use irlm_user::core::handover::GuestState;
use irlm_user::core::units::PAGE_SIZE;
use irlm_user::flow::unix_ns;
use irlm_user::host::ram::GuestRam;
use irlm_user::host::sched::peer_pid;
use irlm_user::net::qmp::{Qmp, QmpError};
use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const MIB: usize = 48;

struct Guest {
    child: Child,
    qmp: Qmp,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn start(env: &str, more: &[&str]) -> Option<Self> {
        Self::start_unstopped(env, &[&["-S"], more].concat())
    }

    /// `None`, with the reason printed, where there is no QEMU.
    fn start_unstopped(env: &str, more: &[&str]) -> Option<Self> {
        let first = std::env::var("IRLM_QEMU");
        let qemu = std::env::var(env).or(first).unwrap_or_else(|_| "qemu-system-x86_64".into());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let memory = format!("memory-backend-memfd,id=m0,size={MIB}M,share=on");
        let child = Command::new(&qemu)
            .args(["-accel", "tcg", "-machine", "pc-q35-7.2,memory-backend=m0", "-object", &memory])
            .args(["-m", &MIB.to_string(), "-display", "none", "-serial", "none", "-monitor", "none"])
            .args(["-nodefaults", "-qmp", &format!("unix:{},server=on,wait=off", path.display())])
            .args(more)
            .stdin(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(e) => {
                println!("skipped: cannot start {qemu}: {e} (install qemu-system-x86 or set IRLM_QEMU)");
                return None;
            }
        };
        let until = Instant::now() + Duration::from_secs(20);
        let qmp = loop {
            match Qmp::connect(&path, Duration::from_secs(5)) {
                Ok(q) => break q,
                Err(QmpError::Connect { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => panic!("{e}"),
            }
        };
        Some(Self { child, qmp, _dir: dir })
    }

    /// A running source with `mib` MiB of its RAM filled with what does not compress, and a waiting target.
    fn pair(mib: usize) -> Option<(Self, Self)> {
        let mut source = Self::start("IRLM_QEMU", &[])?;
        let target = Self::start("IRLM_QEMU_TARGET", &["-incoming", "defer"])?;
        let mut fds = std::fs::read_dir(format!("/proc/{}/fd", source.child.id())).unwrap().flatten();
        let is_ram = |p: &std::fs::DirEntry| {
            std::fs::read_link(p.path()).is_ok_and(|l| l.to_string_lossy().contains("memory-backend-memfd"))
        };
        let fd = fds.find(is_ram).unwrap().path();
        let ram = std::fs::OpenOptions::new().write(true).open(fd).unwrap();
        let mut noise = vec![0u8; mib << 20];
        let mut x = 88_172_645_463_325_252u64;
        for w in noise.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            w.copy_from_slice(&x.to_le_bytes());
        }
        ram.write_all_at(&noise, 2 << 20).unwrap();
        source.qmp.cont().unwrap();
        Some((source, target))
    }

    fn ram(&mut self) -> Vec<u8> {
        let pid = peer_pid(&self.qmp).unwrap().unwrap();
        let ram = GuestRam::open(pid, &mut |c| self.qmp.hmp(c).map_err(Into::into)).unwrap();
        let block = ram.find("m0").unwrap();
        let mut all = vec![0; MIB << 20];
        for r in ram.data_ranges(block) {
            let at = r.start as usize * PAGE_SIZE..r.end as usize * PAGE_SIZE;
            ram.read_at(block, r.start, &mut all[at]).unwrap();
        }
        all
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn both_methods_move_a_guest_and_its_ram_is_identical() {
    for multifd in [false, true] {
        let Some((mut s, mut t)) = Guest::pair(32) else { return };
        let to = listen(&mut t.qmp, multifd, IP).unwrap();
        let started = start(&mut s.qmp, multifd, to, 300, None).unwrap();
        let never = AtomicBool::new(false);
        let mut polls = 0;
        let end =
            watch_source(&mut s.qmp, &Cell::new(GuestState::Running), &never, &|| None, &mut |_| polls += 1)
                .unwrap();
        let SourceEnd::Completed { stopped, completed_ns, info } = end else { panic!("{end:?}") };
        let stopped = stopped.unwrap();
        assert!(
            stopped.elapsed() < Duration::from_nanos(unix_ns() - started),
            "by the clock that does not step"
        );
        let stopped_ns = stopped.unix_ns;
        let loaded = watch_target(&mut t.qmp, &never, &mut |_| {}).unwrap();
        let TargetEnd::Loaded { at_ns } = loaded else { panic!("{loaded:?}") };
        assert!(
            started < stopped_ns && stopped_ns < completed_ns && stopped_ns < at_ns,
            "{stopped_ns} {at_ns}"
        );
        assert!(polls > 0 && info.transferred > 20 << 20, "{info:?}");
        assert!(!s.qmp.query_status().unwrap().running && !t.qmp.query_status().unwrap().running);
        assert!(s.ram() == t.ram(), "multifd {multifd}: RAM differs");
        assert!(run(&mut t.qmp).unwrap() > at_ns && t.qmp.query_status().unwrap().running);
        run(&mut t.qmp).unwrap();
        println!(
            "{} to {}, multifd {multifd}: {} bytes, stop to loaded {} us",
            s.qmp.version(),
            t.qmp.version(),
            info.transferred,
            (at_ns - stopped_ns) / 1000
        );
    }
}

#[test]
fn a_target_that_dies_leaves_the_guest_running_at_its_source() {
    let Some((mut s, mut t)) = Guest::pair(40) else { return };
    let to = listen(&mut t.qmp, false, IP).unwrap();
    start(&mut s.qmp, false, to, 1, None).unwrap();
    t.child.kill().unwrap();
    let never = AtomicBool::new(false);
    let end =
        watch_source(&mut s.qmp, &Cell::new(GuestState::Running), &never, &|| None, &mut |_| {}).unwrap();
    assert!(matches!(end, SourceEnd::Failed { .. }), "{end:?}");
    assert!(s.qmp.query_status().unwrap().running);
    let end = watch_target(&mut t.qmp, &never, &mut |_| {}).unwrap_err();
    assert!(end.to_string().contains("ended"), "{end}");
}

#[test]
fn a_cancelled_guest_runs_on_and_can_be_moved_again() {
    let Some((mut s, mut t)) = Guest::pair(40) else { return };
    let to = listen(&mut t.qmp, false, IP).unwrap();
    start(&mut s.qmp, false, to, 300, None).unwrap();
    // Slow enough that the cancel is not too late.
    let mut slow = serde_json::Map::new();
    slow.insert("max-bandwidth".into(), serde_json::json!(1 << 20));
    s.qmp.set_parameters(slow).unwrap();
    let cancel = AtomicBool::new(false);
    let end = watch_source(&mut s.qmp, &Cell::new(GuestState::Running), &cancel, &|| None, &mut |_| {
        cancel.store(true, Ordering::Release);
    })
    .unwrap();
    assert!(matches!(end, SourceEnd::Cancelled), "{end:?}");
    assert!(s.qmp.query_status().unwrap().running);
    // It ends when its stream breaks, and may have said so before.
    let end = watch_target(&mut t.qmp, &AtomicBool::new(false), &mut |_| {});
    assert!(!matches!(end, Ok(TargetEnd::Loaded { .. } | TargetEnd::Cancelled)), "{end:?}");
    let Some(mut again) = Guest::start("IRLM_QEMU_TARGET", &["-incoming", "defer"]) else { return };
    let to = listen(&mut again.qmp, true, IP).unwrap();
    start(&mut s.qmp, true, to, 300, None).unwrap();
    let end = watch_source(
        &mut s.qmp,
        &Cell::new(GuestState::Running),
        &AtomicBool::new(false),
        &|| None,
        &mut |_| {},
    )
    .unwrap();
    assert!(matches!(end, SourceEnd::Completed { .. }), "{end:?}");
}

fn settings(qmp: &mut Qmp) -> (serde_json::Value, serde_json::Value) {
    let capabilities = qmp.execute("query-migrate-capabilities", serde_json::Value::Null).unwrap();
    (capabilities, qmp.execute("query-migrate-parameters", serde_json::Value::Null).unwrap())
}

#[test]
fn a_paused_guest_stays_paused_a_target_without_s_too_and_settings_are_as_they_were() {
    let Some((mut s, _)) = Guest::pair(8) else { return };
    // As its owner has it: paused, and with settings of its own.
    s.qmp.stop().unwrap();
    let mut own = serde_json::Map::new();
    own.insert("max-bandwidth".into(), serde_json::json!(77 << 20));
    own.insert("downtime-limit".into(), serde_json::json!(123));
    s.qmp.set_parameters(own).unwrap();
    s.qmp.set_capabilities(&[("xbzrle", true)]).unwrap();
    let Some(mut t) = Guest::start_unstopped("IRLM_QEMU_TARGET", &["-incoming", "defer"]) else { return };
    let found = [settings(&mut s.qmp), settings(&mut t.qmp)];
    let kept = [Kept::of(&mut s.qmp).unwrap(), Kept::of(&mut t.qmp).unwrap()];
    // Told to listen by a group that never came, and used again.
    listen(&mut t.qmp, true, IP).unwrap();
    let to = listen(&mut t.qmp, true, IP).unwrap();
    let guest = look(&mut s.qmp).unwrap();
    assert_eq!(guest, GuestState::Paused);
    start(&mut s.qmp, true, to, 300, None).unwrap();
    assert!(settings(&mut s.qmp) != found[0], "something is to be put back");
    let never = AtomicBool::new(false);
    let end = watch_source(&mut s.qmp, &Cell::new(guest), &never, &|| None, &mut |_| {}).unwrap();
    assert!(matches!(end, SourceEnd::Completed { .. }), "{end:?}");
    let end = watch_target(&mut t.qmp, &never, &mut |_| {}).unwrap();
    assert!(matches!(end, TargetEnd::Loaded { .. }), "{end:?}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!t.qmp.query_status().unwrap().running && !s.qmp.query_status().unwrap().running);
    kept[0].restore(&mut s.qmp).unwrap();
    kept[1].restore(&mut t.qmp).unwrap();
    assert_eq!([settings(&mut s.qmp), settings(&mut t.qmp)], found);
    // The source's copy is nobody's to move again; neither is a target that has its VM.
    assert!(look(&mut s.qmp).unwrap_err().to_string().contains("completed a migration"));
    assert!(listen(&mut t.qmp, true, IP).unwrap_err().to_string().contains("does not wait"));
}

#[test]
fn a_running_guest_does_not_run_at_a_target_without_s_before_it_is_told_to() {
    let Some((mut s, _)) = Guest::pair(8) else { return };
    let Some(mut t) = Guest::start_unstopped("IRLM_QEMU_TARGET", &["-incoming", "defer"]) else { return };
    let to = listen(&mut t.qmp, false, IP).unwrap();
    let guest = look(&mut s.qmp).unwrap();
    start(&mut s.qmp, false, to, 300, None).unwrap();
    let never = AtomicBool::new(false);
    let end = watch_source(&mut s.qmp, &Cell::new(guest), &never, &|| None, &mut |_| {}).unwrap();
    assert!(matches!(end, SourceEnd::Completed { .. }), "{end:?}");
    watch_target(&mut t.qmp, &never, &mut |_| {}).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(!t.qmp.query_status().unwrap().running);
    run(&mut t.qmp).unwrap();
    assert!(t.qmp.query_status().unwrap().running);
}
