//! Lines of JSON on a socket, both sides: capped, because a peer's line is the only thing on a control connection
//! that could grow, and with a deadline on each, because nobody waits for ever.

use super::api::MAX_LINE;
use crate::net::connection::in_words;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a line that anybody may send; of longer ones a server reads only so many at a time.
pub(super) const MAX_SMALL: usize = 64 << 10;
/// What a TLS connection begins with: a handshake record (RFC 8446, 5.1). No line of JSON does.
const TLS: u8 = 22;
/// Bytes read at once, at least and at most.
const READ: (usize, usize) = (1 << 10, 64 << 10);

/// A connection that carries lines.
#[derive(Debug)]
pub struct Lines<S> {
    stream: S,
    /// Read and not yet taken; at most [`MAX_LINE`] plus one read.
    buf: Vec<u8>,
    /// Who reads a line of more than [`MAX_SMALL`] bytes has one of these meanwhile; none: no matter.
    big: Option<Vec<Arc<Semaphore>>>,
    most: usize,
}

/// A line without its newline. A long one has its place among long ones until it is dropped.
#[derive(Debug)]
pub struct Line {
    /// The bytes.
    pub text: Vec<u8>,
    _room: Vec<OwnedSemaphorePermit>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Lines<S> {
    /// Over a connected stream.
    pub fn new(stream: S) -> Self {
        Self { stream, buf: Vec::new(), big: None, most: MAX_LINE }
    }

    /// Over a stream whose other end may be anybody's: of long lines, one is read while it has a permit of each of `big`.
    pub fn served(stream: S, big: Vec<Arc<Semaphore>>) -> Self {
        Self { big: Some(big), ..Self::new(stream) }
    }

    /// Takes no long line at all.
    pub fn keep_small(&mut self) {
        self.most = MAX_SMALL;
    }

    /// Waits until a line has begun; false when the peer has closed instead.
    pub async fn begin(&mut self, timeout: Duration) -> io::Result<bool> {
        if !self.buf.is_empty() {
            return Ok(true);
        }
        let read = tokio::time::timeout(timeout, self.read_some()).await;
        Ok(read.map_err(|_| silent(timeout))?? > 0)
    }

    /// 0: the peer has closed. Under TLS it may not have said so first; whether a line was cut is seen by its end.
    async fn read_some(&mut self) -> io::Result<usize> {
        self.buf.reserve(self.buf.len().clamp(READ.0, READ.1));
        match self.stream.read_buf(&mut self.buf).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            read => read.map_err(in_words),
        }
    }

    /// The next line; `None` when the peer has closed between lines. After an error or a timeout the connection is of
    /// no more use.
    pub async fn read(&mut self, timeout: Duration) -> io::Result<Option<Line>> {
        tokio::time::timeout(timeout, self.read_line()).await.map_err(|_| silent(timeout))?
    }

    async fn read_line(&mut self) -> io::Result<Option<Line>> {
        let (mut scanned, mut room) = (0, Vec::new());
        loop {
            if self.big.is_some() && self.buf.first() == Some(&TLS) {
                // Its first message seldom has a newline, and it would wait for an answer.
                let what = "it speaks TLS, and here is plain text: one of both is set up wrongly";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            if let Some(at) = self.buf[scanned..].iter().position(|b| *b == b'\n') {
                let rest = self.buf.split_off(scanned + at + 1);
                let mut text = std::mem::replace(&mut self.buf, rest);
                text.pop();
                return Ok(Some(Line { text, _room: room }));
            }
            scanned = self.buf.len();
            if scanned > self.most {
                let what = format!("a control line of more than {} bytes", self.most);
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            if let (MAX_SMALL.., true, Some(big)) = (scanned, room.is_empty(), &self.big) {
                // The others wait in the kernel's buffers.
                for big in big {
                    room.extend(big.clone().acquire_owned().await);
                }
            }
            if self.read_some().await? == 0 {
                return match scanned {
                    0 => Ok(None),
                    _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed within a control line")),
                };
            }
        }
    }

    /// Sends one line; `line` has no newline.
    pub async fn write(&mut self, mut line: String, timeout: Duration) -> io::Result<()> {
        line.push('\n');
        let all = async {
            self.stream.write_all(line.as_bytes()).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(timeout, async { all.await.map_err(in_words) })
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("not taken within {timeout:?}")))?
    }
}

fn silent(timeout: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("silent for {timeout:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn lines_arrive_whole_however_they_are_cut() {
        let (a, mut b) = tokio::io::duplex(7);
        let mut a = Lines::new(a);
        let sender = tokio::spawn(async move {
            for chunk in ["o", "ne\ntwo", "\n\nth", "ree\n", "tail"] {
                b.write_all(chunk.as_bytes()).await.unwrap();
            }
        });
        for want in ["one", "two", "", "three"] {
            assert_eq!(a.read(T).await.unwrap().unwrap().text, want.as_bytes());
        }
        assert_eq!(a.read(T).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        sender.await.unwrap();
    }

    #[tokio::test]
    async fn silence_an_endless_line_and_a_close_are_told_apart() {
        let (a, b) = tokio::io::duplex(1 << 16);
        let mut a = Lines::new(a);
        let e = a.read(Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::TimedOut);
        let mut b = Lines::new(b);
        let sender = tokio::spawn(async move {
            let _ = b.write("x".repeat(MAX_LINE + (64 << 10)), T).await;
        });
        assert_eq!(a.read(T).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        sender.await.unwrap();
        let (a, b) = tokio::io::duplex(64);
        drop(b);
        assert!(Lines::new(a).read(T).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn long_lines_take_turns_and_short_ones_need_none() {
        let big = Arc::new(Semaphore::new(1));
        let long = || "x".repeat(MAX_SMALL * 2);
        let served = |text: String| {
            let (near, far) = tokio::io::duplex(1 << 10);
            let sender = tokio::spawn(async move { Lines::new(far).write(text, T).await });
            (Lines::served(near, vec![big.clone()]), sender)
        };
        let ((mut a, _a), (mut b, _b), (mut c, _c)) =
            (served(long()), served(long()), served("short".into()));
        let first = a.read(T).await.unwrap().unwrap();
        assert_eq!(first.text.len(), MAX_SMALL * 2);
        // While the first one is not done with, a second one is not read beyond what anybody may send.
        assert_eq!(b.read(Duration::from_millis(50)).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(b.buf.len() <= MAX_SMALL + READ.1, "{}", b.buf.len());
        assert_eq!(c.read(T).await.unwrap().unwrap().text, b"short");
        drop(first);
        let (mut d, _d) = served(long());
        assert!(d.read(T).await.unwrap().is_some());
        let (mut e, _e) = served(long());
        e.keep_small();
        assert_eq!(e.read(T).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
