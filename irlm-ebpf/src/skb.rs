//! Where the bytes of a packet come from, and how a DSCP gets into it. The shapes that nearly all packets have are read
//! in place; everything else, and headers outside the packet's linear part, by helper.

use aya_ebpf::{bindings::BPF_F_RECOMPUTE_CSUM, programs::TcContext};
use irlm_common::{
    Direction, FlowKey, mark,
    parse::{
        ETH_IPV4, ETH_IPV6, ETH_QINQ, ETH_VLAN, ETHERNET, Found, Packet, Verdict, common_ipv4, common_ipv6,
        parse,
    },
};

/// Up to the EtherType, which lies on an even address as the IP header lies on one divisible by four.
const TYPE_AT: usize = ETHERNET as usize - 2;

/// Finds the flow of the packet.
#[inline(always)]
pub(crate) fn find(ctx: &TcContext, direction: Direction, key: &mut FlowKey) -> Verdict {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + ETHERNET as usize > end {
        return Verdict::unpack(at_length(ctx, direction, key));
    }
    // SAFETY: the packet's linear part was just seen to hold these bytes, and the kernel places the IP header behind
    // them on an address divisible by four wherever the CPU asks for it (NET_IP_ALIGN).
    let kind = u16::from_be(unsafe { *((data + TYPE_AT) as *const u16) });
    let start = data + ETHERNET as usize;
    let common = match kind {
        ETH_IPV4 if start + size_of::<[u32; 10]>() <= end => {
            // SAFETY: seen to be inside, and aligned as above.
            common_ipv4(unsafe { &*(start as *const [u32; 10]) }, ctx.len(), direction, key)
        }
        ETH_IPV6 if start + size_of::<[u32; 15]>() <= end => {
            // SAFETY: seen to be inside, and aligned as above.
            common_ipv6(unsafe { &*(start as *const [u32; 15]) }, ctx.len(), direction, key)
        }
        ETH_IPV4 | ETH_IPV6 | ETH_VLAN | ETH_QINQ => None,
        _ => Some(Verdict::NotIp),
    };
    match common {
        Some(verdict) => verdict,
        None => Verdict::unpack(at_length(ctx, direction, key)),
    }
}

struct Skb<'a>(&'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset as usize).ok()
    }
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }
}

/// Any shape, by helper. A function of its own, so that the common way stays short. Returns a packed [`Verdict`].
#[inline(never)]
fn at_length(ctx: &TcContext, direction: Direction, key: &mut FlowKey) -> u64 {
    parse(&Skb(ctx), direction, key).pack()
}

/// Writes a DSCP; `None` if the packet would not take it, and then it is as it was.
///
/// The helper makes the header writable first: it copies it if a clone (a capture, a retransmission still in the
/// queue) would see the change, and pulls it together if it lies outside the linear part. One store for class and
/// checksum, so that there is nothing half written.
#[inline(always)]
pub(crate) fn write_dscp(ctx: &TcContext, found: Found, dscp: u8) -> Option<()> {
    let at = found.network as usize;
    if found.v6 {
        let head = ctx.load::<[u8; mark::IPV6_BYTES]>(at).ok()?;
        // A sum that the device took over the packet, if there is one, covers these bytes.
        ctx.store(at, &mark::ipv6(head, dscp), u64::from(BPF_F_RECOMPUTE_CSUM)).ok()
    } else {
        let head = ctx.load::<[u32; mark::IPV4_BYTES / 4]>(at).ok()?;
        // An IPv4 header adds up to zero before and after.
        ctx.store(at, &mark::ipv4(head, dscp), 0).ok()
    }
}
