//! Against the real kernel: threads of this process and of another touch memory that is filled in from here.

use super::*;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

/// A shared mapping of a memfd, as a VMM's guest memory is.
struct Memory {
    file: File,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is only touched through `get`, which reads volatile bytes, and by the kernel.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(pages: usize) -> Self {
        let file =
            File::from(rustix::fs::memfd_create("uffd-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let bytes = pages * PAGE_SIZE;
        file.set_len(bytes as u64).unwrap();
        // SAFETY: a new mapping of a file that only this test has.
        let base = unsafe {
            mmap(null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0).unwrap()
        };
        Self { file, base: base.cast(), bytes }
    }
    fn range(&self) -> (u64, u64) {
        (self.base as u64, self.bytes as u64)
    }
    fn arm(&self, mode: Mode) -> Option<Uffd> {
        // SAFETY: the test's own mapping, which only its helper threads touch.
        match unsafe { arm(&[self.range()], mode) } {
            Ok(fd) => Some(Uffd::new(fd, &[self.range()]).unwrap()),
            Err(e) => {
                println!("skipped: {e}");
                None
            }
        }
    }
    fn give_away(&self, page: usize, count: usize) -> rustix::io::Result<()> {
        assert!((page + count) * PAGE_SIZE <= self.bytes);
        // SAFETY: within the mapping; nobody relies on what these pages hold.
        unsafe { madvise(self.base.add(page * PAGE_SIZE).cast(), count * PAGE_SIZE, Advice::LinuxRemove) }
    }
    /// The first byte of a page; waits until somebody has filled it in.
    fn get(&self, page: usize) -> u8 {
        assert!(page * PAGE_SIZE < self.bytes);
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.base.add(page * PAGE_SIZE).read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; nobody holds a pointer into it any more.
        unsafe { munmap(self.base.cast(), self.bytes) }.unwrap();
    }
}

/// The next events; fails after ten seconds.
fn events(u: &Uffd) -> Vec<Event> {
    let (mut list, until) = (Vec::new(), Instant::now() + Duration::from_secs(10));
    while u.read(&mut list).unwrap() == 0 {
        assert!(Instant::now() < until, "no event came");
        std::thread::sleep(Duration::from_micros(200));
    }
    list
}

fn page_of(byte: u8) -> Vec<u8> {
    vec![byte; PAGE_SIZE]
}
const WHOLE: fn(u32) -> Done = |pages| Done { pages, stop: None };

#[test]
fn missing_pages_are_copied_zeroed_and_never_overwritten() {
    let m = Memory::new(64);
    let Some(u) = m.arm(Mode::Missing) else { return };
    std::thread::scope(|s| {
        let readers: Vec<_> = [3usize, 9, 20]
            .map(|p| {
                (
                    p,
                    s.spawn({
                        let m = &m;
                        move || m.get(p)
                    }),
                )
            })
            .into();
        let mut faults = Vec::new();
        while faults.len() < 3 {
            faults.extend(events(&u));
        }
        for e in &faults {
            let Event::Fault { slot: 0, page, minor: false, write: false } = *e else { panic!("{e:?}") };
            let done = if page == 9 { u.zero(0, 9, 1) } else { u.copy(0, page, &page_of(page as u8)) };
            assert_eq!(done.unwrap(), WHOLE(1));
        }
        for (p, r) in readers {
            assert_eq!(r.join().unwrap(), if p == 9 { 0 } else { p as u8 });
        }
    });
    // A run that meets a page which is there stops before it.
    assert_eq!(u.copy(0, 18, &page_of(7).repeat(4)).unwrap(), Done { pages: 2, stop: Some(Stop::Present) });
    assert_eq!(u.copy(0, 21, &page_of(7).repeat(4)).unwrap(), WHOLE(4));
    assert_eq!(u.zero(0, 0, 10).unwrap(), Done { pages: 3, stop: Some(Stop::Present) });
    assert_eq!((m.get(18), m.get(20), m.get(24), m.get(0)), (7, 20, 7, 0));
    // What the file has from elsewhere is there, too.
    m.file.write_all_at(&page_of(5), 40 * PAGE_SIZE as u64).unwrap();
    assert_eq!(u.copy(0, 40, &page_of(6)).unwrap(), Done { pages: 0, stop: Some(Stop::Present) });
    assert_eq!(m.get(40), 5);
    for (page, count) in [(64, 1), (63, 2), (u32::MAX, 2)] {
        assert!(matches!(u.zero(0, page, count), Err(UffdError::Outside { .. })));
    }
    assert!(matches!(u.wake(1, 0, 1), Err(UffdError::Outside { .. })));
}

#[test]
fn pages_written_into_the_file_are_mapped() {
    let m = Memory::new(64);
    let Some(u) = m.arm(Mode::Minor) else { return };
    m.file.write_all_at(&page_of(4).repeat(3), 10 * PAGE_SIZE as u64).unwrap();
    std::thread::scope(|s| {
        let in_file = s.spawn(|| m.get(11));
        assert_eq!(events(&u), [Event::Fault { slot: 0, page: 11, minor: true, write: false }]);
        assert_eq!(u.map(0, 10, 3).unwrap(), WHOLE(3));
        assert_eq!(in_file.join().unwrap(), 4);
        let hole = s.spawn(|| m.get(30));
        assert_eq!(events(&u), [Event::Fault { slot: 0, page: 30, minor: false, write: false }]);
        assert_eq!(u.map(0, 30, 1).unwrap(), Done { pages: 0, stop: Some(Stop::NotInFile) });
        m.file.write_all_at(&page_of(8), 30 * PAGE_SIZE as u64).unwrap();
        assert_eq!(u.map(0, 30, 1).unwrap(), WHOLE(1));
        assert_eq!(hole.join().unwrap(), 8);
    });
    assert_eq!(u.map(0, 11, 1).unwrap(), Done { pages: 0, stop: Some(Stop::Present) });
}

#[test]
fn pages_given_away_are_told_of_before_they_go() {
    let m = Memory::new(16);
    let Some(u) = m.arm(Mode::Missing) else { return };
    assert_eq!(u.copy(0, 0, &page_of(1).repeat(16)).unwrap(), WHOLE(16));
    std::thread::scope(|s| {
        let gives = s.spawn(|| m.give_away(4, 3));
        // While the layout is being changed nothing is placed: the event comes first.
        while !gives.is_finished() {
            let before = u.copy(0, 15, &page_of(9)).unwrap();
            assert!(matches!(before.stop, Some(Stop::Present | Stop::Changing)), "{before:?}");
            let mut list = Vec::new();
            if u.read(&mut list).unwrap() > 0 {
                assert_eq!(list, [Event::Removed { slot: 0, page: 4, count: 3 }]);
                break;
            }
        }
        gives.join().unwrap().unwrap();
        let reads = s.spawn(|| m.get(5));
        assert!(matches!(events(&u)[..], [Event::Fault { page: 5, .. }]));
        assert_eq!(u.zero(0, 5, 1).unwrap(), WHOLE(1));
        assert_eq!(reads.join().unwrap(), 0);
    });
}

#[test]
fn what_is_not_mapped_any_more_is_told_apart_from_what_is_there() {
    let m = Memory::new(16);
    let Some(u) = m.arm(Mode::Missing) else { return };
    // SAFETY: the upper half of the test's own mapping, which nobody touches; mapping it anew keeps `drop` right.
    unsafe {
        let half = m.base.add(8 * PAGE_SIZE).cast();
        rustix::mm::mmap_anonymous(half, 8 * PAGE_SIZE, ProtFlags::READ, MapFlags::PRIVATE | MapFlags::FIXED)
            .unwrap();
    }
    assert_eq!(u.copy(0, 2, &page_of(1)).unwrap(), WHOLE(1));
    assert_eq!(u.copy(0, 9, &page_of(1)).unwrap(), Done { pages: 0, stop: Some(Stop::NoMapping) });
    assert_eq!(u.zero(0, 9, 1).unwrap(), Done { pages: 0, stop: Some(Stop::NoMapping) });
}

#[test]
fn a_new_reader_hears_again_of_who_waits() {
    let m = Memory::new(4);
    let Some(u) = m.arm(Mode::Missing) else { return };
    std::thread::scope(|s| {
        let waits = s.spawn(|| m.get(2));
        assert_eq!(events(&u).len(), 1);
        // The reader dies here: its successor knows nothing of that fault.
        let next = Uffd::new(u.as_fd().try_clone_to_owned().unwrap(), &[m.range()]).unwrap();
        next.wake_all().unwrap();
        assert_eq!(events(&next), [Event::Fault { slot: 0, page: 2, minor: false, write: false }]);
        next.copy(0, 2, &page_of(3)).unwrap();
        assert_eq!(waits.join().unwrap(), 3);
    });
}

#[test]
fn slots_that_make_no_sense_are_refused() {
    let Ok(fd) = open() else {
        println!("skipped: no userfaultfd here");
        return;
    };
    let p = PAGE_SIZE as u64;
    for slots in
        [&[(1, p)][..], &[(p, 1)], &[(p, 0)], &[(u64::MAX - p + 1, 2 * p)], &[(p, 4 * p), (3 * p, p)]]
    {
        let got = Uffd::new(fd.try_clone().unwrap(), slots);
        assert!(matches!(got, Err(UffdError::Range { .. })), "{slots:?}: {got:?}");
    }
    assert!(Uffd::new(fd, &[(p, p), (2 * p, p)]).is_ok());
}

const CHILD: &str = "IRLM_TEST_UFFD_SOCKET";
const PAGES: usize = 32;

/// Not a test by itself: the other process of the next one.
#[test]
fn child_that_touches() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let Some(path) = std::env::var_os(CHILD) else { return };
    let m = Memory::new(PAGES);
    // SAFETY: the test's own mapping, which only this thread touches.
    let fd = unsafe { arm(&[m.range()], Mode::Missing) }.unwrap();
    let mut socket = std::os::unix::net::UnixStream::connect(path).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let base = (m.base as u64).to_ne_bytes();
    sendmsg(&socket, &[io::IoSlice::new(&base)], &mut control, SendFlags::empty()).unwrap();
    let sum: u64 = (0..PAGES).map(|p| u64::from(m.get(p))).sum();
    socket.write_all(&sum.to_ne_bytes()).unwrap();
    // Lives until the other end has seen enough.
    let _ = socket.read(&mut [0]);
}

#[test]
fn another_process_is_served_until_its_end() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    if let Err(e) = open() {
        println!("skipped: {e}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "host::uffd::tests::child_that_touches", "--nocapture"])
        .env(CHILD, &path)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut socket = listener.accept().unwrap().0;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut base = [0u8; 8];
    recvmsg(&socket, &mut [io::IoSliceMut::new(&mut base)], &mut control, RecvFlags::empty()).unwrap();
    let fd = control
        .drain()
        .find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .unwrap();
    let u = Uffd::new(fd, &[(u64::from_ne_bytes(base), (PAGES * PAGE_SIZE) as u64)]).unwrap();
    let mut served = 0;
    while served < PAGES {
        for e in events(&u) {
            let Event::Fault { page, .. } = e else { panic!("{e:?}") };
            served += u.copy(0, page, &page_of(page as u8)).unwrap().pages as usize;
        }
    }
    let mut sum = [0; 8];
    socket.read_exact(&mut sum).unwrap();
    assert_eq!(u64::from_ne_bytes(sum), (0..PAGES as u64).sum::<u64>());
    drop(socket);
    child.wait().unwrap();
    assert!(matches!(u.copy(0, 0, &page_of(1)), Err(UffdError::ProcessGone)));
}
