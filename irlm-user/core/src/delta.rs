//! A page as its difference from another one that both sides have (docs/decisions/0010): bytewise, so that it is as long
//! as the page, and the frame's codec, which compresses it, sees zeros where the two agree and short repeats where they
//! differ by a relocation.
//!
//! What may be referred to stands in [`Slots`] at the receiver: contents that came in full, each in the place the
//! sender gave it. The sender alone decides what makes room for what (`core::sketch`), so no two ideas of what is
//! there have to agree, and a reference is never itself a difference: there are no chains. A wrong or missing
//! reference makes a page that does not hash to its digest, and is asked for like any other that did not come.
//! Whoever takes a frame in puts the contents that its Keep records name into their slots before ([`Slots::keep`]).

use super::digest::Hasher;
use super::units::{PAGE_SIZE, PageBytes};
use super::wire::frame::{Kind, WireError};
use super::wire::limits::MAX_FRAME_PAGES;
use super::wire::pages::{Form, PageBatch, Record};

/// What a difference must leave of a page's bytes that are not zero, in quarters, to be worth its name and digest.
const WORTH_QUARTERS: u32 = 3;
/// And by how many bytes at least it must be less.
const WORTH_BYTES: u32 = 96;

/// Bytes that are not zero.
fn filled(page: &PageBytes) -> u32 {
    let (parts, _) = page.as_chunks::<128>();
    // Each part is counted in bytes, which a vector unit does in a few steps.
    parts.iter().map(|p| u32::from(p.iter().fold(0u8, |n, b| n + u8::from(*b != 0)))).sum()
}

/// `out` becomes `page` less `reference`; returns whether that is worth it.
#[must_use]
pub fn less(page: &PageBytes, reference: &PageBytes, out: &mut PageBytes) -> bool {
    for ((o, p), r) in out.iter_mut().zip(page).zip(reference) {
        *o = p.wrapping_sub(*r);
    }
    let (left, whole) = (filled(out), filled(page));
    left * 4 < whole * WORTH_QUARTERS && left + WORTH_BYTES < whole
}

/// Undoes [`less`] in place.
pub fn plus(page: &mut PageBytes, reference: &PageBytes) {
    for (p, r) in page.iter_mut().zip(reference) {
        *p = p.wrapping_add(*r);
    }
}

/// Pages in one piece of memory of [`Slots`]: 256 KiB.
pub(super) const CHUNK_PAGES: usize = 64;
/// Most slots of one source host and trust domain: 4 GiB.
pub const MAX_SLOTS: u32 = 1 << 20;

/// What one source host has told to keep, for the pages of one trust domain that refer to it.
///
/// Bound: the number of slots given at creation. Memory is taken as slots are filled, a piece at a time.
#[derive(Debug)]
pub struct Slots {
    chunks: Vec<Option<Box<[u8]>>>,
    held: Vec<bool>,
}

impl Slots {
    /// Room for `pages` contents.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let pages = pages.min(MAX_SLOTS) as usize;
        Self { chunks: vec![None; pages.div_ceil(CHUNK_PAGES)], held: vec![false; pages] }
    }

    /// How many there are.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.held.len() as u32
    }

    /// Keeps a content, in the place of what was there. A place that is not there is left out: who refers to it is
    /// answered like anybody who refers to what is not there.
    pub fn keep(&mut self, slot: u32, bytes: &PageBytes) {
        let slot = slot as usize;
        let Some(held) = self.held.get_mut(slot) else { return };
        *held = true;
        let chunk = self.chunks[slot / CHUNK_PAGES]
            .get_or_insert_with(|| vec![0; CHUNK_PAGES * PAGE_SIZE].into_boxed_slice());
        let at = slot % CHUNK_PAGES * PAGE_SIZE;
        chunk[at..at + PAGE_SIZE].copy_from_slice(bytes);
    }

    /// What is in a slot.
    #[must_use]
    pub fn get(&self, slot: u32) -> Option<&PageBytes> {
        let slot = slot as usize;
        if !*self.held.get(slot)? {
            return None;
        }
        let at = slot % CHUNK_PAGES * PAGE_SIZE;
        self.chunks[slot / CHUNK_PAGES].as_ref()?.get(at..)?.first_chunk()
    }

    /// Bytes of memory taken.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.chunks.iter().flatten().count() * CHUNK_PAGES * PAGE_SIZE + self.held.len()
    }
}

/// Which of a frame's contents could not be made, because what they refer to is not there.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Missing([u64; MAX_FRAME_PAGES / 64]);

impl Missing {
    /// Whether content number `n` is missing.
    #[must_use]
    pub fn contains(&self, n: usize) -> bool {
        self.0.get(n / 64).is_some_and(|w| w >> (n % 64) & 1 == 1)
    }
    /// How many are missing.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }
    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    fn insert(&mut self, n: usize) {
        if let Some(w) = self.0.get_mut(n / 64) {
            *w |= 1 << (n % 64);
        }
    }
}

/// Makes the contents of a `Pages` frame out of its body: keeps what is to be kept, and adds to each difference what it
/// was taken from. One that does not come to its digest is missing, whatever the reason. `scratch` grows to one frame's
/// contents and no further; what it holds is given back only where the frame has differences.
pub fn restore<'a>(
    batch: &PageBatch,
    body: &'a [PageBytes],
    slots: &mut Slots,
    hasher: &Hasher,
    scratch: &'a mut Vec<PageBytes>,
) -> Result<(&'a [PageBytes], Missing), WireError> {
    let mut missing = Missing::default();
    let mut copied = false;
    for p in batch.records() {
        let Some(contents) = body.get(p.first..p.first + p.contents) else { break };
        match (p.form, p.record) {
            (Form::Kept(slot), _) if p.contents > 0 => {
                for (n, content) in (slot..).zip(contents) {
                    slots.keep(n, content);
                }
            }
            (Form::Less(slot), Record::Named { digest, .. } | Record::Shared { digest, .. }) => {
                if !std::mem::replace(&mut copied, true) {
                    scratch.clear();
                    scratch.extend_from_slice(body);
                }
                let page = &mut scratch[p.first];
                let made = slots.get(slot).map(|reference| plus(page, reference)).is_some();
                if !made || hasher.page(page) != digest {
                    missing.insert(p.first);
                }
            }
            _ => {}
        }
    }
    if batch.contents() != body.len() {
        return Err(WireError::Bad { kind: Kind::Pages, what: "body length" });
    }
    Ok((if copied { scratch } else { body }, missing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;
    use crate::units::{BlockIx, HostIx, PageAddr, PageId};
    use crate::wire::pages::PagesBuilder;
    use proptest::prelude::*;

    fn batch(meta: &[u8]) -> PageBatch {
        let mut batch = PageBatch::default();
        batch.read(meta).unwrap();
        batch
    }

    fn page(seed: u8) -> PageBytes {
        std::array::from_fn(|i| (i as u8).wrapping_mul(seed) ^ (i >> 8) as u8)
    }

    /// A page, and how it differs from its reference: bytes by place.
    fn pairs() -> impl Strategy<Value = (PageBytes, PageBytes)> {
        (any::<u8>(), prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..600)).prop_map(|(seed, edits)| {
            let reference = page(seed);
            let mut p = reference;
            edits.into_iter().for_each(|(at, b)| p[at] = b);
            (p, reference)
        })
    }

    proptest! {
        #[test]
        fn a_difference_and_its_reference_make_the_page((p, reference) in pairs()) {
            let mut out = [0; PAGE_SIZE];
            let worth = less(&p, &reference, &mut out);
            prop_assert!(worth || filled(&out) + WORTH_BYTES >= filled(&p) * 3 / 4);
            plus(&mut out, &reference);
            prop_assert!(out == p);
        }
    }

    #[test]
    fn what_is_alike_becomes_zero_and_what_is_not_is_not_worth_it() {
        let reference = page(7);
        let mut p = reference;
        // A relocation: one byte of each pointer.
        p.iter_mut().skip(2).step_by(8).for_each(|b| *b = b.wrapping_add(0x1a));
        let mut out = [0; PAGE_SIZE];
        assert!(less(&p, &reference, &mut out));
        assert!(out.iter().enumerate().all(|(i, b)| *b == if i % 8 == 2 { 0x1a } else { 0 }));
        let strange: PageBytes = std::array::from_fn(|i| ((i * i) >> 3) as u8 | 1);
        assert!(!less(&strange, &page(1), &mut out));
        assert!(!less(&[0; PAGE_SIZE], &reference, &mut out));
        // A page that has next to nothing is small anyway.
        let mut few = [0; PAGE_SIZE];
        few[..WORTH_BYTES as usize].fill(3);
        assert!(!less(&few, &few.clone(), &mut out));
        few[WORTH_BYTES as usize] = 3;
        assert!(less(&few, &few.clone(), &mut out));
    }

    #[test]
    fn slots_hold_what_was_kept_last_and_no_more_than_they_may() {
        for pages in [0u32, 1, 63, 64, 65, 200] {
            let mut s = Slots::new(pages);
            assert!(s.bytes() <= pages as usize);
            for round in 1..3u8 {
                for n in 0..pages + 3 {
                    s.keep(n, &page(round.wrapping_add(n as u8)));
                }
                s.keep(u32::MAX, &page(9));
                for n in 0..pages {
                    assert_eq!(s.get(n), Some(&page(round.wrapping_add(n as u8))));
                }
                assert!(s.get(pages).is_none() && s.get(u32::MAX).is_none());
            }
            let room = (pages as usize).div_ceil(CHUNK_PAGES) * CHUNK_PAGES * PAGE_SIZE + pages as usize;
            assert_eq!(s.bytes(), room);
        }
        let mut s = Slots::new(1000);
        s.keep(999, &page(3));
        assert!(s.get(998).is_none() && s.get(0).is_none(), "what was not kept is not there");
        assert_eq!(s.bytes(), CHUNK_PAGES * PAGE_SIZE + 1000);
    }

    #[test]
    fn a_frame_is_restored_and_what_cannot_be_is_missing_and_no_more() {
        let hasher = Hasher::new(Algorithm::Blake3, &[3; 32], "t");
        let addr = |page| PageAddr { block: BlockIx(0), page };
        let id = PageId::local(HostIx(0), 5);
        let (old, mut new) = (page(3), page(3));
        new[77] = 1;
        let mut difference = [0; PAGE_SIZE];
        assert!(less(&new, &old, &mut difference));
        let (digest, wrong) = (hasher.page(&new), hasher.page(&page(4)));
        let mut frame = PagesBuilder::default();
        frame.unique(addr(0), Some(7));
        frame.unique(addr(1), Some(8));
        // Not this function's business, and no content.
        frame.keep(7, &wrong);
        frame.named(addr(2), &digest, 7);
        frame.shared(addr(3), id, &digest, Form::Less(7));
        frame.reference(addr(4), id);
        frame.named(addr(5), &digest, 8);
        frame.named(addr(6), &digest, 9);
        frame.named(addr(7), &digest, 500);
        frame.named(addr(8), &wrong, 7);
        frame.shared(addr(9), id, &wrong, Form::Kept(7));
        frame.named(addr(10), &digest, 7);
        let meta = frame.meta().to_vec();
        let d = difference;
        let body = [old, page(9), d, d, d, d, d, d, page(4), d];
        let (mut slots, mut scratch) = (Slots::new(10), Vec::new());
        let (restored, missing) = restore(&batch(&meta), &body, &mut slots, &hasher, &mut scratch).unwrap();
        let there: Vec<usize> = (0..body.len()).filter(|n| !missing.contains(*n)).collect();
        assert_eq!(
            there,
            [0, 1, 2, 3, 8],
            "another's slot, an empty one, none, another digest, replaced since"
        );
        assert!(restored[..4] == [old, page(9), new, new] && restored[8] == page(4));
        assert_eq!(missing.len(), 5);
        assert!(slots.get(7) == Some(&page(4)) && slots.get(8) == Some(&page(9)));
        for n in [0, body.len() - 1] {
            assert!(
                restore(&batch(&meta), &body[..n], &mut slots, &hasher, &mut scratch).is_err(),
                "{n} contents"
            );
        }
        // Nothing to undo, nothing to copy.
        let mut frame = PagesBuilder::default();
        frame.unique(addr(0), Some(1));
        let (body, mut scratch) = ([page(6)], Vec::new());
        let (same, missing) =
            restore(&batch(frame.meta()), &body, &mut slots, &hasher, &mut scratch).unwrap();
        assert!(std::ptr::eq(same, &raw const body[..]) && missing.is_empty());
        assert_eq!(slots.get(1), Some(&page(6)));
    }
}
