//! Frames over TCP: connecting with a deadline, sending a frame from where its parts lie, and reading frames from a
//! fixed buffer without copying their bodies.
//!
//! Bounds: [`FrameBuf`] never holds more than [`BUF_LEN`]; nothing is queued on the sending side but what the kernel's
//! socket buffer takes, so back-pressure goes straight to whoever produces the pages.

use crate::core::wire::frame::{HEADER_LEN, Header, Kind, WireError};
use crate::core::wire::limits::{MAX_BODY, MAX_META};
use crate::core::wire::messages::{Hello, HelloOk};
use crate::net::connection::{Connection, Security};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// One whole frame and half of the next, so that few bytes are moved when the buffer is compacted.
pub const BUF_LEN: usize = (HEADER_LEN + MAX_META + MAX_BODY) * 3 / 2;

/// What can go wrong on a connection between agents.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No connection.
    #[error("{addr}: cannot connect: {source}")]
    Connect {
        /// The peer.
        addr: SocketAddr,
        /// From the kernel.
        source: io::Error,
    },
    /// The connection broke.
    #[error("{peer}: connection lost: {source}")]
    Lost {
        /// The peer.
        peer: String,
        /// From the kernel.
        source: io::Error,
    },
    /// The peer closed it.
    #[error("{peer}: closed the connection")]
    Closed {
        /// The peer.
        peer: String,
    },
    /// The peer sent something else than the protocol allows.
    #[error("{peer}: {source}")]
    Wire {
        /// The peer.
        peer: String,
        /// What is wrong.
        source: WireError,
    },
    /// Nothing came in time.
    #[error("{peer}: nothing heard for {ms} ms")]
    Silent {
        /// The peer.
        peer: String,
        /// How long.
        ms: u64,
    },
    /// The peer declined, in its own words.
    #[error("{peer}: {why}")]
    Declined {
        /// The peer.
        peer: String,
        /// Its words.
        why: String,
    },
}

/// The peer's address for messages.
#[must_use]
pub fn peer_name(stream: &Connection) -> String {
    stream.peer_addr().map_or_else(|_| "peer".to_owned(), |a| a.to_string())
}

/// Connects within `timeout` and says hello. The answer is read by [`wait_hello_ok`], or later.
///
/// `announce` is told the connection's ends, this host's first, before the first packet leaves where that can be known,
/// else as soon as the connection stands; what it returns comes back with the connection.
pub fn dial<T>(
    addr: SocketAddr,
    hello: &Hello,
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
    send(&stream, Kind::Hello, &hello.encode(), &[]).map_err(fail)?;
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

/// Socket options all data connections share. `silence` bounds how long unacknowledged bytes may stay so (TCP user
/// timeout, RFC 5482) and how long one write may block before the caller is asked whether to go on.
pub fn tune(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let sock = socket2::SockRef::from(stream);
    sock.set_tcp_user_timeout(Some(silence))?;
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    Ok(())
}

/// Makes a connection fit for a process that knows nothing of it: its calls block, and a peer that is silent for `silence`
/// ends them with an error, also while nothing is under way.
pub fn hand_over(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    stream.set_write_timeout(None)?;
    stream.set_read_timeout(None)?;
    let sock = socket2::SockRef::from(stream);
    sock.set_tcp_user_timeout(Some(silence))?;
    let third = (silence / 3).max(Duration::from_secs(1));
    sock.set_tcp_keepalive(
        &socket2::TcpKeepalive::new().with_time(third).with_interval(third).with_retries(2),
    )?;
    Ok(())
}

/// Answers a hello.
pub fn send_hello_ok(stream: &Connection, ok: HelloOk) -> io::Result<()> {
    send(stream, Kind::HelloOk, &ok.encode(), &[])
}

/// Waits for `HelloOk` at most `timeout`; a peer that declines says why in an `Aborted` word. The buffer may hold what the
/// peer said right behind its answer.
pub fn wait_hello_ok(stream: &Connection, timeout: Duration) -> Result<(HelloOk, FrameBuf), NetError> {
    use crate::core::wire::messages::Word;
    let peer = peer_name(stream);
    let mut frames = FrameBuf::new();
    let frame = frames.wait(stream, timeout)?;
    match frame.kind {
        Kind::HelloOk => match HelloOk::decode(frame.meta) {
            Ok(ok) => Ok((ok, frames)),
            Err(source) => Err(NetError::Wire { peer, source }),
        },
        Kind::Word => match Word::decode(frame.meta) {
            Ok(Word::Aborted(why)) => Err(NetError::Declined { peer, why }),
            Ok(_) => Err(NetError::Wire { peer, source: WireError::Unexpected(Kind::Word) }),
            Err(source) => Err(NetError::Wire { peer, source }),
        },
        kind => Err(NetError::Wire { peer, source: WireError::Unexpected(kind) }),
    }
}

/// Sends one frame; blocks until the kernel has taken all of it. Writes that make no progress for the socket's write
/// timeout end in an error.
pub fn send(stream: &Connection, kind: Kind, meta: &[u8], body: &[IoSlice<'_>]) -> io::Result<()> {
    send_while(stream, kind, meta, body, || false)
}

/// As [`send`], but each time the write timeout passes without progress `go_on` decides whether to keep trying.
pub fn send_while(
    stream: &Connection,
    kind: Kind,
    meta: &[u8],
    body: &[IoSlice<'_>],
    go_on: impl FnMut() -> bool,
) -> io::Result<()> {
    let body_len = body.iter().map(|b| b.len()).sum();
    send_frame_while(stream, Header::new(kind, meta.len(), body_len), meta, body, go_on)
}

/// As [`send_while`], with a header that says how the body is coded.
pub fn send_frame_while(
    stream: &Connection,
    header: Header,
    meta: &[u8],
    body: &[IoSlice<'_>],
    go_on: impl FnMut() -> bool,
) -> io::Result<()> {
    let header = header.encode();
    let mut iov = Vec::with_capacity(2 + body.len());
    iov.push(IoSlice::new(&header));
    iov.push(IoSlice::new(meta));
    iov.extend_from_slice(body);
    write_all_vectored(&mut &*stream, &mut iov, go_on)
}

/// Writes all slices, at most IOV_MAX (1024) a call.
pub fn write_all_vectored(
    to: &mut impl Write,
    mut iov: &mut [IoSlice<'_>],
    mut go_on: impl FnMut() -> bool,
) -> io::Result<()> {
    IoSlice::advance_slices(&mut iov, 0);
    while !iov.is_empty() {
        let n = iov.len().min(1024);
        match to.write_vectored(&iov[..n]) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut iov, n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if !go_on() {
                    return Err(io::Error::new(ErrorKind::TimedOut, "the peer takes no bytes"));
                }
            }
            Err(e) => return Err(e),
        }
    }
    flush_all(to, go_on)
}

/// Has all that was written handed on (what a TLS session has taken may not have left).
pub fn flush_all(to: &mut impl Write, mut go_on: impl FnMut() -> bool) -> io::Result<()> {
    loop {
        match to.flush() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if !go_on() {
                    return Err(io::Error::new(ErrorKind::TimedOut, "the peer takes no bytes"));
                }
            }
            done => return done,
        }
    }
}

/// Reads what is here, and never waits. A read that waits must not be mixed with a low-water mark for receiving: what it has
/// taken counts no more towards the mark, and it waits for as much again.
#[derive(Debug)]
pub struct NoWait<'a>(pub &'a Connection);

impl Read for NoWait<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_now(buf)
    }
}

/// A frame in the buffer.
#[derive(Debug)]
pub struct Frame<'a> {
    /// What it is.
    pub kind: Kind,
    /// How its body is coded.
    pub codec: u8,
    /// Its meta part.
    pub meta: &'a [u8],
    /// Its body.
    pub body: &'a [u8],
}

/// A fixed buffer that frames are read through.
#[derive(Debug)]
pub struct FrameBuf {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for FrameBuf {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameBuf {
    /// An empty buffer. Its pages are only touched as far as frames are long.
    #[must_use]
    pub fn new() -> Self {
        Self { buf: vec![0; BUF_LEN], start: 0, end: 0 }
    }

    /// Reads once; 0 means that the peer closed. A buffer that is full (of frames not taken yet) reads nothing and says
    /// `WouldBlock`.
    pub fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buf.len() - self.start < HEADER_LEN + MAX_META + MAX_BODY {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.buf.len() {
            // Reading into nothing would give 0, which means something else.
            return Err(ErrorKind::WouldBlock.into());
        }
        let n = from.read(&mut self.buf[self.end..])?;
        self.end += n;
        Ok(n)
    }

    fn header(&self) -> Result<Option<Header>, WireError> {
        self.buf[self.start..self.end].first_chunk().map(Header::decode).transpose()
    }

    /// The next whole frame, if the buffer holds one.
    #[expect(
        clippy::should_implement_trait,
        reason = "the frame borrows the buffer, which Iterator cannot say"
    )]
    pub fn next(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let Some(h) = self.header()? else { return Ok(None) };
        let at = self.start + HEADER_LEN;
        if self.end - self.start < HEADER_LEN + h.payload_len() {
            return Ok(None);
        }
        self.start = at + h.payload_len();
        let (meta, body) = self.buf[at..self.start].split_at(h.meta_len as usize);
        Ok(Some(Frame { kind: h.kind, codec: h.codec, meta, body }))
    }

    /// Whether a whole frame is in the buffer (or bytes that are no frame).
    #[must_use]
    pub fn ready(&self) -> bool {
        match self.header() {
            Ok(None) => false,
            Ok(Some(h)) => self.end - self.start >= HEADER_LEN + h.payload_len(),
            Err(_) => true,
        }
    }

    /// Bytes that are to come before [`Self::ready`]: to the end of the next frame, or of its header.
    #[must_use]
    pub fn lacks(&self) -> usize {
        let whole = self.header().ok().flatten().map_or(0, |h| h.payload_len());
        (HEADER_LEN + whole).saturating_sub(self.end - self.start)
    }

    /// Blocks until a frame is here, at most `timeout`.
    pub fn wait(&mut self, stream: &Connection, timeout: Duration) -> Result<Frame<'_>, NetError> {
        self.wait_asking(stream, timeout, |_| {})
    }

    /// As [`Self::wait`]; `lacks` is told before each read how many bytes the frame lacks, and may have the kernel wake this
    /// reader only when they are here.
    pub fn wait_asking(
        &mut self,
        stream: &Connection,
        timeout: Duration,
        mut lacks: impl FnMut(usize),
    ) -> Result<Frame<'_>, NetError> {
        let until = Instant::now() + timeout;
        let lost = |source| NetError::Lost { peer: peer_name(stream), source };
        while !self.ready() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NetError::Silent { peer: peer_name(stream), ms: timeout.as_millis() as u64 });
            }
            lacks(self.lacks());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            if !stream.is_pending() {
                match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(lost(e.into())),
                }
            }
            match self.fill(&mut NoWait(stream)) {
                Ok(0) => return Err(NetError::Closed { peer: peer_name(stream) }),
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) => return Err(lost(e)),
            }
        }
        match self.next() {
            Ok(Some(f)) => Ok(f),
            Ok(None) => Err(NetError::Closed { peer: peer_name(stream) }),
            Err(source) => Err(NetError::Wire { peer: peer_name(stream), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::units::{HostIx, VmIx};
    use crate::core::wire::messages::Purpose;
    use std::net::TcpListener;

    fn pair() -> (Connection, Connection) {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(l.local_addr().unwrap()).unwrap();
        (a.into(), l.accept().unwrap().0.into())
    }

    #[test]
    fn frames_of_all_sizes_pass_through_the_fixed_buffer() {
        let (a, b) = pair();
        let sizes = [0usize, 1, 4096, MAX_BODY, 7, MAX_BODY, MAX_BODY, 100_000];
        let sender = std::thread::spawn(move || {
            for (i, n) in sizes.iter().enumerate() {
                let body = vec![i as u8; *n];
                let meta = vec![i as u8; *n % 50];
                let (x, y) = body.split_at(n / 3);
                send(&a, Kind::Pages, &meta, &[IoSlice::new(x), IoSlice::new(y)]).unwrap();
            }
        });
        let mut buf = FrameBuf::new();
        for (i, n) in sizes.iter().enumerate() {
            let payload = n + n % 50;
            let lacks = |l| assert!((1..=HEADER_LEN.max(payload)).contains(&l), "{l} of {payload} lacking");
            let f = buf.wait_asking(&b, Duration::from_secs(10), lacks).unwrap();
            assert_eq!((f.kind, f.meta.len(), f.body.len()), (Kind::Pages, n % 50, *n));
            assert!(f.body.iter().chain(f.meta).all(|x| *x == i as u8));
        }
        sender.join().unwrap();
        assert!(matches!(buf.wait(&b, Duration::from_secs(1)), Err(NetError::Closed { .. })));
    }

    #[test]
    fn a_buffer_full_of_frames_not_taken_is_not_a_closed_connection() {
        let frame = [&Header::new(Kind::Pages, 0, 4096).encode()[..], &[7; 4096]].concat();
        let bytes = frame.repeat(BUF_LEN / frame.len() + 10);
        let (mut rest, mut buf) = (&bytes[..], FrameBuf::new());
        let (mut taken, mut refused) = (0, 0);
        while !rest.is_empty() || buf.ready() {
            // Reads twice as often as it takes.
            for _ in 0..2 {
                match buf.fill(&mut rest) {
                    Ok(0) => assert!(rest.is_empty()),
                    Ok(_) => {}
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::WouldBlock);
                        refused += 1;
                    }
                }
            }
            if let Some(f) = buf.next().unwrap() {
                assert_eq!(f.body, [7; 4096]);
                taken += 1;
            }
        }
        assert_eq!(taken, bytes.len() / frame.len());
        assert!(refused > 0, "the buffer was never full");
    }

    #[test]
    fn a_silent_peer_a_refusing_peer_and_garbage_are_told_apart() {
        let (a, b) = pair();
        assert!(matches!(wait_hello_ok(&b, Duration::from_millis(20)), Err(NetError::Silent { .. })));
        let word = crate::core::wire::messages::Word::Aborted("no such VM".into());
        send(&a, Kind::Word, &word.encode(), &[]).unwrap();
        let e = wait_hello_ok(&b, Duration::from_secs(1)).unwrap_err();
        assert!(e.to_string().ends_with("no such VM"), "{e}");
        // What comes right behind the answer is not lost with it.
        let ok = HelloOk { version: crate::core::wire::messages::VERSIONS[0], window_log: 0, slots: 0 };
        let mut both = Vec::new();
        for (kind, meta) in [(Kind::HelloOk, ok.encode()), (Kind::Lacks, vec![1, 0])] {
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
        let h = Hello::new("g", [1; 32], Purpose::Vm { source: HostIx(1), vm: VmIx(2) });
        assert_eq!(Hello::decode(&h.encode()), Ok(h));
    }

    #[test]
    fn the_ends_of_a_connection_are_announced_before_it_stands() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let addr = listener.local_addr().unwrap();
            let h = Hello::new("g", [1; 32], Purpose::Vm { source: HostIx(1), vm: VmIx(2) });
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

    #[test]
    fn a_peer_that_takes_no_bytes_ends_the_write_when_told_so() {
        let (a, _b) = pair();
        tune(a.socket(), Duration::from_secs(30)).unwrap();
        a.socket().set_write_timeout(Some(Duration::from_millis(10))).unwrap();
        let body = vec![0; MAX_BODY];
        let mut asked = 0;
        let e = loop {
            let r = send_while(&a, Kind::Pages, &[], &[IoSlice::new(&body)], || {
                asked += 1;
                asked < 3
            });
            if let Err(e) = r {
                break e;
            }
        };
        assert_eq!((e.kind(), asked), (ErrorKind::TimedOut, 3));
    }
}
