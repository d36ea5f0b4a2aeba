//! `irlm settle`: it answers with what is, is refused where there is nothing to settle, and what was decided is tried for as
//! long as something stands in its way.

use super::disk::lock_target;
use super::light::{Begin, LOCKER, Light, until};
use super::rig::{Disk, Going, Rig, SETTLE, Spec, with};
use super::{AFTER, BEFORE, CHOSEN, DIRECT, OC, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::net::Host;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "own-settle-midway-target",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| midway(b, "target", &[]),
    },
    Case {
        name: "own-settle-midway-source",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| midway(b, "source", &[]),
    },
    Case {
        name: "own-settle-midway-vouched",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| midway(b, "target", &["--other-side-is-dead"]),
    },
    Case { name: "own-settle-target-refused", needs: CHOSEN, takes: Takes::Light, run: target_refused },
    Case { name: "own-settle-source-refused", needs: CHOSEN, takes: Takes::Light, run: source_refused },
    Case { name: "own-settle-journal-full", needs: CHOSEN, takes: Takes::Light, run: journal_full },
    Case { name: "own-settle-unheard", needs: CHOSEN, takes: Takes::Light, run: unheard },
    Case { name: "own-settle-moved", needs: CHOSEN, takes: Takes::Light, run: moved },
    Case { name: "own-settle-ended-unseen", needs: CHOSEN, takes: Takes::Light, run: ended_unseen },
    Case {
        name: "own-settle-ended-unseen-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: ended_unseen_direct,
    },
    Case { name: "own-settle-continued", needs: CHOSEN, takes: Takes::Light, run: |b| continued(b, PATH) },
    Case { name: "own-settle-continued-oc", needs: CHOSEN, takes: Takes::Light, run: |b| continued(b, OC) },
];

fn settle(rig: &Rig<'_>, group: &str, side: &str, more: &[&str]) -> Result<(i32, String)> {
    let mut args = vec!["settle", group, "alpha", "--run-at", side];
    args.extend(more);
    let (code, said) = rig.irlm.command(&args)?;
    say(&format!("settle --run-at {side}: exit code {code}: {}", said.trim().replace('\n', "; ")));
    Ok((code, said))
}

/// Pages move: there is nothing to settle, the answer says so, and the move goes on.
fn midway(b: &Bench, side: &str, more: &[&str]) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        let (code, said) = settle(rig, &group, side, more)?;
        let ended = going.end()?;
        ensure!(code == 4, "settle in the middle of a move ended with {code}: {said}");
        ended.code(0)?;
        rig.stays(0, "postmigrate", "running")
    })
}

/// A VM that is paused on both sides: given up, and the target has not heard it, because the source's agent is dead.
fn in_doubt(rig: &mut Rig<'_>, group: &str) -> Result<Going> {
    let going = rig.begin(group, &[])?;
    rig.holds(0, AFTER.1)?;
    rig.irlm.kill_agent(Host::Source(0))?;
    rig.irlm.agent_args.clear();
    let target = |rig: &Rig<'_>| Ok(rig.phase(Host::Target(0), "alpha")?.0);
    until("the target is in doubt", SETTLE, || {
        let phase: Result<String> = target(rig);
        Ok(matches!(&*phase?, "loaded" | "in-doubt"))
    })?;
    rig.comes_to(0, "*", "*", SETTLE)?;
    Ok(going)
}

fn spec() -> Spec {
    Spec::of(vec![Light::new("alpha")]).held(AFTER.0, 30_000)
}

/// It is to run at its target, whose disk is locked: that is said, exit code 3, and when the lock is gone it runs.
fn target_refused(b: &Bench) -> Result<()> {
    with(b, spec(), |rig| {
        let group = rig.group(PATH)?;
        // Before the target has loaded, which may take the lock for itself.
        let locker = lock_target(rig, 0)?;
        let _going = in_doubt(rig, &group)?;
        let (code, said) = settle(rig, &group, "target", &["--other-side-is-dead"])?;
        rig.comes_to(0, "*", "*", Duration::ZERO)?;
        ensure!(code == 3, "settled, it says ({code}), and no copy runs: {said}");
        ensure!(said.contains("lock"), "what stands in the way is not said: {said}");
        drop(locker);
        rig.stays(0, "*", "running")?;
        rig.irlm.start_agent(Host::Source(0))?;
        std::thread::sleep(Duration::from_secs(3));
        rig.stays(0, "*", "running")
    })
}

/// The same at its source.
fn source_refused(b: &Bench) -> Result<()> {
    with(b, spec(), |rig| {
        let group = rig.group(PATH)?;
        let _going = in_doubt(rig, &group)?;
        // Its target is dead, agent and QEMU.
        rig.irlm.kill_agent(Host::Target(0))?;
        rig.vms[0].target.kill();
        let light = rig.vms[0].light.clone();
        let locker = light.start(rig.lab, &rig.b.qemu, Host::Source(0), LOCKER, Begin::Runs)?;
        rig.irlm.start_agent(Host::Source(0))?;
        let (code, said) = settle(rig, &group, "source", &["--other-side-is-dead"])?;
        rig.comes_to(0, "*", "ended", Duration::ZERO)?;
        ensure!(code == 3, "settled, it says ({code}), and no copy runs: {said}");
        ensure!(said.contains("lock"), "what stands in the way is not said: {said}");
        drop(locker);
        rig.stays(0, "running", "ended")
    })
}

/// It is to run at its target, whose journal is full: not done, said so, and done when there is room.
fn journal_full(b: &Bench) -> Result<()> {
    with(b, Spec { small: vec![Host::Target(0)], ..spec() }, |rig| {
        let group = rig.group(PATH)?;
        let _going = in_doubt(rig, &group)?;
        let full = Disk::full(rig.lab, Host::Target(0))?;
        let (code, said) = settle(rig, &group, "target", &["--other-side-is-dead"])?;
        rig.comes_to(0, "*", "*", Duration::ZERO)?;
        ensure!(code == 3, "settled, it says ({code}), and no copy runs: {said}");
        drop(full);
        rig.stays(0, "*", "running")
    })
}

/// Nobody can say that the target has a copy: the source's is not given up for good, and nothing is lost by the word.
fn unheard(b: &Bench) -> Result<()> {
    with(b, spec(), |rig| {
        let group = rig.group(PATH)?;
        let _going = in_doubt(rig, &group)?;
        rig.irlm.kill_agent(Host::Target(0))?;
        rig.irlm.start_agent(Host::Source(0))?;
        let (code, said) = settle(rig, &group, "target", &[])?;
        ensure!(code != 0, "the target's agent is dead, and it says that all is settled: {said}");
        ensure!(said.contains("nothing was changed"), "what was changed is not said: {said}");
        let (phase, why) = rig.phase(Host::Source(0), "alpha")?;
        ensure!(phase == "in-doubt", "the source's copy is {phase} by a word that was refused: {why}");
        rig.irlm.start_agent(Host::Target(0))?;
        rig.stays(0, "postmigrate", "running")
    })
}

/// It has moved: the old copy is not to be had back by a word.
fn moved(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let group = rig.group(PATH)?;
        rig.evacuate(&group, &[])?.code(0)?;
        for more in [&[][..], &["--other-side-is-dead"][..]] {
            let (code, said) = settle(rig, &group, "source", more)?;
            rig.stays(0, "postmigrate", "running")?;
            ensure!(code == 4, "settle of a VM that is in no doubt ended with {code}: {said}");
        }
        Ok(())
    })
}

/// It has moved, and its target has lost it since. Its old copy is its owner's to continue; once that was done and said, it is
/// the VM, and moves again.
fn continued(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let group = rig.group(route)?;
        rig.evacuate(&group, &[])?.code(0)?;
        rig.vms[0].target.kill();
        let (code, said) = settle(rig, &group, "source", &[])?;
        rig.comes_to(0, "postmigrate", "ended", Duration::ZERO)?;
        ensure!(code == 4, "settle of an old copy that stands still ended with {code}: {said}");
        ensure!(said.contains("may have changed since"), "why it is not continued is not said: {said}");
        rig.vms[0].source.qmp.run("cont", &json!({}))?;
        let (code, said) = settle(rig, &group, "source", &[])?;
        ensure!(code == 0, "settle of a copy that was continued by hand ended with {code}: {said}");
        rig.stays(0, "running", "ended")?;
        let (phase, why) = rig.phase(Host::Source(0), "alpha")?;
        ensure!(phase == "failed" && why.contains("by hand"), "its source says {phase}: {why}");
        rig.restart(Host::Source(0), Duration::ZERO)?;
        rig.stays(0, "running", "ended")?;
        let light = rig.vms[0].light.clone();
        rig.vms[0].target = light.start(rig.lab, &rig.b.qemu_target, Host::Target(0), "", Begin::Waits)?;
        rig.evacuate(&group, &[])?.code(0)?;
        rig.stays(0, "postmigrate", "running")
    })
}

/// The source's QEMU hangs in the very moment in which it is let go. Its agent dies, and then it does, before an agent is back.
fn ends_unseen(rig: &mut Rig<'_>, route: &str) -> Result<(String, Going)> {
    let group = rig.group(route)?;
    let going = rig.begin(&group, &[])?;
    rig.holds(0, BEFORE.1)?;
    let pid = i32::try_from(rig.vms[0].source.pid()).ok().and_then(Pid::from_raw);
    kill_process(pid.context("the QEMU's number")?, Signal::STOP)?;
    // The agent goes on, and writes that the guest may go.
    std::thread::sleep(Duration::from_millis(2500));
    rig.irlm.kill_agent(Host::Source(0))?;
    rig.vms[0].source.kill();
    rig.irlm.agent_args.clear();
    rig.irlm.start_agent(Host::Source(0))?;
    Ok((group, going))
}

/// Nobody saw whether the guest ran on: its copy at the target waits for an operator.
fn ended_unseen(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]).held(BEFORE.0, 1500), |rig| {
        let (group, going) = ends_unseen(rig, PATH)?;
        rig.stays(0, "ended", "*")?;
        let ended = going.end()?;
        ended.code(3)?;
        ended.row("alpha", "verdict", "in-doubt")?;
        let why = ended.cell("alpha", "error")?;
        ensure!(why.contains("no agent saw"), "it is not said why: {why:?}");
        let (code, said) = settle(rig, &group, "target", &[])?;
        ensure!(code == 0, "settle ended with {code}: {said}");
        rig.stays(0, "ended", "running")
    })
}

/// The target had not loaded it: nothing is left to choose, and nothing stays in doubt.
fn ended_unseen_direct(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]).held(BEFORE.0, 1500), |rig| {
        let (_, going) = ends_unseen(rig, DIRECT)?;
        rig.comes_to(0, "ended", "ended", SETTLE)?;
        let ended = going.end()?;
        ended.code(5)?;
        ended.row("alpha", "verdict", "lost")
    })
}
