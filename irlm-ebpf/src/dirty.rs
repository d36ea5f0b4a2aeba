//! Which guest pages are dirtied, as the kernel's KVM sees it: totals, counts by 2 MiB region, and single pages when
//! asked. An object of its own, so that a kernel that refuses tracing still takes the classifiers. Nothing here
//! changes what the kernel does.
#![no_std]
#![no_main]
// For the one atomic addition: `core` offers none to targets without compare-and-swap, as BPF before v3 is.
#![feature(asm_experimental_arch)]

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_RB_NO_WAKEUP},
    btf_maps::{Array, HashMap, PerCpuHashMap, RingBuf},
    helpers::{bpf_get_current_pid_tgid, bpf_get_prandom_u32, bpf_probe_read_kernel},
    macros::{btf_map, fentry, raw_tracepoint},
    programs::{FEntryContext, RawTracePointContext},
};
use irlm_common::{
    ABI_MARK,
    dirty::{
        DirtyConfig, GFN_SLOT, MAX_DIRTY_VMS, MAX_REGIONS, MAX_SLOTS, PAGES_BYTES, PageEvent, REGION_BITS,
        RegionKey, SlotKey, SlotPlace, Source, VmTotals,
    },
};

/// Settings, by user space.
#[btf_map]
static IRLM_DIRTY_CFG: Array<DirtyConfig, 1> = Array::new();

/// The VMs of interest, and their totals. All maps are preallocated: memory is not to be had in every place these
/// programs run.
#[btf_map]
static IRLM_DIRTY_VMS: PerCpuHashMap<u32, VmTotals, { MAX_DIRTY_VMS as usize }> = PerCpuHashMap::new();

/// Sampled dirtyings by region.
#[btf_map]
static IRLM_DIRTY_REG: HashMap<RegionKey, u64, { MAX_REGIONS as usize }> = HashMap::new();

/// Where the slots lie.
#[btf_map]
static IRLM_DIRTY_SLOT: HashMap<SlotKey, SlotPlace, { MAX_SLOTS as usize }> = HashMap::new();

/// Sampled pages, one by one: [`PageEvent`]. (A type in the map would be a value size to libbpf, which ring buffers
/// may not have.)
#[btf_map]
static IRLM_DIRTY_PAGE: RingBuf<(), { PAGES_BYTES as usize }> = RingBuf::new();

/// Where to learn a slot's place from.
enum Where {
    /// The slot itself.
    Slot(u64),
    /// The vCPU's dirty ring, which is a part of the vCPU.
    Ring(u64),
    /// Nowhere.
    Unknown,
}

/// `mark_page_dirty_in_slot(kvm, memslot, gfn)`: every page that any vCPU or KVM itself dirties, bitmap or ring.
#[fentry(function = "mark_page_dirty_in_slot")]
pub fn irlm_dirty_func(ctx: FEntryContext) -> i32 {
    let (slot, gfn): (u64, u64) = (ctx.arg(1), ctx.arg(2));
    if let Some(cfg) = IRLM_DIRTY_CFG.get(0) {
        in_slot(cfg, slot, gfn);
    }
    0
}

#[inline(always)]
fn in_slot(cfg: &DirtyConfig, slot: u64, gfn: u64) -> Option<()> {
    let totals = watched(Source::Function)?;
    // KVM_MEM_LOG_DIRTY_PAGES: without it the function does nothing.
    if slot == 0 || read::<u32>(slot, cfg.slot_flags)? & 1 == 0 {
        return None;
    }
    let base = read::<u64>(slot, cfg.slot_base)?;
    dirtied(cfg, totals, slot_number(cfg, slot)?, gfn.wrapping_sub(base), &Where::Slot(slot));
    Some(())
}

/// `kvm_dirty_ring_push(ring, slot, offset)`: every page that a vCPU of a VM with a dirty ring dirties.
#[raw_tracepoint(tracepoint = "kvm_dirty_ring_push")]
pub fn irlm_dirty_ring(ctx: RawTracePointContext) -> i32 {
    let (ring, slot, page): (u64, u64, u64) = (ctx.arg(0), ctx.arg(1), ctx.arg(2));
    if let Some(cfg) = IRLM_DIRTY_CFG.get(0)
        && let Some(totals) = watched(Source::Ring)
    {
        dirtied(cfg, totals, slot as u32, page, &Where::Ring(ring));
    }
    0
}

/// `kvm_page_fault(vcpu, address, error code)`: the write faults among them.
#[raw_tracepoint(tracepoint = "kvm_page_fault")]
pub fn irlm_dirty_flt3(ctx: RawTracePointContext) -> i32 {
    fault(ctx.arg(1), ctx.arg(2));
    0
}

/// `kvm_page_fault(address, error code)`, as kernels before 6.2 have it.
#[raw_tracepoint(tracepoint = "kvm_page_fault")]
pub fn irlm_dirty_flt2(ctx: RawTracePointContext) -> i32 {
    fault(ctx.arg(0), ctx.arg(1));
    0
}

#[inline(always)]
fn fault(address: u64, code: u64) {
    // PFERR_WRITE_MASK
    if code & 2 != 0
        && let Some(cfg) = IRLM_DIRTY_CFG.get(0)
        && let Some(totals) = watched(Source::Fault)
    {
        dirtied(cfg, totals, GFN_SLOT, address >> 12, &Where::Unknown);
    }
}

/// This CPU's totals of the VM we run for, if somebody wants to know and this program is to tell.
#[inline(always)]
fn watched(source: Source) -> Option<*mut VmTotals> {
    let tgid = tgid();
    let totals = IRLM_DIRTY_VMS.get_ptr_mut(&tgid)?;
    // SAFETY: the map is preallocated, and the entry is this CPU's own part of it.
    (unsafe { (*totals).source } == source as u64).then_some(totals)
}

#[inline(always)]
fn tgid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// Counts in a value that all CPUs share.
#[inline(always)]
fn add_shared(counter: *mut u64) {
    // SAFETY: `counter` points into a map value, aligned and preallocated; the instruction is an atomic addition and
    // touches nothing else.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1u64) };
}

#[inline(always)]
fn dirtied(cfg: &DirtyConfig, totals: *mut VmTotals, slot: u32, page: u64, place: &Where) {
    // SAFETY: `totals` is this CPU's own, the kernel lets a program run once at a time on a CPU, and one program alone
    // counts a VM.
    let totals = unsafe { &mut *totals };
    totals.seen += 1;
    if cfg.one_in == 0 {
        return;
    }
    if cfg.one_in > 1 {
        // The gap is drawn, with the right mean: a fixed one would sample the same pages of a guest that writes its
        // pages in a circle.
        if totals.skip > 0 {
            totals.skip -= 1;
            return;
        }
        // SAFETY: a helper without arguments that every program type has.
        let random = unsafe { bpf_get_prandom_u32() };
        totals.skip = u64::from(random) % (2 * u64::from(cfg.one_in) - 1);
    }
    totals.sampled += 1;
    let tgid = tgid();
    let base = learn(cfg, SlotKey { tgid, slot }, place).unwrap_or(0);
    // Slots begin anywhere, regions where the guest's own huge pages do.
    let in_region = page.wrapping_add(base & ((1 << REGION_BITS) - 1));
    if count(&RegionKey { tgid, slot, region: (in_region >> REGION_BITS) as u32 }).is_none() {
        totals.region_lost += 1;
    }
    if cfg.pages != 0 {
        // Read by time and not by wake-up: a wake-up costs more than the event.
        let sent = match IRLM_DIRTY_PAGE.reserve_untyped::<PageEvent>(0) {
            Some(mut entry) => {
                entry.write(PageEvent { tgid, slot, page });
                entry.submit(u64::from(BPF_RB_NO_WAKEUP));
                true
            }
            None => false,
        };
        if !sent {
            totals.page_lost += 1;
        }
    }
}

/// Counts in the region map; `None` if it is full.
#[inline(always)]
fn count(key: &RegionKey) -> Option<()> {
    if let Some(counter) = IRLM_DIRTY_REG.get_ptr_mut(key) {
        add_shared(counter);
        return Some(());
    }
    if IRLM_DIRTY_REG.insert(key, &1, u64::from(BPF_NOEXIST)).is_ok() {
        return Some(());
    }
    // Another CPU made the entry meanwhile, or there is no room.
    add_shared(IRLM_DIRTY_REG.get_ptr_mut(key)?);
    Some(())
}

/// The first guest frame of a slot. Where it lies is noted the first time it is met: KVM keeps the slot it used last
/// in the vCPU; only if that is the slot in question it is believed.
#[inline(always)]
fn learn(cfg: &DirtyConfig, key: SlotKey, place: &Where) -> Option<u64> {
    if let Some(known) = IRLM_DIRTY_SLOT.get_ptr(&key) {
        // SAFETY: the map is preallocated; an entry is written once, before it can be found.
        return Some(unsafe { (*known).base_gfn });
    }
    if cfg.offsets == 0 {
        return None;
    }
    let slot = match place {
        Where::Slot(slot) => *slot,
        Where::Ring(_) if cfg.vcpu_slot == 0 => return None,
        Where::Ring(ring) => read::<u64>(ring.wrapping_sub(u64::from(cfg.vcpu_ring)), cfg.vcpu_slot)?,
        Where::Unknown => return None,
    };
    if slot == 0 || slot_number(cfg, slot)? != key.slot {
        return None;
    }
    let place = SlotPlace {
        base_gfn: read(slot, cfg.slot_base)?,
        pages: read(slot, cfg.slot_pages)?,
        hva: read(slot, cfg.slot_hva)?,
    };
    IRLM_DIRTY_SLOT.insert(&key, &place, 0).ok()?;
    Some(place.base_gfn)
}

/// The slot's number as the dirty ring has it.
#[inline(always)]
fn slot_number(cfg: &DirtyConfig, slot: u64) -> Option<u32> {
    let (id, space) = (read::<u16>(slot, cfg.slot_id)?, read::<u16>(slot, cfg.slot_as)?);
    Some(u32::from(space) << 16 | u32::from(id))
}

#[inline(always)]
fn read<T: Copy>(at: u64, offset: u32) -> Option<T> {
    let from = at.wrapping_add(u64::from(offset)) as *const T;
    // SAFETY: the helper checks the address itself and fails where nothing is mapped.
    unsafe { bpf_probe_read_kernel(from) }.ok()
}

/// Lets user space refuse an object of another ABI before it loads anything.
#[unsafe(link_section = "irlm_abi")]
#[unsafe(no_mangle)]
static IRLM_ABI: [u8; ABI_MARK.len()] = ABI_MARK;

/// Reading kernel memory is reserved to programs that are also under the GPL, as this one may be taken.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
