//! Frames on connections in plain text, sealed: 16 bytes behind each frame that only the two ends can make. They say that
//! this very frame was sent, on this connection, in this direction, after as many others as have come. So a frame that was
//! changed, lost, repeated, cut short or moved is found when it arrives, before anything of it is believed.
//!
//! The seal is keyed BLAKE3, cut to 128 bits, over body, meta part, header and number. The body comes first, because its
//! pages then lie as BLAKE3 takes several at a time. Header and number have fixed lengths, and the header has the others.

use crate::wire::frame::HEADER_LEN;

/// Bytes behind each sealed frame.
pub const SEAL_LEN: usize = 16;

/// Bytes that BLAKE3 takes side by side. A copy of a page costs a tenth of what it loses with one page at a time.
const GATHER: usize = 16 << 10;

/// Makes the seal of frame number `number`.
fn seal<'b>(
    key: &[u8; 32],
    number: u64,
    header: &[u8; HEADER_LEN],
    meta: &[u8],
    body: impl IntoIterator<Item = &'b [u8]>,
) -> [u8; SEAL_LEN] {
    let mut h = blake3::Hasher::new_keyed(key);
    let (mut gathered, mut n) = ([0; GATHER], 0);
    for mut part in body {
        while !part.is_empty() {
            if n == 0 && part.len() >= GATHER {
                h.update(part);
                break;
            }
            let (some, rest) = part.split_at(part.len().min(GATHER - n));
            gathered[n..n + some.len()].copy_from_slice(some);
            (n, part) = (n + some.len(), rest);
            if n == GATHER {
                h.update(&gathered);
                n = 0;
            }
        }
    }
    h.update(&gathered[..n]).update(meta).update(header).update(&number.to_le_bytes());
    let mut out = [0; SEAL_LEN];
    h.finalize_xof().fill(&mut out);
    out
}

/// Seals what leaves in one direction of a connection.
pub struct Sealer {
    key: [u8; 32],
    next: u64,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sealer({})", self.next)
    }
}

impl Sealer {
    /// No frame has left yet.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, next: 0 }
    }

    /// What follows the next frame.
    pub fn seal<'b>(
        &mut self,
        header: &[u8; HEADER_LEN],
        meta: &[u8],
        body: impl IntoIterator<Item = &'b [u8]>,
    ) -> [u8; SEAL_LEN] {
        let number = self.next;
        self.next += 1;
        seal(&self.key, number, header, meta, body)
    }
}

/// A frame that is not the one that was due. Nothing of it, or after it, may be believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Broken {
    /// Which frame of its direction, from 0.
    pub number: u64,
}

/// Checks what arrives in one direction of a connection.
#[derive(Clone)]
pub struct Opener {
    key: [u8; 32],
    next: u64,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opener({})", self.next)
    }
}

impl Opener {
    /// No frame has come yet.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self { key, next: 0 }
    }

    /// Whether the next frame is this one.
    pub fn open(
        &mut self,
        header: &[u8; HEADER_LEN],
        meta: &[u8],
        body: &[u8],
        came: &[u8; SEAL_LEN],
    ) -> Result<(), Broken> {
        let number = self.next;
        let made = seal(&self.key, number, header, meta, [body]);
        let differ = made.iter().zip(came).fold(0, |d, (a, b)| std::hint::black_box(d | (a ^ b)));
        if std::hint::black_box(differ) != 0 {
            return Err(Broken { number });
        }
        self.next += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Header, Kind};
    use proptest::prelude::*;

    type Sealed = ([u8; HEADER_LEN], Vec<u8>, Vec<u8>, [u8; SEAL_LEN]);

    fn sent(sealer: &mut Sealer, meta: &[u8], body: &[u8]) -> Sealed {
        let header = Header::new(Kind::Pages, meta.len(), body.len()).encode();
        let tag = sealer.seal(&header, meta, body.chunks(7));
        (header, meta.to_vec(), body.to_vec(), tag)
    }

    fn comes(opener: &mut Opener, (header, meta, body, tag): &Sealed) -> Result<(), Broken> {
        opener.open(header, meta, body, tag)
    }

    fn any_frames() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40);
        prop::collection::vec((bytes(), bytes()), 1..8)
    }

    /// However a body lies, its seal is that of its bytes.
    #[test]
    fn a_body_in_pieces_is_sealed_as_a_whole_one() {
        let body: Vec<u8> = (0..100_000u32).map(|n| (n >> 3) as u8 ^ n as u8).collect();
        let header = Header::new(Kind::Pages, 1, body.len()).encode();
        let whole = Sealer::new([7; 32]).seal(&header, b"m", [&body[..]]);
        for size in [1, 4096, GATHER - 1, GATHER, GATHER + 1, 70_000] {
            let pieces = Sealer::new([7; 32]).seal(&header, b"m", body.chunks(size));
            assert_eq!(pieces, whole, "{size}");
        }
        let mut all = body;
        all.push(b'm');
        all.extend_from_slice(&header);
        all.extend_from_slice(&0u64.to_le_bytes());
        assert_eq!(whole, blake3::keyed_hash(&[7; 32], &all).as_bytes()[..SEAL_LEN]);
    }

    proptest! {
        #[test]
        fn what_was_sent_is_taken_in_its_order(frames in any_frames()) {
            let (mut sealer, mut opener) = (Sealer::new([7; 32]), Opener::new([7; 32]));
            for (meta, body) in &frames {
                let frame = sent(&mut sealer, meta, body);
                prop_assert_eq!(comes(&mut opener, &frame), Ok(()));
            }
        }

        #[test]
        fn any_one_bit_of_any_frame_is_missed(frames in any_frames(), which in any::<prop::sample::Index>(), bit in any::<prop::sample::Index>()) {
            let (mut sealer, mut opener) = (Sealer::new([7; 32]), Opener::new([7; 32]));
            let mut frames: Vec<Sealed> = frames.iter().map(|(m, b)| sent(&mut sealer, m, b)).collect();
            let n = which.index(frames.len());
            let (header, meta, body, tag) = &mut frames[n];
            let parts: [&mut [u8]; 4] = [header, meta, body, tag];
            let mut all: Vec<&mut u8> = parts.into_iter().flatten().collect();
            let at = bit.index(all.len() * 8);
            *all[at / 8] ^= 1 << (at % 8);
            for frame in &frames[..n] {
                prop_assert_eq!(comes(&mut opener, frame), Ok(()));
            }
            prop_assert_eq!(comes(&mut opener, &frames[n]), Err(Broken { number: n as u64 }));
        }

        #[test]
        fn a_byte_moved_between_meta_part_and_body_is_missed(meta in prop::collection::vec(any::<u8>(), 1..40), body in prop::collection::vec(any::<u8>(), 1..40)) {
            let frame = sent(&mut Sealer::new([7; 32]), &meta, &body);
            let (mut longer, mut shorter) = (frame.1.clone(), frame.2.clone());
            longer.push(shorter.remove(0));
            let header = Header::new(Kind::Pages, longer.len(), shorter.len()).encode();
            let other = (header, longer, shorter, frame.3);
            prop_assert_eq!(comes(&mut Opener::new([7; 32]), &other), Err(Broken { number: 0 }));
        }
    }

    #[test]
    fn a_frame_lost_repeated_moved_or_of_another_direction_is_named() {
        let mut sealer = Sealer::new([7; 32]);
        // The same frame each time: only its place tells them apart.
        let frames: Vec<Sealed> = (0..4).map(|_| sent(&mut sealer, b"m", b"body")).collect();
        for (order, broken) in [
            (&[0, 1, 2, 3][..], None),
            (&[1], Some(0)),
            (&[0, 2], Some(1)),
            (&[0, 0], Some(1)),
            (&[0, 1, 2, 1], Some(3)),
            (&[0, 2, 1, 3], Some(1)),
        ] {
            let mut opener = Opener::new([7; 32]);
            let result = order.iter().find_map(|n| comes(&mut opener, &frames[*n]).err());
            assert_eq!(result.map(|b| b.number), broken, "{order:?}");
        }
        assert!(comes(&mut Opener::new([8; 32]), &frames[0]).is_err(), "another connection's key");
    }
}
