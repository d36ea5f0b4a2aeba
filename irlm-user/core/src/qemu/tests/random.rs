//! Random streams, random cuts, random damage.

use super::build::{Build, TAIL, content};
use super::*;
use proptest::prelude::*;

const BLOCKS: &[(&str, u64)] = &[("m0", 0x9000), ("/rom@etc/acpi/tables", 0x3000), ("pc.bios", 0x1000)];

#[derive(Clone, Debug)]
enum Record {
    Page(usize, u64, u64),
    Zero(usize, u64),
    /// Name the block again in the next record.
    Forget,
    /// End the section; with a PING between it and the next one, or not.
    Cut(bool),
}

fn record() -> impl Strategy<Value = Record> {
    let addr = (0..BLOCKS.len()).prop_flat_map(|b| (Just(b), 0..BLOCKS[b].1 >> 12));
    prop_oneof![
        4 => (addr.clone(), any::<u64>()).prop_map(|((b, p), seed)| Record::Page(b, p, seed)),
        4 => addr.prop_map(|(b, p)| Record::Zero(b, p)),
        1 => Just(Record::Forget),
        2 => any::<bool>().prop_map(Record::Cut),
    ]
}

fn build(footers: bool, parts: &[Record], end: &[Record]) -> Vec<u8> {
    let mut b = Build::usual();
    b.footers = footers;
    b.start(BLOCKS).part();
    let write = |b: &mut Build, records: &[Record], cuts: bool| {
        for r in records {
            match r {
                Record::Page(block, page, seed) => b.page(BLOCKS[*block].0, *page, &content(*seed)),
                Record::Zero(block, page) => b.zero(BLOCKS[*block].0, *page),
                Record::Forget => b.forget(),
                Record::Cut(false) if cuts => b.eos().part(),
                Record::Cut(true) if cuts => b.eos().command(2, &[0, 0, 0, 9]).part(),
                Record::Cut(_) => b,
            };
        }
    };
    write(&mut b, parts, true);
    b.eos().end();
    write(&mut b, end, false);
    b.eos().raw(TAIL);
    b.out
}

/// What the target agent does with the events: straight through, closing sections where `close` says so.
pub(super) fn straight(seen: &[Seen], close: &mut impl FnMut() -> bool) -> Vec<u8> {
    let (mut out, mut emitter) = (Vec::new(), None::<Emitter>);
    for event in seen {
        match (event, &mut emitter) {
            (Seen::Verbatim(bytes), emitter) => {
                if let Some(e) = emitter {
                    e.close_section(&mut out);
                }
                out.extend_from_slice(bytes);
            }
            (Seen::Blocks(list), emitter) => *emitter = Some(Emitter::new(Arc::clone(list))),
            (Seen::Page(addr, bytes), Some(e)) => {
                e.page_header(*addr, &mut out).expect("a listed page");
                out.extend_from_slice(bytes);
            }
            (Seen::Zero(addr), Some(e)) => e.zero(*addr, &mut out).expect("a listed page"),
            (Seen::SectionEnd, Some(e)) if close() => e.close_section(&mut out),
            (Seen::RamEnd, Some(e)) => e.end(&mut out),
            _ => {}
        }
    }
    out
}

/// All pages held back, only the newest versions sent, in another order, just before the end.
fn held_back(seen: &[Seen]) -> Vec<u8> {
    let mut newest: Vec<_> = ram(seen).into_iter().collect();
    newest.sort_by_key(|(addr, _)| (addr.page % 2, addr.block, std::cmp::Reverse(addr.page)));
    let mut held: Vec<Seen> = Vec::new();
    for event in seen {
        match event {
            Seen::RamEnd => {
                for (addr, bytes) in newest.drain(..) {
                    held.push(bytes.map_or(Seen::Zero(addr), |bytes| Seen::Page(addr, bytes)));
                }
                held.push(Seen::RamEnd);
            }
            Seen::Page(..) | Seen::Zero(_) => {}
            other => held.push(other.clone()),
        }
    }
    straight(&held, &mut || true)
}

/// Feeds anything at all; the parser may refuse it, but must not panic, stall or hold more than its caps.
fn survive(stream: &[u8], pieces: &[usize]) {
    let (parser, seen, _) = feed(stream, pieces);
    assert!(parser.blocks().is_none_or(|l| l.blocks().len() <= MAX_BLOCKS));
    assert!(parser.machine().is_none_or(|m| m.len() <= MAX_MACHINE_NAME));
    assert!(verbatim(&seen).0.len() <= stream.len());
    let mut rp = RpParser::new();
    let _: Result<usize, RpError> = rp.parse(stream, &mut |m| {
        assert!(m.bytes.len() <= 4 + MAX_RP_PAYLOAD);
        Ok(())
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn parse_emit_parse_keeps_ram_and_all_other_bytes(
        footers: bool,
        parts in proptest::collection::vec(record(), 0..40),
        end in proptest::collection::vec(record(), 0..10),
        pieces in proptest::collection::vec(1usize..9000, 1..20),
        closes in proptest::collection::vec(any::<bool>(), 1..8),
    ) {
        let stream = build(footers, &parts, &end);
        let seen = events(&stream);
        let (_, cut, finish) = feed(&stream, &pieces);
        prop_assert_eq!(finish, Ok(()));
        prop_assert_eq!(&cut, &seen);

        let mut turn = 0;
        let mut close = || {
            turn += 1;
            closes[turn % closes.len()]
        };
        for again in [straight(&seen, &mut close), held_back(&seen)] {
            let again = events(&again);
            prop_assert_eq!(ram(&again), ram(&seen));
            prop_assert_eq!(verbatim(&again), verbatim(&seen));
        }
    }

    #[test]
    fn random_bytes_are_survived(
        bytes in proptest::collection::vec(any::<u8>(), 0..12_000),
        pieces in proptest::collection::vec(1usize..5000, 1..9),
    ) {
        survive(&bytes, &pieces);
    }

    #[test]
    fn damaged_streams_are_survived(
        footers: bool,
        parts in proptest::collection::vec(record(), 0..12),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
        pieces in proptest::collection::vec(1usize..5000, 1..9),
    ) {
        let mut stream = build(footers, &parts, &[]);
        // Page contents are most of the stream and nobody looks at them; half of the damage aims at the front.
        for (n, (at, byte, how)) in damage.into_iter().enumerate() {
            if stream.is_empty() {
                break;
            }
            let at = at.index(if n % 2 == 0 { stream.len().min(160) } else { stream.len() });
            match how {
                0 => stream[at] = byte,
                1 => stream.insert(at, byte),
                2 => { stream.remove(at); }
                _ => stream.truncate(at + 1),
            }
        }
        survive(&stream, &pieces);
    }
}
