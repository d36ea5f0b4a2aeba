//! Bodies both ways, hostile bodies, and the level under a virtual link.

use super::*;
use crate::units::{PAGE_SIZE, PageBytes};
use crate::wire::frame::{
    CODEC_RAW, CODEC_ZSTD, CODEC_ZSTD_BEGIN, CODEC_ZSTD_MORE, HEADER_LEN, Header, Kind, WireError,
};
use crate::wire::limits::{MAX_BODY, MAX_FRAME_PAGES, WINDOW_LOG};
use crate::wire::messages::decode_entries;
use crate::wire::pages::Records;
use proptest::prelude::*;

/// Text-like: words of a small vocabulary.
fn text(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    for (i, word) in page.chunks_mut(4).enumerate() {
        let h = blake3::hash(&(seed * 31 + i as u64).to_le_bytes());
        let n = h.as_bytes()[0] % 23;
        word.copy_from_slice(&[b'a' + n, b'b' + n % 7, 0, n]);
    }
    page
}

fn noise(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

fn squeeze(s: &mut Squeezer, pages: &[PageBytes], level: i32) -> (u8, Vec<u8>) {
    let refs: Vec<&PageBytes> = pages.iter().collect();
    let mut body = Vec::new();
    match s.squeeze(&refs, level, &mut body) {
        Some(made) => {
            let body = body.concat();
            let plain = pages.len() * PAGE_SIZE - made.raw;
            assert!(plain <= pages.iter().filter(|p| !compressible(p)).count() * PAGE_SIZE);
            assert!(body.len() >= made.small + plain && body.len() <= MAX_BODY);
            (made.codec, body)
        }
        None => {
            assert!(body.is_empty());
            (CODEC_RAW, pages.concat())
        }
    }
}

fn back(u: &mut Unsqueezer, codec: u8, body: &[u8], n: usize) -> Result<Vec<PageBytes>, WireError> {
    u.contents(Kind::Pages, codec, body, n).map(<[PageBytes]>::to_vec)
}

#[test]
fn what_is_squeezed_comes_out_whole() {
    for window in [0, 16, WINDOW_LOG] {
        let (mut s, mut u) = (Squeezer::new(window).unwrap(), Unsqueezer::new(window));
        let mut codecs = Vec::new();
        for (n, level) in [1, 1, 3, 3, -3, 19, 1].into_iter().enumerate() {
            let n = n as u64;
            let pages =
                [text(n), noise(n), text(n + 1), text(n + 2), noise(n + 1), noise(n + 2), text(n + 3)];
            let (codec, body) = squeeze(&mut s, &pages, level);
            codecs.push(codec);
            assert_eq!(back(&mut u, codec, &body, pages.len()).unwrap(), pages);
        }
        let (one, first, more) = (CODEC_ZSTD, CODEC_ZSTD_BEGIN, CODEC_ZSTD_MORE);
        let expected = if window == 0 { [one; 7] } else { [first, more, first, more, first, first, first] };
        assert_eq!(codecs, expected);
    }
}

#[test]
fn a_window_finds_what_earlier_frames_had_and_noise_is_left_alone() {
    let pages: Vec<PageBytes> = (0..32).map(text).collect();
    let size = |window| {
        let mut s = Squeezer::new(window).unwrap();
        squeeze(&mut s, &pages, 3);
        squeeze(&mut s, &pages, 3).1.len()
    };
    assert!(size(WINDOW_LOG) * 20 < size(0));
    let mut s = Squeezer::new(WINDOW_LOG).unwrap();
    // The first frame of noise makes it wary.
    let all: Vec<PageBytes> = (0..8).map(noise).collect();
    squeeze(&mut s, &all, 3);
    assert_eq!(squeeze(&mut s, &all, 3), (CODEC_RAW, all.concat()));
    let none: [PageBytes; 0] = [];
    assert_eq!(squeeze(&mut s, &none, 3), (CODEC_RAW, vec![]));
    // More than a frame may carry once noise has grown: sent as it is.
    let many: Vec<PageBytes> = (0..MAX_FRAME_PAGES as u64).map(text).collect();
    assert_eq!(squeeze(&mut s, &many, 3).0, CODEC_RAW);
}

#[test]
fn bodies_are_pinned_but_for_what_zstd_makes_of_them() {
    let (mut s, pages) = (Squeezer::new(0).unwrap(), [noise(1), text(1), text(2), noise(2)]);
    assert_eq!(squeeze(&mut s, &[noise(3)], 3).0, CODEC_RAW, "noise makes it wary");
    let (codec, body) = squeeze(&mut s, &pages, 3);
    assert_eq!((codec, &body[..3]), (1, &[1 << 2, 2 << 2 | 1, 1 << 2][..]));
    assert_eq!(body[3..][..PAGE_SIZE], noise(1));
    assert_eq!(body[3 + PAGE_SIZE..][..PAGE_SIZE], noise(2));
    let zstd = zstd::bulk::decompress(&body[3 + 2 * PAGE_SIZE..], 1 << 20).unwrap();
    assert_eq!(zstd, [text(1), text(2)].concat());
    // A body made elsewhere, byte by byte: one raw page, one of zstd's runs.
    let run_of_4096 = [0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x0f, 0x03, 0x80, 0x00, b'x'];
    let stored = [&[1 << 2, 1 << 2 | 1][..], &noise(3), &run_of_4096].concat();
    let mut u = Unsqueezer::default();
    assert_eq!(back(&mut u, CODEC_ZSTD, &stored, 2), Ok(vec![noise(3), [b'x'; PAGE_SIZE]]));
}

#[test]
fn damage_is_an_error_within_fixed_memory() {
    for window in [0, 16] {
        let pages = [text(1), noise(1), text(2)];
        let mut s = Squeezer::new(window).unwrap();
        let (before, warning) = squeeze(&mut s, &[noise(1), noise(2)], 3);
        let (codec, body) = squeeze(&mut s, &pages, 3);
        let fresh = || {
            let mut u = Unsqueezer::new(window);
            back(&mut u, before, &warning, 2).unwrap();
            u
        };
        assert_eq!(back(&mut fresh(), codec, &body, 3).unwrap(), pages);
        for n in [0, 1, 2, 4, MAX_FRAME_PAGES, MAX_FRAME_PAGES + 1, usize::MAX / PAGE_SIZE] {
            assert!(back(&mut fresh(), codec, &body, n).is_err(), "{n} contents were announced");
        }
        for cut in 0..body.len() {
            assert!(back(&mut fresh(), codec, &body[..cut], 3).is_err(), "cut at {cut}");
        }
        let longer = [&body[..], &[0]].concat();
        assert!(back(&mut fresh(), codec, &longer, 3).is_err());
        for (at, was, is) in [(0, 5, 6), (0, 5, 7), (0, 5, 1), (0, 5, 13)] {
            let mut b = body.clone();
            assert_eq!(std::mem::replace(&mut b[at], is), was);
            assert!(back(&mut fresh(), codec, &b, 3).is_err(), "run {is}");
        }
    }
}

#[test]
fn bombs_and_windows_beyond_the_grant_are_refused() {
    let bound = (MAX_FRAME_PAGES + 1) * PAGE_SIZE + (1 << 16) + (1 << 20);
    let bomb = |log: u32| {
        let mut c = zstd::bulk::Compressor::new(1).unwrap();
        c.set_parameter(zstd::zstd_safe::CParameter::WindowLog(log)).unwrap();
        [&[4 << 2 | 1][..], &c.compress(&vec![0; 64 << 20]).unwrap()].concat()
    };
    for (codec, log) in [(CODEC_ZSTD, 20), (CODEC_ZSTD, 27), (CODEC_ZSTD_BEGIN, 20), (CODEC_ZSTD_BEGIN, 27)] {
        let mut u = Unsqueezer::new(16);
        assert!(back(&mut u, codec, &bomb(log), 4).is_err());
        assert!(u.memory() <= bound, "{} bytes after a bomb", u.memory());
        assert!(back(&mut u, CODEC_ZSTD_MORE, &[4], 0).is_err(), "a broken stream does not go on");
    }
}

#[test]
fn streams_need_a_grant_a_beginning_and_their_order() {
    let (mut s, a, b, c) = (Squeezer::new(WINDOW_LOG).unwrap(), [text(1)], [text(2)], [text(1)]);
    let [a, b, c] = [a, b, c].map(|p| squeeze(&mut s, &p, 1));
    assert!(back(&mut Unsqueezer::new(0), a.0, &a.1, 1).is_err(), "no window granted");
    assert!(back(&mut Unsqueezer::new(WINDOW_LOG), b.0, &b.1, 1).is_err(), "never begun");
    let mut u = Unsqueezer::new(WINDOW_LOG);
    back(&mut u, a.0, &a.1, 1).unwrap();
    // The third refers to the first by its distance, so without the second it is something else or nothing.
    assert_ne!(back(&mut u, c.0, &c.1, 1), Ok(vec![text(1)]));
}

#[test]
fn only_evenly_spread_pages_are_not_worth_a_try() {
    for n in 0..2000 {
        assert!(!compressible(&noise(n)));
        assert!(compressible(&text(n)));
    }
    // Every other byte even: zstd finds one bit in sixteen.
    let mut half = noise(7);
    half.iter_mut().step_by(2).for_each(|b| *b &= 0x0f);
    assert!(compressible(&half));
    assert!(compressible(&[0; PAGE_SIZE]) && compressible(&[7; PAGE_SIZE]));
}

#[test]
fn modes_are_written_as_they_are_read() {
    for (text, mode) in [
        ("auto", Mode::Auto),
        ("off", Mode::Off),
        ("forwarded", Mode::Forwarded),
        ("zstd:3", Mode::Level(3)),
        ("zstd:-5", Mode::Level(-5)),
    ] {
        assert_eq!((text.parse(), mode.to_string()), (Ok(mode), text.to_owned()));
        assert_eq!(serde_json::from_str::<Mode>(&format!("{text:?}")).unwrap(), mode);
        assert_eq!(serde_json::to_string(&mode).unwrap(), format!("{text:?}"));
    }
    for bad in ["", "on", "zstd", "zstd:", "zstd:0", "zstd:20", "zstd:-8", "zstd:x", "3", "Auto"] {
        let e = bad.parse::<Mode>().unwrap_err();
        assert!(e.contains("give \"auto\"") && e.contains(bad), "{e}");
    }
}

fn any_page() -> impl Strategy<Value = PageBytes> {
    prop_oneof![
        (0..50u64).prop_map(text),
        (0..50u64).prop_map(noise),
        any::<u8>().prop_map(|b| [b; PAGE_SIZE]),
        (0..50u64, 0..PAGE_SIZE, any::<u8>()).prop_map(|(n, at, b)| {
            let mut page = text(n);
            page[at] = b;
            page
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn any_frames_at_any_levels_come_back(
        window in prop_oneof![Just(0), Just(16), Just(WINDOW_LOG)],
        frames in prop::collection::vec((prop::collection::vec(any_page(), 0..20), prop_oneof![Just(1), Just(3), Just(6), Just(-1)]), 1..8),
    ) {
        let (mut s, mut u) = (Squeezer::new(window).unwrap(), Unsqueezer::new(window));
        for (pages, level) in frames {
            let (codec, body) = squeeze(&mut s, &pages, level);
            prop_assert_eq!(back(&mut u, codec, &body, pages.len()).unwrap(), pages);
        }
    }

    #[test]
    fn any_bytes_are_contents_or_an_error(
        codec in 1..=3u8,
        n in 0..20usize,
        bytes in prop::collection::vec(any::<u8>(), 0..6000),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut u = Unsqueezer::new(16);
        if let Ok(p) = back(&mut u, codec, &bytes, n) {
            prop_assert_eq!(p.len(), n);
        }
        let pages: Vec<PageBytes> = (0..n as u64).map(text).collect();
        let (codec, mut body) = squeeze(&mut Squeezer::new(16).unwrap(), &pages, 1);
        for (at, b) in flips.into_iter().filter(|_| !pages.is_empty()) {
            let at = at.index(body.len());
            body[at] = b;
        }
        if let Ok(p) = back(&mut Unsqueezer::new(16), codec, &body, n) {
            prop_assert_eq!(p.len(), n);
        }
    }
}

/// A VM connection's frames, written byte by byte after RFC 8878 with its simplest blocks: what any zstd must read, and
/// what the fuzz target `frames` starts from.
const RECORDED: &[u8] = include_bytes!("../../../tests/data/frames/vm.frames");

#[test]
fn frames_made_by_hand_are_read() {
    let mixed = |n: usize| -> PageBytes { std::array::from_fn(|i| (n * 7 + i / 9) as u8) };
    let one = |b: u8| [b; PAGE_SIZE];
    let expected = [
        (CODEC_RAW, vec![mixed(1)]),
        (CODEC_ZSTD_BEGIN, vec![one(b'A'), mixed(2), one(b'B')]),
        (CODEC_ZSTD_MORE, vec![mixed(3), one(b'C'), mixed(5), mixed(4)]),
        (CODEC_ZSTD, vec![one(b'x')]),
        (CODEC_ZSTD_BEGIN, vec![mixed(6)]),
    ];
    let (mut rest, mut u) = (RECORDED, Unsqueezer::new(WINDOW_LOG));
    for (codec, pages) in expected {
        let head = Header::decode(rest.first_chunk().unwrap()).unwrap();
        let (frame, after) = rest[HEADER_LEN..].split_at(head.payload_len());
        let (meta, body) = frame.split_at(head.meta_len as usize);
        let n = match head.kind {
            Kind::Pages => {
                let mut all = Records::new(meta);
                assert!(all.by_ref().all(|r| r.is_ok()));
                all.contents()
            }
            kind => decode_entries(kind, meta).unwrap().len(),
        };
        assert_eq!(head.codec, codec);
        assert!(u.contents(head.kind, head.codec, body, n) == Ok(&pages[..]), "codec {codec}");
        rest = after;
    }
    assert!(rest.is_empty());
}
