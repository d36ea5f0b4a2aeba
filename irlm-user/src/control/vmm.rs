//! A VMM's control socket, its side: who may ask, how many at a time, and who holds the log of writes. The words are
//! `net::vmm::words`, what they do is `host::kvm`.

use crate::host::kvm::KvmError;
use crate::host::kvm::machine::{BalloonStatus, Dirty, FaultMode, Machine, Standing};
use crate::net::vmm::fds::regular;
use crate::net::vmm::file_of;
use crate::net::vmm::line::FdLines;
use crate::net::vmm::words::{
    Answer, BalloonWords, DirtyMode, Done, HarvestWords, MAX_STATE, MemoryWords, Request, SlotWords, State,
    StateWords, Status, UffdMode, UserfaultWords,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Connections at a time: an agent, its threads, and people who look.
pub const MAX_CLIENTS: usize = 16;
/// How long an answer may take to be taken.
const WRITE: Duration = Duration::from_secs(5);
/// How soon a thread that waits sees that it is to end.
const LOOK: Duration = Duration::from_millis(200);

/// What is done for all connections.
#[derive(Debug)]
struct Server {
    machine: Arc<Machine>,
    stop: Arc<AtomicBool>,
    clients: AtomicUsize,
    /// The connection whose log of writes it is.
    holder: Mutex<Option<u64>>,
}

/// Listens on `path`, which then only this user can connect to. A socket that nobody answers on any more is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let mut bound = UnixListener::bind(path);
    let taken = bound.as_ref().is_err_and(|e| e.kind() == ErrorKind::AddrInUse);
    if taken && UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
        bound = UnixListener::bind(path);
    }
    rustix::process::umask(before);
    bound
}

/// Serves until `stop` is set (a client's `quit` sets it, too) or the guest has ended by its own wish.
pub fn serve(listener: &UnixListener, machine: Arc<Machine>, stop: Arc<AtomicBool>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let server = Arc::new(Server { machine, stop, clients: AtomicUsize::new(0), holder: Mutex::default() });
    let numbers = AtomicU64::new(0);
    while !server.stop.load(Ordering::Acquire) {
        if matches!(server.machine.standing(), Standing::Ended(end) if end.wanted) {
            server.stop.store(true, Ordering::Release);
            break;
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
        match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => continue,
            Err(e) => {
                // Out of descriptors, say: whoever is connected goes on.
                tracing::warn!("control socket: {e}");
                std::thread::sleep(LOOK);
                continue;
            }
        };
        stream.set_nonblocking(false)?;
        if server.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            server.clients.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        let client = Client { server: Arc::clone(&server), number };
        let thread = std::thread::Builder::new().name(format!("vmm-ctl-{number}"));
        if let Err(e) = thread.spawn(move || client.run(stream)) {
            tracing::warn!("control socket: {e}");
        }
    }
    // Answers under way, above all to `quit`.
    let until = Instant::now() + 5 * LOOK;
    while server.clients.load(Ordering::Acquire) > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// One connection.
struct Client {
    server: Arc<Server>,
    number: u64,
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut holder = self.server.holder();
        if *holder == Some(self.number) {
            *holder = None;
            // Nobody will ask for it any more, and it costs the guest.
            if let Err(e) = self.server.machine.dirty_stop() {
                tracing::warn!("after a client has gone: {e}");
            }
        }
        drop(holder);
        self.server.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What goes back: a line, and what rides on it.
type Reply = (String, Vec<OwnedFd>);

impl Client {
    fn run(self, stream: UnixStream) {
        let mut lines = FdLines::new(stream);
        while !self.server.stop.load(Ordering::Acquire) {
            let (line, fds) = match lines.read(Some(Instant::now() + LOOK)) {
                Ok(Some(got)) => got,
                Ok(None) => return,
                Err(e) if e.kind() == ErrorKind::TimedOut => continue,
                Err(e) => {
                    tracing::debug!(client = self.number, "control socket: {e}");
                    return;
                }
            };
            let request = serde_json::from_slice::<Request>(&line);
            let (text, out) = match &request {
                Ok(r) => self.answer(r, fds).unwrap_or_else(|why| refusal(&format!("{why}"))),
                Err(e) => refusal(&format!("not a command of this VMM: {e}")),
            };
            let out: Vec<BorrowedFd<'_>> = out.iter().map(|fd| fd.as_fd()).collect();
            if let Err(e) = lines.write(text, &out, Instant::now() + WRITE) {
                tracing::debug!(client = self.number, "control socket: {e}");
                return;
            }
            if matches!(request, Ok(Request::Quit)) {
                self.server.stop.store(true, Ordering::Release);
            }
        }
    }

    fn answer(&self, request: &Request, fds: Vec<OwnedFd>) -> Result<Reply, Trouble> {
        let m = &self.server.machine;
        match request {
            Request::Status => return ok(&self.server.status(), vec![]),
            Request::Memory => return self.server.memory(),
            Request::Pause => m.pause()?,
            Request::Resume => m.resume()?,
            Request::PauseForMove => m.pause_for_move()?,
            Request::Release => m.release()?,
            Request::GiveUp => m.give_up()?,
            Request::TakeBack => m.take_back(),
            Request::DirtyStart => {
                let mut holder = self.server.holder();
                if holder.is_some_and(|h| h != self.number) {
                    return Err(Trouble::Other("another connection has the log of writes".into()));
                }
                m.dirty_start()?;
                *holder = Some(self.number);
            }
            Request::DirtyHarvest => {
                self.holds()?;
                return self.server.harvest();
            }
            Request::DirtyStop => {
                self.holds()?;
                m.dirty_stop()?;
                *self.server.holder() = None;
            }
            Request::SaveState => {
                let state = m.save_state()?;
                let file = file_of(&state).map_err(Trouble::Io)?;
                return ok(&StateWords { bytes: state.len() as u64 }, vec![file.into()]);
            }
            Request::LoadState => m.load_state(&read_state(fds)?)?,
            Request::Userfault => {
                let (fd, mode, bases) = m.userfault()?;
                let mode = match mode {
                    FaultMode::Minor => UffdMode::Minor,
                    FaultMode::Missing => UffdMode::Missing,
                };
                return ok(&UserfaultWords { mode, bases }, vec![fd]);
            }
            Request::UserfaultEnd => m.userfault_end()?,
            Request::Balloon { bytes } => m.balloon(*bytes)?,
            Request::Quit => {}
        }
        ok(&Done {}, vec![])
    }

    fn holds(&self) -> Result<(), Trouble> {
        match *self.server.holder() {
            Some(h) if h == self.number => Ok(()),
            Some(_) => Err(Trouble::Other("another connection has the log of writes".into())),
            None => Err(Trouble::Other("writes are not noted; send dirty-start first".into())),
        }
    }
}

impl Server {
    fn holder(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Status {
        let m = &self.machine;
        let log = m.dirty_status();
        let (state, why) = match m.standing() {
            Standing::Running => (State::Running, None),
            Standing::Pausing => (State::Pausing, None),
            Standing::Paused => (State::Paused, None),
            Standing::GivenUp => (State::GivenUp, None),
            Standing::Incoming => (State::Incoming, None),
            Standing::Ended(end) => (State::Ended, Some(end.why)),
        };
        Status {
            state,
            why,
            vcpus: m.vcpus(),
            ram_bytes: m.memory().bytes(),
            dirty: match log.kind {
                Dirty::Bitmap => DirtyMode::Bitmap,
                Dirty::Ring(_) => DirtyMode::Ring,
            },
            dirty_on: log.on,
            ring_full: log.ring_full,
            ring_lost: log.ring_lost,
            uffd: m.asks_for_pages(),
            balloon: m.balloon_status().map(|b| {
                let BalloonStatus { asked, given, released } = b;
                BalloonWords { asked, given, released }
            }),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn memory(&self) -> Result<Reply, Trouble> {
        let mut words = MemoryWords { slots: vec![] };
        let mut fds = Vec::new();
        for s in self.machine.memory().slots() {
            words.slots.push(SlotWords {
                guest_phys: s.guest_phys,
                bytes: s.bytes,
                page_bytes: s.page_bytes,
                name: s.name.clone(),
            });
            fds.push(s.file.as_fd().try_clone_to_owned().map_err(Trouble::Io)?);
        }
        ok(&words, fds)
    }

    /// The bitmaps of all slots one after the other, little-endian words, in a file.
    fn harvest(&self) -> Result<Reply, Trouble> {
        let slots = self.machine.memory().slots();
        let mut bits: Vec<Vec<u64>> = slots.iter().map(|s| vec![0; s.words()]).collect();
        self.machine.dirty_harvest(&mut bits)?;
        let mut bytes = Vec::with_capacity(bits.iter().map(Vec::len).sum::<usize>() * 8);
        let mut pages = 0;
        for word in bits.iter().flatten() {
            pages += u64::from(word.count_ones());
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        ok(&HarvestWords { pages }, vec![file_of(&bytes).map_err(Trouble::Io)?.into()])
    }
}

/// The state that came with the request.
fn read_state(fds: Vec<OwnedFd>) -> Result<Vec<u8>, Trouble> {
    let mut fds = fds.into_iter();
    let (Some(fd), None) = (fds.next(), fds.next()) else {
        return Err(Trouble::Other("the state comes as exactly one file with the request".into()));
    };
    let bytes = regular(&fd).map_err(|e| Trouble::Other(e.to_string()))?;
    let file = File::from(fd);
    if bytes > MAX_STATE {
        return Err(Trouble::Other(format!("a state of {bytes} bytes; at most {MAX_STATE} are taken")));
    }
    let mut out = vec![0; bytes as usize];
    file.read_exact_at(&mut out, 0).map_err(Trouble::Io)?;
    Ok(out)
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{0}")]
    Kvm(#[from] KvmError),
    #[error("{0}")]
    Io(io::Error),
    #[error("{0}")]
    Other(String),
}

fn ok<T: Serialize>(words: &T, fds: Vec<OwnedFd>) -> Result<Reply, Trouble> {
    let line = serde_json::to_string(&Answer::Ok(words)).map_err(|e| Trouble::Other(e.to_string()))?;
    Ok((line, fds))
}

fn refusal(why: &str) -> Reply {
    let line = serde_json::to_string(&Answer::<Done>::Error(why.replace('\n', " ")));
    (line.unwrap_or_else(|_| "{\"error\":\"unspeakable\"}".into()), vec![])
}
