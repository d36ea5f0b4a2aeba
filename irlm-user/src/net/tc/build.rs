//! Requests for the kinds that IRLM sets up (HTB, byte queues), and for putting back what a dump recorded. Layouts:
//! linux/pkt_sched.h. Link layer "ethernet" is said outright, so that the kernel computes its own rate tables.

use super::change::{Change, ROOT, handle_text, raw_attribute};
use super::object::{Object, TCA_CHAIN, TCA_KIND, TCA_OPTIONS, TCA_STAB, What};
use super::options::{HTB_INIT, find, glob};
use crate::core::policy::{HtbClass, MAJOR, minor};
use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

/// TCA_HTB_*.
const HTB_PARMS: u16 = 1;
const HTB_RATE64: u16 = 6;
const HTB_CEIL64: u16 = 7;
/// Where each kind of filter keeps its TCA_CLS_FLAGS_* (linux/pkt_cls.h).
const FILTER_FLAGS: [(&str, u16); 4] = [("u32", 11), ("flower", 22), ("matchall", 3), ("bpf", 9)];
/// TCA_CLS_FLAGS_IN_HW, TCA_CLS_FLAGS_NOT_IN_HW.
const IN_HW: u32 = 4;
const NOT_IN_HW: u32 = 8;
/// TC_LINKLAYER_ETHERNET.
const ETHERNET: u8 = 1;
/// Nanoseconds of one scheduler tick, since Linux 2.6.32 (/proc/net/psched: 64 ns).
const TICK_NS: u64 = 64;

fn message(index: i32, parent: u32, handle: u32, kind: &str, options: Vec<TcOption>) -> TcMessage {
    let mut m = TcMessage::with_index(index);
    m.header.parent = TcHandle::from(parent);
    m.header.handle = TcHandle::from(handle);
    m.attributes.push(TcAttribute::Kind(kind.to_owned()));
    if !options.is_empty() {
        m.attributes.push(TcAttribute::Options(options));
    }
    m
}

fn option(kind: u16, value: Vec<u8>) -> TcOption {
    TcOption::Other(DefaultNla::new(kind, value))
}

/// Our root: HTB, what no class names goes to others. Takes the place of the kernel's default, and of nothing else.
#[must_use]
pub fn htb_root(index: i32) -> Change {
    let glob: [u32; 5] = [3, 10, u32::from(minor::OTHERS), 0, 0];
    let glob = glob.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let m = message(index, ROOT, u32::from(MAJOR) << 16, "htb", vec![option(HTB_INIT, glob)]);
    Change::replace(RouteNetlinkMessage::NewQueueDiscipline(m), format!("HTB qdisc {MAJOR:x}: as root"))
}

/// Bytes a second in 64 bits, and as much of it as the old field takes.
fn rate(bits: u64) -> (u64, [u8; 12]) {
    let bytes = bits / 8;
    let mut spec = [0; 12];
    spec[1] = ETHERNET;
    // cell_align -1, as `tc` says where no table is sent.
    spec[4..6].copy_from_slice(&(-1i16).to_ne_bytes());
    spec[8..].copy_from_slice(&u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
    (bytes, spec)
}

/// The time that `burst` bytes take at `bytes` a second, in ticks.
fn ticks(burst: u32, bytes: u64) -> u32 {
    let ns = u128::from(burst) * 1_000_000_000 / u128::from(bytes.max(1));
    u32::try_from(ns / u128::from(TICK_NS)).unwrap_or(u32::MAX)
}

/// Makes the class, or changes its rates where it is: its queue and its flows stay.
#[must_use]
pub fn htb_class(index: i32, c: &HtbClass) -> Change {
    let ((rate64, rate), (ceil64, ceil)) = (rate(c.rate), rate(c.ceil));
    let mut parms = Vec::with_capacity(44);
    parms.extend(rate);
    parms.extend(ceil);
    for word in [ticks(c.burst, rate64), ticks(c.cburst, ceil64), c.quantum, 0, c.prio] {
        parms.extend(word.to_ne_bytes());
    }
    let mut options = vec![option(HTB_PARMS, parms)];
    for (kind, rate) in [(HTB_RATE64, rate64), (HTB_CEIL64, ceil64)] {
        if u32::try_from(rate).is_err() {
            options.push(option(kind, rate.to_ne_bytes().to_vec()));
        }
    }
    let m = message(index, c.parent_id(), c.classid(), "htb", options);
    Change::replace(
        RouteNetlinkMessage::NewTrafficClass(m),
        format!("HTB class {} ({})", handle_text(c.classid()), c.name),
    )
}

/// The queue of a leaf, in bytes; or its new length.
#[must_use]
pub fn byte_fifo(index: i32, c: &HtbClass) -> Change {
    let mut m = message(index, c.classid(), c.queue_handle(), "bfifo", vec![]);
    // struct tc_fifo_qopt is the attribute itself, not nested in it.
    m.attributes.push(raw_attribute(TCA_OPTIONS, &c.queue.to_ne_bytes()));
    Change::replace(
        RouteNetlinkMessage::NewQueueDiscipline(m),
        format!("bfifo {} of class {}", handle_text(c.queue_handle()), c.name),
    )
}

/// Takes the root away, with all below it; the kernel puts its default there.
#[must_use]
pub fn delete_root(index: i32, handle: u32) -> Change {
    let mut m = TcMessage::with_index(index);
    m.header.parent = TcHandle::ROOT;
    m.header.handle = TcHandle::from(handle);
    Change::delete(
        RouteNetlinkMessage::DelQueueDiscipline(m),
        format!("removing the root qdisc {}", handle_text(handle)),
    )
}

/// Makes again what a dump has recorded, on interface `index`.
#[must_use]
pub fn recreate(index: i32, o: &Object) -> Change {
    let mut m = TcMessage::with_index(index);
    let h = o.header();
    (m.header.parent, m.header.handle) = (h.parent, h.handle);
    if o.what == What::Filter {
        m.header.info = h.info;
    }
    for kind in [TCA_KIND, TCA_OPTIONS, TCA_STAB, TCA_CHAIN] {
        let Some(mut value) = o.attribute(kind).map(<[u8]>::to_vec) else { continue };
        if kind == TCA_OPTIONS && o.what == What::Qdisc && o.kind() == "htb" {
            // It tells its version with the minor number, and does not take it back so.
            if let Some(version) = glob(&mut value).and_then(|g| g.get_mut(..4)) {
                version.copy_from_slice(&3u32.to_ne_bytes());
            }
        }
        if kind == TCA_OPTIONS && o.what == What::Filter {
            forget_hardware(o.kind(), &mut value);
        }
        m.attributes.push(raw_attribute(kind, &value));
    }
    let (what, m) = match o.what {
        What::Qdisc => ("qdisc", RouteNetlinkMessage::NewQueueDiscipline(m)),
        What::Class => ("class", RouteNetlinkMessage::NewTrafficClass(m)),
        What::Filter => ("filter", RouteNetlinkMessage::NewTrafficFilter(m)),
    };
    let place = if o.what == What::Filter { o.parent() } else { o.handle() };
    let says = format!("{} {what} {}", o.kind(), handle_text(place));
    // A root is there already (the kernel's default); everything else is new.
    if o.what == What::Qdisc && o.parent() == ROOT {
        Change::replace(m, says)
    } else {
        Change::create(m, says)
    }
}

/// Filters tell whether the hardware has them, and do not take that back.
fn forget_hardware(kind: &str, options: &mut [u8]) {
    let Some((_, attribute)) = FILTER_FLAGS.iter().find(|f| f.0 == kind) else { return };
    if let Some(flags) = find(options, *attribute)
        && let Ok(word) = <[u8; 4]>::try_from(&*flags)
    {
        flags.copy_from_slice(&(u32::from_ne_bytes(word) & !(IN_HW | NOT_IN_HW)).to_ne_bytes());
    }
}
