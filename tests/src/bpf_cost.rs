//! What the classifier costs a packet, by the way it takes through the programs.

use crate::frames;
use anyhow::{Context as _, Result};
use irlm_user::host::bpf::{FlowClass, Marking, TagPolicy, Trial, Trialled};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Nanoseconds that a packet of a migration flow may cost, and one of anybody else.
pub const MIGRATION_NS: u64 = 150;
/// See [`MIGRATION_NS`].
pub const OTHERS_NS: u64 = 60;

/// The cost of one way through.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Cost {
    /// What kind of packet, in which setting.
    pub what: &'static str,
    /// A migration packet: has the larger allowance.
    pub migration: bool,
    /// Median of all rounds, harness included.
    pub ns: u64,
    /// Best of all rounds, harness included.
    pub best_ns: u64,
    /// What it may cost.
    pub allowed_ns: u64,
}

/// The costs, and what the harness itself costs: a program that does nothing.
#[derive(Debug, serde::Serialize)]
pub struct Costs {
    /// The harness; in each of the others.
    pub nothing_ns: u64,
    /// By way.
    pub ways: Vec<Cost>,
}

/// A flow of this host.
const LOCAL: &str = "10.77.1.2:40000";
const REMOTE: &str = "10.77.2.2:7702";
const LOCAL6: &str = "[fd77:1::2]:40000";
const REMOTE6: &str = "[fd77:2::2]:7702";
/// Somebody else's ports.
const STRANGER: &str = "10.77.2.2:443";
const STRANGER6: &str = "[fd77:2::2]:443";

struct Way {
    what: &'static str,
    migration: bool,
    program: Trialled,
    trial: usize,
    frame: Vec<u8>,
}

/// Measures all ways, `rounds` times `repeat` runs each, in turns, so that a disturbance hits all alike.
pub fn measure(rounds: usize, repeat: u32) -> Result<Costs> {
    let at = |text: &str| text.parse::<SocketAddr>().with_context(|| text.to_owned());
    let (local, remote, local6, remote6) = (at(LOCAL)?, at(REMOTE)?, at(LOCAL6)?, at(REMOTE6)?);
    let (stranger, stranger6) = (at(STRANGER)?, at(STRANGER6)?);
    // One that only counts, one that tags and tells scopes apart as in earnest.
    let trials = [trial(None)?, trial(Some(policy()))?];
    let way =
        |what, migration, trial, frame| Way { what, migration, program: Trialled::Egress, trial, frame };
    let mut ways = vec![
        way("others: TCP over IPv4", false, 1, frames::tcp(local, stranger)?),
        way("others: TCP over IPv6", false, 1, frames::tcp(local6, stranger6)?),
        way("others: ICMP", false, 1, frames::ping(local, stranger)?),
        way("others: ARP", false, 1, frames::arp()?),
        way("others: unparsable", false, 1, frames::broken(local, stranger)?),
        way("others: TCP over IPv4, no policy", false, 0, frames::tcp(local, stranger)?),
        way("migration: IPv4, no policy", true, 0, frames::tcp(local, remote)?),
        way("migration: IPv6, no policy", true, 0, frames::tcp(local6, remote6)?),
        way("migration: IPv4, tagged", true, 1, frames::tcp(local, remote)?),
        way("migration: IPv6, tagged", true, 1, frames::tcp(local6, remote6)?),
        way("migration: IPv4 in a VLAN tag, tagged", true, 1, frames::tagged_tcp(local, remote)?),
    ];
    for (what, migration, from, to) in [
        ("others arriving: TCP over IPv4", false, stranger, local),
        ("migration arriving: IPv4", true, remote, local),
        ("migration arriving: IPv6", true, remote6, local6),
    ] {
        let (program, frame) = (Trialled::Ingress, frames::tcp(from, to)?);
        ways.push(Way { what, migration, program, trial: 1, frame });
    }
    let nothing = frames::tcp(local, stranger)?;
    let mut taken = vec![Vec::new(); ways.len() + 1];
    for round in 0..=rounds {
        for (n, times) in taken.iter_mut().enumerate() {
            let (program, trial, frame) = match ways.get(n) {
                Some(way) => (way.program, way.trial, &way.frame),
                None => (Trialled::Nothing, 0, &nothing),
            };
            let trial = trials.get(trial).context("no such trial")?;
            // The first round warms caches and branch predictors, and is not counted.
            let repeat = if round == 0 { repeat / 10 } else { repeat };
            let time = trial.time(program, frame, repeat)?;
            if round > 0 {
                times.push(time);
            }
        }
    }
    let mut summed = taken.into_iter().map(|mut times: Vec<Duration>| {
        times.sort();
        let ns = |time: Option<&Duration>| time.map_or(0, |t| t.as_nanos() as u64);
        (ns(times.get(times.len() / 2)), ns(times.first()))
    });
    let costs: Vec<Cost> = ways
        .iter()
        .zip(summed.by_ref())
        .map(|(way, (ns, best_ns))| Cost {
            what: way.what,
            migration: way.migration,
            ns,
            best_ns,
            allowed_ns: if way.migration { MIGRATION_NS } else { OTHERS_NS },
        })
        .collect();
    Ok(Costs { nothing_ns: summed.next().context("nothing measured")?.0, ways: costs })
}

/// Flows of a busy host besides the one that is measured, so that the table is not an empty one.
const FLOWS: u16 = 500;

fn trial(policy: Option<TagPolicy>) -> Result<Trial> {
    let trial = Trial::load()?;
    let (local, remote) = (LOCAL.parse()?, REMOTE.parse()?);
    trial.add_flow(irlm_common::PROTO_TCP, local, remote, FlowClass::Bulk)?;
    trial.add_flow(irlm_common::PROTO_TCP, LOCAL6.parse()?, REMOTE6.parse()?, FlowClass::Bulk)?;
    for n in 0..FLOWS {
        let peer = Ipv4Addr::new(10, 77, 2, 3 + (n % 64) as u8);
        let (mut local, remote): (SocketAddr, _) = (local, SocketAddr::new(IpAddr::V4(peer), 7702));
        local.set_port(41_000 + n);
        trial.add_flow(irlm_common::PROTO_TCP, local, remote, FlowClass::Bulk)?;
    }
    if let Some(policy) = policy {
        trial.set_policy(&policy)?;
    }
    Ok(trial)
}

/// Every kind of tag for every class, and prefixes of both families, so that nothing is left out.
fn policy() -> TagPolicy {
    let mut policy = TagPolicy::default();
    for class in FlowClass::ALL {
        policy.classes[class.slot() as usize] =
            Marking { dscp: Some(8 + class.slot() as u8), priority: Some(0x1f1a_0010), mark: Some(1) };
    }
    policy.rack_prefixes = vec![
        (Ipv4Addr::new(10, 77, 1, 0).into(), 24),
        (std::net::Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 0).into(), 64),
    ];
    policy
}
