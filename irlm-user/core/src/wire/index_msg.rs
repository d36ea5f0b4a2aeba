//! What agents and coordinator say to the index server and what it answers.
//!
//! ```text
//!  0..4      4      5..
//! ┌────────┬──────┬────────┐   length: bytes after it, kind byte included
//! │ length │ kind │ fields │   integers little-endian
//! └────────┴──────┴────────┘
//!
//! agent A, coordinator C, index X
//! C→X Open        X→C HelloOk       (the first Open makes the group, with its token)
//! A→X Hello       X→A HelloOk
//! A→X Register*   X→A Registered*   (pipelined, answered in order)
//! A→X RegisterDone                  X→A Done
//! C→X PlanNow                       X→C Planned
//! A→X PlanRequest                   X→A PlanPart*, the last one marked
//! A→X Sketches*                     (after the plan, no answer)
//! A→X ModelsRequest                 X→A ModelsPart*, the last one marked
//! A→X Late        X→A LateReply
//! C→X Close       X→C Done
//! X→ Error at any time
//! ```
//!
//! `Hello`, `Open`, `HelloOk` and `Error` keep their form in every version; the caller offers versions and the
//! server takes the newest common one. A set of hosts is one length byte and that many bytes of bits, host 0 in the
//! lowest bit of the first, the last byte not zero. "No id" is eight bytes 0xff.

use crate::digest::DIGEST_LEN;
use crate::index::{HostSet, LateItem, LateReply, Registration};
use crate::models::{Lend, SketchItem};
use crate::plan::{HostPlan, Remote};
use crate::sketch::{FEATURES, Sketch};
use crate::units::{HostIx, PageId};

// What can go wrong.
mod errors;
// Reading and writing of single fields.
mod fields;
// Caps.
mod limits;
// A group's secret.
mod token;

pub use errors::{ErrorCode, IndexMsgError};
pub use limits::{
    MAX_BATCH, MAX_BODY, MAX_FIRST_BODY, MAX_GROUP_NAME, MAX_SET_BYTES, MAX_TEXT, MAX_VERSIONS,
};
pub use token::Token;

use fields::{Fields, Put};

/// Versions spoken here, newest first.
pub const VERSIONS: &[u16] = &[1];

/// One message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IndexMsg {
    /// An agent's first message.
    Hello {
        /// Versions on offer.
        versions: Vec<u16>,
        /// Which group.
        group: String,
        /// The group's secret.
        token: Token,
        /// Which source host calls.
        host: HostIx,
    },
    /// The coordinator's first message; makes the group if it does not exist.
    Open {
        /// Versions on offer.
        versions: Vec<u16>,
        /// Which group.
        group: String,
        /// The group's secret.
        token: Token,
        /// Source hosts, numbered from 0.
        source_hosts: u16,
        /// Target hosts, numbered from 0.
        target_hosts: u16,
    },
    /// The version taken.
    HelloOk {
        /// One of those offered.
        version: u16,
    },
    /// What the caller holds.
    Register {
        /// Repeated in the answer.
        seq: u32,
        /// At most [`MAX_BATCH`].
        batch: Vec<Registration>,
    },
    /// The ids of a batch, in its order.
    Registered {
        /// The batch's.
        seq: u32,
        /// `None`: the content is host-local.
        ids: Vec<Option<PageId>>,
    },
    /// The caller has registered all it will.
    RegisterDone {
        /// Pages it will send that it did not register, or that got no id.
        own_unique_pages: u64,
    },
    /// Asks for the caller's part of the plan.
    PlanRequest {
        /// How long the caller will wait for it, in milliseconds.
        wait_ms: u32,
    },
    /// A piece of the caller's part.
    PlanPart {
        /// Whether this is the last one.
        last: bool,
        /// At most [`MAX_BATCH`] entries in both lists together.
        piece: HostPlan,
    },
    /// Contents that appeared after the plan and were sent.
    Late {
        /// Repeated in the answer.
        seq: u32,
        /// At most [`MAX_BATCH`].
        items: Vec<LateItem>,
    },
    /// The answers, in the order of the report.
    LateReply {
        /// The report's.
        seq: u32,
        /// One an item.
        replies: Vec<LateReply>,
    },
    /// Plan without waiting any longer; source hosts that are not done are left out.
    PlanNow {
        /// Source hosts to leave out even if they are done.
        missing: HostSet,
    },
    /// The plan is made.
    Planned {
        /// Source hosts in it.
        sources: HostSet,
        /// Distinct contents registered.
        digests: u64,
        /// Of these with a carrier.
        shared: u64,
    },
    /// Forget the group.
    Close,
    /// Done as asked.
    Done,
    /// Not done.
    Error {
        /// Why, for programs.
        code: ErrorCode,
        /// Why, for people: one line.
        text: String,
    },
    /// What the caller's contents look like that it alone has.
    Sketches {
        /// Their trust domain.
        domain: u16,
        /// At most [`MAX_BATCH`].
        items: Vec<SketchItem>,
    },
    /// The caller has reported all its sketches; asks for its part of the models.
    ModelsRequest {
        /// Contents it can borrow.
        room: u32,
        /// How long the caller will wait for hosts that still report, in milliseconds.
        wait_ms: u32,
    },
    /// A piece of the caller's part.
    ModelsPart {
        /// Whether this is the last one.
        last: bool,
        /// Contents that others lend to the caller; the same in every piece.
        borrows: u32,
        /// What it lends, at most [`MAX_BATCH`].
        lend: Vec<Lend>,
    },
}

impl IndexMsg {
    /// The message's name in errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        NAMES.get(usize::from(self.kind())).copied().unwrap_or("?")
    }

    /// An error message, its text cut to [`MAX_TEXT`] bytes.
    #[must_use]
    pub fn error(code: ErrorCode, text: &str) -> Self {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self::Error { code, text: text[..end].to_owned() }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Hello { .. } => 1,
            Self::Open { .. } => 2,
            Self::HelloOk { .. } => 3,
            Self::Register { .. } => 4,
            Self::Registered { .. } => 5,
            Self::RegisterDone { .. } => 6,
            Self::PlanRequest { .. } => 7,
            Self::PlanPart { .. } => 8,
            Self::Late { .. } => 9,
            Self::LateReply { .. } => 10,
            Self::PlanNow { .. } => 11,
            Self::Planned { .. } => 12,
            Self::Close => 13,
            Self::Done => 14,
            Self::Error { .. } => 15,
            Self::Sketches { .. } => 16,
            Self::ModelsRequest { .. } => 17,
            Self::ModelsPart { .. } => 18,
        }
    }

    /// Appends the message to `out`. On an error, which means that a cap is passed, `out` is as before.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), IndexMsgError> {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.push(self.kind());
        let fields = self.encode_fields(&mut Put { out, kind: self.name() });
        let body = out.len() - start - 4;
        let cap = MAX_BODY;
        let done = fields.and_then(|()| match u32::try_from(body) {
            Ok(len) if body <= cap => Ok(len),
            len => Err(IndexMsgError::Length { len: len.unwrap_or(u32::MAX), cap }),
        });
        match done {
            Ok(len) => out[start..start + 4].copy_from_slice(&len.to_le_bytes()),
            Err(_) => out.truncate(start),
        }
        done.map(|_| ())
    }

    fn encode_fields(&self, p: &mut Put<'_>) -> Result<(), IndexMsgError> {
        match self {
            Self::Hello { versions, group, token, host } => {
                p.first(versions, group, token)?;
                p.u16(host.0);
            }
            Self::Open { versions, group, token, source_hosts, target_hosts } => {
                p.first(versions, group, token)?;
                p.u16(*source_hosts);
                p.u16(*target_hosts);
            }
            Self::HelloOk { version } => p.u16(*version),
            Self::Register { seq, batch } => {
                p.u32(*seq);
                p.list("registrations", batch, Put::registration)?;
            }
            Self::Registered { seq, ids } => {
                p.u32(*seq);
                p.list("ids", ids, |p, id| p.maybe_id(*id))?;
            }
            Self::RegisterDone { own_unique_pages } => p.u64(*own_unique_pages),
            Self::PlanRequest { wait_ms } => p.u32(*wait_ms),
            Self::PlanPart { last, piece } => {
                p.out.push(u8::from(*last));
                p.count("plan entries", piece.carry.len() + piece.remote.len())?;
                p.count("carried contents", piece.carry.len())?;
                piece.carry.iter().for_each(|c| p.carry(c));
                piece.remote.iter().for_each(|r| p.remote(r));
            }
            Self::Late { seq, items } => {
                p.u32(*seq);
                p.list("late contents", items, Put::late)?;
            }
            Self::LateReply { seq, replies } => {
                p.u32(*seq);
                p.list("late replies", replies, |p, r| {
                    p.maybe_id(r.id);
                    p.hosts(&r.delivered);
                })?;
            }
            Self::PlanNow { missing } => p.hosts(missing),
            Self::Planned { sources, digests, shared } => {
                p.hosts(sources);
                p.u64(*digests);
                p.u64(*shared);
            }
            Self::Close | Self::Done => {}
            Self::Error { code, text } => {
                p.u16(code.number());
                p.text(text)?;
            }
            Self::Sketches { domain, items } => {
                p.u16(*domain);
                p.list("sketches", items, Put::sketch)?;
            }
            Self::ModelsRequest { room, wait_ms } => {
                p.u32(*room);
                p.u32(*wait_ms);
            }
            Self::ModelsPart { last, borrows, lend } => {
                p.out.push(u8::from(*last));
                p.u32(*borrows);
                p.list("models", lend, |p, l| {
                    p.carry(&l.carry);
                    p.hosts(&l.to);
                })?;
            }
        }
        Ok(())
    }

    /// Reads a message from its kind byte and fields.
    pub fn decode(body: &[u8]) -> Result<Self, IndexMsgError> {
        let cap = MAX_BODY;
        let (&tag, rest) = body.split_first().ok_or(IndexMsgError::Length { len: 0, cap })?;
        let kind = NAMES.get(usize::from(tag)).copied().filter(|_| tag != 0);
        let mut f = Fields { rest, kind: kind.ok_or(IndexMsgError::UnknownKind(tag))? };
        let msg = Self::decode_fields(tag, &mut f)?;
        match f.rest.len() {
            0 => Ok(msg),
            extra => Err(IndexMsgError::Trailing { kind: f.kind, extra }),
        }
    }

    fn decode_fields(tag: u8, f: &mut Fields<'_>) -> Result<Self, IndexMsgError> {
        Ok(match tag {
            1 => {
                let (versions, group, token) = f.first()?;
                Self::Hello { versions, group, token, host: f.host()? }
            }
            2 => {
                let (versions, group, token) = f.first()?;
                Self::Open { versions, group, token, source_hosts: f.side()?, target_hosts: f.side()? }
            }
            3 => Self::HelloOk { version: f.u16()? },
            4 => {
                let seq = f.u32()?;
                let batch = f.list("registrations", DIGEST_LEN + 5, |f| {
                    let (digest, pages) = (f.digest()?, f.u32()?);
                    Ok(Registration { digest, targets: f.hosts()?, pages })
                })?;
                Self::Register { seq, batch }
            }
            5 => Self::Registered { seq: f.u32()?, ids: f.list("ids", 8, Fields::maybe_id)? },
            6 => Self::RegisterDone { own_unique_pages: f.u64()? },
            7 => Self::PlanRequest { wait_ms: f.u32()? },
            8 => {
                let last = f.flag()?;
                let all = f.count("plan entries")?;
                let carry = f.list("carried contents", DIGEST_LEN + 11, Fields::carry)?;
                let others = all.checked_sub(carry.len()).ok_or(f.bad("count of carried contents"))?;
                let remote = f.items(others, DIGEST_LEN + 11, |f| {
                    let (digest, id) = (f.digest()?, f.id()?);
                    Ok(Remote { digest, id, carrier: f.host()?, targets: f.hosts()? })
                })?;
                Self::PlanPart { last, piece: HostPlan { carry, remote } }
            }
            9 => {
                let seq = f.u32()?;
                let items = f.list("late contents", DIGEST_LEN + 3, |f| {
                    Ok(LateItem { digest: f.digest()?, target: f.host()?, kept: f.flag()? })
                })?;
                Self::Late { seq, items }
            }
            10 => {
                let seq = f.u32()?;
                let replies = f.list("late replies", 9, |f| {
                    Ok(LateReply { id: f.maybe_id()?, delivered: f.hosts()? })
                })?;
                Self::LateReply { seq, replies }
            }
            11 => Self::PlanNow { missing: f.hosts()? },
            12 => Self::Planned { sources: f.hosts()?, digests: f.u64()?, shared: f.u64()? },
            13 => Self::Close,
            14 => Self::Done,
            15 => Self::Error { code: ErrorCode::from_number(f.u16()?), text: f.text()? },
            16 => {
                let domain = f.u16()?;
                let items = f.list("sketches", DIGEST_LEN + 2 + 4 * FEATURES, |f| {
                    let (digest, target) = (f.digest()?, f.host()?);
                    let mut features = [0; FEATURES];
                    for feature in &mut features {
                        *feature = f.u32()?;
                    }
                    Ok(SketchItem { digest, target, sketch: Sketch::from_features(features) })
                })?;
                Self::Sketches { domain, items }
            }
            17 => Self::ModelsRequest { room: f.u32()?, wait_ms: f.u32()? },
            18 => {
                let (last, borrows) = (f.flag()?, f.u32()?);
                let lend = f.list("models", DIGEST_LEN + 12, |f| {
                    let (carry, to) = (f.carry()?, f.hosts()?);
                    if to.is_empty() { Err(f.bad("set of borrowers")) } else { Ok(Lend { carry, to }) }
                })?;
                Self::ModelsPart { last, borrows, lend }
            }
            other => return Err(IndexMsgError::UnknownKind(other)),
        })
    }
}

/// By kind byte.
const NAMES: [&str; 19] = [
    "(none)",
    "Hello",
    "Open",
    "HelloOk",
    "Register",
    "Registered",
    "RegisterDone",
    "PlanRequest",
    "PlanPart",
    "Late",
    "LateReply",
    "PlanNow",
    "Planned",
    "Close",
    "Done",
    "Error",
    "Sketches",
    "ModelsRequest",
    "ModelsPart",
];

/// The newest version that both sides speak.
#[must_use]
pub fn choose_version(offered: &[u16]) -> Option<u16> {
    VERSIONS.iter().copied().filter(|v| offered.contains(v)).max()
}

/// Cuts a byte stream into messages. Holds at most one message of the cap and what was fed behind it.
#[derive(Debug)]
pub struct Decoder {
    buf: Vec<u8>,
    at: usize,
    cap: usize,
}

impl Decoder {
    /// A decoder that takes message bodies of up to `cap` bytes: [`MAX_FIRST_BODY`] before the peer is known,
    /// [`MAX_BODY`] after.
    #[must_use]
    pub fn new(cap: usize) -> Self {
        Self { buf: Vec::new(), at: 0, cap }
    }

    /// Changes the cap for the messages that follow.
    pub fn set_cap(&mut self, cap: usize) {
        self.cap = cap;
    }

    /// Takes bytes from the peer.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.buf.drain(..self.at);
            self.at = 0;
        }
        self.buf.extend_from_slice(bytes);
    }

    /// Whether a message has begun and not ended.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.at < self.buf.len()
    }

    /// The next whole message; `None` if more bytes are needed. After an error the stream is of no more use.
    pub fn next_msg(&mut self) -> Result<Option<IndexMsg>, IndexMsgError> {
        let rest = &self.buf[self.at..];
        let Some((head, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_le_bytes(*head);
        let body = usize::try_from(len).unwrap_or(usize::MAX);
        if body == 0 || body > self.cap {
            return Err(IndexMsgError::Length { len, cap: self.cap });
        }
        let Some(body) = rest.get(..body) else { return Ok(None) };
        let msg = IndexMsg::decode(body)?;
        self.at += 4 + body.len();
        Ok(Some(msg))
    }
}

#[cfg(test)]
mod tests;
