//! What whoever calls the data port says first. Until it is known who that is, its bytes are not kept.

use crate::core::wire::frame::{HEADER_LEN, Header, Kind, WireError};
use crate::core::wire::limits::MAX_HELLO;
use crate::core::wire::messages::Hello;
use crate::net::conn::{NetError, peer_name};
use crate::net::connection::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::ErrorKind;
use std::time::Instant;

/// The hello that a caller begins with, until `deadline`. Nothing more than that is read: whoever says something else first
/// is a stranger, whose bytes are not kept. What follows the hello is left on the connection. With it comes how it was said,
/// on which keys hang.
pub fn hear_hello(stream: &Connection, deadline: Instant) -> Result<(Hello, Vec<u8>), NetError> {
    let wrong = |source| NetError::Wire { peer: peer_name(stream), source };
    let mut head = [0; HEADER_LEN];
    read_until(stream, &mut head, deadline)?;
    let header = Header::decode(&head).map_err(wrong)?;
    if header.kind != Kind::Hello {
        return Err(wrong(WireError::Unexpected(header.kind)));
    }
    let mut meta = [0; MAX_HELLO];
    let len = u64::from(header.meta_len);
    let cap = MAX_HELLO as u64;
    let meta = usize::try_from(len).ok().and_then(|len| meta.get_mut(..len)).ok_or(WireError::TooLong {
        kind: Kind::Hello,
        what: "meta length",
        len,
        cap,
    });
    let meta = meta.map_err(wrong)?;
    read_until(stream, meta, deadline)?;
    Ok((Hello::decode(meta).map_err(wrong)?, meta.to_vec()))
}

/// Fills `buf`, and reads nothing beyond.
fn read_until(stream: &Connection, buf: &mut [u8], deadline: Instant) -> Result<(), NetError> {
    let begun = Instant::now();
    let lost = |source| NetError::Lost { peer: peer_name(stream), source };
    let mut filled = 0;
    while filled < buf.len() {
        match stream.read_now(&mut buf[filled..]) {
            Ok(0) if filled > 0 => {
                return Err(NetError::Wire {
                    peer: peer_name(stream),
                    source: WireError::Short(Kind::Hello),
                });
            }
            Ok(0) => return Err(NetError::Closed { peer: peer_name(stream) }),
            Ok(n) => filled += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let ms = deadline.saturating_duration_since(begun).as_millis() as u64;
                    return Err(NetError::Silent { peer: peer_name(stream), ms });
                }
                let left =
                    Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
                match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(lost(e.into())),
                }
            }
            Err(e) => return Err(lost(e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::units::{HostIx, VmIx};
    use crate::core::wire::limits::MAX_BODY;
    use crate::core::wire::messages::Purpose;
    use crate::net::conn::{FrameBuf, send};
    use crate::net::connection::pair;
    use std::io::Write as _;
    use std::time::Duration;

    #[test]
    fn a_hello_is_read_and_nothing_beyond_it_and_nothing_else() {
        let soon = || Instant::now() + Duration::from_secs(5);
        let hello = Hello::new("g", &[1; 32], Purpose::Vm { source: HostIx(1), vm: VmIx(2) });
        let (a, b) = pair();
        let said = hello.encode(&[9; 16]);
        send(&a, Kind::Hello, &said, &[]).unwrap();
        send(&a, Kind::Lacks, &[1, 0], &[]).unwrap();
        assert_eq!(hear_hello(&b, soon()).unwrap(), (hello, said));
        assert_eq!(FrameBuf::new().wait(&b, Duration::from_secs(5)).unwrap().kind, Kind::Lacks);

        let wrong = |header: Header| {
            let (a, b) = pair();
            (&a).write_all(&header.encode()).unwrap();
            hear_hello(&b, soon()).unwrap_err()
        };
        let e = wrong(Header::new(Kind::Pages, 0, MAX_BODY));
        assert!(matches!(e, NetError::Wire { source: WireError::Unexpected(Kind::Pages), .. }), "{e}");
        let e = wrong(Header::new(Kind::Hello, MAX_HELLO + 1, 0));
        assert!(matches!(e, NetError::Wire { source: WireError::TooLong { .. }, .. }), "{e}");

        // One that says a byte now and then is no further than one that says nothing.
        let (a, b) = pair();
        let begun = Instant::now();
        let drip = std::thread::spawn(move || {
            for byte in Header::new(Kind::Hello, MAX_HELLO, 0).encode().iter().chain(&[0; 1000]) {
                if (&a).write_all(&[*byte]).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let e = hear_hello(&b, begun + Duration::from_millis(200)).unwrap_err();
        assert!(matches!(e, NetError::Silent { .. }), "{e}");
        assert!(begun.elapsed() < Duration::from_secs(2));
        drop(b);
        drip.join().unwrap();
    }
}
