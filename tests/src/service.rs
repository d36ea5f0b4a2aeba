//! Questions to a guest's service over its second serial port: no network card is needed, and the port migrates with
//! the guest like any device.

use anyhow::{Context as _, Result, bail};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// One guest's port.
#[derive(Debug)]
pub struct Service {
    port: UnixStream,
    seen: Vec<u8>,
    asked: u32,
}

impl Service {
    /// Opens the port; QEMU allows one client at a time.
    pub fn open(socket: &Path) -> Result<Self> {
        let port = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Self { port, seen: Vec::new(), asked: 0 })
    }

    /// Asks `question` and gives the answer; an error if the guest says so or says nothing within `wait`.
    pub fn ask(&mut self, question: &str, wait: Duration) -> Result<String> {
        self.asked += 1;
        // A tag of its own, so that an answer that came too late is not taken for this one's.
        let tag = format!("Q{}-{}", std::process::id(), self.asked);
        self.port.write_all(format!("\n{tag} {question}\n").as_bytes()).context("ask the guest")?;
        let until = Instant::now() + wait;
        loop {
            while let Some(end) = self.seen.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.seen.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let mut words = line.trim_end().splitn(3, ' ');
                match (words.next(), words.next(), words.next()) {
                    (Some(t), Some("ok"), answer) if t == tag => {
                        return Ok(answer.unwrap_or_default().to_owned());
                    }
                    (Some(t), Some("error"), why) if t == tag => {
                        bail!("the guest cannot answer `{question}`: {}", why.unwrap_or_default())
                    }
                    _ => {}
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest did not answer `{question}` within {wait:?}");
            }
            self.port.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.port.read(&mut buffer) {
                Ok(0) => bail!("QEMU closed the guest's port"),
                Ok(n) => self.seen.extend_from_slice(&buffer[..n]),
                Err(e)
                    if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).context("read the guest's port"),
            }
        }
    }
}
