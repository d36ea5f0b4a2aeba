//! A block: a trust domain's number and one `Contents` frame of the wire, so that what comes by multicast is taken like
//! what comes from a peer.

use crate::wire::frame::{HEADER_LEN, Header, Kind, WireError};

/// Bytes before the frame.
const HEAD: usize = 2;

/// Puts a block together; `body`: in pieces.
pub fn seal(domain: u16, header: Header, meta: &[u8], body: &[&[u8]], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&domain.to_le_bytes());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(meta);
    body.iter().for_each(|b| out.extend_from_slice(b));
}

/// What a block is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened<'a> {
    /// The contents' trust domain.
    pub domain: u16,
    /// The frame's header.
    pub header: Header,
    /// Its meta part.
    pub meta: &'a [u8],
    /// Its body.
    pub body: &'a [u8],
}

/// Takes one apart.
pub fn open(bytes: &[u8]) -> Result<Opened<'_>, WireError> {
    let short = WireError::Short(Kind::Contents);
    let (domain, rest) = bytes.split_first_chunk::<HEAD>().ok_or(short.clone())?;
    let (header, rest) = rest.split_first_chunk::<HEADER_LEN>().ok_or(short.clone())?;
    let header = Header::decode(header)?;
    if header.kind != Kind::Contents {
        return Err(WireError::Unexpected(header.kind));
    }
    if rest.len() != header.payload_len() {
        return Err(short);
    }
    let (meta, body) = rest.split_at(header.meta_len as usize);
    Ok(Opened { domain: u16::from_le_bytes(*domain), header, meta, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_contents_frame_and_nothing_else() {
        let mut out = Vec::new();
        seal(3, Header::new(Kind::Contents, 2, 4), b"me", &[b"bo", b"dy"], &mut out);
        let o = open(&out).unwrap();
        assert_eq!((o.domain, o.header.kind, o.meta, o.body), (3, Kind::Contents, &b"me"[..], &b"body"[..]));
        for cut in 0..out.len() {
            assert!(open(&out[..cut]).is_err());
        }
        let mut more = out.clone();
        more.push(0);
        assert!(open(&more).is_err());
        seal(3, Header::new(Kind::Voids, 6, 0), b"mebody", &[], &mut out);
        assert_eq!(open(&out), Err(WireError::Unexpected(Kind::Voids)));
    }
}
