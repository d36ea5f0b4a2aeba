//! Pins: what they show, that they go, and that a new agent follows a killed one without a packet uncounted.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio, id};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use aya::EbpfLoader;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::tc::{NlOptions, TcAttachOptions};
use aya::programs::{SchedClassifier, TcAttachType};
use irlm_common::policy::State;
use irlm_common::{
    COUNTS_MAP, Counter, FILTER_MAP, FLOWS_MAP, Flow, FlowKey, INGRESS_PROGRAM, SCOPES, SLOTS, STATE_MAP,
    Scope, count_index,
};
use irlm_user::host::bpf::{
    Classifier, Direction, FlowClass, Hook, Marking, OBJECT, Snapshot, TagPolicy, default_pin_dir,
};

use super::{IFACE, MIB, Result, at_peer, connection, programs_on, run, transfer};

/// Set for the process that is killed: where it pins, and how it attaches.
const CHILD: &str = "IRLM_TEST_BPF_CHILD";

fn pinned(path: &Path) -> Result<Map> {
    Ok(Map::from_map_data(MapData::from_pin(path)?)?)
}

fn sum_of(
    counts: &PerCpuArray<MapData, Counter>,
    direction: Direction,
    scope: Scope,
    slot: u32,
) -> Result<Counter> {
    let mut sum = Counter::default();
    counts.get(&count_index(direction, scope, slot), 0)?.iter().for_each(|cpu| sum.add(cpu));
    Ok(sum)
}

fn id_of(path: &Path) -> Result<u32> {
    Ok(MapData::from_pin(path)?.info()?.id())
}

pub(super) fn pins_show_the_maps_and_go(peer: &str) -> Result<()> {
    let name = format!("test-{}", id());
    let dir = default_pin_dir(&name)?;
    let classifier = Classifier::attach(IFACE, Some(&dir))?;
    assert_eq!((classifier.pin_error(), classifier.pinned()), (None, Some(dir.clone())));
    // Another agent under the same name counts, but may not touch the pins.
    let second = Classifier::attach(IFACE, Some(&dir))?;
    assert_eq!(second.pinned(), None);
    assert!(second.pin_error().is_some_and(|error| error.contains("in use")), "{:?}", second.pin_error());
    drop(second);

    let (mut here, mut there) = connection(&classifier, peer, "10.77.0.2:0", FlowClass::Bulk)?;
    transfer(&mut here, &mut there, MIB)?;
    let counts = PerCpuArray::try_from(pinned(&dir.join(COUNTS_MAP))?)?;
    let seen = sum_of(&counts, Direction::Egress, Scope::Core, FlowClass::Bulk.slot())?;
    assert!(seen.bytes >= MIB as u64, "{seen:?}");
    let flows: HashMap<_, FlowKey, Flow> = pinned(&dir.join(FLOWS_MAP))?.try_into()?;
    let all = flows.iter().collect::<std::result::Result<Vec<_>, _>>()?;
    let [(flow, value)] = all.as_slice() else { return Err(format!("flows: {all:?}").into()) };
    assert_eq!((flow.remote_port, value.class), (here.peer_addr()?.port(), FlowClass::Bulk.slot()));

    // Once its address is in the rack, a flow counts there.
    let mut policy = TagPolicy::default();
    policy.classes[FlowClass::Bulk.slot() as usize] = Marking { dscp: Some(10), ..Marking::default() };
    policy.rack_prefixes = vec![("10.77.0.0".parse()?, 24)];
    classifier.set_policy(&policy)?;
    let before = classifier.counters()?;
    transfer(&mut here, &mut there, MIB)?;
    let counted = classifier.counters()?.since(&before);
    assert!(counted.scoped(Direction::Egress, Scope::Rack, FlowClass::Bulk).bytes >= MIB as u64);
    assert_eq!(counted.scoped(Direction::Egress, Scope::Core, FlowClass::Bulk).bytes, 0);

    let shown = Snapshot::of(&name)?;
    assert_eq!((shown.agent_runs, &*shown.iface), (true, IFACE));
    assert_eq!(shown.rack_prefixes, ["10.77.0.0/24"]);
    assert_eq!(shown.flows.iter().find(|(class, _)| *class == "bulk"), Some(&("bulk", 1)));
    let dscp =
        shown.policy.iter().find(|row| row.class == "bulk" && row.scope == "core").and_then(|row| row.dscp);
    assert_eq!(dscp, Some(10));
    let names: Vec<_> = shown.programs.iter().map(|program| &*program.name).collect();
    assert_eq!(names, ["irlm_egress", "irlm_ingress"]);

    // A guard forgets its flow, and its footprint; a second handle keeps the programs until it is gone too.
    drop(classifier.track(&here, FlowClass::Control));
    assert_eq!(flows.keys().count(), 0);
    let filter: Array<_, irlm_common::filter::Word> = pinned(&dir.join(FILTER_MAP))?.try_into()?;
    assert!(filter.iter().all(|word| word.is_ok_and(|word| word.bits == 0)));
    let clone = classifier.clone();
    drop(classifier);
    assert!(dir.join(COUNTS_MAP).exists());
    // An orderly end does not wait for handles that others still have.
    clone.shut_down();
    assert!(!dir.exists(), "{} is still there", dir.display());
    assert_eq!(programs_on(Hook::Tcx)?, [""; 0]);
    clone.add_flow(here.local_addr()?, here.peer_addr()?, FlowClass::Bulk)?;
    assert!(!clone.counters()?.counted());
    Ok(())
}

pub(super) fn bpftool_shows_named_fields() -> Result<()> {
    if let Err(error) = run("bpftool", "version") {
        println!("skipped: named fields in bpftool: {error}");
        return Ok(());
    }
    let dir = default_pin_dir(&format!("named-{}", id()))?;
    let classifier = Classifier::attach(IFACE, Some(&dir))?;
    classifier.add_flow("10.0.0.1:1".parse()?, "10.0.0.2:2".parse()?, FlowClass::Demand)?;
    let policy = TagPolicy { rack_prefixes: vec![("10.77.0.0".parse()?, 24)], ..TagPolicy::default() };
    classifier.set_policy(&policy)?;
    for (map, fields) in [
        ("IRLM_FLOWS", &["local_addr", "remote_addr", "local_port", "remote_port", "proto", "class"][..]),
        ("IRLM_COUNTS", &["packets", "bytes", "wire_packets", "wire_bytes"]),
        ("IRLM_POLICY", &["prefixes", "core", "rack", "set_dscp", "dscp", "priority", "mark"]),
        ("IRLM_STATE", &["abi", "ifindex", "generation", "iface"]),
        (
            "IRLM_EVENTS",
            &["dscp_not_written", "cut_short", "bad_ipv4", "bad_ipv6", "bad_tcp", "log_suppressed"],
        ),
        ("IRLM_FILTER", &["bits"]),
        ("IRLM_PREFIXES_1", &["prefix_len", "data"]),
    ] {
        let dump = run("bpftool", &format!("-j map dump pinned {}", dir.join(map).display()))?;
        for field in fields {
            assert!(dump.contains(&format!("\"{field}\":")), "{map} shows no {field}: {dump:.600}");
        }
    }
    for way in ["egress", "ingress"] {
        let link =
            run("bpftool", &format!("link show pinned {}", dir.join(format!("link_{way}")).display()))?;
        // An older bpftool knows the kind by its number only.
        assert!(link.contains("tcx") || link.contains("type 11"), "{link}");
    }
    Ok(())
}

/// A process that attaches, registers a flow, and waits to be killed.
struct Doomed(Child);

impl Doomed {
    fn start(dir: &Path, hook: Hook) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "takeover::doomed", "--nocapture"])
            .env(CHILD, format!("{} {}", hook.name(), dir.display()))
            .stdout(Stdio::piped())
            .spawn()?;
        let out = child.stdout.take().ok_or("no output")?;
        let child = Self(child);
        for line in BufReader::new(out).lines() {
            if line?.ends_with("attached") {
                return Ok(child);
            }
        }
        Err("the process to be killed did not attach".into())
    }

    /// By SIGKILL: nothing of it gets to tidy up.
    fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

const DOOMED_FLOW: (&str, &str) = ("10.77.0.1:40001", "10.77.0.2:40002");

#[test]
fn doomed() -> Result<()> {
    let Ok(order) = std::env::var(CHILD) else {
        println!("run by the takeover test, to be killed");
        return Ok(());
    };
    let (hook, dir) = order.split_once(' ').ok_or("no directory")?;
    let hook = if hook == Hook::Tcx.name() { Hook::Tcx } else { Hook::Clsact };
    let dir = PathBuf::from(dir);
    let classifier = Classifier::options(IFACE).hook(hook).pin_dir(Some(&dir)).attach()?;
    assert_eq!(classifier.pin_error(), None);
    let (local, remote) = (DOOMED_FLOW.0.parse()?, DOOMED_FLOW.1.parse()?);
    classifier.add_udp_flow(local, remote, FlowClass::Bulk)?;
    println!("attached");
    thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// Packets that the interface was given, sent or not.
fn interface_packets() -> Result<u64> {
    let read = |name: &str| -> Result<u64> {
        Ok(fs::read_to_string(format!("/sys/class/net/{IFACE}/statistics/{name}"))?.trim().parse()?)
    };
    Ok(read("tx_packets")? + read("tx_dropped")?)
}

/// Sends from the doomed flow's ends until told to stop.
fn sender(stop: &AtomicBool) -> Result<u64> {
    let socket = UdpSocket::bind(DOOMED_FLOW.0)?;
    let to: SocketAddr = DOOMED_FLOW.1.parse()?;
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..20 {
            socket.send_to(&[0; 100], to)?;
            sent += 1;
        }
        thread::sleep(Duration::from_micros(300));
    }
    Ok(sent)
}

/// Every packet counted, by sums over all slots and scopes.
fn total(counts: &PerCpuArray<MapData, Counter>, direction: Direction) -> Result<u64> {
    let mut packets = 0;
    for scope in Scope::ALL {
        for slot in 0..SLOTS {
            packets += sum_of(counts, direction, scope, slot)?.packets;
        }
    }
    assert_eq!(Scope::ALL.len() as u32, SCOPES);
    Ok(packets)
}

pub(super) fn a_killed_agent_is_followed_without_a_gap(peer: &str) -> Result<()> {
    let name = format!("killed-{}", id());
    let dir = default_pin_dir(&name)?;
    let receiver = {
        let to: SocketAddr = DOOMED_FLOW.1.parse()?;
        at_peer(peer, move || Ok(UdpSocket::bind(to)?))?
    };
    let old = Doomed::start(&dir, Hook::Tcx)?;
    let ids = |dir: &Path| -> Result<Vec<u32>> {
        [COUNTS_MAP, FLOWS_MAP, STATE_MAP].iter().map(|map| id_of(&dir.join(map))).collect()
    };
    let maps = ids(&dir)?;
    let before = Snapshot::of(&name)?;
    let counts = PerCpuArray::try_from(pinned(&dir.join(COUNTS_MAP))?)?;
    let (start, start_counted) = (interface_packets()?, total(&counts, Direction::Egress)?);
    let stop = AtomicBool::new(false);
    let bulk = || sum_of(&counts, Direction::Egress, Scope::Core, FlowClass::Bulk.slot());
    let (sent, classifier) = thread::scope(|scope| -> Result<_> {
        let sending = scope.spawn(|| sender(&stop));
        // Counters never go back, whoever looks whenever.
        let watching = scope.spawn(|| -> Result<u32> {
            let (mut last, mut looks) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                let now = total(&counts, Direction::Egress)?;
                assert!(now >= last, "the counter went back from {last} to {now}");
                (last, looks) = (now, looks + 1);
            }
            Ok(looks)
        });
        let taken = (|| -> Result<Classifier> {
            thread::sleep(Duration::from_millis(200));
            old.kill()?;
            let (dead, counted) = (Snapshot::of(&name)?, bulk()?);
            assert!(!dead.agent_runs, "nobody holds the lock");
            thread::sleep(Duration::from_millis(200));
            assert!(bulk()?.packets > counted.packets, "nothing is counted while no agent lives");
            let classifier = Classifier::attach(IFACE, Some(&dir))?;
            thread::sleep(Duration::from_millis(200));
            Ok(classifier)
        })();
        stop.store(true, Ordering::Relaxed);
        let sent = sending.join().map_err(|_| "the sender panicked")??;
        let looks = watching.join().map_err(|_| "the watcher panicked")??;
        assert!(looks > 100, "looked only {looks} times");
        Ok((sent, taken?))
    })?;
    let (counted, given) = (total(&counts, Direction::Egress)? - start_counted, interface_packets()? - start);
    println!("takeover under traffic: {sent} datagrams sent, interface {given} packets, eBPF {counted}");
    assert!(sent > 1000 && given >= sent);
    assert_eq!(counted, given, "packets went by uncounted, or twice counted");
    // The same maps and links, and another program in them.
    let after = Snapshot::of(&name)?;
    assert_eq!((classifier.pin_error(), after.agent_runs), (None, true));
    assert_eq!(ids(&dir)?, maps);
    for (old, new) in before.programs.iter().zip(&after.programs) {
        assert_eq!(old.link, new.link);
        assert_ne!(old.program, new.program);
    }
    assert_eq!(programs_on(Hook::Tcx)?.len(), 2);
    // The dead agent's flow is forgotten, and the new agent's counts.
    assert!(after.flows.iter().all(|(_, number)| *number == 0), "{:?}", after.flows);
    let was = bulk()?;
    let socket = UdpSocket::bind(DOOMED_FLOW.0)?;
    socket.send_to(&[0; 100], DOOMED_FLOW.1)?;
    assert_eq!(bulk()?, was);
    classifier.add_udp_flow(DOOMED_FLOW.0.parse()?, DOOMED_FLOW.1.parse()?, FlowClass::Bulk)?;
    socket.send_to(&[0; 100], DOOMED_FLOW.1)?;
    assert_eq!(bulk()?.packets, was.packets + 1);
    drop(classifier);
    assert!(!dir.exists());
    assert_eq!(programs_on(Hook::Tcx)?, [""; 0]);
    drop(receiver);
    Ok(())
}

/// Another interface, another ABI, half of the pins: no continuing, and nothing of it left.
pub(super) fn leftovers_that_do_not_fit_are_replaced() -> Result<()> {
    let dir = default_pin_dir(&format!("replaced-{}", id()))?;
    let counts = || id_of(&dir.join(COUNTS_MAP));
    let die = || -> Result<u32> {
        Doomed::start(&dir, Hook::Tcx)?.kill()?;
        assert_eq!(programs_on(Hook::Tcx)?.len(), 2, "links live on in their pins");
        counts()
    };
    let old = die()?;
    let elsewhere = Classifier::attach("lo", Some(&dir))?;
    assert_eq!(elsewhere.pin_error(), None);
    assert_ne!(counts()?, old);
    assert_eq!(programs_on(Hook::Tcx)?, [""; 0], "left on {IFACE}");
    drop(elsewhere);

    let old = die()?;
    let mut state: Array<_, State> = pinned(&dir.join(STATE_MAP))?.try_into()?;
    let said = state.get(&0, 0)?;
    state.set(0, State { abi: said.abi + 1, ..said }, 0)?;
    let newer = Classifier::attach(IFACE, Some(&dir))?;
    assert_ne!(counts()?, old);
    assert_eq!(programs_on(Hook::Tcx)?.len(), 2);
    drop(newer);

    let old = die()?;
    fs::remove_file(dir.join(FLOWS_MAP))?;
    let whole = Classifier::attach(IFACE, Some(&dir))?;
    assert_ne!(counts()?, old);
    assert_eq!(programs_on(Hook::Tcx)?.len(), 2);
    drop(whole);

    // Links alone gone, as after the interface was made anew by hand: maps go on, links are new.
    let old = die()?;
    for way in ["egress", "ingress"] {
        fs::remove_file(dir.join(format!("link_{way}")))?;
    }
    let again = Classifier::attach(IFACE, Some(&dir))?;
    assert_eq!(counts()?, old);
    assert_eq!(programs_on(Hook::Tcx)?.len(), 2);
    drop(again);
    assert!(!dir.exists());
    assert_eq!(programs_on(Hook::Tcx)?, [""; 0]);
    Ok(())
}

/// The clsact way: a killed agent's filters count on, and are replaced in their place.
pub(super) fn filters_of_a_killed_agent_are_replaced(peer: &str) -> Result<()> {
    let dir = default_pin_dir(&format!("clsact-{}", id()))?;
    Doomed::start(&dir, Hook::Clsact)?.kill()?;
    assert_eq!(programs_on(Hook::Clsact)?.len(), 2);
    let old = id_of(&dir.join(COUNTS_MAP))?;
    let classifier = Classifier::options(IFACE).hook(Hook::Clsact).pin_dir(Some(&dir)).attach()?;
    assert_eq!(id_of(&dir.join(COUNTS_MAP))?, old);
    assert_eq!(programs_on(Hook::Clsact)?.len(), 2);
    let (mut here, mut there) = connection(&classifier, peer, "10.77.0.2:0", FlowClass::Forward)?;
    transfer(&mut here, &mut there, MIB)?;
    let counted = classifier.counters()?.get(Direction::Egress, FlowClass::Forward);
    assert!(
        (MIB as u64..2 * MIB as u64).contains(&counted.bytes),
        "counted twice or not at all: {counted:?}"
    );
    drop(classifier);
    assert_eq!(programs_on(Hook::Clsact)?, [""; 0]);

    // A filter of ours at any other place would count a second time, so it goes.
    let mut ebpf = EbpfLoader::new().load(OBJECT)?;
    let program: &mut SchedClassifier = ebpf.program_mut(INGRESS_PROGRAM).ok_or("no program")?.try_into()?;
    program.load()?;
    let options = TcAttachOptions::Netlink(NlOptions::default());
    let link = program.attach_with_options(IFACE, TcAttachType::Ingress, options)?;
    std::mem::forget(program.take_link(link)?);
    assert_eq!(programs_on(Hook::Clsact)?.len(), 1);
    let classifier = Classifier::options(IFACE).hook(Hook::Clsact).attach()?;
    assert_eq!(programs_on(Hook::Clsact)?.len(), 2);
    drop(classifier);
    assert_eq!(programs_on(Hook::Clsact)?, [""; 0]);
    Ok(())
}
