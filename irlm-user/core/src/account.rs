//! What one end of a move has made of a VM's pages: a running fingerprint of the newest version of each, whatever the order
//! in which they came. The source notes what its QEMU, or its memory, gave; the target notes what it gives to whoever loads
//! the VM. If both have noted the same, every page is there as it was ([`Tally`]).
//!
//! Each page has a *mark*, a 64-bit keyed hash of its place and its content. The tally is the sum of the newest marks. A page
//! that comes again takes its old mark off and puts its new one on, so nothing is read twice and the order does not matter.
//! Zero pages have marks like all others. A page that was never sent has none, so a zero page that got lost is missed.
//!
//! A mark is made in two steps. The content goes through NH (Black et al., UMAC, CRYPTO 1999; with 64-bit words as in VMAC):
//! two contents come to the same 128 bits with a chance of 2⁻⁶⁴, over the choice of the key. Place and those 128 bits then
//! go through keyed BLAKE3, several at a time.
//!
//! Bound: 8 bytes a page, 2 MiB a GiB of guest memory, at each end and for as long as the VM moves; and 12 KiB a VM.

use crate::digest::uniform;
use crate::page_set::PageSet;
use crate::units::{PAGE_SIZE, PageAddr, PageBytes};
use blake3::IncrementCounter;
use blake3::platform::Platform;

/// How a move is verified: `[verify] pages` of group.toml.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// Not at all.
    Off,
    /// Every page is accounted for at both ends, as it passes.
    #[default]
    Stream,
    /// And the memory of the stopped VM is read at both ends, and compared ([`crate::ram`]).
    Ram,
}

/// What is known of a VM's pages since it moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// Both ends had the same of so many pages, before the target could run it.
    Pages(u64),
    /// Post-copy: the same of so many pages. The others came while it ran.
    Before(u64),
    /// And its memory was compared while it stood still.
    Ram(InRam),
    /// Nothing: `[verify] pages` is `off`.
    Off,
    /// Nothing: its pages passed no agent.
    NotInPath,
    /// Nothing: one end lost its account, because its agent was started anew.
    Lost,
}

impl Proof {
    /// So many pages were accounted for.
    #[must_use]
    pub fn pages(self) -> u64 {
        match self {
            Self::Pages(n) | Self::Before(n) => n,
            Self::Ram(ram) => ram.pages,
            Self::Off | Self::NotInPath | Self::Lost => 0,
        }
    }
}

/// What came of comparing a stopped VM's memory at both ends ([`crate::ram`]): it was the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct InRam {
    /// Pages that were compared in memory.
    pub pages: u64,
    /// Pages that were accounted for as they passed; none where the QEMUs streamed to each other.
    pub passed: u64,
    /// Of `pages`, those in which KVM has a clock: they differed, and were let pass.
    pub clocks: u32,
    /// Pages in blocks that were not read at both ends.
    pub unread: u64,
    /// The downtime that it cost, milliseconds.
    pub ms: u64,
}

/// What both ends compare.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Tally {
    /// The sum of the newest marks. At most 2⁴⁸ of 64 bits fit.
    pub sum: u128,
    /// Pages that have one.
    pub pages: u64,
}

impl Tally {
    /// Bytes of [`Self::encode`].
    pub const LEN: usize = 24;

    /// Its bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..16].copy_from_slice(&self.sum.to_le_bytes());
        out[16..].copy_from_slice(&self.pages.to_le_bytes());
        out
    }

    /// Reads them.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let (mut sum, mut pages) = ([0; 16], [0; 8]);
        sum.copy_from_slice(&bytes[..16]);
        pages.copy_from_slice(&bytes[16..]);
        Self { sum: u128::from_le_bytes(sum), pages: u64::from_le_bytes(pages) }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages, {:08x}", self.pages, self.sum as u32)
    }
}

/// 64-bit words in a page.
const WORDS: usize = PAGE_SIZE / 8;
/// Marks that are made side by side: what the widest vectors take.
const LANES: usize = 16;
/// What is hashed of a page: where it is, and its content's 128 bits.
const BLOCK: usize = 64;
const HASH: usize = 32;
/// Where a block says that its page is not one that passed.
const IN_RAM: usize = 6;
/// A whole message of one block (BLAKE3 paper, section 2.2, table 3): CHUNK_START, CHUNK_END, ROOT and KEYED_HASH.
const FLAGS: (u8, u8, u8) = ((1 << 3) | (1 << 4), 1 << 0, 1 << 1);

/// Makes marks, with the keys of one VM's move.
pub struct Marker {
    /// For contents.
    words: Box<[u64; WORDS]>,
    /// For place and content together.
    key: [u32; 8],
    /// The contents of uniform pages, by their byte.
    fills: Box<[u128; 256]>,
    platform: Platform,
}

impl std::fmt::Debug for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker(…)")
    }
}

impl Marker {
    /// Both ends derive the same key from the group's secret ([`crate::wire::keys::account`]).
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        let mut bytes = [0; PAGE_SIZE + HASH];
        blake3::Hasher::new_keyed(key).update(b"marks").finalize_xof().fill(&mut bytes);
        let mut words = Box::new([0; WORDS]);
        for (w, b) in words.iter_mut().zip(bytes.as_chunks().0) {
            *w = u64::from_le_bytes(*b);
        }
        let mut key = [0; 8];
        for (w, b) in key.iter_mut().zip(bytes[PAGE_SIZE..].as_chunks().0) {
            *w = u32::from_le_bytes(*b);
        }
        let mut marker = Self { words, key, fills: Box::new([0; 256]), platform: Platform::detect() };
        for fill in 0..=255u8 {
            marker.fills[usize::from(fill)] = marker.content(&[fill; PAGE_SIZE]);
        }
        marker
    }

    /// NH of a page: products of its words and the key's, in two rows so that none waits for the one before.
    fn content(&self, page: &PageBytes) -> u128 {
        let words = page.as_chunks::<8>().0.as_chunks::<4>().0.iter();
        let added = |word: [u8; 8], key: u64| u128::from(u64::from_le_bytes(word).wrapping_add(key));
        let (mut one, mut other) = (0u128, 0u128);
        for ([a, b, c, d], key) in words.zip(self.words.as_chunks::<4>().0) {
            one = one.wrapping_add(added(*a, key[0]) * added(*b, key[1]));
            other = other.wrapping_add(added(*c, key[2]) * added(*d, key[3]));
        }
        one.wrapping_add(other)
    }

    /// For `each` the number and the mark of pages that follow each other, but for zero pages. No mark of an [`Account`] is like
    /// one of these.
    pub fn each(&self, first: u32, pages: &[PageBytes], mut each: impl FnMut(u32, u64)) {
        let (mut numbers, mut blocks, mut marks) = ([0; LANES], [[0; BLOCK]; LANES], [0; LANES]);
        let mut n = 0;
        for (page, bytes) in (first..).zip(pages) {
            if uniform(bytes) == Some(0) {
                continue;
            }
            let addr = PageAddr { block: crate::units::BlockIx(0), page };
            (numbers[n], blocks[n]) = (page, block_of(addr, self.content(bytes)));
            blocks[n][IN_RAM] = 1;
            n += 1;
            if n == LANES {
                self.marks(&blocks, &mut marks);
                numbers.iter().zip(marks).for_each(|(page, mark)| each(*page, mark));
                n = 0;
            }
        }
        self.marks(&blocks[..n], &mut marks);
        numbers[..n].iter().zip(marks).for_each(|(page, mark)| each(*page, mark));
    }

    /// The marks of up to [`LANES`] blocks. None is 0, which stands for a page without one.
    fn marks(&self, blocks: &[[u8; BLOCK]], out: &mut [u64; LANES]) {
        let Some(first) = blocks.first() else { return };
        let n = blocks.len().min(LANES);
        let (mut inputs, mut hashes) = ([first; LANES], [0; LANES * HASH]);
        inputs.iter_mut().zip(blocks).for_each(|(input, block)| *input = block);
        let (flags, start, end) = FLAGS;
        let to = &mut hashes[..n * HASH];
        self.platform.hash_many(&inputs[..n], &self.key, 0, IncrementCounter::No, flags, start, end, to);
        for (mark, hash) in out.iter_mut().zip(hashes[..n * HASH].as_chunks::<HASH>().0) {
            let mut low = [0; 8];
            low.copy_from_slice(&hash[..8]);
            *mark = u64::from_le_bytes(low).max(1);
        }
    }
}

/// Where a page is, and what is in it, as one block.
fn block_of(addr: PageAddr, content: u128) -> [u8; BLOCK] {
    let mut b = [0; BLOCK];
    b[..2].copy_from_slice(&addr.block.0.to_le_bytes());
    b[2..6].copy_from_slice(&addr.page.to_le_bytes());
    b[8..24].copy_from_slice(&content.to_le_bytes());
    b
}

/// The account of one VM at one end.
#[derive(Debug)]
pub struct Account {
    marker: Marker,
    /// The newest mark of each page, by block; 0: none. The kernel gives memory as pages are noted.
    newest: Vec<Vec<u64>>,
    tally: Tally,
    /// Noted, and not marked yet.
    waiting: [(PageAddr, [u8; BLOCK]); LANES],
    waits: usize,
}

impl Account {
    /// Of a VM whose blocks have so many pages each.
    #[must_use]
    pub fn new(marker: Marker, pages: impl IntoIterator<Item = u32>) -> Self {
        let nowhere = PageAddr { block: crate::units::BlockIx(0), page: 0 };
        Self {
            marker,
            newest: pages.into_iter().map(|n| vec![0; n as usize]).collect(),
            tally: Tally::default(),
            waiting: [(nowhere, [0; BLOCK]); LANES],
            waits: 0,
        }
    }

    /// This is the newest version of the page.
    pub fn page(&mut self, addr: PageAddr, bytes: &PageBytes) {
        self.note(addr, self.marker.content(bytes));
    }

    /// The newest version of this page, and of `count` in all, is all `fill`.
    pub fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) {
        let content = self.marker.fills[usize::from(fill)];
        for n in 0..count {
            let Some(page) = addr.page.checked_add(n) else { return };
            self.note(PageAddr { page, ..addr }, content);
        }
    }

    fn note(&mut self, addr: PageAddr, content: u128) {
        self.waiting[self.waits] = (addr, block_of(addr, content));
        self.waits += 1;
        if self.waits == LANES {
            self.settle();
        }
    }

    /// Marks what waits, in the order in which it came.
    fn settle(&mut self) {
        let (mut blocks, mut marks) = ([[0; BLOCK]; LANES], [0; LANES]);
        let waits = &self.waiting[..std::mem::take(&mut self.waits)];
        blocks.iter_mut().zip(waits).for_each(|(block, (_, b))| *block = *b);
        self.marker.marks(&blocks[..waits.len()], &mut marks);
        for ((addr, _), mark) in waits.iter().zip(marks) {
            replace(&mut self.newest, &mut self.tally, *addr, mark);
        }
    }

    /// These pages count no more: what they held is thrown away, and what they will hold comes by another way.
    pub fn forget(&mut self, pages: &PageSet) {
        self.settle();
        for addr in pages.iter() {
            replace(&mut self.newest, &mut self.tally, addr, 0);
        }
    }

    /// What it comes to by now.
    pub fn tally(&mut self) -> Tally {
        self.settle();
        self.tally
    }
}

/// Puts a mark in the place of the one before. A page that the VM does not have is nobody's; whoever loads it refuses it.
fn replace(newest: &mut [Vec<u64>], tally: &mut Tally, addr: PageAddr, mark: u64) {
    let block = newest.get_mut(usize::from(addr.block.0));
    let Some(old) = block.and_then(|b| b.get_mut(addr.page as usize)) else { return };
    tally.sum = tally.sum.wrapping_sub(u128::from(*old)).wrapping_add(u128::from(mark));
    tally.pages = tally.pages.wrapping_sub(u64::from(*old != 0)).wrapping_add(u64::from(mark != 0));
    *old = mark;
}

#[cfg(test)]
mod tests;
