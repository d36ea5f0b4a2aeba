//! A peer's frames are hostile input: no bytes may make a decoder panic or hold more than its caps. The input is what a
//! connection delivers: frames one after the other, whose compressed bodies may go on with one stream.

use irlm_user::core::digest::Digest;
use irlm_user::core::handover::GuestState;
use irlm_user::core::postcopy::{PageSet, Run};
use irlm_user::core::squeeze::Unsqueezer;
use irlm_user::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageId, VmIx};
use irlm_user::core::wire::frame::{HEADER_LEN, Header, Kind, WireError};
use irlm_user::core::wire::limits::{MAX_FRAME_PAGES, WINDOW_LOG};
use irlm_user::core::wire::messages::{
    Blocks, ContentEntry, Hello, HelloOk, NeedEntry, Purpose, VERSIONS, Want, Word, decode_entries, decode_needs, decode_number,
    decode_slots, encode_entries, encode_needs, encode_number, encode_slots,
};
use irlm_user::core::wire::pages::{Form, PagesBuilder, Records};
use irlm_user::core::wire::paging::{Demand, decode_digests, decode_set, encode_digests, encode_set};

/// Reads a meta part; what is written of it must be read alike. Gives the contents behind it: none.
fn same<T: PartialEq + std::fmt::Debug>(
    meta: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, WireError>,
    encode: impl Fn(&T) -> Vec<u8>,
) -> Result<usize, WireError> {
    let read = decode(meta)?;
    assert_eq!(decode(&encode(&read)).as_ref(), Ok(&read));
    Ok(0)
}

/// What a peer draws at random.
const NONCE: [u8; 16] = [0x55; 16];
/// What zstd needs besides its window.
const DECODER: usize = 1 << 20;

pub(crate) fn target(mut data: &[u8]) {
    let mut unsqueezer = Unsqueezer::new(WINDOW_LOG);
    while let Some(Ok(head)) = data.first_chunk::<HEADER_LEN>().map(Header::decode) {
        let Some(payload) = data[HEADER_LEN..].get(..head.payload_len()) else { return };
        data = &data[HEADER_LEN + head.payload_len()..];
        let (meta, body) = payload.split_at(head.meta_len as usize);
        let contents = match head.kind {
            Kind::Hello => same(meta, Hello::decode, |m| m.encode(&NONCE)),
            Kind::HelloOk => same(meta, HelloOk::decode, |m| m.encode(&NONCE)),
            Kind::Blocks => same(meta, Blocks::decode, Blocks::encode),
            Kind::Pages => {
                let mut all = Records::new(meta);
                all.by_ref().try_for_each(|r| r.map(drop)).map(|()| all.contents())
            }
            Kind::Contents | Kind::Voids => {
                let encode = |list: &Vec<ContentEntry>| {
                    let mut out = Vec::new();
                    encode_entries(list.iter(), &mut out);
                    out
                };
                let entries = decode_entries(head.kind, meta).map(|e| e.len());
                same(meta, |m| decode_entries(head.kind, m), encode).and(entries)
            }
            Kind::Need | Kind::Gone => same(meta, |m| decode_needs(head.kind, m), |n| encode_needs(n)),
            Kind::Word => same(meta, Word::decode, Word::encode),
            Kind::Waiting | Kind::Taken => same(meta, |m| decode_number(head.kind, m), |n| encode_number(*n)),
            Kind::Unkept => same(meta, decode_slots, |s| encode_slots(s)),
            Kind::Switch | Kind::Lacks => {
                decode_set(head.kind, meta, &mut PageSet::empty(&[100_000, 40])).map(|_| 0)
            }
            Kind::Demand => same(meta, Demand::decode, Demand::encode),
            Kind::Hurry | Kind::NotHere => {
                same(meta, |m| decode_digests(head.kind, m), |d| encode_digests(d))
            }
            Kind::Verbatim | Kind::Stopped | Kind::RamEnd | Kind::ReturnPath | Kind::Heartbeat => Ok(0),
        };
        let Ok(contents) = contents else { return };
        if !matches!(head.kind, Kind::Pages | Kind::Contents) {
            continue;
        }
        match unsqueezer.contents(head.kind, head.codec, body, contents) {
            Ok(pages) => assert_eq!(pages.len(), contents),
            Err(_) => return,
        }
        let bound = (MAX_FRAME_PAGES + 1) * PAGE_SIZE + (1 << WINDOW_LOG) + DECODER;
        assert!(unsqueezer.memory() <= bound, "{} bytes held", unsqueezer.memory());
    }
}

/// A frame as it is sent.
pub(super) fn frame(kind: Kind, meta: &[u8], body: &[u8]) -> Vec<u8> {
    [&Header::new(kind, meta.len(), body.len()).encode(), meta, body].concat()
}

pub(super) fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}

/// A frame of each kind with fields, what was recorded of a connection, and a connection's worth of all.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (d, id) = (|b| Digest([b; 20]), PageId { bucket: 3, index: 300 });
    let vm = Purpose::Vm { source: HostIx(1), vm: VmIx(2) };
    let blocks = Blocks { section_id: 2, footers: true, blocks: vec![("pc.ram".to_owned(), 0x4000_0000)] };
    let forward = vec![HostIx(1), HostIx(300)];
    let entries = [ContentEntry { id: Some(id), digest: d(0xaa), forward }, ContentEntry { id: None, digest: d(1), forward: vec![] }];
    let mut listed = Vec::new();
    encode_entries(entries.iter(), &mut listed);
    let wants = [NeedEntry { addr: at(1, 2), want: Want::Digest(d(0xcc)) }, NeedEntry { addr: at(1, 3), want: Want::Id(id) }];
    let mut pages = PagesBuilder::default();
    pages.uniform(at(0, 0), 0);
    pages.unique(at(0, 10), Some(300));
    pages.shared(at(0, 5), id, &d(0xaa), Form::Kept(7));
    pages.reference(at(2, 6), id);
    pages.remote(at(2, 7), id, &d(0xbb));
    pages.keep(1, &d(0xbb));
    let mut set = PageSet::empty(&[100_000, 40]);
    set.insert_run(Run { addr: at(0, 5), count: 40_000 });
    set.insert(at(1, 7));
    let demand = Demand { urgent: 1, pages: vec![at(1, 2), at(0, 9)] };
    let mut seeds = vec![
        frame(Kind::Hello, &Hello::new("web", &[0x77; 32], vm).encode(&NONCE), &[]),
        frame(Kind::HelloOk, &HelloOk { version: VERSIONS[0], window_log: 0, slots: 300 }.encode(&NONCE), &[]),
        frame(Kind::Blocks, &blocks.encode(), &[]),
        frame(Kind::Pages, pages.meta(), &[5; 2 * PAGE_SIZE]),
        frame(Kind::Contents, &listed, &[6; 2 * PAGE_SIZE]),
        frame(Kind::Voids, &listed, &[]),
        frame(Kind::Need, &encode_needs(&wants), &[]),
        frame(Kind::Waiting, &encode_number(300), &[]),
        frame(Kind::Unkept, &encode_slots(&[1, 300]), &[]),
        frame(Kind::Demand, &demand.encode(), &[]),
        frame(Kind::Hurry, &encode_digests(&[d(1), d(2)]), &[]),
    ];
    seeds.extend(encode_set(&set).iter().map(|m| frame(Kind::Switch, m, &[])));
    let words = [Word::GivenUp(GuestState::Paused, None), Word::Refused("no disk".into()), Word::Lost("it died".into())];
    seeds.extend(words.iter().map(|w| frame(Kind::Word, &w.encode(), &[])));
    seeds.push(seeds.concat());
    seeds.push(include_bytes!("../../../tests/data/frames/vm.frames").to_vec());
    seeds
}
