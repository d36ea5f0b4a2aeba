//! Frames through TLS over loopback: whole, both ways at once, at a slow reader's pace, and never after a cut or a change.

use super::*;
use crate::core::identity::{Role, RoleUri};
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::MAX_BODY;
use crate::net::conn::{FrameBuf, NetError, NoWait, send, send_while, tune};
use crate::net::relay::end_for;
use crate::net::tls::make::{Authority, Holder, Side, Validity};
use crate::net::tls::{CA, CLIENT, CLIENT_KEY, SERVER, SERVER_KEY, Use};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{SystemTime, UNIX_EPOCH};

const LONG: Duration = Duration::from_secs(20);

/// Certificates of a host that is reached over loopback.
pub(crate) fn keys() -> Security {
    keys_of(&[Role::Agent("h".into())]).remove(0)
}

/// Certificates of one CA for whoever has these roles, all reached over loopback.
pub(crate) fn keys_of(roles: &[Role]) -> Vec<Security> {
    credentials_of(roles).into_iter().map(|c| Security::Tls(Arc::new(c))).collect()
}

/// The same, as an agent has them.
pub(crate) fn credentials_of(roles: &[Role]) -> Vec<Credentials> {
    let (ca, pem) = authority();
    roles.iter().enumerate().map(|(n, role)| credentials(&ca, &pem, role, n)).collect()
}

/// A server, and a client of another CA who believes the server.
pub(crate) fn disbelieved() -> (Security, Security) {
    let ((ours, pem), (others, other)) = (authority(), authority());
    (issued(&ours, &pem, &Role::Agent("h".into()), 0), issued(&others, &(pem + &other), &Role::Operator, 0))
}

fn valid() -> Validity {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
    Validity { from: now - 3600, to: now + 86_400 }
}

fn authority() -> (Authority, String) {
    let (ca, pems) = Authority::create("lab", valid()).unwrap();
    (ca, pems.cert)
}

/// The keys of somebody who believes these CAs.
fn issued(ca: &Authority, believes: &str, role: &Role, n: usize) -> Security {
    Security::Tls(Arc::new(credentials(ca, believes, role, n)))
}

fn credentials(ca: &Authority, believes: &str, role: &Role, n: usize) -> Credentials {
    let name = match role {
        Role::Agent(host) => host.clone(),
        role => format!("{}-{n}", role.name()),
    };
    let uri = RoleUri::new(role.clone(), &name).unwrap();
    let ips = ["127.0.0.1".parse().unwrap()];
    let holder = Holder { name: &name, dns: &[], ips: &ips, roles: &[uri] };
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    put(CA, believes);
    for (side, cert, key) in [(Side::Server, SERVER, SERVER_KEY), (Side::Client, CLIENT, CLIENT_KEY)] {
        let pems = ca.issue(&holder, side, valid()).unwrap();
        put(cert, &pems.cert);
        put(key, &pems.key);
    }
    Credentials::open(dir.path(), Use::Both).unwrap()
}

/// A connection to `to`, and what has accepted it there.
fn over(security: &Security, to: SocketAddr, listener: &TcpListener) -> (Connection, Connection) {
    let called = security.clone();
    let caller = std::thread::spawn(move || {
        let tcp = TcpStream::connect(to).unwrap();
        tune(&tcp, LONG).unwrap();
        called.call(tcp, to, LONG)
    });
    let tcp = listener.accept().unwrap().0;
    tune(&tcp, LONG).unwrap();
    let far = security.answer(tcp, LONG).unwrap();
    (caller.join().unwrap().unwrap(), far)
}

fn secured() -> (Connection, Connection) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    over(&keys(), listener.local_addr().unwrap(), &listener)
}

fn body(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + n) as u8).collect()
}

#[test]
fn frames_of_all_sizes_cross_both_ways_at_once_and_whole() {
    let (near, far) = secured();
    assert!(near.is_secured() && !near.peer_certificates().is_empty() && !far.peer_certificates().is_empty());
    let sizes = [0, 1, 4096, MAX_BODY, 7, 16_384, 16_385, MAX_BODY, 100_000, MAX_BODY, 3];
    let both = [(near.clone(), far.clone()), (far, near)].map(|(from, to)| {
        let sender = std::thread::spawn(move || {
            for n in sizes {
                let all = body(n);
                let (a, b) = all.split_at(n / 3);
                send(&from, Kind::Pages, &[n as u8; 9], &[IoSlice::new(a), IoSlice::new(b)]).unwrap();
            }
            from
        });
        let reader = std::thread::spawn(move || {
            let mut frames = FrameBuf::new();
            for n in sizes {
                let frame = frames.wait(&to, LONG).unwrap();
                assert_eq!((frame.meta, frame.body), (&[n as u8; 9][..], &body(n)[..]));
            }
            to
        });
        (sender, reader)
    });
    let ends = both.map(|(s, r)| (s.join().unwrap(), r.join().unwrap()));
    // An end that is said is an end; nothing else was read.
    let [(near, far), _] = ends;
    near.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(FrameBuf::new().wait(&far, LONG), Err(NetError::Closed { .. })));
}

/// What has been read from the socket and lies open in the session is not waited for.
#[test]
fn many_small_frames_that_came_at_once_are_all_there() {
    let (near, far) = secured();
    for n in 0..2000u32 {
        send(&near, Kind::Word, &n.to_le_bytes(), &[]).unwrap();
    }
    let (mut frames, began) = (FrameBuf::new(), Instant::now());
    for n in 0..2000u32 {
        assert_eq!(frames.wait(&far, LONG).unwrap().meta, n.to_le_bytes());
    }
    assert!(began.elapsed() < LONG);
}

#[test]
fn a_reader_that_is_slow_holds_the_writer_and_loses_nothing() {
    let (near, far) = secured();
    let all = body(MAX_BODY);
    let sender = std::thread::spawn(move || {
        let began = Instant::now();
        for _ in 0..200 {
            send_while(&near, Kind::Pages, &[], &[IoSlice::new(&all)], || began.elapsed() < LONG).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(1200));
    assert!(!sender.is_finished(), "everything fitted on the way");
    let mut frames = FrameBuf::new();
    for _ in 0..200 {
        assert_eq!(frames.wait(&far, LONG).unwrap().body, body(MAX_BODY));
    }
    sender.join().unwrap();
    assert!(matches!(frames.wait(&far, LONG), Err(NetError::Closed { .. })), "the last clone said the end");
}

/// Somebody between the two ends, who does `to` to each chunk that goes towards the server.
fn between(
    to: SocketAddr,
    mut change: impl FnMut(usize, &mut Vec<u8>) -> bool + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut from = listener.accept().unwrap().0;
        let mut on = TcpStream::connect(to).unwrap();
        let (mut back, mut home) = (on.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut back, &mut home));
        let (mut chunk, mut passed) = (vec![0; 65_536], 0);
        while let Ok(n) = from.read(&mut chunk)
            && n > 0
        {
            let mut bytes = chunk[..n].to_vec();
            if !change(passed, &mut bytes) || on.write_all(&bytes).is_err() {
                break;
            }
            passed += n;
        }
        let _ = on.shutdown(Shutdown::Both);
    });
    at
}

#[test]
fn a_bit_that_was_flipped_and_a_connection_that_was_cut_are_no_frames() {
    for cut in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = between(listener.local_addr().unwrap(), move |passed, bytes| {
            // The handshake is far shorter.
            if passed < 20_000 {
                return true;
            }
            bytes[0] ^= 4;
            !cut
        });
        let (near, far) = over(&keys(), at, &listener);
        let sender = std::thread::spawn(move || {
            let all = body(10_000);
            while send(&near, Kind::Pages, &[], &[IoSlice::new(&all)]).is_ok() {}
        });
        let (mut frames, mut whole) = (FrameBuf::new(), 0);
        let e = loop {
            match frames.wait(&far, LONG) {
                Ok(frame) => assert_eq!(frame.body, body(10_000)),
                Err(e) => break e,
            }
            whole += 1;
        };
        assert!(whole >= 1 && matches!(e, NetError::Lost { .. }), "{whole}: {e}");
        // Of a connection that was cut there may be nothing left to end.
        let _ = far.shutdown(Shutdown::Both);
        sender.join().unwrap();
    }
}

#[test]
fn who_shows_no_certificate_and_who_speaks_no_tls_are_not_let_in() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let server = keys();
    let caller = std::thread::spawn(move || {
        let stranger = keys();
        let e = stranger.call(TcpStream::connect(to).unwrap(), to, LONG).map(drop).unwrap_err();
        let mut plain = TcpStream::connect(to).unwrap();
        plain.write_all(&[7; 400]).unwrap();
        (e.to_string(), plain)
    });
    let e = server.answer(listener.accept().unwrap().0, LONG).map(drop).unwrap_err();
    assert!(e.to_string().contains("refuses this side's certificate"), "{e}");
    let plain = listener.accept().unwrap().0;
    assert!(server.answer(plain, LONG).is_err());
    let (e, _plain) = caller.join().unwrap();
    assert!(e.contains("issued by somebody else"), "{e}");
    // Nor does one who says nothing hold anybody for long.
    let _silent = TcpStream::connect(to).unwrap();
    let began = Instant::now();
    assert!(server.answer(listener.accept().unwrap().0, Duration::from_millis(100)).is_err());
    assert!(began.elapsed() < LONG);
}

#[test]
fn a_process_that_knows_no_tls_has_an_end_of_its_own() {
    for (near, far) in [secured(), pair()] {
        let ends = (end_for("near", near, LONG).unwrap(), end_for("far", far, LONG).unwrap());
        let mut ends = (std::fs::File::from(ends.0), std::fs::File::from(ends.1));
        let all = body(3 << 20);
        let (sent, mut out) = (all.clone(), ends.0.try_clone().unwrap());
        let sender = std::thread::spawn(move || out.write_all(&sent).unwrap());
        let mut got = vec![0; all.len()];
        ends.1.read_exact(&mut got).unwrap();
        assert!(got == all);
        sender.join().unwrap();
        ends.1.write_all(b"and back").unwrap();
        let mut back = [0; 8];
        ends.0.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"and back");
        // The end of one is seen by the other.
        drop(ends.0);
        assert_eq!(ends.1.read(&mut back).unwrap_or(0), 0);
    }
}

/// Somebody between the two ends, who passes all on until told to stop, and then is at what comes from the caller and at what
/// goes to the server.
fn stopped_between(to: SocketAddr) -> (SocketAddr, impl FnOnce() -> (TcpStream, TcpStream)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, stop) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let stopped = stop.clone();
    let passing = std::thread::spawn(move || {
        let mut from = listener.accept().unwrap().0;
        let mut on = TcpStream::connect(to).unwrap();
        let (mut back, mut home) = (on.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut back, &mut home));
        from.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut chunk = [0; 4096];
        loop {
            match from.read(&mut chunk) {
                Ok(n) => on.write_all(&chunk[..n]).unwrap(),
                Err(_) if stopped.load(Ordering::Relaxed) => break,
                Err(_) => {}
            }
        }
        from.set_read_timeout(None).unwrap();
        (from, on)
    });
    (at, move || {
        stop.store(true, Ordering::Relaxed);
        passing.join().unwrap()
    })
}

/// Who waits for less is woken for each segment of a record that cannot be opened yet; who waits for more waits for ever.
#[test]
fn what_is_still_to_come_is_the_rest_of_a_record_and_no_more() {
    const LAST_WORD: usize = 24;
    for frame in [100, 5000, 16_000, 40_000] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (at, stop) = stopped_between(listener.local_addr().unwrap());
        let (near, far) = over(&keys(), at, &listener);
        let (mut from, mut on) = stop();
        send(&near, Kind::Pages, &[], &[IoSlice::new(&body(frame))]).unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut sealed = Vec::new();
        from.read_to_end(&mut sealed).unwrap();
        let (mut frames, mut rest, mut wakes) = (FrameBuf::new(), &sealed[..], 0);
        while !frames.ready() {
            let n = far.still_to_come(frames.lacks());
            let most = rest.len() - LAST_WORD;
            assert!((1..=most).contains(&n), "{n} of {most} bytes are waited for");
            let (now, later) = rest.split_at(n);
            on.write_all(now).unwrap();
            (rest, wakes) = (later, wakes + 1);
            while !frames.ready()
                && wait(far.socket(), PollFlags::IN, Some(Duration::from_millis(50))).is_ok()
            {
                match frames.fill(&mut NoWait(&far)) {
                    Ok(_) => {}
                    Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
                }
            }
        }
        assert_eq!(frames.next().unwrap().unwrap().body, body(frame));
        assert!(wakes <= 2 + 2 * (frame / 16_384), "{wakes} wakes for {frame} bytes");
    }
}
