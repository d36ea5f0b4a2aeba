//! QEMU's stream and return path are hostile input: no bytes may make the parser panic, stall, keep more than its
//! caps, or say different things depending on how they were cut; and what it understood must survive the emitter.

use irlm_user::core::qemu::{
    Emitter, Event, MAX_BLOCKS, MAX_LOOKAHEAD, MAX_MACHINE_NAME, MAX_RP_PAYLOAD, Parser, RpError, RpParser,
    StreamError,
};
use irlm_user::core::units::{PAGE_SIZE, PageAddr};
use std::collections::BTreeMap;

/// What a stream came to.
#[derive(PartialEq, Debug)]
struct Outcome {
    verbatim: Vec<u8>,
    /// Newest versions; none for zero pages.
    ram: BTreeMap<PageAddr, Option<Box<[u8; PAGE_SIZE]>>>,
    /// The stream written anew.
    emitted: Vec<u8>,
    end: Result<(), StreamError>,
}

/// Feeds `data` in pieces of `piece` bytes through a buffer of bounded size.
fn parse(data: &[u8], piece: usize) -> Outcome {
    let mut parser = Parser::new();
    let mut emitter = None::<Emitter>;
    let mut o = Outcome { verbatim: Vec::new(), ram: BTreeMap::new(), emitted: Vec::new(), end: Ok(()) };
    let (mut from, mut to) = (0, 0);
    while to < data.len() {
        to = data.len().min(to + piece);
        let used = parser.parse::<StreamError>(&data[from..to], &mut |event| {
            match (event, &mut emitter) {
                (Event::Verbatim(bytes), emitter) => {
                    o.verbatim.extend_from_slice(bytes);
                    if let Some(e) = emitter {
                        e.close_section(&mut o.emitted);
                    }
                    o.emitted.extend_from_slice(bytes);
                }
                (Event::Blocks(list), emitter) => {
                    assert!(list.blocks().len() <= MAX_BLOCKS && emitter.is_none());
                    *emitter = Some(Emitter::new(list));
                }
                (Event::Page { addr, bytes }, Some(e)) => {
                    e.page_header(addr, &mut o.emitted).expect("a parsed page is in the list");
                    o.emitted.extend_from_slice(bytes);
                    o.ram.insert(addr, Some(Box::new(*bytes)));
                }
                (Event::Zero { addr }, Some(e)) => {
                    e.zero(addr, &mut o.emitted).expect("a parsed page is in the list");
                    o.ram.insert(addr, None);
                }
                (Event::SectionEnd, Some(e)) => e.close_section(&mut o.emitted),
                (Event::RamEnd, Some(e)) => e.end(&mut o.emitted),
                (Event::Stopped, _) => {}
                (other, None) => panic!("{other:?} before the block list"),
            }
            Ok(())
        });
        match used {
            Ok(used) => {
                assert!(used > 0 || to - from < MAX_LOOKAHEAD, "no progress at {}", parser.offset());
                from += used;
                assert_eq!(parser.offset(), from as u64);
            }
            Err(e) => {
                o.end = Err(e);
                return o;
            }
        }
    }
    assert!(parser.machine().is_none_or(|m| m.len() <= MAX_MACHINE_NAME));
    o.end = parser.finish();
    o
}

pub(crate) fn target(data: &[u8]) {
    let whole = parse(data, usize::MAX / 2);
    let piece = 1 + data.first().map_or(0, |&b| usize::from(b)) + data.len() % 4099;
    assert_eq!(parse(data, piece), whole, "pieces of {piece} bytes say something else");
    if whole.end.is_ok() {
        let again = parse(&whole.emitted, usize::MAX / 2);
        assert_eq!(again.end, Ok(()));
        assert!(again.ram == whole.ram && again.verbatim == whole.verbatim, "lost in re-emission");
    }

    let mut rp = RpParser::new();
    let _: Result<usize, RpError> = rp.parse(data, &mut |message| {
        assert!(message.bytes.len() <= 4 + MAX_RP_PAYLOAD);
        Ok(())
    });
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        include_bytes!("../../../tests/data/qemu/q35-7.2.stream").to_vec(),
        include_bytes!("../../../tests/data/qemu/q35-10.0.stream").to_vec(),
    ]
}
