//! What a table finds, what it keeps, and what it forgets.

use super::*;
use crate::delta::{less, restore};
use crate::digest::{Algorithm, Hasher};
use crate::units::{BlockIx, PageAddr};
use crate::wire::pages::{PageBatch, PagesBuilder, Record, Records};
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};

fn on(vm: u16) -> Lane {
    Lane { vm, frame: 0 }
}

const LATER: Nanos = Nanos(SETTLE_MS * 1_000_000);

fn noise(seed: u64) -> PageBytes {
    let mut p = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut p);
    p
}

/// A page of kernel text: an absolute address every so many bytes, where `base` was added to each.
fn text(seed: u64, every: usize, base: u64) -> PageBytes {
    let mut p = noise(seed);
    for at in (8..PAGE_SIZE - 8).step_by(every) {
        let address = 0xFFFF_FFFF_8100_0000 + (seed * 4096 + at as u64) % 0x100_0000 + base;
        p[at..at + 8].copy_from_slice(&address.to_le_bytes());
    }
    p
}

#[test]
fn a_relocated_page_is_found() {
    for every in [16, 24, 48, 200] {
        let mut t = References::new(1000, SETTLE_MS);
        for seed in 0..300 {
            t.keep(Sketch::of(&text(seed, every, 0)), &text(seed, every, 0), on(0), Nanos(0)).unwrap();
        }
        for seed in 0..300 {
            // KASLR moves by multiples of 2 MiB.
            let p = text(seed, every, 0x1A20_0000);
            let (_, r) =
                t.find(&Sketch::of(&p), on(1), LATER).unwrap_or_else(|| panic!("page {seed}, {every}"));
            assert!(*r == text(seed, every, 0));
            let mut out = [0; PAGE_SIZE];
            assert!(less(&p, r, &mut out));
        }
    }
}

#[test]
fn a_page_written_to_in_places_is_found_and_a_strange_one_is_not() {
    let mut t = References::new(1000, SETTLE_MS);
    for seed in 0..500 {
        t.keep(Sketch::of(&noise(seed)), &noise(seed), on(0), Nanos(0)).unwrap();
    }
    let mut found = 0;
    for seed in 0..500u64 {
        let mut p = noise(seed);
        // A quarter of the blocks is touched.
        p.iter_mut().step_by(128).for_each(|b| *b ^= 0x55);
        found += u32::from(t.find(&Sketch::of(&p), on(0), LATER).is_some_and(|(_, r)| *r == noise(seed)));
    }
    assert!(found > 490, "{found} of 500");
    assert!((1000..1500).all(|seed| t.find(&Sketch::of(&noise(seed)), on(0), LATER).is_none()));
    assert!(
        t.keep(Sketch::of(&[0; PAGE_SIZE]), &[0; PAGE_SIZE], on(0), LATER).is_none(),
        "nothing to compare"
    );
    assert!(t.find(&Sketch::of(&[0; PAGE_SIZE]), on(0), LATER).is_none());
}

#[test]
fn what_another_connection_brings_is_referred_to_when_it_has_had_time_to_arrive() {
    let mut t = References::new(10, SETTLE_MS);
    let s = Sketch::of(&noise(1));
    t.keep(s, &noise(1), on(7), Nanos(5)).unwrap();
    assert!(t.find(&s, on(7), Nanos(5)).is_some(), "same connection: in order");
    assert!(t.find(&s, on(8), Nanos(5)).is_none());
    assert!(t.find(&s, on(8), LATER).is_none());
    assert!(t.find(&s, on(8), Nanos(LATER.0 + 5)).is_some());
    // Or when the target host has said that it has.
    let s = Sketch::of(&noise(2));
    t.keep(s, &noise(2), Lane { vm: 7, frame: 3 }, LATER).unwrap();
    for (taken, there) in [(0, false), (3, false), (4, true), (9, true)] {
        t.taken(7, taken);
        assert_eq!(t.find(&s, on(8), LATER).is_some(), there, "{taken} frames taken in");
    }
    t.taken(7, 0);
    t.taken(8, 9);
    assert!(t.find(&s, on(8), LATER).is_none(), "another connection's word");
}

#[test]
fn what_was_referred_to_outlives_what_was_not() {
    let mut t = References::new(4, SETTLE_MS);
    let at = |n: u64| Nanos(n * LATER.0);
    for n in 0..4 {
        assert_eq!(t.keep(Sketch::of(&noise(n)), &noise(n), on(0), at(n)), Some(n as u32));
    }
    // All were kept too lately to make room.
    let full = t.keep(Sketch::of(&noise(9)), &noise(9), on(0), Nanos(1));
    assert_eq!(full, None);
    let (slot, _) = t.find(&Sketch::of(&noise(0)), on(0), at(5)).unwrap();
    assert_eq!(t.used(slot, on(0), at(5)), None);
    // The first was referred to: the second makes room, then the third.
    assert_eq!(t.keep(Sketch::of(&noise(10)), &noise(10), on(0), at(7)), Some(1));
    assert!(t.find(&Sketch::of(&noise(1)), on(0), at(7)).is_none());
    assert!(t.find(&Sketch::of(&noise(0)), on(0), at(7)).is_some());
    assert_eq!(t.keep(Sketch::of(&noise(11)), &noise(11), on(0), at(8)), Some(2));
    assert_eq!((t.counts.kept, t.counts.evicted), (6, 2));
    let mut none = References::new(0, SETTLE_MS);
    assert_eq!(none.keep(Sketch::of(&noise(1)), &noise(1), on(0), at(1)), None);
    assert!(none.find(&Sketch::of(&noise(1)), on(0), at(1)).is_none());
}

proptest! {
    /// Whatever comes in whatever order: what is found is what the slot was told to keep last, and the memory stays
    /// within its bound.
    #[test]
    fn sender_and_receiver_agree_on_every_slot(
        slots in 1u32..40,
        steps in prop::collection::vec((0u64..60, 0u16..3, 0u64..700), 1..300),
    ) {
        let mut t = References::new(slots, SETTLE_MS);
        let mut there = Slots::new(slots);
        let mut now = Nanos(0);
        for (content, lane, ms) in steps {
            now = now.plus_ms(ms);
            let p = noise(content);
            let s = Sketch::of(&p);
            if let Some((slot, bytes)) = t.find(&s, on(lane), now) {
                prop_assert_eq!(there.get(slot), Some(bytes));
                prop_assert_eq!(t.used(slot, on(lane), now), None);
            } else if let Some(slot) = t.keep(s, &p, on(lane), now) {
                prop_assert!(slot < slots);
                there.keep(slot, &p);
            }
            prop_assert!(t.bytes() <= References::most_bytes(slots));
        }
    }
}

#[test]
fn a_model_is_told_on_each_connection_until_it_has_settled() {
    let mut t = References::new(10, SETTLE_MS);
    let (s, d) = (Sketch::of(&noise(1)), Digest([1; 20]));
    assert!(t.adopt(s, &noise(1), d, Nanos(0)));
    let at = |vm, frame| Lane { vm, frame };
    // Long there at this side, and yet not known at the other.
    let now = Nanos(9 * LATER.0);
    let (slot, bytes) = t.find(&s, at(1, 0), now).unwrap();
    assert!(*bytes == noise(1) && t.is_model(slot) && !t.is_model(slot + 1));
    assert_eq!(t.used(slot, at(1, 0), now), Some(d));
    assert_eq!(t.used(slot, at(1, 0), now), None, "once a frame, and once a connection");
    assert_eq!(t.used(slot, at(2, 7), now), Some(d), "another may overtake the first");
    assert_eq!(t.used(slot, at(2, 7), now), None);
    assert_eq!(t.used(slot, at(1, 1), now), None);
    assert_eq!(t.used(slot, at(3, 0), now), Some(d));
    t.taken(1, 1);
    assert_eq!(t.used(slot, at(4, 0), now), None, "the first has been taken in");
    // Or has had time, from the first word on.
    let (s, d) = (Sketch::of(&noise(2)), Digest([2; 20]));
    assert!(t.adopt(s, &noise(2), d, now));
    let (slot, _) = t.find(&s, at(5, 0), now).unwrap();
    assert_eq!(t.used(slot, at(5, 0), now), Some(d));
    assert_eq!(t.used(slot, at(6, 0), Nanos(now.0 + LATER.0 - 1)), Some(d));
    assert_eq!(t.used(slot, at(7, 0), Nanos(now.0 + LATER.0)), None);
    assert_eq!((t.counts.adopted, t.counts.told, t.counts.forgotten), (2, 5, 0));
}

#[test]
fn a_model_that_is_not_there_is_forgotten_and_makes_room() {
    let mut t = References::new(4, SETTLE_MS);
    let digest = |n: u8| Digest([n; 20]);
    let s = |n: u8| Sketch::of(&noise(n.into()));
    let page = |n: u8| noise(n.into());
    assert!(t.adopt(s(0), &page(0), digest(0), Nanos(0)));
    assert!(t.adopt(s(1), &page(1), digest(1), Nanos(0)));
    assert!(!t.adopt(s(2), &page(2), digest(2), Nanos(0)), "no more than half");
    t.forget(&[0]);
    assert!(t.is_model(0), "it has not been told of this one");
    assert_eq!(t.used(0, on(1), Nanos(0)), Some(digest(0)));
    t.forget(&[0, 0, 2, 77, u32::MAX]);
    assert_eq!(t.counts.forgotten, 1);
    assert!(t.find(&s(0), on(1), LATER).is_none() && !t.is_model(0));
    // The other has moved among the models, and is what it was.
    let (slot, bytes) = t.find(&s(1), on(1), LATER).unwrap();
    assert!(slot == 1 && *bytes == page(1));
    assert_eq!(t.used(slot, on(1), LATER), Some(digest(1)));
    assert!(t.adopt(s(2), &page(2), digest(2), LATER), "there are fewer again");
    assert_eq!(t.keep(s(3), &page(3), on(1), LATER), Some(3));
    let later = Nanos(3 * LATER.0);
    assert_eq!(t.keep(s(4), &page(4), on(1), later), Some(0), "in the place of the forgotten one");
    // A slot that is given to another content is no model's any more.
    assert_eq!(t.keep(s(5), &page(5), on(1), later), Some(2), "the model in 1 was referred to");
    assert!(!t.is_model(2) && t.is_model(1));
    t.forget(&[2]);
    assert!(t.find(&s(5), on(1), later).is_some());
    assert!(!t.adopt(Sketch::of(&[0; PAGE_SIZE]), &[0; PAGE_SIZE], digest(9), later));
    assert!(!References::new(0, SETTLE_MS).adopt(s(1), &page(1), digest(1), later));
}

/// What one side does next; contents are numbers.
#[derive(Clone, Debug)]
enum Step {
    /// A similar page leaves on a connection.
    Leaves(u64, u16),
    /// Another host lends this content.
    Lent(u64),
    /// The target host's store gets, or loses, a content.
    Store(u64, bool),
    /// So many frames of a connection arrive.
    Arrives(u16, usize),
    /// The sender hears what the receiver has said.
    Hears,
    /// Milliseconds.
    Waits(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..24u64, 0..2u16).prop_map(|(n, lane)| Step::Leaves(n, lane)),
        2 => (0..24u64).prop_map(Step::Lent),
        2 => (0..24u64, any::<bool>()).prop_map(|(n, there)| Step::Store(n, there)),
        4 => (0..2u16, 1..4usize).prop_map(|(lane, n)| Step::Arrives(lane, n)),
        2 => Just(Step::Hears),
        2 => (0..400u64).prop_map(Step::Waits),
    ]
}

/// A receiver: frames under way to it by connection, its slots, and the contents that others have brought to its host.
struct Receiver {
    hasher: Hasher,
    wire: [VecDeque<(Vec<u8>, PageBytes, PageBytes)>; 2],
    arrived: [u32; 2],
    slots: Slots,
    store: BTreeSet<u64>,
    unkept: Vec<u32>,
}

impl Receiver {
    /// A frame arrives: whether its page could be made, which then is the one that left.
    fn takes(&mut self, vm: u16) -> Option<bool> {
        let (meta, body, page) = self.wire[usize::from(vm)].pop_front()?;
        for record in Records::new(&meta) {
            if let Record::Keep { digest, slot } = record.unwrap() {
                match self.store.iter().find(|n| self.hasher.page(&noise(**n)) == digest) {
                    Some(n) => self.slots.keep(slot, &noise(*n)),
                    None => self.unkept.push(slot),
                }
            }
        }
        let (body, mut scratch) = ([body], Vec::new());
        let mut batch = PageBatch::default();
        batch.read(&meta).unwrap();
        let (made, missing) = restore(&batch, &body, &mut self.slots, &self.hasher, &mut scratch).unwrap();
        self.arrived[usize::from(vm)] += 1;
        assert!(missing.contains(0) || made[0] == page, "never another page");
        Some(missing.is_empty())
    }
}

proptest! {
    /// Two connections with any delay, and models that the receiver may lack: what it makes of a difference is the page, or
    /// nothing; and always the page if everything is there and arrives at once.
    #[test]
    fn models_make_the_page_or_nothing(
        slots in 1u32..24,
        prompt in any::<bool>(),
        steps in prop::collection::vec(any_step(), 1..200),
    ) {
        let hasher = Hasher::new(Algorithm::Blake3, &[1; 32], "t");
        let mut t = References::new(slots, SETTLE_MS);
        let mut there = Receiver {
            hasher: hasher.clone(),
            wire: Default::default(),
            arrived: [0; 2],
            slots: Slots::new(slots),
            store: if prompt { (0..24).collect() } else { BTreeSet::new() },
            unkept: Vec::new(),
        };
        let (mut now, mut sent) = (Nanos(0), [0u32; 2]);
        for (turn, step) in steps.into_iter().enumerate() {
            match step {
                Step::Leaves(n, vm) => {
                    // It resembles its content, and is not it.
                    let mut page = noise(n);
                    page[turn % PAGE_SIZE] ^= 1;
                    let (s, lane) = (Sketch::of(&page), Lane { vm, frame: sent[usize::from(vm)] });
                    let (mut frame, mut body) = (PagesBuilder::default(), [0; PAGE_SIZE]);
                    let addr = PageAddr { block: BlockIx(0), page: 0 };
                    let found = t.find(&s, lane, now);
                    if let Some(slot) = found.and_then(|(slot, r)| less(&page, r, &mut body).then_some(slot)) {
                        if let Some(digest) = t.used(slot, lane, now) {
                            prop_assert!(t.is_model(slot));
                            frame.keep(slot, &digest);
                        }
                        prop_assert_eq!(t.used(slot, lane, now), None);
                        frame.named(addr, &hasher.page(&page), slot);
                    } else {
                        frame.unique(addr, t.keep(s, &page, lane, now));
                        body = page;
                    }
                    sent[usize::from(vm)] += 1;
                    there.wire[usize::from(vm)].push_back((frame.meta().to_vec(), body, page));
                    prop_assert!(!prompt || there.takes(vm) == Some(true));
                }
                Step::Lent(n) => {
                    t.adopt(Sketch::of(&noise(n)), &noise(n), hasher.page(&noise(n)), now);
                }
                Step::Store(n, true) => {
                    there.store.insert(n);
                }
                Step::Store(n, false) => {
                    there.store.retain(|m| prompt || *m != n);
                }
                Step::Arrives(vm, frames) => (0..frames).for_each(|_| {
                    there.takes(vm);
                }),
                Step::Hears => {
                    t.forget(&std::mem::take(&mut there.unkept));
                    (0..2).for_each(|vm| t.taken(vm, there.arrived[usize::from(vm)]));
                }
                Step::Waits(ms) => now = now.plus_ms(ms),
            }
            prop_assert!(t.bytes() <= References::most_bytes(slots));
            prop_assert!(t.models.len() <= slots.div_ceil(2) as usize);
            for (at, m) in t.models.iter().enumerate() {
                prop_assert_eq!(t.kept[m.slot as usize].model as usize, at);
            }
        }
    }
}
