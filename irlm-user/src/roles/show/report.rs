//! What a move came to: the final table and the lines below it.

use crate::control::api::{Phase, Work};
use crate::control::coordinator::report::{Outcome, Report, VmReport};
use crate::control::coordinator::watch::{ALREADY, ENDED, Verdict, stands};
use crate::core::account::{InRam, Proof};
use crate::obs::human::{bytes, millis};
use crate::obs::say::outln;
use crate::roles::tables::{pages, right, table};
use comfy_table::{Cell, Table};

/// The final table and the lines below it.
pub(in super::super) fn print_report(r: &Report) {
    for p in &r.problems {
        outln!("! {p}");
    }
    if r.outcome == Outcome::NothingStarted {
        print_not_started(r);
        return;
    }
    outln!("{}", rows(r));
    for v in r.vms.iter().filter(|v| v.error.is_some()) {
        outln!("! {}: {}", v.name, v.error.as_deref().unwrap_or(""));
    }
    r.vms.iter().filter_map(early).for_each(|line| outln!("{line}"));
    verified(r).iter().for_each(|line| outln!("{line}"));
    print_silent(r);
    for h in r.hosts.iter().filter(|h| h.counters.direct) {
        outln!(
            "host {}: its link is faster than an agent, so QEMUs streamed to each other (`direct` in the group file)",
            h.name
        );
    }
    outln!("{}", summary(r));
    if !nothing_left(r) {
        print_totals(r);
    }
    hints(r).iter().for_each(|line| outln!("{line}"));
}

fn print_silent(r: &Report) {
    for h in r.hosts.iter().filter(|h| !h.answers) {
        outln!("! host {}: its agent did not answer at the end; its figures are the last it gave", h.name);
    }
}

/// What is known of a group of which nothing was started.
fn print_not_started(r: &Report) {
    if !r.vms.is_empty() {
        let mut t = table(&["VM", "from", "to", "now"]);
        for v in &r.vms {
            t.add_row([v.name.clone(), v.source.clone(), v.target.clone(), verdict(v, r.outcome)]);
        }
        outln!("{t}");
        for v in r.vms.iter().filter(|v| v.error.is_some()) {
            outln!("! {}: {}", v.name, v.error.as_deref().unwrap_or(""));
        }
        print_silent(r);
    } else if r.prepare_ms.is_some() {
        outln!("group {}: nothing was started; every VM is where it was", r.group);
    }
}

fn or_dash(ms: Option<f64>) -> Cell {
    right(ms.map_or_else(|| "-".to_owned(), millis))
}

/// Whether earlier runs had moved all of it.
fn nothing_left(r: &Report) -> bool {
    !r.vms.is_empty() && r.vms.iter().all(|v| v.phase == ALREADY)
}

/// The final table.
pub(super) fn rows(r: &Report) -> Table {
    let mut t = table(&[
        "VM",
        "from",
        "to",
        "now",
        "time",
        "downtime",
        "RAM",
        "QEMU sent",
        "core link",
        "unique",
        "shared",
        "ref",
        "remote ref",
        "uniform",
        "asked",
    ]);
    for v in &r.vms {
        let mut row = vec![
            Cell::new(&v.name),
            Cell::new(&v.source),
            Cell::new(&v.target),
            Cell::new(verdict(v, r.outcome)),
            or_dash(v.total_ms),
            or_dash(v.downtime_ms),
        ];
        if v.phase == ALREADY {
            // Nothing of it passed in this run.
            row.extend((0..9).map(|_| right("-")));
        } else {
            row.extend([v.ram_bytes, v.stream_bytes, v.wire_bytes].map(|n| right(bytes(n))));
            row.extend(pages(&v.pages));
        }
        t.add_row(row);
    }
    t
}

/// How many ended how, and how long it took as far as that is known.
pub(super) fn summary(r: &Report) -> String {
    let count = |v: Verdict| r.vms.iter().filter(|x| x.verdict == v).count();
    let some = |n: usize, what: &str| if n == 0 { String::new() } else { format!(", {n} {what}") };
    let mut line = format!(
        "group {}, method {}: {} moved, {} stayed, {} in doubt{}{}{}",
        r.group,
        r.method,
        count(Verdict::Moved),
        count(Verdict::Stayed),
        count(Verdict::InDoubt) + count(Verdict::Open),
        some(count(Verdict::Lost), "lost"),
        some(r.vms.iter().filter(|v| v.ended_since).count(), "of the moved ended since"),
        some(r.vms.iter().filter(|v| v.old_copy_runs).count(), "of the moved with an old copy that runs"),
    );
    if nothing_left(r) {
        line.push_str("; earlier runs had moved all of it");
        return line;
    }
    let took = [("prepared in", r.prepare_ms), ("moved in", r.group_ms)];
    let took: Vec<String> =
        took.iter().filter_map(|(what, ms)| Some(format!("{what} {}", millis((*ms)?)))).collect();
    if !took.is_empty() {
        line.push_str(&format!("; {}", took.join(", ")));
    }
    line
}

/// What passed, and what it cost.
fn print_totals(r: &Report) {
    outln!(
        "core link by the agents' count: {} (of it pushed {}); forwarded inside the target rack: {}; QEMU sent {}",
        bytes(r.totals.wire_bytes),
        bytes(r.totals.push_bytes),
        bytes(r.totals.forwarded_bytes),
        bytes(r.totals.stream_bytes)
    );
    if r.totals.pages.spared > 0 {
        outln!(
            "{} versions of pages that were being written were not sent, because a newer one came while they were held back",
            r.totals.pages.spared
        );
    }
    print_work(&r.totals.work, r.totals.cpu_s_per_gib);
}

/// What to know of the figures, and what an operator can do now.
pub(super) fn hints(r: &Report) -> Vec<String> {
    let any = |is: fn(&VmReport) -> bool| r.vms.iter().any(is);
    let mut out = Vec::new();
    if any(|v| v.wall_clock) {
        out.push(
            "some times are differences of hosts' wall clocks: a clock that was set meanwhile shows in them"
                .to_owned(),
        );
    }
    if any(|v| v.verdict == Verdict::InDoubt) {
        out.push(
            "In doubt: the agents keep trying to settle it. `irlm settle --help` says what you can do."
                .to_owned(),
        );
    }
    if any(|v| v.verdict == Verdict::Lost) {
        let mut line = "Lost: no copy of it runs.".to_owned();
        let left: Vec<String> = r
            .vms
            .iter()
            .filter(|v| v.copy_at_source)
            .map(|v| {
                format!(
                    " The copy of {} that {} gave up is paused there, and left for you.",
                    v.name, v.source
                )
            })
            .collect();
        line.push_str(&left.concat());
        out.push(line);
    }
    if any(|v| v.old_copy_runs) {
        out.push(
            "Old copy runs: the VM belongs to its target. Stop the old copy: both may write to the same disk."
                .to_owned(),
        );
    }
    out
}

/// What was verified of the VMs that moved, and of which nothing was and why.
pub(super) fn verified(r: &Report) -> Vec<String> {
    let of = |is: fn(Proof) -> bool| -> Vec<&VmReport> {
        r.vms.iter().filter(|v| v.phase != ALREADY && v.verified.is_some_and(is)).collect()
    };
    let names = |vms: &[&VmReport]| vms.iter().map(|v| &*v.name).collect::<Vec<_>>().join(", ");
    let pages = |vms: &[&VmReport]| vms.iter().filter_map(|v| v.verified).map(Proof::pages).sum::<u64>();
    let mut out = Vec::new();
    let mut say = |vms: Vec<&VmReport>, line: &dyn Fn(&[&VmReport]) -> String| {
        if !vms.is_empty() {
            out.push(line(&vms));
        }
    };
    say(of(|p| matches!(p, Proof::Pages(_))), &|vms| {
        format!("verified: {} pages of {} are at their target as they were sent", pages(vms), names(vms))
    });
    say(of(|p| matches!(p, Proof::Before(_))), &|vms| {
        format!(
            "verified: {} pages of {} were at their target as they were sent before they ran there; the others came while they ran",
            pages(vms),
            names(vms)
        )
    });
    for v in of(|p| matches!(p, Proof::Ram(_))) {
        let Some(Proof::Ram(ram)) = v.verified else { continue };
        out.push(in_ram(&v.name, &ram));
    }
    let mut say = |vms: Vec<&VmReport>, line: &dyn Fn(&[&VmReport]) -> String| {
        if !vms.is_empty() {
            out.push(line(&vms));
        }
    };
    say(of(|p| p == Proof::NotInPath), &|vms| {
        format!("not verified: {}: no agent saw the pages", names(vms))
    });
    say(of(|p| p == Proof::Off), &|vms| format!("not verified: {}: [verify] pages is \"off\"", names(vms)));
    say(of(|p| p == Proof::Lost), &|vms| {
        format!(
            "not verified: {}: an agent was started anew in the middle, or pages still waited",
            names(vms)
        )
    });
    out
}

/// What comparing a VM's memory came to.
fn in_ram(vm: &str, ram: &InRam) -> String {
    let mut line = format!(
        "verified: {} pages of {vm} were the same in memory at both hosts while it was stopped, for {} ms of its downtime",
        ram.pages, ram.ms
    );
    match ram.passed {
        0 => line.push_str("; no agent saw them pass"),
        passed => line.push_str(&format!("; {passed} are at their target as they were sent")),
    }
    if ram.clocks > 0 {
        line.push_str(&format!("; {} of them differ, because KVM has clocks of the guest there", ram.clocks));
    }
    if ram.unread > 0 {
        line.push_str(&format!("; {} pages were not compared: blocks below 1 MiB, as ROMs are, and what cannot be read at both hosts", ram.unread));
    }
    line
}

/// Whether the VM runs at its target and lacks pages.
fn fetches(v: &VmReport) -> bool {
    v.target_status.as_ref().is_some_and(|t| t.phase == Phase::Fetching)
}

/// Of a VM that ran before its pages were there: how long that took, and how long its vCPUs waited.
pub(super) fn early(v: &VmReport) -> Option<String> {
    let t = v.target_status.as_ref()?;
    if fetches(v) {
        // What its target's agent said last may be older than what its source's agent said.
        let what = match t.waiting {
            n if n > 0 && v.verdict != Verdict::Moved => {
                format!("and lacks {n} page{} of its source", if n == 1 { "" } else { "s" })
            }
            _ => "and the agent there has yet to say that its last pages came".to_owned(),
        };
        return Some(format!("! {} is at {} {what}", v.name, v.target));
    }
    let all = &t.faults.as_ref()?.all;
    let us = |n: u64| if n < 1000 { format!("{n} µs") } else { millis(n as f64 / 1e3) };
    Some(format!(
        "{} ran at {} before its pages were there, for {}: {} waits for a page, half of them at most {}, the longest {}",
        v.name,
        v.target,
        v.fill_ms.map_or_else(|| "?".to_owned(), millis),
        all.count,
        us(all.p50_us),
        us(all.max_us)
    ))
}

/// What compression did, and what all of it cost. Plain QEMU says neither.
fn print_work(w: &Work, per_gib: Option<f64>) {
    if w.raw_bytes == 0 {
        return;
    }
    let levels: Vec<String> = w.by_level.iter().map(|(l, n)| format!("{} at {l}", bytes(*n))).collect();
    outln!(
        "contents {} sent as {} ({:.3}): zstd levels {}",
        bytes(w.raw_bytes),
        bytes(w.wire_bytes),
        w.wire_bytes as f64 / w.raw_bytes as f64,
        levels.join(", ")
    );
    outln!(
        "processor time, all hosts: hash {:.2} s, compress {:.2} s, decompress {:.2} s, similar {:.2} s, other {:.2} s; {:.2} s a GiB",
        w.hash_s,
        w.compress_s,
        w.decompress_s,
        w.similar_s,
        w.other_s,
        per_gib.unwrap_or_default()
    );
}

/// Where it is, and what its QEMU says there: nothing that nobody has seen.
pub(super) fn verdict(v: &VmReport, outcome: Outcome) -> String {
    let lost_at_target = v.target_status.as_ref().is_some_and(|t| t.phase == Phase::Lost);
    match v.verdict {
        Verdict::Moved if v.phase == ALREADY && v.state.is_empty() => format!("{ALREADY} to {}", v.target),
        Verdict::Moved if v.phase == ALREADY => format!("{ALREADY}, {} at {}", v.state, v.target),
        Verdict::Moved if v.old_copy_runs => {
            format!("{} at {}, and its old copy runs at {}", stands(v.phase, &v.state), v.target, v.source)
        }
        Verdict::Moved if v.state.is_empty() => format!("moved to {}", v.target),
        Verdict::Moved if v.state == ENDED && !v.ended_since => {
            format!("moved to {}, and left it again", v.target)
        }
        Verdict::Moved => format!("{} at {}", stands(v.phase, &v.state), v.target),
        Verdict::Stayed => match &*v.state {
            "" => format!("stayed at {} ({})", v.source, v.phase),
            "running" => format!("runs on at {} ({})", v.source, v.phase),
            "paused" => format!("paused at {}, as its owner left it ({})", v.source, v.phase),
            state => format!("{state} at {} ({})", v.source, v.phase),
        },
        Verdict::Lost if lost_at_target => format!("lost at {}", v.target),
        Verdict::Lost => format!("its QEMU has ended at {}", v.source),
        Verdict::InDoubt => "in doubt".to_owned(),
        Verdict::Open if outcome == Outcome::NothingStarted => v.phase.to_owned(),
        Verdict::Open => format!("{} (not watched to its end)", v.phase),
    }
}
