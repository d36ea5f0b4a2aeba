//! The kernel's traffic control over rtnetlink: dump, add, replace and delete qdiscs and classes, without running `tc`.
//!
//! Requests are built as netlink-packet-route messages. What the kernel answers is kept as raw attributes
//! ([`Object`]): a tree that is to be put back as it was must not pass through a parser that drops what it does not know.

// The options of the kinds we set up.
mod build;
// What is to be changed.
mod change;
// What is there.
mod object;
// Options of single kinds.
mod options;

pub use build::{byte_fifo, delete_root, htb_class, htb_root, recreate};
use change::encode;
pub use change::{Change, ROOT, payload, show_handle};
use object::attributes;
pub use object::{Identity, Object, Stats, What};
use options::align;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{TcHandle, TcMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Attribute of an extended acknowledgement: the kernel's own words.
const EXT_ACK_MESSAGE: u16 = 1;
/// Largest answer kept, bytes: a tree of some 50,000 classes.
const MAX_DUMP: usize = 32 << 20;
/// Tries of a dump that was interrupted by a change.
const DUMP_TRIES: u32 = 5;

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

#[cfg(test)]
mod tests;
