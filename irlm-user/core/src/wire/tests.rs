//! The wire, byte by byte: what is written here is what the other rack reads, so golden bytes pin every kind, both
//! sides of every cap are tried, and nothing a peer sends may panic or make us reserve memory beyond the caps.

use super::frame::*;
use super::limits::*;
use super::messages::*;
use super::pages::*;
use super::paging::*;
use crate::account::Tally;
use crate::digest::{DIGEST_LEN, Digest};
use crate::handover::GuestState;
use crate::postcopy::{PageSet, Run};
use crate::ram::{Block, MAX_TOLD, Ram, STRIPES, Sums};
use crate::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageId, VmIx};

// For any values.
mod any;

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}
fn id(bucket: u32, index: u32) -> PageId {
    PageId { bucket, index }
}
fn entry(id: Option<PageId>, d: u8, forward: &[u16]) -> ContentEntry {
    ContentEntry {
        id,
        digest: Digest([d; DIGEST_LEN]),
        forward: forward.iter().map(|h| HostIx(*h)).collect(),
    }
}
fn entries(list: &[ContentEntry]) -> Vec<u8> {
    let mut m = Vec::new();
    encode_entries(list.iter(), &mut m);
    m
}
fn frame(kind: Kind, meta: &[u8], body: &[u8]) -> Vec<u8> {
    [&Header::new(kind, meta.len(), body.len()).encode(), meta, body].concat()
}
/// Bytes written as hex, with `aa*20` for a repeated byte; spaces are for the reader.
fn hex(text: &str) -> Vec<u8> {
    text.split_whitespace()
        .flat_map(|w| {
            let (digits, times) = w.split_once('*').unwrap_or((w, "1"));
            let b: Vec<u8> = (0..digits.len())
                .step_by(2)
                .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
                .collect();
            b.repeat(times.parse().unwrap())
        })
        .collect()
}

/// Pages of the blocks of the VM whose sets of pages travel here.
const SIZES: [u32; 2] = [SPAN_PAGES + 20, 40];

fn set_of(runs: &[(u16, u32, u32)]) -> PageSet {
    let mut set = PageSet::empty(&SIZES);
    for (block, page, count) in runs {
        set.insert_run(Run { addr: at(*block, *page), count: *count });
    }
    set
}
/// A set that travels in one frame.
fn one_frame(set: &PageSet) -> Vec<u8> {
    let frames = encode_set(set);
    assert_eq!(frames.len(), 1);
    frames[0].clone()
}

/// Every decoder on the meta part of a frame of this kind, as a receiver would choose it.
fn decode(kind: Kind, meta: &[u8]) -> Result<(), WireError> {
    match kind {
        Kind::Hello => Hello::decode(meta).map(drop),
        Kind::HelloOk => HelloOk::decode(meta).map(drop),
        Kind::Blocks => Blocks::decode(meta).map(drop),
        Kind::Pages => Records::new(meta).try_for_each(|r| r.map(drop)),
        Kind::Contents | Kind::Voids => decode_entries(kind, meta).map(drop),
        Kind::Need | Kind::Gone => decode_needs(kind, meta).map(drop),
        Kind::Word => Word::decode(meta).map(drop),
        Kind::Waiting | Kind::Taken => decode_number(kind, meta).map(drop),
        Kind::Unkept => decode_slots(meta).map(drop),
        Kind::Switch | Kind::Lacks => decode_set(kind, meta, &mut PageSet::empty(&SIZES)).map(drop),
        Kind::Demand => Demand::decode(meta).map(drop),
        Kind::Hurry | Kind::NotHere => decode_digests(kind, meta).map(drop),
        Kind::Verbatim | Kind::Stopped | Kind::RamEnd | Kind::ReturnPath | Kind::Heartbeat => {
            MetaReader::new(kind, meta).end()
        }
    }
}

/// One frame of each kind at least, with its bytes.
fn golden() -> Vec<(Kind, Vec<u8>, Vec<u8>)> {
    let hello = |purpose| {
        let hello = Hello { pass: [0x77; 32], ..Hello::new("web", &[1; 32], purpose) };
        hello.encode(&[0x99; NONCE_LEN])
    };
    let mut pages = PagesBuilder::default();
    let d = |b| Digest([b; DIGEST_LEN]);
    pages.uniform(at(0, 0), 0);
    pages.uniform(at(0, 1), 0);
    pages.uniform(at(0, 2), 0xff);
    pages.unique(at(0, 10), None);
    pages.unique(at(0, 11), None);
    pages.shared(at(0, 5), id(3, 300), &d(0xaa), Form::Whole);
    pages.reference(at(2, 6), id(3, 300));
    pages.remote(at(2, 7), id(0x8000_0001, 1), &d(0xbb));
    let mut differences = PagesBuilder::default();
    differences.unique(at(0, 0), Some(300));
    differences.unique(at(0, 1), Some(301));
    differences.unique(at(0, 2), Some(303));
    differences.shared(at(0, 3), id(3, 1), &d(0xaa), Form::Kept(7));
    differences.shared(at(0, 4), id(3, 2), &d(0xaa), Form::Less(8));
    differences.named(at(0, 5), &d(0xdd), 301);
    let mut keeps = PagesBuilder::default();
    keeps.keep(300, &d(0xaa));
    keeps.keep(1, &d(0xbb));
    keeps.named(at(0, 5), &d(0xdd), 1);
    let want_digest = NeedEntry { addr: at(1, 2), want: Want::Digest(d(0xcc)) };
    let want_id = NeedEntry { addr: at(1, 3), want: Want::Id(id(4, 5)) };
    let blocks = Blocks {
        section_id: 2,
        footers: true,
        blocks: vec![("pc.ram".to_owned(), 0x4000_0000), ("pc.rom".to_owned(), 0x2_0000)],
    };
    let contents = [entry(Some(id(3, 300)), 0xaa, &[1, 300]), entry(None, 0xbb, &[])];
    let mut scattered = set_of(&[(0, 5, 200), (0, SPAN_PAGES, 3)]);
    (0..=32).step_by(2).for_each(|p| {
        scattered.insert(at(1, p));
    });
    let demand = Demand { urgent: 1, pages: vec![at(1, 2), at(0, 9)] };
    let hello_start = "01000000 40000000 00000000 49524c4d 01 0300 03 776562 77*32 99*16";
    let h = |rest: &str| hex(&format!("{hello_start} {rest}"));
    let mut all = vec![
        (Kind::Hello, hello(Purpose::Vm { source: HostIx(1), vm: VmIx(2) }), h("01 0100 0200")),
        (Kind::Hello, hello(Purpose::Push { source: HostIx(1), domain: 2 }), h("02 0100 0200")),
        (Kind::Hello, hello(Purpose::Peer { target: HostIx(1), domain: 2 }), h("03 0100 0200")),
        (Kind::Hello, hello(Purpose::Settle { source: HostIx(1), vm: VmIx(2) }), h("04 0100 0200")),
        (Kind::Hello, hello(Purpose::Demand { source: HostIx(1), vm: VmIx(2) }), h("05 0100 0200")),
        (Kind::Hello, hello(Purpose::Direct { source: HostIx(1), vm: VmIx(2) }), h("06 0100 0200")),
        (Kind::Hello, hello(Purpose::Stream { source: HostIx(1), vm: VmIx(2) }), h("07 0100 0200")),
        (Kind::Hello, hello(Purpose::Probe { source: HostIx(1) }), h("08 0100 0000")),
        (Kind::Hello, hello(Purpose::Lend { source: HostIx(1), domain: 2 }), h("09 0100 0200")),
        (
            Kind::HelloOk,
            HelloOk { version: 3, window_log: 20, slots: 300 }.encode(&[0x99; NONCE_LEN]),
            hex("02000000 17000000 00000000 0300 14 2c010000 99*16"),
        ),
        (Kind::Verbatim, vec![], hex("03000000 00000000 03000000 5145 56")),
        (
            Kind::Blocks,
            blocks.encode(),
            hex("04000000 24000000 00000000 02000000 01 02 06 70632e72616d 0000004000000000
                 06 70632e726f6d 0000020000000000"),
        ),
        (
            Kind::Pages,
            pages.meta().to_vec(),
            hex("05000000 50000000 03000000 01 0000 02 00 02 00 02 00 01 ff 03 0e 02
                 04 0d 03000000 ac02 aa*20 01 0200 05 0c 03000000 ac02 06 00 01000080 01 bb*20 514556"),
        ),
        (
            Kind::Pages,
            differences.meta().to_vec(),
            hex("05000000 5d000000 03000000 01 0000 13 00 02 ac02 13 00 01 af02 14 00 03000000 01 aa*20 07
                 24 00 03000000 02 aa*20 08 27 00 dd*20 ad02 514556"),
        ),
        (
            Kind::Pages,
            keeps.meta().to_vec(),
            hex("05000000 47000000 03000000 08 aa*20 ac02 08 bb*20 01 01 0000 27 0a dd*20 01 514556"),
        ),
        (
            Kind::Contents,
            entries(&contents),
            hex("06000000 38000000 03000000 02 01 03000000 2c010000 aa*20 02 01 ac02 00 bb*20 00 514556"),
        ),
        (Kind::Voids, entries(&contents[1..]), hex("07000000 17000000 00000000 01 00 bb*20 00")),
        (Kind::Stopped, vec![], hex("08000000 00000000 00000000")),
        (Kind::RamEnd, vec![], hex("09000000 00000000 00000000")),
        (Kind::ReturnPath, vec![], hex("0a000000 00000000 03000000 514556")),
        (
            Kind::Need,
            encode_needs(&[want_digest, want_id]),
            hex("0b000000 2b000000 00000000 02 0100 02000000 00 cc*20 0100 03000000 01 04000000 05000000"),
        ),
        (
            Kind::Gone,
            encode_needs(&[want_id]),
            hex("0c000000 10000000 00000000 01 0100 03000000 01 04000000 05000000"),
        ),
        (Kind::Heartbeat, vec![], hex("0e000000 00000000 00000000")),
        (Kind::Waiting, encode_number(258), hex("0f000000 04000000 00000000 02010000")),
        (
            Kind::Switch,
            one_frame(&scattered),
            hex("10000000 27000000 00000000 01 03 0000 00000000 8040 00 01 05 c801
                 0000 00200000 14 00 01 00 03 0100 00000000 28 01 5555555501"),
        ),
        (Kind::Demand, demand.encode(), hex("11000000 0e000000 00000000 01 02 0100 02000000 0000 09000000")),
        (Kind::Lacks, one_frame(&set_of(&[])), hex("12000000 02000000 00000000 01 00")),
        (Kind::Hurry, encode_digests(&[d(0xaa), d(0xbb)]), hex("13000000 29000000 00000000 02 aa*20 bb*20")),
        (Kind::NotHere, encode_digests(&[d(0xcc)]), hex("14000000 15000000 00000000 01 cc*20")),
        (Kind::Taken, encode_number(259), hex("15000000 04000000 00000000 03010000")),
        (Kind::Unkept, encode_slots(&[7, 300]), hex("16000000 04000000 00000000 02 07 ac02")),
    ];
    all.extend(golden_words());
    all
}

/// Each word, with its bytes.
fn golden_words() -> Vec<(Kind, Vec<u8>, Vec<u8>)> {
    let tally = Some(Tally { sum: 0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f, pages: 258 });
    let mut sums = [Sums::default(); STRIPES];
    sums[0] = Sums { marks: 5, placed: 10 };
    sums[STRIPES - 1].marks = 0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f;
    let m0 = Block { name: "m0".to_owned(), pages: 1 << 14, sums };
    let memory = Ram { blocks: vec![m0], unread: 7, took_ms: 300 };
    vec![
        (Kind::Word, Word::Loaded(None).encode(), hex("0d000000 02000000 00000000 01 00")),
        (
            Kind::Word,
            Word::Loaded(tally).encode(),
            hex("0d000000 1a000000 00000000 01 01 0f0e0d0c0b0a09080706050403020100 0201000000000000"),
        ),
        (
            Kind::Word,
            Word::GivenUp(GuestState::Paused, None).encode(),
            hex("0d000000 03000000 00000000 02 01 00"),
        ),
        (
            Kind::Word,
            Word::GivenUp(GuestState::Running, tally).encode(),
            hex("0d000000 1b000000 00000000 02 00 01 0f0e0d0c0b0a09080706050403020100 0201000000000000"),
        ),
        (Kind::Word, Word::Runs.encode(), hex("0d000000 01000000 00000000 03")),
        (Kind::Word, Word::Aborted("no".to_owned()).encode(), hex("0d000000 04000000 00000000 04 02 6e6f")),
        (Kind::Word, Word::Discarded.encode(), hex("0d000000 01000000 00000000 05")),
        (Kind::Word, Word::Ready(None).encode(), hex("0d000000 02000000 00000000 06 00")),
        (Kind::Word, Word::Filled.encode(), hex("0d000000 01000000 00000000 07")),
        (Kind::Word, Word::PagesLost.encode(), hex("0d000000 01000000 00000000 08")),
        (Kind::Word, Word::Refused("no".to_owned()).encode(), hex("0d000000 04000000 00000000 09 02 6e6f")),
        (Kind::Word, Word::Gone.encode(), hex("0d000000 01000000 00000000 0a")),
        (Kind::Word, Word::Lost("no".to_owned()).encode(), hex("0d000000 04000000 00000000 0b 02 6e6f")),
        (
            Kind::Word,
            Word::Memory(memory).encode(),
            hex("0d000000 15020000 00000000 0c 0700000000000000 2c010000 01 02 6d30 00400000
                 05000000000000000000000000000000 0a000000000000000000000000000000 00*448
                 0f0e0d0c0b0a09080706050403020100 00*16"),
        ),
    ]
}

#[test]
fn golden_bytes_of_every_kind() {
    let list = golden();
    for kind in Kind::ALL {
        assert!(list.iter().any(|(k, ..)| k == kind), "{kind:?} has no golden bytes");
    }
    for (kind, meta, bytes) in list {
        let body: &[u8] = if kind.has_body() { b"QEV" } else { b"" };
        let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&frame(kind, &meta, body)), hex(&bytes), "{kind:?}");
        let head = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!((head.kind, head.payload_len()), (kind, bytes.len() - HEADER_LEN));
        assert_eq!(decode(kind, &meta), Ok(()), "{kind:?}");
    }
}

#[test]
fn every_truncation_of_every_kind_is_an_error() {
    for (kind, meta, _) in golden() {
        for n in 0..meta.len() {
            let got = decode(kind, &meta[..n]);
            // A list of records has no count: it may end between two of them, and announces fewer contents then.
            if kind != Kind::Pages {
                assert!(got.is_err(), "{kind:?} cut at {n}");
            }
        }
        if kind != Kind::Pages {
            let longer = [&meta[..], &[0]].concat();
            assert!(decode(kind, &longer).is_err(), "{kind:?} with a byte too many");
        }
    }
}

#[test]
fn a_header_is_refused_for_each_of_its_bytes() {
    let good = Header::new(Kind::Pages, 1, 2).encode();
    let with = |i: usize, v: u8| {
        let mut b = good;
        b[i] = v;
        Header::decode(&b)
    };
    assert_eq!(with(0, 0), Err(WireError::UnknownKind(0)));
    let next = Kind::ALL.len() as u8 + 1;
    assert_eq!(with(0, next), Err(WireError::UnknownKind(next)));
    for kind in Kind::ALL {
        for codec in 0..=255 {
            let body = u8::from(kind.has_body());
            let h = Header::new(*kind, 1, body.into()).coded(codec);
            let contents = matches!(kind, Kind::Pages | Kind::Contents);
            let unknown = Err(WireError::UnknownCodec { kind: *kind, codec });
            assert_eq!(
                Header::decode(&h.encode()),
                if codec == 0 || contents && codec <= 3 { Ok(h) } else { unknown }
            );
        }
    }
    for i in [2, 3] {
        assert_eq!(with(i, 1), Err(WireError::Bad { kind: Kind::Pages, what: "reserved bytes" }));
    }
    for tag in 0..=255 {
        let known = Kind::from_tag(tag);
        assert_eq!(known.is_ok(), (1..next).contains(&tag));
        assert!(known.is_err() || known.is_ok_and(|k| k as u8 == tag));
    }
}

#[test]
fn both_sides_of_the_header_caps() {
    for kind in Kind::ALL {
        let body_cap = if kind.has_body() { MAX_BODY } else { 0 };
        let raw = |meta: usize, body: usize| {
            let mut b = [0; HEADER_LEN];
            b[0] = *kind as u8;
            b[4..8].copy_from_slice(&(meta as u32).to_le_bytes());
            b[8..].copy_from_slice(&(body as u32).to_le_bytes());
            Header::decode(&b)
        };
        assert!(raw(MAX_META, body_cap).is_ok());
        let too = |what, len: usize, cap: usize| {
            Err(WireError::TooLong { kind: *kind, what, len: len as u64, cap: cap as u64 })
        };
        assert_eq!(raw(MAX_META + 1, 0), too("meta", MAX_META + 1, MAX_META));
        assert_eq!(raw(0, body_cap + 1), too("body", body_cap + 1, body_cap));
        assert_eq!(raw(0, u32::MAX as usize), too("body", u32::MAX as usize, body_cap));
    }
    assert_eq!(MAX_BODY, MAX_FRAME_PAGES * PAGE_SIZE);
}

/// Whether a decode failed for being above a cap (and not for any other reason).
fn too_long<T: std::fmt::Debug>(r: Result<T, WireError>) -> bool {
    match r {
        Ok(_) => false,
        Err(WireError::TooLong { .. }) => true,
        Err(e) => panic!("neither fine nor too long: {e}"),
    }
}

#[test]
fn both_sides_of_the_message_caps() {
    let vm = Purpose::Vm { source: HostIx(0), vm: VmIx(0) };
    for (n, over) in [(MAX_VERSIONS, false), (MAX_VERSIONS + 1, true)] {
        let mut h = Hello::new("g", &[0; 32], vm);
        h.versions = vec![1; n];
        assert_eq!(too_long(Hello::decode(&h.encode(&[0; NONCE_LEN]))), over);
    }
    for (n, over) in [(MAX_GROUP_NAME, false), (MAX_GROUP_NAME + 1, true)] {
        assert_eq!(
            too_long(Hello::decode(&Hello::new(&"g".repeat(n), &[0; 32], vm).encode(&[0; NONCE_LEN]))),
            over
        );
    }
    for (n, over) in [(MAX_BLOCKS, false), (MAX_BLOCKS + 1, true)] {
        let b = Blocks { section_id: 2, footers: false, blocks: vec![(String::new(), 0); n] };
        assert_eq!(too_long(Blocks::decode(&b.encode())), over);
    }
    for (n, over) in [(MAX_BLOCK_NAME, false), (MAX_BLOCK_NAME + 1, true)] {
        let b = Blocks { section_id: 2, footers: false, blocks: vec![("b".repeat(n), 0)] };
        assert_eq!(too_long(Blocks::decode(&b.encode())), over);
    }
    for (n, over) in [(MAX_FRAME_PAGES, false), (MAX_FRAME_PAGES + 1, true)] {
        let m = entries(&vec![entry(None, 1, &[]); n]);
        assert_eq!(too_long(decode_entries(Kind::Contents, &m)), over);
    }
    for (n, over) in [(MAX_FORWARD, false), (MAX_FORWARD + 1, true)] {
        let m = entries(&[entry(None, 1, &vec![65535; n])]);
        assert_eq!(too_long(decode_entries(Kind::Voids, &m)), over);
    }
    for (n, over) in [(MAX_NEEDS, false), (MAX_NEEDS + 1, true)] {
        let m = encode_needs(&vec![NeedEntry { addr: at(0, 0), want: Want::Digest(Digest([0; 20])) }; n]);
        assert!(m.len() <= MAX_META, "a full Need fits a frame");
        for kind in [Kind::Need, Kind::Gone] {
            assert_eq!(too_long(decode_needs(kind, &m)), over);
        }
    }
    for (n, over) in [(MAX_UNKEPT, false), (MAX_UNKEPT + 1, true)] {
        let m = encode_slots(&vec![u32::MAX; n]);
        assert!(m.len() <= MAX_META, "a full Unkept fits a frame");
        assert_eq!(too_long(decode_slots(&m)), over);
    }
    // A reason is cut to its cap at a character's edge when it is said, and refused above it when it is heard.
    let said = Word::Aborted(format!("{}ä", "x".repeat(MAX_REASON - 1))).encode();
    assert_eq!(Word::decode(&said), Ok(Word::Aborted("x".repeat(MAX_REASON - 1))));
    for (n, over) in [(MAX_REASON, false), (MAX_REASON + 1, true)] {
        let mut m = vec![4];
        put_string(&mut m, &"x".repeat(n));
        assert_eq!(too_long(Word::decode(&m)), over);
    }
    // Of more blocks than may be told the first are.
    let block = Block { name: "x".repeat(MAX_BLOCK_NAME), pages: u32::MAX, sums: [Sums::default(); STRIPES] };
    let ram = |n| Ram { blocks: vec![block.clone(); n], unread: 1, took_ms: 2 };
    let most = Word::Memory(ram(MAX_TOLD)).encode();
    assert!(most.len() <= MAX_META, "the memory of many blocks fits a frame");
    assert_eq!(Word::decode(&Word::Memory(ram(MAX_TOLD + 9)).encode()), Ok(Word::Memory(ram(MAX_TOLD))));
    let mut m = [&[12][..], &[0; 12]].concat();
    put_varint(&mut m, MAX_TOLD as u32 + 1);
    assert!(too_long(Word::decode(&m)));
    assert_eq!(
        Word::decode(&Word::Aborted("a\u{1b}[2J\nb".to_owned()).encode()),
        Ok(Word::Aborted("a [2J b".to_owned()))
    );
}

fn bad(what: &'static str) -> Result<Vec<Record>, WireError> {
    Err(WireError::Bad { kind: Kind::Pages, what })
}
fn records(meta: &[u8]) -> Result<Vec<Record>, WireError> {
    Records::new(meta).collect()
}

#[test]
fn both_sides_of_the_page_record_caps() {
    let filled = |tag: u8, page: u32, count: u32, fill: u8| {
        let mut m = vec![1, 0, 0, tag];
        // Zigzag of the distance from page 0.
        put_varint(&mut m, page.cast_signed().wrapping_shl(1).cast_unsigned() ^ (page >> 31).wrapping_neg());
        put_varint(&mut m, count);
        if tag == 2 {
            m.push(fill);
        }
        records(&m)
    };
    let run = |tag: u8, page: u32, count: u32| filled(tag, page, count, 0);
    let uniform = |count, fill| Ok(vec![Record::Uniform { addr: at(0, 0), count, fill }]);
    assert_eq!(run(2, 0, MAX_UNIFORM), uniform(MAX_UNIFORM, 0));
    assert_eq!(filled(2, 0, MAX_FILLED, 7), uniform(MAX_FILLED, 7));
    let uniforms = bad("number of uniform pages");
    assert_eq!(filled(2, 0, MAX_FILLED + 1, 7), uniforms);
    // Counted over all records of a frame.
    let two = |n: u32, fill: u8| {
        let mut m = vec![1, 0, 0];
        for (count, fill) in [(n, fill), (1, 0)] {
            m.extend([2, 0]);
            put_varint(&mut m, count);
            m.push(fill);
        }
        records(&m).map(drop)
    };
    assert_eq!(two(MAX_UNIFORM - 1, 0), Ok(()));
    assert_eq!(two(MAX_UNIFORM, 0), uniforms.clone().map(drop));
    for (tag, page, count) in
        [(2, 0, MAX_UNIFORM + 1), (2, 0, 0), (3, 0, 0), (3, u32::MAX, 2), (2, u32::MAX - 1, 3)]
    {
        assert_eq!(run(tag, page, count), bad("run length"));
    }
    assert_eq!(run(3, u32::MAX, 1), Ok(vec![Record::Unique { addr: at(0, u32::MAX), count: 1 }]));
    assert!(run(3, 0, MAX_FRAME_PAGES as u32).is_ok());
    let contents = bad("number of contents");
    assert_eq!(run(3, 0, MAX_FRAME_PAGES as u32 + 1), contents);
    // Contents are counted over all records.
    let mut b = PagesBuilder::default();
    for p in 0..=MAX_FRAME_PAGES as u32 {
        assert_eq!(b.is_full(), p as usize == MAX_FRAME_PAGES);
        b.shared(at(0, p), id(0, p), &Digest([0; 20]), Form::Whole);
    }
    assert_eq!(records(b.meta()).map(drop), contents.map(drop));

    for (fill, cap) in [(0, MAX_UNIFORM), (7, MAX_FILLED)] {
        let mut b = PagesBuilder::default();
        for p in 0..cap {
            assert!(!b.is_full());
            b.uniform(at(0, p), fill);
        }
        assert!(b.is_full());
        assert!(records(b.meta()).is_ok());
        b.clear();
        assert!(!b.is_full());
    }

    let blocks = |n: usize| records(&[1, 0, 0].repeat(n));
    assert_eq!(blocks(MAX_RECORDS - 1).map(|r| r.len()), Err(WireError::Short(Kind::Pages)));
    assert_eq!(blocks(MAX_RECORDS + 1), bad("number of records"));
    let zeros = |n: usize| records(&[&[1, 0, 0][..], &[2, 0, 1, 0].repeat(n)].concat());
    assert!(zeros(MAX_RECORDS - 1).is_ok());
    assert_eq!(zeros(MAX_RECORDS), bad("number of records"));
    // Keeps count as any other, outside of any block.
    let keeps = |n: usize| {
        let mut b = PagesBuilder::default();
        (0..n as u32).for_each(|slot| b.keep(slot, &Digest([5; 20])));
        records(b.meta()).map(|r| r.len())
    };
    assert_eq!(keeps(MAX_RECORDS), Ok(MAX_RECORDS));
    assert_eq!(keeps(MAX_RECORDS + 1), bad("number of records").map(|r| r.len()));
}

#[test]
fn records_out_of_any_block_or_of_no_kind_are_refused() {
    assert_eq!(records(&[2, 0, 1, 0]), bad("record before any block"));
    for tag in [0, 7, 9, 0xF, 0x12, 0x15, 0x16, 0x17, 0x18, 0x23, 0x26, 0x28, 0x33, 0x34, 0x37, 0x43, 0x83] {
        assert_eq!(records(&[1, 0, 0, tag, 0]), bad("record tag"), "{tag:#x}");
    }
    let less = |end: &[u8]| records(&[&[1, 0, 0, 0x27, 0][..], &[9; DIGEST_LEN], end].concat()).map(drop);
    assert_eq!(less(&[5]), Ok(()));
    assert_eq!(less(&[]), Err(WireError::Short(Kind::Pages)));
    assert_eq!(
        less(&[0xff, 0xff, 0xff, 0xff, 0x0f]),
        Ok(()),
        "a slot that no receiver has is its sender's loss"
    );
    let kept = |slot: &[u8]| records(&[&[1, 0, 0, 0x13, 0, 2][..], slot].concat()).map(drop);
    assert_eq!(kept(&[0xfd, 0xff, 0xff, 0xff, 0x0f]), Ok(()));
    assert_eq!(kept(&[0xfe, 0xff, 0xff, 0xff, 0x0f]), bad("slot").map(drop));
    let varint = bad("varint");
    assert_eq!(records(&[1, 0, 0, 5, 0xff, 0xff, 0xff, 0xff, 0x1f]), varint);
    assert_eq!(records(&[1, 0, 0, 5, 0x80, 0x80, 0x80, 0x80, 0x80, 0]), varint);
    // After an error nothing more is read.
    let mut r = Records::new(&[7, 7, 7]);
    assert!(r.next().is_some_and(|r| r.is_err()) && r.next().is_none());
}

#[test]
fn a_builder_that_is_not_full_never_overflows_a_frame() {
    for (first, before) in [(0, 1), (1, 2), (0, 3), (1, 4), (0, 4), (1, 3)] {
        let mut b = PagesBuilder::default();
        for p in 0..before {
            b.reference(at(9, p), id(0, 0));
        }
        let mut n = 0u32;
        // The dearest mix: every page in another block than the last, pending runs between single records with a Keep each.
        let mut keeps = 0;
        while !b.is_full() {
            let a = at((n % 2) as u16, n.wrapping_mul(0x9e37_79b9));
            if n % 2 == first {
                b.uniform(a, 1);
            } else {
                b.keep(u32::MAX, &Digest([1; 20]));
                b.reference(a, id(u32::MAX, u32::MAX));
                keeps += 1;
            }
            n += 1;
        }
        assert!(b.meta().len() <= MAX_META);
        assert_eq!(records(b.meta()).map(|r| r.len()), Ok((n + before + keeps) as usize));
    }
}

#[test]
fn the_newest_common_version_wins() {
    let offer = |versions: &[u16]| {
        let mut h = Hello::new("g", &[0; 32], Purpose::Push { source: HostIx(0), domain: 0 });
        h.versions = versions.to_vec();
        Hello::decode(&h.encode(&[0; NONCE_LEN])).unwrap().choose()
    };
    assert!(VERSIONS.is_sorted_by(|a, b| a > b), "newest first");
    assert_eq!(offer(VERSIONS), Ok(VERSIONS[0]));
    assert_eq!(offer(&[9999, VERSIONS[0]]), Ok(VERSIONS[0]), "an unknown newer one is passed over");
    let none =
        |offered: &[u16]| Err(WireError::NoVersion { offered: offered.to_vec(), spoken: VERSIONS.to_vec() });
    assert_eq!(offer(&[9999]), none(&[9999]));
    assert_eq!(offer(&[]), none(&[]));
    for window_log in 0..=255 {
        let ok = HelloOk { version: VERSIONS[0], window_log, slots: 7 };
        let usable = window_log == 0 || (MIN_WINDOW_LOG..=WINDOW_LOG).contains(&window_log);
        assert_eq!(
            HelloOk::decode(&ok.encode(&[0; NONCE_LEN])).ok(),
            usable.then_some(ok),
            "window {window_log}"
        );
    }
    assert!(
        HelloOk::decode(&HelloOk { version: 9999, window_log: 0, slots: 0 }.encode(&[0; NONCE_LEN])).is_err()
    );
}
