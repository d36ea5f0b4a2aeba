//! Things die in the middle of a move. Rule 1 decides what must be true afterwards, and QEMU itself is asked whether
//! it is.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, bail};
use irlm_tests::irlm::{Irlm, Method, Proc};
use irlm_tests::lab::{Guests, Lab, Pair};
use irlm_tests::net::{CoreBytes, Host};
use irlm_tests::settle::{Look, Side, settled};
use irlm_tests::unmet::{over, unmet};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub(super) const NEEDS: &[Need] = &[Need::Irlm, Need::ChosenQemu];
/// The push is under way.
const EARLY: Far = Far::Link(8_000_000);
/// Of a guest's stream of about 145 MiB, how much QEMU has written when it is well under way.
const STREAMED: u64 = 16 << 20;
/// Exit code of `irlm evacuate` if every guest runs where it did.
const NOTHING_STARTED: i32 = 4;
pub(super) const SETTLE: Duration = Duration::from_secs(90);

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "fail-source-agent-killed-early",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| source_agent(b, EARLY),
    },
    Case {
        name: "fail-source-agent-killed-late",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| source_agent(b, Far::Streams),
    },
    Case { name: "fail-target-agent-killed", needs: NEEDS, takes: Takes::Heavy, run: target_agent },
    Case {
        name: "fail-index-killed-early",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| index(b, Far::Link(1)),
    },
    Case {
        name: "fail-index-killed-late",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| index(b, Far::Streams),
    },
    Case { name: "fail-evacuate-killed", needs: NEEDS, takes: Takes::Heavy, run: evacuate_killed },
    Case { name: "fail-target-qemu-killed", needs: NEEDS, takes: Takes::Heavy, run: target_qemu },
    Case { name: "fail-source-qemu-killed", needs: NEEDS, takes: Takes::Heavy, run: source_qemu },
    Case { name: "fail-core-cut", needs: NEEDS, takes: Takes::Heavy, run: core_cut },
    Case { name: "fail-cancel", needs: NEEDS, takes: Takes::Heavy, run: cancel },
    Case { name: "fail-interrupt", needs: NEEDS, takes: Takes::Heavy, run: interrupt },
    Case { name: "fail-handover-cut", needs: NEEDS, takes: Takes::Heavy, run: handover_cut },
    Case {
        name: "fail-handover-source-agent-killed",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| handover_kill(b, Host::Source),
    },
    Case {
        name: "fail-handover-target-agent-killed",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| handover_kill(b, Host::Target),
    },
];

/// How far a move has come when something happens to it.
#[derive(Clone, Copy)]
pub(super) enum Far {
    /// So many bytes have passed the core link.
    Link(u64),
    /// On every source host the stream of some guest is well under way, as QEMU itself counts. What
    /// passes the core link does not tell: a move that needs fewer bytes is over before any given number of them.
    Streams,
}

/// A move under way.
pub(super) struct Move<'a> {
    pub(super) lab: &'a Lab,
    pub(super) guests: Guests,
    pub(super) irlm: Irlm<'a>,
    evacuate: Proc,
    start: Instant,
}

pub(super) fn lab(b: &Bench) -> Result<Lab> {
    Lab::new(b.cache.clone(), b.spec(2, 1), &say)
}

/// Two guests a host: where one dies, another one beside it must not be hurt.
fn twice(b: &Bench) -> Result<Lab> {
    Lab::new(b.cache.clone(), b.spec(2, 2), &say)
}

impl<'a> Move<'a> {
    /// Starts a move by method `irlm` and returns when it has come so far.
    pub(super) fn begin(b: &Bench, lab: &'a Lab, far: Far) -> Result<Self> {
        Self::begin_with(b, lab, far, Vec::new())
    }

    /// As [`Self::begin`], with further arguments for every agent.
    pub(super) fn begin_with(b: &Bench, lab: &'a Lab, far: Far, agent_args: Vec<String>) -> Result<Self> {
        Self::begin_as(b, lab, far, agent_args, "digest = \"blake3\"")
    }

    /// As [`Self::begin_with`], with these lines in the group file.
    pub(super) fn begin_as(
        b: &Bench,
        lab: &'a Lab,
        far: Far,
        agent_args: Vec<String>,
        extra: &str,
    ) -> Result<Self> {
        let mut guests = lab.start_guests()?;
        guests.start_writers(100, 1024)?;
        let irlm = Irlm::start_with(lab, &b.irlm, &guests, extra, agent_args)?;
        let before = lab.net.core_bytes()?;
        let evacuate = irlm.evacuate(Method::Irlm, &lab.top().join("report.json"), false)?;
        let mut m = Self { lab, guests, irlm, evacuate, start: Instant::now() };
        while !m.is(far, before)? {
            if let Some(code) = m.evacuate.ended()? {
                return over(code, &m.evacuate.said());
            }
            if m.start.elapsed() > Duration::from_secs(120) {
                bail!("the move does not get going: {}\n{}", m.evacuate.said(), m.irlm.logs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let bytes = lab.net.core_bytes()?.since(before).forward;
        println!("  in its middle after {:.1?}: {bytes} bytes had passed", m.start.elapsed());
        if !m.all_at_their_sources()? {
            return unmet("a guest had left before the streams of all hosts were well under way");
        }
        Ok(m)
    }

    /// Whether no guest is being handed over, or has been.
    fn all_at_their_sources(&mut self) -> Result<bool> {
        let mut all = true;
        for p in &mut self.guests.pairs {
            let status = p.source.qmp.run("query-status", &json!({}))?;
            all &= !matches!(status["status"].as_str(), Some("finish-migrate" | "postmigrate"));
        }
        Ok(all)
    }

    fn is(&mut self, far: Far, before: CoreBytes) -> Result<bool> {
        match far {
            Far::Link(bytes) => Ok(self.lab.net.core_bytes()?.since(before).forward >= bytes),
            Far::Streams => {
                let mut streaming = BTreeMap::new();
                for p in &mut self.guests.pairs {
                    let streamed = p.source.qmp.run("query-migrate", &json!({}))?;
                    let bytes = streamed["ram"]["transferred"].as_u64().unwrap_or(0);
                    *streaming.entry(p.host).or_insert(false) |= bytes >= STREAMED;
                }
                Ok(streaming.values().all(|s| *s))
            }
        }
    }

    /// Waits for `irlm evacuate` to end by itself, checks where every guest runs and that the report says the same.
    pub(super) fn end(mut self, expected: impl Fn(&Pair) -> Option<Side>) -> Result<()> {
        let code = self.evacuate.wait(Duration::from_secs(180))?;
        let sides = settled(&mut self.guests, &expected, SETTLE)
            .with_context(|| format!("{}\n{}", self.evacuate.said(), self.irlm.logs()))?;
        let stayed = sides.iter().filter(|s| s.1 == Side::Source).count();
        if (code == 0) != (stayed == 0) {
            bail!("irlm evacuate ended with {code} while {stayed} guests stayed: {}", self.evacuate.said());
        }
        let text = std::fs::read_to_string(self.lab.top().join("report.json")).context("no report")?;
        let report: Value = serde_json::from_str(&text)?;
        for (name, side) in &sides {
            let vms = report["vms"].as_array().context("a report without vms")?;
            let vm =
                vms.iter().find(|v| v["name"] == name.as_str()).context("a guest is not in the report")?;
            let said = vm["verdict"].as_str().unwrap_or_default();
            let right = if *side == Side::Source { "stayed" } else { "moved" };
            if said != right {
                bail!("{name} runs on the {side:?}, and the report says `{said}`: {vm}");
            }
            if *side == Side::Source && vm["error"].as_str().is_none_or(str::is_empty) {
                bail!("the report does not say why {name} stayed");
            }
        }
        Ok(())
    }
}

/// The guests of the host whose agent died stay; the others move.
fn source_agent(b: &Bench, when: Far) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, when)?;
    m.irlm.kill_agent(Host::Source(0))?;
    m.end(|p| Some(if p.host == 0 { Side::Source } else { Side::Target }))
}

/// The same on the target side.
fn target_agent(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    m.irlm.kill_agent(Host::Target(0))?;
    m.end(|p| Some(if p.host == 0 { Side::Source } else { Side::Target }))
}

/// The index costs bandwidth, never a guest: before the plan is made nothing is started, after it all move.
fn index(b: &Bench, when: Far) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, when)?;
    m.irlm.index.take().context("no index")?.kill();
    let code = m.evacuate.wait(Duration::from_secs(180))?;
    if code == NOTHING_STARTED {
        settled(&mut m.guests, |_| Some(Side::Source), SETTLE).with_context(|| m.irlm.logs())?;
        return Ok(());
    }
    m.end(|_| Some(Side::Target))
}

/// The coordinator is only a watcher: each guest ends on one side or the other.
fn evacuate_killed(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    m.evacuate.kill();
    let until = Instant::now() + Duration::from_secs(120);
    while !all_final(&m.irlm)? {
        if Instant::now() > until {
            bail!("the agents do not finish without their coordinator: {}", m.irlm.logs());
        }
        for p in &mut m.guests.pairs {
            Look::at(p)?;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let sides = settled(&mut m.guests, |_| None, SETTLE)?;
    println!("  without the coordinator: {sides:?}");
    Ok(())
}

fn all_final(irlm: &Irlm<'_>) -> Result<bool> {
    for host in irlm.agents.keys() {
        let text = irlm.status(*host)?.to_string();
        if ["prepared", "pushing", "migrating", "stopped", "loaded", "gave-up", "in-doubt"]
            .iter()
            .any(|p| text.contains(&format!("\"phase\":\"{p}\"")))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One target QEMU dies: its guest stays, and nobody else is hurt.
fn target_qemu(b: &Bench) -> Result<()> {
    let lab = twice(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    m.guests.pair("db0")?.target.kill();
    m.end(|p| Some(if p.name == "db0" { Side::Source } else { Side::Target }))
}

/// A source QEMU dies, and its guest with it: the others, some of which need pages that it had, still move.
fn source_qemu(b: &Bench) -> Result<()> {
    let lab = twice(b)?;
    let mut m = Move::begin(b, &lab, EARLY)?;
    m.guests.pair("db0")?.source.kill();
    m.evacuate.wait(Duration::from_secs(180))?;
    let dead = m.guests.pairs.iter().position(|p| p.name == "db0").context("no db0")?;
    let mut db0 = m.guests.pairs.remove(dead);
    settled(&mut m.guests, |_| Some(Side::Target), SETTLE).with_context(|| m.irlm.logs())?;
    match Look::at(&mut db0)?.side() {
        None => Ok(()),
        Some(side) => bail!("db0 died half-moved, and yet runs on the {side:?}"),
    }
}

/// Nothing can cross: every guest runs on at its source, also after the link is back.
fn core_cut(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    lab.net.cut_core()?;
    // Guests run at their source all along; the move is over only when the coordinator says so.
    let ended = m.evacuate.wait(Duration::from_secs(120));
    let code = ended.with_context(|| {
        let said = [0, 1].map(|n| m.irlm.status(Host::Source(n)).map(|s| s.to_string()));
        format!("the source hosts say {said:?}: {}", m.irlm.logs())
    })?;
    settled(&mut m.guests, |_| Some(Side::Source), SETTLE)
        .with_context(|| format!("evacuate ended with {code}: {}\n{}", m.evacuate.said(), m.irlm.logs()))?;
    lab.net.mend_core()?;
    std::thread::sleep(Duration::from_secs(5));
    m.end(|_| Some(Side::Source))
}

/// `irlm cancel` in the middle.
fn cancel(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let m = Move::begin(b, &lab, Far::Streams)?;
    let (code, said) = m.irlm.command(&["cancel", &m.irlm.group_file()])?;
    if code != 0 {
        bail!("irlm cancel ended with {code}: {said}");
    }
    m.end(|_| Some(Side::Source))
}

/// ^C in the middle is a cancel.
fn interrupt(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let m = Move::begin(b, &lab, Far::Streams)?;
    m.evacuate.signal(Signal::INT)?;
    m.end(|_| Some(Side::Source))
}

impl Move<'_> {
    /// Waits until a guest has been stopped at its source for its last pages; gives its host.
    fn until_one_stops(&mut self) -> Result<usize> {
        loop {
            for p in &mut self.guests.pairs {
                if p.source.qmp.status()? != "running" {
                    return Ok(p.host);
                }
            }
            if self.start.elapsed() > Duration::from_secs(120) {
                bail!("no guest stopped: {}", self.irlm.logs());
            }
        }
    }

    /// Looks for two running copies of any guest, for as long as `time`.
    pub(super) fn never_two(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            for p in &mut self.guests.pairs {
                Look::at(p)?;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// The link is cut as soon as a guest has stopped at its source, so that some fall into the handover's window. While
/// the link is cut never two copies run; mended, each guest settles to one. A stream that survives goes on, so that
/// who runs at its source may leave it yet until the coordinator has ended.
fn handover_cut(b: &Bench) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    m.until_one_stops()?;
    lab.net.cut_core()?;
    m.never_two(Duration::from_secs(8))?;
    lab.net.mend_core()?;
    m.evacuate.wait(Duration::from_secs(180))?;
    let sides = settled(&mut m.guests, |_| None, SETTLE).with_context(|| m.irlm.logs())?;
    println!("  after the cut: {sides:?}");
    Ok(())
}

/// An agent is killed in the handover's window, and started again: never two copies run, and each guest settles to one.
fn handover_kill(b: &Bench, side: fn(usize) -> Host) -> Result<()> {
    let lab = lab(b)?;
    let mut m = Move::begin(b, &lab, Far::Streams)?;
    let host = side(m.until_one_stops()?);
    m.irlm.kill_agent(host)?;
    m.never_two(Duration::from_secs(4))?;
    m.irlm.start_agent(host)?;
    m.never_two(Duration::from_secs(2))?;
    m.evacuate.wait(Duration::from_secs(180))?;
    let sides = settled(&mut m.guests, |_| None, SETTLE).with_context(|| m.irlm.logs())?;
    println!("  after the restart of {}: {sides:?}", host.name());
    Ok(())
}
