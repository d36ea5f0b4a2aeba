//! What the target rack's own links carry while a group moves, with contents multicast in it or not.

use crate::irlm::{Irlm, Method};
use crate::lab::Lab;
use crate::net::{CoreBytes, Host};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Put at the top of a group file.
pub const ON: &str = "[multicast]\ngroup = \"239.255.77.10:7720\"\nceiling_mbit = 100\n";
const PAGE: u64 = 4096;

/// One move.
#[derive(Debug, Clone)]
pub struct Moved {
    /// Bytes that target hosts sent and that did not go over the core link.
    pub rack: u64,
    /// Bytes on the core link.
    pub core: CoreBytes,
    /// Contents that came to a target host with a forward list, each once, bytes.
    pub shared: u64,
    /// The group's time, ms.
    pub group_ms: f64,
    /// The report of `irlm evacuate`.
    pub report: Value,
}

impl Moved {
    /// A figure of the target hosts' multicast, summed; nothing if there was none.
    #[must_use]
    pub fn multicast(&self, key: &str) -> Option<u64> {
        let hosts = self.report["hosts"].as_array()?;
        let of = |h: &Value| h["counters"]["multicast"][key].as_u64();
        hosts.iter().filter_map(of).reduce(|a, b| a + b)
    }

    /// Bytes in the target rack by what was shared.
    #[must_use]
    pub fn by_shared(&self) -> f64 {
        self.rack as f64 / self.shared.max(1) as f64
    }

    /// A count of the guests' pages, summed.
    #[must_use]
    pub fn pages(&self, key: &str) -> u64 {
        self.report["totals"]["pages"][key].as_u64().unwrap_or_default()
    }
}

/// Moves the lab's guests by `irlm` and compares all memory. `extra` is put at the top of the group file; of a thousand
/// multicast datagrams `dropped` are let go by every host that gets them.
pub fn run(lab: &Lab, program: &std::path::Path, extra: &str, dropped: u32) -> Result<Moved> {
    let mut guests = lab.start_guests()?;
    let args = vec!["--drill-drop-multicast".to_owned(), dropped.to_string()];
    let mut irlm = Irlm::start_with(lab, program, &guests, extra, args)?;
    let json = lab.top().join("report.json");
    let _ = std::fs::remove_file(&json);
    let sent = || (0..lab.spec.hosts.len()).map(|h| lab.net.host_bytes(Host::Target(h)).map(|b| b.0)).sum();
    let (before, core): (Result<u64>, _) = (sent(), lab.net.core_bytes()?);
    let start = Instant::now();
    let mut evacuate = irlm.evacuate(Method::Irlm, &json, true)?;
    let code = evacuate.wait(Duration::from_secs(240))?;
    let (after, core): (Result<u64>, _) = (sent(), lab.net.core_bytes()?.since(core));
    if code != 0 {
        bail!("irlm evacuate ended with {code}: {}\n{}{}", evacuate.said(), irlm.logs(), guests.said());
    }
    let wall = start.elapsed().as_secs_f64() * 1e3;
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    for p in &mut guests.pairs {
        lab.compare(p)?;
    }
    for p in &mut guests.pairs {
        p.resume_and_check()?;
    }
    irlm.agents.clear();
    let hosts = report["hosts"].as_array().context("a report without hosts")?;
    let shared: u64 = hosts.iter().filter_map(|h| h["counters"]["shared_pages"].as_u64()).sum();
    ensure!(shared > 0, "nothing was shared among target hosts, so this shows nothing");
    Ok(Moved {
        rack: (after? - before?).saturating_sub(core.back),
        core,
        shared: shared * PAGE,
        group_ms: report["group_ms"].as_f64().unwrap_or(wall),
        report,
    })
}
