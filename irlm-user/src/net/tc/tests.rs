//! Requests byte for byte as the kernel's headers lay them out (linux/pkt_sched.h, linux/rtnetlink.h), and answers
//! that are hostile, cut short or of kinds we do not know.

use super::*;
use crate::core::policy::{HtbClass, classid};
use proptest::prelude::*;

const BULK: HtbClass = HtbClass {
    name: "bulk",
    minor: 0x40,
    parent: 3,
    rate: 8_000_000,
    ceil: 80_000_000_000,
    prio: 5,
    quantum: 3028,
    burst: 16384,
    cburst: 50_000_000,
    queue: 262_144,
};

/// Little-endian words, as the tests are written for; elsewhere the same words in the other order.
fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn half(a: u16, b: u16) -> u32 {
    u32::from_ne_bytes([a.to_ne_bytes(), b.to_ne_bytes()].concat().try_into().unwrap())
}

fn text(s: &[u8; 4]) -> u32 {
    u32::from_ne_bytes(*s)
}

#[test]
fn the_root_as_the_kernel_wants_it() {
    let want = bytes(&[
        72,
        half(36, 0x0505),
        9,
        0, // length, NEWQDISC, REQUEST ACK REPLACE CREATE, sequence, port
        0,
        7,
        0x1f1a_0000,
        0xffff_ffff,
        0, // family, interface, handle, parent, info
        half(8, 1),
        text(b"htb\0"), // kind
        half(28, 2),
        half(24, 2),
        3,
        10,
        0xf0,
        0,
        0, // version, rate2quantum, default, debug, direct packets
    ]);
    assert_eq!(htb_root(7).bytes(9), want);
}

#[test]
fn a_class_as_the_kernel_wants_it() {
    let mut want = bytes(&[
        0,
        half(40, 0x0505),
        1,
        0, // NEWTCLASS
        0,
        7,
        0x1f1a_0040,
        0x1f1a_0003,
        0,
        half(8, 1),
        text(b"htb\0"),
        half(64, 2),
        half(48, 1),
        half(0x0100, 0),
        half(0xffff, 0),
        1_000_000, // 8 Mbit/s are 10^6 bytes/s; cell_align -1
        half(0x0100, 0),
        half(0xffff, 0),
        u32::MAX, // 80 Gbit/s are 10^10 bytes/s: too large for this field
        256_000,  // 16384 bytes take 16.384 ms at 10^6 bytes/s: 256,000 ticks of 64 ns
        78_125,   // 50,000,000 bytes take 5 ms at 10^10 bytes/s
        3028,
        0,
        5, // quantum, level, priority
        half(12, 7),
    ]);
    want.extend(10_000_000_000u64.to_ne_bytes());
    let n = u32::try_from(want.len()).unwrap();
    want[..4].copy_from_slice(&n.to_ne_bytes());
    assert_eq!(htb_class(7, &BULK).bytes(1), want);
}

#[test]
fn a_queue_and_a_removal_as_the_kernel_wants_them() {
    let want = bytes(&[
        56,
        half(36, 0x0505),
        0,
        0,
        0,
        7,
        0x1f1e_0000,
        0x1f1a_0040,
        0,
        half(10, 1),
        text(b"bfif"),
        text(b"o\0\0\0"),
        half(8, 2),
        262_144,
    ]);
    assert_eq!(byte_fifo(7, &BULK).bytes(0), want);
    let want = bytes(&[36, half(37, 0x0005), 0, 0, 0, 7, 0x1f1a_0000, 0xffff_ffff, 0]);
    assert_eq!(delete_root(7, 0x1f1a_0000).bytes(0), want);
}

#[test]
fn what_was_recorded_is_made_again_whole() {
    let (_, _, class) = payload(&htb_class(7, &BULK));
    let again = recreate(9, &class);
    let (what, delete, made) = payload(&again);
    assert_eq!((what, delete, made.index()), (What::Class, false, 9));
    assert_eq!(made.identity(), class.identity());
    assert_eq!((made.kind(), made.handle(), made.parent()), ("htb", classid(0x40), classid(3)));
    // Not on top of something else.
    assert_eq!(again.bytes(0)[6..8], 0x0605u16.to_ne_bytes());
}

#[test]
fn counters_do_not_make_two_trees_differ_and_rates_do() {
    let (_, _, root) = payload(&htb_root(7));
    let mut counted = root.raw().to_vec();
    let end = counted.len();
    counted[end - 4..].copy_from_slice(&77u32.to_ne_bytes());
    // TCA_STATS2 with one basic and one queue attribute.
    counted.extend(bytes(&[half(44, 7), half(16, 1), 5000, 0, 4, half(24, 3), 2, 3028, 1, 0, 0]));
    let counted = Object::from_raw(What::Qdisc, counted).unwrap();
    assert_eq!(counted.identity(), root.identity());
    let want = Stats { bytes: 5000, packets: 4, dropped: 1, backlog: 3028, backlog_packets: 2 };
    assert_eq!(counted.stats(), want);
    let (_, _, a) = payload(&htb_class(7, &BULK));
    let (_, _, b) = payload(&htb_class(7, &HtbClass { rate: 9_000_000, ..BULK }));
    assert_ne!(a.identity(), b.identity());
}

proptest! {
    #[test]
    fn no_answer_makes_it_panic(raw in proptest::collection::vec(any::<u8>(), 0..200), what in 0..3) {
        let what = [What::Qdisc, What::Class, What::Filter][what as usize];
        if let Some(o) = Object::from_raw(what, raw) {
            let _ = (o.kind(), o.stats(), o.identity(), o.options());
            let _ = recreate(1, &o).bytes(0);
        }
    }

    #[test]
    fn an_answer_cut_short_is_still_no_harm(cut in 0..112usize, flip in 0..112usize, to in any::<u8>()) {
        let (_, _, class) = payload(&htb_class(7, &BULK));
        let mut raw = class.raw().to_vec();
        if let Some(b) = raw.get_mut(flip) { *b = to; }
        raw.truncate(cut);
        if let Some(o) = Object::from_raw(What::Class, raw) {
            let _ = (o.kind(), o.stats(), o.identity());
            let _ = recreate(1, &o).bytes(0);
        }
    }
}
