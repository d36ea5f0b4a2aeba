//! The frame: a 12-byte header, a *meta* part that is parsed and a *body* that is only carried (page contents, QEMU's
//! own bytes), so that a sender can gather a body from where it lies and a receiver can scatter it without a look.
//!
//! ```text
//!  0      1       2..4      4..8       8..12      12..12+meta     …
//! ┌──────┬───────┬─────────┬──────────┬──────────┬──────────────┬──────┐
//! │ kind │ codec │ 0       │ meta len │ body len │ meta         │ body │   integers little-endian
//! └──────┴───────┴─────────┴──────────┴──────────┴──────────────┴──────┘
//! ```
//!
//! In plain text 16 bytes of seal follow each frame but Hello (`core::seal`).
//!
//! A VM connection, source agent (S) to target agent (T):
//!
//! ```text
//! S→T Hello            T→S HelloOk
//! S→T Verbatim*, Blocks, (Pages | Verbatim)*, Stopped, Pages*, RamEnd, Verbatim*
//! T→S ReturnPath*, Need*, Waiting*, Taken*, Unkept*  S→T Contents | Gone   (answers to Need)
//! T→S Word::Loaded   S→T Word::GivenUp   T→S Word::Runs
//! T→S Word::Refused   S→T Word::Aborted | Word::Gone   (its QEMU does not let it run)
//! either: Heartbeat at any time; Word::Aborted ends the attempt
//! ```
//!
//! With post-copy, after `Stopped`: `Switch`+, Verbatim*; T→S Word::Ready; S→T Word::GivenUp; then `Pages` in any order,
//! T→S `Demand`*, and at the end T→S Word::Filled.

use super::limits::{MAX_BODY, MAX_META};

/// Bytes in a frame header.
pub const HEADER_LEN: usize = 12;

/// Body as it is. Further codecs (delta) have their own numbers when they come.
pub const CODEC_RAW: u8 = 0;
/// Body is compressed contents (`core::squeeze`), by itself. This and the next two only in `Pages` and `Contents`,
/// whose raw length is known.
pub const CODEC_ZSTD: u8 = 1;
/// As before, and begins the connection's zstd stream anew.
pub const CODEC_ZSTD_BEGIN: u8 = 2;
/// As before, and goes on with that stream.
pub const CODEC_ZSTD_MORE: u8 = 3;

/// Why bytes from a peer are not a frame, or not one that may stand here.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum WireError {
    /// The first byte names no frame kind.
    #[error("unknown frame kind {0}: the peer speaks another protocol or the stream is damaged")]
    UnknownKind(u8),
    /// The codec byte is not one this version reads.
    #[error("frame {kind:?} has codec {codec}, which was not agreed on")]
    UnknownCodec {
        /// The frame.
        kind: Kind,
        /// Its codec byte.
        codec: u8,
    },
    /// A length is above its cap.
    #[error("frame {kind:?}: {what} is {len}, above the cap of {cap}")]
    TooLong {
        /// The frame.
        kind: Kind,
        /// Which length.
        what: &'static str,
        /// What the peer said.
        len: u64,
        /// The cap in `core::wire::limits`.
        cap: u64,
    },
    /// The meta part ended inside a field.
    #[error("frame {0:?} ends inside a field")]
    Short(Kind),
    /// A field's value is not allowed.
    #[error("frame {kind:?}: bad {what}")]
    Bad {
        /// The frame.
        kind: Kind,
        /// Which field.
        what: &'static str,
    },
    /// A frame that is fine by itself, but not now.
    #[error("frame {0:?} is out of place here")]
    Unexpected(Kind),
    /// It is not the frame that was due: it was changed, lost, repeated or moved on its way (`core::seal`).
    #[error(
        "frame {number} of the connection, which came as {kind:?}, is not what was sent: it was damaged, lost, repeated or \
         moved on the way"
    )]
    Seal {
        /// What it seems to be.
        kind: Kind,
        /// Which frame of its direction, from 0.
        number: u64,
    },
    /// None of the offered versions is spoken here.
    #[error("no common wire version: peer offers {offered:?}, this side speaks {spoken:?}")]
    NoVersion {
        /// The peer's offer.
        offered: Vec<u16>,
        /// Ours.
        spoken: Vec<u16>,
    },
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $tag:literal, body: $body:literal;)*) => {
        /// What a frame is. Zero is reserved as invalid; an unknown tag is an error.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $tag,)* }
        impl Kind {
            /// All kinds, in tag order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
            /// The kind with this tag.
            pub fn from_tag(tag: u8) -> Result<Self, WireError> {
                match tag { $($tag => Ok(Self::$name),)* other => Err(WireError::UnknownKind(other)) }
            }
            /// Whether a body may follow the meta part.
            #[must_use]
            pub fn has_body(self) -> bool { match self { $(Self::$name => $body,)* } }
        }
    };
}

kinds! {
    /// First frame of a connection: who calls, for which group, and the wire versions on offer.
    Hello = 1, body: false;
    /// The version chosen, newest common one.
    HelloOk = 2, body: false;
    /// QEMU stream bytes outside guest RAM, in order.
    Verbatim = 3, body: true;
    /// The RAM block list of this VM, once, before any page.
    Blocks = 4, body: false;
    /// Records for guest pages, in stream order; the body holds the contents they announce.
    Pages = 5, body: true;
    /// Shared contents for the store (push, forward, or the answer to a `Need`).
    Contents = 6, body: true;
    /// Contents that the carrier cannot carry after all.
    Voids = 7, body: false;
    /// The VM is stopped at the source; what follows counts as downtime.
    Stopped = 8, body: false;
    /// Every page record has been sent.
    RamEnd = 9, body: false;
    /// QEMU return-path bytes, target to source.
    ReturnPath = 10, body: true;
    /// Pages whose content the target's waiting list asks the VM's own source for.
    Need = 11, body: false;
    /// Needs whose content the page no longer holds: a newer version is on its way in the stream.
    Gone = 12, body: false;
    /// A word of the handover.
    Word = 13, body: false;
    /// Nothing but life: sent when a side has been silent for a while.
    Heartbeat = 14, body: false;
    /// How many pages of the VM wait for content at the target, for the source to hold the stream's end back.
    Waiting = 15, body: false;
    /// Post-copy: the VM is stopped for good, and these of its pages are still to come; all others stay as they are.
    Switch = 16, body: false;
    /// Post-copy: pages that the target wants next, those that a vCPU waits for first.
    Demand = 17, body: false;
    /// Post-copy, first on a connection after a lost one: the pages that the target still has no content for.
    Lacks = 18, body: false;
    /// Between target hosts: contents that a vCPU waits for, to be forwarded before all others.
    Hurry = 19, body: false;
    /// Answers a `Hurry`: contents that are not here.
    NotHere = 20, body: false;
    /// How many `Pages` frames the target has taken in, so that other connections' pages may refer to what they brought.
    Taken = 21, body: false;
    /// Slots that the source wanted a content in which is not at this target host: what refers to them cannot be made.
    Unkept = 22, body: false;
}

/// A checked frame header: lengths are within the caps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// How the body is coded.
    pub codec: u8,
    /// Meta bytes.
    pub meta_len: u32,
    /// Body bytes (as they are on the wire).
    pub body_len: u32,
}

impl Header {
    /// A raw-bodied frame's header.
    #[must_use]
    pub fn new(kind: Kind, meta_len: usize, body_len: usize) -> Self {
        debug_assert!(meta_len <= MAX_META && body_len <= MAX_BODY);
        Self { kind, codec: CODEC_RAW, meta_len: meta_len as u32, body_len: body_len as u32 }
    }

    /// The same with a body that is coded so.
    #[must_use]
    pub fn coded(self, codec: u8) -> Self {
        Self { codec, ..self }
    }

    /// Its 12 bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[0] = self.kind as u8;
        b[1] = self.codec;
        b[4..8].copy_from_slice(&self.meta_len.to_le_bytes());
        b[8..12].copy_from_slice(&self.body_len.to_le_bytes());
        b
    }

    /// Reads and checks 12 bytes from a peer.
    pub fn decode(b: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let kind = Kind::from_tag(b[0])?;
        let compressible = matches!(kind, Kind::Pages | Kind::Contents);
        if b[1] > if compressible { CODEC_ZSTD_MORE } else { CODEC_RAW } {
            return Err(WireError::UnknownCodec { kind, codec: b[1] });
        }
        if b[2] != 0 || b[3] != 0 {
            return Err(WireError::Bad { kind, what: "reserved bytes" });
        }
        let meta_len = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        let body_len = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        for (what, len, cap) in
            [("meta", meta_len, MAX_META), ("body", body_len, if kind.has_body() { MAX_BODY } else { 0 })]
        {
            if len as usize > cap {
                return Err(WireError::TooLong { kind, what, len: len.into(), cap: cap as u64 });
            }
        }
        Ok(Self { kind, codec: b[1], meta_len, body_len })
    }

    /// Meta and body bytes together.
    #[must_use]
    pub fn payload_len(self) -> usize {
        self.meta_len as usize + self.body_len as usize
    }
}

/// Reads fields out of a meta part; each failure names the frame.
#[derive(Debug)]
pub struct MetaReader<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> MetaReader<'a> {
    /// A reader over the meta part of a frame of `kind`.
    #[must_use]
    pub fn new(kind: Kind, meta: &'a [u8]) -> Self {
        Self { kind, rest: meta }
    }
    /// Whether everything has been read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
    /// Bytes not read yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rest.len()
    }
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (a, b) = self.rest.split_at_checked(n).ok_or(WireError::Short(self.kind))?;
        self.rest = b;
        Ok(a)
    }
    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (a, b) = self.rest.split_first_chunk::<N>().ok_or(WireError::Short(self.kind))?;
        self.rest = b;
        Ok(*a)
    }
    /// A byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }
    /// A little-endian u16.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// A little-endian u32.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// A little-endian u64.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// A LEB128 number of at most 32 bits.
    pub fn varint(&mut self) -> Result<u32, WireError> {
        let mut v = 0u64;
        for shift in (0..35).step_by(7) {
            let b = self.u8()?;
            v |= u64::from(b & 0x7f) << shift;
            if b & 0x80 == 0 {
                return u32::try_from(v).map_err(|_| self.bad("varint"));
            }
        }
        Err(self.bad("varint"))
    }
    /// A count as varint, checked against its cap.
    pub fn count(&mut self, what: &'static str, cap: usize) -> Result<usize, WireError> {
        let n = self.varint()?;
        if n as usize > cap {
            return Err(WireError::TooLong { kind: self.kind, what, len: n.into(), cap: cap as u64 });
        }
        Ok(n as usize)
    }
    /// A counted UTF-8 string, checked against its cap.
    pub fn string(&mut self, what: &'static str, cap: usize) -> Result<&'a str, WireError> {
        let n = self.count(what, cap)?;
        let b = self.bytes(n)?;
        std::str::from_utf8(b).map_err(|_| self.bad(what))
    }
    /// Fails unless everything has been read.
    pub fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.bad("trailing bytes")) }
    }
    /// The error for a field of this frame.
    #[must_use]
    pub fn bad(&self, what: &'static str) -> WireError {
        WireError::Bad { kind: self.kind, what }
    }
}

/// Appends a LEB128 number.
pub fn put_varint(out: &mut Vec<u8>, mut v: u32) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

/// Appends a counted string.
pub fn put_string(out: &mut Vec<u8>, s: &str) {
    put_varint(out, s.len() as u32);
    out.extend_from_slice(s.as_bytes());
}
