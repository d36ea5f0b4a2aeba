//! A connection's end for a process that knows nothing of TLS: the socket itself in plain text, else one end of a pair
//! whose other end two threads of this process keep in step with the connection.
//!
//! Bounds: 256 KiB (`CHUNK`) each way, and what the sockets' buffers hold.

use super::conn::{flush_all, hand_over};
use super::connection::Connection;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes that are passed on at once.
const CHUNK: usize = 256 << 10;

/// The end that `who` (for the threads' names) is given. A peer that is silent for `silence` ends it with an error.
pub fn end_for(who: &str, conn: Connection, silence: Duration) -> io::Result<OwnedFd> {
    hand_over(conn.socket(), silence)?;
    if !conn.is_secured() {
        return conn.as_fd().try_clone_to_owned();
    }
    let (own, its) = UnixStream::pair()?;
    let spawn = |way: &str, run: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new().name(format!("irlm-{way}-{who}")).spawn(run).map(drop)
    };
    let (from, to) = (own.try_clone()?, conn.clone());
    spawn("out", Box::new(move || outwards(&from, &to, silence)))?;
    spawn("in", Box::new(move || inwards(&conn, &own)))?;
    Ok(its.into())
}

/// What the process writes, until it closes its end.
fn outwards(mut from: &UnixStream, to: &Connection, silence: Duration) {
    let mut chunk = vec![0; CHUNK];
    // A write that makes no progress comes back to be asked, so that a dead peer does not hold the thread.
    let _ = to.socket().set_write_timeout(Some(Duration::from_millis(500)));
    let passed = loop {
        match from.read(&mut chunk) {
            Ok(0) => break to.shutdown(Shutdown::Write),
            Ok(n) => {
                if let Err(e) = pass_on(to, &chunk[..n], silence) {
                    break Err(e);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Err(e),
        }
    };
    if let Err(e) = passed {
        tracing::info!("a relayed connection ended: {e}");
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}

fn pass_on(mut to: &Connection, mut bytes: &[u8], silence: Duration) -> io::Result<()> {
    let mut progress = Instant::now();
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(n) => {
                bytes = &bytes[n..];
                progress = Instant::now();
            }
            Err(e) if is_later(&e) && progress.elapsed() < silence => {}
            Err(e) => return Err(e),
        }
    }
    flush_all(&mut to, || progress.elapsed() < silence)
}

/// What comes for the process, until the peer says that nothing more does.
fn inwards(mut from: &Connection, mut to: &UnixStream) {
    let mut chunk = vec![0; CHUNK];
    let passed = loop {
        match from.read(&mut chunk) {
            Ok(0) => break to.shutdown(Shutdown::Write),
            Ok(n) => {
                if let Err(e) = to.write_all(&chunk[..n]) {
                    break Err(e);
                }
            }
            Err(e) if is_later(&e) => {}
            Err(e) => break Err(e),
        }
    };
    if let Err(e) = passed {
        tracing::info!("a relayed connection ended: {e}");
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

fn is_later(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
