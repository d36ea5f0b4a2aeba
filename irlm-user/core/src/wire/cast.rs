//! Datagrams of the target rack's multicast (docs/multicast.md): contents that several target hosts need, and the few
//! words that make up for what is lost. The fields are encrypted, and whatever was not sealed with the group's key is
//! refused before it is read.
//!
//! ```text
//!  0         1      2..4   4..12       12 …     last 16
//! ┌─────────┬──────┬──────┬───────────┬────────┬───────┐
//! │ version │ kind │ host │ group tag │ fields │ tag   │   integers little-endian
//! └─────────┴──────┴──────┴───────────┴────────┴───────┘
//! ```

use crate::index::HostSet;
use crate::units::HostIx;
use aes_gcm_siv::aead::AeadInOut as _;
use aes_gcm_siv::{Aes256GcmSiv, KeyInit as _, Nonce, Tag};

/// Version of the datagrams.
pub const CAST_VERSION: u8 = 2;
/// Bytes of a datagram's tag (AES-256-GCM-SIV, RFC 8452).
pub const TAG_LEN: usize = 16;
/// Bytes before the fields.
const HEAD: usize = 12;
/// Largest datagram that is read or made: the payload of a jumbo frame of 9000 bytes.
pub const MAX_DATAGRAM: usize = 8972;
/// Fragments of one block, so that a set of them is 128 bytes.
pub const MAX_FRAGMENTS: usize = 1024;
/// Bytes of one block: 64 contents as they are, with their digests, and some room.
pub const MAX_BLOCK: usize = 288 << 10;
/// Blocks that one report may miss parts of; what is missed beyond them is said in the next.
pub const MAX_MISSES: usize = 40;
/// Blocks in one skip.
pub const MAX_SKIPS: usize = 256;
/// Bytes of a set of hosts (`core::index::MAX_HOSTS`).
const MAX_SET: usize = 128;

/// Why a datagram is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum CastError {
    /// Another group's, or nobody's.
    #[error("not of this group")]
    Foreign,
    /// Of another version.
    #[error("version {0}, which is not spoken here")]
    Version(u8),
    /// Not made with the group's key, or damaged.
    #[error("its seal does not fit")]
    Seal,
    /// Made with the group's key, and wrong all the same.
    #[error("bad {0}")]
    Bad(&'static str),
}

/// What datagrams of one group are made and checked with.
#[derive(Clone)]
pub struct CastKey {
    tag: [u8; 8],
    cipher: Aes256GcmSiv,
}

impl std::fmt::Debug for CastKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CastKey(…)")
    }
}

impl CastKey {
    /// The key of the group with this token.
    #[must_use]
    pub fn new(token: &[u8; 32]) -> Self {
        let (tag, key) = super::keys::multicast(token);
        let mut short = [0; 8];
        short.copy_from_slice(&tag[..8]);
        Self { tag: short, cipher: Aes256GcmSiv::new(&key.into()) }
    }

    /// Encrypts the fields of a datagram and puts the tag behind them.
    fn seal(&self, out: &mut Vec<u8>) {
        let (head, fields) = out.split_at_mut(HEAD);
        // AES takes all that fits into a datagram.
        let tag = self.cipher.encrypt_inout_detached(&NONCE, head, fields.into());
        out.extend_from_slice(&tag.unwrap_or_default());
    }

    /// Decrypts the fields between a head and its tag.
    fn open<'a>(&self, bytes: &'a mut [u8]) -> Result<&'a [u8], CastError> {
        let (head, rest) = bytes.split_at_mut(HEAD);
        let (fields, tag) = rest.split_last_chunk_mut::<TAG_LEN>().ok_or(CastError::Foreign)?;
        let tag = Tag::from(*tag);
        let opened = self.cipher.decrypt_inout_detached(&NONCE, head, (&mut *fields).into(), &tag);
        opened.map(|()| &*fields).map_err(|_| CastError::Seal)
    }
}

/// The same for all datagrams: what is encrypted twice the same is the same datagram, and no two senders have the same
/// head. RFC 8452 is made for that: an attacker learns which datagrams are equal, and nothing else. A key lives as long as a
/// group, and 2³² datagrams (6 TB) are within its bounds.
const NONCE: Nonce = aes_gcm_siv::aead::array::Array([0; 12]);

/// Fragments of a block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fragments([u64; MAX_FRAGMENTS / 64]);

impl std::fmt::Debug for Fragments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Default for Fragments {
    fn default() -> Self {
        Self([0; MAX_FRAGMENTS / 64])
    }
}

impl Fragments {
    /// Fragments 0 to `count` - 1.
    #[must_use]
    pub fn first(count: u16) -> Self {
        let mut s = Self::default();
        (0..count).for_each(|n| {
            s.insert(n);
        });
        s
    }
    /// Puts one in; false if it was there, or cannot be.
    pub fn insert(&mut self, n: u16) -> bool {
        let Some(w) = self.0.get_mut(usize::from(n / 64)) else { return false };
        let bit = 1u64 << (n % 64);
        let new = *w & bit == 0;
        *w |= bit;
        new
    }
    /// Takes one out.
    pub fn remove(&mut self, n: u16) {
        if let Some(w) = self.0.get_mut(usize::from(n / 64)) {
            *w &= !(1u64 << (n % 64));
        }
    }
    /// Whether it is in.
    #[must_use]
    pub fn contains(&self, n: u16) -> bool {
        self.0.get(usize::from(n / 64)).is_some_and(|w| w >> (n % 64) & 1 == 1)
    }
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|w| *w == 0)
    }
    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..MAX_FRAGMENTS as u16).filter(|n| self.contains(*n))
    }
    /// The lowest.
    #[must_use]
    pub fn lowest(&self) -> Option<u16> {
        let (i, w) = (0u16..).zip(self.0).find(|(_, w)| *w != 0)?;
        Some(i * 64 + w.trailing_zeros() as u16)
    }
    /// Puts in all of `other`.
    pub fn union_with(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
    }
    /// Keeps only what is in `other`.
    pub fn intersect_with(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= b);
    }
    /// Takes out all of `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a &= !b);
    }
}

/// A part of a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Data<'a> {
    /// Which block of its sender's.
    pub block: u32,
    /// Bytes of the whole block.
    pub total: u32,
    /// Bytes of every fragment but the last.
    pub size: u16,
    /// Which fragment.
    pub fragment: u16,
    /// The target hosts that need the block.
    pub hosts: HostSet,
    /// The bytes.
    pub payload: &'a [u8],
}

/// How many fragments make up a block.
#[must_use]
pub fn fragments(total: u32, size: u16) -> usize {
    (total as usize).div_ceil(usize::from(size).max(1))
}

/// A block of which something is missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Miss {
    /// Which.
    pub block: u32,
    /// What of it; none: nothing of it has been seen.
    pub fragments: Option<Fragments>,
}

/// What a receiver has of one sender's blocks: it says that it hears, acknowledges and asks in one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Counts up with every report from this receiver to this sender.
    pub count: u32,
    /// It has every block below this one, or need not have it.
    pub below: u32,
    /// Of those from `below` up to this one it misses what `misses` says, and nothing else.
    pub end: u32,
    /// What it misses.
    pub misses: Vec<Miss>,
}

/// One datagram.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cast<'a> {
    /// A part of a block.
    Data(Data<'a>),
    /// The sender is there, and its next new block has this number: asks for reports.
    Announce {
        /// Counts up with every announcement.
        count: u32,
        /// The next new block.
        next: u32,
    },
    /// From a receiver to a sender.
    Report(Report),
    /// From a sender to a receiver: these blocks are not to be waited for.
    Skip(Vec<u32>),
}

impl Cast<'_> {
    fn kind(&self) -> u8 {
        match self {
            Cast::Data(_) => 1,
            Cast::Announce { .. } => 2,
            Cast::Report(_) => 3,
            Cast::Skip(_) => 4,
        }
    }
}

fn begin(key: &CastKey, host: HostIx, kind: u8, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&[CAST_VERSION, kind]);
    out.extend_from_slice(&host.0.to_le_bytes());
    out.extend_from_slice(&key.tag);
}

/// Bytes around the payload of a fragment for these hosts.
#[must_use]
pub fn data_overhead(hosts: &HostSet) -> usize {
    HEAD + 13 + set_len(hosts) + TAG_LEN
}

fn set_len(hosts: &HostSet) -> usize {
    hosts.highest().map_or(0, |h| usize::from(h.0) / 8 + 1)
}

/// Writes a datagram of `host`'s.
pub fn encode(key: &CastKey, host: HostIx, cast: &Cast<'_>, out: &mut Vec<u8>) {
    begin(key, host, cast.kind(), out);
    fields(cast, out);
    key.seal(out);
}

/// Writes what a datagram says.
pub fn fields(cast: &Cast<'_>, out: &mut Vec<u8>) {
    match cast {
        Cast::Data(d) => {
            out.extend_from_slice(&d.block.to_le_bytes());
            out.extend_from_slice(&d.total.to_le_bytes());
            out.extend_from_slice(&d.size.to_le_bytes());
            out.extend_from_slice(&d.fragment.to_le_bytes());
            let n = set_len(&d.hosts);
            out.push(n as u8);
            out.extend(d.hosts.words().flat_map(u64::to_le_bytes).take(n));
            out.extend_from_slice(d.payload);
        }
        Cast::Announce { count, next } => {
            out.extend_from_slice(&count.to_le_bytes());
            out.extend_from_slice(&next.to_le_bytes());
        }
        Cast::Report(r) => {
            for n in [r.count, r.below, r.end] {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.push(r.misses.len().min(MAX_MISSES) as u8);
            for m in r.misses.iter().take(MAX_MISSES) {
                out.extend_from_slice(&m.block.to_le_bytes());
                let bits = m.fragments.unwrap_or_default().0.map(u64::to_le_bytes);
                let bits = bits.as_flattened();
                let n = bits.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
                out.push(n as u8);
                out.extend_from_slice(&bits[..n]);
            }
        }
        Cast::Skip(blocks) => {
            out.extend_from_slice(&(blocks.len().min(MAX_SKIPS) as u16).to_le_bytes());
            blocks.iter().take(MAX_SKIPS).for_each(|b| out.extend_from_slice(&b.to_le_bytes()));
        }
    }
}

/// What follows version, host and tag, kind first, made a datagram of `host`'s whatever it says: for those who try what a
/// member that has gone mad can do.
#[must_use]
pub fn seal(key: &CastKey, host: HostIx, said: &[u8]) -> Vec<u8> {
    let (mut out, (kind, fields)) = (Vec::new(), said.split_first().unwrap_or((&0, &[])));
    begin(key, host, *kind, &mut out);
    out.extend_from_slice(fields);
    key.seal(&mut out);
    out
}

/// Reads a datagram, which is decrypted where it is: who sent it, and what it says.
pub fn decode<'a>(key: &CastKey, bytes: &'a mut [u8]) -> Result<(HostIx, Cast<'a>), CastError> {
    if bytes.len() < HEAD + TAG_LEN || bytes.len() > MAX_DATAGRAM || bytes[4..HEAD] != key.tag {
        return Err(CastError::Foreign);
    }
    if bytes[0] != CAST_VERSION {
        return Err(CastError::Version(bytes[0]));
    }
    let (kind, host) = (bytes[1], HostIx(u16::from_le_bytes([bytes[2], bytes[3]])));
    let mut r = Reader(key.open(bytes)?);
    let cast = match kind {
        1 => Cast::Data(r.data()?),
        2 => Cast::Announce { count: r.u32()?, next: r.u32()? },
        3 => Cast::Report(r.report()?),
        4 => {
            let n = usize::from(r.u16()?);
            if n > MAX_SKIPS {
                return Err(CastError::Bad("number of blocks"));
            }
            Cast::Skip((0..n).map(|_| r.u32()).collect::<Result<_, _>>()?)
        }
        _ => return Err(CastError::Bad("kind")),
    };
    if !r.0.is_empty() {
        return Err(CastError::Bad("trailing bytes"));
    }
    Ok((host, cast))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], CastError> {
        let (a, b) = self.0.split_at_checked(n).ok_or(CastError::Bad("length"))?;
        self.0 = b;
        Ok(a)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], CastError> {
        let (a, b) = self.0.split_first_chunk::<N>().ok_or(CastError::Bad("length"))?;
        self.0 = b;
        Ok(*a)
    }
    fn u16(&mut self) -> Result<u16, CastError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> Result<u32, CastError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// A length byte and so many bytes, of which the last is not zero.
    fn bits(&mut self, what: &'static str) -> Result<&'a [u8], CastError> {
        let n = usize::from(self.array::<1>()?[0]);
        let bits = self.bytes(n)?;
        if n > MAX_SET || bits.last() == Some(&0) {
            return Err(CastError::Bad(what));
        }
        Ok(bits)
    }

    fn data(&mut self) -> Result<Data<'a>, CastError> {
        let (block, total) = (self.u32()?, self.u32()?);
        let (size, fragment) = (self.u16()?, self.u16()?);
        let bits = self.bits("hosts")?;
        let set = (0u16..bits.len() as u16 * 8).filter(|n| bits[usize::from(n / 8)] >> (n % 8) & 1 == 1);
        let hosts = set.map(HostIx).collect();
        let payload = self.bytes(self.0.len())?;
        let count = fragments(total, size);
        if total == 0 || total as usize > MAX_BLOCK || size == 0 || count > MAX_FRAGMENTS {
            return Err(CastError::Bad("block length"));
        }
        let from = usize::from(fragment) * usize::from(size);
        if usize::from(fragment) >= count || payload.len() != usize::from(size).min(total as usize - from) {
            return Err(CastError::Bad("fragment"));
        }
        Ok(Data { block, total, size, fragment, hosts, payload })
    }

    fn report(&mut self) -> Result<Report, CastError> {
        let (count, below, end) = (self.u32()?, self.u32()?, self.u32()?);
        let n = usize::from(self.array::<1>()?[0]);
        if n > MAX_MISSES || end < below {
            return Err(CastError::Bad("report"));
        }
        let mut misses = Vec::with_capacity(n);
        for _ in 0..n {
            let block = self.u32()?;
            let bits = self.bits("fragments")?;
            let mut set = Fragments::default();
            for (word, chunk) in set.0.iter_mut().zip(bits.chunks(8)) {
                let mut bytes = [0; 8];
                bytes[..chunk.len()].copy_from_slice(chunk);
                *word = u64::from_le_bytes(bytes);
            }
            misses.push(Miss { block, fragments: (!bits.is_empty()).then_some(set) });
        }
        Ok(Report { count, below, end, misses })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> CastKey {
        CastKey::new(&[7; 32])
    }

    fn hex(b: &[u8]) -> String {
        b.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn the_bytes_of_every_kind_are_these() {
        let mut fragments = Fragments::first(2);
        fragments.insert(9);
        let hosts = [HostIx(1), HostIx(9)].into_iter().collect();
        let data = Data { block: 5, total: 7, size: 4, fragment: 1, hosts, payload: b"end" };
        let misses = vec![Miss { block: 3, fragments: None }, Miss { block: 4, fragments: Some(fragments) }];
        let head = |kind| format!("02{kind}0200{}", hex(&key().tag));
        for (cast, kind, said) in [
            (Cast::Data(data), "01", "05000000070000000400010002020265 6e64"),
            (Cast::Announce { count: 2, next: 0x0102_0304 }, "02", "0200000004030201"),
            (
                Cast::Report(Report { count: 1, below: 3, end: 5, misses }),
                "03",
                "010000000300000005000000 02 03000000 00 04000000 02 0302",
            ),
            (Cast::Skip(vec![1, 256]), "04", "0200 01000000 00010000"),
        ] {
            let mut out = Vec::new();
            encode(&key(), HostIx(2), &cast, &mut out);
            assert_eq!(hex(&out[..HEAD]), head(kind));
            let said = said.replace(' ', "");
            assert!(!hex(&out).contains(&said), "what is said can be read: {}", hex(&out));
            assert_eq!(hex(key().open(&mut out.clone()).unwrap()), said);
            assert_eq!(out.len(), HEAD + said.len() / 2 + TAG_LEN);
            assert_eq!(decode(&key(), &mut out), Ok((HostIx(2), cast)));
        }
        // The keys' derivation and the cipher are part of the wire.
        let mut out = Vec::new();
        encode(&key(), HostIx(2), &Cast::Announce { count: 2, next: 0x0102_0304 }, &mut out);
        assert_eq!(hex(&out), SEALED);
    }

    const SEALED: &str = "0202020068dca3accbefe8c1059b77bd81eaeed175cdd876bac076184aa7d077b55291c7";

    #[test]
    fn what_is_not_of_the_group_or_damaged_is_refused() {
        let mut out = Vec::new();
        encode(&key(), HostIx(2), &Cast::Announce { count: 1, next: 1 }, &mut out);
        assert_eq!(decode(&CastKey::new(&[8; 32]), &mut out.clone()), Err(CastError::Foreign));
        for at in 0..out.len() {
            let mut bad = out.clone();
            bad[at] ^= 1;
            let want = match at {
                0 => CastError::Version(3),
                4..HEAD => CastError::Foreign,
                _ => CastError::Seal,
            };
            assert_eq!(decode(&key(), &mut bad), Err(want), "byte {at}");
        }
        for cut in 0..out.len() {
            assert!(decode(&key(), &mut out.clone()[..cut]).is_err());
        }
        assert_eq!(decode(&key(), &mut vec![0; MAX_DATAGRAM + 1]), Err(CastError::Foreign));
    }

    #[test]
    fn lengths_are_held_against_their_caps_and_each_other() {
        let hosts = HostSet::one(HostIx(0));
        let data = |total, size, fragment, payload| {
            let d = Data { block: 0, total, size, fragment, hosts: hosts.clone(), payload };
            let mut out = Vec::new();
            encode(&key(), HostIx(0), &Cast::Data(d), &mut out);
            decode(&key(), &mut out).map(|_| ())
        };
        let page = [0; 4096];
        assert_eq!(data(10, 4, 2, &page[..2]), Ok(()));
        assert_eq!(data(MAX_BLOCK as u32, 4096, 0, &page), Ok(()));
        for (total, size, fragment, payload) in [
            (10, 4, 2, &page[..3]),
            (10, 4, 2, &page[..1]),
            (10, 4, 3, &page[..0]),
            (10, 4, 0, &page[..0]),
            (10, 0, 0, &page[..0]),
            (0, 4, 0, &page[..0]),
            (MAX_BLOCK as u32 + 1, 4096, 0, &page[..]),
            (u32::MAX, 1, 0, &page[..1]),
            (MAX_FRAGMENTS as u32 + 1, 1, 0, &page[..1]),
        ] {
            assert!(data(total, size, fragment, payload).is_err(), "{total} {size} {fragment}");
        }
    }

    proptest! {
        #[test]
        fn noise_with_a_good_seal_is_read_or_refused(kind in 0u8..6, mut fields in prop::collection::vec(any::<u8>(), 0..300)) {
            fields.insert(0, kind);
            let said = seal(&key(), HostIx(1), &fields);
            if let Ok((host, cast)) = decode(&key(), &mut said.clone()) {
                let mut again = Vec::new();
                encode(&key(), host, &cast, &mut again);
                prop_assert_eq!(again, said);
            }
        }

        #[test]
        fn fragments_behave_like_a_set(a in prop::collection::btree_set(0u16..1024, 0..40), b in prop::collection::btree_set(0u16..1024, 0..40)) {
            let of = |s: &std::collections::BTreeSet<u16>| {
                let mut f = Fragments::default();
                s.iter().for_each(|n| assert!(f.insert(*n) && !f.insert(*n)));
                f
            };
            let (mut x, y) = (of(&a), of(&b));
            prop_assert_eq!(x.len(), a.len());
            prop_assert_eq!(x.is_empty(), a.is_empty());
            prop_assert_eq!(x.lowest(), a.first().copied());
            x.union_with(&y);
            prop_assert_eq!(&x, &of(&a.union(&b).copied().collect()));
            x.subtract(&y);
            prop_assert_eq!(x.iter().collect::<Vec<_>>(), a.difference(&b).copied().collect::<Vec<_>>());
        }
    }
}
