//! Preparation (paper §2.4): hashes the VMs' RAM from outside while they run, at idle priority and a bounded rate,
//! fills the host's dedup tables, and turns the share plan into hints. All hashes made here are hints: they go stale
//! as guests write, and a page is looked at again when it leaves.
//!
//! Memory: 24 bytes a page that is not uniform, 0.6 % of guest RAM, until the VM has left.

use super::{SourceGroup, SourceSpec};
use crate::core::digest::{Digest, uniform};
use crate::core::plan::HostPlan;
use crate::core::qemu::BlockList;
use crate::core::source::BlockInfo;
use crate::core::units::{HostIx, PAGE_SIZE};
use crate::flow::lock;
use crate::host::ram::GuestRam;
use crate::host::sched;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

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
    /// Pages there are to look at (holes are not counted).
    pub total: AtomicU64,
    /// Set to end it.
    pub cancel: AtomicBool,
}

/// What preparation learnt of one VM.
#[derive(Debug, Default)]
pub struct PreparedVm {
    /// Its RAM, open for reading; none if it cannot be read from outside.
    pub ram: Option<Arc<GuestRam>>,
    /// By block of `ram`: page and digest of what is not uniform, ascending.
    blocks: Vec<Vec<(u32, Digest)>>,
    /// By block name: pages whose content was seen once in the group.
    lone: Vec<(String, Vec<u32>)>,
}

impl PreparedVm {
    /// A VM whose RAM can be read but was not hashed.
    #[must_use]
    pub fn unhashed(ram: Option<Arc<GuestRam>>) -> Self {
        Self { ram, ..Self::default() }
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
        Self { ram: self.ram.clone(), blocks: Vec::new(), lone: self.lone.clone() }
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
                    for (name, pages) in &self.lone {
                        if *name == *b.name {
                            pages.iter().for_each(|p| info.set_lone(*p));
                        }
                    }
                    info
                })
                .collect()
        })
    }
}

/// Opens a VM's RAM through its monitor.
pub fn open_ram(spec: &SourceSpec, setup: Duration) -> Result<GuestRam, String> {
    let mut qmp = crate::net::qmp::Qmp::connect(&spec.qmp, setup).map_err(|e| e.to_string())?;
    let pid = sched::peer_pid(qmp.as_fd())
        .map_err(|e| format!("{}: {e}", spec.qmp.display()))?
        .ok_or_else(|| format!("{}: QEMU's process is not visible from here", spec.qmp.display()))?;
    GuestRam::open(pid, &mut |line| qmp.hmp(line).map_err(Into::into)).map_err(|e| e.to_string())
}

/// Hashes one VM and notes its digests in the table towards its target host. Call on a thread of its own, made idle
/// with [`sched::idle_this_thread`]. `rate` in bytes a second bounds what it reads.
pub fn scan(
    group: &SourceGroup,
    spec: &SourceSpec,
    ram: &Arc<GuestRam>,
    rate: u64,
    progress: &PrepareProgress,
) -> Result<PreparedVm, PrepareError> {
    let hasher = &group.hashers[usize::from(spec.domain)];
    let table = &group.tables[usize::from(spec.target.0)];
    let mut out = PreparedVm { ram: Some(ram.clone()), ..PreparedVm::default() };
    let mut buf = vec![0; CHUNK as usize * PAGE_SIZE];
    let started = Instant::now();
    let mut read = 0u64;
    for block in 0..ram.blocks().len() {
        let mut pages = Vec::new();
        for range in ram.data_ranges(block) {
            let mut at = range.start;
            while at < range.end {
                if progress.cancel.load(Ordering::Relaxed) {
                    return Err(PrepareError::Cancelled);
                }
                let n = CHUNK.min(range.end - at);
                let bytes = &mut buf[..n as usize * PAGE_SIZE];
                ram.read_at(block, at, bytes)
                    .map_err(|source| PrepareError::Read { vm: spec.name.clone(), source })?;
                let (whole, _) = bytes.as_chunks::<PAGE_SIZE>();
                let from = pages.len();
                for (i, page) in whole.iter().enumerate() {
                    if uniform(page).is_none() {
                        pages.push((at + i as u32, hasher.page(page)));
                    }
                }
                let mut table = lock(table);
                for (_, d) in &pages[from..] {
                    table.note(*d);
                }
                drop(table);
                progress.pages.fetch_add(n.into(), Ordering::Relaxed);
                progress.uniform.fetch_add(u64::from(n) - (pages.len() - from) as u64, Ordering::Relaxed);
                at += n;
                read += u64::from(n) * PAGE_SIZE as u64;
                pace(started, read, rate);
            }
        }
        out.blocks.push(pages);
    }
    Ok(out)
}

/// Sleeps until `done` bytes are not more than `rate` allows since `started`.
fn pace(started: Instant, done: u64, rate: u64) {
    let due = Duration::from_secs_f64(done as f64 / rate.max(1) as f64);
    let ahead = due.saturating_sub(started.elapsed());
    if ahead > Duration::from_millis(5) {
        std::thread::sleep(ahead);
    }
}

/// Everything this host would register: each distinct digest with the target hosts its VMs need it at.
#[must_use]
pub fn needs_by_digest(vms: &[(&SourceSpec, &PreparedVm)]) -> Vec<(Digest, Vec<HostIx>, u32)> {
    let mut map: HashMap<Digest, (Vec<HostIx>, u32)> = HashMap::new();
    for (spec, vm) in vms {
        for (_, _, d) in vm.digests() {
            let e = map.entry(d).or_default();
            if !e.0.contains(&spec.target) {
                e.0.push(spec.target);
            }
            e.1 += 1;
        }
    }
    let mut out: Vec<_> = map.into_iter().map(|(d, (t, n))| (d, t, n)).collect();
    out.sort_unstable_by_key(|e| e.0);
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
