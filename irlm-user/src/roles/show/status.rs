//! What agents say of their groups, as `irlm status` prints it.

use crate::control::api::{GroupStatus, Phase, Role, VmStatus};
use crate::control::coordinator::watch::{AgentView, stands};
use crate::obs::human::{bytes, rate};
use crate::obs::say::outln;
use crate::roles::tables::{pages, right, table};
use comfy_table::Cell;

/// A VM's phase in an agent's status, with its QEMU's own word where the two are not the same.
pub(super) fn phase_words(v: &VmStatus) -> String {
    match (v.role, v.phase, &*v.state) {
        (_, phase, "") => phase.name().to_owned(),
        (Role::Target, Phase::Running | Phase::LeftPaused, state) => stands(v.phase.name(), state).to_owned(),
        (Role::Target, Phase::Fetching, state) if state != "running" => format!("fetching, {state}"),
        (Role::Source, Phase::Failed | Phase::Cancelled | Phase::InDoubt, state) => {
            format!("{}, {state}", v.phase.name())
        }
        // It has left, and somebody has let its old copy run.
        (Role::Source, Phase::GaveUp | Phase::Done, "running") => {
            format!("{}, its old copy runs", v.phase.name())
        }
        (_, phase, _) => phase.name().to_owned(),
    }
}

/// What agents say of their groups, as `irlm status` prints it.
pub(in super::super) fn print_status(views: &[AgentView]) {
    let mut t = table(&[
        "host",
        "group",
        "VM",
        "role",
        "phase",
        "QEMU",
        "core link",
        "RAM left",
        "waiting",
        "unique",
        "shared",
        "ref",
        "remote ref",
        "uniform",
        "asked",
    ]);
    let mut errors = Vec::new();
    for a in views {
        if let Some(e) = &a.error {
            errors.push(format!("! {}: {e}", a.name));
            continue;
        }
        if a.groups.is_empty() {
            outln!("{}: no groups", a.name);
        }
        for g in &a.groups {
            for v in &g.vms {
                t.add_row(row(&a.name, g, v));
                if let Some(e) = &v.error {
                    errors.push(format!("! {} {}: {e}", a.name, v.name));
                }
            }
            print_host(&a.name, g);
        }
    }
    if !t.is_empty() {
        outln!("{t}");
    }
    for e in errors {
        outln!("{e}");
    }
}

fn row(agent: &str, g: &GroupStatus, v: &VmStatus) -> Vec<Cell> {
    let mut row = vec![
        Cell::new(agent),
        Cell::new(format!("{} ({})", g.group, g.method)),
        Cell::new(&v.name),
        Cell::new(format!("{:?}", v.role).to_lowercase()),
        Cell::new(phase_words(v)),
        right(bytes(v.stream_bytes)),
        right(bytes(v.wire_bytes)),
        right(bytes(v.ram_remaining)),
        right(v.waiting),
    ];
    row.extend(pages(&v.pages));
    row
}

/// What a group's host has sent and received beside its VMs' streams.
fn print_host(agent: &str, g: &GroupStatus) {
    let h = &g.host;
    outln!(
        "{agent}: group {}: pushed {} ({} void), forwarded {}, store {}",
        g.group,
        bytes(h.push_bytes),
        h.push_void,
        bytes(h.forwarded_bytes),
        bytes(h.store_bytes)
    );
    if let Some(m) = &h.multicast {
        outln!(
            "{agent}: group {}: multicast to {} hosts: {} contents, {}, repaired {}; {} contents by unicast after all; \
             heard {} contents; refused {}, dropped {}",
            g.group,
            m.hearers,
            m.sent_pages,
            bytes(m.sent_bytes),
            bytes(m.repaired_bytes),
            m.handed_pages,
            m.received_pages,
            m.refused,
            m.dropped
        );
    }
    if let Some(s) = &g.share {
        let by = if s.tree { "class tree" } else { "pacing" };
        outln!("{agent}: group {}: share of the core link {}, kept by {by}", g.group, rate(s.bits));
    }
    if let Some(b) = &h.bpf {
        let (mut out, mut arrived) = (0, 0);
        for class in b.of_vms() {
            out += class.core_out.bytes + class.rack_out.bytes;
            arrived += class.core_in.bytes + class.rack_in.bytes;
        }
        outln!(
            "{agent}: on the wire: pages out {} in {} (switchover {}), control {}, forward {}, other {}",
            bytes(out),
            bytes(arrived),
            bytes(b.switchover.bytes()),
            bytes(b.control.bytes()),
            bytes(b.forward.bytes()),
            bytes(b.other.bytes())
        );
    }
}
