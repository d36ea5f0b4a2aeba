//! Pages into the memory of a VM that already runs: a page appears to its vCPUs in one piece or not at all, and whoever
//! waits for it goes on. See `host::uffd` for what the kernel's answers mean.

use crate::core::page_set::{PageSet, Run};
use crate::core::units::{BlockIx, PAGE_SIZE, PageAddr};
use crate::host::ram::GuestRam;
use crate::host::uffd::{Done, Event, Stop, Uffd, UffdError};
use crate::net::vmm::{UffdMode, Userfault};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How often a page is tried again whose mapping is being changed, and the pause before that.
const TRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_micros(100);

/// A VM's memory with its faults.
#[derive(Debug)]
pub(in super::super) struct Faults {
    /// Slots, named and as files.
    pub(in super::super) slots: Vec<(String, u64, File)>,
    /// Who waits for pages.
    pub(in super::super) userfault: Userfault,
}

/// Why a page could not be placed.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum PlaceError {
    #[error("{0}")]
    Uffd(#[from] UffdError),
    #[error("into the VM's memory: {0}")]
    File(#[from] io::Error),
    #[error("page {page} of slot {slot} cannot be placed: {why:?}")]
    Stopped { slot: usize, page: u32, why: Stop },
}

/// The memory, open.
#[derive(Debug)]
pub(super) struct Place {
    uffd: Uffd,
    mode: UffdMode,
    files: Vec<File>,
    ram: GuestRam,
}

impl Place {
    pub(super) fn new(faults: Faults) -> Result<Self, String> {
        let Faults { slots, userfault } = faults;
        let ranges: Vec<(u64, u64)> =
            userfault.bases.iter().copied().zip(slots.iter().map(|(_, bytes, _)| *bytes)).collect();
        if ranges.len() != slots.len() {
            return Err("the VMM names another number of mappings than it has slots".into());
        }
        let uffd = Uffd::new(userfault.fd, &ranges).map_err(|e| e.to_string())?;
        let files = slots.iter().map(|(_, _, f)| f.try_clone()).collect::<Result<_, _>>();
        let files = files.map_err(|e| e.to_string())?;
        Ok(Self { uffd, mode: userfault.mode, files, ram: GuestRam::of_files(slots) })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    pub(super) fn events(&self, into: &mut Vec<Event>) -> Result<usize, PlaceError> {
        Ok(self.uffd.read(into)?)
    }

    /// Takes out of `set` what the memory has.
    pub(super) fn less_present(&self, set: &mut PageSet) {
        for block in 0..self.files.len() {
            let Ok(ix) = u16::try_from(block) else { break };
            for r in self.ram.data_ranges(block) {
                let addr = PageAddr { block: BlockIx(ix), page: r.start };
                set.remove_run(Run { addr, count: r.end - r.start });
            }
        }
    }

    /// Places whole pages that follow each other.
    pub(super) fn put(&self, addr: PageAddr, bytes: &[u8]) -> Result<(), PlaceError> {
        let slot = usize::from(addr.block.0);
        let count = (bytes.len() / PAGE_SIZE) as u32;
        match self.mode {
            UffdMode::Minor => {
                let file = self.files.get(slot).ok_or(UffdError::Outside { slot, page: addr.page, count })?;
                file.write_all_at(bytes, u64::from(addr.page) * PAGE_SIZE as u64)?;
                self.show(addr, count)
            }
            UffdMode::Missing => self.each(addr, count, |page, left| {
                let from = (page - addr.page) as usize * PAGE_SIZE;
                self.uffd.copy(slot, page, &bytes[from..from + left as usize * PAGE_SIZE])
            }),
        }
    }

    /// Places one page of zeros.
    pub(super) fn zero(&self, addr: PageAddr) -> Result<(), PlaceError> {
        self.each(addr, 1, |page, n| self.uffd.zero(usize::from(addr.block.0), page, n))
    }

    /// The page is as it was at the switch, or as it was placed since.
    pub(super) fn show_or_zero(&self, addr: PageAddr) -> Result<(), PlaceError> {
        if self.mode == UffdMode::Missing {
            // A page that is in the file does not fault.
            return self.zero(addr);
        }
        match self.show(addr, 1) {
            Err(PlaceError::Stopped { why: Stop::NotInFile, .. }) => self.zero(addr),
            other => other,
        }
    }

    fn show(&self, addr: PageAddr, count: u32) -> Result<(), PlaceError> {
        self.each(addr, count, |page, left| self.uffd.map(usize::from(addr.block.0), page, left))
    }

    /// Goes on behind pages that are there already, after it has woken who waits for them.
    fn each(
        &self,
        addr: PageAddr,
        count: u32,
        mut one: impl FnMut(u32, u32) -> Result<Done, UffdError>,
    ) -> Result<(), PlaceError> {
        let (slot, end) = (usize::from(addr.block.0), addr.page + count);
        let (mut at, mut tries) = (addr.page, 0);
        while at < end {
            let done = one(at, end - at)?;
            at += done.pages;
            match done.stop {
                None => break,
                Some(Stop::Present) => {
                    self.uffd.wake(slot, at, 1)?;
                    at += 1;
                }
                Some(Stop::Changing) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(PAUSE);
                }
                Some(why) => return Err(PlaceError::Stopped { slot, page: at, why }),
            }
        }
        Ok(())
    }

    /// Whoever waits faults again, and is heard of again.
    pub(super) fn wake_all(&self) -> Result<(), PlaceError> {
        Ok(self.uffd.wake_all()?)
    }
}
