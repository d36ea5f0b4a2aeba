//! What "the same content" means: a 160-bit keyed digest of a page, and the tests that need no digest at all.
//!
//! The key is drawn per group and mixed with the trust domain's label, so equal pages of two domains have different
//! digests and are never shared (invariant 6), and a guest cannot aim at a digest it does not know the key of.

use super::units::{PAGE_SIZE, PageBytes};
use blake3::IncrementCounter;
use blake3::platform::Platform;
use sha1::Digest as _;

/// Bytes in a [`Digest`]: 160 bits, as the paper's SHA-1; BLAKE3 output is cut to it.
pub const DIGEST_LEN: usize = 20;

/// Keyed content hash of one page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; DIGEST_LEN]);

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for b in &self.0[..6] {
            write!(f, "{b:02x}")?;
        }
        f.write_str("…")
    }
}

/// Which hash function a group uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Keyed BLAKE3 cut to 160 bits (default): 2.8 times the speed of SHA-1 with its own instructions, where there is AVX-512 (`irlm-lab bench digest`).
    #[default]
    Blake3,
    /// SHA-1 over key and page: the paper's, for comparison.
    Sha1,
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Blake3 => "blake3",
            Self::Sha1 => "sha1",
        })
    }
}

/// Hashes the pages of one trust domain of one group.
#[derive(Clone)]
pub struct Hasher {
    algorithm: Algorithm,
    key: [u8; 32],
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hasher({:?})", self.algorithm)
    }
}

impl Hasher {
    /// A hasher for the trust domain `tenant` of the group that drew `group_key`.
    #[must_use]
    pub fn new(algorithm: Algorithm, group_key: &[u8; 32], tenant: &str) -> Self {
        Self { algorithm, key: super::wire::keys::domain(group_key, tenant) }
    }

    /// The digest of one page.
    #[must_use]
    pub fn page(&self, page: &PageBytes) -> Digest {
        let mut out = [0; DIGEST_LEN];
        match self.algorithm {
            Algorithm::Blake3 => {
                out.copy_from_slice(&blake3::keyed_hash(&self.key, page).as_bytes()[..DIGEST_LEN]);
            }
            Algorithm::Sha1 => {
                let mut h = sha1::Sha1::new();
                h.update(self.key);
                h.update(page);
                out.copy_from_slice(&h.finalize());
            }
        }
        Digest(out)
    }

    /// Whether each of these pages has the digest that stands for it.
    pub fn vouches<'p>(
        &self,
        pages: impl IntoIterator<Item = &'p PageBytes>,
        mut digests: impl Iterator<Item = Digest>,
    ) -> bool {
        let mut good = true;
        self.pages(pages, |d| good &= digests.next() == Some(d));
        good && digests.next().is_none()
    }

    /// The digest of each of these pages, in their order. Several at a time, where that is faster.
    pub fn pages<'p>(&self, pages: impl IntoIterator<Item = &'p PageBytes>, mut each: impl FnMut(Digest)) {
        let mut pages = pages.into_iter();
        let Some(first) = pages.next() else { return };
        let mut batch = [first; LANES];
        let mut n = 1;
        let mut hashes = [[0; HASH]; LANES];
        loop {
            while n < LANES
                && let Some(page) = pages.next()
            {
                batch[n] = page;
                n += 1;
            }
            if n < FEW || self.algorithm != Algorithm::Blake3 {
                batch[..n].iter().for_each(|page| each(self.page(page)));
            } else {
                side_by_side(&self.key, &batch[..n], &mut hashes);
                for hash in &hashes[..n] {
                    let mut out = [0; DIGEST_LEN];
                    out.copy_from_slice(&hash[..DIGEST_LEN]);
                    each(Digest(out));
                }
            }
            if n < LANES {
                return;
            }
            n = 0;
        }
    }
}

/// Pages hashed side by side: what the widest vectors take (16 × 32 bits in AVX-512). A page alone fills four of these lanes,
/// its four chunks.
const LANES: usize = 16;
/// With fewer pages than this left the lanes are emptier than with one page at a time.
const FEW: usize = 4;
const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE_SIZE / CHUNK;
const HASH: usize = 32;
const BLOCK: usize = 64;

/// Domain flags of the BLAKE3 paper (section 2.2, table 3).
mod flags {
    pub(super) const CHUNK_START: u8 = 1 << 0;
    pub(super) const CHUNK_END: u8 = 1 << 1;
    pub(super) const PARENT: u8 = 1 << 2;
    pub(super) const ROOT: u8 = 1 << 3;
    pub(super) const KEYED_HASH: u8 = 1 << 4;
}

/// Keyed BLAKE3 of up to [`LANES`] pages, side by side: the same tree as of each alone (BLAKE3 paper, section 2.1), level by level.
fn side_by_side(key: &[u8; HASH], pages: &[&PageBytes], out: &mut [[u8; HASH]; LANES]) {
    let n = pages.len().min(LANES);
    let Some(first) = pages.first() else { return };
    let (platform, mut words) = (Platform::detect(), [0u32; 8]);
    for (w, b) in words.iter_mut().zip(key.as_chunks().0) {
        *w = u32::from_le_bytes(*b);
    }
    let mut chunks = [[0; LANES * HASH]; CHUNKS];
    for (c, hashes) in chunks.iter_mut().enumerate() {
        let mut inputs = [&first.as_chunks::<CHUNK>().0[c]; LANES];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks::<CHUNK>().0[c];
        }
        let (start, end) = (flags::CHUNK_START, flags::CHUNK_END);
        let number = c as u64;
        let out = &mut hashes[..n * HASH];
        let each = IncrementCounter::No;
        platform.hash_many(&inputs[..n], &words, number, each, flags::KEYED_HASH, start, end, out);
    }
    let parents = |pairs: &[[u8; BLOCK]], flags: u8, out: &mut [u8]| {
        let mut inputs = [&pairs[0]; LANES];
        inputs.iter_mut().zip(pairs).for_each(|(input, pair)| *input = pair);
        let inputs = &inputs[..pairs.len()];
        platform.hash_many(inputs, &words, 0, IncrementCounter::No, flags, 0, 0, out);
    };
    let mut halves = [[0; LANES * HASH]; 2];
    for (half, hashes) in halves.iter_mut().zip(chunks.as_chunks::<2>().0) {
        let pairs = paired(&hashes[0], &hashes[1]);
        parents(&pairs[..n], flags::KEYED_HASH | flags::PARENT, &mut half[..n * HASH]);
    }
    let pairs = paired(&halves[0], &halves[1]);
    let root = flags::KEYED_HASH | flags::PARENT | flags::ROOT;
    parents(&pairs[..n], root, &mut out.as_flattened_mut()[..n * HASH]);
}

/// Left and right hashes in blocks of two.
fn paired(left: &[u8; LANES * HASH], right: &[u8; LANES * HASH]) -> [[u8; BLOCK]; LANES] {
    let mut pairs = [[0; BLOCK]; LANES];
    let both = left.as_chunks::<HASH>().0.iter().zip(right.as_chunks::<HASH>().0);
    for (pair, (l, r)) in pairs.iter_mut().zip(both) {
        pair[..HASH].copy_from_slice(l);
        pair[HASH..].copy_from_slice(r);
    }
    pairs
}

/// The fill byte if every byte of the page is the same. Looks at whole words, and leaves at the first difference.
#[must_use]
pub fn uniform(page: &PageBytes) -> Option<u8> {
    let b = page[0];
    let first = u64::from_ne_bytes([b; 8]);
    let mut at = 0;
    while at < PAGE_SIZE {
        let mut differ = 0;
        for w in page[at..at + 256].chunks_exact(8) {
            differ |= u64::from_ne_bytes(w.try_into().unwrap_or([0; 8])) ^ first;
        }
        if differ != 0 {
            return None;
        }
        at += 256;
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_sees_every_single_differing_byte() {
        for fill in [0u8, 7, 255] {
            let mut p = [fill; PAGE_SIZE];
            assert_eq!(uniform(&p), Some(fill));
            for i in (0..PAGE_SIZE).step_by(13).chain([1, PAGE_SIZE - 1]) {
                p[i] ^= 1;
                assert_eq!(uniform(&p), None, "byte {i}");
                p[i] ^= 1;
            }
        }
    }

    #[test]
    fn domains_keys_and_algorithms_never_share_a_digest() {
        let p = [3u8; PAGE_SIZE];
        let mut seen = std::collections::HashSet::new();
        for alg in [Algorithm::Blake3, Algorithm::Sha1] {
            for key in [[0u8; 32], [1; 32]] {
                for tenant in ["", "a", "b"] {
                    assert!(seen.insert(Hasher::new(alg, &key, tenant).page(&p)));
                }
            }
        }
    }

    #[test]
    fn pages_side_by_side_have_the_digests_that_they_have_alone() {
        let pages: Vec<PageBytes> = (0..67u32)
            .map(|n| {
                std::array::from_fn(|i| {
                    (n.wrapping_mul(2_654_435_761).rotate_left(i as u32 % 32) >> 3) as u8 ^ i as u8
                })
            })
            .collect();
        for algorithm in [Algorithm::Blake3, Algorithm::Sha1] {
            let h = Hasher::new(algorithm, &[7; 32], "a");
            for n in [0, 1, 2, 3, 4, 5, 15, 16, 17, 19, 20, 32, 67] {
                let mut many = Vec::new();
                h.pages(&pages[..n], |d| many.push(d));
                assert_eq!(many, pages[..n].iter().map(|p| h.page(p)).collect::<Vec<_>>(), "{n} pages");
            }
        }
    }

    #[test]
    fn blake3_is_the_published_keyed_mode() {
        let h = Hasher { algorithm: Algorithm::Blake3, key: [9; 32] };
        let p = [5u8; PAGE_SIZE];
        assert_eq!(h.page(&p).0[..], blake3::keyed_hash(&[9; 32], &p).as_bytes()[..20]);
    }
}
