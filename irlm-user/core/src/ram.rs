//! What a VM's memory comes to while the VM stands still, read anew from whoever runs it at one end of its move: `[verify] pages =
//! "ram"`. It is compared with what the other end reads, so that it also shows what no stream shows: a loader's own faults.
//!
//! Of each block there are [`STRIPES`] pairs of sums over its pages that are not all zero: of their marks ([`Marker`]), and of
//! their marks times their numbers. Page n counts in stripe n mod [`STRIPES`]. A hole costs nothing, and the order does not matter.
//! If one page of a stripe differs, the two differences of its sums say which.
//!
//! KVM writes into guest memory as it loads a VM: into the clocks that it keeps there for the guest. So a page that differs is
//! let pass if its source's version holds such a clock ([`holds_clock`]), and is counted.

use crate::account::Marker;
use crate::units::{PAGE_SIZE, PageBytes};

/// Groups of a block's pages that are summed up apart. The clocks of a guest lie in pages next to each other.
pub const STRIPES: usize = 16;
/// Most pages that may be let pass, in all.
pub const MAX_ODD: usize = 16;
/// Most blocks that are told; a VM has a few of 1 MiB and more, which are all that is read.
pub const MAX_TOLD: usize = 256;

/// The sums of one stripe. At most 2³² marks of 64 bits times 32 bits fit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Sums {
    /// Of the marks.
    pub marks: u128,
    /// Of the marks times the pages' numbers, from 1 on.
    pub placed: u128,
}

/// The sums of a block, or of a part of it.
pub type Stripes = [Sums; STRIPES];

/// Adds pages that follow each other in their block, from page `first` on.
pub fn add(stripes: &mut Stripes, marker: &Marker, first: u32, pages: &[PageBytes]) {
    marker.each(first, pages, |page, mark| {
        let s = &mut stripes[page as usize % STRIPES];
        s.marks = s.marks.wrapping_add(u128::from(mark));
        s.placed = s.placed.wrapping_add(u128::from(mark) * (u128::from(page) + 1));
    });
}

/// Adds the sums of another part of the block.
pub fn merge(stripes: &mut Stripes, part: &Stripes) {
    for (s, p) in stripes.iter_mut().zip(part) {
        s.marks = s.marks.wrapping_add(p.marks);
        s.placed = s.placed.wrapping_add(p.placed);
    }
}

/// One block that was read.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Block {
    /// Its name, which both ends know it by.
    pub name: String,
    /// Its pages, zero pages and holes too.
    pub pages: u32,
    /// What they come to.
    pub sums: Stripes,
}

/// The memory of a VM at one end.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Ram {
    /// The blocks that were read.
    pub blocks: Vec<Block>,
    /// Pages in blocks that could not be read, or are too small to be.
    pub unread: u64,
    /// How long it took, milliseconds.
    pub took_ms: u32,
}

/// A page by its block's name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PageAt {
    /// The block.
    pub block: String,
    /// The page.
    pub page: u32,
}

impl std::fmt::Display for PageAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "page {:#x} of {}", self.page, self.block)
    }
}

/// What the memories of both ends came to beside each other.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Compared {
    /// Pages in the blocks that both ends have read.
    pub pages: u64,
    /// Blocks that only one end has read, and those of another length.
    pub alone: Vec<String>,
    /// Pages of one end that were not compared; of the end that has more of them.
    pub unread: u64,
    /// Pages that differ.
    pub odd: Vec<PageAt>,
    /// And there are more, which cannot be named.
    pub more: bool,
    /// Less than half of the memory could be compared.
    pub little: bool,
}

impl Ram {
    /// Compares it with the other end's.
    #[must_use]
    pub fn compare(&self, other: &Self) -> Compared {
        let mut out = Compared::default();
        let find = |ram: &Self, name: &str, pages| {
            ram.blocks.iter().position(|b| b.name == name && b.pages == pages)
        };
        for b in &self.blocks {
            match find(other, &b.name, b.pages).and_then(|at| other.blocks.get(at)) {
                Some(theirs) => {
                    out.pages += u64::from(b.pages);
                    out.differences(b, theirs);
                }
                None => out.alone.push(b.name.clone()),
            }
        }
        let lacks = other.blocks.iter().filter(|b| find(self, &b.name, b.pages).is_none());
        out.alone.extend(lacks.map(|b| b.name.clone()));
        let all = |ram: &Self| {
            ram.blocks.iter().map(|b| u64::from(b.pages)).sum::<u64>().saturating_add(ram.unread)
        };
        let most = all(self).max(all(other));
        out.unread = most.saturating_sub(out.pages);
        out.little = out.pages <= most / 2;
        out
    }
}

impl Compared {
    fn differences(&mut self, ours: &Block, theirs: &Block) {
        for (stripe, (a, b)) in ours.sums.iter().zip(&theirs.sums).enumerate() {
            if a == b {
                continue;
            }
            match odd_page(a, b, ours.pages).filter(|p| *p as usize % STRIPES == stripe) {
                Some(page) if self.odd.len() < MAX_ODD => {
                    self.odd.push(PageAt { block: ours.name.clone(), page });
                }
                _ => self.more = true,
            }
        }
    }

    /// Why it is not the same memory; nothing if all that differs is in `spared`.
    #[must_use]
    pub fn fault(&self, spared: &[PageAt]) -> Option<String> {
        let odd: Vec<String> =
            self.odd.iter().filter(|p| !spared.contains(p)).map(PageAt::to_string).collect();
        if self.little {
            return Some(format!(
                "only {} pages of its memory could be compared after it was stopped",
                self.pages
            ));
        }
        if odd.is_empty() && !self.more {
            return None;
        }
        let what = match (odd.is_empty(), self.more) {
            (true, _) => "several pages".to_owned(),
            (false, true) => format!("{} and others", odd.join(", ")),
            (false, false) => odd.join(", "),
        };
        Some(format!("the memory that was loaded is not what its source holds ({what}), so it is not run"))
    }
}

/// The one page that makes the difference of two sums, if it is one.
fn odd_page(a: &Sums, b: &Sums, pages: u32) -> Option<u32> {
    let marks = a.marks.wrapping_sub(b.marks).cast_signed();
    let placed = a.placed.wrapping_sub(b.placed).cast_signed();
    let number = (placed.checked_rem(marks)? == 0).then(|| placed / marks)?;
    u32::try_from(number.checked_sub(1)?).ok().filter(|p| *p < pages)
}

/// How far the second at which a VM's process was started may be from the one that KVM writes, seconds: clocks are set.
const NEAR: u64 = 300;

/// Whether a page holds one of the clocks that KVM writes for a guest whose process was started at that second (Unix time; 0: not
/// known): the guest's time since then (`pvclock_vcpu_time_info`), or the time at which it began (`pvclock_wall_clock`).
#[must_use]
pub fn holds_clock(page: &PageBytes, started: u64) -> bool {
    let aligned = |step: usize, len: usize| (0..=PAGE_SIZE - len).step_by(step);
    aligned(8, TIME).any(|at| page[at..].first_chunk().is_some_and(is_time))
        || aligned(4, WALL).any(|at| page[at..].first_chunk().is_some_and(|b| is_wall(b, started)))
}

const TIME: usize = 32;
const WALL: usize = 12;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// u32 version (even), u32 0, u64 TSC, u64 ns since then, u32 and i8: ns of a tick, u8 flags, u16 0.
fn is_time(b: &[u8; TIME]) -> bool {
    let (version, tsc, ns) = (u32_at(b, 0), u64_at(b, 8), u64_at(b, 16));
    let (mul, shift, flags) = (u32_at(b, 24), b[28].cast_signed(), b[29]);
    // From 0.1 GHz to 16 GHz.
    let tick = f64::from(mul) / f64::from(1u32 << 31) / 2.0 * f64::from(shift.clamp(-8, 8)).exp2();
    version != 0
        && version % 2 == 0
        && u32_at(b, 4) == 0
        && tsc != 0
        && ns != 0
        && ns < 1 << 60
        && mul >= 1 << 31
        && (1.0 / 16.0..=10.0).contains(&tick)
        && flags < 8
        && b[30..] == [0, 0]
}

/// u32 version (even), u32 seconds, u32 ns of Unix time.
fn is_wall(b: &[u8; WALL], started: u64) -> bool {
    let (version, s, ns) = (u32_at(b, 0), u32_at(b, 4), u32_at(b, 8));
    let near = started > NEAR && u64::from(s).abs_diff(started) <= NEAR;
    version != 0 && version % 2 == 0 && near && ns < 1_000_000_000
}

#[cfg(test)]
mod tests;
