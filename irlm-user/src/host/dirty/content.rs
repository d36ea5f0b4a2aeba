//! The sampler that needs nothing of the kernel: reads the same random pages of a guest again and again, and sees which
//! have another content. Works for every guest whose RAM can be read from outside, under TCG too.
//!
//! Bounds: [`MAX_PICKS`] pages a guest, 16 bytes each; a look reads and hashes them once, some 2 µs a page, and leaves
//! the processor alone for nine times as long as it took ([`ContentSampler::pause`]).

use crate::core::units::{BlockIx, PAGE_SIZE, PageAddr};
use crate::host::ram::GuestRam;
use std::io;
use std::time::{Duration, Instant};

/// Most pages looked at in one guest.
pub const MAX_PICKS: usize = 8192;
/// Guests up to this size (16 GiB) are also asked how many of their pages hold something, at each look: that is how
/// writes to pages show that were never written before. In larger ones those are not seen.
const MAX_COUNTED: u64 = 4 << 20;

/// What one look showed.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Pages whose content is not that of the look before.
    pub changed: Vec<PageAddr>,
    /// Pages that hold something and did not at the look before.
    pub grown: u64,
    /// Time since the look before.
    pub seconds: f64,
}

/// Looks at the same pages again and again.
#[derive(Debug)]
pub struct ContentSampler {
    picks: Vec<(PageAddr, u64)>,
    each: f64,
    /// Pages that held something at the last look; none if that is not asked.
    held: Option<u64>,
    buf: Vec<u8>,
    last: Instant,
    cost: Duration,
}

impl ContentSampler {
    /// Chooses up to `most` pages of those that hold something, spread evenly with a random step, and looks at them
    /// for the first time.
    pub fn new(ram: &GuestRam, most: usize) -> io::Result<Self> {
        let most = most.clamp(1, MAX_PICKS);
        let total = held(ram);
        let size: u64 = ram.blocks().iter().map(|b| u64::from(b.pages())).sum();
        let step = (total as f64 / most as f64).max(1.0);
        let mut picks = Vec::with_capacity(most);
        let (mut before, mut due) = (0u64, step * rand::random::<f64>());
        for block in 0..ram.blocks().len() {
            let Ok(ix) = u16::try_from(block) else { break };
            for range in ram.data_ranges(block) {
                let n = u64::from(range.end - range.start);
                while due < (before + n) as f64 && picks.len() < most {
                    let page = range.start + (due as u64).saturating_sub(before) as u32;
                    picks.push((PageAddr { block: BlockIx(ix), page }, 0));
                    // A fixed step would fall in with the strides that programs write in.
                    due += if step > 1.0 { step * (0.5 + rand::random::<f64>()) } else { 1.0 };
                }
                before += n;
            }
        }
        let each = if picks.is_empty() { 0.0 } else { total as f64 / picks.len() as f64 };
        let mut this = Self {
            picks,
            each,
            held: (size <= MAX_COUNTED).then_some(total),
            buf: vec![0; PAGE_SIZE],
            last: Instant::now(),
            cost: Duration::ZERO,
        };
        this.look(ram)?;
        Ok(this)
    }

    /// Pages that each page looked at stands for.
    #[must_use]
    pub fn each(&self) -> f64 {
        self.each
    }

    /// Looks again.
    pub fn look(&mut self, ram: &GuestRam) -> io::Result<Look> {
        let began = Instant::now();
        let mut changed = Vec::new();
        for (page, known) in &mut self.picks {
            ram.read_at(usize::from(page.block.0), page.page, &mut self.buf)?;
            let hash = blake3::hash(&self.buf);
            let mut first = [0; 8];
            first.copy_from_slice(&hash.as_bytes()[..8]);
            let now = u64::from_ne_bytes(first);
            if now != *known {
                *known = now;
                changed.push(*page);
            }
        }
        // From middle to middle of the looks: each page is read at the same place of each.
        let seconds = began.duration_since(self.last).as_secs_f64();
        self.last = began;
        let mut grown = 0;
        if let Some(before) = self.held {
            let now = held(ram);
            grown = now.saturating_sub(before);
            self.held = Some(now);
        }
        self.cost = began.elapsed();
        Ok(Look { changed, grown, seconds })
    }

    /// How long to leave the processor alone after a look.
    #[must_use]
    pub fn pause(&self) -> Duration {
        self.cost * 9
    }
}

/// Pages that may hold something else than zeros.
fn held(ram: &GuestRam) -> u64 {
    let ranges = (0..ram.blocks().len()).flat_map(|b| ram.data_ranges(b));
    ranges.map(|r| u64::from(r.end - r.start)).sum()
}
