//! A set of hosts in 24 bytes: racks have tens of hosts, so the first 64 numbers are one word and only larger groups
//! pay for a heap block.

use crate::units::HostIx;

/// Hosts of one side (source or target) of a group: some ten racks. Bounds every host set on the wire and in memory
/// (128 bytes of bits).
pub const MAX_HOSTS: u16 = 1024;

/// A set of host numbers below [`MAX_HOSTS`]. Equal sets are equal values, so a set can be a key.
#[derive(Clone, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct HostSet {
    low: u64,
    /// Hosts 64 and up; the last word is never zero, and an empty block is `None`.
    high: Option<Box<[u64]>>,
}

/// The target hosts that need a content.
pub type TargetSet = HostSet;

impl HostSet {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { low: 0, high: None }
    }

    /// The set of one host; empty if its number is not below [`MAX_HOSTS`].
    #[must_use]
    pub fn one(host: HostIx) -> Self {
        let mut s = Self::new();
        s.insert(host);
        s
    }

    /// Hosts 0 to `count` - 1 (at most [`MAX_HOSTS`]).
    #[must_use]
    pub fn first(count: u16) -> Self {
        (0..count.min(MAX_HOSTS)).map(HostIx).collect()
    }

    /// Adds a host. False, and nothing added, if its number is not below [`MAX_HOSTS`].
    pub fn insert(&mut self, host: HostIx) -> bool {
        if host.0 >= MAX_HOSTS {
            return false;
        }
        let (word, bit) = (usize::from(host.0 / 64), 1u64 << (host.0 % 64));
        if word == 0 {
            self.low |= bit;
        } else {
            self.grow(word);
            if let Some(w) = self.high.as_mut().and_then(|h| h.get_mut(word - 1)) {
                *w |= bit;
            }
        }
        true
    }

    /// Takes a host out.
    pub fn remove(&mut self, host: HostIx) {
        let (word, bit) = (usize::from(host.0 / 64), 1u64 << (host.0 % 64));
        if word == 0 {
            self.low &= !bit;
        } else if let Some(w) = self.high.as_mut().and_then(|h| h.get_mut(word - 1)) {
            *w &= !bit;
            self.trim();
        }
    }

    /// Whether the host is in the set.
    #[must_use]
    pub fn contains(&self, host: HostIx) -> bool {
        self.word(usize::from(host.0 / 64)) >> (host.0 % 64) & 1 == 1
    }

    /// Hosts in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether no host is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.low == 0 && self.high.is_none()
    }

    /// Adds all hosts of `other`; whether that changed anything.
    pub fn union_with(&mut self, other: &Self) -> bool {
        let mut changed = other.low & !self.low != 0;
        self.low |= other.low;
        if let Some(theirs) = &other.high {
            self.grow(theirs.len());
            for (w, o) in self.high.iter_mut().flatten().zip(theirs.iter()) {
                changed |= o & !*w != 0;
                *w |= o;
            }
        }
        changed
    }

    /// Whether every host of this set is in `other`.
    #[must_use]
    pub fn is_subset(&self, other: &Self) -> bool {
        self.words().enumerate().all(|(i, w)| w & !other.word(i) == 0)
    }

    /// The largest host number in the set.
    #[must_use]
    pub fn highest(&self) -> Option<HostIx> {
        let (i, w) = self.words().enumerate().filter(|(_, w)| *w != 0).last()?;
        // At most 16 words of 64 bits: fits.
        u16::try_from(i as u32 * 64 + 63 - w.leading_zeros()).ok().map(HostIx)
    }

    /// The hosts in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = HostIx> + '_ {
        self.words().zip(0u16..).flat_map(|(word, i)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = u16::try_from(rest.trailing_zeros()).ok().filter(|_| rest != 0)?;
                rest &= rest - 1;
                Some(HostIx(i * 64 + bit))
            })
        })
    }

    /// The bits, host 0 lowest, in words of 64; the last word is not zero unless it is the only one.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::once(self.low).chain(self.high.iter().flatten().copied())
    }

    fn word(&self, i: usize) -> u64 {
        match i {
            0 => self.low,
            _ => self.high.as_ref().and_then(|h| h.get(i - 1)).copied().unwrap_or(0),
        }
    }

    fn grow(&mut self, words: usize) {
        let have = self.high.as_ref().map_or(0, |h| h.len());
        if have < words {
            let mut v = self.high.take().map_or_else(Vec::new, Vec::from);
            v.resize(words, 0);
            self.high = Some(v.into_boxed_slice());
        }
    }

    fn trim(&mut self) {
        let Some(h) = self.high.take() else { return };
        let mut v = Vec::from(h);
        while v.last() == Some(&0) {
            v.pop();
        }
        self.high = (!v.is_empty()).then(|| v.into_boxed_slice());
    }
}

impl FromIterator<HostIx> for HostSet {
    /// Numbers not below [`MAX_HOSTS`] are left out.
    fn from_iter<I: IntoIterator<Item = HostIx>>(hosts: I) -> Self {
        let mut s = Self::new();
        for h in hosts {
            s.insert(h);
        }
        s
    }
}

impl std::fmt::Debug for HostSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter().map(|h| h.0)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            a in prop::collection::btree_set(0u16..300, 0..20),
            b in prop::collection::btree_set(0u16..300, 0..20),
        ) {
            let make = |s: &BTreeSet<u16>| s.iter().copied().map(HostIx).collect::<HostSet>();
            let (mut x, y) = (make(&a), make(&b));
            prop_assert_eq!(x.iter().map(|h| h.0).collect::<Vec<_>>(), a.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(x.len(), a.len());
            prop_assert_eq!(x.is_empty(), a.is_empty());
            prop_assert_eq!(x.highest().map(|h| h.0), a.last().copied());
            prop_assert_eq!(x.is_subset(&y), a.is_subset(&b));
            prop_assert!(a.iter().all(|&h| x.contains(HostIx(h))));
            prop_assert_eq!(x.union_with(&y), !b.is_subset(&a));
            prop_assert_eq!(&x, &make(&a.union(&b).copied().collect()));
            for h in &b {
                x.remove(HostIx(*h));
            }
            prop_assert_eq!(&x, &make(&a.difference(&b).copied().collect()));
        }
    }

    #[test]
    fn refuses_numbers_above_the_cap() {
        let mut s = HostSet::new();
        assert!(s.insert(HostIx(MAX_HOSTS - 1)));
        assert!(!s.insert(HostIx(MAX_HOSTS)));
        assert_eq!(s.len(), 1);
        assert_eq!(HostSet::first(u16::MAX).len(), usize::from(MAX_HOSTS));
        assert_eq!(size_of::<HostSet>(), 24);
    }
}
