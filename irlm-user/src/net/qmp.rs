//! A thin blocking QMP client, because driving a migration needs four things at once that are easy to lose in a
//! general one: a deadline on every word, events kept beside replies with QEMU's own time stamps, capabilities that
//! differ between QEMU 7.2 and 10.x, and an error that names the socket and the command.
//!
//! QEMU serves one client per monitor socket; a second one connects but is never greeted, and that is told apart
//! ([`QmpError::Busy`]).

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

// Who the VM is, and what its QEMU is busy with.
pub mod identity;
// Memory backends.
pub mod memory;
// Capabilities and parameters, as they were found.
pub mod settings;
// What is read of answers and events.
mod types;

pub use types::{Event, MigrateInfo, MigrateStatus, RunState, Version};

/// Longest line taken from QEMU, in bytes. The longest honest one is `info mtree` of a large machine, a few 100 KiB.
pub const MAX_LINE: usize = 8 << 20;

/// Events kept until asked for. A migration brings some dozens; beyond this the oldest is dropped and counted.
pub const MAX_EVENTS: usize = 4096;

/// How long a command may take unless [`Qmp::set_timeout`] says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong on a monitor socket. Each names the socket and the command.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket is not there, or nobody listens on it.
    #[error(
        "QMP {path}: cannot connect: {source} (is QEMU running, with -qmp unix:{path},server=on,wait=off?)"
    )]
    Connect {
        /// The monitor socket.
        path: String,
        /// From the kernel.
        source: std::io::Error,
    },
    /// Connected, but QEMU does not greet: it serves another client, or hangs.
    #[error(
        "QMP {path}: no greeting within {ms} ms: another client holds this monitor (give IRLM one of its own), \
         or its QEMU hangs or is stopped (SIGSTOP)"
    )]
    Busy {
        /// The monitor socket.
        path: String,
        /// How long it was waited for.
        ms: u128,
    },
    /// QEMU closed the monitor, or died.
    #[error("QMP {path}: {command}: QEMU closed the monitor (it has ended or was killed)")]
    Closed {
        /// The monitor socket.
        path: String,
        /// The command under way.
        command: String,
    },
    /// No reply in time.
    #[error("QMP {path}: {command}: no reply within {ms} ms")]
    Timeout {
        /// The monitor socket.
        path: String,
        /// The command under way.
        command: String,
        /// How long it was waited for.
        ms: u128,
    },
    /// The socket failed.
    #[error("QMP {path}: {command}: {source}")]
    Io {
        /// The monitor socket.
        path: String,
        /// The command under way.
        command: String,
        /// From the kernel.
        source: std::io::Error,
    },
    /// The other side is not speaking QMP.
    #[error("QMP {path}: {command}: not QMP: {what}")]
    Grammar {
        /// The monitor socket.
        path: String,
        /// The command under way.
        command: String,
        /// What was wrong.
        what: String,
    },
    /// QEMU answered with an error of its own.
    #[error("QMP {path}: QEMU refuses {command}: {desc}")]
    Refused {
        /// The monitor socket.
        path: String,
        /// The command.
        command: String,
        /// QEMU's error class, mostly `GenericError`.
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// A capability must be on, and this QEMU has never heard of it.
    #[error(
        "QMP {path}: QEMU {version} has no migration capability {name}; use a newer QEMU or another --method"
    )]
    NoCapability {
        /// The monitor socket.
        path: String,
        /// Its version.
        version: Version,
        /// The capability.
        name: String,
    },
}

impl QmpError {
    /// Whether QEMU is gone (as opposed to slow or unwilling).
    #[must_use]
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } | Self::Connect { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
            }
            _ => false,
        }
    }
}

/// Short for this module's results.
pub type Result<T> = std::result::Result<T, QmpError>;

/// A connection to one QEMU's monitor. Not shared: wrap it in a lock if two threads need it.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    /// Bytes read and not yet taken as lines; never beyond [`MAX_LINE`] plus one read.
    buf: Vec<u8>,
    /// How much of `buf` is known to hold no newline.
    scanned: usize,
    next_id: u64,
    events: VecDeque<Event>,
    dropped: u64,
    version: Version,
    timeout: Duration,
    /// Rides on the next command.
    riding: Option<OwnedFd>,
}

impl Qmp {
    /// Connects, takes the greeting and enters command mode, all within `timeout`.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let until = Instant::now() + timeout;
        let fail = |source| QmpError::Connect { path: path.display().to_string(), source };
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(fail)?;
        // For a UNIX socket this also bounds connect() itself when QEMU's backlog of one is taken.
        socket.set_write_timeout(Some(timeout.max(Duration::from_millis(1)))).map_err(fail)?;
        match socket.connect(&SockAddr::unix(&path).map_err(fail)?) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                return Err(QmpError::Busy { path: path.display().to_string(), ms: timeout.as_millis() });
            }
            Err(e) => return Err(fail(e)),
        }
        Self::over(
            UnixStream::from(OwnedFd::from(socket)),
            path,
            until.saturating_duration_since(Instant::now()),
        )
    }

    /// The same over a connected stream: takes the greeting and enters command mode.
    pub fn over(stream: UnixStream, path: PathBuf, timeout: Duration) -> Result<Self> {
        let until = Instant::now() + timeout;
        let mut qmp = Self {
            stream,
            path,
            buf: Vec::new(),
            scanned: 0,
            next_id: 1,
            events: VecDeque::new(),
            dropped: 0,
            version: Version { major: 0, minor: 0, micro: 0 },
            timeout: DEFAULT_TIMEOUT,
            riding: None,
        };
        let Some(greeting) = qmp.read_value("greeting", until)? else {
            return Err(QmpError::Busy { path: qmp.name(), ms: timeout.as_millis() });
        };
        let v = &greeting["QMP"]["version"]["qemu"];
        let part = |k: &str| v[k].as_u64().and_then(|n| u32::try_from(n).ok());
        match (part("major"), part("minor"), part("micro")) {
            (Some(major), Some(minor), Some(micro)) => qmp.version = Version { major, minor, micro },
            _ => return Err(qmp.grammar("greeting", "no QEMU version in the first line")),
        }
        qmp.timeout = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        qmp.execute("qmp_capabilities", Value::Null)?;
        qmp.set_timeout(DEFAULT_TIMEOUT);
        Ok(qmp)
    }

    /// How long each later command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
        // A peer that does not read is as stuck as one that does not answer. A failure shows at the next command.
        let _ = self.stream.set_write_timeout(Some(timeout.max(Duration::from_millis(1))));
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The monitor socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs one command and gives its `return`. `args` may be `Null` for none. Events that come meanwhile are kept.
    pub fn execute(&mut self, command: &str, args: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if !args.is_null() {
            request["arguments"] = args;
        }
        let mut line = request.to_string();
        line.push('\n');
        let until = Instant::now() + self.timeout;
        self.write(line.as_bytes()).map_err(|e| match e.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => self.closed(command),
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.late(command),
            _ => self.io(command, e),
        })?;
        loop {
            let Some(mut v) = self.read_value(command, until)? else {
                return Err(self.late(command));
            };
            if v["event"].is_string() {
                self.keep(&mut v);
            } else if !v["id"].is_null() && v["id"] != id {
                // The late reply to a command that was given up.
            } else if v["error"].is_object() {
                let text = |k: &str| v["error"][k].as_str().unwrap_or("?").to_owned();
                return Err(QmpError::Refused {
                    path: self.name(),
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                });
            } else if v["id"] == id && v.get("return").is_some() {
                return Ok(v["return"].take());
            } else {
                return Err(self.grammar(command, "a line that is no reply, error or event"));
            }
        }
    }

    fn write(&mut self, line: &[u8]) -> std::io::Result<()> {
        let Some(fd) = self.riding.take() else { return self.stream.write_all(line) };
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // There is room for one.
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(&self.stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
        // It went with the first byte.
        self.stream.write_all(&line[sent..])
    }

    /// The next event, in QEMU's order: at once if one is kept, else after at most `wait`. `None`: none came.
    pub fn next_event(&mut self, wait: Duration) -> Result<Option<Event>> {
        let until = Instant::now() + wait;
        loop {
            if let Some(e) = self.events.pop_front() {
                return Ok(Some(e));
            }
            match self.read_value("waiting for events", until)? {
                Some(mut v) if v["event"].is_string() => self.keep(&mut v),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// All events that are there now, without waiting.
    pub fn drain_events(&mut self) -> Result<Vec<Event>> {
        while let Some(mut v) = self.read_value("reading events", Instant::now())? {
            if v["event"].is_string() {
                self.keep(&mut v);
            }
        }
        Ok(self.events.drain(..).collect())
    }

    /// Events lost because nobody asked for them in time (see [`MAX_EVENTS`]).
    #[must_use]
    pub fn dropped_events(&self) -> u64 {
        self.dropped
    }

    /// Sets migration capabilities. One this QEMU does not know is fine to be off, and an error to be on.
    pub fn set_capabilities(&mut self, wanted: &[(&str, bool)]) -> Result<()> {
        let known = self.capabilities()?;
        let mut list = Vec::with_capacity(wanted.len());
        for &(name, on) in wanted {
            if known.contains_key(name) {
                list.push(json!({ "capability": name, "state": on }));
            } else if on {
                return Err(QmpError::NoCapability {
                    path: self.name(),
                    version: self.version,
                    name: name.to_owned(),
                });
            }
        }
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// The capabilities that are on.
    pub fn enabled_capabilities(&mut self) -> Result<Vec<String>> {
        Ok(self.capabilities()?.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect())
    }

    /// Sets migration parameters (names and units: QEMU's `migrate-set-parameters`).
    pub fn set_parameters(&mut self, parameters: Map<String, Value>) -> Result<()> {
        self.execute("migrate-set-parameters", Value::Object(parameters)).map(drop)
    }

    /// Starts migrating to `uri`; returns at once.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Tells a QEMU started with `-incoming defer` where to listen.
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<()> {
        self.execute("migrate-incoming", json!({ "uri": uri })).map(drop)
    }

    /// The same; a QEMU that can (9.1 and later) stays when the loading fails, and says why, instead of
    /// ending.
    pub fn migrate_incoming_and_stay(&mut self, uri: &str) -> Result<()> {
        let stay = self.execute("migrate-incoming", json!({ "uri": uri, "exit-on-error": false }));
        match stay {
            Err(QmpError::Refused { desc, .. }) if desc.contains("exit-on-error") => {
                self.migrate_incoming(uri)
            }
            other => other.map(drop),
        }
    }

    /// Gives QEMU a connection under a name that `migrate` and `migrate-incoming` take as `fd:NAME`; what it has under that
    /// name already is closed.
    pub fn give(&mut self, name: &str, connection: BorrowedFd<'_>) -> Result<()> {
        self.riding = Some(connection.try_clone_to_owned().map_err(|e| self.io("getfd", e))?);
        let result = self.execute("getfd", json!({ "fdname": name })).map(drop);
        self.riding = None;
        result
    }

    /// Lets a QEMU go on that has stopped the guest and waits (`pause-before-switchover`).
    pub fn migrate_continue(&mut self) -> Result<()> {
        self.execute("migrate-continue", json!({ "state": "pre-switchover" })).map(drop)
    }

    /// Cancels; the guest runs on at the source. Harmless when nothing is under way.
    pub fn migrate_cancel(&mut self) -> Result<()> {
        self.execute("migrate_cancel", Value::Null).map(drop)
    }

    /// Where the migration stands.
    pub fn query_migrate(&mut self) -> Result<MigrateInfo> {
        Ok(MigrateInfo::parse(&self.execute("query-migrate", Value::Null)?))
    }

    /// Whether the guest runs.
    pub fn query_status(&mut self) -> Result<RunState> {
        let v = self.execute("query-status", Value::Null)?;
        match (v["running"].as_bool(), v["status"].as_str()) {
            (Some(running), Some(status)) => Ok(RunState { running, status: status.to_owned() }),
            _ => Err(self.grammar("query-status", "no running/status in the reply")),
        }
    }

    /// Lets the guest run.
    pub fn cont(&mut self) -> Result<()> {
        self.execute("cont", Value::Null).map(drop)
    }

    /// Has the guest's network cards announce themselves, five times within a second, as QEMU itself does at a target
    /// (`announce-self`, since QEMU 4.0): switches then send the guest's packets here. Where it is refused, that is only
    /// logged: being hard to find is no reason to keep a guest from its owner.
    pub fn announce_self(&mut self) {
        let often = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        if let Err(e) = self.execute("announce-self", often) {
            tracing::warn!("a guest's network cards could not be announced: {e}");
        }
    }

    /// Pauses the guest.
    pub fn stop(&mut self) -> Result<()> {
        self.execute("stop", Value::Null).map(drop)
    }

    /// Ends QEMU. That it closes the monitor before it answers is fine.
    pub fn quit(&mut self) -> Result<()> {
        match self.execute("quit", Value::Null) {
            Err(e) if e.is_closed() => Ok(()),
            other => other.map(drop),
        }
    }

    /// A command of the human monitor; its text is no stable interface.
    pub fn hmp(&mut self, line: &str) -> Result<String> {
        let v = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        match v {
            Value::String(s) => Ok(s),
            _ => Err(self.grammar(line, "human-monitor-command gave no text")),
        }
    }

    /// Takes one line as JSON; `None` when `until` passes first.
    fn read_value(&mut self, command: &str, until: Instant) -> Result<Option<Value>> {
        loop {
            if let Some(at) = self.buf[self.scanned..].iter().position(|b| *b == b'\n') {
                let end = self.scanned + at;
                let parsed = serde_json::from_slice::<Value>(&self.buf[..end]);
                self.buf.drain(..=end);
                self.scanned = 0;
                return match parsed {
                    Ok(v) if v.is_object() => Ok(Some(v)),
                    Ok(_) => Err(self.grammar(command, "a line that is no object")),
                    Err(e) => Err(self.grammar(command, &format!("{e}"))),
                };
            }
            self.scanned = self.buf.len();
            if self.buf.len() > MAX_LINE {
                return Err(self.grammar(command, &format!("a line of more than {MAX_LINE} bytes")));
            }
            let left = until.saturating_duration_since(Instant::now());
            // Zero would mean "for ever"; one millisecond is also how a look without waiting is done.
            let left = left.max(Duration::from_millis(1));
            self.stream.set_read_timeout(Some(left)).map_err(|e| self.io(command, e))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.closed(command)),
                Ok(n) => self.buf.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= until {
                        return Ok(None);
                    }
                }
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Err(self.closed(command)),
                Err(e) => return Err(self.io(command, e)),
            }
        }
    }

    fn keep(&mut self, v: &mut Value) {
        let stamp = &v["timestamp"];
        // QEMU writes -1 when its clock fails.
        let part = |k: &str| stamp[k].as_u64();
        let at_ns = match (part("seconds"), part("microseconds")) {
            (Some(s), Some(us)) => s.saturating_mul(1_000_000_000).saturating_add(us.saturating_mul(1000)),
            _ => 0,
        };
        let name = v["event"].as_str().unwrap_or("").to_owned();
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(Event { name, data: v["data"].take(), at_ns });
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn closed(&self, command: &str) -> QmpError {
        QmpError::Closed { path: self.name(), command: command.to_owned() }
    }

    fn late(&self, command: &str) -> QmpError {
        QmpError::Timeout { path: self.name(), command: command.to_owned(), ms: self.timeout.as_millis() }
    }

    fn io(&self, command: &str, source: std::io::Error) -> QmpError {
        QmpError::Io { path: self.name(), command: command.to_owned(), source }
    }

    fn grammar(&self, command: &str, what: &str) -> QmpError {
        QmpError::Grammar { path: self.name(), command: command.to_owned(), what: what.to_owned() }
    }
}

impl AsFd for Qmp {
    /// For `host::sched::peer_pid`: who opened the monitor.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

// A QEMU for tests.
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod tests;
