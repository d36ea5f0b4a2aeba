//! Target hosts on one machine that multicast to each other over its loopback, and what they do for each other where
//! multicast does not get through.

use super::super::peers::Peers;
use super::*;
use crate::core::arrival::TargetHost;
use crate::core::digest::{Algorithm, Hasher};
use crate::core::units::PAGE_SIZE;
use crate::flow::arrival::{ArrivalOptions, Member};
use crate::flow::door::{self, Door};
use crate::flow::{FlowTags, NoTags, Timeouts};
use std::net::{TcpListener, UdpSocket};

struct Rack {
    hosts: Vec<(Arc<TargetGroup>, Arc<Door>)>,
    hasher: Hasher,
    stop: Arc<AtomicBool>,
}

const TOKEN: [u8; 32] = [5; 32];

fn config(port: u16, drop_per_mille: u32) -> CastConfig {
    let group = SocketAddr::from(([239, 255, 77, 2], port));
    CastConfig { group, mtu: 1500, floor: 1_000_000, ceiling: 40_000_000, drop_per_mille, looped: true }
}

impl Rack {
    /// `configs`: how each host multicasts, if it does.
    fn new(configs: &[Option<CastConfig>]) -> Option<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let listeners: Vec<_> = configs.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addrs: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        let hasher = Hasher::new(Algorithm::Blake3, &TOKEN, "");
        let mut hosts = Vec::new();
        for ((me, listener), config) in (0u16..).zip(listeners).zip(configs) {
            let group = Arc::new(TargetGroup::new(
                Member { name: "g".into(), token: TOKEN, me: HostIx(me), hashers: vec![hasher.clone()] },
                TargetHost::new(10_000, 10_000),
                Peers::new(addrs.clone()),
                Timeouts::default(),
                Arc::new(NoTags),
                ArrivalOptions { socket_dir: std::env::temp_dir(), ..ArrivalOptions::default() },
            ));
            let door = Arc::new(Door::default());
            door.admit(group.clone());
            let (serving, halt) = (door.clone(), stop.clone());
            let tags: Arc<dyn FlowTags> = Arc::new(NoTags);
            std::thread::spawn(move || door::serve(&listener, &serving, &tags, Timeouts::default(), &halt));
            if let Some(config) = config
                && let Err(e) = group.multicast(*config, &addrs)
            {
                println!("skipped: no multicast on the loopback: {e}");
                return None;
            }
            hosts.push((group, door));
        }
        Some(Self { hosts, hasher, stop })
    }

    /// Contents that host `from` gets with a forward list, as by a push.
    fn push(&self, from: usize, numbers: std::ops::Range<u32>, to: &[u16]) {
        let group = &self.hosts[from].0;
        let all: Vec<u32> = numbers.collect();
        for batch in all.chunks(64) {
            let pages: Vec<_> = batch.iter().map(|n| page(*n)).collect();
            let forward: Vec<HostIx> = to.iter().map(|h| HostIx(*h)).collect();
            let entry = |p| ContentEntry { id: None, digest: self.hasher.page(p), forward: forward.clone() };
            let entries: Vec<_> = pages.iter().map(entry).collect();
            let mut meta = Vec::new();
            encode_entries(entries.iter(), &mut meta);
            let body = pages.as_flattened();
            let frame = Frame { kind: Kind::Contents, codec: 0, meta: &meta, body };
            let mut taker = Taker::new(From::Push(HostIx(0)), 0, Landing::default());
            assert_eq!(taker.take(group, &frame), Ok(batch.len()));
        }
    }

    fn has(&self, host: usize, numbers: std::ops::Range<u32>) -> bool {
        let h = lock(&self.hosts[host].0.host);
        numbers.into_iter().all(|n| h.store.get(&self.hasher.page(&page(n))).is_some())
    }

    fn counts(&self, host: usize) -> CastCounts {
        self.hosts[host].0.multicast_counts().unwrap()
    }

    fn end(self) {
        self.hosts.iter().for_each(|h| h.1.dismiss("g"));
        self.stop.store(true, Ordering::Relaxed);
        until("the threads' end", || self.hosts.iter().all(|h| Arc::strong_count(&h.0) == 1));
    }
}

/// Half noise, half not, so that it shrinks as guests' pages do.
fn page(n: u32) -> [u8; PAGE_SIZE] {
    let mut p = [n as u8; PAGE_SIZE];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut p[..PAGE_SIZE / 2]);
    p
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_several_need_leaves_once_and_arrives_whatever_is_lost() {
    let Some(rack) = Rack::new(&[Some(config(7731, 30)); 4]) else { return };
    rack.push(0, 0..1000, &[1, 2, 3]);
    rack.push(1, 1000..1500, &[0, 3]);
    until("all contents", || {
        (1..4).all(|h| rack.has(h, 0..1000)) && rack.has(0, 1000..1500) && rack.has(3, 1000..1500)
    });
    let (c, other) = (rack.counts(0), rack.counts(1));
    assert_eq!((c.sent.contents, c.unheard, c.hearers), (1000, 0, 3), "{c:?}");
    assert!(c.dropped > 0 && rack.counts(2).dropped > 0 && c.sent.repairs > 0, "{c:?}");
    // Once, compressed to a little over a half, and the losses of three receivers.
    assert!(c.sent.bytes + c.sent.repair_bytes < 1000 * 4096 * 7 / 10, "{c:?}");
    // Who needs nothing of it does not take it.
    assert!(!rack.has(2, 1000..1001) && other.sent.contents == 500);
    assert_eq!(rack.counts(3).contents, 1500);
    assert_eq!(lock(&rack.hosts[1].0.host).stats.duplicates, 0, "nothing came by unicast as well");
    rack.end();
}

#[test]
fn lists_of_one_and_hosts_that_hear_nothing_are_served_by_unicast() {
    let on = Some(config(7732, 0));
    let Some(rack) = Rack::new(&[on, on, on, None]) else { return };
    rack.push(0, 0..100, &[1, 2, 3]);
    rack.push(0, 100..200, &[1]);
    rack.push(0, 200..300, &[1, 3]);
    until("all contents", || {
        rack.has(1, 0..300) && rack.has(2, 0..100) && rack.has(3, 0..100) && rack.has(3, 200..300)
    });
    let c = rack.counts(0);
    // The third host's share of the first hundred, and both hosts' of the last: one alone hears.
    assert_eq!((c.sent.contents, c.unheard, c.hearers), (100, 300, 2), "{c:?}");
    rack.end();
}

#[test]
fn a_host_that_falls_silent_gets_the_rest_by_unicast() {
    let Some(rack) = Rack::new(&[Some(config(7733, 0)); 3]) else { return };
    until("all to hear each other", || (0..3).all(|h| rack.counts(h).hearers == 2));
    rack.hosts[2].0.cast.get().unwrap().close();
    std::thread::sleep(2 * NAP);
    rack.push(0, 0..2000, &[1, 2]);
    until("all contents", || rack.has(1, 0..2000) && rack.has(2, 0..2000));
    let c = rack.counts(0);
    assert!(c.sent.handed > 0 && c.hearers == 1, "{c:?}");
    rack.end();
}

#[test]
fn strangers_are_counted_and_nothing_else() {
    let Some(rack) = Rack::new(&[Some(config(7734, 0)); 3]) else { return };
    until("all to hear each other", || (0..3).all(|h| rack.counts(h).hearers == 2));
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let own = rack.hosts[0].0.cast.get().unwrap().sockets.local().unwrap();
    let (mut foreign, mut far) = (Vec::new(), Vec::new());
    encode(&CastKey::new(&[6; 32]), HostIx(1), &Datagram::Announce { count: 9, next: 9 }, &mut foreign);
    // Of the group, but an announcement to one host alone proves nothing.
    encode(&CastKey::new(&TOKEN), HostIx(1), &Datagram::Announce { count: 900, next: 900 }, &mut far);
    for bytes in [&foreign[..], &far[..], &[0; 1400], &[]] {
        stranger.send_to(bytes, own).unwrap();
    }
    until("four refusals", || rack.counts(0).foreign == 4);
    rack.push(1, 0..64, &[0, 2]);
    until("contents all the same", || rack.has(0, 0..64) && rack.has(2, 0..64));
    rack.end();
}

#[test]
fn names_wait_by_hosts_and_leave_in_order() {
    let set = |hosts: &[u16]| hosts.iter().map(|h| HostIx(*h)).collect::<HostSet>();
    let mut lanes = Lanes::default();
    let digest = |n: u8| Digest([n; 20]);
    for n in 0..100 {
        lanes.put(0, set(if n % 3 == 0 { &[1, 2] } else { &[1, 2, 3] }), digest(n));
    }
    lanes.put(1, set(&[1, 2]), digest(200));
    let mut seen = Vec::new();
    let mut lens = Vec::new();
    while let Some((domain, hosts, batch)) = lanes.take() {
        assert!(batch.iter().all(|d| (d.0[0] == 200) == (domain == 1)));
        assert!(batch.iter().all(|d| hosts.len() == if d.0[0] % 3 == 0 || domain == 1 { 2 } else { 3 }));
        lens.push(batch.len());
        seen.extend(batch);
    }
    assert_eq!((lens, lanes.len, seen.len()), (vec![34, 64, 2, 1], 0, 101));
}
