//! Preparation (paper §2.4): hashes the VMs' RAM from outside while they run, at idle priority and a bounded rate,
//! fills the host's dedup tables, and turns the share plan into hints. All hashes made here are hints: they go stale
//! as guests write, and a page is looked at again when it leaves; but for VMs of our own VMM, whose dirty log is on from
//! the start, so that it is known which went stale (`core::kept`).
//!
//! Memory: 24 bytes a page that is not uniform, 0.6 % of guest RAM, until the VM has left.

use super::kvm::guest::Guest;
use super::observe::Observed;
use super::{SourceGroup, SourceSpec};
use crate::core::digest::{Digest, uniform};
use crate::core::heat::RegionAddr;
use crate::core::kept::Digests;
use crate::core::plan::HostPlan;
use crate::core::qemu::BlockList;
use crate::core::source::BlockInfo;
use crate::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr};
use crate::flow::front::memory_of;
use crate::flow::{Front, MoveError, lock};
use crate::host::ram::GuestRam;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

// Memory that can be read.
mod opened;

pub use opened::Opened;

/// Pages read and hashed at a time: 1 MiB.
const CHUNK: u32 = 256;

/// Why a VM could not be prepared. It can still be migrated, without dedup.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Its RAM cannot be found.
    #[error("{vm}: {source}; the VM can be migrated, but without dedup")]
    Ram {
        /// The VM.
        vm: String,
        /// Why.
        source: crate::host::ram::RamError,
    },
    /// Its RAM cannot be read.
    #[error("{vm}: reading guest RAM: {source}")]
    Read {
        /// The VM.
        vm: String,
        /// From the kernel.
        source: std::io::Error,
    },
    /// Its dirty log cannot be had.
    #[error("{vm}: its dirty log: {what}; the VM can be migrated, but without dedup")]
    Log {
        /// The VM.
        vm: String,
        /// Why.
        what: String,
    },
    /// Somebody cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// Counted while preparation runs, for whoever watches.
#[derive(Debug, Default)]
pub struct PrepareProgress {
    /// Pages looked at.
    pub pages: AtomicU64,
    /// Of them uniform.
    pub uniform: AtomicU64,
    /// Pages left out because they are written to all the time.
    pub hot: AtomicU64,
    /// Pages there are to look at (holes are not counted).
    pub total: AtomicU64,
    /// Set to end it.
    pub cancel: AtomicBool,
}

/// What preparation learnt of one VM.
#[derive(Clone, Debug, Default)]
pub struct PreparedVm {
    /// Its RAM, open for reading; none if it cannot be read from outside.
    pub ram: Option<Arc<GuestRam>>,
    /// The VM with its dirty log on, if our own VMM runs it.
    pub guest: Option<Arc<Guest>>,
    /// By block of `ram`: page and digest of what is not uniform, ascending.
    blocks: Digests,
    /// By block name: pages whose content was seen once in the group.
    lone: Vec<(String, Vec<u32>)>,
    /// By block name: pages that are written all the time.
    hot: Vec<(String, Vec<u32>)>,
}

impl PreparedVm {
    /// A VM whose RAM can be read but was not hashed.
    #[must_use]
    pub fn unhashed(opened: Opened) -> Self {
        Self { ram: opened.ram, guest: opened.guest, ..Self::default() }
    }

    /// Every (block of `ram`, page, digest).
    pub fn digests(&self) -> impl Iterator<Item = (usize, u32, Digest)> + '_ {
        self.blocks.iter().enumerate().flat_map(|(b, v)| v.iter().map(move |(p, d)| (b, *p, *d)))
    }

    /// Pages that were not uniform.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.iter().map(Vec::len).sum()
    }
    /// Whether nothing but uniform pages was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes which pages need no hash when they first leave: those whose content `is_lone`.
    pub fn settle_hints(&mut self, is_lone: impl Fn(&Digest) -> bool) {
        let Some(ram) = &self.ram else { return };
        let lone =
            |pages: &Vec<(u32, Digest)>| pages.iter().filter(|(_, d)| is_lone(d)).map(|(p, _)| *p).collect();
        self.lone =
            self.blocks.iter().zip(ram.blocks()).map(|(p, info)| (info.name.clone(), lone(p))).collect();
    }

    /// What the VM's stream needs of it: all but the digests, which only the plan and the push use.
    #[must_use]
    pub fn for_stream(&self) -> Self {
        Self {
            ram: self.ram.clone(),
            guest: self.guest.clone(),
            blocks: Digests::default(),
            lone: self.lone.clone(),
            hot: self.hot.clone(),
        }
    }

    /// Called with the stream's block list: what is known of each of its blocks.
    pub(super) fn block_finder(self) -> super::tap::BlockFinder {
        Box::new(move |list: &BlockList| {
            list.blocks()
                .iter()
                .map(|b| {
                    let readable = self
                        .ram
                        .as_ref()
                        .and_then(|r| r.find(&b.name).map(|i| r.blocks()[i].readable()))
                        .unwrap_or(false);
                    let mut info = BlockInfo::new(readable);
                    let of = |all: &[(String, Vec<u32>)]| {
                        let found = all.iter().find(|(name, _)| **name == *b.name);
                        found.map_or_else(Vec::new, |(_, pages)| pages.clone())
                    };
                    of(&self.lone).iter().for_each(|p| info.set_lone(*p));
                    of(&self.hot).iter().for_each(|p| info.set_hot(*p));
                    info
                })
                .collect()
        })
    }
}

/// Opens a VM's memory. From then on the dirty log is on, if it is a VM of our own VMM.
pub fn open(spec: &SourceSpec, setup: Duration) -> Result<Opened, MoveError> {
    match &spec.front {
        Front::Qmp(path) => {
            let ram = open_ram(path, setup)?;
            Ok(Opened { ram: Some(Arc::new(ram)), guest: None })
        }
        Front::Vmm(path) => {
            let guest = Arc::new(Guest::open(path, setup)?);
            Ok(Opened { ram: Some(guest.ram().clone()), guest: Some(guest) })
        }
    }
}

/// Opens a QEMU's RAM through its monitor.
fn open_ram(monitor: &Path, setup: Duration) -> Result<GuestRam, MoveError> {
    memory_of(&mut crate::net::qmp::Qmp::connect(monitor, setup)?)
}

/// What is known, while a VM is read, of where it writes ([`super::observe`]).
#[expect(missing_debug_implementations, reason = "a closure has nothing to show")]
pub struct Heat<'a> {
    /// The observation; its end is waited for before what is written to is read.
    pub observed: &'a Observed,
    /// The VM's number there.
    pub ix: usize,
    /// Blocks until the observation is over.
    pub wait: &'a dyn Fn(),
}

/// Hashes one VM and notes its digests in the table towards its target host. Call on a thread of its own, made idle
/// with [`crate::host::sched::idle_this_thread`]. `rate` in bytes a second bounds what it reads.
///
/// Regions that are being written to are read last, and pages that are hot by then are left out: their digests would
/// be stale before they leave, and a plan made with them would carry what nobody needs.
pub fn scan(
    group: &SourceGroup,
    spec: &SourceSpec,
    ram: &Arc<GuestRam>,
    guest: Option<&Arc<Guest>>,
    rate: u64,
    progress: &PrepareProgress,
    heat: &Heat<'_>,
) -> Result<PreparedVm, PrepareError> {
    let mut reader = Reader {
        hasher: &group.hashers[usize::from(spec.domain)],
        table: &group.tables[usize::from(spec.target.0)],
        vm: &spec.name,
        ram,
        rate,
        progress,
        buf: vec![0; CHUNK as usize * PAGE_SIZE],
        started: Instant::now(),
        read: 0,
        hot: 0,
        kept: Vec::with_capacity(CHUNK as usize),
    };
    let mut blocks = Vec::new();
    let mut later: Vec<(usize, Range<u32>)> = Vec::new();
    for block in 0..ram.blocks().len() {
        let mut pages = Vec::new();
        for range in ram.data_ranges(block) {
            for part in chunks(range) {
                let region = region_of(block, part.start);
                if region.is_some_and(|r| heat.observed.is_warm(heat.ix, r)) {
                    later.push((block, part));
                } else {
                    reader.chunk(block, part, &|_| false, &mut pages)?;
                }
            }
        }
        blocks.push(pages);
    }
    (heat.wait)();
    let seen = heat.observed.get(heat.ix).and_then(Result::ok);
    let hot = |block, page| match (&seen, page_of(block, page)) {
        (Some(seen), Some(page)) => seen.heat.is_hot(page),
        _ => false,
    };
    for (block, part) in later {
        reader.chunk(block, part, &|page| hot(block, page), &mut blocks[block])?;
    }
    if let Some(g) = guest {
        g.harvest().map_err(|e| PrepareError::Log { vm: spec.name.clone(), what: e.to_string() })?;
    }
    let stale = |block, page| guest.zip(page_of(block, page)).is_some_and(|(g, addr)| g.is_stale(addr));
    // What turned out hot after it had been read, or is known to have been written.
    for (block, pages) in blocks.iter_mut().enumerate() {
        let before = pages.len();
        pages.retain(|(page, _)| !hot(block, *page) && !stale(block, *page));
        reader.hot += (before - pages.len()) as u64;
        pages.sort_unstable_by_key(|(page, _)| *page);
    }
    progress.hot.fetch_add(reader.hot, Ordering::Relaxed);
    let blocks = Arc::new(blocks);
    if let Some(g) = guest {
        g.learn(blocks.clone());
    }
    let hot = seen.map_or_else(Vec::new, |s| by_block(ram, &s.heat.hot_pages()));
    Ok(PreparedVm { ram: Some(ram.clone()), guest: guest.cloned(), blocks, hot, ..PreparedVm::default() })
}

/// Pages by the names of their blocks.
fn by_block(ram: &GuestRam, pages: &[PageAddr]) -> Vec<(String, Vec<u32>)> {
    let of = |n: usize| pages.iter().filter(move |a| usize::from(a.block.0) == n).map(|a| a.page);
    ram.blocks().iter().enumerate().map(|(n, b)| (b.name.clone(), of(n).collect())).collect()
}

/// A range in pieces of up to [`CHUNK`] pages, none of which crosses a region's border.
fn chunks(range: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = (at / CHUNK + 1).saturating_mul(CHUNK).min(range.end);
        let part = at..end;
        at = end;
        (!part.is_empty()).then_some(part)
    })
}

fn page_of(block: usize, page: u32) -> Option<PageAddr> {
    Some(PageAddr { block: BlockIx(u16::try_from(block).ok()?), page })
}

fn region_of(block: usize, page: u32) -> Option<RegionAddr> {
    page_of(block, page).map(RegionAddr::of)
}

/// Reads and hashes pieces of one VM.
struct Reader<'a> {
    hasher: &'a crate::core::digest::Hasher,
    table: &'a Mutex<crate::core::pair::PairTable>,
    vm: &'a str,
    ram: &'a GuestRam,
    rate: u64,
    progress: &'a PrepareProgress,
    buf: Vec<u8>,
    started: Instant,
    read: u64,
    hot: u64,
    /// Of the piece at hand: pages to be hashed.
    kept: Vec<u32>,
}

impl Reader<'_> {
    fn chunk(
        &mut self,
        block: usize,
        part: Range<u32>,
        hot: &dyn Fn(u32) -> bool,
        pages: &mut Vec<(u32, Digest)>,
    ) -> Result<(), PrepareError> {
        if self.progress.cancel.load(Ordering::Relaxed) {
            return Err(PrepareError::Cancelled);
        }
        let n = part.end - part.start;
        let bytes = &mut self.buf[..n as usize * PAGE_SIZE];
        self.ram
            .read_at(block, part.start, bytes)
            .map_err(|source| PrepareError::Read { vm: self.vm.to_owned(), source })?;
        let (whole, _) = bytes.as_chunks::<PAGE_SIZE>();
        let from = pages.len();
        let mut left_out = 0;
        self.kept.clear();
        for (page, content) in part.clone().zip(whole) {
            if uniform(content).is_some() {
                continue;
            }
            if hot(page) { left_out += 1 } else { self.kept.push(page) }
        }
        let mut numbers = self.kept.iter();
        let contents = self.kept.iter().filter_map(|page| whole.get((page - part.start) as usize));
        self.hasher.pages(contents, |d| pages.extend(numbers.next().map(|page| (*page, d))));
        let mut table = lock(self.table);
        for (_, d) in &pages[from..] {
            table.note(*d);
        }
        drop(table);
        let kept = (pages.len() - from) as u64 + left_out;
        self.hot += left_out;
        self.progress.pages.fetch_add(n.into(), Ordering::Relaxed);
        self.progress.uniform.fetch_add(u64::from(n) - kept, Ordering::Relaxed);
        self.read += u64::from(n) * PAGE_SIZE as u64;
        pace(self.started, self.read, self.rate);
        Ok(())
    }
}

/// Sleeps until `done` bytes are not more than `rate` allows since `started`.
pub(super) fn pace(started: Instant, done: u64, rate: u64) {
    let due = Duration::from_secs_f64(done as f64 / rate.max(1) as f64);
    let ahead = due.saturating_sub(started.elapsed());
    if ahead > Duration::from_millis(5) {
        std::thread::sleep(ahead);
    }
}

/// Everything this host would register: each distinct digest with the target hosts its VMs need it at and how many pages
/// have it. In the order of the guests' memory, which the plan keeps together (`core::plan`).
#[must_use]
pub fn needs_by_digest(vms: &[(&SourceSpec, &PreparedVm)]) -> Vec<(Digest, Vec<HostIx>, u32)> {
    let mut at: HashMap<Digest, usize> = HashMap::new();
    let mut out: Vec<(Digest, Vec<HostIx>, u32)> = Vec::new();
    for (spec, vm) in vms {
        for (_, _, d) in vm.digests() {
            let at = *at.entry(d).or_insert_with(|| {
                out.push((d, Vec::new(), 0));
                out.len() - 1
            });
            let (_, targets, pages) = &mut out[at];
            if !targets.contains(&spec.target) {
                targets.push(spec.target);
            }
            *pages += 1;
        }
    }
    out
}

/// Puts the plan into the tables: what will be in each target host's store, under which name.
pub fn apply_plan(group: &SourceGroup, plan: &HostPlan) {
    for c in &plan.carry {
        for t in std::iter::once(c.first).chain(c.forward.iter()) {
            if let Some(table) = group.tables.get(usize::from(t.0)) {
                lock(table).planned(c.digest, c.id);
            }
        }
    }
    for r in &plan.remote {
        for t in r.targets.iter() {
            if let Some(table) = group.tables.get(usize::from(t.0)) {
                lock(table).planned(r.digest, r.id);
            }
        }
    }
}
