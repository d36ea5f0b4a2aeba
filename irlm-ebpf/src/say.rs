//! What the programs tell user space's log, each CPU at most [`LINES_A_SECOND`] lines: whoever floods the port with
//! broken packets must not be able to flood the log, or to make a packet cost a line. What goes beyond is counted.
//!
//! Nothing here runs for a packet that is as it should be.

use aya_ebpf::{helpers::generated::bpf_ktime_get_coarse_ns, programs::TcContext};
use aya_log_ebpf::warn;
use irlm_common::{Direction, Events, parse::Unparsed};

use crate::IRLM_EVENTS;

const LINES_A_SECOND: u64 = 4;
const SECOND: u64 = 1_000_000_000;

/// Counts a packet that was not parsed, by what is wrong with it.
#[inline(never)]
pub(crate) fn unparsed(ctx: &TcContext, direction: Direction, why: Unparsed) {
    let Some(events) = IRLM_EVENTS.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's own entry, as in `count`.
    let events = unsafe { &mut *events };
    match why {
        Unparsed::CutShort => events.cut_short += 1,
        Unparsed::BadIpv4 => events.bad_ipv4 += 1,
        Unparsed::BadIpv6 => events.bad_ipv6 += 1,
        Unparsed::BadTcp => events.bad_tcp += 1,
    }
    if may_speak(events) {
        line_unparsed(ctx, direction, why);
    }
}

/// Counts a packet that keeps its own DSCP because its header could not be written.
#[inline(never)]
pub(crate) fn dscp_not_written(ctx: &TcContext, v6: bool) {
    let Some(events) = IRLM_EVENTS.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's own entry, as in `count`.
    let events = unsafe { &mut *events };
    events.dscp_not_written += 1;
    if may_speak(events) {
        line_dscp(ctx, v6);
    }
}

/// Takes a line from the budget.
#[inline(always)]
fn may_speak(events: &mut Events) -> bool {
    // SAFETY: the helper takes nothing and reads a clock that ticks at least ten times within our second.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if now - events.log_second >= SECOND {
        events.log_second = now;
        events.log_used = 0;
    }
    if events.log_used >= LINES_A_SECOND {
        events.log_suppressed += 1;
        return false;
    }
    events.log_used += 1;
    events.log_lines += 1;
    true
}

#[inline(never)]
fn line_unparsed(ctx: &TcContext, direction: Direction, why: Unparsed) {
    let way = match direction {
        Direction::Egress => "leaving",
        Direction::Ingress => "arriving",
    };
    let what = match why {
        Unparsed::CutShort => "it ends inside a header",
        Unparsed::BadIpv4 => "its IPv4 header contradicts itself",
        Unparsed::BadIpv6 => "its IPv6 header contradicts itself",
        Unparsed::BadTcp => "its TCP header contradicts itself",
    };
    warn!(ctx, "a {} packet of {} bytes not parsed, passed as it is: {}", way, ctx.len(), what);
}

#[inline(never)]
fn line_dscp(ctx: &TcContext, v6: bool) {
    let version = if v6 { 6 } else { 4 };
    warn!(ctx, "DSCP not written into an IPv{} packet of {} bytes, passed as it is", version, ctx.len());
}
