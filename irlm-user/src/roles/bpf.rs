//! `irlm bpf show`: what the eBPF programs of this host's agents do and have counted, read from their pins, so that it
//! can be seen also when an agent is dead or hangs.

use super::common::write_json;
use super::tables::right;
use crate::host::bpf::{self, CountsRow, Snapshot};
use crate::obs::human::bytes;
use crate::obs::say::outln;
use clap::{Args, Subcommand};
use comfy_table::{Cell, Table, presets};
use std::path::Path;
use std::time::{Duration, Instant};

/// Arguments of `irlm bpf`.
#[derive(Debug, Args)]
pub(super) struct BpfArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Show programs, policy and counters of the agents on this host
    Show(ShowArgs),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Reads the pins in /sys/fs/bpf/irlm, so it needs root and the agent's mount namespace, but no agent.\n\
        Exit codes: 0 shown, 1 no such pins or not readable, 2 shown, and an agent is dead."
)]
struct ShowArgs {
    /// The agent's name [default: all that have pins]
    #[arg(long, conflicts_with = "all")]
    name: Option<String>,
    /// All agents that have pins
    #[arg(long)]
    all: bool,
    /// Show again every so many seconds, with rates; ^C ends it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    every: Option<u64>,
    /// JSON on standard output instead of tables, one document each time
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &BpfArgs) -> anyhow::Result<u8> {
    let What::Show(args) = &args.what;
    let mut before: Option<(Instant, Vec<Snapshot>)> = None;
    loop {
        let (at, now) = (Instant::now(), read(args)?);
        if args.json {
            write_json(Path::new("-"), &now)?;
        } else {
            for snapshot in &now {
                let old = before.as_ref().and_then(|(then, all)| {
                    let old = all.iter().find(|old| old.name == snapshot.name)?;
                    Some((at.duration_since(*then), old))
                });
                print(snapshot, old);
            }
        }
        let Some(pause) = args.every else {
            return Ok(if now.iter().all(|snapshot| snapshot.agent_runs) { 0 } else { 2 });
        };
        before = Some((at, now));
        std::thread::sleep(Duration::from_secs(pause));
    }
}

fn read(args: &ShowArgs) -> anyhow::Result<Vec<Snapshot>> {
    let names = match &args.name {
        Some(name) => vec![name.clone()],
        None => bpf::names()?,
    };
    if names.is_empty() {
        anyhow::bail!(
            "no pins in {}: no agent with core_iface set runs here, or it cannot pin",
            bpf::PIN_ROOT
        );
    }
    names.iter().map(|name| Ok(Snapshot::of(name)?)).collect()
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(header);
    table
}

fn print(s: &Snapshot, before: Option<(Duration, &Snapshot)>) {
    let agent = if s.agent_runs { "runs" } else { "does not run" };
    outln!(
        "{}: interface {} (index {}), agent {agent}, pins in {}, ABI {}",
        s.name,
        s.iface,
        s.ifindex,
        s.dir.display(),
        s.abi
    );
    for p in &s.programs {
        let verified = p.verified.map_or_else(String::new, |n| format!(", {n} instructions verified"));
        outln!("  {}: TCX link {}, program {} {}{verified}", p.direction, p.link, p.program, p.name);
    }
    if s.programs.is_empty() {
        outln!("  no TCX links: by a clsact qdisc (`tc filter show dev IFACE egress`), or detached");
    }
    let maps: Vec<_> = s.maps.iter().map(|m| format!("{} {}", m.id, m.name)).collect();
    outln!("  maps: {}", maps.join(", "));
    let flows: Vec<_> = s.flows.iter().map(|(class, n)| format!("{class} {n}")).collect();
    outln!("  flows: {}", flows.join(", "));
    match s.rack_prefixes.as_slice() {
        [] => outln!("  rack prefixes: none, so every address is behind the core link"),
        all => outln!("  rack prefixes: {}", all.join(", ")),
    }
    print_policy(s);
    print_counts(s, before);
    print_oddities(s);
}

fn print_policy(s: &Snapshot) {
    let mut policy = table(&["policy for", "scope", "DSCP", "priority", "mark"]);
    for p in s.policy.iter().filter(|p| p.dscp.is_some() || p.priority.is_some() || p.mark.is_some()) {
        let own = || "-".to_owned();
        policy.add_row([
            Cell::new(p.class),
            Cell::new(p.scope),
            right(p.dscp.map_or_else(own, |n| n.to_string())),
            // As tc writes classes.
            right(p.priority.map_or_else(own, |n| format!("{:x}:{:x}", n >> 16, n & 0xffff))),
            right(p.mark.map_or_else(own, |n| format!("{n:#x}"))),
        ]);
    }
    match policy.is_empty() {
        true => outln!("  policy: none, packets keep what they have"),
        false => outln!("{policy}"),
    }
}

/// What has passed, and how fast since the last look.
fn print_counts(s: &Snapshot, before: Option<(Duration, &Snapshot)>) {
    let mut header = vec!["direction", "scope", "class", "packets", "bytes", "on the wire"];
    header.extend(before.map(|_| "Mbit/s"));
    let mut counts = table(&header);
    for (n, row) in s.counters.iter().enumerate().filter(|(_, row)| row.packets > 0) {
        let mut cells = vec![
            Cell::new(row.direction),
            Cell::new(row.scope),
            Cell::new(row.class),
            right(row.packets),
            right(bytes(row.bytes)),
            right(bytes(row.wire_bytes)),
        ];
        if let Some((passed, old)) = before {
            cells.push(right(old.counters.get(n).map_or_else(String::new, |old| rate(row, old, passed))));
        }
        counts.add_row(cells);
    }
    if !counts.is_empty() {
        outln!("{counts}");
    }
}

fn print_oddities(s: &Snapshot) {
    let o = &s.oddities;
    if o.dscp_not_written > 0 {
        outln!("  DSCP not written into {} packets", o.dscp_not_written);
    }
    let unparsed = [
        ("cut short", o.cut_short),
        ("bad IPv4", o.bad_ipv4),
        ("bad IPv6", o.bad_ipv6),
        ("bad TCP", o.bad_tcp),
    ];
    let unparsed: Vec<_> =
        unparsed.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{what} {n}")).collect();
    if !unparsed.is_empty() {
        outln!(
            "  unparsed: {}; log lines {}, held back {}",
            unparsed.join(", "),
            o.log_lines,
            o.log_suppressed
        );
    }
}

/// Megabits a second on the wire since the last look.
fn rate(now: &CountsRow, before: &CountsRow, passed: Duration) -> String {
    let bits = now.wire_bytes.saturating_sub(before.wire_bytes) as f64 * 8.0;
    format!("{:.1}", bits / passed.as_secs_f64().max(1e-3) / 1e6)
}
