//! Contents that a host was to carry and no longer has: guests overwrite them between the plan and the push. Nobody may
//! wait for such a page for ever, and none may be wrong.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, bail, ensure};
use irlm_tests::irlm::{Irlm, Method};
use irlm_tests::lab::{Guests, Lab};
use irlm_tests::unmet::{over, unmet};
use serde_json::Value;
use std::time::{Duration, Instant};

pub(crate) const CASES: &[Case] = &[Case {
    name: "void-planned-pages-overwritten",
    needs: &[Need::Irlm, Need::ChosenQemu],
    takes: Takes::Heavy,
    run: overwritten,
}];

/// Bits a second of an edge link, so slow that a guest has time to write before all is pushed.
const EDGE: u64 = 50_000_000;
/// Bytes on the core link after which the plan is made and the push has begun; not compressed it takes seconds.
const PUSHING: u64 = 2_000_000;
/// Pages that a guest writes at once. More than it has free: what it had read into its page cache, and shares with the
/// others, must make room.
const PAGES: u32 = 36_000;

fn overwritten(b: &Bench) -> Result<()> {
    let mut spec = b.spec(2, 2);
    spec.rates.edge = Some(EDGE);
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let mut guests = lab.start_guests()?;
    let mut irlm = Irlm::start(&lab, &b.irlm, &guests, "compress = \"off\"")?;
    let json = lab.top().join("report.json");
    let before = lab.net.core_bytes()?;
    let start = Instant::now();
    let mut evacuate = irlm.evacuate(Method::Irlm, &json, true)?;
    while lab.net.core_bytes()?.since(before).forward < PUSHING {
        if let Some(code) = evacuate.ended()? {
            return over(code, &evacuate.said());
        }
        ensure!(start.elapsed() < Duration::from_secs(60), "the push does not begin: {}", irlm.logs());
        std::thread::sleep(Duration::from_millis(5));
    }
    overwrite(&guests)?;
    let code = evacuate.wait(Duration::from_secs(180))?;
    if code != 0 {
        bail!("irlm evacuate ended with {code}: {}\n{}{}", evacuate.said(), irlm.logs(), guests.said());
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    let voids = voids(&report)?;
    println!("  {voids:?} planned contents were gone when their hosts came to carry them");
    for p in &mut guests.pairs {
        lab.compare(p)?;
    }
    for p in &mut guests.pairs {
        p.resume_and_check()?;
    }
    irlm.agents.clear();
    if voids.iter().sum::<u64>() == 0 {
        return unmet("no planned page changed in time");
    }
    Ok(())
}

/// All guests at once, as soon as each hears it.
fn overwrite(guests: &Guests) -> Result<()> {
    for p in &guests.pairs {
        p.source.service()?.ask(&format!("writer 50 {PAGES}"), Duration::from_secs(20))?;
    }
    Ok(())
}

/// By source host.
fn voids(report: &Value) -> Result<Vec<u64>> {
    let hosts = report["hosts"].as_array().context("a report without hosts")?;
    let sources = hosts.iter().filter(|h| h["name"].as_str().is_some_and(|n| n.starts_with('s')));
    sources
        .map(|h| h["counters"]["push_void"].as_u64().with_context(|| format!("no push_void in {h}")))
        .collect()
}
