//! Qdiscs, classes and filters as the kernel tells them, kept as raw attributes.

use super::options::{self, align};
use netlink_packet_core::NlaBuffer;
use netlink_packet_route::tc::TcHeader;

pub(super) const TCA_KIND: u16 = 1;
pub(super) const TCA_OPTIONS: u16 = 2;
pub(super) const TCA_STATS2: u16 = 7;
pub(super) const TCA_STAB: u16 = 8;
pub(super) const TCA_CHAIN: u16 = 11;
/// Length of `struct tcmsg`.
const TCMSG: usize = 20;
/// What kind of thing an [`Object`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A queueing discipline.
    Qdisc,
    /// A class of one.
    Class,
    /// A filter of one.
    Filter,
}

/// A qdisc, class or filter as the kernel told it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Which of the three.
    pub what: What,
    /// The message behind its netlink header: `struct tcmsg` and attributes.
    pub(super) raw: Vec<u8>,
}

impl Object {
    /// From the message behind its netlink header; `None` if it cannot be one.
    #[must_use]
    pub fn from_raw(what: What, raw: Vec<u8>) -> Option<Self> {
        TcHeader::parse(&raw).ok()?;
        let o = Self { what, raw };
        // Every attribute can be stepped over.
        let (mut rest, mut steps) = (o.raw.get(TCMSG..)?, 0);
        while rest.len() >= 4 {
            let n = usize::from(NlaBuffer::new_checked(rest).ok()?.length());
            rest = rest.get(align(n)..).unwrap_or(&[]);
            steps += 1;
        }
        (steps > 0).then_some(o)
    }

    /// The bytes that [`Object::from_raw`] takes.
    #[must_use]
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    pub(super) fn header(&self) -> TcHeader {
        TcHeader::parse(&self.raw).unwrap_or_default()
    }

    /// Its interface's number.
    #[must_use]
    pub fn index(&self) -> i32 {
        self.header().index
    }

    /// Its handle or class id.
    #[must_use]
    pub fn handle(&self) -> u32 {
        self.header().handle.into()
    }

    /// Whom it hangs on.
    #[must_use]
    pub fn parent(&self) -> u32 {
        self.header().parent.into()
    }

    /// A class's own qdisc; a filter's preference and protocol.
    #[must_use]
    pub fn info(&self) -> u32 {
        self.header().info
    }

    fn attributes(&self) -> impl Iterator<Item = (u16, &[u8])> {
        attributes(self.raw.get(TCMSG..).unwrap_or(&[]))
    }

    pub(super) fn attribute(&self, kind: u16) -> Option<&[u8]> {
        self.attributes().find(|a| a.0 == kind).map(|a| a.1)
    }

    /// "htb".
    #[must_use]
    pub fn kind(&self) -> &str {
        let bytes = self.attribute(TCA_KIND).unwrap_or(&[]);
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        std::str::from_utf8(&bytes[..end]).unwrap_or("?")
    }

    /// What its kind was told.
    #[must_use]
    pub fn options(&self) -> Option<&[u8]> {
        self.attribute(TCA_OPTIONS)
    }

    /// Whether the kernel makes it with the first filter of its preference: u32's first table,
    /// numbered from 800.
    #[must_use]
    pub fn comes_by_itself(&self) -> bool {
        let h = self.handle();
        self.what == What::Filter && self.kind() == "u32" && h >> 20 >= 0x800 && h & 0xf_ffff == 0
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut s = Stats::default();
        let u32_at = |b: &[u8], at: usize| {
            b.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        for (kind, b) in attributes(self.attribute(TCA_STATS2).unwrap_or(&[])) {
            match kind {
                // struct gnet_stats_basic
                1 => {
                    s.bytes = b.get(..8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
                    s.packets = u32_at(b, 8);
                }
                // struct gnet_stats_queue
                3 => (s.backlog_packets, s.backlog, s.dropped) = (u32_at(b, 0), u32_at(b, 4), u32_at(b, 8)),
                _ => {}
            }
        }
        s
    }

    /// What makes it what it is: everything that is not counted, timed, or the interface's number.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let mut options = self.options().map(<[u8]>::to_vec);
        match (self.what, self.kind(), options.as_mut()) {
            (What::Qdisc, "htb", Some(o)) => options::forget_direct_packets(o),
            (What::Filter, "u32", Some(o)) => options::forget_key_counts(o),
            _ => {}
        }
        Identity {
            what: self.what,
            handle: self.handle(),
            parent: self.parent(),
            // A qdisc's is a reference count, which depends on the device's queues.
            info: if self.what == What::Qdisc { 0 } else { self.info() },
            kind: self.kind().to_owned(),
            options,
            table: self.attribute(TCA_STAB).map(<[u8]>::to_vec),
        }
    }
}

/// See [`Object::identity`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Identity {
    what: What,
    parent: u32,
    handle: u32,
    info: u32,
    kind: String,
    options: Option<Vec<u8>>,
    table: Option<Vec<u8>>,
}

impl PartialOrd for What {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for What {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (*self as u8).cmp(&(*other as u8))
    }
}

/// What the kernel counted of a qdisc or class.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Bytes sent.
    pub bytes: u64,
    /// Packets sent.
    pub packets: u32,
    /// Packets dropped.
    pub dropped: u32,
    /// Bytes that wait.
    pub backlog: u32,
    /// Packets that wait.
    pub backlog_packets: u32,
}

/// Walks over attributes as far as they make sense.
pub(super) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let nla = NlaBuffer::new_checked(rest).ok()?;
        let (kind, n) = (nla.kind(), usize::from(nla.length()));
        let value = rest.get(4..n)?;
        rest = rest.get(align(n)..).unwrap_or(&[]);
        Some((kind, value))
    })
}
