//! Point 6: certificates are replaced and the CA is rolled while a group moves, and whoever has none that counts is refused.

use super::super::{Point, at_most, unmeasured};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{CONTROL, Irlm, Method};
use irlm_tests::keys::Keys;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::{Host, Rates};
use irlm_user::core::identity::Role;
use std::path::Path;
use std::time::{Duration, Instant};

/// A program looks for new files every second.
const SEEN: Duration = Duration::from_millis(2500);
const HOSTS: [Host; 3] = [Host::Ctl, Host::Source(0), Host::Target(0)];

pub(super) fn points(points: &mut Vec<Point>, irlm: &Path) -> Result<()> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 1, 2, 256);
    spec.rates = Rates { edge: Some(10_000_000), core: Some(1_000_000_000) };
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    let old = lab.net.ca().context("the lab speaks TLS")?;
    // Of the CA that will be none any more, and of one whose time is over.
    let foreign = old.somebody("ann-of-old", Role::Operator, 30)?;
    let mut guests = lab.start_guests()?;
    let daemons = Irlm::start(&lab, irlm, &guests, "direct = \"never\"")?;
    let mut evacuate = daemons.evacuate(Method::Irlm, &lab.top().join("report.json"), true)?;
    let before = lab.net.core_bytes()?;
    let start = Instant::now();
    while lab.net.core_bytes()?.since(before).forward < 2_000_000 {
        ensure!(start.elapsed() < Duration::from_secs(60), "the move does not begin: {}", daemons.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
    let new = Keys::new()?;
    HOSTS.iter().try_for_each(|h| new.believed_by(&old.of(&h.name())))?;
    std::thread::sleep(SEEN);
    HOSTS.iter().try_for_each(|h| new.takes_over(old, *h))?;
    std::thread::sleep(SEEN);
    HOSTS.iter().try_for_each(|h| new.alone_believed_by(&old.of(&h.name())))?;
    std::thread::sleep(SEEN);
    let what = "a move during which all certificates and the CA were replaced";
    if evacuate.ended()?.is_some() {
        return unmeasured(points, "6-rolling", what, "it was over before the old CA was gone");
    }
    // New connections are made with the new certificates meanwhile.
    let asked = [Host::Source(0), Host::Target(0)].map(|h| daemons.status(h).map(drop));
    let code = evacuate.wait(Duration::from_secs(300))?;
    let mut wrong = i32::from(code != 0);
    let mut said = vec![format!("irlm evacuate ended with {code}")];
    for r in asked {
        if let Err(e) = r {
            wrong += 1;
            said.push(format!("{e:#}"));
        }
    }
    for p in &mut guests.pairs {
        lab.compare(p)?;
        p.resume_and_check()?;
    }
    let how = format!("2 guests of 256 MiB, 10 Mbit/s, memory compared, services asked: {}", said.join("; "));
    at_most(points, "6-rolling", &format!("what broke of {what}"), &how, f64::from(wrong), 0.0)?;
    let agent = format!("{}:{CONTROL}", Host::Source(0).ip());
    let (mut taken, mut lines) = (0, Vec::new());
    let expired = new.somebody("late", Role::Operator, -1)?;
    for (who, dir, word) in [("of the old CA", &foreign, "certificate"), ("expired", &expired, "expired")] {
        // It believes the agents, and is sure of itself: only they can refuse it.
        new.believed_by(dir)?;
        let dir = dir.display().to_string();
        let (code, text) = daemons.command(&["status", "--agent", &agent, "--tls", &dir])?;
        let line = text.lines().find(|l| !l.trim().is_empty()).unwrap_or_default().to_owned();
        if code == 0 || !text.contains(word) {
            taken += 1;
        }
        lines.push(format!("{who}: exit code {code}, {line:?}"));
    }
    at_most(
        points,
        "6-refused",
        "callers with a foreign or an expired certificate who were heard, or not told why not",
        &lines.join("; "),
        f64::from(taken),
        0.0,
    )
}
