//! `irlm vmm` as agents use it: real KVM, a guest whose memory can be predicted (`tests/src/steps.rs`), the control
//! socket, and a second process that goes on where the first stopped.
//!
//! Without `/dev/kvm` the reason is printed and the tests pass.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

#[path = "../../tests/src/payload.rs"]
#[expect(unreachable_pub, dead_code, reason = "the lab has it as a public module")]
mod payload;
#[path = "../../tests/src/steps.rs"]
#[expect(unreachable_pub, reason = "the lab has it as a public module")]
mod steps;

use irlm_user::host::sched::peer_pid;
use irlm_user::net::vmm::{Slot, State, UffdMode, Vmm, VmmError};
use std::collections::HashSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use steps::{Seen, Steps};

const WAIT: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

/// One at a time: a software KVM shares few processors, and some of this is timed.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_kvm() -> bool {
    let none = !Path::new("/dev/kvm").exists();
    if none {
        println!("skipped: no /dev/kvm");
    }
    none
}

/// A VMM process; dies with the value.
struct Guest {
    child: Child,
    dir: tempfile::TempDir,
    vmm: Vmm,
    slots: Vec<Slot>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Starts `irlm vmm` with these arguments and a control socket in `dir`.
fn spawn(dir: &Path, args: &[String]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_irlm"))
        .arg("vmm")
        .arg("--control")
        .arg(dir.join("vmm"))
        .args(args)
        .args(["--serial", "none"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn connect(child: &mut Child, path: &Path) -> Vmm {
    let until = Instant::now() + WAIT;
    loop {
        match Vmm::connect(path, Duration::from_secs(5)) {
            Ok(v) => return v,
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
        assert_eq!(child.try_wait().unwrap(), None, "the VMM has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Guest {
    fn start(args: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, args)
    }

    fn start_in(dir: tempfile::TempDir, args: &[String]) -> Self {
        let mut child = spawn(dir.path(), args);
        let mut vmm = connect(&mut child, &dir.path().join("vmm"));
        let slots = vmm.memory().unwrap();
        Self { child, dir, vmm, slots }
    }

    /// A VM that runs `steps` when resumed.
    fn running(steps: &Steps, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, steps.image()).unwrap();
        let mut args = shape(steps, more);
        args.extend(["--paused".into(), "--payload".into(), image.display().to_string()]);
        Self::start_in(dir, &args)
    }

    /// A VM of the same shape that waits.
    fn incoming(steps: &Steps, more: &[&str]) -> Self {
        let mut args = shape(steps, more);
        args.push("--incoming".into());
        Self::start(&args)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vmm")
    }

    fn page(&self, gfn: u32, page: &mut [u8; 4096]) -> std::io::Result<()> {
        let at = u64::from(gfn) << 12;
        let slot = self.slots.iter().find(|s| (s.guest_phys..s.guest_phys + s.bytes).contains(&at)).unwrap();
        let file = std::fs::File::from(slot.fd.try_clone().unwrap());
        file.read_exact_at(page, at - slot.guest_phys)
    }

    fn seen(&self, steps: &Steps, vcpu: u32) -> Seen {
        let mut page = [0; 4096];
        self.page(steps.control_page(vcpu), &mut page).unwrap();
        Steps::seen(&page)
    }

    /// All processors by the model; they must stand still.
    fn check(&self, steps: &Steps) -> Vec<Seen> {
        (0..steps.vcpus).map(|v| steps.check(v, |n, page| self.page(n, page)).unwrap()).collect()
    }

    /// Waits until every processor has done so many steps more than `since` says.
    fn wait(&self, steps: &Steps, since: &[Seen], more: u32) {
        let until = Instant::now() + WAIT;
        for v in 0..steps.vcpus {
            let from = since.get(v as usize).map_or(0, |s| s.step);
            while self.seen(steps, v).step < from + more {
                let seen = self.seen(steps, v);
                assert!(Instant::now() < until, "processor {v} is at {seen:?}, from {from} on");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn take_memory(&self, from: &Self) {
        let mut chunk = vec![0; 1 << 20];
        for (to, from) in self.slots.iter().zip(&from.slots) {
            let to = std::fs::File::from(to.fd.try_clone().unwrap());
            let from = std::fs::File::from(from.fd.try_clone().unwrap());
            for at in (0..).map(|n| n * MIB) {
                let got = from.read_at(&mut chunk, at).unwrap();
                if got == 0 {
                    break;
                }
                to.write_all_at(&chunk[..got], at).unwrap();
            }
        }
    }
}

fn shape(steps: &Steps, more: &[&str]) -> Vec<String> {
    let mib = steps.memory().div_ceil(MIB);
    let mut args = vec![format!("--vcpus={}", steps.vcpus), format!("--memory={mib}M")];
    args.extend(more.iter().map(|s| (*s).to_owned()));
    args
}

/// As fast as it can, over 2 MiB a processor, from 1 MiB on.
fn busy(vcpus: u32) -> Steps {
    Steps { vcpus, first: 256, pages: 512, stride: 37, spin: 0 }
}

/// Guest pages of a harvest, over slots.
fn harvested(g: &mut Guest) -> HashSet<u32> {
    let mut bits = Vec::new();
    let said = g.vmm.dirty_harvest(&mut bits).unwrap();
    let mut out = HashSet::new();
    for (slot, bits) in g.slots.iter().zip(&bits) {
        for (i, word) in (0u32..).zip(bits) {
            let first = (slot.guest_phys >> 12) as u32 + i * 64;
            out.extend((0..64).filter(|b| word >> b & 1 == 1).map(|b| first + b));
        }
    }
    assert_eq!(out.len() as u64, said);
    out
}

/// What a processor has written between two looks while it stood still, and what it may have.
fn model(steps: &Steps, v: u32, from: Seen, to: Seen) -> (HashSet<u32>, HashSet<u32>) {
    let must: HashSet<u32> =
        (from.step + 2..=to.step).map(|s| steps.page_of(v, s)).chain([steps.control_page(v)]).collect();
    // Where it stood still in the middle of a step.
    let may = [from.step + 1, to.step + 1].map(|s| steps.page_of(v, s)).into();
    (must, may)
}

#[test]
fn the_log_of_writes_is_what_was_written() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    for (dirty, slot) in [("bitmap", "64M"), ("bitmap", "2M"), ("ring", "2M"), ("ring=4096", "64M")] {
        for vcpus in [1, 2, 4] {
            let steps = Steps { pages: 1024, ..busy(vcpus) };
            let mut g = Guest::running(&steps, &["--dirty", dirty, "--slot", slot]);
            g.vmm.resume().unwrap();
            g.wait(&steps, &[], 50);
            g.vmm.pause().unwrap();
            g.vmm.dirty_start().unwrap();
            let mut before = g.check(&steps);
            for more in [10, 400, 3] {
                g.vmm.resume().unwrap();
                g.wait(&steps, &before, more);
                g.vmm.pause().unwrap();
                let after = g.check(&steps);
                let seen = harvested(&mut g);
                let mut allowed = HashSet::new();
                for v in 0..vcpus {
                    let (must, may) = model(&steps, v, before[v as usize], after[v as usize]);
                    let missing: Vec<_> = must.difference(&seen).collect();
                    assert!(missing.is_empty(), "{dirty} {vcpus}: processor {v} wrote {missing:?}");
                    allowed.extend(must);
                    allowed.extend(may);
                }
                let extra: Vec<_> = seen.difference(&allowed).collect();
                let lost = g.vmm.status().unwrap().ring_lost;
                if lost == 0 {
                    assert!(extra.is_empty(), "{dirty} {vcpus}: nobody wrote {extra:x?}");
                } else {
                    println!("{dirty} {vcpus}: this KVM let a ring overflow {lost} times");
                }
                assert!(dirty != "bitmap" || lost == 0);
                before = after;
            }
            assert!(harvested(&mut g).is_empty(), "nothing moved");
            g.vmm.dirty_stop().unwrap();
            let refused = g.vmm.dirty_harvest(&mut Vec::new()).unwrap_err().to_string();
            assert!(refused.contains("dirty-start"), "{refused}");
        }
    }
}

#[test]
fn a_ring_that_nobody_empties_fills_and_loses_nothing() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let steps = Steps { pages: 4099, ..busy(2) };
    let mut g = Guest::running(&steps, &["--dirty", "ring=256"]);
    g.vmm.dirty_start().unwrap();
    g.vmm.resume().unwrap();
    g.wait(&steps, &[], 2000);
    g.vmm.pause().unwrap();
    let status = g.vmm.status().unwrap();
    println!("{} times a ring was full, {} times it had overflowed", status.ring_full, status.ring_lost);
    assert!(status.ring_full >= 2, "{status:?}");
    let (now, seen) = (g.check(&steps), harvested(&mut g));
    for v in 0..2 {
        let (must, _) = model(&steps, v, Seen::default(), now[v as usize]);
        let missing: Vec<_> = must.difference(&seen).collect();
        assert!(missing.is_empty(), "processor {v} wrote {missing:?}");
    }
}

#[test]
fn harvests_of_a_running_guest_miss_nothing() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    for dirty in ["bitmap", "ring", "ring=1024"] {
        let steps = busy(2);
        let mut g = Guest::running(&steps, &["--dirty", dirty]);
        let copy = Guest::incoming(&steps, &["--dirty", dirty]);
        g.vmm.dirty_start().unwrap();
        g.vmm.resume().unwrap();
        g.wait(&steps, &[], 10);
        copy.take_memory(&g);
        // What a harvest names is read after it; so whatever is not named again is as it was read.
        let read_again = |g: &mut Guest| {
            let mut page = [0; 4096];
            for gfn in harvested(g) {
                g.page(gfn, &mut page).unwrap();
                let file = std::fs::File::from(copy.slots[0].fd.try_clone().unwrap());
                file.write_all_at(&page, u64::from(gfn) << 12).unwrap();
            }
        };
        for _ in 0..20 {
            read_again(&mut g);
            std::thread::sleep(Duration::from_millis(10));
        }
        g.vmm.pause().unwrap();
        read_again(&mut g);
        println!("{dirty}: {:?}", g.vmm.status().unwrap());
        assert_eq!(g.check(&steps), copy.check(&steps));
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        for gfn in 0..(g.slots[0].bytes >> 12) as u32 {
            g.page(gfn, &mut a).unwrap();
            copy.page(gfn, &mut b).unwrap();
            assert!(a == b, "{dirty}: page {gfn:#x} differs");
        }
    }
}

#[test]
fn another_process_goes_on_without_a_missed_step() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    for vcpus in [1, 2, 4] {
        let steps = busy(vcpus);
        let more = ["--slot", "4M"];
        let mut source = Guest::running(&steps, &more);
        source.vmm.resume().unwrap();
        source.wait(&steps, &[], 600);
        source.vmm.pause().unwrap();
        let before = source.check(&steps);
        let state = source.vmm.save_state().unwrap();
        let again = source.vmm.save_state().unwrap();
        let parsed = irlm_user::host::kvm::snapshot::Snapshot::decode(&state).unwrap();
        let twice = irlm_user::host::kvm::snapshot::Snapshot::decode(&again).unwrap();
        assert_eq!(parsed.differences(&twice), Vec::<String>::new(), "saving changes nothing");
        let mut target = Guest::incoming(&steps, &more);
        target.take_memory(&source);
        target.vmm.load_state(&state).unwrap();
        assert_eq!(target.vmm.status().unwrap().state, State::Paused);
        let taken = target.vmm.save_state().unwrap();
        let taken = irlm_user::host::kvm::snapshot::Snapshot::decode(&taken).unwrap();
        assert_eq!(parsed.differences(&taken), Vec::<String>::new(), "{vcpus} vCPUs");
        source.vmm.quit().unwrap();
        target.vmm.resume().unwrap();
        target.wait(&steps, &before, 1500);
        target.vmm.pause().unwrap();
        let after = target.check(&steps);
        println!("{vcpus} vCPUs: {:?} -> {:?}", before[0], after[0]);
        // And on again, in place.
        target.vmm.resume().unwrap();
        target.wait(&steps, &after, 100);
        target.vmm.pause().unwrap();
        target.check(&steps);
    }
}

#[test]
fn a_pause_is_prompt() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let steps = busy(4);
    let mut g = Guest::running(&steps, &[]);
    let mut worst = Duration::ZERO;
    let mut before = vec![];
    for _ in 0..20 {
        g.vmm.resume().unwrap();
        g.wait(&steps, &before, 20);
        let began = Instant::now();
        g.vmm.pause().unwrap();
        worst = worst.max(began.elapsed());
        assert_eq!(g.vmm.status().unwrap().state, State::Paused);
        before = g.check(&steps);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(before, g.check(&steps), "it stands still");
    }
    println!("the longest pause of 20 took {worst:?}");
    assert!(worst < Duration::from_millis(500), "{worst:?}");
}

#[test]
fn wrong_states_are_refused_and_the_right_one_is_still_taken() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let steps = busy(2);
    let mut source = Guest::running(&steps, &[]);
    let refused = |r: Result<(), VmmError>, word: &str| {
        let e = r.unwrap_err().to_string();
        assert!(e.contains(word) && !e.contains('\n'), "{e}");
    };
    source.vmm.resume().unwrap();
    source.wait(&steps, &[], 20);
    refused(source.vmm.save_state().map(drop), "pause");
    source.vmm.pause().unwrap();
    let state = source.vmm.save_state().unwrap();
    refused(source.vmm.load_state(&state), "--incoming");
    let mut target = Guest::incoming(&steps, &[]);
    refused(target.vmm.resume(), "load-state");
    refused(target.vmm.load_state(&[]), "no saved state");
    refused(target.vmm.load_state(&state[..state.len() - 3]), "cut");
    for at in [0, 9, 17, 30, 5000, state.len() - 1] {
        let mut bad = state.clone();
        bad[at] ^= 4;
        assert!(target.vmm.load_state(&bad).is_err(), "byte {at}");
    }
    let mut small = Guest::incoming(&busy(1), &[]);
    refused(small.vmm.load_state(&state), "2 vCPUs");
    assert_eq!(target.vmm.status().unwrap().state, State::Incoming);
    target.take_memory(&source);
    target.vmm.load_state(&state).unwrap();
    target.vmm.resume().unwrap();
    target.wait(&steps, &source.check(&steps), 50);
}

#[test]
fn a_state_goes_only_where_the_same_disks_are() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let image = |name: &str, sectors: u64| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(sectors * 512).unwrap();
        path.display().to_string()
    };
    let (disk, longer) = (image("disk", 64), image("longer", 65));
    let steps = busy(1);
    let with = |disk: &str| Guest::incoming(&steps, &["--disk", disk]);
    let mut source = Guest::running(&steps, &["--disk", &disk]);
    source.vmm.resume().unwrap();
    source.wait(&steps, &[], 100);
    source.vmm.pause().unwrap();
    let before = source.check(&steps);
    let state = source.vmm.save_state().unwrap();
    let refused = |e: Result<(), VmmError>, why: &str| {
        let e = e.unwrap_err().to_string();
        assert!(e.contains(why) && !e.contains('\n'), "{e}");
    };
    let mut bare = Guest::incoming(&steps, &[]);
    refused(bare.vmm.load_state(&state), "1 virtio devices, and this one has 0");
    refused(with(&longer).vmm.load_state(&state), "a disk of 64 sectors, and here is a disk of 65 sectors");
    let mut target = with(&disk);
    target.take_memory(&source);
    target.vmm.load_state(&state).unwrap();
    source.vmm.quit().unwrap();
    target.vmm.resume().unwrap();
    target.wait(&steps, &before, 100);
}

#[test]
fn the_log_belongs_to_one_connection_and_ends_with_it() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let mut g = Guest::running(&busy(1), &[]);
    assert_eq!(peer_pid(&g.vmm).unwrap(), Some(g.child.id()));
    assert_eq!(g.vmm.status().unwrap().pid, g.child.id());
    let mut other = Vmm::connect(g.socket(), WAIT).unwrap();
    g.vmm.dirty_start().unwrap();
    assert!(other.status().unwrap().dirty_on);
    for r in [other.dirty_start(), other.dirty_harvest(&mut vec![]).map(drop), other.dirty_stop()] {
        assert!(r.unwrap_err().to_string().contains("another connection"));
    }
    g.vmm = Vmm::connect(g.socket(), WAIT).unwrap();
    let until = Instant::now() + WAIT;
    while other.status().unwrap().dirty_on {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    other.dirty_start().unwrap();
}

#[test]
fn who_paused_a_vm_for_a_move_lets_it_run_again_unless_its_owner_has_paused_it() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let mut g = Guest::running(&busy(1), &[]);
    let mut owner = Vmm::connect(g.socket(), WAIT).unwrap();
    owner.resume().unwrap();
    let mut stands = |before: &[&str]| {
        for word in before {
            match *word {
                "move" => g.vmm.pause_for_move().unwrap(),
                "pause" => owner.pause().unwrap(),
                "resume" => owner.resume().unwrap(),
                "away" => g.vmm.give_up().unwrap(),
                "back" => g.vmm.take_back().unwrap(),
                other => panic!("{other}"),
            }
        }
        g.vmm.release().unwrap();
        g.vmm.status().unwrap().state
    };
    assert_eq!(stands(&["move"]), State::Running);
    assert_eq!(stands(&["move", "away", "back"]), State::Running);
    assert_eq!(stands(&["move", "pause"]), State::Paused);
    assert_eq!(stands(&["resume"]), State::Running);
    assert_eq!(stands(&["pause", "move"]), State::Paused);
    assert_eq!(stands(&["resume", "move", "pause", "away", "back"]), State::Paused);
    assert_eq!(stands(&["resume", "move", "resume"]), State::Running);
}

#[test]
fn a_page_that_is_missing_is_asked_for_and_a_guest_that_waits_can_be_ended() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let steps = busy(1);
    let mut source = Guest::running(&steps, &[]);
    source.vmm.resume().unwrap();
    source.wait(&steps, &[], 20);
    source.vmm.pause().unwrap();
    let state = source.vmm.save_state().unwrap();
    let mut target = Guest::incoming(&steps, &[]);
    let asked = match target.vmm.userfault() {
        Ok(u) => u,
        Err(e) => {
            println!("skipped: {e}");
            return;
        }
    };
    assert_eq!(asked.bases.len(), target.slots.len());
    println!("{:?}", asked.mode);
    assert!(matches!(asked.mode, UffdMode::Minor | UffdMode::Missing));
    let again = Vmm::connect(target.socket(), WAIT).unwrap().userfault().unwrap();
    assert_eq!(again.bases, asked.bases);
    target.vmm.load_state(&state).unwrap();
    target.vmm.resume().unwrap();
    // An event comes: 32 bytes, kind first, address at 16.
    let mut event = [0; 32];
    let mut fds = [rustix::event::PollFd::new(&asked.fd, rustix::event::PollFlags::IN)];
    let wait = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&wait)).unwrap(), 1);
    assert_eq!(rustix::io::read(&asked.fd, &mut event).unwrap(), 32);
    let at = u64::from_le_bytes(event[16..24].try_into().unwrap());
    assert_eq!(event[0], 0x12);
    assert!((asked.bases[0]..asked.bases[0] + target.slots[0].bytes).contains(&at), "{at:#x}");
    assert!(target.vmm.status().unwrap().uffd);
    let began = Instant::now();
    let paused = target.vmm.pause();
    println!("a pause while a page is missing: {paused:?} after {:?}", began.elapsed());
    target.vmm.quit().unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while target.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(target.child.wait().unwrap().success());
}

#[test]
fn it_ends_cleanly_and_says_why_it_does_not_start() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let mut g = Guest::running(&busy(2), &[]);
    g.vmm.resume().unwrap();
    let pid = rustix::process::Pid::from_raw(g.child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(g.child.wait().unwrap().success());
    assert!(!g.socket().exists());
    assert!(g.vmm.status().unwrap_err().is_closed());

    let dir = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_irlm"));
        let out = c.arg("vmm").arg("--control").arg(dir.path().join("v")).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let text = String::from_utf8(out.stderr).unwrap();
        assert_eq!(text.trim().lines().count(), 1, "{text}");
        text
    };
    assert!(said(&[]).contains("--payload"));
    assert!(said(&["--payload", "/nowhere/image"]).contains("/nowhere/image"));
    assert!(said(&["--incoming", "--vcpus", "1000"]).contains("1000 vCPUs"));
    assert!(said(&["--incoming", "--dirty", "ring=100"]).contains("powers of two"));
    assert!(said(&["--incoming", "--memory", "1M"]).contains("2 MiB"));
}

#[test]
fn huge_pages_are_given_where_the_host_has_some() {
    if no_kvm() {
        return;
    }
    let _alone = alone();
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if free.ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0) < 2 {
        println!("skipped: the host has no free huge pages (vm.nr_hugepages)");
        return;
    }
    let steps = Steps { pages: 512, ..busy(1) };
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, steps.image()).unwrap();
    let args = ["--memory=4M", "--pages=2M", "--paused", "--payload", image.to_str().unwrap()];
    let mut g = Guest::start_in(dir, &args.map(str::to_owned));
    assert_eq!(g.slots[0].page_bytes, 2 * MIB);
    g.vmm.dirty_start().unwrap();
    g.vmm.resume().unwrap();
    g.wait(&steps, &[], 100);
    g.vmm.pause().unwrap();
    let now = g.check(&steps);
    let (must, _) = model(&steps, 0, Seen::default(), now[0]);
    assert!(must.is_subset(&harvested(&mut g)));
}
