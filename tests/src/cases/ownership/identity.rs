//! Who a process is, and who else uses it: two monitors swapped, an unrelated VM's monitor, somebody else's migration.

use super::light::{Begin, Light, migration, state};
use super::rig::{Rig, Spec, Way, with};
use super::{CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::net::Host;
use serde_json::json;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-swapped", needs: CHOSEN, takes: Takes::Light, run: |b| swapped(b, PATH) },
    Case { name: "own-swapped-direct", needs: CHOSEN, takes: Takes::Light, run: |b| swapped(b, DIRECT) },
    Case { name: "own-swapped-oc", needs: CHOSEN, takes: Takes::Light, run: |b| swapped(b, OC) },
    Case { name: "own-unrelated", needs: CHOSEN, takes: Takes::Light, run: |b| unrelated(b, "paused") },
    Case {
        name: "own-unrelated-running",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| unrelated(b, "running"),
    },
    Case {
        name: "own-unrelated-waiting",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| unrelated(b, "inmigrate"),
    },
    Case { name: "own-foreign-migration", needs: CHOSEN, takes: Takes::Light, run: |b| foreign(b, PATH) },
    Case { name: "own-foreign-migration-oc", needs: CHOSEN, takes: Takes::Light, run: |b| foreign(b, OC) },
    Case { name: "own-foreign-completed", needs: CHOSEN, takes: Takes::Light, run: completed },
];

fn two() -> Vec<Light> {
    vec![Light::new("alpha"), Light::new("beta")]
}

/// The ways of all VMs, their targets in this order.
pub(super) fn ways(rig: &Rig<'_>, targets: [usize; 2]) -> Vec<Way> {
    let vms = rig.vms.iter().zip(targets);
    vms.map(|(d, t)| Way {
        vm: d.light.name.clone(),
        from: Host::Source(d.host),
        to: Host::Target(d.host),
        source_qmp: d.source.agent_qmp.clone(),
        target_qmp: rig.vms[t].target.agent_qmp.clone(),
    })
    .collect()
}

/// Each would come onto the other's disks.
fn swapped(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group_of("own", route, &ways(rig, [1, 0]))?;
        let ended = rig.evacuate(&group, &[])?;
        ended.code(4)?;
        rig.untouched(0)?;
        rig.untouched(1)?;
        ensure!(
            ended.said.contains("alpha") && ended.said.contains("beta"),
            "no reason names both: {}",
            ended.said
        );
        // Mended, it works at once.
        let group = rig.group(route)?;
        rig.evacuate(&group, &[])?.code(0)
    })
}

/// The target's monitor is one of a VM that has nothing to do with it.
fn unrelated(b: &Bench, what: &str) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let begin = if what == "inmigrate" { Begin::Waits } else { Begin::Runs };
        let mut other = rig.further(&Light::new("gamma"), Host::Target(0), "", begin)?;
        if what == "paused" {
            other.qmp.run("stop", &json!({}))?;
        }
        let mut all = ways(rig, [0, 1]);
        all[0].target_qmp.clone_from(&other.agent_qmp);
        let group = rig.group_of("own", PATH, &all)?;
        let ended = rig.evacuate(&group, &[]);
        std::thread::sleep(Duration::from_secs(1));
        let now = state(&mut other);
        ensure!(now == what, "the unrelated VM was {what} and is {now}");
        let ended = ended?;
        ended.code(4)?;
        rig.untouched(0)?;
        rig.untouched(1)
    })
}

/// Somebody saves the VM's state, slowly: refused, and theirs goes on.
fn foreign(b: &Bench, route: &str) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(route)?;
        let source = &mut rig.vms[0].source.qmp;
        source.run("migrate-set-parameters", &json!({"max-bandwidth": 65_536}))?;
        source.run("migrate", &json!({"uri": "exec:cat > /dev/null"}))?;
        rig.streaming(0, 1)?;
        let ended = rig.evacuate(&group, &[])?;
        let theirs = migration(&mut rig.vms[0].source)?;
        ensure!(theirs == "active", "somebody else's migration was active and is {theirs}");
        rig.comes_to(0, "running", "inmigrate", Duration::ZERO)?;
        ended.code(4)?;
        rig.untouched(1)
    })
}

/// Somebody else's migration has completed: this copy may run elsewhere, and is not continued.
fn completed(b: &Bench) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(PATH)?;
        let source = &mut rig.vms[0].source.qmp;
        source.run("migrate", &json!({"uri": "exec:cat > /dev/null"}))?;
        source.migrated(Duration::from_secs(30))?;
        let ended = rig.evacuate(&group, &[])?;
        rig.stays(0, "postmigrate", "inmigrate")?;
        ended.code(4)?;
        let said = "has completed a migration that IRLM knows nothing of";
        ensure!(ended.said.contains(said), "the reason is not said: {}", ended.said);
        rig.untouched(1)
    })
}
