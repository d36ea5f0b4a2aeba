//! Frames built by hand, cut at every byte, and with bytes that lie.

use super::{ETH_IPV4, ETH_IPV6, Found, Packet, Unparsed, Verdict, common_ipv4, common_ipv6, mapped, parse};
use crate::{Direction, FlowKey, PROTO_TCP, PROTO_UDP};

const LOCAL: [u8; 4] = [10, 0, 0, 1];
const REMOTE: [u8; 4] = [10, 0, 0, 2];

fn ethernet(tags: &[u16], kind: u16) -> Vec<u8> {
    let mut frame = vec![0x02; 12];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(kind.to_be_bytes());
    frame
}

fn ipv4(proto: u8, options: usize) -> Vec<u8> {
    let mut ip = vec![0; 20 + options];
    ip[0] = 0x40 | u8::try_from(ip.len() / 4).unwrap();
    ip[9] = proto;
    ip[12..16].copy_from_slice(&LOCAL);
    ip[16..20].copy_from_slice(&REMOTE);
    ip
}

fn ipv6(next: u8) -> Vec<u8> {
    let mut ip = vec![0; 40];
    ip[0] = 0x60;
    ip[6] = next;
    ip[8..24].copy_from_slice(&[0xaa; 16]);
    ip[24..40].copy_from_slice(&[0xbb; 16]);
    ip
}

fn tcp(options: usize) -> Vec<u8> {
    let mut tcp = vec![0; 20 + options];
    tcp[0..4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    tcp[12] = u8::try_from(tcp.len() / 4).unwrap() << 4;
    tcp
}

fn udp() -> Vec<u8> {
    vec![0x12, 0x34, 0x56, 0x78, 0, 8, 0, 0]
}

fn run(parts: &[Vec<u8>], direction: Direction) -> (Verdict, FlowKey) {
    let frame = parts.concat();
    let mut key = FlowKey { proto: 99, ..FlowKey::default() };
    (parse(&frame.as_slice(), direction, &mut key), key)
}

fn flow(direction: Direction, addresses: ([u8; 16], [u8; 16]), proto: u8) -> FlowKey {
    let (source, destination) = addresses;
    let (sport, dport) = (0x1234, 0x5678);
    let proto = u32::from(proto);
    match direction {
        Direction::Egress => FlowKey {
            local_addr: source,
            remote_addr: destination,
            local_port: sport,
            remote_port: dport,
            proto,
        },
        Direction::Ingress => FlowKey {
            local_addr: destination,
            remote_addr: source,
            local_port: dport,
            remote_port: sport,
            proto,
        },
    }
}

#[test]
fn ipv4_flows_are_found_behind_tags_and_options() {
    let ends = (mapped(LOCAL), mapped(REMOTE));
    for direction in [Direction::Egress, Direction::Ingress] {
        for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
            for options in [0, 4, 40] {
                let network = u32::try_from(14 + 4 * tags.len()).unwrap();
                let headers = network + 20 + u32::try_from(options).unwrap();
                let start = [ethernet(tags, 0x0800), ipv4(PROTO_TCP, options), tcp(12), vec![0; 100]];
                let (verdict, key) = run(&start, direction);
                assert_eq!(verdict, Verdict::Flow(Found { network, v6: false, headers: headers + 32 }));
                assert_eq!(key, flow(direction, ends, PROTO_TCP));
                let start = [ethernet(tags, 0x0800), ipv4(PROTO_UDP, options), udp()];
                let (verdict, key) = run(&start, direction);
                assert_eq!(verdict, Verdict::Flow(Found { network, v6: false, headers: headers + 8 }));
                assert_eq!(key, flow(direction, ends, PROTO_UDP));
            }
        }
    }
}

#[test]
fn ipv6_flows_are_found_behind_extensions() {
    let ends = ([0xaa; 16], [0xbb; 16]);
    let plain = [ethernet(&[], 0x86dd), ipv6(PROTO_TCP), tcp(0)];
    let (verdict, key) = run(&plain, Direction::Ingress);
    assert_eq!(verdict, Verdict::Flow(Found { network: 14, v6: true, headers: 14 + 40 + 20 }));
    assert_eq!(key, flow(Direction::Ingress, ends, PROTO_TCP));
    // Hop-by-hop of 8 bytes, destination options of 16, then UDP.
    let extended = [
        ethernet(&[0x8100], 0x86dd),
        ipv6(0),
        vec![60, 0, 0, 0, 0, 0, 0, 0],
        {
            let mut options = vec![0; 16];
            options[0..2].copy_from_slice(&[PROTO_UDP, 1]);
            options
        },
        udp(),
    ];
    let (verdict, key) = run(&extended, Direction::Egress);
    assert_eq!(verdict, Verdict::Flow(Found { network: 18, v6: true, headers: 18 + 40 + 8 + 16 + 8 }));
    assert_eq!(key, flow(Direction::Egress, ends, PROTO_UDP));
    // A chain that is longer than the parser follows is no flow, and ends.
    let endless = [ethernet(&[], 0x86dd), ipv6(0), vec![0; 8 * 64]];
    assert_eq!(run(&endless, Direction::Egress).0, Verdict::NoPorts);
}

#[test]
fn what_has_no_ports_is_no_flow() {
    let not_ip = |parts: &[Vec<u8>]| assert_eq!(run(parts, Direction::Egress).0, Verdict::NotIp);
    not_ip(&[ethernet(&[], 0x0806), vec![0; 28]]);
    not_ip(&[ethernet(&[0x8100, 0x8100, 0x8100], 0x0800), ipv4(PROTO_TCP, 0), tcp(0)]);
    // Its addresses are known all the same: they tell the scope.
    let no_flow = |parts: &[Vec<u8>]| {
        let (verdict, key) = run(parts, Direction::Egress);
        assert_eq!(verdict, Verdict::NoPorts);
        assert!(key.remote_addr == mapped(REMOTE) || key.remote_addr == [0xbb; 16]);
    };
    no_flow(&[ethernet(&[], 0x0800), ipv4(1, 0), vec![0; 8]]);
    no_flow(&[ethernet(&[], 0x86dd), ipv6(58), vec![0; 8]]);
    no_flow(&[ethernet(&[], 0x86dd), ipv6(44), vec![0; 8], tcp(0)]);
    for (byte, value) in [(6, 0x20), (6, 0x01), (7, 0x01)] {
        let mut fragment = ipv4(PROTO_TCP, 0);
        fragment[byte] = value;
        no_flow(&[ethernet(&[], 0x0800), fragment, tcp(0)]);
    }
    // "Do not fragment" makes no fragment.
    let mut whole = ipv4(PROTO_TCP, 0);
    whole[6] = 0x40;
    assert!(matches!(run(&[ethernet(&[], 0x0800), whole, tcp(0)], Direction::Egress).0, Verdict::Flow(_)));
}

#[test]
fn headers_that_contradict_themselves_are_unparsed() {
    let unparsed = |ip: Vec<u8>, kind, l4: Vec<u8>, why| {
        assert_eq!(run(&[ethernet(&[], kind), ip, l4], Direction::Egress).0, Verdict::Unparsed(why));
    };
    for first in [0x44, 0x55, 0x00, 0x65] {
        let mut ip = ipv4(PROTO_TCP, 0);
        ip[0] = first;
        unparsed(ip, 0x0800, tcp(0), Unparsed::BadIpv4);
    }
    unparsed(ipv4(PROTO_TCP, 0), 0x86dd, vec![0; 60], Unparsed::BadIpv6);
    unparsed(ipv6(PROTO_TCP), 0x0800, tcp(0), Unparsed::BadIpv4);
    let mut short = tcp(0);
    short[12] = 0x40;
    unparsed(ipv4(PROTO_TCP, 0), 0x0800, short, Unparsed::BadTcp);
}

#[test]
fn a_packet_that_says_it_ends_inside_its_headers_is_unparsed() {
    let frame =
        |network: [Vec<u8>; 2], l4: Vec<u8>| [&[ethernet(&[], ETH_IPV4)], &network[..], &[l4]].concat();
    // IPv4 with options and TCP with options: 24 + 32 bytes, and payload behind them.
    for (total, verdict) in [
        (0, None),
        (24 + 32, None),
        (24 + 31, Some(Unparsed::BadIpv4)),
        (20, Some(Unparsed::BadIpv4)),
        (1, Some(Unparsed::BadIpv4)),
    ] {
        let mut ip = ipv4(PROTO_TCP, 4);
        ip[2..4].copy_from_slice(&u16::to_be_bytes(total));
        let (found, _) = run(&frame([ip, vec![]], [tcp(12), vec![0; 9]].concat()), Direction::Egress);
        match verdict {
            None => assert!(matches!(found, Verdict::Flow(_)), "{total}: {found:?}"),
            Some(why) => assert_eq!(found, Verdict::Unparsed(why), "{total}"),
        }
    }
    for (payload, fits) in [(0, true), (8, true), (7, false)] {
        let mut ip = ipv6(PROTO_UDP);
        ip[4..6].copy_from_slice(&u16::to_be_bytes(payload));
        let (found, _) = run(&[ethernet(&[], ETH_IPV6), ip, udp()], Direction::Egress);
        assert_eq!(matches!(found, Verdict::Flow(_)), fits, "{payload}: {found:?}");
        assert!(fits || found == Verdict::Unparsed(Unparsed::BadIpv6));
    }
    // Options that are announced and not there.
    let mut short = tcp(12);
    short.truncate(24);
    let (found, _) = run(&[ethernet(&[], ETH_IPV4), ipv4(PROTO_TCP, 0), short], Direction::Egress);
    assert_eq!(found, Verdict::Unparsed(Unparsed::CutShort));
}

#[test]
fn a_packet_cut_at_any_byte_is_never_a_flow() {
    let frames = [
        [ethernet(&[0x88a8, 0x8100], 0x0800), ipv4(PROTO_TCP, 8), tcp(0)].concat(),
        [ethernet(&[], 0x0800), ipv4(PROTO_UDP, 0), udp()].concat(),
        [ethernet(&[], 0x86dd), ipv6(43), vec![PROTO_TCP, 0, 0, 0, 0, 0, 0, 0], tcp(0)].concat(),
    ];
    for frame in frames {
        let mut key = FlowKey::default();
        assert!(matches!(parse(&frame.as_slice(), Direction::Egress, &mut key), Verdict::Flow(_)));
        for end in 0..frame.len() {
            let verdict = parse(&&frame[..end], Direction::Egress, &mut key);
            assert_eq!(verdict, Verdict::Unparsed(Unparsed::CutShort), "cut at {end} of {}", frame.len());
        }
    }
}

#[test]
fn any_bytes_give_a_verdict_within_the_packet() {
    // A small xorshift: the frames need to be varied, not random.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let kinds = [0x0800_u16, 0x86dd, 0x8100, 0x88a8];
    let (mut flows, mut common) = (0, 0);
    for _ in 0..200_000 {
        let mut frame: Vec<u8> = (0..16).flat_map(|_| next().to_le_bytes()).collect();
        frame[12..14].copy_from_slice(&kinds[next() as usize % kinds.len()].to_be_bytes());
        if next() % 2 == 0 {
            // Often enough a sound first byte and protocol to get further in.
            frame[14] = if frame[12] == 8 { 0x45 } else { 0x60 };
            (frame[20], frame[21]) = (if frame[12] == 8 { 0 } else { PROTO_TCP }, 0);
            frame[23] = if next() % 2 == 0 { PROTO_TCP } else { PROTO_UDP };
        }
        frame.truncate(next() as usize % 129);
        common_says_the_same(&frame, &mut common);
        let mut key = FlowKey::default();
        if let Verdict::Flow(Found { headers, .. }) = parse(&frame.as_slice(), Direction::Ingress, &mut key) {
            flows += 1;
            assert!(key.proto == u32::from(PROTO_TCP) || key.proto == u32::from(PROTO_UDP));
            assert!(headers <= u32::try_from(frame.len()).unwrap());
        }
    }
    assert!(flows > 1000, "only {flows} frames got through to a flow");
    assert!(common > 1000, "only {common} frames had a common shape");
}

/// Where a frame has a common shape, both ways to read it say the same, and fill in the same key.
fn common_says_the_same(frame: &[u8], common: &mut u32) {
    fn words<const N: usize>(frame: &[u8]) -> Option<[u32; N]> {
        let bytes = frame.get(14..14 + 4 * N)?;
        let mut words = [0; N];
        for (word, four) in words.iter_mut().zip(bytes.chunks(4)) {
            *word = u32::from_ne_bytes(four.try_into().unwrap());
        }
        Some(words)
    }
    let Some(kind) = frame.get(12..14) else { return };
    let length = u32::try_from(frame.len()).unwrap();
    for direction in [Direction::Egress, Direction::Ingress] {
        let (mut one, mut other) = (FlowKey::default(), FlowKey::default());
        let said = match u16::from_be_bytes([kind[0], kind[1]]) {
            ETH_IPV4 => words(frame).and_then(|words| common_ipv4(&words, length, direction, &mut one)),
            ETH_IPV6 => words(frame).and_then(|words| common_ipv6(&words, length, direction, &mut one)),
            _ => None,
        };
        let Some(said) = said else { continue };
        *common += 1;
        assert_eq!(said, parse(&frame, direction, &mut other), "{frame:02x?}");
        if !matches!(said, Verdict::Unparsed(_)) {
            assert_eq!(one, other, "{frame:02x?}");
        }
    }
}

#[test]
fn frames_of_common_shape_are_read_both_ways_alike() {
    let mut common = 0;
    for l4 in [tcp(0), tcp(12), [udp(), vec![0; 40]].concat()] {
        for proto in [PROTO_TCP, PROTO_UDP, 1, 58, 44] {
            common_says_the_same(
                &[ethernet(&[], ETH_IPV4), ipv4(proto, 0), l4.clone()].concat(),
                &mut common,
            );
            common_says_the_same(&[ethernet(&[], ETH_IPV6), ipv6(proto), l4.clone()].concat(), &mut common);
        }
    }
    assert_eq!(common, 2 * 2 * 3 * 5, "every one of these frames has a common shape");
}

#[test]
fn reads_beyond_the_end_are_refused() {
    let bytes = [1_u8, 2, 3].as_slice();
    assert_eq!(bytes.bytes::<2>(1), Some([2, 3]));
    assert_eq!(bytes.bytes::<2>(2), None);
    assert_eq!(bytes.bytes::<1>(u32::MAX), None);
}

#[test]
fn a_verdict_survives_its_register() {
    let mut all = vec![Verdict::NoPorts, Verdict::NotIp];
    all.extend(Unparsed::ALL.map(Verdict::Unparsed));
    for v6 in [false, true] {
        for (network, headers) in [(0, 0), (14, 54), (22, 22 + 40 + 4 * 2048 + 60), (0xffff, u32::MAX)] {
            all.push(Verdict::Flow(Found { network, v6, headers }));
        }
    }
    for verdict in all {
        assert_eq!(Verdict::unpack(verdict.pack()), verdict);
    }
}
