//! Page faults of another process, answered from here: a userfaultfd(2) that a VMM made over its guest's memory and handed
//! to the agent. The agent reads faults in batches and has the kernel place, map or zero pages; the descriptor works
//! from any process, and the VMM's threads that touch a page wait in the kernel meanwhile, also while no agent lives.
//!
//! What the kernel answers is typed, because each answer means something else to a post-copy ([`Stop`]):
//! EEXIST, the page is there; EAGAIN, the memory's layout is being changed and the events must be read first;
//! ENOENT, nothing is mapped there any more; ESRCH, the VMM is gone.
//!
//! Numbers and layouts come from `linux-raw-sys`. The `userfaultfd` crate binds the same calls, but its bindings are made
//! with libclang when it is built, and it drops how far an interrupted call had come, which is needed here.

use crate::core::units::{PAGE_BITS, PAGE_SIZE};
use linux_raw_sys::general as raw;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of one event.
const EVENT: usize = size_of::<raw::uffd_msg>();
const _: () = assert!(EVENT == 32);
/// Events read at once: more than any VM here has vCPUs.
const BATCH: usize = 64;
const NODE: &str = "/dev/userfaultfd";
/// Its one call, `_IO(0xaa, 0)` of linux/userfaultfd.h, which `linux-raw-sys` does not have.
const NEW: libc::Ioctl = 0xaa00;

/// How pages are filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// A page is missing until the kernel copies it in ([`Uffd::copy`]).
    Missing,
    /// A page is written into the memory's file first and then mapped ([`Uffd::map`]); pages that are in the file and not
    /// mapped yet fault too.
    Minor,
}

/// Something that cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The kernel refused.
    #[error("userfaultfd: {what}: {source}")]
    Os {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The process whose memory it is has ended.
    #[error("userfaultfd: the process whose memory it is has ended")]
    ProcessGone,
    /// A page that no slot has.
    #[error("userfaultfd: slot {slot} has no {count} pages from page {page} on")]
    Outside {
        /// The slot.
        slot: usize,
        /// First page.
        page: u32,
        /// Pages.
        count: u32,
    },
    /// Slots that overlap, or do not lie on whole pages.
    #[error("userfaultfd: memory at {base:#x}, {bytes} bytes: not a range of whole pages of its own")]
    Range {
        /// Where.
        base: u64,
        /// How long.
        bytes: u64,
    },
}

/// Why a call ended before all of its pages were done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The next page is there already (EEXIST): nobody was woken for it.
    Present,
    /// The memory's layout is being changed (EAGAIN): read the events, then try again.
    Changing,
    /// Nothing that was registered is mapped at the next page (ENOENT): the guest's memory was taken away there.
    NoMapping,
    /// The next page is not in the memory's file (EFAULT), so it cannot be mapped.
    NotInFile,
}

/// How far a call came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// Pages done.
    pub pages: u32,
    /// Why not all of them.
    pub stop: Option<Stop>,
}

/// What a VMM's memory tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A thread waits for this page.
    Fault {
        /// The slot.
        slot: usize,
        /// The page.
        page: u32,
        /// It is in the file, and only not mapped.
        minor: bool,
        /// The thread wants to write.
        write: bool,
    },
    /// These pages are given away: zeros when touched next. The thread that does it goes on now that this has been read.
    Removed {
        /// The slot.
        slot: usize,
        /// The first page.
        page: u32,
        /// How many.
        count: u32,
    },
    /// A fault at an address that belongs to no slot.
    Stray(u64),
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    base: u64,
    pages: u32,
}

/// A userfaultfd over the slots of one VM's memory.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    slots: Vec<Slot>,
}

impl Uffd {
    /// Takes `fd` into use; `slots` are the address, in the process that registered them, and the bytes of each.
    pub fn new(fd: OwnedFd, slots: &[(u64, u64)]) -> Result<Self, UffdError> {
        let slot = |&(base, bytes): &(u64, u64)| {
            let whole = base % PAGE_SIZE as u64 == 0 && bytes % PAGE_SIZE as u64 == 0;
            let pages = u32::try_from(bytes >> PAGE_BITS).ok().filter(|p| *p > 0);
            let fits = base.checked_add(bytes).is_some();
            pages
                .filter(|_| whole && fits)
                .map(|pages| Slot { base, pages })
                .ok_or(UffdError::Range { base, bytes })
        };
        let list: Vec<Slot> = slots.iter().map(slot).collect::<Result<_, _>>()?;
        for (i, a) in list.iter().enumerate() {
            if list[..i].iter().any(|b| a.base < b.end() && b.base < a.end()) {
                return Err(UffdError::Range { base: a.base, bytes: a.end() - a.base });
            }
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(os("read its flags"))?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(os("make it non-blocking"))?;
        Ok(Self { fd, slots: list })
    }

    /// Reads the events that wait, appends them to `into`, and says how many. Never blocks.
    pub fn read(&self, into: &mut Vec<Event>) -> Result<usize, UffdError> {
        let mut bytes = [0u8; EVENT * BATCH];
        let n = match rustix::io::read(&self.fd, &mut bytes) {
            Ok(n) => n,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(e) => return Err(os("read its events")(e)),
        };
        let before = into.len();
        for message in bytes[..n].as_chunks::<EVENT>().0 {
            self.event(message, into);
        }
        Ok(into.len() - before)
    }

    fn event(&self, message: &[u8; EVENT], into: &mut Vec<Event>) {
        let word = |at: usize| u64::from_ne_bytes(*message[at..].first_chunk().unwrap_or(&[0; 8]));
        match u32::from(message[0]) {
            raw::UFFD_EVENT_PAGEFAULT => {
                let (flags, address) = (word(8), word(16));
                let is = |flag: u32| flags & u64::from(flag) != 0;
                into.push(self.find(address).map_or(Event::Stray(address), |(slot, page)| Event::Fault {
                    slot,
                    page,
                    minor: is(raw::UFFD_PAGEFAULT_FLAG_MINOR),
                    write: is(raw::UFFD_PAGEFAULT_FLAG_WRITE),
                }));
            }
            raw::UFFD_EVENT_REMOVE | raw::UFFD_EVENT_UNMAP => {
                let (start, end) = (word(8), word(16));
                for (slot, s) in self.slots.iter().enumerate() {
                    let (from, to) = (start.max(s.base), end.min(s.end()));
                    if from < to {
                        let page = ((from - s.base) >> PAGE_BITS) as u32;
                        let count = (to - from).div_ceil(PAGE_SIZE as u64) as u32;
                        into.push(Event::Removed { slot, page, count });
                    }
                }
            }
            raw::UFFD_EVENT_FORK => {
                // SAFETY: for this event the kernel has just made a descriptor in this process, whose number stands here
                // and which nobody else knows of; dropping it is all that is done with it.
                drop(unsafe { OwnedFd::from_raw_fd((word(8) as u32).cast_signed()) });
            }
            // A mapping that was moved: its pages fault at an address that is no slot's.
            _ => {}
        }
    }

    fn find(&self, address: u64) -> Option<(usize, u32)> {
        let within = |s: &Slot| address >= s.base && address < s.end();
        let slot = self.slots.iter().position(within)?;
        Some((slot, ((address - self.slots[slot].base) >> PAGE_BITS) as u32))
    }

    fn address(&self, slot: usize, page: u32, count: u32) -> Result<u64, UffdError> {
        self.slots
            .get(slot)
            .filter(|s| page.checked_add(count).is_some_and(|e| e <= s.pages))
            .map(|s| s.base + (u64::from(page) << PAGE_BITS))
            .ok_or(UffdError::Outside { slot, page, count })
    }

    /// Places whole pages from `page` on, and wakes who waits for them. A page is there in one piece or not at all.
    pub fn copy(&self, slot: usize, page: u32, bytes: &[u8]) -> Result<Done, UffdError> {
        let count = (bytes.len() >> PAGE_BITS) as u32;
        let dst = self.address(slot, page, count)?;
        self.all(count, "copy pages in", |done, left| {
            let mut c = raw::uffdio_copy {
                dst: dst + (u64::from(done) << PAGE_BITS),
                src: bytes[(done as usize) << PAGE_BITS..].as_ptr() as u64,
                len: u64::from(left) << PAGE_BITS,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the opcode's argument is a `uffdio_copy`. The kernel reads `len` bytes from `src`, which `bytes` has
            // from there on, and writes only pages that are missing in ranges which the owner of that memory registered
            // for exactly that; it never changes a page that is there.
            let r = unsafe { call::<{ raw_op::COPY }, _>(&self.fd, &mut c) };
            (r, c.copy)
        })
    }

    /// Places zero pages, and wakes who waits for them.
    pub fn zero(&self, slot: usize, page: u32, count: u32) -> Result<Done, UffdError> {
        let start = self.address(slot, page, count)?;
        self.all(count, "place zero pages", |done, left| {
            let mut z = raw::uffdio_zeropage { range: range(start, done, left), mode: 0, zeropage: 0 };
            // SAFETY: the opcode's argument is a `uffdio_zeropage`; as for `copy` only missing pages are filled.
            let r = unsafe { call::<{ raw_op::ZEROPAGE }, _>(&self.fd, &mut z) };
            (r, z.zeropage)
        })
    }

    /// Maps pages that are in the memory's file, and wakes who waits for them.
    pub fn map(&self, slot: usize, page: u32, count: u32) -> Result<Done, UffdError> {
        let start = self.address(slot, page, count)?;
        self.all(count, "map pages", |done, left| {
            let mut c = raw::uffdio_continue { range: range(start, done, left), mode: 0, mapped: 0 };
            // SAFETY: the opcode's argument is a `uffdio_continue`. What gets mapped is what a touch of the page would have
            // mapped, had it not been registered.
            let r = unsafe { call::<{ raw_op::CONTINUE }, _>(&self.fd, &mut c) };
            (r, c.mapped)
        })
    }

    /// Wakes who waits for these pages; they look again, and fault again if the page still is not there.
    pub fn wake(&self, slot: usize, page: u32, count: u32) -> Result<(), UffdError> {
        let start = self.address(slot, page, count)?;
        let mut r = range(start, 0, count);
        // SAFETY: the opcode's argument is a `uffdio_range`; no memory is changed.
        unsafe { call::<{ raw_op::WAKE }, _>(&self.fd, &mut r) }.map_err(failed("wake"))
    }

    /// Wakes everybody: who was read of by an agent that has died faults again, and is read of again.
    pub fn wake_all(&self) -> Result<(), UffdError> {
        (0..self.slots.len()).try_for_each(|s| self.wake(s, 0, self.slots[s].pages))
    }

    /// Repeats `one` (pages done, pages left → the call's result, bytes it did or an error number) until all are done or it
    /// makes no progress.
    fn all(
        &self,
        count: u32,
        what: &'static str,
        mut one: impl FnMut(u32, u32) -> (Result<(), Errno>, i64),
    ) -> Result<Done, UffdError> {
        let mut pages = 0;
        while pages < count {
            let (result, bytes) = one(pages, count - pages);
            let did = u32::try_from(bytes >> PAGE_BITS).unwrap_or(0);
            pages += did.min(count - pages);
            let stop = match result {
                Ok(()) => continue,
                Err(Errno::INTR) => continue,
                // Interrupted after some pages: what stopped it shows at the next.
                Err(Errno::AGAIN) if did > 0 => continue,
                Err(Errno::AGAIN) => Stop::Changing,
                Err(Errno::EXIST) => Stop::Present,
                Err(Errno::NOENT) => Stop::NoMapping,
                Err(Errno::FAULT) => Stop::NotInFile,
                Err(e) => return Err(failed(what)(e)),
            };
            return Ok(Done { pages, stop: Some(stop) });
        }
        Ok(Done { pages, stop: None })
    }
}

impl Slot {
    fn end(self) -> u64 {
        self.base + (u64::from(self.pages) << PAGE_BITS)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The opcodes, as rustix counts them.
mod raw_op {
    use linux_raw_sys::ioctl as n;
    use rustix::ioctl::Opcode;
    pub(super) const API: Opcode = n::UFFDIO_API as Opcode;
    pub(super) const REGISTER: Opcode = n::UFFDIO_REGISTER as Opcode;
    pub(super) const COPY: Opcode = n::UFFDIO_COPY as Opcode;
    pub(super) const ZEROPAGE: Opcode = n::UFFDIO_ZEROPAGE as Opcode;
    pub(super) const CONTINUE: Opcode = n::UFFDIO_CONTINUE as Opcode;
    pub(super) const WAKE: Opcode = n::UFFDIO_WAKE as Opcode;
}

fn range(start: u64, done: u32, left: u32) -> raw::uffdio_range {
    raw::uffdio_range { start: start + (u64::from(done) << PAGE_BITS), len: u64::from(left) << PAGE_BITS }
}

/// # Safety
///
/// `OP` must be a userfaultfd opcode whose argument is a `T`, and what the kernel then does must be sound.
unsafe fn call<const OP: Opcode, T>(fd: impl AsFd, value: &mut T) -> Result<(), Errno> {
    // SAFETY: the caller vouches for opcode, type and effect; the value is borrowed for the call.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<OP, T>::new(value)) }
}

fn os(what: &'static str) -> impl Fn(Errno) -> UffdError {
    move |e| UffdError::Os { what, source: e.into() }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> UffdError {
    move |e| match e {
        Errno::SRCH => UffdError::ProcessGone,
        e => os(what)(e),
    }
}

/// A new descriptor over this process's memory, with nothing registered. It tells of pages given away, and of faults by the
/// kernel too (a vCPU's are).
pub fn open() -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let number = match std::fs::File::open(NODE) {
        // SAFETY: the node's one call takes the flags as an integer and gives a new descriptor back.
        Ok(node) => unsafe { libc::ioctl(node.as_raw_fd(), NEW, flags) },
        // SAFETY: the call takes the flags only.
        Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
    };
    if number < 0 {
        let source = io::Error::last_os_error();
        return Err(UffdError::Os {
            what: "open it (CAP_SYS_PTRACE, or access to /dev/userfaultfd, is needed)",
            source,
        });
    }
    // SAFETY: the kernel has just made this descriptor for this process.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    Ok(fd)
}

/// The features this kernel has.
fn features() -> Result<u64, UffdError> {
    agree(&open()?, 0)
}

/// Agrees on `features`; possible once a descriptor.
fn agree(fd: &OwnedFd, features: u64) -> Result<u64, UffdError> {
    let mut api = raw::uffdio_api { api: raw::UFFD_API.into(), features, ioctls: 0 };
    // SAFETY: the opcode's argument is a `uffdio_api`; nothing but the descriptor is changed.
    unsafe { call::<{ raw_op::API }, _>(fd, &mut api) }.map_err(os("agree on its features"))?;
    Ok(api.features)
}

/// Opens a userfaultfd over `ranges` of this process's memory (shared mappings of a memfd: address, bytes). From its return on
/// whoever touches a page that is not there (with [`Mode::Minor`]: or not mapped) waits for whoever answers.
///
/// # Safety
///
/// The ranges must be mappings whose missing pages only the holder of the descriptor fills in, and that no thread of this
/// process needs in order to answer.
pub unsafe fn arm(ranges: &[(u64, u64)], mode: Mode) -> Result<OwnedFd, UffdError> {
    let mut want = raw::UFFD_FEATURE_EVENT_REMOVE | raw::UFFD_FEATURE_MISSING_SHMEM;
    let mut how = raw::UFFDIO_REGISTER_MODE_MISSING;
    if mode == Mode::Minor {
        want |= raw::UFFD_FEATURE_MINOR_SHMEM;
        how |= raw::UFFDIO_REGISTER_MODE_MINOR;
    }
    let lacking = u64::from(want) & !features()?;
    if lacking != 0 {
        let source = io::Error::from(io::ErrorKind::Unsupported);
        return Err(UffdError::Os { what: "this kernel lacks a feature of it (Linux 5.13 has all)", source });
    }
    let fd = open()?;
    agree(&fd, want.into())?;
    for &(start, len) in ranges {
        let mut r =
            raw::uffdio_register { range: raw::uffdio_range { start, len }, mode: how.into(), ioctls: 0 };
        // SAFETY: the opcode's argument is a `uffdio_register`; the caller vouches for the range.
        unsafe { call::<{ raw_op::REGISTER }, _>(&fd, &mut r) }.map_err(os("register memory"))?;
    }
    Ok(fd)
}

#[cfg(test)]
mod tests;
