//! The classifiers on a host's core-facing port: which class does a packet belong to, and how many bytes is it on
//! the wire. They only count. Whatever happens in here the packet goes on to the next program or qdisc, so losing
//! them costs counting, never packets.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    btf_maps::{HashMap, PerCpuArray},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use irlm_common::{
    ABI_MARK, COUNT_ENTRIES, Counter, Direction, FlowClass, FlowKey, MAX_FLOWS, UNPARSED_SLOT,
    account::PacketSize,
    count_index,
    parse::{Packet, Verdict, parse},
};

/// The flows of this host's agent and their classes. Preallocated: an update never fails for want of memory while
/// there is room, and a reader never sees a freed entry.
#[btf_map]
static IRLM_FLOWS: HashMap<FlowKey, u32, { MAX_FLOWS as usize }> = HashMap::new();

/// Sums per direction and class, each CPU its own: no atomics, no shared cache line.
#[btf_map]
static IRLM_COUNTS: PerCpuArray<Counter, { COUNT_ENTRIES as usize }> = PerCpuArray::new();

/// Leaves by the interface.
#[classifier]
pub fn irlm_egress(ctx: TcContext) -> i32 {
    count(&ctx, Direction::Egress);
    TC_ACT_UNSPEC
}

/// Arrives on the interface.
#[classifier]
pub fn irlm_ingress(ctx: TcContext) -> i32 {
    count(&ctx, Direction::Ingress);
    TC_ACT_UNSPEC
}

struct Skb<'a>(&'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // By helper and not by direct access: headers may lie outside the linear part.
        self.0.load::<[u8; N]>(offset as usize).ok()
    }
}

#[inline(always)]
fn count(ctx: &TcContext, direction: Direction) {
    let mut key = FlowKey::default();
    let (slot, headers) = match parse(&Skb(ctx), direction, &mut key) {
        Verdict::Flow { headers } => {
            // SAFETY: the map is preallocated and its values are single u32: a value read while the agent replaces
            // the entry is the old class or the new one.
            let class = unsafe { IRLM_FLOWS.get(&key) };
            (class.copied().unwrap_or(FlowClass::Other.slot()), headers)
        }
        Verdict::NoFlow => (FlowClass::Other.slot(), 0),
        Verdict::Unparsed => (UNPARSED_SLOT, 0),
    };
    let skb = ctx.skb.skb;
    // SAFETY: `skb` is the context the kernel called us with; the verifier checks these reads of its fields.
    let size = unsafe {
        PacketSize {
            len: (*skb).len,
            headers,
            gso_size: (*skb).gso_size,
            gso_segs: (*skb).gso_segs,
            offloaded_tag: (*skb).vlan_present != 0,
        }
    };
    let Some(counter) = IRLM_COUNTS.get_ptr_mut(count_index(direction, slot)) else { return };
    // SAFETY: the pointer is to this CPU's own entry, and the hook does not migrate or nest within one direction.
    unsafe {
        (*counter).packets += 1;
        (*counter).bytes += u64::from(size.len);
        (*counter).wire_packets += u64::from(size.wire_packets());
        (*counter).wire_bytes += size.wire_bytes();
    }
}

/// Lets user space refuse an object of another ABI before it loads anything.
#[unsafe(link_section = "irlm_abi")]
#[unsafe(no_mangle)]
static IRLM_ABI: [u8; ABI_MARK.len()] = ABI_MARK;

/// No helper in use is reserved to GPL programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 18] = *b"Apache-2.0 OR MIT\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
