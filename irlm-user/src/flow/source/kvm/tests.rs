//! A departure over a real connection, from a memory file that a thread writes to all the time, with a dirty log that is
//! as a VMM's is.

use super::guest::Control;
use super::*;
use crate::core::arrival::{Output, TargetError, TargetHost, TargetVm};
use crate::core::digest::{Algorithm, Digest, Hasher};
use crate::core::migration::Migration;
use crate::core::pair::PairTable;
use crate::core::squeeze::Mode;
use crate::core::units::{HostIx, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use crate::core::vm_state;
use crate::core::wire::frame::Kind;
use crate::core::wire::pages::{Record, Records};
use crate::flow::source::observe::Observed;
use crate::flow::source::prepare::{self, PrepareProgress};
use crate::flow::source::{DepartureOptions, Drill, SourceGroup, SourceSpec, SourceVmShared};
use crate::flow::squeeze::{Lane, Window};
use crate::flow::{Front, NoTags, lock, now};
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use crate::net::vmm::{VmmError, file_of};
use std::collections::HashMap;
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

// By post-copy.
mod postcopy;

const PAGES: [u32; 2] = [3000, 500];
const STATE: &[u8] = b"the state of all vCPUs";

/// A VM: a write and its mark are one step for whoever harvests, as a write fault makes them.
#[derive(Debug)]
struct World {
    files: Vec<File>,
    bits: Vec<Vec<u64>>,
    running: bool,
    given_up: bool,
    /// Its owner has paused it.
    by_owner: bool,
    /// It has run since its state was saved.
    ran_on: bool,
    writes: u64,
    harvests: u64,
    /// The guest writes to this page of slot 0 right before this harvest.
    before: Option<(u64, u32)>,
}

impl World {
    fn new() -> Arc<Mutex<Self>> {
        let file = |pages: &u32| {
            let file = file_of(&[]).unwrap();
            file.set_len(u64::from(*pages) * 4096).unwrap();
            file
        };
        let bits = PAGES.iter().map(|n| vec![0; n.div_ceil(64) as usize]).collect();
        let files = PAGES.iter().map(file).collect();
        Arc::new(Mutex::new(Self {
            files,
            bits,
            running: true,
            given_up: false,
            by_owner: false,
            ran_on: false,
            writes: 0,
            harvests: 0,
            before: None,
        }))
    }

    /// What the guest writes; nothing once it is stopped.
    fn write(&mut self, slot: usize, page: u32, content: &PageBytes) {
        if self.running {
            self.behind(slot, page, content);
            self.bits[slot][page as usize / 64] |= 1 << (page % 64);
            self.writes += 1;
        }
    }

    /// A change that no log sees.
    fn behind(&self, slot: usize, page: u32, content: &PageBytes) {
        self.files[slot].write_all_at(content, u64::from(page) * 4096).unwrap();
    }
}

#[derive(Debug)]
struct Fake(Arc<Mutex<World>>);

impl Control for Fake {
    fn state(&mut self) -> Result<State, VmmError> {
        let w = lock(&self.0);
        Ok(match (w.running, w.given_up) {
            (true, _) => State::Running,
            (false, true) => State::GivenUp,
            (false, false) => State::Paused,
        })
    }
    fn harvest(&mut self, bits: &mut Vec<Vec<u64>>) -> Result<u64, VmmError> {
        let mut w = lock(&self.0);
        w.harvests += 1;
        if let Some((at, page)) = w.before
            && at == w.harvests
        {
            w.write(0, page, &content(99));
        }
        let mut n = 0;
        for (out, log) in bits.iter_mut().zip(&mut w.bits) {
            for (out, word) in out.iter_mut().zip(log) {
                n += u64::from(word.count_ones());
                *out |= std::mem::take(word);
            }
        }
        Ok(n)
    }
    fn stop_log(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn pause_for_move(&mut self) -> Result<(), VmmError> {
        lock(&self.0).running = false;
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmmError> {
        let mut w = lock(&self.0);
        assert!(!w.given_up, "resumed although it was given up");
        w.running = !w.by_owner;
        Ok(())
    }
    fn give_up(&mut self) -> Result<(), VmmError> {
        let mut w = lock(&self.0);
        if w.running || w.ran_on {
            let why = "it has run since its state was saved".into();
            return Err(VmmError::Refused { path: "v".into(), command: "give-up", why });
        }
        w.given_up = true;
        Ok(())
    }
    fn take_back(&mut self) -> Result<(), VmmError> {
        lock(&self.0).given_up = false;
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        assert!(!lock(&self.0).running, "state of a running VM");
        Ok(STATE.to_vec())
    }
}

/// What arrives.
#[derive(Default)]
struct Arrived {
    pages: HashMap<PageAddr, PageBytes>,
    body: Vec<PageBytes>,
    state: Option<Vec<u8>>,
    refused: u64,
}

impl Output for Arrived {
    type Error = TargetError;
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), TargetError> {
        for i in 0..count {
            self.pages.insert(PageAddr { page: addr.page + i, ..addr }, [fill; PAGE_SIZE]);
        }
        Ok(())
    }
    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), TargetError> {
        self.pages.insert(addr, self.body[content]);
        Ok(())
    }
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), TargetError> {
        self.pages.insert(addr, *bytes);
        Ok(())
    }
}

/// The target's side of the connection, as `flow::arrival::vm` reads it.
fn receive(conn: &Connection, hasher: &Hasher) -> Arrived {
    let mut host = TargetHost::new(1 << 20, 1 << 20);
    let mut list = TargetVm::new(VmIx(0), HostIx(0), 1 << 20);
    let mut out = Arrived::default();
    let (mut frames, mut gather, mut ended) = (FrameBuf::new(), vm_state::Gather::default(), false);
    while out.state.is_none() {
        let Ok(frame) = frames.wait(conn, Duration::from_secs(20)) else { break };
        match frame.kind {
            Kind::Blocks => assert!(out.pages.is_empty()),
            Kind::Pages => {
                assert!(!ended);
                out.body = frame.body.as_chunks::<PAGE_SIZE>().0.to_vec();
                let (mut content, mut wakes) = (0, Vec::new());
                for record in Records::new(frame.meta) {
                    let record = record.unwrap();
                    let bytes = out.body.get(content).copied();
                    if let (Record::Shared { digest, .. }, Some(bytes)) = (&record, &bytes) {
                        out.refused += u64::from(hasher.page(bytes) != *digest);
                    }
                    let at = now();
                    list.record(&mut host, record, &mut content, bytes.as_ref(), at, &mut out, &mut wakes)
                        .unwrap();
                }
                assert_eq!(list.waiting(), 0);
            }
            Kind::RamEnd => ended = true,
            Kind::Verbatim => {
                assert!(ended);
                out.state = gather.take(frame.body).unwrap().map(<[u8]>::to_vec);
            }
            _ => {}
        }
    }
    out
}

struct Bench {
    world: Arc<Mutex<World>>,
    group: SourceGroup,
    spec: SourceSpec,
    hasher: Hasher,
    shared: Arc<SourceVmShared>,
    conn: Connection,
    far: Connection,
    prepared: PreparedVm,
}

/// A content with this number.
fn content(n: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    page.as_chunks_mut::<8>()
        .0
        .iter_mut()
        .enumerate()
        .for_each(|(i, w)| *w = (n * 1000 + i as u64).to_le_bytes());
    page
}

/// A VM with contents of all sorts that has been prepared.
fn bench(prove: bool) -> Bench {
    let world = World::new();
    for page in 0..2000 {
        match page % 5 {
            0 => {}
            1 => lock(&world).behind(0, page, &[page as u8; PAGE_SIZE]),
            2 => lock(&world).behind(0, page, &content(u64::from(page % 50))),
            _ => lock(&world).behind(0, page, &content(1000 + u64::from(page))),
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (conn, far) = crate::net::connection::pair();
    let hasher = Hasher::new(Algorithm::Blake3, &[1; 32], "");
    let group = SourceGroup {
        targets: vec![listener.local_addr().unwrap()],
        tables: vec![Mutex::new(PairTable::new(HostIx(0), 1 << 20))],
        options: DepartureOptions {
            drill: Drill { prove_digests: prove, ..Drill::default() },
            ..SourceGroup::bare().options
        },
        ..SourceGroup::bare()
    };
    let front = Front::Vmm("/nonexistent".into());
    let spec = SourceSpec { vm: VmIx(0), name: "v".into(), target: HostIx(0), domain: 0, front };
    let blocks = (0..).zip(PAGES).map(|(n, pages)| {
        let file = lock(&world).files[n].try_clone().unwrap();
        (format!("slot{n}"), u64::from(pages) * 4096, file)
    });
    let guest = Arc::new(
        Guest::new(Box::new(Fake(world.clone())), blocks.collect(), None, GuestState::Running).unwrap(),
    );
    // Written while it is being prepared.
    lock(&world).write(0, 3, &content(77));
    let (observed, progress) = (Observed::default(), PrepareProgress::default());
    let heat = prepare::Heat { observed: &observed, ix: 0, wait: &|| {} };
    let prepared =
        prepare::scan(&group, &spec, guest.ram(), Some(&guest), 1 << 34, &progress, &heat).unwrap();
    assert!(prepared.len() > 1000 && prepared.digests().all(|(_, page, _)| page != 3));
    let shared = Arc::new(SourceVmShared::new().unwrap());
    shared.heard.store(now().0, Ordering::Relaxed);
    Bench { world, group, spec, hasher, shared, conn, far, prepared }
}

impl Bench {
    /// Sends the whole VM.
    fn send(&self) -> Result<crate::core::source::VmStats, PumpError> {
        let mut kvm =
            Kvm::new(&self.group, &self.spec, &self.shared, self.prepared.for_stream(), Before::default());
        kvm.set_up(&mut |_| Ok(()))?;
        let mut lane = Lane::new(Mode::Off, Window::default(), &Arc::default());
        let mut out = Out {
            conn: &self.conn,
            lane: &mut lane,
            shared: &self.shared,
            spec: &self.spec,
            group: &self.group,
        };
        let mut stopped = false;
        loop {
            match kvm.ready() {
                Ready::Never => break,
                Ready::At(at) => std::thread::sleep(at.saturating_duration_since(Instant::now())),
                Ready::Fd(_) => panic!("there is nothing to poll"),
            }
            stopped |= kvm.pump(&mut out, 0)?.stopped;
        }
        assert!(stopped);
        assert_eq!(kvm.let_complete()?, Standing::Completed);
        Ok(kvm.vm().unwrap().stats)
    }
}

/// The harvest after which a page is written may name it while it is still to be taken: then it must be looked at afresh.
#[test]
fn a_hole_that_is_written_between_two_looks_is_no_hole_any_more() {
    for harvest in 1..16 {
        let b = bench(false);
        {
            let mut w = lock(&b.world);
            // In the middle of the hole behind the pages that have a content.
            w.before = Some((w.harvests + harvest, 2600));
        }
        let arrived = std::thread::scope(|s| {
            let far = s.spawn(|| receive(&b.far, &b.hasher));
            b.send().unwrap();
            far.join().unwrap()
        });
        let w = lock(&b.world);
        let mut is = [0; PAGE_SIZE];
        w.files[0].read_exact_at(&mut is, 2600 * 4096).unwrap();
        let addr = PageAddr { block: crate::core::units::BlockIx(0), page: 2600 };
        assert!(arrived.pages[&addr] == is, "written before harvest {harvest}: lost");
    }
}

#[test]
fn the_newest_version_arrives_while_the_guest_writes_and_clean_pages_are_not_hashed_again() {
    let b = bench(true);
    let over = AtomicBool::new(false);
    let (stats, arrived) = std::thread::scope(|s| {
        s.spawn(|| {
            let mut n = 0u64;
            while !over.load(Ordering::Relaxed) {
                n += 1;
                let (page, hot) = (((n * 2_654_435_761) >> 7) as u32, n.is_multiple_of(3));
                let page = if hot { 40 + page % 4 } else { page % PAGES[0] };
                lock(&b.world).write(0, page, &content(1 << 20 | n));
                lock(&b.world).write(1, page % PAGES[1], &content(n % 7));
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let far = s.spawn(|| receive(&b.far, &b.hasher));
        let stats = b.send();
        over.store(true, Ordering::Relaxed);
        (stats, far.join().unwrap())
    });
    let stats = stats.unwrap();
    assert_eq!((arrived.state.as_deref(), arrived.refused), (Some(STATE), 0));
    let w = lock(&b.world);
    assert!(!w.running && w.writes > 20, "{} writes", w.writes);
    for (slot, file) in w.files.iter().enumerate() {
        for page in 0..PAGES[slot] {
            let mut is = [0; PAGE_SIZE];
            file.read_exact_at(&mut is, u64::from(page) * 4096).unwrap();
            let addr = PageAddr { block: crate::core::units::BlockIx(slot as u16), page };
            assert!(arrived.pages[&addr] == is, "slot {slot} page {page} is not the newest");
        }
    }
    assert!(stats.kept > 500 && stats.references > 0, "{stats:?}");
    assert!(stats.hashed <= w.writes + 1, "{stats:?}");
}

#[test]
fn a_stale_digest_is_caught_and_named() {
    let b = bench(true);
    // Page 3 + 5 n has a content of its own; this one changes behind the log's back.
    lock(&b.world).behind(0, 8, &content(5_000_000));
    let e = std::thread::scope(|s| {
        s.spawn(|| receive(&b.far, &b.hasher));
        let e = b.send().unwrap_err().to_string();
        b.conn.shutdown(std::net::Shutdown::Both).unwrap();
        e
    });
    assert!(e.contains("page 8 of slot 0 is stale"), "{e}");
}

#[test]
fn without_the_proof_a_stale_digest_of_a_shared_content_is_caught_by_its_receiver() {
    let b = bench(false);
    // Pages 2, 52, … share a content; the first of them is sent with its name.
    lock(&b.world).behind(0, 2, &content(5_000_000));
    let arrived = std::thread::scope(|s| {
        let far = s.spawn(|| receive(&b.far, &b.hasher));
        b.send().unwrap();
        far.join().unwrap()
    });
    assert_eq!(arrived.refused, 1);
}

/// A VM that was opened while it ran, or did not.
fn opened(b: &Bench, running: bool) -> Guest {
    lock(&b.world).running = running;
    let blocks = vec![("slot0".to_owned(), 4096, lock(&b.world).files[0].try_clone().unwrap())];
    let state = if running { GuestState::Running } else { GuestState::Paused };
    Guest::new(Box::new(Fake(b.world.clone())), blocks, None, state).unwrap()
}

#[test]
fn a_vm_that_stays_runs_on_and_one_that_its_owner_paused_does_not() {
    let (run, paused) = (GuestState::Running, GuestState::Paused);
    let b = bench(false);
    let guest = opened(&b, true);
    guest.pause().unwrap();
    assert!(guest.is_stopped() && !lock(&b.world).running);
    assert_eq!((guest.take_back(run).unwrap(), lock(&b.world).running), (run, true));

    let guest = opened(&b, false);
    guest.pause().unwrap();
    assert!(!guest.is_stopped(), "its owner had");
    assert_eq!((guest.take_back(paused).unwrap(), lock(&b.world).running), (paused, false));

    // In the middle of the move, and nobody has told the departure.
    let guest = opened(&b, true);
    lock(&b.world).running = false;
    guest.pause().unwrap();
    assert_eq!((guest.by_owner(), guest.is_stopped()), (paused, false));
    assert_eq!((guest.take_back(run).unwrap(), lock(&b.world).running), (paused, false));

    // Paused in the middle by its owner after it was stopped here: it stays stopped.
    let guest = opened(&b, true);
    guest.pause().unwrap();
    assert_eq!((guest.take_back(paused).unwrap(), lock(&b.world).running), (paused, false));
}

/// An agent that was started anew does not know who has stopped it, so whoever runs it has to.
#[test]
fn a_vm_that_its_owner_paused_while_no_agent_was_there_stays_paused() {
    let (run, paused) = (GuestState::Running, GuestState::Paused);
    for (by_owner, stands) in [(false, run), (true, paused)] {
        let b = bench(false);
        {
            let mut w = lock(&b.world);
            (w.running, w.given_up, w.by_owner) = (false, true, by_owner);
        }
        let mut control = Fake(b.world.clone());
        assert_eq!(take_back(&mut control, true, run).unwrap(), stands);
        assert_eq!(lock(&b.world).running, stands == run);
    }
}

#[test]
fn how_a_vm_stands_says_who_has_stopped_it() {
    let b = bench(false);
    let mut kvm = Kvm::new(&b.group, &b.spec, &b.shared, b.prepared.for_stream(), Before::default());
    let mut notes = Vec::new();
    kvm.set_up(&mut |n| {
        notes.push(n);
        Ok(())
    })
    .unwrap();
    assert_eq!(notes, [SourceNote::Guest(GuestState::Running), SourceNote::Begun], "before anything is sent");
    assert_eq!(kvm.ask().unwrap(), Standing::Back(GuestState::Running));
    kvm.guest.as_ref().unwrap().pause().unwrap();
    assert_eq!(kvm.ask().unwrap(), Standing::Completed);
    assert_eq!(kvm.take_back(GuestState::Running).unwrap(), Took::Stands(GuestState::Running));
    // Given up, it is nobody's to resume until it is taken back, running or as its owner left it.
    for as_left in [GuestState::Running, GuestState::Paused] {
        kvm.guest.as_ref().unwrap().pause().unwrap();
        assert_eq!(kvm.let_complete().unwrap(), Standing::Completed);
        assert!(lock(&b.world).given_up);
        assert_eq!(kvm.ask().unwrap(), Standing::Completed);
        assert_eq!(kvm.take_back(as_left).unwrap(), Took::Stands(as_left));
        assert!(!lock(&b.world).given_up);
        lock(&b.world).running = true;
    }
    lock(&b.world).running = false;
    assert_eq!(kvm.ask().unwrap(), Standing::Back(GuestState::Paused), "its owner, this time");
    // Post-copy gives it up where its pages begin to be served.
    kvm.serve().unwrap();
    assert!(lock(&b.world).given_up);
    assert_eq!(kvm.ask().unwrap(), Standing::Completed);
    assert_eq!(kvm.take_back(GuestState::Running).unwrap(), Took::Stands(GuestState::Paused));
}

/// By its owner's hand, between the moment when it was stopped here and the one when it is given up.
#[test]
fn a_vm_that_has_run_since_it_was_stopped_is_not_given_up() {
    for paused_again in [false, true] {
        let b = bench(false);
        let mut kvm = Kvm::new(&b.group, &b.spec, &b.shared, b.prepared.for_stream(), Before::default());
        kvm.set_up(&mut |_| Ok(())).unwrap();
        kvm.guest.as_ref().unwrap().pause().unwrap();
        {
            let mut w = lock(&b.world);
            (w.running, w.ran_on) = (!paused_again, true);
        }
        // Post-copy asks so, pre-copy otherwise.
        assert!(kvm.hold().unwrap_err().to_string().contains("since it was stopped"));
        let state = if paused_again { GuestState::Paused } else { GuestState::Running };
        assert_eq!(kvm.let_complete().unwrap(), Standing::Back(state));
        assert!(!lock(&b.world).given_up);
        assert_eq!(kvm.take_back(GuestState::Running).unwrap(), Took::Stands(state), "as its owner has it");
    }
}

#[test]
fn a_digest_is_not_believed_if_the_page_was_written_while_it_was_read() {
    let b = bench(false);
    let guest = b.prepared.guest.clone().unwrap();
    let at = |page| PageAddr { block: crate::core::units::BlockIx(0), page };
    let digest = |page: u32| -> Option<Digest> {
        b.prepared.digests().find(|(_, p, _)| *p == page).map(|(_, _, d)| d)
    };
    guest.take_written(|_, _| {});
    // "Read", then written, then asked.
    lock(&b.world).write(0, 13, &content(6_000_000));
    let mut known = Vec::new();
    guest.known(&[at(8), at(13), at(3)], true, &mut known).unwrap();
    assert_eq!(
        known,
        [guest::Known::Digest(digest(8).unwrap()), guest::Known::Written, guest::Known::Nothing]
    );
    guest.take_written(|_, _| {});
    // Stopped, its last content is all there is.
    guest.known(&[at(13)], false, &mut known).unwrap();
    assert_eq!(known, [guest::Known::Nothing]);
}
