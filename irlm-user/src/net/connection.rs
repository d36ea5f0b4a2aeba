//! One TCP connection, in plain text or under TLS: what frames and messages are sent over, so that nobody above knows
//! the difference.
//!
//! Under TLS (1.3, RFC 8446) one lock guards the session. It is held while records are made, opened, or in a socket call that
//! does not wait, and never while anybody waits: one thread may read while another one writes.
//!
//! Bounds: 128 KiB (`CIPHER`) that came and are not opened yet, as much that is opened and not read, and 64 KiB (`AHEAD`)
//! that are sealed and have not left.

use super::tls::{Credentials, why_io};
use crate::core::seal::{Opener, Sealer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use seals::Seals;
use session::{Session, is_later};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

// Frames in plain text that cannot be changed unseen.
mod seals;
// A TLS session over buffers of ours.
mod session;

pub use seals::End;

/// Bytes of content that are sealed before what is sealed has left.
const AHEAD: usize = 64 << 10;

/// A connection. Its clones are the same connection, which ends when the last of them is dropped.
#[derive(Clone, Debug)]
pub struct Connection(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Whoever counts strangers can end it, too (`net::gate`).
    tcp: Arc<TcpStream>,
    tls: Option<Tls>,
    /// In plain text.
    seals: Seals,
}

/// A TLS session.
#[derive(Debug)]
struct Tls {
    session: Mutex<Session>,
    /// Who writes has this for as long as that takes, as the kernel's own lock of a socket would be had.
    outgoing: Mutex<()>,
    /// The last read ended for want of room: there may be more, of which the socket says nothing.
    more: AtomicBool,
    /// The peer's certificate, its own first.
    peer: Vec<CertificateDer<'static>>,
}

/// Where a process finds the keys for its connections now: they are replaced while it runs.
pub trait Keys: Send + Sync + std::fmt::Debug {
    /// To call others.
    fn client(&self) -> io::Result<Arc<ClientConfig>>;
    /// To be called.
    fn server(&self) -> io::Result<Arc<ServerConfig>>;
}

impl Keys for Credentials {
    fn client(&self) -> io::Result<Arc<ClientConfig>> {
        Self::client(self).map_err(io::Error::other)
    }

    fn server(&self) -> io::Result<Arc<ServerConfig>> {
        Self::server(self).map_err(io::Error::other)
    }
}

/// Where somebody listens, and how a connection to them is secured.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The address.
    pub addr: SocketAddr,
    /// How.
    pub security: Security,
}

impl From<SocketAddr> for Endpoint {
    /// In plain text.
    fn from(addr: SocketAddr) -> Self {
        Self { addr, security: Security::Plain }
    }
}

/// What the certificate of whoever is called at `addr` must name.
#[must_use]
pub fn name_of(addr: SocketAddr) -> ServerName<'static> {
    ServerName::from(addr.ip().to_canonical())
}

/// A TLS error as an operator reads it.
#[must_use]
pub fn in_words(e: io::Error) -> io::Error {
    match why_io(&e) {
        Some(why) => io::Error::new(e.kind(), why),
        None => e,
    }
}

/// How a process secures its connections.
#[derive(Clone, Debug, Default)]
pub enum Security {
    /// Not at all.
    #[default]
    Plain,
    /// TLS, with certificates on both sides.
    Tls(Arc<dyn Keys>),
}

impl Security {
    /// Makes a connection that this process has opened to `addr` ready for use, within `timeout`.
    pub fn call(&self, tcp: TcpStream, addr: SocketAddr, timeout: Duration) -> io::Result<Connection> {
        match self {
            Self::Plain => Ok(tcp.into()),
            Self::Tls(keys) => {
                Connection::client(tcp, keys.client()?, name_of(addr), Instant::now() + timeout)
                    .map_err(in_words)
            }
        }
    }

    /// Makes a connection that came ready for use, within `timeout`.
    pub fn answer(&self, tcp: impl Into<Arc<TcpStream>>, timeout: Duration) -> io::Result<Connection> {
        let tcp = tcp.into();
        match self {
            Self::Plain => Ok(tcp.into()),
            Self::Tls(keys) => {
                Connection::server(tcp, keys.server()?, Instant::now() + timeout).map_err(in_words)
            }
        }
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<TcpStream> for Connection {
    /// In plain text.
    fn from(tcp: TcpStream) -> Self {
        Arc::new(tcp).into()
    }
}

impl From<Arc<TcpStream>> for Connection {
    /// In plain text.
    fn from(tcp: Arc<TcpStream>) -> Self {
        Self(Arc::new(Inner { tcp, tls: None, seals: Seals::default() }))
    }
}

impl Connection {
    /// Shakes hands with a server that must be `name`, until `deadline`.
    pub fn client(
        tcp: impl Into<Arc<TcpStream>>,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        deadline: Instant,
    ) -> io::Result<Self> {
        Self::shake_hands(tcp.into(), Session::client(config, name)?, deadline)
    }

    /// Shakes hands with a client, until `deadline`.
    pub fn server(
        tcp: impl Into<Arc<TcpStream>>,
        config: Arc<ServerConfig>,
        deadline: Instant,
    ) -> io::Result<Self> {
        Self::shake_hands(tcp.into(), Session::server(config)?, deadline)
    }

    fn shake_hands(tcp: Arc<TcpStream>, mut session: Session, deadline: Instant) -> io::Result<Self> {
        loop {
            if let Err(e) = session.go_on() {
                // The peer is told why, if it can be.
                session.say_over(&tcp);
                return Err(io::Error::new(ErrorKind::InvalidData, e));
            }
            while !session.push(&tcp)? {
                wait(&tcp, PollFlags::OUT, left(deadline)?)?;
            }
            if !session.is_handshaking() {
                break;
            }
            wait(&tcp, PollFlags::IN, left(deadline)?)?;
            match session.fill(&tcp) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(e) if !is_later(&e) => return Err(e),
                _ => {}
            }
        }
        let peer = session.peer_certificates().to_vec();
        let tls =
            Tls { session: Mutex::new(session), more: AtomicBool::new(true), outgoing: Mutex::new(()), peer };
        Ok(Self(Arc::new(Inner { tcp, tls: Some(tls), seals: Seals::default() })))
    }

    /// The socket, for its addresses and options. Nothing may be read from it or written to it.
    #[must_use]
    pub fn socket(&self) -> &TcpStream {
        &self.0.tcp
    }

    /// Whether the connection is under TLS.
    #[must_use]
    pub fn is_secured(&self) -> bool {
        self.0.tls.is_some()
    }

    /// The peer's certificates, its own first; none in plain text.
    #[must_use]
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        self.0.tls.as_ref().map_or(&[], |t| &t.peer)
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.0.tcp.peer_addr()
    }

    /// This end's address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.tcp.local_addr()
    }

    /// Whether a read may give something of which the socket says nothing any more: ask before waiting for the socket.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.0.tls.as_ref().is_some_and(|t| t.more.load(Ordering::Acquire))
    }

    /// Bytes that surely are still to come on the socket before `lacks` bytes can be read. Under TLS that is at least the rest
    /// of a record, which cannot be opened before.
    #[must_use]
    pub fn still_to_come(&self, lacks: usize) -> usize {
        self.0.tls.as_ref().map_or(lacks, |tls| lock(&tls.session).still_to_come(lacks))
    }

    /// Hello was said, or heard: once HelloOk is, frames are sealed by keys that hang on both and on the group's secret. Not
    /// under TLS, which sees to that.
    pub fn said_hello(&self, secret: [u8; 32], hello: Vec<u8>, end: End) {
        if !self.is_secured() {
            self.0.seals.said_hello(secret, hello, end);
        }
    }

    /// HelloOk has these bytes: it and what follows is sealed, in both directions. What opens the other end's frames, if
    /// they are sealed.
    pub(super) fn seal_with(&self, ok: &[u8]) -> Option<Opener> {
        self.0.seals.make(ok)
    }

    /// Whether frames are sealed.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.0.seals.are_made()
    }

    /// Who seals what leaves, if it is sealed. Whoever has it sends, so that frames leave in the order of their numbers.
    pub(super) fn sealer(&self) -> Option<MutexGuard<'_, Sealer>> {
        self.0.seals.sealer()
    }

    /// What opens the frames that come from the first one on, if they are sealed.
    pub(super) fn opener(&self) -> Option<Opener> {
        self.0.seals.opener()
    }

    /// Ends the connection, or a half of it, for all clones. The peer is told that this is no cut.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if let (Some(tls), Shutdown::Write | Shutdown::Both) = (&self.0.tls, how) {
            lock(&tls.session).say_over(&self.0.tcp);
        }
        self.0.tcp.shutdown(how)
    }

    /// Reads what is here; waits for it as long as the socket's read timeout says, or not at all.
    fn receive(&self, buf: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        match &self.0.tls {
            None => Ok(recv(&self.0.tcp, buf, flags)?.0),
            Some(tls) => tls.read(&self.0.tcp, buf, flags),
        }
    }

    /// As [`Read::read`], but never waits.
    pub fn read_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf, RecvFlags::DONTWAIT)
    }

    /// Whether the peer has hung up, as far as the socket knows without waiting.
    pub fn is_hung_up(&self) -> bool {
        if self.is_secured() {
            // The word that nothing more comes may still be unread, so its bytes say nothing.
            let mut socket = [PollFd::new(&self.0.tcp, PollFlags::RDHUP)];
            return match poll(&mut socket, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Ok(n) => n > 0,
                Err(e) => e != Errno::INTR,
            };
        }
        let mut byte = [0];
        match recv(&self.0.tcp, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, n)) => n == 0,
            Err(e) => !matches!(e, Errno::AGAIN | Errno::INTR),
        }
    }
}

impl Tls {
    fn read(&self, tcp: &TcpStream, buf: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            {
                let mut session = lock(&self.session);
                loop {
                    let n = session.read(buf)?;
                    if n > 0 || session.is_over() || buf.is_empty() {
                        self.more.store(n == buf.len() || session.has_more(), Ordering::Release);
                        return Ok(n);
                    }
                    self.more.store(false, Ordering::Release);
                    match session.fill(tcp) {
                        // Its end was not said.
                        Ok(0) => {
                            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the connection was cut"));
                        }
                        Ok(_) => {}
                        Err(e) if !is_later(&e) || flags.contains(RecvFlags::DONTWAIT) => return Err(e),
                        Err(_) => break,
                    }
                }
            }
            wait(tcp, PollFlags::IN, tcp.read_timeout()?)?;
        }
    }

    /// Hands what is sealed to the kernel, and waits for room at most the socket's write timeout.
    fn push(&self, tcp: &TcpStream) -> io::Result<()> {
        while !lock(&self.session).push(tcp)? {
            wait(tcp, PollFlags::OUT, tcp.write_timeout()?)?;
        }
        Ok(())
    }

    fn write(&self, tcp: &TcpStream, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let _mine = lock(&self.outgoing);
        // What could not leave before comes first.
        self.push(tcp)?;
        let n = lock(&self.session).seal(bufs, AHEAD)?;
        match self.push(tcp) {
            // These bytes are taken; what is left of them leaves with the next write or flush.
            Err(e) if !is_later(&e) => Err(e),
            _ => Ok(n),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(tls) = &self.tls {
            lock(&tls.session).say_over(&self.tcp);
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.tcp.as_fd()
    }
}

impl Read for &Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf, RecvFlags::empty())
    }
}

impl Write for &Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.0.tls {
            None => (&*self.0.tcp).write_vectored(bufs),
            Some(tls) => tls.write(&self.0.tcp, bufs),
        }
    }

    /// Under TLS, hands what has been taken to the kernel; `WouldBlock` if it takes nothing for the write timeout.
    fn flush(&mut self) -> io::Result<()> {
        match &self.0.tls {
            None => Ok(()),
            Some(tls) => {
                let _mine = lock(&tls.outgoing);
                tls.push(&self.0.tcp)
            }
        }
    }
}

fn left(deadline: Instant) -> io::Result<Option<Duration>> {
    let left = deadline.saturating_duration_since(Instant::now());
    let late = || io::Error::new(ErrorKind::TimedOut, "the peer does not finish its TLS handshake");
    if left.is_zero() { Err(late()) } else { Ok(Some(left)) }
}

/// Waits for the socket; `WouldBlock` if `most` passes.
fn wait(tcp: &TcpStream, flags: PollFlags, most: Option<Duration>) -> io::Result<()> {
    let most = most.map(|d| Timespec { tv_sec: d.as_secs().cast_signed(), tv_nsec: d.subsec_nanos().into() });
    match poll(&mut [PollFd::new(tcp, flags)], most.as_ref()) {
        Ok(0) => Err(ErrorKind::WouldBlock.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Both ends of a connection over loopback, in plain text.
#[cfg(test)]
pub(crate) fn pair() -> (Connection, Connection) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near.into(), listener.accept().unwrap().0.into())
}

#[cfg(test)]
pub(crate) mod tests;
