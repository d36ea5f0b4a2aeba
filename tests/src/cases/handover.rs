//! The handover's window, hit exactly: agents hold each departing guest between two words of the handover (a drill),
//! and just then the link is cut or an agent is killed. Rule 1: paused on both sides and in doubt, never two, and one
//! running copy as soon as the two agents can talk again.

use super::failures::{Far, Move, NEEDS, SETTLE, lab};
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, bail};
use irlm_tests::lab::Lab;
use irlm_tests::net::Host;
use irlm_tests::settle::{Side, settled};
use std::time::{Duration, Instant};

/// How long an agent holds: longer than the peers' patience with a silent side (5 s).
const HOLD_MS: &str = "9000";

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "doubt-before-giving-up-cut",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, BEFORE, Harm::Cut),
    },
    Case {
        name: "doubt-before-giving-up-source",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, BEFORE, Harm::Kill(Host::Source)),
    },
    Case {
        name: "doubt-before-giving-up-target",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, BEFORE, Harm::Kill(Host::Target)),
    },
    Case {
        name: "doubt-after-giving-up-cut",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, AFTER, Harm::Cut),
    },
    Case {
        name: "doubt-after-giving-up-source",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, AFTER, Harm::Kill(Host::Source)),
    },
    Case {
        name: "doubt-after-giving-up-target",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill(b, AFTER, Harm::Kill(Host::Target)),
    },
];

/// The agent's option, and what it says when it holds.
pub(super) type Point = (&'static str, &'static str);
pub(super) const BEFORE: Point = ("--drill-before-give-up", "drill: holding before giving up");
pub(super) const AFTER: Point = ("--drill-after-give-up", "drill: holding after giving up");

#[derive(Clone, Copy)]
pub(super) enum Harm {
    Cut,
    Kill(fn(usize) -> Host),
}

/// Waits until a source agent holds a guest, and tells which host's.
fn held(m: &mut Move<'_>, says: &str) -> Result<usize> {
    let until = Instant::now() + Duration::from_secs(120);
    while Instant::now() < until {
        for h in 0..m.lab.spec.hosts.len() {
            let log = m.lab.dir(Host::Source(h)).join("agent.log");
            if std::fs::read_to_string(log).is_ok_and(|text| text.contains(says)) {
                return Ok(h);
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("no agent held a guest: {}", m.irlm.logs())
}

/// Waits until a target agent has a guest loaded. Where QEMUs stream to each other, a source may give up some milliseconds
/// before; if the target's agent dies in these, the guest stays at its source.
fn loaded(m: &Move<'_>, host: usize) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        let text = m.irlm.status(Host::Target(host))?.to_string();
        if ["loaded", "in-doubt"].iter().any(|p| text.contains(&format!("\"phase\":\"{p}\""))) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("given up, and yet the target has not loaded it: {}", m.irlm.logs())
}

/// Whether some guest of this host is paused on both sides.
fn in_doubt(m: &mut Move<'_>, host: usize) -> Result<bool> {
    for p in m.guests.pairs.iter_mut().filter(|p| p.host == host) {
        if p.source.qmp.status()? != "running" && p.target.qmp.status().is_ok_and(|s| s != "running") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn drill(b: &Bench, point: Point, harm: Harm) -> Result<()> {
    let lab = lab(b)?;
    drill_in(b, &lab, point, harm, "digest = \"blake3\"")
}

/// The same in this lab, with these lines in the group file.
pub(super) fn drill_in(b: &Bench, lab: &Lab, point: Point, harm: Harm, extra: &str) -> Result<()> {
    let args = vec![point.0.to_owned(), HOLD_MS.to_owned()];
    let mut m = Move::begin_as(b, lab, Far::Streams, args, extra)?;
    let host = held(&mut m, point.1)?;
    if point == AFTER {
        loaded(&m, host)?;
    }
    if !in_doubt(&mut m, host)? {
        bail!("a held guest is not paused on both sides");
    }
    // From here on agents that start do not hold.
    m.irlm.agent_args.clear();
    match harm {
        Harm::Cut => {
            lab.net.cut_core()?;
            m.never_two(Duration::from_secs(12))?;
            if point == AFTER && !in_doubt(&mut m, host)? {
                bail!("given up, and the target cannot have heard: the guest must be paused on both sides");
            }
            lab.net.mend_core()?;
        }
        Harm::Kill(side) => {
            let victim = side(host);
            m.irlm.kill_agent(victim)?;
            m.never_two(Duration::from_secs(3))?;
            // A source QEMU whose stream breaks before SHUT resumes by itself; after it nothing may move.
            if point == AFTER && !in_doubt(&mut m, host)? {
                bail!("given up, and an agent is dead: the guest must be paused on both sides");
            }
            m.irlm.start_agent(victim)?;
        }
    }
    m.never_two(Duration::from_secs(2))?;
    let sides = settled(&mut m.guests, |_| None, SETTLE).with_context(|| m.irlm.logs())?;
    println!("  settled: {sides:?}");
    if point == AFTER
        && !m.guests.pairs.iter().zip(&sides).any(|(p, s)| p.host == host && s.1 == Side::Target)
    {
        bail!("a guest that was given up did not end at its target: {sides:?}");
    }
    Ok(())
}
