//! The body of a compressed frame, which announces `n` contents in its meta part:
//!
//! ```text
//! runs                          contents sent raw, in order     zstd bytes of the other contents, in order
//! varint (count << 2 | how) …   4096 bytes each                 to the end of the body
//!     how: 0 raw, 1 squeezed; the counts come to n
//! ```
//!
//! The zstd bytes are a frame of their own (codec 1), or a piece of the one stream that the connection has in this
//! direction: its first piece (codec 2, after which earlier pieces count no more) or a further one (codec 3). Every piece
//! is flushed, so that a receiver has all of a frame when it has the frame.
//!
//! Bounds: a receiver holds one frame's contents and, once a stream has begun, its window; it allocates neither by what
//! the sender says.

use super::super::units::{PAGE_SIZE, PageBytes};
use super::super::wire::frame::{
    CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_BEGIN, CODEC_ZSTD_MORE, Kind, MetaReader, WireError, put_varint,
};
use super::super::wire::limits::{MAX_BODY, MAX_FRAME_PAGES};
use std::fmt;
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, compress_bound,
    zstd_sys::ZSTD_EndDirective,
};

/// Levels that by themselves do not look for matches of four bytes when they do not know how much is to come; guest
/// memory has many: 4 % fewer bytes at level 1 (decision 0009).
const MATCHES_OF_4: std::ops::RangeInclusive<i32> = 1..=12;
/// Bytes of a zstd block's header.
const BLOCK_HEADER: usize = 3;
/// Frames after one that did not shrink well for which each page is looked at.
const WARY: u8 = 16;

const RAW: u32 = 0;
const SQUEEZED: u32 = 1;

/// Sampled bytes of a page: eight stretches of it.
const SAMPLED: usize = 256;
/// Sum of the squares of how often each byte value is among them. Evenly spread values come to about 511, with a deviation
/// of 23; pages that zstd makes smaller by a tenth are far above.
const EVEN: u32 = 620;

/// Whether a page is worth a try: a page whose bytes are evenly spread (compressed or encrypted already) is not.
#[must_use]
pub fn compressible(page: &PageBytes) -> bool {
    let mut counts = [0u16; 256];
    for stretch in page.chunks_exact(PAGE_SIZE / 8) {
        for b in &stretch[..SAMPLED / 8] {
            counts[usize::from(*b)] += 1;
        }
    }
    counts.iter().map(|c| u32::from(*c) * u32::from(*c)).sum::<u32>() > EVEN
}

/// What became of a frame's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Squeezed {
    /// How the body is coded.
    pub codec: u8,
    /// Raw bytes that were compressed; the rest is sent as it is.
    pub raw: usize,
    /// What they came to.
    pub small: usize,
}

/// Compresses the contents of one connection's frames, in one direction.
pub struct Squeezer {
    zstd: CCtx<'static>,
    /// 0: no stream, each frame by itself.
    window_log: u8,
    /// The level of the stream under way.
    stream: Option<i32>,
    /// Frames for which each page is still looked at: a look costs a tenth of a fast level, and most memory has nothing
    /// that it would find.
    wary: u8,
    runs: Vec<u8>,
    out: Vec<u8>,
}

impl fmt::Debug for Squeezer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Squeezer(window 2^{}, {:?})", self.window_log, self.stream)
    }
}

impl Squeezer {
    /// One for a connection whose receiver granted a window of `2^window_log` bytes, 0 for none. None if there is no
    /// memory for it.
    #[must_use]
    pub fn new(window_log: u8) -> Option<Self> {
        let zstd = CCtx::try_create()?;
        Some(Self { zstd, window_log, stream: None, wary: 0, runs: Vec::new(), out: Vec::new() })
    }

    /// Bytes of memory held.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.zstd.sizeof() + self.out.capacity()
    }

    /// Compresses `contents` and appends the pieces of the body to `body`; none if nothing of them is worth it, and then
    /// they are sent raw.
    pub fn squeeze<'a>(
        &'a mut self,
        contents: &[&'a PageBytes],
        level: i32,
        body: &mut Vec<&'a [u8]>,
    ) -> Option<Squeezed> {
        // The worst case must fit a body, too: noise grows a little.
        if contents.is_empty() || contents.len() * PAGE_SIZE > MAX_BODY / 2 {
            return None;
        }
        let at = body.len();
        body.push(&[]);
        let mut how = [RAW; MAX_FRAME_PAGES];
        let mut raw = 0;
        let mut runs = Runs { out: &mut self.runs, last: None };
        runs.out.clear();
        for (page, how) in contents.iter().zip(&mut how) {
            *how = if self.wary == 0 || compressible(page) { SQUEEZED } else { RAW };
            runs.push(*how);
            if *how == SQUEEZED {
                raw += PAGE_SIZE;
            } else {
                body.push(*page);
            }
        }
        runs.end();
        let picked = || contents.iter().zip(&how).filter(|(_, how)| **how == SQUEEZED).map(|(p, _)| *p);
        let made = if raw > 0 { self.compress(level, raw, picked()) } else { None };
        let small = made.map_or(usize::MAX, |(_, small)| small);
        let shrank = raw == contents.len() * PAGE_SIZE && small < raw / 10 * 8;
        self.wary = if shrank { self.wary.saturating_sub(1) } else { WARY };
        let Some((codec, small)) = made else {
            body.truncate(at);
            return None;
        };
        body[at] = &self.runs;
        body.push(&self.out[..small]);
        Some(Squeezed { codec, raw, small })
    }

    /// Codec and length of `raw` bytes compressed into `out`.
    fn compress<'a>(
        &mut self,
        level: i32,
        raw: usize,
        pages: impl Iterator<Item = &'a PageBytes>,
    ) -> Option<(u8, usize)> {
        let Self { zstd, out, window_log, stream, .. } = self;
        // A flushed piece needs a little more than a frame: block headers, and what the encoder held back.
        let room = compress_bound(raw) + 1024;
        if out.len() < room {
            out.resize(room, 0);
        }
        let streaming = *window_log > 0;
        let codec = match (streaming, *stream) {
            (false, _) => CODEC_ZSTD,
            (true, Some(l)) if l == level => CODEC_ZSTD_MORE,
            (true, _) => CODEC_ZSTD_BEGIN,
        };
        // Whatever fails here, the next frame begins anew.
        *stream = None;
        if codec != CODEC_ZSTD_MORE {
            zstd.reset(ResetDirective::SessionAndParameters).ok()?;
            zstd.set_parameter(CParameter::CompressionLevel(level)).ok()?;
            if MATCHES_OF_4.contains(&level) {
                zstd.set_parameter(CParameter::MinMatch(4)).ok()?;
            }
            if streaming {
                zstd.set_parameter(CParameter::WindowLog((*window_log).into())).ok()?;
            } else {
                zstd.set_pledged_src_size(Some(raw as u64)).ok()?;
            }
        }
        let mut left = raw;
        let mut to = OutBuffer::around(&mut out[..]);
        for page in pages {
            left -= PAGE_SIZE;
            let end = match (left, streaming) {
                (1.., _) => ZSTD_EndDirective::ZSTD_e_continue,
                (0, true) => ZSTD_EndDirective::ZSTD_e_flush,
                (0, false) => ZSTD_EndDirective::ZSTD_e_end,
            };
            let mut from = InBuffer::around(page);
            let rest = zstd.compress_stream2(&mut to, &mut from, end).ok()?;
            if from.pos() < PAGE_SIZE || (left == 0 && rest > 0) {
                return None;
            }
        }
        let small = to.pos();
        if streaming {
            *stream = Some(level);
        } else if small >= raw {
            return None;
        }
        Some((codec, small))
    }
}

struct Runs<'a> {
    out: &'a mut Vec<u8>,
    last: Option<(u32, u32)>,
}

impl Runs<'_> {
    fn push(&mut self, how: u32) {
        match &mut self.last {
            Some((h, count)) if *h == how => *count += 1,
            _ => {
                self.end();
                self.last = Some((how, 1));
            }
        }
    }
    fn end(&mut self) {
        if let Some((how, count)) = self.last.take() {
            put_varint(self.out, count << 2 | how);
        }
    }
}

/// Undoes a [`Squeezer`], frame by frame in the same order.
#[derive(Default)]
pub struct Unsqueezer {
    zstd: Option<DCtx<'static>>,
    /// The window granted; 0: no stream is taken.
    window_log: u8,
    /// A stream is under way.
    streaming: bool,
    scratch: Vec<u8>,
}

impl fmt::Debug for Unsqueezer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unsqueezer(window 2^{}, streaming {})", self.window_log, self.streaming)
    }
}

impl Unsqueezer {
    /// One for a connection to which a window of `2^window_log` bytes was granted, 0 for none.
    #[must_use]
    pub fn new(window_log: u8) -> Self {
        Self { window_log, ..Self::default() }
    }

    /// Bytes of memory held.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.zstd.as_ref().map_or(0, DCtx::sizeof) + self.scratch.capacity()
    }

    /// The contents of a frame that announces `n` of them: exactly so many, or an error after which the connection must
    /// end.
    pub fn contents<'a>(
        &'a mut self,
        kind: Kind,
        codec: u8,
        body: &'a [u8],
        n: usize,
    ) -> Result<&'a [PageBytes], WireError> {
        let bad = |what| WireError::Bad { kind, what };
        if codec == CODEC_RAW {
            let (pages, rest) = body.as_chunks::<PAGE_SIZE>();
            return if pages.len() == n && rest.is_empty() { Ok(pages) } else { Err(bad("body length")) };
        }
        if n > MAX_FRAME_PAGES {
            return Err(bad("number of contents"));
        }
        let mut r = MetaReader::new(kind, body);
        let mut runs = [(0u16, false); MAX_FRAME_PAGES];
        let (mut used, mut seen, mut raw) = (0, 0, 0);
        while seen < n {
            let v = r.varint()?;
            let (count, how) = ((v >> 2) as usize, v & 3);
            if count == 0 || count > n - seen || how > SQUEEZED {
                return Err(bad("runs of a compressed body"));
            }
            runs[used] = (count as u16, how == RAW);
            used += 1;
            seen += count;
            raw += if how == RAW { count } else { 0 };
        }
        let plain = r.bytes(raw * PAGE_SIZE)?;
        let packed = r.bytes(r.len())?;
        // One byte more than is announced shows a sender that has more to say.
        self.scratch.resize(n * PAGE_SIZE + 1, 0);
        let squeezed = (n - raw) * PAGE_SIZE;
        self.unpack(codec, packed, squeezed).map_err(bad)?;
        if raw > 0 {
            spread(&mut self.scratch, n, n - raw, &runs[..used], plain);
        }
        Ok(self.scratch[..n * PAGE_SIZE].as_chunks::<PAGE_SIZE>().0)
    }

    /// Unpacks to the front of the scratch buffer.
    fn unpack(&mut self, codec: u8, packed: &[u8], len: usize) -> Result<(), &'static str> {
        const DAMAGED: &str = "compressed body";
        let streaming = std::mem::take(&mut self.streaming);
        if self.zstd.is_none() {
            self.zstd = DCtx::try_create();
        }
        let zstd = self.zstd.as_mut().ok_or("compressed body: no memory to unpack it")?;
        match codec {
            CODEC_ZSTD => {
                let n = zstd.decompress(&mut self.scratch[..len], packed).map_err(|_| DAMAGED)?;
                return if n == len { Ok(()) } else { Err(DAMAGED) };
            }
            CODEC_ZSTD_BEGIN if self.window_log > 0 => {
                zstd.reset(ResetDirective::SessionOnly).map_err(|_| DAMAGED)?;
                zstd.set_parameter(DParameter::WindowLogMax(self.window_log.into())).map_err(|_| DAMAGED)?;
            }
            CODEC_ZSTD_MORE if streaming => {}
            CODEC_ZSTD_MORE => return Err("compressed body: a stream goes on that never began"),
            _ => return Err("compressed body: a stream, for which no window was granted"),
        }
        let mut from = InBuffer::around(packed);
        let mut to = OutBuffer::around(&mut self.scratch[..=len]);
        let mut wants = BLOCK_HEADER;
        while from.pos() < packed.len() {
            let before = (from.pos(), to.pos());
            wants = zstd.decompress_stream(&mut to, &mut from).map_err(|_| DAMAGED)?;
            if to.pos() > len || (from.pos(), to.pos()) == before {
                return Err(DAMAGED);
            }
        }
        // A piece ends between two blocks, so the next thing wanted is a block's header.
        if to.pos() != len || wants != BLOCK_HEADER {
            return Err(DAMAGED);
        }
        self.streaming = true;
        Ok(())
    }
}

/// Moves the `squeezed` pages at the front of `scratch` to their places among `n`, and puts the raw ones into theirs.
/// From the end, because no page moves to the front.
fn spread(scratch: &mut [u8], n: usize, mut squeezed: usize, runs: &[(u16, bool)], plain: &[u8]) {
    let (mut at, mut plain) = (n, plain);
    for (count, raw) in runs.iter().rev() {
        let count = usize::from(*count);
        at -= count;
        let place = at * PAGE_SIZE..(at + count) * PAGE_SIZE;
        if *raw {
            let (rest, pages) = plain.split_at(plain.len() - count * PAGE_SIZE);
            scratch[place].copy_from_slice(pages);
            plain = rest;
        } else {
            squeezed -= count;
            scratch.copy_within(squeezed * PAGE_SIZE..(squeezed + count) * PAGE_SIZE, place.start);
        }
    }
}
