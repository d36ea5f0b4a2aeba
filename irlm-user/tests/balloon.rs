//! A real guest of `irlm vmm` that gives pages away, before it is moved and while its pages are asked for over a userfaultfd that
//! nobody reads for a while.
//!
//! Without `/dev/kvm` the reason is printed and the test passes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

#[path = "../../tests/src/drivers.rs"]
#[expect(unreachable_pub, dead_code, reason = "the lab has it as a public module")]
mod drivers;
#[path = "../../tests/src/payload.rs"]
#[expect(unreachable_pub, dead_code, reason = "the lab has it as a public module")]
mod payload;

use drivers::Drivers;
use irlm_user::net::vmm::{Slot, State, UffdMode, Userfault, Vmm};
use payload::Payload;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(30);
const PAGE: u64 = 4096;
/// The pages that the guest gives, in the order in which it does.
const GIVES: std::ops::Range<u32> = 600..700;

/// A VMM process; dies with the value.
struct Guest {
    child: Child,
    _dir: tempfile::TempDir,
    vmm: Vmm,
    slots: Vec<Slot>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Guest {
    /// With the image, or waiting for a state without one.
    fn start(image: Option<&[u8]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_irlm"));
        command.args(["vmm", "--memory", "4M", "--balloon", "--serial", "none", "--faults", "missing"]);
        match image {
            Some(image) => {
                let path = dir.path().join("image");
                std::fs::write(&path, image).unwrap();
                command.args(["--paused", "--payload"]).arg(path);
            }
            None => {
                command.arg("--incoming");
            }
        }
        let socket = dir.path().join("vmm");
        let mut child = command.arg("--control").arg(&socket).stdin(Stdio::null()).spawn().unwrap();
        let until = Instant::now() + WAIT;
        let mut vmm = loop {
            match Vmm::connect(&socket, Duration::from_secs(10)) {
                Ok(v) => break v,
                Err(e) => assert!(Instant::now() < until, "{e}"),
            }
            assert_eq!(child.try_wait().unwrap(), None, "the VMM has ended");
            std::thread::sleep(Duration::from_millis(5));
        };
        let slots = vmm.memory().unwrap();
        Self { child, _dir: dir, vmm, slots }
    }

    fn memory(&self) -> File {
        self.slots[0].fd.try_clone().unwrap().into()
    }

    /// The first byte of a page, and whether the host has anything for it.
    fn page(&self, page: u32) -> (u8, bool) {
        let (mut byte, at, memory) = ([0], u64::from(page) * PAGE, self.memory());
        let held = rustix::fs::seek(&memory, rustix::fs::SeekFrom::Data(at)) == Ok(at);
        memory.read_exact_at(&mut byte, at).unwrap();
        (byte[0], held)
    }

    /// Pages that it says it has given.
    fn given(&mut self) -> u64 {
        self.vmm.status().unwrap().balloon.unwrap().given / PAGE
    }

    fn wait_given(&mut self, pages: u64) {
        let until = Instant::now() + WAIT;
        while self.given() < pages {
            assert!(Instant::now() < until, "{} pages are given", self.given());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What it is told of: waits for a page that is given away, and takes it.
fn told(u: &Userfault) -> u32 {
    // 32 bytes, kind first, start of the range at 8.
    let mut event = [0; 32];
    let mut fds = [rustix::event::PollFd::new(&u.fd, rustix::event::PollFlags::IN)];
    let wait = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&wait)).unwrap(), 1);
    assert_eq!(rustix::io::read(&u.fd, &mut event).unwrap(), 32);
    assert_eq!(event[0], 0x15);
    let at = u64::from_le_bytes(event[8..16].try_into().unwrap());
    ((at - u.bases[0]) / PAGE) as u32
}

#[test]
fn a_guest_that_gives_pages_away_waits_for_whoever_answers_its_faults() {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let work = Payload { cold: 300..500, hot: 0..0, ticks: 0, spin: 0 };
    let drivers = Drivers { balloon: Some(GIVES), ..Drivers::default() };
    let mut source = Guest::start(Some(&work.image_with(&drivers.begin(), &drivers.turn())));
    for page in GIVES {
        source.memory().write_all_at(&[7; PAGE as usize], u64::from(page) * PAGE).unwrap();
    }
    assert!(source.vmm.balloon(4 * PAGE).is_err(), "it stands still");
    source.vmm.resume().unwrap();
    let mut written = Vec::new();
    source.vmm.dirty_start().unwrap();
    source.vmm.dirty_harvest(&mut written).unwrap();
    // Four at once, and no more than asked for.
    source.vmm.balloon(4 * PAGE).unwrap();
    source.wait_given(4);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!([599, 600, 603, 604].map(|p| source.page(p)), [(0, false), (0, false), (0, false), (7, true)]);
    written.iter_mut().for_each(|w: &mut Vec<u64>| w.fill(0));
    source.vmm.dirty_harvest(&mut written).unwrap();
    assert_eq!(written[0][9] >> (600 - 576) & 0x1f, 0xf, "given pages count as written");
    source.vmm.pause().unwrap();
    let state = source.vmm.save_state().unwrap();
    assert!(Guest::start(None).vmm.balloon(0).is_err());

    // Elsewhere, with all of its pages there, so that nothing but giving is told of.
    let target = || {
        let mut target = Guest::start(None);
        let mut all = vec![0; 4 << 20];
        source.memory().read_exact_at(&mut all, 0).unwrap();
        target.memory().write_all_at(&all, 0).unwrap();
        let u = target.vmm.userfault().unwrap();
        assert_eq!(u.mode, UffdMode::Missing);
        target.vmm.load_state(&state).unwrap();
        target.vmm.resume().unwrap();
        target.vmm.balloon(10 * PAGE).unwrap();
        (target, u)
    };
    let (mut guest, u) = target();
    assert_eq!(told(&u), 604);
    guest.wait_given(5);
    // The next waits. Whoever asks is answered; a pause ends with an error, and holds once it is read.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!((guest.given(), guest.page(605)), (5, (7, true)));
    let e = guest.vmm.pause().unwrap_err().to_string();
    assert!(e.contains("has not left the guest"), "{e}");
    assert_eq!(guest.vmm.status().unwrap().state, State::Pausing);
    assert_eq!(told(&u), 605);
    let until = Instant::now() + WAIT;
    while guest.vmm.status().unwrap().state != State::Paused {
        assert!(Instant::now() < until, "it does not come to stand still");
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.vmm.pause().unwrap();
    guest.vmm.resume().unwrap();
    // With the end of faults nobody is to be told any more, and all that are asked for are given.
    std::thread::sleep(Duration::from_millis(100));
    assert!(guest.given() <= 6);
    guest.vmm.userfault_end().unwrap();
    guest.wait_given(10);
    assert!((604..610).all(|p| guest.page(p) == (0, false)) && guest.page(610) == (7, true));

    // A VMM can be ended while its guest waits so, and somebody has the descriptor who does not read.
    let (mut guest, u) = target();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(guest.given(), 4);
    guest.vmm.quit().unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while guest.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(u);
}
