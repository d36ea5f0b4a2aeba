//! What a report calls things: `state` is QEMU's own word, and nobody "runs on" who does not run.

use super::light::{Light, state};
use super::rig::{Rig, Spec, with};
use super::{CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::irlm::UNHEARD;
use irlm_tests::net::Host;
use serde_json::json;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-report-moved", needs: CHOSEN, takes: Takes::Light, run: moved },
    Case { name: "own-report-shutdown-before", needs: CHOSEN, takes: Takes::Light, run: shutdown_before },
    Case {
        name: "own-report-shutdown-midway",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| shutdown_midway(b, PATH),
    },
    Case {
        name: "own-report-shutdown-midway-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| shutdown_midway(b, DIRECT),
    },
    Case { name: "own-report-ended-before", needs: CHOSEN, takes: Takes::Light, run: ended_before },
    Case {
        name: "own-report-ended-midway",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| ended_midway(b, PATH),
    },
    Case {
        name: "own-report-ended-midway-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| ended_midway(b, DIRECT),
    },
    Case {
        name: "own-report-ended-midway-oc",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| ended_midway(b, OC),
    },
    Case { name: "own-report-leave-paused", needs: CHOSEN, takes: Takes::Light, run: |b| left(b, PATH) },
    Case { name: "own-report-leave-paused-oc", needs: CHOSEN, takes: Takes::Light, run: |b| left(b, OC) },
    Case { name: "own-report-unheard", needs: CHOSEN, takes: Takes::Light, run: |b| unheard(b, PATH) },
    Case { name: "own-report-unheard-oc", needs: CHOSEN, takes: Takes::Light, run: |b| unheard(b, OC) },
    Case { name: "own-report-unkept", needs: CHOSEN, takes: Takes::Light, run: unkept },
    Case { name: "own-report-oc-target-there", needs: CHOSEN, takes: Takes::Light, run: oc_there },
];

/// Guests whose QEMU stays, in state "shutdown", when they are shut down.
fn stays_there(fill: u64) -> Light {
    Light { fill, args: vec!["-no-reboot", "-no-shutdown"], ..Light::new("alpha") }
}

/// As a guest that ends itself.
fn shut_down(rig: &mut Rig<'_>) -> Result<()> {
    rig.vms[0].source.qmp.run("system_reset", &json!({}))?;
    super::light::until("the guest is shut down", Duration::from_secs(5), || {
        Ok(state(&mut rig.vms[0].source) != "running")
    })
}

fn moved(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let group = rig.group(PATH)?;
        let ended = rig.evacuate(&group, &[])?;
        ended.code(0)?;
        ended.row("alpha", "state", "running")
    })
}

/// Whoever read the log and the progress has gone (a closed terminal, a dead pager, a full disk): nobody of IRLM ends
/// of that, and the report is kept all the same.
fn unheard(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        for host in [Host::Ctl, Host::Source(0), Host::Target(0)] {
            std::fs::write(rig.lab.dir(host).join(UNHEARD), "")?;
        }
        rig.restart(Host::Source(0), Duration::ZERO)?;
        rig.restart(Host::Target(0), Duration::ZERO)?;
        let group = rig.group(route)?;
        let ended = rig.evacuate(&group, &[])?;
        rig.comes_to(0, "postmigrate", "running", Duration::from_secs(2))?;
        ended.code(0)?;
        ended.row("alpha", "verdict", "moved")?;
        // The agents are there still.
        rig.phase(Host::Source(0), "alpha").and(rig.phase(Host::Target(0), "alpha")).map(drop)
    })
}

/// A report that could not be kept is refused before anything moves.
fn unkept(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let group = rig.group(PATH)?;
        let nowhere = rig.lab.top().join("no-such-directory/report.json").display().to_string();
        let (code, said) = rig.irlm.command(&["evacuate", &group, "--json", &nowhere])?;
        ensure!(code == 1 && said.contains("nothing was started"), "exit code {code}: {said}");
        rig.untouched(0)
    })
}

/// It was shut down before: refused, or it comes to its target as it is; it never runs.
fn shutdown_before(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![stays_there(4)]), |rig| {
        shut_down(rig)?;
        let group = rig.group(PATH)?;
        let ended = rig.evacuate(&group, &[])?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "a guest that was shut down ran at its target");
        if ended.code == 4 {
            ensure!(ended.said.contains("shutdown"), "why it is refused is not said: {}", ended.said);
            return rig.comes_to(0, "shutdown", "inmigrate", Duration::ZERO);
        }
        ended.row("alpha", "state", "shutdown")
    })
}

/// It is shut down while its pages move.
fn shutdown_midway(b: &Bench, route: &str) -> Result<()> {
    let spec = Spec { edge: 40, ..Spec::of(vec![stays_there(20)]) };
    with(b, spec, |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        shut_down(rig)?;
        let ended = going.end()?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "a guest that was shut down ran at its target");
        let (source, target) = rig.vms[0].states();
        let (verdict, why) = (ended.cell("alpha", "verdict")?, ended.cell("alpha", "error")?);
        let owner = if verdict == "moved" { target } else { source };
        ensure!(owner == "shutdown", "{verdict}, and QEMU says {owner}");
        ensure!(verdict != "moved" || why.is_empty(), "it moved as it was, and the report complains: {why}");
        ended.row("alpha", "state", "shutdown")
    })
}

/// Its QEMU has ended before: nothing starts, and the reason names it.
fn ended_before(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha"), Light::new("beta")]), |rig| {
        rig.vms[0].source.kill();
        let group = rig.group(PATH)?;
        let ended = rig.evacuate(&group, &[])?;
        ended.code(4)?;
        ensure!(ended.said.contains("alpha"), "the reason does not name it: {}", ended.said);
        rig.untouched(1)?;
        rig.comes_to(0, "ended", "inmigrate", Duration::ZERO)
    })
}

/// Its QEMU ends while its pages move: it does not run on anywhere.
fn ended_midway(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        rig.vms[0].source.kill();
        let ended = going.end()?;
        rig.comes_to(0, "ended", "*", Duration::ZERO)?;
        ensure!(ended.code != 0, "all moved, it says");
        let (verdict, why) = (ended.cell("alpha", "verdict")?, ended.cell("alpha", "error")?);
        ensure!(!why.is_empty() && !why.contains("runs on"), "{verdict}: the reason is {why:?}");
        let line = ended.said.lines().find(|l| l.contains("runs on"));
        ensure!(
            line.is_none(),
            "its QEMU has ended, and the table says: {}",
            line.unwrap_or_default().trim()
        );
        ended.row("alpha", "state", "ended")
    })
}

/// `--leave-paused`: paused, and called so.
fn left(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let group = rig.group(route)?;
        let ended = rig.evacuate(&group, &["--leave-paused"])?;
        rig.stays(0, "*", "paused")?;
        ended.code(0)?;
        ended.row("alpha", "verdict", "moved")?;
        ensure!(ended.cell("alpha", "phase")? != "running", "the report calls it running");
        let again = rig.evacuate(&group, &[])?;
        rig.stays(0, "*", "paused")?;
        again.code(0)?;
        again.row("alpha", "phase", "already moved")?;
        ended.row("alpha", "state", "paused")?;
        again.row("alpha", "state", "paused")
    })
}

/// `oc` with a target that is refused its disk: its copy is not gone, and nobody may say so.
fn oc_there(b: &Bench) -> Result<()> {
    let guest = Light { fill: 12, ..Light::new("alpha") };
    with(b, Spec { edge: 40, ..Spec::of(vec![guest]) }, |rig| {
        let group = rig.group(OC)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        let _locker = super::disk::lock_target(rig, 0)?;
        let ended = going.end()?;
        let (_, target) = rig.vms[0].states();
        let why = ended.cell("alpha", "error")?;
        ensure!(
            !(why.contains("gone") && target != "ended"),
            "the target is {target}, and the report says {why:?}"
        );
        let owner = ended.cell("alpha", "state")?;
        let (source, target) = rig.vms[0].states();
        let is = match &*ended.cell("alpha", "verdict")? {
            "moved" => target,
            "stayed" => source,
            // No side owns it yet, so no side's word is the VM's state.
            _ => String::new(),
        };
        ensure!(owner == is, "the report says {owner:?}, and QEMU says {is:?}");
        Ok(())
    })
}
