//! Disk images: only one QEMU may write to each. The source can always go on with its disk until it has given up, and a target
//! that is refused its disk does not count as moved.

use super::light::{Begin, LOCKER, Light, disk_works};
use super::rig::{Rig, SETTLE, Spec, with};
use super::{BEFORE, CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::net::Host;
use irlm_tests::qemu::Vm;
use std::time::{Duration, Instant};

pub(super) const CASES: &[Case] = &[
    Case { name: "own-cont-refused", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, PATH) },
    Case { name: "own-cont-refused-direct", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, DIRECT) },
    Case { name: "own-cont-refused-oc", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, OC) },
    Case { name: "own-disk-moved", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, PATH) },
    Case { name: "own-disk-moved-direct", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, DIRECT) },
    Case {
        name: "own-disk-target-agent-killed",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| late(b, PATH, |rig| rig.irlm.kill_agent(Host::Target(0))),
    },
    Case {
        name: "own-disk-target-agent-killed-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| late(b, DIRECT, |rig| rig.irlm.kill_agent(Host::Target(0))),
    },
    Case {
        name: "own-disk-target-qemu-killed",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| late(b, PATH, qemu),
    },
    Case {
        name: "own-disk-target-qemu-killed-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| late(b, DIRECT, qemu),
    },
    Case { name: "own-disk-card-announced", needs: CHOSEN, takes: Takes::Light, run: announced },
    Case { name: "own-disk-source-agent-killed", needs: CHOSEN, takes: Takes::Light, run: source_agent },
];

/// A QEMU that holds the target's own image, and so keeps any other from it.
pub(super) fn lock_target(rig: &Rig<'_>, guest: usize) -> Result<Vm> {
    let light = &rig.vms[guest].light;
    let locker = light.start(rig.lab, &rig.b.qemu, Host::Target(0), LOCKER, Begin::Runs);
    locker.context("lock the target's disk image")
}

/// The target's `cont` is refused: the guest is back at its source with a working disk; or it is in doubt, and that is said.
fn refused(b: &Bench, route: &str) -> Result<()> {
    let guest = Light { fill: 12, ..Light::new("alpha") };
    with(b, Spec { edge: 40, ..Spec::of(vec![guest]) }, |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        let locker = lock_target(rig, 0)?;
        let ended = going.end()?;
        ensure!(ended.code != 0, "all moved, it says, and {:?} are the two copies", rig.vms[0].states());
        if ended.code == 3 {
            ended.row("alpha", "verdict", "in-doubt")?;
            ensure!(!ended.cell("alpha", "error")?.is_empty(), "nothing says why");
            drop(locker);
            return rig.stays(0, "*", "running");
        }
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")?;
        ended.row("alpha", "state", "running")?;
        let why = ended.cell("alpha", "error")?;
        ensure!(why.contains("lock"), "QEMU's reason is not passed on: {why:?}");
        rig.stays(0, "running", "*")?;
        disk_works(&mut rig.vms[0].source)?;
        drop(locker);
        rig.stays(0, "running", "*")
    })
}

/// A guest whose two QEMUs share one image, as on shared storage.
fn shared() -> Vec<Light> {
    vec![Light { own_disk: false, ..Light::new("alpha") }]
}

/// Nothing fails: the one image goes over to the target.
fn moved(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(shared()), |rig| {
        let group = rig.group(route)?;
        rig.evacuate(&group, &[])?.code(0)?;
        rig.stays(0, "postmigrate", "running")?;
        disk_works(&mut rig.vms[0].target)
    })
}

fn qemu(rig: &mut Rig<'_>) -> Result<()> {
    rig.vms[0].target.kill();
    Ok(())
}

/// All is loaded at the target, and it is lost before the source has given up: the source goes on, and can write.
fn late(b: &Bench, route: &str, harm: fn(&mut Rig<'_>) -> Result<()>) -> Result<()> {
    with(b, Spec::of(shared()).held(BEFORE.0, 2500), |rig| {
        let group = rig.group(route)?;
        let going = rig.begin(&group, &[])?;
        rig.holds(0, BEFORE.1)?;
        std::thread::sleep(Duration::from_millis(300));
        harm(rig)?;
        rig.comes_to(0, "running", "*", SETTLE)?;
        disk_works(&mut rig.vms[0].source)?;
        if !rig.irlm.agents.contains_key(&Host::Target(0)) {
            rig.irlm.agent_args.clear();
            rig.irlm.start_agent(Host::Target(0))?;
        }
        let ended = going.end()?;
        std::thread::sleep(Duration::from_secs(3));
        disk_works(&mut rig.vms[0].source)?;
        rig.stays(0, "running", "*")?;
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")?;
        ended.row("alpha", "state", "running")
    })
}

/// The target's QEMU has announced the guest's card when it had loaded: the source says that the guest is still here.
fn announced(b: &Bench) -> Result<()> {
    let guest = Light { card: true, ..Light::new("alpha") };
    with(b, Spec::of(vec![guest]).held(BEFORE.0, 2500), |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.holds(0, BEFORE.1)?;
        std::thread::sleep(Duration::from_millis(300));
        let light = rig.vms[0].light.clone();
        let target = light.announced(rig.lab, Host::Target(0))?;
        ensure!(target > 0, "the target's QEMU has not announced the card: this case shows nothing");
        rig.vms[0].target.kill();
        rig.comes_to(0, "running", "*", SETTLE)?;
        let until = Instant::now() + Duration::from_secs(3);
        while light.announced(rig.lab, Host::Source(0))? == 0 {
            ensure!(
                Instant::now() < until,
                "the card is not announced at the source, where its guest runs on"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        going.end()?.code(2)
    })
}

/// The source's agent dies in that moment, and comes back.
fn source_agent(b: &Bench) -> Result<()> {
    with(b, Spec::of(shared()).held(BEFORE.0, 2500), |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.holds(0, BEFORE.1)?;
        std::thread::sleep(Duration::from_millis(300));
        rig.restart(Host::Source(0), Duration::from_secs(1))?;
        rig.comes_to(0, "running", "*", SETTLE)?;
        disk_works(&mut rig.vms[0].source)?;
        std::thread::sleep(Duration::from_secs(3));
        disk_works(&mut rig.vms[0].source)?;
        rig.stays(0, "running", "*")?;
        let ended = going.end()?;
        ended.row("alpha", "verdict", "stayed")
    })
}
