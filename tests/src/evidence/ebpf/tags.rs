//! DSCP as packets on a wire carry it, hostile packets, and the cost of a packet.

use super::super::{Only, Point, at_most};
use anyhow::{Context as _, Result, bail, ensure};
use irlm_common::{PROTO_TCP, PROTO_UDP};
use irlm_tests::bpf_cost;
use irlm_tests::cache::Cache;
use irlm_tests::frames::{self, Seen};
use irlm_tests::irlm::{CONTROL, DATA, Method};
use irlm_tests::janitor::Run;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::round::{self, Plan};
use irlm_tests::wire::{Capture, Wire};
use irlm_user::host::bpf::{FlowClass, Marking, TagPolicy, Trial, Trialled};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) fn points(irlm: &Path, only: &Only, points: &mut Vec<Point>) -> Result<()> {
    if only.wants("2-dscp-v") {
        on_the_wire(points)?;
    }
    if only.wants("2-dscp-lab") {
        in_the_lab(irlm, points)?;
    }
    if only.wants("6-hostile") {
        hostile(points)?;
    }
    if only.wants("cost-") { cost(points) } else { Ok(()) }
}

/// Six different values, none of which a packet has by itself.
fn policy() -> TagPolicy {
    let mut policy = TagPolicy::default();
    for (class, dscp) in [
        (FlowClass::Bulk, 10),
        (FlowClass::Control, 24),
        (FlowClass::Forward, 12),
        (FlowClass::Switchover, 46),
        (FlowClass::Demand, 34),
    ] {
        policy.classes[class.slot() as usize] = Marking { dscp: Some(dscp), ..Marking::default() };
    }
    policy
}

/// Real connections of every class, captured at the far end of the wire and read by other people's code.
fn on_the_wire(points: &mut Vec<Point>) -> Result<()> {
    let run = Run::start()?;
    let policy = policy();
    for (version, bytes) in [(4, 4 << 20), (6, 4 << 20)] {
        eprintln!("tags: connections of every class over IPv{version}, captured at the far end");
        let wire = Wire::new(run.id())?;
        let seen = wire.traffic(version == 6, &policy, bytes)?;
        let mut wrong = 0;
        let mut text = Vec::new();
        for flow in &seen.flows {
            let expected = match flow.class {
                // As its socket sends it.
                FlowClass::Other => 0,
                class => policy.classes[class.slot() as usize].dscp.context("a class without DSCP")?,
            };
            let theirs: Vec<&Seen> =
                seen.packets.iter().filter(|p| (p.from, p.to) == (flow.local, flow.remote)).collect();
            ensure!(theirs.len() >= 100, "{}: only {} packets captured", flow.class.name(), theirs.len());
            wrong += theirs.iter().filter(|p| p.dscp != expected || !p.sum_right).count();
            // The far end has no classifier: what comes back is as it was sent.
            let back = seen.packets.iter().filter(|p| (p.to, p.from) == (flow.local, flow.remote));
            wrong += back.filter(|p| p.dscp != 0 || !p.sum_right).count();
            // The connections negotiate ECN, so its bits are in use and must arrive.
            ensure!(theirs.iter().any(|p| p.ecn != 0), "{}: no packet had ECN bits", flow.class.name());
            text.push(format!("{} {expected} in {} packets", flow.class.name(), theirs.len()));
        }
        at_most(
            points,
            &format!("2-dscp-v{version}"),
            &format!(
                "packets over IPv{version} with another DSCP than the policy's, or a wrong header checksum"
            ),
            &format!("veth between two namespaces, TCP through the classifier: DSCP of {}", text.join(", ")),
            wrong as f64,
            0.0,
        )?;
    }
    Ok(())
}

/// What every agent of the lab tags with: the same numbers as [`policy`], in the words of a policy file.
fn policy_file() -> String {
    let mut text =
        String::from("[port]\nshaping = \"off\"\nlink_mbit = 100\nrack_prefixes = [\"10.77.1.0/24\"]\n");
    let policy = policy();
    for class in FlowClass::ALL {
        if let Some(dscp) = policy.classes[class.slot() as usize].dscp {
            text.push_str(&format!("[class.{}]\ndscp = {dscp}\n", class.name()));
        }
    }
    text
}

/// A rack moves by `irlm`, captured at the switch of the target rack: what came over the core link, and what target
/// hosts forwarded.
fn in_the_lab(irlm: &Path, points: &mut Vec<Point>) -> Result<()> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 2, 1, 256);
    spec.policy = Some(policy_file());
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    eprintln!("tags: a rack moves, captured at the target rack's switch");
    let capture = Capture::start(&lab.net.namespace("tsw"))?;
    let wait = Duration::from_secs(240);
    let plan = Plan { method: Method::Irlm, irlm, writers: 200, extra: "", wait, others: None };
    let moved = round::run(&lab, &plan, &|_, _| {});
    let packets = capture.stop()?;
    moved?;
    let policy = policy();
    let dscp = |class: FlowClass| policy.classes[class.slot() as usize].dscp.unwrap_or_default();
    let mut told: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = 0;
    for p in
        packets.iter().filter(|p| p.to.port() == DATA || p.from.port() == DATA || p.from.port() == CONTROL)
    {
        let in_target_rack = |end: SocketAddr| matches!(end.ip(), IpAddr::V4(v4) if v4.octets()[2] == 2);
        let bulk = [FlowClass::Bulk, FlowClass::Switchover];
        let may: &[FlowClass] = if p.from.port() == CONTROL {
            &[FlowClass::Control]
        } else if in_target_rack(p.from) && in_target_rack(p.to) {
            &[FlowClass::Forward]
        } else {
            &bulk
        };
        // Who accepts a data connection does not know its class before the hello.
        let waits = p.from.port() == DATA && p.dscp == dscp(FlowClass::Control);
        // Who dials has registered the connection before its first packet. Bare acknowledgements also leave before an
        // accepted connection is registered, and after any has been forgotten.
        let bare = p.payload == 0 && p.dscp == 0 && !(p.opens && p.to.port() == DATA);
        let class = may.iter().find(|class| dscp(**class) == p.dscp);
        let what = match class {
            Some(class) => class.name(),
            None if waits => "accepted, before its hello",
            None if bare => "bare, not registered",
            None => "wrong",
        };
        *told.entry(what).or_default() += 1;
        wrong += usize::from(what == "wrong" || !p.sum_right);
    }
    for class in [FlowClass::Bulk, FlowClass::Switchover, FlowClass::Forward, FlowClass::Control] {
        ensure!(
            told.contains_key(class.name()),
            "no packet of class {} was captured: {told:?}",
            class.name()
        );
    }
    let told: Vec<_> = told.iter().map(|(what, n)| format!("{what} {n}")).collect();
    at_most(
        points,
        "2-dscp-lab",
        "agents' packets with another DSCP than the policy's, or a wrong header checksum, while a rack moves",
        &format!(
            "two guests, captured at the target rack's switch (each packet at two ports): {}",
            told.join(", ")
        ),
        wrong as f64,
        0.0,
    )
}

/// Registered flows in the trial with hostile packets.
const FLOWS: [(&str, &str); 2] =
    [("10.77.1.2:40000", "10.77.2.2:7702"), ("[fd77:1::2]:40000", "[fd77:2::2]:7702")];
const TRIED: u32 = 200_000;

/// Bytes of any kind through the program for leaving packets.
fn hostile(points: &mut Vec<Point>) -> Result<()> {
    let trial = Trial::load()?;
    let mut seeds = Vec::new();
    for (local, remote) in FLOWS {
        let (local, remote): (SocketAddr, SocketAddr) = (local.parse()?, remote.parse()?);
        for proto in [PROTO_TCP, PROTO_UDP] {
            trial.add_flow(proto, local, remote, FlowClass::Bulk)?;
        }
        seeds.extend([frames::tcp(local, remote)?, frames::tcp(remote, local)?]);
        if local.is_ipv4() {
            seeds.extend([frames::tagged_tcp(local, remote)?, frames::ping(local, remote)?]);
        }
    }
    seeds.push(frames::arp()?);
    let mut policy = policy();
    let bulk = &mut policy.classes[FlowClass::Bulk.slot() as usize];
    (bulk.priority, bulk.mark) = (Some(7), Some(9));
    trial.set_policy(&policy)?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    eprintln!("tags: {TRIED} random packets, seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut told: BTreeMap<&str, u32> = BTreeMap::new();
    let mut wrong = 0;
    for _ in 0..TRIED {
        let packet = mutated(&mut rng, &seeds);
        let Ok(ran) = trial.run(Trialled::Egress, &packet) else {
            // The kernel itself refuses to run a program on a packet that ends inside an untagged IP header.
            ensure!(packet.len() < 14 + 40, "a packet of {} bytes was not run", packet.len());
            *told.entry("not run by the kernel").or_default() += 1;
            continue;
        };
        let changed = ran.packet != packet || ran.priority != 0 || ran.mark != 0 || ran.verdict != -1;
        let ours = frames::ends(&packet).is_some_and(|(from, to)| {
            FLOWS.iter().any(|flow| (from.to_string(), to.to_string()) == (flow.0.into(), flow.1.into()))
        });
        *told.entry(if changed { "tagged" } else { "as they were" }).or_default() += 1;
        wrong += u32::from(changed && !ours);
    }
    let tagged = told.get("tagged").copied().unwrap_or_default();
    if tagged < TRIED / 100 {
        bail!("only {tagged} packets were of registered flows: the trial shows nothing");
    }
    let told: Vec<_> = told.iter().map(|(what, n)| format!("{n} {what}")).collect();
    at_most(
        points,
        "6-hostile",
        "packets changed that are of no migration flow",
        &format!("{TRIED} random, mutated and cut packets by BPF_PROG_TEST_RUN: {}", told.join(", ")),
        wrong.into(),
        0.0,
    )
}

/// A registered flow's packet or another, with some bytes changed and perhaps cut; or bytes out of nowhere.
fn mutated(rng: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = if rng.random_ratio(1, 8) {
        (0..rng.random_range(15..256)).map(|_| rng.random()).collect()
    } else {
        seeds[rng.random_range(0..seeds.len())].clone()
    };
    for _ in 0..rng.random_range(0..4) {
        // Headers are where it hurts.
        let end = packet.len().min(if rng.random() { 80 } else { packet.len() });
        let at = rng.random_range(0..end);
        packet[at] = rng.random();
    }
    if rng.random_ratio(1, 3) {
        packet.truncate(rng.random_range(15..=packet.len()));
    }
    packet
}

/// The dearest way of each kind; the others are said beside it.
fn cost(points: &mut Vec<Point>) -> Result<()> {
    eprintln!("tags: nanoseconds a packet, by BPF_PROG_TEST_RUN");
    let costs = bpf_cost::measure(9, 1_000_000)?;
    for (id, what, migration, bound) in [
        ("cost-migration", "nanoseconds that a migration packet costs", true, bpf_cost::MIGRATION_NS),
        ("cost-others", "nanoseconds that any other packet costs", false, bpf_cost::OTHERS_NS),
    ] {
        let ways: Vec<_> = costs.ways.iter().filter(|way| way.migration == migration).collect();
        let dearest = ways.iter().map(|way| way.ns).max().context("no way was measured")?;
        let all: Vec<_> = ways.iter().map(|way| format!("{} {}", way.what, way.ns)).collect();
        let how = format!(
            "dearest way, median of 9 x 1,000,000 runs, of which the harness is {}: {}",
            costs.nothing_ns,
            all.join("; ")
        );
        at_most(points, id, what, &how, dearest as f64, bound as f64)?;
    }
    Ok(())
}
