//! Every method moves guests that keep writing, byte for byte, under both QEMU versions.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Result, bail};
use irlm_tests::irlm::Method;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::Rates;
use irlm_tests::round::{self, Plan};
use irlm_tests::unmet::unmet;
use std::time::Duration;

const OLD: &[Need] = &[Need::Irlm, Need::Qemu("7.2")];
const NEW: &[Need] = &[Need::Irlm, Need::Qemu("10.0")];
const BOTH: &[Need] = &[Need::Irlm, Need::Qemu("7.2"), Need::Qemu("10.0")];

/// QEMU to QEMU.
const DIRECT: &str = "direct = \"always\"";

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "move-oc-7.2",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Oc, "7.2", "7.2"),
    },
    Case {
        name: "move-multifd-7.2",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::QemuMultifdZstd, "7.2", "7.2"),
    },
    Case {
        name: "move-gm-7.2",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Gm, "7.2", "7.2"),
    },
    Case {
        name: "move-irlm-7.2",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Irlm, "7.2", "7.2"),
    },
    Case {
        name: "move-gm-10.0",
        needs: NEW,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Gm, "10.0", "10.0"),
    },
    Case {
        name: "move-irlm-10.0",
        needs: NEW,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Irlm, "10.0", "10.0"),
    },
    Case {
        name: "move-irlm-7.2-to-10.0",
        needs: BOTH,
        takes: Takes::Heavy,
        run: |b| moved(b, Method::Irlm, "7.2", "10.0"),
    },
    Case {
        name: "move-direct-7.2",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| with(b, Method::Irlm, "7.2", "7.2", DIRECT),
    },
    Case {
        name: "move-direct-7.2-to-10.0",
        needs: BOTH,
        takes: Takes::Heavy,
        run: |b| with(b, Method::Irlm, "7.2", "10.0", DIRECT),
    },
    // Its guests must get to write: beside others none of three moves may hold a page back.
    Case { name: "move-irlm-held-back", needs: OLD, takes: Takes::Alone, run: held_back },
    Case { name: "move-irlm-models", needs: OLD, takes: Takes::Heavy, run: models },
    Case {
        name: "move-irlm-sha1",
        needs: OLD,
        takes: Takes::Heavy,
        run: |b| with(b, Method::Irlm, "7.2", "7.2", "digest = \"sha1\"\ndirect = \"never\""),
    },
];

fn moved(b: &Bench, method: Method, source: &str, target: &str) -> Result<()> {
    // Without rates the agents would stay out of the path.
    with(b, method, source, target, "digest = \"blake3\"\ndirect = \"never\"")
}

/// Guests that write the same 8 MiB over and over, on a link that takes several rounds for it: some pages are held back while
/// they run, and every page arrives in its last version all the same.
fn held_back(b: &Bench) -> Result<()> {
    let mut spec = LabSpec::new(&b.cache, 1, 2, 256);
    spec.rates = Rates { edge: Some(100_000_000), core: None };
    spec.qemu_source = b.cache.qemu("7.2");
    spec.qemu_target = b.cache.qemu("7.2");
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let plan = Plan {
        method: Method::Irlm,
        irlm: &b.irlm,
        writers: 3000,
        extra: "downtime_ms = 100",
        wait: Duration::from_secs(180),
        others: None,
    };
    let r = round::run(&lab, &plan, &|_, _| {})?;
    let (held, spared) = (r.sum("held").unwrap_or(0), r.sum("spared").unwrap_or(0));
    println!("  {held} pages were held back, and {spared} versions of them not sent");
    if held == 0 || spared == 0 {
        return unmet("no guest rewrote a page just while it could be held");
    }
    Ok(())
}

/// One guest on each of two hosts, which resemble each other: contents are lent, and pages leave as differences from what the
/// other host carries.
fn models(b: &Bench) -> Result<()> {
    let mut spec = LabSpec::new(&b.cache, 2, 1, 256);
    spec.rates = Rates { edge: Some(100_000_000), core: None };
    spec.qemu_source = b.cache.qemu("7.2");
    spec.qemu_target = b.cache.qemu("7.2");
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let wait = Duration::from_secs(180);
    let moved = |extra| {
        let plan = Plan { method: Method::Irlm, irlm: &b.irlm, writers: 100, extra, wait, others: None };
        let r = round::run(&lab, &plan, &|_, _| {})?;
        let hosts = r.report["hosts"].as_array().cloned().unwrap_or_default();
        let sum = |name: &str| hosts.iter().filter_map(|h| h["counters"][name].as_u64()).sum::<u64>();
        anyhow::Ok((r.core.forward, sum("lent"), sum("borrowed"), r.sum("modelled").unwrap_or(0)))
    };
    let (with, lent, borrowed, modelled) = moved("models = true")?;
    if lent < 500 || borrowed < 500 || modelled < 500 {
        bail!("{lent} contents lent, {borrowed} borrowed, {modelled} pages sent as differences from them");
    }
    let (without, lent, borrowed, modelled) = moved("models = false")?;
    if (lent, borrowed, modelled) != (0, 0, 0) {
        bail!("not asked for: {lent} contents lent, {borrowed} borrowed, {modelled} differences");
    }
    println!("  {with} bytes on the core link, {without} without models");
    if with > without {
        bail!("models cost {with} bytes where {without} were enough");
    }
    Ok(())
}

/// Two hosts with two guests each, without rates, so that it is quick and the guests' writes meet every stage.
fn with(b: &Bench, method: Method, source: &str, target: &str, extra: &str) -> Result<()> {
    let mut spec = LabSpec::new(&b.cache, 2, 2, 256);
    spec.rates = Rates::NONE;
    spec.qemu_source = b.cache.qemu(source);
    spec.qemu_target = b.cache.qemu(target);
    // One method in plain text, where frames are sealed.
    spec.tls = method != Method::Gm;
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let plan =
        Plan { method, irlm: &b.irlm, writers: 300, extra, wait: Duration::from_secs(180), others: None };
    let r = round::run(&lab, &plan, &|_, _| {})?;
    let content = r.census.content * 4096;
    // What the method promises, with room for what the guests rewrote.
    let most = match method {
        Method::Oc => content * 2,
        Method::Irlm if extra == DIRECT => content * 2,
        Method::QemuMultifdZstd | Method::Gm => content * 9 / 10,
        Method::Irlm => content * 3 / 4,
    };
    if r.core.forward > most || r.core.forward < content / 50 {
        bail!("{} bytes on the core link for {content} bytes of content: {} at most", r.core.forward, most);
    }
    let direct = |h: &serde_json::Value| h["counters"]["direct"] == true;
    let hosts = r.report["hosts"].as_array().map_or(0, |all| all.iter().filter(|h| direct(h)).count());
    if hosts != if extra == DIRECT { 2 } else { 0 } {
        bail!("of {hosts} hosts the report says that their QEMUs streamed themselves");
    }
    let made = |h: &serde_json::Value| h["counters"]["populated_bytes"].as_u64();
    let made: u64 = r.report["hosts"].as_array().into_iter().flatten().filter_map(made).sum();
    let agents = matches!(method, Method::Irlm | Method::Gm);
    // A guest has a few KiB less than its 256 MiB.
    if made.div_ceil(1 << 20) != if agents { 4 * 256 } else { 0 } {
        bail!("{made} bytes of the guests' memory were made before they moved");
    }
    verified(&r.report, agents && extra != DIRECT)?;
    if method == Method::Irlm && extra != DIRECT && r.sum("remote_reference").unwrap_or(0) == 0 {
        bail!("no page was referenced across hosts");
    }
    Ok(())
}

/// What the report says of every VM's pages.
fn verified(report: &serde_json::Value, in_path: bool) -> Result<()> {
    for v in report["vms"].as_array().into_iter().flatten() {
        let (said, ram) = (&v["verified"], v["ram_bytes"].as_u64().unwrap_or(0));
        let all = said["pages"].as_u64().is_some_and(|n| n > 0 && n * 4096 == ram);
        if if in_path { !all } else { said != "not-in-path" } {
            bail!("{}: {ram} bytes of RAM, and of its pages the report says {said}", v["name"]);
        }
    }
    Ok(())
}
