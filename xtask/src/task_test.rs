//! Everything that says whether the tree is good. Nothing stops at the first failure: all are collected, counted and
//! named at the end, and what was skipped is named with its reason.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::task_lab::{self, Profile};
use crate::{ebpf, setup, task_tidy};
use anyhow::{Context as _, Result, anyhow, bail};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave the lab's tests out (they need root, and minutes)
    #[arg(long)]
    no_lab: bool,
    /// Only the lab's tests whose name contains this
    #[arg(long)]
    lab: Option<String>,
}

/// Failure cases that also run under the newer QEMU: one of each kind of death, and the narrowest windows.
/// `cargo xtask evidence foundation --only 6` runs all of them under both.
const NEWER: &[&str] = &[
    "void-",
    "fail-source-agent-killed-late",
    "fail-target-agent-killed",
    "fail-target-qemu-killed",
    "fail-core-cut",
    "fail-cancel",
    "doubt-after-",
];

/// What all steps came to.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<String>,
}

impl Tally {
    /// Runs one step that either passes or fails as a whole.
    fn step(&mut self, name: &str, run: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        match run() {
            Ok(()) => {
                self.passed += 1;
                println!("test: {name}: passed ({:.0?})", start.elapsed());
            }
            Err(e) => {
                println!("test: {name}: FAILED\n{e:#}");
                self.failed.push(name.to_owned());
            }
        }
    }

    fn skip(&mut self, what: &str, why: &str) {
        println!("test: {what}: skipped: {why}");
        self.skipped.push(format!("{what}: {why}"));
    }
}

/// `cargo xtask test`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut t = Tally::default();
    if args.lab.is_none() {
        check(ctx, args, &mut t);
    }
    if args.no_lab {
        t.skip("lab", "left out by --no-lab");
    } else {
        match task_lab::ready(ctx, Profile::Tests) {
            Ok(Some(mut lab)) => {
                lab.arg("test").args(&args.lab);
                counted("lab", &mut lab, &mut t);
                if let (None, Some(mut lab)) = (&args.lab, task_lab::program(ctx, Profile::Tests)) {
                    // Guests of our own VMM have no QEMU in their path.
                    lab.args(["test", "--qemu", "10.0", "--without", "kvm-"]).args(NEWER);
                    counted("lab under QEMU 10.0", &mut lab, &mut t);
                    random(ctx, &mut t);
                }
            }
            Ok(None) => t.skip("lab", NO_ROOT),
            Err(e) if !ctx.install => t.skip("lab", &format!("{e:#} (not installed: --no-install)")),
            Err(e) => {
                println!("test: lab: FAILED\n{e:#}");
                t.failed.push(format!("lab: {e:#}"));
            }
        }
    }
    for s in &t.skipped {
        println!("skipped: {s}");
    }
    for f in &t.failed {
        println!("failed: {f}");
    }
    println!("{} passed, {} failed, {} skipped", t.passed, t.failed.len(), t.skipped.len());
    if !t.failed.is_empty() {
        bail!("not everything passed");
    }
    Ok(())
}

/// The random campaign's fixed runs, and some that nobody has seen before: their seeds are in their lines.
fn random(ctx: &Ctx, t: &mut Tally) {
    let Some(mut lab) = task_lab::program(ctx, Profile::Tests) else { return };
    println!("test: random campaign");
    let start = Instant::now();
    let ended = stream(lab.args(["campaign", "--fixed"]), |line| {
        println!("{line}");
        let Some((run, how)) = line.strip_prefix("run ").and_then(|l| l.split_once(" — ")) else { return };
        match how.split([' ', ':']).next() {
            Some("ok") => t.passed += 1,
            Some("skipped") => t.skipped.push(format!("campaign {run}: {how}")),
            _ => t.failed.push(format!("campaign {run}: {how}")),
        }
    });
    println!("test: random campaign ({:.0?})", start.elapsed());
    if let (Err(e), true) = (ended, t.failed.is_empty()) {
        t.failed.push(format!("random campaign: {e:#}"));
    }
}

/// All that needs no lab.
fn check(ctx: &Ctx, args: &Args, t: &mut Tally) {
    let start = Instant::now();
    let object = std::thread::scope(|s| {
        // It waits for the network and for disks most of the time; lints and pages are made meanwhile.
        let fetched = s.spawn(|| fetch(ctx, args));
        read(ctx, t);
        let waited = Instant::now();
        let object = fetched.join().unwrap_or_else(|_| Err(anyhow!("its thread panicked")));
        let (waited, all) = (waited.elapsed(), start.elapsed());
        println!("test: what is fetched and built once: there after {all:.0?}, waited for {waited:.0?}");
        object
    });
    match object {
        Ok(Some(_)) => t.step("eBPF object", || Ok(())),
        Ok(None) => t.skip("eBPF object", "this tree has no irlm-ebpf crate"),
        Err(e) if !ctx.install => t.skip("eBPF object", &format!("{e:#}")),
        Err(e) => t.step("eBPF object", || Err(e)),
    }
    compile_and_test(ctx, t);
}

/// What later steps find ready: the eBPF object, QEMUs, the guest's image. Gives the object, and says what lacks.
fn fetch(ctx: &Ctx, args: &Args) -> Result<Option<PathBuf>> {
    let object = ebpf::object(ctx);
    // Who needs these and cannot have them says so: tests on real QEMU are skipped, and the lab asks again.
    let needs = if args.no_lab { setup::QEMUS } else { setup::LAB };
    if let Err(e) = setup::ensure(ctx, needs) {
        println!("test: not there: {e:#}");
    }
    object
}

/// What looks at the text, and compiles nothing that runs.
fn read(ctx: &Ctx, t: &mut Tally) {
    let quiet = |c: &mut Command| ctx::output(c).map(|_| ());
    t.step("format", || quiet(ctx.cargo().args(["fmt", "--all", "--check"])));
    if ctx.root.join("irlm-ebpf/Cargo.toml").is_file() {
        t.step("format of irlm-ebpf", || {
            quiet(ctx.cargo().args(["fmt", "--check", "--manifest-path", "irlm-ebpf/Cargo.toml"]))
        });
    }
    t.step("tidy", || task_tidy::run(ctx, &task_tidy::Args { bless: false }));
    let clippy = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    t.step("lints", || quiet(ctx.cargo().args(clippy)));
    t.step("documentation", || {
        quiet(
            ctx.cargo()
                .args(["doc", "--workspace", "--no-deps", "--quiet"])
                .env("RUSTDOCFLAGS", "-D warnings"),
        )
    });
}

/// What compiles, and runs without a lab.
fn compile_and_test(ctx: &Ctx, t: &mut Tally) {
    let quiet = |c: &mut Command| ctx::output(c).map(|_| ());
    // --show-output: a test that cannot run here passes and prints `skipped: why`, which must not get lost.
    let words = ["--quiet", "--", "--show-output", "--format=pretty"];
    // Always the whole workspace: a part of it gives dependencies other features, and is compiled anew from there on.
    let all = ["test", "--workspace", "--no-fail-fast"];
    t.step("tests compile", || quiet(ctx.cargo().args(["test", "--workspace", "--no-run", "--quiet"])));
    // Tests on real QEMU skip by themselves where there is none.
    let [old, new] = ["7.2", "10.0"].map(|v| setup::qemu_path(ctx, v));
    let mut tests = ctx.cargo();
    tests.args(all).args(words).env("IRLM_QEMU", &old);
    counted("unit and property tests, real QEMU 7.2", &mut tests, t);
    let mut again = |name: &str, source: &Path, target: &Path| {
        let mut tests = ctx.cargo();
        tests.args(all).args(QEMU_TESTS.iter().flat_map(|t| ["--test", t])).args(words);
        tests
            .env("IRLM_QEMU", source)
            .env("IRLM_QEMU_TARGET", target)
            .env("IRLM_QEMU_MACHINES", "pc-q35-7.2");
        counted(name, &mut tests, t);
    };
    again("real QEMU 10.0", &new, &new);
    again("real QEMU 7.2 to 10.0", &old, &new);
}

/// Test programs that start a QEMU.
const QEMU_TESTS: [&str; 3] = ["plain", "qemu_stream", "qmp"];

/// Runs a program that prints a line per test, in cargo's or the lab's words, and counts what it says.
fn counted(name: &str, c: &mut Command, t: &mut Tally) {
    println!("test: {name}");
    let lab = name.starts_with("lab");
    let start = Instant::now();
    let before = (t.passed, t.failed.len());
    let mut seen = Vec::new();
    let mut panics = Panics::default();
    // Whether the next reason is the first of its test's.
    let mut counts = true;
    let ended = stream(c, |line| {
        if let Some(test) = line.strip_prefix("test ")
            && let Some((test, how)) = test.rsplit_once(" ... ")
        {
            match how.split([' ', ',', ':']).next() {
                Some("ok") => t.passed += 1,
                Some("FAILED") => t.failed.push(format!(
                    "{test}: {}",
                    how.trim_start_matches("FAILED").trim_start_matches([':', ' '])
                )),
                Some("ignored" | "skipped") => t.skipped.push(format!("{test}: {how}")),
                _ => {}
            }
            if lab {
                println!("{line}");
            }
        } else if let Some(why) = line.trim_start().strip_prefix("skipped: ") {
            // Printed by a test that passed because it could not run: it is no pass. One test may give two reasons.
            if std::mem::take(&mut counts) {
                t.passed = t.passed.saturating_sub(1);
                t.skipped.push(why.to_owned());
            }
        } else if let Some(test) = line.strip_prefix("---- ") {
            counts = true;
            panics.begins(test.split(' ').next().unwrap_or_default());
        } else if lab {
            println!("{line}");
        }
        panics.line(line);
        if seen.len() < 20_000 {
            seen.push(line.to_owned());
        }
    });
    for f in &mut t.failed[before.1..] {
        panics.explain(f);
    }
    let failed = t.failed.len() - before.1;
    let passed = t.passed.saturating_sub(before.0);
    println!("test: {name}: {passed} passed, {failed} failed ({:.0?})", start.elapsed());
    if let Err(e) = ended {
        if !lab {
            println!(
                "{}",
                seen.iter().filter(|l| !l.ends_with("... ok")).cloned().collect::<Vec<_>>().join("\n")
            );
        }
        if failed == 0 {
            t.failed.push(format!("{name}: {e:#}"));
        }
    }
}

/// What tests said when they panicked, from the blocks that cargo prints for those that failed.
#[derive(Default)]
struct Panics {
    test: String,
    /// Test, and its panic's lines.
    said: Vec<(String, Vec<String>)>,
    open: bool,
}

impl Panics {
    /// Lines of a panic that are kept.
    const KEPT: usize = 6;

    fn begins(&mut self, test: &str) {
        test.clone_into(&mut self.test);
        self.open = false;
    }

    fn line(&mut self, line: &str) {
        if line.starts_with("thread '") && line.contains(" panicked at ") {
            let at = line.split_once(" panicked at ").map_or("", |l| l.1);
            self.said.push((self.test.clone(), vec![at.to_owned()]));
            self.open = true;
        } else if line.is_empty() || line.starts_with("note: ") {
            self.open = false;
        } else if let (true, Some((_, lines))) = (self.open, self.said.last_mut())
            && lines.len() < Self::KEPT
        {
            lines.push(line.to_owned());
        }
    }

    /// Puts what the test said behind its name.
    fn explain(&self, failed: &mut String) {
        let name = failed.split(": ").next().unwrap_or_default();
        if let Some((_, lines)) = self.said.iter().find(|(test, _)| test == name) {
            *failed = format!("{name}: {}", lines.join("\n    "));
        }
    }
}

/// Runs a command and hands on each line of its output as it comes.
fn stream(c: &mut Command, mut each: impl FnMut(&str)) -> Result<()> {
    let what = ctx::name(c);
    let mut child =
        c.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("start {what}"))?;
    let out = child.stdout.take().context("no output")?;
    for line in BufReader::new(out).split(b'\n') {
        each(String::from_utf8_lossy(&line?).trim_end());
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{what} ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Panics;

    #[test]
    fn a_failed_test_is_named_with_what_it_said() {
        let mut p = Panics::default();
        p.begins("a::quiet_one stdout ----");
        p.begins("a::loud_one");
        for line in [
            "thread 'a::loud_one' (7) panicked at src/a.rs:3:9:",
            "assertion `left == right` failed",
            "  left: 1",
            " right: 2",
            "note: run with `RUST_BACKTRACE=1`",
            "more",
        ] {
            p.line(line);
        }
        let [mut loud, mut other] = ["a::loud_one: ", "a::other: it panicked"].map(str::to_owned);
        p.explain(&mut loud);
        p.explain(&mut other);
        let said = "src/a.rs:3:9:\n    assertion `left == right` failed\n      left: 1\n     right: 2";
        assert_eq!(loud, format!("a::loud_one: {said}"));
        assert_eq!(other, "a::other: it panicked");
    }
}
