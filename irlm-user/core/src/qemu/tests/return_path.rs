//! The return path: real messages, every cut, and refusals.

use super::*;

/// PONG, SHUT, REQ_PAGES_ID, REQ_PAGES and RESUME_ACK as QEMU 7.2 writes them.
const MESSAGES: &[&[u8]] = &[
    b"\0\x02\0\x04\0\0\0\x01",
    b"\0\x03\0\x0f\0\0\0\0\x02\x70\0\0\0\0\x10\0\x02m0",
    b"\0\x04\0\x0c\0\0\0\0\x02\x60\0\0\0\0\x10\0",
    b"\0\x07\0\0",
    b"\0\x01\0\x04\0\0\0\0",
    b"\0\x01\0\x04\0\0\0\x05",
];

fn feed(bytes: &[u8], piece: usize) -> Result<Vec<(RpKind, Vec<u8>)>, RpError> {
    let mut parser = RpParser::new();
    let (mut held, mut seen) = (Vec::new(), Vec::new());
    for part in bytes.chunks(piece) {
        held.extend_from_slice(part);
        let used = parser.parse::<RpError>(&held, &mut |m| {
            seen.push((m.kind, m.bytes.to_vec()));
            Ok(())
        })?;
        assert!(used > 0 || held.len() < 4 + MAX_RP_PAYLOAD);
        held.drain(..used);
    }
    Ok(seen)
}

#[test]
fn messages_are_cut_out_whole_and_told_apart() {
    let kinds = [
        RpKind::Pong(1),
        RpKind::Other(3),
        RpKind::Other(4),
        RpKind::Other(7),
        RpKind::Shut { ok: true },
        RpKind::Shut { ok: false },
    ];
    let want: Vec<_> = kinds.into_iter().zip(MESSAGES.iter().map(|m| m.to_vec())).collect();
    let all = MESSAGES.concat();
    for piece in 1..=all.len() {
        assert_eq!(feed(&all, piece), Ok(want.clone()), "pieces of {piece}");
    }
}

#[test]
fn shut_is_what_qemu_writes() {
    assert_eq!(shut(true), MESSAGES[4]);
    assert_eq!(feed(&shut(false), 8), Ok(vec![(RpKind::Shut { ok: false }, shut(false).to_vec())]));
}

#[test]
fn recovery_wrong_sizes_and_long_messages_are_refused_at_their_header() {
    let pong = MESSAGES[0];
    let refused = |tail: &[u8]| feed(&[pong, tail].concat(), usize::MAX);
    assert_eq!(refused(b"\0\x05\0\x03"), Err(RpError::Recovery { at: 8 }));
    assert_eq!(refused(b"\0\x01\0\x00"), Err(RpError::Fixed { at: 8, kind: 1, len: 0 }));
    assert_eq!(refused(b"\0\x02\xff\xff"), Err(RpError::Length { at: 8, kind: 2, len: 0xffff }));
    assert_eq!(refused(b"\x51\x45\x56\x4d"), Err(RpError::Length { at: 8, kind: 0x5145, len: 0x564d }));
}
