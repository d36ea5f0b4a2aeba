//! The classifiers on a host's core-facing port: which class does a packet belong to, how many bytes is it on the
//! wire, and which DSCP, priority and mark does its class get. Whatever happens in here the packet goes on to the next
//! program or qdisc, so losing them costs tagging and counting, never packets. Only packets of flows that user space
//! registered, and that leave, are ever changed.
#![no_std]
#![no_main]

// Log lines, within a budget.
mod say;
// Where the bytes of a packet come from, and go to.
mod skb;

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::TC_ACT_UNSPEC,
    btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    macros::{btf_map, classifier},
    programs::TcContext,
};
use irlm_common::{
    ABI_MARK, COUNT_ENTRIES, Counter, Direction, Events, Flow, FlowClass, FlowKey, MAX_FLOWS, MAX_PREFIXES,
    Scope, UNPARSED_SLOT,
    account::PacketSize,
    count_index,
    filter::{WORDS, Word, footprint, place},
    parse::{Found, Verdict},
    policy::{Policy, State},
};
use skb::{find, write_dscp};

/// The flows of this host's agent and their classes. Preallocated: an update never fails for want of memory while
/// there is room, and a reader never sees a freed entry.
#[btf_map]
static IRLM_FLOWS: HashMap<FlowKey, Flow, { MAX_FLOWS as usize }> = HashMap::new();

/// One bit a flow: says of most other packets that they are not in [`IRLM_FLOWS`].
#[btf_map]
static IRLM_FILTER: Array<Word, { WORDS as usize }> = Array::new();

/// Sums per direction, scope and class, each CPU its own: no atomics, no shared cache line.
#[btf_map]
static IRLM_COUNTS: PerCpuArray<Counter, { COUNT_ENTRIES as usize }> = PerCpuArray::new();

/// What should not happen.
#[btf_map]
static IRLM_EVENTS: PerCpuArray<Events, 1> = PerCpuArray::new();

/// Both generations of the policy.
#[btf_map]
static IRLM_POLICY: Array<Policy, 2> = Array::new();

/// Which generation is in force.
#[btf_map]
static IRLM_STATE: Array<State, 1> = Array::new();

/// Rack-local prefixes of generation 0. The value says nothing: what is in the trie is in the rack.
#[btf_map]
static IRLM_PREFIXES_0: LpmTrie<[u8; 16], u32, { MAX_PREFIXES as usize }> = LpmTrie::new();

/// The same of generation 1.
#[btf_map]
static IRLM_PREFIXES_1: LpmTrie<[u8; 16], u32, { MAX_PREFIXES as usize }> = LpmTrie::new();

/// Leaves by the interface.
#[classifier]
pub fn irlm_egress(ctx: TcContext) -> i32 {
    classify(&ctx, Direction::Egress);
    TC_ACT_UNSPEC
}

/// Arrives on the interface.
#[classifier]
pub fn irlm_ingress(ctx: TcContext) -> i32 {
    classify(&ctx, Direction::Ingress);
    TC_ACT_UNSPEC
}

/// What running any program costs; never attached.
#[classifier]
pub fn irlm_nothing(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

#[inline(always)]
fn classify(ctx: &TcContext, direction: Direction) {
    let mut place = MaybeUninit::uninit();
    let key = zeroed(&mut place);
    let verdict = find(ctx, direction, key);
    // Read once: everything below belongs to this generation, whatever user space does meanwhile.
    let generation = IRLM_STATE.get(0).map_or(0, |state| state.generation & 1);
    let policy = IRLM_POLICY.get(generation);
    let (slot, scope, headers) = match verdict {
        Verdict::Flow(found) => {
            let slot = class_of(key);
            let scope = scope_of(policy, generation, key);
            if let (Direction::Egress, Some(policy)) = (direction, policy)
                && slot != FlowClass::Other.slot()
            {
                tag(ctx, policy, scope, slot, found);
            }
            (slot, scope, found.headers)
        }
        Verdict::NoPorts => (FlowClass::Other.slot(), scope_of(policy, generation, key), 0),
        Verdict::NotIp => (FlowClass::Other.slot(), Scope::Core, 0),
        Verdict::Unparsed(why) => {
            say::unparsed(ctx, direction, why);
            (UNPARSED_SLOT, Scope::Core, 0)
        }
    };
    count(ctx, count_index(direction, scope, slot), headers);
}

/// A key of zeros, written in five words: the compiler would call a function that writes it byte by byte.
#[inline(always)]
fn zeroed(place: &mut MaybeUninit<FlowKey>) -> &mut FlowKey {
    const WORDS: usize = size_of::<FlowKey>() / size_of::<u64>();
    let words = place.as_mut_ptr().cast::<u64>();
    for n in 0..WORDS {
        // SAFETY: the key is this many words long, and aligned to them.
        unsafe { words.add(n).write_volatile(0) };
    }
    // SAFETY: every byte was written, and zeros are a key.
    unsafe { place.assume_init_mut() }
}

/// The class of a registered flow; `Other` of what is not registered.
#[inline(always)]
fn class_of(key: &FlowKey) -> u32 {
    let (word, bit) = place(footprint(key));
    if IRLM_FILTER.get(word).is_none_or(|word| word.bits & bit == 0) {
        return FlowClass::Other.slot();
    }
    // SAFETY: the map is preallocated and its values are single u32: a value read while the agent replaces the entry
    // is the old class or the new one.
    unsafe { IRLM_FLOWS.get(key) }.map_or(FlowClass::Other.slot(), |flow| flow.class)
}

#[inline(always)]
fn scope_of(policy: Option<&Policy>, generation: u32, key: &FlowKey) -> Scope {
    if policy.is_none_or(|policy| policy.prefixes == 0) {
        return Scope::Core;
    }
    let key = Key::new(128, key.remote_addr);
    let found = if generation == 0 { IRLM_PREFIXES_0.get(&key) } else { IRLM_PREFIXES_1.get(&key) };
    if found.is_some() { Scope::Rack } else { Scope::Core }
}

/// Does to a migration packet what its class's policy says.
#[inline(always)]
fn tag(ctx: &TcContext, policy: &Policy, scope: Scope, slot: u32, found: Found) {
    let class = policy.of(scope, slot);
    let skb = ctx.skb.skb;
    if class.set_priority != 0 {
        // SAFETY: `skb` is the context the kernel called us with; it lets classifiers write this field.
        unsafe { (*skb).priority = class.priority };
    }
    if class.set_mark != 0 {
        // SAFETY: as above.
        unsafe { (*skb).mark = class.mark };
    }
    if class.set_dscp != 0 && write_dscp(ctx, found, class.dscp).is_none() {
        say::dscp_not_written(ctx, found.v6);
    }
}

#[inline(always)]
fn count(ctx: &TcContext, index: u32, headers: u32) {
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
    let Some(counter) = IRLM_COUNTS.get_ptr_mut(index) else { return };
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
