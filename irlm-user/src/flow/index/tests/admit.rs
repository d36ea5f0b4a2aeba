//! Whoever calls is asked who he is, and keeps what is his.

use super::*;
use crate::core::identity::{Role, Tenants};
use crate::net::connection::tests::keys_of;
use crate::net::connection::{Endpoint, Security};

fn refused<T: std::fmt::Debug>(r: Result<T, IndexError>) -> (ErrorCode, String) {
    match r.unwrap_err() {
        IndexError::Refused { code, text, .. } => (code, text),
        other => panic!("{other}"),
    }
}

fn open(server: &Running, by: &Security, name: &str, token: u8) -> Result<IndexOpener, IndexError> {
    let at = Endpoint { addr: server.addr, security: by.clone() };
    IndexOpener::open(at, name, &[token; 32], 2, 4, PATIENCE)
}

fn join(server: &Running, by: &Security, host: u16) -> Result<IndexClient, IndexError> {
    let at = Endpoint { addr: server.addr, security: by.clone() };
    IndexClient::connect(at, "rack", &TOKEN, HostIx(host), PATIENCE)
}

#[test]
fn only_coordinators_open_only_agents_join_and_each_keeps_what_is_its_own() {
    let coordinator = || Role::Coordinator(Tenants::All);
    let roles = [
        Role::Index,
        coordinator(),
        coordinator(),
        Role::Operator,
        Role::Viewer,
        Role::Agent("s0".into()),
        Role::Agent("s1".into()),
    ];
    let keys: [Security; 7] = keys_of(&roles).try_into().unwrap();
    let [index, robot, other, ann, viewer, s0, s1] = keys;
    let server = Running::new(ServerOptions { security: index, ..ServerOptions::default() });
    for nobody in [&viewer, &s0] {
        assert_eq!(refused(open(&server, nobody, "rack", 7)).0, ErrorCode::Refused);
    }
    assert!(open(&server, &Security::Plain, "rack", 7).is_err(), "in plain text");
    let opened = open(&server, &robot, "rack", 7).unwrap();
    for nobody in [&viewer, &robot] {
        assert_eq!(refused(join(&server, nobody, 0)).0, ErrorCode::Refused);
    }
    let first = join(&server, &s0, 0).unwrap();
    let (got, why) = refused(join(&server, &s1, 0));
    assert!(got == ErrorCode::Refused && why.contains("is s0, and not s1"), "{why}");
    // Also after it has left.
    drop(first);
    assert_eq!(refused(join(&server, &s1, 0)).0, ErrorCode::Refused);
    drop((join(&server, &s0, 0).unwrap(), join(&server, &s1, 1).unwrap()));
    // A name is its owner's: nobody else is in the way of it, or gets what is under it.
    assert_eq!(refused(open(&server, &robot, "rack", 8)).0, ErrorCode::NameInUse);
    let beside = open(&server, &other, "rack", 8).unwrap();
    let operators = open(&server, &ann, "rack", 9).unwrap();
    drop((join(&server, &s0, 0).unwrap(), beside, operators));
    drop(opened);
    let until = Instant::now() + PATIENCE;
    let mut all = vec![loop {
        match open(&server, &robot, "rack", 10) {
            Ok(again) => break again,
            // Its coordinator's end is still to be noticed.
            Err(e) => assert!(Instant::now() < until && code(&e) == ErrorCode::NameInUse, "{e}"),
        }
        std::thread::sleep(TICK);
    }];
    assert_eq!(refused(join(&server, &s0, 0)).0, ErrorCode::Refused, "the old group is over");
    // Half of all are one caller's at most.
    let more = |who, n| open(&server, who, &format!("rack {n}"), n);
    all.extend((0..3).map(|n| more(&robot, n).unwrap()));
    let (got, why) = refused(more(&robot, 9));
    assert!(got == ErrorCode::Busy && why.contains("open here"), "{why}");
    all.extend((0..2).map(|n| more(&ann, n).unwrap()));
}

/// One group is enough for any number of connections.
#[test]
fn one_caller_cannot_have_all_connections() {
    let robot = || Role::Coordinator(Tenants::All);
    let keys: [Security; 4] = keys_of(&[Role::Index, robot(), robot(), Role::Operator]).try_into().unwrap();
    let [index, greedy, other, ann] = keys;
    let opts = ServerOptions { security: index, max_connections: 8, ..ServerOptions::default() };
    let server = Running::new(opts);
    let open = |who, name: &str| open(&server, who, name, 7);
    let _held = [open(&greedy, "rack").unwrap(), open(&greedy, "rack").unwrap()];
    let (code, why) = refused(open(&greedy, "rack"));
    assert!(code == ErrorCode::Busy && why.contains("too many connections of"), "{why}");
    let _others = [open(&other, "rack").unwrap(), open(&ann, "rack").unwrap()];
}

#[test]
fn groups_that_nobody_joins_make_room_for_callers_from_elsewhere() {
    let at = |from: &str| {
        let from = from.to_owned();
        move |server: &Running, n: u8| {
            // All of 127.0.0.0/8 is this machine.
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(from.parse().unwrap(), 0).into()).unwrap();
            socket.connect(&server.addr.into()).unwrap();
            let mut conn =
                Conn::new(crate::net::connection::Connection::from(TcpStream::from(socket)), MAX_BODY)
                    .unwrap();
            let open = IndexMsg::Open {
                versions: VERSIONS.to_vec(),
                group: format!("{from}-{n}"),
                token: Token([n; 32]),
                source_hosts: 1,
                target_hosts: 1,
            };
            conn.send(&open, &|| true).unwrap();
            let until = Instant::now() + PATIENCE;
            let answer = conn.recv(&mut |_| Instant::now() < until).unwrap();
            (conn, answer)
        }
    };
    let server = Running::new(ServerOptions { max_groups: 8, ..ServerOptions::default() });
    let (greedy, modest, third) = (at("127.0.0.2"), at("127.0.0.3"), at("127.0.0.4"));
    let is_in = |m: &IndexMsg| matches!(m, IndexMsg::HelloOk { .. });
    let is_busy = |m: &IndexMsg| matches!(m, IndexMsg::Error { code: ErrorCode::Busy, .. });
    let mut all: Vec<_> = (0..4).map(|n| greedy(&server, n)).collect();
    assert!(all.iter().all(|(_, m)| is_in(m)));
    let busy = greedy(&server, 4).1;
    assert!(is_busy(&busy), "{busy:?}");
    let kept: Vec<_> = (0..3).map(|n| modest(&server, n)).collect();
    assert!(kept.iter().all(|(_, m)| is_in(m)));
    // Seven are all that anybody may have: the oldest one went, and is told so.
    let first = third(&server, 0);
    assert!(is_in(&first.1), "{:?}", first.1);
    let until = Instant::now() + PATIENCE;
    let ended = all[0].0.recv(&mut |_| Instant::now() < until);
    assert!(!matches!(ended, Ok(ref m) if is_in(m)), "{ended:?}");
    // Until nobody has many more than a newcomer would have.
    let next = ["127.0.0.5", "127.0.0.6", "127.0.0.7", "127.0.0.8"].map(|from| at(from)(&server, 0));
    assert!(next.iter().all(|(_, m)| is_in(m)));
    let got = at("127.0.0.9")(&server, 0).1;
    assert!(is_busy(&got), "{got:?}");
}
