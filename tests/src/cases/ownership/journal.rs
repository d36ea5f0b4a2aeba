//! Journals on a disk that fills up in the middle: nothing is said or done that was not written, and when there is room again
//! one copy runs; never two.

use super::light::{Light, until};
use super::rig::{Disk, Rig, SETTLE, Spec, WAIT, with};
use super::{AFTER, BEFORE, CHOSEN, DIRECT, KVM, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, bail, ensure};
use irlm_tests::kvm::KvmGuest;
use irlm_tests::lab::Lab;
use irlm_tests::mixed::Mixed;
use irlm_tests::net::{Host, Rates};
use irlm_tests::payload::Payload;
use irlm_tests::qemu::{Guest, Role};
use irlm_tests::workload::Workload;
use std::time::{Duration, Instant};

const SOURCE: Host = Host::Source(0);
const TARGET: Host = Host::Target(0);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "own-journal-full-source",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, SOURCE, BEFORE, false),
    },
    Case {
        name: "own-journal-full-source-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, DIRECT, SOURCE, BEFORE, false),
    },
    Case {
        name: "own-journal-full-source-restart",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, SOURCE, BEFORE, true),
    },
    Case {
        name: "own-journal-full-source-after-restart",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, SOURCE, AFTER, true),
    },
    Case {
        name: "own-journal-full-target",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, TARGET, BEFORE, false),
    },
    Case {
        name: "own-journal-full-target-restart",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, TARGET, BEFORE, true),
    },
    Case {
        name: "own-journal-full-target-after",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, PATH, TARGET, AFTER, false),
    },
    Case {
        name: "own-journal-full-target-after-restart",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| full(b, DIRECT, TARGET, AFTER, true),
    },
    Case { name: "own-journal-full-loading", needs: CHOSEN, takes: Takes::Light, run: loading },
    Case {
        name: "own-journal-full-serving",
        needs: KVM,
        takes: Takes::Light,
        run: |b| kvm(b, SOURCE, Some(BEFORE)),
    },
    Case { name: "own-journal-full-ready", needs: KVM, takes: Takes::Light, run: |b| kvm(b, TARGET, None) },
    Case {
        name: "own-journal-full-fetching",
        needs: KVM,
        takes: Takes::Light,
        run: |b| kvm(b, TARGET, Some(AFTER)),
    },
];

/// The journal of one side is full from a point of the handover on, for longer than the drill holds; then its agent may
/// even be killed and started again, before there is room.
fn full(b: &Bench, route: &str, side: Host, point: (&str, &str), restart: bool) -> Result<()> {
    let spec = Spec { small: vec![side], ..Spec::of(vec![Light::new("alpha")]) }.held(point.0, 1500);
    with(b, spec, |rig| {
        let group = rig.group(route)?;
        let mut going = rig.begin(&group, &[])?;
        rig.holds(0, point.1)?;
        let full = Disk::full(rig.lab, side)?;
        std::thread::sleep(Duration::from_secs(5));
        // The target may run only if that is written, at the source that it gave up and at the target that it runs.
        let ran = rig.sentry.saw("alpha", "t0", "running");
        ensure!(!ran || (side == SOURCE && point == AFTER), "the target runs, and that was not written");
        let early = going.proc.ended()?;
        ensure!(early != Some(0) || ran, "all moved, it says, and the target has never run");
        if restart {
            rig.irlm.kill_agent(side)?;
            drop(full);
            rig.irlm.agent_args.clear();
            rig.irlm.start_agent(side)?;
        } else {
            drop(full);
        }
        let side = one_runs(rig)?;
        let ended = going.end()?;
        ensure!(
            ended.code == 3 || (ended.code == 0) == (side == TARGET),
            "alpha runs at {}, and irlm evacuate ended with {}",
            side.name(),
            ended.code
        );
        Ok(())
    })
}

/// Waits until exactly one copy has run for two seconds, and says where.
fn one_runs(rig: &mut Rig<'_>) -> Result<Host> {
    let began = Instant::now();
    let mut since = (None, Instant::now());
    loop {
        let states = rig.vms[0].states();
        let now = match (&*states.0, &*states.1) {
            ("running", _) => Some(SOURCE),
            (_, "running") => Some(TARGET),
            _ => None,
        };
        if now != since.0 {
            since = (now, Instant::now());
        }
        if let Some(host) = now.filter(|_| since.1.elapsed() > Duration::from_secs(2)) {
            return Ok(host);
        }
        if began.elapsed() > SETTLE {
            bail!("there is room again, and no copy runs after {SETTLE:?}: {states:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The target's journal fills while pages come: it does not say that it has loaded, and the guest runs on at its source, or
/// moves when there is room.
fn loading(b: &Bench) -> Result<()> {
    with(b, Spec { small: vec![TARGET], ..Spec::slow() }, |rig| {
        let group = rig.group(PATH)?;
        let going = rig.begin(&group, &[])?;
        rig.streaming(0, 1 << 20)?;
        let full = Disk::full(rig.lab, TARGET)?;
        std::thread::sleep(Duration::from_secs(9));
        ensure!(!rig.sentry.saw("alpha", "t0", "running"), "the target runs, and nothing of it is written");
        drop(full);
        let side = one_runs(rig)?;
        let ended = going.end()?;
        ensure!(
            (ended.code == 0) == (side == TARGET),
            "{} runs it, and exit code {}",
            side.name(),
            ended.code
        );
        Ok(())
    })
}

/// Bytes that have crossed the core link in the middle of a round of pre-copy.
const ROUND: u64 = 8 << 20;

/// A guest of our own VMM with as much memory as takes some seconds.
fn small_guest() -> KvmGuest {
    let payload = Payload { cold: 4096..8192, hot: 1024..1056, ticks: 2_000_000, spin: 0 };
    let mut guest = KvmGuest::new(Guest { role: Role::Db, seed: 0, mem_mib: 64 }, 0);
    guest.work = Workload::Rounds(payload);
    guest
}

/// A lab of so many hosts for one of them; a host's journal may be on a small disk.
pub(super) fn kvm_lab(b: &Bench, hosts: usize, edge: u64, small: Option<Host>) -> Result<Lab> {
    let mut spec = b.spec(1, 1);
    spec.hosts = vec![vec![]; hosts];
    spec.rates = Rates { edge: Some(edge * 1_000_000), core: Some(1_000_000_000) };
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    if let Some(host) = small {
        Disk::mount(&lab, host)?;
    }
    Ok(lab)
}

/// The images of one such guest.
pub(super) fn kvm_images(lab: &Lab) -> Result<Vec<(usize, irlm_tests::kvm::Image)>> {
    Ok(vec![(0, small_guest().bare_image(lab)?)])
}

/// Post-copy: *Serving*, *Ready* or *Fetching* cannot be written. What was said without being written lets both run after a restart.
fn kvm(b: &Bench, side: Host, point: Option<(&str, &str)>) -> Result<()> {
    // Before *Ready* there is no drill; after a round of pre-copy there is time for it.
    let (migration, edge) = if point.is_some() { ("post-copy", 40) } else { ("hybrid", 100) };
    let lab = kvm_lab(b, 1, edge, Some(side))?;
    let images = kvm_images(&lab)?;
    let args = point.map(|p| vec![p.0.to_owned(), "1500".into()]).unwrap_or_default();
    let extra = format!("migration = {migration:?}\ncompress = \"off\"");
    let mut m = Mixed::start(&lab, &b.irlm, &images, &extra, args)?;
    let _going = m.evacuate(false)?;
    match point {
        Some((_, says)) => {
            let log = lab.dir(SOURCE).join("agent.log");
            until(says, WAIT, || Ok(std::fs::read_to_string(&log).unwrap_or_default().contains(says)))?;
        }
        None => until("pages move", WAIT, || Ok(m.passed()? > ROUND))?,
    }
    let full = Disk::full(&lab, side)?;
    let (mut ran, mut stopped) = (false, None);
    let began = Instant::now();
    // A few seconds from when the guest has been stopped for the handover; with a drill it is.
    while stopped.is_none_or(|s: Instant| s.elapsed() < Duration::from_secs(4))
        && !ran
        && began.elapsed() < WAIT
    {
        let sides = m.sides()?;
        ran |= sides.iter().any(|s| s.1);
        stopped = stopped.or((!sides[0].0).then(Instant::now));
        std::thread::sleep(Duration::from_millis(20));
    }
    say(&format!(
        "journal of {} full: the target {}; the source {}",
        side.name(),
        if ran { "ran" } else { "did not run" },
        if stopped.is_some() { "was stopped" } else { "ran on" }
    ));
    m.irlm.kill_agent(side)?;
    drop(full);
    m.irlm.agent_args.clear();
    m.irlm.start_agent(side)?;
    let settled = m.settled(SETTLE)?;
    say(&format!("settled: at the target {settled:?}"));
    ensure!(!ran, "the target ran, and {} had not written it", side.name());
    Ok(())
}
