//! Lines of JSON on a socket, both sides: capped, because a peer's line is the only thing on a control connection
//! that could grow, and with a deadline on each, because nobody waits for ever.

use super::api::MAX_LINE;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A connection that carries lines.
#[derive(Debug)]
pub struct Lines<S> {
    stream: S,
    /// Read and not yet taken; at most [`MAX_LINE`] plus one read.
    buf: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Lines<S> {
    /// Over a connected stream.
    pub fn new(stream: S) -> Self {
        Self { stream, buf: Vec::new() }
    }

    /// The next line without its newline; `None` when the peer has closed between lines. After an error or a
    /// timeout the connection is of no more use.
    pub async fn read(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        tokio::time::timeout(timeout, self.read_line())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("silent for {timeout:?}")))?
    }

    async fn read_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut scanned = 0;
        loop {
            if let Some(at) = self.buf[scanned..].iter().position(|b| *b == b'\n') {
                let rest = self.buf.split_off(scanned + at + 1);
                let mut line = std::mem::replace(&mut self.buf, rest);
                line.pop();
                return Ok(Some(line));
            }
            scanned = self.buf.len();
            if scanned > MAX_LINE {
                let what = format!("a control line of more than {MAX_LINE} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            self.buf.reserve(16 << 10);
            if self.stream.read_buf(&mut self.buf).await? == 0 {
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
        tokio::time::timeout(timeout, all)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("not taken within {timeout:?}")))?
    }
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
            assert_eq!(a.read(T).await.unwrap().unwrap(), want.as_bytes());
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
}
