//! Two source hosts on loopback: what one lends comes to the other, whatever changed meanwhile; and what lenders may send.

use super::*;
use crate::core::index::{HostSet, TargetSet};
use crate::core::pair::PairTable;
use crate::core::plan::Carry;
use crate::core::units::{PageId, VmIx};
use crate::flow::door::{self, Door};
use crate::flow::source::observe::Observed;
use crate::flow::source::prepare::{self, PrepareProgress};
use crate::flow::source::similar::Similar;
use crate::flow::source::{DepartureOptions, SourceGroup};
use crate::flow::{FlowTags, Front, NoTags, Timeouts};
use crate::host::ram::GuestRam;
use crate::net::conn::send as send_frame;
use crate::net::connection::Security;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

const TOKEN: [u8; 32] = [1; 32];

fn page(n: u64) -> PageBytes {
    let mut x = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::array::from_fn(|_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    })
}

fn group(me: u16, sources: Vec<Option<SocketAddr>>) -> Arc<SourceGroup> {
    let timeouts = Timeouts { peer: Duration::from_secs(2), ..Timeouts::default() };
    Arc::new(SourceGroup {
        me: HostIx(me),
        tables: (0..2).map(|_| Mutex::new(PairTable::new(HostIx(me), 1 << 20))).collect(),
        timeouts,
        options: DepartureOptions { compress: Mode::Auto, ..SourceGroup::bare().options },
        lending: Lending::new(sources),
        similar: Similar::new([(HostIx(me), 0)], 64 << 20),
        ..SourceGroup::bare()
    })
}

struct Vm {
    spec: SourceSpec,
    vm: PreparedVm,
    ram: File,
}

/// A VM of `group` whose pages are these, prepared.
fn vm(group: &SourceGroup, pages: impl Iterator<Item = u64>) -> Vm {
    let fd = rustix::fs::memfd_create("lend", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    let mut len = 0;
    for (at, n) in (0u64..).zip(pages) {
        file.write_all_at(&page(n), at * 4096).unwrap();
        len = (at + 1) * 4096;
    }
    let ram = Arc::new(GuestRam::of_files(vec![("ram".into(), len, file.try_clone().unwrap())]));
    let front = Front::Vmm("/nonexistent".into());
    let spec = SourceSpec { vm: VmIx(0), name: "v".into(), target: group.me, domain: 0, front };
    let (observed, progress) = (Observed::default(), PrepareProgress::default());
    let heat = prepare::Heat { observed: &observed, ix: 0, wait: &|| {} };
    let vm = prepare::scan(group, &spec, &ram, None, 1 << 34, &progress, &heat).unwrap();
    Vm { spec, vm, ram: file }
}

/// A data port for `group`.
fn open(group: &Arc<SourceGroup>, listener: TcpListener) -> Arc<AtomicBool> {
    let (hall, stop) = (Arc::new(Door::default()), Arc::new(AtomicBool::new(false)));
    hall.borrow_for(group.clone());
    let (halt, timeouts) = (stop.clone(), group.timeouts);
    let tags: Arc<dyn FlowTags> = Arc::new(NoTags);
    std::thread::spawn(move || door::serve(&listener, &hall, &tags, timeouts, &halt));
    stop
}

fn lend_to(digest: Digest, to: &[u16]) -> Lend {
    let (mut hosts, mut forward) = (HostSet::new(), TargetSet::new());
    to.iter().for_each(|h| assert!(hosts.insert(HostIx(*h)) && forward.insert(HostIx(*h))));
    let id = PageId { bucket: 0, index: 0 };
    Lend { carry: Carry { digest, id, first: HostIx(0), forward }, to: hosts }
}

fn counted(l: &Lending) -> [u64; 3] {
    [&l.lent, &l.borrowed, &l.came].map(|n| n.load(Ordering::Relaxed))
}

#[test]
fn what_one_source_host_lends_comes_to_the_others_and_what_changed_is_said_to_be_void() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let borrower = group(1, Vec::new());
    let stop = open(&borrower, listener);
    // Nobody answers at the third host's address.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let lender = group(0, vec![None, Some(addr), Some(gone)]);
    // 400 contents of its own, and one that two of its pages have.
    let v = vm(&lender, (0..400).chain([1000, 1000]));
    let vms = [(&v.spec, &v.vm)];
    let all = sketches(&lender, &vms, 1 << 34, &|| true);
    let items = &all[&0];
    assert_eq!(items.len(), 400, "what no other page has");
    assert!(items.iter().zip(0..).all(|(i, n)| i.sketch == Sketch::of(&page(n)) && i.target == HostIx(0)));
    // The guest writes to two of them.
    for at in [3u64, 77] {
        v.ram.write_all_at(&page(5000 + at), at * 4096).unwrap();
    }
    let lends: Vec<Lend> = items
        .iter()
        .enumerate()
        .map(|(n, i)| lend_to(i.digest, if n % 10 == 0 { &[1, 2] } else { &[1] }))
        .collect();
    lend(&lender, &vms, &lends, &|| true);
    assert!(wait_borrowed(&borrower, 400, &|| true));
    assert_eq!(counted(&lender.lending), [398, 0, 0]);
    assert_eq!(counted(&borrower.lending), [0, 398, 400]);
    let raw = 398 * PAGE_SIZE as u64;
    let bytes = lender.lending.bytes.load(Ordering::Relaxed);
    assert!((raw..raw + raw / 50).contains(&bytes), "{bytes} of noise, once");
    // Cancelled: nothing goes, nothing is waited for.
    lend(&lender, &vms, &lends, &|| false);
    assert_eq!(counted(&lender.lending)[0], 398);
    assert!(!wait_borrowed(&borrower, 401, &|| false));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn of_too_many_pages_those_that_look_alike_are_all_in_or_all_out() {
    let pages: Vec<PageBytes> = (0..200).map(page).collect();
    let some = pages.iter().filter(|p| is_in(&Sketch::of(p), 4)).count();
    assert!((20..90).contains(&some), "{some} of 200, about a quarter");
    for p in &pages {
        let mut other = *p;
        other[4000..].fill(0);
        let (a, b) = (Sketch::of(p), Sketch::of(&other));
        if a.features()[0] == b.features()[0] {
            assert_eq!(is_in(&a, 4), is_in(&b, 4));
        }
        assert!(is_in(&a, 1));
    }
}

#[test]
fn a_lender_that_lies_or_is_of_another_group_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let borrower = group(1, Vec::new());
    let stop = open(&borrower, listener);
    let call = |token: [u8; 32], domain: u16| {
        let hello = Greeting::new("g", token, Purpose::Lend { source: HostIx(0), domain });
        let (conn, ()) = dial(addr, &hello, Duration::from_secs(2), &Security::Plain, |_| ()).unwrap();
        wait_hello_ok(&conn, Duration::from_secs(2)).map(|_| conn)
    };
    assert!(matches!(call([8; 32], 0), Err(NetError::Declined { .. })));
    let entry = |digest| ContentEntry { id: None, digest, forward: vec![HostIx(1)] };
    let contents = |conn: &Connection, entries: &[ContentEntry], pages: &[PageBytes]| {
        let mut meta = Vec::new();
        encode_entries(entries.iter(), &mut meta);
        let body: Vec<_> = pages.iter().map(|p| IoSlice::new(p)).collect();
        send_frame(conn, Kind::Contents, &meta, &body).unwrap();
    };
    let ends = |conn: &Connection| FrameBuf::new().wait(conn, Duration::from_secs(5)).is_err();
    let digest = borrower.hashers[0].page(&page(1));
    // Two contents, of which one is another.
    let conn = call(TOKEN, 0).unwrap();
    contents(&conn, &[entry(digest), entry(digest)], &[page(2), page(1)]);
    assert!(wait_borrowed(&borrower, 2, &|| true));
    assert_eq!(counted(&borrower.lending), [0, 1, 2]);
    // Fewer contents than are announced, a frame that has no business here, a trust domain that is none.
    contents(&conn, &[entry(digest), entry(digest)], &[page(1)]);
    assert!(ends(&conn));
    let conn = call(TOKEN, 0).unwrap();
    send_frame(&conn, Kind::RamEnd, &[], &[]).unwrap();
    assert!(ends(&conn));
    let why = call(TOKEN, 9).unwrap_err();
    assert!(matches!(&why, NetError::Declined { why, .. } if why.contains("no trust domain 9")), "{why}");
    assert_eq!(counted(&borrower.lending), [0, 1, 2]);
    stop.store(true, Ordering::Relaxed);
}
