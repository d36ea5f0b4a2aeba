//! A filter in front of the table of flows: one bit per footprint. A host's port carries mostly packets of other
//! people, and for them one bit read is cheaper than hashing a 40-byte key. A bit that is set says "perhaps", one that is
//! not says "surely unknown": user space sets it before it adds a flow and clears it after it has removed the last one.

use crate::FlowKey;

/// Bits are this many, as a power of two: with the most flows that are possible 6 % are set.
const BITS_LOG2: u32 = 18;
/// Entries of the map.
pub const WORDS: u32 = 1 << (BITS_LOG2 - 6);

/// 64 bits of the filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Word {
    /// Footprint `f` has bit `f % 64` of word `f / 64`.
    pub bits: u64,
}

/// The number of a flow's bit, below `64 * WORDS`.
#[must_use]
#[inline(always)]
pub const fn footprint(key: &FlowKey) -> u32 {
    let [.., a, b, c, d] = key.remote_addr;
    let address = u32::from_ne_bytes([a, b, c, d]);
    let ports = ((key.local_port as u32) << 16) | key.remote_port as u32;
    // Two rounds of multiplying by an odd constant (golden ratio, and one of murmur's): the high bits depend on all.
    let mixed = (ports ^ address.wrapping_mul(0x85eb_ca6b)).wrapping_mul(0x9e37_79b1);
    mixed >> (32 - BITS_LOG2)
}

/// Index of the footprint's word, and its bit there.
#[must_use]
#[inline(always)]
pub const fn place(footprint: u32) -> (u32, u64) {
    ((footprint >> 6) & (WORDS - 1), 1 << (footprint & 63))
}

#[cfg(test)]
mod tests {
    use super::{WORDS, footprint, place};
    use crate::{FlowKey, parse::mapped};
    use std::collections::HashSet;

    #[test]
    fn footprints_of_a_busy_host_are_spread() {
        // One target port, 64 peers, 250 ephemeral ports each: as alike as real flows get.
        let mut seen = HashSet::new();
        for peer in 0..64 {
            for port in 0..250 {
                let key = FlowKey {
                    local_addr: mapped([10, 0, 0, 1]),
                    remote_addr: mapped([10, 0, 1, peer]),
                    local_port: 32_768 + port,
                    remote_port: 7700,
                    ..FlowKey::default()
                };
                let (word, bit) = place(footprint(&key));
                assert!(word < WORDS);
                seen.insert((word, bit));
            }
        }
        // 16,000 of 262,144 places: by chance 15,523 different ones.
        assert!(seen.len() > 15_000, "only {} places for 16,000 flows", seen.len());
    }
}
