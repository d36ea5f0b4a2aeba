//! How connections begin, over loopback; and what comes of it if anything of that is changed on its way.

use super::*;
use crate::core::units::{HostIx, VmIx};
use crate::core::wire::messages::NONCE_LEN;
use std::io::Write as _;
use std::net::TcpListener;

fn pair() -> (Connection, Connection) {
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(l.local_addr().unwrap()).unwrap();
    (a.into(), l.accept().unwrap().0.into())
}

#[test]
fn a_silent_peer_a_refusing_peer_and_garbage_are_told_apart() {
    let (a, b) = pair();
    assert!(matches!(wait_hello_ok(&b, Duration::from_millis(20)), Err(NetError::Silent { .. })));
    let word = Word::Aborted("no such VM".into());
    send(&a, Kind::Word, &word.encode(), &[]).unwrap();
    let e = wait_hello_ok(&b, Duration::from_secs(1)).unwrap_err();
    assert!(e.to_string().ends_with("no such VM"), "{e}");
    // What comes right behind the answer is not lost with it.
    let ok = HelloOk { version: crate::core::wire::messages::VERSIONS[0], window_log: 0, slots: 0 };
    let mut both = Vec::new();
    for (kind, meta) in [(Kind::HelloOk, ok.encode(&[7; NONCE_LEN])), (Kind::Lacks, vec![1, 0])] {
        both.extend(Header::new(kind, meta.len(), 0).encode());
        both.extend(meta);
    }
    (&a).write_all(&both).unwrap();
    let (got, mut buf) = wait_hello_ok(&b, Duration::from_secs(1)).unwrap();
    assert_eq!(got, ok);
    assert_eq!(buf.wait(&b, Duration::from_secs(1)).unwrap().kind, Kind::Lacks);
    (&a).write_all(&[99; 20]).unwrap();
    let e = buf.wait(&b, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(e, NetError::Wire { source: WireError::UnknownKind(99), .. }), "{e}");
}

#[test]
fn the_ends_of_a_connection_are_announced_before_it_stands() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else { continue };
        let addr = listener.local_addr().unwrap();
        let h = Greeting::new("g", [1; 32], Purpose::Vm { source: HostIx(1), vm: VmIx(2) });
        listener.set_nonblocking(true).unwrap();
        let mut told = Vec::new();
        let announce = |ends: Option<(SocketAddr, SocketAddr)>| {
            assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
            told.extend(ends);
        };
        let (stream, ()) = dial(addr, &h, Duration::from_secs(5), &Security::Plain, announce).unwrap();
        assert_eq!(told, [(stream.local_addr().unwrap(), addr)]);
        let closed = TcpListener::bind(address).unwrap().local_addr().unwrap();
        let mut told = 0;
        let e = dial(closed, &h, Duration::from_secs(5), &Security::Plain, |_| told += 1).unwrap_err();
        assert!(matches!(e, NetError::Connect { .. }), "{e}");
        assert_eq!(told, 1);
    }
}

/// What passes from one end to the other, and which of its bits is flipped on the way: byte, bit.
fn pass(mut from: &TcpStream, mut to: &TcpStream, flip: Option<(usize, u8)>) {
    use std::io::Read as _;
    let (mut chunk, mut passed) = ([0; 4096], 0);
    while let Ok(n @ 1..) = from.read(&mut chunk) {
        if let Some((at, bit)) = flip.filter(|(at, _)| (passed..passed + n).contains(at)) {
            chunk[at - passed] ^= 1 << bit;
        }
        passed += n;
        if to.write_all(&chunk[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

const SECRET: [u8; 32] = [1; 32];
const SHORT: Duration = Duration::from_millis(100);

/// A caller and a taker with somebody between them who flips a bit of what the caller (the taker) says; then each says one
/// frame. Whether the taker (the caller) has believed it.
fn through(
    caller_flip: Option<(usize, u8)>,
    taker_flip: Option<(usize, u8)>,
    secret: [u8; 32],
) -> (bool, bool) {
    let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (door, middle) = (listen(), listen());
    let (to, addr) = (door.local_addr().unwrap(), middle.local_addr().unwrap());
    std::thread::scope(|s| {
        s.spawn(|| {
            let (near, far) = (middle.accept().unwrap().0, TcpStream::connect(to).unwrap());
            std::thread::scope(|s| {
                s.spawn(|| pass(&near, &far, caller_flip));
                pass(&far, &near, taker_flip);
            });
        });
        let taker = s.spawn(|| {
            let conn = Connection::from(door.accept().unwrap().0);
            let mut frames = FrameBuf::new();
            let Ok(frame) = frames.wait(&conn, SHORT) else { return false };
            let said = frame.meta.to_vec();
            let Ok(hello) = Hello::decode(&said) else { return false };
            if hello.pass != crate::core::wire::keys::pass(&SECRET) || hello.choose().is_err() {
                return false;
            }
            conn.said_hello(SECRET, said, End::Taker);
            let ok = HelloOk { version: 3, window_log: 0, slots: 5 };
            if send_hello_ok(&conn, ok).is_err() || send(&conn, Kind::Word, b"from the taker", &[]).is_err() {
                return false;
            }
            let believed = frames.wait(&conn, SHORT).is_ok_and(|f| f.meta == b"from the caller");
            let _ = conn.shutdown(std::net::Shutdown::Both);
            believed
        });
        let greeting = Greeting::new("g", secret, Purpose::Vm { source: HostIx(1), vm: VmIx(2) });
        let (conn, ()) = dial(addr, &greeting, SHORT, &Security::Plain, |_| ()).unwrap();
        let believed = wait_hello_ok(&conn, SHORT).is_ok_and(|(_, mut frames)| {
            assert!(conn.is_sealed());
            let _ = send(&conn, Kind::Word, b"from the caller", &[]);
            frames.wait(&conn, SHORT).is_ok_and(|f| f.meta == b"from the taker")
        });
        let _ = conn.shutdown(std::net::Shutdown::Both);
        (taker.join().unwrap(), believed)
    })
}

#[test]
fn nothing_is_believed_on_a_connection_of_which_a_bit_was_flipped() {
    assert_eq!(through(None, None, SECRET), (true, true), "the counterpart");
    assert_eq!(through(None, None, [2; 32]), (false, false), "another group's secret");
    let hello = 12
        + Hello::new("g", &SECRET, Purpose::Vm { source: HostIx(1), vm: VmIx(2) })
            .encode(&[0; NONCE_LEN])
            .len();
    let ok = 12 + HelloOk { version: 3, window_log: 0, slots: 5 }.encode(&[0; NONCE_LEN]).len() + SEAL_LEN;
    let bit = |at: usize| (at, (at % 8) as u8);
    for at in 0..hello {
        assert_eq!(through(Some(bit(at)), None, SECRET), (false, false), "byte {at} of Hello");
    }
    for at in 0..ok {
        assert_eq!(through(None, Some(bit(at)), SECRET), (false, false), "byte {at} of HelloOk");
    }
    let frame = 12 + 15 + SEAL_LEN;
    for at in (0..frame).step_by(3) {
        let believed = through(Some(bit(hello + at)), None, SECRET);
        assert_eq!(believed, (false, true), "byte {at} of the caller's first frame");
    }
    for at in (0..frame - 1).step_by(3) {
        let (_, believed) = through(None, Some(bit(ok + at)), SECRET);
        assert!(!believed, "byte {at} of the taker's first frame");
    }
}

#[test]
fn two_qemus_and_a_measurement_are_left_alone() {
    for (purpose, sealed) in [
        (Purpose::Stream { source: HostIx(1), vm: VmIx(2) }, false),
        (Purpose::Probe { source: HostIx(1) }, false),
        (Purpose::Vm { source: HostIx(1), vm: VmIx(2) }, true),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let greeting = Greeting::new("g", SECRET, purpose);
        let (near, ()) = dial(addr, &greeting, SHORT, &Security::Plain, |_| ()).unwrap();
        let far = Connection::from(listener.accept().unwrap().0);
        let hello = FrameBuf::new().wait(&far, SHORT).unwrap().meta.to_vec();
        if purpose.is_sealed() {
            far.said_hello(SECRET, hello, End::Taker);
        }
        send_hello_ok(&far, HelloOk { version: 3, window_log: 0, slots: 0 }).unwrap();
        wait_hello_ok(&near, SHORT).unwrap();
        assert_eq!((near.is_sealed(), far.is_sealed()), (sealed, sealed));
    }
}
