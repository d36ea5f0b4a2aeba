//! The same group file run again, after a whole and after a partial success: what has moved is left alone, the rest moves.

use super::identity::ways;
use super::light::{Begin, Light};
use super::rig::{Ended, Rig, SETTLE, Spec, with};
use super::{CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::net::Host;
use serde_json::json;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-again-whole", needs: CHOSEN, takes: Takes::Light, run: |b| whole(b, PATH, false) },
    Case {
        name: "own-again-whole-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| whole(b, DIRECT, false),
    },
    Case { name: "own-again-whole-oc", needs: CHOSEN, takes: Takes::Light, run: |b| whole(b, OC, false) },
    Case { name: "own-again-paused", needs: CHOSEN, takes: Takes::Light, run: |b| whole(b, PATH, true) },
    Case { name: "own-again-agents-restarted", needs: CHOSEN, takes: Takes::Light, run: restarted },
    Case { name: "own-again-at-once", needs: CHOSEN, takes: Takes::Light, run: |b| at_once(b, "own") },
    Case {
        name: "own-again-at-once-other-group",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| at_once(b, "own-2"),
    },
    Case { name: "own-again-sources-ended", needs: CHOSEN, takes: Takes::Light, run: |b| ended(b, PATH) },
    Case { name: "own-again-sources-ended-oc", needs: CHOSEN, takes: Takes::Light, run: |b| ended(b, OC) },
    Case { name: "own-again-old-copy-runs", needs: CHOSEN, takes: Takes::Light, run: old_copy },
    Case { name: "own-again-part", needs: CHOSEN, takes: Takes::Light, run: |b| part(b, false) },
    Case { name: "own-again-part-paused", needs: CHOSEN, takes: Takes::Light, run: |b| part(b, true) },
];

/// What the second run must say of a VM that the first one moved.
fn already(ended: &Ended, vm: &str, state: &str) -> Result<()> {
    ended.row(vm, "verdict", "moved")?;
    ended.row(vm, "phase", "already moved")?;
    ended.row(vm, "state", state)
}

fn two() -> Vec<Light> {
    vec![Light::new("alpha"), Light::new("beta")]
}

/// All moved, and once more.
fn whole(b: &Bench, route: &str, paused: bool) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(route)?;
        rig.evacuate(&group, &[])?.code(0)?;
        if paused {
            rig.vms[0].target.qmp.run("stop", &json!({}))?;
        }
        let alpha = if paused { "paused" } else { "running" };
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "postmigrate", alpha)?;
        rig.stays(1, "postmigrate", "running")?;
        again.code(0)?;
        already(&again, "alpha", alpha)?;
        already(&again, "beta", "running")
    })
}

/// The same with agents that have only their records left.
fn restarted(b: &Bench) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(PATH)?;
        rig.evacuate(&group, &[])?.code(0)?;
        for host in [Host::Source(0), Host::Target(0)] {
            rig.restart(host, std::time::Duration::ZERO)?;
        }
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "postmigrate", "running")?;
        rig.stays(1, "postmigrate", "running")?;
        again.code(0)?;
        already(&again, "alpha", "running")
    })
}

/// The old copies' QEMUs were ended, as people do when all has moved.
fn ended(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(route)?;
        rig.evacuate(&group, &[])?.code(0)?;
        rig.vms.iter_mut().for_each(|v| v.source.kill());
        let dry = rig.evacuate(&group, &["--dry-run"])?;
        ensure!(dry.code == 0, "the dry run ended with {}", dry.code);
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "ended", "running")?;
        rig.stays(1, "ended", "running")?;
        again.code(0)?;
        already(&again, "alpha", "running")?;
        already(&again, "beta", "running")
    })
}

/// Somebody pauses the VM where it is and continues its old copy: the file run again says so, and touches neither.
fn old_copy(b: &Bench) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(PATH)?;
        rig.evacuate(&group, &[])?.code(0)?;
        rig.vms[0].target.qmp.run("stop", &json!({}))?;
        rig.vms[0].source.qmp.run("cont", &json!({}))?;
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "running", "paused")?;
        rig.stays(1, "postmigrate", "running")?;
        again.code(4)
    })
}

/// Two coordinators at the same time, with one file or with two groups of the same VMs: what was asked for twice is done once.
fn at_once(b: &Bench, other: &str) -> Result<()> {
    let guest = |name: &str| Light { fill: 12, ..Light::new(name) };
    let spec = Spec { edge: 40, ..Spec::of(vec![guest("alpha"), guest("beta")]) };
    with(b, spec, |rig| {
        let ways = ways(rig, [0, 1]);
        let group = rig.group_of("own", PATH, &ways)?;
        let other = rig.group_of(other, PATH, &ways)?;
        let first = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        let second = rig.evacuate(&other, &[])?;
        let first = first.end()?;
        rig.stays(0, "postmigrate", "running")?;
        rig.stays(1, "postmigrate", "running")?;
        first.code(0)?;
        second.code(4)
    })
}

/// One target QEMU dies in the first run; a new one waits for the second.
fn part(b: &Bench, paused: bool) -> Result<()> {
    let beta = Light { fill: 20, ..Light::new("beta") };
    let spec = Spec { edge: 40, ..Spec::of(vec![Light::new("alpha"), beta]) };
    with(b, spec, |rig: &mut Rig<'_>| {
        let group = rig.group(PATH)?;
        let first = rig.begin(&group, &[])?;
        rig.streaming(1, 1 << 20)?;
        rig.vms[1].target.kill();
        let first = first.end()?;
        first.code(2)?;
        first.row("alpha", "verdict", "moved")?;
        first.row("beta", "verdict", "stayed")?;
        rig.comes_to(0, "postmigrate", "running", SETTLE)?;
        if paused {
            rig.vms[0].target.qmp.run("stop", &json!({}))?;
        }
        let alpha = if paused { "paused" } else { "running" };
        let beta = rig.vms[1].light.clone();
        rig.vms[1].target = beta.start(rig.lab, &rig.b.qemu_target, Host::Target(0), "", Begin::Waits)?;
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "postmigrate", alpha)?;
        rig.stays(1, "postmigrate", "running")?;
        again.code(0)?;
        already(&again, "alpha", alpha)?;
        again.row("beta", "verdict", "moved")?;
        ensure!(again.cell("beta", "phase")? != "already moved", "beta moved only now");
        Ok(())
    })
}
