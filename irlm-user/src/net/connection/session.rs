//! One TLS session over buffers of ours: records are opened where the socket has put them, and sealed to where they leave
//! from. The library's own buffers take 4 KiB at a time, which costs more than the cipher does.

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, Error, ServerConfig};
use std::fmt;
use std::io::{self, ErrorKind, IoSlice};
use std::net::TcpStream;
use std::sync::Arc;

/// Sealed bytes that came and are not opened yet.
const CIPHER: usize = 128 << 10;
/// Bytes of content in one record (RFC 8446 §5.1).
const CONTENT: usize = 16 << 10;
/// The longest record, with what seals it (RFC 8446 §5.2).
const RECORD: usize = CONTENT + 256 + 5;
/// Before each record; its last two bytes are the length of what follows.
const HEADER: usize = 5;
/// The least that a record has beside its content: header, type and tag.
const LEAST: usize = HEADER + 1 + 16;
/// Room for what a record has beside its content, and for a word of the session's own.
const AROUND: usize = 256;

/// One end of a session.
enum End {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// A session with all that is under way in it.
pub(super) struct Session {
    end: End,
    came: Came,
    opened: Opened,
    sealed: Sealed,
    /// Pieces of content that are shorter than a record.
    pieces: Vec<u8>,
    /// The peer has said that nothing more comes.
    over: bool,
    /// What came behind what was opened last cannot be believed.
    broken: Option<Error>,
}

/// What came and is not opened yet. The session remembers places in it, so it is always shown all of it.
struct Came {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What was opened and is not read yet: the rest of a record, or what was opened on the way to sealing something.
#[derive(Default)]
struct Opened {
    buf: Vec<u8>,
    read: usize,
}

/// What is sealed and has not left yet: `left..end`.
#[derive(Default)]
struct Sealed {
    buf: Vec<u8>,
    left: usize,
    end: usize,
}

/// What is done with a session that has nothing else to do.
enum Wish<'a> {
    /// Nothing.
    Look,
    /// This content is sealed.
    Seal(&'a [u8]),
    /// The peer is told that nothing more comes.
    SayOver,
}

/// Where opened content goes: first to who reads, as far as there is room.
struct Sink<'a> {
    buf: &'a mut [u8],
    filled: usize,
    rest: &'a mut Opened,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let here = self.came.end - self.came.start;
        f.debug_struct("Session").field("came", &here).field("over", &self.over).finish_non_exhaustive()
    }
}

impl Session {
    /// Of whoever calls a server that must be `name`.
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Self> {
        let client = UnbufferedClientConnection::new(config, name);
        client.map(|c| Self::of(End::Client(c))).map_err(io::Error::other)
    }

    /// Of whoever is called.
    pub(super) fn server(config: Arc<ServerConfig>) -> io::Result<Self> {
        let server = UnbufferedServerConnection::new(config);
        server.map(|c| Self::of(End::Server(c))).map_err(io::Error::other)
    }

    fn of(end: End) -> Self {
        Self {
            end,
            came: Came { buf: vec![0; CIPHER].into(), start: 0, end: 0 },
            opened: Opened::default(),
            sealed: Sealed::default(),
            pieces: Vec::new(),
            over: false,
            broken: None,
        }
    }

    /// Whether the peers do not know each other yet.
    pub(super) fn is_handshaking(&self) -> bool {
        match &self.end {
            End::Client(c) => c.is_handshaking(),
            End::Server(c) => c.is_handshaking(),
        }
    }

    /// The peer's certificates, its own first.
    pub(super) fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        let all = match &self.end {
            End::Client(c) => c.peer_certificates(),
            End::Server(c) => c.peer_certificates(),
        };
        all.unwrap_or_default()
    }

    /// Whether the peer has said that nothing more comes.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// Whether a read gives something, or an error, without a look at the socket.
    pub(super) fn has_more(&self) -> bool {
        self.opened.read < self.opened.buf.len() || self.broken.is_some()
    }

    /// Bytes that surely come on the socket before `lacks` more bytes of content can be read. All that came whole was opened.
    pub(super) fn still_to_come(&self, lacks: usize) -> usize {
        let part = &self.came.buf[self.came.start..self.came.end];
        let length =
            part.get(HEADER - 2..HEADER).map_or(0, |l| usize::from(u16::from_be_bytes([l[0], l[1]])));
        (lacks + LEAST).max(HEADER + length).saturating_sub(part.len())
    }

    /// Goes on with a handshake by what came.
    pub(super) fn go_on(&mut self) -> Result<(), Error> {
        self.run(&mut [], &Wish::Look).1
    }

    /// Gives what is here, as far as `buf` has room. What came whole before something that cannot be believed is given
    /// first.
    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.opened.take(buf);
        if n == buf.len() {
            return Ok(n);
        }
        let n = n + self.run(&mut buf[n..], &Wish::Look).0;
        match self.broken.as_ref().filter(|_| n == 0) {
            Some(e) => Err(io::Error::new(ErrorKind::InvalidData, e.clone())),
            None => Ok(n),
        }
    }

    /// Takes what the socket has, without waiting. 0: somebody has cut the connection.
    pub(super) fn fill(&mut self, tcp: &TcpStream) -> io::Result<usize> {
        let came = &mut self.came;
        if came.buf.len() - came.end < RECORD {
            came.buf.copy_within(came.start..came.end, 0);
            (came.start, came.end) = (0, came.end - came.start);
        }
        let n = recv(tcp, &mut came.buf[came.end..], RecvFlags::DONTWAIT)?.0;
        came.end += n;
        Ok(n)
    }

    /// Seals as much of this as `most` bytes are. Returns how much that was.
    pub(super) fn seal(&mut self, bufs: &[IoSlice<'_>], most: usize) -> io::Result<usize> {
        let mut taken = 0;
        let mut pieces = std::mem::take(&mut self.pieces);
        for buf in bufs {
            let mut rest = &buf[..buf.len().min(most - taken)];
            taken += rest.len();
            if pieces.is_empty() && rest.len() >= CONTENT {
                let (whole, tail) = rest.split_at(rest.len() / CONTENT * CONTENT);
                self.wish(&Wish::Seal(whole))?;
                rest = tail;
            }
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(CONTENT - pieces.len()));
                pieces.extend_from_slice(now);
                rest = later;
                if pieces.len() == CONTENT {
                    self.wish(&Wish::Seal(&pieces))?;
                    pieces.clear();
                }
            }
        }
        if !pieces.is_empty() {
            self.wish(&Wish::Seal(&pieces))?;
            pieces.clear();
        }
        self.pieces = pieces;
        Ok(taken)
    }

    /// Hands what is sealed to the socket, without waiting. False: the socket takes no more now.
    pub(super) fn push(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        let sealed = &mut self.sealed;
        while sealed.left < sealed.end {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let rest = IoSlice::new(&sealed.buf[sealed.left..sealed.end]);
            match sendmsg(tcp, &[rest], &mut SendAncillaryBuffer::default(), flags).map_err(io::Error::from) {
                Ok(n) => sealed.left += n,
                Err(e) if is_later(&e) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        (sealed.left, sealed.end) = (0, 0);
        Ok(true)
    }

    /// Says that nothing more comes, if that can be said without waiting. After an error the peer is told that error instead.
    pub(super) fn say_over(&mut self, tcp: &TcpStream) {
        let _ = self.wish(&Wish::SayOver);
        let _ = self.push(tcp);
    }

    fn wish(&mut self, wish: &Wish<'_>) -> io::Result<()> {
        self.run(&mut [], wish).1.map_err(|e| io::Error::new(ErrorKind::BrokenPipe, e))
    }

    fn run(&mut self, buf: &mut [u8], wish: &Wish<'_>) -> (usize, Result<(), Error>) {
        if let Some(e) = &self.broken {
            return (0, Err(e.clone()));
        }
        let mut sink = Sink { buf, filled: 0, rest: &mut self.opened };
        let end = loop {
            let came = &mut self.came.buf[self.came.start..self.came.end];
            let (sealed, over) = (&mut self.sealed, &mut self.over);
            let (done, more) = match &mut self.end {
                End::Client(c) => step(c.process_tls_records(came), &mut sink, wish, sealed, over),
                End::Server(c) => step(c.process_tls_records(came), &mut sink, wish, sealed, over),
            };
            self.came.start += done;
            match more {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => {
                    self.broken = Some(e.clone());
                    break Err(e);
                }
            }
        };
        if end.is_err() {
            self.end.last_word(&mut self.sealed);
        }
        if self.came.start == self.came.end {
            (self.came.start, self.came.end) = (0, 0);
        }
        (sink.filled, end)
    }
}

/// Whether the socket does not take or give anything now.
pub(super) fn is_later(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

impl End {
    /// After an error: what the peer is told of it. What came is not looked at again.
    fn last_word(&mut self, sealed: &mut Sealed) {
        let mut sink = Sink { buf: &mut [], filled: 0, rest: &mut Opened::default() };
        match self {
            Self::Client(c) if c.wants_write() => {
                let _ = step(c.process_tls_records(&mut []), &mut sink, &Wish::Look, sealed, &mut false);
            }
            Self::Server(c) if c.wants_write() => {
                let _ = step(c.process_tls_records(&mut []), &mut sink, &Wish::Look, sealed, &mut false);
            }
            _ => {}
        }
    }
}

impl Opened {
    fn take(&mut self, buf: &mut [u8]) -> usize {
        let rest = &self.buf[self.read..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.read += n;
        if self.read == self.buf.len() {
            self.buf.clear();
            self.read = 0;
        }
        n
    }
}

impl Sink<'_> {
    /// Whether there is room for more.
    fn put(&mut self, content: &[u8]) -> bool {
        let (now, later) = content.split_at(content.len().min(self.buf.len() - self.filled));
        self.buf[self.filled..][..now.len()].copy_from_slice(now);
        self.filled += now.len();
        self.rest.buf.extend_from_slice(later);
        self.filled < self.buf.len()
    }
}

impl Sealed {
    /// Has `with` write behind what is there, into as much room as it takes. False: it cannot.
    fn put(
        &mut self,
        mut room: usize,
        mut with: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
    ) -> bool {
        loop {
            // Only what was never used is filled with zeros.
            self.buf.resize(self.buf.len().max(self.end + room), 0);
            match with(&mut self.buf[self.end..]) {
                Ok(n) => {
                    self.end += n;
                    return true;
                }
                Err(Some(required)) if required > room => room = required,
                Err(_) => return false,
            }
        }
    }
}

/// One step of a session: the bytes that came and are done with, and whether there may be another step.
fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    sink: &mut Sink<'_>,
    wish: &Wish<'_>,
    sealed: &mut Sealed,
    over: &mut bool,
) -> (usize, Result<bool, Error>) {
    let mut done = status.discard;
    let more = match status.state {
        Err(e) => Err(e),
        Ok(ConnectionState::ReadTraffic(mut records)) => {
            let mut wanted = true;
            while let Some(record) = records.next_record() {
                match record {
                    Ok(record) => {
                        done += record.discard;
                        wanted = sink.put(record.payload);
                    }
                    Err(e) => return (done, Err(e)),
                }
            }
            // Who seals something has to open all that came before.
            Ok(wanted || !matches!(wish, Wish::Look))
        }
        Ok(ConnectionState::EncodeTlsData(mut word)) => {
            sealed.put(AROUND, |room| match word.encode(room) {
                Ok(n) => Ok(n),
                Err(EncodeError::InsufficientSize(size)) => Err(Some(size.required_size)),
                Err(EncodeError::AlreadyEncoded) => Err(None),
            });
            Ok(true)
        }
        // It stands before whatever is sealed next, and leaves with it.
        Ok(ConnectionState::TransmitTlsData(word)) => {
            word.done();
            Ok(true)
        }
        Ok(ConnectionState::PeerClosed) => {
            *over = true;
            Ok(true)
        }
        Ok(ConnectionState::WriteTraffic(mut session)) => {
            let encrypted = |r| match r {
                Ok(n) => Ok(n),
                Err(EncryptError::InsufficientSize(size)) => Err(Some(size.required_size)),
                Err(EncryptError::EncryptExhausted) => Err(None),
            };
            let good = match wish {
                Wish::Look => true,
                Wish::Seal(content) => {
                    let room = content.len() + (content.len() / CONTENT + 1) * AROUND;
                    sealed.put(room, |room| encrypted(session.encrypt(content, room)))
                }
                Wish::SayOver => sealed.put(AROUND, |room| encrypted(session.queue_close_notify(room))),
            };
            if good { Ok(false) } else { Err(Error::EncryptError) }
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(false),
        Ok(_) => match wish {
            Wish::Look | Wish::SayOver => Ok(false),
            Wish::Seal(_) => Err(Error::General("the connection has ended".to_owned())),
        },
    };
    (done, more)
}
