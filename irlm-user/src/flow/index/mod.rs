//! The rack index on a socket: a server that keeps several groups' indices, and the client that agents and
//! coordinator use. Losing it costs bandwidth, never correctness, so every wait here ends: each one has a deadline,
//! and looks up from its socket every `TICK` to see whether it should still go on.

use crate::core::wire::index_msg::{Decoder, IndexMsg, IndexMsgError, MAX_BODY};
use crate::net::connection::Connection;
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read as _, Write as _};
use std::time::{Duration, Instant};

// The side of agents and coordinator.
pub mod client;
// The side that keeps the indices.
pub mod server;

/// How often a blocked read or write looks up.
const TICK: Duration = Duration::from_millis(100);

/// Bytes read at once.
const CHUNK: usize = 64 * 1024;
/// Bytes read at once of somebody who has not said yet who it is.
const FIRST_CHUNK: usize = 1024;

/// Why a message did not get through.
#[derive(Debug, thiserror::Error)]
enum ConnError {
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer hung up.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer's bytes are no message, or ours do not fit their caps.
    #[error(transparent)]
    Wire(#[from] IndexMsgError),
    /// The wait was ended from this side.
    #[error("gave up waiting")]
    GaveUp,
}

/// Messages over one TCP connection.
#[derive(Debug)]
struct Conn {
    stream: Connection,
    decoder: Decoder,
    chunk: Vec<u8>,
    /// Since when the message being read is on its way.
    partial: Option<Instant>,
}

impl Conn {
    fn new(stream: Connection, cap: usize) -> io::Result<Self> {
        // Small messages both ways: waiting for more bytes would only add delay.
        stream.socket().set_nodelay(true)?;
        stream.socket().set_read_timeout(Some(TICK))?;
        stream.socket().set_write_timeout(Some(TICK))?;
        let chunk = if cap < MAX_BODY { FIRST_CHUNK } else { CHUNK };
        Ok(Self { stream, decoder: Decoder::new(cap), chunk: vec![0; chunk], partial: None })
    }

    /// From now on takes messages of any length that there may be.
    fn let_in(&mut self) {
        self.decoder.set_cap(MAX_BODY);
        self.chunk.resize(CHUNK, 0);
    }

    /// The next message. `go_on` is asked whenever the message is not whole yet, with the time since its first
    /// bytes came, if any did.
    fn recv(&mut self, go_on: &mut dyn FnMut(Option<Duration>) -> bool) -> Result<IndexMsg, ConnError> {
        loop {
            if let Some(msg) = self.decoder.next_msg()? {
                self.partial = None;
                return Ok(msg);
            }
            if !self.decoder.is_partial() {
                self.partial = None;
            } else if self.partial.is_none() {
                self.partial = Some(Instant::now());
            }
            if !go_on(self.partial.map(|t| t.elapsed())) {
                return Err(ConnError::GaveUp);
            }
            match (&self.stream).read(&mut self.chunk) {
                Ok(0) => return Err(ConnError::Closed),
                Ok(n) => self.decoder.feed(&self.chunk[..n]),
                Err(e) if is_tick(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends a message whole.
    fn send(&mut self, msg: &IndexMsg, go_on: &dyn Fn() -> bool) -> Result<(), ConnError> {
        send_on(&self.stream, msg, go_on)
    }

    /// Has the kernel find out within about ten seconds that the peer's host is gone.
    fn notice_death(&self) -> io::Result<()> {
        let probe =
            TcpKeepalive::new().with_time(Duration::from_secs(4)).with_interval(Duration::from_secs(2));
        SockRef::from(self.stream.socket()).set_tcp_keepalive(&probe.with_retries(3))
    }

    /// Whether the peer has hung up; does not wait.
    fn peer_is_gone(&self) -> bool {
        self.stream.is_hung_up()
    }
}

/// Sends a message whole; `go_on` is asked before each write.
fn send_on(mut stream: &Connection, msg: &IndexMsg, go_on: &dyn Fn() -> bool) -> Result<(), ConnError> {
    let mut bytes = Vec::new();
    msg.encode(&mut bytes)?;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        if !go_on() {
            return Err(ConnError::GaveUp);
        }
        match stream.write(rest) {
            Ok(0) => return Err(ConnError::Closed),
            Ok(n) => rest = &rest[n..],
            Err(e) if is_tick(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
    loop {
        match stream.flush() {
            Err(e) if is_tick(&e) => {}
            done => return Ok(done?),
        }
        if !go_on() {
            return Err(ConnError::GaveUp);
        }
    }
}

fn is_tick(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
