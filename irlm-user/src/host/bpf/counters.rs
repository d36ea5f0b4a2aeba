//! What the classifiers counted, as reports and metrics take it.

use irlm_common::{COUNT_ENTRIES, Counter, Direction, FlowClass, UNPARSED_SLOT, count_index};
use serde::Serialize;

/// The sums of one interface, per direction and class, over all CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    counted: bool,
    sums: [Counter; COUNT_ENTRIES as usize],
}

impl Default for Counters {
    /// Nothing counted.
    fn default() -> Self {
        Self { counted: false, sums: [Counter::default(); COUNT_ENTRIES as usize] }
    }
}

/// One line of a report: a class in one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct CountsRow {
    /// `egress` or `ingress`.
    pub direction: &'static str,
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
    pub(super) const fn new(sums: [Counter; COUNT_ENTRIES as usize]) -> Self {
        Self { counted: true, sums }
    }

    /// False if nothing counts, because eBPF is off; then all sums are zero.
    #[must_use]
    pub const fn counted(&self) -> bool {
        self.counted
    }

    /// The sums of one class in one direction.
    #[must_use]
    pub fn get(&self, direction: Direction, class: FlowClass) -> Counter {
        self.at(direction, class.slot())
    }

    /// The sums of packets whose headers made no sense.
    #[must_use]
    pub fn unparsed(&self, direction: Direction) -> Counter {
        self.at(direction, UNPARSED_SLOT)
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
        Self { counted: self.counted, sums }
    }

    /// Every class in both directions, ready to print or to serialise.
    pub fn rows(&self) -> impl Iterator<Item = CountsRow> + '_ {
        let slots = FlowClass::ALL.map(|class| (class.slot(), class.name()));
        let slots = move || slots.into_iter().chain([(UNPARSED_SLOT, "unparsed")]);
        [(Direction::Egress, "egress"), (Direction::Ingress, "ingress")].into_iter().flat_map(
            move |(way, direction)| {
                slots().map(move |(slot, class)| {
                    let Counter { packets, bytes, wire_packets, wire_bytes } = self.at(way, slot);
                    CountsRow { direction, class, packets, bytes, wire_packets, wire_bytes }
                })
            },
        )
    }

    fn at(&self, direction: Direction, slot: u32) -> Counter {
        // count_index keeps any slot within the table.
        self.sums.get(count_index(direction, slot) as usize).copied().unwrap_or_default()
    }
}
