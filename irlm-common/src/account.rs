//! How many packets and bytes a packet is on the wire. The kernel passes TCP down as super-packets of up to 64 KiB
//! and cuts them late, so the length at the hook misses the headers of all segments but the first (up to 5 %).

/// What the hook knows about a packet's size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PacketSize {
    /// Length at the hook, Ethernet header included.
    pub len: u32,
    /// Bytes of all headers up to the payload of TCP or UDP; 0 when they are not known.
    pub headers: u32,
    /// Payload per segment; 0 if the packet is not a super-packet.
    pub gso_size: u32,
    /// Segments, if the kernel counted them; 0 if it did not (packets from a guest or a tap).
    pub gso_segs: u32,
    /// A VLAN tag travels beside the packet and not in it.
    pub offloaded_tag: bool,
}

/// Bytes of one VLAN tag.
const VLAN_TAG: u64 = 4;

impl PacketSize {
    /// Packets on the wire, at least 1.
    #[must_use]
    #[inline(always)]
    pub const fn wire_packets(&self) -> u32 {
        if self.gso_size == 0 {
            1
        } else if self.gso_segs != 0 {
            self.gso_segs
        } else {
            let payload = self.len.saturating_sub(self.headers);
            let segments = payload.div_ceil(self.gso_size);
            if segments == 0 { 1 } else { segments }
        }
    }

    /// Bytes on the wire, counted as interface counters do: Ethernet header, no preamble, FCS or gap.
    #[must_use]
    #[inline(always)]
    pub const fn wire_bytes(&self) -> u64 {
        let packets = self.wire_packets() as u64;
        let tags = if self.offloaded_tag { VLAN_TAG * packets } else { 0 };
        self.len as u64 + (packets - 1) * self.headers as u64 + tags
    }
}

#[cfg(test)]
mod tests {
    use super::PacketSize;

    #[test]
    fn a_plain_packet_is_itself() {
        let size = PacketSize { len: 1514, headers: 66, ..Default::default() };
        assert_eq!((size.wire_packets(), size.wire_bytes()), (1, 1514));
    }

    #[test]
    fn a_super_packet_pays_headers_per_segment() {
        // 45 segments of 1448 bytes behind 66 bytes of headers.
        let size = PacketSize {
            len: 66 + 45 * 1448,
            headers: 66,
            gso_size: 1448,
            gso_segs: 45,
            ..Default::default()
        };
        assert_eq!((size.wire_packets(), size.wire_bytes()), (45, 45 * 1514));
        // A short last segment, and a kernel that did not count.
        let size = PacketSize { len: 66 + 1448 + 1, gso_segs: 0, ..size };
        assert_eq!((size.wire_packets(), size.wire_bytes()), (2, 1514 + 67));
    }

    #[test]
    fn an_offloaded_tag_is_paid_per_segment() {
        let size = PacketSize { len: 100, headers: 42, offloaded_tag: true, ..Default::default() };
        assert_eq!(size.wire_bytes(), 104);
        let size = PacketSize { len: 42 + 200, gso_size: 100, ..size };
        assert_eq!(size.wire_bytes(), 2 * (42 + 4 + 100));
    }

    #[test]
    fn contradictory_sizes_do_not_wrap() {
        let size = PacketSize { len: 10, headers: 4000, gso_size: 100, ..Default::default() };
        assert_eq!((size.wire_packets(), size.wire_bytes()), (1, 10));
        let size = PacketSize {
            len: u32::MAX,
            headers: u32::MAX,
            gso_size: 1,
            // The kernel's field is 16 bits wide.
            gso_segs: u32::from(u16::MAX),
            offloaded_tag: true,
        };
        assert!(size.wire_bytes() > u64::from(u32::MAX));
    }
}
