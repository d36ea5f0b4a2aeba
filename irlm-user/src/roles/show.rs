//! Live progress, for `evacuate` and `status --follow`: bars where there is a terminal, plain lines where there is
//! none, and the final table. Progress goes to standard error, results to standard output.

use crate::control::api::{PageCounts, Phase, PreparePhase, PrepareStatus, Role, VmStatus, Work};
use crate::control::coordinator::Scene;
use crate::control::coordinator::plan::Plan;
use crate::control::coordinator::report::{Outcome, Report, VmReport};
use crate::control::coordinator::watch::{ALREADY, AgentView, ENDED, Verdict, VmView, stands};
use crate::obs::human::{bytes, millis, rate};
use crate::obs::say::{errln, outln};
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

/// Most VMs shown at once; of a larger group those under way are.
const MAX_BARS: usize = 24;

/// How often a group line is printed where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows scenes as they come.
#[derive(Debug)]
pub(super) struct Show {
    agents: Vec<String>,
    began: Instant,
    quiet: bool,
    screen: Option<Screen>,
    /// Without a terminal: what was last said of each VM, and when of the group.
    said: HashMap<String, String>,
    last_line: Option<Instant>,
}

#[derive(Debug)]
struct Screen {
    all: MultiProgress,
    group: ProgressBar,
    bars: Vec<ProgressBar>,
}

impl Show {
    pub(super) fn new(plan: &Plan, quiet: bool) -> Self {
        let screen = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(5));
            let style = |template: &str| {
                // The templates are ours; a wrong one would only look plain.
                ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> ")
            };
            let bars = (0..plan.config.vm.len().min(MAX_BARS))
                .map(|_| {
                    let bar = all.add(ProgressBar::new(100));
                    bar.set_style(style("{prefix:28!} [{bar:24}] {msg}"));
                    bar
                })
                .collect();
            let group = all.add(ProgressBar::new(100));
            group.set_style(style("{prefix:28!} [{bar:24}] {msg}"));
            Screen { all, group, bars }
        });
        Self {
            agents: plan.agents.iter().map(|a| a.name.clone()).collect(),
            began: Instant::now(),
            quiet,
            screen,
            said: HashMap::new(),
            last_line: None,
        }
    }

    pub(super) fn scene(&mut self, scene: &Scene<'_>) {
        if self.quiet {
            return;
        }
        match scene {
            Scene::Say(line) => self.say(line),
            Scene::Preparing(states) => self.preparing(states),
            Scene::Moving(vms, agents) => self.moving(vms, agents),
        }
    }

    /// Takes the bars away, so that what follows stays.
    pub(super) fn end(&mut self) {
        if let Some(s) = self.screen.take() {
            // Where the terminal is gone there is nothing to clear.
            let _ = s.all.clear();
        }
    }

    fn say(&self, line: &str) {
        let line = format!("{:>7.1} s  {line}", self.began.elapsed().as_secs_f64());
        match &self.screen {
            Some(s) => {
                let _ = s.all.println(line);
            }
            None => errln!("{line}"),
        }
    }

    /// Whether it is time for a line about the group.
    fn line_due(&mut self) -> bool {
        let due = self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }

    fn preparing(&mut self, states: &[Option<PrepareStatus>]) {
        let sum = |f: fn(&PrepareStatus) -> u64| states.iter().flatten().map(f).sum::<u64>();
        let (done, total) = (sum(|s| s.pages_done), sum(|s| s.pages_total));
        let ready = states.iter().flatten().filter(|s| s.phase == PreparePhase::Ready).count();
        let text = format!(
            "{ready} of {} hosts ready; {} of {} guest memory read, {} distinct contents",
            states.len(),
            bytes(done.saturating_mul(4096)),
            bytes(total.saturating_mul(4096)),
            sum(|s| s.distinct)
        );
        if let Some(s) = &self.screen {
            s.group.set_prefix("preparing");
            s.group.set_position(percent(done, total));
            s.group.set_message(text);
            for ((bar, name), state) in s.bars.iter().zip(&self.agents).zip(states) {
                bar.set_prefix(name.clone());
                if let Some(p) = state {
                    bar.set_position(percent(p.pages_done, p.pages_total));
                    bar.set_message(format!("{:?}", p.phase).to_lowercase());
                }
            }
        } else if self.line_due() {
            self.say(&text);
        }
    }

    fn moving(&mut self, vms: &[VmView], agents: &[AgentView]) {
        let settled = vms.iter().filter(|v| v.verdict != Verdict::Open).count();
        let of = |f: fn(&VmView) -> u64| vms.iter().map(f).sum::<u64>();
        let (gone, total) = (of(|v| progress(v).0), of(|v| progress(v).1));
        let silent: Vec<&str> =
            agents.iter().filter(|a| !a.answers && a.error.is_some()).map(|a| &*a.name).collect();
        let mut text = format!("{settled} of {} settled, {} over the core link", vms.len(), bytes(of(wire)));
        if !silent.is_empty() {
            text.push_str(&format!("; not answering: {}", silent.join(", ")));
        }
        if let Some(s) = &self.screen {
            s.group.set_prefix("group");
            s.group.set_position(percent(gone, total));
            s.group.set_message(text);
            // Those under way first, each group in the file's order.
            let mut order: Vec<&VmView> = vms.iter().collect();
            if vms.len() > MAX_BARS {
                order.sort_by_key(|v| v.verdict != Verdict::Open);
            }
            for (bar, v) in s.bars.iter().zip(order) {
                let (gone, total) = progress(v);
                bar.set_prefix(format!("{} {}>{}", v.name, v.source_host, v.target_host));
                bar.set_position(percent(gone, total));
                bar.set_message(line(v));
            }
            return;
        }
        for v in vms {
            if self.said.insert(v.name.clone(), v.now().to_owned()).as_deref() != Some(v.now()) {
                self.say(&format!("{} ({} to {}): {}", v.name, v.source_host, v.target_host, line(v)));
            }
        }
        if self.line_due() {
            self.say(&format!("group: {text}, {} %", percent(gone, total)));
        }
    }
}

fn wire(v: &VmView) -> u64 {
    v.source.status().or(v.target.status()).map_or(0, |s| s.wire_bytes)
}

/// Bytes of guest RAM dealt with, and in all.
fn progress(v: &VmView) -> (u64, u64) {
    let Some(s) = v.source.status().or(v.target.status()) else { return (0, 0) };
    match v.verdict {
        Verdict::Moved => (s.ram_total, s.ram_total),
        // Before the stream starts nothing is known to remain.
        _ if s.started_ns == 0 => (0, s.ram_total),
        _ => (s.ram_total.saturating_sub(s.ram_remaining), s.ram_total),
    }
}

fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(0).min(100)
}

/// What there is to say of a VM, in one line.
fn line(v: &VmView) -> String {
    let mut out = v.now().to_owned();
    if wire(v) != 0 {
        out.push_str(&format!(", {} sent", bytes(wire(v))));
    }
    let waiting = v.target.status().map_or(0, |s| s.waiting);
    if waiting != 0 {
        out.push_str(&format!(", {waiting} pages wait"));
    }
    if let Some(e) = v.error() {
        out.push_str(&format!(": {e}"));
    }
    out
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut t = Table::new();
    t.load_style(presets::UTF8_BORDERS_ONLY);
    t.set_header(header.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    t
}

pub(super) fn right(text: impl std::fmt::Display) -> Cell {
    Cell::new(text.to_string()).set_alignment(CellAlignment::Right)
}

fn pages(p: &PageCounts) -> [Cell; 6] {
    [p.unique, p.shared, p.reference, p.remote_reference, p.uniform, p.answered].map(right)
}

fn or_dash(ms: Option<f64>) -> Cell {
    right(ms.map_or_else(|| "-".to_owned(), millis))
}

/// The final table and the lines below it.
pub(super) fn print_report(r: &Report) {
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

/// Whether earlier runs had moved all of it.
fn nothing_left(r: &Report) -> bool {
    !r.vms.is_empty() && r.vms.iter().all(|v| v.phase == ALREADY)
}

/// The final table.
fn rows(r: &Report) -> Table {
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
fn summary(r: &Report) -> String {
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
fn hints(r: &Report) -> Vec<String> {
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

/// Whether the VM runs at its target and lacks pages.
fn fetches(v: &VmReport) -> bool {
    v.target_status.as_ref().is_some_and(|t| t.phase == Phase::Fetching)
}

/// Of a VM that ran before its pages were there: how long that took, and how long its vCPUs waited.
fn early(v: &VmReport) -> Option<String> {
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
fn verdict(v: &VmReport, outcome: Outcome) -> String {
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

/// A VM's phase in an agent's status, with its QEMU's own word where the two are not the same.
fn phase_words(v: &VmStatus) -> String {
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
pub(super) fn print_status(views: &[AgentView]) {
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
                let mut row = vec![
                    Cell::new(&a.name),
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
                t.add_row(row);
                if let Some(e) = &v.error {
                    errors.push(format!("! {} {}: {e}", a.name, v.name));
                }
            }
            let h = &g.host;
            outln!(
                "{}: group {}: pushed {} ({} void), forwarded {}, store {}",
                a.name,
                g.group,
                bytes(h.push_bytes),
                h.push_void,
                bytes(h.forwarded_bytes),
                bytes(h.store_bytes)
            );
            if let Some(m) = &h.multicast {
                outln!(
                    "{}: group {}: multicast to {} hosts: {} contents, {}, repaired {}; {} contents by unicast after all; \
                     heard {} contents; refused {}, dropped {}",
                    a.name,
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
                outln!(
                    "{}: group {}: share of the core link {}, kept by {by}",
                    a.name,
                    g.group,
                    rate(s.bits)
                );
            }
            if let Some(b) = &h.bpf {
                let (mut out, mut arrived) = (0, 0);
                for class in b.of_vms() {
                    out += class.core_out.bytes + class.rack_out.bytes;
                    arrived += class.core_in.bytes + class.rack_in.bytes;
                }
                outln!(
                    "{}: on the wire: pages out {} in {} (switchover {}), control {}, forward {}, other {}",
                    a.name,
                    bytes(out),
                    bytes(arrived),
                    bytes(b.switchover.bytes()),
                    bytes(b.control.bytes()),
                    bytes(b.forward.bytes()),
                    bytes(b.other.bytes())
                );
            }
        }
    }
    if !t.is_empty() {
        outln!("{t}");
    }
    for e in errors {
        outln!("{e}");
    }
}

#[cfg(test)]
mod tests;
