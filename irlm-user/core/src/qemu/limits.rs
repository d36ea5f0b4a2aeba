//! What no stream exceeds: bounds of what is read, and lengths that always suffice.

use crate::units::PAGE_SIZE;

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
/// Longest return-path payload taken; the longest defined one (a page request with a block name)
/// has 268 bytes.
pub const MAX_RP_PAYLOAD: usize = 512;
/// [`Parser::parse`](super::Parser::parse) always makes progress on a buffer of this many bytes: a
/// page record with a block name.
pub const MAX_LOOKAHEAD: usize = 8 + 1 + MAX_NAME + PAGE_SIZE;
/// What [`Emitter::page_header`](super::Emitter::page_header) or
/// [`Emitter::zero`](super::Emitter::zero) appends at most: section header, word, name, fill byte.
pub const MAX_RECORD_HEADER: usize = 5 + 8 + 1 + MAX_NAME + 1;
