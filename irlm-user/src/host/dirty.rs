//! Which pages of which VM are dirtied, from outside of QEMU: programs in the kernel where it has any that can tell
//! ([`Tracer`]), looking at contents where it has none ([`content`]). Which one is in force is chosen when the agent
//! starts, by trying; the others' refusals are kept for whoever asks why.
//!
//! Samplers are a help to planning. Nothing here can stop an agent or a migration.

// BTF of the running kernel.
mod btf;
// The sampler that needs no kernel.
pub mod content;
// Maps shown to operators and tools.
mod pinned;

use crate::host::bpf::error::chain;
use aya::maps::{Array, HashMap, MapData, PerCpuHashMap, PerCpuValues, RingBuf};
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::programs::{FEntry, ProgramError, RawTracePoint, fentry::FEntryLinkId};
use aya::{Btf, Ebpf, EbpfLoader};
use irlm_common::ABI_MARK;
use irlm_common::dirty::{
    DirtyConfig, FAULT_PROGRAMS, FUNCTION_PROGRAM, MAX_DIRTY_VMS, RING_PROGRAM, RegionKey, SlotKey, Source,
    VmTotals,
};
pub use irlm_common::dirty::{GFN_SLOT, PageEvent, SlotPlace};
pub use pinned::clear_stale;
use pinned::{MAPS, pin};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The object of this build; empty if it was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/irlm-dirty"));

/// The kernel's number of its first PID namespace (`PROC_PID_INIT_INO`).
const FIRST_PID_NS: &str = "pid:[4026531836]";

/// A way to see dirtied pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampler {
    /// fentry of `mark_page_dirty_in_slot`.
    Function,
    /// Raw tracepoint `kvm_dirty_ring_push`.
    Ring,
    /// Raw tracepoint `kvm_page_fault`, write faults.
    Faults,
    /// The same random pages read again and again.
    Content,
    /// The dirty log of a VMM of our own, which it hands out.
    Log,
}

impl Sampler {
    /// Those in the kernel, the best first.
    pub const KERNEL: [Self; 3] = [Self::Function, Self::Ring, Self::Faults];

    /// For tables and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Function => "fentry mark_page_dirty_in_slot",
            Self::Ring => "raw_tp kvm_dirty_ring_push",
            Self::Faults => "raw_tp kvm_page_fault",
            Self::Content => "sampled content",
            Self::Log => "the VMM's dirty log",
        }
    }

    /// What it can and cannot see, in a line.
    #[must_use]
    pub fn sees(self) -> &'static str {
        match self {
            Self::Function => {
                "every page KVM marks dirty, ring or bitmap, once a clearing of the log; not what QEMU's own devices or \
                 vhost write"
            }
            Self::Ring => {
                "every page a vCPU dirties in VMs with -accel kvm,dirty-ring-size=N, once a clearing of the ring; not \
                 what QEMU's own devices or vhost write"
            }
            Self::Faults => {
                "the first write to a page after the log was cleared, where the processor does not log writes itself \
                 (no PML); a hint, not a count"
            }
            Self::Content => {
                "changed content of random pages, at most one change a look, in any guest, devices' writes included; not \
                 writes of what was there before"
            }
            Self::Log => {
                "every page written since it was looked at last, by vCPUs and by the VMM's own devices"
            }
        }
    }

    fn source(self) -> Option<Source> {
        match self {
            Self::Function => Some(Source::Function),
            Self::Ring => Some(Source::Ring),
            Self::Faults => Some(Source::Fault),
            Self::Content | Self::Log => None,
        }
    }
}

/// Why a VM is not watched by the kernel, or its figures cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The sampler is not to be had here.
    #[error("sampler {0} is not to be had here: {1}")]
    NotHere(&'static str, String),
    /// The VM cannot be registered.
    #[error("process {pid} not registered with the dirty-page programs (at most {MAX_DIRTY_VMS}): {text}")]
    Register {
        /// QEMU's process.
        pid: u32,
        /// What the kernel said.
        text: String,
    },
    /// A map cannot be read or written.
    #[error("dirty-page maps: {0}")]
    Maps(String),
}

/// A VM's figures since it was registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Dirtyings seen. Exact.
    pub seen: u64,
    /// Of them looked at by region.
    pub sampled: u64,
    /// Sampled, and not counted by region for want of room.
    pub region_lost: u64,
    /// Sampled, and not sent as page events because the ring buffer was full.
    pub page_lost: u64,
}

/// Sampled dirtyings of one region since the VM was registered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionCount {
    /// KVM's memory slot, or [`GFN_SLOT`].
    pub slot: u32,
    /// Page number in the slot / 512.
    pub region: u32,
    /// How often.
    pub count: u64,
}

/// What became of trying one sampler.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tried {
    /// Which.
    pub sampler: Sampler,
    /// Why not; `None`: it works.
    pub refused: Option<String>,
}

/// The programs, loaded; shared by all who watch.
#[derive(Debug)]
pub struct Tracer {
    tried: Vec<Tried>,
    loaded: Option<Mutex<Loaded>>,
}

struct Loaded {
    ebpf: Ebpf,
    config: Array<MapData, DirtyConfig>,
    settings: DirtyConfig,
    vms: PerCpuHashMap<MapData, u32, VmTotals>,
    regions: HashMap<MapData, RegionKey, u64>,
    slots: HashMap<MapData, SlotKey, SlotPlace>,
    pages: RingBuf<MapData>,
    fault_program: &'static str,
    links: Vec<(Sampler, Link)>,
    watched: Vec<(u32, Sampler)>,
    pins: Option<crate::host::bpf::pins::Pins>,
    /// Nobody is watched any more.
    ended: bool,
}

enum Link {
    Function(FEntryLinkId),
    Raw(&'static str, RawTracePointLinkId),
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("settings", &self.settings).field("watched", &self.watched).finish()
    }
}

fn maps(e: &(dyn std::error::Error + 'static)) -> DirtyError {
    DirtyError::Maps(chain(e))
}

impl Tracer {
    /// Loads what this kernel takes; never fails, see [`Tracer::tried`]. Maps are shown in `pin_dir`, if that can be.
    #[must_use]
    pub fn load(pin_dir: Option<&Path>) -> Self {
        Self::load_object(OBJECT, pin_dir)
    }

    /// As [`Tracer::load`], with another object.
    #[must_use]
    pub fn load_object(object: &[u8], pin_dir: Option<&Path>) -> Self {
        match Loaded::new(object, pin_dir) {
            Ok((loaded, tried)) => {
                let any = tried.iter().any(|t| t.refused.is_none());
                Self { tried, loaded: any.then(|| Mutex::new(loaded)) }
            }
            Err(why) => {
                if let Some(dir) = pin_dir {
                    clear_stale(dir);
                }
                Self::disabled(&why)
            }
        }
    }

    /// Takes programs and pins off now, whoever still has a handle; nothing is watched from here on. For a process that
    /// ends in order: a thread that lives a little longer than the rest must not leave them behind. May be repeated.
    pub fn shut_down(&self) {
        if let Some(mut l) = self.lock() {
            l.ended = true;
            l.watched.clear();
            l.detach_idle();
            l.pins = None;
        }
    }

    /// One that watches nothing, and why.
    #[must_use]
    pub fn disabled(why: &str) -> Self {
        let refused = Some(why.to_owned());
        let tried = Sampler::KERNEL.iter().map(|s| Tried { sampler: *s, refused: refused.clone() }).collect();
        Self { tried, loaded: None }
    }

    /// What was tried, in order, and why it was refused.
    #[must_use]
    pub fn tried(&self) -> &[Tried] {
        &self.tried
    }

    /// The best sampler for a VM: of those that work, the first that can see it.
    #[must_use]
    pub fn best(&self, has_dirty_ring: bool) -> Sampler {
        self.tried
            .iter()
            .filter(|t| t.refused.is_none())
            .map(|t| t.sampler)
            .find(|s| *s != Sampler::Ring || has_dirty_ring)
            .unwrap_or(Sampler::Content)
    }

    fn lock(&self) -> Option<MutexGuard<'_, Loaded>> {
        self.loaded.as_ref().map(|l| l.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn need(&self, what: Sampler) -> Result<MutexGuard<'_, Loaded>, DirtyError> {
        let why = || {
            let tried = self.tried.iter().find(|t| t.sampler == what);
            tried.and_then(|t| t.refused.clone()).unwrap_or_else(|| "it is not in the kernel".into())
        };
        match self.lock() {
            Some(l) if self.tried.iter().any(|t| t.sampler == what && t.refused.is_none()) => Ok(l),
            _ => Err(DirtyError::NotHere(what.name(), why())),
        }
    }

    /// One dirtying in `one_in` is looked at by region, and as a page event if `pages`. At once, for all VMs.
    pub fn set_rate(&self, one_in: u32, pages: bool) -> Result<(), DirtyError> {
        let Some(mut l) = self.lock() else { return Ok(()) };
        // Beyond it the gap's arithmetic would overflow, and nothing would be sampled in a VM's life.
        l.settings.one_in = one_in.min(1 << 30);
        l.settings.pages = u32::from(pages);
        let settings = l.settings;
        l.config.set(0, settings, 0).map_err(|e| maps(&e))
    }

    /// Watches the VM of process `pid` from now on, all its counts 0.
    pub fn watch(&self, pid: u32, sampler: Sampler) -> Result<(), DirtyError> {
        let mut l = self.need(sampler)?;
        if l.ended {
            return Err(DirtyError::NotHere(sampler.name(), "the agent is ending".into()));
        }
        let source = sampler.source().map_or(0, |s| s as u64);
        let fail = |text: String| DirtyError::Register { pid, text };
        let cpus = aya::util::nr_cpus().map_err(|(what, e)| fail(format!("{what}: {e}")))?;
        let values = PerCpuValues::try_from(vec![VmTotals { source, ..VmTotals::default() }; cpus])
            .map_err(|e| fail(e.to_string()))?;
        l.forget(pid);
        l.attach(sampler).map_err(|e| fail(chain(&e)))?;
        l.watched.push((pid, sampler));
        let inserted = l.vms.insert(pid, values, 0);
        if let Err(e) = inserted {
            l.forget(pid);
            return Err(fail(chain(&e)));
        }
        Ok(())
    }

    /// Watches it no more; its counts go. Programs that watch nobody any more are taken off.
    pub fn unwatch(&self, pid: u32) {
        if let Some(mut l) = self.lock() {
            l.forget(pid);
        }
    }

    /// A VM's totals; `None` if it is not watched.
    #[must_use]
    pub fn totals(&self, pid: u32) -> Option<Totals> {
        let l = self.lock()?;
        let mut sum = VmTotals::default();
        l.vms.get(&pid, 0).ok()?.iter().for_each(|part| sum.add(part));
        let VmTotals { seen, sampled, region_lost, page_lost, .. } = sum;
        Some(Totals { seen, sampled, region_lost, page_lost })
    }

    /// A VM's sampled dirtyings by region.
    pub fn regions(&self, pid: u32) -> Result<Vec<RegionCount>, DirtyError> {
        let Some(l) = self.lock() else { return Ok(vec![]) };
        let mut out = Vec::new();
        for entry in l.regions.iter() {
            let (key, count) = entry.map_err(|e| maps(&e))?;
            if key.tgid == pid {
                out.push(RegionCount { slot: key.slot, region: key.region, count });
            }
        }
        Ok(out)
    }

    /// Where a VM's memory slots lie, as far as the programs have met them.
    pub fn slots(&self, pid: u32) -> Result<Vec<(u32, SlotPlace)>, DirtyError> {
        let Some(l) = self.lock() else { return Ok(vec![]) };
        let mut out = Vec::new();
        for entry in l.slots.iter() {
            let (key, place) = entry.map_err(|e| maps(&e))?;
            if key.tgid == pid {
                out.push((key.slot, place));
            }
        }
        Ok(out)
    }

    /// Takes all page events that are there, of all VMs.
    pub fn drain(&self, mut each: impl FnMut(PageEvent)) {
        let Some(mut l) = self.lock() else { return };
        while let Some(item) = l.pages.next() {
            let word =
                |at: usize| item.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
            let page = item.get(8..16).and_then(|b| b.try_into().ok()).map(u64::from_ne_bytes);
            if let (Some(tgid), Some(slot), Some(page)) = (word(0), word(4), page) {
                each(PageEvent { tgid, slot, page });
            }
        }
    }

    /// How often the programs ran, and how long in all; only while the kernel clocks them ([`clock_programs`]).
    #[must_use]
    pub fn runs(&self) -> Option<(u64, Duration)> {
        let l = self.lock()?;
        let infos = l.ebpf.programs().filter_map(|(_, p)| p.info().ok());
        Some(infos.fold((0, Duration::ZERO), |(n, time), i| (n + i.run_count(), time + i.run_time())))
    }

    /// How often the kernel did not run a program because it was running already on that processor: dirtyings that
    /// no total has. `None` where the kernel does not tell (before 5.12).
    #[must_use]
    pub fn missed(&self) -> Option<u64> {
        let l = self.lock()?;
        let mut sum = None;
        for (_, program) in l.ebpf.programs() {
            let Ok(fd) = program.fd() else { continue };
            let info = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let text = std::fs::read_to_string(info).ok()?;
            let line = text.lines().find_map(|l| l.strip_prefix("recursion_misses:"));
            let n: u64 = line?.trim().parse().ok()?;
            *sum.get_or_insert(0) += n;
        }
        sum
    }
}

/// Has the kernel clock all eBPF programs as long as the value lives; it costs each run some ten nanoseconds.
pub fn clock_programs() -> std::io::Result<std::os::fd::OwnedFd> {
    aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(|e| std::io::Error::other(chain(&e)))
}

impl Loaded {
    /// Loads the object and each of its programs that the kernel takes, and attaches each once to see.
    fn new(object: &[u8], pin_dir: Option<&Path>) -> Result<(Self, Vec<Tried>), String> {
        if object.is_empty() {
            return Err("this build of irlm has no dirty-page object: build it with `cargo xtask`".into());
        }
        if !object.windows(ABI_MARK.len()).any(|part| part == ABI_MARK) {
            return Err(
                "the dirty-page object is of another version: build it anew with `cargo xtask`".into()
            );
        }
        // The programs know processes by their numbers in the first namespace.
        let ns = std::fs::read_link("/proc/self/ns/pid").map_err(|e| format!("/proc/self/ns/pid: {e}"))?;
        if ns.as_os_str() != FIRST_PID_NS {
            return Err("the agent runs in a PID namespace of its own, in which the kernel's process numbers mean nothing".into());
        }
        let btf = btf::Btf::running().map_err(|e| format!("the kernel shows no BTF: {e}"))?;
        let mut ebpf = EbpfLoader::new().load(object).map_err(|e| chain(&e))?;
        let mut take =
            |name: &str| ebpf.take_map(name).ok_or_else(|| format!("the object has no map {name}"));
        let [config, vms, regions, slots, pages] =
            [take(MAPS[0])?, take(MAPS[1])?, take(MAPS[2])?, take(MAPS[3])?, take(MAPS[4])?];
        let pins = pin_dir.and_then(|dir| {
            let maps = [&config, &vms, &regions, &slots, &pages];
            let pinned = pin(dir, maps);
            pinned
                .inspect_err(|e| tracing::warn!("dirty-page maps not pinned in {}: {e}", dir.display()))
                .ok()
        });
        let fault_program = btf
            .tracepoint("kvm_page_fault")
            .and_then(|n| FAULT_PROGRAMS.iter().find(|(args, _)| *args == n))
            .map_or("", |(_, name)| name);
        let mut this = Self {
            config: Array::try_from(config).map_err(|e| chain(&e))?,
            settings: settings(&btf),
            vms: PerCpuHashMap::try_from(vms).map_err(|e| chain(&e))?,
            regions: HashMap::try_from(regions).map_err(|e| chain(&e))?,
            slots: HashMap::try_from(slots).map_err(|e| chain(&e))?,
            pages: RingBuf::try_from(pages).map_err(|e| chain(&e))?,
            ebpf,
            fault_program,
            links: vec![],
            watched: vec![],
            pins,
            ended: false,
        };
        this.config.set(0, this.settings, 0).map_err(|e| chain(&e))?;
        let tried = Sampler::KERNEL
            .iter()
            .map(|s| Tried { sampler: *s, refused: this.try_out(*s, &btf).err() })
            .collect();
        Ok((this, tried))
    }

    /// Loads a sampler's program, and attaches it to see whether that works too.
    fn try_out(&mut self, sampler: Sampler, btf: &btf::Btf) -> Result<(), String> {
        match sampler {
            Sampler::Function => {
                const FUNCTION: &str = "mark_page_dirty_in_slot";
                match btf.function(FUNCTION) {
                    None => return Err("the kernel has no KVM, or not loaded".into()),
                    Some((_, false)) => {
                        return Err("KVM is a module here, whose functions aya cannot attach to".into());
                    }
                    Some((3, true)) if self.settings.offsets != 0 => {}
                    Some((n, true)) => {
                        return Err(format!("not known in the form this kernel has it ({n} arguments)"));
                    }
                }
                let kernel = Btf::from_sys_fs().map_err(|e| chain(&e))?;
                let program: &mut FEntry = self.program(FUNCTION_PROGRAM)?;
                // A refusal outright comes with an empty log of the verifier, which says nothing.
                let plain = |text: String| text.split(". Verifier output: :").next().unwrap_or("").to_owned();
                program.load(FUNCTION, &kernel).map_err(|e| plain(chain(&e)))?;
            }
            Sampler::Ring => {
                match btf.tracepoint("kvm_dirty_ring_push") {
                    Some(3) => {}
                    None => return Err("this kernel's KVM has no dirty ring, or is not loaded".into()),
                    Some(n) => return Err(format!("not known with {n} arguments")),
                }
                self.program::<RawTracePoint>(RING_PROGRAM)?.load().map_err(|e| chain(&e))?;
            }
            Sampler::Faults => {
                if self.fault_program.is_empty() {
                    return Err("the kernel has no KVM, or not loaded, or its tracepoint is not known".into());
                }
                let name = self.fault_program;
                self.program::<RawTracePoint>(name)?.load().map_err(|e| chain(&e))?;
            }
            Sampler::Content | Sampler::Log => return Err("is not in the kernel".into()),
        }
        self.attach(sampler).map_err(|e| chain(&e))?;
        self.detach_idle();
        Ok(())
    }

    fn program<'e, P>(&'e mut self, name: &str) -> Result<&'e mut P, String>
    where
        &'e mut P: TryFrom<&'e mut aya::programs::Program, Error = ProgramError>,
    {
        let program =
            self.ebpf.program_mut(name).ok_or_else(|| format!("the object has no program {name}"))?;
        program.try_into().map_err(|e: ProgramError| chain(&e))
    }

    fn attach(&mut self, sampler: Sampler) -> Result<(), ProgramError> {
        if self.links.iter().any(|(s, _)| *s == sampler) {
            return Ok(());
        }
        let mut raw = |program: &'static str, tracepoint: &str| {
            let p = self.ebpf.program_mut(program).ok_or(ProgramError::NotLoaded)?;
            let p: &mut RawTracePoint = p.try_into()?;
            p.attach(tracepoint).map(|id| Link::Raw(program, id))
        };
        let link = match sampler {
            Sampler::Function => {
                let p = self.ebpf.program_mut(FUNCTION_PROGRAM).ok_or(ProgramError::NotLoaded)?;
                let p: &mut FEntry = p.try_into()?;
                Link::Function(p.attach()?)
            }
            Sampler::Ring => raw(RING_PROGRAM, "kvm_dirty_ring_push")?,
            Sampler::Faults => raw(self.fault_program, "kvm_page_fault")?,
            Sampler::Content | Sampler::Log => return Ok(()),
        };
        self.links.push((sampler, link));
        Ok(())
    }

    /// Takes programs off that watch nobody: then they cost nothing.
    fn detach_idle(&mut self) {
        let (keep, idle): (Vec<_>, Vec<_>) =
            self.links.drain(..).partition(|(s, _)| self.watched.iter().any(|(_, w)| w == s));
        self.links = keep;
        for (_, link) in idle {
            // A program that cannot be taken off goes with the agent.
            match link {
                Link::Function(id) => {
                    if let Ok(p) = self.program::<FEntry>(FUNCTION_PROGRAM) {
                        p.detach(id).ok();
                    }
                }
                Link::Raw(name, id) => {
                    if let Ok(p) = self.program::<RawTracePoint>(name) {
                        p.detach(id).ok();
                    }
                }
            }
        }
    }

    fn forget(&mut self, pid: u32) {
        let before = self.watched.len();
        self.watched.retain(|(p, _)| *p != pid);
        if self.watched.len() == before {
            return;
        }
        self.vms.remove(&pid).ok();
        let regions: Vec<RegionKey> = self.regions.keys().flatten().filter(|k| k.tgid == pid).collect();
        regions.iter().for_each(|k| drop(self.regions.remove(k)));
        let slots: Vec<SlotKey> = self.slots.keys().flatten().filter(|k| k.tgid == pid).collect();
        slots.iter().for_each(|k| drop(self.slots.remove(k)));
        self.detach_idle();
    }
}

/// Where this kernel keeps what the programs read; without it the slots' places stay unknown.
fn settings(btf: &btf::Btf) -> DirtyConfig {
    let none = DirtyConfig { one_in: 1, ..DirtyConfig::default() };
    let slots = || {
        let slot = |member| btf.member("kvm_memory_slot", member).map(|(at, _)| at);
        Some(DirtyConfig {
            offsets: 1,
            slot_base: slot("base_gfn")?,
            slot_pages: slot("npages")?,
            slot_hva: slot("userspace_addr")?,
            slot_flags: slot("flags")?,
            slot_id: slot("id")?,
            slot_as: slot("as_id")?,
            ..none
        })
    };
    let mut known = slots().unwrap_or(none);
    // An index into a table before Linux 5.17, of no use here.
    if let (Some((ring, _)), Some((slot, true))) =
        (btf.member("kvm_vcpu", "dirty_ring"), btf.member("kvm_vcpu", "last_used_slot"))
    {
        known.vcpu_ring = ring;
        known.vcpu_slot = slot;
    }
    known
}
