//! Sketches: a few small numbers of a page, such that pages that share much share some of them. Several kinds,
//! compared with the most similar page there is (looked for in all of them).

use super::corpus::Corpus;
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use std::collections::HashMap;
use std::time::Instant;

/// Numbers in a sketch.
pub(super) const FEATURES: usize = 8;
/// A sketch; 0 stands for none.
pub(super) type Sketch = [u32; FEATURES];

/// A kind of sketch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finder {
    /// Least hashes of aligned blocks of so many bytes, their place in the page included.
    Placed(usize),
    /// The same with the words that look like addresses cut down to what relocation leaves alone.
    Masked(usize),
    /// The same with only the twelve lowest bits of each word, which no relocation by pages touches.
    Low(usize),
    /// Least hashes of aligned blocks wherever they stand.
    Anywhere(usize),
    /// Least hashes of windows of 32 bytes at every byte.
    Shifted,
    /// Hashes of eight fixed stretches of 64 bytes.
    Fixed,
}

impl Finder {
    /// All kinds that are compared.
    pub const ALL: &'static [Self] = &[
        Self::Placed(16),
        Self::Placed(32),
        Self::Placed(64),
        Self::Masked(16),
        Self::Masked(32),
        Self::Masked(64),
        Self::Low(16),
        Self::Low(32),
        Self::Low(64),
        Self::Anywhere(32),
        Self::Anywhere(64),
        Self::Shifted,
        Self::Fixed,
    ];

    /// For the table.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Placed(n) => format!("min-wise, {n}-byte blocks with their place"),
            Self::Masked(n) => format!("the same, {n} bytes, addresses masked"),
            Self::Low(n) => format!("the same, {n} bytes, low 12 bits of words"),
            Self::Anywhere(n) => format!("min-wise, aligned {n}-byte blocks"),
            Self::Shifted => "min-wise, 32-byte windows at every byte".into(),
            Self::Fixed => "eight fixed 64-byte stretches".into(),
        }
    }

    pub(super) fn sketch(self, page: &PageBytes) -> Sketch {
        let mut s = [u32::MAX; FEATURES];
        match self {
            Self::Placed(n) => blocks(page, n, true, |w| w, &mut s),
            Self::Masked(n) => blocks(page, n, true, mask, &mut s),
            Self::Low(n) => blocks(page, n, true, |w| w & 0xFFF, &mut s),
            Self::Anywhere(n) => blocks(page, n, false, |w| w, &mut s),
            Self::Shifted => {
                // A rolling sum of powers; the window's bytes are whitened by the last multiplication.
                const P: u64 = 0x9E37_79B9_7F4A_7C15;
                let out = (0..32).fold(1u64, |a, _| a.wrapping_mul(P));
                let mut h = 0u64;
                let mut zero = 0;
                for (i, b) in page.iter().enumerate() {
                    h = h.wrapping_mul(P).wrapping_add(u64::from(*b) + 1);
                    zero = if *b == 0 { zero + 1 } else { 0 };
                    if i >= 32 {
                        h = h.wrapping_sub(out.wrapping_mul(u64::from(page[i - 32]) + 1));
                    }
                    if i >= 31 && zero < 32 {
                        put(&mut s, (h ^ (h >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9));
                    }
                }
            }
            Self::Fixed => {
                for (i, f) in s.iter_mut().enumerate() {
                    let at = i * PAGE_SIZE / FEATURES + 128;
                    let h = hash(page[at..at + 64].chunks_exact(8).map(word), i as u64);
                    *f = h.map_or(u32::MAX, |h| (h >> 32) as u32);
                }
            }
        }
        s.map(|f| if f == u32::MAX { 0 } else { f | 1 })
    }
}

fn word(b: &[u8]) -> u64 {
    u64::from_le_bytes(b.try_into().unwrap_or([0; 8]))
}

/// Cuts what looks like an address down to what KASLR and ASLR leave alone: kernel text moves by 2 MiB, the direct map
/// by 1 GiB, user mappings by pages.
fn mask(w: u64) -> u64 {
    if w >> 31 == 0x1_FFFF_FFFF {
        w & 0x1F_FFFF | 1 << 63
    } else if w >> 47 == 0x1_FFFF {
        w & 0xFFF | 1 << 62
    } else if matches!(w >> 40, 0x55..=0x56 | 0x7F) {
        w & 0xFFF | 1 << 61
    } else {
        w
    }
}

/// None for a block of zeros, which tells nothing.
fn hash(words: impl Iterator<Item = u64>, seed: u64) -> Option<u64> {
    let (mut h, mut any) = (seed.wrapping_mul(0xD6E8_FEB8_6659_FD93), 0);
    for w in words {
        any |= w;
        h = (h ^ w).wrapping_mul(0x9FB2_1C65_1E98_DF25);
        h ^= h >> 32;
    }
    (any != 0).then(|| h.wrapping_mul(0xBF58_476D_1CE4_E5B9))
}

/// The hash's top bits choose one of the numbers, the rest competes to be the least there.
fn put(s: &mut Sketch, h: u64) {
    let f = &mut s[(h >> 61) as usize];
    *f = (*f).min((h >> 16) as u32);
}

fn blocks(page: &PageBytes, n: usize, placed: bool, see: impl Fn(u64) -> u64, s: &mut Sketch) {
    for (i, b) in page.chunks_exact(n).enumerate() {
        let seed = if placed { i as u64 + 1 } else { 1 };
        if let Some(h) = hash(b.chunks_exact(8).map(|w| see(word(w))), seed) {
            put(s, h);
        }
    }
}

/// Pages that may be referred to, by the numbers of their sketches; the newest wins.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<(u8, u32), u32>);

impl Table {
    pub(super) fn insert(&mut self, ix: u32, s: &Sketch) {
        for (i, f) in (0u8..).zip(s).filter(|(_, f)| **f != 0) {
            self.0.insert((i, *f), ix);
        }
    }

    /// The page that shares most numbers, and how many those are.
    pub(super) fn find(&self, s: &Sketch) -> Option<(u32, usize)> {
        let mut found = [(0u32, 0usize); FEATURES];
        let mut n = 0;
        for (i, f) in (0u8..).zip(s).filter(|(_, f)| **f != 0) {
            let Some(ix) = self.0.get(&(i, *f)) else { continue };
            match found[..n].iter_mut().find(|(x, _)| x == ix) {
                Some((_, votes)) => *votes += 1,
                None => {
                    found[n] = (*ix, 1);
                    n += 1;
                }
            }
        }
        found[..n].iter().copied().max_by_key(|(_, votes)| *votes)
    }
}

/// Bytes that are equal at the same place and not zero.
pub(super) fn alike(a: &PageBytes, b: &PageBytes) -> u32 {
    a.iter().zip(b).map(|(x, y)| u32::from(x == y && *x != 0)).sum()
}

/// How well a finder does.
#[derive(Clone, Debug)]
pub struct Recall {
    /// Which.
    pub finder: Finder,
    /// Of the sampled pages that have a similar page: those for which one nearly as good (nine tenths) was found.
    pub found: f64,
    /// Bytes alike in what was found, as a share of those in the most similar page.
    pub alike: f64,
    /// Nanoseconds a sketch.
    pub nanos: f64,
}

/// Compares finders on a sample of the last host's stream contents; every content of that host sent before is a
/// candidate. Also returns which share of the sample has a page with at least a quarter of its bytes alike.
#[must_use]
pub fn recall(c: &Corpus, sample: usize) -> (Vec<Recall>, f64) {
    let order: Vec<u32> =
        c.frames.iter().filter(|f| f.lane.host + 1 == c.hosts).flat_map(|f| f.contents.clone()).collect();
    let from = order.len() / 2;
    let step = ((order.len() - from) / sample.max(1)).max(1);
    let picks: Vec<usize> = (from..order.len()).step_by(step).collect();
    let best: Vec<u32> = picks
        .iter()
        .map(|&p| order[..p].iter().map(|&o| alike(c.page(order[p]), c.page(o))).max().unwrap_or(0))
        .collect();
    let worth = |b: u32| b >= 1024;
    let out = Finder::ALL
        .iter()
        .map(|&finder| {
            let started = Instant::now();
            let sketches: Vec<Sketch> = order.iter().map(|&o| finder.sketch(c.page(o))).collect();
            let nanos = started.elapsed().as_nanos() as f64 / order.len() as f64;
            let (mut table, mut at) = (Table::default(), 0);
            let (mut hits, mut sum, mut of, mut n) = (0u32, 0u64, 0u64, 0u32);
            for (&p, &b) in picks.iter().zip(&best) {
                (at..p).for_each(|o| table.insert(order[o], &sketches[o]));
                at = p;
                if !worth(b) {
                    continue;
                }
                let got = table.find(&sketches[p]).map_or(0, |(o, _)| alike(c.page(order[p]), c.page(o)));
                hits += u32::from(got * 10 >= b * 9);
                sum += u64::from(got);
                of += u64::from(b);
                n += 1;
            }
            let share = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
            Recall {
                finder,
                found: share(f64::from(hits), f64::from(n)),
                alike: share(sum as f64, of as f64),
                nanos,
            }
        })
        .collect();
    let have = best.iter().filter(|b| worth(**b)).count() as f64 / best.len().max(1) as f64;
    (out, have)
}
