//! Byte-exact messages, every message both ways at every split, and what a hostile peer may say.

use super::*;
use crate::digest::Digest;
use crate::index::MAX_HOSTS;
use crate::plan::Carry;
use proptest::prelude::*;

fn bytes(m: &IndexMsg) -> Vec<u8> {
    let mut out = Vec::new();
    m.encode(&mut out).unwrap();
    out
}

fn hosts(h: &[u16]) -> HostSet {
    h.iter().copied().map(HostIx).collect()
}

fn d(n: u8) -> Digest {
    Digest([n; DIGEST_LEN])
}

/// One of each kind.
fn samples() -> Vec<IndexMsg> {
    let (token, group) = (Token([0xaa; 32]), String::from("g"));
    let id = PageId { bucket: 0x0102_0304, index: 5 };
    vec![
        IndexMsg::Hello { versions: vec![1, 2], group: group.clone(), token, host: HostIx(3) },
        IndexMsg::Open { versions: vec![1], group, token, source_hosts: 6, target_hosts: 300 },
        IndexMsg::HelloOk { version: 1 },
        IndexMsg::Register {
            seq: 9,
            batch: vec![
                Registration { digest: d(1), targets: hosts(&[0, 9]), pages: 7 },
                Registration { digest: d(2), targets: hosts(&[1023]), pages: 1 },
            ],
        },
        IndexMsg::Registered { seq: 9, ids: vec![Some(id), None] },
        IndexMsg::RegisterDone { own_unique_pages: 1 << 33 },
        IndexMsg::PlanRequest { wait_ms: 1000 },
        IndexMsg::PlanPart {
            last: true,
            piece: HostPlan {
                carry: vec![Carry { digest: d(3), id, first: HostIx(1), forward: hosts(&[2]) }],
                remote: vec![Remote { digest: d(4), id, carrier: HostIx(4), targets: hosts(&[0]) }],
            },
        },
        IndexMsg::Late { seq: 2, items: vec![LateItem { digest: d(5), target: HostIx(6), kept: true }] },
        IndexMsg::LateReply {
            seq: 2,
            replies: vec![
                LateReply { id: Some(id), delivered: hosts(&[6]) },
                LateReply { id: None, delivered: hosts(&[]) },
            ],
        },
        IndexMsg::PlanNow { missing: hosts(&[1]) },
        IndexMsg::Planned { sources: hosts(&[0, 2]), digests: 3, shared: 2 },
        IndexMsg::Close,
        IndexMsg::Done,
        IndexMsg::Error { code: ErrorCode::NotReady, text: String::from("née") },
        IndexMsg::Sketches {
            domain: 0x0203,
            items: vec![SketchItem {
                digest: d(6),
                target: HostIx(5),
                sketch: Sketch::from_features([1, 0, 3, 0, 0, 0, 0, 0xa1a2_a3a4]),
            }],
        },
        IndexMsg::ModelsRequest { room: 65_536, wait_ms: 2000 },
        IndexMsg::ModelsPart {
            last: true,
            borrows: 7,
            lend: vec![Lend {
                carry: Carry { digest: d(7), id, first: HostIx(1), forward: hosts(&[2]) },
                to: hosts(&[0, 3]),
            }],
        },
    ]
}

#[test]
fn golden_bytes() {
    let hex = |m: &IndexMsg| bytes(m).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let aa = "aa".repeat(32);
    let (d1, d2, d3, d4, d5) =
        ("01".repeat(20), "02".repeat(20), "03".repeat(20), "04".repeat(20), "05".repeat(20));
    let top = format!("80{}80", "00".repeat(127));
    let want = [
        format!("2a000000 01 02 0100 0200 01 67 {aa} 0300"),
        format!("2a000000 02 01 0100 01 67 {aa} 0600 2c01"),
        "03000000 03 0100".into(),
        format!("bb000000 04 09000000 0200 {d1} 07000000 02 0102 {d2} 01000000 {top}"),
        "17000000 05 09000000 0200 04030201 05000000 ffffffff ffffffff".into(),
        "09000000 06 0000000002000000".into(),
        "05000000 07 e8030000".into(),
        format!(
            "46000000 08 01 0200 0100 {d3} 04030201 05000000 0100 01 04 \
             {d4} 04030201 05000000 0400 01 01"
        ),
        format!("1e000000 09 02000000 0100 {d5} 0600 01"),
        "1a000000 0a 02000000 0200 04030201 05000000 01 40 ffffffff ffffffff 00".into(),
        "03000000 0b 01 02".into(),
        "13000000 0c 01 05 0300000000000000 0200000000000000".into(),
        "01000000 0d".into(),
        "01000000 0e".into(),
        "09000000 0f 0600 0400 6ec3a965".into(),
        format!(
            "3b000000 10 0302 0100 {} 0500 01000000 00000000 03000000 00000000 00000000 00000000 \
             00000000 a4a3a2a1",
            "06".repeat(20)
        ),
        "09000000 11 00000100 d0070000".into(),
        format!("2a000000 12 01 07000000 0100 {} 04030201 05000000 0100 01 04 01 09", "07".repeat(20)),
    ];
    for (m, w) in samples().iter().zip(&want) {
        assert_eq!(hex(m), w.replace(' ', ""), "{}", m.name());
    }
    assert_eq!(samples().len(), want.len());
    assert_eq!(samples().len(), NAMES.len() - 1, "every kind has its sample");
}

#[test]
fn split_at_every_byte() {
    let stream: Vec<u8> = samples().iter().flat_map(bytes).collect();
    for cut in 0..=stream.len() {
        let mut dec = Decoder::new(MAX_BODY);
        let mut got = Vec::new();
        for part in [&stream[..cut], &stream[cut..]] {
            dec.feed(part);
            while let Some(m) = dec.next_msg().unwrap() {
                got.push(m);
            }
        }
        assert_eq!(got, samples());
        assert!(!dec.is_partial());
    }
    let mut dec = Decoder::new(MAX_BODY);
    let mut got = Vec::new();
    for b in &stream {
        dec.feed(&[*b]);
        got.extend(dec.next_msg().unwrap());
    }
    assert_eq!(got, samples());
}

#[test]
fn every_cut_message_is_refused_and_every_longer_one() {
    for m in samples() {
        let b = bytes(&m);
        for end in 5..b.len() {
            assert!(IndexMsg::decode(&b[4..end]).is_err(), "{} cut to {end}", m.name());
        }
        let mut long = b[4..].to_vec();
        long.push(0);
        let e = IndexMsg::decode(&long).unwrap_err();
        assert_eq!(e, IndexMsgError::Trailing { kind: m.name(), extra: 1 });
    }
}

#[test]
fn lengths_are_capped_before_anything_is_kept() {
    for (cap, len) in [(MAX_FIRST_BODY, 513u32), (MAX_BODY, u32::MAX), (MAX_BODY, 0)] {
        let mut dec = Decoder::new(cap);
        dec.feed(&len.to_le_bytes());
        assert_eq!(dec.next_msg(), Err(IndexMsgError::Length { len, cap }));
    }
    let mut dec = Decoder::new(MAX_FIRST_BODY);
    dec.feed(&512u32.to_le_bytes());
    assert_eq!(dec.next_msg(), Ok(None));
    // 8192 registrations announced in 7 bytes: nothing is allocated for them.
    assert_eq!(IndexMsg::decode(&[4, 0, 0, 0, 0, 0, 32]), Err(IndexMsgError::Short("Register")));
    let e = IndexMsg::decode(&[4, 0, 0, 0, 0, 1, 32]).unwrap_err();
    assert!(matches!(e, IndexMsgError::TooMany { count: 8193, cap: 8192, .. }), "{e}");
}

#[test]
fn both_sides_of_every_cap() {
    let reg = |n| IndexMsg::Register {
        seq: 0,
        batch: vec![Registration { digest: d(0), targets: hosts(&[1023]), pages: 0 }; n],
    };
    let hello = |versions, name: usize| IndexMsg::Hello {
        versions: vec![1; versions],
        group: "x".repeat(name),
        token: Token([0; 32]),
        host: HostIx(0),
    };
    let all = HostSet::first(MAX_HOSTS);
    let id = PageId { bucket: 0, index: 0 };
    let remote = Remote { digest: d(0), id, carrier: HostIx(0), targets: all.clone() };
    let part = |n| IndexMsg::PlanPart {
        last: false,
        piece: HostPlan { carry: vec![], remote: vec![remote.clone(); n] },
    };
    let carry = Carry { digest: d(0), id, first: HostIx(0), forward: all.clone() };
    let lend = Lend { carry, to: all.clone() };
    let models = |n| IndexMsg::ModelsPart { last: false, borrows: 0, lend: vec![lend.clone(); n] };
    let sketch = Sketch::from_features([u32::MAX; FEATURES]);
    let item = SketchItem { digest: d(0), target: HostIx(1023), sketch };
    let sketches = |n| IndexMsg::Sketches { domain: 0, items: vec![item.clone(); n] };
    let text = |n| IndexMsg::Error { code: ErrorCode::Busy, text: "x".repeat(n) };
    let pairs = [
        (reg(MAX_BATCH), reg(MAX_BATCH + 1)),
        (part(MAX_BATCH), part(MAX_BATCH + 1)),
        (models(MAX_BATCH), models(MAX_BATCH + 1)),
        (sketches(MAX_BATCH), sketches(MAX_BATCH + 1)),
        (hello(MAX_VERSIONS, 1), hello(MAX_VERSIONS + 1, 1)),
        (hello(1, MAX_GROUP_NAME), hello(1, MAX_GROUP_NAME + 1)),
        (hello(1, 1), hello(1, 0)),
        (text(MAX_TEXT), text(MAX_TEXT + 1)),
    ];
    for (good, bad) in pairs {
        let b = bytes(&good);
        assert_eq!(IndexMsg::decode(&b[4..]), Ok(good));
        let mut out = vec![1, 2, 3];
        assert!(bad.encode(&mut out).is_err());
        assert_eq!(out, [1, 2, 3], "nothing half written");
    }
    assert_eq!(
        bytes(&models(MAX_BATCH)).len() - 4,
        MAX_BODY,
        "the longest message is the one the cap is made for"
    );
}

#[test]
fn values_out_of_range_are_refused() {
    let bad = |body: &[u8], what: &str| {
        let e = IndexMsg::decode(body).unwrap_err();
        assert!(matches!(e, IndexMsgError::Bad { what: w, .. } if w == what), "{e}");
    };
    bad(&[11, 2, 1, 0], "host set");
    bad(&[5, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x80, 0, 0, 0, 0], "page id");
    bad(&[8, 2, 0, 0, 0, 0], "flag");
    let mut hello = bytes(&samples()[0]);
    let end = hello.len();
    hello[end - 2..].copy_from_slice(&MAX_HOSTS.to_le_bytes());
    bad(&hello[4..], "host number");
    hello[10] = b'\n';
    bad(&hello[4..], "group name");
    let mut open = bytes(&samples()[1]);
    let end = open.len();
    open[end - 2..].copy_from_slice(&[0, 0]);
    bad(&open[4..], "number of hosts");
    assert_eq!(IndexMsg::decode(&[0]), Err(IndexMsgError::UnknownKind(0)));
    assert_eq!(IndexMsg::decode(&[19]), Err(IndexMsgError::UnknownKind(19)));
    let mut lent = bytes(&samples()[17]);
    assert_eq!(lent.pop(), Some(9));
    *lent.last_mut().unwrap() = 0;
    bad(&lent[4..], "set of borrowers");
    let mut part = bytes(&samples()[7]);
    part[6..8].copy_from_slice(&[0, 0]);
    bad(&part[4..], "count of carried contents");
}

#[test]
fn versions_codes_tokens_and_texts() {
    assert_eq!(choose_version(&[9, 1]), Some(1));
    assert_eq!(choose_version(&[9]), None);
    for n in 0..20 {
        assert_eq!(ErrorCode::from_number(n).number(), n);
    }
    assert!(Token([1; 32]).matches(&Token([1; 32])));
    let mut other = [1; 32];
    other[31] = 0;
    assert!(!Token([1; 32]).matches(&Token(other)));
    assert_eq!(format!("{:?}", Token([1; 32])), "Token(…)");
    let long = IndexMsg::error(ErrorCode::Busy, &"é".repeat(MAX_TEXT));
    assert_eq!(bytes(&long).len(), 4 + 1 + 2 + 2 + MAX_TEXT);
    let cursor = bytes(&IndexMsg::Error { code: ErrorCode::Busy, text: "a\x1b[2J".into() });
    let IndexMsg::Error { text, .. } = IndexMsg::decode(&cursor[4..]).unwrap() else { panic!() };
    assert_eq!(text, "a [2J");
}

proptest! {
    #[test]
    fn any_bytes_end_in_a_message_or_an_error(b in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(m) = IndexMsg::decode(&b) {
            // Errors' texts are cleaned; all else reads back as it was.
            if !matches!(m, IndexMsg::Error { .. }) {
                prop_assert_eq!(&bytes(&m)[4..], &b[..]);
            }
        }
    }

    #[test]
    fn a_damaged_message_never_panics(which in 0usize..18, at in any::<prop::sample::Index>(), x in 1u8..) {
        let mut b = bytes(&samples()[which]);
        let at = 4 + at.index(b.len() - 4);
        b[at] ^= x;
        if let Ok(m) = IndexMsg::decode(&b[4..]) {
            prop_assert!(m.encode(&mut Vec::new()).is_ok());
        }
    }
}
