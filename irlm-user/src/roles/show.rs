//! Live progress, for `evacuate` and `status --follow`: bars where there is a terminal, plain lines
//! where there is none. Progress goes to standard error, results to standard
//! output.

use crate::control::api::{PreparePhase, PrepareStatus};
use crate::control::coordinator::Scene;
use crate::control::coordinator::plan::Plan;
use crate::control::coordinator::watch::{AgentView, Verdict, VmView};
use crate::obs::human::bytes;
use crate::obs::say::errln;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

// What a move came to.
mod report;
// What agents say of their groups.
mod status;

pub(super) use report::print_report;
pub(super) use status::{print_keys, print_status};

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

#[cfg(test)]
mod tests;
