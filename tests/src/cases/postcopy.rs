//! Guests of our own VMM that run at their target before their pages are there, and what may fail meanwhile.

use super::kvm::{NEEDS, WAIT, handover, lab, two};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::irlm::Proc;
use irlm_tests::kvm::Image;
use irlm_tests::lab::Lab;
use irlm_tests::mixed::Mixed;
use irlm_tests::net::Host;
use irlm_tests::unmet::{over, unmet};
use irlm_user::net::vmm::State;
use std::time::{Duration, Instant};

pub(super) const CASES: &[Case] = &[
    Case { name: "kvm-postcopy", needs: NEEDS, takes: Takes::Heavy, run: |b| running(b, "post-copy", &[]) },
    Case {
        name: "kvm-postcopy-missing",
        needs: NEEDS,
        takes: Takes::Alone,
        run: |b| running(b, "post-copy", &["--faults", "missing"]),
    },
    Case { name: "kvm-hybrid", needs: NEEDS, takes: Takes::Heavy, run: |b| running(b, "hybrid", &[]) },
    Case {
        name: "kvm-hybrid-missing",
        needs: NEEDS,
        takes: Takes::Alone,
        run: |b| running(b, "hybrid", &["--faults", "missing"]),
    },
    Case {
        name: "kvm-postcopy-source-agent-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, |m| restart(m, Host::Source(0))),
    },
    Case {
        name: "kvm-postcopy-target-agent-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, |m| restart(m, Host::Target(0))),
    },
    Case {
        name: "kvm-postcopy-both-agents-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, both_agents),
    },
    Case {
        name: "kvm-postcopy-source-vmm-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, source_vmms),
    },
    Case {
        name: "kvm-postcopy-coordinator-killed",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, |_| Ok(())),
    },
    Case {
        name: "kvm-postcopy-core-cut",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| while_fetching(b, cut),
    },
    Case { name: "kvm-postcopy-target-vmm-killed", needs: NEEDS, takes: Takes::Light, run: target_vmm },
    Case { name: "kvm-postcopy-source-memory-lost", needs: NEEDS, takes: Takes::Light, run: memory_lost },
    Case {
        name: "kvm-postcopy-doubt-source-agent-killed-before-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "post-copy", Host::Source(0), "--drill-before-give-up"),
    },
    Case {
        name: "kvm-postcopy-doubt-source-agent-killed-after-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "post-copy", Host::Source(0), "--drill-after-give-up"),
    },
    Case {
        name: "kvm-postcopy-doubt-target-agent-killed-before-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "post-copy", Host::Target(0), "--drill-before-give-up"),
    },
    Case {
        name: "kvm-postcopy-doubt-target-agent-killed-after-giving-up",
        needs: NEEDS,
        takes: Takes::Light,
        run: |b| handover(b, "post-copy", Host::Target(0), "--drill-after-give-up"),
    },
];

/// Guests run at their target before their pages are there, and miss no step.
fn running(b: &Bench, migration: &str, args: &[&str]) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, args)?;
    let extra = format!("migration = {migration:?}");
    let moved = Mixed::start(&lab, &b.irlm, &images, &extra, Vec::new())?.move_running(WAIT)?;
    for name in ["kvm-db0", "kvm-web0"] {
        let vm = moved.vm(name)?;
        let faults = &vm["target_status"]["faults"];
        println!(
            "  {name}: {}, downtime {} ms, filled in {} ms; {} faults, half of them in {} µs, 99 % in {} µs",
            vm["pages"],
            vm["downtime_ms"],
            vm["fill_ms"],
            faults["all"]["count"],
            faults["all"]["p50_us"],
            faults["all"]["p99_us"]
        );
        // After rounds of pre-copy so little is left that a guest may well touch none of it.
        let waited = faults["all"]["count"].as_u64() > Some(0);
        if !waited && migration != "hybrid" {
            return unmet(format!("{name} waited for no page"));
        }
        ensure!(vm["fill_ms"].as_f64() > Some(0.0), "{name} was not filled while it ran: {vm}");
    }
    Ok(())
}

/// Guests that all run at their target while their pages come.
pub(super) fn fetch(m: Mixed<'_>) -> Result<(Mixed<'_>, Proc)> {
    let mut evacuate = m.evacuate(false)?;
    let start = Instant::now();
    while phases(&m, "fetching")? < m.kvm.len() {
        if let Some(code) = evacuate.ended()? {
            return over(code, &format!("{}\n{}", evacuate.said(), m.said()));
        }
        ensure!(start.elapsed() < WAIT, "the guests do not come to run: {}", m.said());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok((m, evacuate))
}

/// Two guests.
fn begin<'a>(b: &Bench, lab: &'a Lab, images: &'a [(usize, Image)]) -> Result<(Mixed<'a>, Proc)> {
    fetch(Mixed::start(lab, &b.irlm, images, "migration = \"post-copy\"", Vec::new())?)
}

/// How many guests the target agent says this of.
fn phases(m: &Mixed<'_>, phase: &str) -> Result<usize> {
    let text = m.irlm.status(Host::Target(0))?.to_string();
    Ok(text.matches(&format!("\"phase\":\"{phase}\"")).count())
}

/// Waits until so many guests are whole; all that run do so at their target alone.
pub(super) fn whole(m: &mut Mixed<'_>, guests: usize) -> Result<()> {
    let start = Instant::now();
    while phases(m, "running")? < guests {
        ensure!(m.sides()?.iter().all(|(source, _)| !source), "an old copy runs: {}", m.said());
        ensure!(start.elapsed() < WAIT, "not all that should be are whole: {}", m.said());
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("  whole {:.1} s after the failure", start.elapsed().as_secs_f64());
    Ok(())
}

/// What fails while guests run at their target and their pages still come loses nothing, even if nobody watches any more: they
/// wait, run on, and have missed no step when they are whole.
fn while_fetching(b: &Bench, fail: fn(&mut Mixed<'_>) -> Result<()>) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images)?;
    evacuate.kill();
    fail(&mut m)?;
    whole(&mut m, 2)?;
    for (p, (_, image)) in m.kvm.iter_mut().zip(&images) {
        p.check_running(image)?;
    }
    Ok(())
}

/// An agent dies and comes back two seconds later.
fn restart(m: &mut Mixed<'_>, host: Host) -> Result<()> {
    m.irlm.kill_agent(host)?;
    std::thread::sleep(Duration::from_secs(2));
    m.irlm.start_agent(host)
}

/// Nothing crosses for longer than anybody believes in a slow link.
fn cut(m: &mut Mixed<'_>) -> Result<()> {
    m.lab.net.cut_core()?;
    std::thread::sleep(Duration::from_secs(8));
    m.lab.net.mend_core()
}

/// Both die, and the target's comes back first.
fn both_agents(m: &mut Mixed<'_>) -> Result<()> {
    m.irlm.kill_agent(Host::Source(0))?;
    restart(m, Host::Target(0))?;
    m.irlm.start_agent(Host::Source(0))
}

/// Their memory is the agent's, too.
fn source_vmms(m: &mut Mixed<'_>) -> Result<()> {
    m.kvm.iter_mut().for_each(|p| p.source.kill());
    Ok(())
}

/// The VMM dies in which a guest ran before its pages were there: that guest is gone, as in any host's crash; its old copy
/// never runs, and the agent says what happened. The other comes to be whole.
fn target_vmm(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, _evacuate) = begin(b, &lab, &images)?;
    m.kvm[0].target.kill();
    whole(&mut m, 1)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(
        m.kvm[0].source.state() == Some(State::GivenUp),
        "the old copy does not stand still: {}",
        m.said()
    );
    let status = m.irlm.status(Host::Target(0))?.to_string();
    ensure!(status.contains("of its pages had not come"), "nothing is said of it: {status}");
    m.kvm[1].check_running(&images[1].1).map(drop)
}

/// Whoever holds the source's memory is gone, agent and VMM: the target says which pages of which guest are missing, and
/// what has come runs on.
fn memory_lost(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = two(b, &lab, &[])?;
    let (mut m, mut evacuate) = begin(b, &lab, &images)?;
    m.irlm.kill_agent(Host::Source(0))?;
    m.kvm[0].source.kill();
    m.irlm.start_agent(Host::Source(0))?;
    let start = Instant::now();
    let said = loop {
        let status = m.irlm.status(Host::Target(0))?.to_string();
        if let Some(at) = status.find("the memory of kvm-db0 at its source is gone") {
            break status[at..].chars().take(160).collect::<String>();
        }
        ensure!(start.elapsed() < WAIT, "the loss is not said: {status}\n{}", m.said());
        std::thread::sleep(Duration::from_millis(100));
    };
    println!("  {said}");
    ensure!(said.contains("slot 0: "), "the pages are not named: {said}");
    whole(&mut m, 1)?;
    // Nobody waits for what does not come: the command ends, and an operator has the last word.
    let code = evacuate.wait(WAIT).context("irlm evacuate waits for pages that nobody has")?;
    ensure!(code == 3, "irlm evacuate ends with {code}: {}", evacuate.said());
    let group = m.irlm.group_file();
    let (code, said) = m.irlm.command(&["settle", &group, "kvm-db0", "--run-at", "target"])?;
    println!("  settle: exit code {code}: {}", said.trim().replace('\n', "; "));
    ensure!(code == 0, "settle --run-at target ends with {code}: {said}");
    whole(&mut m, 2)?;
    ensure!(m.kvm[0].target.state() == Some(State::Running), "the guest does not run on as far as it can");
    m.kvm[1].check_running(&images[1].1).map(drop)
}
