//! Server and client over loopback: the whole conversation, and each party's death or ill will in the middle of it.

use super::client::{IndexClient, IndexError, IndexOpener};
use super::server::{ServerOptions, serve};
use super::{Conn, TICK};
use crate::core::digest::{DIGEST_LEN, Digest};
use crate::core::index::{HostSet, LateItem, Registration};
use crate::core::models::Lend;
use crate::core::plan::{Carry, HostPlan};
use crate::core::units::{HostIx, PageId};
use crate::core::wire::index_msg::{ErrorCode, IndexMsg, MAX_BODY, Token, VERSIONS};
use models::alone;
use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

fn digest(n: u64) -> Digest {
    let mut d = [0; DIGEST_LEN];
    d.copy_from_slice(&blake3::hash(&n.to_le_bytes()).as_bytes()[..DIGEST_LEN]);
    Digest(d)
}

fn reg(n: u64, targets: &[u16]) -> Registration {
    Registration { digest: digest(n), targets: targets.iter().copied().map(HostIx).collect(), pages: 1 }
}

// Who may ask for what.
mod admit;
// Contents that stand for many.
mod models;

/// A question about content `n`, sent to a target host without a name.
fn ask(n: u64, target: u16) -> LateItem {
    LateItem { digest: digest(n), target: HostIx(target), kept: false }
}

const TOKEN: [u8; 32] = [7; 32];
const PATIENCE: Duration = Duration::from_secs(20);

/// A server on a free loopback port; stopped and joined when dropped.
struct Running {
    addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Running {
    fn new(opts: ServerOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        Self { addr, stop, thread: Some(std::thread::spawn(move || serve(listener, opts, theirs))) }
    }

    fn open(&self, hosts: u16) -> IndexOpener {
        IndexOpener::open(self.addr, "rack", &TOKEN, hosts, 4, PATIENCE).unwrap()
    }

    fn join(&self, host: u16) -> IndexClient {
        IndexClient::connect(self.addr, "rack", &TOKEN, HostIx(host), PATIENCE).unwrap()
    }

    fn raw(&self) -> TcpStream {
        let s = TcpStream::connect(self.addr).unwrap();
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            t.join().unwrap().unwrap();
        }
    }
}

fn code(e: &IndexError) -> ErrorCode {
    match e {
        IndexError::Refused { code, .. } => *code,
        other => panic!("{other}"),
    }
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

/// Contents 0..n; host h needs them at target h.
fn holdings(host: u16, n: u64) -> Vec<Registration> {
    (0..n).map(|d| reg(d, &[host])).collect()
}

#[test]
fn three_hosts_register_share_and_close() {
    let server = Running::new(ServerOptions::default());
    let opener = server.open(3);
    let n = 20_000;
    let plans: Vec<(HashMap<Digest, PageId>, HostPlan, IndexClient)> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..3)
            .map(|h| {
                let mut client = server.join(h);
                s.spawn(move || {
                    let mut mine = holdings(h, n);
                    mine.push(reg(n + u64::from(h), &[h]));
                    let ids = client.register(&mine).unwrap();
                    client.done(5).unwrap();
                    let plan = client.plan(soon()).unwrap();
                    let ids = mine.iter().zip(ids).map(|(r, id)| (r.digest, id.unwrap())).collect();
                    (ids, plan, client)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut carried = HashMap::new();
    for (ids, plan, _) in &plans {
        assert_eq!((plan.carry.len() + plan.remote.len()) as u64, n, "all are shared but its own");
        assert!(plan.carry.len().abs_diff(n as usize / 3) <= 1, "balanced: {}", plan.carry.len());
        for c in &plan.carry {
            assert_eq!(ids[&c.digest], c.id);
            assert_eq!(c.forward.len(), 2);
            assert!(carried.insert(c.digest, c.id).is_none());
        }
    }
    assert_eq!(carried.len() as u64, n);
    for (_, plan, _) in &plans {
        assert!(plan.remote.iter().all(|r| carried[&r.digest] == r.id));
    }
    let mut clients: Vec<_> = plans.into_iter().map(|p| p.2).collect();
    let kept = |n, target| LateItem { kept: true, ..ask(n, target) };
    let late = clients[1].late(&[kept(0, 3), kept(999_999, 2), ask(999_998, 2)]).unwrap();
    assert_eq!(late[0].delivered, HostSet::first(4));
    assert_eq!(late[1].delivered, HostSet::one(HostIx(2)));
    assert_eq!(
        (late[2].id, late[2].delivered.len()),
        (None, 0),
        "nobody has it, and a question keeps nothing"
    );
    let late = clients[2].late(&[ask(999_999, 0), ask(999_998, 0)]).unwrap();
    assert_eq!(late[0].delivered, HostSet::one(HostIx(2)));
    assert_eq!(late[1].delivered.len(), 0);
    // Any number of times, also from a new connection.
    let again = clients[0].plan(soon()).unwrap();
    let mut back = server.join(0);
    assert!(matches!(back.plan(soon()), Err(IndexError::Unexpected { .. })), "more than it has registered");
    let mut back = server.join(0);
    back.assume_registered(n as usize);
    assert_eq!(back.plan(soon()).unwrap(), again);

    opener.close().unwrap();
    assert_eq!(code(&clients[0].late(&[ask(0, 0)]).unwrap_err()), ErrorCode::Closed);
    assert!(clients[0].is_lost());
    assert!(matches!(clients[0].done(0), Err(IndexError::Lost { .. })));
    let gone = IndexClient::connect(server.addr, "rack", &TOKEN, HostIx(0), PATIENCE).unwrap_err();
    assert_eq!(code(&gone), ErrorCode::Refused);
}

#[test]
fn a_host_that_dies_while_registering_is_left_out() {
    let server = Running::new(ServerOptions::default());
    let mut opener = server.open(3);
    let mut clients = [server.join(0), server.join(1)];
    for (h, c) in (0..).zip(&mut clients) {
        c.register(&holdings(h, 100)).unwrap();
        c.done(0).unwrap();
    }
    let mut dying = server.join(2);
    dying.register(&holdings(2, 50)).unwrap();
    // Its second batch is cut in the middle.
    let mut cut = Vec::new();
    IndexMsg::Register { seq: 2, batch: holdings(2, 100) }.encode(&mut cut).unwrap();
    let stream = dying.stream();
    (&stream).write_all(&cut[..cut.len() / 2]).unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    drop(dying);

    let started = Instant::now();
    let not_yet = clients[0].plan(Instant::now() + TICK).unwrap_err();
    assert_eq!(code(&not_yet), ErrorCode::NotReady);
    assert!(started.elapsed() < PATIENCE / 2);
    assert!(!clients[0].is_lost(), "asking again is fine");

    let planned = opener.plan_now(&HostSet::new(), PATIENCE).unwrap();
    assert_eq!((planned.sources, planned.digests, planned.shared), (HostSet::first(2), 100, 100));
    let [a, b] = clients.each_mut().map(|c| c.plan(soon()).unwrap());
    assert_eq!((a.carry.len(), b.carry.len()), (50, 50));
    assert!(a.carry.iter().all(|c| c.forward.len() == 1), "what the dead host needed is not served");

    // It comes back too late.
    let mut back = server.join(2);
    assert_eq!(back.register(&holdings(2, 2)).unwrap(), [None, None]);
    back.done(0).unwrap();
    assert_eq!(code(&back.plan(soon()).unwrap_err()), ErrorCode::NotInPlan);
    assert_eq!(
        opener.plan_now(&HostSet::first(3), PATIENCE).unwrap().sources,
        HostSet::first(2),
        "once made, it stays"
    );
}

#[test]
fn a_host_that_was_given_up_is_no_holder() {
    let server = Running::new(ServerOptions::default());
    let mut opener = server.open(3);
    let mut clients = [server.join(0), server.join(1)];
    for (h, c) in (0..).zip(&mut clients) {
        c.register(&holdings(h, 10)).unwrap();
        c.done(0).unwrap();
    }
    let planned = opener.plan_now(&HostSet::one(HostIx(1)), PATIENCE).unwrap();
    assert_eq!((planned.sources, planned.shared), (HostSet::first(1), 0));
    assert_eq!(clients[0].plan(soon()).unwrap(), HostPlan::default());
}

#[test]
fn the_name_of_a_group_whose_coordinator_is_gone_is_free_at_once() {
    let server = Running::new(ServerOptions { max_groups: 1, ..ServerOptions::default() });
    let (first, second) = (server.open(2), server.open(2));
    let mut agent = server.join(0);
    let again = || IndexOpener::open(server.addr, "rack", &[8; 32], 1, 4, PATIENCE);
    assert_eq!(code(&again().unwrap_err()), ErrorCode::NameInUse);
    drop(first);
    assert_eq!(code(&again().unwrap_err()), ErrorCode::NameInUse, "one is still there");
    drop(second);
    let until = soon();
    let mut mine = loop {
        match again() {
            Ok(mine) => break mine,
            Err(e) if Instant::now() < until => assert_eq!(code(&e), ErrorCode::NameInUse),
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(code(&agent.done(0).unwrap_err()), ErrorCode::Closed, "the old group is over");
    assert_eq!(mine.plan_now(&HostSet::new(), PATIENCE).unwrap().digests, 0);
}

#[test]
fn strangers_stay_outside() {
    let opts = ServerOptions { max_groups: 1, ..ServerOptions::default() };
    let server = Running::new(opts);
    let _opener = server.open(2);
    let connect = |group: &str, token: [u8; 32], host: u16| {
        code(&IndexClient::connect(server.addr, group, &token, HostIx(host), PATIENCE).unwrap_err())
    };
    assert_eq!(connect("rack", [8; 32], 0), ErrorCode::Refused);
    assert_eq!(connect("other", TOKEN, 0), ErrorCode::Refused);
    assert_eq!(connect("rack", TOKEN, 2), ErrorCode::Protocol);
    let open = |group: &str, token, hosts| {
        code(&IndexOpener::open(server.addr, group, &token, hosts, 4, PATIENCE).unwrap_err())
    };
    assert_eq!(open("rack", [8; 32], 2), ErrorCode::NameInUse);
    assert_eq!(open("rack", TOKEN, 3), ErrorCode::NameInUse);
    assert_eq!(open("second", TOKEN, 2), ErrorCode::Busy);
    // Re-attached: same token, same shape.
    let _again = server.open(2);

    let mut old = Conn::new(server.raw().into(), MAX_BODY).unwrap();
    let hello =
        IndexMsg::Hello { versions: vec![99], group: "rack".into(), token: Token(TOKEN), host: HostIx(0) };
    old.send(&hello, &|| true).unwrap();
    let answer = old.recv(&mut |_| true).unwrap();
    assert!(matches!(answer, IndexMsg::Error { code: ErrorCode::Version, .. }), "{answer:?}");
    drop(old);
}

#[test]
fn connections_are_bounded_and_places_come_free_again() {
    let server = Running::new(ServerOptions { max_connections: 8, ..ServerOptions::default() });
    let _opener = server.open(2);
    let first = server.join(0);
    let connect = || IndexClient::connect(server.addr, "rack", &TOKEN, HostIx(1), PATIENCE);
    assert_eq!(code(&connect().unwrap_err()), ErrorCode::Busy);
    drop(first);
    let until = soon();
    while let Err(e) = connect() {
        // Its place is free as soon as the server has seen it leave.
        assert_eq!(code(&e), ErrorCode::Busy);
        assert!(Instant::now() < until);
    }
}

#[test]
fn hostile_bytes_end_one_connection_only() {
    let message = Duration::from_millis(300);
    let server = Running::new(ServerOptions { message, handshake: message, ..ServerOptions::default() });
    let opener = server.open(1);
    let mut good = server.join(0);
    let mut greeted = Vec::new();
    IndexMsg::Hello {
        versions: VERSIONS.to_vec(),
        group: "rack".into(),
        token: Token(TOKEN),
        host: HostIx(0),
    }
    .encode(&mut greeted)
    .unwrap();
    let then = |msg: &[u8]| [&greeted[..], msg].concat();
    let encoded = |m: IndexMsg| {
        let mut b = Vec::new();
        m.encode(&mut b).unwrap();
        b
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a web browser", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a long first message", [&513u32.to_le_bytes()[..], &[1; 513]].concat()),
        ("an empty message", vec![0; 8]),
        ("silence", vec![]),
        ("half a greeting", greeted[..9].to_vec()),
        ("business before the greeting", encoded(IndexMsg::Close)),
        ("a huge length", then(&u32::MAX.to_le_bytes())),
        ("an unknown kind", then(&[1, 0, 0, 0, 200])),
        ("half a message", then(&[200, 0, 0, 0, 4])),
        ("more registrations than bytes", then(&[7, 0, 0, 0, 4, 0, 0, 0, 0, 0, 32])),
        ("an agent closing the group", then(&encoded(IndexMsg::Close))),
        ("a server's word", then(&encoded(IndexMsg::Done))),
        (
            "a target host outside the group",
            then(&encoded(IndexMsg::Register { seq: 1, batch: vec![reg(1, &[4])] })),
        ),
        (
            "a late target outside the group",
            then(&encoded(IndexMsg::Late { seq: 1, items: vec![ask(1, 4)] })),
        ),
        (
            "a sketch's target outside the group",
            then(&encoded(IndexMsg::Sketches { domain: 0, items: alone(4, 1).1 })),
        ),
    ];
    for (what, bytes) in cases {
        let mut s = server.raw();
        s.write_all(&bytes).unwrap();
        // Hung up on, by its own fault or by the deadline; a reset is as good as an end.
        let mut end = Vec::new();
        if let Err(e) = s.read_to_end(&mut end) {
            assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{what}");
        }
    }
    assert!(good.register(&[reg(5, &[0])]).unwrap()[0].is_some());
    good.done(0).unwrap();
    good.plan(soon()).unwrap();
    opener.close().unwrap();
}

#[test]
fn a_silent_group_is_forgotten_and_its_place_is_free() {
    let opts =
        ServerOptions { group_idle: Duration::from_millis(200), max_groups: 1, ..ServerOptions::default() };
    let server = Running::new(opts);
    let _opener = server.open(2);
    let mut waiting = server.join(0);
    let e = waiting.plan(soon()).unwrap_err();
    assert_eq!(code(&e), ErrorCode::Closed);
    IndexOpener::open(server.addr, "next", &TOKEN, 1, 1, PATIENCE).unwrap();
}

#[test]
fn a_server_that_goes_down_says_so() {
    let server = Running::new(ServerOptions::default());
    let _opener = server.open(2);
    let mut waiting = server.join(0);
    let stop = Arc::clone(&server.stop);
    let t = std::thread::spawn(move || {
        std::thread::sleep(TICK);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(code(&waiting.plan(soon()).unwrap_err()), ErrorCode::Stopping);
    t.join().unwrap();
}

/// A server of one connection that greets and then does `then`.
fn false_server(then: impl FnOnce(&mut Conn) + Send + 'static) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut conn = Conn::new(listener.accept().unwrap().0.into(), MAX_BODY).unwrap();
        conn.recv(&mut |_| true).unwrap();
        conn.send(&IndexMsg::HelloOk { version: 1 }, &|| true).unwrap();
        then(&mut conn);
    });
    (addr, thread)
}

fn connect(addr: SocketAddr, timeout: Duration) -> IndexClient {
    IndexClient::connect(addr, "rack", &TOKEN, HostIx(0), timeout).unwrap()
}

fn answer_register(conn: &mut Conn, wrong_by: u32) {
    let IndexMsg::Register { seq, batch } = conn.recv(&mut |_| true).unwrap() else { panic!() };
    let ids = vec![Some(PageId { bucket: 0, index: 0 }); batch.len()];
    conn.send(&IndexMsg::Registered { seq: seq + wrong_by, ids }, &|| true).unwrap();
}

#[test]
fn a_server_lost_in_mid_registration_is_one_typed_error() {
    let (addr, thread) = false_server(|conn| answer_register(conn, 0));
    let mut client = connect(addr, PATIENCE);
    let e = client.register(&holdings(0, 200_000)).unwrap_err();
    assert!(matches!(e, IndexError::HungUp { .. } | IndexError::Io { .. }), "{e}");
    assert!(matches!(client.register(&[]), Err(IndexError::Lost { .. })));
    thread.join().unwrap();
    let e = IndexClient::connect(addr, "rack", &TOKEN, HostIx(0), PATIENCE).unwrap_err();
    assert!(matches!(e, IndexError::Connect { .. }), "{e}");
}

#[test]
fn a_server_that_falls_silent_costs_one_timeout() {
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (addr, thread) = false_server(move |conn| {
        answer_register(conn, 0);
        // Neither reads nor answers any more, until the client has given up.
        let _ = wait.recv();
    });
    let mut client = connect(addr, Duration::from_millis(400));
    let started = Instant::now();
    let e = client.register(&holdings(0, 400_000)).unwrap_err();
    assert!(matches!(e, IndexError::Timeout { .. }), "{e}");
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    assert!(client.is_lost());
    drop(go);
    thread.join().unwrap();
}

#[test]
fn a_lying_server_is_found_out() {
    let (addr, thread) = false_server(|conn| answer_register(conn, 1));
    let e = connect(addr, PATIENCE).register(&holdings(0, 10)).unwrap_err();
    assert!(matches!(e, IndexError::Unexpected { .. }), "{e}");
    thread.join().unwrap();

    let (addr, thread) = false_server(|conn| {
        answer_register(conn, 0);
        conn.recv(&mut |_| true).unwrap();
        let id = PageId { bucket: 0, index: 0 };
        let carry = vec![Carry { digest: digest(0), id, first: HostIx(0), forward: HostSet::new() }; 8];
        let piece = HostPlan { carry, remote: vec![] };
        // Plan without end: the client stops listening once it is more than it has registered.
        while conn.send(&IndexMsg::PlanPart { last: false, piece: piece.clone() }, &|| true).is_ok() {}
    });
    let mut client = connect(addr, PATIENCE);
    client.register(&holdings(0, 20)).unwrap();
    let e = client.plan(soon()).unwrap_err();
    assert!(matches!(e, IndexError::Unexpected { .. }), "{e}");
    drop(client);
    thread.join().unwrap();

    let (addr, thread) = false_server(|conn| {
        conn.recv(&mut |_| true).unwrap();
        conn.recv(&mut |_| true).unwrap();
        let id = PageId { bucket: 0, index: 0 };
        let carry = Carry { digest: digest(0), id, first: HostIx(0), forward: HostSet::new() };
        let lend = vec![Lend { carry, to: HostSet::one(HostIx(1)) }; 2];
        let part = IndexMsg::ModelsPart { last: false, borrows: 0, lend };
        while conn.send(&part, &|| true).is_ok() {}
    });
    let mut client = connect(addr, PATIENCE);
    client.sketches(0, &alone(0, 1).1).unwrap();
    let e = client.models(0, soon()).unwrap_err();
    assert!(matches!(e, IndexError::Unexpected { .. }), "{e}");
    drop(client);
    thread.join().unwrap();

    let (addr, thread) = false_server(|conn| {
        let _ = (&conn.stream).write_all(b"\xff\xff\xff\xffnonsense");
    });
    let e = connect(addr, PATIENCE).done(1).unwrap_err();
    assert!(matches!(e, IndexError::Wire { .. }), "{e}");
    thread.join().unwrap();
}

/// Prints its figures; run with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement: a million digests, worth its time only in a release build"]
fn a_million_digests_over_loopback() {
    let server = Running::new(ServerOptions::default());
    let mut opener = server.open(2);
    let all: Vec<_> = (0..2).map(|h| holdings(h, 1_000_000)).collect();
    let t = Instant::now();
    let mut clients: Vec<_> = std::thread::scope(|s| {
        let server = &server;
        let threads: Vec<_> = (0..)
            .zip(&all)
            .map(|(h, mine)| {
                s.spawn(move || {
                    let mut c = server.join(h);
                    c.register(mine).unwrap();
                    c
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let registered = t.elapsed();
    let t = Instant::now();
    clients.iter_mut().for_each(|c| c.done(0).unwrap());
    assert_eq!(opener.plan_now(&HostSet::new(), PATIENCE).unwrap().shared, 1_000_000);
    let planned = t.elapsed();
    let t = Instant::now();
    let parts: usize =
        clients.iter_mut().map(|c| c.plan(soon()).unwrap()).map(|p| p.carry.len() + p.remote.len()).sum();
    println!(
        "wall time: 2 x 1 M registrations {registered:?}, plan {planned:?}, {parts} plan entries {:?}",
        t.elapsed()
    );
    opener.close().unwrap();
}
