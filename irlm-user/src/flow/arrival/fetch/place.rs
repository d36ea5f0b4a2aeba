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

/// How long one change of the memory's layout may take: as long as a thread that gives pages away may be kept from running.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

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
    #[error("the VMM names another number of mappings than it has slots")]
    Mappings,
    #[error("nothing can be placed: the memory's layout has been changing for {} s", PATIENCE.as_secs())]
    Changing,
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
    pub(super) fn new(faults: Faults) -> Result<Self, PlaceError> {
        let Faults { slots, userfault } = faults;
        let ranges: Vec<(u64, u64)> =
            userfault.bases.iter().copied().zip(slots.iter().map(|(_, bytes, _)| *bytes)).collect();
        if ranges.len() != slots.len() {
            return Err(PlaceError::Mappings);
        }
        let uffd = Uffd::new(userfault.fd, &ranges)?;
        let files = slots.iter().map(|(_, _, f)| f.try_clone()).collect::<Result<_, _>>();
        let files = files?;
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

    /// Writes whole pages that follow each other to where [`Self::reveal`] takes them from. Nobody sees them before that.
    pub(super) fn store(&self, addr: PageAddr, bytes: &[u8]) -> Result<(), PlaceError> {
        if self.mode == UffdMode::Minor {
            let (slot, count) = (usize::from(addr.block.0), (bytes.len() / PAGE_SIZE) as u32);
            let file = self.files.get(slot).ok_or(UffdError::Outside { slot, page: addr.page, count })?;
            file.write_all_at(bytes, u64::from(addr.page) * PAGE_SIZE as u64)?;
        }
        Ok(())
    }

    /// Places what was stored, or goes on with that, and wakes who waits. Says how many pages that came to: fewer than all if
    /// the memory's layout is being changed, so that events must be read first.
    pub(super) fn reveal(&self, addr: PageAddr, bytes: &[u8]) -> Result<u32, PlaceError> {
        let (slot, count) = (usize::from(addr.block.0), (bytes.len() / PAGE_SIZE) as u32);
        self.each(addr, count, |page, left| match self.mode {
            UffdMode::Minor => self.uffd.map(slot, page, left),
            UffdMode::Missing => {
                let from = (page - addr.page) as usize * PAGE_SIZE;
                self.uffd.copy(slot, page, &bytes[from..from + left as usize * PAGE_SIZE])
            }
        })
    }

    /// Places one page of zeros; `false`: as for [`Self::reveal`].
    pub(super) fn zero(&self, addr: PageAddr) -> Result<bool, PlaceError> {
        Ok(self.each(addr, 1, |page, n| self.uffd.zero(usize::from(addr.block.0), page, n))? == 1)
    }

    /// The page is as it was at the switch, or as it was placed since; `false`: as for [`Self::reveal`].
    pub(super) fn show_or_zero(&self, addr: PageAddr) -> Result<bool, PlaceError> {
        if self.mode == UffdMode::Missing {
            // A page that is in the file does not fault.
            return self.zero(addr);
        }
        let shown = self.each(addr, 1, |page, n| self.uffd.map(usize::from(addr.block.0), page, n));
        match shown {
            Err(PlaceError::Stopped { why: Stop::NotInFile, .. }) => self.zero(addr),
            other => Ok(other? == 1),
        }
    }

    /// Goes on behind pages that are there already, after it has woken who waits for them; how many pages that came to.
    fn each(
        &self,
        addr: PageAddr,
        count: u32,
        mut one: impl FnMut(u32, u32) -> Result<Done, UffdError>,
    ) -> Result<u32, PlaceError> {
        let (slot, end) = (usize::from(addr.block.0), addr.page + count);
        let mut at = addr.page;
        while at < end {
            let done = one(at, end - at)?;
            at += done.pages;
            match done.stop {
                None => break,
                Some(Stop::Present) => {
                    self.uffd.wake(slot, at, 1)?;
                    at += 1;
                }
                Some(Stop::Changing) => break,
                Some(why) => return Err(PlaceError::Stopped { slot, page: at, why }),
            }
        }
        Ok(at - addr.page)
    }

    /// Whoever waits faults again, and is heard of again.
    pub(super) fn wake_all(&self) -> Result<(), PlaceError> {
        Ok(self.uffd.wake_all()?)
    }
}
