//! The ioctls on dirtied pages that kvm-ioctls 0.25 does not have, and the two whose buffers are better reused.

use super::{Result, last};
use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use std::os::fd::AsRawFd as _;

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: fetching the bitmap and clearing it are two calls.
pub(super) const CAP_MANUAL_PROTECT: u32 = 168;
/// Its argument: on (and not "all pages are dirty at first").
pub(super) const MANUAL_PROTECT_ENABLE: u64 = 1;
/// `KVM_CAP_DIRTY_LOG_RING`, on x86.
pub(super) const CAP_RING: u32 = 192;
/// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`: the same, with its memory ordering promised.
pub(super) const CAP_RING_ACQ_REL: u32 = 223;
/// `KVM_EXIT_DIRTY_RING_FULL`.
pub(super) const EXIT_RING_FULL: u32 = 31;

/// linux/kvm.h: _IOW(0xAE, 0x42, struct kvm_dirty_log), _IOWR(0xAE, 0xc0, struct kvm_clear_dirty_log), _IO(0xAE, 0xc7).
const GET_DIRTY_LOG: libc::c_ulong = request(1, 0x42, size_of::<kvm_dirty_log>());
const CLEAR_DIRTY_LOG: libc::c_ulong = request(3, 0xc0, size_of::<kvm_clear_dirty_log>());
const RESET_DIRTY_RINGS: libc::c_ulong = request(0, 0xc7, 0);

/// An ioctl number: direction (1 write, 2 read), number and argument size of KVM's calls.
const fn request(direction: u64, number: u64, size: usize) -> libc::c_ulong {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

/// Fills `bits` with what is dirty in the slot. With manual protection nothing changes by that.
pub(super) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, bits: &mut [u64]) -> Result<()> {
    assert!(bits.len() as u64 * 64 >= pages, "the kernel writes one bit a page");
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
    };
    // SAFETY: `log` outlives the call. The kernel writes one bit for each page of the slot, rounded up to whole words, to
    // `dirty_bitmap`; `pages` is the slot's, so by the assertion that is within `bits`, which is borrowed mutably.
    match unsafe { libc::ioctl(vm.as_raw_fd(), GET_DIRTY_LOG, &raw const log) } {
        0 => Ok(()),
        _ => Err(last("KVM_GET_DIRTY_LOG")),
    }
}

/// Says that the pages in `bits` have been taken note of: they are write-protected again before this returns.
pub(super) fn clear_dirty_log(vm: &VmFd, slot: u32, pages: u64, bits: &mut [u64]) -> Result<()> {
    assert!(bits.len() as u64 * 64 >= pages, "the kernel reads one bit a page");
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(pages).unwrap_or(u32::MAX),
        first_page: 0,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
    };
    // SAFETY: `log` outlives the call, and the kernel reads one bit for each of `num_pages` pages, which `bits` has.
    match unsafe { libc::ioctl(vm.as_raw_fd(), CLEAR_DIRTY_LOG, &raw const log) } {
        0 => Ok(()),
        _ => Err(last("KVM_CLEAR_DIRTY_LOG")),
    }
}

/// Says that all harvested ring entries have been taken note of: their pages are write-protected again, and their places are
/// free, before this returns. The kernel may stop in the middle (for a signal, say) and tells how many it has done, so it is
/// asked until nothing is left: an entry that is left would have its page written without a note.
pub(super) fn reset_dirty_rings(vm: &VmFd) -> Result<()> {
    loop {
        // SAFETY: the call has no argument; it changes only the rings' flags and the guest's page protection.
        match unsafe { libc::ioctl(vm.as_raw_fd(), RESET_DIRTY_RINGS, 0) } {
            0 => return Ok(()),
            n if n > 0 => {}
            _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return Err(last("KVM_RESET_DIRTY_RINGS")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernel_s() {
        assert_eq!((GET_DIRTY_LOG, CLEAR_DIRTY_LOG, RESET_DIRTY_RINGS), (0x4010_ae42, 0xc018_aec0, 0xaec7));
    }
}
