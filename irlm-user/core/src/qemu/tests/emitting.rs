//! The emitter, byte for byte.

use super::build::RAM_ID;
use super::*;
use crate::units::BlockIx;

fn list(footers: bool) -> Arc<BlockList> {
    let blocks = [("m0", 0x4000), ("rom", 0x1000)]
        .map(|(name, used_bytes)| RamBlock { name: name.into(), used_bytes })
        .to_vec();
    Arc::new(BlockList::new(RAM_ID, footers, blocks).expect("good blocks"))
}

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}

#[test]
fn records_and_sections_are_the_expected_bytes() {
    let mut e = Emitter::new(list(true));
    let mut out = Vec::new();
    e.page_header(at(0, 3), &mut out).expect("a page");
    assert_eq!(out, b"\x02\0\0\0\x02\0\0\0\0\0\0\x30\x08\x02m0");
    out.clear();
    e.zero(at(0, 1), &mut out).expect("a page");
    assert_eq!(out, b"\0\0\0\0\0\0\x10\x22\0", "the block is known");
    out.clear();
    assert!(e.is_open());
    e.close_section(&mut out);
    e.close_section(&mut out);
    assert!(!e.is_open());
    assert_eq!(out, b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    out.clear();
    e.page_header(at(0, 0), &mut out).expect("a page");
    assert_eq!(out, b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x28", "a section's end does not forget the block");
    out.clear();
    e.zero(at(1, 0), &mut out).expect("a page");
    assert_eq!(out, b"\0\0\0\0\0\0\0\x02\x03rom\0");
    out.clear();
    e.end(&mut out);
    e.end(&mut out);
    assert_eq!(out, b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
}

#[test]
fn machines_without_footers_get_none() {
    let mut e = Emitter::new(list(false));
    let mut out = Vec::new();
    e.end(&mut out);
    assert_eq!(out, b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x10");
}

#[test]
fn pages_outside_the_list_or_after_the_end_write_nothing() {
    let mut e = Emitter::new(list(true));
    let mut out = Vec::new();
    for addr in [at(0, 4), at(0, u32::MAX), at(1, 1), at(2, 0), at(u16::MAX, 0)] {
        assert_eq!(e.page_header(addr, &mut out), Err(EmitError::NoSuchPage { addr }));
        assert_eq!(e.zero(addr, &mut out), Err(EmitError::NoSuchPage { addr }));
    }
    assert!(out.is_empty() && !e.is_open());
    e.end(&mut out);
    out.clear();
    let addr = at(0, 0);
    assert_eq!(e.page_header(addr, &mut out), Err(EmitError::AfterEnd { addr }));
    assert!(out.is_empty());
}

#[test]
fn headers_stay_below_their_cap() {
    let name = "n".repeat(MAX_NAME).into_boxed_str();
    let blocks = vec![RamBlock { name, used_bytes: 0x1000 }];
    let mut e = Emitter::new(Arc::new(BlockList::new(1, true, blocks).expect("good blocks")));
    let mut out = Vec::new();
    e.zero(at(0, 0), &mut out).expect("a page");
    assert_eq!(out.len(), MAX_RECORD_HEADER);
}
