//! Starts that fail leave nothing behind, and two groups do not get in each other's way.

use super::light::{Light, until};
use super::rig::{Rig, SETTLE, Spec, Way, with};
use super::{CHOSEN, OC, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::net::Host;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-failed-start", needs: CHOSEN, takes: Takes::Light, run: typo },
    Case { name: "own-failed-start-target", needs: CHOSEN, takes: Takes::Light, run: typo_at_target },
    Case {
        name: "own-failed-start-source-restarted",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| restarted(b, Host::Source(0)),
    },
    Case {
        name: "own-failed-start-target-restarted",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| restarted(b, Host::Target(0)),
    },
    Case { name: "own-history", needs: CHOSEN, takes: Takes::Light, run: history },
    Case { name: "own-two-groups", needs: CHOSEN, takes: Takes::Light, run: |b| two_groups(b, PATH) },
    Case { name: "own-two-groups-oc", needs: CHOSEN, takes: Takes::Light, run: |b| two_groups(b, OC) },
];

/// Agents with all that they may load.
const WHOLE: &str = "[prepare]\nidle = false\n[sampling]\nseconds = 1\n";

/// What agents hold: threads and descriptors of each, and pinned programs.
fn held(rig: &Rig<'_>) -> Result<Vec<(String, usize, usize, usize)>> {
    let count = |dir: String| Ok::<_, anyhow::Error>(std::fs::read_dir(&dir).context(dir)?.count());
    let mut out = Vec::new();
    for (host, agent) in &rig.irlm.agents {
        let pid = agent.pid();
        let (threads, open) = (count(format!("/proc/{pid}/task"))?, count(format!("/proc/{pid}/fd"))?);
        out.push((host.name(), threads, open, pins(&rig.lab.dir(*host))));
    }
    Ok(out)
}

/// Files in the BPF file system below a host's directory.
fn pins(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let below = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
    let bpf = |p: &Path| {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        mounts.lines().any(|l| l.contains(" bpf ") && l.split(' ').nth(1) == Some(&p.display().to_string()))
    };
    fn files(dir: &Path) -> usize {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
    }
    below.map(|e| if bpf(&e.path()) { files(&e.path()) } else { pins(&e.path()) }).sum()
}

/// The group with a name in it that nobody has.
fn wrong(rig: &Rig<'_>, at_target: bool) -> Result<String> {
    let ways = rig.vms.iter().enumerate().map(|(i, d)| {
        let mut way = Way {
            vm: d.light.name.clone(),
            from: Host::Source(d.host),
            to: Host::Target(d.host),
            source_qmp: d.source.agent_qmp.clone(),
            target_qmp: d.target.agent_qmp.clone(),
        };
        if i == 1 {
            if at_target { &mut way.target_qmp } else { &mut way.source_qmp }.set_extension("nobody");
        }
        way
    });
    rig.group_of("own", PATH, &ways.collect::<Vec<_>>())
}

/// Five times with a typo; then the mended file.
fn failing(rig: &mut Rig<'_>, at_target: bool) -> Result<()> {
    let mut first = Vec::new();
    for n in 0..5 {
        let group = wrong(rig, at_target)?;
        let ended = rig.evacuate(&group, &[])?;
        ended.code(4)?;
        ensure!(ended.said.contains("nobody"), "the reason is not said the {n}th time: {}", ended.said);
        let (code, said) = rig.irlm.command(&["cancel", &group])?;
        ensure!(code == 0, "irlm cancel ended with {code}: {said}");
        if n == 0 {
            first = held(rig)?;
        }
    }
    // What is let go may take a moment.
    let mut last = Vec::new();
    let same = until("as after the first", Duration::from_secs(8), || {
        last = held(rig)?;
        let more = first.iter().zip(&last).any(|(f, l)| l.1 > f.1 + 1 || l.2 > f.2 + 2 || l.3 > f.3);
        Ok(!more)
    });
    say(&format!("threads, descriptors, pins after one failed start {first:?}, after five {last:?}"));
    let group = rig.group(PATH)?;
    let ended = rig.evacuate(&group, &[])?;
    ended.code(0).context("the mended file")?;
    rig.stays(0, "postmigrate", "running")?;
    rig.stays(1, "postmigrate", "running")?;
    ensure!(same.is_ok(), "agents held {first:?} after one failed start, and {last:?} after five");
    Ok(())
}

fn two() -> Vec<Light> {
    vec![Light::new("alpha"), Light::new("beta")]
}

fn typo(b: &Bench) -> Result<()> {
    with(b, Spec { more: WHOLE, ..Spec::of(two()) }, |rig| failing(rig, false))
}

fn typo_at_target(b: &Bench) -> Result<()> {
    with(b, Spec { more: WHOLE, ..Spec::of(two()) }, |rig| failing(rig, true))
}

/// An agent is killed and started again while it prepares: nothing has moved, the reason is said, and the same file works at once.
fn restarted(b: &Bench, host: Host) -> Result<()> {
    let spec = Spec {
        more: "bpf = false\n[prepare]\nidle = false\n[sampling]\nkernel = false\nseconds = 4\n",
        ..Spec::of(two())
    };
    with(b, spec, |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        until("the agents prepare", SETTLE, || {
            Ok(!rig.phase(host, "alpha")?.0.is_empty() || rig.prepares(host)?)
        })?;
        std::thread::sleep(Duration::from_millis(500));
        rig.restart(host, Duration::from_millis(300))?;
        let ended = going.end()?;
        ended.code(4)?;
        ensure!(ended.said.contains(&host.name()), "the reason names no host: {}", ended.said);
        rig.untouched(0)?;
        rig.untouched(1)?;
        rig.evacuate(&group, &[])?.code(0).context("the same file again")?;
        rig.stays(0, "postmigrate", "running")
    })
}

/// A group that is over can be read of, and another one of its name is not in the way.
fn history(b: &Bench) -> Result<()> {
    with(b, Spec::of(two()), |rig| {
        let group = rig.group(PATH)?;
        rig.evacuate(&group, &[])?.code(0)?;
        let (code, said) = rig.irlm.command(&["history", &group])?;
        say(&format!("history: exit code {code}: {}", said.trim().replace('\n', "; ")));
        ensure!(code == 0, "irlm history ended with {code}: {said}");
        for word in ["own", "alpha", "beta"] {
            ensure!(said.contains(word), "irlm history does not say {word}: {said}");
        }
        let (code, said) = rig.irlm.command(&["history", &group, "--json"])?;
        ensure!(code == 0, "irlm history --json ended with {code}: {said}");
        serde_json::from_str::<Value>(&said).context("irlm history --json")?;
        let (code, said) = rig.irlm.command(&["cancel", &group])?;
        ensure!(code == 0, "irlm cancel of a group that is over ended with {code}: {said}");
        rig.stays(0, "postmigrate", "running")?;
        rig.stays(1, "postmigrate", "running")
    })
}

/// Two groups whose VMs have the same numbers reach one host at the same time.
fn two_groups(b: &Bench, route: &str) -> Result<()> {
    let guest = |name: &str| Light { fill: 12, ..Light::new(name) };
    let spec = Spec { edge: 40, ..Spec::of(vec![guest("alpha"), guest("beta")]) };
    with(b, spec, |rig| {
        let ways = super::identity::ways(rig, [0, 1]);
        let groups: Vec<String> = ways
            .chunks(1)
            .enumerate()
            .map(|(n, way)| rig.group_of(&format!("own-{n}"), route, way))
            .collect::<Result<_>>()?;
        let mut first = rig.begin(&groups[0], &[])?;
        let mut second = rig.begin(&groups[1], &[])?;
        // Where each target takes its stream, as its QEMU tells it while it does.
        let mut doors = [Value::Null, Value::Null];
        while first.proc.ended()?.is_none() || second.proc.ended()?.is_none() {
            for (door, d) in doors.iter_mut().zip(&mut rig.vms) {
                let said = d.target.qmp.run("query-migrate", &json!({}))?;
                *door = said.get("socket-address").cloned().unwrap_or(door.take());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let (first, second) = (first.end()?, second.end()?);
        first.code(0)?;
        second.code(0)?;
        rig.stays(0, "*", "running")?;
        rig.stays(1, "*", "running")?;
        // A moment earlier or later, and one would have got the other's guest.
        ensure!(doors[0].is_null() || doors[0] != doors[1], "both came in at {}", doors[0]);
        Ok(())
    })
}
