//! Numbers of the format (docs/qemu-stream.md), shared by parser, emitter and tests.

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
