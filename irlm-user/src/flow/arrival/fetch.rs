//! A VM that runs here while its pages still come: faults are read, answered from what is here, and asked for elsewhere;
//! what comes is placed. `core::postcopy` decides; this owns the descriptors. Used by the arrival's thread only.
//!
//! Order: a content is in the memory's file before it is mapped, and counts as here only when it is mapped.

use super::verified::Verified;
use super::{TargetGroup, TargetSpec, contents};
use crate::core::arrival::{Key, TargetError};
use crate::core::digest::Digest;
use crate::core::page_set::PageSet;
use crate::core::postcopy::{Answer, Fill, Origin, Patience, Put};
use crate::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::paging::Demand;
use crate::flow::{MoveError, Tagged, lock, now};
use crate::host::uffd::Event;
use crate::net::conn::{FrameBuf, NoWait, send};
use crate::net::connection::Connection;
use due::DueFile;
use latency::Latency;
use place::{Place, PlaceError};
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

// The set of pages still to come, on disk.
mod due;
// How long vCPUs waited.
pub mod latency;
// Pages into memory.
mod place;
// The same while the guest gives pages away.
mod placing;

pub(super) use place::Faults;

/// Pages from the store that are placed in one step.
const STEP: usize = 256;
/// The set on disk is written anew at most so often, because a guest may give its pages away one by one.
const WRITE_AGAIN: Duration = Duration::from_millis(50);

/// Why the filling cannot go on. The VM's pages are not lost by it.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("{0}")]
    Place(#[from] PlaceError),
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("{0}")]
    Wire(#[from] crate::core::wire::frame::WireError),
    #[error("the list of pages still to come cannot be written to {0}: {1}")]
    Due(String, std::io::Error),
}

impl From<FetchError> for MoveError {
    fn from(e: FetchError) -> Self {
        Self::memory(e)
    }
}

/// The filling of one VM.
#[derive(Debug)]
pub(super) struct Fetch {
    name: String,
    domain: u16,
    fill: Fill,
    place: Place,
    file: DueFile,
    demand: Option<Line>,
    begun: Instant,
    latency: Latency,
    /// Pages that a vCPU waits for, and that were to come from another target host when it touched them.
    pressed: HashSet<PageAddr>,
    events: Vec<Event>,
    /// Faults that were read while something was being placed, and pages given away meanwhile that a vCPU waits for.
    unheard: Vec<Event>,
    zeros: Vec<PageAddr>,
    /// The set on disk has pages that were given away since this.
    stale: Option<Instant>,
    at_hand: AtHand,
}

/// Pages at hand, in buffers that are used again.
#[derive(Debug, Default)]
struct AtHand {
    puts: Vec<Put>,
    addrs: Vec<PageAddr>,
    bytes: Vec<u8>,
}

/// The demand connection.
#[derive(Debug)]
struct Line {
    conn: Connection,
    /// None while its frames are taken in.
    frames: Option<FrameBuf>,
    _tag: Tagged,
}

impl Fetch {
    /// The state is loaded, faults are caught, and `due` is still to come; so is what `waiting` pages wait for.
    pub(super) fn begin(
        group: &Arc<TargetGroup>,
        spec: &TargetSpec,
        faults: Faults,
        due: PageSet,
        waiting: Vec<(PageAddr, Option<Key>)>,
    ) -> Result<Self, FetchError> {
        let mut fetch = Self::new(group, spec, faults, |_, _| due)?;
        let taken = fetch.fill.take_over(&mut lock(&group.host), waiting, now());
        taken?;
        fetch.write_due()?;
        Ok(fetch)
    }

    /// The same VM for the next agent.
    pub(super) fn again(
        group: &Arc<TargetGroup>,
        spec: &TargetSpec,
        faults: Faults,
    ) -> Result<Self, FetchError> {
        let pages: Vec<u32> =
            faults.slots.iter().map(|(_, bytes, _)| (bytes / PAGE_SIZE as u64) as u32).collect();
        let mut fetch = Self::new(group, spec, faults, |place, file| {
            let mut set = file.read(&pages).unwrap_or_else(|e| {
                // The source's copy stands still: a page of zeros that comes once more does no harm.
                tracing::warn!("{}: {e}: every page that is not here is asked for", file.0.display());
                PageSet::full(&pages)
            });
            place.less_present(&mut set);
            set
        })?;
        fetch.fill.lost();
        fetch.place.wake_all()?;
        tracing::info!("{}: {} pages are still to come", fetch.name, fetch.fill.lacking());
        Ok(fetch)
    }

    fn new(
        group: &Arc<TargetGroup>,
        spec: &TargetSpec,
        faults: Faults,
        due: impl FnOnce(&Place, &DueFile) -> PageSet,
    ) -> Result<Self, FetchError> {
        let place = Place::new(faults)?;
        let file = DueFile::new(&group.options.socket_dir, &group.name, &spec.name);
        let due = due(&place, &file);
        let patience = Patience::default();
        let holders = group.peers.others(group.me);
        Ok(Self {
            name: spec.name.clone(),
            domain: spec.domain,
            fill: Fill::new(spec.vm, spec.source, due, &holders, patience),
            place,
            file,
            demand: None,
            begun: Instant::now(),
            latency: Latency::new(),
            pressed: HashSet::new(),
            events: Vec::new(),
            unheard: Vec::new(),
            zeros: Vec::new(),
            stale: None,
            at_hand: AtHand::default(),
        })
    }

    fn write_due(&mut self) -> Result<(), FetchError> {
        self.stale = None;
        let at = || self.file.0.display().to_string();
        self.file.write(&self.fill.absent()).map_err(|e| FetchError::Due(at(), e))
    }

    /// Where faults are heard of.
    pub(super) fn fault_fd(&self) -> BorrowedFd<'_> {
        self.place.fd()
    }

    /// The demand connection, if it stands.
    pub(super) fn demand_fd(&self) -> Option<BorrowedFd<'_>> {
        self.demand.as_ref().map(|d| d.conn.as_fd())
    }

    /// Takes a demand connection into use.
    pub(super) fn called(&mut self, conn: Connection, mut frames: FrameBuf, tag: Tagged) {
        frames.follow(&conn);
        self.demand = Some(Line { conn, frames: Some(frames), _tag: tag });
    }

    /// Pages that are not there yet.
    pub(super) fn lacking(&self) -> u64 {
        self.fill.lacking()
    }

    pub(super) fn complete(&self) -> bool {
        self.fill.complete()
    }

    /// Which.
    pub(super) fn lacks(&self) -> PageSet {
        self.fill.lacks()
    }

    /// Whether a vCPU waits.
    pub(super) fn faulting(&self) -> bool {
        self.fill.faulting() > 0
    }

    /// Whether [`Self::step`] has something to do at once.
    pub(super) fn busy(&self, group: &TargetGroup) -> bool {
        let demanded = self.demand.as_ref().is_some_and(|d| d.frames.is_some() && d.conn.is_pending());
        let unheard = !self.unheard.is_empty() || !self.zeros.is_empty() || demanded;
        unheard || self.fill.has_ready() && self.begun.elapsed() >= group.options.hold_placing
    }

    pub(super) fn waits(&self) -> latency::FaultWaits {
        self.latency.waits()
    }

    pub(super) fn stats(&self) -> crate::core::postcopy::arrival::FillStats {
        self.fill.stats
    }

    /// The source cannot be heard.
    pub(super) fn lost(&mut self) {
        self.fill.lost();
        self.demand = None;
    }

    /// The source is back: what it is to be told.
    pub(super) fn reconnected(&mut self) -> PageSet {
        self.demand = None;
        self.fill.reconnected()
    }

    /// All pages are there, or nobody wants them any more.
    pub(super) fn end(&mut self, group: &Arc<TargetGroup>) {
        self.leave(group);
        self.file.remove();
        self.demand = None;
    }

    /// Nothing waits for other hosts any more. The set on disk stays, for the next agent.
    pub(super) fn leave(&mut self, group: &Arc<TargetGroup>) {
        self.fill.leave(&mut lock(&group.host));
    }

    /// Reads faults, and answers what can be answered at once.
    pub(super) fn hear_faults(&mut self, group: &Arc<TargetGroup>) -> Result<(), FetchError> {
        self.place.events(&mut self.unheard)?;
        self.answer(group)
    }

    /// Answers what was read.
    fn answer(&mut self, group: &Arc<TargetGroup>) -> Result<(), FetchError> {
        while !self.unheard.is_empty() || !self.zeros.is_empty() {
            let mut events = std::mem::replace(&mut self.unheard, std::mem::take(&mut self.events));
            // Pages that are gone first: nothing of theirs may be placed any more.
            events.retain(|e| !self.removed(group, *e));
            let mut result = self.zero_removed(group);
            for event in events.drain(..) {
                result = result.and_then(|()| self.event(group, event));
            }
            self.events = events;
            result?;
        }
        Ok(())
    }

    fn event(&mut self, group: &Arc<TargetGroup>, event: Event) -> Result<(), FetchError> {
        match event {
            Event::Fault { slot, page, .. } => self.fault(group, addr_of(slot, page)),
            Event::Removed { .. } => Ok(()),
            Event::Stray(address) => {
                tracing::warn!("{}: a fault at {address:#x}, which is in no slot", self.name);
                Ok(())
            }
        }
    }

    fn fault(&mut self, group: &Arc<TargetGroup>, addr: PageAddr) -> Result<(), FetchError> {
        let since = now();
        let mut page = [0; PAGE_SIZE];
        let answer = {
            let host = lock(&group.host);
            let answer = self.fill.fault(&host, addr, since);
            if let Answer::Store(key) = &answer
                && let Some(bytes) = host.find(key)
            {
                page = *bytes;
            }
            answer
        };
        match answer {
            Answer::Here | Answer::Settled => {
                self.show(group, addr, Place::show_or_zero)?;
                self.waited(Origin::Here, Some(now().0.saturating_sub(since.0)));
            }
            Answer::Store(_) => {
                let origin = self.fill.origin(addr);
                self.put(group, addr, &page, origin)?;
            }
            Answer::Wait => {
                if self.fill.is_held(addr) {
                    self.pressed.insert(addr);
                }
            }
            Answer::Outside => {
                tracing::warn!("{}: a fault at {addr:?}, which the VM does not have", self.name);
            }
        }
        Ok(())
    }

    fn waited(&mut self, origin: Origin, ns: Option<u64>) {
        if let Some(ns) = ns {
            self.latency.record(origin, ns);
        }
    }

    /// Takes in a `Pages` frame.
    pub(super) fn pages(
        &mut self,
        group: &Arc<TargetGroup>,
        spec: &TargetSpec,
        made: &Verified<'_>,
    ) -> Result<(), FetchError> {
        let (mut content, at) = (0, now());
        let (mut wakes, mut owed) = (Vec::new(), Vec::new());
        let mut puts = std::mem::take(&mut self.at_hand.puts);
        puts.clear();
        {
            let mut host = lock(&group.host);
            for p in made.records {
                let bytes = made.content(content);
                owed.extend(self.fill.record(
                    &mut host,
                    p.record,
                    &mut content,
                    bytes,
                    at,
                    &mut puts,
                    &mut wakes,
                )?);
            }
        }
        group.wake(&wakes);
        for (digest, hosts) in owed {
            contents::serve_owed(group, spec.domain, digest, &hosts);
        }
        let result = self.put_all(group, &puts, made.contents);
        self.at_hand.puts = puts;
        result
    }

    fn put_all(
        &mut self,
        group: &Arc<TargetGroup>,
        puts: &[Put],
        body: &[PageBytes],
    ) -> Result<(), FetchError> {
        let mut at = 0;
        while let Some(put) = puts.get(at) {
            match *put {
                Put::Zero(addr) => {
                    self.show(group, addr, Place::zero)?;
                    let ns = self.fill.answered(addr, now());
                    self.waited(Origin::Source, ns);
                    at += 1;
                }
                Put::Filled(addr, fill) => {
                    self.put(group, addr, &[fill; PAGE_SIZE], Origin::Source)?;
                    at += 1;
                }
                Put::Body(addr, content) => {
                    let follows = |(n, put): &(usize, &Put)| {
                        let next = PageAddr { page: addr.page.wrapping_add(*n as u32), ..addr };
                        **put == Put::Body(next, content + n)
                    };
                    let n = puts[at..].iter().enumerate().take_while(follows).count();
                    let Some(pages) = body.get(content..content + n) else { break };
                    self.put(group, addr, pages.as_flattened(), Origin::Source)?;
                    at += n;
                }
            }
        }
        Ok(())
    }

    /// Another target host does not have these contents.
    pub(super) fn not_here(&mut self, peer: HostIx, digests: &[Digest]) {
        digests.iter().for_each(|d| self.fill.not_here(peer, d, now()));
    }

    /// What `key` stands for has changed.
    pub(super) fn woken(&mut self, group: &Arc<TargetGroup>, key: Key) {
        self.fill.woken(&mut lock(&group.host), key, now());
    }

    /// Places what is in the store, and asks for what is to be asked for; the demand to be said on the VM connection, if
    /// there is no connection for it.
    pub(super) fn step(
        &mut self,
        group: &Arc<TargetGroup>,
        held_ms: u64,
    ) -> Result<Option<Demand>, FetchError> {
        self.answer(group)?;
        if self.stale.is_some_and(|since| since.elapsed() >= WRITE_AGAIN) {
            self.write_due()?;
        }
        let (mut addrs, mut bytes) =
            (std::mem::take(&mut self.at_hand.addrs), std::mem::take(&mut self.at_hand.bytes));
        addrs.clear();
        bytes.clear();
        if self.begun.elapsed() >= group.options.hold_placing {
            self.fill.take_ready(&mut lock(&group.host), STEP, &mut addrs, &mut bytes);
        }
        let mut result = Ok(());
        for (addr, page) in addrs.iter().zip(bytes.chunks(PAGE_SIZE)) {
            let origin = self.fill.origin(*addr);
            result = self.put(group, *addr, page, origin);
            if result.is_err() {
                break;
            }
        }
        (self.at_hand.addrs, self.at_hand.bytes) = (addrs, bytes);
        result?;
        let asks = self.fill.asks(&mut lock(&group.host), now(), held_ms);
        for (holder, digest) in asks.hurry {
            group.peers.hurry(group, holder, self.domain, std::iter::once(digest));
        }
        if asks.demand.pages.is_empty() {
            return Ok(None);
        }
        let Some(line) = &self.demand else { return Ok(Some(asks.demand)) };
        if let Err(e) = send(&line.conn, Kind::Demand, &asks.demand.encode(), &[]) {
            tracing::info!("{}: demand connection: {e}", self.name);
            self.demand = None;
            return Ok(Some(asks.demand));
        }
        Ok(None)
    }

    /// Reads the demand connection once, without waiting: what was told to be readable may have been the one before this.
    pub(super) fn read_demand(&mut self) {
        let Some(line) = &mut self.demand else { return };
        let Some(frames) = &mut line.frames else { return };
        let why = match frames.fill(&mut NoWait(&line.conn)) {
            Ok(0) => "its source closed it".to_owned(),
            Ok(_) => return,
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock) =>
            {
                return;
            }
            Err(e) => e.to_string(),
        };
        tracing::info!("{}: demand connection: {why}", self.name);
        self.demand = None;
    }

    /// The demand connection's frames, for whoever takes in pages; given back with [`Self::give_back`].
    pub(super) fn take_frames(&mut self) -> Option<FrameBuf> {
        let line = self.demand.as_mut()?;
        line.frames.take_if(|f| f.ready())
    }

    /// See [`Self::take_frames`].
    pub(super) fn give_back(&mut self, frames: FrameBuf) {
        if let Some(line) = &mut self.demand {
            line.frames = Some(frames);
        }
    }
}

fn addr_of(slot: usize, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(slot as u16), page }
}

/// How long a page that nobody waits for is held for its content: as before the switch.
pub(super) fn held_ms(patience: crate::core::arrival::Patience) -> u64 {
    patience.running_ms
}
