//! One VM's arrival, on its own thread: sets the target QEMU up, turns frames into its stream, keeps the waiting list,
//! and carries out what `core::handover` decides. Mirror of `flow::source::vm`.

use super::back::{self, Sender};
use super::emit::OutError;
use super::fetch::{Fetch, FetchError};
use super::intake::Intake;
use super::loader::{self, LoadError, Loader};
use super::{
    Call, Input, Phase, TargetGroup, TargetJournal, TargetNote, TargetSpec, TargetVmShared, contents,
};
use crate::core::delta::Slots;
use crate::core::handover::{TargetEvent, TargetHandover, TargetState, TargetStep};
use crate::core::target::TargetVm;
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::limits::WINDOW_LOG;
use crate::core::wire::messages::{HelloOk, Word};
use crate::flow::inbox::wait_readable;
use crate::flow::source::Decision;
use crate::flow::squeeze::Landing;
use crate::flow::{Lowat, Tagged, lock, unix_ns};
use crate::host::sched::Process;
use crate::net::conn::{FrameBuf, NoWait, send_hello_ok};
use postcopy::PostCopy;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

// What frames do.
mod frames;
// Pages that come while the VM runs.
mod postcopy;

/// Pages that may wait at once: 16 GiB of references without content, some 500 MiB of list. At the bound the arrival
/// fails and the VM stays at its source.
pub const MAX_WAITING: usize = 4 << 20;
/// Device state held back while pages still wait. At the bound the arrival fails.
pub const MAX_HELD: usize = 256 << 20;
/// How long a VM connection may take to come once the group has begun (the push comes first).
const ARRIVAL: Duration = Duration::from_secs(3600);
/// How much longer a wait may take while contents arrive.
const PATIENCE_FACTOR: u64 = 30;
/// How often the waiting list is looked through for pages whose patience has ended.
const LOOK: Duration = Duration::from_millis(20);
/// The same while there is nothing to look for.
const IDLE: Duration = Duration::from_millis(500);

/// Why an arrival failed, on this side.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArrivalError {
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Out(#[from] OutError),
    #[error("{0}")]
    Target(#[from] crate::core::target::TargetError),
    #[error("a content does not hash to the digest its source gave")]
    Digest,
    #[error("more than {} MiB of device state while pages still wait", MAX_HELD >> 20)]
    Held,
    #[error("the source's block list is not valid: {0}")]
    Blocks(#[from] crate::core::qemu::BlockListError),
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Fetch(#[from] FetchError),
}

/// Runs the arrival until the group is forgotten; everything of note is told through `shared`.
pub fn run(
    group: &Arc<TargetGroup>,
    spec: &TargetSpec,
    shared: &Arc<TargetVmShared>,
    mut journal: TargetJournal,
) {
    let wrote = journal(TargetNote::State(TargetState::Filling));
    let loader = loader::of(group, spec, shared, None);
    let mut vm = Vm::new(group, spec, shared, journal, TargetHandover::new(), loader);
    if let Err(e) = wrote {
        let steps = vm.handover.on(TargetEvent::Abort(format!("the journal cannot be written: {e}")));
        vm.carry_out(steps);
    }
    vm.meet();
    vm.until_forgotten();
}

/// After a restart of the agent: settles what the journal holds.
pub fn recover(
    group: &Arc<TargetGroup>,
    spec: &TargetSpec,
    state: TargetState,
    settled: bool,
    process: Option<Process>,
    shared: &Arc<TargetVmShared>,
    journal: TargetJournal,
) {
    let (handover, steps) = TargetHandover::recover(state);
    let loader = loader::of(group, spec, shared, process);
    let mut vm = Vm::new(group, spec, shared, journal, handover, loader);
    lock(&shared.status).reason = "the target agent was restarted".into();
    // What is settled was done before the restart; only the source may still have to hear of it.
    if vm.fetching() {
        vm.prepare_again();
    }
    vm.carry_out(if settled { vec![] } else { steps });
    vm.until_forgotten();
}

struct Vm<'a> {
    group: &'a Arc<TargetGroup>,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    journal: TargetJournal,
    handover: TargetHandover,
    list: TargetVm,
    conn: Option<TcpStream>,
    tag: Option<Tagged>,
    intake: Intake,
    sender: Sender,
    heard: Instant,
    begun: Instant,
    loader: Box<dyn Loader + 'a>,
    /// The source has named its blocks, with so many pages each.
    listed: bool,
    pages: Vec<u32>,
    post: PostCopy,
    ram_over: bool,
    held: Vec<u8>,
    looked: Instant,
    /// The number of awaited pages the source was told last.
    told: u32,
    /// How many of the `Pages` frames taken in the source was told.
    taken: u32,
    done: bool,
}

impl<'a> Vm<'a> {
    fn new(
        group: &'a Arc<TargetGroup>,
        spec: &'a TargetSpec,
        shared: &'a Arc<TargetVmShared>,
        journal: TargetJournal,
        handover: TargetHandover,
        loader: Box<dyn Loader + 'a>,
    ) -> Self {
        let now = Instant::now();
        Self {
            group,
            spec,
            shared,
            journal,
            handover,
            list: TargetVm::new(spec.vm, spec.source, MAX_WAITING),
            conn: None,
            tag: None,
            intake: Intake::new(Landing::default()),
            sender: Arc::new(Mutex::new(None)),
            heard: now,
            begun: now,
            loader,
            listed: false,
            pages: Vec::new(),
            post: PostCopy::new(),
            ram_over: false,
            held: Vec::new(),
            looked: now,
            told: 0,
            taken: 0,
            done: false,
        }
    }

    fn until_forgotten(&mut self) {
        let (mut frames, mut lowat) = (FrameBuf::new(), Lowat::default());
        loop {
            // What is left of a connection that was given up is nobody's business.
            let busy = self.conn.is_some() && frames.ready();
            if let Some(conn) = self.conn.as_ref().filter(|_| !busy) {
                lowat.wants(conn, frames.lacks());
            }
            let conn = self.conn.as_ref().filter(|_| !busy).map(AsFd::as_fd);
            let pause = if busy { Duration::ZERO } else { self.pause() };
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
                        (frames, lowat) = (FrameBuf::new(), Lowat::default());
                        self.called(conn, tag, call);
                    }
                    other => self.hear(other),
                }
            }
            if ready[0] {
                self.read(&mut frames);
            } else if self.conn.is_some() && !busy && self.heard.elapsed() > self.group.timeouts.peer {
                self.lost("the source has been silent for too long");
            }
            while self.conn.is_some() {
                match frames.next() {
                    Ok(Some(frame)) => {
                        self.heard = Instant::now();
                        match self.frame(&frame) {
                            Ok(()) => {}
                            // What it brought is asked for again on the next connection.
                            Err(e) if self.fetching() => self.fetch_disturbed(e),
                            Err(e) => self.fail(&e.to_string()),
                        }
                    }
                    Ok(None) => break,
                    Err(e) if self.fetching() => {
                        self.fetch_disturbed(e.into());
                        break;
                    }
                    Err(e) => {
                        self.fail(&e.to_string());
                        break;
                    }
                }
                // Wakes and words must not wait behind a full buffer, and no vCPU must.
                if !self.shared.inbox.is_empty() || self.post.fetch.is_some() {
                    break;
                }
            }
            self.fetch_step(ready[2], ready[3]);
            self.look();
            if self.conn.is_none()
                && self.handover.state() == TargetState::Filling
                && self.begun.elapsed() > ARRIVAL
            {
                self.fail("its source never connected");
            }
        }
    }

    /// How long may be slept while nothing is heard.
    fn pause(&self) -> Duration {
        if let Some(pause) = self.post.pause(self.group) {
            return pause;
        }
        // Until it is told otherwise, the source holds its stream back for those it was told of last.
        let looks = self.list.waiting() > 0 || self.told > 0;
        if looks { LOOK } else { IDLE }
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
            Err(e) => self.fail(&e),
        }
    }

    fn read(&mut self, frames: &mut FrameBuf) {
        let Some(conn) = &self.conn else { return };
        match frames.fill(&mut NoWait(conn)) {
            Ok(0) => self.lost("the source closed the connection"),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => self.lost(&e.to_string()),
        }
    }

    fn lost(&mut self, why: &str) {
        self.conn = None;
        self.tag = None;
        *lock(&self.sender) = None;
        tracing::info!("{}: connection to the source: {why}", self.spec.name);
        {
            let mut st = lock(&self.shared.status);
            match self.handover.state() {
                TargetState::Filling => st.reason = format!("connection to the source: {why}"),
                TargetState::Loaded => {
                    st.reason = format!("in doubt: loaded, but the source cannot be heard ({why})");
                }
                _ => {}
            }
        }
        if let Some(fetch) = &mut self.post.fetch {
            fetch.lost();
        }
        let steps = self.handover.on(TargetEvent::Lost);
        self.carry_out(steps);
    }

    /// This side cannot go on; the source keeps the VM.
    fn fail(&mut self, why: &str) {
        tracing::warn!("{}: {why}", self.spec.name);
        let steps = self.handover.on(TargetEvent::QemuFailed(why.to_owned()));
        if !steps.is_empty() {
            why.clone_into(&mut lock(&self.shared.status).reason);
        }
        self.carry_out(steps);
    }

    fn called(&mut self, conn: TcpStream, tag: Tagged, call: Call) {
        let version = match call {
            Call::Vm(v) | Call::Direct(v) => Some(v),
            Call::Settle => None,
        };
        let sending = match conn.try_clone() {
            Ok(c) => c,
            Err(e) => {
                tracing::error!("{}: {e}", self.spec.name);
                return;
            }
        };
        if version.is_some() && (self.loader.is_open() || self.handover.state() != TargetState::Filling) {
            let why = Word::Aborted("this VM has been called before; start a new group".into());
            let _ = crate::net::conn::send(&conn, Kind::Word, &why.encode(), &[]);
            return;
        }
        let _ = conn.set_read_timeout(Some(Duration::from_millis(500)));
        self.tag = Some(tag);
        self.heard = Instant::now();
        *lock(&self.sender) = Some(sending);
        if let Some(version) = version {
            match self.set_up(call) {
                Ok(()) => {
                    self.intake = Intake::new(Landing::new(self.group.windows.take(WINDOW_LOG)));
                    let slots = self.slots().map_or(0, |s| lock(s).slots());
                    let ok = HelloOk { version, window_log: self.intake.landing.window_log(), slots };
                    if let Err(e) = send_hello_ok(&conn, ok) {
                        tracing::warn!("{}: {e}", self.spec.name);
                    }
                }
                Err(why) => self.fail(&why),
            }
            self.heard = Instant::now();
        }
        self.conn = Some(conn);
        if version.is_none() && self.fetching() {
            self.say_lacks();
        }
    }

    fn slots(&self) -> Option<&'a Mutex<Slots>> {
        self.group.slots(self.spec.source, self.spec.domain)
    }

    fn set_up(&mut self, call: Call) -> Result<(), String> {
        match call {
            Call::Direct(_) => self.loader.set_up_direct(&self.sender)?,
            _ => self.loader.set_up(&self.sender)?,
        }
        self.set_phase(Phase::Filling);
        Ok(())
    }

    fn set_phase(&self, phase: Phase) {
        lock(&self.shared.status).phase = phase;
    }

    fn hear(&mut self, input: Input) {
        let event = match input {
            Input::Wake(key) => {
                if let Err(e) = self.woken(key) {
                    self.fail(&e.to_string());
                }
                return;
            }
            Input::ReturnPath(bytes) => {
                let _ = back::say(&self.sender, Kind::ReturnPath, &[], &bytes);
                return;
            }
            Input::Loaded => {
                tracing::debug!("{}: loaded", self.spec.name);
                lock(&self.shared.status).loaded_ns = unix_ns();
                if self.post.switched() { self.prepare() } else { TargetEvent::QemuLoaded }
            }
            Input::NotHere(peer, digests) => {
                if let Some(fetch) = &mut self.post.fetch {
                    fetch.not_here(peer, &digests);
                }
                return;
            }
            Input::Demand(conn, frames, tag) => {
                self.demand(conn, *frames, tag);
                return;
            }
            Input::Stream(conn, tag, version) => {
                if let Err(e) = self.loader.take_stream(conn, tag, version) {
                    self.fail(&e);
                }
                return;
            }
            Input::LoadFailed(why) => {
                if matches!(self.handover.state(), TargetState::Filling | TargetState::Loaded) {
                    why.clone_into(&mut lock(&self.shared.status).reason);
                }
                TargetEvent::QemuFailed(why)
            }
            Input::Abort(why) => {
                if self.handover.state() == TargetState::Filling {
                    why.clone_into(&mut lock(&self.shared.status).reason);
                }
                TargetEvent::Abort(why)
            }
            Input::Settle(Decision::Target) => {
                self.still_alive();
                // Also one that lacks pages which nobody has any more.
                if self.fetching() { TargetEvent::Decided } else { TargetEvent::Word(Word::GivenUp) }
            }
            Input::Settle(Decision::Source) => {
                TargetEvent::Word(Word::Aborted("settled by an operator: the source's copy is the VM".into()))
            }
            Input::Called(..) | Input::Forget => return,
        };
        let steps = self.handover.on(event);
        self.carry_out(steps);
    }

    fn carry_out(&mut self, steps: Vec<TargetStep>) {
        for step in steps {
            match step {
                TargetStep::Write(state) => {
                    if let Err(e) = (self.journal)(TargetNote::State(state)) {
                        tracing::error!("{}: {e}", self.spec.name);
                        if matches!(state, TargetState::Loaded | TargetState::Running) {
                            // Not written down, so not said and not done. Running stays undone too: the source
                            // repeats its word when it hears nothing.
                            self.unwritten(state, &e);
                            return;
                        }
                    }
                }
                TargetStep::Say(word) => {
                    if let Err(e) = back::say(&self.sender, Kind::Word, &word.encode(), &[]) {
                        tracing::debug!("{}: {e}", self.spec.name);
                    }
                }
                TargetStep::Run => self.run_vm(),
                TargetStep::EndStream => self.loader.end_stream(),
                TargetStep::Discard => self.discard(),
                TargetStep::Finish => self.finish(),
            }
        }
        self.publish();
    }

    fn unwritten(&mut self, state: TargetState, why: &str) {
        let why = format!("the journal cannot be written: {why}");
        if state == TargetState::Loaded {
            self.handover = TargetHandover::new();
            self.fail(&why);
        } else {
            self.handover = TargetHandover::recover(TargetState::Loaded).0;
            lock(&self.shared.status).reason = why;
            self.publish();
        }
    }

    fn publish(&self) {
        let mut st = lock(&self.shared.status);
        st.stats = self.list.stats;
        st.waiting = match &self.post.fetch {
            Some(fetch) => fetch.lacking(),
            None => self.list.waiting() as u64,
        };
        st.phase = match self.handover.state() {
            TargetState::Filling => return,
            TargetState::Loaded | TargetState::Ready if self.handover.in_doubt() => Phase::InDoubt,
            TargetState::Loaded | TargetState::Ready => Phase::Loaded,
            TargetState::Fetching => Phase::Fetching,
            TargetState::Running | TargetState::Filled => Phase::Running,
            TargetState::Discarded => Phase::Discarded,
        };
        if st.phase == Phase::Running && st.running_ns > 0 {
            st.reason.clear();
        }
    }

    fn run_vm(&mut self) {
        {
            let mut st = lock(&self.shared.status);
            if st.ready_ns == 0 {
                st.ready_ns = unix_ns();
            }
        }
        if self.group.leave_paused {
            self.settled();
            return;
        }
        for attempt in 0..20 {
            match self.loader.run() {
                Ok(()) => {
                    lock(&self.shared.status).running_ns = unix_ns();
                    self.settled();
                    return;
                }
                Err(e) => {
                    tracing::error!("{}: continue (attempt {attempt}): {e}", self.spec.name);
                    lock(&self.shared.status).reason =
                        format!("this is the VM, but it cannot be continued: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn settled(&mut self) {
        if self.fetching() {
            // Much is left to do.
            return;
        }
        if let Err(e) = (self.journal)(TargetNote::Settled) {
            tracing::warn!("{}: {e}; after a restart the VM may be continued once more", self.spec.name);
        }
    }

    /// Ends what waits for the VM, which must never have run.
    fn discard(&mut self) {
        if let Err(e) = self.loader.discard() {
            // Mostly because it has ended by itself: QEMU exits when an incoming migration fails.
            tracing::debug!("{}: discarding what waited for it: {e}", self.spec.name);
        }
    }

    /// The arrival is over: what it held is freed; words are still answered.
    fn finish(&mut self) {
        if self.done {
            return;
        }
        self.done = true;
        self.fetch_over();
        let pass = self.list.leave(&mut lock(&self.group.host));
        for (digest, rest) in pass {
            contents::pass_on(self.group, digest, &rest, self.spec.domain);
        }
        self.intake = Intake::new(Landing::default());
        self.loader.close();
        self.held = Vec::new();
    }
}

#[cfg(test)]
mod tests;
