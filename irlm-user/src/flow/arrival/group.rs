//! What all VMs of one group that arrive at this host share.

use super::cast::{Cast, CastCounts};
use super::handle::{Input, TargetVmShared};
use super::peers::Peers;
use crate::core::account::{Account, Marker, Pages};
use crate::core::arrival::{HostStats, Patience, TargetHost, Wake};
use crate::core::delta::Slots;
use crate::core::digest::{Digest, Hasher};
use crate::core::squeeze::Mode;
use crate::core::units::{HostIx, PAGE_SIZE, VmIx};
use crate::core::wire::keys;
use crate::flow::hosts::Hosts;
use crate::flow::squeeze::{Edge, Windows};
use crate::flow::work::Work;
use crate::flow::{FlowTags, Timeouts, lock};
use crate::net::connection::Security;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// What all VMs of one group that arrive at this host share.
#[derive(Debug)]
pub struct TargetGroup {
    /// Group name.
    pub name: String,
    /// Group secret.
    pub token: [u8; 32],
    /// This host's number among the target hosts.
    pub me: HostIx,
    /// One hasher a trust domain.
    pub hashers: Vec<Hasher>,
    /// Store, bindings, who waits for what.
    pub host: Mutex<TargetHost>,
    /// Senders to the other target hosts.
    pub peers: Peers,
    /// Multicast to them, where there is any.
    pub(super) cast: OnceLock<Arc<Cast>>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How its VMs arrive.
    pub options: ArrivalOptions,
    /// Who is told of connections.
    pub tags: Arc<dyn FlowTags>,
    /// Windows for streams that come compressed.
    pub windows: Arc<Windows>,
    /// What is known of the link to the other target hosts.
    pub(in crate::flow) edge: Arc<Edge>,
    /// Counters.
    pub counts: GroupCounts,
    /// Contents kept for differences, by source host and trust domain.
    pub(super) slots: HashMap<(HostIx, u16), Mutex<Slots>>,
    pub(super) vms: Mutex<HashMap<VmIx, Arc<TargetVmShared>>>,
}

/// Which group it is, and who this host is in it.
#[derive(Clone, Debug)]
pub struct Member {
    /// Group name.
    pub name: String,
    /// Group secret.
    pub token: [u8; 32],
    /// This host's number among the target hosts.
    pub me: HostIx,
    /// One hasher a trust domain.
    pub hashers: Vec<Hasher>,
}

/// How the VMs of a group arrive.
#[derive(Clone, Debug, Default)]
pub struct ArrivalOptions {
    /// When a waiting page asks its own source.
    pub patience: Patience,
    /// Where files are made that last as long as an arrival (post-copy: which pages are due).
    pub socket_dir: PathBuf,
    /// How contents are compressed that are passed on.
    pub compress: Mode,
    /// Leave the VMs paused when they have been handed over, for somebody else to continue.
    pub leave_paused: bool,
    /// Whether pages are accounted for, and memory is compared.
    pub verify: Pages,
    /// How connections to other target hosts are secured.
    pub security: Security,
    /// The names of the group's hosts.
    pub hosts: Arc<Hosts>,
    /// Drill: for so long what is in the store is placed only where a vCPU waits for it.
    pub hold_placing: Duration,
}

/// Counters of one group at one target host.
#[derive(Debug, Default)]
pub struct GroupCounts {
    /// Contents refused because they did not hash to their digest.
    pub refused: AtomicU64,
    /// Contents that came with a forward list, each once.
    pub to_forward: AtomicU64,
    /// Contents queued for other target hosts, once for each.
    pub forwarded: AtomicU64,
    /// Bytes of them as they were sent, compressed where that paid.
    pub forwarded_wire: AtomicU64,
    /// What push and peer connections cost this host; contents passed on are in it.
    pub work: Work,
    /// When a push or peer connection last brought contents ([`crate::flow::now`]).
    pub last_content: AtomicU64,
}

impl TargetGroup {
    /// A group with no VM yet.
    #[must_use]
    pub fn new(
        member: Member,
        host: TargetHost,
        peers: Peers,
        timeouts: Timeouts,
        tags: Arc<dyn FlowTags>,
        options: ArrivalOptions,
    ) -> Self {
        let Member { name, token, me, hashers } = member;
        Self {
            name,
            token,
            me,
            hashers,
            host: Mutex::new(host),
            peers,
            cast: OnceLock::new(),
            timeouts,
            options,
            tags,
            windows: Arc::default(),
            edge: Arc::default(),
            counts: GroupCounts::default(),
            slots: HashMap::new(),
            vms: Mutex::default(),
        }
    }

    /// What was multicast, if anything could be.
    #[must_use]
    pub fn multicast_counts(&self) -> Option<CastCounts> {
        self.cast.get().map(|c| c.counts())
    }

    /// Forwards nothing more than what is queued.
    pub fn close(&self) {
        if let Some(c) = self.cast.get() {
            c.close();
        }
        self.peers.close();
    }

    /// Keeps contents for differences among the VMs that come from these source hosts, each with
    /// its trust domain, in `bytes` of memory altogether.
    pub fn keep(&mut self, lines: impl IntoIterator<Item = (HostIx, u16)>, bytes: u64) {
        let lines: HashSet<_> = lines.into_iter().collect();
        let pages = bytes / PAGE_SIZE as u64 / lines.len().max(1) as u64;
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        self.slots = lines.into_iter().map(|line| (line, Mutex::new(Slots::new(pages)))).collect();
    }

    /// An account of this VM's pages, of which its blocks have so many each, if they are accounted for.
    pub(super) fn account(&self, vm: VmIx, pages: impl IntoIterator<Item = u32>) -> Option<Account> {
        (self.options.verify != Pages::Off).then(|| Account::new(self.marker(vm), pages))
    }

    /// What marks this VM's pages.
    pub(super) fn marker(&self, vm: VmIx) -> Marker {
        Marker::new(&keys::account(&self.token, vm))
    }

    pub(super) fn slots(&self, source: HostIx, domain: u16) -> Option<&Mutex<Slots>> {
        self.slots.get(&(source, domain))
    }

    /// Bytes of memory taken for contents that are kept.
    #[must_use]
    pub fn kept_bytes(&self) -> u64 {
        self.slots.values().map(|s| lock(s).bytes() as u64).sum()
    }

    /// Gives back the memory of what was stored and kept: no VM of the group waits for a content
    /// any more.
    pub fn let_go(&self) {
        {
            let mut host = lock(&self.host);
            let stats = host.stats;
            *host = TargetHost::new(1, 1 << 20);
            host.stats = stats;
        }
        for s in self.slots.values() {
            *lock(s) = Slots::new(0);
        }
    }

    /// Lets wakes and connections find this VM.
    pub fn expect(&self, vm: VmIx, shared: &Arc<TargetVmShared>) {
        lock(&self.vms).insert(vm, shared.clone());
    }

    /// The VM's handle, if it is expected here.
    #[must_use]
    pub fn vm(&self, vm: VmIx) -> Option<Arc<TargetVmShared>> {
        lock(&self.vms).get(&vm).cloned()
    }

    /// Passes wakes on.
    pub(super) fn wake(&self, wakes: &[Wake]) {
        if wakes.is_empty() {
            return;
        }
        let vms = lock(&self.vms);
        for w in wakes {
            if let Some(vm) = vms.get(&w.vm) {
                vm.inbox.post(Input::Wake(w.key));
            }
        }
    }

    /// A target host does not have these contents.
    pub(super) fn not_here(&self, peer: HostIx, digests: &[Digest]) {
        for vm in lock(&self.vms).values() {
            vm.inbox.post(Input::NotHere(peer, digests.to_vec()));
        }
    }

    /// Host counters, contents and bytes in the store, contents evicted.
    #[must_use]
    pub fn stats(&self) -> (HostStats, usize, u64) {
        let h = lock(&self.host);
        (h.stats, h.store.len(), h.store.evicted())
    }

    /// Contents refused, and contents forwarded.
    #[must_use]
    pub fn counted(&self) -> (u64, u64) {
        (self.counts.refused.load(Ordering::Relaxed), self.counts.forwarded.load(Ordering::Relaxed))
    }
}

impl Drop for TargetGroup {
    /// One that was dropped without a close leaves no threads behind either.
    fn drop(&mut self) {
        self.close();
    }
}
