//! Finds the flow of an Ethernet frame. Pure and generic over where the bytes come from, so that the code the kernel
//! runs is the code that the tests and the property tests run on byte slices.
//!
//! [`parse`] takes any frame, a few bytes at a time. [`common_ipv4`] and [`common_ipv6`] say the same of the shapes that
//! nearly all frames have, from words at fixed places, which in the kernel costs no helper call.
//!
//! Everything is inlined and every loop has a small constant bound: the verifiers of 5.15 and later must follow it.

use crate::{Direction, FlowKey, PROTO_TCP, PROTO_UDP};

/// A packet that can be read at an offset from the start of its Ethernet header.
pub trait Packet {
    /// `N` bytes at `offset`, or `None` if the packet ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
    /// All bytes of it.
    fn length(&self) -> u32;
}

impl Packet for &[u8] {
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }
    fn length(&self) -> u32 {
        self.len() as u32
    }
}

/// What [`parse`] made of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The key is filled in: the packet may be of a registered flow.
    Flow(Found),
    /// An IP packet that can be of no registered flow: another protocol, a fragment, more IPv6 extensions than are
    /// followed. The key has its addresses.
    NoPorts,
    /// Neither IPv4 nor IPv6, or behind more VLAN tags than are followed.
    NotIp,
    /// Cut short, or its headers contradict themselves.
    Unparsed(Unparsed),
}

/// Where the headers of a flow's packet are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Offset of the IP header.
    pub network: u32,
    /// IPv6 and not IPv4.
    pub v6: bool,
    /// Bytes up to the payload: Ethernet, VLAN, IP with options or extensions, TCP with options or UDP.
    pub headers: u32,
}

/// Why a packet was not parsed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Unparsed {
    /// It ends inside a header.
    CutShort = 0,
    /// Its IPv4 header has another version, or says that header or packet are shorter than they must be.
    BadIpv4 = 1,
    /// Its IPv6 header has another version, or says that the packet is shorter than it must be.
    BadIpv6 = 2,
    /// Its TCP header says that it is shorter than it must be.
    BadTcp = 3,
}

impl Unparsed {
    /// All, in order of their numbers.
    pub const ALL: [Self; 4] = [Self::CutShort, Self::BadIpv4, Self::BadIpv6, Self::BadTcp];
}

impl Verdict {
    /// In one register: a function of an eBPF program returns no more, and the kernel's type format knows no enum with
    /// fields.
    #[must_use]
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        match self {
            Self::Flow(Found { network, v6, headers }) => {
                ((headers as u64) << 32) | ((network as u64 & 0xffff) << 8) | ((v6 as u64) << 2)
            }
            Self::NoPorts => 1,
            Self::NotIp => 2,
            Self::Unparsed(why) => 3 | ((why as u64) << 8),
        }
    }

    /// The other way.
    #[must_use]
    #[inline(always)]
    pub const fn unpack(packed: u64) -> Self {
        match packed & 3 {
            0 => Self::Flow(Found {
                network: (packed >> 8) as u32 & 0xffff,
                v6: packed & 4 != 0,
                headers: (packed >> 32) as u32,
            }),
            1 => Self::NoPorts,
            2 => Self::NotIp,
            _ => Self::Unparsed(match (packed >> 8) & 3 {
                0 => Unparsed::CutShort,
                1 => Unparsed::BadIpv4,
                2 => Unparsed::BadIpv6,
                _ => Unparsed::BadTcp,
            }),
        }
    }
}

/// Bytes of an Ethernet header without tags.
pub const ETHERNET: u32 = 14;
/// EtherTypes, in host byte order.
pub const ETH_IPV4: u16 = 0x0800;
/// See [`ETH_IPV4`].
pub const ETH_IPV6: u16 = 0x86dd;
/// See [`ETH_IPV4`].
pub const ETH_VLAN: u16 = 0x8100;
/// See [`ETH_IPV4`].
pub const ETH_QINQ: u16 = 0x88a8;
const MAX_TAGS: u32 = 2;
const IPV6_HEADER: u32 = 40;
/// IPv6 extension headers that are stepped over.
const MAX_EXTENSIONS: u32 = 4;
const EXT_HOP_BY_HOP: u8 = 0;
const EXT_ROUTING: u8 = 43;
const EXT_DESTINATION: u8 = 60;
/// "More fragments" and the fragment's offset.
const FRAGMENT: u32 = 0x3fff;
const CUT: Verdict = Verdict::Unparsed(Unparsed::CutShort);

const fn is_extension(next: u8) -> bool {
    matches!(next, EXT_HOP_BY_HOP | EXT_ROUTING | EXT_DESTINATION)
}

/// Finds the flow that the packet belongs to.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(kind) = packet.bytes::<2>(ETHERNET - 2) else { return CUT };
    let mut kind = u16::from_be_bytes(kind);
    let mut offset = ETHERNET;
    for _ in 0..MAX_TAGS {
        if kind != ETH_VLAN && kind != ETH_QINQ {
            break;
        }
        // A tag: two bytes of VLAN number, then the next type.
        let Some(next) = packet.bytes::<2>(offset + 2) else { return CUT };
        kind = u16::from_be_bytes(next);
        offset += 4;
    }
    match kind {
        ETH_IPV4 => ipv4(packet, offset, direction, key),
        ETH_IPV6 => ipv6(packet, offset, direction, key),
        _ => Verdict::NotIp,
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, offset: u32, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(ip) = packet.bytes::<20>(offset) else { return CUT };
    let words = u32::from(ip[0] & 0x0f);
    if ip[0] >> 4 != 4 || words < 5 {
        return Verdict::Unparsed(Unparsed::BadIpv4);
    }
    let source = mapped([ip[12], ip[13], ip[14], ip[15]]);
    let destination = mapped([ip[16], ip[17], ip[18], ip[19]]);
    ends(key, direction, source, destination);
    // Any fragment, the first too: only the first has ports, and one datagram shall not count in two classes.
    if u32::from(u16::from_be_bytes([ip[6], ip[7]])) & FRAGMENT != 0 {
        return Verdict::NoPorts;
    }
    let total = u32::from(u16::from_be_bytes([ip[2], ip[3]]));
    let place = Place { network: offset, v6: false, end: end(offset, total) };
    ports(packet, place, offset + words * 4, ip[9], direction, key)
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, network: u32, direction: Direction, key: &mut FlowKey) -> Verdict {
    let Some(start) = packet.bytes::<8>(network) else { return CUT };
    if start[0] >> 4 != 6 {
        return Verdict::Unparsed(Unparsed::BadIpv6);
    }
    let Some(source) = packet.bytes::<16>(network + 8) else { return CUT };
    let Some(destination) = packet.bytes::<16>(network + 24) else { return CUT };
    ends(key, direction, source, destination);
    let mut next = start[6];
    let mut offset = network + IPV6_HEADER;
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(next) {
            break;
        }
        let Some(extension) = packet.bytes::<2>(offset) else { return CUT };
        next = extension[0];
        offset += (u32::from(extension[1]) + 1) * 8;
    }
    let payload = u32::from(u16::from_be_bytes([start[4], start[5]]));
    let place = Place { network, v6: true, end: end(network + IPV6_HEADER, payload) };
    ports(packet, place, offset, next, direction, key)
}

/// Where a flow's IP header is, and where it says that the packet ends.
#[derive(Clone, Copy)]
struct Place {
    network: u32,
    v6: bool,
    end: u32,
}

/// A length of 0 is that of a super-packet which is longer than the field can say.
#[inline(always)]
const fn end(start: u32, length: u32) -> u32 {
    if length == 0 { u32::MAX } else { start + length }
}

/// The flow, if packet and IP header hold all of its headers.
#[inline(always)]
const fn found(place: Place, headers: u32, length: u32) -> Verdict {
    if headers > length {
        CUT
    } else if headers > place.end {
        Verdict::Unparsed(if place.v6 { Unparsed::BadIpv6 } else { Unparsed::BadIpv4 })
    } else {
        Verdict::Flow(Found { network: place.network, v6: place.v6, headers })
    }
}

#[inline(always)]
fn ports<P: Packet>(
    packet: &P,
    place: Place,
    offset: u32,
    proto: u8,
    direction: Direction,
    key: &mut FlowKey,
) -> Verdict {
    let length = if proto == PROTO_TCP {
        // The header's length is in the upper half of byte 12, in words; the fixed part must be there as a whole.
        let Some(rest) = packet.bytes::<8>(offset + 12) else { return CUT };
        let words = u32::from(rest[0] >> 4);
        if words < 5 {
            return Verdict::Unparsed(Unparsed::BadTcp);
        }
        words * 4
    } else if proto == PROTO_UDP {
        8
    } else {
        return Verdict::NoPorts;
    };
    let Some(start) = packet.bytes::<8>(offset) else { return CUT };
    let source = u16::from_be_bytes([start[0], start[1]]);
    let destination = u16::from_be_bytes([start[2], start[3]]);
    of_ports(key, direction, source, destination, proto);
    found(place, offset + length, packet.length())
}

/// What [`parse`] says of a frame without VLAN tag whose type is [`ETH_IPV4`], if its header has no options. `words` are
/// its bytes behind the Ethernet header, in memory order: the IP header, and as much as TCP's fixed part; `length` are
/// all bytes of the frame.
#[inline(always)]
pub fn common_ipv4(
    words: &[u32; 10],
    length: u32,
    direction: Direction,
    key: &mut FlowKey,
) -> Option<Verdict> {
    let first = u32::from_be(words[0]);
    if first >> 24 != 0x45 {
        return None;
    }
    let marked = 0xffff_u32.to_be();
    ends(key, direction, whole([0, 0, marked, words[3]]), whole([0, 0, marked, words[4]]));
    if u32::from_be(words[1]) & FRAGMENT != 0 {
        return Some(Verdict::NoPorts);
    }
    let proto = (u32::from_be(words[2]) >> 16) as u8;
    let place = Place { network: ETHERNET, v6: false, end: end(ETHERNET, first & 0xffff) };
    Some(common_ports([words[5], words[8]], proto, (place, ETHERNET + 20, length), direction, key))
}

/// As [`common_ipv4`], for [`ETH_IPV6`] without extension headers.
#[inline(always)]
pub fn common_ipv6(
    words: &[u32; 15],
    length: u32,
    direction: Direction,
    key: &mut FlowKey,
) -> Option<Verdict> {
    let second = u32::from_be(words[1]);
    let next = (second >> 8) as u8;
    if u32::from_be(words[0]) >> 28 != 6 || is_extension(next) {
        return None;
    }
    let source = whole([words[2], words[3], words[4], words[5]]);
    let destination = whole([words[6], words[7], words[8], words[9]]);
    ends(key, direction, source, destination);
    let start = ETHERNET + IPV6_HEADER;
    let place = Place { network: ETHERNET, v6: true, end: end(start, second >> 16) };
    Some(common_ports([words[10], words[13]], next, (place, start, length), direction, key))
}

/// By the words of the transport header that hold the ports and TCP's length, and where that header starts.
#[inline(always)]
fn common_ports(
    [ports, fourth]: [u32; 2],
    proto: u8,
    (place, start, length): (Place, u32, u32),
    direction: Direction,
    key: &mut FlowKey,
) -> Verdict {
    let header = match proto {
        PROTO_TCP => match u32::from_be(fourth) >> 28 {
            0..5 => return Verdict::Unparsed(Unparsed::BadTcp),
            words => words * 4,
        },
        PROTO_UDP => 8,
        _ => return Verdict::NoPorts,
    };
    let ports = u32::from_be(ports);
    of_ports(key, direction, (ports >> 16) as u16, ports as u16, proto);
    found(place, start + header, length)
}

/// Joined to two words of 64 bits first: what is stored in halves and read whole waits in the CPU's store buffer.
#[inline(always)]
fn whole([a, b, c, d]: [u32; 4]) -> [u8; 16] {
    let join = |first: u32, second: u32| {
        if cfg!(target_endian = "big") {
            (u64::from(first) << 32) | u64::from(second)
        } else {
            u64::from(first) | (u64::from(second) << 32)
        }
    };
    let mut whole = [0; 16];
    whole[..8].copy_from_slice(&join(a, b).to_ne_bytes());
    whole[8..].copy_from_slice(&join(c, d).to_ne_bytes());
    whole
}

#[inline(always)]
fn of_ports(key: &mut FlowKey, direction: Direction, source: u16, destination: u16, proto: u8) {
    match direction {
        Direction::Egress => (key.local_port, key.remote_port) = (source, destination),
        Direction::Ingress => (key.local_port, key.remote_port) = (destination, source),
    }
    key.proto = proto.into();
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
