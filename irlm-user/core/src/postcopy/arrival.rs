//! The target side of post-copy: where each page of a VM is that already runs here, who is asked for it, and when.
//! `core::postcopy` shows the states. One thread a VM owns a [`Fill`]; what the kernel answers when a page is placed is
//! told to it ([`Fill::placed`]), and a page counts as here only then.

use super::{PageSet, Run};
use crate::arrival::{Key, TargetError, TargetHost, Wake};
use crate::digest::Digest;
use crate::units::{HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use crate::wire::pages::Record;
use crate::wire::paging::Demand;
use asked::Asking;
use std::collections::{HashMap, VecDeque};

// What has been asked of whom.
mod asked;
// Who is asked, and when.
mod asking;

/// Pages that may be held for their content at once. At the bound the source is asked for the content instead.
pub const MAX_HELD: usize = 4 << 20;

/// How long what may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Milliseconds that each target host has to forward a content that a vCPU waits for.
    pub hurry_ms: u64,
    /// Milliseconds that a page nobody waits for is held for its content before the source is asked.
    pub held_ms: u64,
    /// Milliseconds after which the source is asked again.
    pub again_ms: u64,
}

impl Default for Patience {
    /// 5 ms are some round trips within a rack: a host whose link is full of what it forwards does not answer in time anyway,
    /// and then the source's 4 KiB over the core link cost less than a vCPU's wait; 3 s as before the switch; a source that
    /// lives answers within a second, whatever else it sends.
    fn default() -> Self {
        Self { hurry_ms: 5, held_ms: 3000, again_ms: 1000 }
    }
}

/// What to do about a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The page was placed since the switch: wake who waits for it (and map it, where pages are mapped one by one).
    Here,
    /// Nothing is to come for it: it is as it was at the switch, zeros if it was never written.
    Settled,
    /// Its content is in the store: place it now.
    Store(Key),
    /// It is on its way or has been asked for; [`Fill::placed`] will tell how long it took.
    Wait,
    /// The VM has no such page.
    Outside,
}

/// Where a page came from that a vCPU waited for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Origin {
    /// It was here, or there was nothing to come.
    Here,
    /// The store, at once.
    Store,
    /// The store, after another host had sent it.
    Forward,
    /// The VM's source.
    Source,
}

/// A page that is to be placed now. After each the outcome is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Put {
    /// A page of zeros that a vCPU waits for.
    Zero(PageAddr),
    /// All bytes are this.
    Filled(PageAddr, u8),
    /// Content number `.1` of the frame's body.
    Body(PageAddr, usize),
}

/// What is to be asked now.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Asks {
    /// Of the source.
    pub demand: Demand,
    /// Of other target hosts.
    pub hurry: Vec<(HostIx, Digest)>,
}

/// Counters of one VM's filling.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct FillStats {
    /// Faults heard of.
    pub faults: u64,
    /// Pages placed, from wherever.
    pub placed: u64,
    /// Pages that came although nothing was to come for them any more (given away by the guest, or here already).
    pub late: u64,
    /// Pages asked for because a vCPU waits for them.
    pub demanded: u64,
    /// Pages asked for ahead of a touch.
    pub ahead: u64,
    /// Contents that other target hosts were asked to hurry with.
    pub hurried: u64,
    /// Times such a host did not deliver in time or had nothing.
    pub passed_over: u64,
    /// Pages the guest gave away.
    pub removed: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    key: Key,
    /// Its content was in the store when it was last looked for.
    ready: bool,
    /// The content came after the page began to wait.
    waited: bool,
    since: Nanos,
}

/// Pages whose content is to come from elsewhere.
#[derive(Debug)]
struct HeldPages {
    pages: HashMap<PageAddr, Held>,
    keys: HashMap<Key, Vec<PageAddr>>,
    /// Those whose content is in the store, first those that a vCPU waits for.
    ready: VecDeque<PageAddr>,
    /// When they began to wait.
    waits: VecDeque<(Nanos, PageAddr)>,
    /// How many may be held at once.
    most: usize,
}

impl HeldPages {
    fn new(most: usize) -> Self {
        let (pages, keys) = (HashMap::new(), HashMap::new());
        Self { pages, keys, ready: VecDeque::new(), waits: VecDeque::new(), most }
    }
}

/// The filling of one VM.
#[derive(Debug)]
pub struct Fill {
    vm: VmIx,
    source: HostIx,
    patience: Patience,
    due: PageSet,
    here: PageSet,
    held: HeldPages,
    faults: HashMap<PageAddr, Nanos>,
    asking: Asking,
    /// Counters.
    pub stats: FillStats,
}

impl Fill {
    /// The filling of `vm` from `source`: the pages in `due` are still to come. `holders` are the other target hosts.
    #[must_use]
    pub fn new(vm: VmIx, source: HostIx, due: PageSet, holders: &[HostIx], patience: Patience) -> Self {
        Self {
            vm,
            source,
            patience,
            here: PageSet::empty(due.pages()),
            due,
            held: HeldPages::new(MAX_HELD),
            faults: HashMap::new(),
            asking: Asking::new(holders),
            stats: FillStats::default(),
        }
    }

    /// Another bound than [`MAX_HELD`].
    #[must_use]
    pub fn with_max_held(mut self, max_held: usize) -> Self {
        self.held.most = max_held;
        self
    }

    /// Pages that waited for content at the switch go on waiting, unless they are due anew. One whose newer version was
    /// promised must be.
    pub fn take_over(
        &mut self,
        host: &mut TargetHost,
        waiting: Vec<(PageAddr, Option<Key>)>,
        now: Nanos,
    ) -> Result<(), TargetError> {
        // First off the lists, then on: pages that are due and pages that are not may wait for the same content.
        let (due, waiting): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|(a, _)| self.due.contains(*a));
        for key in due.into_iter().filter_map(|(_, key)| key) {
            host.unwait(&key, self.vm);
        }
        for (addr, key) in waiting {
            let Some(key) = key else {
                return Err(TargetError::BrokenPromise { block: addr.block.0, page: addr.page });
            };
            self.hold(host, addr, key, now);
        }
        Ok(())
    }

    /// Pages that are not there yet.
    #[must_use]
    pub fn lacking(&self) -> u64 {
        self.due.len() + self.held.pages.len() as u64
    }

    /// Whether every page is there.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.due.is_empty() && self.held.pages.is_empty()
    }

    /// Pages that a vCPU waits for.
    #[must_use]
    pub fn faulting(&self) -> usize {
        self.faults.len()
    }

    /// Whether content for this page may still be written.
    #[must_use]
    pub fn wants(&self, addr: PageAddr) -> bool {
        self.due.contains(addr) || self.held.pages.contains_key(&addr)
    }

    /// A fault, read from the kernel.
    pub fn fault(&mut self, host: &TargetHost, addr: PageAddr, now: Nanos) -> Answer {
        self.stats.faults += 1;
        if !self.due.covers(addr) {
            return Answer::Outside;
        }
        if self.here.contains(addr) {
            return Answer::Here;
        }
        if let Some(held) = self.held.pages.get(&addr).copied() {
            self.faults.entry(addr).or_insert(now);
            if host.find(&held.key).is_some() {
                return Answer::Store(held.key);
            }
            self.press(addr, host.resolve(&held.key), now);
            return Answer::Wait;
        }
        if !self.due.contains(addr) {
            return Answer::Settled;
        }
        self.faults.entry(addr).or_insert(now);
        self.urge(addr);
        self.look_ahead(addr);
        Answer::Wait
    }

    /// One record of a `Pages` frame. Shared and Named contents must have been verified by the caller; `shared` gives
    /// their bytes, or nothing if they could not be made of what they refer to: such a page waits.
    /// What is to be placed is appended to `out`; hosts that a void promised a content to are returned.
    // bounds: as `core::arrival::TargetVm::record`, which it mirrors
    #[expect(clippy::too_many_arguments, reason = "see the bounds")]
    pub fn record(
        &mut self,
        host: &mut TargetHost,
        record: Record,
        content: &mut usize,
        shared: Option<&PageBytes>,
        now: Nanos,
        out: &mut Vec<Put>,
        wakes: &mut Vec<Wake>,
    ) -> Result<Option<(Digest, Vec<HostIx>)>, TargetError> {
        match record {
            Record::Uniform { addr, count, fill: 0 } => self.zeros(host, Run { addr, count }, out),
            Record::Uniform { addr, count, fill } => {
                for addr in (Run { addr, count }).pages() {
                    self.offer(addr, || Put::Filled(addr, fill), out);
                }
            }
            Record::Unique { addr, count } => {
                for addr in (Run { addr, count }).pages() {
                    let n = *content;
                    self.offer(addr, || Put::Body(addr, n), out);
                    *content += 1;
                }
            }
            Record::Shared { addr, id, digest } => {
                host.bind(self.source, id, digest, wakes)?;
                let n = *content;
                *content += 1;
                let Some(bytes) = shared else {
                    self.refer(host, addr, Key::Digest(digest), now);
                    return Ok(None);
                };
                let owed = host.content(false, digest, bytes, wakes);
                self.offer(addr, || Put::Body(addr, n), out);
                return Ok((!owed.is_empty()).then_some((digest, owed)));
            }
            Record::Named { addr, digest } => {
                let n = *content;
                *content += 1;
                match shared {
                    Some(_) => self.offer(addr, || Put::Body(addr, n), out),
                    None => self.refer(host, addr, Key::Digest(digest), now),
                }
            }
            Record::Ref { addr, id } => self.refer(host, addr, host.key_of(self.source, id), now),
            Record::Remote { addr, id, digest } => {
                host.bind(self.source, id, digest, wakes)?;
                self.refer(host, addr, Key::Digest(digest), now);
            }
            Record::Keep { .. } => {}
        }
        Ok(None)
    }

    fn offer(&mut self, addr: PageAddr, put: impl FnOnce() -> Put, out: &mut Vec<Put>) {
        if self.wants(addr) {
            out.push(put());
        } else {
            self.stats.late += 1;
        }
    }

    /// Zeros need no writing: the page is settled, and who waits for it gets a zero page.
    fn zeros(&mut self, host: &mut TargetHost, run: Run, out: &mut Vec<Put>) {
        let faults: Vec<PageAddr> = self.faulting_in(run);
        self.settle(host, run);
        out.extend(faults.into_iter().map(Put::Zero));
    }

    fn faulting_in(&self, run: Run) -> Vec<PageAddr> {
        self.faults.keys().copied().filter(|a| run.contains(*a)).collect()
    }

    /// Nothing is to come for these pages any more.
    fn settle(&mut self, host: &mut TargetHost, run: Run) {
        self.due.remove_run(run);
        let few = |len: usize| len < run.count as usize;
        let held: Vec<PageAddr> = if few(self.held.pages.len()) {
            self.held.pages.keys().copied().filter(|a| run.contains(*a)).collect()
        } else {
            run.pages().filter(|a| self.held.pages.contains_key(a)).collect()
        };
        for addr in held {
            self.unhold(host, addr);
        }
        if few(self.asking.asked.len()) {
            self.asking.asked.retain(|a, _| !run.contains(*a));
        } else {
            run.pages().for_each(|a| {
                self.asking.asked.remove(&a);
            });
        }
    }

    fn refer(&mut self, host: &mut TargetHost, addr: PageAddr, key: Key, now: Nanos) {
        if !self.due.contains(addr) {
            self.stats.late += 1;
            return;
        }
        if self.held.pages.len() >= self.held.most {
            // It stays due; its source sends the content when asked.
            self.asking.ahead.push_back(addr);
            return;
        }
        self.due.remove(addr);
        self.hold(host, addr, key, now);
    }

    fn hold(&mut self, host: &mut TargetHost, addr: PageAddr, key: Key, now: Nanos) {
        let ready = host.find(&key).is_some();
        self.held.pages.insert(addr, Held { key, ready, waited: !ready, since: now });
        if ready {
            self.make_ready(addr);
            return;
        }
        self.held.keys.entry(key).or_default().push(addr);
        host.wait(key, self.vm);
        self.held.waits.push_back((now, addr));
        if self.faults.contains_key(&addr) && !self.asking.asked.contains_key(&addr) {
            self.press(addr, key, now);
        }
    }

    fn make_ready(&mut self, addr: PageAddr) {
        if self.faults.contains_key(&addr) {
            self.held.ready.push_front(addr);
        } else {
            self.held.ready.push_back(addr);
        }
    }

    /// Takes a page off the waiting lists.
    fn unhold(&mut self, host: &mut TargetHost, addr: PageAddr) -> Option<Held> {
        let held = self.held.pages.remove(&addr)?;
        if let Some(list) = self.held.keys.get_mut(&held.key) {
            list.retain(|a| *a != addr);
            if list.is_empty() {
                self.held.keys.remove(&held.key);
                host.unwait(&held.key, self.vm);
                if let Key::Digest(d) = held.key {
                    self.asking.hurries.remove(&d);
                }
            }
        }
        Some(held)
    }

    /// What `key` stands for has changed: the content came, the id is known now, or its carrier cannot carry it.
    pub fn woken(&mut self, host: &mut TargetHost, key: Key, now: Nanos) {
        let Some(list) = self.held.keys.remove(&key) else { return };
        if let Key::Digest(d) = key {
            self.asking.hurries.remove(&d);
        }
        host.unwait(&key, self.vm);
        let better = host.resolve(&key);
        for addr in list {
            let Some(held) = self.held.pages.get_mut(&addr) else { continue };
            if host.find(&key).is_some() {
                held.ready = true;
                self.make_ready(addr);
            } else if better != key {
                self.held.pages.remove(&addr);
                self.hold(host, addr, better, now);
            } else {
                // Void, or evicted before this VM came round.
                self.fall_back(host, addr);
            }
        }
    }

    /// No host forwards it: the source is asked, at once if a vCPU waits.
    fn fall_back(&mut self, host: &mut TargetHost, addr: PageAddr) {
        if self.unhold(host, addr).is_none() {
            return;
        }
        self.due.insert(addr);
        if self.faults.contains_key(&addr) {
            self.urge(addr);
        } else if !self.asking.asked.contains_key(&addr) {
            self.asking.ahead.push_back(addr);
        }
    }

    /// The next pages whose contents are in the store, at most `most`: appended to `addrs`, and their bytes to `bytes`. The
    /// caller places them now.
    pub fn take_ready(
        &mut self,
        host: &mut TargetHost,
        most: usize,
        addrs: &mut Vec<PageAddr>,
        bytes: &mut Vec<u8>,
    ) {
        for _ in 0..most {
            let Some(addr) = self.held.ready.pop_front() else { return };
            let Some(held) = self.held.pages.get(&addr) else { continue };
            if let Some(b) = host.find(&held.key) {
                addrs.push(addr);
                bytes.extend_from_slice(b);
            } else {
                self.fall_back(host, addr);
            }
        }
        debug_assert!(bytes.len() == addrs.len() * PAGE_SIZE);
    }

    /// Whether [`Self::take_ready`] has something.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.held.ready.is_empty()
    }

    /// Where a held page's content comes from, for who places it.
    #[must_use]
    pub fn origin(&self, addr: PageAddr) -> Origin {
        match self.held.pages.get(&addr) {
            Some(h) if h.waited => Origin::Forward,
            _ => Origin::Store,
        }
    }

    /// Whether the page's content is to come from elsewhere.
    #[must_use]
    pub fn is_held(&self, addr: PageAddr) -> bool {
        self.held.pages.contains_key(&addr)
    }

    /// Since when the page has been held for a content that was to come from elsewhere, if no vCPU waits for it.
    #[must_use]
    pub fn held_behind(&self, addr: PageAddr) -> Option<Nanos> {
        let held = self.held.pages.get(&addr).filter(|h| h.waited && !self.faults.contains_key(&addr))?;
        Some(held.since)
    }

    /// The kernel has the page now, or had it before. Returns how long a vCPU waited for it, if one did.
    pub fn placed(&mut self, host: &mut TargetHost, addr: PageAddr, now: Nanos) -> Option<u64> {
        self.due.remove(addr);
        self.unhold(host, addr);
        self.asking.asked.remove(&addr);
        if self.here.insert(addr) {
            self.stats.placed += 1;
        }
        self.answered(addr, now)
    }

    /// Who waited for the page has been woken. Returns how long it waited, if it did.
    pub fn answered(&mut self, addr: PageAddr, now: Nanos) -> Option<u64> {
        self.faults.remove(&addr).map(|since| now.0.saturating_sub(since.0))
    }

    /// The guest has given these pages away (or they are not mapped any more): they are zeros when touched next, and
    /// nothing that comes for them may be written. Returns those that a vCPU waits for, to be woken.
    pub fn removed(&mut self, host: &mut TargetHost, run: Run) -> Vec<PageAddr> {
        self.stats.removed += u64::from(run.count);
        self.here.remove_run(run);
        self.settle(host, run);
        self.faulting_in(run)
    }

    /// A target host does not have this content.
    pub fn not_here(&mut self, from: HostIx, digest: &Digest, now: Nanos) {
        if let Some(h) = self.asking.hurries.get_mut(digest)
            && h.asked == Some(from)
        {
            h.until = now;
        }
    }

    /// The source cannot be heard. Everything stays as it is.
    pub fn lost(&mut self) {
        self.asking.connected = false;
        for (_, addr) in self.asking.asked_order.drain(..) {
            let Some(asked) = self.asking.asked.remove(&addr) else { continue };
            if asked.urgent && self.faults.contains_key(&addr) {
                self.asking.urgent.push_back(addr);
            }
        }
    }

    /// The source is back: what it is to be told is lacking. What a vCPU waits for is asked for at once.
    ///
    /// The source may have seen before this side that the last connection was lost: what was asked for on it is not to come.
    pub fn reconnected(&mut self) -> PageSet {
        self.lost();
        self.asking.connected = true;
        let faults: Vec<PageAddr> = self.faults.keys().copied().filter(|a| self.due.contains(*a)).collect();
        self.asking.urgent.extend(faults);
        self.lacks()
    }

    /// Pages without content, also those whose content is on its way from elsewhere.
    #[must_use]
    pub fn lacks(&self) -> PageSet {
        let mut set = self.due.clone();
        self.held.pages.iter().filter(|(_, h)| !h.ready).for_each(|(a, _)| {
            set.insert(*a);
        });
        set
    }

    /// Pages that are not in the VM's memory yet, also those whose content is in this host's store: what an agent after this
    /// one has to have filled, because the store ends with its agent.
    #[must_use]
    pub fn absent(&self) -> PageSet {
        let mut set = self.due.clone();
        self.held.pages.keys().for_each(|a| {
            set.insert(*a);
        });
        set
    }

    /// The arrival is over: takes what it waits for off the host's lists.
    pub fn leave(&mut self, host: &mut TargetHost) {
        for key in std::mem::take(&mut self.held.keys).into_keys() {
            host.unwait(&key, self.vm);
        }
        self.held.pages.clear();
        self.asking.hurries.clear();
    }
}
