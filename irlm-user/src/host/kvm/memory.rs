//! Guest memory: one memfd a slot, mapped shared and given to KVM as it is. A descriptor of it is enough for another
//! process to read and write the guest's pages. Writes by the VMM itself go through [`Memory::guest`], which notes them:
//! KVM's own log does not see them.

use super::{KvmError, Result};
use crate::core::units::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use vm_memory::bitmap::{AtomicBitmap, Bitmap as _};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap};

/// Guest addresses from here to 4 GiB are not memory: interrupt controllers and devices lie there.
pub const HOLE_START: u64 = 3 << 30;
/// Memory goes on here.
pub const HOLE_END: u64 = 4 << 30;
/// Most slots; `net::vmm::words` has the same bound for its descriptors.
pub const MAX_SLOTS: usize = 128;
/// Most memory: as many pages as the wire can number in one block.
pub const MAX_BYTES: u64 = 1 << 44;
/// Least memory: a payload ends at 1 MiB and needs something to write to.
pub const MIN_BYTES: u64 = 2 << 20;

/// Host pages behind guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HostPages {
    /// Ordinary ones.
    #[default]
    Small,
    /// 2 MiB each, from the host's pool.
    Huge2M,
    /// 1 GiB each, from the host's pool.
    Huge1G,
}

impl HostPages {
    /// Bytes in one.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Small => PAGE_SIZE as u64,
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }
}

/// What memory a VM is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemorySpec {
    /// In all; whole MiB and whole host pages.
    pub bytes: u64,
    /// Length of each slot but the last; without it memory below and above the hole is one slot each.
    pub slot_bytes: Option<u64>,
    /// What is behind it.
    pub pages: HostPages,
}

/// One slot.
#[derive(Debug)]
pub struct Slot {
    /// `slot0`, `slot1`, …: the RAM block's name on the wire.
    pub name: String,
    /// Where the guest has it.
    pub guest_phys: u64,
    /// Its length.
    pub bytes: u64,
    /// Size of the host's pages behind it.
    pub page_bytes: u64,
    /// Where this process has it: what KVM maps, and what faults are about.
    pub base: u64,
    /// The memory itself.
    pub file: Arc<File>,
}

impl Slot {
    /// Pages of 4 KiB.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE_SIZE as u64
    }

    /// Words of a bitmap over them.
    #[must_use]
    pub fn words(&self) -> usize {
        self.pages().div_ceil(64) as usize
    }
}

/// All memory of one VM.
#[derive(Debug)]
pub struct Memory {
    slots: Vec<Slot>,
    guest: GuestMemoryMmap<AtomicBitmap>,
}

impl Memory {
    /// Makes it: zeros, and not yet taken from the host.
    pub fn new(spec: &MemorySpec) -> Result<Self> {
        let fail = |what: String| KvmError::Memory { what };
        // Of huge pages the host has a fixed number: better none now than none in the middle of a guest's write.
        let reserve = if spec.pages == HostPages::Small { libc::MAP_NORESERVE } else { 0 };
        let mut slots = Vec::new();
        let mut regions = Vec::new();
        for (i, (guest_phys, bytes)) in layout(spec)?.into_iter().enumerate() {
            let name = format!("slot{i}");
            let file = Arc::new(memfd(&name, bytes, spec.pages)?);
            let offset = FileOffset::from_arc(Arc::clone(&file), 0);
            let noted = AtomicBitmap::new(bytes as usize, PAGE);
            let mapping = MmapRegionBuilder::new_with_bitmap(bytes as usize, noted)
                .with_file_offset(offset)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | reserve)
                .with_hugetlbfs(spec.pages != HostPages::Small)
                .build()
                .map_err(|e| fail(format!("cannot map {name} of {bytes} bytes: {e}")))?;
            let base = mapping.as_ptr() as u64;
            let region = GuestRegionMmap::new(mapping, GuestAddress(guest_phys));
            regions.push(region.ok_or_else(|| fail(format!("{name} ends beyond the last address")))?);
            slots.push(Slot { name, guest_phys, bytes, page_bytes: spec.pages.bytes(), base, file });
        }
        let guest = GuestMemoryMmap::from_regions(regions).map_err(|e| fail(e.to_string()))?;
        Ok(Self { slots, guest })
    }

    /// By guest address.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// In all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(|s| s.bytes).sum()
    }

    /// For writes by the VMM itself; they are noted.
    #[must_use]
    pub fn guest(&self) -> &GuestMemoryMmap<AtomicBitmap> {
        &self.guest
    }

    /// Gives the whole host pages of a range of guest memory back to the host; returns how many pages of 4 KiB they were. They
    /// are zeros when touched next. While missing pages are asked for this waits until whoever answers has read of it.
    pub(crate) fn release(&self, guest_phys: u64, bytes: u64) -> io::Result<u64> {
        let end = guest_phys.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let mut pages = 0;
        for (slot, region) in self.slots.iter().zip(self.guest.iter()) {
            let (from, to) = (guest_phys.max(slot.guest_phys), end.min(slot.guest_phys + slot.bytes));
            if from >= to {
                continue;
            }
            let from = (from - slot.guest_phys).next_multiple_of(slot.page_bytes);
            let to = (to - slot.guest_phys) / slot.page_bytes * slot.page_bytes;
            if from >= to {
                continue;
            }
            let (at, len) = (slot.base + from, (to - from) as usize);
            // SAFETY: the range lies within a mapping that lives as long as `self`. It is guest memory: nothing in this process
            // relies on what it holds, and all access to it is volatile.
            unsafe { madvise(at as *mut libc::c_void, len, Advice::LinuxRemove)? };
            // Afterwards: who reads a page between its note and its end would keep what it held.
            vm_memory::MmapRegion::bitmap(region).mark_dirty(from as usize, len);
            pages += len as u64 / PAGE_SIZE as u64;
        }
        Ok(pages)
    }

    /// ORs in what the VMM itself has written since the last call.
    pub(super) fn take_own(&self, slot_bits: &mut [Vec<u64>]) {
        for (region, bits) in self.guest.iter().zip(slot_bits) {
            for (word, own) in bits.iter_mut().zip(region.bitmap_words()) {
                *word |= own;
            }
        }
    }
}

/// The region's own notes, taken.
trait Noted {
    fn bitmap_words(&self) -> Vec<u64>;
}

impl Noted for GuestRegionMmap<AtomicBitmap> {
    fn bitmap_words(&self) -> Vec<u64> {
        vm_memory::MmapRegion::bitmap(self).get_and_reset()
    }
}

const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE).expect("a page has bytes");

/// Where slots lie: guest address and length of each.
fn layout(spec: &MemorySpec) -> Result<Vec<(u64, u64)>> {
    let fail = |what: String| Err(KvmError::Memory { what });
    let unit = spec.pages.bytes().max(1 << 20);
    let whole = |n: u64| n > 0 && n.is_multiple_of(unit);
    if !whole(spec.bytes) || spec.slot_bytes.is_some_and(|n| !whole(n)) {
        return fail(format!("sizes must be whole multiples of {} MiB", unit >> 20));
    }
    if spec.bytes < MIN_BYTES || spec.bytes > MAX_BYTES {
        return fail(format!("{} MiB; from 2 MiB to 16 TiB are possible", spec.bytes >> 20));
    }
    let most = spec.slot_bytes.unwrap_or(spec.bytes);
    let (mut out, mut at, mut left) = (Vec::new(), 0, spec.bytes);
    while left > 0 {
        let room = if at < HOLE_START { HOLE_START - at } else { u64::MAX };
        let take = left.min(most).min(room);
        if out.len() == MAX_SLOTS {
            return fail(format!("more than {MAX_SLOTS} slots; make them larger"));
        }
        out.push((at, take));
        at += take;
        left -= take;
        if at == HOLE_START {
            at = HOLE_END;
        }
    }
    Ok(out)
}

/// A file of that length which cannot change it any more: who has a descriptor cannot make this process fault.
fn memfd(name: &str, bytes: u64, pages: HostPages) -> Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    flags |= match pages {
        HostPages::Small => MemfdFlags::empty(),
        HostPages::Huge2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        HostPages::Huge1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fail = |what: &str, e: rustix::io::Errno| KvmError::Memory {
        what: format!("{what} {name} of {bytes} bytes: {e}"),
    };
    let fd = memfd_create(name, flags).map_err(|e| fail("cannot make", e))?;
    ftruncate(&fd, bytes).map_err(|e| fail("cannot size", e))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(|e| fail("cannot seal", e))?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn spec(bytes: u64, slot_bytes: Option<u64>) -> MemorySpec {
        MemorySpec { bytes, slot_bytes, pages: HostPages::Small }
    }

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(layout(&spec(64 * MIB, None)).unwrap(), [(0, 64 * MIB)]);
        assert_eq!(layout(&spec(3 * GIB, None)).unwrap(), [(0, 3 * GIB)]);
        assert_eq!(layout(&spec(5 * GIB, None)).unwrap(), [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
        let cut = layout(&spec(10 * MIB, Some(4 * MIB))).unwrap();
        assert_eq!(cut, [(0, 4 * MIB), (4 * MIB, 4 * MIB), (8 * MIB, 2 * MIB)]);
        let cut = layout(&spec(6 * GIB, Some(2 * GIB))).unwrap();
        assert_eq!(cut, [(0, 2 * GIB), (2 * GIB, GIB), (4 * GIB, 2 * GIB), (6 * GIB, GIB)]);
        for (bytes, slot) in
            [(0, None), (MIB, None), (4 * MIB + 4096, None), (8 * MIB, Some(5)), (MAX_BYTES + MIB, None)]
        {
            assert!(layout(&spec(bytes, slot)).is_err(), "{bytes} {slot:?}");
        }
        assert!(layout(&spec(129 * MIB, Some(MIB))).is_err(), "too many slots");
        let huge = MemorySpec { pages: HostPages::Huge2M, ..spec(3 * MIB, None) };
        assert!(layout(&huge).is_err());
    }

    #[test]
    fn released_pages_are_zeros_and_noted_and_no_other_is_touched() {
        let m = Memory::new(&spec(4 * MIB, Some(2 * MIB))).unwrap();
        let mut bits: Vec<Vec<u64>> = m.slots().iter().map(|s| vec![0; s.words()]).collect();
        m.guest().write_slice(&vec![7; 4 * MIB as usize], GuestAddress(0)).unwrap();
        m.take_own(&mut bits);
        bits.iter_mut().for_each(|b| b.fill(0));
        // Whole pages only, across the border of the slots, and nothing beyond memory.
        assert_eq!(m.release(2 * MIB - 2 * 4096 - 1, 3 * 4096).unwrap(), 2);
        assert_eq!(m.release(4 * MIB - 4096, MIB).unwrap(), 1);
        assert_eq!((m.release(4 * MIB, 4096).unwrap(), m.release(1, 4095).unwrap()), (0, 0));
        assert!(m.release(4096, u64::MAX).is_err());
        m.take_own(&mut bits);
        assert_eq!((bits[0][7], bits[1][7]), (1 << 63 | 1 << 62, 1 << 63));
        assert_eq!(bits.iter().flatten().map(|w| w.count_ones()).sum::<u32>(), 3);
        let held = |page: u64| m.guest().read_obj::<u8>(GuestAddress(page * 4096 + 5)).unwrap();
        assert_eq!([509, 510, 511, 512, 1022, 1023].map(held), [7, 0, 0, 7, 7, 0]);
    }

    #[test]
    fn own_writes_are_noted_once_and_lengths_are_sealed() {
        let m = Memory::new(&spec(4 * MIB, Some(2 * MIB))).unwrap();
        let mut bits: Vec<Vec<u64>> = m.slots().iter().map(|s| vec![0; s.words()]).collect();
        // Across the border of the slots.
        m.guest().write_slice(&[1; 8192], GuestAddress(2 * MIB - 4097)).unwrap();
        m.take_own(&mut bits);
        assert_eq!((bits[0][7], bits[1][0]), (1 << 63 | 1 << 62, 1));
        assert_eq!(bits.iter().flatten().map(|w| w.count_ones()).sum::<u32>(), 3);
        bits.iter_mut().for_each(|b| b.fill(0));
        m.take_own(&mut bits);
        assert!(bits.iter().flatten().all(|w| *w == 0));
        assert!(m.slots()[0].file.set_len(0).is_err());
        assert!(m.slots()[0].file.set_len(64 * MIB).is_err());
    }
}
