//! Which pages were written: KVM's bitmap or KVM's rings, and beside either the VMM's own writes, which KVM does not see.
//!
//! The one rule: pages are write-protected again *before* they are reported. What somebody reads after a harvest then is
//! either what was there, or its next change is in the next harvest. Clearing afterwards would lose a write between the
//! read and the clearing.

use super::memory::Memory;
use super::ring::{Drained, Ring};
use super::{KvmError, Result, call, raw};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;

/// How writes are noted; chosen when a VM is made, because a ring must be there before the first vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirtyKind {
    /// `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`: a look costs one bit a page of guest memory.
    Bitmap,
    /// One ring a vCPU, of so many entries: a look costs what was written; a full ring stops its vCPU for a moment.
    Ring(u32),
}

/// Entries of a ring unless said otherwise.
pub const RING_ENTRIES: u32 = 65_536;

/// The log of one VM.
#[derive(Debug)]
pub(super) struct DirtyLog {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    kind: DirtyKind,
    on: bool,
    rings: Vec<Ring>,
    /// Harvested by a vCPU whose ring was full, and not asked for yet.
    pending: Vec<Vec<u64>>,
    /// A slot's bitmap.
    scratch: Vec<u64>,
    /// How often a ring had overflowed.
    lost: u64,
}

impl DirtyLog {
    /// Prepares the VM; it must have no vCPU yet.
    pub(super) fn new(vm: Arc<VmFd>, memory: Arc<Memory>, kind: DirtyKind) -> Result<Self> {
        match kind {
            DirtyKind::Bitmap => {
                if vm.check_extension_raw(raw::CAP_MANUAL_PROTECT.into()) & 1 == 0 {
                    let hint = " (Linux 5.2 has it); use --dirty ring";
                    return Err(KvmError::Lacks { what: "KVM_CLEAR_DIRTY_LOG", hint });
                }
                enable(&vm, raw::CAP_MANUAL_PROTECT, raw::MANUAL_PROTECT_ENABLE, "KVM_CLEAR_DIRTY_LOG")?;
            }
            DirtyKind::Ring(entries) => {
                let bytes = u64::from(entries) * 16;
                let offers = |cap: u32| u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
                let caps = [raw::CAP_RING_ACQ_REL, raw::CAP_RING];
                let Some((cap, most)) = caps.iter().map(|c| (*c, offers(*c))).find(|c| c.1 > 0) else {
                    return Err(KvmError::Lacks { what: "dirty ring", hint: "; use --dirty bitmap" });
                };
                if !entries.is_power_of_two() || bytes < 4096 || bytes > most {
                    let what = format!(
                        "a dirty ring of {entries} entries: from 256 to {} in powers of two are possible",
                        most / 16
                    );
                    return Err(KvmError::Not { what });
                }
                enable(&vm, cap, bytes, "a dirty ring")?;
            }
        }
        let pending = memory.slots().iter().map(|s| vec![0; s.words()]).collect();
        let log =
            Self { vm, memory, kind, on: false, rings: Vec::new(), pending, scratch: Vec::new(), lost: 0 };
        log.set_regions(0)?;
        Ok(log)
    }

    /// A vCPU that was just made.
    pub(super) fn add_vcpu(&mut self, vcpu: &VcpuFd) -> Result<()> {
        if let DirtyKind::Ring(entries) = self.kind {
            self.rings.push(Ring::map(vcpu, entries)?);
        }
        Ok(())
    }

    pub(super) fn kind(&self) -> DirtyKind {
        self.kind
    }

    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// How often a ring had overflowed, so that all pages were reported as written.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Everything written from here on is noted. With rings all vCPUs stand still, here and at a harvest.
    pub(super) fn start(&mut self) -> Result<()> {
        // What lies in the rings is from an earlier time.
        (0..self.rings.len()).try_for_each(|i| self.drain(i, false))?;
        self.memory.take_own(&mut self.pending);
        self.pending.iter_mut().for_each(|b| b.fill(0));
        self.set_regions(KVM_MEM_LOG_DIRTY_PAGES)?;
        self.on = true;
        Ok(())
    }

    /// Nothing is noted any more.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.on = false;
        self.set_regions(0)
    }

    /// ORs in what was written since the last harvest; protected again when this returns.
    pub(super) fn harvest(&mut self, slot_bits: &mut [Vec<u64>]) -> Result<()> {
        if !self.on {
            return Err(KvmError::Not { what: "writes are not noted; send dirty-start first".into() });
        }
        match self.kind {
            DirtyKind::Bitmap => self.fetch_bitmaps(slot_bits)?,
            DirtyKind::Ring(_) => (0..self.rings.len()).try_for_each(|i| self.drain(i, false))?,
        }
        for (bits, pending) in slot_bits.iter_mut().zip(&mut self.pending) {
            for (word, p) in bits.iter_mut().zip(pending) {
                *word |= std::mem::take(p);
            }
        }
        self.memory.take_own(slot_bits);
        Ok(())
    }

    /// Empties the ring of a vCPU that is out of the guest, and keeps what was in it for the next harvest. `full`: that is why
    /// it came out.
    pub(super) fn drain(&mut self, vcpu: usize, full: bool) -> Result<()> {
        let Some(ring) = self.rings.get_mut(vcpu) else { return Ok(()) };
        let pending = &mut self.pending;
        let how = ring.drain(full, |slot, page| {
            let bits = pending.get_mut(slot as usize);
            if let Some(word) = bits.and_then(|b| b.get_mut((page / 64) as usize)) {
                *word |= 1 << (page % 64);
            }
        });
        raw::reset_dirty_rings(&self.vm)?;
        if how == Drained::Lost && self.on {
            self.lost += 1;
            // Nobody knows which pages are not protected any more: all are again, and all count as written.
            self.set_regions(0)?;
            self.set_regions(KVM_MEM_LOG_DIRTY_PAGES)?;
            self.pending.iter_mut().for_each(|b| b.fill(u64::MAX));
        }
        Ok(())
    }

    fn fetch_bitmaps(&mut self, slot_bits: &mut [Vec<u64>]) -> Result<()> {
        for (i, (slot, bits)) in (0u32..).zip(self.memory.slots().iter().zip(slot_bits)) {
            self.scratch.clear();
            self.scratch.resize(slot.words(), 0);
            raw::get_dirty_log(&self.vm, i, slot.pages(), &mut self.scratch)?;
            if self.scratch.iter().all(|w| *w == 0) {
                continue;
            }
            raw::clear_dirty_log(&self.vm, i, slot.pages(), &mut self.scratch)?;
            bits.iter_mut().zip(&self.scratch).for_each(|(word, new)| *word |= new);
        }
        Ok(())
    }

    fn set_regions(&self, flags: u32) -> Result<()> {
        for (slot, s) in (0u32..).zip(self.memory.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: s.guest_phys,
                memory_size: s.bytes,
                userspace_addr: s.base,
            };
            // SAFETY: the range is exactly one mapping of `memory`, which this value keeps alive as long as the VM's
            // descriptor; the guest may write there, and nothing in this process takes that memory for its own.
            call("cannot give the guest its memory", unsafe { self.vm.set_user_memory_region(region) })?;
        }
        Ok(())
    }
}

fn enable(vm: &VmFd, cap: u32, argument: u64, what: &'static str) -> Result<()> {
    let mut wanted = kvm_enable_cap { cap, ..Default::default() };
    wanted.args[0] = argument;
    call(what, vm.enable_cap(&wanted))
}
