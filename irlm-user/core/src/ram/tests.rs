//! What memory comes to: the same however it is cut up, another one for any page that differs, and that page's name.

use super::*;
use proptest::collection::btree_map;
use proptest::prelude::*;

const PAGES: u32 = 100;

fn content(n: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    if n > 0 {
        blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    }
    page
}

fn marker() -> Marker {
    Marker::new(&[3; 32])
}

fn block(name: &str, contents: &[u64]) -> Block {
    let pages: Vec<PageBytes> = contents.iter().map(|n| content(*n)).collect();
    let mut sums = Stripes::default();
    add(&mut sums, &marker(), 0, &pages);
    Block { name: name.to_owned(), pages: contents.len() as u32, sums }
}

fn ram(blocks: Vec<Block>) -> Ram {
    Ram { blocks, ..Ram::default() }
}

fn one(contents: &[u64]) -> Ram {
    ram(vec![block("m0", contents)])
}

fn at(page: u32) -> PageAt {
    PageAt { block: "m0".to_owned(), page }
}

fn plain() -> Vec<u64> {
    // Some zero pages, and contents that are there twice.
    (0..u64::from(PAGES)).map(|n| n % 37).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn pages_that_differ_are_seen_and_named_where_each_is_alone_in_its_stripe(
        changed in btree_map(0..PAGES, 0..1000u64, 0..5),
    ) {
        let (ours, mut theirs) = (plain(), plain());
        changed.iter().for_each(|(page, n)| theirs[*page as usize] = *n);
        let differ: Vec<u32> = (0..PAGES).filter(|p| ours[*p as usize] != theirs[*p as usize]).collect();
        let found = one(&ours).compare(&one(&theirs));
        prop_assert_eq!(found.fault(&[]).is_some(), !differ.is_empty());
        let stripe = |p: u32| differ.iter().filter(|q| **q as usize % STRIPES == p as usize % STRIPES).count();
        let mut alone: Vec<PageAt> = differ.iter().filter(|p| stripe(**p) == 1).map(|p| at(*p)).collect();
        alone.sort_by_key(|p| p.page);
        let mut named = found.odd.clone();
        named.sort_by_key(|p| p.page);
        prop_assert_eq!(&named, &alone);
        prop_assert_eq!(found.more, alone.len() < differ.len());
        // Only what is named can be let pass.
        prop_assert_eq!(found.fault(&named).is_none(), !found.more);
    }

    #[test]
    fn it_does_not_matter_in_which_pieces_it_is_read(cuts in proptest::collection::btree_set(1..PAGES, 0..6)) {
        let pages: Vec<PageBytes> = plain().iter().map(|n| content(*n)).collect();
        let mut whole = Stripes::default();
        add(&mut whole, &marker(), 0, &pages);
        let mut sum = Stripes::default();
        let ends = cuts.iter().copied().chain([PAGES]);
        let mut from = 0;
        for to in ends {
            let mut part = Stripes::default();
            add(&mut part, &marker(), from, &pages[from as usize..to as usize]);
            merge(&mut sum, &part);
            from = to;
        }
        prop_assert_eq!(sum, whole);
    }
}

#[test]
fn pages_that_change_places_are_seen() {
    let (ours, mut theirs) = (plain(), plain());
    theirs.swap(3, 4);
    let found = one(&ours).compare(&one(&theirs));
    assert_eq!(found.odd, [at(3), at(4)]);
    // Of one stripe: the sums of the marks would be the same but for their places.
    let mut theirs = plain();
    theirs.swap(3, 3 + STRIPES);
    let found = one(&ours).compare(&one(&theirs));
    assert!(found.more && found.odd.is_empty(), "{found:?}");
    assert!(found.fault(&[]).unwrap().contains("several pages"));
}

#[test]
fn a_page_and_a_zero_page_or_a_hole_differ_and_two_of_these_do_not() {
    assert_eq!(one(&[0; 8]).blocks[0].sums, Stripes::default());
    let found = one(&[0; 8]).compare(&one(&[0, 0, 9, 0, 0, 0, 0, 0]));
    assert_eq!(found.odd, [at(2)]);
    let says = found.fault(&[]).unwrap();
    assert!(says.contains("page 0x2 of m0"), "{says}");
    assert_eq!(found.fault(&[at(2)]), None);
    assert!(found.fault(&[at(3)]).is_some(), "another page");
}

#[test]
fn a_mark_in_memory_is_not_the_mark_of_a_page_that_passes() {
    let m = marker();
    let mut marks = Vec::new();
    m.each(0, &[content(7)], |page, mark| marks.push((page, mark)));
    let mut account = crate::account::Account::new(marker(), [1]);
    account.page(crate::units::PageAddr { block: crate::units::BlockIx(0), page: 0 }, &content(7));
    assert_eq!((marks.len(), marks[0].0), (1, 0));
    assert_ne!(u128::from(marks[0].1), account.tally().sum);
}

#[test]
fn only_what_both_ends_have_read_is_compared_and_enough_of_it_must_be() {
    let big = |n| block("m0", &[n; 64]);
    let (vga, small) = (block("vga.vram", &[5; 16]), block("rom", &[6; 4]));
    let (ours, theirs) = (ram(vec![big(1), vga.clone()]), ram(vec![small.clone(), big(1)]));
    let found = ours.compare(&theirs);
    assert_eq!((found.pages, &found.alone[..]), (64, &["vga.vram".to_owned(), "rom".to_owned()][..]));
    assert_eq!((found.unread, found.fault(&[])), (16, None));
    // Of another length: it is not the same block.
    let found = ram(vec![big(1), vga.clone()]).compare(&ram(vec![big(1), block("vga.vram", &[5; 8])]));
    assert_eq!((found.pages, found.alone.len(), found.fault(&[])), (64, 2, None));
    for (ours, theirs) in [
        (ram(vec![vga.clone()]), ram(vec![vga.clone(), big(1)])),
        (Ram { unread: 17, ..ram(vec![vga.clone()]) }, ram(vec![vga.clone()])),
        (ram(vec![vga.clone()]), Ram { unread: u64::MAX, ..ram(vec![vga.clone()]) }),
        (ram(vec![small]), ram(vec![vga])),
        (Ram::default(), Ram::default()),
    ] {
        let says = ours.compare(&theirs).fault(&[]);
        assert!(says.as_ref().is_some_and(|s| s.starts_with("only ")), "{says:?}");
    }
}

/// As KVM of Linux 6.18 wrote them for SeaBIOS and for a guest that asked for both.
const TIME_THERE: &str = "040000000000000053fd886aa7020000dbcbed0000000000f35637c5ff010000";
const WALL_THERE: &str = "02000000b7ed0d6bcd55c915";
const STARTED: u64 = 0x6b0d_edb6;

fn page_with(at: usize, hex: &str) -> PageBytes {
    let mut page = content(1);
    // No struct of content's own begins there.
    for (n, b) in page[at..].iter_mut().take(hex.len() / 2).enumerate() {
        *b = u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap();
    }
    page
}

#[test]
fn the_clocks_that_kvm_writes_are_known_and_little_else_is_taken_for_one() {
    for at in [0, 0xc20, PAGE_SIZE - 32] {
        assert!(holds_clock(&page_with(at, TIME_THERE), 0), "{at:#x}");
    }
    for at in [0, 4, 0x7f4, PAGE_SIZE - 12] {
        assert!(holds_clock(&page_with(at, WALL_THERE), STARTED), "{at:#x}");
        assert!(holds_clock(&page_with(at, WALL_THERE), STARTED + NEAR), "{at:#x}");
        for other in [0, STARTED - 2 * NEAR, STARTED + 2 * NEAR] {
            assert!(!holds_clock(&page_with(at, WALL_THERE), other), "a time that is another one's: {other}");
        }
    }
    assert!(!holds_clock(&page_with(4, TIME_THERE), 0), "KVM's are aligned");
    assert!(!holds_clock(&[0; PAGE_SIZE], STARTED) && !holds_clock(&[0xff; PAGE_SIZE], STARTED));
    // Odd while it is being written; padding that is none; a clock of 1000 GHz.
    for wrong in [
        TIME_THERE.replacen("04", "05", 1),
        TIME_THERE.replacen("0400000000", "0400000001", 1),
        TIME_THERE.replace("ff010000", "ff010001"),
        TIME_THERE.replace("ff010000", "f7010000"),
    ] {
        assert!(!holds_clock(&page_with(64, &wrong), 0), "{wrong}");
    }
    let seldom = (1..400).filter(|n| holds_clock(&content(*n), STARTED)).count();
    assert_eq!(seldom, 0, "of pages of noise");
}
