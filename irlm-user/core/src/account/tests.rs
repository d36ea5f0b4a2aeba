//! The same for whoever noted the same newest versions, and another for whoever did not.

use super::*;
use crate::page_set::Run;
use crate::units::BlockIx;
use proptest::prelude::*;
use std::collections::HashMap;

const SIZES: [u32; 2] = [40, 7];

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}

fn content(seed: u64) -> PageBytes {
    let mut p = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut p);
    p
}

fn account() -> Account {
    Account::new(Marker::new(&[5; 32]), SIZES)
}

/// A version of a page: of so many contents, or uniform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Of(u64),
    Fill(u8),
}

fn note(a: &mut Account, addr: PageAddr, version: Version) {
    match version {
        Version::Of(seed) => a.page(addr, &content(seed)),
        Version::Fill(fill) => a.uniform(addr, 1, fill),
    }
}

fn any_note() -> impl Strategy<Value = (PageAddr, Version)> {
    let addr = (0..2u16).prop_flat_map(|b| (Just(b), 0..SIZES[usize::from(b)])).prop_map(|(b, p)| at(b, p));
    let version = prop_oneof![(0..6u64).prop_map(Version::Of), any::<u8>().prop_map(Version::Fill)];
    (addr, version)
}

fn newest(notes: &[(PageAddr, Version)]) -> HashMap<PageAddr, Version> {
    notes.iter().copied().collect()
}

fn sum_of(notes: impl IntoIterator<Item = (PageAddr, Version)>) -> Tally {
    let mut a = account();
    notes.into_iter().for_each(|(addr, v)| note(&mut a, addr, v));
    a.tally()
}

proptest! {
    #[test]
    fn only_the_newest_versions_count_in_whatever_order_pages_came(
        notes in prop::collection::vec(any_note(), 0..120),
        looks in prop::collection::vec(0..120usize, 0..4),
    ) {
        let mut a = account();
        for (n, (addr, v)) in notes.iter().enumerate() {
            note(&mut a, *addr, *v);
            if looks.contains(&n) {
                // Looking changes nothing.
                a.tally();
            }
        }
        let newest = newest(&notes);
        let tally = a.tally();
        prop_assert_eq!(tally.pages, newest.len() as u64);
        prop_assert_eq!(tally, sum_of(newest.iter().map(|(a, v)| (*a, *v))));
        // A map's order is another in each map.
        prop_assert_eq!(tally, sum_of(newest.clone()));
    }

    #[test]
    fn a_page_changed_lost_or_too_many_is_missed(
        notes in prop::collection::vec(any_note(), 1..60),
        which in any::<prop::sample::Index>(),
        bit in 0..PAGE_SIZE * 8,
        other in any_note(),
    ) {
        let newest = newest(&notes);
        let tally = sum_of(newest.clone());
        let pages: Vec<_> = newest.iter().collect();
        let (addr, version) = pages[which.index(pages.len())];
        let without = sum_of(newest.clone().into_iter().filter(|(a, _)| a != addr));
        prop_assert_ne!(without, tally);
        let mut a = account();
        for (a_, v) in newest.iter().filter(|(a_, _)| *a_ != addr) {
            note(&mut a, *a_, *v);
        }
        let mut bytes = match version {
            Version::Of(seed) => content(*seed),
            Version::Fill(fill) => [*fill; PAGE_SIZE],
        };
        bytes[bit / 8] ^= 1 << (bit % 8);
        a.page(*addr, &bytes);
        prop_assert_ne!(a.tally(), tally);
        if newest.get(&other.0) != Some(&other.1) {
            prop_assert_ne!(sum_of(newest.into_iter().chain([other])), tally);
        }
    }

    #[test]
    fn two_pages_in_each_other_s_place_are_missed(a in any_note(), b in any_note()) {
        prop_assume!(a.0 != b.0 && a.1 != b.1);
        prop_assert_ne!(sum_of([a, b]), sum_of([(a.0, b.1), (b.0, a.1)]));
    }
}

#[test]
fn an_older_version_that_comes_last_is_missed() {
    let (old, new) = ((at(0, 3), Version::Of(1)), (at(0, 3), Version::Of(2)));
    assert_eq!(sum_of([old, new]), sum_of([new]));
    assert_ne!(sum_of([new, old]), sum_of([new]));
}

#[test]
fn a_uniform_page_is_the_same_however_it_comes_and_no_page_is_another_thing() {
    for fill in [0, 1, 255] {
        let mut a = account();
        a.page(at(1, 2), &[fill; PAGE_SIZE]);
        assert_eq!(a.tally(), sum_of([(at(1, 2), Version::Fill(fill))]), "{fill}");
        assert_ne!(a.tally(), Tally::default());
    }
    let mut a = account();
    a.uniform(at(0, 4), 30, 0);
    assert_eq!(a.tally(), sum_of((4..34).map(|p| (at(0, p), Version::Fill(0)))));
}

#[test]
fn what_is_forgotten_never_counted() {
    let mut a = account();
    (0..40).for_each(|n| a.page(at(0, n), &content(n.into())));
    a.uniform(at(1, 0), 7, 0);
    let mut due = PageSet::empty(&SIZES);
    due.insert_run(Run { addr: at(0, 10), count: 20 });
    due.insert_run(Run { addr: at(1, 3), count: 4 });
    a.forget(&due);
    let left = (0..10).chain(30..40).map(|n| (at(0, n), Version::Of(n.into())));
    assert_eq!(a.tally(), sum_of(left.chain((0..3).map(|n| (at(1, n), Version::Fill(0))))));
}

#[test]
fn pages_that_the_vm_has_not_are_nobody_s_and_do_no_harm() {
    let mut a = account();
    a.page(at(2, 0), &content(1));
    a.page(at(1, 7), &content(1));
    a.uniform(at(0, u32::MAX - 1), 5, 0);
    assert_eq!(a.tally(), Tally::default());
}

#[test]
fn other_keys_make_other_marks_and_a_tally_survives_the_wire() {
    let mut other = Account::new(Marker::new(&[6; 32]), SIZES);
    other.page(at(0, 0), &content(0));
    let tally = sum_of([(at(0, 0), Version::Of(0))]);
    assert_ne!(other.tally(), tally);
    assert_eq!(Tally::decode(&tally.encode()), tally);
}

/// The second step is BLAKE3 as it is published, so that another implementation comes to the same marks.
#[test]
fn a_mark_is_keyed_blake3_of_place_and_nh() {
    let marker = Marker::new(&[5; 32]);
    let page = content(9);
    let mut words = [0u64; WORDS];
    let mut bytes = vec![0; PAGE_SIZE + HASH];
    blake3::Hasher::new_keyed(&[5; 32]).update(b"marks").finalize_xof().fill(&mut bytes);
    words.iter_mut().zip(bytes.as_chunks().0).for_each(|(w, b)| *w = u64::from_le_bytes(*b));
    let mut nh = 0u128;
    for (pair, keys) in page.as_chunks::<16>().0.iter().zip(words.as_chunks::<2>().0) {
        let word = |n: usize| u64::from_le_bytes(*pair[n * 8..].first_chunk().unwrap()).wrapping_add(keys[n]);
        nh = nh.wrapping_add(u128::from(word(0)) * u128::from(word(1)));
    }
    assert_eq!(marker.content(&page), nh);
    let key: [u8; 32] = bytes[PAGE_SIZE..].try_into().unwrap();
    let hash = blake3::keyed_hash(&key, &block_of(at(1, 6), nh));
    let mark = u64::from_le_bytes(*hash.as_bytes().first_chunk().unwrap());
    let mut a = Account::new(marker, SIZES);
    a.page(at(1, 6), &page);
    assert_eq!(a.tally(), Tally { sum: mark.into(), pages: 1 });
}
