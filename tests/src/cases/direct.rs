//! Guests whose QEMUs stream to each other: what becomes of them when somebody dies, or the link is cut, in the middle and in
//! the handover's window. There is no agent in the path that could break a stream.

use super::failures::{Far, Move, NEEDS};
use super::handover::{AFTER, BEFORE, Harm, drill_in};
use super::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, bail};
use irlm_tests::lab::Lab;
use irlm_tests::net::{Host, Rates};
use irlm_tests::settle::Side;
use std::time::Duration;

const DIRECT: &str = "direct = \"always\"";

pub(crate) const CASES: &[Case] = &[
    Case { name: "direct-fail-source-agent-killed", needs: NEEDS, takes: Takes::Heavy, run: source_agent },
    Case { name: "direct-fail-target-agent-killed", needs: NEEDS, takes: Takes::Heavy, run: target_agent },
    Case { name: "direct-fail-target-qemu-killed", needs: NEEDS, takes: Takes::Heavy, run: target_qemu },
    Case { name: "direct-fail-core-cut", needs: NEEDS, takes: Takes::Heavy, run: core_cut },
    Case { name: "direct-fail-cancel", needs: NEEDS, takes: Takes::Heavy, run: cancel },
    Case {
        name: "direct-doubt-before-giving-up-cut",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill_in(b, &lab(b)?, BEFORE, Harm::Cut, DIRECT),
    },
    Case {
        name: "direct-doubt-before-giving-up-source",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill_in(b, &lab(b)?, BEFORE, Harm::Kill(Host::Source), DIRECT),
    },
    Case {
        name: "direct-doubt-after-giving-up-source",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill_in(b, &lab(b)?, AFTER, Harm::Kill(Host::Source), DIRECT),
    },
    Case {
        name: "direct-doubt-after-giving-up-target",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| drill_in(b, &lab(b)?, AFTER, Harm::Kill(Host::Target), DIRECT),
    },
];

/// Slow enough to do something in the middle: a guest takes about two seconds.
fn lab(b: &Bench) -> Result<Lab> {
    let mut spec = b.spec(2, 1);
    spec.rates = Rates { edge: Some(500_000_000), core: Some(2_000_000_000) };
    Lab::new(b.cache.clone(), spec, &say)
}

fn begin<'a>(b: &Bench, lab: &'a Lab) -> Result<Move<'a>> {
    Move::begin_as(b, lab, Far::Streams, Vec::new(), DIRECT)
}

/// The guest of the host whose agent died stays, and runs: the other side's agent lets go of its QEMU, and that ends the stream.
/// Its QEMU waits for leave that only an agent of its host may give: one that is started again takes the VM back.
fn source_agent(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = begin(b, &lab)?;
    m.irlm.kill_agent(Host::Source(0))?;
    std::thread::sleep(Duration::from_secs(2));
    m.irlm.start_agent(Host::Source(0))?;
    m.end(|p| Some(if p.host == 0 { Side::Source } else { Side::Target }))
}

fn target_agent(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = begin(b, &lab)?;
    m.irlm.kill_agent(Host::Target(0))?;
    m.end(|p| Some(if p.host == 0 { Side::Source } else { Side::Target }))
}

fn target_qemu(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = begin(b, &lab)?;
    let Some(first) = m.guests.pairs.iter_mut().find(|p| p.host == 0) else { bail!("no guest on host 0") };
    first.target.kill();
    m.end(|p| Some(if p.host == 0 { Side::Source } else { Side::Target }))
}

fn core_cut(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = begin(b, &lab)?;
    lab.net.cut_core()?;
    m.never_two(Duration::from_secs(12))?;
    lab.net.mend_core()?;
    m.end(|_| Some(Side::Source))
}

fn cancel(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let m = begin(b, &lab)?;
    let (code, said) = m.irlm.command(&["cancel", &m.irlm.group_file()])?;
    if code != 0 {
        bail!("irlm cancel ended with {code}: {said}");
    }
    m.end(|_| Some(Side::Source))
}
