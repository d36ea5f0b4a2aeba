//! What `irlm evacuate --dry-run` says of each VM before anything moves: how it writes, by which sampler that is known,
//! and how its migration would go.

use super::calls::{call_all, problems};
use super::plan::Plan;
use crate::control::api::{HostWrites, Reply, Request, VmWrites};
use crate::core::forecast::{Departure, Forecast, forecast, next};
use serde::Serialize;
use std::time::Duration;

/// The bandwidth that is assumed where nobody says one: 1 Gbit/s.
const ASSUMED_MBIT: u64 = 1000;

/// The forecast of one VM.
#[derive(Clone, Debug, Serialize)]
pub struct VmForecast {
    /// Its name.
    pub name: String,
    /// Its source host.
    pub source: String,
    /// What was seen; absent if it could not be watched.
    pub seen: Option<VmWrites>,
    /// The bandwidth of the forecast, Mbit/s.
    pub mbit: u64,
    /// Where that figure is from.
    pub mbit_from: &'static str,
    /// Mbit/s below which it does not converge.
    pub needs_mbit: f64,
    /// How its migration goes with all of that bandwidth, and every page sent once in the first round: IRLM sends less.
    pub forecast: Option<Forecast>,
    /// Its turn among the VMs of its host, from 1.
    pub turn: usize,
}

/// What was asked and found.
#[derive(Clone, Debug, Serialize)]
pub struct GroupForecast {
    /// The group.
    pub group: String,
    /// Downtime limit, milliseconds.
    pub downtime_ms: u64,
    /// All VMs, in the group file's order.
    pub vms: Vec<VmForecast>,
    /// What could not be found out.
    pub problems: Vec<String>,
}

/// Has every source host watch its VMs for `seconds`, and forecasts. `mbit` overrides what the hosts say of their links.
pub async fn observe(plan: &Plan, timeout: Duration, seconds: u32, mbit: Option<u64>) -> GroupForecast {
    let request = |i: usize| {
        let spec = &plan.agents[i].spec;
        spec.my_source?;
        Some(Request::Observe { spec: Box::new(spec.clone()), seconds, one_in: 1 })
    };
    let answers = call_all(plan, timeout + Duration::from_secs(seconds.into()), request).await;
    let mut problems = problems(plan, &answers);
    let hosts: Vec<Option<HostWrites>> = answers
        .into_iter()
        .map(|a| match a {
            Some(Ok(Reply::Observed(h))) => Some(h),
            _ => None,
        })
        .collect();
    for (a, h) in plan.agents.iter().zip(&hosts) {
        problems.extend(h.iter().flat_map(|h| &h.problems).map(|p| format!("host {}: {p}", a.name)));
    }
    GroupForecast {
        group: plan.config.name.clone(),
        downtime_ms: plan.config.downtime_ms,
        vms: vms(plan, &hosts, mbit),
        problems,
    }
}

fn vms(plan: &Plan, hosts: &[Option<HostWrites>], mbit: Option<u64>) -> Vec<VmForecast> {
    let limit = plan.config.downtime_ms as f64 / 1e3;
    let mut out: Vec<VmForecast> = Vec::new();
    for (ix, v) in plan.config.vm.iter().enumerate() {
        let host = plan.source_agent(&v.source).and_then(|a| hosts.get(a)?.as_ref());
        let seen = host.and_then(|h| h.vms.iter().find(|w| usize::from(w.ix) == ix)).cloned();
        let link = host.and_then(|h| h.link_mbit);
        let (mbit, mbit_from) = match (mbit, link) {
            (Some(n), _) => (n, "the command line"),
            (None, Some(n)) => (n, "the source host's port"),
            (None, None) => (ASSUMED_MBIT, "an assumption"),
        };
        let bandwidth = mbit as f64 * 1e6 / 8.0;
        out.push(VmForecast {
            name: v.name.clone(),
            source: v.source.clone(),
            mbit,
            mbit_from,
            needs_mbit: seen.as_ref().map_or(0.0, |s| s.writes.needs(limit) * 8.0 / 1e6),
            forecast: seen.as_ref().and_then(|s| forecast(s.data_pages as f64, &s.writes, bandwidth, limit)),
            seen,
            turn: 0,
        });
    }
    for host in &plan.config.source {
        turns(&mut out, &host.name, plan.config.parallel);
    }
    out
}

/// Numbers a host's VMs by the order in which they would start if each took equally long.
fn turns(vms: &mut [VmForecast], host: &str, parallel: Option<u16>) {
    let mut waiting: Vec<usize> = (0..vms.len()).filter(|i| vms[*i].source == host).collect();
    let mut leaving: Vec<usize> = Vec::new();
    let mut turn = 0;
    let places = usize::from(parallel.unwrap_or(u16::MAX));
    while !waiting.is_empty() {
        let departures = |list: &[usize]| -> Vec<Departure> {
            let one = |i: &usize| Departure {
                needs: vms[*i].needs_mbit * 1e6 / 8.0,
                pages: vms[*i].seen.as_ref().map_or(0.0, |s| s.data_pages as f64),
            };
            list.iter().map(one).collect()
        };
        let bandwidth = vms[waiting[0]].mbit as f64 * 1e6 / 8.0;
        match next(&departures(&waiting), &departures(&leaving), bandwidth, places) {
            Some(n) => {
                let vm = waiting.remove(n);
                turn += 1;
                vms[vm].turn = turn;
                leaving.push(vm);
            }
            // One is over and makes room.
            None => drop(leaving.remove(0)),
        }
    }
}
