//! The foundation's points: bytes, times, identity and downtime of all methods under both QEMU versions, and the
//! proxy's tax.

use super::{Only, Point, at_most, unmeasured};
use crate::cmd_bench;
use crate::cmd_run::rounds;
use crate::cmd_test::ended;
use crate::opts::SpecArgs;
use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::Method;
use irlm_tests::janitor::Run;
use irlm_tests::lab::Lab;
use irlm_tests::report;
use irlm_tests::round::Round;
use irlm_user::core::squeeze::Mode;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(clap::Parser)]
struct Spec {
    #[command(flatten)]
    spec: SpecArgs,
}

/// How the points of a rack begin whose guests do not write.
const RACK: &[&str] = &["1-bytes-oc", "1-bytes-gm", "1-ebpf-gm", "1-ebpf-irlm", "2-time-oc", "2-time-gm"];
/// How those of every rack begin.
const ANY_RACK: &[&str] = &["3-ram", "4-downtime"];

/// These points are about what sharing saves; what compression adds is another matter (docs/decisions/0009).
const SHARING: Mode = Mode::Forwarded;

pub(super) fn points(irlm: &Path, out: &Path, only: &Only) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (name, words) in [
        ("7.2", vec!["lab", "--qemu", "7.2"]),
        ("10.0", vec!["lab", "--qemu", "10.0"]),
        ("7.2 to 10.0", vec!["lab", "--qemu", "7.2", "--qemu-target", "10.0"]),
    ] {
        for writers in [0, 300] {
            let rack = format!("qemu-{}-writers-{writers}", name.replace(' ', "-"));
            let mut ids = ANY_RACK.iter().chain(RACK.iter().filter(|_| writers == 0));
            if !ids.any(|id| only.wants(&format!("{id}-{rack}"))) {
                continue;
            }
            let cache = Cache::open()?;
            let lab = Lab::new(cache.clone(), Spec::parse_from(&words).spec.spec(&cache)?, &|line| {
                eprintln!("{line}");
            })?;
            eprintln!("\nQEMU {name}, each guest writes {writers} pages a second");
            let r = rounds(&lab, &Method::ALL, irlm, writers, SHARING)?;
            eprintln!("{}", report::table(&r));
            let file = format!("foundation-{}-{writers}.json", name.replace(' ', "-"));
            report::json(&r, &out.join(file))?;
            judge(&mut points, &rack, &r, writers == 0)?;
            let id = format!("2-time-gm-{rack}");
            if writers == 0 && only.wants(&id) {
                beside_gm(&mut points, &id, &lab, irlm, &r)?;
            }
        }
    }
    if only.wants("5-proxy-tax") {
        let share = cmd_bench::proxy(irlm, 3)?;
        let how = "one 512 MiB guest of random content on an unshaped link, median of 3 moves each";
        let what = "plain QEMU's rate divided by irlm's";
        at_most(&mut points, "5-proxy-tax", what, how, 1.0 / share.max(1e-9), 2.0)?;
    }
    for (source, target) in [("7.2", "7.2"), ("10.0", "10.0"), ("7.2", "10.0")] {
        let id = match source == target {
            true => format!("6-failures-{source}"),
            false => format!("6-failures-{source}-to-{target}"),
        };
        if only.wants(&id) {
            failures(&mut points, irlm, &id, source, target)?;
        }
    }
    if only.wants("8-time") {
        clean_clone(&mut points)?;
    }
    Ok(points)
}

fn judge(points: &mut Vec<Point>, name: &str, rounds: &[Round], idle: bool) -> Result<()> {
    let of = |m: &str| rounds.iter().find(|r| r.method == m).with_context(|| format!("no round of {m}"));
    let (oc, gm, irlm) = (of("oc")?, of("gm")?, of("irlm")?);
    let bytes = |r: &Round| r.core.forward as f64;
    let bytes_how = "interface counter of the core link, 2x2 guests of 256 MiB at the default rates, contents on the core link not compressed";
    let time_how = "from the group's start to its last guest handed over, same runs";
    if idle {
        let ratio = |r: &Round| bytes(irlm) / bytes(r);
        at_most(
            points,
            &format!("1-bytes-oc-{name}"),
            "core-link bytes of irlm by oc",
            bytes_how,
            ratio(oc),
            0.52,
        )?;
        at_most(
            points,
            &format!("1-bytes-gm-{name}"),
            "core-link bytes of irlm by gm",
            bytes_how,
            ratio(gm),
            0.80,
        )?;
        let ratio = |r: &Round| irlm.group_ms / r.group_ms;
        at_most(points, &format!("2-time-oc-{name}"), "group time of irlm by oc", time_how, ratio(oc), 0.75)?;
        for r in [gm, irlm] {
            let id = format!("1-ebpf-{}-{name}", r.method);
            let what = "eBPF's count of page data that left the source hosts, off the interface counter";
            match r.bpf_core_out() {
                Some(n) => at_most(points, &id, what, bytes_how, (n as f64 / bytes(r) - 1.0).abs(), 0.01)?,
                None => unmeasured(points, &id, what, "eBPF counted nothing")?,
            }
        }
    }
    let extra = irlm.downtime_median_ms - oc.downtime_median_ms;
    let how = "from QEMU's STOP event to the word that the target may run, median of the guests";
    at_most(points, &format!("4-downtime-{name}"), "downtime of irlm above oc's, ms", how, extra, 30.0)?;
    // A round fails unless all memory is identical and every service answers, so that it is here is the proof.
    Point {
        id: format!("3-ram-{name}"),
        what: "methods whose guests' memory was not identical".to_owned(),
        value: Some(rounds.iter().filter(|r| r.compared == 0).count() as f64),
        bound: Some(0.0),
        holds: rounds.iter().all(|r| r.compared > 0),
        how: "every byte of main memory of every guest, source and target paused".to_owned(),
    }
    .print(points)
}

/// Both methods are bound by the same edge link and lie within a hundredth of each other, so one pair of runs is not
/// enough to tell them apart.
fn beside_gm(points: &mut Vec<Point>, id: &str, lab: &Lab, irlm: &Path, first: &[Round]) -> Result<()> {
    let time = |rounds: &[Round], m: &str| rounds.iter().find(|r| r.method == m).map(|r| r.group_ms);
    let ratio = |rounds: &[Round]| Some(time(rounds, "irlm")? / time(rounds, "gm")?);
    let mut ratios = vec![ratio(first).context("no rounds of gm and irlm")?];
    for methods in [[Method::Irlm, Method::Gm], [Method::Gm, Method::Irlm]] {
        let pair = rounds(lab, &methods, irlm, 0, SHARING)?;
        ratios.push(ratio(&pair).context("no rounds of gm and irlm")?);
    }
    ratios.sort_by(f64::total_cmp);
    let how = format!("median of three pairs of runs, in changing order: {ratios:.4?}");
    at_most(points, id, "group time of irlm by gm", &how, ratios[1], 1.0)
}

/// Every failure case under a pair of QEMUs, by the same command that a person would type.
fn failures(points: &mut Vec<Point>, irlm: &Path, id: &str, source: &str, target: &str) -> Result<()> {
    let mut c = Command::new(std::env::current_exe().context("find the lab's own program")?);
    c.args(["test", "--qemu", source, "--qemu-target", target, "fail-", "doubt-", "--irlm"]).arg(irlm);
    let start = Instant::now();
    let (mut all, mut wrong) = (0, Vec::new());
    told(&mut c, |line| {
        if let Some((name, how)) = ended(line) {
            all += 1;
            if how != "ok" {
                wrong.push(name.to_owned());
            }
        }
    })?;
    if all == 0 {
        bail!("no failure case ran under QEMU {source} and {target}");
    }
    let how = format!(
        "{all} cases (fail-*, doubt-*) on 2x2 guests of 256 MiB that write, QEMU {source} at the source and {target} at the target, in {:.0} s; \
         QEMU itself is asked which copies run; not so: {}",
        start.elapsed().as_secs_f64(),
        if wrong.is_empty() { "none".to_owned() } else { wrong.join(", ") }
    );
    let what = "failure cases that did not end as rule 1 demands";
    at_most(points, id, what, &how, wrong.len() as f64, 0.0)
}

/// `cargo xtask test` as a stranger's first one, but for the cache: in a clone that has nothing built.
fn clean_clone(points: &mut Vec<Point>) -> Result<()> {
    let git = |args: &[&str]| -> Result<String> {
        let out = Command::new("git").args(args).output().context("start git")?;
        if !out.status.success() {
            bail!("git {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let root = git(&["rev-parse", "--show-toplevel"])?;
    // Below a lab's directory, so that it is removed whatever happens.
    let run = Run::start()?;
    let clone = run.dir().join("clone");
    let to = clone.display().to_string();
    git(&["clone", "--quiet", "--no-local", &root, &to])?;
    let commit = git(&["-C", &to, "rev-parse", "--short", "HEAD"])?;
    let mut c = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    c.args(["xtask", "test"]).current_dir(&clone).env("CARGO_TARGET_DIR", clone.join("target"));
    let start = Instant::now();
    let mut last = String::new();
    let green = told(&mut c, |line| {
        if !line.is_empty() {
            line.clone_into(&mut last);
        }
    })?;
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    Point {
        id: "8-time".to_owned(),
        what: "minutes of `cargo xtask test` in a clean clone, all green".to_owned(),
        value: Some(minutes),
        bound: Some(25.0),
        holds: green && minutes <= 25.0,
        how: format!("clone of {commit} with a target directory of its own, {last}"),
    }
    .print(points)
}

/// Runs a command, hands on each line of its standard output, and copies it to standard error: ours is for the points.
pub(super) fn told(c: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
    let mut child = c.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start a test run")?;
    for line in BufReader::new(child.stdout.take().context("no output")?).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        eprintln!("{line}");
        each(line.trim_end());
    }
    Ok(child.wait()?.success())
}
