//! Every cap on what a peer may send, in one place, each with its reason: no length from the wire drives an
//! allocation beyond these (invariant 7). Tests check both sides of each cap.

use crate::units::PAGE_SIZE;

/// Pages a [`super::frame::Kind::Pages`] or `Contents` frame may carry the content of: 1 MiB of body, large enough
/// for full-size segments and small enough that a frame holds a 100 Mbit/s edge link for under 90 ms.
pub const MAX_FRAME_PAGES: usize = 256;
/// Body bytes of any frame.
pub const MAX_BODY: usize = MAX_FRAME_PAGES * PAGE_SIZE;
/// Meta bytes of any frame: 4096 records of the longest kind (under 64 bytes each).
pub const MAX_META: usize = 256 * 1024;
/// Records in a `Pages` frame.
pub const MAX_RECORDS: usize = 4096;
/// Meta bytes of a `Hello`, all that is read of whoever calls before it has said who it is: one takes about 150.
pub const MAX_HELLO: usize = 1024;
/// Slots in one `Unkept` frame: as many as one `Pages` frame may have asked for.
pub const MAX_UNKEPT: usize = MAX_RECORDS;
/// Uniform pages one `Pages` frame may name in all: bounds what a small frame makes the target write to QEMU (nine
/// bytes a zero page).
pub const MAX_UNIFORM: u32 = 1 << 16;
/// Uniform pages of another byte than zero in one frame: QEMU's stream has no short form, each becomes 4096 bytes.
pub const MAX_FILLED: u32 = 4096;
/// RAM blocks of one VM; QEMU's `pc` has about ten, a VM full of DIMMs and NIC ROMs some hundreds.
pub const MAX_BLOCKS: usize = 4096;
/// Bytes of a block name: QEMU writes it behind one length byte.
pub const MAX_BLOCK_NAME: usize = 255;
/// Target hosts in one forward list.
pub const MAX_FORWARD: usize = 1024;
/// Bytes of a group name.
pub const MAX_GROUP_NAME: usize = 64;
/// Bytes of an abort reason, so that a peer's words fit on one line of a report.
pub const MAX_REASON: usize = 512;
/// Wire versions in one offer.
pub const MAX_VERSIONS: usize = 16;
/// Addresses in one `Need` or `Gone` frame.
pub const MAX_NEEDS: usize = 4096;
/// The largest window, as a power of two, that a receiver may grant to a zstd stream: 1 MiB. A larger one gains nothing
/// (decision 0009), and both ends of each connection hold one.
pub const WINDOW_LOG: u8 = 20;
/// The smallest that zstd has.
pub const MIN_WINDOW_LOG: u8 = 10;
/// Pages in one `Demand` frame: what a fault wants at once and some windows of prefetching; a source answers them with
/// 1 MiB at most.
pub const MAX_DEMAND: usize = 256;
/// Pages that one span of a page set covers: 1 KiB as a bitmap, so that the shorter of two forms is chosen often enough.
pub const SPAN_PAGES: u32 = 8192;
/// Spans in one frame: as many as fit its meta part at their longest (1 KiB of bits and 16 bytes of head).
pub const MAX_SPANS: usize = 248;
/// Digests in one `Hurry` or `NotHere` frame.
pub const MAX_HURRY: usize = 256;
