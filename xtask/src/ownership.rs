//! The points of `evidence ownership` that cargo measures: the tests, the simulations' schedules, who interprets the
//! handover's actions, and the mutations. Cases and campaign are the lab's (`irlm-lab evidence ownership`).

use crate::ctx::{self, Ctx};
use crate::point::{Measure, Point, at_most};
use crate::{setup, task_mutate, task_tidy};
use anyhow::{Context as _, Result};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// All of them.
pub(crate) const POINTS: &[Measure] = &[
    ("1-tests", tests),
    ("2-schedules", schedules),
    ("2-interpreters", interpreters),
    ("4-mutations", mutations),
];

/// Schedules that the simulations must do.
const SCHEDULES: u64 = 200_000;
/// Test, its function with every kind of fault, schedules that it is told to do, and how often it does so many (by numbers
/// of faults).
const SIMULATIONS: [(&str, &str, u64, u64); 3] = [
    ("direct", "one_copy_runs_whatever_happens", 20_000, 4),
    ("sim", "hard_one_copy_runs_whatever_breaks", 60_000, 1),
    ("postcopy", "hard_one_copy_is_the_vm_and_what_is_missing_is_named", 60_000, 1),
];

/// How many tests passed, and which failed, by what cargo prints.
fn counted(out: &str) -> (usize, Vec<String>) {
    let (mut passed, mut failed) = (0, Vec::new());
    for (test, how) in out.lines().filter_map(|l| l.strip_prefix("test ")?.rsplit_once(" ... ")) {
        match how.split([' ', ',', ':']).next() {
            Some("ok") => passed += 1,
            Some("FAILED") => failed.push(test.to_owned()),
            _ => {}
        }
    }
    (passed, failed)
}

fn output(c: &mut Command) -> Result<(String, bool)> {
    let what = ctx::name(c);
    let out =
        c.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("start {what}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    eprintln!("{text}");
    Ok((text, out.status.success()))
}

fn tests(ctx: &Ctx) -> Result<Point> {
    setup::ensure(ctx, setup::QEMUS)?;
    let mut c = ctx.cargo();
    c.args([
        "test",
        "-p",
        "irlm-core",
        "-p",
        "irlm-user",
        "--no-fail-fast",
        "--quiet",
        "--",
        "--format=pretty",
    ]);
    let (out, ended) = output(c.env("IRLM_QEMU", setup::qemu_path(ctx, "7.2")))?;
    let (passed, failed) = counted(&out);
    // A run that broke off has lost tests.
    let wrong = if ended || !failed.is_empty() { failed.len() } else { 1 };
    let which = if failed.is_empty() { "none".to_owned() } else { failed.join(", ") };
    let how = format!("cargo test -p irlm-core -p irlm-user: {passed} passed; failed: {which}");
    let what = "tests of the program that fail: those of every mended kind are named in tests/mutations";
    Ok(at_most("1-tests", what, (wrong as f64, 0.0), how))
}

fn schedules(ctx: &Ctx) -> Result<Point> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut done, mut said) = (0, Vec::new());
    for (test, function, runs, times) in SIMULATIONS {
        let mut c = ctx.cargo();
        c.args([
            "test",
            "--release",
            "--quiet",
            "-p",
            "irlm-user",
            "--test",
            test,
            "--",
            "--format=pretty",
            "--exact",
        ]);
        c.arg(function).env("IRLM_SIM_RUNS", runs.to_string()).env("IRLM_SIM_SEED", seed.to_string());
        let (out, ended) = output(&mut c)?;
        let holds = ended && counted(&out) == (1, Vec::new());
        done += if holds { runs * times } else { 0 };
        said.push(format!("{test} {} {}", runs * times, if holds { "hold" } else { "BROKEN" }));
    }
    let how = format!(
        "seeds from {seed} on, the shipped drivers, every action failing somewhere: {}",
        said.join(", ")
    );
    let what = "schedules that are missing of 200,000 in which rules 1 to 4 hold";
    Ok(at_most("2-schedules", what, (SCHEDULES.saturating_sub(done) as f64, 0.0), how))
}

fn interpreters(ctx: &Ctx) -> Result<Point> {
    let files = task_tidy::files(ctx)?;
    let doers = task_tidy::interpreters(&files, |name| std::fs::read_to_string(ctx.root.join(name)).ok());
    let how = format!("cargo xtask tidy: {}", doers.join(", "));
    let what = "files outside of tests that interpret the handover's actions, off the one that may";
    Ok(at_most("2-interpreters", what, (doers.len().abs_diff(1) as f64, 0.0), how))
}

/// Tries every patch of `tests/mutations`.
fn mutations(ctx: &Ctx) -> Result<Point> {
    let count = task_mutate::count(ctx, &task_mutate::Args::default())?;
    let missed = count.all - count.red;
    let how = format!("cargo xtask mutate: {} patches of tests/mutations, {} seen red", count.all, count.red);
    let what = "mended kinds that are broken again on purpose, one at a time, and that no test notices";
    Ok(at_most("4-mutations", what, (missed as f64, 0.0), how))
}

/// What is asked of the lab, if anything is, and which points are measured here.
pub(crate) fn parts(only: &[String]) -> (Option<Vec<String>>, Vec<&'static Measure>) {
    let named = |p: &str| POINTS.iter().any(|m| m.0.starts_with(p));
    let here = POINTS.iter().filter(|m| only.is_empty() || only.iter().any(|p| m.0.starts_with(p.as_str())));
    // The lab has points 1, 3 and 5, and refuses a name that none of its points has.
    let rest = only.iter().filter(|p| p.len() <= 2 && !p.starts_with(['2', '4']) || !named(p));
    let rest: Vec<String> = rest.cloned().collect();
    ((only.is_empty() || !rest.is_empty()).then_some(rest), here.collect())
}

#[cfg(test)]
mod tests {
    use super::{POINTS, counted, parts};

    #[test]
    fn what_only_names_is_measured_where_it_can_be() {
        let of = |only: &[&str]| {
            let (lab, here) = parts(&only.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
            (lab, here.into_iter().map(|m| m.0).collect::<Vec<_>>())
        };
        let lab = |only: &[&str]| Some(only.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&[]).0, lab(&[]));
        assert_eq!(of(&[]).1.len(), POINTS.len());
        assert_eq!(of(&["4-"]), (None, vec!["4-mutations"]));
        assert_eq!(of(&["2"]), (None, vec!["2-schedules", "2-interpreters"]));
        assert_eq!(of(&["1-tests"]), (None, vec!["1-tests"]));
        assert_eq!(of(&["1-"]), (lab(&["1-"]), vec!["1-tests"]));
        assert_eq!(of(&["1-paused-7.2", "3-"]), (lab(&["1-paused-7.2", "3-"]), vec![]));
    }

    #[test]
    fn tests_are_counted_by_what_cargo_prints() {
        let out = "running 3 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ignored, slow\ntest result: FAILED. 1 passed";
        assert_eq!(counted(out), (1, vec!["b".to_owned()]));
    }
}
