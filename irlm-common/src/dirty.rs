//! What the dirty-page programs and user space agree on (object `irlm-dirty`, docs/sampling.md).
//!
//! The programs count for registered processes only, so a VM that nobody asked about costs one failed map look-up an
//! event while the programs are attached, and nothing otherwise.

/// Array of one [`DirtyConfig`]; written by user space.
pub const CONFIG_MAP: &str = "IRLM_DIRTY_CFG";
/// Per-CPU hash map: process (`u32`, thread group) → [`VmTotals`]. User space makes the entries, programs count.
pub const VMS_MAP: &str = "IRLM_DIRTY_VMS";
/// Hash map: [`RegionKey`] → sampled dirtyings (`u64`).
pub const REGIONS_MAP: &str = "IRLM_DIRTY_REG";
/// Hash map: [`SlotKey`] → [`SlotPlace`], filled by the programs as they meet memory slots.
pub const SLOTS_MAP: &str = "IRLM_DIRTY_SLOT";
/// Ring buffer of [`PageEvent`], filled while [`DirtyConfig::pages`] is not 0.
pub const PAGES_MAP: &str = "IRLM_DIRTY_PAGE";

/// fentry of `mark_page_dirty_in_slot`.
pub const FUNCTION_PROGRAM: &str = "irlm_dirty_func";
/// Raw tracepoint `kvm_dirty_ring_push`.
pub const RING_PROGRAM: &str = "irlm_dirty_ring";
/// Raw tracepoint `kvm_page_fault` of two arguments and of three, by how many arguments it has.
pub const FAULT_PROGRAMS: [(usize, &str); 2] = [(2, "irlm_dirty_flt2"), (3, "irlm_dirty_flt3")];

/// VMs watched at once. A per-CPU value of 48 bytes each: 48 KiB a CPU.
pub const MAX_DIRTY_VMS: u32 = 1024;
/// Regions counted at once: 128 GiB of guest memory written to since its VM was registered. Beyond it dirtyings
/// are counted in [`VmTotals::region_lost`].
pub const MAX_REGIONS: u32 = 65_536;
/// Memory slots known at once; what has no place counts all the same.
pub const MAX_SLOTS: u32 = 8192;
/// Bytes of the ring buffer: 174,762 events. Beyond it events are counted in [`VmTotals::page_lost`].
pub const PAGES_BYTES: u32 = 4 << 20;
/// log2 of the pages in a region (2 MiB of 4 KiB pages).
pub const REGION_BITS: u32 = 9;
/// The "slot" of [`FAULT_PROGRAMS`]'s figures, whose page numbers are guest frame numbers.
pub const GFN_SLOT: u32 = u32::MAX;

/// Which program counts a VM, so that one seen by two is counted once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub enum Source {
    /// [`FUNCTION_PROGRAM`].
    Function = 1,
    /// [`RING_PROGRAM`].
    Ring = 2,
    /// [`FAULT_PROGRAMS`].
    Fault = 3,
}

/// Settings, adjustable while the programs run, and where this kernel keeps what they read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct DirtyConfig {
    /// One of so many dirtyings is looked at by region and page; 0: totals only.
    pub one_in: u32,
    /// Not 0: each sampled dirtying also becomes a [`PageEvent`].
    pub pages: u32,
    /// Not 0: the slots' offsets below are known.
    pub offsets: u32,
    /// Offset of `dirty_ring` in `struct kvm_vcpu`.
    pub vcpu_ring: u32,
    /// Offset of `last_used_slot` in `struct kvm_vcpu`; 0: not known.
    pub vcpu_slot: u32,
    /// Offset of `base_gfn` in `struct kvm_memory_slot`.
    pub slot_base: u32,
    /// Offset of `npages` in `struct kvm_memory_slot`.
    pub slot_pages: u32,
    /// Offset of `userspace_addr` in `struct kvm_memory_slot`.
    pub slot_hva: u32,
    /// Offset of `flags` in `struct kvm_memory_slot`.
    pub slot_flags: u32,
    /// Offset of `id` in `struct kvm_memory_slot`.
    pub slot_id: u32,
    /// Offset of `as_id` in `struct kvm_memory_slot`.
    pub slot_as: u32,
}

/// Sums of one VM on one CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct VmTotals {
    /// Which program counts this VM: a [`Source`].
    pub source: u64,
    /// Dirtyings seen. Exact.
    pub seen: u64,
    /// Of them looked at by region (and page).
    pub sampled: u64,
    /// Sampled, but not counted by region: the map was full.
    pub region_lost: u64,
    /// Sampled, but not sent as a page event: the ring buffer was full.
    pub page_lost: u64,
    /// The programs' own: dirtyings to pass over before the next sample.
    pub skip: u64,
}

/// A region of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct RegionKey {
    /// The VM's process.
    pub tgid: u32,
    /// KVM's memory slot (address space in the high half), or [`GFN_SLOT`].
    pub slot: u32,
    /// Number of the 2 MiB region, counted from the aligned guest address at or below the slot's beginning. (Where the
    /// slot's place is not known: from its beginning.)
    pub region: u32,
}

/// A memory slot of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct SlotKey {
    /// The VM's process.
    pub tgid: u32,
    /// As in [`RegionKey::slot`].
    pub slot: u32,
}

/// Where a memory slot lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct SlotPlace {
    /// Its first guest frame.
    pub base_gfn: u64,
    /// Its pages.
    pub pages: u64,
    /// Its address in the VM's process.
    pub hva: u64,
}

/// One sampled dirtying.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct PageEvent {
    /// The VM's process.
    pub tgid: u32,
    /// As in [`RegionKey::slot`].
    pub slot: u32,
    /// Page number in the slot.
    pub page: u64,
}

const _: () = assert!(size_of::<DirtyConfig>() == 44 && size_of::<VmTotals>() == 48);
const _: () = assert!(size_of::<RegionKey>() == 12 && size_of::<SlotKey>() == 8);
const _: () = assert!(size_of::<SlotPlace>() == 24 && size_of::<PageEvent>() == 16);

impl VmTotals {
    /// Adds another CPU's part.
    pub const fn add(&mut self, other: &Self) {
        self.seen = self.seen.wrapping_add(other.seen);
        self.sampled = self.sampled.wrapping_add(other.sampled);
        self.region_lost = self.region_lost.wrapping_add(other.region_lost);
        self.page_lost = self.page_lost.wrapping_add(other.page_lost);
    }
}
