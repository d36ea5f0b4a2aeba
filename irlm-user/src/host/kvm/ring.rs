//! One vCPU's dirty ring (linux/kvm.h, struct kvm_dirty_gfn): KVM writes entries, we take them in order and hand them back.

use super::{Result, last};
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where in the vCPU's file the ring lies, in pages (`KVM_DIRTY_LOG_PAGE_OFFSET` on x86).
const PAGE_OFFSET: usize = 64;
/// Set by KVM: the entry is to be taken.
const DIRTY: u32 = 1;
/// Set by us: it was taken, and can be written again after the next reset.
const RESET: u32 = 2;

/// As in linux/kvm.h; shared with the kernel, hence atomic.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// A mapped ring.
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<Entry>,
    count: u32,
    next: u32,
}

// SAFETY: the mapping belongs to this value alone and is valid from any thread; entries are only touched as atomics.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of `vcpu`, whose VM was given rings of `count` entries.
    pub(super) fn map(vcpu: &VcpuFd, count: u32) -> Result<Self> {
        let bytes = count as usize * size_of::<Entry>();
        // SAFETY: a fresh mapping at an address of the kernel's choice; it touches no memory of ours. The vCPU's file has
        // the ring at that offset and in that length, or the call fails.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                (PAGE_OFFSET * crate::core::units::PAGE_SIZE) as libc::off_t,
            )
        };
        match NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED) {
            Some(entries) => Ok(Self { entries, count, next: 0 }),
            None => Err(last("cannot map a vCPU's dirty ring")),
        }
    }

    /// The next page that was written, as slot and page in it.
    pub(super) fn take(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next` is below `count`, so the entry is within the mapping, which lives as long as `self`; it is
        // page-aligned and entries are 16 bytes, so aligned; all bit patterns are valid atomics.
        let entry = unsafe { self.entries.add((self.next % self.count) as usize).as_ref() };
        if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        let at = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
        entry.flags.store(RESET, Ordering::Release);
        self.next = (self.next + 1) % self.count;
        Some(at)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; no reference into it outlives `take`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count as usize * size_of::<Entry>()) };
    }
}
