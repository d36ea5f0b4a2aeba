//! What all arrivals at one target host share: the store, what ids stand for, who waits for what, and what is owed to
//! other target hosts.

use super::{Key, TargetError, Wake};
use crate::digest::Digest;
use crate::store::Store;
use crate::units::{HostIx, PageBytes, PageId, VmIx};
use std::collections::HashMap;

/// What to do about content that its carrier cannot carry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VoidAction {
    /// The content is here: forward it to the rest of the list.
    Forward,
    /// A VM here waits for it and asks its own source now; the rest of the list is served when that comes.
    Asking,
    /// Nobody here needs it yet: pass the void on to the rest of the list.
    PassOn,
}

/// Counters of one target host and group.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct HostStats {
    /// Contents that came from source hosts.
    pub contents_core: u64,
    /// Contents that came from other target hosts.
    pub contents_peer: u64,
    /// Contents that came though they were here already.
    pub duplicates: u64,
    /// Voids heard.
    pub voids: u64,
}

/// State shared by all VMs of one group that arrive at one target host. The caller locks it per batch.
#[derive(Debug)]
pub struct TargetHost {
    /// The page contents.
    pub store: Store,
    /// Counters.
    pub stats: HostStats,
    binds: HashMap<(HostIx, PageId), Digest>,
    pub(super) waiters: HashMap<Key, Vec<VmIx>>,
    /// Contents voided by their carrier, with the target hosts that get it from here should it come after all. At most
    /// `max_binds`: a void beyond that is passed on and forgotten, and who waits asks at its deadline.
    pub(super) owed: HashMap<Digest, Vec<HostIx>>,
    max_binds: usize,
}

impl TargetHost {
    /// A host whose store keeps `budget_pages` and which believes at most `max_binds` ids (28 bytes each and more).
    #[must_use]
    pub fn new(budget_pages: usize, max_binds: usize) -> Self {
        Self {
            store: Store::new(budget_pages),
            stats: HostStats::default(),
            binds: HashMap::new(),
            waiters: HashMap::new(),
            owed: HashMap::new(),
            max_binds,
        }
    }

    /// Source host `source` says that its `id` stands for `digest`.
    pub fn bind(
        &mut self,
        source: HostIx,
        id: PageId,
        digest: Digest,
        wakes: &mut Vec<Wake>,
    ) -> Result<(), TargetError> {
        if self.binds.len() >= self.max_binds && !self.binds.contains_key(&(source, id)) {
            return Err(TargetError::TooManyIds(self.max_binds));
        }
        self.binds.insert((source, id), digest);
        self.wake(Key::Id(source, id), wakes);
        Ok(())
    }

    /// A content, verified by the caller to hash to `digest`, has come. Returns the further target hosts that a void
    /// promised it to (the sender's own forward list is the caller's to serve).
    pub fn content(
        &mut self,
        from_peer: bool,
        digest: Digest,
        bytes: &PageBytes,
        wakes: &mut Vec<Wake>,
    ) -> Vec<HostIx> {
        if from_peer {
            self.stats.contents_peer += 1;
        } else {
            self.stats.contents_core += 1;
        }
        if !self.store.insert(digest, bytes) {
            self.stats.duplicates += 1;
        }
        self.wake(Key::Digest(digest), wakes);
        self.owed.remove(&digest).unwrap_or_default()
    }

    /// A carrier cannot carry `digest`; `rest` are the target hosts after this one in its forward list.
    pub fn void(&mut self, digest: Digest, rest: &[HostIx], wakes: &mut Vec<Wake>) -> VoidAction {
        self.stats.voids += 1;
        if self.store.get(&digest).is_some() {
            return VoidAction::Forward;
        }
        let waits = self.waiters.contains_key(&Key::Digest(digest));
        if waits {
            self.wake_keeping(Key::Digest(digest), wakes);
        }
        if self.owed.len() >= self.max_binds && !self.owed.contains_key(&digest) {
            return VoidAction::PassOn;
        }
        let owed = self.owed.entry(digest).or_default();
        if !waits {
            return VoidAction::PassOn;
        }
        for h in rest {
            if !owed.contains(h) {
                owed.push(*h);
            }
        }
        VoidAction::Asking
    }

    /// No VM of this host can get the voided `digest` from its own source any more: the hosts to pass the void to.
    pub(super) fn give_up_owed(&mut self, digest: &Digest) -> Vec<HostIx> {
        self.owed.get_mut(digest).map(std::mem::take).unwrap_or_default()
    }

    fn wake(&mut self, key: Key, wakes: &mut Vec<Wake>) {
        for vm in self.waiters.remove(&key).unwrap_or_default() {
            wakes.push(Wake { vm, key });
        }
    }

    fn wake_keeping(&self, key: Key, wakes: &mut Vec<Wake>) {
        for vm in self.waiters.get(&key).into_iter().flatten() {
            wakes.push(Wake { vm: *vm, key });
        }
    }

    /// The content of this key, if it is here.
    #[must_use]
    pub fn find(&self, key: &Key) -> Option<&PageBytes> {
        match key {
            Key::Digest(d) => self.store.get(d),
            Key::Id(source, id) => self.binds.get(&(*source, *id)).and_then(|d| self.store.get(d)),
        }
    }

    /// The better name of a key: the digest, if the id it names is known by now.
    #[must_use]
    pub fn resolve(&self, key: &Key) -> Key {
        match key {
            Key::Digest(_) => *key,
            Key::Id(source, id) => self.key_of(*source, *id),
        }
    }

    /// `vm` is to be woken when this key's content comes, or its carrier says that it cannot carry it.
    pub fn wait(&mut self, key: Key, vm: VmIx) {
        let w = self.waiters.entry(key).or_default();
        if !w.contains(&vm) {
            w.push(vm);
        }
    }

    /// `vm` no longer waits for this key.
    pub fn unwait(&mut self, key: &Key, vm: VmIx) {
        if let Some(w) = self.waiters.get_mut(key) {
            w.retain(|v| *v != vm);
            if w.is_empty() {
                self.waiters.remove(key);
            }
        }
    }

    /// What a page that refers to source host `source`'s `id` waits for: the digest, as soon as that is known.
    #[must_use]
    pub fn key_of(&self, source: HostIx, id: PageId) -> Key {
        self.binds.get(&(source, id)).map_or(Key::Id(source, id), |d| Key::Digest(*d))
    }
}
