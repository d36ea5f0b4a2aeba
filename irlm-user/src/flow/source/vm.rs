//! One VM's departure, on its own thread: sets both ends up, pumps the stream, answers needs, and lends its hands to the
//! driver that decides (`core::handover::departure`).

use super::back;
use super::kinds;
use super::kvm::serve::Serving;
use super::out::Out;
use super::prepare::PreparedVm;
use super::runner::{Before, PumpError, Ready, Runner, Saw};
use super::{Input, Left, Phase, Says, SourceGroup, SourceJournal, SourceNote, SourceSpec, SourceVmShared};
use crate::core::account::{InRam, Pages, Proof};
use crate::core::handover::departure::{Departure, Input as Event};
use crate::core::handover::{SourceState, Standing};
use crate::core::page_set::PageSet;
use crate::core::squeeze::Mode;
use crate::core::units::{PAGE_SIZE, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::MAX_FRAME_PAGES;
use crate::core::wire::messages::{ContentEntry, NeedEntry, Purpose, encode_entries, encode_needs};
use crate::flow::inbox::wait_readable;
use crate::flow::memory::Reading;
use crate::flow::pace::Paced;
use crate::flow::squeeze::{Lane, Window};
use crate::flow::{HEARTBEAT, MoveError, NOTSENT_LOWAT, Tagged, Traffic, lock, now, unix_ns};
use crate::host::sched::Process;
use crate::net::conn::{FrameBuf, is_closed};
use crate::net::connection::Connection;
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

// What is heard, and carried out.
mod hear;

/// Runs the departure to its end: the VM is known to run at the target, or at the source with the target knowing, or
/// the agent forgets the group. Everything else is told through `shared`. `process` is the one that was claimed for it.
pub fn run(
    group: &Arc<SourceGroup>,
    spec: &SourceSpec,
    (prepared, process): (PreparedVm, Option<Process>),
    shared: &Arc<SourceVmShared>,
    journal: SourceJournal,
) {
    let runner = kinds::runner(group, spec, shared, prepared, Before { process, ..Before::default() });
    let mut driver = Departure::new();
    let compares = group.options.verify == Pages::Ram && !runner.may_switch();
    if compares {
        driver.compares_memory();
    }
    let mut vm = Vm::new(group, spec, shared, journal, driver, runner);
    vm.memory.asked = compares;
    vm.set_phase(Phase::Connecting);
    shared.starts_now();
    match vm.set_up() {
        Ok(()) => vm.set_phase(Phase::Migrating),
        Err(e) => vm.tell(Event::Abort(e.to_string())),
    }
    vm.until_over();
}

/// After a restart of the agent: settles what the journal holds.
pub fn recover(
    group: &Arc<SourceGroup>,
    spec: &SourceSpec,
    state: SourceState,
    before: Before,
    shared: &Arc<SourceVmShared>,
    journal: SourceJournal,
) {
    let driver = Departure::recover(state, before.guest, now());
    let runner = kinds::runner(group, spec, shared, PreparedVm::default(), before);
    let mut vm = Vm::new(group, spec, shared, journal, driver, runner);
    vm.recovered = true;
    vm.link.connected = false;
    vm.carry_out();
    vm.until_over();
}

/// The connections to the target.
struct Link {
    conn: Option<Connection>,
    /// Of the connection; each reconnection has the next.
    number: u32,
    /// For contents on the VM connection, once it stands.
    lane: Lane,
    tag: Option<Tagged>,
    _paced: Option<Paced>,
    connected: bool,
    /// Why the target cannot be heard, as it was seen last.
    unheard: String,
    last_sent: Instant,
}

/// Post-copy's part of a departure.
#[derive(Default)]
struct Later {
    /// The demand connection that was made beforehand.
    demand: Option<(Connection, FrameBuf, Tagged)>,
    /// Since the VM is the target's.
    serving: Option<Arc<Serving>>,
    /// What is left to send is known. After a lost connection it is not before the target says what
    /// it lacks.
    filling: bool,
    /// What the target has said so far of what it lacks.
    lacks: Option<PageSet>,
}

/// The comparing of the stopped VM's memory.
#[derive(Default)]
struct Compared {
    /// It is to be compared.
    asked: bool,
    reading: Option<Reading>,
    /// When the target had said what it has, and how long that waited here for the same.
    heard: Option<Instant>,
    waited: Duration,
}

struct Vm<'a> {
    group: &'a Arc<SourceGroup>,
    spec: &'a SourceSpec,
    shared: &'a Arc<SourceVmShared>,
    journal: SourceJournal,
    driver: Departure,
    link: Link,
    runner: Box<dyn Runner + 'a>,
    /// Whoever ran the VM is gone.
    died: bool,
    /// There was an agent before this one: nothing is sent but words.
    recovered: bool,
    /// Pages that wait for content at the target, as it said last.
    awaited: u32,
    later: Later,
    memory: Compared,
    /// When its stream began, if it has, and the VM was not stopped yet.
    streams_since: Option<Instant>,
    forgotten: bool,
}

impl<'a> Vm<'a> {
    fn new(
        group: &'a Arc<SourceGroup>,
        spec: &'a SourceSpec,
        shared: &'a Arc<SourceVmShared>,
        journal: SourceJournal,
        driver: Departure,
        runner: Box<dyn Runner + 'a>,
    ) -> Self {
        Self {
            group,
            spec,
            shared,
            journal,
            driver,
            link: Link {
                conn: None,
                number: 0,
                lane: Lane::new(Mode::Off, Window::default(), &group.squeezing.edge),
                tag: None,
                _paced: None,
                connected: false,
                unheard: String::new(),
                last_sent: Instant::now(),
            },
            runner,
            died: false,
            recovered: false,
            awaited: 0,
            later: Later::default(),
            memory: Compared::default(),
            streams_since: None,
            forgotten: false,
        }
    }

    fn set_phase(&self, phase: Phase) {
        lock(&self.shared.status).phase = phase;
    }

    fn target(&self) -> std::net::SocketAddr {
        self.group.targets[usize::from(self.spec.target.0)]
    }

    fn dial(&self, purpose: Purpose, class: Traffic) -> Result<(Connection, Tagged), MoveError> {
        let hello = Greeting::new(&self.group.name, self.group.token, purpose);
        let tag = |ends| Tagged::of(&self.group.tags, ends, class);
        Ok(dial(self.target(), &hello, self.group.timeouts.peer, &self.group.options.security, tag)?)
    }

    /// Takes a connection into use: keep its tag and read it on a thread of its own.
    fn adopt(&mut self, conn: Connection, tag: Tagged, frames: FrameBuf) -> Result<(), MoveError> {
        self.link.number += 1;
        self.shared.heard.store(now().0, Ordering::Relaxed);
        self.shared.lost.store(false, Ordering::Relaxed);
        self.link.tag = Some(tag);
        self.link._paced = self.group.pacer.join(conn.socket());
        let reading = conn.clone();
        let (shared, number, silence) = (self.shared.clone(), self.link.number, self.group.timeouts.peer);
        std::thread::Builder::new()
            .name(format!("irlm-back-{}", self.spec.name))
            .spawn(move || back::read(&reading, frames, number, silence, &shared))?;
        self.link.conn = Some(conn);
        self.link.connected = true;
        Ok(())
    }

    fn set_up(&mut self) -> Result<(), MoveError> {
        (self.journal)(SourceNote::State(SourceState::Streaming, self.driver.guest()))?;
        let setup = self.group.timeouts.setup;
        let (source, vm) = (self.group.me, self.spec.vm);
        let direct = self.spec.front.is_qemu() && self.group.direct.load(Ordering::Relaxed);
        let purpose = if direct { Purpose::Direct { source, vm } } else { Purpose::Vm { source, vm } };
        self.runner.may_leave()?;
        let (conn, tag) = self.dial(purpose, Traffic::Bulk)?;
        crate::host::sockopt::set_notsent_lowat(&conn, NOTSENT_LOWAT)?;
        let (ok, frames) = wait_hello_ok(&conn, setup)?;
        let window = self.group.squeezing.windows.take(ok.window_log);
        self.link.lane = Lane::beside(
            self.group.options.compress,
            window,
            &self.group.squeezing.edge,
            self.group.squeezing.workers.take(),
        );
        self.group.similar.granted(self.spec.target, self.spec.domain, ok.slots);
        self.adopt(conn, tag, frames)?;
        self.runner.set_up(&mut self.journal)?;
        self.streams_since = Some(Instant::now());
        if self.runner.may_switch() {
            self.later.demand = Some(self.dial_demand()?);
        }
        Ok(())
    }

    fn dial_demand(&self) -> Result<(Connection, FrameBuf, Tagged), MoveError> {
        let purpose = Purpose::Demand { source: self.group.me, vm: self.spec.vm };
        let (conn, tag) = self.dial(purpose, Traffic::Demand)?;
        let (_, frames) = wait_hello_ok(&conn, self.group.timeouts.peer)?;
        Ok((conn, frames, tag))
    }

    /// The loop: pages, inbox, heartbeats, calls; until the handover is finished.
    fn until_over(&mut self) {
        while !(self.driver.finished() || self.forgotten) {
            let streaming = self.streaming() && !self.runner.gated(self.awaited);
            let ready = if streaming { self.runner.ready() } else { Ready::Never };
            let (fd, mut pause) = (if let Ready::Fd(fd) = &ready { Some(*fd) } else { None }, self.pause());
            if let Ready::At(at) = ready {
                pause = pause.min(at.saturating_duration_since(Instant::now()));
            }
            // What is still being compressed goes out at once if there is nothing else to do.
            if self.link.connected && self.link.lane.is_ahead() {
                pause = Duration::ZERO;
            }
            let mut heard = match wait_readable([fd, Some(self.shared.inbox.as_fd())], pause) {
                Ok(r) => r,
                Err(e) => {
                    tracing::error!("{}: poll: {e}", self.spec.name);
                    std::thread::sleep(Duration::from_millis(100));
                    [false, true]
                }
            };
            if let Ready::At(at) = ready {
                heard[0] = Instant::now() >= at;
            }
            if heard[1] {
                self.shared.inbox.hush();
            }
            while let Some(input) = self.shared.inbox.take() {
                self.hear(input);
            }
            if heard[0] && self.streaming() {
                self.pump();
            } else if self.link.connected {
                self.drain();
            }
            if self.runner.found_dead() {
                self.hear(Input::Qemu(Says::Died));
            }
            self.beat();
            self.converges();
            self.carry_out();
        }
        // What came after the last page is for the host's other VMs to know.
        let unkept = std::mem::take(&mut *lock(&self.shared.unkept));
        self.group.similar.unkept(self.spec.target, self.spec.domain, &unkept);
    }

    fn streaming(&self) -> bool {
        self.link.connected
            && match self.driver.state() {
                SourceState::Streaming => !self.recovered,
                SourceState::Serving => self.later.filling,
                _ => false,
            }
    }

    fn pause(&self) -> Duration {
        let beat = HEARTBEAT.saturating_sub(self.link.last_sent.elapsed());
        let wake = self.driver.wake().map(|at| Duration::from_nanos(at.0.saturating_sub(now().0)));
        wake.map_or(beat, |w| w.min(beat)).clamp(Duration::from_millis(1), HEARTBEAT)
    }

    /// A guest that writes faster than the link takes it would stream for ever.
    fn converges(&mut self) {
        let longest = self.group.options.longest;
        if self.streams_since.is_some_and(|since| since.elapsed() > longest) {
            self.streams_since = None;
            let s = longest.as_secs();
            self.tell(Event::Abort(format!(
                "it writes faster than the link takes it: not converged within {s} s (timeouts.move_ms)"
            )));
        }
    }

    /// Its owner lets it run again that he had stopped: no downtime yet, and it has to converge again.
    fn runs_on(&mut self) {
        let mut st = lock(&self.shared.status);
        if std::mem::take(&mut st.stopped_ns) != 0 {
            self.streams_since = Some(Instant::now());
        }
    }

    fn send(&mut self, kind: Kind, meta: &[u8], body: &[IoSlice<'_>]) -> std::io::Result<()> {
        self.link.last_sent = Instant::now();
        match &self.link.conn {
            Some(conn) => {
                let lane = &mut self.link.lane;
                Out { conn, lane, shared: self.shared, spec: self.spec, group: self.group }
                    .send(kind, meta, body)
            }
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }

    fn drain(&mut self) {
        if let Some(conn) = self.link.conn.as_ref().filter(|_| self.link.lane.is_ahead()) {
            let lane = &mut self.link.lane;
            // A failure shows up at the reader.
            let _ = Out { conn, lane, shared: self.shared, spec: self.spec, group: self.group }.drain();
        }
    }

    fn beat(&mut self) {
        if self.link.connected && self.link.last_sent.elapsed() >= HEARTBEAT {
            // A failure shows up at the reader.
            let _ = self.send(Kind::Heartbeat, &[], &[]);
        }
    }

    fn pump(&mut self) {
        let Some(conn) = &self.link.conn else { return };
        let mut out =
            Out { conn, lane: &mut self.link.lane, shared: self.shared, spec: self.spec, group: self.group };
        let result = self.runner.pump(&mut out, self.awaited);
        self.link.last_sent = Instant::now();
        self.publish_stats();
        match result {
            Ok(Saw { eof: true, .. }) => {
                if self.died {
                    self.tell(Event::Source(Standing::Gone));
                }
            }
            Ok(Saw { stopped, switched, .. }) => {
                if stopped {
                    self.set_phase(Phase::Stopped);
                    self.streams_since = None;
                    self.tell(Event::Stopped);
                    self.read_memory();
                }
                if switched {
                    self.tell(Event::Switched);
                }
            }
            // Its reader says so.
            Err(PumpError::Send(_)) if self.later.serving.is_some() => {
                self.hang_up();
                self.link.connected = false;
            }
            Err(e) if self.later.serving.is_some() => {
                tracing::error!("{}: {e}", self.spec.name);
                self.link.unheard = e.to_string();
                self.later.serving = None;
                self.tell(Event::PagesLost);
            }
            Err(PumpError::Send(e)) if self.shared.lost.load(Ordering::Relaxed) || is_closed(&e) => {
                // The reader's message is on its way, which knows more: the target says why before it closes.
                self.link.connected = false;
            }
            Err(PumpError::Died(why)) => {
                tracing::warn!("{}: {why}", self.spec.name);
                self.hear(Input::Qemu(Says::Died));
            }
            Err(e) => self.tell(Event::Abort(e.to_string())),
        }
    }

    /// The connection's reader finds it closed, and says so.
    fn hang_up(&self) {
        if let Some(conn) = &self.link.conn {
            let _ = conn.shutdown(std::net::Shutdown::Both);
        }
    }

    fn publish_stats(&mut self) {
        let stats = self.runner.vm().map(|vm| vm.stats);
        let mut st = lock(&self.shared.status);
        st.stats = stats.unwrap_or(st.stats);
        if st.ram_bytes == 0
            && let Some(list) = self.runner.blocks()
        {
            st.ram_bytes = list.blocks().iter().map(|b| b.used_bytes).sum();
        }
    }

    /// What is known of its pages.
    fn proof(&self) -> Option<Proof> {
        let d = &self.driver;
        match d.proven() {
            _ if self.group.options.verify == Pages::Off => Some(Proof::Off),
            passed if let Some((compared, clocks, theirs)) = d.same_memory() => Some(Proof::Ram(InRam {
                pages: compared.pages,
                passed: passed.map_or(0, |tally| tally.pages),
                clocks,
                unread: compared.unread,
                ms: u64::from(theirs.took_ms) + self.memory.waited.as_millis() as u64,
            })),
            _ if !self.runner.in_path() => Some(Proof::NotInPath),
            Some(tally) if d.switched() => Some(Proof::Before(tally.pages)),
            Some(tally) => Some(Proof::Pages(tally.pages)),
            None => (d.state() == SourceState::Done).then_some(Proof::Lost),
        }
    }

    /// Publishes how it stands.
    fn publish(&mut self) {
        let d = &self.driver;
        let mut st = lock(&self.shared.status);
        st.settled = d.settled();
        st.guest = d.guest();
        st.may_be_decided = d.may_be_decided();
        // Between two words of a handover that goes well nobody needs to be told of doubt.
        let unheard =
            !self.link.connected || d.trouble().is_some() || d.lost().is_some() || d.claimed().is_some();
        let unheard = unheard || d.differs().is_some() || d.behind() || d.pages_lost();
        st.proof = self.proof();
        st.in_doubt = d.in_doubt() && unheard;
        st.left = match (d.left(), d.gone()) {
            _ if d.claimed().is_some() && d.in_doubt() => d.claimed().map(Left::Stands),
            _ if d.state() != SourceState::Aborted => None,
            (_, true) => Some(Left::Ended),
            (left, _) => left.map(Left::Stands),
        };
        let phase = match d.state() {
            SourceState::Done => Phase::Moved,
            SourceState::Aborted if d.is_back() => Phase::Stayed,
            SourceState::GivingUp | SourceState::TakingBack if d.behind() => Phase::InDoubt,
            SourceState::Aborted | SourceState::TakingBack => Phase::TakingBack,
            SourceState::GaveUp => Phase::InDoubt,
            SourceState::Serving if d.in_doubt() => Phase::InDoubt,
            SourceState::Serving => Phase::Serving,
            SourceState::GivingUp => Phase::HandingOver,
            SourceState::Streaming => return,
        };
        st.reason = self.reason(phase);
        if matches!(phase, Phase::Moved | Phase::Stayed) && st.ended_ns == 0 {
            st.ended_ns = unix_ns();
        }
        st.phase = phase;
    }

    /// One line for people: why it is where it is, or what it waits for.
    fn reason(&self, phase: Phase) -> String {
        let d = &self.driver;
        let again = d.trouble().map(|why| format!("{why}; it is tried again")).unwrap_or_default();
        let reason = d.reason();
        match phase {
            Phase::Moved => again,
            Phase::Stayed if again.is_empty() => reason.to_owned(),
            Phase::Stayed => format!("{reason}; {again}"),
            Phase::TakingBack if again.is_empty() => reason.to_owned(),
            Phase::TakingBack => format!("{reason}; its copy here cannot be seen to be as before: {again}"),
            _ if let Some(guest) = d.claimed().filter(|_| d.in_doubt()) => format!(
                "in doubt: it was given up, and somebody has continued it here by hand (it is {} here); it is not let run at \
                 its target until `irlm settle` has decided which copy is the VM",
                guest.name()
            ),
            _ if d.behind() => {
                format!(
                    "in doubt: {reason}; its copy here is gone: `irlm settle` may let it run at its target as it is"
                )
            }
            _ if let Some(why) = d.differs().filter(|_| d.in_doubt()) => {
                format!(
                    "in doubt: {why}; its copy here is gone: `irlm settle` may let it run at its target as it is"
                )
            }
            _ if d.pages_lost() && d.lost().is_none() => {
                "in doubt: its memory here is gone, and what its target lacks with it: `irlm settle` may let it go on there \
                 without"
                    .to_owned()
            }
            _ => match (d.lost(), d.trouble()) {
                (Some(why), _) => format!(
                    "the target has lost it: {why}; the copy here is as of its giving up, and paused: \
                     `irlm settle` may continue it"
                ),
                (_, Some(_)) => format!("in doubt: {again}"),
                _ if d.in_doubt() && !self.link.connected => {
                    let why = if self.link.unheard.is_empty() {
                        "nothing was heard of it yet"
                    } else {
                        &self.link.unheard
                    };
                    format!("in doubt: given up, but the target has not said that it runs ({why})")
                }
                _ if !self.link.connected && d.serving() => self.link.unheard.clone(),
                _ => String::new(),
            },
        }
    }

    fn answer(&mut self, needs: &[NeedEntry]) {
        let table = &self.group.tables[usize::from(self.spec.target.0)];
        let blocks = self.runner.blocks().cloned();
        let ram = self.runner.ram().cloned();
        let mut gone = Vec::new();
        for group in needs.chunks(MAX_FRAME_PAGES / 4) {
            let mut entries = Vec::new();
            let mut pages: Vec<PageBytes> = Vec::new();
            for need in group {
                let mut page: PageBytes = [0; PAGE_SIZE];
                let name = blocks.as_ref().and_then(|b| b.get(need.addr.block)).map(|b| &*b.name);
                let read = name.zip(ram.as_ref()).is_some_and(|(name, ram)| {
                    ram.find(name).is_some_and(|b| ram.read_at(b, need.addr.page, &mut page).is_ok())
                });
                let vm = self.runner.vm();
                match vm.and_then(|vm| vm.answer(&lock(table), need.want, read.then_some(&page))) {
                    Some(digest) => {
                        let id = lock(table).id_of(&digest);
                        entries.push(ContentEntry { id, digest, forward: Vec::new() });
                        pages.push(page);
                    }
                    None => gone.push(*need),
                }
            }
            if !entries.is_empty() {
                let mut meta = Vec::new();
                encode_entries(entries.iter(), &mut meta);
                if let Some(conn) = &self.link.conn {
                    let contents: Vec<&PageBytes> = pages.iter().collect();
                    let lane = &mut self.link.lane;
                    self.link.last_sent = Instant::now();
                    let _ = Out { conn, lane, shared: self.shared, spec: self.spec, group: self.group }
                        .contents(Kind::Contents, &meta, &contents);
                }
            }
        }
        if !gone.is_empty() {
            let _ = self.send(Kind::Gone, &encode_needs(&gone), &[]);
        }
        self.publish_stats();
    }
}

/// Holds the handover, so that a failure can be caused exactly here. Zero in earnest.
fn drill(what: &str, ms: u64) {
    if ms > 0 {
        tracing::warn!("drill: holding {what} for {ms} ms");
        std::thread::sleep(Duration::from_millis(ms));
    }
}
