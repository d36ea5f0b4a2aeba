//! Packets made and read by a library that shares no code with the program under test.

use anyhow::{Context as _, Result};
use etherparse::{PacketBuilder, VlanId};
use std::net::{IpAddr, SocketAddr};

const HERE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const THERE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Payload behind the headers.
const PAYLOAD: [u8; 100] = [0x5a; 100];

/// A TCP segment with payload.
pub fn tcp(from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let start = PacketBuilder::ethernet2(HERE, THERE);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => start.ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => start.ipv6(a.octets(), b.octets(), 64),
        _ => anyhow::bail!("{from} and {to} are of two families"),
    };
    ip.tcp(from.port(), to.port(), 1, 4096).write(&mut frame, &PAYLOAD)?;
    Ok(frame)
}

/// A TCP segment over IPv4 behind one 802.1Q tag.
pub fn tagged_tcp(from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let (IpAddr::V4(a), IpAddr::V4(b)) = (from.ip(), to.ip()) else { anyhow::bail!("IPv4 only") };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(HERE, THERE)
        .single_vlan(VlanId::try_new(7)?)
        .ipv4(a.octets(), b.octets(), 64)
        .tcp(from.port(), to.port(), 1, 4096)
        .write(&mut frame, &PAYLOAD)?;
    Ok(frame)
}

/// An ARP request.
pub fn arp() -> Result<Vec<u8>> {
    use etherparse::{ArpEthIpv4Packet, ArpOperation};
    let mut frame = Vec::new();
    let arp = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: HERE,
        sender_ipv4: [10, 0, 0, 1],
        target_mac: [0; 6],
        target_ipv4: [10, 0, 0, 2],
    };
    PacketBuilder::ethernet2(HERE, [0xff; 6]).arp(arp.into()).write(&mut frame)?;
    // As a device pads it.
    frame.resize(60, 0);
    Ok(frame)
}

/// An echo request.
pub fn ping(from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let (IpAddr::V4(a), IpAddr::V4(b)) = (from.ip(), to.ip()) else { anyhow::bail!("IPv4 only") };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(HERE, THERE)
        .ipv4(a.octets(), b.octets(), 64)
        .icmpv4_echo_request(1, 2)
        .write(&mut frame, &PAYLOAD)?;
    Ok(frame)
}

/// A segment whose IPv4 header says that it has 16 bytes.
pub fn broken(from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let mut frame = tcp(from, to)?;
    *frame.get_mut(14).context("no IP header")? = 0x44;
    Ok(frame)
}

/// What a packet on the wire says, read independently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// Its DSCP.
    pub dscp: u8,
    /// Its two ECN bits.
    pub ecn: u8,
    /// Whether its IPv4 header adds up; IPv6 has no sum.
    pub sum_right: bool,
    /// Bytes behind the TCP header.
    pub payload: usize,
    /// It opens a connection.
    pub opens: bool,
}

/// Reads a TCP packet of IPv4 or IPv6; none if it is something else.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Seen> {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { return None };
    let (from, to, class, sum_right) = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let right = header.to_header().calc_header_checksum() == header.header_checksum();
            let class = (header.dcp().value(), header.ecn().value());
            (IpAddr::V4(header.source_addr()), IpAddr::V4(header.destination_addr()), class, right)
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            let class = (header.traffic_class() >> 2, header.traffic_class() & 3);
            (IpAddr::V6(header.source_addr()), IpAddr::V6(header.destination_addr()), class, true)
        }
        NetSlice::Arp(_) => return None,
    };
    Some(Seen {
        from: SocketAddr::new(from, tcp.source_port()),
        to: SocketAddr::new(to, tcp.destination_port()),
        dscp: class.0,
        ecn: class.1,
        sum_right,
        payload: tcp.payload().len(),
        opens: tcp.syn() && !tcp.ack(),
    })
}

/// Sender and receiver of a TCP or UDP packet that is no fragment, as far as its headers are there; lengths may lie.
#[must_use]
pub fn ends(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
    let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let (from, to) = match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) if !ip.header().is_fragmenting_payload() => {
            (IpAddr::V4(ip.header().source_addr()), IpAddr::V4(ip.header().destination_addr()))
        }
        LaxNetSlice::Ipv6(ip) => {
            (IpAddr::V6(ip.header().source_addr()), IpAddr::V6(ip.header().destination_addr()))
        }
        _ => return None,
    };
    let ports = match packet.transport.as_ref()? {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
        _ => return None,
    };
    Some((SocketAddr::new(from, ports.0), SocketAddr::new(to, ports.1)))
}
