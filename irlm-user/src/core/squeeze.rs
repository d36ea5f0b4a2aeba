//! Whether, and how, contents are compressed on their way between target hosts (docs/decisions/0006). A sender
//! compresses while that gets more contents through than the link does raw, and not otherwise: both rates are measured
//! as it goes, in times that the caller takes.

use super::units::PAGE_SIZE;
use super::wire::limits::MAX_FRAME_PAGES;

/// zstd's fastest level: a core compresses faster than a 1 Gbit/s link carries.
const LEVEL: i32 = 1;
/// How much a new measurement counts against the older ones.
const WEIGHT: f64 = 0.2;
/// Batches sent raw after which compression is tried again, so that a slower link is noticed.
const RETRY: u32 = 64;

/// Exponentially decayed sums of work and time.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    bytes: f64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, bytes: usize, seconds: f64) {
        self.bytes = self.bytes * (1.0 - WEIGHT) + bytes as f64;
        self.seconds = self.seconds * (1.0 - WEIGHT) + seconds.max(0.0);
    }
    /// Seconds a byte; none if nothing was measured.
    fn cost(self) -> Option<f64> {
        (self.bytes > 0.0).then(|| self.seconds / self.bytes)
    }
}

/// The choice between raw and compressed, from what was measured.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Wire bytes and the time the link took for them.
    link: Rate,
    /// Raw bytes and the time the compressor took for them.
    work: Rate,
    /// Wire bytes and raw bytes of compressed batches.
    shrunk: Rate,
    raw_since: u32,
}

impl Choice {
    /// Whether the next batch is to be compressed.
    #[must_use]
    pub fn compress(&self) -> bool {
        let (Some(link), Some(work), Some(raw_per_wire)) =
            (self.link.cost(), self.work.cost(), self.shrunk.cost())
        else {
            return true;
        };
        // Seconds for one raw byte, either way. A link that takes all at once costs nothing, and is left alone.
        work + link / raw_per_wire < link || self.raw_since >= RETRY
    }

    /// A batch of `raw` bytes was compressed to `wire` in so many seconds.
    pub fn compressed(&mut self, raw: usize, wire: usize, seconds: f64) {
        self.work.add(raw, seconds);
        // "Seconds" are raw bytes here: cost is raw bytes a wire byte.
        self.shrunk.add(wire, raw as f64);
        self.raw_since = 0;
    }

    /// A batch went out: `wire` bytes, for which the link took so many seconds.
    pub fn sent(&mut self, wire: usize, seconds: f64) {
        self.link.add(wire, seconds);
        self.raw_since = self.raw_since.saturating_add(1);
    }
}

/// A compressor with its buffer, for one connection.
pub struct Squeezer {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

impl std::fmt::Debug for Squeezer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Squeezer")
    }
}

impl Squeezer {
    /// One with room for a batch of `pages`; none if there is no memory for it.
    #[must_use]
    pub fn new(pages: usize) -> Option<Self> {
        let zstd = zstd::bulk::Compressor::new(LEVEL).ok()?;
        Some(Self { zstd, out: vec![0; zstd::zstd_safe::compress_bound(pages * PAGE_SIZE)] })
    }

    /// The batch compressed; none if that makes it no smaller.
    pub fn squeeze(&mut self, raw: &[u8]) -> Option<&[u8]> {
        let n = self.zstd.compress_to_buffer(raw, &mut self.out[..]).ok()?;
        (n < raw.len()).then(|| &self.out[..n])
    }
}

/// Undoes [`Squeezer`] for a frame that announces `pages` contents: exactly so many, or nothing. `scratch` grows to one
/// frame's raw contents and no further, whatever the bytes say.
#[must_use]
pub fn unsqueeze(body: &[u8], pages: usize, scratch: &mut Vec<u8>) -> bool {
    if pages > MAX_FRAME_PAGES {
        return false;
    }
    scratch.resize(pages * PAGE_SIZE, 0);
    let done = zstd::bulk::decompress_to_buffer(body, &mut scratch[..]);
    done.is_ok_and(|n| n == pages * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves batches of 256 KiB over a link and a compressor of given speeds; which share of the last ones was
    /// compressed.
    fn settle(link: f64, work: f64, ratio: f64) -> f64 {
        let (mut c, mut squeezed) = (Choice::default(), 0);
        for n in 0..1000 {
            let raw = 262_144;
            let mut wire = raw;
            if c.compress() {
                wire = (raw as f64 * ratio) as usize;
                c.compressed(raw, wire, raw as f64 / work);
                squeezed += u32::from(n >= 500);
            }
            c.sent(wire, wire as f64 / link);
        }
        f64::from(squeezed) / 500.0
    }

    #[test]
    fn compression_is_used_where_it_gets_more_through() {
        let (mbit, gbyte) = (1e6 / 8.0, 1e9);
        assert!(settle(100.0 * mbit, 0.4 * gbyte, 0.4) > 0.99);
        assert!(settle(1000.0 * mbit, 0.4 * gbyte, 0.4) > 0.99);
        // A link faster than the compressor is only tried now and then, and so are contents that do not shrink.
        assert!(settle(10_000.0 * mbit, 0.4 * gbyte, 0.4) < 0.03);
        assert!(settle(100.0 * mbit, 0.4 * gbyte, 0.999) < 0.03);
        assert!(settle(f64::INFINITY, 0.4 * gbyte, 0.1) < 0.03);
    }

    #[test]
    fn what_is_squeezed_comes_out_whole_and_nothing_else_does() {
        let mut s = Squeezer::new(4).unwrap();
        let raw: Vec<u8> = (0..4 * PAGE_SIZE).map(|i| (i / 97) as u8).collect();
        let small = s.squeeze(&raw).unwrap().to_vec();
        assert!(small.len() < raw.len() / 4);
        let mut scratch = Vec::new();
        assert!(unsqueeze(&small, 4, &mut scratch) && scratch == raw);
        for pages in [0, 3, 5, MAX_FRAME_PAGES + 1] {
            assert!(!unsqueeze(&small, pages, &mut scratch), "{pages} pages were not announced");
        }
        for cut in 0..small.len() {
            assert!(!unsqueeze(&small[..cut], 4, &mut scratch));
        }
        assert!(!unsqueeze(&[], 4, &mut scratch) && !unsqueeze(&[7; 4096], 4, &mut scratch));
        // A bomb: much more than is announced. Nothing grows.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert!(!unsqueeze(&bomb, 4, &mut scratch) && scratch.capacity() <= MAX_FRAME_PAGES * PAGE_SIZE);
        let noise: Vec<u8> =
            (0..4 * PAGE_SIZE as u64).map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[0]).collect();
        assert!(s.squeeze(&noise).is_none(), "noise is sent as it is");
    }
}
