//! Missing pages are asked for: the guest's mappings are registered with a userfaultfd, which the agent answers from its
//! own process. linux/userfaultfd.h has the numbers.
//!
//! The descriptor takes faults that the kernel itself runs into (no UFFD_USER_MODE_ONLY): a vCPU's access is one.

use super::memory::Memory;
use super::{KvmError, Result};
use crate::core::units::PAGE_SIZE;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

const API: u64 = 0xaa;
const IOCTL_API: libc::c_ulong = 0xc018_aa3f;
const IOCTL_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOCTL_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 4;
/// Features: missing pages, and pages that are there and not mapped, of memfds on small and on huge pages.
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;
/// Feature: who answers hears of pages that are given away, and whoever gives them waits until it has.
const EVENT_REMOVE: u64 = 1 << 3;

#[repr(C)]
#[derive(Default)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct RegisterArgument {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// How faults are answered; see `net::vmm::UffdMode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// By content in the file and UFFDIO_CONTINUE.
    Minor,
    /// By UFFDIO_COPY.
    Missing,
}

/// Which of them is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Choice {
    /// The best that the kernel offers.
    #[default]
    Probe,
    /// This one.
    Only(Mode),
}

/// A userfaultfd with all of a VM's memory.
#[derive(Debug)]
pub(crate) struct Userfault {
    fd: OwnedFd,
    pub(crate) mode: Mode,
}

impl Userfault {
    /// Registers all slots; nobody may have touched the mappings before.
    pub(crate) fn new(memory: &Memory, choice: Choice) -> Result<Self> {
        // Features can be asked for once a descriptor: this one tells. Kinds of faults need not be asked for.
        let offered = Self::open(0)?.1;
        let huge = memory.slots().iter().any(|s| s.page_bytes > PAGE_SIZE as u64);
        let (minor, missing) =
            if huge { (MINOR_HUGETLBFS, MISSING_HUGETLBFS) } else { (MINOR_SHMEM, MISSING_SHMEM) };
        let has = |bits| offered & bits == bits;
        let (mode, bits) = match choice {
            Choice::Probe | Choice::Only(Mode::Minor) if has(minor | missing) => {
                (Mode::Minor, MODE_MINOR | MODE_MISSING)
            }
            Choice::Probe | Choice::Only(Mode::Missing) if has(missing) => (Mode::Missing, MODE_MISSING),
            _ => {
                let hint = " (Linux 4.11 has it, with minor faults 5.14)";
                return Err(KvmError::Lacks { what: "userfaultfd for memfds", hint });
            }
        };
        let uffd = Self { fd: Self::open(offered & EVENT_REMOVE)?.0, mode };
        for s in memory.slots() {
            let range = Range { start: s.base, len: s.bytes };
            let mut argument = RegisterArgument { range, mode: bits, ioctls: 0 };
            // SAFETY: the kernel reads and writes `argument`, which outlives the call and has the struct's layout;
            // registering changes nothing about memory but who is asked when a page of it is not there.
            uffd.ioctl("cannot register guest memory", IOCTL_REGISTER, (&raw mut argument).cast())?;
        }
        Ok(uffd)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The mappings are as they were; whoever waits for a page looks again.
    pub(crate) fn end(&self, memory: &Memory) -> Result<()> {
        for s in memory.slots() {
            let mut range = Range { start: s.base, len: s.bytes };
            self.ioctl("cannot unregister guest memory", IOCTL_UNREGISTER, (&raw mut range).cast())?;
        }
        self.let_go();
        Ok(())
    }

    /// Reads what nobody needs to hear any more: who gives pages away waits for a reader.
    pub(super) fn let_go(&self) {
        let mut events = [0u8; 32 * 64];
        while rustix::io::read(&self.fd, &mut events).is_ok_and(|n| n > 0) {}
    }

    /// A descriptor that has shaken hands, and the features its kernel has.
    fn open(features: u64) -> Result<(OwnedFd, u64)> {
        let fail = |what| move |source| KvmError::Userfault { what, source };
        // Without O_NONBLOCK it cannot be polled.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor; by itself it changes nothing about this process's memory.
        let fd = unsafe { userfaultfd(flags) }
            .map_err(io::Error::from)
            .map_err(fail("cannot open (needs CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1)"))?;
        let uffd = Self { fd, mode: Mode::Missing };
        let mut argument = ApiArgument { api: API, features, ..Default::default() };
        uffd.ioctl("cannot agree on the interface", IOCTL_API, (&raw mut argument).cast())?;
        Ok((uffd.fd, argument.features))
    }

    fn ioctl(&self, what: &'static str, request: libc::c_ulong, argument: *mut libc::c_void) -> Result<()> {
        // SAFETY: callers give an argument of the request's own layout that outlives the call; none of the requests
        // hands memory of this process to anybody.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(KvmError::Userfault { what, source: io::Error::last_os_error() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernel_s() {
        let number = |dir: u64, nr: u64, size: usize| dir << 30 | (size as u64) << 16 | 0xaa << 8 | nr;
        assert_eq!(number(3, 0x3f, size_of::<ApiArgument>()), IOCTL_API);
        assert_eq!(number(3, 0, size_of::<RegisterArgument>()), IOCTL_REGISTER);
        assert_eq!(number(2, 1, size_of::<Range>()), IOCTL_UNREGISTER);
    }
}
