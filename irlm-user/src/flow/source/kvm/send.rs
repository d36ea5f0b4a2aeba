//! Pages of a running VM into frames, round by round, then the last round and the VM's state.
//!
//! The order that keeps digests honest: a window of pages is *read*, then the log is harvested, and a page that this
//! harvest does not name is what its digest says (`core::kept`). A page that it names is not sent now at all: what was
//! read may be half of a write, and its newer version is on the list already.
//!
//! Bounds: one window of [`WINDOW`] pages is read at a time (1 MiB); the state is at most what the VMM's client takes.

use super::super::batch::{Batch, Leave};
use super::super::book::Book;
use super::super::out::Out;
use super::super::runner::{PumpError, Ready, Saw};
use super::super::tap::{Audit, to_wire};
use super::super::{Input, Says, SourceGroup, SourceSpec, SourceVmShared};
use super::guest::{Guest, Known};
use super::serve::Serving;
use crate::core::account::Tally;
use crate::core::digest::{Digest, Hasher, uniform};
use crate::core::migration::Migration;
use crate::core::page_set::{PageSet, Run};
use crate::core::precopy::{Limits, MAX_ROUNDS, Precopy, Step, WireRate};
use crate::core::source::{BlockInfo, Leaving, SourceVm};
use crate::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageBytes};
use crate::core::vm_state;
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::MAX_BODY;
use crate::core::wire::pages::{Form, PagesBuilder};
use crate::core::wire::paging::encode_set;
use crate::flow::{MoveError, lock, now, unix_ns};
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pages read, and covered by one harvest, at a time.
const WINDOW: usize = 256;
/// Pages of the filling read and sent at a time, so that what is asked for meanwhile never is among many.
const FILL: usize = 64;
/// Pages looked at in one step for whether they can leave by name: their references fit into one frame.
const NAMES: usize = 1024;
const FIRST: PageAddr = PageAddr { block: BlockIx(0), page: 0 };
const ZERO: PageBytes = [0; PAGE_SIZE];

/// Where a departure stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Nothing has been sent.
    Begin,
    /// The VM runs.
    Rounds,
    /// It is stopped; what is left of its pages.
    Last,
    /// Its state.
    State,
    /// All is out.
    Over,
    /// Post-copy: it runs at its target, which lacks pages.
    Filling,
}

/// Post-copy's part of a departure.
struct Later {
    /// Since the switch.
    serving: Option<Arc<Serving>>,
    /// The target may not know any more what it was sent: only contents are any good.
    plain: bool,
    /// What was written of late, which goes first.
    recent: Option<PageSet>,
    /// What was no hole before the VM was stopped.
    data_before: Option<PageSet>,
    /// How far it has been looked for pages whose contents the target has, or is promised, by name.
    names: Option<PageAddr>,
    hold: Duration,
    hold_until: Instant,
}

/// The pages at hand, in buffers that are used again.
struct AtHand {
    frame: PagesBuilder,
    plan: Leave,
    buf: Vec<u8>,
    picked: Vec<PageAddr>,
    /// Picked pages that are no holes.
    data: Vec<PageAddr>,
    known: Vec<Known>,
    digests: Vec<Option<Digest>>,
    /// The next pages of a block that are no holes, as far as it was looked.
    ahead: Option<(usize, Range<u32>)>,
}

/// State still to be sent, and how much of it has been.
#[derive(Default)]
struct StateOut {
    bytes: Vec<u8>,
    sent: usize,
}

/// What sends one VM.
pub(super) struct Sender {
    guest: Arc<Guest>,
    name: String,
    target: HostIx,
    shared: Arc<SourceVmShared>,
    vm: SourceVm,
    /// In the drill: digests that are kept are proven by it.
    prove: Option<Hasher>,
    audit: Option<Audit>,
    /// Of what leaves while the target may not run it.
    book: Book,
    rounds: Precopy,
    rate: WireRate,
    migration: Migration,
    later: Later,
    stage: Stage,
    at_hand: AtHand,
    state: StateOut,
}

impl Sender {
    pub(super) fn new(
        group: &SourceGroup,
        spec: &SourceSpec,
        shared: &Arc<SourceVmShared>,
        guest: Arc<Guest>,
    ) -> Self {
        let limits = Limits { downtime: group.options.downtime_ms as f64 / 1e3, rounds: MAX_ROUNDS };
        let hasher = group.hashers[usize::from(spec.domain)].clone();
        let blocks = vec![BlockInfo::new(true); guest.pages().len()];
        let mut book = Book::new(group.marker(spec));
        book.begin(guest.pages().iter().copied());
        Self {
            rounds: Precopy::new(guest.pages(), limits),
            vm: SourceVm::new(hasher.clone(), blocks),
            name: spec.name.clone(),
            target: spec.target,
            shared: shared.clone(),
            prove: group.options.drill.prove_digests.then_some(hasher),
            audit: group.audit(spec).map(Audit::new),
            book,
            rate: WireRate::default(),
            migration: group.options.migration,
            later: Later {
                serving: None,
                plain: false,
                recent: (group.options.migration == Migration::PostCopy)
                    .then(|| PageSet::empty(guest.pages())),
                data_before: None,
                names: Some(FIRST),
                hold: Duration::from_millis(group.options.drill.hold_filling_ms),
                hold_until: Instant::now(),
            },
            stage: Stage::Begin,
            at_hand: AtHand {
                frame: PagesBuilder::default(),
                plan: Leave::default(),
                buf: vec![0; WINDOW * PAGE_SIZE],
                picked: Vec::with_capacity(WINDOW),
                data: Vec::with_capacity(WINDOW),
                known: Vec::with_capacity(WINDOW),
                digests: Vec::new(),
                ahead: None,
            },
            state: StateOut::default(),
            guest,
        }
    }

    pub(super) fn vm(&mut self) -> &mut SourceVm {
        &mut self.vm
    }

    /// What the pages come to that were sent, once all were that the target must have before it may run the VM.
    pub(super) fn tally(&self) -> Option<Tally> {
        self.book.tally()
    }

    pub(super) fn ready(&self) -> Ready<'static> {
        let at = Instant::now();
        match self.stage {
            Stage::Over => Ready::Never,
            Stage::Filling => match &self.later.serving {
                Some(s) if s.must_answer() => Ready::At(at),
                Some(s) if s.left() > 0 => Ready::At(at.max(self.later.hold_until)),
                _ => Ready::Never,
            },
            Stage::Rounds if self.switches() => Ready::At(at),
            Stage::Rounds => match self.rounds.step(now()) {
                Step::Wait(until) => Ready::At(at + Duration::from_nanos(until.0.saturating_sub(now().0))),
                _ => Ready::At(at),
            },
            _ => Ready::At(at),
        }
    }

    /// One step. `may_stop`: the target is not waiting for much.
    pub(super) fn pump(&mut self, out: &mut Out<'_>, may_stop: bool) -> Result<Saw, PumpError> {
        match self.stage {
            Stage::Begin => self.begin(out)?,
            Stage::Rounds if self.switches() => {
                self.switch(out)?;
                return Ok(Saw { stopped: true, switched: true, ..Saw::default() });
            }
            Stage::Rounds => match self.rounds.step(now()) {
                Step::Send => self.window(out, true)?,
                Step::Harvest => {
                    self.guest.harvest()?;
                    self.hear_written();
                    let rate = self.rate.measure(now(), self.shared.wire_bytes.load(Ordering::Relaxed));
                    self.rounds.harvested(now(), rate, may_stop);
                    self.vm.stats.held = self.rounds.held();
                }
                Step::Stop => {
                    self.stop(out)?;
                    return Ok(Saw { stopped: true, ..Saw::default() });
                }
                Step::Wait(_) | Step::Over => {}
            },
            Stage::Last => match self.rounds.step(now()) {
                Step::Send => self.window(out, false)?,
                _ => self.end_ram(out)?,
            },
            Stage::State => self.send_state(out)?,
            Stage::Filling => self.fill(out)?,
            Stage::Over => {}
        }
        Ok(Saw::default())
    }

    fn begin(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        out.send(Kind::Blocks, &to_wire(self.guest.blocks()).encode(), &[]).map_err(PumpError::Send)?;
        // What was written before the first page is read is read anyway.
        self.guest.harvest()?;
        let recent = &mut self.later.recent;
        self.guest.take_written(|block, bits| {
            if let Some(recent) = recent {
                recent.merge(block, bits);
            }
        });
        // While the guest still runs, because it takes the longer the more memory there is; what it writes from here on the log
        // names.
        self.later.data_before = self.later.recent.is_some().then(|| self.data());
        self.stage = Stage::Rounds;
        Ok(())
    }

    fn hear_written(&mut self) {
        let (rounds, recent) = (&mut self.rounds, &mut self.later.recent);
        self.guest.take_written(|block, bits| {
            rounds.written(block, bits);
            if let Some(recent) = recent {
                recent.merge(block, bits);
            }
        });
    }

    fn stop(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        let (round, left) = (self.rounds.round(), self.rounds.remaining());
        if self.rounds.gave_in() {
            tracing::warn!(
                "{}: stopped after {round} rounds with {left} pages left: it writes as fast as the link is",
                self.name
            );
        }
        self.pause()?;
        self.rounds.stopped();
        tracing::debug!("{}: stopped in round {round}, {} pages left", self.name, self.rounds.remaining());
        self.stage = Stage::Last;
        out.send(Kind::Stopped, &[], &[]).map_err(PumpError::Send)
    }

    /// Stops the VM, and hears the last of what it wrote.
    fn pause(&mut self) -> Result<(), PumpError> {
        // The downtime begins before the last vCPU stands still.
        let at = unix_ns();
        self.guest.pause()?;
        // Its owner may have stopped it since the move began.
        self.shared.inbox.post(Input::Qemu(Says::Guest(self.guest.by_owner())));
        self.shared.inbox.post(Input::Qemu(Says::Stopped(at)));
        self.guest.harvest()?;
        self.hear_written();
        Ok(())
    }

    /// Whether the VM is to be stopped now, and what is left of it sent while it runs at its target.
    fn switches(&self) -> bool {
        match self.migration {
            Migration::PreCopy => false,
            Migration::PostCopy => true,
            Migration::Hybrid => !self.rounds.first_round() || self.rounds.step(now()) == Step::Stop,
        }
    }

    fn switch(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        self.pause()?;
        let mut due = self.rounds.take_all();
        if let (Some(mut data), Some(recent)) = (self.later.data_before.take(), &self.later.recent) {
            // Nothing has been sent, and so the target has zeros everywhere.
            data.merge_all(recent);
            due = data;
        }
        tracing::debug!("{}: switched, {} pages left", self.name, due.len());
        out.send(Kind::Stopped, &[], &[]).map_err(PumpError::Send)?;
        for meta in encode_set(&due) {
            out.send(Kind::Switch, &meta, &[]).map_err(PumpError::Send)?;
        }
        self.audit(&due)?;
        self.book.end(Some(&due));
        let ram = self.guest.ram().clone();
        let serving = Serving::new(&self.name, self.guest.pages(), ram, due);
        if let Some(recent) = self.later.recent.take() {
            serving.begin_with(recent.iter());
        }
        self.later.serving = Some(Arc::new(serving));
        self.state.bytes = vm_state::wrap(&self.guest.save()?);
        self.stage = Stage::State;
        Ok(())
    }

    /// Pages that are no holes of the memory files.
    fn data(&self) -> PageSet {
        let mut out = PageSet::empty(self.guest.pages());
        for (block, ix) in (0..self.guest.pages().len()).zip(0u16..) {
            for r in self.guest.ram().data_ranges(block) {
                let addr = PageAddr { block: BlockIx(ix), page: r.start };
                out.insert_run(Run { addr, count: r.end - r.start });
            }
        }
        out
    }

    /// Writes down what the target has and what it will get.
    fn audit(&mut self, due: &PageSet) -> Result<(), PumpError> {
        let Some(audit) = &mut self.audit else { return Ok(()) };
        for addr in due.iter() {
            let mut page = ZERO;
            self.guest
                .ram()
                .read_at(usize::from(addr.block.0), addr.page, &mut page)
                .map_err(MoveError::memory)?;
            audit.saw(addr, &page);
        }
        self.write_audit();
        Ok(())
    }

    fn write_audit(&self) {
        if let Some(a) = &self.audit
            && let Err(e) = a.write(self.guest.blocks())
        {
            tracing::error!("audit: {}: {e}", a.file.display());
        }
    }

    /// Post-copy: the VM is the target's.
    pub(super) fn serve(&mut self) -> Arc<Serving> {
        self.stage = Stage::Filling;
        self.later.hold_until = Instant::now() + self.later.hold;
        self.at_hand.plan.list_named();
        let new = || {
            // There was an agent before this one, and the target will say what it lacks.
            self.later.plain = true;
            let none = PageSet::empty(self.guest.pages());
            Arc::new(Serving::new(&self.name, self.guest.pages(), self.guest.ram().clone(), none))
        };
        self.later.serving.get_or_insert_with(new).clone()
    }

    /// Post-copy, after a lost connection.
    pub(super) fn resume(&mut self, lacks: PageSet) {
        self.later.plain = true;
        if let Some(s) = &self.later.serving {
            s.resume(lacks);
        }
    }

    /// Sends some of what the target lacks; first what it asks for, if there is no other connection for that.
    fn fill(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        let Some(serving) = self.later.serving.clone() else { return Ok(()) };
        let mut picked = std::mem::take(&mut self.at_hand.picked);
        picked.clear();
        let wanted = serving.must_answer();
        if wanted {
            serving.take_wanted(&mut picked);
        } else if let Some(from) = self.later.names.filter(|_| !self.later.plain) {
            let result = self.by_name(out, &serving, from, &mut picked);
            self.at_hand.picked = picked;
            return result;
        } else {
            serving.take_filling(FILL, &mut picked);
        }
        let result = if wanted || self.later.plain {
            self.vm.stats.unique += picked.len() as u64;
            self.fill_plain(out, &serving, &picked)
        } else {
            self.fill_from(out, &picked)
        };
        serving.left_by_name(&self.at_hand.plan.named().collect::<Vec<_>>());
        self.vm.stats.demanded = serving.answered();
        self.at_hand.picked = picked;
        result
    }

    /// Before any content leaves: pages whose contents the target has, or is promised, under a digest that is still kept. They
    /// take some bytes each, and need not be read.
    fn by_name(
        &mut self,
        out: &mut Out<'_>,
        serving: &Serving,
        from: PageAddr,
        picked: &mut Vec<PageAddr>,
    ) -> Result<(), PumpError> {
        self.later.names = serving.peek(from, NAMES, picked);
        self.guest.kept(picked, &mut self.at_hand.digests);
        self.at_hand.frame.clear();
        let table = &out.group.tables[usize::from(self.target.0)];
        let mut named = Vec::new();
        {
            let mut table = lock(table);
            for (addr, digest) in picked.iter().zip(&self.at_hand.digests) {
                if let Some(digest) = digest.filter(|d| table.id_of(d).is_some()) {
                    let leaving = self.vm.known(digest);
                    // It has an id, so that it never is content.
                    self.vm.decide(&mut table, leaving).put(*addr, Form::Whole, &mut self.at_hand.frame);
                    named.push(*addr);
                }
            }
        }
        if named.is_empty() {
            return Ok(());
        }
        self.prove_all(&named)?;
        serving.by_name(&named);
        self.at_hand.plan.count_frame();
        out.send(Kind::Pages, self.at_hand.frame.meta(), &[]).map_err(PumpError::Send)
    }

    /// In the drill: pages that leave by a kept digest have it.
    fn prove_all(&self, named: &[PageAddr]) -> Result<(), PumpError> {
        let Some(hasher) = &self.prove else { return Ok(()) };
        for addr in named {
            let mut page = ZERO;
            let read = self.guest.ram().read_at(usize::from(addr.block.0), addr.page, &mut page);
            read.map_err(MoveError::memory)?;
            let mut digest = Vec::new();
            self.guest.kept(std::slice::from_ref(addr), &mut digest);
            if digest.first() != Some(&Some(hasher.page(&page))) {
                return Err(stale(*addr));
            }
        }
        Ok(())
    }

    fn fill_plain(
        &mut self,
        out: &mut Out<'_>,
        serving: &Serving,
        picked: &[PageAddr],
    ) -> Result<(), PumpError> {
        let pages = serving.gather(picked, &mut self.at_hand.frame).map_err(MoveError::memory)?;
        let contents: Vec<&PageBytes> = pages.iter().collect();
        out.contents(Kind::Pages, self.at_hand.frame.meta(), &contents).map_err(PumpError::Send)
    }

    fn fill_from(&mut self, out: &mut Out<'_>, picked: &[PageAddr]) -> Result<(), PumpError> {
        self.read(picked)?;
        let mut known = std::mem::take(&mut self.at_hand.known);
        let result = self.guest.known(picked, false, &mut known);
        let result = result.map_err(PumpError::from).and_then(|()| self.emit(out, picked, picked, &known));
        self.at_hand.known = known;
        result
    }

    /// Whether the page is a hole of the memory file, and so all zeros.
    fn is_hole(&mut self, addr: PageAddr) -> bool {
        let block = usize::from(addr.block.0);
        let known = matches!(&self.at_hand.ahead, Some((b, r)) if *b == block && addr.page < r.end);
        if !known {
            let next = self.guest.ram().data_ranges_from(block, addr.page).next();
            self.at_hand.ahead = Some((block, next.unwrap_or(u32::MAX..u32::MAX)));
        }
        self.at_hand.ahead.as_ref().is_some_and(|(_, r)| addr.page < r.start)
    }

    fn window(&mut self, out: &mut Out<'_>, running: bool) -> Result<(), PumpError> {
        let mut picked = std::mem::take(&mut self.at_hand.picked);
        picked.clear();
        self.rounds.take(WINDOW, &mut picked);
        // A hole that is written is named by the log; so only the first round has any worth looking for. What was seen
        // before the last harvest is no use: that one may have named a page, and trusted that it would be read.
        let look = running && self.rounds.first_round();
        self.at_hand.ahead = None;
        let mut data = std::mem::take(&mut self.at_hand.data);
        data.clear();
        data.extend(picked.iter().filter(|a| !(look && self.is_hole(**a))));
        self.read(&data)?;
        let mut known = std::mem::take(&mut self.at_hand.known);
        let result = self.guest.known(&data, running, &mut known);
        let result = result.map_err(PumpError::from).and_then(|()| self.emit(out, &picked, &data, &known));
        self.hear_written();
        (self.at_hand.picked, self.at_hand.data, self.at_hand.known) = (picked, data, known);
        result
    }

    /// Reads pages, neighbours at once.
    fn read(&mut self, data: &[PageAddr]) -> Result<(), PumpError> {
        let mut at = 0;
        while let Some(first) = data.get(at) {
            let follows = |(n, a): &(usize, &PageAddr)| {
                a.block == first.block && first.page.checked_add(*n as u32) == Some(a.page)
            };
            let run = data[at..].iter().enumerate().take_while(follows).count();
            let bytes = &mut self.at_hand.buf[at * PAGE_SIZE..(at + run) * PAGE_SIZE];
            self.guest.ram().read_at(usize::from(first.block.0), first.page, bytes).map_err(|e| {
                MoveError::at(format_args!("reading slot {} at page {}", first.block.0, first.page))(e)
            })?;
            at += run;
        }
        Ok(())
    }

    fn emit(
        &mut self,
        out: &mut Out<'_>,
        picked: &[PageAddr],
        data: &[PageAddr],
        known: &[Known],
    ) -> Result<(), PumpError> {
        let table = &out.group.tables[usize::from(self.target.0)];
        let (contents, _) = self.at_hand.buf.as_chunks::<PAGE_SIZE>();
        let mut read = data.iter().zip(contents).zip(known).peekable();
        let mut batch = Batch::new(&mut self.at_hand.frame, &mut self.at_hand.plan);
        for addr in picked {
            let (leaving, bytes) = match read.next_if(|((a, _), _)| *a == addr) {
                None => (Some(Leaving::Uniform(0)), &ZERO),
                Some((_, Known::Written)) => continue,
                Some(((_, bytes), known)) => match (uniform(bytes), known) {
                    (Some(fill), _) => (Some(Leaving::Uniform(fill)), bytes),
                    (None, Known::Digest(d)) => {
                        if self.prove.as_ref().is_some_and(|h| h.page(bytes) != *d) {
                            return Err(stale(*addr));
                        }
                        (Some(self.vm.known(*d)), bytes)
                    }
                    (None, _) => (None, bytes),
                },
            };
            if let Some(a) = &mut self.audit {
                a.saw(*addr, bytes);
            }
            let fill = if let Some(Leaving::Uniform(fill)) = leaving { Some(fill) } else { None };
            self.book.page(*addr, fill, bytes);
            batch.add(*addr, leaving, Some(bytes));
            batch.flush_if_full(&mut self.vm, table, out).map_err(PumpError::Send)?;
        }
        let stream = picked.len() * PAGE_SIZE;
        self.shared.stream_bytes.fetch_add(stream as u64, Ordering::Relaxed);
        batch.flush(&mut self.vm, table, out).map_err(PumpError::Send)
    }

    fn end_ram(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        self.book.end(None);
        out.send(Kind::RamEnd, &[], &[]).map_err(PumpError::Send)?;
        self.write_audit();
        let state = self.guest.save()?;
        self.state.bytes = vm_state::wrap(&state);
        self.stage = Stage::State;
        Ok(())
    }

    fn send_state(&mut self, out: &mut Out<'_>) -> Result<(), PumpError> {
        let end = self.state.bytes.len().min(self.state.sent + MAX_BODY);
        let part = &self.state.bytes[self.state.sent..end];
        out.send(Kind::Verbatim, &[], &[IoSlice::new(part)]).map_err(PumpError::Send)?;
        self.state.sent = end;
        if self.state.sent == self.state.bytes.len() {
            self.state.bytes = Vec::new();
            self.stage = Stage::Over;
        }
        Ok(())
    }
}

fn stale(addr: PageAddr) -> PumpError {
    PumpError::Failed(MoveError::Refused(format!(
        "drill: the digest kept of page {} of slot {} is stale: its content changed and the dirty log did not say so",
        addr.page, addr.block.0
    )))
}
