//! What a table finds, what it keeps, and what it forgets.

use super::*;
use crate::core::delta::less;
use proptest::prelude::*;

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
    t.used(slot, at(5));
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
                t.used(slot, now);
            } else if let Some(slot) = t.keep(s, &p, on(lane), now) {
                prop_assert!(slot < slots);
                there.keep(slot, &p);
            }
            prop_assert!(t.bytes() <= References::most_bytes(slots));
        }
    }
}
