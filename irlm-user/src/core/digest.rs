//! What "the same content" means: a 160-bit keyed digest of a page, and the tests that need no digest at all.
//!
//! The key is drawn per group and mixed with the trust domain's label, so equal pages of two domains have different
//! digests and are never shared (DESIGN rule 6), and a guest cannot aim at a digest it does not know the key of.

use super::units::{PAGE_SIZE, PageBytes};
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
    /// Keyed BLAKE3 cut to 160 bits (default): about five times SHA-1's speed here (docs/testing.md, benchmarks).
    #[default]
    Blake3,
    /// SHA-1 over key and page: the paper's, for comparison.
    Sha1,
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
        let mut h = blake3::Hasher::new_keyed(group_key);
        h.update(b"irlm trust domain\0");
        h.update(tenant.as_bytes());
        Self { algorithm, key: *h.finalize().as_bytes() }
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
    fn blake3_is_the_published_keyed_mode() {
        let h = Hasher { algorithm: Algorithm::Blake3, key: [9; 32] };
        let p = [5u8; PAGE_SIZE];
        assert_eq!(h.page(&p).0[..], blake3::keyed_hash(&[9; 32], &p).as_bytes()[..20]);
    }
}
