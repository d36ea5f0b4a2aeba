//! A peer's frames are hostile input: no bytes may make a decoder panic or hold more than its caps. The input is what a
//! connection delivers: frames one after the other, whose compressed bodies may go on with one stream.

use irlm_user::core::postcopy::PageSet;
use irlm_user::core::squeeze::Unsqueezer;
use irlm_user::core::units::PAGE_SIZE;
use irlm_user::core::wire::frame::{HEADER_LEN, Header, Kind};
use irlm_user::core::wire::limits::{MAX_FRAME_PAGES, WINDOW_LOG};
use irlm_user::core::wire::messages::{
    Blocks, Hello, HelloOk, Word, decode_entries, decode_needs, decode_number, decode_slots,
};
use irlm_user::core::wire::pages::Records;
use irlm_user::core::wire::paging::{Demand, decode_digests, decode_set};

/// What zstd needs besides its window.
const DECODER: usize = 1 << 20;

pub(crate) fn target(mut data: &[u8]) {
    let mut unsqueezer = Unsqueezer::new(WINDOW_LOG);
    while let Some(Ok(head)) = data.first_chunk::<HEADER_LEN>().map(Header::decode) {
        let Some(payload) = data[HEADER_LEN..].get(..head.payload_len()) else { return };
        data = &data[HEADER_LEN + head.payload_len()..];
        let (meta, body) = payload.split_at(head.meta_len as usize);
        let contents = match head.kind {
            Kind::Hello => Hello::decode(meta).map(|_| 0),
            Kind::HelloOk => HelloOk::decode(meta).map(|_| 0),
            Kind::Blocks => Blocks::decode(meta).map(|_| 0),
            Kind::Pages => {
                let mut all = Records::new(meta);
                all.by_ref().try_for_each(|r| r.map(drop)).map(|()| all.contents())
            }
            Kind::Contents | Kind::Voids => decode_entries(head.kind, meta).map(|e| e.len()),
            Kind::Need | Kind::Gone => decode_needs(head.kind, meta).map(|_| 0),
            Kind::Word => Word::decode(meta).map(|_| 0),
            Kind::Waiting | Kind::Taken => decode_number(head.kind, meta).map(|_| 0),
            Kind::Unkept => decode_slots(meta).map(|_| 0),
            Kind::Switch | Kind::Lacks => {
                decode_set(head.kind, meta, &mut PageSet::empty(&[100_000, 40])).map(|_| 0)
            }
            Kind::Demand => Demand::decode(meta).map(|_| 0),
            Kind::Hurry | Kind::NotHere => decode_digests(head.kind, meta).map(|_| 0),
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

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![include_bytes!("../../../tests/data/frames/vm.frames").to_vec()]
}
