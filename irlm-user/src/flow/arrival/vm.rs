//! One VM's arrival, on its own thread: sets the target QEMU up, turns frames into its stream, keeps the waiting list,
//! and lends its hands to the driver that decides (`core::handover::arrival`). Mirror of `flow::source::vm`.

use super::back::Sender;
use super::fetch::Fetch;
use super::intake::Intake;
use super::kinds;
use super::loader::{Before, Loader};
use super::{
    Call, Input, Phase, TargetGroup, TargetJournal, TargetNote, TargetSpec, TargetVmShared, contents,
};
use crate::core::arrival::TargetVm;
use crate::core::delta::Slots;
use crate::core::handover::arrival::{Arrival, Input as Event};
use crate::core::handover::{GuestState, TargetState};
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::WINDOW_LOG;
use crate::core::wire::messages::{HelloOk, Word};
use crate::flow::inbox::wait_readable;
use crate::flow::memory::Reading;
use crate::flow::squeeze::Landing;
use crate::flow::{Lowat, MoveError, Tagged, lock, now};
use crate::net::conn::{FrameBuf, NoWait};
use crate::net::connection::Connection;
use crate::net::greeting::send_hello_ok;
use post::PostCopy;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

// What frames do.
mod frames;
// What is heard, and carried out.
mod hear;
// What is known while pages come later.
mod post;
// Pages that come while the VM runs.
mod postcopy;

/// Pages that may wait at once: 16 GiB of references without content, some 500 MiB of list. At the bound the arrival
/// fails and the VM stays at its source.
pub const MAX_WAITING: usize = 4 << 20;
/// How long a VM connection may take to come once the group has begun (the push comes first).
const ARRIVAL: Duration = Duration::from_secs(3600);
/// How much longer a wait may take while contents arrive.
const PATIENCE_FACTOR: u64 = 30;
/// How often the waiting list is looked through for pages whose patience has ended.
const LOOK: Duration = Duration::from_millis(20);
/// The same while there is nothing to look for.
const IDLE: Duration = Duration::from_millis(500);

/// How often a loaded VM that was not given to this host is looked at.
const HOLD: Duration = Duration::from_millis(500);
/// Runs the arrival until the group is forgotten; everything of note is told through `shared`.
pub fn run(
    group: &Arc<TargetGroup>,
    spec: &TargetSpec,
    shared: &Arc<TargetVmShared>,
    mut journal: TargetJournal,
) {
    let wrote = journal(TargetNote::State(TargetState::Filling));
    let loader = kinds::loader(group, spec, shared, Before::default());
    let mut vm = Vm::new(group, spec, shared, journal, Arrival::new(), loader);
    if let Err(e) = wrote {
        vm.tell(Event::Abort(format!("the journal cannot be written: {e}")));
    }
    vm.meet();
    vm.until_forgotten();
}

/// After a restart of the agent: settles what the journal holds.
pub fn recover(
    group: &Arc<TargetGroup>,
    spec: &TargetSpec,
    (state, guest, settled): (TargetState, GuestState, bool),
    before: Before,
    shared: &Arc<TargetVmShared>,
    journal: TargetJournal,
) {
    let loader = kinds::loader(group, spec, shared, before);
    let driver = Arrival::recover(state, guest, settled);
    let mut vm = Vm::new(group, spec, shared, journal, driver, loader);
    lock(&shared.status).reason = "the target agent was restarted".into();
    // What is settled was done before the restart; only the source may still have to hear of it.
    if vm.fetching() {
        vm.prepare_again();
    }
    vm.carry_out();
    vm.until_forgotten();
}

/// The connection to the source, and what was said on it.
struct Link {
    conn: Option<Connection>,
    tag: Option<Tagged>,
    sender: Sender,
    heard: Instant,
    /// The number of awaited pages the source was told last.
    told: u32,
    /// How many of the `Pages` frames taken in the source was told.
    taken: u32,
    /// Why the source cannot be heard, as it was seen last.
    unheard: String,
}

/// How far what the source sends has come.
#[derive(Default)]
struct Stream {
    /// The source has named its blocks, with so many pages each.
    listed: bool,
    pages: Vec<u32>,
    ram_over: bool,
    held: Vec<u8>,
    /// It is to be closed once all that came has been written.
    ending: bool,
}

/// When a loaded VM was seen last, and whether it had been let run by somebody before it was this
/// host's.
struct Early {
    looked: Instant,
    ran: bool,
}

struct Vm<'a> {
    group: &'a Arc<TargetGroup>,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    journal: TargetJournal,
    driver: Arrival,
    list: TargetVm,
    link: Link,
    intake: Intake,
    begun: Instant,
    loader: Box<dyn Loader + 'a>,
    stream: Stream,
    post: PostCopy,
    looked: Instant,
    early: Early,
    /// The loaded memory that is being read.
    reading: Option<Reading>,
    done: bool,
}

impl<'a> Vm<'a> {
    fn new(
        group: &'a Arc<TargetGroup>,
        spec: &'a TargetSpec,
        shared: &'a Arc<TargetVmShared>,
        journal: TargetJournal,
        driver: Arrival,
        loader: Box<dyn Loader + 'a>,
    ) -> Self {
        let now = Instant::now();
        Self {
            group,
            spec,
            shared,
            journal,
            driver,
            list: TargetVm::new(spec.vm, spec.source, MAX_WAITING),
            link: Link {
                conn: None,
                tag: None,
                sender: Arc::new(Mutex::new(None)),
                heard: now,
                told: 0,
                taken: 0,
                unheard: String::new(),
            },
            intake: Intake::new(Landing::default()),
            begun: now,
            loader,
            stream: Stream::default(),
            post: PostCopy::new(),
            looked: now,
            early: Early { looked: now, ran: false },
            reading: None,
            done: false,
        }
    }

    fn until_forgotten(&mut self) {
        let (mut frames, mut lowat) = (FrameBuf::new(), Lowat::default());
        loop {
            // What is left of a connection that was given up is nobody's business.
            let busy = self.link.conn.is_some() && frames.ready();
            if let Some(conn) = self.link.conn.as_ref().filter(|_| !busy) {
                lowat.wants(conn, frames.lacks());
            }
            let conn = self.link.conn.as_ref().filter(|_| !busy).map(AsFd::as_fd);
            let held = !busy && self.link.conn.as_ref().is_some_and(Connection::is_pending);
            let pause = if busy || held { Duration::ZERO } else { self.pause() };
            let fetch = self.post.fetch.as_ref();
            let (faults, demand) = (fetch.map(Fetch::fault_fd), fetch.and_then(Fetch::demand_fd));
            let ready = match wait_readable([conn, Some(self.shared.inbox.as_fd()), faults, demand], pause) {
                Ok(r) => r,
                Err(e) => {
                    tracing::error!("{}: poll: {e}", self.spec.name);
                    std::thread::sleep(Duration::from_millis(100));
                    [false, true, false, false]
                }
            };
            if ready[1] {
                self.shared.inbox.hush();
            }
            while let Some(input) = self.shared.inbox.take() {
                match input {
                    Input::Forget => return,
                    Input::Called(conn, tag, call) => {
                        if self.called(conn, tag, call) {
                            let fresh = self.link.conn.as_ref().map_or_else(FrameBuf::new, FrameBuf::on);
                            (frames, lowat) = (fresh, Lowat::default());
                        }
                    }
                    other => self.hear(other),
                }
            }
            if ready[0] || held {
                self.read(&mut frames);
            } else if self.link.conn.is_some()
                && !busy
                && self.link.heard.elapsed() > self.group.timeouts.peer
            {
                self.lost("the source has been silent for too long");
            }
            self.take_in(&mut frames);
            self.fetch_step(ready[2], ready[3]);
            self.look();
            self.hold();
            self.end_if_written();
            self.carry_out();
            if self.link.conn.is_none()
                && self.driver.state() == TargetState::Filling
                && self.begun.elapsed() > ARRIVAL
            {
                self.fail("its source never connected");
            }
        }
    }

    /// Takes in the frames that have come whole.
    fn take_in(&mut self, frames: &mut FrameBuf) {
        while self.link.conn.is_some() {
            match frames.next() {
                Ok(Some(frame)) => {
                    self.link.heard = Instant::now();
                    let filling = self.driver.state() == TargetState::Filling;
                    match self.frame(&frame) {
                        Ok(()) => {}
                        // What it brought is asked for again on the next connection.
                        Err(e) if self.fetching() => self.fetch_disturbed(e),
                        // The source is to hear that this side has given up.
                        Err(e) if filling => self.fail(&e.to_string()),
                        // It goes on with what makes no sense: each such frame would be said.
                        Err(e) => self.lost(&e.to_string()),
                    }
                }
                Ok(None) => break,
                Err(e) if self.fetching() => {
                    self.fetch_disturbed(e.into());
                    break;
                }
                Err(e) => {
                    // What follows cannot be told from what is broken: nothing more is read of this
                    // connection.
                    self.fail(&e.to_string());
                    self.lost(&e.to_string());
                    break;
                }
            }
            // Wakes and words must not wait behind a full buffer, and no vCPU must.
            if !self.shared.inbox.is_empty() || self.post.fetch.is_some() {
                break;
            }
        }
    }

    /// How long may be slept while nothing is heard.
    fn pause(&self) -> Duration {
        let wake = self.driver.wake().map(|at| Duration::from_nanos(at.0.saturating_sub(now().0)));
        let wake = wake.map_or(IDLE, |w| w.max(Duration::from_millis(1)));
        if let Some(pause) = self.post.pause(self.group) {
            return pause.min(wake);
        }
        // Until it is told otherwise, the source holds its stream back for those it was told of last.
        let looks = self.list.waiting() > 0 || self.link.told > 0;
        wake.min(if looks { LOOK } else { IDLE })
    }

    /// A loaded VM runs only once it was given to this host, whoever lets it run before.
    fn hold(&mut self) {
        use TargetState::{Loaded, Ready, Refused};
        if !matches!(self.driver.state(), Loaded | Ready | Refused) || self.early.looked.elapsed() < HOLD {
            return;
        }
        self.early.looked = Instant::now();
        match self.loader.hold() {
            Ok(ran) => self.early.ran |= ran,
            Err(e) => tracing::debug!("{}: {e}", self.spec.name),
        }
        self.publish();
    }

    /// Learns who waits for the VM.
    fn meet(&mut self) {
        match self.loader.meet() {
            Ok(Some(p)) => {
                if let Err(e) = (self.journal)(TargetNote::Process(p)) {
                    self.fail(&format!("the journal cannot be written: {e}"));
                }
            }
            Ok(None) => tracing::warn!("{}: the process that waits for it is not visible", self.spec.name),
            Err(e) => self.fail(&e.to_string()),
        }
    }

    fn read(&mut self, frames: &mut FrameBuf) {
        let Some(conn) = &self.link.conn else { return };
        match frames.fill(&mut NoWait(conn)) {
            Ok(0) => self.lost("the source closed the connection"),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => self.lost(&e.to_string()),
        }
    }

    fn lost(&mut self, why: &str) {
        self.link.conn = None;
        self.link.tag = None;
        *lock(&self.link.sender) = None;
        tracing::info!("{}: connection to the source: {why}", self.spec.name);
        self.link.unheard = why.to_owned();
        if let Some(fetch) = &mut self.post.fetch {
            fetch.lost();
        }
        self.tell(Event::Lost);
    }

    /// This side cannot go on; the source keeps the VM.
    fn fail(&mut self, why: &str) {
        tracing::warn!("{}: {why}", self.spec.name);
        self.tell(Event::Failed(why.to_owned()));
    }

    /// A connection for this VM; whether it is taken into use.
    fn called(&mut self, conn: Connection, tag: Tagged, call: Call) -> bool {
        let version = match call {
            Call::Vm(v) | Call::Direct(v) => Some(v),
            Call::Settle => None,
        };
        let sending = conn.clone();
        if version.is_some() && (self.loader.is_open() || self.driver.state() != TargetState::Filling) {
            let why = Word::Aborted("this VM has been called before; start a new group".into());
            let _ = crate::net::conn::send(&conn, Kind::Word, &why.encode(), &[]);
            return false;
        }
        if self.link.conn.is_some() {
            // Its source has lost this one, or has been started anew, and this side has not noticed yet.
            self.lost("the source called again");
        }
        let _ = conn.socket().set_read_timeout(Some(Duration::from_millis(500)));
        self.link.tag = Some(tag);
        self.link.heard = Instant::now();
        *lock(&self.link.sender) = Some(sending);
        if let Some(version) = version {
            match self.set_up(call) {
                Ok(()) => {
                    self.intake = Intake::new(Landing::new(self.group.windows.take(WINDOW_LOG)));
                    let slots = self.slots().map_or(0, |s| lock(s).slots());
                    let ok = HelloOk { version, window_log: self.intake.landing.window_log(), slots };
                    // Whoever else says something on it waits for that: what follows is sealed.
                    let _first = lock(&self.link.sender);
                    if let Err(e) = send_hello_ok(&conn, ok) {
                        tracing::warn!("{}: {e}", self.spec.name);
                    }
                }
                Err(e) => self.fail(&e.to_string()),
            }
            self.link.heard = Instant::now();
        }
        self.link.conn = Some(conn);
        if version.is_none() && self.fetching() {
            self.say_lacks();
        }
        true
    }

    fn slots(&self) -> Option<&'a Mutex<Slots>> {
        self.group.slots(self.spec.source, self.spec.domain)
    }

    fn set_up(&mut self, call: Call) -> Result<(), MoveError> {
        match call {
            Call::Direct(_) => {
                self.driver.goes_direct();
                self.loader.set_up_direct(&self.link.sender, &mut self.journal)?;
            }
            _ => self.loader.set_up(&self.link.sender, &mut self.journal)?,
        }
        self.set_phase(Phase::Filling);
        Ok(())
    }

    fn set_phase(&self, phase: Phase) {
        lock(&self.shared.status).phase = phase;
    }

    /// The source's QEMU is gone: its stream is closed once all that came of it has been written.
    fn end_if_written(&mut self) {
        if self.stream.ending && self.stream.held.is_empty() && self.list.waiting() == 0 {
            self.stream.ending = false;
            self.loader.end_stream();
        }
    }

    fn publish(&self) {
        let mut st = lock(&self.shared.status);
        st.stats = self.list.stats;
        st.waiting = match &self.post.fetch {
            Some(fetch) => fetch.lacking(),
            None => self.list.waiting() as u64,
        };
        let d = &self.driver;
        (st.in_doubt, st.may_be_decided) = (d.in_doubt(), d.may_be_decided());
        (st.guest, st.ran) = (d.guest(), d.ran());
        st.phase = match d.state() {
            TargetState::Filling => {
                if let Some(why) = d.trouble() {
                    st.reason = format!("{why}; it is tried again");
                }
                return;
            }
            TargetState::Loaded | TargetState::Ready | TargetState::Refused if d.in_doubt() => Phase::InDoubt,
            TargetState::Loaded | TargetState::Ready | TargetState::Refused => Phase::Loaded,
            TargetState::Running | TargetState::Fetching if !d.ran() => {
                if d.in_doubt() {
                    Phase::InDoubt
                } else {
                    Phase::Loaded
                }
            }
            // Nobody will end it but an operator.
            TargetState::Fetching if d.in_doubt() => Phase::InDoubt,
            TargetState::Fetching => Phase::Fetching,
            TargetState::Running | TargetState::Filled => Phase::Running,
            TargetState::Discarded => Phase::Discarded,
            TargetState::Lost => Phase::Lost,
        };
        if let Some(reason) = self.reason() {
            st.reason = reason;
        }
    }

    /// One line for people: why it ended, or what it waits for. Nothing: what was said stays.
    fn reason(&self) -> Option<String> {
        let d = &self.driver;
        let again = d.trouble().map(|why| format!("{why}; it is tried again"));
        match d.state() {
            TargetState::Loaded | TargetState::Ready if d.differs() => Some(
                "in doubt: the pages that arrived are not those that its source says it has sent, and its copy there is gone: \
                 `irlm settle` may let it run here as it is"
                    .to_owned(),
            ),
            TargetState::Loaded | TargetState::Ready if d.in_doubt() => {
                let why = &self.link.unheard;
                let early = if self.early.ran {
                    "; somebody let it run here, and it was stopped again: it is not this host's until its source, or \
                     `irlm settle`, says so"
                } else {
                    ""
                };
                Some(format!("in doubt: loaded, but the source cannot be heard ({why}){early}"))
            }
            TargetState::Loaded | TargetState::Ready => again.or(Some(String::new())),
            TargetState::Refused => {
                Some(format!("loaded, but it is not let run here: {}; its source takes it back", d.reason()))
            }
            TargetState::Running | TargetState::Fetching if !d.ran() => {
                again.map(|why| format!("this is the VM, but it cannot be seen to run: {why}"))
            }
            // What is said of lost pages, and of the filling, stays.
            TargetState::Fetching => None,
            TargetState::Running | TargetState::Filled => again.or(Some(String::new())),
            TargetState::Discarded | TargetState::Lost => Some(match again {
                Some(why) => format!("{}; {why}", d.reason()),
                None => d.reason().to_owned(),
            }),
            TargetState::Filling => None,
        }
    }

    /// The arrival is over: what it held is freed; words are still answered.
    fn over(&mut self) {
        if self.done {
            return;
        }
        self.done = true;
        self.reading = None;
        self.fetch_over();
        let pass = self.list.leave(&mut lock(&self.group.host));
        for (digest, rest) in pass {
            contents::pass_on(self.group, digest, &rest, self.spec.domain);
        }
        self.intake = Intake::new(Landing::default());
        if self.driver.state() != TargetState::Discarded {
            self.loader.restore();
        }
        self.loader.close();
        self.stream.held = Vec::new();
    }
}

#[cfg(test)]
mod tests;
