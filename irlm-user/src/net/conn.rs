//! Frames over TCP: sending a frame from where its parts lie, and reading frames from a fixed buffer without copying their
//! bodies. On a connection in plain text each is sealed (`core::seal`), and one that is not what was sent ends it.
//!
//! Bounds: [`FrameBuf`] never holds more than [`BUF_LEN`]; nothing is queued on the sending side but what the kernel's
//! socket buffer takes, so back-pressure goes straight to whoever produces the pages.

use crate::core::seal::{Broken, Opener, SEAL_LEN};
use crate::core::wire::frame::{HEADER_LEN, Header, Kind, WireError};
use crate::core::wire::limits::{MAX_BODY, MAX_META};
use crate::net::connection::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// One whole frame and half of the next, so that few bytes are moved when the buffer is compacted.
pub const BUF_LEN: usize = MAX_FRAME * 3 / 2;
/// The longest frame, with its seal.
const MAX_FRAME: usize = HEADER_LEN + MAX_META + MAX_BODY + SEAL_LEN;

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

/// Whether the peer has ended the connection, as opposed to being slow. What it said before can still be read.
#[must_use]
pub fn is_closed(e: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
}

/// The peer's address for messages.
#[must_use]
pub fn peer_name(stream: &Connection) -> String {
    stream.peer_addr().map_or_else(|_| "peer".to_owned(), |a| a.to_string())
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
    let mut iov = Vec::with_capacity(3 + body.len());
    iov.push(IoSlice::new(&header));
    iov.push(IoSlice::new(meta));
    iov.extend_from_slice(body);
    let Some(mut sealer) = stream.sealer() else { return write_all_vectored(&mut &*stream, &mut iov, go_on) };
    let seal = sealer.seal(&header, meta, body.iter().map(|b| &**b));
    iov.push(IoSlice::new(&seal));
    // Frames are numbered in the order in which they leave, so that one leaves after the other.
    write_all_vectored(&mut &*stream, &mut iov, go_on)
}

/// Bytes of a frame on this connection.
#[must_use]
pub fn frame_len(stream: &Connection, meta: usize, body: usize) -> usize {
    HEADER_LEN + meta + body + if stream.is_sealed() { SEAL_LEN } else { 0 }
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
    /// Of a sealed connection.
    opener: Option<Opener>,
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
        Self { buf: vec![0; BUF_LEN], start: 0, end: 0, opener: None }
    }

    /// For what comes on this connection from now on.
    #[must_use]
    pub fn on(stream: &Connection) -> Self {
        let mut frames = Self::new();
        frames.follow(stream);
        frames
    }

    /// What is read from now on is sealed, if the connection is. Once it is, all that comes on it is.
    pub fn follow(&mut self, stream: &Connection) {
        if self.opener.is_none() {
            self.opener = stream.opener();
        }
    }

    /// What is read from now on is sealed so.
    pub(super) fn go_on(&mut self, opener: Opener) {
        self.opener = Some(opener);
    }

    /// Bytes behind each frame.
    fn behind(&self) -> usize {
        if self.opener.is_some() { SEAL_LEN } else { 0 }
    }

    /// Reads once; 0 means that the peer closed. A buffer that is full (of frames not taken yet) reads nothing and says
    /// `WouldBlock`.
    pub fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buf.len() - self.start < MAX_FRAME {
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
        if self.end - self.start < HEADER_LEN + h.payload_len() + self.behind() {
            return Ok(None);
        }
        let end = at + h.payload_len();
        let (meta, body) = self.buf[at..end].split_at(h.meta_len as usize);
        if let Some(opener) = &mut self.opener {
            let (header, seal) = (self.buf[self.start..].first_chunk(), self.buf[end..].first_chunk());
            if let (Some(header), Some(seal)) = (header, seal) {
                let broken = |b: Broken| WireError::Seal { kind: h.kind, number: b.number };
                opener.open(header, meta, body, seal).map_err(broken)?;
            }
        }
        self.start = end + if self.opener.is_some() { SEAL_LEN } else { 0 };
        Ok(Some(Frame { kind: h.kind, codec: h.codec, meta, body }))
    }

    /// Whether a whole frame is in the buffer (or bytes that are no frame).
    #[must_use]
    pub fn ready(&self) -> bool {
        match self.header() {
            Ok(None) => false,
            Ok(Some(h)) => self.end - self.start >= HEADER_LEN + h.payload_len() + self.behind(),
            Err(_) => true,
        }
    }

    /// Bytes that are to come before [`Self::ready`]: to the end of the next frame, or of its header.
    #[must_use]
    pub fn lacks(&self) -> usize {
        let whole = self.header().ok().flatten().map_or(0, |h| h.payload_len() + self.behind());
        (HEADER_LEN + whole).saturating_sub(self.end - self.start)
    }

    /// Blocks until `n` bytes more are here that are no frame, at most `timeout`, and takes them.
    pub(super) fn wait_bytes<const N: usize>(
        &mut self,
        stream: &Connection,
        timeout: Duration,
    ) -> Result<[u8; N], NetError> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(bytes) = self.buf[self.start..self.end].first_chunk() {
                self.start += N;
                return Ok(*bytes);
            }
            self.read_until(stream, until, timeout)?;
        }
    }

    /// Waits for more, and reads it.
    fn read_until(&mut self, stream: &Connection, until: Instant, timeout: Duration) -> Result<(), NetError> {
        let lost = |source| NetError::Lost { peer: peer_name(stream), source };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NetError::Silent { peer: peer_name(stream), ms: timeout.as_millis() as u64 });
        }
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        if !stream.is_pending() {
            match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(lost(e.into())),
            }
        }
        match self.fill(&mut NoWait(stream)) {
            Ok(0) => Err(NetError::Closed { peer: peer_name(stream) }),
            Ok(_) => Ok(()),
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => Ok(()),
            Err(e) => Err(lost(e)),
        }
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
        self.follow(stream);
        let until = Instant::now() + timeout;
        while !self.ready() {
            if until > Instant::now() {
                lacks(self.lacks());
            }
            self.read_until(stream, until, timeout)?;
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
