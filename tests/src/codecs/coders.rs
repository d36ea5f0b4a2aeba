//! Ways to put frames of contents into bytes, and what each costs: frame by frame, with a window
//! that is kept from frame to frame, with similar pages as zstd's prefix, and as differences from
//! them.

use super::corpus::{Corpus, Frame};
use super::finders::{Finder, Sketch, Table};
use anyhow::{Context as _, Result};
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use rustix::time::{ClockId, clock_gettime};
use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, compress_bound, get_error_name, zstd_sys};

/// Bytes that a record with reference and digest costs beside the contents.
const NAMES: usize = 25;

/// Which pages may be referred to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Those sent before on the same connection.
    Connection,
    /// Those sent before on connections of the same kind: pushed contents for pushed ones, streams
    /// for streams.
    Kind,
    /// Those that this source host sent to this target host before, on any connection.
    Host,
    /// And those that others carry there and this host holds too.
    Planned,
    /// All that anybody sent before: a bound, as the bytes are not to be had.
    Rack,
}

/// What is done with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coding {
    /// zstd, each frame for itself.
    Frames,
    /// One zstd frame a connection, with a window of 2^n bytes, and with long-distance matches of
    /// so many bytes.
    Window(u32, Option<u32>),
    /// zstd, each frame for itself, its pages' references as the prefix.
    FramePrefix(Scope),
    /// zstd, each page for itself, its reference as the prefix.
    PagePrefix(Scope),
    /// Bytewise differences from references; the frame is then coded as `Frames`, or as `Window`.
    Less(Less),
}

/// How differences are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Less {
    scope: Scope,
    /// Each block of so many bytes is a difference or stands as it is.
    block: usize,
    /// What has been sent as a difference may be referred to, too.
    chains: bool,
    /// The log of the window, if one is kept from frame to frame.
    window: Option<u32>,
}

/// A way with its level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Coder {
    /// What is done.
    pub coding: Coding,
    /// zstd's level.
    pub level: i32,
    /// How similar pages are found.
    pub finder: Finder,
}

/// What a way costs.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Bytes, names of references included.
    pub bytes: u64,
    /// Of them, those of pushed contents.
    pub pushed: u64,
    /// Contents sent with a reference.
    pub referring: u64,
    /// Processor time a content, nanoseconds.
    pub nanos: f64,
}

/// All ways that are compared.
#[must_use]
pub fn all(finder: Finder, levels: &[i32]) -> Vec<Coder> {
    let mut codings = vec![Coding::Frames];
    for log in [20, 23, 25, 27] {
        codings.push(Coding::Window(log, None));
        codings.push(Coding::Window(log, Some(64)));
    }
    codings.push(Coding::Window(27, Some(16)));
    let less = |scope, block, chains, window| Coding::Less(Less { scope, block, chains, window });
    for scope in [Scope::Connection, Scope::Kind, Scope::Host, Scope::Planned, Scope::Rack] {
        codings.push(Coding::FramePrefix(scope));
        codings.push(less(scope, 64, false, None));
    }
    codings.push(Coding::PagePrefix(Scope::Host));
    for block in [32, 128, 256, PAGE_SIZE] {
        codings.push(less(Scope::Host, block, false, None));
    }
    codings.push(less(Scope::Host, 64, true, None));
    for scope in [Scope::Kind, Scope::Host, Scope::Planned] {
        codings.extend([20, 23, 25, 27].map(|log| less(scope, 64, false, Some(log))));
    }
    codings.push(less(Scope::Host, 64, true, Some(23)));
    let with = |level: i32| codings.clone().into_iter().map(move |coding| Coder { coding, level, finder });
    levels.iter().copied().flat_map(with).collect()
}

impl Coder {
    /// For the table.
    #[must_use]
    pub fn name(&self) -> String {
        let mib = |log: u32| 1u64 << (log - 20);
        let scope = |s: Scope| match s {
            Scope::Connection => "(i) connection",
            Scope::Kind => "(i') same kind",
            Scope::Host => "(ii) host pair",
            Scope::Planned => "(iii) and planned",
            Scope::Rack => "(bound) whole rack",
        };
        match self.coding {
            Coding::Frames => "frames of 64".into(),
            Coding::Window(log, None) => format!("window {} MiB", mib(log)),
            Coding::Window(log, Some(n)) => format!("window {} MiB, long matches of {n}", mib(log)),
            Coding::FramePrefix(s) => format!("prefix of a frame, {}", scope(s)),
            Coding::PagePrefix(s) => format!("prefix of a page, {}", scope(s)),
            Coding::Less(l) => {
                let after = l.window.map_or("frames".to_owned(), |w| format!("window {} MiB", mib(w)));
                let chains = if l.chains { "chains, " } else { "" };
                format!("difference by {}, {chains}{}, {after}", l.block, scope(l.scope))
            }
        }
    }
}

fn cpu_nanos() -> u64 {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec.cast_unsigned() * 1_000_000_000 + t.tv_nsec.cast_unsigned()
}

/// A zstd context made for `level`, with a window and long matches if so wanted.
fn context<'a>(level: i32, window: Option<u32>, long: Option<u32>) -> Result<CCtx<'a>> {
    let mut c = CCtx::try_create().context("no memory for zstd")?;
    let set = |c: &mut CCtx<'a>, p| {
        c.set_parameter(p).map(|_| ()).map_err(|e| anyhow::anyhow!("zstd: {}", get_error_name(e)))
    };
    set(&mut c, CParameter::CompressionLevel(level))?;
    if let Some(log) = window {
        set(&mut c, CParameter::WindowLog(log))?;
    }
    if let Some(n) = long {
        set(&mut c, CParameter::EnableLongDistanceMatching(true))?;
        set(&mut c, CParameter::LdmMinMatch(n))?;
        if n < 32 {
            set(&mut c, CParameter::LdmHashRateLog(4))?;
        }
    }
    Ok(c)
}

/// References towards one target host, or on one connection.
struct Refs {
    finder: Finder,
    tables: Vec<Table>,
    planned: Vec<bool>,
    scope: Scope,
}

impl Refs {
    fn new(c: &Corpus, scope: Scope, finder: Finder) -> Self {
        let tables = (0..c.conns.max(2 * c.hosts)).map(|_| Table::default()).collect();
        Self { finder, tables, planned: vec![false; c.hosts], scope }
    }

    fn table(&mut self, f: &Frame) -> &mut Table {
        let n = match self.scope {
            Scope::Connection => f.lane.conn,
            Scope::Kind => 2 * f.lane.host + usize::from(f.lane.push),
            Scope::Host | Scope::Planned => f.lane.host,
            Scope::Rack => 0,
        };
        &mut self.tables[n]
    }

    /// What others carry to this frame's target host is there, or will be, when the streams begin.
    fn plan(&mut self, c: &Corpus, f: &Frame) {
        let h = f.lane.host;
        if self.scope != Scope::Planned || f.lane.push || std::mem::replace(&mut self.planned[h], true) {
            return;
        }
        for (ix, held) in (0u32..).zip(&c.held) {
            if held.count_ones() > 1 && held & (1 << h) != 0 {
                let s = self.finder.sketch(c.page(ix));
                self.tables[h].insert(ix, &s);
            }
        }
    }
}

/// Puts the page less its reference into `out`; returns whether that is worth it.
fn less(page: &PageBytes, reference: &PageBytes, block: usize, out: &mut Vec<u8>) -> bool {
    let from = out.len();
    let filled = |b: &[u8]| b.iter().map(|x| u32::from(*x != 0)).sum::<u32>();
    let mut any = false;
    for (p, r) in page.chunks_exact(block).zip(reference.chunks_exact(block)) {
        let at = out.len();
        out.extend(p.iter().zip(r).map(|(p, r)| p.wrapping_sub(*r)));
        if filled(&out[at..]) * 4 < filled(p) * 3 {
            any = true;
        } else {
            out[at..].copy_from_slice(p);
        }
    }
    if !any {
        out.truncate(from);
    }
    any
}

/// Codes all frames of the corpus.
pub fn measure(c: &Corpus, coder: Coder) -> Result<Measured> {
    let started = cpu_nanos();
    let mut run = Run::new(c, coder)?;
    let mut conn = None;
    for f in &c.frames {
        // Hosts send one after the other here: only one connection's window is needed at a time, or
        // one host's.
        if conn.replace(f.lane.host) != Some(f.lane.host) {
            run.streams.iter_mut().for_each(|s| *s = None);
        }
        run.frame(f)?;
    }
    run.m.nanos = (cpu_nanos() - started) as f64 / c.len().max(1) as f64;
    Ok(run.m)
}

/// A way on its way through the corpus, with what it keeps from frame to frame.
struct Run<'c> {
    corpus: &'c Corpus,
    coder: Coder,
    refs: Option<Refs>,
    streams: Vec<Option<CCtx<'static>>>,
    alone: CCtx<'static>,
    /// Of the frame at hand, or of the page where each has a frame of its own.
    body: Vec<u8>,
    prefix: Vec<u8>,
    out: Vec<u8>,
    m: Measured,
}

impl<'c> Run<'c> {
    fn new(corpus: &'c Corpus, coder: Coder) -> Result<Self> {
        let scope = match coder.coding {
            Coding::FramePrefix(s) | Coding::PagePrefix(s) => Some(s),
            Coding::Less(l) => Some(l.scope),
            _ => None,
        };
        Ok(Self {
            corpus,
            coder,
            refs: scope.map(|s| Refs::new(corpus, s, coder.finder)),
            streams: (0..corpus.conns).map(|_| None).collect(),
            alone: context(coder.level, None, None)?,
            body: Vec::new(),
            prefix: Vec::new(),
            out: vec![0; compress_bound(2 * super::corpus::FRAME * PAGE_SIZE)],
            m: Measured { bytes: 0, pushed: 0, referring: 0, nanos: 0.0 },
        })
    }

    fn frame(&mut self, f: &Frame) -> Result<()> {
        self.body.clear();
        self.prefix.clear();
        let before = self.m.bytes;
        if let Some(r) = &mut self.refs {
            r.plan(self.corpus, f);
        }
        let mut kept: Vec<(u32, Sketch)> = Vec::new();
        for &ix in &f.contents {
            kept.extend(self.page(f, ix)?);
        }
        if let Some(r) = &mut self.refs {
            let table = r.table(f);
            kept.iter().for_each(|(ix, s)| table.insert(*ix, s));
        }
        self.m.bytes += self.rest(f)?;
        if f.lane.push {
            self.m.pushed += self.m.bytes - before;
        }
        Ok(())
    }

    /// Takes in a page of the frame. Returns its sketch if it may be referred to.
    fn page(&mut self, f: &Frame, ix: u32) -> Result<Option<(u32, Sketch)>> {
        let (c, coding) = (self.corpus, self.coder.coding);
        let page = c.page(ix);
        let Some(r) = &mut self.refs else {
            self.body.extend_from_slice(page);
            return Ok(None);
        };
        let s = r.finder.sketch(page);
        let found = r.table(f).find(&s).map(|(o, _)| c.page(o));
        let used = match (found, coding) {
            (Some(reference), Coding::FramePrefix(_) | Coding::PagePrefix(_)) => {
                self.prefix.extend_from_slice(reference);
                false
            }
            (Some(reference), Coding::Less(l)) => less(page, reference, l.block, &mut self.body),
            _ => false,
        };
        if matches!(coding, Coding::PagePrefix(_)) {
            if found.is_some() {
                self.m.bytes += NAMES as u64;
                self.m.referring += 1;
            }
            self.m.bytes += prefixed(self.coder.level, &self.prefix, page, &mut self.out)?;
            self.prefix.clear();
        } else if used {
            let mask = if let Coding::Less(l) = coding { (PAGE_SIZE / l.block / 8) as u64 } else { 0 };
            self.m.bytes += NAMES as u64 + mask;
            self.m.referring += 1;
        } else {
            self.body.extend_from_slice(page);
        }
        let refers = used || found.is_some() && !self.prefix.is_empty();
        let chains = matches!(coding, Coding::Less(Less { chains: true, .. }));
        Ok((!refers || chains).then_some((ix, s)))
    }

    /// Codes what its pages have left of the frame. Returns its bytes.
    fn rest(&mut self, f: &Frame) -> Result<u64> {
        let level = self.coder.level;
        let (window, long) = match self.coder.coding {
            Coding::PagePrefix(_) => return Ok(0),
            Coding::FramePrefix(_) => {
                let n = (self.prefix.len() / PAGE_SIZE) as u64;
                self.m.referring += n;
                return Ok(prefixed(level, &self.prefix, &self.body, &mut self.out)? + n * NAMES as u64);
            }
            Coding::Window(w, long) => (Some(w), long),
            Coding::Less(l) => (l.window, None),
            Coding::Frames => (None, None),
        };
        if window.is_none() {
            return once(&mut self.alone, &self.body, &mut self.out);
        }
        let stream = match &mut self.streams[f.lane.conn] {
            Some(s) => s,
            none => none.insert(context(level, window, long)?),
        };
        flush(stream, &self.body, &mut self.out)
    }
}

/// A zstd frame of its own, with what it refers to as its prefix.
fn prefixed(level: i32, prefix: &[u8], body: &[u8], out: &mut [u8]) -> Result<u64> {
    let mut one = context(level, None, None)?;
    one.ref_prefix(prefix).map_err(|e| anyhow::anyhow!("zstd: {}", get_error_name(e)))?;
    once(&mut one, body, out)
}

/// A zstd frame of its own; what does not shrink is counted as it is.
fn once(c: &mut CCtx<'_>, body: &[u8], out: &mut [u8]) -> Result<u64> {
    let n = c.compress2(out, body).map_err(|e| anyhow::anyhow!("zstd: {}", get_error_name(e)))?;
    Ok(n.min(body.len()) as u64)
}

/// The next piece of a zstd frame that goes on.
fn flush(c: &mut CCtx<'_>, body: &[u8], out: &mut [u8]) -> Result<u64> {
    let mut input = InBuffer::around(body);
    let mut to = OutBuffer::around(out);
    let left = c
        .compress_stream2(&mut to, &mut input, zstd_sys::ZSTD_EndDirective::ZSTD_e_flush)
        .map_err(|e| anyhow::anyhow!("zstd: {}", get_error_name(e)))?;
    anyhow::ensure!(left == 0 && input.pos() == body.len(), "zstd kept something back");
    Ok(to.pos() as u64)
}
