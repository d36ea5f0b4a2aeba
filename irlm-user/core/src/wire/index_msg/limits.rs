//! Caps of what is said to the index server and by it.

use crate::digest::DIGEST_LEN;
use crate::index::MAX_HOSTS;

/// Bytes of a group's name, which is printable UTF-8.
pub const MAX_GROUP_NAME: usize = 64;
/// Versions in one offer.
pub const MAX_VERSIONS: usize = 16;
/// Digests, ids, late reports, sketches, plan entries or models in one message: large enough to
/// hide a round trip behind the work on one batch (32 MiB of guest memory), small enough that the
/// longest message stays below 4 MiB.
pub const MAX_BATCH: usize = 8192;
/// Bytes of an error's text: one line of a report.
pub const MAX_TEXT: usize = 256;
/// Bytes of bits in a set of hosts.
pub const MAX_SET_BYTES: usize = MAX_HOSTS as usize / 8;
/// Body bytes (kind byte and fields) of the longest message: a `ModelsPart`.
pub const MAX_BODY: usize = 1 + 1 + 4 + 2 + MAX_BATCH * (DIGEST_LEN + 8 + 2 + 2 * (1 + MAX_SET_BYTES));
const _: () = assert!(MAX_BODY < 4 << 20);
/// Body bytes of the longest first message: what a peer may make us hold before it has shown a
/// token.
pub const MAX_FIRST_BODY: usize = 512;
const _: () = assert!(1 + 1 + 2 * MAX_VERSIONS + 1 + MAX_GROUP_NAME + 32 + 4 <= MAX_FIRST_BODY);
const _: () = assert!(1 + 2 + 2 + MAX_TEXT <= MAX_FIRST_BODY);
