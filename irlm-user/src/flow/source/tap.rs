//! QEMU's stream into frames: read once, parse in place, decide for a batch of pages under one lock of the host's
//! table, send header, records and the contents from where they lie in the read buffer.
//!
//! Bounds: the read buffer ([`BUF_LEN`]) and one batch ([`BATCH_PAGES`]); no allocation per page.

use super::UNKNOWN;
use super::batch::{Batch, Leave};
use super::book::Book;
use super::out::Out;
use super::runner::Saw;
use crate::core::account::Tally;
use crate::core::digest::uniform;
use crate::core::hold::Hold;
use crate::core::pair::PairTable;
use crate::core::qemu::{BlockList, Event, Parser, RamBlock, StreamError};
use crate::core::source::{BlockInfo, Leaving, SourceVm};
use crate::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::MAX_BODY;
use crate::core::wire::messages::Blocks;
use crate::core::wire::pages::PagesBuilder;
use std::io::{self, IoSlice, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// What a UNIX socket hands over in one read (its default send buffer) fits several times.
const BUF_LEN: usize = 1 << 20;
/// Why the tap stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum TapError {
    /// QEMU's stream is one IRLM does not carry.
    #[error("{0}")]
    Stream(#[from] StreamError),
    /// The target cannot be reached.
    #[error("to the target: {0}")]
    Send(io::Error),
    /// QEMU cannot be read.
    #[error("from the source QEMU: {0}")]
    Read(io::Error),
}

/// Finds what is known of a VM's blocks once the stream has named them.
pub(super) type BlockFinder = Box<dyn FnOnce(&BlockList) -> Vec<BlockInfo> + Send>;

/// What QEMU sent last of each page, for whoever must prove that the target loaded exactly that (invariant 2).
#[derive(Debug)]
pub(super) struct Audit {
    pub(super) file: std::path::PathBuf,
    newest: std::collections::BTreeMap<PageAddr, [u8; 16]>,
}

impl Audit {
    pub(super) fn new(file: std::path::PathBuf) -> Self {
        Self { file, newest: std::collections::BTreeMap::new() }
    }

    pub(super) fn saw(&mut self, addr: PageAddr, bytes: &PageBytes) {
        let mut d = [0; 16];
        d.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        self.newest.insert(addr, d);
    }

    /// One line a page: block name, page number, the first 128 bits of the unkeyed BLAKE3 of its content.
    pub(super) fn write(&self, list: &BlockList) -> io::Result<()> {
        use std::io::Write;
        let mut out = io::BufWriter::new(std::fs::File::create(&self.file)?);
        for (addr, d) in &self.newest {
            let name = list.get(addr.block).map_or("?", |b| &b.name);
            writeln!(out, "{name} {} {:032x}", addr.page, u128::from_be_bytes(*d))?;
        }
        out.flush()
    }
}

/// The stream's state.
pub(super) struct Tap {
    audit: Option<Audit>,
    book: Book,
    parser: Parser,
    buf: Vec<u8>,
    filled: usize,
    frame: PagesBuilder,
    plan: Leave,
    vm: SourceVm,
    hold: Hold,
    finder: Option<BlockFinder>,
    blocks: Option<Arc<BlockList>>,
    stopped: bool,
}

impl Tap {
    pub(super) fn new(
        vm: SourceVm,
        hold: Hold,
        finder: BlockFinder,
        book: Book,
        audit: Option<std::path::PathBuf>,
    ) -> Self {
        Self {
            audit: audit.map(Audit::new),
            book,
            parser: Parser::new(),
            buf: vec![0; BUF_LEN],
            filled: 0,
            frame: PagesBuilder::default(),
            plan: Leave::default(),
            vm,
            hold,
            finder: Some(finder),
            blocks: None,
            stopped: false,
        }
    }

    pub(super) fn vm(&mut self) -> &mut SourceVm {
        &mut self.vm
    }

    /// What the pages come to that QEMU gave, once it has given all.
    pub(super) fn tally(&self) -> Option<Tally> {
        self.book.tally()
    }

    /// Whether most of the VM's pages have been through: from here on QEMU may stop the VM at any time.
    pub(super) fn near_end(&self) -> bool {
        let s = &self.vm.stats;
        let seen = s.uniform + s.unique + s.shared + s.references + s.remote_references;
        self.blocks.as_ref().is_some_and(|b| seen * 10 >= u64::from(b.pages()) * 9) && !self.stopped
    }

    pub(super) fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.blocks.as_ref()
    }

    /// Reads once from QEMU and sends all that can be said of it.
    pub(super) fn pump(
        &mut self,
        qemu: &UnixStream,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> Result<Saw, TapError> {
        let n = match (&mut &*qemu).read(&mut self.buf[self.filled..]) {
            Ok(0) => return Ok(Saw { eof: true, ..Saw::default() }),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Saw::default()),
            Err(e) => return Err(TapError::Read(e)),
        };
        self.filled += n;
        out.shared.stream_bytes.fetch_add(n as u64, Ordering::Relaxed);
        let was_stopped = self.stopped;
        let Self { audit, book, parser, buf, filled, frame, plan, vm, hold, finder, blocks, stopped } = self;
        let may_hold = out.shared.may_hold.load(Ordering::Relaxed);
        if may_hold != UNKNOWN {
            hold.allow(may_hold as usize);
        }
        let batch = Batch::new(frame, plan);
        let mut sorter = Sorter { audit, book, vm, hold, finder, blocks, stopped, batch, table, out };
        let used = parser.parse::<TapError>(&buf[..*filled], &mut |event| sorter.take(event))?;
        sorter.end()?;
        buf.copy_within(used..*filled, 0);
        *filled -= used;
        Ok(Saw { stopped: *stopped && !was_stopped, ..Saw::default() })
    }
}

/// What is read at a time, on its way into frames.
struct Sorter<'a, 'f, 'o, 's> {
    audit: &'s mut Option<Audit>,
    book: &'s mut Book,
    vm: &'s mut SourceVm,
    hold: &'s mut Hold,
    finder: &'s mut Option<BlockFinder>,
    blocks: &'s mut Option<Arc<BlockList>>,
    stopped: &'s mut bool,
    batch: Batch<'a, 'f>,
    table: &'s Mutex<PairTable>,
    out: &'s mut Out<'o>,
}

impl<'a> Sorter<'a, '_, '_, '_> {
    fn take(&mut self, event: Event<'a>) -> Result<(), TapError> {
        match event {
            Event::Page { addr, bytes } => {
                if let Some(a) = self.audit {
                    a.saw(addr, bytes);
                }
                let alike = uniform(bytes);
                // As QEMU gave it: what becomes of it from here on is what is to be proven.
                self.book.page(addr, alike, bytes);
                let content = alike.is_none().then_some(bytes);
                if !self.hold.page(addr, content, self.vm.is_hot(addr)) {
                    self.batch.add(addr, alike.map(Leaving::Uniform), Some(bytes));
                }
            }
            Event::Zero { addr } => {
                if let Some(a) = self.audit {
                    a.saw(addr, &[0; PAGE_SIZE]);
                }
                self.book.zero(addr);
                self.hold.page(addr, None, false);
                self.batch.add(addr, Some(Leaving::Uniform(0)), None);
            }
            Event::SectionEnd => return Ok(()),
            Event::Verbatim(bytes) => {
                self.flush()?;
                for part in bytes.chunks(MAX_BODY) {
                    self.send(Kind::Verbatim, &[], &[IoSlice::new(part)])?;
                }
            }
            Event::Blocks(list) => {
                let found = self.finder.take().map_or_else(Vec::new, |f| f(&list));
                self.vm.set_blocks(found);
                let pages = list.blocks().iter().map(RamBlock::pages);
                self.book.begin(pages);
                self.send(Kind::Blocks, &to_wire(&list).encode(), &[])?;
                *self.blocks = Some(list);
            }
            Event::Stopped => {
                self.flush()?;
                *self.stopped = true;
                self.hold.stop();
                tracing::debug!("VM stopped; {}", self.out.counted());
                self.send(Kind::Stopped, &[], &[])?;
            }
            Event::RamEnd => self.ram_end()?,
        }
        self.batch.flush_if_full(self.vm, self.table, self.out).map_err(TapError::Send)
    }

    fn ram_end(&mut self) -> Result<(), TapError> {
        self.flush()?;
        // What came anew since the VM stopped is not among it.
        let all = self.hold.all();
        tracing::debug!("RAM ends; {} pages were held back until now", all.len());
        self.batch.send(&all, self.vm, self.table, self.out).map_err(TapError::Send)?;
        self.hold.reuse(all);
        self.book.end(None);
        self.send(Kind::RamEnd, &[], &[])?;
        tracing::debug!("RAM ended; {}", self.out.counted());
        if let (Some(a), Some(list)) = (&self.audit, &self.blocks)
            && let Err(e) = a.write(list)
        {
            tracing::error!("audit: {}: {e}", a.file.display());
        }
        Ok(())
    }

    /// Sends what is left, and what was held back for long enough.
    fn end(mut self) -> Result<(), TapError> {
        self.flush()?;
        let due = self.hold.due();
        self.batch.send(&due, self.vm, self.table, self.out).map_err(TapError::Send)?;
        self.hold.reuse(due);
        self.out.shared.holds.store(self.hold.len() as u32, Ordering::Relaxed);
        (self.vm.stats.held, self.vm.stats.spared) = (self.hold.times(), self.hold.spared());
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TapError> {
        self.batch.flush(self.vm, self.table, self.out).map_err(TapError::Send)
    }

    fn send(&mut self, kind: Kind, meta: &[u8], body: &[IoSlice<'_>]) -> Result<(), TapError> {
        self.out.send(kind, meta, body).map_err(TapError::Send)
    }
}

pub(super) fn to_wire(list: &BlockList) -> Blocks {
    Blocks {
        section_id: list.section_id(),
        footers: list.footers(),
        blocks: list.blocks().iter().map(|b| (b.name.to_string(), b.used_bytes)).collect(),
    }
}
