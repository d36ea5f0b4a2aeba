//! A group moved by plain QEMU (`oc`, `qemu-multifd-zstd`): the agents only drive the monitors, so that a comparison
//! measures the pages' way and nothing else.
//!
//! Who owns a VM: its source's QEMU, until it has completed; it does so only when the target's has loaded everything,
//! and never runs again by itself. Both agents write down what they do from there on before they do it, so that a
//! restarted one goes on with it. Nothing is quit here: a target whose stream breaks ends by itself, and one to which
//! nothing came goes on waiting.

// One VM's arrival.
mod arrive;
// One VM's departure.
mod depart;

use super::{Group, GroupSpec, Incoming, Phase, Role, Shared, StartPart, VmStatus, blank, put, record};
use crate::control::api::Refusal;
use crate::control::journal::{JournalError, JournalState, VmRecord};
use crate::control::plain::{self, Kept, PlainError};
use crate::control::recipe::Recipe;
use crate::core::account::Proof;
use crate::core::handover::GuestState;
use crate::flow::front::restorer;
use crate::flow::{Front, lock};
use crate::host::sched::{Process, peer_pid};
use crate::net::connection::Security;
use crate::net::qmp::{MigrateInfo, Qmp, QmpError};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a target that has been released may take to say that it runs.
const RELEASE: Duration = Duration::from_secs(20);
/// Pause between tries of what must be done at last.
const AGAIN: Duration = Duration::from_millis(500);
/// How long a monitor may take to answer when settings are put back later.
const LATER: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Plain {
    sides: Vec<Arc<Side>>,
    multifd: bool,
    rate: Arc<Rate>,
    spec: Arc<GroupSpec>,
}

/// What all departures of a group may put on the wire, divided equally among those under way.
#[derive(Debug, Default)]
struct Rate {
    /// Bytes a second; 0: no limit.
    all: AtomicU64,
    running: AtomicU64,
}

impl Rate {
    /// One departure's part, bytes of QEMU's stream a second; none: no limit.
    fn part(&self) -> Option<u64> {
        let all = self.all.load(Ordering::Relaxed);
        // 1448 of 1514 bytes on the wire are QEMU's.
        (all > 0).then(|| (all / 1000 * 956 / self.running.load(Ordering::Relaxed).max(1)).max(4096))
    }
}

/// A departure counts as under way while this lives.
struct Running<'a>(&'a Rate);

impl<'a> Running<'a> {
    fn new(rate: &'a Rate) -> Self {
        rate.running.fetch_add(1, Ordering::Relaxed);
        Self(rate)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One VM, one role.
#[derive(Debug)]
struct Side {
    vm: super::super::api::VmSpec,
    role: Role,
    status: Mutex<VmStatus>,
    cancel: AtomicBool,
    /// The group is dropped: nobody asks any more.
    forgotten: AtomicBool,
    /// Target: the source has let go of it, and its owner had it so.
    released: Mutex<Option<GuestState>>,
    /// Target: the monitor, between listening and watching.
    qmp: Mutex<Option<Qmp>>,
    /// The QEMU that all this is about; no later one at that path is taken for it.
    process: Mutex<Option<Process>>,
    /// Its settings as they were found.
    kept: Mutex<Option<Kept>>,
}

impl Side {
    fn new(v: &super::super::api::VmSpec, role: Role) -> Self {
        Self {
            vm: v.clone(),
            role,
            status: Mutex::new(VmStatus {
                verified: Some(Proof::NotInPath),
                ..blank(v, role, Phase::Prepared)
            }),
            cancel: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
            released: Mutex::default(),
            qmp: Mutex::default(),
            process: Mutex::default(),
            kept: Mutex::default(),
        }
    }
    fn set(&self, change: impl FnOnce(&mut VmStatus)) {
        change(&mut lock(&self.status));
    }
    fn fail(&self, why: &str) {
        self.set(|s| {
            s.phase = Phase::Failed;
            s.error = Some(why.to_owned());
        });
    }
    /// Nobody can say yet; it is tried again.
    fn in_doubt(&self, why: &str) {
        self.set(|s| {
            s.phase = Phase::InDoubt;
            s.error = Some(format!("in doubt: {why}"));
        });
    }
    fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Acquire)
    }
    fn progress(&self, i: &MigrateInfo) {
        self.set(|s| {
            s.wire_bytes = i.transferred;
            s.stream_bytes = i.transferred;
            s.ram_total = i.ram_total;
            s.ram_remaining = i.ram_remaining;
            s.pages.uniform = i.zero_pages;
            s.pages.unique = i.normal_pages;
        });
    }

    /// The monitor of the one QEMU that this side is about.
    fn connect(&self, setup: Duration) -> Result<Qmp, PlainError> {
        let qmp = Qmp::connect(self.front().socket(), setup)?;
        let process = peer_pid(&qmp).ok().flatten().and_then(|pid| Process::of(pid).ok());
        let mut known = lock(&self.process);
        if known.is_some() && *known != process {
            let path = qmp.path().display().to_string();
            let what = "another QEMU than before listens here".to_owned();
            return Err(PlainError::NotReady { path, what });
        }
        *known = process;
        Ok(qmp)
    }

    /// What its QEMU says of itself now; before an end is told, because nobody asks again after it.
    fn look(&self, qmp: &mut Option<Qmp>, setup: Duration) {
        let asked = self.at_monitor(qmp, setup, |q| Ok(q.query_status()?));
        let state = match asked {
            Ok(s) => s.status,
            Err(_) if self.is_gone() => "ended".to_owned(),
            Err(_) => return,
        };
        self.set(|s| s.state = state);
    }

    /// Whether its QEMU has certainly ended.
    fn is_gone(&self) -> bool {
        lock(&self.process).is_some_and(Process::is_gone)
    }

    /// Does something at the monitor, over a new connection if there is none.
    fn at_monitor<T>(
        &self,
        qmp: &mut Option<Qmp>,
        setup: Duration,
        act: impl FnOnce(&mut Qmp) -> Result<T, PlainError>,
    ) -> Result<T, PlainError> {
        let mut open = match qmp.take() {
            Some(open) => open,
            None => self.connect(setup)?,
        };
        let done = act(&mut open);
        // After anything but a plain no, what comes next may be an answer to something else.
        if !matches!(&done, Err(PlainError::Qmp(e)) if !matches!(e, QmpError::Refused { .. })) {
            *qmp = Some(open);
        }
        done
    }

    /// Puts the settings back that were found; later, if somebody's own migration is in the way now.
    fn put_back(&self, qmp: &mut Option<Qmp>, setup: Duration) {
        let Some(kept) = lock(&self.kept).take() else { return };
        match self.at_monitor(qmp, setup, |q| Ok(kept.restore(q)?)) {
            Err(e) if !self.is_gone() => {
                tracing::warn!(
                    "{}: its migration settings are not as they were: {e}; it is tried again",
                    self.vm.name
                );
                restorer::later(self.front().socket(), setup.max(LATER), *lock(&self.process), kept.0);
            }
            _ => {}
        }
    }

    /// A first try of that, as soon as its QEMU may take them.
    fn put_back_early(&self, qmp: &mut Qmp) {
        let Some(kept) = lock(&self.kept).clone() else { return };
        match kept.restore(qmp) {
            Ok(()) => *lock(&self.kept) = None,
            Err(e) => tracing::debug!("{}: {e}", self.vm.name),
        }
    }

    /// Who runs the VM at this side.
    fn front(&self) -> &Front {
        if self.role == Role::Source { &self.vm.source_front } else { &self.vm.target_front }
    }

    /// The settings of its QEMU as they were before anybody of this program changed them.
    fn found(&self, qmp: &mut Qmp) -> Result<Kept, QmpError> {
        let mut found = Kept::of(qmp)?;
        if let Some(before) = restorer::take(self.front().socket(), *lock(&self.process)) {
            found.0.after(before);
        }
        Ok(found)
    }

    /// Nothing came to it, and no thread attends to it: it goes on waiting as it was found.
    fn leave_waiting(&self) {
        let mut qmp = lock(&self.qmp).take();
        if qmp.is_some() {
            self.put_back(&mut qmp, Duration::ZERO);
        }
    }
}

/// Writes a record with a new state, durably, before it returns.
type Write = Box<dyn FnMut(&mut VmRecord, JournalState) -> Result<(), JournalError> + Send>;

/// A side's record, and who writes it.
struct Note {
    record: VmRecord,
    put: Write,
    /// How long a monitor may take to be reached.
    setup: Duration,
    /// How the target's agent is called.
    security: Security,
}

impl Note {
    fn new(shared: &Arc<Shared>, record: VmRecord) -> Self {
        let (setup, security, shared) = (shared.timeouts.setup, shared.security.clone(), shared.clone());
        Self { record, setup, security, put: Box::new(move |record, state| put(&shared, record, state)) }
    }

    fn of(shared: &Arc<Shared>, spec: &GroupSpec, side: &Side, leave_paused: bool) -> Option<Self> {
        let peer = match side.role {
            Role::Source => spec.targets.get(usize::from(side.vm.target))?.agent,
            Role::Target => spec.sources.get(usize::from(side.vm.source))?.agent,
        };
        Some(Self::new(shared, record(spec, &side.vm, side.role, peer, leave_paused)))
    }

    /// Writes it down; on return it is on disk, or the group is forgotten: then nothing is to follow.
    fn write(&mut self, side: &Side, state: JournalState, settled: bool) -> bool {
        self.record.process = *lock(&side.process);
        (self.record.settled, self.record.begun) = (settled, true);
        if let Some(kept) = &*lock(&side.kept) {
            self.record.settings = Some(kept.0.clone());
        }
        while let Err(e) = (self.put)(&mut self.record, state) {
            side.in_doubt(&format!("it cannot be written down: {e}"));
            if side.is_forgotten() {
                return false;
            }
            std::thread::sleep(AGAIN);
        }
        true
    }

    /// Writes down how it ended. Without that a restarted agent looks at its QEMU and finds the same.
    fn try_write(&mut self, side: &Side, state: JournalState) {
        (self.record.process, self.record.settled) = (*lock(&side.process), true);
        if let Err(e) = (self.put)(&mut self.record, state) {
            tracing::warn!("{}: {e}", side.vm.name);
        }
    }

    fn guest(&self) -> GuestState {
        self.record.guest
    }

    /// Writes down how the VM was left in the middle of its move, if that is news. What cannot be written is news again.
    fn left_as(&mut self, side: &Side, guest: GuestState) {
        if guest == self.record.guest {
            return;
        }
        let before = std::mem::replace(&mut self.record.guest, guest);
        if let Err(e) = (self.put)(&mut self.record, JournalState::Started) {
            tracing::debug!("{}: {e}", side.vm.name);
            self.record.guest = before;
        }
    }
}

impl Plain {
    pub(super) fn new(spec: &GroupSpec) -> Self {
        let mut sides = Vec::new();
        for v in &spec.vms {
            for (role, mine) in [
                (Role::Source, spec.my_source == Some(v.source)),
                (Role::Target, spec.my_target == Some(v.target)),
            ] {
                if mine {
                    sides.push(Arc::new(Side::new(v, role)));
                }
            }
        }
        let multifd = spec.recipe == Recipe::Plain { multifd: true };
        Self { sides, multifd, rate: Arc::default(), spec: Arc::new(spec.clone()) }
    }

    /// After a restart: goes on with what was written down.
    pub(super) fn recover(
        shared: &Arc<Shared>,
        spec: &GroupSpec,
        records: &[VmRecord],
    ) -> std::io::Result<Self> {
        let plain = Self::new(spec);
        for rec in records {
            let Some(side) = plain.sides.iter().find(|s| s.vm.ix == rec.ix && s.role == rec.role) else {
                continue;
            };
            *lock(&side.process) = rec.process;
            *lock(&side.kept) = rec.settings.clone().map(Kept);
            let phase = match rec.state {
                JournalState::Done => Phase::Done,
                JournalState::Running if rec.leave_paused || !rec.guest.runs() => Phase::LeftPaused,
                JournalState::Running => Phase::Running,
                JournalState::Aborted | JournalState::Discarded => Phase::Failed,
                _ => Phase::InDoubt,
            };
            side.set(|s| s.phase = phase);
            if rec.settled {
                continue;
            }
            side.in_doubt("the agent was restarted");
            let (note, side) = (Note::new(shared, rec.clone()), side.clone());
            let spec = plain.spec.clone();
            let rate = plain.rate.clone();
            match rec.role {
                Role::Source if rec.state == JournalState::Started => {
                    spawn(move || depart::again(&spec, &side, note, &rate))
                }
                Role::Source if rec.state == JournalState::GaveUp => {
                    spawn(move || depart::release(&spec, &side, note, None, None))
                }
                Role::Target => spawn(move || arrive::arrive(&side, note)),
                Role::Source => Ok(()),
            }?;
        }
        Ok(plain)
    }

    /// Most that all departures together put on the wire, bytes a second; none: no limit.
    pub(super) fn set_rate(&self, rate: Option<u64>) {
        self.rate.all.store(rate.map_or(0, |r| r.max(1)), Ordering::Relaxed);
    }

    pub(super) fn prepare(&self, shared: &Arc<Shared>, group: &Arc<Group>) -> Result<(), Refusal> {
        let prepared = self.sides.iter().try_for_each(|side| {
            let at = |e: PlainError| Refusal::failed(format!("{}: {e}", side.vm.name));
            let mut qmp = side.connect(shared.timeouts.setup).map_err(at)?;
            if side.role == Role::Source {
                return plain::look(&mut qmp).map(drop).map_err(at);
            }
            *lock(&side.kept) = Some(side.found(&mut qmp).map_err(|e| at(e.into()))?);
            let listens = plain::listen(&mut qmp, self.multifd, shared.config.data.ip());
            *lock(&side.qmp) = Some(qmp);
            lock(&group.prepare).incoming.push(Incoming { vm: side.vm.ix, addr: listens.map_err(at)? });
            Ok(())
        });
        if prepared.is_err() {
            self.sides.iter().for_each(|s| s.leave_waiting());
        }
        prepared
    }

    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        leave_paused: bool,
        incoming: &[Incoming],
        part: StartPart,
    ) -> Result<(), Refusal> {
        let failed = |side: &Side, why: &str| Refusal::failed(format!("{}: {why}", side.vm.name));
        let mut sources = Vec::new();
        for side in &self.sides {
            let note = Note::of(shared, &self.spec, side, leave_paused);
            let note = note.ok_or_else(|| failed(side, "its other host is not of the group"))?;
            match side.role {
                Role::Source if part.sources() => {
                    let to = incoming
                        .iter()
                        .find(|i| i.vm == side.vm.ix)
                        .ok_or_else(|| failed(side, "nobody said where its target listens"))?;
                    sources.push((side.clone(), to.addr, note));
                }
                Role::Target if part.targets() => {
                    let own = side.clone();
                    if let Err(e) = spawn(move || arrive::arrive(&own, note)) {
                        side.fail(&e.to_string());
                    }
                }
                _ => {}
            }
        }
        let (spec, multifd, rate) = (self.spec.clone(), self.multifd, self.rate.clone());
        spawn(move || {
            let places = usize::from(spec.parallel.unwrap_or(u16::MAX)).max(1);
            let mut begun: Vec<Arc<Side>> = Vec::new();
            for (side, to, note) in sources {
                let busy =
                    |b: &Vec<Arc<Side>>| b.iter().filter(|s| !lock(&s.status).phase.is_final()).count();
                while busy(&begun) >= places && !side.cancel.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let (spec, own, rate) = (spec.clone(), side.clone(), rate.clone());
                begun.push(side.clone());
                let leave = move || depart::depart(&spec, &own, note, (multifd, to), &rate);
                if let Err(e) = spawn(leave) {
                    side.fail(&format!("it did not begin to leave: {e}"));
                }
            }
        })
        .map_err(Refusal::failed)
    }

    pub(super) fn cancel(&self) {
        for s in &self.sides {
            s.cancel.store(true, Ordering::Release);
            // Those that no thread attends to.
            s.leave_waiting();
        }
    }

    pub(super) fn released(&self, vm: u16, guest: GuestState) -> Result<(), Refusal> {
        let side = self
            .sides
            .iter()
            .find(|s| s.role == Role::Target && s.vm.ix == vm)
            .ok_or_else(|| Refusal::failed(format!("VM number {vm} does not arrive here")))?;
        let refused = |why: &str| Refusal::failed(format!("{}: its target says: {why}", side.vm.name));
        lock(&side.released).get_or_insert(guest);
        let until = Instant::now() + RELEASE;
        let mut said = None;
        while Instant::now() < until {
            let st = lock(&side.status).clone();
            match st.phase {
                Phase::Running | Phase::LeftPaused => return Ok(()),
                Phase::Failed | Phase::Cancelled | Phase::Lost => {
                    return Err(refused(st.error.as_deref().unwrap_or(st.phase.name())));
                }
                _ => said = st.error,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(refused(said.as_deref().unwrap_or("it has not loaded it yet")))
    }

    pub(super) fn vms(&self, _: &Group) -> Vec<VmStatus> {
        self.sides.iter().map(|s| lock(&s.status).clone()).collect()
    }
}

impl Drop for Plain {
    /// The group is forgotten.
    fn drop(&mut self) {
        for s in &self.sides {
            s.forgotten.store(true, Ordering::Release);
            s.leave_waiting();
        }
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let begun = std::thread::Builder::new().name("irlm-plain".into()).spawn(run);
    begun.map(drop).map_err(|e| std::io::Error::new(e.kind(), format!("no thread: {e}")))
}

#[cfg(test)]
mod tests;
