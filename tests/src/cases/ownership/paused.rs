//! A VM keeps the state that its owner gave it, wherever it ends; and a target QEMU that nobody told to wait does not run.

use super::light::{Begin, Light};
use super::rig::{Rig, SETTLE, Spec, with};
use super::{AFTER, BEFORE, CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::net::Host;
use serde_json::json;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-paused", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, PATH) },
    Case { name: "own-paused-direct", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, DIRECT) },
    Case { name: "own-paused-oc", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, OC) },
    Case { name: "own-paused-cancel", needs: CHOSEN, takes: Takes::Light, run: |b| stays(b, PATH, cancel) },
    Case {
        name: "own-paused-cancel-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| stays(b, DIRECT, cancel),
    },
    Case { name: "own-paused-failed", needs: CHOSEN, takes: Takes::Light, run: |b| stays(b, PATH, kill) },
    Case { name: "own-paused-failed-oc", needs: CHOSEN, takes: Takes::Light, run: |b| stays(b, OC, kill) },
    Case { name: "own-paused-midway", needs: CHOSEN, takes: Takes::Light, run: |b| midway(b, PATH) },
    Case { name: "own-paused-midway-oc", needs: CHOSEN, takes: Takes::Light, run: |b| midway(b, OC) },
    Case { name: "own-paused-midway-direct", needs: CHOSEN, takes: Takes::Light, run: |b| midway(b, DIRECT) },
    Case { name: "own-paused-agent-killed", needs: CHOSEN, takes: Takes::Light, run: given },
    Case {
        name: "own-paused-agent-killed-early",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| early(b, PATH),
    },
    Case {
        name: "own-paused-agent-killed-early-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| early(b, DIRECT),
    },
    Case { name: "own-no-S", needs: CHOSEN, takes: Takes::Light, run: |b| no_wait(b, PATH) },
    Case { name: "own-no-S-direct", needs: CHOSEN, takes: Takes::Light, run: |b| no_wait(b, DIRECT) },
    Case { name: "own-no-S-oc", needs: CHOSEN, takes: Takes::Light, run: |b| no_wait(b, OC) },
    Case { name: "own-no-S-broken", needs: CHOSEN, takes: Takes::Light, run: no_wait_broken },
];

fn stop(rig: &mut Rig<'_>) -> Result<()> {
    rig.vms[0].source.qmp.run("stop", &json!({})).map(drop)
}

/// It was paused before, and is afterwards.
fn moved(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha"), Light::new("beta")]), |rig| {
        stop(rig)?;
        let group = rig.group(route)?;
        let ended = rig.evacuate(&group, &[])?;
        rig.stays(0, "*", "paused")?;
        rig.stays(1, "*", "running")?;
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "alpha ran at its target for a moment");
        ended.code(0)?;
        ended.row("alpha", "verdict", "moved")?;
        ended.row("alpha", "state", "paused")?;
        ended.row("beta", "state", "running")
    })
}

/// Paused while its pages moved. Its agent dies when it has given it up, before that is said: the next one says it.
fn given(b: &Bench) -> Result<()> {
    with(b, Spec::slow().held(AFTER.0, 30_000), |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        stop(rig)?;
        rig.holds(0, AFTER.1)?;
        rig.restart(Host::Source(0), Duration::ZERO)?;
        rig.stays(0, "postmigrate", "paused")?;
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "alpha ran at its target for a moment");
        going.end()?.code(0)
    })
}

/// The same, and its agent dies before all has been sent: it is paused where it was.
fn early(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        stop(rig)?;
        std::thread::sleep(Duration::from_millis(200));
        rig.irlm.kill_agent(Host::Source(0))?;
        rig.irlm.start_agent(Host::Source(0))?;
        let ended = going.end()?;
        let (source, target) = rig.vms[0].states();
        // So QEMU 7.2 leaves a VM whose migration failed while it was paused.
        ensure!(
            matches!(&*source, "paused" | "postmigrate"),
            "{source} at its source, {target} at its target"
        );
        rig.stays(0, &source, "*")?;
        ended.code(2)
    })
}

fn cancel(rig: &mut Rig<'_>, group: &str) -> Result<()> {
    let (code, said) = rig.irlm.command(&["cancel", group])?;
    ensure!(code == 0, "irlm cancel ended with {code}: {said}");
    Ok(())
}

fn kill(rig: &mut Rig<'_>, _: &str) -> Result<()> {
    rig.vms[0].target.kill();
    Ok(())
}

/// It was paused before, its move ends in the middle, and it is paused where it was.
fn stays(b: &Bench, route: &str, harm: fn(&mut Rig<'_>, &str) -> Result<()>) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        stop(rig)?;
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        harm(rig, &group)?;
        let ended = going.end()?;
        rig.stays(0, "paused", "*")?;
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "alpha ran at its target for a moment");
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")?;
        ended.row("alpha", "state", "paused")
    })
}

/// Its owner pauses it in the middle of its move.
fn midway(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        stop(rig)?;
        let ended = going.end()?;
        rig.stays(0, "*", "paused")?;
        ended.code(0)?;
        ended.row("alpha", "state", "paused")
    })
}

/// `-S` was forgotten at the target: it runs when it was given to it, and not when it happens to have loaded. A refusal will do.
fn no_wait(b: &Bench, route: &str) -> Result<()> {
    let spec = Spec { waits: Begin::WaitsToRun, ..Spec::of(vec![Light::new("alpha")]) }.held(BEFORE.0, 2500);
    with(b, spec, |rig| {
        let group = rig.group(route)?;
        let mut going = rig.begin(&group, &[])?;
        if route != OC {
            while going.proc.ended()?.is_none() && rig.holds_now(0, BEFORE.1) < 1 {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(1500));
            ensure!(
                !rig.sentry.saw("alpha", "t0", "running"),
                "the target runs before its source gave it up"
            );
        }
        let ended = going.end()?;
        if ended.code == 4 {
            return rig.untouched(0);
        }
        ended.code(0)?;
        rig.stays(0, "postmigrate", "running")
    })
}

/// The same, and the target's agent dies before the source has given up: the source goes on.
fn no_wait_broken(b: &Bench) -> Result<()> {
    let spec = Spec { waits: Begin::WaitsToRun, ..Spec::of(vec![Light::new("alpha")]) }.held(BEFORE.0, 3000);
    with(b, spec, |rig| {
        let group = rig.group(PATH)?;
        let mut going = rig.begin(&group, &[])?;
        while rig.holds_now(0, BEFORE.1) < 1 {
            if going.proc.ended()?.is_some() {
                going.end()?.code(4)?;
                return rig.untouched(0);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        rig.irlm.kill_agent(Host::Target(0))?;
        rig.comes_to(0, "running", "*", SETTLE)?;
        rig.irlm.agent_args.clear();
        rig.irlm.start_agent(Host::Target(0))?;
        let ended = going.end()?;
        rig.stays(0, "running", "*")?;
        ended.code(2)
    })
}
