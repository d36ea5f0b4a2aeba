//! Types and rules that both the eBPF programs and user space name. A type enters only if an eBPF program names it.
//!
//! Everything here is what a pinned map shows to a reader outside, so layouts are fixed, padding is explicit, and
//! any change of a layout or of a slot's meaning raises [`ABI_VERSION`]. docs/bpf.md describes the fields.
#![cfg_attr(not(test), no_std)]

pub mod account;
pub mod dirty;
pub mod filter;
pub mod mark;
pub mod parse;
#[cfg(feature = "user")]
mod pod;
pub mod policy;

/// Version of the map layouts and slot meanings. User space refuses an object that carries another one, and does not
/// take over pinned maps of another one.
pub const ABI_VERSION: u32 = 2;

/// What an object of this ABI carries in a section of its own, so that a stale object is refused and not misread.
/// The last four bytes are [`ABI_VERSION`] in decimal.
pub const ABI_MARK: [u8; 13] = *b"irlm-abi-0002";

/// Hash map: [`FlowKey`] → [`Flow`]; filled by user space, read by the programs.
pub const FLOWS_MAP: &str = "IRLM_FLOWS";
/// Array of [`filter::Word`]: the flows' footprints, so that most other packets need no look into [`FLOWS_MAP`].
pub const FILTER_MAP: &str = "IRLM_FILTER";
/// Per-CPU array of [`Counter`], [`COUNT_ENTRIES`] long, indexed by [`count_index`]; written by the programs.
pub const COUNTS_MAP: &str = "IRLM_COUNTS";
/// Per-CPU array of one [`Events`]; written by the programs.
pub const EVENTS_MAP: &str = "IRLM_EVENTS";
/// Array of two [`policy::Policy`]; the programs read the one that [`policy::State::generation`] names.
pub const POLICY_MAP: &str = "IRLM_POLICY";
/// Array of one [`policy::State`].
pub const STATE_MAP: &str = "IRLM_STATE";
/// Longest-prefix tries of rack-local addresses, one a generation: key is a prefix length (of 128) and an address.
pub const PREFIX_MAPS: [&str; 2] = ["IRLM_PREFIXES_0", "IRLM_PREFIXES_1"];
/// The program for packets that leave by the interface.
pub const EGRESS_PROGRAM: &str = "irlm_egress";
/// The program for packets that arrive on the interface.
pub const INGRESS_PROGRAM: &str = "irlm_ingress";
/// A program that does nothing: what a benchmark's harness costs. Never attached.
pub const EMPTY_PROGRAM: &str = "irlm_nothing";

/// Most flows known at once. A host has one flow per VM, per target host and per peer; beyond the cap user space
/// gets an error and the flow's packets count as [`FlowClass::Other`].
pub const MAX_FLOWS: u32 = 16_384;
/// Most rack-local prefixes in one policy.
pub const MAX_PREFIXES: u32 = 1024;
/// Counter slots per direction and scope. The classes use the low ones; slots without a name are reserved and stay 0.
pub const SLOTS: u32 = 8;
/// Directions: egress, then ingress.
pub const DIRECTIONS: u32 = 2;
/// Scopes: core, then rack.
pub const SCOPES: u32 = 2;
/// Entries of [`COUNTS_MAP`].
pub const COUNT_ENTRIES: u32 = SLOTS * SCOPES * DIRECTIONS;
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

impl Direction {
    /// Both, in counter order.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    /// The name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

/// Where a packet's other end is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Scope {
    /// Behind the core link, or not known to be in this rack.
    Core = 0,
    /// In this rack: its address has one of the policy's prefixes.
    Rack = 1,
}

impl Scope {
    /// Both, in counter order.
    pub const ALL: [Self; 2] = [Self::Core, Self::Rack];

    /// The name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Rack => "rack",
        }
    }
}

/// What a flow carries. The number is the map value and the counter slot; 6 is reserved, 7 is [`UNPARSED_SLOT`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum FlowClass {
    /// Everything that nobody registered, ARP and unrelated traffic included.
    Other = 0,
    /// Unique contents and references: VM connections of running VMs, and push connections.
    Bulk = 1,
    /// Control: agents, index, evacuate.
    Control = 2,
    /// Contents forwarded from target host to target host.
    Forward = 3,
    /// The last round and the device state of a VM that has been stopped.
    Switchover = 4,
    /// Pages that a running VM waits for.
    Demand = 5,
}

impl FlowClass {
    /// All classes, in slot order.
    pub const ALL: [Self; 6] =
        [Self::Other, Self::Bulk, Self::Control, Self::Forward, Self::Switchover, Self::Demand];

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
            Self::Bulk => "bulk",
            Self::Control => "control",
            Self::Forward => "forward",
            Self::Switchover => "switchover",
            Self::Demand => "demand",
        }
    }
}

/// A slot that is surely one: a class that no program of this ABI knows counts as `Other`, so that a map written by a
/// newer agent can never send a program out of bounds.
#[must_use]
#[inline(always)]
pub const fn known_slot(slot: u32) -> u32 {
    if slot < SLOTS { slot } else { FlowClass::Other.slot() }
}

/// Index into [`COUNTS_MAP`].
#[must_use]
#[inline(always)]
pub const fn count_index(direction: Direction, scope: Scope, slot: u32) -> u32 {
    (direction as u32 * SCOPES + scope as u32) * SLOTS + known_slot(slot)
}

/// IP protocol number of TCP.
pub const PROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTO_UDP: u8 = 17;

/// One exact flow, as its own host sees it: `local` is this host's end in both directions.
///
/// Addresses are IPv6, or IPv4 mapped into IPv6 (`::ffff:a.b.c.d`); ports are in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
// Aligned so that the programs write it in whole words.
#[repr(C, align(8))]
pub struct FlowKey {
    /// This host's address.
    pub local_addr: [u8; 16],
    /// The other end's address.
    pub remote_addr: [u8; 16],
    /// This host's port.
    pub local_port: u16,
    /// The other end's port.
    pub remote_port: u16,
    /// [`PROTO_TCP`] or [`PROTO_UDP`]. As wide as the rest of the key, so that there is no padding to compare.
    pub proto: u32,
}

/// What is known of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Flow {
    /// See [`FlowClass`].
    pub class: u32,
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

/// What should not happen, counted, and the budget of log lines; on one CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Events {
    /// Packets of a class with a DSCP into whose header it could not be written; they left with the one they had.
    pub dscp_not_written: u64,
    /// Unparsed, because the packet ends inside a header.
    pub cut_short: u64,
    /// Unparsed, because the IPv4 header contradicts itself.
    pub bad_ipv4: u64,
    /// Unparsed, because the IPv6 header contradicts itself.
    pub bad_ipv6: u64,
    /// Unparsed, because the TCP header contradicts itself.
    pub bad_tcp: u64,
    /// Lines handed to the log.
    pub log_lines: u64,
    /// Lines that would have gone beyond the budget of this CPU.
    pub log_suppressed: u64,
    /// When the current second of the budget began, by the coarse monotonic clock, in nanoseconds.
    pub log_second: u64,
    /// Lines of the current second.
    pub log_used: u64,
}

const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 8);
const _: () = assert!(size_of::<Flow>() == 4);
const _: () = assert!(size_of::<Counter>() == 32 && align_of::<Counter>() == 8);
const _: () = assert!(size_of::<Events>() == 72);
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

#[cfg(test)]
mod tests {
    use super::{COUNT_ENTRIES, Direction, SLOTS, Scope, count_index};

    #[test]
    fn every_counter_has_a_place_of_its_own_and_none_is_out_of_bounds() {
        let mut seen = std::collections::HashSet::new();
        for direction in Direction::ALL {
            for scope in Scope::ALL {
                for slot in 0..SLOTS {
                    assert!(seen.insert(count_index(direction, scope, slot)));
                }
                for slot in [SLOTS, SLOTS + 1, u32::MAX] {
                    assert_eq!(count_index(direction, scope, slot), count_index(direction, scope, 0));
                }
            }
        }
        assert_eq!(seen.into_iter().max(), Some(COUNT_ENTRIES - 1));
    }
}
