//! Lines with descriptors on a UNIX socket, both sides: a line is capped and has a deadline, descriptors come with the
//! line they were sent with, and what nobody expected is closed.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Longest line, in bytes: `memory` of 128 slots has 16 KiB.
pub const MAX_LINE: usize = 256 << 10;
/// Most descriptors on one line.
pub const MAX_FDS: usize = super::words::MAX_SLOTS;

/// A line, and what rode on it.
pub type Line = (Vec<u8>, Vec<OwnedFd>);

/// A connection that carries lines and descriptors.
#[derive(Debug)]
pub struct FdLines {
    stream: UnixStream,
    /// Read and not yet taken; at most [`MAX_LINE`] plus one read.
    buf: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl FdLines {
    /// Over a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buf: Vec::new(), fds: Vec::new() }
    }

    /// The stream below.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The next line without its newline; `None` when the peer has closed between lines. An error of kind `TimedOut` means
    /// that `until` has passed; a later call goes on where this one stopped.
    pub fn read(&mut self, until: Option<Instant>) -> io::Result<Option<Line>> {
        let mut scanned = 0;
        loop {
            if let Some(at) = self.buf[scanned..].iter().position(|b| *b == b'\n') {
                let rest = self.buf.split_off(scanned + at + 1);
                let mut line = std::mem::replace(&mut self.buf, rest);
                line.pop();
                return Ok(Some((line, std::mem::take(&mut self.fds))));
            }
            scanned = self.buf.len();
            if scanned > MAX_LINE {
                return Err(invalid(format!("a line of more than {MAX_LINE} bytes")));
            }
            // Zero would mean "for ever".
            let left =
                until.map(|u| u.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
            self.stream.set_read_timeout(left)?;
            match self.receive() {
                Ok(0) if scanned == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "closed within a line")),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if until.is_some_and(|u| Instant::now() >= u) {
                        return Err(ErrorKind::TimedOut.into());
                    }
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
            return Err(invalid(format!("more than {MAX_FDS} descriptors on a line")));
        }
        self.buf.extend_from_slice(&chunk[..got.bytes]);
        Ok(got.bytes)
    }

    /// Sends one line (without newline) and what rides on it, in order.
    pub fn write(&mut self, mut line: String, fds: &[BorrowedFd<'_>], until: Instant) -> io::Result<()> {
        line.push('\n');
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_write_timeout(Some(left))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(invalid(format!("{} descriptors do not fit a line", fds.len())));
        }
        let bytes = line.as_bytes();
        let sent = loop {
            match sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => break n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        // The descriptors went with the first byte.
        self.stream.write_all(&bytes[sent..])
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _};
    use std::os::fd::AsFd as _;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn descriptors_come_with_their_line() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut a, mut b) = (FdLines::new(a), FdLines::new(b));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        file.rewind().unwrap();
        a.write("one".into(), &[file.as_fd(), file.as_fd()], soon()).unwrap();
        let (line, fds) = b.read(Some(soon())).unwrap().unwrap();
        assert_eq!((line.as_slice(), fds.len()), (b"one".as_slice(), 2));
        let mut text = String::new();
        std::fs::File::from(fds.into_iter().next().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        a.write("two".into(), &[], soon()).unwrap();
        let (line, fds) = b.read(Some(soon())).unwrap().unwrap();
        assert_eq!((line.as_slice(), fds.len()), (b"two".as_slice(), 0));
    }

    #[test]
    fn silence_an_endless_line_and_a_close_are_told_apart() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = FdLines::new(b);
        let e = b.read(Some(Instant::now() + Duration::from_millis(20))).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TimedOut);
        let sender = std::thread::spawn(move || {
            let mut a = a;
            // The receiver gives up in the middle.
            let _ = a.write_all(&vec![b'x'; MAX_LINE + (64 << 10)]);
        });
        assert_eq!(b.read(Some(soon())).unwrap_err().kind(), ErrorKind::InvalidData);
        drop(b);
        sender.join().unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut b = FdLines::new(b);
        a.write_all(b"half").unwrap();
        drop(a);
        assert_eq!(b.read(Some(soon())).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert!(FdLines::new(b).read(Some(soon())).unwrap().is_none());
    }
}
