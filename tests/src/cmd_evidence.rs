//! `irlm-lab evidence`: measures the points that an issue must show, and says of each whether it is shown.

use crate::cmd_bench;
use crate::cmd_run::rounds;
use crate::opts::SpecArgs;
use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{Method, beside};
use irlm_tests::lab::Lab;
use irlm_tests::report;
use irlm_tests::round::Round;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which points
    #[arg(value_enum)]
    topic: Topic,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Where the results are kept
    #[arg(long, default_value = "target/lab")]
    out: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Topic {
    /// Bytes, times, identity and downtime of all methods under QEMU 7.2, 10.0, and from 7.2 to 10.0; the proxy's tax
    Foundation,
}

/// What was measured of one point.
struct Point {
    text: String,
    shown: bool,
}

fn at_most(points: &mut Vec<Point>, what: &str, value: f64, limit: f64) {
    let shown = value <= limit;
    let text =
        format!("{what}: {value:.3}, at most {limit:.3}: {}", if shown { "shown" } else { "NOT SHOWN" });
    println!("{text}");
    points.push(Point { text, shown });
}

pub(crate) fn run(a: &Args) -> Result<()> {
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let points = match a.topic {
        Topic::Foundation => foundation(&irlm, &a.out)?,
    };
    println!();
    for p in &points {
        println!("{}", p.text);
    }
    match points.iter().filter(|p| !p.shown).count() {
        0 => Ok(()),
        n => bail!("{n} of {} points are not shown", points.len()),
    }
}

#[derive(clap::Parser)]
struct Spec {
    #[command(flatten)]
    spec: SpecArgs,
}

fn foundation(irlm: &Path, out: &Path) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (name, words) in [
        ("7.2", vec!["lab", "--qemu", "7.2"]),
        ("10.0", vec!["lab", "--qemu", "10.0"]),
        ("7.2 to 10.0", vec!["lab", "--qemu", "7.2", "--qemu-target", "10.0"]),
    ] {
        for writers in [0, 300] {
            let cache = Cache::open()?;
            let lab = Lab::new(cache.clone(), Spec::parse_from(&words).spec.spec(&cache)?, &|line| {
                println!("{line}");
            })?;
            println!("\nQEMU {name}, each guest writes {writers} pages a second");
            let r = rounds(&lab, &Method::ALL, irlm, writers)?;
            println!("{}", report::table(&r));
            let file = format!("foundation-{}-{writers}.json", name.replace(' ', "-"));
            report::json(&r, &out.join(file))?;
            judge(&mut points, &format!("QEMU {name}, writers {writers}"), &r, writers == 0)?;
        }
    }
    let share = cmd_bench::proxy(irlm, 3)?;
    at_most(&mut points, "point 5, plain QEMU's rate by irlm's", 1.0 / share.max(1e-9), 2.0);
    Ok(points)
}

fn judge(points: &mut Vec<Point>, name: &str, rounds: &[Round], idle: bool) -> Result<()> {
    let of = |m: &str| rounds.iter().find(|r| r.method == m).with_context(|| format!("no round of {m}"));
    let (oc, gm, irlm) = (of("oc")?, of("gm")?, of("irlm")?);
    let bytes = |r: &Round| r.core.forward as f64;
    if idle {
        at_most(points, &format!("point 1, {name}: bytes of irlm by oc"), bytes(irlm) / bytes(oc), 0.52);
        at_most(points, &format!("point 1, {name}: bytes of irlm by gm"), bytes(irlm) / bytes(gm), 0.80);
        at_most(
            points,
            &format!("point 2, {name}: group time of irlm by oc"),
            irlm.group_ms / oc.group_ms,
            0.75,
        );
        at_most(
            points,
            &format!("point 2, {name}: group time of irlm by gm"),
            irlm.group_ms / gm.group_ms,
            1.0,
        );
        for r in [gm, irlm] {
            let counted = r.bpf_core_out().with_context(|| format!("{}: eBPF counted nothing", r.method))?;
            let off = (counted as f64 / bytes(r) - 1.0).abs();
            at_most(
                points,
                &format!("point 1, {name}: eBPF off the interface counter, {}", r.method),
                off,
                0.01,
            );
        }
    }
    let extra = irlm.downtime_median_ms - oc.downtime_median_ms;
    at_most(points, &format!("point 4, {name}: downtime of irlm above oc, ms"), extra, 30.0);
    // A round fails unless all memory is identical and every service answers, so that it is here is the proof.
    let text = format!("point 3, {name}: memory of all guests identical by every method: shown");
    println!("{text}");
    points.push(Point { text, shown: rounds.iter().all(|r| r.compared > 0) });
    Ok(())
}
