//! Guest RAM read from outside of a running QEMU, because the preparation may not cost the guest anything and stock
//! QEMU has no call for it.
//!
//! What is read here is a hint: the guest writes on, and only the migration stream tells the truth. So a block that
//! cannot be read is no error; its pages are just not known beforehand. Guest memory is never mapped: touching a
//! hole through a mapping would allocate it.
//!
//! [`GuestRam`] holds descriptors on the guest's memory; after QEMU's end they keep that memory alive, so drop it as
//! soon as the VM's preparation and push are over.

use crate::core::units::PAGE_SIZE;
use layout::{Block, Vma};
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

// Parsing of what QEMU and /proc say about memory.
mod layout;

pub use layout::MAX_BLOCKS;

/// Smaller blocks (option ROMs, ACPI tables) are not worth a descriptor; the stream brings them.
pub const MIN_BYTES: u64 = 1 << 20;

/// Runs one command of QEMU's human monitor and gives its text (the net floor's QMP client does, through a closure).
pub type Monitor<'a> = dyn FnMut(&str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Why a guest's RAM cannot be read from outside.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// QEMU's monitor failed or refused.
    #[error("RAM of process {pid}: monitor command `{command}`: {what}")]
    Monitor {
        /// QEMU's process.
        pid: u32,
        /// The human monitor's command.
        command: String,
        /// What the monitor said.
        what: String,
    },
    /// The monitor's text has no form known from QEMU 7.2 to 10.
    #[error("RAM of process {pid}: `info ramblock` of this QEMU is not understood: {what}")]
    Layout {
        /// QEMU's process.
        pid: u32,
        /// The line, or what is missing.
        what: String,
    },
    /// /proc refused.
    #[error(
        "RAM of process {pid}: {path}: {source} (the agent needs CAP_SYS_PTRACE, or to run as QEMU's user)"
    )]
    Proc {
        /// QEMU's process.
        pid: u32,
        /// Which file.
        path: String,
        /// From the kernel.
        source: io::Error,
    },
}

/// Whether the memory of a process may be read at all.
pub fn may_read(pid: u32) -> Result<(), RamError> {
    ["maps", "mem"].iter().try_for_each(|what| {
        let path = format!("/proc/{pid}/{what}");
        File::open(&path).map(drop).map_err(|source| RamError::Proc { pid, path, source })
    })
}

/// Where a block's bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// A memfd or file that QEMU maps shared: holes are known to the file.
    File,
    /// QEMU's own address space: holes are known to its page table.
    Process,
    /// Not readable from outside; see [`RamBlockInfo::why_not`].
    None,
}

/// One RAM block of the guest.
#[derive(Clone, Debug)]
pub struct RamBlockInfo {
    /// QEMU's name, the same as in the migration stream.
    pub name: String,
    /// Used length in bytes.
    pub bytes: u64,
    /// How it is read.
    pub way: Way,
    /// Why it is not, if it is not.
    pub why_not: Option<&'static str>,
}

impl RamBlockInfo {
    /// Whether [`GuestRam::read_at`] can work.
    #[must_use]
    pub fn readable(&self) -> bool {
        self.way != Way::None
    }

    /// Pages in the block.
    #[must_use]
    pub fn pages(&self) -> u32 {
        u32::try_from(self.bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX)
    }
}

/// Guest frames that follow each other in a RAM block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frames {
    /// Guest frame numbers.
    pub gfns: Range<u64>,
    /// Which block they are in.
    pub block: usize,
    /// The page of the first.
    pub first: u32,
}

impl Frames {
    /// The page of a frame, if it is one of these.
    #[must_use]
    pub fn page(&self, gfn: u64) -> Option<(usize, u32)> {
        let at = gfn.checked_sub(self.gfns.start).filter(|_| self.gfns.contains(&gfn))?;
        Some((self.block, self.first.checked_add(u32::try_from(at).ok()?)?))
    }
}

#[derive(Debug)]
enum Source {
    File { file: File, offset: u64 },
    Process { hva: u64, sparse: bool },
    None,
}

/// The RAM of one running QEMU, readable by any number of threads at once. The default has none.
#[derive(Debug, Default)]
pub struct GuestRam {
    blocks: Vec<RamBlockInfo>,
    sources: Vec<Source>,
    /// Where QEMU has each, as far as it tells.
    hvas: Vec<Option<u64>>,
    mem: Option<File>,
    pagemap: Option<File>,
}

impl GuestRam {
    /// Finds and opens the RAM of the QEMU that runs as process `pid`; `hmp` runs a command of its human monitor.
    /// Fails only if nothing can be known at all; a single block that cannot be read is marked so.
    pub fn open(pid: u32, hmp: &mut Monitor<'_>) -> Result<Self, RamError> {
        let mut ask = |command: &str| {
            hmp(command).map_err(|e| RamError::Monitor {
                pid,
                command: command.to_owned(),
                what: e.to_string(),
            })
        };
        let mut blocks =
            layout::ramblocks(&ask("info ramblock")?).map_err(|what| RamError::Layout { pid, what })?;
        if blocks.iter().any(|b| b.hva.is_none() && b.bytes >= MIN_BYTES) {
            // Before QEMU 8.2 the table has no host addresses: find a guest address of each block, and ask for it.
            let regions = layout::mtree(&ask("info mtree -f")?);
            for i in 0..blocks.len() {
                if blocks[i].hva.is_some() || blocks[i].bytes < MIN_BYTES {
                    continue;
                }
                for r in &regions {
                    // Two like devices have regions of one name: which is whose cannot be told.
                    let mut mine = blocks.iter().enumerate().filter(|(_, b)| b.is_region(&r.name));
                    if !matches!((mine.next(), mine.next()), (Some((j, _)), None) if i == j) {
                        continue;
                    }
                    let found = layout::gpa2hva(&ask(&format!("gpa2hva {:#x}", r.gpa))?);
                    blocks[i].hva = found.and_then(|hva| hva.checked_sub(r.offset));
                    if blocks[i].hva.is_some() {
                        break;
                    }
                }
            }
        }
        Self::from_blocks(pid, &blocks)
    }

    /// The RAM of a VM that hands its memory files out: name, length and file of each block, from offset 0.
    #[must_use]
    pub fn of_files(blocks: Vec<(String, u64, File)>) -> Self {
        let mut out = Self::default();
        for (name, bytes, file) in blocks {
            out.blocks.push(RamBlockInfo { name, bytes, way: Way::File, why_not: None });
            out.sources.push(Source::File { file, offset: 0 });
            out.hvas.push(None);
        }
        out
    }

    fn from_blocks(pid: u32, blocks: &[Block]) -> Result<Self, RamError> {
        let fail = |path: &str, source| RamError::Proc { pid, path: path.to_owned(), source };
        let path = format!("/proc/{pid}/maps");
        let maps = std::fs::read_to_string(&path).map_err(|e| fail(&path, e))?;
        let vmas = layout::maps(&maps);
        let path = format!("/proc/{pid}/mem");
        let mem = File::open(&path).map_err(|e| fail(&path, e))?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok();
        let mut out = Self { blocks: vec![], sources: vec![], hvas: vec![], mem: Some(mem), pagemap };
        let mut fds = None;
        for b in blocks {
            let (source, why_not) = if b.bytes < MIN_BYTES {
                (Source::None, Some("smaller than 1 MiB"))
            } else if let Some(hva) = b.hva {
                locate(pid, hva, b.bytes, &vmas, &mut fds)
            } else {
                (Source::None, Some("QEMU tells no host address for it"))
            };
            out.blocks.push(RamBlockInfo {
                name: b.name.clone(),
                bytes: b.bytes,
                way: match source {
                    Source::File { .. } => Way::File,
                    Source::Process { .. } => Way::Process,
                    Source::None => Way::None,
                },
                why_not,
            });
            out.sources.push(source);
            out.hvas.push(b.hva);
        }
        if !out.sources.iter().any(|s| matches!(s, Source::Process { .. })) {
            out.mem = None;
            out.pagemap = None;
        }
        Ok(out)
    }

    /// All blocks, in QEMU's order, unreadable ones included.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlockInfo] {
        &self.blocks
    }

    /// The block of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|b| b.name == name)
    }

    /// The block and page at an address of QEMU's own.
    #[must_use]
    pub fn page_at(&self, hva: u64) -> Option<(usize, u32)> {
        let blocks = self.hvas.iter().zip(&self.blocks).enumerate();
        blocks.into_iter().find_map(|(i, (start, b))| {
            let at = hva.checked_sub((*start)?).filter(|at| *at < b.bytes)?;
            Some((i, u32::try_from(at / PAGE_SIZE as u64).ok()?))
        })
    }

    /// Which guest frames each block's pages are, by `info mtree -f`. Blocks whose region cannot be told are left out.
    pub fn frames(&self, hmp: &mut Monitor<'_>) -> Result<Vec<Frames>, RamError> {
        let command = "info mtree -f".to_owned();
        let text = hmp(&command).map_err(|e| RamError::Monitor { pid: 0, command, what: e.to_string() })?;
        let mut out = Vec::new();
        for r in layout::mtree(&text) {
            let name = |b: &RamBlockInfo| {
                b.name == r.name || b.name.rsplit_once('/').is_some_and(|(_, last)| last == r.name)
            };
            let mut mine = self.blocks.iter().enumerate().filter(|(_, b)| name(b));
            let (Some((block, b)), None) = (mine.next(), mine.next()) else { continue };
            let page = PAGE_SIZE as u64;
            if r.offset.checked_add(r.bytes).is_none_or(|end| end > b.bytes.next_multiple_of(page)) {
                continue;
            }
            let Ok(first) = u32::try_from(r.offset / page) else { continue };
            out.push(Frames { gfns: r.gpa / page..r.gpa.saturating_add(r.bytes) / page, block, first });
        }
        Ok(out)
    }

    /// Fills `buf` (whole pages) from page `page` of block `block` on. The content may be torn: the guest runs.
    pub fn read_at(&self, block: usize, page: u32, buf: &mut [u8]) -> io::Result<()> {
        let at = u64::from(page) * PAGE_SIZE as u64;
        let bytes = self.blocks.get(block).map_or(0, |b| b.bytes);
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > bytes) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the RAM block"));
        }
        match (&self.sources[block], &self.mem) {
            (Source::File { file, offset }, _) => file.read_exact_at(buf, offset + at),
            (Source::Process { hva, .. }, Some(mem)) => mem.read_exact_at(buf, hva + at),
            _ => Err(io::Error::new(io::ErrorKind::Unsupported, "RAM block not readable from outside")),
        }
    }

    /// The page ranges that may hold something else than zeros, ascending; all of the block where holes are not
    /// known, none of an unreadable one. Ranges are found as the iterator goes, so they follow a growing guest.
    #[must_use]
    pub fn data_ranges(&self, block: usize) -> DataRanges<'_> {
        let pages = self.blocks.get(block).filter(|b| b.readable()).map_or(0, RamBlockInfo::pages);
        DataRanges { ram: self, block, next: 0, pages, window: vec![], window_at: 0 }
    }

    /// The same from page `from` on.
    #[must_use]
    pub fn data_ranges_from(&self, block: usize, from: u32) -> DataRanges<'_> {
        DataRanges { next: from, ..self.data_ranges(block) }
    }

    /// The first data range at or after `from` (bytes in the file), cut to the block.
    fn file_range(file: &File, offset: u64, from: u64, bytes: u64) -> Option<Range<u64>> {
        let start = match seek(file, SeekFrom::Data(offset + from)) {
            Ok(at) => at.saturating_sub(offset).max(from),
            Err(rustix::io::Errno::NXIO) => return None,
            // A file system without the call: everything is data.
            Err(_) => return (from < bytes).then_some(from..bytes),
        };
        if start >= bytes {
            return None;
        }
        let end = seek(file, SeekFrom::Hole(offset + start)).map_or(bytes, |at| at.saturating_sub(offset));
        Some(start..end.clamp(start + 1, bytes))
    }
}

/// Iterator of [`GuestRam::data_ranges`].
#[derive(Debug)]
pub struct DataRanges<'a> {
    ram: &'a GuestRam,
    block: usize,
    next: u32,
    pages: u32,
    /// Page-table entries of the pages from `window_at` on.
    window: Vec<u8>,
    window_at: u32,
}

/// Page-table entries read at once: 32 MiB of guest memory.
const WINDOW: u32 = 8192;

impl DataRanges<'_> {
    /// Whether the page is in QEMU's page table, in memory or swapped out. A read error counts as "may be".
    fn present(&mut self, hva: u64, page: u32) -> bool {
        let Some(pagemap) = &self.ram.pagemap else { return true };
        let in_window = page.wrapping_sub(self.window_at) as usize;
        if page < self.window_at || in_window >= self.window.len() / 8 {
            let n = WINDOW.min(self.pages - page) as usize;
            self.window.resize(n * 8, 0);
            self.window_at = page;
            let at = (hva / PAGE_SIZE as u64 + u64::from(page)) * 8;
            if pagemap.read_exact_at(&mut self.window, at).is_err() {
                self.window.fill(0xff);
            }
        }
        let i = (page - self.window_at) as usize * 8;
        // Little-endian, as all of the supported machines; bit 63 present, bit 62 swapped.
        self.window.get(i + 7).is_none_or(|top| top & 0xc0 != 0)
    }
}

impl Iterator for DataRanges<'_> {
    type Item = Range<u32>;

    fn next(&mut self) -> Option<Range<u32>> {
        if self.next >= self.pages {
            return None;
        }
        let out = match self.ram.sources.get(self.block)? {
            Source::File { file, offset } => {
                let page = PAGE_SIZE as u64;
                let r = GuestRam::file_range(
                    file,
                    *offset,
                    u64::from(self.next) * page,
                    u64::from(self.pages) * page,
                );
                r.map(|r| {
                    let to = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).min(self.pages);
                    to(r.start / page)..to(r.end.div_ceil(page))
                })
            }
            Source::Process { sparse: false, .. } => Some(self.next..self.pages),
            Source::Process { hva, .. } => {
                let hva = *hva;
                (self.next..self.pages).find(|p| self.present(hva, *p)).map(|start| {
                    let end = (start + 1..self.pages).find(|p| !self.present(hva, *p));
                    start..end.unwrap_or(self.pages)
                })
            }
            Source::None => None,
        };
        self.next = out.as_ref().map_or(self.pages, |r| r.end);
        out
    }
}

/// Open files of the process, found once: (device, inode) and the link to open.
type Fds = Option<Vec<(u64, u64, String)>>;

/// Finds the best way to the `bytes` bytes at `hva` of process `pid`.
fn locate(pid: u32, hva: u64, bytes: u64, vmas: &[Vma], fds: &mut Fds) -> (Source, Option<&'static str>) {
    let Some(end) = hva.checked_add(bytes) else {
        return (Source::None, Some("its host address is out of range"));
    };
    // The kernel splits and merges mappings as it likes: walk over all that touch the block.
    let mut at = hva;
    let mut files: Option<(u64, u64, u64)> = None;
    let mut anonymous = true;
    let mut one_file = true;
    for v in vmas.iter().filter(|v| v.end > hva && v.start < end) {
        if v.start > at || !v.read {
            return (Source::None, Some("QEMU does not map it whole and readable"));
        }
        let offset_of_hva = v.offset.wrapping_add(hva.wrapping_sub(v.start));
        let this = (v.device, v.inode, offset_of_hva);
        one_file &= v.shared && v.inode != 0 && *files.get_or_insert(this) == this;
        anonymous &= v.inode == 0 && !v.shared;
        at = v.end;
    }
    if at < end {
        return (Source::None, Some("QEMU does not map it whole and readable"));
    }
    if let (true, Some((device, inode, offset))) = (one_file, files)
        && let Some(file) = open_mapped(pid, hva, device, inode, vmas, fds)
    {
        return (Source::File { file, offset }, None);
    }
    // A private mapping of a file has content where the page table is empty: then holes are not known.
    (Source::Process { hva, sparse: anonymous }, None)
}

/// Opens the file behind a shared mapping: by one of the process's descriptors, else by its map entry.
fn open_mapped(pid: u32, hva: u64, device: u64, inode: u64, vmas: &[Vma], fds: &mut Fds) -> Option<File> {
    let fds = fds.get_or_insert_with(|| {
        let dir = std::fs::read_dir(format!("/proc/{pid}/fd"));
        dir.into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| {
                let path = e.path();
                let m = std::fs::metadata(&path).ok()?;
                m.is_file().then(|| (m.dev(), m.ino(), path.display().to_string()))
            })
            .collect()
    });
    let is_it = |f: &File| f.metadata().is_ok_and(|m| m.ino() == inode && m.dev() == device);
    for (_, _, path) in fds.iter().filter(|(d, i, _)| (*d, *i) == (device, inode)) {
        if let Some(f) = File::open(path).ok().filter(is_it) {
            return Some(f);
        }
    }
    let v = vmas.iter().find(|v| v.start <= hva && hva < v.end)?;
    File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end)).ok().filter(is_it)
}

#[cfg(test)]
mod tests;
