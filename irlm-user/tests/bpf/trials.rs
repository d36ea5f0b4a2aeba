//! Packets made by hand, through the real programs by `BPF_PROG_TEST_RUN`: what is tagged is tagged right, what is not
//! a registered flow comes back as it was, and a policy is never seen half.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use irlm_common::parse::{ETH_IPV4, ETH_IPV6, ETH_QINQ, ETH_VLAN, Verdict, parse};
use irlm_common::{FlowKey, PROTO_TCP, PROTO_UDP};
use irlm_user::host::bpf::{Direction, FlowClass, Marking, Scope, TagPolicy, Trial, Trialled};

use super::{Result, missing};

/// `TC_ACT_UNSPEC`: on to the next program.
const NEXT: i32 = -1;
const V4: (&str, &str) = ("10.0.0.1:1000", "10.0.0.2:2000");
const V6: (&str, &str) = ("[fd00::1]:1000", "[fd00::2]:2000");

/// Loaded programs, or why there are none here.
fn trial() -> Result<Option<Trial>> {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return Ok(None);
    }
    let trial = Trial::load()?;
    if let Err(error) = trial.run(Trialled::Nothing, &[0; 64]) {
        println!("skipped: no BPF_PROG_TEST_RUN here: {error}");
        return Ok(None);
    }
    Ok(Some(trial))
}

/// As [`trial`], with one flow of each family and protocol registered.
fn with_flows(class: FlowClass) -> Result<Option<Trial>> {
    let Some(trial) = trial()? else { return Ok(None) };
    for (local, remote) in [V4, V6] {
        for proto in [PROTO_TCP, PROTO_UDP] {
            trial.add_flow(proto, local.parse()?, remote.parse()?, class)?;
        }
    }
    Ok(Some(trial))
}

fn only(class: FlowClass, marking: Marking) -> TagPolicy {
    let mut policy = TagPolicy::default();
    policy.classes[class.slot() as usize] = marking;
    policy
}

/// A whole frame from one end to the other. `class` is the TOS or traffic class; options go behind an IPv4 header,
/// extension headers (their own length in units of 8) behind an IPv6 one.
fn frame(
    tags: &[u16],
    ends: (SocketAddr, SocketAddr),
    proto: u8,
    class: u8,
    options: usize,
    extensions: &[u8],
) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    let mut l4 = vec![0; if proto == PROTO_TCP { 20 } else { 8 }];
    l4[0..2].copy_from_slice(&ends.0.port().to_be_bytes());
    l4[2..4].copy_from_slice(&ends.1.port().to_be_bytes());
    if proto == PROTO_TCP {
        l4[12] = 0x50;
    }
    l4.extend([0x5a; 50]);
    match ends {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            frame.extend(ETH_IPV4.to_be_bytes());
            let mut ip = vec![0; 20 + options];
            ip[0] = 0x40 | (ip.len() / 4) as u8;
            ip[1] = class;
            let total = (ip.len() + l4.len()) as u16;
            ip[2..4].copy_from_slice(&total.to_be_bytes());
            ip[4..8].copy_from_slice(&[0xbe, 0xef, 0x40, 0]);
            (ip[8], ip[9]) = (64, proto);
            ip[12..16].copy_from_slice(&from.ip().octets());
            ip[16..20].copy_from_slice(&to.ip().octets());
            let sum = sum_of(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend(ip);
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            frame.extend(ETH_IPV6.to_be_bytes());
            let mut ip = vec![0; 40];
            // A flow label, to see it stay.
            ip[0..4].copy_from_slice(&[0x60 | class >> 4, class << 4 | 0x0a, 0xbc, 0xde]);
            ip[7] = 64;
            ip[8..24].copy_from_slice(&from.ip().octets());
            ip[24..40].copy_from_slice(&to.ip().octets());
            let mut kinds: Vec<u8> = [0, 43, 60, 60][..extensions.len()].to_vec();
            kinds.push(proto);
            ip[6] = kinds[0];
            let mut rest = Vec::new();
            for (n, length) in extensions.iter().enumerate() {
                let mut extension = vec![0; (usize::from(*length) + 1) * 8];
                extension[0..2].copy_from_slice(&[kinds[n + 1], *length]);
                rest.extend(extension);
            }
            let length = (rest.len() + l4.len()) as u16;
            ip[4..6].copy_from_slice(&length.to_be_bytes());
            frame.extend(ip);
            frame.extend(rest);
        }
        _ => unreachable!("both ends are of one family"),
    }
    frame.extend(l4);
    frame
}

/// An IPv4 header's checksum from scratch; its field counts as zero.
fn sum_of(header: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for (_, pair) in header.chunks(2).enumerate().filter(|(n, _)| *n != 5) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ends(pair: (&str, &str)) -> Result<(SocketAddr, SocketAddr)> {
    Ok((pair.0.parse()?, pair.1.parse()?))
}

#[test]
fn every_shape_of_a_registered_flow_gets_its_tags_and_nothing_else() -> Result<()> {
    let Some(trial) = with_flows(FlowClass::Switchover)? else { return Ok(()) };
    let mut cases = 0;
    for dscp in [0, 1, 46, 63] {
        let marking = Marking { dscp: Some(dscp), priority: Some(0x1f1a_0010), mark: Some(0xabcd) };
        trial.set_policy(&only(FlowClass::Switchover, marking))?;
        for tags in [&[][..], &[ETH_VLAN], &[ETH_QINQ], &[ETH_QINQ, ETH_VLAN]] {
            for proto in [PROTO_TCP, PROTO_UDP] {
                for class in [0, 0x03, 0xb8, 0xff] {
                    let mut shapes = vec![];
                    for options in [0, 4, 40] {
                        shapes.push((frame(tags, ends(V4)?, proto, class, options, &[]), 20 + options));
                    }
                    for extensions in [&[][..], &[0], &[0, 2], &[1, 0, 3], &[0, 0, 0, 0]] {
                        shapes.push((frame(tags, ends(V6)?, proto, class, 0, extensions), 0));
                    }
                    for (before, header) in shapes {
                        cases += 1;
                        let ran = trial.run(Trialled::Egress, &before)?;
                        let what = format!("DSCP {dscp}, tags {tags:04x?}, proto {proto}, class {class:#x}");
                        assert_eq!(
                            (ran.verdict, ran.priority, ran.mark),
                            (NEXT, 0x1f1a_0010, 0xabcd),
                            "{what}"
                        );
                        let (ip, mut expected) = (14 + 4 * tags.len(), before.clone());
                        let new = dscp << 2 | class & 3;
                        if header > 0 {
                            expected[ip + 1] = new;
                            let sum = sum_of(&expected[ip..ip + header]);
                            expected[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
                        } else {
                            expected[ip] = 0x60 | new >> 4;
                            expected[ip + 1] = new << 4 | 0x0a;
                        }
                        assert_eq!(ran.packet, expected, "{what}");
                        // What arrives is counted and never touched, and the other way round it is no flow.
                        let ran = trial.run(Trialled::Ingress, &before)?;
                        assert_eq!((ran.packet, ran.priority, ran.mark), (before, 0, 0), "{what}");
                    }
                }
            }
        }
    }
    let counted = trial.counters()?;
    assert_eq!(counted.get(Direction::Egress, FlowClass::Switchover).packets, cases);
    assert_eq!(counted.get(Direction::Ingress, FlowClass::Other).packets, cases);
    assert_eq!(counted.oddities().dscp_not_written, 0);
    println!("{cases} shapes of registered flows");
    Ok(())
}

#[test]
fn each_tag_is_set_alone_or_left_alone() -> Result<()> {
    let Some(trial) = with_flows(FlowClass::Bulk)? else { return Ok(()) };
    let before = frame(&[], ends(V4)?, PROTO_TCP, 0, 0, &[]);
    for bits in 0..8 {
        let marking = Marking {
            dscp: (bits & 1 != 0).then_some(10),
            priority: (bits & 2 != 0).then_some(7),
            mark: (bits & 4 != 0).then_some(9),
        };
        trial.set_policy(&only(FlowClass::Bulk, marking))?;
        let ran = trial.run(Trialled::Egress, &before)?;
        assert_eq!((ran.packet != before, ran.packet[15] >> 2), (bits & 1 != 0, marking.dscp.unwrap_or(0)));
        assert_eq!((ran.priority, ran.mark), (marking.priority.unwrap_or(0), marking.mark.unwrap_or(0)));
    }
    // Another class's marking is not this one's.
    trial
        .set_policy(&only(FlowClass::Control, Marking { dscp: Some(1), priority: Some(1), mark: Some(1) }))?;
    let ran = trial.run(Trialled::Egress, &before)?;
    assert_eq!((ran.packet, ran.priority, ran.mark), (before, 0, 0));
    Ok(())
}

#[test]
fn scopes_have_their_own_tags_and_counters() -> Result<()> {
    let Some(trial) = trial()? else { return Ok(()) };
    let local: SocketAddr = "10.77.1.5:1000".parse()?;
    let local6: SocketAddr = "[fd77:1::5]:1000".parse()?;
    let mark = |mark| Marking { mark: Some(mark), ..Marking::default() };
    let mut policy = only(FlowClass::Forward, mark(1));
    policy.rack_prefixes =
        vec![("10.77.1.0".parse()?, 24), ("10.77.9.9".parse()?, 32), ("fd77:1::".parse()?, 64)];
    trial.set_policy_by_scope(&policy, &only(FlowClass::Forward, mark(2)).classes)?;
    let (mut core, mut rack) = (0, 0);
    for (remote, inside) in [
        ("10.77.1.255:7", true),
        ("10.77.2.0:7", false),
        ("10.77.9.9:7", true),
        ("10.77.9.8:7", false),
        ("[fd77:1::ffff]:7", true),
        ("[fd77:1:0:1::1]:7", false),
        // The number of an IPv4 prefix is none in IPv6.
        ("[::10.77.1.1]:7", false),
    ] {
        let remote: SocketAddr = remote.parse()?;
        let ends = (if remote.is_ipv4() { local } else { local6 }, remote);
        trial.add_flow(PROTO_TCP, ends.0, ends.1, FlowClass::Forward)?;
        let ran = trial.run(Trialled::Egress, &frame(&[], ends, PROTO_TCP, 0, 0, &[]))?;
        assert_eq!(ran.mark, if inside { 2 } else { 1 }, "{remote}");
        // What is not registered counts in its scope too, fragments and pings included.
        let mut fragment = frame(&[], ends, PROTO_UDP, 0, 0, &[]);
        if remote.is_ipv4() {
            fragment[20] = 0x20;
        }
        assert_eq!(trial.run(Trialled::Egress, &fragment)?.mark, 0);
        *(if inside { &mut rack } else { &mut core }) += 1;
    }
    let counted = trial.counters()?;
    for class in [FlowClass::Forward, FlowClass::Other] {
        assert_eq!(counted.scoped(Direction::Egress, Scope::Core, class).packets, core);
        assert_eq!(counted.scoped(Direction::Egress, Scope::Rack, class).packets, rack);
    }
    Ok(())
}

#[test]
fn frames_of_any_shape_find_their_slot() -> Result<()> {
    let Some(trial) = with_flows(FlowClass::Demand)? else { return Ok(()) };
    let back = |pair| -> Result<_> { ends(pair).map(|(local, remote)| (remote, local)) };
    let mut arp = vec![2; 12];
    arp.extend([0x08, 0x06]);
    arp.resize(60, 0);
    let mut bad_v4 = frame(&[], back(V4)?, PROTO_TCP, 0, 0, &[]);
    bad_v4[14] = 0x44;
    let mut bad_v6 = frame(&[], back(V6)?, PROTO_TCP, 0, 0, &[]);
    bad_v6[14] = 0x40;
    let mut bad_tcp = frame(&[ETH_VLAN], back(V4)?, PROTO_TCP, 0, 0, &[]);
    bad_tcp[18 + 20 + 12] = 0x40;
    let short = frame(&[], back(V6)?, PROTO_TCP, 0, 0, &[])[..60].to_vec();
    for frame in [&arp, &bad_v4, &bad_v6, &bad_tcp, &short] {
        let ran = trial.run(Trialled::Ingress, frame)?;
        assert_eq!((ran.verdict, &ran.packet), (NEXT, frame));
    }
    trial.run(Trialled::Ingress, &frame(&[ETH_QINQ, ETH_VLAN], back(V4)?, PROTO_UDP, 0, 4, &[]))?;
    let counted = trial.counters()?;
    assert_eq!(counted.get(Direction::Ingress, FlowClass::Other).packets, 1);
    assert_eq!(counted.get(Direction::Ingress, FlowClass::Demand).packets, 1);
    assert_eq!(counted.unparsed(Direction::Ingress).packets, 4);
    let odd = counted.oddities();
    assert_eq!((odd.bad_ipv4, odd.bad_ipv6, odd.bad_tcp, odd.cut_short), (1, 1, 1, 1));
    Ok(())
}

/// What the log of this process was told.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// All tests of this program share one log; lines of others do not hurt.
    fn shared() -> &'static Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Self::default();
            let writer = log.clone();
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
            log
        })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_flood_of_broken_packets_is_no_flood_of_lines() -> Result<()> {
    let log = Log::shared();
    let Some(trial) = trial()? else { return Ok(()) };
    let mut broken = frame(&[], ends(V4)?, PROTO_TCP, 0, 0, &[]);
    broken[14] = 0x44;
    // A length that no other test's packets have.
    broken.resize(1234, 0);
    let times = 200_000;
    let took = trial.time(Trialled::Egress, &broken, times)? * times;
    let odd = trial.counters()?.oddities();
    println!("{times} broken packets in {took:?}: {} lines, {} held back", odd.log_lines, odd.log_suppressed);
    assert_eq!(odd.bad_ipv4, u64::from(times));
    assert_eq!(odd.log_lines + odd.log_suppressed, u64::from(times));
    // Four a second on the one CPU it ran on; a run that is disturbed may be moved to another, or take seconds.
    let most = 4 * (took.as_secs() + 2) * 2;
    assert!((1..=most).contains(&odd.log_lines), "{} lines", odd.log_lines);
    // They reach this process's log, and so does how many were held back.
    let line =
        "a leaving packet of 1234 bytes not parsed, passed as it is: its IPv4 header contradicts itself";
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let text = log.text();
        if text.contains(line) && text.contains("more lines held back by the programs' own budget") {
            let lines = text.matches(line).count() as u64;
            assert!(lines <= odd.log_lines, "{lines} lines shown of {}", odd.log_lines);
            return Ok(());
        }
        assert!(Instant::now() < until, "not in the log: {text}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The shortest packet that the kernel runs a program on: an Ethernet header and a byte.
const SHORTEST: usize = 15;

/// A small xorshift: the packets need to be varied and repeatable.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Registered flows' packets, cut, mutated, grown, or bytes out of nowhere.
fn hostile(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = match rng.below(8) {
        0 => (0..SHORTEST + rng.below(200)).map(|_| rng.next() as u8).collect(),
        1 => {
            let mut packet: Vec<u8> = (0..SHORTEST + rng.below(200)).map(|_| rng.next() as u8).collect();
            let kind = [ETH_IPV4, ETH_IPV6, ETH_VLAN, ETH_QINQ][rng.below(4)];
            packet[12..14].copy_from_slice(&kind.to_be_bytes());
            packet
        }
        _ => seeds[rng.below(seeds.len())].clone(),
    };
    for _ in 0..rng.below(4) {
        let at = rng.below(packet.len());
        match rng.below(3) {
            0 => packet[at] ^= 1 << rng.below(8),
            1 => packet[at] = rng.next() as u8,
            // Headers are where it hurts.
            _ => {
                let at = at.min(12 + rng.below(60));
                packet[at] = [0, 1, 4, 6, 17, 43, 44, 60, 0x40, 0x45, 0x60, 0xff][rng.below(12)];
            }
        }
    }
    if rng.below(3) == 0 {
        packet.truncate(SHORTEST + rng.below(packet.len() + 1 - SHORTEST));
    }
    packet
}

/// Newer kernels run no program on a packet that ends inside its IP header. Behind a VLAN tag they do.
fn not_run(packet: &[u8]) -> bool {
    let least = match [packet[12], packet[13]].map(u16::from) {
        [0x08, 0x00] => 14 + 20,
        [0x86, 0xdd] => 14 + 40,
        _ => 0,
    };
    packet.len() < least
}

#[test]
fn no_packet_but_a_registered_flows_ever_comes_back_changed() -> Result<()> {
    let Some(trial) = with_flows(FlowClass::Bulk)? else { return Ok(()) };
    let marking = Marking { dscp: Some(0x2a), priority: Some(5), mark: Some(6) };
    trial.set_policy(&only(FlowClass::Bulk, marking))?;
    let mut seeds = Vec::new();
    let other = ("10.0.0.1:1000", "10.0.0.2:2001");
    for pair in [V4, V6, other] {
        for proto in [PROTO_TCP, PROTO_UDP] {
            for tags in [&[][..], &[ETH_VLAN], &[ETH_QINQ, ETH_VLAN]] {
                seeds.push(frame(tags, ends(pair)?, proto, 0x01, 8, &[0, 1]));
                seeds.push(frame(tags, ends(pair)?, proto, 0x01, 0, &[]));
            }
        }
    }
    let is_ours = |key: &FlowKey| -> Result<bool> {
        let proto = [PROTO_TCP, PROTO_UDP].iter().any(|proto| key.proto == u32::from(*proto));
        let ports = (key.local_port, key.remote_port) == (1000, 2000);
        let address = |text: &str| -> Result<[u8; 16]> {
            Ok(match text.parse::<SocketAddr>()?.ip() {
                std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                std::net::IpAddr::V6(v6) => v6.octets(),
            })
        };
        let mut known = false;
        for (local, remote) in [V4, V6] {
            known |= key.local_addr == address(local)? && key.remote_addr == address(remote)?;
        }
        Ok(proto && ports && known)
    };
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let (mut changed, mut unparsed, mut refused, tried) = (0, 0, 0, 30_000);
    for n in 0..tried {
        let packet = hostile(&mut rng, &seeds);
        if not_run(&packet) {
            refused += 1;
            continue;
        }
        let ran = trial.run(Trialled::Egress, &packet)?;
        assert_eq!(ran.verdict, NEXT);
        let mut key = FlowKey::default();
        let verdict = parse(&packet.as_slice(), Direction::Egress, &mut key);
        unparsed += u32::from(matches!(verdict, Verdict::Unparsed(_)));
        let found = match verdict {
            Verdict::Flow(found) if is_ours(&key)? => found,
            _ => {
                assert_eq!((&ran.packet, ran.priority, ran.mark), (&packet, 0, 0), "packet {n} was changed");
                continue;
            }
        };
        changed += 1;
        assert_eq!((ran.priority, ran.mark, ran.packet.len()), (5, 6, packet.len()), "packet {n}");
        // Only the six bits of the DSCP, and the checksum of IPv4, may differ.
        let at = found.network as usize;
        for (place, (before, after)) in packet.iter().zip(&ran.packet).enumerate() {
            let may = match (place.wrapping_sub(at), found.v6) {
                (1, false) => 0xfc,
                (10 | 11, false) => 0xff,
                (0, true) => 0x0f,
                (1, true) => 0xc0,
                _ => 0,
            };
            assert_eq!((before ^ after) & !may, 0, "packet {n}, byte {place}");
        }
        let dscp = match found.v6 {
            false => ran.packet[at + 1] >> 2,
            true => ran.packet[at] << 2 & 0x3f | ran.packet[at + 1] >> 6,
        };
        assert_eq!(dscp, 0x2a, "packet {n}");
        // What arrives is never changed, whoever's it is.
        let ran = trial.run(Trialled::Ingress, &packet)?;
        assert_eq!((&ran.packet, ran.priority, ran.mark), (&packet, 0, 0), "packet {n} arriving");
    }
    println!(
        "{tried} packets: {changed} of registered flows, {unparsed} unparsed, {refused} not run by the kernel"
    );
    assert!(changed > tried / 20 && unparsed > tried / 20, "{changed} flows, {unparsed} unparsed of {tried}");
    assert_eq!(trial.counters()?.unparsed(Direction::Egress).packets, u64::from(unparsed));
    Ok(())
}

#[test]
fn a_policy_is_swapped_whole_while_packets_pass() -> Result<()> {
    let Some(trial) = with_flows(FlowClass::Bulk)? else { return Ok(()) };
    // In each policy all three tags say the same number, and the prefix moves the flow to the scope that has it.
    let policy = |number: u8| -> Result<(TagPolicy, [Marking; 8])> {
        let value = u32::from(number);
        let marking = Marking { dscp: Some(number), priority: Some(value), mark: Some(value) };
        // 99 would show a scope that belongs to the other policy.
        let wrong = Marking { mark: Some(99), ..marking };
        let inside = number.is_multiple_of(2);
        let mut core = only(FlowClass::Bulk, if inside { wrong } else { marking });
        core.rack_prefixes =
            if inside { vec![("10.0.0.0".parse()?, 8)] } else { vec![("11.0.0.0".parse()?, 8)] };
        Ok((core, only(FlowClass::Bulk, if inside { marking } else { wrong }).classes))
    };
    let put = |number| -> Result<()> {
        let (core, rack) = policy(number)?;
        Ok(trial.set_policy_by_scope(&core, &rack)?)
    };
    put(1)?;
    let packet = frame(&[], ends(V4)?, PROTO_TCP, 0, 0, &[]);
    let stop = AtomicBool::new(false);
    let seen = thread::scope(|scope| -> Result<Vec<u64>> {
        let running = scope.spawn(|| -> Result<Vec<u64>> {
            let mut seen = vec![0; 64];
            while !stop.load(Ordering::Relaxed) {
                let ran = trial.run(Trialled::Egress, &packet)?;
                let dscp = ran.packet[15] >> 2;
                let number = u32::from(dscp);
                assert_eq!((ran.priority, ran.mark), (number, number), "half of one policy, half of another");
                seen[usize::from(dscp)] += 1;
            }
            Ok(seen)
        });
        let mut result = Ok(());
        for n in 0..200_u8 {
            if result.is_ok() {
                result = put(1 + n % 8);
            }
        }
        stop.store(true, Ordering::Relaxed);
        let seen = running.join().map_err(|_| "a packet saw half a policy")?;
        result.and(seen)
    })?;
    let policies = seen.iter().filter(|n| **n > 0).count();
    println!("{} packets saw {policies} policies whole", seen.iter().sum::<u64>());
    assert!(policies >= 4, "{seen:?}");
    // A policy that is refused leaves the one before in force.
    let bad = TagPolicy { rack_prefixes: vec![("10.0.0.0".parse()?, 40)], ..TagPolicy::default() };
    assert!(trial.set_policy(&bad).is_err());
    assert_ne!(trial.run(Trialled::Egress, &packet)?.mark, 0);
    Ok(())
}
