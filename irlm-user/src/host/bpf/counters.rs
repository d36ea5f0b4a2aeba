//! What the classifiers counted, as reports and metrics take it.

use irlm_common::{COUNT_ENTRIES, Counter, Direction, Events, FlowClass, Scope, UNPARSED_SLOT, count_index};
use serde::Serialize;

/// The sums of one interface, per direction, scope and class, over all CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    counted: bool,
    sums: [Counter; COUNT_ENTRIES as usize],
    oddities: Oddities,
}

impl Default for Counters {
    /// Nothing counted.
    fn default() -> Self {
        let sums = [Counter::default(); COUNT_ENTRIES as usize];
        Self { counted: false, sums, oddities: Oddities::default() }
    }
}

/// What should not happen, over all CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Oddities {
    /// Packets that kept their own DSCP because their header could not be written.
    pub dscp_not_written: u64,
    /// Unparsed: the packet ends inside a header.
    pub cut_short: u64,
    /// Unparsed: the IPv4 header contradicts itself.
    pub bad_ipv4: u64,
    /// Unparsed: the IPv6 header contradicts itself.
    pub bad_ipv6: u64,
    /// Unparsed: the TCP header contradicts itself.
    pub bad_tcp: u64,
    /// Lines handed to the log.
    pub log_lines: u64,
    /// Lines held back by the programs' budget.
    pub log_suppressed: u64,
}

/// One line of a report: a class in one direction and scope.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct CountsRow {
    /// `egress` or `ingress`.
    pub direction: &'static str,
    /// `core` or `rack`.
    pub scope: &'static str,
    /// A class's name, or `unparsed`.
    pub class: &'static str,
    /// Packets at the hook; a super-packet is one.
    pub packets: u64,
    /// Bytes at the hook, with Ethernet headers.
    pub bytes: u64,
    /// Packets after segmentation.
    pub wire_packets: u64,
    /// Bytes after segmentation, with Ethernet headers.
    pub wire_bytes: u64,
}

impl Counters {
    pub(super) fn new(sums: [Counter; COUNT_ENTRIES as usize], cpus: &[Events]) -> Self {
        let mut oddities = Oddities::default();
        for cpu in cpus {
            oddities.dscp_not_written += cpu.dscp_not_written;
            oddities.cut_short += cpu.cut_short;
            oddities.bad_ipv4 += cpu.bad_ipv4;
            oddities.bad_ipv6 += cpu.bad_ipv6;
            oddities.bad_tcp += cpu.bad_tcp;
            oddities.log_lines += cpu.log_lines;
            oddities.log_suppressed += cpu.log_suppressed;
        }
        Self { counted: true, sums, oddities }
    }

    /// False if nothing counts, because eBPF is off; then all sums are zero.
    #[must_use]
    pub const fn counted(&self) -> bool {
        self.counted
    }

    /// What should not happen, since the maps were made.
    #[must_use]
    pub const fn oddities(&self) -> Oddities {
        self.oddities
    }

    /// The sums of one class in one direction, wherever the other end is.
    #[must_use]
    pub fn get(&self, direction: Direction, class: FlowClass) -> Counter {
        self.both(direction, class.slot())
    }

    /// The sums of one class in one direction and scope.
    #[must_use]
    pub fn scoped(&self, direction: Direction, scope: Scope, class: FlowClass) -> Counter {
        self.at(direction, scope, class.slot())
    }

    /// The sums of packets whose headers made no sense.
    #[must_use]
    pub fn unparsed(&self, direction: Direction) -> Counter {
        self.both(direction, UNPARSED_SLOT)
    }

    /// All packets of one direction: what the interface's own counter should say.
    #[must_use]
    pub fn total(&self, direction: Direction) -> Counter {
        let mut sum = self.unparsed(direction);
        for class in FlowClass::ALL {
            sum.add(&self.get(direction, class));
        }
        sum
    }

    /// What was counted between `earlier` and now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut sums = self.sums;
        for (sum, before) in sums.iter_mut().zip(&earlier.sums) {
            sum.packets = sum.packets.saturating_sub(before.packets);
            sum.bytes = sum.bytes.saturating_sub(before.bytes);
            sum.wire_packets = sum.wire_packets.saturating_sub(before.wire_packets);
            sum.wire_bytes = sum.wire_bytes.saturating_sub(before.wire_bytes);
        }
        let (now, old) = (self.oddities, earlier.oddities);
        let oddities = Oddities {
            dscp_not_written: now.dscp_not_written.saturating_sub(old.dscp_not_written),
            cut_short: now.cut_short.saturating_sub(old.cut_short),
            bad_ipv4: now.bad_ipv4.saturating_sub(old.bad_ipv4),
            bad_ipv6: now.bad_ipv6.saturating_sub(old.bad_ipv6),
            bad_tcp: now.bad_tcp.saturating_sub(old.bad_tcp),
            log_lines: now.log_lines.saturating_sub(old.log_lines),
            log_suppressed: now.log_suppressed.saturating_sub(old.log_suppressed),
        };
        Self { counted: self.counted, sums, oddities }
    }

    /// Every class in both directions and scopes, ready to print or to serialise.
    pub fn rows(&self) -> impl Iterator<Item = CountsRow> + '_ {
        let slots = FlowClass::ALL.map(|class| (class.slot(), class.name()));
        let places = Direction::ALL.into_iter().flat_map(|way| Scope::ALL.map(|scope| (way, scope)));
        places.flat_map(move |(way, scope)| {
            slots.into_iter().chain([(UNPARSED_SLOT, "unparsed")]).map(move |(slot, class)| {
                let Counter { packets, bytes, wire_packets, wire_bytes } = self.at(way, scope, slot);
                let (direction, scope) = (way.name(), scope.name());
                CountsRow { direction, scope, class, packets, bytes, wire_packets, wire_bytes }
            })
        })
    }

    fn both(&self, direction: Direction, slot: u32) -> Counter {
        let mut sum = self.at(direction, Scope::Core, slot);
        sum.add(&self.at(direction, Scope::Rack, slot));
        sum
    }

    fn at(&self, direction: Direction, scope: Scope, slot: u32) -> Counter {
        // count_index keeps any slot within the table.
        self.sums.get(count_index(direction, scope, slot) as usize).copied().unwrap_or_default()
    }
}
