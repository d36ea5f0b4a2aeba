//! The rack index as plain data: which source hosts hold a content, which target hosts need it from there, and the
//! short name, `(bucket, index)`, under which the group speaks of it (paper §2.4). One [`Index`] a group.
//!
//! A rack has up to hundreds of millions of distinct pages, so an entry is 36 bytes plus 5.7 to 11.4 bytes of hash
//! table (load 0.88 to 0.44) with its first holder, and 12 bytes for each further holder. Sets of target hosts are
//! kept once and named by number: a rack's hosts have few different ones. 100 million digests with two holders each
//! take about 5.7 GB. Fixed costs are 4 MiB of bucket counters.
//!
//! At a bound of [`Limits`] a registration gets no id. Its host then treats the content as known to itself alone:
//! that costs core-link bytes, nothing else.

use super::digest::{DIGEST_LEN, Digest};
use super::units::{HostIx, PageId};
use hashbrown::HashTable;
use std::collections::HashMap;

// Host sets.
mod hosts;
// Append-only tables without the slack of a doubling `Vec`.
mod slab;

pub use hosts::{HostSet, MAX_HOSTS, TargetSet};
pub(super) use slab::Slab;

/// Hash buckets of the index. The bucket of a digest is its first 32 bits modulo this.
pub const BUCKETS: u32 = 1 << 20;
const _: () = assert!(BUCKETS < 1 << 31, "the top bit of a bucket marks host-local page ids");

/// What one source host knows about one content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// The content.
    pub digest: Digest,
    /// Target hosts of the host's VMs that have it. Must not be empty.
    pub targets: TargetSet,
    /// Guest pages on this host with this content; only counted.
    pub pages: u32,
}

/// Content that appeared after the plan, as its source host sent it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LateItem {
    /// The content.
    pub digest: Digest,
    /// The target host it was sent to.
    pub target: HostIx,
    /// Whether it was sent with a name, so that the target host's store keeps it; else this is a question only.
    pub kept: bool,
}

/// Answer to content that appeared after the plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LateReply {
    /// Its id, if the index has room for it.
    pub id: Option<PageId>,
    /// Target hosts in whose stores the content is or, by the plan, will be, whoever brings it; one where this very
    /// report says it is kept included.
    pub delivered: TargetSet,
}

/// Bounds of one group's index. What is refused gets no id (module text).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Distinct digests.
    pub max_entries: u32,
    /// Holders beyond the first, over all digests.
    pub max_further_holders: u32,
    /// Different sets of target hosts, over all registrations.
    pub max_target_sets: u32,
    /// Random number mixed into the hash table's hashes, so that nobody can aim digests at one slot.
    pub hash_seed: u64,
}

impl Default for Limits {
    /// 64 Mi digests (256 GiB of distinct content) with 128 Mi further holders: 4.8 GB when full.
    fn default() -> Self {
        Self { max_entries: 1 << 26, max_further_holders: 1 << 27, max_target_sets: 1 << 16, hash_seed: 0 }
    }
}

/// Counts of one index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexStats {
    /// Distinct digests.
    pub entries: u64,
    /// Pairs of digest and holder.
    pub holders: u64,
    /// Guest pages behind the accepted registrations (a host that registers again counts again).
    pub pages: u64,
    /// Registrations and late reports that got no id.
    pub refused: u64,
}

/// No further holder.
const END: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    digest: Digest,
    /// Position in the bucket.
    position: u32,
    set: u32,
    more: u32,
    host: u16,
}
const _: () = assert!(size_of::<Entry>() == 36);

#[derive(Clone, Copy, Debug)]
struct Further {
    next: u32,
    set: u32,
    host: u16,
}
const _: () = assert!(size_of::<Further>() == 12);

#[derive(Clone, Debug)]
struct Sealed {
    sources: HostSet,
    entries: u32,
}

/// The index of one group.
#[derive(Debug)]
pub struct Index {
    limits: Limits,
    source_hosts: u16,
    target_hosts: u16,
    entries: Slab<Entry>,
    further: Slab<Further>,
    table: HashTable<u32>,
    /// Entries in each bucket, so that the next one gets the next position.
    filled: Vec<u32>,
    sets: Vec<TargetSet>,
    set_table: HashTable<u32>,
    sealed: Option<Sealed>,
    /// Late deliveries of contents that were registered before the plan: entry to set number.
    late: HashMap<u32, u32>,
    stats: IndexStats,
}

impl Index {
    /// An empty index for a group of so many source and target hosts (cut to [`MAX_HOSTS`]).
    #[must_use]
    pub fn new(limits: Limits, source_hosts: u16, target_hosts: u16) -> Self {
        Self {
            limits,
            source_hosts: source_hosts.min(MAX_HOSTS),
            target_hosts: target_hosts.min(MAX_HOSTS),
            entries: Slab::default(),
            further: Slab::default(),
            table: HashTable::new(),
            filled: vec![0; BUCKETS as usize],
            sets: Vec::new(),
            set_table: HashTable::new(),
            sealed: None,
            late: HashMap::new(),
            stats: IndexStats::default(),
        }
    }

    /// Source hosts of the group.
    #[must_use]
    pub fn source_hosts(&self) -> u16 {
        self.source_hosts
    }

    /// Target hosts of the group.
    #[must_use]
    pub fn target_hosts(&self) -> u16 {
        self.target_hosts
    }

    /// Counts so far.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        self.stats
    }

    /// Heap bytes in use, the slack of tables included.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        let sets: usize =
            self.sets.iter().map(|s| size_of::<TargetSet>() + (s.words().count() - 1) * 8).sum();
        self.entries.heap_bytes()
            + self.further.heap_bytes()
            + self.table.allocation_size()
            + self.filled.len() * 4
            + sets
            + self.set_table.allocation_size()
            // Eight bytes a pair and a control byte a slot.
            + self.late.capacity() * 9
    }

    /// Takes what `source` holds and gives each content's id, in the batch's order. `None`: no room, the index is
    /// sealed, or the host or its targets are not of this group; the content is then host-local. Registering again
    /// adds to the target hosts.
    pub fn register(&mut self, source: HostIx, batch: &[Registration]) -> Vec<Option<PageId>> {
        batch
            .iter()
            .map(|r| {
                let id = self.register_one(source, r);
                match id {
                    Some(_) => self.stats.pages += u64::from(r.pages),
                    None => self.stats.refused += 1,
                }
                id
            })
            .collect()
    }

    fn register_one(&mut self, source: HostIx, r: &Registration) -> Option<PageId> {
        let top = r.targets.highest()?;
        if self.sealed.is_some() || source.0 >= self.source_hosts || top.0 >= self.target_hosts {
            return None;
        }
        let set = self.intern(&r.targets)?;
        match self.find(&r.digest) {
            Some(e) => self.add_holder(e, source, set).then(|| self.id(e)),
            None => self.insert(r.digest, source, set).map(|e| self.id(e)),
        }
    }

    /// Freezes the entries: from now on the plan over `sources` holds, registrations are refused, and
    /// [`Self::late`] answers.
    pub fn seal(&mut self, sources: HostSet) {
        if self.sealed.is_none() {
            self.sealed = Some(Sealed { sources, entries: self.entries.len() });
        }
    }

    /// Takes contents that `source` has sent after the plan. Before the plan nothing counts as delivered, so nothing
    /// is recorded then; nor is a mere question.
    pub fn late(&mut self, source: HostIx, items: &[LateItem]) -> Vec<LateReply> {
        items.iter().map(|item| self.late_one(source, item)).collect()
    }

    fn late_one(&mut self, source: HostIx, item: &LateItem) -> LateReply {
        let LateItem { digest, target, kept } = *item;
        let mut delivered = if kept { TargetSet::one(target) } else { TargetSet::new() };
        let ours = source.0 < self.source_hosts && target.0 < self.target_hosts;
        let Some(sealed) = self.sealed.clone().filter(|_| ours) else {
            self.stats.refused += 1;
            return LateReply { id: None, delivered };
        };
        let entry = match self.find(&digest) {
            Some(e) if e >= sealed.entries => {
                delivered.union_with(self.set(self.entries.at(e).set));
                if kept && let Some(set) = self.intern(&delivered) {
                    self.entries.at_mut(e).set = set;
                }
                Some(e)
            }
            Some(e) => {
                if let Some(&set) = self.late.get(&e) {
                    delivered.union_with(self.set(set));
                }
                if kept && let Some(set) = self.intern(&delivered) {
                    self.late.insert(e, set);
                }
                let (holders, needed) = self.view(e, &sealed.sources);
                if is_shared(holders, &needed) {
                    delivered.union_with(&needed);
                }
                Some(e)
            }
            None if !kept => return LateReply { id: None, delivered },
            None => self.intern(&delivered).and_then(|set| self.insert(digest, source, set)),
        };
        if entry.is_none() {
            self.stats.refused += 1;
        }
        LateReply { id: entry.map(|e| self.id(e)), delivered }
    }

    /// Entries that a plan made now covers.
    pub(super) fn planned_entries(&self) -> u32 {
        self.sealed.as_ref().map_or(self.entries.len(), |s| s.entries)
    }

    pub(super) fn digest(&self, entry: u32) -> Digest {
        self.entries.at(entry).digest
    }

    pub(super) fn id(&self, entry: u32) -> PageId {
        let e = self.entries.at(entry);
        PageId { bucket: bucket(&e.digest), index: e.position }
    }

    /// The holders of an entry with their target hosts, in no particular order.
    pub(super) fn holders(&self, entry: u32) -> impl Iterator<Item = (HostIx, &TargetSet)> {
        let e = self.entries.at(entry);
        let mut next = e.more;
        let further = std::iter::from_fn(move || {
            (next != END).then(|| {
                let f = self.further.at(next);
                next = f.next;
                (HostIx(f.host), self.set(f.set))
            })
        });
        std::iter::once((HostIx(e.host), self.set(e.set))).chain(further)
    }

    /// How many of `sources` hold the entry, and which target hosts need it from them.
    pub(super) fn view(&self, entry: u32, sources: &HostSet) -> (u16, TargetSet) {
        let (mut count, mut needed) = (0, TargetSet::new());
        for (_, targets) in self.holders(entry).filter(|(h, _)| sources.contains(*h)) {
            count += 1;
            needed.union_with(targets);
        }
        (count, needed)
    }

    /// A content of the plan's time that one of the plan's hosts has, for one target host, and no other: its entry, that
    /// host, and the target host. Nothing before the plan.
    pub(super) fn lone(&self, digest: &Digest) -> Option<(u32, HostIx, HostIx)> {
        let sealed = self.sealed.as_ref()?;
        let e = self.find(digest).filter(|e| *e < sealed.entries)?;
        let mut holders = self.holders(e).filter(|(h, _)| sealed.sources.contains(*h));
        let (holder, targets) = holders.next()?;
        let alone = holders.next().is_none() && !is_shared(1, targets);
        targets.highest().filter(|_| alone).map(|target| (e, holder, target))
    }

    fn set(&self, number: u32) -> &TargetSet {
        &self.sets[number as usize]
    }

    fn find(&self, digest: &Digest) -> Option<u32> {
        self.table
            .find(hash(self.limits.hash_seed, digest), |&e| self.entries.at(e).digest == *digest)
            .copied()
    }

    fn insert(&mut self, digest: Digest, host: HostIx, set: u32) -> Option<u32> {
        if self.entries.len() >= self.limits.max_entries {
            return None;
        }
        let filled = &mut self.filled[bucket(&digest) as usize];
        let number = self.entries.push(Entry { digest, position: *filled, set, more: END, host: host.0 });
        *filled += 1;
        let (seed, entries) = (self.limits.hash_seed, &self.entries);
        self.table.insert_unique(hash(seed, &digest), number, |&e| hash(seed, &entries.at(e).digest));
        self.stats.entries += 1;
        self.stats.holders += 1;
        Some(number)
    }

    /// False if there was no room to record it.
    fn add_holder(&mut self, entry: u32, host: HostIx, set: u32) -> bool {
        let e = *self.entries.at(entry);
        if e.host == host.0 {
            return match self.joined(e.set, set) {
                Some(joined) => {
                    self.entries.at_mut(entry).set = joined;
                    true
                }
                None => false,
            };
        }
        let mut at = e.more;
        while at != END {
            let f = *self.further.at(at);
            if f.host == host.0 {
                let Some(joined) = self.joined(f.set, set) else { return false };
                self.further.at_mut(at).set = joined;
                return true;
            }
            at = f.next;
        }
        if self.further.len() >= self.limits.max_further_holders {
            return false;
        }
        let node = self.further.push(Further { next: e.more, set, host: host.0 });
        self.entries.at_mut(entry).more = node;
        self.stats.holders += 1;
        true
    }

    /// The number of the union of two sets.
    fn joined(&mut self, a: u32, b: u32) -> Option<u32> {
        if a == b {
            return Some(a);
        }
        let mut both = self.set(a).clone();
        both.union_with(self.set(b));
        self.intern(&both)
    }

    /// The number of a target set, if it is known or there is room for it.
    fn intern(&mut self, set: &TargetSet) -> Option<u32> {
        let seed = self.limits.hash_seed;
        let h = hash_set(seed, set);
        if let Some(&n) = self.set_table.find(h, |&n| self.sets[n as usize] == *set) {
            return Some(n);
        }
        let number = u32::try_from(self.sets.len()).ok().filter(|n| *n < self.limits.max_target_sets)?;
        self.sets.push(set.clone());
        let sets = &self.sets;
        self.set_table.insert_unique(h, number, |&n| hash_set(seed, &sets[n as usize]));
        Some(number)
    }
}

/// Whether a content goes through the plan: more than one host has it or needs it.
pub(super) fn is_shared(holders: u16, needed: &TargetSet) -> bool {
    holders >= 2 || (holders == 1 && needed.len() >= 2)
}

fn bucket(digest: &Digest) -> u32 {
    word32(&digest.0, 0) % BUCKETS
}

fn word32(bytes: &[u8; DIGEST_LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn word64(bytes: &[u8; DIGEST_LEN], at: usize) -> u64 {
    u64::from(word32(bytes, at)) << 32 | u64::from(word32(bytes, at + 4))
}

/// A wide multiplication folded to 64 bits.
fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    wide as u64 ^ (wide >> 64) as u64
}

/// A number's place in a hash table, which nobody without the seed can aim at.
pub(super) fn hash_number(seed: u64, n: u64) -> u64 {
    fold(n ^ seed, seed.rotate_left(32) ^ ODD)
}

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

fn hash(seed: u64, digest: &Digest) -> u64 {
    let d = &digest.0;
    let first = fold(word64(d, 0) ^ seed, word64(d, 8) ^ seed.rotate_left(32) ^ ODD);
    fold(first ^ u64::from(word32(d, 16)), seed | 1).wrapping_mul(ODD) ^ first
}

fn hash_set(seed: u64, set: &TargetSet) -> u64 {
    set.words().fold(seed ^ ODD, |h, w| fold(h ^ w, ODD) ^ w.rotate_left(17).wrapping_mul(ODD))
}

#[cfg(test)]
pub(crate) mod tests;
