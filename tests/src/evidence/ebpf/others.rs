//! What other people's UDP and TCP traffic loses on the core link while a rack is evacuated, with shaping and without.
//! The paper's figures 6 to 9, in small: they took 0.7 of a core link of 10 Gbit/s; these take 0.7 of one of 200 Mbit/s,
//! which is as wide as the source hosts' edge links together.

use super::super::{Only, Point, at_most};
use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::Method;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::Rates;
use irlm_tests::others::{self, Kind, Load, Seen};
use irlm_tests::report::{Panel, panels};
use irlm_tests::round::{self, Plan};
use std::path::Path;
use std::time::Duration;

const MBIT: u64 = 1_000_000;
const EDGE: u64 = 100;
const CORE: u64 = 200;
const OTHERS: u64 = CORE * 7 / 10;
/// What all source hosts together may put on the core link: what the others leave, less a tenth of it for bursts.
const BUDGET: u64 = (CORE - OTHERS) * 9 / 10;
/// How long the others are watched alone.
const ALONE: Duration = Duration::from_secs(15);
/// The most they may lose with shaping on.
const MOST: f64 = 0.02;

/// The hosts' ports are shaped by their agents; what they may send together is in the group's file.
const POLICY: &str = "[port]\nshaping = \"own\"\nlink_mbit = 100\nothers_mbit = 5\n\
                      rack_prefixes = [\"10.77.1.0/24\"]\n";

/// One evacuation with others about.
#[derive(serde::Serialize)]
struct Line {
    kind: &'static str,
    method: String,
    alone: Seen,
    others: Seen,
    loss: f64,
    group_s: f64,
    core_mb: f64,
}

/// A lab's TCP and whether its agents shape, and the evacuations in it. Cubic is what nearly every Linux uses, and backs
/// off where packets are lost; BBR does not, and so is the neighbour that others need to be guarded from.
struct Setting {
    congestion: &'static str,
    shaped: bool,
    runs: &'static [(Method, &'static str)],
}

const SETTINGS: &[Setting] = &[
    Setting {
        congestion: "cubic",
        shaped: false,
        runs: &[(Method::Oc, "oc"), (Method::Gm, "gm"), (Method::Irlm, "irlm")],
    },
    Setting { congestion: "cubic", shaped: true, runs: &[(Method::Irlm, "shaped")] },
    Setting { congestion: "bbr", shaped: false, runs: &[(Method::Irlm, "irlm-bbr")] },
    Setting { congestion: "bbr", shaped: true, runs: &[(Method::Irlm, "shaped-bbr")] },
];

pub(super) fn points(irlm: &Path, out: &Path, only: &Only, points: &mut Vec<Point>) -> Result<()> {
    let mut lines = Vec::new();
    let id = |kind: Kind, run: &str| format!("1-others-{}-{run}", kind.name());
    for setting in SETTINGS {
        let wanted =
            |kind| -> Vec<_> { setting.runs.iter().filter(|r| only.wants(&id(kind, r.1))).collect() };
        let kinds = [Kind::Udp, Kind::Tcp].map(|k| (k, wanted(k)));
        if kinds.iter().all(|k| k.1.is_empty()) {
            continue;
        }
        let lab = lab(setting)?;
        for (kind, wanted) in kinds.iter().filter(|k| !k.1.is_empty()) {
            let alone = others::alone(&lab, load(*kind), ALONE)?;
            for (method, run) in wanted {
                let line = evacuate(&lab, irlm, *method, run, *kind, alone)?;
                judge(points, &id(*kind, run), &line, setting)?;
                lines.push(line);
            }
        }
    }
    if lines.is_empty() { Ok(()) } else { show(&lines, out) }
}

/// Without shaping there is no bound: what is lost is what shaping is for.
fn judge(points: &mut Vec<Point>, id: &str, line: &Line, setting: &Setting) -> Result<()> {
    let what = match (line.kind, setting.shaped) {
        ("udp", false) => "share of the others' UDP packets lost without shaping",
        ("udp", true) => "share of the others' UDP packets lost with shaping",
        (_, false) => "share of the others' TCP throughput lost without shaping",
        (_, true) => "share of the others' TCP throughput lost with shaping",
    };
    let how = how(line, setting.congestion);
    if setting.shaped {
        return at_most(points, id, what, &how, line.loss, MOST);
    }
    let (id, what) = (id.to_owned(), what.to_owned());
    Point { id, what, value: Some(line.loss), bound: None, holds: true, how }.print(points)
}

/// Two hosts with two guests each. Where agents shape, their ports are free of a tree of somebody else's.
fn lab(setting: &Setting) -> Result<Lab> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 2, 2, 256);
    spec.rates = Rates { edge: Some(EDGE * MBIT), core: Some(CORE * MBIT) };
    spec.others = 2;
    spec.congestion = Some(setting.congestion);
    spec.host_qdisc = !setting.shaped;
    spec.policy = setting.shaped.then(|| POLICY.to_owned());
    Lab::new(cache, spec, &|line| eprintln!("{line}"))
}

fn load(kind: Kind) -> Load {
    Load { kind, wire: OTHERS * MBIT }
}

fn evacuate(lab: &Lab, irlm: &Path, method: Method, name: &str, kind: Kind, alone: Seen) -> Result<Line> {
    let wait = Duration::from_secs(300);
    // A move that lasts: what is not compressed has more to say to others.
    let mut extra = String::from("compress = \"off\"\n");
    if lab.spec.policy.is_some() {
        extra.push_str(&format!("budget_mbit = {BUDGET}"));
    }
    let extra = extra.as_str();
    let plan = Plan { method, irlm, writers: 0, extra, wait, others: Some(load(kind)) };
    let r = round::run(lab, &plan, &|_, _| {}).with_context(|| format!("{name} beside {}", kind.name()))?;
    let others = r.others.context("the others' traffic was not watched")?;
    let line = Line {
        kind: kind.name(),
        method: name.to_owned(),
        alone,
        others,
        loss: others.loss(kind, &alone),
        group_s: r.group_ms / 1e3,
        core_mb: r.core.forward as f64 / 1e6,
    };
    eprintln!("{} of others beside {name}: {:.4} lost, group {:.1} s", line.kind, line.loss, line.group_s);
    Ok(line)
}

fn how(l: &Line, congestion: &str) -> String {
    format!(
        "2x2 guests of 256 MiB, edge {EDGE} and core {CORE} Mbit/s, TCP {congestion}, {OTHERS} of them asked for by 2 iperf3 flows; \
         alone {:.1} Mbit/s and {:.4} of packets arrived, during {:.1} s of evacuation {:.1} Mbit/s and {:.4}",
        l.alone.mbit, l.alone.received, l.others.seconds, l.others.mbit, l.others.received
    )
}

/// The table, the JSON and the picture.
fn show(lines: &[Line], out: &Path) -> Result<()> {
    let mut t = Table::new();
    t.load_style(presets::UTF8_BORDERS_ONLY);
    t.set_header([
        "others",
        "method",
        "alone\nMbit/s",
        "now\nMbit/s",
        "alone\nreceived %",
        "now\nreceived %",
        "lost %",
        "group s",
    ]);
    for l in lines {
        t.add_row([
            l.kind.to_owned(),
            l.method.clone(),
            format!("{:.1}", l.alone.mbit),
            format!("{:.1}", l.others.mbit),
            format!("{:.2}", l.alone.received * 100.0),
            format!("{:.2}", l.others.received * 100.0),
            format!("{:.2}", l.loss * 100.0),
            format!("{:.1}", l.group_s),
        ]);
    }
    eprintln!("{t}");
    std::fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let file = out.join("others.json");
    std::fs::write(&file, serde_json::to_string_pretty(lines)?)
        .with_context(|| format!("write {}", file.display()))?;
    let of = |kind: Kind| lines.iter().filter(move |l| l.kind == kind.name());
    let mut data = Vec::new();
    for kind in [Kind::Udp, Kind::Tcp] {
        let names: Vec<&str> = of(kind).map(|l| l.method.as_str()).collect();
        let left: Vec<f64> = of(kind).map(|l| (1.0 - l.loss) * 100.0).collect();
        let times: Vec<f64> = of(kind).map(|l| l.group_s).collect();
        data.push((kind, names, left, times));
    }
    let mut all = Vec::new();
    for (kind, names, left, times) in &data {
        let (got, took) = match kind {
            Kind::Udp => ("others' UDP packets received, % of alone", "group time beside UDP, s"),
            Kind::Tcp => ("others' TCP throughput, % of alone", "group time beside TCP, s"),
        };
        all.push(Panel { title: got, names, values: left, digits: 1, line: Some(100.0) });
        all.push(Panel { title: took, names, values: times, digits: 1, line: None });
    }
    let file = out.join("others.svg");
    panels(&all, &file)?;
    eprintln!("written: {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_gets_its_bar_and_what_is_left_to_the_others() {
        let all = SETTINGS.iter().flat_map(|s| s.runs.iter());
        let seen = |mbit| Seen { seconds: 10.0, mbit, received: 1.0 };
        let line = |kind, run: &str, loss: f64| Line {
            kind,
            method: run.to_owned(),
            alone: seen(134.0),
            others: seen(134.0 * (1.0 - loss)),
            loss,
            group_s: 41.7,
            core_mb: 900.0,
        };
        let lines: Vec<Line> = ["udp", "tcp"]
            .iter()
            .flat_map(|k| {
                all.clone().zip([0.002, 0.003, 0.35, 0.0, 0.253, 0.001]).map(|(r, l)| line(k, r.1, l))
            })
            .collect();
        let dir = std::env::temp_dir().join(format!("irlm-others-{}", std::process::id()));
        show(&lines, &dir).unwrap();
        let svg = std::fs::read_to_string(dir.join("others.svg")).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(svg.contains("shaped-bbr") && svg.contains("74.7") && svg.contains("65.0"), "{svg}");
    }
}
