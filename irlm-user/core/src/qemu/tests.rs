//! Tests of the stream grammar. The streams come from a builder that shares no code with the parser or the emitter,
//! so that a misread fact cannot hide in a constant that both use.

mod build;
mod emitting;
mod golden;
mod parsing;
mod random;
mod refusing;
mod return_path;

use super::*;
use crate::units::PageAddr;
use std::collections::BTreeMap;
use std::sync::Arc;

/// An [`Event`] that owns its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Seen {
    Verbatim(Vec<u8>),
    Blocks(Arc<BlockList>),
    Page(PageAddr, Vec<u8>),
    Zero(PageAddr),
    SectionEnd,
    Stopped,
    RamEnd,
}

/// Adds `event` to `seen`; adjoining verbatim bytes are joined, as where they are cut says nothing.
fn note(seen: &mut Vec<Seen>, event: Event<'_>) {
    let next = match event {
        Event::Verbatim(bytes) => {
            if let Some(Seen::Verbatim(before)) = seen.last_mut() {
                before.extend_from_slice(bytes);
                return;
            }
            Seen::Verbatim(bytes.to_vec())
        }
        Event::Blocks(list) => Seen::Blocks(list),
        Event::Page { addr, bytes } => Seen::Page(addr, bytes.to_vec()),
        Event::Zero { addr } => Seen::Zero(addr),
        Event::SectionEnd => Seen::SectionEnd,
        Event::Stopped => Seen::Stopped,
        Event::RamEnd => Seen::RamEnd,
    };
    seen.push(next);
}

/// Feeds `stream` in pieces of the given sizes (the last one again and again) through a buffer no larger than
/// [`MAX_LOOKAHEAD`] and one piece, as a caller with a fixed buffer does.
fn feed(stream: &[u8], pieces: &[usize]) -> (Parser, Vec<Seen>, Result<(), StreamError>) {
    let mut parser = Parser::new();
    let mut seen = Vec::new();
    let mut held = Vec::new();
    let (mut from, mut turn) = (0, 0);
    while from < stream.len() {
        let piece = pieces[turn.min(pieces.len() - 1)].clamp(1, stream.len() - from);
        turn += 1;
        held.extend_from_slice(&stream[from..from + piece]);
        from += piece;
        let result = parser.parse::<StreamError>(&held, &mut |event| {
            note(&mut seen, event);
            Ok(())
        });
        match result {
            Ok(used) => {
                assert!(held.len() < MAX_LOOKAHEAD || used > 0, "no progress on {} bytes", held.len());
                held.drain(..used);
                assert_eq!(parser.offset() + held.len() as u64, from as u64);
            }
            Err(e) => return (parser, seen, Err(e)),
        }
    }
    let end = parser.finish();
    (parser, seen, end)
}

/// The events of a whole stream that must be good.
fn events(stream: &[u8]) -> Vec<Seen> {
    let (_, seen, end) = feed(stream, &[usize::MAX]);
    assert_eq!(end, Ok(()));
    seen
}

/// The error that a stream must end in, the same however it is cut.
fn refused(stream: &[u8]) -> StreamError {
    let (mut parser, _, end) = feed(stream, &[usize::MAX]);
    let error = end.expect_err("refused");
    assert_eq!(feed(stream, &[1]).2, Err(error.clone()));
    assert_eq!(feed(stream, &[3, 7, 4096, 1]).2, Err(error.clone()));
    assert!(matches!(error, StreamError::Truncated { .. }) || parser.finish().is_err());
    if !matches!(error, StreamError::Truncated { .. }) {
        let again = parser.parse::<StreamError>(&[0], &mut |_| Ok(()));
        assert!(matches!(again, Err(StreamError::Refused { .. })));
    }
    error
}

/// What the loader's RAM holds in the end; absent means never sent.
type Ram = BTreeMap<PageAddr, Option<Vec<u8>>>;

fn ram(seen: &[Seen]) -> Ram {
    let mut ram = Ram::new();
    for event in seen {
        match event {
            Seen::Page(addr, bytes) => ram.insert(*addr, Some(bytes.clone())),
            Seen::Zero(addr) => ram.insert(*addr, None),
            _ => None,
        };
    }
    ram
}

/// All verbatim bytes, and those from the end of RAM on.
fn verbatim(seen: &[Seen]) -> (Vec<u8>, Vec<u8>) {
    let (mut head, mut tail, mut ended) = (Vec::new(), Vec::new(), false);
    for event in seen {
        match event {
            Seen::Verbatim(bytes) if ended => tail.extend_from_slice(bytes),
            Seen::Verbatim(bytes) => head.extend_from_slice(bytes),
            Seen::RamEnd => ended = true,
            _ => {}
        }
    }
    (head, tail)
}
