//! The kernel's traffic control over rtnetlink: dump, add, replace and delete qdiscs and classes, without running `tc`.
//!
//! Requests are built as netlink-packet-route messages. What the kernel answers is kept as raw attributes
//! ([`Object`]): a tree that is to be put back as it was must not pass through a parser that drops what it does not know.

// The options of the kinds we set up.
mod build;

pub use build::{byte_fifo, delete_root, htb_class, htb_root, recreate};

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkMessage, NlaBuffer,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcHeader, TcMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attribute of an extended acknowledgement: the kernel's own words.
const EXT_ACK_MESSAGE: u16 = 1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STAB: u16 = 8;
const TCA_CHAIN: u16 = 11;
/// Length of `struct tcmsg`.
const TCMSG: usize = 20;
/// Largest answer kept, bytes: a tree of some 50,000 classes.
const MAX_DUMP: usize = 32 << 20;
/// Tries of a dump that was interrupted by a change.
const DUMP_TRIES: u32 = 5;

/// The root's parent.
pub const ROOT: u32 = u32::MAX;
/// Handle and parent of ingress and clsact qdiscs, which are beside the root's tree.
pub const CLSACT: u32 = 0xffff_fff1;

/// What traffic control was asked to do, and did not.
#[derive(Debug, thiserror::Error)]
pub enum TcError {
    /// The kernel cannot be talked to.
    #[error("rtnetlink: {what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// The kernel said no.
    #[error("{what}: {source}{words} (needs CAP_NET_ADMIN; sch_htb in the kernel)")]
    Refused {
        /// What was asked.
        what: String,
        /// Its error number, as an error.
        source: io::Error,
        /// Its own words, in parentheses, or nothing.
        words: String,
    },
    /// An answer that is none.
    #[error("rtnetlink: {0}: an answer that cannot be read")]
    Grammar(&'static str),
    /// No such interface.
    #[error("there is no interface {0:?} here: see `ip link`, and core_iface in agent.toml")]
    NoInterface(String),
}

impl TcError {
    /// The kernel's error number, if it said no.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

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
    raw: Vec<u8>,
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

    fn header(&self) -> TcHeader {
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

    fn attribute(&self, kind: u16) -> Option<&[u8]> {
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

    /// Whether the kernel makes it with the first filter of its preference: u32's first table, numbered from 800.
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
            (What::Qdisc, "htb", Some(o)) => build::forget_direct_packets(o),
            (What::Filter, "u32", Some(o)) => build::forget_key_counts(o),
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

const fn align(n: usize) -> usize {
    n.next_multiple_of(4)
}

/// Walks over attributes as far as they make sense.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let nla = NlaBuffer::new_checked(rest).ok()?;
        let (kind, n) = (nla.kind(), usize::from(nla.length()));
        let value = rest.get(4..n)?;
        rest = rest.get(align(n)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    message: RouteNetlinkMessage,
    flags: u16,
    /// For errors: "HTB class 1f1a:40".
    says: String,
}

impl Change {
    fn create(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_EXCL, says }
    }

    fn replace(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_REPLACE, says }
    }

    fn delete(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: 0, says }
    }

    /// The request as it goes to the kernel, under sequence number `seq`.
    #[must_use]
    pub fn bytes(&self, seq: u32) -> Vec<u8> {
        encode(self.message.clone(), self.flags | NLM_F_REQUEST | NLM_F_ACK, seq)
    }
}

fn encode(message: RouteNetlinkMessage, flags: u16, seq: u32) -> Vec<u8> {
    let mut m = NetlinkMessage::from(message);
    m.header.flags = flags;
    m.header.sequence_number = seq;
    m.finalize();
    let mut out = vec![0; m.buffer_len()];
    m.serialize(&mut out);
    out
}

fn handle_text(h: u32) -> String {
    match h {
        ROOT => "root".to_owned(),
        _ if h & 0xffff == 0 => format!("{:x}:", h >> 16),
        _ => format!("{:x}:{:x}", h >> 16, h & 0xffff),
    }
}

/// A handle or class id as `tc` writes it.
#[must_use]
pub fn show_handle(h: u32) -> String {
    handle_text(h)
}

/// A socket to the kernel's traffic control, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Tc {
    socket: Socket,
    seq: u32,
}

impl Tc {
    /// Opens it.
    pub fn open() -> Result<Self, TcError> {
        let fail = |what| move |source| TcError::Socket { what, source };
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(fail("socket"))?;
        socket.bind_auto().map_err(fail("bind"))?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail("connect"))?;
        // Both only make errors more readable; old kernels do without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        Ok(Self { socket, seq: 0 })
    }

    /// The number of an interface.
    pub fn index(&mut self, iface: &str) -> Result<i32, TcError> {
        let mut m = LinkMessage::default();
        m.attributes.push(LinkAttribute::IfName(iface.to_owned()));
        let missing = || TcError::NoInterface(iface.to_owned());
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let answers = match self.exchange(RouteNetlinkMessage::GetLink(m), flags, "interface") {
            Ok(a) => a,
            Err(e) if e.os_error() == Some(libc::ENODEV) => return Err(missing()),
            Err(e) => return Err(e),
        };
        // struct ifinfomsg: family, pad, type, index.
        let index = answers.first().and_then(|(_, b)| b.get(4..8)).and_then(|b| b.try_into().ok());
        index.map(i32::from_ne_bytes).ok_or_else(missing)
    }

    /// All qdiscs, or all classes, or the filters of `parent`, of an interface, as the kernel lists them.
    pub fn dump(&mut self, what: What, index: i32, parent: u32) -> Result<Vec<Object>, TcError> {
        for attempt in 1.. {
            let mut m = TcMessage::with_index(index);
            m.header.parent = TcHandle::from(parent);
            let m = match what {
                What::Qdisc => RouteNetlinkMessage::GetQueueDiscipline(m),
                What::Class => RouteNetlinkMessage::GetTrafficClass(m),
                What::Filter => RouteNetlinkMessage::GetTrafficFilter(m),
            };
            match self.exchange(m, NLM_F_REQUEST | NLM_F_DUMP, "dump") {
                Ok(all) => {
                    let objects: Option<Vec<_>> =
                        all.into_iter().map(|(_, raw)| Object::from_raw(what, raw)).collect();
                    let mut objects = objects.ok_or(TcError::Grammar("dump"))?;
                    objects.retain(|o| o.index() == index);
                    return Ok(objects);
                }
                Err(e) if e.os_error() == Some(libc::EINTR) && attempt < DUMP_TRIES => {}
                Err(e) => return Err(e),
            }
        }
        Err(TcError::Grammar("dump"))
    }

    /// Has a change made.
    pub fn apply(&mut self, change: &Change) -> Result<(), TcError> {
        let flags = change.flags | NLM_F_REQUEST | NLM_F_ACK;
        self.exchange(change.message.clone(), flags, &change.says).map(drop)
    }

    /// Sends, and collects the answers (type, payload) up to the acknowledgement or the end of the dump.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        says: &str,
    ) -> Result<Vec<(u16, Vec<u8>)>, TcError> {
        self.seq = self.seq.wrapping_add(1);
        let fail = |what| move |source| TcError::Socket { what, source };
        self.socket.send(&encode(message, flags, self.seq), 0).map_err(fail("send"))?;
        let (mut out, mut held, mut torn) = (Vec::new(), 0, false);
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(fail("receive"))?;
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let m = NetlinkBuffer::new_checked(rest).map_err(|_| TcError::Grammar("answer"))?;
                let (len, seq, kind) = (m.length() as usize, m.sequence_number(), m.message_type());
                let payload = rest.get(16..len).ok_or(TcError::Grammar("answer"))?;
                // NLM_F_DUMP_INTR: something changed meanwhile.
                torn |= m.flags() & 0x10 != 0;
                // NLM_F_ACK_TLVS.
                let worded = m.flags() & 0x200 != 0;
                rest = rest.get(align(len)..).unwrap_or(&[]);
                if seq != self.seq {
                    // What a call that failed left unread.
                    continue;
                }
                match kind {
                    NLMSG_DONE if torn => return Err(refused(says, -libc::EINTR, String::new())),
                    NLMSG_DONE => return Ok(out),
                    NLMSG_ERROR => {
                        let code =
                            payload.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        if code == 0 {
                            return Ok(out);
                        }
                        // With NETLINK_CAP_ACK the request's header alone comes back before the attributes.
                        let words = payload.get(20..).filter(|_| worded).map(words).unwrap_or_default();
                        return Err(refused(says, code, words));
                    }
                    _ => {
                        held += payload.len();
                        if held > MAX_DUMP {
                            return Err(TcError::Grammar("dump (too long)"));
                        }
                        out.push((kind, payload.to_vec()));
                    }
                }
            }
        }
    }
}

fn words(attrs: &[u8]) -> String {
    let Some((_, text)) = attributes(attrs).find(|a| a.0 == EXT_ACK_MESSAGE) else { return String::new() };
    format!(" ({})", String::from_utf8_lossy(text).trim_end_matches('\0'))
}

fn refused(says: &str, code: i32, words: String) -> TcError {
    TcError::Refused { what: says.to_owned(), source: io::Error::from_raw_os_error(-code), words }
}

fn raw_attribute(kind: u16, value: &[u8]) -> TcAttribute {
    TcAttribute::Other(DefaultNla::new(kind, value.to_vec()))
}

/// The message of a change, for tests and for stand-ins of the kernel.
#[must_use]
pub fn payload(change: &Change) -> (What, bool, Object) {
    let bytes = change.bytes(0);
    let (what, delete) = match &change.message {
        RouteNetlinkMessage::NewQueueDiscipline(_) => (What::Qdisc, false),
        RouteNetlinkMessage::DelQueueDiscipline(_) => (What::Qdisc, true),
        RouteNetlinkMessage::NewTrafficClass(_) => (What::Class, false),
        RouteNetlinkMessage::DelTrafficClass(_) => (What::Class, true),
        _ => (What::Filter, false),
    };
    (what, delete, Object { what, raw: bytes[16..].to_vec() })
}

#[cfg(test)]
mod tests;
