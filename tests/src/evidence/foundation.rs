//! The foundation's points: bytes, times, identity and downtime of all methods under both QEMU versions, and the
//! proxy's tax.

use super::{Point, at_most, unmeasured};
use crate::cmd_bench;
use crate::cmd_run::rounds;
use crate::opts::SpecArgs;
use anyhow::{Context as _, Result};
use clap::Parser as _;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::Method;
use irlm_tests::lab::Lab;
use irlm_tests::report;
use irlm_tests::round::Round;
use std::path::Path;

#[derive(clap::Parser)]
struct Spec {
    #[command(flatten)]
    spec: SpecArgs,
}

pub(super) fn points(irlm: &Path, out: &Path) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for (name, words) in [
        ("7.2", vec!["lab", "--qemu", "7.2"]),
        ("10.0", vec!["lab", "--qemu", "10.0"]),
        ("7.2 to 10.0", vec!["lab", "--qemu", "7.2", "--qemu-target", "10.0"]),
    ] {
        for writers in [0, 300] {
            let cache = Cache::open()?;
            let lab = Lab::new(cache.clone(), Spec::parse_from(&words).spec.spec(&cache)?, &|line| {
                eprintln!("{line}");
            })?;
            eprintln!("\nQEMU {name}, each guest writes {writers} pages a second");
            let r = rounds(&lab, &Method::ALL, irlm, writers)?;
            eprintln!("{}", report::table(&r));
            let file = format!("foundation-{}-{writers}.json", name.replace(' ', "-"));
            report::json(&r, &out.join(file))?;
            judge(
                &mut points,
                &format!("qemu-{}-writers-{writers}", name.replace(' ', "-")),
                &r,
                writers == 0,
            )?;
        }
    }
    let share = cmd_bench::proxy(irlm, 3)?;
    let how = "one 512 MiB guest of random content on an unshaped link, median of 3 moves each";
    at_most(
        &mut points,
        "5-proxy-tax",
        "plain QEMU's rate divided by irlm's",
        how,
        1.0 / share.max(1e-9),
        2.0,
    )?;
    let how = "`cargo xtask test` runs them (fail-*, doubt-*)";
    unmeasured(&mut points, "6-failures", "every failure case ends as rule 1 demands", how)?;
    let how = "time `cargo xtask test` in a clean clone";
    unmeasured(&mut points, "8-time", "minutes of `cargo xtask test` after the first set-up, below 25", how)?;
    Ok(points)
}

fn judge(points: &mut Vec<Point>, name: &str, rounds: &[Round], idle: bool) -> Result<()> {
    let of = |m: &str| rounds.iter().find(|r| r.method == m).with_context(|| format!("no round of {m}"));
    let (oc, gm, irlm) = (of("oc")?, of("gm")?, of("irlm")?);
    let bytes = |r: &Round| r.core.forward as f64;
    let bytes_how = "interface counter of the core link, 2x2 guests of 256 MiB at the default rates";
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
        at_most(points, &format!("2-time-gm-{name}"), "group time of irlm by gm", time_how, ratio(gm), 1.0)?;
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
