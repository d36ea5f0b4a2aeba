//! QEMU's migration settings after a move that did not come to its end: as they were found, so that the operator's own
//! migration works.

use super::light::{changed, migration, settings, state, until};
use super::rig::{Rig, Spec, with};
use super::{CHOSEN, DIRECT, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::net::Host;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-settings-failed", needs: CHOSEN, takes: Takes::Light, run: |b| kept(b, PATH, failed) },
    Case {
        name: "own-settings-failed-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| kept(b, DIRECT, failed),
    },
    Case { name: "own-settings-failed-oc", needs: CHOSEN, takes: Takes::Light, run: |b| kept(b, OC, failed) },
    Case {
        name: "own-settings-cancelled",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| kept(b, PATH, cancelled),
    },
    Case {
        name: "own-settings-cancelled-oc",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| kept(b, OC, cancelled),
    },
    Case {
        name: "own-settings-agent-killed",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| kept(b, PATH, killed),
    },
    Case {
        name: "own-settings-agent-killed-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| kept(b, DIRECT, killed),
    },
    Case { name: "own-settings-agent-killed-oc", needs: CHOSEN, takes: Takes::Light, run: taken_up },
    Case { name: "own-settings-save-between-direct", needs: CHOSEN, takes: Takes::Light, run: between },
    Case { name: "own-settings-save-between-oc", needs: CHOSEN, takes: Takes::Light, run: between_plain },
    Case { name: "own-settings-save-agent-killed", needs: CHOSEN, takes: Takes::Light, run: orphaned },
];

fn failed(rig: &mut Rig<'_>, _: &str) -> Result<()> {
    rig.vms[0].target.kill();
    Ok(())
}

fn cancelled(rig: &mut Rig<'_>, group: &str) -> Result<()> {
    let (code, said) = rig.irlm.command(&["cancel", group])?;
    ensure!(code == 0, "irlm cancel ended with {code}: {said}");
    Ok(())
}

fn killed(rig: &mut Rig<'_>, _: &str) -> Result<()> {
    rig.restart(Host::Source(0), Duration::from_secs(1))
}

/// What an operator may have set.
fn own() -> [Value; 2] {
    let capabilities = json!({"capabilities": [
        {"capability": "auto-converge", "state": true},
        {"capability": "events", "state": true},
    ]});
    [capabilities, json!({"max-bandwidth": 123_456_789, "downtime-limit": 777, "multifd-channels": 3})]
}

fn as_found(rig: &mut Rig<'_>, found: &Value) -> Result<()> {
    let mut left = Vec::new();
    let source = &mut rig.vms[0].source;
    let same = until("settings as found", Duration::from_secs(10), || {
        left = changed(found, &settings(source)?);
        Ok(left.is_empty())
    });
    ensure!(same.is_ok(), "settings are not as they were found: {}", left.join("; "));
    Ok(())
}

/// A plain move goes on without its agent, which takes it up again: the settings are put back at its end.
fn taken_up(b: &Bench) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(OC)?;
        let [capabilities, parameters] = own();
        let qmp = &mut rig.vms[0].source.qmp;
        qmp.run("migrate-set-capabilities", &capabilities)?;
        qmp.run("migrate-set-parameters", &parameters)?;
        let found = settings(&mut rig.vms[0].source)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        killed(rig, &group)?;
        let ended = going.end()?;
        rig.stays(0, "postmigrate", "running")?;
        as_found(rig, &found)?;
        ended.code(0)
    })
}

/// The operator's own save, begun as soon as the VM is his again.
fn save(rig: &mut Rig<'_>, uri: &str) -> Result<()> {
    until("the move has failed, and the VM runs", Duration::from_secs(20), || {
        let source = &mut rig.vms[0].source;
        Ok(migration(source)? == "failed" && state(source) == "running")
    })?;
    rig.vms[0].source.qmp.run("migrate", &json!({ "uri": uri })).map(drop)
}

/// His next one comes to its end, with his settings, and leaves the VM as saves do.
fn saves_again(rig: &mut Rig<'_>, found: &Value) -> Result<()> {
    rig.stays(0, "running", "*")?;
    as_found(rig, found)?;
    let source = &mut rig.vms[0].source;
    source.qmp.run("migrate", &json!({"uri": "exec:cat > /dev/null"}))?;
    source.qmp.migrated(Duration::from_secs(20))?;
    source.qmp.run("cont", &json!({}))?;
    rig.stays(0, "running", "*")
}

/// A QEMU that streams to another one stops before it hands over, for its agent to say so. The operator is quicker than the agent
/// is with the settings: his save stops there too, with nobody to say so. It would never end, so the VM is freed from it.
fn between(b: &Bench) -> Result<()> {
    // An agent that is stopped would stop the stream that it passes on.
    with(b, Spec { tls: false, ..Spec::slow() }, |rig| {
        let group = rig.group(DIRECT)?;
        let found = settings(&mut rig.vms[0].source)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        rig.irlm.signal_agent(Host::Source(0), Signal::STOP)?;
        rig.vms[0].target.kill();
        save(rig, "exec:cat > /dev/null")?;
        until("his save has stopped", Duration::from_secs(20), || {
            Ok(migration(&mut rig.vms[0].source)? == "pre-switchover")
        })?;
        rig.irlm.signal_agent(Host::Source(0), Signal::CONT)?;
        let ended = going.end()?;
        saves_again(rig, &found)?;
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")
    })
}

/// A plain move has failed, and the operator's own is under way before the agent looks: that one is not the group's, and
/// the settings wait for its end, whatever becomes of the agent meanwhile.
fn between_plain(b: &Bench) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(OC)?;
        let found = settings(&mut rig.vms[0].source)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        rig.irlm.signal_agent(Host::Source(0), Signal::STOP)?;
        rig.vms[0].target.kill();
        // To somebody who takes his time.
        let socket = rig.lab.dir(Host::Source(0)).join("save.sock");
        let slow = UnixListener::bind(&socket)?;
        save(rig, &format!("unix:{}", socket.display()))?;
        rig.irlm.signal_agent(Host::Source(0), Signal::CONT)?;
        let ended = going.end()?;
        killed(rig, &group)?;
        std::thread::sleep(Duration::from_secs(2));
        let job = migration(&mut rig.vms[0].source)?;
        ensure!(job == "active", "the operator's own save is {job}");
        rig.vms[0].source.qmp.run("migrate_cancel", &json!({}))?;
        drop(slow);
        saves_again(rig, &found)?;
        ended.code(2)?;
        ended.row("alpha", "verdict", "stayed")
    })
}

/// The agent that had the stream is dead, so that the move has failed; the next one finds the operator's save, and leaves it alone.
fn orphaned(b: &Bench) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(PATH)?;
        let found = settings(&mut rig.vms[0].source)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        rig.irlm.kill_agent(Host::Source(0))?;
        // To somebody who takes his time.
        let socket = rig.lab.dir(Host::Source(0)).join("save.sock");
        let slow = UnixListener::bind(&socket)?;
        save(rig, &format!("unix:{}", socket.display()))?;
        rig.irlm.start_agent(Host::Source(0))?;
        let ended = going.end()?;
        std::thread::sleep(Duration::from_secs(3));
        let job = migration(&mut rig.vms[0].source)?;
        ensure!(job == "active", "the operator's own save is {job}");
        rig.vms[0].source.qmp.run("migrate_cancel", &json!({}))?;
        drop(slow);
        saves_again(rig, &found)?;
        ended.code(2)
    })
}

fn kept(b: &Bench, route: &str, harm: fn(&mut Rig<'_>, &str) -> Result<()>) -> Result<()> {
    with(b, Spec::slow(), |rig| {
        let group = rig.group(route)?;
        let [capabilities, parameters] = own();
        let qmp = &mut rig.vms[0].source.qmp;
        qmp.run("migrate-set-capabilities", &capabilities)?;
        qmp.run("migrate-set-parameters", &parameters)?;
        let found = settings(&mut rig.vms[0].source)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        harm(rig, &group)?;
        let ended = going.end()?;
        rig.stays(0, "running", "*")?;
        as_found(rig, &found)?;
        ended.code(2)?;
        // The operator's own migration.
        let source = &mut rig.vms[0].source;
        source.qmp.run("migrate", &json!({"uri": "exec:cat > /dev/null"}))?;
        source.qmp.migrated(Duration::from_secs(20)).map(drop)
    })
}
