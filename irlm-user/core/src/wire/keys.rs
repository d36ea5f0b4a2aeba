//! What is derived from a group's secret: one key for each use, so that whoever learns one of them knows no other, and
//! the secret itself is shown to nobody on a data connection.

use crate::units::VmIx;

/// What a caller shows in its Hello: that it knows the secret.
#[must_use]
pub fn pass(secret: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("irlm wire v3: what opens a data connection", secret)
}

/// What opens a group at the rack's index: the index learns no other key by it, so it cannot guess contents, nor speak as
/// anybody of the group.
#[must_use]
pub fn index(secret: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("irlm wire v3: what opens a group at the index", secret)
}

/// The keys that seal one connection (`core::seal`): the caller's frames, and the taker's. They hang on all that was said in
/// Hello and HelloOk, which have a random number each, so that no two connections have the same.
#[must_use]
pub fn seals(secret: &[u8; 32], hello: &[u8], ok: &[u8]) -> ([u8; 32], [u8; 32]) {
    let mut h = blake3::Hasher::new_derive_key("irlm wire v3: seals of a connection");
    h.update(secret);
    for said in [hello, ok] {
        h.update(&(said.len() as u64).to_le_bytes());
        h.update(said);
    }
    let (mut both, mut caller, mut taker) = ([0; 64], [0; 32], [0; 32]);
    h.finalize_xof().fill(&mut both);
    caller.copy_from_slice(&both[..32]);
    taker.copy_from_slice(&both[32..]);
    (caller, taker)
}

/// The key by which both ends account for a VM's pages (`core::account`).
#[must_use]
pub fn account(secret: &[u8; 32], vm: VmIx) -> [u8; 32] {
    let mut h = blake3::Hasher::new_derive_key("irlm wire v3: account of a VM's pages");
    h.update(secret);
    h.update(&vm.0.to_le_bytes());
    *h.finalize().as_bytes()
}

/// The key of a trust domain's digests (`core::digest`).
#[must_use]
pub fn domain(secret: &[u8; 32], tenant: &str) -> [u8; 32] {
    let mut h = blake3::Hasher::new_keyed(secret);
    h.update(b"irlm trust domain\0");
    h.update(tenant.as_bytes());
    *h.finalize().as_bytes()
}

/// By what multicast datagrams of a group are told from others', and the key that they are sealed with (`core::cast`).
#[must_use]
pub fn multicast(secret: &[u8; 32]) -> ([u8; 32], [u8; 32]) {
    (
        blake3::derive_key("irlm target rack multicast v2: group tag", secret),
        blake3::derive_key("irlm target rack multicast v2: sealing key", secret),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_uses_groups_connections_or_vms_share_a_key() {
        let mut seen = std::collections::HashSet::new();
        for secret in [[0; 32], [1; 32]] {
            assert!(seen.insert(secret));
            assert!(seen.insert(pass(&secret)) && seen.insert(index(&secret)));
            for (hello, ok) in [(&b"ab"[..], &b"c"[..]), (b"a", b"bc"), (b"ab", b"d"), (b"", b"")] {
                let (caller, taker) = seals(&secret, hello, ok);
                assert!(seen.insert(caller) && seen.insert(taker));
            }
            for vm in [0, 1, 256] {
                assert!(seen.insert(account(&secret, VmIx(vm))));
            }
            for tenant in ["", "a"] {
                assert!(seen.insert(domain(&secret, tenant)));
            }
            let (tag, seal) = multicast(&secret);
            assert!(seen.insert(tag) && seen.insert(seal));
        }
    }
}
