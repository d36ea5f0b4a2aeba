//! Every party killed in every phase of a move, each a test of its own (`irlm-lab test`), run now and put into one table.

use super::super::{Point, at_most};
use crate::cmd_test::ended;
use anyhow::{Context as _, Result, ensure};
use comfy_table::Table;
use std::path::Path;
use std::process::{Command, Stdio};

/// Phase, who is killed, and the test that does it. In each, exactly one copy of each guest runs or can, or the report says
/// which pages of which guest are gone.
const CELLS: &[(&str, &str, &str)] = &[
    ("rounds", "source agent", "kvm-fail-source-agent-killed"),
    ("rounds", "target agent", "kvm-fail-target-agent-killed"),
    ("rounds", "source VMM", "kvm-fail-source-vmm-killed"),
    ("rounds", "target VMM", "kvm-fail-target-vmm-killed"),
    ("rounds", "link", "kvm-fail-core-cut"),
    ("rounds", "cancelled", "kvm-fail-cancel"),
    ("before giving up", "source agent", "kvm-doubt-source-agent-killed-before-giving-up"),
    ("before giving up", "target agent", "kvm-doubt-target-agent-killed-before-giving-up"),
    ("after giving up", "source agent", "kvm-doubt-source-agent-killed-after-giving-up"),
    ("after giving up", "target agent", "kvm-doubt-target-agent-killed-after-giving-up"),
    (
        "post-copy, before giving up",
        "source agent",
        "kvm-postcopy-doubt-source-agent-killed-before-giving-up",
    ),
    (
        "post-copy, before giving up",
        "target agent",
        "kvm-postcopy-doubt-target-agent-killed-before-giving-up",
    ),
    ("post-copy, after giving up", "source agent", "kvm-postcopy-doubt-source-agent-killed-after-giving-up"),
    ("post-copy, after giving up", "target agent", "kvm-postcopy-doubt-target-agent-killed-after-giving-up"),
    ("post-copy, pages come", "source agent", "kvm-postcopy-source-agent-killed"),
    ("post-copy, pages come", "target agent", "kvm-postcopy-target-agent-killed"),
    ("post-copy, pages come", "both agents", "kvm-postcopy-both-agents-killed"),
    ("post-copy, pages come", "source VMM", "kvm-postcopy-source-vmm-killed"),
    ("post-copy, pages come", "target VMM", "kvm-postcopy-target-vmm-killed"),
    ("post-copy, pages come", "source agent and VMM", "kvm-postcopy-source-memory-lost"),
    ("post-copy, pages come", "coordinator", "kvm-postcopy-coordinator-killed"),
    ("post-copy, pages come", "link", "kvm-postcopy-core-cut"),
    ("post-copy, pages are given away", "target agent", "kvm-postcopy-balloon-target-agent-killed"),
];

/// Runs them all, two labs at a time.
pub(super) fn table(points: &mut Vec<Point>, irlm: &Path, out: &Path) -> Result<()> {
    let me = std::env::current_exe().context("find the lab's own program")?;
    let run = Command::new(me)
        .arg("test")
        .args(CELLS.iter().map(|c| c.2))
        .arg("--irlm")
        .arg(irlm)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("start the lab's own program again")?;
    let text = String::from_utf8_lossy(&run.stdout);
    let ends: Vec<(&str, &str)> = text.lines().filter_map(ended).collect();
    let mut table = Table::new();
    table.set_header(["phase", "killed", "came out as it must", "test"]);
    let mut bad = 0;
    for (phase, who, test) in CELLS {
        let end = ends.iter().find(|(name, _)| name == test).map_or("not run", |(_, how)| *how);
        bad += u32::from(end != "ok");
        table.add_row([*phase, *who, end, *test]);
    }
    ensure!(ends.len() >= CELLS.len(), "only {} tests ran: {text}", ends.len());
    std::fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let file = out.join("killing.txt");
    std::fs::write(&file, format!("{table}\n")).with_context(|| format!("write {}", file.display()))?;
    let how = format!(
        "{} cells of phase and party, each a lab test with two guests that write throughout, run now: never two copies, never none but \
         where the one that ran has died with its VMM, and what is lost is named; table in {}",
        CELLS.len(),
        file.display()
    );
    at_most(points, "6-table", "cells that did not come out as they must", &how, f64::from(bad), 0.0)
}

#[cfg(test)]
mod tests {
    use super::CELLS;

    #[test]
    fn every_cell_is_a_test_and_every_such_test_a_cell() {
        let tests: Vec<&str> = crate::cases::all().iter().map(|c| c.name).collect();
        let words = ["fail-", "doubt-", "-killed", "-lost", "-cut"];
        let of_kind = tests.iter().filter(|t| t.starts_with("kvm-") && words.iter().any(|w| t.contains(w)));
        assert!(of_kind.clone().all(|t| CELLS.iter().any(|c| c.2 == *t)), "{of_kind:?}");
        assert!(CELLS.iter().all(|c| tests.contains(&c.2)));
    }
}
