//! Guests of our own VMM: moved alone and beside QEMU's, and what becomes of them when somebody dies.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::kvm::{Image, KvmGuest};
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::mixed::Mixed;
use irlm_tests::net::Host;
use irlm_tests::qemu::{Guest, Role};
use irlm_tests::unmet::{over, unmet};
use std::time::{Duration, Instant};

pub(super) const NEEDS: &[Need] = &[Need::Irlm, Need::ChosenQemu, Need::Kvm];
/// Bytes on the core link after which a move of two guests is in its middle.
const MIDDLE: u64 = 20_000_000;
pub(super) const WAIT: Duration = Duration::from_secs(180);
const SETTLE: Duration = Duration::from_secs(60);

pub(crate) const CASES: &[Case] = &[
    Case { name: "kvm-precopy-bitmap", needs: NEEDS, takes: Takes::Heavy, run: |b| precopy(b, "bitmap") },
    Case { name: "kvm-precopy-ring", needs: NEEDS, takes: Takes::Heavy, run: |b| precopy(b, "ring") },
    Case {
        name: "kvm-group-half-qemu-half-kvm",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| half_and_half(b, ""),
    },
    Case {
        name: "kvm-group-half-qemu-half-kvm-ram",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| half_and_half(b, "[verify]\npages = \"ram\""),
    },
    Case {
        name: "kvm-fail-source-agent-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| agent(b, Host::Source(0)),
    },
    Case {
        name: "kvm-fail-target-agent-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| agent(b, Host::Target(0)),
    },
    Case { name: "kvm-fail-source-vmm-killed", needs: NEEDS, takes: Takes::Light, run: source_vmm },
    Case { name: "kvm-fail-target-vmm-killed", needs: NEEDS, takes: Takes::Light, run: target_vmm },
    Case { name: "kvm-fail-core-cut", needs: NEEDS, takes: Takes::Light, run: core_cut },
    Case { name: "kvm-fail-cancel", needs: NEEDS, takes: Takes::Light, run: cancel },
    Case {
        name: "kvm-doubt-source-agent-killed-before-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "pre-copy", Host::Source(0), "--drill-before-give-up"),
    },
    Case {
        name: "kvm-doubt-source-agent-killed-after-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "pre-copy", Host::Source(0), "--drill-after-give-up"),
    },
    Case {
        name: "kvm-doubt-target-agent-killed-before-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "pre-copy", Host::Target(0), "--drill-before-give-up"),
    },
    Case {
        name: "kvm-doubt-target-agent-killed-after-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "pre-copy", Host::Target(0), "--drill-after-give-up"),
    },
];

pub(super) fn like(role: Role, seed: u32) -> Guest {
    Guest { role, seed, mem_mib: 256 }
}

/// A lab of so many hosts with these QEMU guests.
pub(super) fn lab(b: &Bench, qemu: Vec<Vec<Guest>>) -> Result<Lab> {
    let spec = LabSpec { hosts: qemu, ..b.spec(1, 1) };
    Lab::new(b.cache.clone(), spec, &say)
}

/// Two guests of our VMM on one host.
pub(super) fn two(b: &Bench, lab: &Lab, args: &[&str]) -> Result<Vec<(usize, Image)>> {
    let mut images = Vec::new();
    for (role, seed) in [(Role::Db, 0), (Role::Web, 0)] {
        let mut guest = KvmGuest::new(like(role, seed), 2_000_000);
        guest.args = args.iter().map(|s| (*s).to_owned()).collect();
        images.push((0, guest.image(lab, &b.cache, &say)?));
    }
    Ok(images)
}

/// Guests that write throughout move by pre-copy; memory is the source's and the model's, and no step is missed. Every
/// digest that is kept from preparation is proved.
fn precopy(b: &Bench, dirty: &str) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &["--dirty", dirty])?;
    let args = vec!["--drill-prove-digests".to_owned()];
    let moved = Mixed::start(&lab, &b.irlm, &images, "", args)?.move_all(WAIT)?;
    for name in ["kvm-db0", "kvm-web0"] {
        let pages = &moved.vm(name)?["pages"];
        ensure!(pages["kept"].as_u64() > Some(20_000), "{name} left with few kept digests: {pages}");
        println!("  {name}: {pages}, downtime {} ms", moved.vm(name)?["downtime_ms"]);
    }
    Ok(())
}

/// Half of a 2×2 group is QEMU's, half ours; each half has pages that the other brings.
fn half_and_half(b: &Bench, verify: &str) -> Result<()> {
    let lab = lab(b, vec![vec![like(Role::Web, 0)], vec![like(Role::Web, 1)]])?;
    let mut images = Vec::new();
    for (host, role) in [(0, Role::Db), (1, Role::Idle)] {
        images.push((host, KvmGuest::new(like(role, 0), 2_000_000).image(&lab, &b.cache, &say)?));
    }
    let moved = Mixed::start(&lab, &b.irlm, &images, verify, Vec::new())?.move_all(WAIT)?;
    for name in ["web0", "web1", "kvm-db0", "kvm-idle0"] {
        let vm = moved.vm(name)?;
        println!("  {name}: verified {}", vm["verified"]);
        // 256 MiB less what the machine keeps from its guest.
        let ram = &vm["verified"]["ram"];
        let all = ram["pages"].as_u64() >= Some(65_000) && ram["passed"].as_u64() >= Some(65_000);
        ensure!(verify.is_empty() || all, "{name}: verified {}", vm["verified"]);
        let pages = &vm["pages"];
        let shared =
            pages["reference"].as_u64().unwrap_or(0) + pages["remote_reference"].as_u64().unwrap_or(0);
        println!("  {name}: {pages}, downtime {} ms", vm["downtime_ms"]);
        ensure!(shared > 5000, "{name} shares hardly anything: {pages}");
    }
    Ok(())
}

/// Two guests under way, in the middle of their move.
fn begin<'a>(
    b: &Bench,
    lab: &'a Lab,
    images: &'a [(usize, Image)],
    args: Vec<String>,
) -> Result<(Mixed<'a>, irlm_tests::irlm::Proc)> {
    let mut m = Mixed::start(lab, &b.irlm, images, "", args)?;
    let mut evacuate = m.evacuate(false)?;
    let start = Instant::now();
    while m.passed()? < MIDDLE {
        if let Some(code) = evacuate.ended()? {
            return over(code, &format!("{}\n{}", evacuate.said(), m.said()));
        }
        ensure!(start.elapsed() < WAIT, "the move does not get going: {}", m.said());
        std::thread::sleep(Duration::from_millis(10));
    }
    if m.sides()?.iter().any(|(source, _)| !source) {
        return unmet("a guest had left its source before the middle");
    }
    Ok((m, evacuate))
}

fn all(m: &Mixed<'_>, sides: &[bool], target: bool) -> Result<()> {
    ensure!(sides.iter().all(|s| *s == target), "on the target: {sides:?}\n{}", m.said());
    Ok(())
}

/// An agent dies in the middle: the guests run on at their source all along, also after it is back.
fn agent(b: &Bench, host: Host) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images, Vec::new())?;
    m.irlm.kill_agent(host)?;
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, false)?;
    m.irlm.start_agent(host)?;
    evacuate.wait(WAIT)?;
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, false)
}

/// A source VMM dies, and its guest with it; the other moves.
fn source_vmm(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images, Vec::new())?;
    m.kvm[0].source.kill();
    evacuate.wait(WAIT)?;
    let dead = m.kvm.remove(0);
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, true)?;
    let mut dead = dead;
    ensure!(
        dead.target.state() != Some(irlm_user::net::vmm::State::Running),
        "{} died half-moved, and yet runs on the target",
        dead.name
    );
    Ok(())
}

/// A target VMM dies: its guest stays, the other moves.
fn target_vmm(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images, Vec::new())?;
    m.kvm[0].target.kill();
    evacuate.wait(WAIT)?;
    let sides = m.settled(SETTLE)?;
    ensure!(sides == [false, true], "on the target: {sides:?}\n{}", m.said());
    let report = m.report()?;
    let why = report["vms"][0]["error"].as_str().unwrap_or_default().to_owned();
    ensure!(why.contains("VMM"), "the report does not say why: {report}");
    Ok(())
}

/// Nothing can cross: both stay, also when the link is back.
fn core_cut(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images, Vec::new())?;
    lab.net.cut_core()?;
    // They run at their source all along; the move is over only when the coordinator says so.
    evacuate.wait(WAIT)?;
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, false)?;
    lab.net.mend_core()?;
    std::thread::sleep(Duration::from_secs(5));
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, false)
}

/// `irlm cancel` in the middle.
fn cancel(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images, Vec::new())?;
    let (code, said) = m.irlm.command(&["cancel", &m.irlm.group_file()])?;
    ensure!(code == 0, "irlm cancel ended with {code}: {said}");
    evacuate.wait(WAIT)?;
    let sides = m.settled(SETTLE)?;
    all(&m, &sides, false)
}

/// An agent dies between two words of the handover, is started again, and each guest runs on exactly one side; at no
/// moment on two. The handover is held at the drill's point for a while, so that the agent dies in it.
pub(super) fn handover(b: &Bench, migration: &str, host: Host, drill: &str) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let extra = format!("migration = {migration:?}");
    let args = vec![drill.to_owned(), "4000".into()];
    let mut m = Mixed::start(&lab, &b.irlm, &images, &extra, args)?;
    let _evacuate = m.evacuate(false)?;
    let start = Instant::now();
    // In the handover: the source has been stopped, and the target has loaded all.
    let loaded = |m: &Mixed<'_>| -> Result<bool> {
        Ok(m.irlm.status(Host::Target(0))?.to_string().contains("\"phase\":\"loaded\""))
    };
    while !loaded(&m)? {
        ensure!(start.elapsed() < WAIT, "no guest was loaded: {}", m.said());
        m.sides()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(500));
    m.irlm.kill_agent(host).context("the agent")?;
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        m.sides()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    m.irlm.agent_args.clear();
    m.irlm.start_agent(host)?;
    let sides = m.settled(SETTLE)?;
    println!("  after the restart of {}: on the target: {sides:?}", host.name());
    Ok(())
}
