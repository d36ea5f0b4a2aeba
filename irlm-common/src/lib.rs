//! Types and rules that both the eBPF programs and user space name. A type enters only if an eBPF program names it.
//!
//! Everything here is what a pinned map shows to a reader outside, so layouts are fixed, padding is explicit, and
//! any change of a layout or of a slot's meaning raises [`ABI_VERSION`]. docs/bpf.md describes the fields.
#![cfg_attr(not(test), no_std)]

pub mod account;
pub mod dirty;
pub mod parse;
#[cfg(feature = "user")]
mod pod;

/// Version of the map layouts and slot meanings. User space refuses an object that carries another one.
pub const ABI_VERSION: u32 = 1;

/// What an object of this ABI carries in a section of its own, so that a stale object is refused and not misread.
/// The last four bytes are [`ABI_VERSION`] in decimal.
pub const ABI_MARK: [u8; 13] = *b"irlm-abi-0001";

/// Hash map: [`FlowKey`] → class (`u32`, see [`FlowClass`]); filled by user space, read by the programs.
pub const FLOWS_MAP: &str = "IRLM_FLOWS";
/// Per-CPU array of [`Counter`], [`COUNT_ENTRIES`] long, indexed by [`count_index`]; written by the programs.
pub const COUNTS_MAP: &str = "IRLM_COUNTS";
/// The program for packets that leave by the interface.
pub const EGRESS_PROGRAM: &str = "irlm_egress";
/// The program for packets that arrive on the interface.
pub const INGRESS_PROGRAM: &str = "irlm_ingress";

/// Most flows known at once. A host has one flow per VM, per target host and per peer; beyond the cap user space
/// gets an error and the flow's packets count as [`FlowClass::Other`].
pub const MAX_FLOWS: u32 = 16_384;
/// Counter slots per direction. The classes use the low ones; slots without a name are reserved and stay 0.
pub const SLOTS: u32 = 8;
/// Directions: egress, then ingress.
pub const DIRECTIONS: u32 = 2;
/// Entries of [`COUNTS_MAP`].
pub const COUNT_ENTRIES: u32 = SLOTS * DIRECTIONS;
/// Slot of packets whose headers are cut short or contradict themselves. They pass like all others.
pub const UNPARSED_SLOT: u32 = SLOTS - 1;

/// Which way a packet goes, seen from the host that owns the interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Direction {
    /// Leaves the host: source is local, destination is remote.
    Egress = 0,
    /// Arrives at the host: source is remote, destination is local.
    Ingress = 1,
}

/// What a flow carries. The number is the map value and the counter slot.
///
/// 4 to 6 are reserved for switchover and demand traffic; 7 is [`UNPARSED_SLOT`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum FlowClass {
    /// Everything that nobody registered, ARP and unrelated traffic included.
    Other = 0,
    /// Page data over the core link: VM and push connections.
    Page = 1,
    /// Control: agents, index, evacuate.
    Control = 2,
    /// Pages forwarded inside the target rack.
    Forwarded = 3,
}

impl FlowClass {
    /// All classes, in slot order.
    pub const ALL: [Self; 4] = [Self::Other, Self::Page, Self::Control, Self::Forwarded];

    /// The class's counter slot.
    #[must_use]
    pub const fn slot(self) -> u32 {
        self as u32
    }

    /// The name used in reports and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::Page => "page",
            Self::Control => "control",
            Self::Forwarded => "forwarded",
        }
    }
}

/// Index into [`COUNTS_MAP`]. A class that no program of this ABI knows counts as `Other`, so that a map written
/// by a newer agent can never send a program out of bounds.
#[must_use]
#[inline(always)]
pub const fn count_index(direction: Direction, slot: u32) -> u32 {
    let slot = if slot < SLOTS { slot } else { FlowClass::Other.slot() };
    direction as u32 * SLOTS + slot
}

/// IP protocol number of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u8 = 17;

/// One exact flow, as its own host sees it: `local` is this host's end in both directions.
///
/// Addresses are IPv6, or IPv4 mapped into IPv6 (`::ffff:a.b.c.d`); ports are in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct FlowKey {
    /// This host's address.
    pub local_addr: [u8; 16],
    /// The other end's address.
    pub remote_addr: [u8; 16],
    /// This host's port.
    pub local_port: u16,
    /// The other end's port.
    pub remote_port: u16,
    /// [`PROTO_TCP`] or [`PROTO_UDP`].
    pub proto: u8,
    /// Always zero: a hash map compares every byte of a key.
    pub pad: [u8; 3],
}

/// Sums of one slot, on one CPU or over all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Counter {
    /// Packets as the hook saw them; one super-packet is one.
    pub packets: u64,
    /// Bytes as the hook saw them, Ethernet header included: what a device that takes super-packets counts.
    pub bytes: u64,
    /// Packets after segmentation.
    pub wire_packets: u64,
    /// Bytes after segmentation: every segment with its own headers, and with an offloaded VLAN tag; no preamble,
    /// FCS or gap, as interface counters have none.
    pub wire_bytes: u64,
}

const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 2);
const _: () = assert!(size_of::<Counter>() == 32 && align_of::<Counter>() == 8);
const _: () = assert!(FlowClass::ALL.len() < UNPARSED_SLOT as usize);
const _: () = assert!(ABI_VERSION < 10 && ABI_MARK[12] == b'0' + ABI_VERSION as u8);

impl Counter {
    /// Adds another CPU's part, or another slot.
    pub const fn add(&mut self, other: &Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
        self.wire_packets = self.wire_packets.wrapping_add(other.wire_packets);
        self.wire_bytes = self.wire_bytes.wrapping_add(other.wire_bytes);
    }
}
