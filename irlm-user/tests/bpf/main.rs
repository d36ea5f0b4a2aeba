//! The classifiers in a real kernel: every class and direction, both hooks, and against the interface's own counter.
//!
//! Two network namespaces and a veth pair stand for two hosts. The test runs itself again inside the first one by
//! `ip netns exec`, which also gives it a mount namespace, so that its pins never show outside. Without root, `ip`,
//! the eBPF object or a kernel that takes it, the reason is printed and the test passes.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, id};
use std::thread;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use irlm_common::Counter;
use irlm_user::host::bpf::{BpfError, Classifier, Counters, Direction, FlowClass, Hook, OBJECT};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

// Pins, and what a killed agent leaves.
mod takeover;
// Packets made by hand, through the programs.
mod trials;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Set for the run inside the namespace; names the peer's.
const PEER: &str = "IRLM_TEST_BPF_PEER";
const IFACE: &str = "core0";
const VLAN: &str = "core0.7";
const MIB: usize = 1 << 20;

fn run(program: &str, arguments: &str) -> Result<String> {
    let output = Command::new(program).args(arguments.split(' ')).output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {arguments}: {}", error.trim()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn ip(arguments: &str) -> Result<String> {
    run("ip", arguments)
}

/// Why the kernel tests cannot run here.
fn missing() -> Option<String> {
    if OBJECT.is_empty() {
        return Some("this build has no eBPF object; `cargo xtask test` makes it".into());
    }
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    if let Err(error) = ip("netns list") {
        return Some(format!("needs network namespaces: {error}"));
    }
    // Loading comes before attaching: on an interface that does not exist, only a kernel that refuses the
    // programs gives the error of an unsupported one.
    match Classifier::attach("irlm-no-such-if", None) {
        Err(error) if error.is_unsupported() => Some(error.to_string()),
        _ => None,
    }
}

/// Two namespaces with a veth pair; removed when dropped.
struct Pair([String; 2]);

impl Pair {
    fn new() -> Result<Self> {
        let pair = Self([format!("irlm-bpf-{}-a", id()), format!("irlm-bpf-{}-b", id())]);
        let [a, b] = &pair.0;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add {IFACE} netns {a} type veth peer name {IFACE} netns {b}"))?;
        for (name, host) in [(a, 1), (b, 2)] {
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set {IFACE} up"))?;
            ip(&format!("-n {name} addr add 10.77.0.{host}/24 dev {IFACE}"))?;
            ip(&format!("-n {name} addr add fd77::{host}/64 dev {IFACE} nodad"))?;
            if let Err(error) = ip(&format!("-n {name} link add link {IFACE} name {VLAN} type vlan id 7")) {
                println!("skipped: flows behind a VLAN device: {error}");
                continue;
            }
            ip(&format!("-n {name} link set {VLAN} up"))?;
            ip(&format!("-n {name} addr add 10.78.0.{host}/24 dev {VLAN}"))?;
        }
        Ok(pair)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for name in &self.0 {
            ip(&format!("netns del {name}")).ok();
        }
    }
}

#[test]
fn classifiers_count_flows_by_class() -> Result<()> {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return Ok(());
    }
    let pair = Pair::new()?;
    let [a, b] = &pair.0;
    let output = Command::new("ip")
        .args(["netns", "exec", a])
        .arg(std::env::current_exe()?)
        .args(["--exact", "inside_the_namespace", "--nocapture"])
        .env(PEER, b)
        .output()?;
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the run inside the namespace failed: {}", output.status);
    Ok(())
}

#[test]
fn inside_the_namespace() -> Result<()> {
    let Ok(peer) = std::env::var(PEER) else {
        println!("run by classifiers_count_flows_by_class, inside its namespace");
        return Ok(());
    };
    let error = Classifier::attach("irlm-no-such-if", None).err().ok_or("attached to nothing")?;
    println!("no such interface: {error}");
    assert!(matches!(&error, BpfError::Attach { iface, .. } if iface == "irlm-no-such-if"), "{error}");
    for hook in [Hook::Tcx, Hook::Clsact] {
        match Classifier::options(IFACE).hook(hook).attach() {
            Ok(classifier) => every_class_has_its_counter(&classifier, &peer, hook)?,
            Err(error) if hook == Hook::Tcx => println!("skipped: no TCX here: {error}"),
            Err(error) => return Err(error.into()),
        }
        assert_eq!(programs_on(hook)?, [""; 0], "left on {IFACE} after {hook:?}");
    }
    totals_agree_with_the_interface(&peer)?;
    takeover::pins_show_the_maps_and_go(&peer)?;
    takeover::bpftool_shows_named_fields()?;
    takeover::a_killed_agent_is_followed_without_a_gap(&peer)?;
    takeover::leftovers_that_do_not_fit_are_replaced()?;
    takeover::filters_of_a_killed_agent_are_replaced(&peer)
}

/// Runs `work` in the peer's network namespace. Sockets made there stay there.
fn at_peer<T: Send + 'static>(peer: &str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let namespace = File::open(Path::new("/run/netns").join(peer))?;
    let worker = thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    });
    worker.join().map_err(|_| "a worker in the peer's namespace panicked")?
}

/// A connection from here to the peer, registered under `class`; (here, there).
fn connection(
    classifier: &Classifier,
    peer: &str,
    address: &str,
    class: FlowClass,
) -> Result<(TcpStream, TcpStream)> {
    let address: SocketAddr = address.parse()?;
    let listener = at_peer(peer, move || Ok(TcpListener::bind(address)?))?;
    let here = TcpStream::connect(listener.local_addr()?)?;
    classifier.add_flow(here.local_addr()?, here.peer_addr()?, class)?;
    let (there, _) = listener.accept()?;
    Ok((here, there))
}

/// Sends `bytes` from one end and reads them at the other.
fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) -> Result<()> {
    thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<()> {
            let mut buffer = vec![0; 256 << 10];
            let mut left = bytes;
            while left > 0 {
                let part = buffer.len().min(left);
                left -= match to.read(&mut buffer[..part])? {
                    0 => return Err("the stream ended early".into()),
                    read => read,
                };
            }
            Ok(())
        });
        let chunk = vec![0x5a; 256 << 10];
        let mut left = bytes;
        while left > 0 {
            let part = chunk.len().min(left);
            from.write_all(&chunk[..part])?;
            left -= part;
        }
        reader.join().map_err(|_| "the reader panicked")?
    })
}

fn every_class_has_its_counter(classifier: &Classifier, peer: &str, hook: Hook) -> Result<()> {
    assert_eq!(classifier.hook(), Some(hook));
    assert_eq!(programs_on(hook)?.len(), 2);
    let cases = [
        ("10.77.0.2:0", FlowClass::Bulk, 4 * MIB),
        ("[fd77::2]:0", FlowClass::Control, MIB),
        (
            if Path::new("/sys/class/net").join(VLAN).exists() { "10.78.0.2:0" } else { "10.77.0.2:0" },
            FlowClass::Forward,
            2 * MIB,
        ),
    ];
    for (address, class, bytes) in cases {
        let (mut here, mut there) = connection(classifier, peer, address, class)?;
        let payload = bytes as u64;
        let before = classifier.counters()?;
        transfer(&mut here, &mut there, bytes)?;
        let counted = classifier.counters()?.since(&before);
        let sent = counted.get(Direction::Egress, class);
        let got = counted.get(Direction::Ingress, class);
        println!("{hook:?} {address} {}: sent {sent:?}, got {got:?}", class.name());
        assert!(sent.bytes >= payload && sent.bytes < payload + payload / 10, "{sent:?}");
        assert!(sent.wire_bytes >= sent.bytes && sent.wire_packets >= sent.packets, "{sent:?}");
        // A full segment has 1448 bytes behind 66 of IPv4 headers, or 1428 behind 86: 4.6 or 6 % on top.
        let on_top = sent.wire_bytes as f64 / payload as f64;
        assert!((1.04..1.08).contains(&on_top), "wire bytes are {on_top} of the payload");
        // The other way only acknowledgements went.
        assert!(got.packets > 0 && got.bytes < payload / 10, "{got:?}");
        for other in FlowClass::ALL.into_iter().filter(|other| *other != class && *other != FlowClass::Other)
        {
            assert_eq!(counted.get(Direction::Egress, other), Counter::default(), "{other:?}");
        }

        let before = classifier.counters()?;
        transfer(&mut there, &mut here, bytes)?;
        let got = classifier.counters()?.since(&before).get(Direction::Ingress, class);
        assert!(got.bytes >= payload && got.bytes < payload + payload / 10, "{got:?}");

        // Once forgotten it counts as other; forgetting twice is no error.
        classifier.remove_flow(here.local_addr()?, here.peer_addr()?)?;
        classifier.remove_flow(here.local_addr()?, here.peer_addr()?)?;
        let before = classifier.counters()?;
        transfer(&mut here, &mut there, MIB)?;
        let counted = classifier.counters()?.since(&before);
        assert_eq!(counted.get(Direction::Egress, class), Counter::default());
        assert!(counted.get(Direction::Egress, FlowClass::Other).bytes >= MIB as u64);
    }
    datagrams_are_counted_exactly(classifier, peer)?;
    a_live_flow_changes_class(classifier, peer)
}

/// As a VM connection does when its VM is stopped. Registered before it connects, it counts from its first packet.
fn a_live_flow_changes_class(classifier: &Classifier, peer: &str) -> Result<()> {
    let (mut here, mut there) = connection(classifier, peer, "10.77.0.2:0", FlowClass::Bulk)?;
    let (local, remote) = (here.local_addr()?, here.peer_addr()?);
    transfer(&mut here, &mut there, MIB)?;
    classifier.set_class(local, remote, FlowClass::Switchover)?;
    let before = classifier.counters()?;
    transfer(&mut here, &mut there, MIB)?;
    let counted = classifier.counters()?.since(&before);
    assert!(counted.get(Direction::Egress, FlowClass::Switchover).bytes >= MIB as u64);
    assert_eq!(counted.get(Direction::Egress, FlowClass::Bulk).bytes, 0);
    classifier.remove_flow(local, remote)?;
    // What is not registered has no class to change.
    classifier.set_class(local, remote, FlowClass::Demand)?;
    let before = classifier.counters()?;
    transfer(&mut here, &mut there, MIB)?;
    let counted = classifier.counters()?.since(&before);
    assert_eq!(counted.get(Direction::Egress, FlowClass::Demand).bytes, 0);
    Ok(())
}

fn datagrams_are_counted_exactly(classifier: &Classifier, peer: &str) -> Result<()> {
    for (here, there, ip_header) in [("10.77.0.1:0", "10.77.0.2:0", 20), ("[fd77::1]:0", "[fd77::2]:0", 40)] {
        let there: SocketAddr = there.parse()?;
        let there = at_peer(peer, move || Ok(UdpSocket::bind(there)?))?;
        there.set_read_timeout(Some(Duration::from_secs(10)))?;
        let here = UdpSocket::bind(here)?;
        here.set_read_timeout(Some(Duration::from_secs(10)))?;
        classifier.add_udp_flow(here.local_addr()?, there.local_addr()?, FlowClass::Control)?;
        let before = classifier.counters()?;
        for _ in 0..100 {
            here.send_to(&[0; 1000], there.local_addr()?)?;
            there.recv_from(&mut [0; 2000])?;
        }
        there.send_to(&[0; 500], here.local_addr()?)?;
        here.recv_from(&mut [0; 2000])?;
        let counted = classifier.counters()?.since(&before);
        let frame = 14 + ip_header + 8 + 1000;
        let exact = Counter { packets: 100, bytes: 100 * frame, wire_packets: 100, wire_bytes: 100 * frame };
        assert_eq!(counted.get(Direction::Egress, FlowClass::Control), exact);
        assert_eq!(counted.get(Direction::Ingress, FlowClass::Control).bytes, frame - 500);
        classifier.remove_udp_flow(here.local_addr()?, there.local_addr()?)?;
    }
    Ok(())
}

/// The interface's own counter of sent bytes.
fn tx_bytes() -> Result<u64> {
    Ok(fs::read_to_string(format!("/sys/class/net/{IFACE}/statistics/tx_bytes"))?.trim().parse()?)
}

fn assert_close(what: &str, counted: u64, interface: u64) {
    let ratio = counted as f64 / interface as f64;
    println!("{what}: eBPF {counted}, interface {interface}, ratio {ratio:.5}");
    assert!((0.99..1.01).contains(&ratio), "{what}: eBPF {counted}, interface {interface}");
}

/// A veth counts super-packets as they are, which `bytes` is to match. Where every frame passes alone, because the
/// sender may make no super-packets or a qdisc cuts them, it is `wire_bytes` that is to match.
fn totals_agree_with_the_interface(peer: &str) -> Result<()> {
    let classifier = Classifier::attach(IFACE, None)?;
    let measure = || -> Result<(Counter, u64)> {
        let (mut here, mut there) = connection(&classifier, peer, "10.77.0.2:0", FlowClass::Bulk)?;
        let (counters, interface): (Counters, u64) = (classifier.counters()?, tx_bytes()?);
        transfer(&mut here, &mut there, 32 * MIB)?;
        let counted = classifier.counters()?.since(&counters).total(Direction::Egress);
        Ok((counted, tx_bytes()? - interface))
    };
    let (total, interface) = measure()?;
    assert!(total.wire_packets > total.packets, "no super-packets were sent: {total:?}");
    assert_close("super-packets, bytes", total.bytes, interface);

    ip(&format!("link set {IFACE} gso_max_segs 1"))?;
    let (total, interface) = measure()?;
    ip(&format!("link set {IFACE} gso_max_segs 65535"))?;
    assert_eq!(total.packets, total.wire_packets);
    assert_close("single frames, bytes", total.bytes, interface);
    assert_close("single frames, wire bytes", total.wire_bytes, interface);

    // A TBF with a burst below two frames cuts every super-packet, after the hook.
    if let Err(error) = run("tc", &format!("qdisc add dev {IFACE} root tbf rate 1gbit burst 2k limit 1m")) {
        println!("skipped: counting above TBF: {error}");
        return Ok(());
    }
    let measured = measure();
    run("tc", &format!("qdisc del dev {IFACE} root"))?;
    let (total, interface) = measured?;
    assert!(total.wire_packets > total.packets, "no super-packets were sent: {total:?}");
    assert_close("above a TBF that cuts, wire bytes", total.wire_bytes, interface);
    Ok(())
}

/// The names of our programs on the interface.
fn programs_on(hook: Hook) -> Result<Vec<String>> {
    let mut names = Vec::new();
    match hook {
        Hook::Clsact => {
            for way in ["ingress", "egress"] {
                let filters = run("tc", &format!("filter show dev {IFACE} {way}"))?;
                // One line a filter; newer versions of tc name the program in it twice.
                names.extend(filters.lines().filter(|line| line.contains("irlm_")).map(str::to_owned));
            }
        }
        Hook::Tcx => {
            for way in [TcAttachType::Ingress, TcAttachType::Egress] {
                // Kernels without TCX have nothing there.
                let Ok((_, programs)) = SchedClassifier::query_tcx(IFACE, way) else { continue };
                names.extend(programs.iter().filter_map(|program| program.name_as_str().map(str::to_owned)));
            }
        }
    }
    Ok(names)
}
