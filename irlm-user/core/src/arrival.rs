//! The target side of dedup, without sockets: the host's shared state ([`TargetHost`]: store, id bindings, who waits
//! for what, what is owed to peers) and one VM's waiting list ([`TargetVm`]).
//!
//! The rules it keeps: a newer record for a guest page always removes it from the waiting list (rule 2);
//! ids are believed only from the source host whose VMs use them, contents only after the caller hashed them (rule 3);
//! every wait ends in content, in a newer version, or in an error (rule 4).
//!
//! ```text
//!   reference ──content here──────────────────────────────► emitted
//!       └─not here─► waiting ──content arrives (wake)─────► emitted
//!                      │ void, or deadline passed
//!                      ▼
//!                    asked ──Contents─► emitted
//!                      └────Gone──► gone ──newer record───► superseded
//!                                     └─RamEnd────────────► error (the source broke its word)
//! ```

use super::digest::Digest;
use super::units::{HostIx, Nanos, PageAddr, PageBytes, PageId, VmIx};
use super::wire::limits::MAX_NEEDS;
use super::wire::messages::{NeedEntry, Want};
use super::wire::pages::Record;
use std::collections::{BTreeMap, HashMap};

// Shared by a host's arrivals.
mod host;
// What is waited for.
mod wait;

pub use host::{HostStats, TargetHost, VoidAction};
pub use wait::{Key, TargetError, Wake};

/// Where a VM's pages go: QEMU's stream, or a model in a test. Calls come in the order the pages must keep.
pub trait Output {
    /// What can go wrong on the way out.
    type Error: From<TargetError>;
    /// `count` pages from `addr` on, each all `fill`.
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), Self::Error>;
    /// One page whose content is number `content` of the frame's body.
    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), Self::Error>;
    /// One page from the store; the bytes are copied before the call returns.
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), Self::Error>;
}

/// When a waiting page asks its own source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Milliseconds while the VM runs at the source.
    pub running_ms: u64,
    /// Milliseconds once RAM has ended: the VM is stopped, and waiting is downtime.
    pub stopped_ms: u64,
}

impl Default for Patience {
    /// 3 s is many times what a forward takes behind a full queue (a group's `wait_ms` replaces it); 60 ms is one full frame
    /// on a 100 Mbit/s link.
    fn default() -> Self {
        Self { running_ms: 3000, stopped_ms: 60 }
    }
}

/// Counters of one VM's arrival.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct VmStats {
    /// References whose content was here when they came.
    pub hits: u64,
    /// References that had to wait.
    pub waited: u64,
    /// Waiting pages that a newer record removed.
    pub superseded: u64,
    /// Pages asked for.
    pub asked: u64,
    /// Asked pages whose content had changed since.
    pub gone: u64,
    /// Contents that could not be made, because what they were sent as differences from was not here.
    pub unmade: u64,
}

#[derive(Debug)]
struct Waiting {
    addrs: Vec<PageAddr>,
    since: Nanos,
    asked: Option<PageAddr>,
    /// Ask at the next chance, whatever the deadline (void, evicted, or the page asked before had changed).
    hurry: bool,
}

/// How a key is named to the VM's own source.
fn want_of(key: &Key) -> Want {
    match key {
        Key::Digest(d) => Want::Digest(*d),
        Key::Id(_, id) => Want::Id(*id),
    }
}

/// One VM's arrival: its waiting list. Owned by one thread, so that records and wakes are serial.
#[derive(Debug)]
pub struct TargetVm {
    vm: VmIx,
    source: HostIx,
    /// The key each waiting page waits for; none if its content is gone and a newer record must come.
    pages: HashMap<PageAddr, Option<Key>>,
    keys: BTreeMap<Key, Waiting>,
    gone_waiting: usize,
    ended: Option<Nanos>,
    max_waiting: usize,
    /// Contents that came as shared records and that voids promised to peers.
    owed: Vec<(Digest, Vec<HostIx>)>,
    /// Counters.
    pub stats: VmStats,
}

impl TargetVm {
    /// The arrival of `vm` from `source`; its waiting list holds at most `max_waiting` pages.
    #[must_use]
    pub fn new(vm: VmIx, source: HostIx, max_waiting: usize) -> Self {
        Self {
            vm,
            source,
            pages: HashMap::new(),
            keys: BTreeMap::new(),
            gone_waiting: 0,
            ended: None,
            max_waiting,
            owed: Vec::new(),
            stats: VmStats::default(),
        }
    }

    /// Pages that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pages.len()
    }

    /// Pages whose content is still to come from somewhere else than the stream itself: what the source holds the end
    /// of the stream back for. Pages whose newer version the stream brings are not among them.
    #[must_use]
    pub fn awaited(&self) -> usize {
        self.pages.len() - self.gone_waiting
    }

    /// Whether the source has ended RAM.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Whether RAM has ended and nothing waits: the END section may be written.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.ended.is_some() && self.pages.is_empty()
    }

    /// One record of a `Pages` frame. `content` counts the body's contents; Shared and Named contents must have been
    /// verified by the caller, `bytes` gives them, or nothing if they could not be made of what they refer to: such a
    /// page waits, and its own source is asked at once. Wakes are for other VMs too; [`Self::take_owed`] is to be served
    /// after each frame.
    // bounds: one call a record on the hot path; a struct would only rename them
    #[expect(clippy::too_many_arguments, reason = "see the bounds")]
    pub fn record<O: Output + ?Sized>(
        &mut self,
        host: &mut TargetHost,
        record: Record,
        content: &mut usize,
        bytes: Option<&PageBytes>,
        now: Nanos,
        out: &mut O,
        wakes: &mut Vec<Wake>,
    ) -> Result<(), O::Error> {
        match record {
            Record::Uniform { addr, count, fill } => {
                self.supersede_run(host, addr, count);
                out.uniform(addr, count, fill)
            }
            Record::Unique { addr, count } => {
                self.supersede_run(host, addr, count);
                for i in 0..count {
                    out.body(PageAddr { block: addr.block, page: addr.page + i }, *content)?;
                    *content += 1;
                }
                Ok(())
            }
            Record::Shared { addr, id, digest } => {
                self.supersede(host, addr);
                host.bind(self.source, id, digest, wakes)?;
                *content += 1;
                let Some(bytes) = bytes else { return self.refer_hurrying(host, addr, digest, now, out) };
                let owed = host.content(false, digest, bytes, wakes);
                if !owed.is_empty() {
                    self.owed.push((digest, owed));
                }
                out.body(addr, *content - 1)
            }
            Record::Named { addr, digest } => {
                *content += 1;
                if bytes.is_none() {
                    return self.refer_hurrying(host, addr, digest, now, out);
                }
                self.supersede(host, addr);
                out.body(addr, *content - 1)
            }
            Record::Ref { addr, id } => {
                let key = host.key_of(self.source, id);
                self.refer(host, addr, key, now, out)
            }
            Record::Remote { addr, id, digest } => {
                host.bind(self.source, id, digest, wakes)?;
                self.refer(host, addr, Key::Digest(digest), now, out)
            }
            // No page: `core::delta` has heard of it.
            Record::Keep { .. } => Ok(()),
        }
    }

    /// Shared contents that came since the last call and that voids promised to these target hosts.
    pub fn take_owed(&mut self) -> Vec<(Digest, Vec<HostIx>)> {
        std::mem::take(&mut self.owed)
    }

    /// Content that came on the VM's own connection (the answer to a need), verified by the caller. What waits for it
    /// here is emitted at once, so that no store is too small for it to get through. Returns the target hosts that a
    /// void promised it to.
    // bounds: as `record`, whose parameters they are
    #[expect(clippy::too_many_arguments, reason = "see the bounds")]
    pub fn answered<O: Output + ?Sized>(
        &mut self,
        host: &mut TargetHost,
        id: Option<PageId>,
        digest: Digest,
        bytes: &PageBytes,
        now: Nanos,
        out: &mut O,
        wakes: &mut Vec<Wake>,
    ) -> Result<Vec<HostIx>, O::Error> {
        if let Some(id) = id {
            host.bind(self.source, id, digest, wakes)?;
        }
        let owed = host.content(false, digest, bytes, wakes);
        for key in [id.map(|id| Key::Id(self.source, id)), Some(Key::Digest(digest))].into_iter().flatten() {
            self.woken(host, key, now, out)?;
            wakes.retain(|w| w.vm != self.vm || w.key != key);
        }
        Ok(owed)
    }

    fn refer<O: Output + ?Sized>(
        &mut self,
        host: &mut TargetHost,
        addr: PageAddr,
        key: Key,
        now: Nanos,
        out: &mut O,
    ) -> Result<(), O::Error> {
        self.supersede(host, addr);
        if let Key::Digest(d) = key
            && let Some(bytes) = host.store.get(&d)
        {
            self.stats.hits += 1;
            return out.stored(addr, bytes);
        }
        if self.pages.len() >= self.max_waiting {
            return Err(TargetError::TooManyWaiting(self.max_waiting).into());
        }
        self.stats.waited += 1;
        self.enlist(host, addr, key, now);
        Ok(())
    }

    /// A content that its source sent in a form that is of no use here: nobody else will bring it.
    fn refer_hurrying<O: Output + ?Sized>(
        &mut self,
        host: &mut TargetHost,
        addr: PageAddr,
        digest: Digest,
        now: Nanos,
        out: &mut O,
    ) -> Result<(), O::Error> {
        self.stats.unmade += 1;
        let key = Key::Digest(digest);
        self.refer(host, addr, key, now, out)?;
        if let Some(w) = self.keys.get_mut(&key) {
            w.hurry = true;
        }
        Ok(())
    }

    fn enlist(&mut self, host: &mut TargetHost, addr: PageAddr, key: Key, now: Nanos) {
        self.pages.insert(addr, Some(key));
        let voided = matches!(key, Key::Digest(d) if host.owed.contains_key(&d));
        let w = self.keys.entry(key).or_insert_with(|| Waiting {
            addrs: Vec::new(),
            since: now,
            asked: None,
            hurry: false,
        });
        w.addrs.push(addr);
        w.hurry |= voided;
        host.wait(key, self.vm);
    }

    /// A newer version of this page has come: the older one must never be written (rule 2).
    fn supersede(&mut self, host: &mut TargetHost, addr: PageAddr) {
        let Some(key) = self.pages.remove(&addr) else { return };
        self.stats.superseded += 1;
        let Some(key) = key else {
            self.gone_waiting -= 1;
            return;
        };
        if let Some(w) = self.keys.get_mut(&key) {
            w.addrs.retain(|a| *a != addr);
            if w.addrs.is_empty() {
                self.keys.remove(&key);
                host.unwait(&key, self.vm);
            } else if w.asked == Some(addr) {
                w.asked = None;
                w.hurry = true;
            }
        }
    }

    fn supersede_run(&mut self, host: &mut TargetHost, addr: PageAddr, count: u32) {
        if self.pages.is_empty() {
            return;
        }
        for i in 0..count {
            self.supersede(host, PageAddr { block: addr.block, page: addr.page + i });
        }
    }

    /// What `key` stands for has changed: emits what can be emitted now.
    pub fn woken<O: Output + ?Sized>(
        &mut self,
        host: &mut TargetHost,
        key: Key,
        now: Nanos,
        out: &mut O,
    ) -> Result<(), O::Error> {
        let digest = match key {
            Key::Digest(d) => Some(d),
            Key::Id(source, id) => match host.key_of(source, id) {
                Key::Digest(d) => Some(d),
                Key::Id(..) => None,
            },
        };
        let Some(mut w) = self.keys.remove(&key) else { return Ok(()) };
        if let Some(d) = digest
            && let Some(bytes) = host.store.get(&d)
        {
            for addr in &w.addrs {
                self.pages.remove(addr);
                out.stored(*addr, bytes)?;
            }
            host.unwait(&key, self.vm);
            return Ok(());
        }
        let Some(d) = digest.filter(|d| key != Key::Digest(*d)) else {
            // Voided, or evicted before this VM came round: its own source is next, even if its answer to an earlier
            // question was what came and went.
            w.hurry = true;
            w.asked = None;
            host.wait(key, self.vm);
            self.keys.insert(key, w);
            return Ok(());
        };
        // The id is known now, the content is not here yet: wait under the digest instead.
        host.unwait(&key, self.vm);
        for addr in w.addrs {
            self.enlist(host, addr, Key::Digest(d), now);
        }
        Ok(())
    }

    /// The source ended RAM. Everything that waits must now come from somewhere.
    pub fn ram_end(&mut self, now: Nanos) -> Result<(), TargetError> {
        self.ended = Some(now);
        if self.gone_waiting > 0
            && let Some((addr, _)) = self.pages.iter().find(|(_, k)| k.is_none())
        {
            return Err(TargetError::BrokenPromise { block: addr.block.0, page: addr.page });
        }
        Ok(())
    }

    /// The pages to ask the VM's own source for now, at most one per content and [`MAX_NEEDS`] a call.
    pub fn due(&mut self, now: Nanos, patience: Patience) -> Vec<NeedEntry> {
        let mut needs = Vec::new();
        for (key, w) in &mut self.keys {
            if w.asked.is_some() || needs.len() >= MAX_NEEDS {
                continue;
            }
            let deadline = match self.ended {
                Some(end) => {
                    end.max(w.since).plus_ms(patience.stopped_ms).min(w.since.plus_ms(patience.running_ms))
                }
                None => w.since.plus_ms(patience.running_ms),
            };
            if (w.hurry || now >= deadline)
                && let Some(addr) = w.addrs.first()
            {
                w.asked = Some(*addr);
                w.hurry = false;
                needs.push(NeedEntry { addr: *addr, want: want_of(key) });
            }
        }
        self.stats.asked += needs.len() as u64;
        needs
    }

    /// The page no longer holds what was needed; a newer version is on its way in the stream. If that came first, the
    /// page waits for another content by now, or for none, and this says nothing about it. Returns a voided digest and
    /// the target hosts to pass the void on to, if this host was to serve them.
    pub fn gone(
        &mut self,
        host: &mut TargetHost,
        entry: NeedEntry,
    ) -> Result<Option<(Digest, Vec<HostIx>)>, TargetError> {
        let addr = entry.addr;
        let Some(Some(key)) = self.pages.get(&addr).copied() else { return Ok(None) };
        if entry.want != want_of(&key) {
            return Ok(None);
        }
        self.stats.gone += 1;
        if self.ended.is_some() {
            return Err(TargetError::BrokenPromise { block: addr.block.0, page: addr.page });
        }
        self.pages.insert(addr, None);
        self.gone_waiting += 1;
        if let Some(w) = self.keys.get_mut(&key) {
            w.addrs.retain(|a| *a != addr);
            if !w.addrs.is_empty() {
                w.asked = None;
                w.hurry = true;
                return Ok(None);
            }
            self.keys.remove(&key);
            host.unwait(&key, self.vm);
        }
        if let Key::Digest(d) = key
            && !host.waiters.contains_key(&key)
        {
            let rest = host.give_up_owed(&d);
            if !rest.is_empty() {
                return Ok(Some((d, rest)));
            }
        }
        Ok(None)
    }

    /// The VM goes on to run here while pages still come (`core::postcopy`): the pages that wait, each with what it waits
    /// for; none if a newer version was promised. What they wait for stays on the host's lists.
    pub fn take_waiting(&mut self) -> Vec<(PageAddr, Option<Key>)> {
        self.keys.clear();
        self.gone_waiting = 0;
        self.pages.drain().collect()
    }

    /// This arrival is over (done or failed): takes its waits off the host's lists. Returns voids to pass on.
    pub fn leave(&mut self, host: &mut TargetHost) -> Vec<(Digest, Vec<HostIx>)> {
        let mut pass = Vec::new();
        for key in std::mem::take(&mut self.keys).into_keys() {
            host.unwait(&key, self.vm);
            if let Key::Digest(d) = key
                && !host.waiters.contains_key(&key)
            {
                let rest = host.give_up_owed(&d);
                if !rest.is_empty() {
                    pass.push((d, rest));
                }
            }
        }
        self.pages.clear();
        self.gone_waiting = 0;
        pass
    }
}

#[cfg(test)]
mod tests;
