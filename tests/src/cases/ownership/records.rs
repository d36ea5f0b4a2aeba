//! Old records: a VM has moved on, and what some agent wrote of it earlier is history. Whenever an agent starts again, no old
//! copy is continued.

use super::light::{Begin, Light};
use super::rig::{Rig, SETTLE, Spec, Way, with};
use super::{BEFORE, CHOSEN, DIRECT, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::net::Host;
use irlm_tests::qemu::Vm;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "own-old-record-back",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| on(b, PATH, Host::Source(0), false),
    },
    Case {
        name: "own-old-record-on",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| on(b, PATH, Host::Target(1), false),
    },
    Case {
        name: "own-old-record-on-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| on(b, DIRECT, Host::Target(1), false),
    },
    Case {
        name: "own-old-record-unfinished",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| on(b, PATH, Host::Target(1), true),
    },
    Case { name: "own-old-record-aborted", needs: CHOSEN, takes: Takes::Light, run: aborted },
];

/// Makes an agent's finished records look as if it had died right before it noted that nothing is left to do. Records that
/// have no such note stay as they are.
fn unfinish(rig: &Rig<'_>, host: Host) -> Result<()> {
    for e in std::fs::read_dir(rig.lab.dir(host).join("state"))?.flatten() {
        let Ok(text) = std::fs::read_to_string(e.path()) else { continue };
        let open = text.replace("\"settled\":true", "\"settled\":false");
        if open != text {
            say(&format!("unfinished again: {}", e.file_name().to_string_lossy()));
            std::fs::write(e.path(), open)?;
        }
    }
    Ok(())
}

/// Every agent starts again, one after the other, with records that were never finished.
fn restart_all(rig: &mut Rig<'_>) -> Result<()> {
    let hosts: Vec<Host> = rig.irlm.agents.keys().copied().collect();
    for host in hosts {
        rig.irlm.kill_agent(host)?;
        unfinish(rig, host)?;
        rig.irlm.agent_args.clear();
        rig.irlm.start_agent(host)?;
        std::thread::sleep(Duration::from_millis(1500));
    }
    Ok(())
}

/// From s0 to t0, and from there on to `last`, where a new QEMU waits; with `open` the first move's records are unfinished when the
/// second begins.
fn on(b: &Bench, route: &str, last: Host, open: bool) -> Result<()> {
    let spec = Spec { hosts: 2, ..Spec::of(vec![Light::new("alpha")]) };
    with(b, spec, |rig| {
        let first = rig.group(route)?;
        rig.evacuate(&first, &[])?.code(0)?;
        rig.stays(0, "postmigrate", "running")?;
        for host in [Host::Source(0), Host::Target(0)] {
            rig.irlm.kill_agent(host)?;
            if open {
                unfinish(rig, host)?;
            }
            rig.irlm.start_agent(host)?;
        }
        std::thread::sleep(Duration::from_secs(2));
        rig.comes_to(0, "postmigrate", "running", Duration::ZERO)?;
        let second = second(rig, route, last)?;
        restart_all(rig)?;
        restart_all(rig)?;
        rig.stays(0, "postmigrate", "postmigrate")?;
        runs(second, "the last copy")
    })
}

fn second(rig: &mut Rig<'_>, route: &str, last: Host) -> Result<Vm> {
    let light = rig.vms[0].light.clone();
    let vm = rig.further(&light, last, "-2", Begin::Waits)?;
    let way = Way {
        vm: "alpha".into(),
        from: Host::Target(0),
        to: last,
        source_qmp: rig.vms[0].target.agent_qmp.clone(),
        target_qmp: vm.agent_qmp.clone(),
    };
    let group = rig.group_of("own-2", route, &[way])?;
    rig.evacuate(&group, &[])?.code(0).context("the second move")?;
    Ok(vm)
}

fn runs(mut vm: Vm, what: &str) -> Result<()> {
    let state = vm.qmp.status()?;
    ensure!(state == "running", "{what} is {state}");
    Ok(())
}

/// The first move is aborted, and its agent dies before it has noted that nothing is left to do; the second moves the VM.
fn aborted(b: &Bench) -> Result<()> {
    let spec = Spec { hosts: 2, ..Spec::of(vec![Light::new("alpha")]) }.held(BEFORE.0, 1500);
    with(b, spec, |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.holds(0, BEFORE.1)?;
        rig.vms[0].target.kill();
        going.end()?.code(2)?;
        rig.comes_to(0, "running", "ended", SETTLE)?;
        let light = rig.vms[0].light.clone();
        let vm = rig.further(&light, Host::Target(1), "", Begin::Waits)?;
        let way = Way {
            vm: "alpha".into(),
            from: Host::Source(0),
            to: Host::Target(1),
            source_qmp: rig.vms[0].source.agent_qmp.clone(),
            target_qmp: vm.agent_qmp.clone(),
        };
        let group = rig.group_of("own-2", PATH, &[way])?;
        rig.evacuate(&group, &[])?.code(0).context("the second move")?;
        restart_all(rig)?;
        restart_all(rig)?;
        rig.stays(0, "postmigrate", "ended")?;
        runs(vm, "the moved copy")
    })
}
