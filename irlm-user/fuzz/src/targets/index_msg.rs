//! What agents and coordinator say to the index server, and it to them: no bytes make the decoder panic or keep more
//! than its cap, how they are cut says nothing, and what is read is what would be written.

use irlm_user::core::digest::Digest;
use irlm_user::core::index::{HostSet, LateItem, LateReply, Registration};
use irlm_user::core::models::{Lend, SketchItem};
use irlm_user::core::plan::{Carry, HostPlan, Remote};
use irlm_user::core::sketch::Sketch;
use irlm_user::core::units::{HostIx, PageId};
use irlm_user::core::wire::index_msg::{
    Decoder, ErrorCode, IndexMsg, MAX_BODY, MAX_FIRST_BODY, MAX_TEXT, Token,
};

/// What a connection delivers, in pieces of a size that the input chooses.
fn read(data: &[u8], piece: usize) -> (Vec<IndexMsg>, Option<String>) {
    let mut decoder = Decoder::new(MAX_FIRST_BODY);
    let mut all = Vec::new();
    for part in data.chunks(piece) {
        decoder.feed(part);
        loop {
            match decoder.next_msg() {
                Ok(Some(m)) => all.push(m),
                Ok(None) => break,
                Err(e) => return (all, Some(e.to_string())),
            }
            decoder.set_cap(MAX_BODY);
        }
    }
    (all, None)
}

pub(crate) fn target(data: &[u8]) {
    let piece = 1 + data.first().map_or(0, |b| usize::from(*b));
    let (all, error) = read(data, usize::MAX);
    assert_eq!(read(data, piece), (all.clone(), error.clone()), "pieces of {piece} bytes say something else");
    assert!(error.is_none_or(|e| !e.contains('\n')));
    let mut rest = data;
    for m in all {
        let mut again = Vec::new();
        m.encode(&mut again).expect("what was read can be written");
        let (said, after) = rest.split_at(4 + rest[..4].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)));
        rest = after;
        match &m {
            // Texts for people are cleaned as they are read.
            IndexMsg::Error { text, .. } => assert!(text.len() <= 3 * MAX_TEXT && !text.contains('\n')),
            _ => assert_eq!(again, said, "written otherwise than read"),
        }
        assert_eq!(IndexMsg::decode(&again[4..]), Ok(m), "read otherwise than written");
    }
}

/// A message of each kind, and a connection's worth of them.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let d = |n| Digest([n; 20]);
    let hosts = |list: &[u16]| list.iter().copied().map(HostIx).collect::<HostSet>();
    let (token, group, id) = (Token([0xaa; 32]), "g".to_owned(), PageId { bucket: 0x0102_0304, index: 5 });
    let carry = Carry { digest: d(3), id, first: HostIx(1), forward: hosts(&[2, 70]) };
    let sketch = Sketch::from_features(std::array::from_fn(|n| n as u32));
    let all = [
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
                carry: vec![carry.clone()],
                remote: vec![Remote { digest: d(4), id, carrier: HostIx(4), targets: hosts(&[0]) }],
            },
        },
        IndexMsg::Late { seq: 2, items: vec![LateItem { digest: d(5), target: HostIx(6), kept: true }] },
        IndexMsg::LateReply { seq: 2, replies: vec![LateReply { id: Some(id), delivered: hosts(&[6]) }] },
        IndexMsg::PlanNow { missing: hosts(&[1]) },
        IndexMsg::Planned { sources: hosts(&[0, 2]), digests: 3, shared: 2 },
        IndexMsg::Close,
        IndexMsg::Done,
        IndexMsg::error(ErrorCode::NotReady, "née"),
        IndexMsg::Sketches { domain: 1, items: vec![SketchItem { digest: d(7), target: HostIx(1), sketch }] },
        IndexMsg::ModelsRequest { room: 100, wait_ms: 2000 },
        IndexMsg::ModelsPart { last: true, borrows: 3, lend: vec![Lend { carry, to: hosts(&[1, 3]) }] },
    ];
    let encoded = |m: &IndexMsg| {
        let mut out = Vec::new();
        m.encode(&mut out).expect("below every cap");
        out
    };
    let mut seeds: Vec<Vec<u8>> = all.iter().map(encoded).collect();
    seeds.push(seeds.concat());
    seeds
}
