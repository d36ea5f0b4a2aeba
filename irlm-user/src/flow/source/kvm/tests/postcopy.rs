//! A departure by post-copy: what is named at the switch, who sends what then, and what is sent anew after a lost connection.

use super::super::serve::{Serving, answer};
use super::*;
use crate::core::page_set::PageSet;
use crate::core::wire::paging::{Demand, decode_set};
use crate::flow::{FlowTags, Tagged, Traffic};
use crate::net::conn::send;
use crate::net::connection::pair as ends;
use std::collections::HashSet;

/// What came on the VM connection until it ended.
struct Came {
    due: PageSet,
    whole: bool,
    arrived: Arrived,
    /// Pages of records, each as often as it came.
    records: Vec<PageAddr>,
    waiting: usize,
}

fn listen(conn: &Connection, hasher: &Hasher) -> Came {
    let mut host = TargetHost::new(1 << 20, 1 << 20);
    let mut list = TargetVm::new(VmIx(0), HostIx(0), 1 << 20);
    let mut gather = vm_state::Gather::default();
    let mut came = Came {
        due: PageSet::empty(&PAGES),
        whole: false,
        arrived: Arrived::default(),
        records: Vec::new(),
        waiting: 0,
    };
    let mut frames = FrameBuf::new();
    while let Ok(frame) = frames.wait(conn, Duration::from_secs(20)) {
        match frame.kind {
            Kind::Switch => {
                assert!(!came.whole && came.arrived.pages.is_empty());
                came.whole = decode_set(frame.kind, frame.meta, &mut came.due).unwrap();
            }
            Kind::Verbatim => {
                assert!(came.whole, "the state comes behind the set");
                came.arrived.state = gather.take(frame.body).unwrap().map(<[u8]>::to_vec);
            }
            Kind::Pages => {
                assert!(came.arrived.state.is_some(), "pages come behind the state");
                came.arrived.body = frame.body.as_chunks::<PAGE_SIZE>().0.to_vec();
                let (mut content, mut wakes) = (0, Vec::new());
                for record in Records::new(frame.meta) {
                    let record = record.unwrap();
                    let (addr, count) = match record {
                        Record::Uniform { addr, count, .. } | Record::Unique { addr, count } => (addr, count),
                        Record::Shared { addr, .. }
                        | Record::Named { addr, .. }
                        | Record::Ref { addr, .. }
                        | Record::Remote { addr, .. } => (addr, 1),
                        Record::Keep { .. } => continue,
                    };
                    came.records.extend((0..count).map(|n| PageAddr { page: addr.page + n, ..addr }));
                    let bytes = came.arrived.body.get(content).copied();
                    if let (Record::Shared { digest, .. }, Some(bytes)) = (&record, &bytes) {
                        assert_eq!(hasher.page(bytes), *digest);
                    }
                    let out = &mut came.arrived;
                    list.record(&mut host, record, &mut content, bytes.as_ref(), now(), out, &mut wakes)
                        .unwrap();
                }
            }
            _ => {}
        }
    }
    came.waiting = list.waiting();
    came
}

fn page_of(world: &Arc<Mutex<World>>, addr: PageAddr) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    let file = lock(world).files[usize::from(addr.block.0)].try_clone().unwrap();
    file.read_exact_at(&mut page, u64::from(addr.page) * PAGE_SIZE as u64).unwrap();
    page
}

fn tagged(conn: &Connection) -> Tagged {
    let tags: Arc<dyn FlowTags> = Arc::new(NoTags);
    Tagged::new(&tags, conn.socket(), Traffic::Demand)
}

#[test]
fn every_due_page_leaves_once_and_what_is_asked_for_leaves_first_and_alone() {
    let mut b = bench(true);
    b.group.options.migration = Migration::PostCopy;
    let far = b.far.clone();
    let hasher = b.hasher.clone();
    let listening = std::thread::spawn(move || listen(&far, &hasher));
    let mut kvm = Kvm::new(&b.group, &b.spec, &b.shared, b.prepared.for_stream(), Before::default());
    kvm.set_up(&mut |_| Ok(())).unwrap();
    lock(&b.world).write(1, 400, &content(5));
    let mut lane = Lane::new(Mode::Off, Window::default(), &Arc::default());
    let (conn, shared, spec, group) = (&b.conn, &*b.shared, &b.spec, &b.group);
    let mut out = Out { conn, lane: &mut lane, shared, spec, group };
    let mut switched = false;
    while !matches!(kvm.ready(), Ready::Never) {
        let saw = kvm.pump(&mut out, 0).unwrap();
        assert!(!switched || !saw.switched);
        switched |= saw.switched;
    }
    assert!(switched && !lock(&b.world).running);

    // A vCPU waits for one page, and two more are wanted soon.
    let serving = kvm.serve().unwrap();
    let (near, target) = ends();
    let tag = tagged(&near);
    let vm_conn = b.conn.clone();
    answer(serving, &b.group, b.shared.clone(), (near, tag), FrameBuf::new(), vm_conn).unwrap();
    let at = |page| PageAddr { block: crate::core::units::BlockIx(0), page };
    let wanted = [at(4), at(8), at(9)];
    let demand = Demand { pages: wanted.to_vec(), urgent: 1 };
    send(&target, Kind::Demand, &demand.encode(), &[]).unwrap();
    let mut frames = FrameBuf::new();
    let mut got = Vec::new();
    while got.len() < wanted.len() {
        let frame = frames.wait(&target, Duration::from_secs(10)).unwrap();
        let pages = frame.body.as_chunks::<PAGE_SIZE>().0.to_vec();
        assert!(!got.is_empty() || pages.len() == 1, "the first is alone in its frame");
        for record in Records::new(frame.meta) {
            let Record::Unique { addr, count } = record.unwrap() else { panic!("only contents") };
            got.extend((0..count).map(|n| PageAddr { page: addr.page + n, ..addr }));
        }
        let last = &got[got.len() - pages.len()..];
        assert!(last.iter().zip(&pages).all(|(a, p)| page_of(&b.world, *a) == *p));
    }
    assert_eq!(got, wanted);

    while !matches!(kvm.ready(), Ready::Never) {
        kvm.pump(&mut out, 0).unwrap();
    }
    let stats = kvm.vm().unwrap().stats;
    b.conn.shutdown(std::net::Shutdown::Write).unwrap();
    let came = listening.join().unwrap();
    assert_eq!(came.arrived.state.as_deref(), Some(STATE));
    assert_eq!(came.waiting, 0, "every reference is to what came");
    assert!(
        came.due.contains(at(3)) && !came.due.contains(at(2999)),
        "no hole is due, and what was written is"
    );
    let once: HashSet<PageAddr> = came.records.iter().copied().collect();
    assert_eq!(once.len(), came.records.len(), "no page leaves twice");
    for addr in came.due.iter().filter(|a| !wanted.contains(a)) {
        assert_eq!(came.arrived.pages.get(&addr), Some(&page_of(&b.world, addr)), "{addr:?}");
    }
    assert!(wanted.iter().all(|a| !once.contains(a)), "what was asked for did not leave again");
    assert_eq!((stats.demanded, once.len() as u64 + 3), (3, came.due.len()));
    assert!(stats.kept > 1000, "prepared pages are not hashed again: {stats:?}");

    // The connection is lost, and the target lacks some of it.
    let (near, far) = ends();
    let mut lacks = PageSet::empty(&PAGES);
    for page in 100..400 {
        lacks.insert(at(page));
    }
    kvm.resume(lacks.clone());
    kvm.serve().unwrap();
    let hearing = std::thread::spawn(move || {
        let (mut frames, mut pages) = (FrameBuf::new(), HashMap::new());
        while let Ok(frame) = frames.wait(&far, Duration::from_secs(20)) {
            let body = frame.body.as_chunks::<PAGE_SIZE>().0;
            let mut next = 0;
            for record in Records::new(frame.meta) {
                match record.unwrap() {
                    Record::Unique { addr, count } => (0..count).for_each(|n| {
                        pages.insert(PageAddr { page: addr.page + n, ..addr }, body[next]);
                        next += 1;
                    }),
                    Record::Uniform { addr, count, fill } => (0..count).for_each(|n| {
                        pages.insert(PageAddr { page: addr.page + n, ..addr }, [fill; PAGE_SIZE]);
                    }),
                    other => panic!("{other:?}: a target that was started anew knows no names"),
                }
            }
        }
        pages
    });
    let mut out = Out { conn: &near, lane: &mut lane, shared, spec, group };
    while !matches!(kvm.ready(), Ready::Never) {
        kvm.pump(&mut out, 0).unwrap();
    }
    drop(near);
    let pages = hearing.join().unwrap();
    assert_eq!(pages.len() as u64, lacks.len());
    assert!(lacks.iter().all(|a| pages[&a] == page_of(&b.world, a)));
}

/// Pages that are wanted soon are on their way when a vCPU comes to wait: its page leaves before the rest of them, in a frame of
/// its own.
#[test]
fn what_a_vcpu_waits_for_overtakes_what_was_asked_for_before() {
    let pages = [4000];
    let file = file_of(&[]).unwrap();
    file.set_len(u64::from(pages[0]) * PAGE_SIZE as u64).unwrap();
    for page in 0..pages[0] {
        file.write_all_at(&content(u64::from(page)), u64::from(page) * PAGE_SIZE as u64).unwrap();
    }
    let ram = GuestRam::of_files(vec![("slot0".to_owned(), u64::from(pages[0]) * PAGE_SIZE as u64, file)]);
    let serving = Arc::new(Serving::new("vm", &pages, Arc::new(ram), PageSet::full(&pages)));
    let b = bench(false);
    let (near, target) = ends();
    // What nobody waits for must not all fit on the way.
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 64 << 10).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size(&target, 64 << 10).unwrap();
    b.shared.heard.store(now().0, Ordering::Relaxed);
    let tag = tagged(&near);
    let vm_conn = b.conn.clone();
    answer(serving.clone(), &b.group, b.shared.clone(), (near, tag), FrameBuf::new(), vm_conn).unwrap();
    let at = |page| PageAddr { block: crate::core::units::BlockIx(0), page };
    let soon: Vec<PageAddr> = (0..2000).map(at).collect();
    for some in soon.chunks(250) {
        let demand = Demand { pages: some.to_vec(), urgent: 0 };
        send(&target, Kind::Demand, &demand.encode(), &[]).unwrap();
    }
    // They are on their way, and nobody reads.
    let until = Instant::now() + Duration::from_secs(10);
    while serving.answered() == 0 {
        assert!(Instant::now() < until, "nothing leaves");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(100));
    let before = serving.answered();
    assert!(before < 1000, "the link took {before} pages: nothing is left to overtake");
    let urgent = [at(3000), at(1900)];
    send(&target, Kind::Demand, &Demand { pages: urgent.to_vec(), urgent: 2 }.encode(), &[]).unwrap();
    let (mut frames, mut got, mut alone) = (FrameBuf::new(), Vec::new(), Vec::new());
    while got.len() < soon.len() + 1 {
        let frame = frames.wait(&target, Duration::from_secs(10)).unwrap();
        let from = got.len();
        for record in Records::new(frame.meta) {
            let Record::Unique { addr, count } = record.unwrap() else { panic!("only contents") };
            got.extend((0..count).map(|n| PageAddr { page: addr.page + n, ..addr }));
        }
        if got.len() == from + 1 {
            alone.push(got[from]);
        }
    }
    let place = |addr| got.iter().position(|a| *a == addr).unwrap();
    let (first, second) = (place(urgent[0]), place(urgent[1]));
    // Only what was picked before the word came is ahead of them: at most a frame beyond what had left.
    assert!(
        second == first + 1 && first as u64 <= before + 16,
        "{before} had left, they came as {first}, {second}"
    );
    assert_eq!(alone[..2], urgent);
    let once: HashSet<PageAddr> = got.iter().copied().collect();
    assert_eq!(once.len(), got.len(), "no page leaves twice");
}
