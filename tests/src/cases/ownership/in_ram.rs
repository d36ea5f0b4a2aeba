//! `[verify] pages = "ram"`: the memory of a stopped guest is compared at both hosts before it may run at its target, which also
//! shows what no agent sees pass.

use super::light::Light;
use super::rig::{Rig, Spec, with};
use super::{CHOSEN, DIRECT, KVM, OC, PATH};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-report-ram", needs: CHOSEN, takes: Takes::Light, run: |b| moved(b, PATH, false) },
    Case {
        name: "own-report-ram-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| moved(b, DIRECT, false),
    },
    Case { name: "own-report-ram-clocks", needs: KVM, takes: Takes::Light, run: |b| moved(b, PATH, true) },
    Case {
        name: "own-report-ram-clocks-direct",
        needs: KVM,
        takes: Takes::Light,
        run: |b| moved(b, DIRECT, true),
    },
    Case { name: "own-report-ram-changed", needs: CHOSEN, takes: Takes::Light, run: |b| changed(b, PATH) },
    Case {
        name: "own-report-ram-changed-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| changed(b, DIRECT),
    },
    Case { name: "own-report-ram-dry-run", needs: CHOSEN, takes: Takes::Light, run: dry_run },
];

/// A page of the guest's that it never touches.
const PAGE: u64 = 0x1800;

fn group(rig: &Rig<'_>, way: &str, pages: &str) -> Result<String> {
    rig.group(&format!("{way}\n[verify]\npages = {pages:?}"))
}

/// `clocks`: KVM writes into the guest's memory while QEMU loads it.
fn moved(b: &Bench, way: &str, clocks: bool) -> Result<()> {
    with(b, Spec::of(vec![Light { clocks, ..Light::new("alpha") }]), |rig| {
        let group = group(rig, way, "ram")?;
        let ended = rig.evacuate(&group, &[])?;
        ended.code(0)?;
        rig.comes_to(0, "postmigrate", "running", Duration::from_secs(2))?;
        let ram = &ended.report["vms"][0]["verified"]["ram"];
        let number = |key: &str| ram[key].as_u64().unwrap_or(u64::MAX);
        // 32 MiB less 8 KiB.
        let lets_pass = if clocks { 1..=2 } else { 0..=0 };
        ensure!(number("pages") >= 8190 && lets_pass.contains(&number("clocks")), "verified: {ram}");
        println!("  verified: {ram}");
        ensure!((number("passed") > 0) == (way == PATH), "who saw them pass: {ram}");
        ensure!(number("ms") < 10_000, "how long that took: {ram}");
        ensure!(ended.said.contains("were the same in memory at both hosts"), "not said: {}", ended.said);
        Ok(())
    })
}

/// Somebody writes to the target's memory all the time while the guest is loaded there.
fn changed(b: &Bench, way: &str) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        let memory = rig.vms[0].target.memory_for_writing()?;
        let stop = AtomicBool::new(false);
        let run = |rig: &mut Rig<'_>, pages: &str| {
            stop.store(false, Ordering::Relaxed);
            std::thread::scope(|s| {
                s.spawn(|| scribble(&memory, &stop));
                let group = group(rig, way, pages);
                let ended = group.and_then(|g| rig.evacuate(&g, &[]));
                stop.store(true, Ordering::Relaxed);
                ended
            })
        };
        let ended = run(rig, "ram")?;
        ensure!(ended.code != 0, "all moved, it says");
        ended.row("alpha", "verdict", "stayed")?;
        let why = ended.report["vms"][0]["error"].as_str().unwrap_or_default();
        ensure!(why.contains("page 0x1800 of m0"), "which page differs is not said: {why}");
        rig.stays(0, "running", "ended")
    })
}

fn scribble(memory: &File, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let _ = memory.write_all_at(&[0x5a], PAGE * 4096);
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Plain QEMU compares nothing, and that is said beforehand.
fn dry_run(b: &Bench) -> Result<()> {
    with(b, Spec::of(vec![Light::new("alpha")]), |rig| {
        for (way, says) in
            [(PATH, "memory compared while a VM is stopped"), (OC, "pages = \"ram\" is not used")]
        {
            let group = group(rig, way, "ram")?;
            let (code, said) = rig.irlm.command(&["evacuate", &group, "--dry-run"])?;
            ensure!(code == 0 && said.contains(says), "exit code {code}: {said}");
        }
        rig.untouched(0)
    })
}
