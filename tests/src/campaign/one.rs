//! One run from its first process to its verdict.

use super::act::{Act, Op};
use super::checks::{self, Truth};
use super::copy::lacks;
use super::schedule::{Fault, Schedule};
use super::vm::{Vm, Whereabouts, lock};
use super::world::{GROUP, World};
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long agents may take, when all is as it was, until every VM is settled.
const SETTLE: Duration = Duration::from_secs(20);
/// How long a copy may take to end that was told to.
const ENDS: Duration = Duration::from_secs(3);
/// For how long what is settled must stay so.
const QUIET: Duration = Duration::from_millis(600);
/// How long the next evacuation may take.
const NEXT: Duration = Duration::from_secs(40);

/// Something that must not be.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Bad {
    /// Which verdict: `two`, `lost`, `settled`, `guest`, `report`, `leftover`, `again`, `theirs`, or `lab` if the run itself
    /// failed.
    pub verdict: String,
    /// What was seen.
    pub what: String,
}

/// How one run ended.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Outcome {
    /// Its number in the campaign.
    pub n: u64,
    /// Its seed, hexadecimal.
    pub seed: String,
    /// The campaign's seed.
    pub campaign: u64,
    /// The schedule.
    pub line: String,
    /// What must not be; none if all is well.
    pub bad: Vec<Bad>,
    /// Why it was not done here, if it was not.
    pub skipped: Option<String>,
    /// VMs at their target, at their source, in doubt, and gone with a process that the schedule killed.
    pub vms: [u64; 4],
    /// Seconds.
    pub seconds: f64,
    /// Where logs and story are, if anything is bad.
    pub kept: Option<PathBuf>,
}

impl Outcome {
    /// The line that is printed.
    #[must_use]
    pub fn text(&self) -> String {
        let verdict = match (&self.skipped, self.bad.is_empty()) {
            (Some(why), _) => format!("skipped: {why}"),
            (None, true) => "ok".to_owned(),
            (None, false) => {
                let all: Vec<String> =
                    self.bad.iter().map(|b| format!("{}: {}", b.verdict, b.what)).collect();
                format!("BAD {}", all.join(" | "))
            }
        };
        let [moved, stayed, doubt, dead] = self.vms;
        let kept = self.kept.as_ref().map(|d| format!("; see {}", d.display())).unwrap_or_default();
        format!(
            "run {} seed {} {} — {verdict} (moved {moved}, stayed {stayed}, in doubt {doubt}, died {dead}; {:.1} s{kept})",
            self.n, self.seed, self.line, self.seconds
        )
    }
}

/// Does one run. Logs of a bad one go below `out`.
pub(super) fn run(world: &World, s: &Schedule, n: u64, campaign: u64, out: &Path) -> Outcome {
    let start = Instant::now();
    let seed = format!("{:016x}", s.seed);
    let mut o = Outcome {
        n,
        seed: seed.clone(),
        campaign,
        line: s.to_string(),
        bad: Vec::new(),
        skipped: lacks(s, &world.cache),
        vms: [0; 4],
        seconds: 0.0,
        kept: None,
    };
    if o.skipped.is_some() {
        return o;
    }
    let mut act = match Act::set_up(world, s) {
        Ok(act) => act,
        Err(e) => {
            o.bad.push(bad("lab", format!("{e:#}")));
            o.seconds = start.elapsed().as_secs_f64();
            return o;
        }
    };
    let mut judge = Judge { bad: Vec::new() };
    if let Err(e) = judge.whole(&mut act) {
        judge.add("lab", format!("{e:#}"));
    }
    o.vms = judge.count(&act);
    let ends = judge.end(&mut act);
    if let Err(e) = ends {
        judge.add("lab", format!("{e:#}"));
    }
    o.bad = judge.bad;
    o.seconds = start.elapsed().as_secs_f64();
    if !o.bad.is_empty() {
        let dir = out.join(&seed);
        match keep(&act, &o, &dir) {
            Ok(()) => o.kept = Some(dir),
            Err(e) => o.bad.push(bad("lab", format!("its logs could not be kept: {e:#}"))),
        }
    }
    drop(act);
    o.seconds = start.elapsed().as_secs_f64();
    o
}

fn bad(verdict: &str, what: String) -> Bad {
    Bad { verdict: verdict.to_owned(), what }
}

/// Writes down who saw what when, and what everybody logged.
fn keep(act: &Act<'_>, o: &Outcome, dir: &Path) -> Result<()> {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut text = format!("{}\n\n", o.text());
    for (at, what) in &act.told {
        text.push_str(&format!("{:9.3} {what}\n", at.as_secs_f64()));
    }
    for vm in &act.vms {
        let known = lock(&vm.known);
        text.push_str(&format!("\n{}", vm.name()));
        if let Some(why) = &known.excused {
            text.push_str(&format!(" ({why})"));
        }
        text.push_str(&format!("\n{}", known.history.story()));
    }
    std::fs::write(dir.join("story.txt"), text)?;
    act.world.keep_logs(dir)
}

/// Collects what must not be.
struct Judge {
    bad: Vec<Bad>,
}

impl Judge {
    fn add(&mut self, verdict: &str, what: String) {
        self.bad.push(bad(verdict, what));
    }

    /// The evacuation, what is made of it, and the next one.
    fn whole(&mut self, act: &mut Act<'_>) -> Result<()> {
        if let Some(op) = act.play()? {
            self.add("report", format!("`{op}` does not end"));
        }
        act.heal()?;
        self.settle(act)?;
        self.reports(act);
        self.statuses(act)?;
        self.copies(act);
        self.settings(act);
        if self.bad.is_empty() {
            self.again(act)?;
            self.copies(act);
        }
        Ok(())
    }

    /// Waits until everything is quiet, and each VM where somebody wants it.
    fn settle(&mut self, act: &mut Act<'_>) -> Result<()> {
        let until = Instant::now() + SETTLE;
        let file = act.world.dir(crate::net::Host::Ctl).join(format!("{GROUP}.toml"));
        let mut since: Option<Instant> = None;
        let mut prepared: Option<Instant> = None;
        loop {
            let excused = |name: &str| act.vms.iter().any(|v| v.name() == name && v.excused());
            let status = act.world.status(&file)?;
            let busy = checks::busy(&status, GROUP, excused);
            // Whoever prepared it is gone; its operator lets it go.
            let idle = act.unwatched && checks::only_prepared(&status, GROUP);
            prepared = idle.then(|| prepared.unwrap_or_else(Instant::now));
            if prepared.is_some_and(|p| p.elapsed() > Duration::from_secs(2)) {
                act.world.irlm(&["cancel", &file.display().to_string()])?;
                prepared = None;
            }
            owners_let_run(act);
            let wrong: Vec<String> = act.vms.iter().filter_map(unsettled).collect();
            if wrong.is_empty() && busy.is_none() && !idle {
                let quiet = *since.get_or_insert_with(Instant::now);
                if quiet.elapsed() > QUIET {
                    return Ok(());
                }
            } else {
                since = None;
            }
            if Instant::now() > until {
                for w in wrong {
                    self.add("settled", w);
                }
                if let Some(b) = busy {
                    self.add("settled", format!("something is still under way: {b}"));
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(60));
        }
    }

    /// Exit codes and reports of all evacuations that ended by themselves.
    fn reports(&mut self, act: &Act<'_>) {
        for op in &act.ops {
            let (Some(json), Some(code)) = (&op.json, op.code.filter(|c| *c >= 0)) else { continue };
            let text = std::fs::read_to_string(json).unwrap_or_default();
            let report: Value = serde_json::from_str(&text).unwrap_or_default();
            let mut truths = truths_of(act, op.ended);
            // A copy that was told to end may take a moment.
            let later = truths_of(act, op.ended + ENDS);
            for (t, later) in truths.iter_mut().zip(later).filter(|t| t.0.place == Whereabouts::Unclear) {
                *t = later;
            }
            // A second evacuation is refused in many ways; it may not say that it moved what is not there.
            // What stayed here may have moved since, by one that ended later, or that nobody watches.
            let later = |o: &Op| o.json.is_some() && (o.ended > op.ended || o.code.is_none_or(|c| c < 0));
            // Who started nothing may have found all of it moved already.
            let another = |o: &Op| o.json.is_some() && !std::ptr::eq(o, op);
            let crossed = act.ops.iter().any(|o| later(o) || code == 4 && another(o));
            let mut wrong = checks::report(&report, code, &truths, crossed);
            if op.what != "evacuate" && code == 1 {
                wrong.clear();
            }
            for w in wrong {
                self.add("report", format!("`{}`: {w}", op.what));
            }
        }
    }

    /// `irlm status` comes to be true within a few seconds.
    fn statuses(&mut self, act: &Act<'_>) -> Result<()> {
        let file = act.world.dir(crate::net::Host::Ctl).join(format!("{GROUP}.toml"));
        let until = Instant::now() + Duration::from_secs(6);
        let others = act.ops.iter().any(|o| o.json.is_some() && o.what != "evacuate");
        loop {
            let wrong = checks::status(
                &act.world.status(&file)?,
                GROUP,
                &truths_of(act, act.epoch.elapsed()),
                others,
            );
            if wrong.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                for w in wrong {
                    self.add("report", format!("`status`: {w}"));
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What was seen of all copies, and what guests say themselves.
    fn copies(&mut self, act: &mut Act<'_>) {
        for vm in &mut act.vms {
            let (wrong, theirs, excused) = {
                let mut known = lock(&vm.known);
                let wrong = known.history.wrong().map(str::to_owned);
                (wrong, known.theirs.take(), known.excused.is_some())
            };
            let name = vm.name().to_owned();
            if let Some(w) = wrong {
                self.bad.retain(|b| b.verdict != "two" || b.what != w);
                self.add("two", w);
                continue;
            }
            if let Some(w) = theirs {
                self.add("theirs", format!("{name}: {w}"));
            }
            if excused {
                continue;
            }
            let place = vm.whereabouts();
            let alive = vm.copies.iter_mut().map(|c| c.alive()).collect::<Vec<_>>();
            if place == Whereabouts::Nowhere {
                self.add("lost", format!("{name}: {} (alive: {alive:?})", vm.last()));
                continue;
            }
            let (n, runs) = match place {
                Whereabouts::Runs(n) => (n, true),
                Whereabouts::Stands(n) => (n, false),
                _ => continue,
            };
            let checked = vm.copies[n].check_guest(runs, &act.world.cache);
            vm.until_seen(place);
            if let Err(e) = checked {
                self.add("guest", format!("{name}, copy {n}: {e:#}"));
            } else if runs && let Err(e) = vm.copies[n].check_disk(&act.world.shared()) {
                self.add("guest", format!("{name}, copy {n}: {e:#}"));
            }
        }
    }

    /// A QEMU that stayed has its settings as they were found.
    fn settings(&mut self, act: &mut Act<'_>) {
        for vm in &mut act.vms {
            if vm.whereabouts() != Whereabouts::Runs(0) || !vm.copies[0].is_qemu() {
                continue;
            }
            match vm.copies[0].settings() {
                Ok(now) if now == vm.settings => {}
                Ok(now) => {
                    let what = differences(&vm.settings, &now);
                    self.bad.push(bad("leftover", format!("{}: QEMU's {what}", vm.name())));
                }
                Err(e) => self.bad.push(bad("leftover", format!("{}: {e:#}", vm.name()))),
            }
        }
    }

    /// The next evacuation of what is left works, with the same name, at once.
    fn again(&mut self, act: &mut Act<'_>) -> Result<()> {
        let left: Vec<usize> = (0..act.vms.len())
            .filter(|&n| matches!(act.vms[n].whereabouts(), Whereabouts::Runs(0) | Whereabouts::Stands(0)))
            .filter(|&n| !act.vms[n].excused())
            // Paused while its migration failed: QEMU 7.2 moves it no more until it has run, and that is said.
            .filter(|&n| !act.vms[n].last().contains("postmigrate"))
            .collect();
        if format!("{}", act.s).contains("full ") {
            // What could not be written is tried again every two seconds.
            std::thread::sleep(Duration::from_millis(2500));
        }
        if left.is_empty() {
            if let Some(why) = act.world.name_is_taken(act.s) {
                self.add("leftover", format!("the group's name cannot be used again: {why}"));
            }
            return Ok(());
        }
        for &n in &left {
            let newest = act.vms[n].copies.len() - 1;
            act.vms[n].copies[newest].proc.kill();
            act.add_target(n)?;
        }
        let file = act.group(GROUP, &left)?;
        act.evacuate("next", &file)?;
        let code = match act.last_op(NEXT) {
            Ok(code) => code,
            Err(e) => {
                self.add("again", format!("{e:#}"));
                return Ok(());
            }
        };
        if code != 0 {
            let said = act.ops.last().map(|o| why(o.json.as_deref())).unwrap_or_default();
            self.add("again", format!("the next evacuation ended with {code}: {said}"));
            return Ok(());
        }
        std::thread::sleep(QUIET);
        for &n in &left {
            let place = act.vms[n].whereabouts();
            let (at, want) = (act.vms[n].copies.len() - 1, lock(&act.vms[n].known).paused);
            let ok = if want { Whereabouts::Stands(at) } else { Whereabouts::Runs(at) };
            if place != ok {
                let last = act.vms[n].last();
                self.add("again", format!("{} moved, it says, and it is {last}", act.vms[n].name()));
            }
        }
        Ok(())
    }

    /// Moved, stayed, in doubt, and gone with a process that the schedule killed.
    fn count(&self, act: &Act<'_>) -> [u64; 4] {
        let mut vms = [0; 4];
        for vm in &act.vms {
            let at = match vm.whereabouts() {
                _ if vm.excused() => 3,
                Whereabouts::Runs(0) | Whereabouts::Stands(0) => 1,
                Whereabouts::Runs(_) | Whereabouts::Stands(_) => 0,
                Whereabouts::Unclear | Whereabouts::Nowhere => 2,
            };
            vms[at] += 1;
        }
        vms
    }

    /// Ends everything, and looks at what is left.
    fn end(&mut self, act: &mut Act<'_>) -> Result<()> {
        for left in act.world.end(&mut act.daemons) {
            self.add("leftover", left);
        }
        for vm in &mut act.vms {
            vm.end();
        }
        for op in &mut act.ops {
            op.proc.kill();
        }
        for left in act.world.leftovers(act.s) {
            self.add("leftover", left);
        }
        Ok(())
    }
}

/// Who wanted to let his VM run again, and could not while it moved, does so now.
fn owners_let_run(act: &mut Act<'_>) {
    for vm in &act.vms {
        if !lock(&vm.known).back {
            continue;
        }
        let Whereabouts::Stands(n) = vm.whereabouts() else { continue };
        let done = || -> Result<()> {
            let mut hand = vm.copies[n].owner().connect()?;
            if hand.state()? != "paused" {
                return Ok(());
            }
            {
                let mut known = lock(&vm.known);
                (known.paused, known.back) = (false, false);
                known.history.owner_continues(n, act.epoch.elapsed());
            }
            hand.cont()
        };
        if let Err(e) = done() {
            vm.note(format!("its owner cannot let it run: {e:#}"));
        }
    }
}

/// Why a VM is not as somebody wants it.
fn unsettled(vm: &Vm) -> Option<String> {
    let (paused, wrong) = {
        let known = lock(&vm.known);
        (known.paused, known.history.wrong().is_some())
    };
    // Two is two; nothing more can be waited for.
    if vm.excused() || wrong {
        return None;
    }
    let last = vm.last();
    match (vm.whereabouts(), paused) {
        (Whereabouts::Runs(_), false) | (Whereabouts::Stands(_), true) => None,
        // Both copies of a paused VM of ours stand still, and which is its owner's only its agents can tell.
        (Whereabouts::Unclear, true) if !last.contains("running") => None,
        (Whereabouts::Runs(_), true) => {
            Some(format!("{} runs, and its owner had it paused: {last}", vm.name()))
        }
        (Whereabouts::Stands(_), false) => Some(format!("{} does not run: {last}", vm.name())),
        (Whereabouts::Unclear, _) => Some(format!("{}: not exactly one copy: {last}", vm.name())),
        // That is `lost`.
        (Whereabouts::Nowhere, _) => None,
    }
}

fn truths_of(act: &Act<'_>, when: Duration) -> Vec<Truth> {
    let touched = |n: usize| {
        let paused = act.s.paused.contains(&n);
        let own = |f: &Fault| matches!(f, Fault::Pause(vm, _) | Fault::Save(vm) if *vm == n);
        paused || act.s.events.iter().any(|e| own(&e.fault))
    };
    let of = |(n, vm): (usize, &Vm)| {
        let place = vm.whereabouts();
        let known = lock(&vm.known);
        let last = known.history.last();
        let state = match place {
            Whereabouts::Runs(n) | Whereabouts::Stands(n) => last[n].to_owned(),
            _ => "ended".to_owned(),
        };
        let ended = place == Whereabouts::Nowhere;
        let ended_before = ended && vm.killed_at.is_some_and(|at| at + Duration::from_secs(1) < when);
        let name = vm.name().to_owned();
        Truth { name, place, state, excused: known.excused.is_some(), ended_before, touched: touched(n) }
    };
    act.vms.iter().enumerate().map(of).collect()
}

/// What of QEMU's settings is not as before.
fn differences(before: &Value, now: &Value) -> String {
    let mut out = Vec::new();
    let none = serde_json::Map::new();
    let (old, new) = (before["parameters"].as_object(), now["parameters"].as_object());
    let (old, new) = (old.unwrap_or(&none), new.unwrap_or(&none));
    for key in old.keys().chain(new.keys()) {
        if old.get(key) != new.get(key) && !out.iter().any(|o: &String| o.starts_with(key.as_str())) {
            let show = |v: Option<&Value>| v.map_or("unset".to_owned(), ToString::to_string);
            out.push(format!("{key} was {} and is {}", show(old.get(key)), show(new.get(key))));
        }
    }
    let caps = |v: &Value| v["capabilities"].as_array().cloned().unwrap_or_default();
    for (a, b) in caps(before).iter().zip(&caps(now)) {
        if a != b {
            out.push(format!("{} is {}", b["capability"].as_str().unwrap_or("?"), b["state"]));
        }
    }
    out.join(", ")
}

/// What a report says went wrong.
fn why(json: Option<&Path>) -> String {
    let text = json.and_then(|f| std::fs::read_to_string(f).ok()).unwrap_or_default();
    let report: Value = serde_json::from_str(&text).unwrap_or_default();
    let rows = report["vms"].as_array().into_iter().flatten().map(|r| &r["error"]);
    let all = report["problems"].as_array().into_iter().flatten().chain(rows);
    let lines: Vec<&str> = all.filter_map(Value::as_str).collect();
    if lines.is_empty() { "no report says why".to_owned() } else { lines.join("; ") }
}
