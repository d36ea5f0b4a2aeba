//! One vCPU's dirty ring (linux/kvm.h, struct kvm_dirty_gfn): KVM writes entries, we take them in order and hand them back.
//!
//! KVM promises that a ring never overflows: at a soft limit the vCPU comes out. A software KVM was seen to look at that
//! limit too seldom while it emulates, and to write over entries that nobody had taken. Then pages are lost from the log,
//! and KVM's own count of entries in use stays too high for good, so that the vCPU never runs again. Both are
//! noticed and mended here ([`Drained::Lost`]). That needs the ring to stand still: it is only touched while its vCPU is
//! out of the guest.

use super::{Result, last};
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where in the vCPU's file the ring lies (`KVM_DIRTY_LOG_PAGE_OFFSET` on x86: page 64).
const OFFSET: libc::off_t = 64 * 4096;
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
    /// It has overflowed once: KVM may count entries as in use that are empty, before those that it writes.
    gaps: bool,
}

/// How taking all entries went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Drained {
    /// All that was written has been taken.
    All,
    /// The ring had overflowed: any page may have been written.
    Lost,
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
                OFFSET,
            )
        };
        match NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED) {
            Some(entries) => Ok(Self { entries, count, next: 0, gaps: false }),
            None => Err(last("cannot map a vCPU's dirty ring")),
        }
    }

    /// The entry so many behind the next one.
    fn entry(&self, behind: u32) -> &Entry {
        let at = (self.next + behind) % self.count;
        // SAFETY: `at` is below `count`, so the entry is within the mapping, which lives as long as `self`; the mapping is
        // page-aligned and entries have 16 bytes, so it is aligned; all bit patterns are valid atomics.
        unsafe { self.entries.add(at as usize).as_ref() }
    }

    fn is_dirty(&self, behind: u32) -> bool {
        self.entry(behind).flags.load(Ordering::Acquire) & (DIRTY | RESET) == DIRTY
    }

    /// Hands the next entry back, whatever is in it.
    fn hand_back(&mut self) {
        self.entry(0).flags.store(RESET, Ordering::Release);
        self.next = (self.next + 1) % self.count;
    }

    /// Takes entries in order up to an empty one, at most `room`; `note` gets slot and page. How many there were.
    fn take(&mut self, room: u32, note: &mut impl FnMut(u32, u64)) -> u32 {
        let mut taken = 0;
        while taken < room && self.is_dirty(0) {
            let e = self.entry(0);
            note(e.slot.load(Ordering::Relaxed), e.offset.load(Ordering::Relaxed));
            self.hand_back();
            taken += 1;
        }
        taken
    }

    /// Takes all; a reset must follow. `full`: its vCPU came out because of it.
    pub(super) fn drain(&mut self, full: bool, mut note: impl FnMut(u32, u64)) -> Drained {
        let mut taken = self.take(self.count, &mut note);
        if taken == self.count {
            // KVM's limit is below that.
            self.gaps = true;
            return Drained::Lost;
        }
        while self.gaps {
            let Some(gap) = (0..self.count - taken).find(|d| self.is_dirty(*d)) else { break };
            (0..gap).for_each(|_| self.hand_back());
            taken += gap;
            taken += self.take(self.count - taken, &mut note);
        }
        if full && taken == 0 {
            // Full of nothing: KVM counts at least its limit, of which this is a part on every kernel.
            self.gaps = true;
            (0..self.count / 4).for_each(|_| self.hand_back());
        }
        Drained::All
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; no reference into it outlives `take`.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), self.count as usize * size_of::<Entry>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KVM's side of a ring: what it pushes, what it resets, and how many entries it thinks are in use.
    struct Kvm {
        entries: NonNull<Entry>,
        dirty: u64,
        reset: u64,
    }

    const COUNT: u32 = 256;

    impl Kvm {
        fn at(&self, index: u64) -> &Entry {
            // SAFETY: below `COUNT`, and the tests' rings have that many entries and outlive this.
            unsafe { self.entries.add((index % u64::from(COUNT)) as usize).as_ref() }
        }
        fn push(&mut self, page: u64) {
            let e = self.at(self.dirty);
            e.offset.store(page, Ordering::Relaxed);
            e.flags.store(DIRTY, Ordering::Release);
            self.dirty += 1;
        }
        fn reset(&mut self) {
            while self.at(self.reset).flags.load(Ordering::Acquire) & RESET != 0 {
                self.at(self.reset).flags.store(0, Ordering::Release);
                self.reset += 1;
                assert!(self.reset <= self.dirty, "more was handed back than was pushed");
            }
        }
        fn used(&self) -> u64 {
            self.dirty - self.reset
        }
    }

    /// A ring in a file of its own, as the vCPU's.
    fn ring() -> (Ring, Kvm) {
        let bytes = COUNT as usize * size_of::<Entry>();
        // SAFETY: a fresh anonymous mapping; it touches no memory of ours.
        let at = unsafe {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0)
        };
        let entries = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED).unwrap();
        (Ring { entries, count: COUNT, next: 0, gaps: false }, Kvm { entries, dirty: 0, reset: 0 })
    }

    #[test]
    fn what_is_pushed_is_taken_once_and_in_order() {
        let (mut ring, mut kvm) = ring();
        let mut next = 0;
        for n in [0, 1, 100, 192, 7, 255, 255] {
            (0..n).for_each(|i| kvm.push(next + i));
            let mut got = vec![];
            assert_eq!(ring.drain(false, |_, page| got.push(page)), Drained::All);
            assert_eq!(got, (next..next + n).collect::<Vec<_>>());
            kvm.reset();
            assert_eq!(kvm.used(), 0);
            next += n;
        }
    }

    #[test]
    fn an_overflow_is_noticed_and_mended_whatever_its_size() {
        for over in [0u64, 1, 64, 93, 191, 192, 250, 255, 256, 300, 511, 700] {
            let (mut ring, mut kvm) = ring();
            (0..10).for_each(|n| kvm.push(n));
            ring.drain(false, |_, _| {});
            kvm.reset();
            (0..u64::from(COUNT) + over).for_each(|n| kvm.push(n));
            assert_eq!(ring.drain(true, |_, _| {}), Drained::Lost, "{over}");
            kvm.reset();
            // As long as KVM thinks that the limit is reached, the vCPU comes out again at once.
            for _ in 0..20 {
                if kvm.used() >= 192 {
                    ring.drain(true, |_, _| {});
                    kvm.reset();
                }
            }
            assert!(kvm.used() < 192, "{over}: {} in use", kvm.used());
            for round in 1..20u64 {
                let mut got = vec![];
                (0..60).for_each(|n| kvm.push(round * 1000 + n));
                let full = kvm.used() >= 192;
                let how = ring.drain(full, |_, page| got.push(page));
                kvm.reset();
                let all = (0..60).all(|n| got.contains(&(round * 1000 + n)));
                assert!(all || how == Drained::Lost, "{over}, round {round}: {} taken", got.len());
            }
            assert_eq!(kvm.used(), 0, "{over}: nothing stays counted");
        }
    }
}
