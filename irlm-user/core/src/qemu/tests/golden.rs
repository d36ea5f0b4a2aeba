//! Streams of real QEMU, made small (tests/data/qemu/README.md): read right, and re-made byte for byte.

use super::*;
use crate::units::BlockIx;

const Q35_7_2: &[u8] = include_bytes!("../../../../tests/data/qemu/q35-7.2.stream");
const Q35_10_0: &[u8] = include_bytes!("../../../../tests/data/qemu/q35-10.0.stream");

/// Bytes that the files keep of what follows the end of RAM.
const TAIL: usize = 1500;

struct Summary {
    machine: &'static str,
    section_id: u32,
    /// The block list, lengths in pages.
    blocks: [(&'static str, u32); 6],
    sections: usize,
    pages: usize,
    zeroes: usize,
    /// Whether the switchover command comes before the END section.
    switchover: bool,
}

fn check(stream: &[u8], want: &Summary) {
    let (parser, seen, end) = feed(stream, &[usize::MAX]);
    assert_eq!((parser.machine(), end), (Some(want.machine), Ok(())));
    let list = parser.blocks().expect("known");
    assert_eq!((list.section_id(), list.footers()), (want.section_id, true));
    let blocks: Vec<_> = list.blocks().iter().map(|b| (&*b.name, b.pages())).collect();
    assert_eq!(blocks, want.blocks);
    let count = |f: &dyn Fn(&Seen) -> bool| seen.iter().filter(|e| f(e)).count();
    assert_eq!(count(&|e| matches!(e, Seen::SectionEnd)), want.sections);
    assert_eq!(count(&|e| matches!(e, Seen::Page(..))), want.pages);
    assert_eq!(count(&|e| matches!(e, Seen::Zero(_))), want.zeroes);
    assert_eq!(verbatim(&seen).1.len(), TAIL);
    assert_eq!(verbatim(&seen).1[0], 4, "device state follows");
    let stopped = seen.iter().position(|e| *e == Seen::Stopped).expect("stopped");
    let before = matches!(&seen[stopped - 1], Seen::Verbatim(v) if v == b"\x08\0\x0b\0\0");
    assert_eq!(before, want.switchover);

    assert_eq!(feed(stream, &[1]).1, seen);
    assert_eq!(feed(stream, &[4093, 11]).1, seen);

    // Up to the END section, which the emitter writes empty, the emitter's bytes are QEMU's own.
    let again = random::straight(&seen, &mut || true);
    let end = [&[3][..], &want.section_id.to_be_bytes()].concat();
    let end = stream.windows(5).position(|w| w == end).expect("an END section");
    assert!(again[..end] == stream[..end], "re-made otherwise");
    assert_eq!(ram(&events(&again)), ram(&seen));
}

#[test]
fn qemu_7_2() {
    let summary = Summary {
        machine: "pc-q35-7.2",
        section_id: 2,
        blocks: [
            ("m0", 16384),
            ("/rom@etc/acpi/tables", 32),
            ("pc.bios", 64),
            ("pc.rom", 32),
            ("/rom@etc/table-loader", 1),
            ("/rom@etc/acpi/rsdp", 1),
        ],
        sections: 10,
        pages: 7,
        zeroes: 122,
        switchover: false,
    };
    check(Q35_7_2, &summary);
}

#[test]
fn qemu_10_0() {
    let summary = Summary {
        machine: "pc-q35-10.0",
        section_id: 1,
        blocks: [
            ("m0", 16384),
            ("/rom@etc/acpi/tables", 32),
            ("pc.rom", 32),
            ("pc.bios", 16),
            ("/rom@etc/table-loader", 1),
            ("/rom@etc/acpi/rsdp", 1),
        ],
        sections: 7,
        pages: 8,
        zeroes: 85,
        switchover: true,
    };
    check(Q35_10_0, &summary);
}

#[test]
fn a_page_of_the_golden_stream_is_where_and_what_the_file_says() {
    let first = events(Q35_7_2).into_iter().find_map(|e| match e {
        Seen::Page(addr, bytes) => Some((addr, bytes)),
        _ => None,
    });
    let (addr, bytes) = first.expect("a page");
    assert_eq!(addr.block, BlockIx(0));
    // The pattern that replaced the contents, of the file's first page.
    let pattern: Vec<u8> = (0..4096u32).map(|i| (37 + i * 11 + (i >> 8)) as u8).collect();
    assert_eq!(bytes, pattern);
}
