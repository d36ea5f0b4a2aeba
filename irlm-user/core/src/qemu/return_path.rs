//! The return path, target QEMU to source QEMU: cut into messages, so that the target agent can hold back the one
//! that makes the source give up its VM (SHUT) until the handover is decided.

use super::MAX_RP_PAYLOAD;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const RECV_BITMAP: u16 = 5;

/// What a message says, as far as IRLM acts on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RpKind {
    /// The target has loaded everything (`true`) or failed (`false`). The source ends the migration on it.
    Shut {
        /// Whether the code was 0.
        ok: bool,
    },
    /// Answer to a PING command.
    Pong(u32),
    /// Any other message, by its type; passed on unread.
    Other(u16),
}

/// One message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RpMessage<'a> {
    /// What it says.
    pub kind: RpKind,
    /// All its bytes, header included, to be passed on as they are.
    pub bytes: &'a [u8],
}

/// Why the return path is refused. `at` is the byte offset in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpError {
    /// A payload over [`MAX_RP_PAYLOAD`].
    #[error(
        "return path offset {at}: message type {kind} of {len} bytes, more than {MAX_RP_PAYLOAD}; the target QEMU's \
         bytes are damaged"
    )]
    Length {
        /// Where.
        at: u64,
        /// Message type.
        kind: u16,
        /// Announced length.
        len: u16,
    },
    /// SHUT or PONG without its four bytes.
    #[error(
        "return path offset {at}: message type {kind} of {len} bytes, not 4; the target QEMU's bytes are damaged"
    )]
    Fixed {
        /// Where.
        at: u64,
        /// Message type.
        kind: u16,
        /// Announced length.
        len: u16,
    },
    /// A received-pages bitmap, sent only when a post-copy migration is recovered.
    #[error(
        "return path offset {at}: post-copy recovery is not carried; do not use migrate-recover with irlm"
    )]
    Recovery {
        /// Where.
        at: u64,
    },
}

/// Cuts the return path into messages. Holds no bytes itself.
#[derive(Debug, Default)]
pub struct RpParser {
    offset: u64,
}

impl RpParser {
    /// A parser at the start of a connection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes consumed so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Hands every whole message in `buf` to `sink`, in order, and returns how many bytes they took; the caller
    /// keeps the rest and calls again with more behind it. Progress is certain once `4 + MAX_RP_PAYLOAD` bytes are
    /// there. When `sink` fails, the messages before the failing one count as consumed ([`offset`](Self::offset)).
    pub fn parse<'a, E: From<RpError>>(
        &mut self,
        buf: &'a [u8],
        sink: &mut impl FnMut(RpMessage<'a>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut rest = buf;
        while let Some(([k0, k1, l0, l1], after)) = rest.split_first_chunk::<4>() {
            let (kind, len) = (u16::from_be_bytes([*k0, *k1]), u16::from_be_bytes([*l0, *l1]));
            let at = self.offset;
            if kind == RECV_BITMAP {
                return Err(RpError::Recovery { at }.into());
            }
            if usize::from(len) > MAX_RP_PAYLOAD {
                return Err(RpError::Length { at, kind, len }.into());
            }
            if matches!(kind, SHUT | PONG) && len != 4 {
                return Err(RpError::Fixed { at, kind, len }.into());
            }
            let Some((payload, next)) = after.split_at_checked(usize::from(len)) else { break };
            let value = payload.first_chunk::<4>().map_or(0, |v| u32::from_be_bytes(*v));
            let kind = match kind {
                SHUT => RpKind::Shut { ok: value == 0 },
                PONG => RpKind::Pong(value),
                other => RpKind::Other(other),
            };
            let size = 4 + payload.len();
            sink(RpMessage { kind, bytes: &rest[..size] })?;
            self.offset += size as u64;
            rest = next;
        }
        Ok(buf.len() - rest.len())
    }
}

/// The SHUT message with code 0 (`ok`) or 1.
#[must_use]
pub fn shut(ok: bool) -> [u8; 8] {
    [0, 1, 0, 4, 0, 0, 0, u8::from(!ok)]
}
