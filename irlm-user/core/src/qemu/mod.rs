//! QEMU's precopy migration stream (QEMU 7.2 to 10.x), as far as IRLM rewrites it: the source agent takes the pages
//! out of it, the target agent puts them back in, and QEMU notices nothing.
//!
//! ```text
//! header, configuration, commands, START ram (block list)   verbatim
//! PART ram …, END ram                                       taken apart: Page and Zero events; re-made by Emitter
//! device state, EOF, description                            verbatim, to the last byte
//! ```
//!
//! Only what is fully understood before the end of RAM is let through; everything else is one clear [`StreamError`],
//! raised before the VM has moved. docs/qemu-stream.md says what is parsed, passed and refused, and what was seen
//! with which QEMU.

mod blocks;
mod emit;
mod error;
mod parse;
mod return_path;
#[cfg(test)]
mod tests;

pub use blocks::{BlockList, BlockListError, RamBlock};
pub use emit::{EmitError, Emitter};
pub use error::StreamError;
pub use parse::{Event, Parser};
pub use return_path::{RpError, RpKind, RpMessage, RpParser, shut};

use super::units::PAGE_SIZE;

/// Longest RAM block, section or subsection name: its length travels in one byte.
pub const MAX_NAME: usize = 255;
/// Longest machine name in the configuration section. QEMU's longest today has 20 bytes.
pub const MAX_MACHINE_NAME: usize = 255;
/// Most RAM blocks in a stream. A VM has one for each DIMM and ROM, tens in all.
pub const MAX_BLOCKS: usize = 4096;
/// Most guest RAM of one VM, so that its pages can be numbered by a `u32`: 16 TiB less a page.
pub const MAX_RAM_BYTES: u64 = u32::MAX as u64 * PAGE_SIZE as u64;
/// Longest payload among the commands that are let through (post-copy's advice).
pub const MAX_COMMAND: usize = 16;
/// Longest return-path payload taken; the longest defined one (a page request with a block name) has 268 bytes.
pub const MAX_RP_PAYLOAD: usize = 512;
/// [`Parser::parse`] always makes progress on a buffer of this many bytes: a page record with a block name.
pub const MAX_LOOKAHEAD: usize = 8 + 1 + MAX_NAME + PAGE_SIZE;
/// What [`Emitter::page_header`] or [`Emitter::zero`] appends at most: section header, word, name, fill byte.
pub const MAX_RECORD_HEADER: usize = 5 + 8 + 1 + MAX_NAME + 1;

/// Numbers of the format (docs/qemu-stream.md), shared by parser, emitter and tests.
mod format {
    /// "QEVM".
    pub(super) const MAGIC: [u8; 4] = *b"QEVM";
    /// First bytes of a multifd channel.
    pub(super) const MULTIFD_MAGIC: [u8; 4] = [0x11, 0x22, 0x33, 0x44];
    pub(super) const VERSION: u32 = 3;

    pub(super) const EOF: u8 = 0x00;
    pub(super) const START: u8 = 0x01;
    pub(super) const PART: u8 = 0x02;
    pub(super) const END: u8 = 0x03;
    pub(super) const FULL: u8 = 0x04;
    pub(super) const SUBSECTION: u8 = 0x05;
    pub(super) const CONFIGURATION: u8 = 0x07;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const FOOTER: u8 = 0x7e;

    pub(super) const RAM: &[u8] = b"ram";
    pub(super) const RAM_VERSION: u32 = 4;

    /// Low bits of a RAM word; the rest is the byte offset in the block.
    pub(super) const FLAG_BITS: u64 = 0xfff;
    pub(super) const ZERO: u64 = 0x002;
    pub(super) const MEM_SIZE: u64 = 0x004;
    pub(super) const PAGE: u64 = 0x008;
    pub(super) const EOS: u64 = 0x010;
    pub(super) const CONTINUE: u64 = 0x020;
    pub(super) const XBZRLE: u64 = 0x040;
    pub(super) const HOOK: u64 = 0x080;
    pub(super) const COMPRESS_PAGE: u64 = 0x100;
    pub(super) const MULTIFD_FLUSH: u64 = 0x200;
}
