//! Writes a DSCP into the start of an IP header. The two ECN bits belong to the two ends of the flow and always stay.

/// Bytes of an IPv4 header up to its checksum.
pub const IPV4_BYTES: usize = 12;
/// Bytes of an IPv6 header that hold the traffic class.
pub const IPV6_BYTES: usize = 2;

/// The first [`IPV4_BYTES`] of an IPv4 header, in memory order, with this DSCP and the checksum that follows from it
/// (RFC 1624, equation 3). A checksum that was wrong before stays as wrong as it was.
#[must_use]
#[inline(always)]
pub const fn ipv4(head: [u32; 3], dscp: u8) -> [u32; 3] {
    let first = u32::from_be(head[0]);
    let class = (((dscp & 0x3f) as u32) << 2) | ((first >> 16) & 0x03);
    let changed = (first & 0xff00_ffff) | (class << 16);
    let last = u32::from_be(head[2]);
    let (old, new) = (first >> 16, changed >> 16);
    let mut sum = (!last & 0xffff) + (!old & 0xffff) + new;
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let last = (last & 0xffff_0000) | (!sum & 0xffff);
    [changed.to_be(), head[1], last.to_be()]
}

/// The first [`IPV6_BYTES`] of an IPv6 header, in network order, with this DSCP. There is no checksum.
#[must_use]
#[inline(always)]
pub const fn ipv6(head: [u8; IPV6_BYTES], dscp: u8) -> [u8; IPV6_BYTES] {
    let dscp = dscp & 0x3f;
    // Version in the upper half of byte 0; the traffic class straddles both bytes, its ECN bits at 0x30 of byte 1.
    [(head[0] & 0xf0) | (dscp >> 2), (head[1] & 0x3f) | (dscp << 6)]
}

#[cfg(test)]
mod tests {
    use super::{ipv4, ipv6};

    /// From scratch, over a header of any length whose checksum field counts as zero.
    fn checksum(header: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for (n, pair) in header.chunks(2).enumerate() {
            if n != 5 {
                sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
            }
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn every_old_and_new_value_gives_the_checksum_of_a_sum_from_scratch() {
        let mut state = 1_u32;
        for old in 0..=255_u8 {
            for dscp in 0..64_u8 {
                let mut header = [0_u8; 20];
                for byte in &mut header {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *byte = (state >> 24) as u8;
                }
                (header[0], header[1]) = (0x45, old);
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                let word = |n: usize| u32::from_ne_bytes(*header[4 * n..].first_chunk().unwrap());
                let written = ipv4([word(0), word(1), word(2)], dscp);
                let mut after = header;
                for (n, word) in written.into_iter().enumerate() {
                    after[4 * n..4 * n + 4].copy_from_slice(&word.to_ne_bytes());
                }
                assert_eq!(after[1], (dscp << 2) | (old & 3), "ECN is kept");
                assert_eq!(u16::from_be_bytes([after[10], after[11]]), checksum(&after));
                // Nothing else changed.
                (after[1], after[10], after[11]) = (header[1], header[10], header[11]);
                assert_eq!(after, header);
            }
        }
    }

    #[test]
    fn sums_at_the_edge_of_ones_complement_are_right() {
        // The checksums 0x0000 and 0xffff are both "zero" to a careless update.
        for id in 0..=u16::MAX {
            let mut header = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
            header[4..6].copy_from_slice(&id.to_be_bytes());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            let word = |n: usize| u32::from_ne_bytes(*header[4 * n..].first_chunk().unwrap());
            let [first, _, last] = ipv4([word(0), word(1), word(2)], 46);
            header[0..4].copy_from_slice(&first.to_ne_bytes());
            let expected = checksum(&header);
            assert_eq!(u32::from_be(last) as u16, expected, "id {id}");
        }
    }

    #[test]
    fn ipv6_keeps_version_ecn_and_flow_label() {
        for old in 0..=u16::MAX {
            let head = old.to_be_bytes();
            for dscp in [0, 1, 10, 46, 63] {
                let after = ipv6(head, dscp);
                let class = (after[0] << 4) | (after[1] >> 4);
                assert_eq!(class >> 2, dscp);
                assert_eq!(class & 3, (head[1] >> 4) & 3);
                assert_eq!((after[0] & 0xf0, after[1] & 0x0f), (head[0] & 0xf0, head[1] & 0x0f));
            }
        }
    }
}
