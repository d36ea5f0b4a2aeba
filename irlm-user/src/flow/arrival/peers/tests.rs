//! Two target hosts on loopback that forward to each other.

use super::*;
use crate::core::arrival::TargetHost;
use crate::core::digest::{Algorithm, Hasher};
use crate::flow::FlowTags;
use crate::flow::arrival::{ArrivalOptions, Member};
use crate::flow::door::{self, Door};
use crate::net::connection::Security;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Counts connections as they are tagged, at either end.
#[derive(Debug, Default)]
struct Ends(AtomicUsize);

impl FlowTags for Ends {
    fn add(&self, _: SocketAddr, _: SocketAddr, _: Traffic) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn change(&self, _: SocketAddr, _: SocketAddr, class: Traffic) {
        assert!(
            matches!(class, Traffic::Forward | Traffic::Bulk | Traffic::Switchover),
            "neither a peer's connection nor a push, nor one to settle: {class:?}"
        );
    }
    fn remove(&self, _: SocketAddr, _: SocketAddr) {}
}

struct Host {
    group: Arc<TargetGroup>,
    door: Arc<Door>,
    hasher: Hasher,
}

impl Host {
    fn forward(&self, to: u16, byte: u8) {
        let bytes = [byte; PAGE_SIZE];
        let digest = self.hasher.page(&bytes);
        lock(&self.group.host).content(false, digest, &bytes, &mut Vec::new());
        self.group.peers.contents(&self.group, HostIx(to), 0, std::iter::once(digest));
    }
    fn has(&self, byte: u8) -> bool {
        lock(&self.group.host).store.get(&self.hasher.page(&[byte; PAGE_SIZE])).is_some()
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `names[i]`: how the others reach host `i`; the hosts listen on 127.0.0.1.
fn rack(stop: &Arc<AtomicBool>, tags: &Arc<Ends>, told: impl Fn(SocketAddr) -> SocketAddr) -> Vec<Host> {
    let listeners: Vec<_> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addrs: Vec<_> = listeners.iter().map(|l| told(l.local_addr().unwrap())).collect();
    let mut hosts = Vec::new();
    for (me, listener) in (0u16..).zip(listeners) {
        let hasher = Hasher::new(Algorithm::Blake3, &[1; 32], "");
        let group = Arc::new(TargetGroup::new(
            Member { name: "g".into(), token: [1; 32], me: HostIx(me), hashers: vec![hasher.clone()] },
            TargetHost::new(1000, 1000),
            Peers::new(addrs.clone()),
            Timeouts::default(),
            tags.clone(),
            ArrivalOptions { socket_dir: std::env::temp_dir(), ..ArrivalOptions::default() },
        ));
        let door = Arc::new(Door::default());
        door.admit(group.clone());
        let (serving, halt) = (door.clone(), stop.clone());
        let told: Arc<dyn FlowTags> = tags.clone();
        std::thread::spawn(move || door::serve(&listener, &serving, &told, Timeouts::default(), &halt));
        hosts.push(Host { group, door, hasher });
    }
    hosts
}

#[test]
fn two_hosts_that_forward_to_each_other_share_one_connection() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    // The one that is to be called has something first: it waits for the call.
    hosts[1].forward(0, 1);
    hosts[0].forward(1, 2);
    until("both contents", || hosts[0].has(1) && hosts[1].has(2));
    for n in 3..60 {
        hosts[usize::from(n % 2)].forward(1 - u16::from(n % 2), n);
    }
    until("the rest", || (3..60).all(|n| hosts[0].has(n) && hosts[1].has(n)));
    assert_eq!(tags.0.load(Ordering::Relaxed), 2, "one connection, tagged at each end");
    // A lost connection is replaced, whoever notices.
    for (_, line) in lock(&hosts[0].group.peers.lines).drain() {
        let _ = line.shutdown(Shutdown::Both);
    }
    let mut n = 60;
    until("contents after the loss", || {
        n += 1;
        std::thread::sleep(Duration::from_millis(100));
        [(0, 1), (1, 0)].into_iter().all(|(from, to)| {
            let byte = n + 40 * u8::from(from == 1);
            hosts[from].forward(to as u16, byte);
            std::thread::sleep(Duration::from_millis(50));
            hosts[to].has(byte)
        })
    });
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    until("the connections' end", || hosts.iter().all(|h| Arc::strong_count(&h.group) == 1));
    stop.store(true, Ordering::Relaxed);
}

/// Contents that do not resemble each other, and shrink.
fn varied(n: u8) -> PageBytes {
    let mut p = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&[n]).finalize_xof().fill(&mut p[..PAGE_SIZE / 2]);
    p
}

#[test]
fn a_frame_that_all_is_for_a_peer_goes_on_as_it_came_and_others_by_name() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    let hello = Greeting::new("g", [1; 32], Purpose::Push { source: HostIx(0), domain: 0 });
    let (push, ()) =
        dial(hosts[0].group.peers.addrs[0], &hello, Duration::from_secs(5), &Security::Plain, |_| ())
            .unwrap();
    wait_hello_ok(&push, Duration::from_secs(5)).unwrap();
    let work = crate::flow::work::Work::default();
    let mut lane = Lane::new(crate::core::squeeze::Mode::Level(3), Window::default(), &Arc::default());
    let mut send = |which: std::ops::Range<u8>, forward: &dyn Fn(u8) -> bool| {
        let pages: Vec<PageBytes> = which.clone().map(varied).collect();
        let entry = |(n, p): (u8, &PageBytes)| ContentEntry {
            id: None,
            digest: hosts[0].hasher.page(p),
            forward: if forward(n) { vec![HostIx(1)] } else { Vec::new() },
        };
        let entries: Vec<_> = which.zip(&pages).map(entry).collect();
        let mut meta = Vec::new();
        encode_entries(entries.iter(), &mut meta);
        let contents: Vec<&PageBytes> = pages.iter().collect();
        lane.send(&push, (Kind::Contents, &meta), &contents, &work, || false).unwrap();
    };
    let at = |host: usize, n: u8| {
        lock(&hosts[host].group.host).store.get(&hosts[0].hasher.page(&varied(n))).is_some()
    };
    let passed_on = || hosts[0].group.counts.work.snapshot().passed_on as usize / PAGE_SIZE;
    send(0..100, &|_| true);
    until("a whole frame", || (0..100).all(|n| at(1, n)));
    assert_eq!(passed_on(), 100);
    assert_eq!(hosts[0].group.counts.work.snapshot().by_level, [].into(), "nothing was packed again");
    send(100..164, &|n| n % 2 == 0);
    until("half a frame", || (100..164).step_by(2).all(|n| at(1, n)));
    assert!((100..164).all(|n| at(0, n)) && !(101..164).step_by(2).any(|n| at(1, n)));
    assert_eq!(passed_on(), 100, "by name");
    until("what was held to be given back", || hosts[0].group.peers.held.load(Ordering::Relaxed) == 0);
    // At the bound frames are not held.
    hosts[0].group.peers.held.store(MAX_HELD, Ordering::Relaxed);
    send(164..200, &|_| true);
    until("a whole frame by name", || (164..200).all(|n| at(1, n)));
    assert_eq!(passed_on(), 100);
    drop(push);
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_host_that_nobody_calls_calls_itself() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    hosts[1].forward(0, 1);
    until("the content", || hosts[0].has(1));
    hosts[0].forward(1, 2);
    until("the answer on the same connection", || hosts[1].has(2));
    assert_eq!(tags.0.load(Ordering::Relaxed), 2);
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn contents_do_not_go_to_whoever_says_to_be_a_host() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    // The group names an address that is not the caller's.
    let hosts = rack(&stop, &tags, |a| SocketAddr::new([127, 0, 0, 2].into(), a.port()));
    let port = hosts[0].group.peers.addrs[0].port();
    let hello = Greeting::new("g", [1; 32], Purpose::Peer { target: HostIx(1), domain: 0 });
    let (caller, ()) =
        dial(([127, 0, 0, 1], port).into(), &hello, Duration::from_secs(5), &Security::Plain, |_| ())
            .unwrap();
    wait_hello_ok(&caller, Duration::from_secs(5)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(hosts[0].group.peers.line((HostIx(1), 0), Duration::ZERO).is_none());
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn what_a_vcpu_waits_for_overtakes_the_queue_and_what_is_not_there_is_said() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    let vm = Arc::new(crate::flow::arrival::TargetVmShared::new().unwrap());
    hosts[0].group.expect(crate::core::units::VmIx(0), &vm);
    let content = |byte: u8| hosts[0].hasher.page(&[byte; PAGE_SIZE]);
    // In the other's store, but not queued for this host.
    let bytes = [7; PAGE_SIZE];
    lock(&hosts[1].group.host).content(false, content(7), &bytes, &mut Vec::new());
    hosts[0].group.peers.hurry(&hosts[0].group, HostIx(1), 0, [content(7), content(8)].into_iter());
    until("the content", || hosts[0].has(7));
    until(
        "the word that the other is not there",
        || matches!(vm.inbox.take(), Some(crate::flow::arrival::Input::NotHere(HostIx(1), d)) if d == [content(8)]),
    );
    // Before everything that is queued, in batches of its own.
    let queue = Queue::default();
    lock(&queue.waiting).items.extend((0..100).map(|n| Item::Content(content(n))));
    lock(&queue.waiting).urgent.extend([Item::NotHere(content(1)), Item::Content(content(2))]);
    let first = next(&queue).unwrap();
    assert!(matches!(first[..], [Item::NotHere(_)]), "{first:?}");
    assert!(matches!(next(&queue).unwrap()[..], [Item::Content(d)] if d == content(2)));
    assert_eq!(next(&queue).unwrap().len(), BATCH);
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn after_its_close_a_group_has_no_senders_and_takes_no_peers() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    let group = &hosts[0].group;
    group.close();
    for n in 0..20 {
        hosts[0].forward(1, n);
    }
    assert!(lock(&group.peers.senders).queues.is_empty(), "a queue after the close");
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(tags.0.load(Ordering::Relaxed), 0, "nobody was called");
    assert!(!hosts[1].has(0));
    // Nor does one that calls stay.
    let hello = Greeting::new("g", [1; 32], Purpose::Peer { target: HostIx(1), domain: 0 });
    let (caller, ()) =
        dial(group.peers.addrs[0], &hello, Duration::from_secs(5), &Security::Plain, |_| ()).unwrap();
    let (_, mut frames) = wait_hello_ok(&caller, Duration::from_secs(5)).unwrap();
    assert!(
        frames
            .wait(&caller, Duration::from_secs(5))
            .is_err_and(|e| matches!(e, crate::net::conn::NetError::Closed { .. }))
    );
    assert!(lock(&group.peers.lines).is_empty());
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_group_that_is_dropped_unclosed_ends_its_senders() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let mut hosts = rack(&stop, &tags, |a| a);
    hosts[0].forward(1, 1);
    until("the content", || hosts[1].has(1));
    let queue = lock(&hosts[0].group.peers.senders).queues[&(HostIx(1), 0)].clone();
    // The group goes from the door without a word to it.
    let Host { group, door, .. } = hosts.remove(0);
    lock(&door.groups).remove("g");
    hosts[0].door.dismiss("g");
    drop(group);
    // Its sender has the other handle.
    until("the sender's end", || Arc::strong_count(&queue) == 1);
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn nobody_is_served_for_a_trust_domain_a_host_or_a_source_that_the_group_has_not() {
    let (stop, tags) = (Arc::new(AtomicBool::new(false)), Arc::new(Ends::default()));
    let hosts = rack(&stop, &tags, |a| a);
    let (group, vm) = (&hosts[0].group, crate::core::units::VmIx(0));
    let shared = Arc::new(crate::flow::arrival::TargetVmShared::new().unwrap());
    shared.comes_from(HostIx(3));
    group.expect(vm, &shared);
    // Whatever a peer says of a domain, there is no thread for it.
    for domain in 1..50 {
        group.peers.contents(group, HostIx(1), domain, std::iter::once(Digest([0; 20])));
    }
    assert!(lock(&group.peers.senders).queues.is_empty());
    let answer = |purpose| {
        let hello = Greeting::new("g", [1; 32], purpose);
        let (caller, ()) =
            dial(group.peers.addrs[0], &hello, Duration::from_secs(5), &Security::Plain, |_| ()).unwrap();
        let end = wait_hello_ok(&caller, Duration::from_secs(5));
        drop(caller);
        end.map(drop).map_err(|e| e.to_string())
    };
    let declined = |purpose, why: &str| {
        let e = answer(purpose).unwrap_err();
        assert!(e.contains(why), "{e}");
    };
    declined(Purpose::Push { source: HostIx(0), domain: 1 }, "trust domain 1");
    declined(Purpose::Peer { target: HostIx(1), domain: 9 }, "trust domain 9");
    declined(Purpose::Peer { target: HostIx(2), domain: 0 }, "target host 2");
    declined(Purpose::Peer { target: HostIx(0), domain: 0 }, "target host 0");
    for purpose in [
        Purpose::Vm { source: HostIx(1), vm },
        Purpose::Direct { source: HostIx(1), vm },
        Purpose::Stream { source: HostIx(1), vm },
        Purpose::Demand { source: HostIx(1), vm },
    ] {
        declined(purpose, "does not come from source host 1");
    }
    assert!(shared.inbox.is_empty());
    // Its own source's call is passed on, and an agent that was restarted may settle under another number.
    answer(Purpose::Settle { source: HostIx(0), vm }).unwrap();
    until("the call", || !shared.inbox.is_empty());
    answer(Purpose::Push { source: HostIx(0), domain: 0 }).unwrap();
    hosts.iter().for_each(|h| h.door.dismiss("g"));
    stop.store(true, Ordering::Relaxed);
}
