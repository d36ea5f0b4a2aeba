//! A VM whose pages still come, with real memory behind a real userfaultfd: its source is played here, word by word, and so
//! is its guest.

use super::super::emit::OutError;
use super::super::fetch::Faults;
use super::super::loader::{LoadError, Loader, Note};
use super::super::peers::Peers;
use super::*;
use crate::core::account::Tally;
use crate::core::arrival::{Output, TargetHost};
use crate::core::digest::{Algorithm, Digest, Hasher};
use crate::core::handover::{GuestState, Ran};
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use crate::core::wire::frame::HEADER_LEN;
use crate::core::wire::pages::PagesBuilder;
use crate::core::wire::paging::{Demand, decode_set};
use crate::flow::arrival::{ArrivalOptions, Member};
use crate::flow::{FlowTags, Front, NoTags, Timeouts, Traffic};
use crate::host::kvm::memory::{HostPages, Memory, MemorySpec};
use crate::host::kvm::userfault::{Choice, Mode, Userfault};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::conn::send;
use crate::net::connection::pair as ends;
use crate::net::vmm::UffdMode;
use std::io::{IoSlice, Read as _, Write as _};
use std::path::Path;
use std::thread::JoinHandle;
use vm_memory::{Bytes as _, GuestAddress};

const PAGES: u32 = 1024;
const WAIT: Duration = Duration::from_secs(20);

/// Whoever loads the VM: its pages are never given to it, because the VM runs.
struct Guest {
    memory: Arc<Memory>,
    userfault: Arc<Mutex<Option<Userfault>>>,
}

impl Loader for Guest {
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError> {
        Err(OutError::NoBlocks)
    }
    fn meet(&mut self) -> Result<Option<Process>, MoveError> {
        Ok(None)
    }
    fn set_up(&mut self, _: &Sender, _: &mut Note<'_>) -> Result<(), MoveError> {
        Err(MoveError::refused("it has been called before"))
    }
    fn is_open(&self) -> bool {
        true
    }
    fn blocks(&mut self, _: BlockList) -> Result<(), LoadError> {
        Ok(())
    }
    fn verbatim(&mut self, _: &[u8]) -> Result<(), LoadError> {
        Ok(())
    }
    fn end_ram(&mut self) {}
    fn write(&mut self, _: &[u8]) -> Result<(), LoadError> {
        Ok(())
    }
    fn tally(&mut self) -> Option<Tally> {
        None
    }
    fn memory(&mut self) -> Result<GuestRam, MoveError> {
        Err(MoveError::refused("it is not all there"))
    }
    fn state(&mut self, _: &[u8]) -> Result<(), LoadError> {
        Ok(())
    }
    fn end_stream(&mut self) {}
    fn catch_faults(&mut self, _: Option<&PageSet>) -> Result<Faults, MoveError> {
        let userfault = lock(&self.userfault);
        let u = userfault.as_ref().ok_or_else(|| MoveError::refused("it asks for no pages"))?;
        let slots = self.memory.slots();
        let files = slots.iter().map(|s| (s.name.clone(), s.bytes, s.file.try_clone().unwrap())).collect();
        let mode = match u.mode {
            Mode::Minor => UffdMode::Minor,
            Mode::Missing => UffdMode::Missing,
        };
        let fd = u.fd().try_clone_to_owned()?;
        let bases = slots.iter().map(|s| s.base).collect();
        Ok(Faults { slots: files, userfault: crate::net::vmm::Userfault { fd, mode, bases } })
    }
    fn end_faults(&mut self) -> Result<(), MoveError> {
        match lock(&self.userfault).take() {
            Some(u) => u.end(&self.memory).map_err(MoveError::memory),
            None => Err(MoveError::refused("they have ended")),
        }
    }
    fn look(&mut self) -> Result<Option<bool>, MoveError> {
        Ok(Some(true))
    }
    fn hold(&mut self) -> Result<bool, MoveError> {
        Ok(false)
    }
    fn run(&mut self, _: GuestState) -> Result<Ran, MoveError> {
        Ok(Ran::Runs)
    }
    fn discard(&mut self) -> Result<(), MoveError> {
        Err(MoveError::refused("it runs"))
    }
    fn close(&mut self) {}
}

/// The VM's arrival, on a thread of its own, with all of its pages still to come.
struct World {
    memory: Arc<Memory>,
    shared: Arc<TargetVmShared>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.shared.forget();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_none_or(|e| e.is_ok()) || std::thread::panicking());
    }
}

/// The source's ends of its two connections.
struct Source {
    vm: Connection,
    frames: FrameBuf,
    demand: Connection,
    asked: FrameBuf,
    lacks: PageSet,
}

fn tagged(conn: &Connection, traffic: Traffic) -> Tagged {
    let tags: Arc<dyn FlowTags> = Arc::new(NoTags);
    Tagged::new(&tags, conn.socket(), traffic)
}

fn at(page: u32) -> PageAddr {
    PageAddr { block: BlockIx(0), page }
}

/// What the page holds at the source.
fn content(page: u32) -> PageBytes {
    [(page % 251) as u8 + 1; PAGE_SIZE]
}

fn group(dir: &Path) -> Arc<TargetGroup> {
    let hasher = Hasher::new(Algorithm::Blake3, &[1; 32], "");
    Arc::new(TargetGroup::new(
        Member { name: "g".into(), token: [1; 32], me: HostIx(0), hashers: vec![hasher] },
        TargetHost::new(1000, 1000),
        Peers::new(vec!["127.0.0.1:1".parse().unwrap()]),
        Timeouts::default(),
        Arc::new(NoTags),
        ArrivalOptions { socket_dir: dir.to_owned(), ..ArrivalOptions::default() },
    ))
}

fn spec() -> TargetSpec {
    TargetSpec {
        vm: VmIx(0),
        name: "vm".into(),
        source: HostIx(0),
        domain: 0,
        front: Front::Vmm("/nowhere".into()),
    }
}

fn memory() -> Arc<Memory> {
    let bytes = u64::from(PAGES) * PAGE_SIZE as u64;
    Arc::new(Memory::new(&MemorySpec { bytes, slot_bytes: None, pages: HostPages::Small }).unwrap())
}

/// Its stream is held back at the source as long as pages are said to wait here: half a second of that was seen.
#[test]
fn that_no_page_waits_any_more_is_told_as_soon_as_all_else() {
    let dir = tempfile::tempdir().unwrap();
    let (group, spec, shared) = (group(dir.path()), spec(), Arc::new(TargetVmShared::new().unwrap()));
    let guest = Guest { memory: memory(), userfault: Arc::default() };
    let journal: TargetJournal = Box::new(|_| Ok(()));
    let mut vm = Vm::new(&group, &spec, &shared, journal, Arrival::new(), Box::new(guest));
    assert_eq!(vm.pause(), IDLE);
    // The last content came right after a look.
    vm.link.told = 3;
    assert_eq!(vm.pause(), LOOK);
    std::thread::sleep(LOOK);
    vm.look();
    assert_eq!((vm.link.told, vm.pause()), (0, IDLE));
}

impl World {
    /// `None` where there is no userfaultfd, or not of this kind.
    fn new(mode: Mode) -> Option<Self> {
        let memory = memory();
        let userfault = match Userfault::new(&memory, Choice::Only(mode)) {
            Ok(u) => Arc::new(Mutex::new(Some(u))),
            Err(e) => {
                println!("skipped: {e}");
                return None;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        let group = group(dir.path());
        let shared = Arc::new(TargetVmShared::new().unwrap());
        let spec = spec();
        group.expect(spec.vm, &shared);
        let (its, guest) = (Arc::clone(&shared), Guest { memory: Arc::clone(&memory), userfault });
        let thread = std::thread::spawn(move || {
            let driver = Arrival::recover(TargetState::Fetching, GuestState::Running, false);
            let journal: TargetJournal = Box::new(|_| Ok(()));
            let mut vm = Vm::new(&group, &spec, &its, journal, driver, Box::new(guest));
            vm.prepare_again();
            vm.carry_out();
            vm.until_forgotten();
        });
        Some(Self { memory, shared, thread: Some(thread), _dir: dir })
    }

    /// The source calls, and hears what is lacking.
    fn call(&self) -> Source {
        let (vm, far) = ends();
        let tag = tagged(&far, Traffic::Bulk);
        self.shared.inbox.post(Input::Called(far, tag, Call::Settle));
        let (mut frames, mut lacks) = (FrameBuf::new(), PageSet::empty(&[PAGES]));
        loop {
            let frame = frames.wait(&vm, WAIT).unwrap();
            if frame.kind == Kind::Lacks && decode_set(frame.kind, frame.meta, &mut lacks).unwrap() {
                break;
            }
        }
        let (demand, far) = ends();
        let tag = tagged(&far, Traffic::Demand);
        self.shared.inbox.post(Input::Demand(far, Box::default(), tag));
        // Until it is taken into use, what is asked for is said on the VM connection.
        while !self.shared.inbox.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Source { vm, frames, demand, asked: FrameBuf::new(), lacks }
    }

    /// The first byte of a page, as the guest reads it.
    fn touch(&self, page: u32) -> u8 {
        self.memory.guest().read_obj(GuestAddress(u64::from(page) * PAGE_SIZE as u64)).unwrap()
    }
}

impl Source {
    /// Waits until a page is asked for on the demand connection, and sends it there.
    fn answer(&mut self, page: u32) {
        loop {
            let frame = self.asked.wait(&self.demand, WAIT).unwrap();
            let demand = Demand::decode(frame.meta).unwrap();
            if demand.pages[..demand.urgent].contains(&at(page)) {
                break;
            }
        }
        pages(&self.demand, page..page + 1).unwrap();
    }

    /// Both connections were ended by the target, which asked for nothing more.
    fn hears_the_end(mut self) {
        while self.frames.wait(&self.vm, WAIT).is_ok_and(|f| f.kind == Kind::Heartbeat) {}
        let gone = |e: &crate::net::conn::NetError| {
            matches!(e, crate::net::conn::NetError::Closed { .. } | crate::net::conn::NetError::Lost { .. })
        };
        assert!(self.frames.wait(&self.vm, WAIT).is_err_and(|e| gone(&e)), "the VM connection stands");
        while self.asked.wait(&self.demand, WAIT).is_ok() {}
        assert!(self.asked.wait(&self.demand, WAIT).is_err_and(|e| gone(&e)), "the demand connection stands");
    }
}

/// One frame with these pages.
fn pages(conn: &Connection, which: std::ops::Range<u32>) -> io::Result<()> {
    let mut frame = PagesBuilder::default();
    let body: Vec<PageBytes> = which.clone().map(content).collect();
    which.for_each(|page| frame.unique(at(page), None));
    send(conn, Kind::Pages, frame.meta(), &[IoSlice::new(body.as_flattened())])
}

/// A VM that is loaded, and was not given to this host yet.
fn loaded() -> World {
    let dir = tempfile::tempdir().unwrap();
    let (group, shared) = (group(dir.path()), Arc::new(TargetVmShared::new().unwrap()));
    let memory = memory();
    let (its, guest) =
        (Arc::clone(&shared), Guest { memory: Arc::clone(&memory), userfault: Arc::default() });
    let thread = std::thread::spawn(move || {
        let (spec, journal): (_, TargetJournal) = (spec(), Box::new(|_| Ok(())));
        let driver = Arrival::recover(TargetState::Loaded, GuestState::Running, false);
        let mut vm = Vm::new(&group, &spec, &its, journal, driver, Box::new(guest));
        vm.until_forgotten();
    });
    World { memory, shared, thread: Some(thread), _dir: dir }
}

/// Calls it, and gives the caller's end.
fn caller(w: &World, how: Call) -> Connection {
    let (near, far) = ends();
    let tag = tagged(&far, Traffic::Bulk);
    w.shared.inbox.post(Input::Called(far, tag, how));
    near
}

/// Waits for such a word.
fn says(conn: &Connection, word: impl Fn(&Word) -> bool) {
    let mut frames = FrameBuf::new();
    loop {
        let frame = frames.wait(conn, WAIT).unwrap();
        if frame.kind == Kind::Word && word(&Word::decode(frame.meta).unwrap()) {
            return;
        }
    }
}

/// Whoever calls a VM that has been called is sent away, and what its source was just saying stays whole.
#[test]
fn a_call_that_is_declined_takes_nothing_of_the_connection_that_stands() {
    let w = loaded();
    let mut given_up = Vec::new();
    {
        let (near, far) = ends();
        send(&far, Kind::Word, &Word::GivenUp(GuestState::Running, None).encode(), &[]).unwrap();
        drop(far);
        (&near).read_to_end(&mut given_up).unwrap();
    }
    // As much as is waited for before anything is read.
    let (first, second) = given_up.split_at(HEADER_LEN);
    let source = caller(&w, Call::Settle);
    (&source).write_all(first).unwrap();
    // Until it was read.
    std::thread::sleep(Duration::from_millis(300));
    let stranger = caller(&w, Call::Vm(3));
    says(&stranger, |w| matches!(w, Word::Aborted(why) if why.contains("called before")));
    (&source).write_all(second).unwrap();
    says(&source, |w| *w == Word::Runs);
}

/// Of a thousand words that make no sense the first ends the connection. The VM waits for its source's next call.
#[test]
fn words_that_make_no_sense_end_their_connection_and_nothing_else() {
    let w = loaded();
    let source = caller(&w, Call::Settle);
    let (mut head, mut bad) = (Vec::new(), Vec::new());
    head.extend(crate::core::wire::frame::Header::new(Kind::Word, 3, 0).encode());
    (0..1000).for_each(|_| bad.extend(head.iter().chain(&[0xff; 3])));
    let _ = (&source).write_all(&bad);
    source.socket().set_read_timeout(Some(WAIT)).unwrap();
    let mut rest = [0; 4096];
    let ended = loop {
        match (&source).read(&mut rest) {
            Ok(0) => break true,
            Ok(_) => {}
            Err(e) => break e.kind() == io::ErrorKind::ConnectionReset,
        }
    };
    assert!(ended, "it listens to nonsense");
    let again = caller(&w, Call::Settle);
    send(&again, Kind::Word, &Word::GivenUp(GuestState::Running, None).encode(), &[]).unwrap();
    says(&again, |w| *w == Word::Runs);
}

/// A frame that is none, or says what it may not, ends its connections: the VM and what it has stay, and its source hears on the
/// next connection what is lacking.
#[test]
fn a_bad_frame_ends_the_connection_and_not_the_vm() {
    type Bad = fn(&Source) -> io::Result<()>;
    let bad: [(&str, Bad); 7] = [
        ("no frame on the demand connection", |s| (&s.demand).write_all(&[0xff; 64])),
        ("another kind on it", |s| {
            send(&s.demand, Kind::Word, &Word::GivenUp(GuestState::Running, None).encode(), &[])
        }),
        ("records that end early on it", |s| send(&s.demand, Kind::Pages, &[1, 0], &[])),
        ("a content that is not what it is called, on it", |s| {
            let mut frame = PagesBuilder::default();
            frame.named(at(40), &Digest([7; 20]), 0);
            send(&s.demand, Kind::Pages, frame.meta(), &[IoSlice::new(&content(40))])
        }),
        ("no frame on the VM connection", |s| (&s.vm).write_all(&[0xff; 64])),
        ("a kind that is over", |s| send(&s.vm, Kind::Switch, &[1, 0], &[])),
        ("records that end early", |s| send(&s.vm, Kind::Pages, &[1, 0], &[])),
    ];
    let Some(w) = World::new(Mode::Minor) else { return };
    for (n, (what, bad)) in (0u32..).zip(bad) {
        let page = 100 * (n + 1);
        let mut source = w.call();
        assert_eq!(source.lacks.len(), u64::from(PAGES - 2 * n), "before {what}");
        std::thread::scope(|s| {
            let guest = s.spawn(|| w.touch(page));
            source.answer(page);
            assert_eq!(guest.join().unwrap(), content(page)[0], "before {what}");
            // A page that the VM does not have is no news to it.
            pages(&source.demand, PAGES + 5..PAGES + 6).unwrap();
            // Somebody waits when it happens.
            let guest = s.spawn(|| w.touch(page + 50));
            while source.asked.lacks() > 0 && !source.asked.ready() {
                source.asked.fill(&mut &source.demand).unwrap();
            }
            bad(&source).unwrap();
            source.hears_the_end();
            assert!(!guest.is_finished() && w.shared.status().phase == Phase::Fetching, "{what}");
            let mut source = w.call();
            source.answer(page + 50);
            assert_eq!(guest.join().unwrap(), content(page + 50)[0], "after {what}");
        });
    }
    // The rest comes, and it is whole.
    let mut source = w.call();
    for first in (0..PAGES).step_by(64) {
        pages(&source.vm, first..first + 64).unwrap();
    }
    loop {
        let frame = source.frames.wait(&source.vm, WAIT).unwrap();
        if frame.kind == Kind::Word && Word::decode(frame.meta).unwrap() == Word::Filled {
            break;
        }
    }
    assert!((0..PAGES).all(|p| w.touch(p) == content(p)[0]));
}

/// A guest that gives pages away while all of them come: such a page is zeros from then on, whatever was on its way for it, and
/// all others are what the source has. Whoever gives is let go by every reading, and at the end of faults.
fn gives_away(mode: Mode) {
    let Some(w) = World::new(mode) else { return };
    let source = w.call();
    let given: Vec<u32> = (0..PAGES).filter(|p| p * 7 % 13 < 5).collect();
    let (mut frames, vm) = (source.frames, &source.vm);
    std::thread::scope(|s| {
        let givers: Vec<_> = (0..2)
            .map(|n| {
                let (given, w) = (&given, &w);
                s.spawn(move || {
                    for page in given.iter().skip(n).step_by(2) {
                        let at = u64::from(*page) * PAGE_SIZE as u64;
                        assert_eq!(w.memory.release(at, PAGE_SIZE as u64).unwrap(), 1);
                        // Every third is taken back at once.
                        if page % 3 == 0 {
                            assert_eq!(w.touch(*page), 0, "page {page} has its old content");
                        }
                    }
                })
            })
            .collect();
        // Behind each other in long runs, and each once more in a frame of its own.
        for first in (0..PAGES).step_by(64) {
            pages(vm, first..first + 64).unwrap();
            for page in (first..first + 64).rev() {
                pages(vm, page..page + 1).unwrap();
            }
        }
        loop {
            let frame = frames.wait(vm, WAIT).unwrap();
            if frame.kind == Kind::Word && Word::decode(frame.meta).unwrap() == Word::Filled {
                break;
            }
        }
        givers.into_iter().for_each(|g| g.join().unwrap());
    });
    let status = w.shared.status();
    println!("{mode:?}: {:?}", status.fill);
    for page in 0..PAGES {
        let want = if given.contains(&page) { 0 } else { content(page)[0] };
        assert_eq!(w.touch(page), want, "page {page}");
    }
    assert!(status.reason.is_empty(), "{}", status.reason);
}

#[test]
fn pages_given_away_while_they_come_stay_zeros() {
    gives_away(Mode::Minor);
}

#[test]
fn pages_given_away_while_they_come_stay_zeros_where_the_kernel_copies() {
    gives_away(Mode::Missing);
}
