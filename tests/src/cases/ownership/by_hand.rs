//! Somebody continues a copy by hand, on its own monitor, in the middle of a handover or in doubt: the other never runs
//! beside it because of IRLM, and what was done is said.

use super::light::{Light, until};
use super::rig::{Rig, SETTLE, Spec, with};
use super::{AFTER, BEFORE, CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::net::Host;
use irlm_tests::qemu::Vm;
use serde_json::json;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "own-by-hand-source-in-doubt",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| source(b, PATH, Host::Target(0)),
    },
    Case {
        name: "own-by-hand-source-in-doubt-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| source(b, DIRECT, Host::Target(0)),
    },
    Case {
        name: "own-by-hand-source-restarted",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| source(b, PATH, Host::Source(0)),
    },
    Case { name: "own-by-hand-source-oc", needs: CHOSEN, takes: Takes::Light, run: plain },
    Case { name: "own-by-hand-target-early", needs: CHOSEN, takes: Takes::Light, run: |b| early(b, PATH) },
    Case {
        name: "own-by-hand-target-early-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| early(b, DIRECT),
    },
    Case { name: "own-by-hand-target-in-doubt", needs: CHOSEN, takes: Takes::Light, run: target },
];

fn cont(vm: &mut Vm) -> Result<()> {
    vm.qmp.run("cont", &json!({})).map(drop)
}

/// Given up and in doubt, it is continued at its source; then the agents meet again.
fn source(b: &Bench, route: &str, dies: Host) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]).held(AFTER.0, 1500), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.holds(0, AFTER.1)?;
        rig.irlm.kill_agent(dies)?;
        rig.comes_to(0, "*", "*", SETTLE)?;
        // What it said last may still be on its way.
        std::thread::sleep(Duration::from_secs(2));
        rig.comes_to(0, "*", "*", Duration::ZERO)?;
        cont(&mut rig.vms[0].source)?;
        rig.irlm.agent_args.clear();
        rig.irlm.start_agent(dies)?;
        rig.stays(0, "running", "*")?;
        until("that it runs at its source is said", SETTLE, || {
            let (phase, why) = rig.phase(Host::Source(0), "alpha")?;
            Ok(phase == "in-doubt" && why.contains("by hand"))
        })?;
        let ended = going.end()?;
        ended.code(3)?;
        ended.row("alpha", "verdict", "in-doubt")?;
        // It is an operator's to say which one it is, and the target's was never run.
        let settle = |rig: &Rig<'_>, side| rig.irlm.command(&["settle", &group, "alpha", "--run-at", side]);
        let (code, said) = settle(rig, "target")?;
        ensure!(code != 0, "it runs at its source, and is let run at its target: {said}");
        rig.stays(0, "running", "*")?;
        let (code, said) = settle(rig, "source")?;
        ensure!(code == 0, "settled at its source, where it runs: {code}: {said}");
        rig.stays(0, "running", "*")
    })
}

/// Plain QEMU has completed, and the target's agent cannot be told so.
fn plain(b: &Bench) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(OC)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        rig.irlm.kill_agent(Host::Target(0))?;
        rig.comes_to(0, "postmigrate", "paused", SETTLE)?;
        cont(&mut rig.vms[0].source)?;
        std::thread::sleep(Duration::from_secs(1));
        rig.irlm.start_agent(Host::Target(0))?;
        rig.stays(0, "running", "*")?;
        until("that it runs at its source is said", SETTLE, || {
            let (phase, why) = rig.phase(Host::Source(0), "alpha")?;
            Ok(phase == "in-doubt" && why.contains("by hand"))
        })?;
        going.end()?.code(3)
    })
}

/// The waiting target is told `cont` while its pages come, so that it runs as soon as it has loaded.
fn early(b: &Bench, route: &str) -> Result<()> {
    let guest = Light { fill: 20, ..Light::new("alpha") };
    with(b, Spec { edge: 40, ..Spec::of(vec![guest]) }.held(BEFORE.0, 2500), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        cont(&mut rig.vms[0].target)?;
        let ended = going.end()?;
        rig.stays(0, "running", "*")?;
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")?;
        let why = ended.cell("alpha", "error")?;
        ensure!(why.contains("let it run"), "why it stayed is not said: {why}");
        Ok(())
    })
}

/// Loaded and in doubt, it is continued at its target: it is stopped again, and runs once its source has been heard.
fn target(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]).held(AFTER.0, 30_000), |rig| {
        let group = rig.group(PATH)?;
        let _going = rig.begin(&group, &[])?;
        rig.holds(0, AFTER.1)?;
        rig.irlm.kill_agent(Host::Source(0))?;
        until("the target is in doubt", SETTLE, || {
            Ok(matches!(&*rig.phase(Host::Target(0), "alpha")?.0, "loaded" | "in-doubt"))
        })?;
        cont(&mut rig.vms[0].target)?;
        std::thread::sleep(Duration::from_secs(1));
        rig.comes_to(0, "*", "*", SETTLE)?;
        until("that it was stopped is said", SETTLE, || {
            Ok(rig.phase(Host::Target(0), "alpha")?.1.contains("stopped again"))
        })?;
        rig.irlm.agent_args.clear();
        rig.irlm.start_agent(Host::Source(0))?;
        rig.stays(0, "postmigrate", "running")
    })
}
