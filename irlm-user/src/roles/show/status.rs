//! What agents say of their groups, as `irlm status` prints it.

use crate::control::api::{GroupStatus, KeysStatus, Phase, Role, VmStatus};
use crate::control::coordinator::watch::{AgentView, stands};
use crate::flow::unix_ns;
use crate::net::tls::day;
use crate::obs::human::{bytes, rate};
use crate::obs::say::outln;
use crate::roles::tables::{pages, right, table};
use comfy_table::Cell;

/// Days before a certificate's end from which on a line begins with a mark; the agents' logs warn from then on, too.
const SOON: i64 = 30;

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
            errors.push(error_line(a, e));
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

/// What an agent's call has come to. The error names its address, which is also its name if no group file gives one.
fn error_line(a: &AgentView, e: &str) -> String {
    if a.name == a.addr.to_string() { format!("! {e}") } else { format!("! {}: {e}", a.name) }
}

/// Until when an agent's certificates are good, and why newer ones are not in use.
pub(in super::super) fn print_keys(agent: &str, keys: Option<&KeysStatus>) {
    let now = i64::try_from(unix_ns() / 1_000_000_000).unwrap_or(i64::MAX);
    keys_lines(agent, keys, now).iter().for_each(|l| outln!("{l}"));
}

fn keys_lines(agent: &str, keys: Option<&KeysStatus>, now: i64) -> Vec<String> {
    let Some(keys) = keys else {
        return vec![format!("{agent}: plain text: whoever reaches its ports may do everything there")];
    };
    let (gone, good): (Vec<_>, Vec<_>) = keys.certificates.iter().partition(|c| c.not_after < now);
    let gone = gone.iter().map(|c| {
        let (file, when) = (&c.file, day(c.not_after));
        format!("! {agent}: {file} HAS EXPIRED on {when} and counts for nothing: replace it")
    });
    let first = good.into_iter().min_by_key(|c| c.not_after);
    let good = first.map(|c| {
        let left = c.not_after.saturating_sub(now) / 86_400;
        let soon = if left < SOON { "! " } else { "" };
        format!("{soon}{agent}: certificates good until {} ({left} days, {})", day(c.not_after), c.file)
    });
    let bad = keys.problem.as_ref().map(|p| format!("! {agent}: new certificates are not in use: {p}"));
    gone.chain(good).chain(bad).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Certificate;

    #[test]
    fn the_first_certificate_to_expire_is_told_and_why_new_ones_are_not_in_use() {
        let of = |file: &str, days: i64| Certificate {
            file: file.into(),
            subject: "CN=s1".into(),
            not_after: days * 86_400 + 60,
        };
        let certificates = vec![of("ca-cert.pem", 900), of("server-cert.pem", 90)];
        let keys = KeysStatus { certificates: certificates.clone(), problem: None };
        let lines = keys_lines("s1", Some(&keys), 0);
        assert_eq!(lines, ["s1: certificates good until 1970-04-01 00:01 UTC (90 days, server-cert.pem)"]);
        let keys = KeysStatus { certificates, problem: Some("no key".into()) };
        let lines = keys_lines("s1", Some(&keys), 70 * 86_400);
        assert!(lines[0].starts_with("! s1: certificates good until") && lines[0].contains("(20 days"));
        assert_eq!(lines[1], "! s1: new certificates are not in use: no key");
        assert!(keys_lines("s1", None, 0)[0].contains("plain text"));
    }

    #[test]
    fn a_certificate_that_has_expired_is_not_called_good() {
        let of =
            |file: &str, not_after| Certificate { file: file.into(), subject: "CN=s1".into(), not_after };
        let certificates = vec![of("ca-cert.pem", 100 * 86_400), of("server-cert.pem", 86_400)];
        let keys = KeysStatus { certificates, problem: None };
        for since in [1, 86_400] {
            let lines = keys_lines("s1", Some(&keys), 86_400 + since);
            assert_eq!(lines.len(), 2);
            assert!(
                lines[0].starts_with("! s1: server-cert.pem HAS EXPIRED on 1970-01-02 00:00 UTC"),
                "{lines:?}"
            );
            assert!(lines[1].starts_with("s1: certificates good until 1970-04-11"), "{lines:?}");
        }
    }

    #[test]
    fn an_agents_address_is_said_once() {
        let view = |name: &str| AgentView {
            name: name.into(),
            addr: "127.0.0.1:7700".parse().unwrap(),
            heard: None,
            answers: false,
            error: None,
            groups: vec![],
            facts: vec![],
        };
        let e = "agent 127.0.0.1:7700: cannot connect";
        assert_eq!(error_line(&view("127.0.0.1:7700"), e), "! agent 127.0.0.1:7700: cannot connect");
        assert_eq!(error_line(&view("s1"), e), "! s1: agent 127.0.0.1:7700: cannot connect");
    }
}
