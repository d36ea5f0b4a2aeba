//! Observing how VMs write, for some seconds, with whichever sampler sees them: for `irlm evacuate --dry-run`, and
//! beside preparation, so that hot pages are left out of the plan.
//!
//! KVM tells of dirtied pages only while a VM's dirty log is on, which outside of a migration is so only while QEMU's
//! own `calc-dirty-rate` runs. So that is started, for the time of the observation: harmless (migration turns the same
//! log on moments later), but the guest takes a fault for each page it writes first. Guests without KVM are only read. The
//! dirty log of our own VMM is at hand anyway.

use super::kvm::guest::Guest;
use super::prepare::Opened;
use crate::core::forecast::Writes;
use crate::core::heat::{Coverage, HeatMap, Interval, REGION_PAGES, RegionAddr};
use crate::core::page_set::PageSet;
use crate::core::units::{BlockIx, PageAddr};
use crate::flow::front::visible_pid;
use crate::flow::{Front, MoveError, lock};
use crate::host::dirty::content::{ContentSampler, Look, MAX_PICKS};
use crate::host::dirty::{GFN_SLOT, Sampler, SlotPlace, Totals, Tracer};
use crate::host::ram::{Frames, GuestRam};
use crate::net::qmp::Qmp;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long figures are gathered before they are taken in: QEMU clears a dirty ring once a second.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often page events are taken out of the kernel's ring buffer.
const DRAIN: Duration = Duration::from_millis(20);
/// Page events kept of one VM and interval; beyond it they are counted as lost.
const MAX_EVENTS: usize = 1 << 20;
/// Pages looked at a second on a host, over all VMs that are sampled by content.
const MAX_LOOKS: usize = 1 << 16;
/// Longest observation.
pub const MAX_OBSERVATION: Duration = Duration::from_secs(60);
/// How long QEMU may take to end a measurement after its time.
const END: Duration = Duration::from_secs(5);

/// A VM to observe.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name, for messages.
    pub name: String,
    /// Who runs it.
    pub front: Front,
    /// Its memory, as far as it is open already.
    pub opened: Opened,
}

/// How to observe.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For how long, at most [`MAX_OBSERVATION`].
    pub time: Duration,
    /// One dirtying in so many is looked at by place.
    pub one_in: u32,
    /// Whether dirty logs may be turned on; otherwise contents are looked at.
    pub log: bool,
    /// Longest wait for one answer of a monitor.
    pub setup: Duration,
}

/// What was seen of one VM so far.
#[derive(Clone, Debug)]
pub struct Observation {
    /// By which sampler.
    pub sampler: Sampler,
    /// Why by none that sees more, if so.
    pub note: String,
    /// Its writes by place and time.
    pub heat: HeatMap,
    /// The kernel's counts; zero for [`Sampler::Content`].
    pub totals: Totals,
    /// Dirtyings in memory that no RAM block is known for.
    pub unplaced: u64,
    /// Guest RAM, pages.
    pub ram_pages: u64,
    /// Of them such as may hold something else than zeros.
    pub data_pages: u64,
}

impl Observation {
    /// The guest's writes in the forecast's terms.
    #[must_use]
    pub fn writes(&self) -> Writes {
        let h = &self.heat;
        Writes::fit(h.dirty_rate(), h.distinct(), h.observed(), self.ram_pages as f64)
    }
}

/// Observations under way: one place a subject, filled once its first interval is over, or with why there is none.
#[derive(Clone, Debug, Default)]
pub struct Observed(Arc<Mutex<Vec<Place>>>);

/// A subject's place: nothing yet, what was seen, or why nothing was.
pub type Place = Option<Result<Arc<Observation>, Arc<MoveError>>>;

impl Observed {
    /// What is known of subject `ix` now.
    #[must_use]
    pub fn get(&self, ix: usize) -> Place {
        lock(&self.0).get(ix).cloned().flatten()
    }

    /// Whether reading that region should wait, because it is being written to.
    #[must_use]
    pub fn is_warm(&self, ix: usize, region: RegionAddr) -> bool {
        matches!(lock(&self.0).get(ix), Some(Some(Ok(o))) if o.heat.is_warm(region))
    }

    fn put(&self, ix: usize, what: Result<Arc<Observation>, MoveError>) {
        let what = what.map_err(Arc::new);
        if let Some(place) = lock(&self.0).get_mut(ix) {
            *place = Some(what);
        }
    }
}

/// Observes all of `subjects` at once until the time is over or `stop` is set; blocks. What is seen appears in
/// `out` as it goes. One observation at a time may use a tracer's page events: the caller sees to that.
pub fn observe(tracer: &Tracer, subjects: &[Subject], o: &Options, stop: &AtomicBool, out: &Observed) {
    *lock(&out.0) = vec![None; subjects.len()];
    let time = o.time.min(MAX_OBSERVATION);
    if let Err(e) = tracer.set_rate(o.one_in, o.one_in == 1) {
        tracing::warn!("{e}");
    }
    let share = MAX_LOOKS / subjects.len().max(1);
    let mut watched = Vec::new();
    for (ix, subject) in subjects.iter().enumerate() {
        match Watched::begin(tracer, subject, o, time, share) {
            Ok(w) => watched.push((ix, w)),
            Err(e) => out.put(ix, Err(MoveError::at(&subject.name)(e))),
        }
    }
    let until = Instant::now() + time;
    while Instant::now() < until && !stop.load(Ordering::Relaxed) && !watched.is_empty() {
        std::thread::sleep(DRAIN.min(until.saturating_duration_since(Instant::now())));
        drain(tracer, &mut watched);
        for (ix, w) in &mut watched {
            match w.tick(tracer, until) {
                Ok(false) => {}
                Ok(true) => out.put(*ix, Ok(Arc::new(w.seen.clone()))),
                Err(e) => {
                    w.over = true;
                    out.put(*ix, Err(MoveError::at(&subjects[*ix].name)(e)));
                }
            }
        }
    }
    drain(tracer, &mut watched);
    for (ix, mut w) in watched {
        // What came since the last interval counts too, if it is long enough to say something.
        if !w.over && matches!(w.finish(tracer), Ok(true)) {
            out.put(ix, Ok(Arc::new(w.seen.clone())));
        }
        w.end(tracer);
    }
}

fn drain(tracer: &Tracer, watched: &mut [(usize, Watched)]) {
    let by_pid: HashMap<u32, usize> = watched.iter().enumerate().map(|(n, (_, w))| (w.pid, n)).collect();
    tracer.drain(|e| {
        let Some(n) = by_pid.get(&e.tgid) else { return };
        let w = &mut watched[*n].1;
        if w.events.len() < MAX_EVENTS { w.events.push((e.slot, e.page)) } else { w.lost += 1 }
    });
}

/// One VM under observation.
struct Watched {
    pid: u32,
    ram: Arc<GuestRam>,
    /// Where its guest frames are, if the sampler names pages by them.
    frames: Vec<Frames>,
    seen: Observation,
    way: Way,
    began: Instant,
    /// Slot and page of the events of this interval.
    events: Vec<(u32, u64)>,
    /// Events that found no room here.
    lost: u64,
    over: bool,
}

enum Way {
    Content(Box<ContentSampler>),
    Kernel(Box<Kernel>),
    /// The log of our own VMM.
    Log(Arc<Guest>),
}

struct Kernel {
    qmp: Qmp,
    /// QEMU's name of the measurement that keeps the log on.
    mode: &'static str,
    totals: Totals,
    counts: BTreeMap<(u32, u32), u64>,
}

impl Watched {
    fn begin(
        tracer: &Tracer,
        subject: &Subject,
        o: &Options,
        time: Duration,
        share: usize,
    ) -> Result<Self, MoveError> {
        let monitor = match &subject.front {
            Front::Qmp(path) => path,
            Front::Vmm(path) => return Self::log(path, subject.opened.guest.clone(), o),
        };
        let mut qmp = Qmp::connect(monitor, o.setup)?;
        let pid = visible_pid(monitor, &qmp)?;
        let ram = match &subject.opened.ram {
            Some(ram) => ram.clone(),
            None => Arc::new(GuestRam::open(pid, &mut |line| qmp.hmp(line).map_err(Into::into))?),
        };
        let kernel = if o.log {
            begin_log(tracer, &mut qmp, pid, time)
        } else {
            Err(MoveError::refused("dirty logs are left off"))
        };
        let mut frames = vec![];
        let (sampler, way, coverage, note) = match kernel {
            Ok((sampler, mode)) => {
                if sampler == Sampler::Faults {
                    frames = ram.frames(&mut |line| qmp.hmp(line).map_err(Into::into))?;
                }
                let kernel = Kernel { qmp, mode, totals: Totals::default(), counts: BTreeMap::new() };
                let coverage =
                    if o.one_in == 1 { Coverage::Every } else { Coverage::OneIn(f64::from(o.one_in)) };
                (sampler, Way::Kernel(Box::new(kernel)), coverage, String::new())
            }
            Err(why) => {
                // The monitor serves one client: others may need it.
                drop(qmp);
                let sampler = ContentSampler::new(&ram, share.min(MAX_PICKS))
                    .map_err(MoveError::at("reading guest RAM"))?;
                let each = sampler.each();
                (Sampler::Content, Way::Content(Box::new(sampler)), Coverage::Fixed(each), why.to_string())
            }
        };
        Ok(Self::new(pid, ram, frames, sampler, way, coverage, note))
    }

    /// A VM of our own VMM: its dirty log is ours anyway.
    fn log(socket: &Path, guest: Option<Arc<Guest>>, o: &Options) -> Result<Self, MoveError> {
        let guest = match guest {
            Some(g) => g,
            None => Arc::new(Guest::open(socket, o.setup)?),
        };
        // What came before is of no interval.
        guest.harvest()?;
        guest.take_written(|_, _| {});
        let (pid, ram) = (guest.process().map_or(0, |p| p.pid), guest.ram().clone());
        let way = Way::Log(guest);
        Ok(Self::new(pid, ram, vec![], Sampler::Log, way, Coverage::Every, String::new()))
    }

    fn new(
        pid: u32,
        ram: Arc<GuestRam>,
        frames: Vec<Frames>,
        sampler: Sampler,
        way: Way,
        coverage: Coverage,
        note: String,
    ) -> Self {
        let ram_pages = ram.blocks().iter().filter(|b| b.readable()).map(|b| u64::from(b.pages())).sum();
        let data_pages = (0..ram.blocks().len())
            .flat_map(|b| ram.data_ranges(b))
            .map(|r| u64::from(r.end - r.start))
            .sum();
        let heat = HeatMap::new(coverage);
        let totals = Totals::default();
        let seen = Observation { sampler, note, heat, totals, unplaced: 0, ram_pages, data_pages };
        Self { pid, ram, frames, seen, way, began: Instant::now(), events: vec![], lost: 0, over: false }
    }

    /// Takes in an interval if one is over; says whether.
    fn tick(&mut self, tracer: &Tracer, until: Instant) -> Result<bool, MoveError> {
        let pause = match &self.way {
            Way::Content(c) => INTERVAL.max(c.pause()),
            Way::Kernel(_) | Way::Log(_) => INTERVAL,
        };
        // An interval that would end a moment after the observation is not begun: `finish` takes what there is.
        let due = self.began + pause;
        if self.over || Instant::now() < due || until.saturating_duration_since(due) < INTERVAL / 4 {
            return Ok(false);
        }
        self.finish(tracer)
    }

    fn finish(&mut self, tracer: &Tracer) -> Result<bool, MoveError> {
        if self.began.elapsed() < INTERVAL / 2 {
            return Ok(false);
        }
        let interval = match &mut self.way {
            Way::Content(c) => {
                let look = c.look(&self.ram).map_err(MoveError::at("reading guest RAM"))?;
                self.began = Instant::now();
                by_content(&look, c.each())
            }
            Way::Kernel(k) => {
                let place = Places::new(tracer, self.pid, &self.ram, &self.frames)?;
                let (interval, unplaced, lost) =
                    k.interval(tracer, self.pid, &place, &self.events, self.began.elapsed())?;
                self.began = Instant::now();
                self.events.clear();
                self.seen.totals = k.totals;
                self.seen.unplaced += unplaced;
                self.seen.heat.lose(lost + std::mem::take(&mut self.lost));
                k.keep_log()?;
                interval
            }
            Way::Log(guest) => {
                guest.harvest()?;
                let seconds = self.began.elapsed().as_secs_f64();
                self.began = Instant::now();
                let mut written = PageSet::empty(guest.pages());
                guest.take_written(|block, bits| written.merge(block, bits));
                self.seen.totals.seen += written.len();
                self.seen.totals.sampled += written.len();
                by_log(&written, seconds)
            }
        };
        self.seen.heat.absorb(&interval);
        Ok(true)
    }

    fn end(self, tracer: &Tracer) {
        if let Way::Kernel(mut k) = self.way {
            tracer.unwatch(self.pid);
            k.end_log();
        }
    }
}

fn by_log(written: &PageSet, seconds: f64) -> Interval {
    let mut regions: BTreeMap<RegionAddr, f64> = BTreeMap::new();
    for page in written.iter() {
        *regions.entry(RegionAddr::of(page)).or_default() += 1.0;
    }
    Interval {
        seconds,
        dirtied: written.len() as f64,
        regions: regions.into_iter().collect(),
        // As many as of a kernel's events; the rest is in the regions.
        pages: written.iter().take(MAX_EVENTS).collect(),
        fresh: 0.0,
    }
}

fn by_content(look: &Look, each: f64) -> Interval {
    let mut regions: HashMap<RegionAddr, f64> = HashMap::new();
    for page in &look.changed {
        *regions.entry(RegionAddr::of(*page)).or_default() += each;
    }
    Interval {
        seconds: look.seconds,
        dirtied: look.changed.len() as f64 * each + look.grown as f64,
        regions: regions.into_iter().collect(),
        pages: look.changed.clone(),
        fresh: look.grown as f64,
    }
}

/// From the kernel's names of pages to the RAM blocks'.
struct Places<'a> {
    ram: &'a GuestRam,
    slots: HashMap<u32, SlotPlace>,
    frames: &'a [Frames],
}

impl<'a> Places<'a> {
    fn new(tracer: &Tracer, pid: u32, ram: &'a GuestRam, frames: &'a [Frames]) -> Result<Self, MoveError> {
        let slots = tracer.slots(pid)?.into_iter().collect();
        Ok(Self { ram, slots, frames })
    }

    /// A page in the region: of the first, which begins where the slot does, not before.
    fn region(&self, slot: u32, region: u32) -> Option<PageAddr> {
        let lead = self.slots.get(&slot).map_or(0, |p| p.base_gfn % u64::from(REGION_PAGES));
        let first = u64::from(region) * u64::from(REGION_PAGES);
        self.page(slot, first.saturating_sub(lead))
    }

    fn page(&self, slot: u32, page: u64) -> Option<PageAddr> {
        let (block, page) = if slot == GFN_SLOT {
            self.frames.iter().find_map(|f| f.page(page))?
        } else {
            let place = self.slots.get(&slot).filter(|p| page < p.pages)?;
            self.ram.page_at(place.hva.checked_add(page.checked_mul(4096)?)?)?
        };
        Some(PageAddr { block: BlockIx(u16::try_from(block).ok()?), page })
    }
}

impl Kernel {
    /// What the programs counted since the last call, events without a place, and events lost.
    fn interval(
        &mut self,
        tracer: &Tracer,
        pid: u32,
        place: &Places<'_>,
        events: &[(u32, u64)],
        time: Duration,
    ) -> Result<(Interval, u64, u64), MoveError> {
        let now = tracer.totals(pid).ok_or_else(|| MoveError::refused("the kernel forgot it"))?;
        let before = std::mem::replace(&mut self.totals, now);
        let (seen, sampled) = (now.seen - before.seen, now.sampled - before.sampled);
        // What one sampled dirtying stands for.
        let each = if sampled == 0 { 0.0 } else { seen as f64 / sampled as f64 };
        let mut regions: HashMap<RegionAddr, f64> = HashMap::new();
        let mut unplaced = 0;
        for r in tracer.regions(pid)? {
            let old = self.counts.insert((r.slot, r.region), r.count).unwrap_or(0);
            let new = r.count.saturating_sub(old);
            if new == 0 {
                continue;
            }
            match place.region(r.slot, r.region) {
                Some(page) => *regions.entry(RegionAddr::of(page)).or_default() += new as f64 * each,
                None => unplaced += new,
            }
        }
        let pages = events.iter().filter_map(|(slot, page)| place.page(*slot, *page)).collect();
        let lost = now.page_lost - before.page_lost;
        let interval = Interval {
            seconds: time.as_secs_f64(),
            dirtied: seen as f64,
            regions: regions.into_iter().collect(),
            pages,
            fresh: 0.0,
        };
        Ok((interval, unplaced, lost))
    }

    /// A bitmap is cleared only when a measurement begins: so there is one an interval. A ring is cleared all along.
    fn keep_log(&mut self) -> Result<(), MoveError> {
        if self.mode == RING {
            return Ok(());
        }
        self.end_log();
        Ok(measure(&mut self.qmp, self.mode, 1)?)
    }

    /// Waits until QEMU has turned the log off again, so that nobody finds a measurement under way.
    fn end_log(&mut self) {
        let until = Instant::now() + END;
        while Instant::now() < until {
            match self.qmp.execute("query-dirty-rate", Value::Null) {
                // "unstarted" for a moment, then "measuring".
                Ok(v) if v["status"] != "measured" => std::thread::sleep(DRAIN),
                _ => return,
            }
        }
    }
}

const RING: &str = "dirty-ring";
const BITMAP: &str = "dirty-bitmap";

fn measure(qmp: &mut Qmp, mode: &str, seconds: u64) -> crate::net::qmp::Result<()> {
    qmp.execute("calc-dirty-rate", json!({ "calc-time": seconds.clamp(1, 60), "mode": mode })).map(drop)
}

/// Turns the VM's dirty log on and has the best program watch it. The error says why it cannot be.
fn begin_log(
    tracer: &Tracer,
    qmp: &mut Qmp,
    pid: u32,
    time: Duration,
) -> Result<(Sampler, &'static str), MoveError> {
    let refused = || {
        let why =
            |t: &crate::host::dirty::Tried| t.refused.as_ref().map(|r| format!("{}: {r}", t.sampler.name()));
        tracer.tried().iter().filter_map(why).collect::<Vec<_>>().join("; ")
    };
    if tracer.best(true) == Sampler::Content {
        return Err(MoveError::Refused(refused()));
    }
    let kvm = qmp.execute("query-kvm", Value::Null)?;
    if kvm["enabled"] != true {
        return Err(MoveError::refused("the guest does not run on KVM"));
    }
    let seconds = time.as_secs_f64().ceil() as u64;
    // QEMU refuses the mode that its accelerator is not set up for.
    let (mode, sampler) = match measure(qmp, RING, seconds) {
        Ok(()) => (RING, tracer.best(true)),
        Err(_) => match tracer.best(false) {
            Sampler::Content => {
                return Err(MoveError::Refused(format!("the VM has no dirty ring; {}", refused())));
            }
            sampler => {
                measure(qmp, BITMAP, 1)?;
                (BITMAP, sampler)
            }
        },
    };
    tracer.watch(pid, sampler)?;
    Ok((sampler, mode))
}
