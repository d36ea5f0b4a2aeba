//! QEMU's stream into frames: read once, parse in place, decide for a batch of pages under one lock of the host's
//! table, send header, records and the contents from where they lie in the read buffer.
//!
//! Bounds: the read buffer ([`BUF_LEN`]) and one batch ([`BATCH_PAGES`]); no allocation per page.

use super::{SourceGroup, SourceSpec, SourceVmShared};
use crate::core::digest::uniform;
use crate::core::pair::PairTable;
use crate::core::qemu::{BlockList, Event, Parser, StreamError};
use crate::core::sketch::{Lane as From, Sketch};
use crate::core::source::{BlockInfo, Leaving, SourceVm, Way};
use crate::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use crate::core::wire::frame::{HEADER_LEN, Kind};
use crate::core::wire::messages::Blocks;
use crate::core::wire::pages::{Form, PagesBuilder};
use crate::flow::squeeze::Lane;
use crate::flow::work::Stage;
use crate::flow::{lock, now};
use crate::net::conn::send_while;
use std::io::{self, IoSlice, Read};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// What a UNIX socket hands over in one read (its default send buffer) fits several times.
const BUF_LEN: usize = 1 << 20;
/// Contents in one frame: 256 KiB, so that a switchover never waits long behind a frame and caches are kept warm.
const BATCH_PAGES: usize = 64;
/// Pages of any kind in one batch.
const BATCH_EVENTS: usize = 1024;

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

/// What a pump step saw.
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Saw {
    /// QEMU closed its end.
    pub(super) eof: bool,
    /// The VM is stopped.
    pub(super) stopped: bool,
}

/// The sending half of the VM connection.
#[derive(Debug)]
pub(super) struct Out<'a> {
    pub(super) conn: &'a TcpStream,
    pub(super) lane: &'a mut Lane,
    pub(super) shared: &'a SourceVmShared,
    pub(super) spec: &'a SourceSpec,
    pub(super) group: &'a SourceGroup,
}

impl Out<'_> {
    fn counted(&self) -> String {
        let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        format!("stream {} B, wire {} B", get(&self.shared.stream_bytes), get(&self.shared.wire_bytes))
    }

    /// Sends one frame without contents.
    pub(super) fn send(&self, kind: Kind, meta: &[u8], body: &[IoSlice<'_>]) -> io::Result<()> {
        send_while(self.conn, kind, meta, body, go_on(self.shared, self.group))?;
        let bytes = HEADER_LEN + meta.len() + body.iter().map(|b| b.len()).sum::<usize>();
        self.shared.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Sends one frame with these contents.
    pub(super) fn contents(&mut self, kind: Kind, meta: &[u8], contents: &[&PageBytes]) -> io::Result<()> {
        let go_on = go_on(self.shared, self.group);
        let bytes = self.lane.send(self.conn, (kind, meta), contents, &self.shared.work, go_on)?;
        self.shared.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether to wait on for a slow link: as long as the target is heard.
fn go_on<'a>(s: &'a SourceVmShared, group: &SourceGroup) -> impl Fn() -> bool + use<'a> {
    let silence = group.timeouts.peer.as_nanos() as u64;
    move || {
        !s.lost.load(Ordering::Relaxed)
            && !s.cancelled.load(Ordering::Relaxed)
            && now().0.saturating_sub(s.heard.load(Ordering::Relaxed)) < silence
    }
}

/// Finds what is known of a VM's blocks once the stream has named them.
pub(super) type BlockFinder = Box<dyn FnOnce(&BlockList) -> Vec<BlockInfo> + Send>;

/// What QEMU sent last of each page, for whoever must prove that the target loaded exactly that (DESIGN rule 2).
#[derive(Debug)]
struct Audit {
    file: std::path::PathBuf,
    newest: std::collections::BTreeMap<PageAddr, [u8; 16]>,
}

impl Audit {
    fn saw(&mut self, addr: PageAddr, bytes: &PageBytes) {
        let mut d = [0; 16];
        d.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
        self.newest.insert(addr, d);
    }

    /// One line a page: block name, page number, the first 128 bits of the unkeyed BLAKE3 of its content.
    fn write(&self, list: &BlockList) -> io::Result<()> {
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
    parser: Parser,
    buf: Vec<u8>,
    filled: usize,
    frame: PagesBuilder,
    plan: Leave,
    vm: SourceVm,
    finder: Option<BlockFinder>,
    blocks: Option<Arc<BlockList>>,
    stopped: bool,
}

impl Tap {
    pub(super) fn new(vm: SourceVm, finder: BlockFinder, audit: Option<std::path::PathBuf>) -> Self {
        Self {
            audit: audit.map(|file| Audit { file, newest: std::collections::BTreeMap::new() }),
            parser: Parser::new(),
            buf: vec![0; BUF_LEN],
            filled: 0,
            frame: PagesBuilder::default(),
            plan: Leave::default(),
            vm,
            finder: Some(finder),
            blocks: None,
            stopped: false,
        }
    }

    pub(super) fn vm(&mut self) -> &mut SourceVm {
        &mut self.vm
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
        let Self { audit, parser, buf, filled, frame, plan, vm, finder, blocks, stopped } = self;
        let mut batch = Batch { pages: Vec::with_capacity(BATCH_EVENTS), contents: 0, frame, plan };
        let used = parser.parse::<TapError>(&buf[..*filled], &mut |event| {
            match event {
                Event::Page { addr, bytes } => {
                    if let Some(a) = audit {
                        a.saw(addr, bytes);
                    }
                    batch.add(addr, uniform(bytes).map(Leaving::Uniform), Some(bytes));
                }
                Event::Zero { addr } => {
                    if let Some(a) = audit {
                        a.saw(addr, &[0; PAGE_SIZE]);
                    }
                    batch.add(addr, Some(Leaving::Uniform(0)), None);
                }
                Event::SectionEnd => return Ok(()),
                Event::Verbatim(bytes) => {
                    batch.flush(vm, table, out)?;
                    for part in bytes.chunks(crate::core::wire::limits::MAX_BODY) {
                        out.send(Kind::Verbatim, &[], &[IoSlice::new(part)]).map_err(TapError::Send)?;
                    }
                }
                Event::Blocks(list) => {
                    let found = finder.take().map_or_else(Vec::new, |f| f(&list));
                    vm.set_blocks(found);
                    let meta = to_wire(&list).encode();
                    out.send(Kind::Blocks, &meta, &[]).map_err(TapError::Send)?;
                    *blocks = Some(list);
                }
                Event::Stopped => {
                    batch.flush(vm, table, out)?;
                    *stopped = true;
                    tracing::debug!("VM stopped; {}", out.counted());
                    out.send(Kind::Stopped, &[], &[]).map_err(TapError::Send)?;
                }
                Event::RamEnd => {
                    batch.flush(vm, table, out)?;
                    out.send(Kind::RamEnd, &[], &[]).map_err(TapError::Send)?;
                    tracing::debug!("RAM ended; {}", out.counted());
                    if let (Some(a), Some(list)) = (&audit, &blocks)
                        && let Err(e) = a.write(list)
                    {
                        tracing::error!("audit: {}: {e}", a.file.display());
                    }
                }
            }
            if batch.full() { batch.flush(vm, table, out) } else { Ok(()) }
        })?;
        batch.flush(vm, table, out)?;
        buf.copy_within(used..*filled, 0);
        *filled -= used;
        Ok(Saw { eof: false, stopped: *stopped && !was_stopped })
    }
}

fn to_wire(list: &BlockList) -> Blocks {
    Blocks {
        section_id: list.section_id(),
        footers: list.footers(),
        blocks: list.blocks().iter().map(|b| (b.name.to_string(), b.used_bytes)).collect(),
    }
}

/// How the pages of a batch leave. Reused from batch to batch.
#[derive(Default)]
struct Leave {
    /// One a page of the batch.
    ways: Vec<(Way, Form)>,
    /// Of the pages with content.
    sketches: Vec<Sketch>,
    /// Bodies of those that leave as differences.
    less: Vec<PageBytes>,
    /// `Pages` frames sent.
    frames: u32,
}

struct Batch<'a, 'f> {
    /// How a page leaves is not known before the batch is flushed, but for uniform ones.
    pages: Vec<(PageAddr, Option<Leaving>, Option<&'a PageBytes>)>,
    contents: usize,
    frame: &'f mut PagesBuilder,
    plan: &'f mut Leave,
}

impl<'a> Batch<'a, '_> {
    fn add(&mut self, addr: PageAddr, leaving: Option<Leaving>, bytes: Option<&'a PageBytes>) {
        self.contents += usize::from(leaving.is_none());
        self.pages.push((addr, leaving, bytes));
    }

    fn full(&self) -> bool {
        self.contents >= BATCH_PAGES || self.pages.len() >= BATCH_EVENTS
    }

    /// Hashes, decides under one lock, sends without it.
    fn flush(
        &mut self,
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> Result<(), TapError> {
        if self.pages.is_empty() {
            return Ok(());
        }
        out.lane.lap(&out.shared.work, Stage::Other);
        for (addr, leaving, bytes) in &mut self.pages {
            if let (None, Some(bytes)) = (&leaving, bytes) {
                *leaving = Some(vm.look(*addr, bytes));
            }
        }
        out.lane.lap(&out.shared.work, Stage::Hash);
        self.frame.clear();
        let Leave { ways, less, .. } = &mut *self.plan;
        ways.clear();
        less.clear();
        {
            let mut table = lock(table);
            for (_, leaving, _) in &self.pages {
                let way = leaving.map_or(Way::Uniform(0), |l| vm.decide(&mut table, l));
                ways.push((way, Form::Whole));
            }
        }
        // What is sent raw is as long as a difference from it.
        if out.lane.squeezes() {
            self.differ(vm, out);
            out.lane.lap(&out.shared.work, Stage::Similar);
        }
        let mut contents = Vec::with_capacity(self.contents);
        let mut differences = self.plan.less.iter();
        for ((addr, _, bytes), (way, form)) in self.pages.iter().zip(&self.plan.ways) {
            way.put(*addr, *form, self.frame);
            if matches!(form, Form::Less(_)) {
                contents.extend(differences.next());
            } else {
                contents.extend(bytes.filter(|_| way.has_content()));
            }
        }
        self.pages.clear();
        self.contents = 0;
        let sent = out.contents(Kind::Pages, self.frame.meta(), &contents);
        self.plan.frames = self.plan.frames.wrapping_add(1);
        sent.map_err(TapError::Send)
    }

    /// Looks for contents that are similar to what the target host keeps, and has it keep the others.
    fn differ(&mut self, vm: &mut SourceVm, out: &Out<'_>) {
        let Some(table) = out.group.similar.table(out.spec.target, out.spec.domain) else { return };
        let Leave { ways, sketches, less, frames } = &mut *self.plan;
        let pages = || self.pages.iter().map(|(addr, _, bytes)| (*addr, *bytes));
        let contents = pages().zip(&*ways).filter(|(_, (way, _))| way.has_content());
        sketches.clear();
        sketches.extend(contents.filter_map(|((_, bytes), _)| bytes.map(Sketch::of)));
        let mut sketches = sketches.iter();
        let mut table = lock(table);
        let Some(references) = &mut *table else { return };
        let vm_ix = out.spec.vm.0;
        references.taken(vm_ix, out.shared.taken.load(Ordering::Relaxed));
        let when = (From { vm: vm_ix, frame: *frames }, now());
        let mut difference = [0; PAGE_SIZE];
        for ((addr, bytes), (way, form)) in pages().zip(ways) {
            let (true, Some(bytes)) = (way.has_content(), bytes) else { continue };
            let Some(sketch) = sketches.next() else { break };
            *form = vm.form(references, when, addr, way, *sketch, bytes, &mut difference);
            if matches!(form, Form::Less(_)) {
                less.push(difference);
            }
        }
    }
}
