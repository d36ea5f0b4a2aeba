//! What the kernel is asked to change, as a message.

use super::object::{Object, What};
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::TcAttribute;

/// The root's parent.
pub const ROOT: u32 = u32::MAX;
/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub(super) message: RouteNetlinkMessage,
    pub(super) flags: u16,
    /// For errors: "HTB class 1f1a:40".
    pub(super) says: String,
}

impl Change {
    pub(super) fn create(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_EXCL, says }
    }

    pub(super) fn replace(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: NLM_F_CREATE | NLM_F_REPLACE, says }
    }

    pub(super) fn delete(message: RouteNetlinkMessage, says: String) -> Self {
        Self { message, flags: 0, says }
    }

    /// The request as it goes to the kernel, under sequence number `seq`.
    #[must_use]
    pub fn bytes(&self, seq: u32) -> Vec<u8> {
        encode(self.message.clone(), self.flags | NLM_F_REQUEST | NLM_F_ACK, seq)
    }
}

pub(super) fn encode(message: RouteNetlinkMessage, flags: u16, seq: u32) -> Vec<u8> {
    let mut m = NetlinkMessage::from(message);
    m.header.flags = flags;
    m.header.sequence_number = seq;
    m.finalize();
    let mut out = vec![0; m.buffer_len()];
    m.serialize(&mut out);
    out
}

pub(super) fn handle_text(h: u32) -> String {
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

pub(super) fn raw_attribute(kind: u16, value: &[u8]) -> TcAttribute {
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
