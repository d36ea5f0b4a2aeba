//! A small blocking client of QEMU's control socket: the lab's own, so that the lab proves IRLM with code that IRLM
//! does not share.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// One connection.
#[derive(Debug)]
pub struct Qmp {
    read: BufReader<UnixStream>,
    write: UnixStream,
    events: VecDeque<Value>,
    name: String,
}

impl Qmp {
    /// Connects within `wait` (QEMU may still be starting) and leaves the capabilities negotiation.
    pub fn connect(path: &Path, wait: Duration) -> Result<Self> {
        let until = Instant::now() + wait;
        let write = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) if Instant::now() > until => {
                    return Err(e).with_context(|| format!("connect to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        write.set_read_timeout(Some(Duration::from_secs(30)))?;
        let name = path.display().to_string();
        let mut q = Self { read: BufReader::new(write.try_clone()?), write, events: VecDeque::new(), name };
        q.line()?;
        q.run("qmp_capabilities", &json!({}))?;
        Ok(q)
    }

    /// Runs a command and gives its answer; events that come in between are kept.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        self.write.write_all(text.as_bytes()).with_context(|| format!("{}: {command}", self.name))?;
        loop {
            let mut v = self.line().with_context(|| format!("{}: {command}", self.name))?;
            if let Some(r) = v.get_mut("return") {
                return Ok(r.take());
            }
            if let Some(e) = v.get("error") {
                bail!(
                    "{}: {command}: {}",
                    self.name,
                    e["desc"].as_str().unwrap_or("an error without a text")
                );
            }
            if v.get("event").is_some() {
                // Nobody reads most of them: keep the newest.
                if self.events.len() == 1000 {
                    self.events.pop_front();
                }
                self.events.push_back(v);
            }
        }
    }

    /// Runs a command of the human monitor.
    pub fn human(&mut self, line: &str) -> Result<String> {
        let v = self.run("human-monitor-command", &json!({"command-line": line}))?;
        Ok(v.as_str().unwrap_or_default().to_owned())
    }

    /// `query-status`: "running", "paused", "postmigrate", …
    pub fn status(&mut self) -> Result<String> {
        Ok(self.run("query-status", &json!({}))?["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Waits until a migration in or out has ended, and gives `query-migrate`'s last word if it completed.
    pub fn migrated(&mut self, wait: Duration) -> Result<Value> {
        let until = Instant::now() + wait;
        loop {
            let v = self.run("query-migrate", &json!({}))?;
            match v["status"].as_str() {
                Some("completed") => return Ok(v),
                Some("failed" | "cancelled") => bail!("{}: migration failed: {}", self.name, v["error-desc"]),
                s if Instant::now() > until => bail!("{}: migration still {s:?} after {wait:?}", self.name),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.read.read_line(&mut line).context("no answer")? == 0 {
            bail!("QEMU closed the connection");
        }
        serde_json::from_str(&line).context("not JSON")
    }
}
