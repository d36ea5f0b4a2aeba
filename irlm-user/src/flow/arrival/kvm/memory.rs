//! Pages into a VM's memory files: gathered in the order in which they must be, neighbours written in one call.
//!
//! Bound: the scratch buffer holds one frame's stored pages, at most 4096 (16 MiB); typically some hundred KiB. Nothing is
//! written for a zero page where the file has a hole: a fresh file is zero.

use super::super::emit::OutError;
use crate::core::account::{Account, Tally};
use crate::core::arrival::Output;
use crate::core::page_set::PageSet;
use crate::core::qemu::BlockList;
use crate::core::units::{BlockIx, PAGE_SIZE, PageAddr, PageBytes};
use crate::flow::MoveError;
use crate::host::ram::GuestRam;
use crate::net::vmm::Slot;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::pwritev;
use std::fs::File;
use std::io::{self, IoSlice};

/// Pages in one call: IOV_MAX.
const MAX_RUN: usize = 1024;

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug)]
enum Piece {
    /// In the frame's body.
    Body(usize),
    /// In the scratch buffer.
    Scratch(usize),
    /// All this byte.
    Fill(u8),
}

/// A VM's memory, to be filled.
#[derive(Debug)]
pub(super) struct Memory {
    files: Vec<File>,
    names: Vec<String>,
    /// Pages that hold something else than a hole.
    written: PageSet,
    pieces: Vec<(PageAddr, Piece)>,
    scratch: Vec<PageBytes>,
    /// Of all that was written, and the zero pages that need no writing. A page is among those only before its first piece.
    account: Option<Account>,
    zeros: Vec<PageAddr>,
}

impl Memory {
    /// The slots of a VMM that waits.
    pub(super) fn new(slots: Vec<Slot>) -> Result<Self, MoveError> {
        if let Some(s) = slots.iter().find(|s| s.page_bytes != PAGE_SIZE as u64) {
            return Err(MoveError::Refused(format!(
                "{} is on pages of {} KiB, which cannot be filled by writing to their file: start the target VMM \
                 with small pages",
                s.name,
                s.page_bytes >> 10
            )));
        }
        let pages = |s: &Slot| {
            let pages = u32::try_from(s.bytes / PAGE_SIZE as u64);
            pages.map_err(|_| MoveError::Refused(format!("{}: too large", s.name)))
        };
        let pages = slots.iter().map(pages).collect::<Result<Vec<u32>, _>>()?;
        let mut written = PageSet::empty(&pages);
        let (mut files, mut names, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        for s in slots {
            let file = File::from(s.fd);
            blocks.push((s.name.clone(), s.bytes, file.try_clone()?));
            files.push(file);
            names.push(s.name);
        }
        // A VMM that waits has nothing in it; one that has shall not make a lie of the rule above.
        let ram = GuestRam::of_files(blocks);
        for (block, ix) in (0..files.len()).zip(0u16..) {
            for page in ram.data_ranges(block).flatten() {
                written.insert(PageAddr { block: BlockIx(ix), page });
            }
        }
        let (pieces, scratch, zeros) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { files, names, written, pieces, scratch, account: None, zeros })
    }

    /// Accounts for what is written from now on.
    pub(super) fn account_in(&mut self, account: Option<Account>) {
        self.account = account;
    }

    /// What the pages come to that were written.
    pub(super) fn tally(&mut self) -> Option<Tally> {
        self.account.as_mut().map(Account::tally)
    }

    /// The same memory, to be read.
    pub(super) fn to_read(&self) -> io::Result<GuestRam> {
        let mut blocks = Vec::new();
        for ((name, file), pages) in self.names.iter().zip(&self.files).zip(self.written.pages()) {
            blocks.push((name.clone(), u64::from(*pages) * PAGE_SIZE as u64, file.try_clone()?));
        }
        Ok(GuestRam::of_files(blocks))
    }

    /// Accounts for what is written now, from the very bytes that are written.
    fn account_for(&mut self, body: &[PageBytes]) {
        let zeros = self.zeros.drain(..);
        let Some(account) = &mut self.account else { return };
        zeros.for_each(|addr| account.uniform(addr, 1, 0));
        for (addr, piece) in &self.pieces {
            match *piece {
                Piece::Fill(fill) => account.uniform(*addr, 1, fill),
                Piece::Scratch(i) => account.page(*addr, &self.scratch[i]),
                Piece::Body(i) => {
                    if let Some(page) = body.get(i) {
                        account.page(*addr, page);
                    }
                }
            }
        }
    }

    /// Whether the source has the same slots.
    pub(super) fn fits(&self, list: &BlockList) -> Result<(), MoveError> {
        let theirs = list.blocks().iter().map(|b| (&*b.name, b.pages()));
        let ours = self.names.iter().map(String::as_str).zip(self.written.pages().iter().copied());
        if theirs.clone().eq(ours.clone()) {
            return Ok(());
        }
        let show = |blocks: Vec<(&str, u32)>| {
            let all: Vec<String> =
                blocks.iter().map(|(n, p)| format!("{n} of {} KiB", u64::from(*p) * 4)).collect();
            all.join(", ")
        };
        Err(MoveError::Refused(format!(
            "the source's memory is {}, the target's {}: start the target VMM with the same memory",
            show(theirs.collect()),
            show(ours.collect())
        )))
    }

    fn push(&mut self, addr: PageAddr, piece: Piece) -> Result<(), OutError> {
        let inside = self.written.pages().get(usize::from(addr.block.0)).is_some_and(|n| addr.page < *n);
        if !inside {
            return Err(OutError::NoPage(addr));
        }
        self.written.insert(addr);
        self.pieces.push((addr, piece));
        Ok(())
    }

    /// Writes everything gathered; returns the bytes.
    pub(super) fn write(&mut self, body: &[u8]) -> io::Result<u64> {
        let (body, _) = body.as_chunks::<PAGE_SIZE>();
        self.account_for(body);
        let mut at = 0;
        let mut iov = Vec::with_capacity(self.pieces.len().min(MAX_RUN));
        let mut result = Ok(());
        while let Some((first, piece)) = self.pieces.get(at) {
            let file = &self.files[usize::from(first.block.0)];
            let offset = u64::from(first.page) * PAGE_SIZE as u64;
            let run;
            if let Piece::Fill(byte) = *piece {
                run = self.run(at, |p| matches!(p, Piece::Fill(b) if *b == byte));
                let page = [byte; PAGE_SIZE];
                result = write_at(file, &mut vec![IoSlice::new(&page); run], offset);
            } else {
                run = self.run(at, |p| !matches!(p, Piece::Fill(_)));
                iov.clear();
                for (_, piece) in &self.pieces[at..at + run] {
                    iov.push(IoSlice::new(match *piece {
                        Piece::Body(i) => body.get(i).ok_or(io::ErrorKind::InvalidInput)?,
                        Piece::Scratch(i) => &self.scratch[i],
                        Piece::Fill(_) => continue,
                    }));
                }
                result = write_at(file, &mut iov, offset);
            }
            if result.is_err() {
                break;
            }
            at += run;
        }
        let bytes = at * PAGE_SIZE;
        drop(iov);
        self.pieces.clear();
        self.scratch.clear();
        // A rare giant frame must not be paid for ever after.
        self.scratch.shrink_to(256);
        result.map(|()| bytes as u64)
    }

    /// Makes holes of these pages.
    pub(super) fn punch(&mut self, pages: &PageSet) -> io::Result<()> {
        if let Some(account) = &mut self.account {
            account.forget(pages);
        }
        for run in pages.runs() {
            let end = run.addr.page + run.count;
            let mut at = run.addr;
            while let Some(next) = self.written.next(at).filter(|n| n.block == at.block && n.page < end) {
                let some = self.written.run_at(next, end - next.page);
                let file = &self.files[usize::from(next.block.0)];
                let (from, len) = (u64::from(next.page), u64::from(some.count));
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, how, from * PAGE_SIZE as u64, len * PAGE_SIZE as u64)?;
                self.written.remove_run(some);
                at = PageAddr { page: next.page + some.count, ..next };
            }
        }
        Ok(())
    }

    /// How many pieces from `at` on follow each other in the file and are of this sort.
    fn run(&self, at: usize, sort: impl Fn(&Piece) -> bool) -> usize {
        let (first, _) = self.pieces[at];
        let follows = |(n, (addr, piece)): &(usize, &(PageAddr, Piece))| {
            addr.block == first.block && Some(addr.page) == first.page.checked_add(*n as u32) && sort(piece)
        };
        self.pieces[at..].iter().take(MAX_RUN).enumerate().take_while(follows).count()
    }
}

fn write_at(file: &File, iov: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
    let mut rest = iov;
    while !rest.is_empty() {
        match pwritev(file, rest, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                offset += n as u64;
                IoSlice::advance_slices(&mut rest, n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

impl Output for Memory {
    type Error = OutError;

    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), OutError> {
        for i in 0..count {
            let page = addr.page.checked_add(i).ok_or(OutError::NoPage(addr))?;
            let addr = PageAddr { page, ..addr };
            if fill != 0 || self.written.contains(addr) {
                self.push(addr, Piece::Fill(fill))?;
            } else if self.account.is_some() {
                self.zeros.push(addr);
            }
        }
        Ok(())
    }

    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), OutError> {
        self.push(addr, Piece::Body(content))
    }

    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), OutError> {
        self.scratch.push(*bytes);
        self.push(addr, Piece::Scratch(self.scratch.len() - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::qemu::RamBlock;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    fn slot(name: &str, pages: u64, page_bytes: u64) -> Slot {
        let file = crate::net::vmm::file_of(&[]).unwrap();
        file.set_len(pages * 4096).unwrap();
        Slot { guest_phys: 0, bytes: pages * 4096, page_bytes, name: name.into(), fd: OwnedFd::from(file) }
    }

    fn at(block: u16, page: u32) -> PageAddr {
        PageAddr { block: BlockIx(block), page }
    }

    fn read(m: &Memory, addr: PageAddr) -> Vec<u8> {
        let mut out = vec![0; PAGE_SIZE];
        m.files[usize::from(addr.block.0)].read_exact_at(&mut out, u64::from(addr.page) * 4096).unwrap();
        out
    }

    #[test]
    fn the_last_of_several_versions_stays_and_zeros_make_no_page() {
        let mut m = Memory::new(vec![slot("slot0", 2000, 4096), slot("slot1", 10, 4096)]).unwrap();
        let body: Vec<u8> = (0..6u8).flat_map(|n| vec![n + 1; PAGE_SIZE]).collect();
        m.uniform(at(0, 0), 2000, 0).unwrap();
        m.body(at(0, 5), 0).unwrap();
        m.body(at(0, 6), 1).unwrap();
        m.body(at(1, 7), 2).unwrap();
        m.body(at(0, 6), 3).unwrap();
        m.stored(at(0, 7), &[99; PAGE_SIZE]).unwrap();
        m.uniform(at(1, 0), 3, 7).unwrap();
        m.uniform(at(0, 5), 1, 0).unwrap();
        assert_eq!(m.write(&body).unwrap(), 9 * 4096);
        assert_eq!(read(&m, at(0, 5)), [0; PAGE_SIZE]);
        assert_eq!(read(&m, at(0, 6)), [4; PAGE_SIZE]);
        assert_eq!(read(&m, at(0, 7)), [99; PAGE_SIZE]);
        assert_eq!(read(&m, at(1, 7)), [3; PAGE_SIZE]);
        assert_eq!(read(&m, at(1, 2)), [7; PAGE_SIZE]);
        assert_eq!(m.write(&[]).unwrap(), 0, "nothing is written twice");
        let blocks = m.files[0].metadata().unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&blocks) * 512 < 100 * 4096, "holes stay holes");
        // More neighbours than one call takes.
        let all: Vec<u8> = (0..1500usize).flat_map(|n| vec![(n % 250) as u8 + 1; PAGE_SIZE]).collect();
        (0..1500).for_each(|n| m.body(at(0, n), n as usize).unwrap());
        m.write(&all).unwrap();
        assert_eq!(read(&m, at(0, 1499)), vec![(1499 % 250) as u8 + 1; PAGE_SIZE]);
    }

    #[test]
    fn pages_that_the_vm_does_not_have_and_other_memory_are_refused() {
        let mut m = Memory::new(vec![slot("slot0", 8, 4096)]).unwrap();
        for addr in [at(0, 8), at(1, 0), at(9, u32::MAX)] {
            assert!(m.body(addr, 0).is_err() && m.stored(addr, &[1; PAGE_SIZE]).is_err());
            assert!(m.uniform(addr, 1, 3).is_err());
        }
        assert!(m.body(at(0, 1), 5).is_ok());
        assert!(m.write(&[0; PAGE_SIZE]).is_err(), "a content that the frame does not have");
        let list = |blocks: &[(&str, u64)]| {
            let blocks =
                blocks.iter().map(|(n, p)| RamBlock { name: (*n).into(), used_bytes: p * 4096 }).collect();
            BlockList::new(0, false, blocks).unwrap()
        };
        m.fits(&list(&[("slot0", 8)])).unwrap();
        for other in [list(&[("slot0", 9)]), list(&[("pc.ram", 8)]), list(&[("slot0", 8), ("slot1", 1)])] {
            let e = m.fits(&other).unwrap_err().to_string();
            assert!(e.contains("slot0 of 32 KiB") && e.contains("same memory"), "{e}");
        }
        let e = Memory::new(vec![slot("slot0", 512, 2 << 20)]).unwrap_err();
        assert!(e.to_string().contains("2048 KiB"), "{e}");
    }
}
