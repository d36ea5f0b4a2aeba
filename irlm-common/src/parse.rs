//! Finds the flow of an Ethernet frame. Pure and generic over where the bytes come from, so that the code the kernel
//! runs is the code that the tests and the property tests run on byte slices.
//!
//! Everything is inlined and every loop has a small constant bound: the verifiers of 5.15 and later must follow it.

use crate::{Direction, FlowKey, PROTO_TCP, PROTO_UDP};

/// A packet that can be read at an offset from the start of its Ethernet header.
pub trait Packet {
    /// `N` bytes at `offset`, or `None` if the packet ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Packet for &[u8] {
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }
}

/// What [`parse`] made of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The key is filled in; `headers` is the length of all headers up to the payload, in bytes.
    Flow {
        /// Ethernet, VLAN, IP with options or extensions, TCP with options or UDP.
        headers: u32,
    },
    /// A sound packet that can be no registered flow: not IP, another protocol, a fragment, more VLAN tags or IPv6
    /// extensions than are followed.
    NoFlow,
    /// Cut short, or its headers contradict themselves.
    Unparsed,
}

const ETHERNET: u32 = 14;
const ETH_IPV4: u16 = 0x0800;
const ETH_IPV6: u16 = 0x86dd;
const ETH_VLAN: u16 = 0x8100;
const ETH_QINQ: u16 = 0x88a8;
const MAX_TAGS: u32 = 2;
const IPV6_HEADER: u32 = 40;
/// IPv6 extension headers that are stepped over.
const MAX_EXTENSIONS: u32 = 4;
const EXT_HOP_BY_HOP: u8 = 0;
const EXT_ROUTING: u8 = 43;
const EXT_DESTINATION: u8 = 60;

/// Finds the flow that the packet belongs to. `key` is filled in only for [`Verdict::Flow`].
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(kind) = packet.bytes::<2>(ETHERNET - 2) else { return Verdict::Unparsed };
    let mut kind = u16::from_be_bytes(kind);
    let mut offset = ETHERNET;
    for _ in 0..MAX_TAGS {
        if kind != ETH_VLAN && kind != ETH_QINQ {
            break;
        }
        // A tag: two bytes of VLAN number, then the next type.
        let Some(next) = packet.bytes::<2>(offset + 2) else { return Verdict::Unparsed };
        kind = u16::from_be_bytes(next);
        offset += 4;
    }
    match kind {
        ETH_IPV4 => ipv4(packet, offset, direction, key),
        ETH_IPV6 => ipv6(packet, offset, direction, key),
        _ => Verdict::NoFlow,
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, offset: u32, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(ip) = packet.bytes::<20>(offset) else { return Verdict::Unparsed };
    let words = u32::from(ip[0] & 0x0f);
    if ip[0] >> 4 != 4 || words < 5 {
        return Verdict::Unparsed;
    }
    // Any fragment, the first too: only the first has ports, and one datagram shall not count in two classes.
    if ip[6] & 0x3f != 0 || ip[7] != 0 {
        return Verdict::NoFlow;
    }
    let source = mapped([ip[12], ip[13], ip[14], ip[15]]);
    let destination = mapped([ip[16], ip[17], ip[18], ip[19]]);
    ends(key, direction, source, destination);
    ports(packet, offset + words * 4, ip[9], direction, key)
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, offset: u32, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(start) = packet.bytes::<8>(offset) else { return Verdict::Unparsed };
    if start[0] >> 4 != 6 {
        return Verdict::Unparsed;
    }
    let Some(source) = packet.bytes::<16>(offset + 8) else { return Verdict::Unparsed };
    let Some(destination) = packet.bytes::<16>(offset + 24) else { return Verdict::Unparsed };
    let mut next = start[6];
    let mut offset = offset + IPV6_HEADER;
    for _ in 0..MAX_EXTENSIONS {
        if next != EXT_HOP_BY_HOP && next != EXT_ROUTING && next != EXT_DESTINATION {
            break;
        }
        let Some(extension) = packet.bytes::<2>(offset) else { return Verdict::Unparsed };
        next = extension[0];
        offset += (u32::from(extension[1]) + 1) * 8;
    }
    ends(key, direction, source, destination);
    ports(packet, offset, next, direction, key)
}

#[inline(always)]
fn ports<P: Packet>(packet: &P, offset: u32, proto: u8, direction: Direction, key: &mut FlowKey) -> Verdict {
    let length = if proto == PROTO_TCP {
        // The header's length is in the upper half of byte 12, in words; the fixed part must be there as a whole.
        let Some(rest) = packet.bytes::<8>(offset + 12) else { return Verdict::Unparsed };
        let words = u32::from(rest[0] >> 4);
        if words < 5 {
            return Verdict::Unparsed;
        }
        words * 4
    } else if proto == PROTO_UDP {
        8
    } else {
        return Verdict::NoFlow;
    };
    let Some(start) = packet.bytes::<8>(offset) else { return Verdict::Unparsed };
    let source = u16::from_be_bytes([start[0], start[1]]);
    let destination = u16::from_be_bytes([start[2], start[3]]);
    match direction {
        Direction::Egress => (key.local_port, key.remote_port) = (source, destination),
        Direction::Ingress => (key.local_port, key.remote_port) = (destination, source),
    }
    key.proto = proto;
    key.pad = [0; 3];
    Verdict::Flow { headers: offset + length }
}

#[inline(always)]
fn ends(key: &mut FlowKey, direction: Direction, source: [u8; 16], destination: [u8; 16]) {
    match direction {
        Direction::Egress => (key.local_addr, key.remote_addr) = (source, destination),
        Direction::Ingress => (key.local_addr, key.remote_addr) = (destination, source),
    }
}

/// An IPv4 address as IPv6 sockets name it.
#[must_use]
#[inline(always)]
pub const fn mapped(v4: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, v4[0], v4[1], v4[2], v4[3]]
}

#[cfg(test)]
mod tests;
