//! How a connection between agents begins: Hello, HelloOk, and from then on seals where there is no TLS.
//!
//! The keys of the seals hang on all of Hello and HelloOk, and on the group's secret. HelloOk is the first frame that is
//! sealed: if one of the two was changed on its way, the caller finds its seal wrong. A call that is declined is answered
//! before there are keys: whoever can change what passes can make an agent decline, as he can cut the connection.

use super::conn::{FrameBuf, NetError, peer_name, send, tune};
use super::connection::{Connection, End, Security};
use crate::core::seal::SEAL_LEN;
use crate::core::wire::frame::{Header, Kind, WireError};
use crate::core::wire::messages::{Hello, HelloOk, Purpose, Word};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// What a caller says first, and the secret that seals what follows.
#[derive(Clone)]
pub struct Greeting {
    hello: Hello,
    secret: [u8; 32],
}

impl std::fmt::Debug for Greeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Greeting({:?}, {:?})", self.hello.group, self.hello.purpose)
    }
}

impl Greeting {
    /// Of a group with this secret.
    #[must_use]
    pub fn new(group: &str, secret: [u8; 32], purpose: Purpose) -> Self {
        Self { hello: Hello::new(group, &secret, purpose), secret }
    }
}

/// Connects within `timeout` and says hello. The answer is read by [`wait_hello_ok`], or later.
///
/// `announce` is told the connection's ends, this host's first, before the first packet leaves where that can be known,
/// else as soon as the connection stands; what it returns comes back with the connection.
pub fn dial<T>(
    addr: SocketAddr,
    greeting: &Greeting,
    timeout: Duration,
    security: &Security,
    mut announce: impl FnMut(Option<(SocketAddr, SocketAddr)>) -> T,
) -> Result<(Connection, T), NetError> {
    let fail = |source| NetError::Connect { addr, source };
    let (stream, announced) = match announced(addr, timeout, &mut announce).map_err(fail)? {
        Some(connected) => connected,
        None => {
            let stream = TcpStream::connect_timeout(&addr, timeout).map_err(fail)?;
            let ends = stream.local_addr().ok().zip(stream.peer_addr().ok());
            (stream, announce(ends))
        }
    };
    tune(&stream, timeout).map_err(fail)?;
    let stream = security.call(stream, addr, timeout).map_err(fail)?;
    let hello = greeting.hello.encode(&rand::random());
    send(&stream, Kind::Hello, &hello, &[]).map_err(fail)?;
    if greeting.hello.purpose.is_sealed() {
        stream.said_hello(greeting.secret, hello, End::Caller);
    }
    Ok((stream, announced))
}

/// Connects from an address and port that are known beforehand; none if this host's address towards `addr` is not to
/// be had (routes that look at more than addresses), and then nothing has left.
fn announced<T>(
    addr: SocketAddr,
    timeout: Duration,
    announce: &mut impl FnMut(Option<(SocketAddr, SocketAddr)>) -> T,
) -> io::Result<Option<(TcpStream, T)>> {
    use socket2::{Domain, Socket, Type};
    let bound = || -> io::Result<(Socket, SocketAddr)> {
        // Connecting a datagram socket sends nothing; it asks the routes.
        let probe = Socket::new(Domain::for_address(addr), Type::DGRAM, None)?;
        probe.connect(&addr.into())?;
        let mut from = probe.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
        from.set_port(0);
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        socket.bind(&from.into())?;
        let local = socket.local_addr()?.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
        Ok((socket, local))
    };
    let Ok((socket, local)) = bound() else { return Ok(None) };
    let announced = announce(Some((local, addr)));
    match socket.connect_timeout(&addr.into(), timeout) {
        Ok(()) => Ok(Some((socket.into(), announced))),
        // What the kernel refuses to send from there it may send from elsewhere.
        Err(e) if matches!(e.kind(), ErrorKind::AddrNotAvailable | ErrorKind::AddrInUse) => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENETUNREACH | libc::EHOSTUNREACH)) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Answers a hello; what follows is sealed, unless the connection is secured otherwise ([`Connection::said_hello`]).
pub fn send_hello_ok(stream: &Connection, ok: HelloOk) -> io::Result<()> {
    let meta = ok.encode(&rand::random());
    stream.seal_with(&meta);
    send(stream, Kind::HelloOk, &meta, &[])
}

/// Waits for `HelloOk` at most `timeout`; a peer that declines says why in an `Aborted` word. The buffer may hold what the
/// peer said right behind its answer.
pub fn wait_hello_ok(stream: &Connection, timeout: Duration) -> Result<(HelloOk, FrameBuf), NetError> {
    let wire = |source| NetError::Wire { peer: peer_name(stream), source };
    let mut frames = FrameBuf::new();
    let frame = frames.wait(stream, timeout)?;
    match frame.kind {
        Kind::HelloOk => {}
        Kind::Word => {
            return Err(match Word::decode(frame.meta) {
                Ok(Word::Aborted(why)) => NetError::Declined { peer: peer_name(stream), why },
                Ok(_) => wire(WireError::Unexpected(Kind::Word)),
                Err(source) => wire(source),
            });
        }
        kind => return Err(wire(WireError::Unexpected(kind))),
    }
    let meta = frame.meta.to_vec();
    if let Some(mut opener) = stream.seal_with(&meta) {
        let seal = frames.wait_bytes::<SEAL_LEN>(stream, timeout)?;
        let header = Header::new(Kind::HelloOk, meta.len(), 0).encode();
        let broken = |_| wire(WireError::Seal { kind: Kind::HelloOk, number: 0 });
        opener.open(&header, &meta, &[], &seal).map_err(broken)?;
        frames.go_on(opener);
    }
    Ok((HelloOk::decode(&meta).map_err(wire)?, frames))
}

#[cfg(test)]
mod tests;
