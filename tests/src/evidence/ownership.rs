//! Who owns a VM: the operators' ordinary afternoons as lab cases, and the random campaign. What needs cargo (the tests,
//! the simulations, the mutations) is measured by `cargo xtask evidence ownership` around this.

use super::foundation::told;
use super::{Only, Point, at_most, bytes, foundation, kvm};
use crate::cmd_test::ended;
use anyhow::{Context as _, Result, bail};
use irlm_tests::campaign::{self, Counts};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

/// Runs of the campaign that the points ask for.
pub(crate) const RUNS: u64 = 1000;

/// What can happen to a VM's ownership, and how the names of the lab cases begin that do it.
const KINDS: &[(&str, &str, &[&str])] = &[
    ("again", "the same file run again after a part or all has moved", &["own-again-"]),
    ("cont-refused", "`cont` refused at the target", &["own-cont-refused"]),
    ("paused", "a VM that its owner had paused, before or midway", &["own-paused"]),
    ("swapped", "monitors swapped, or of an unrelated VM", &["own-swapped", "own-unrelated"]),
    ("foreign", "somebody else's migration under way at the source", &["own-foreign-"]),
    ("no-S", "a target QEMU without -S", &["own-no-S"]),
    ("journal", "a journal that cannot be written", &["own-journal-"]),
    ("settle", "`settle` of what is refused, written nowhere or not in doubt", &["own-settle-"]),
    ("by-hand", "a copy that somebody continues by hand in the middle", &["own-by-hand-"]),
    ("disk", "disk locks, and a side that dies around the handover", &["own-disk-"]),
    ("old-record", "old records that are found again", &["own-old-record-"]),
    ("fetching", "a VM moved again while its pages still come", &["own-fetching-"]),
    ("settings", "QEMU's settings after a move that failed", &["own-settings-"]),
    ("two-groups", "two groups with the same VM number at one target", &["own-two-groups"]),
    ("failed-start", "a start that fails, and the next one", &["own-failed-start"]),
    ("report", "what the report calls it", &["own-report-"]),
    ("endings", "endings that must come, and parties that come back", &["own-endings-"]),
    ("dry-run", "every refusal of the real run, by --dry-run", &["own-dry-run-"]),
    ("history", "the outcome of a group that is over", &["own-history"]),
];

/// Points of the campaign: name, what is counted, and the verdicts that it counts.
const VERDICTS: &[(&str, &str, &[&str])] = &[
    ("3-two-copies", "runs in which two copies of a VM ran, or an old one again", &["two"]),
    (
        "3-lost",
        "runs in which a VM was lost, never came to rest, or found its memory wrong",
        &["lost", "settled", "guest"],
    ),
    ("3-untrue", "runs in which a report or a status was not true", &["report"]),
    (
        "3-leftovers",
        "runs that left something behind, or after which the next evacuation did not work",
        &["leftover", "again"],
    ),
    ("3-other", "runs that ended what was an owner's own, or that the lab could not do", &["theirs", "lab"]),
];

pub(super) fn points(irlm: &Path, out: &Path, only: &Only, runs: u64) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for qemu in ["7.2", "10.0"] {
        cases(&mut points, irlm, qemu, only)?;
    }
    if VERDICTS.iter().any(|v| only.wants(v.0)) || only.wants("3-runs") {
        random(&mut points, irlm, out, runs)?;
    }
    for (topic, measure) in [
        ("foundation", foundation::points as fn(&Path, &Path, &Only) -> Result<Vec<Point>>),
        ("kvm", kvm::points),
        ("bytes", bytes::points),
    ] {
        let id = format!("5-{topic}");
        if only.wants(&id) {
            let theirs = measure(irlm, out, &Only(Vec::new()))?;
            let wrong: Vec<&str> = theirs.iter().filter(|p| !p.holds).map(|p| p.id.as_str()).collect();
            let how = format!("{} points, printed above; not so: {}", theirs.len(), list(&wrong));
            let what = format!("points of `evidence {topic}` that do not hold");
            at_most(&mut points, &id, &what, &how, wrong.len() as f64, 0.0)?;
        }
    }
    Ok(points)
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The lab cases of each kind, by the same command that a person would type.
fn cases(points: &mut Vec<Point>, irlm: &Path, qemu: &str, only: &Only) -> Result<()> {
    let id = |kind: &str| format!("1-{kind}-{qemu}");
    let wanted: Vec<_> = KINDS.iter().filter(|k| only.wants(&id(k.0))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut c = Command::new(std::env::current_exe().context("find the lab's own program")?);
    c.args(["test", "--qemu", qemu, "--jobs", "3", "--irlm"]).arg(irlm);
    c.args(wanted.iter().flat_map(|k| k.2));
    let mut seen = BTreeMap::new();
    told(&mut c, |line| {
        if let Some((name, how)) = ended(line) {
            seen.insert(name.to_owned(), how.to_owned());
        }
    })?;
    for (kind, what, names) in wanted {
        let of: Vec<_> = seen.iter().filter(|s| names.iter().any(|n| s.0.starts_with(n))).collect();
        if of.is_empty() {
            bail!("no case of {kind} ran");
        }
        let wrong: Vec<&str> = of.iter().filter(|s| s.1 != "ok").map(|s| s.0.as_str()).collect();
        let how = format!(
            "{} cases under QEMU {qemu}: irlm-lab test --qemu {qemu} {}; not so: {}",
            of.len(),
            names.join(" "),
            list(&wrong)
        );
        let what = format!("cases that did not end as they must: {what}");
        at_most(points, &id(kind), &what, &how, wrong.len() as f64, 0.0)?;
    }
    Ok(())
}

fn random(points: &mut Vec<Point>, irlm: &Path, out: &Path, runs: u64) -> Result<()> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seed = since.as_secs();
    let mut options = campaign::Options::new(irlm, out, runs, seed);
    // Nothing that was measured before counts.
    options.state = None;
    let counts: Counts = campaign::measure(&options, &|o| eprintln!("{}", o.text()))?;
    let skipped: u64 = counts.skipped.values().sum();
    let how = format!(
        "irlm-lab campaign --runs {runs} --seed {seed}: {} runs done, {skipped} could not be done here; VMs: {} moved, {} stayed, {} in doubt, {} died of the schedule's own kills",
        counts.runs, counts.moved, counts.stayed, counts.in_doubt, counts.died
    );
    let missing = RUNS.saturating_sub(counts.runs);
    at_most(points, "3-runs", "runs that are missing of a thousand", &how, missing as f64, 0.0)?;
    for (id, what, verdicts) in VERDICTS {
        let bad: u64 = verdicts.iter().map(|v| counts.of(v)).sum();
        let seeds: Vec<&str> =
            verdicts.iter().filter_map(|v| counts.seeds.get(*v)).flatten().map(String::as_str).collect();
        let how = format!("{how}; seeds: {}", list(&seeds));
        at_most(points, id, what, &how, bad as f64, 0.0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{KINDS, VERDICTS};
    use irlm_tests::campaign::VERDICTS as ALL;

    #[test]
    fn every_case_of_ownership_belongs_to_a_kind_and_every_kind_has_cases() {
        let all = crate::cases::all();
        let own: Vec<&str> = all.iter().map(|c| c.name).filter(|n| n.starts_with("own-")).collect();
        let of = |name: &str| KINDS.iter().filter(|k| k.2.iter().any(|p| name.starts_with(p))).count();
        let strays: Vec<_> = own.iter().filter(|n| of(n) != 1).collect();
        assert!(strays.is_empty(), "{strays:?}");
        for (kind, _, names) in KINDS {
            assert!(own.iter().any(|n| names.iter().any(|p| n.starts_with(p))), "{kind}");
        }
    }

    #[test]
    fn every_bad_verdict_of_the_campaign_is_in_one_point() {
        for v in ALL {
            assert_eq!(VERDICTS.iter().filter(|p| p.2.contains(v)).count(), 1, "{v}");
        }
    }
}
