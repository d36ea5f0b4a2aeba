//! The share plan: computed once when the group starts, so that no page waits for an answer while it moves. For
//! every content that more than one host has or needs it names one carrier among the holders, the target host the
//! carrier sends it to, and the target hosts to which that one passes it on.
//!
//! Carriers are balanced over the source hosts' edge links: a host starts with the pages only it has, which count as a
//! quarter each (`SHARED`), then the other contents, those with the fewest holders first, go to their least loaded
//! holder, and a few rounds of single moves mend what that order could not know. First targets are balanced in the same way
//! over the pages each target host
//! has to pass on. Ties go to the lower host number.
//!
//! Contents are given out in *runs*: hosts register in the order of their guests' memory, and neighbours there, mostly
//! of one file, compress better in one frame (decision 0012). So who carries what depends on the order of registration;
//! how much anybody carries does not, but for a page or so.
//!
//! Cost: O(n log n) in shared digests, O(n) in their holders.

use super::digest::Digest;
use super::index::{HostSet, Index, TargetSet, is_shared};
use super::units::{HostIx, PageId};

/// Rounds of single moves after the greedy pass; each costs one walk over the shared contents and the walk ends early
/// when a round moves nothing.
const MEND_ROUNDS: usize = 4;

/// Contents of the same holders that one of them carries before the next one's turn: half a frame of a push, so that a
/// frame has few breaks.
const RUN: usize = 64;
/// A plan has so many runs a host at least, so that small groups stay balanced.
const RUNS: usize = 16;

/// What carrying a content weighs beside a page that only one host has: that one leaves as a difference from a similar
/// page, mostly (a fifth of the bytes in the 2x2 lab, decision 0017).
const SHARED: u64 = 4;

/// No host.
const NOBODY: u16 = u16::MAX;

/// What the plan needs besides the index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlanInput {
    /// Source hosts that take part. Who was given up is left out, and is no holder.
    pub sources: HostSet,
    /// By source host number: pages it will send that it did not register, or that got no id. Missing means 0.
    /// Registered contents that turn out to be its own alone are added by the plan.
    pub own_unique_pages: Vec<u64>,
}

/// A content this host sends over the core link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Carry {
    /// The content.
    pub digest: Digest,
    /// Its name.
    pub id: PageId,
    /// The target host it is sent to: one that needs it for this host's own VMs.
    pub first: HostIx,
    /// Target hosts to which `first` passes it on.
    pub forward: TargetSet,
}

/// A content this host holds and another carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remote {
    /// The content.
    pub digest: Digest,
    /// Its name.
    pub id: PageId,
    /// Who carries it.
    pub carrier: HostIx,
    /// Target hosts where this host's VMs can refer to it.
    pub targets: TargetSet,
}

/// One source host's part of the plan, or a piece of it. Contents in neither list are host-local.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostPlan {
    /// What it carries.
    pub carry: Vec<Carry>,
    /// What others carry for it.
    pub remote: Vec<Remote>,
}

/// The whole plan, as numbers beside the index it was made from: 4 bytes an index entry and 4 bytes for each holder
/// of a shared one.
#[derive(Debug)]
pub struct Plan {
    sources: HostSet,
    /// By entry: who carries it, or [`NOBODY`] if it is host-local.
    carriers: Vec<u16>,
    firsts: Vec<u16>,
    /// By source host: the shared entries it holds, in the order of their registration.
    parts: Vec<Vec<u32>>,
    loads: Vec<u64>,
    forwards: Vec<u64>,
    shared: u64,
}

/// Plans the sharing of what `index` knows. Pages registered later are not in the plan ([`Index::seal`]).
#[must_use]
pub fn share_plan(index: &Index, input: &PlanInput) -> Plan {
    let hosts = usize::from(index.source_hosts());
    let entries = index.planned_entries();
    let mut own = input.own_unique_pages.clone();
    own.resize(hosts, 0);
    let alive = |e: u32| index.holders(e).filter(|(h, _)| input.sources.contains(*h));

    let mut order = Vec::new();
    let mut counts = vec![0usize; hosts];
    for e in 0..entries {
        let (holders, needed) = index.view(e, &input.sources);
        if is_shared(holders, &needed) {
            order.push(sort_key(holders, e));
            alive(e).for_each(|(h, _)| counts[usize::from(h.0)] += 1);
        } else if let Some((h, _)) = alive(e).next() {
            own[usize::from(h.0)] += 1;
        }
    }
    order.sort_unstable();
    let mut loads = own.clone();

    let mut carriers = vec![NOBODY; entries as usize];
    let mut runs = Runs::new(order.len(), hosts);
    for &key in &order {
        let e = entry_of(key);
        if let Some(h) = runs.next(alive(e).map(|(h, _)| h), &loads) {
            carriers[e as usize] = h.0;
            loads[usize::from(h.0)] += SHARED;
        }
    }
    let movable = &order[order.partition_point(|&k| holders_of(k) < 2)..];
    for _ in 0..MEND_ROUNDS {
        let mut moved = false;
        // A walk over everything: not where there is nothing to mend.
        for &key in if level(&loads, &input.sources) { &[] } else { movable } {
            let e = entry_of(key);
            let from = usize::from(carriers[e as usize]);
            if let Some(to) = least(alive(e).map(|(h, _)| h), &loads)
                && loads[usize::from(to.0)] + SHARED < loads[from]
            {
                loads[from] -= SHARED;
                loads[usize::from(to.0)] += SHARED;
                carriers[e as usize] = to.0;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }

    let (firsts, forwards) = first_targets(index, input, &order, &carriers);
    let mut parts: Vec<Vec<u32>> = counts.into_iter().map(Vec::with_capacity).collect();
    for e in (0..entries).filter(|&e| carriers[e as usize] != NOBODY) {
        alive(e).for_each(|(h, _)| parts[usize::from(h.0)].push(e));
    }
    let shared = order.len() as u64;
    // In pages.
    let loads = loads.iter().zip(&own).map(|(all, own)| own + (all - own) / SHARED).collect();
    Plan { sources: input.sources.clone(), carriers, firsts, parts, loads, forwards, shared }
}

/// Picks each content's first target among those the carrier's own VMs go to: first where there is no choice, then
/// the one with the fewest pages to pass on. Also gives those pages by target host.
fn first_targets(index: &Index, input: &PlanInput, order: &[u64], carriers: &[u16]) -> (Vec<u16>, Vec<u64>) {
    let mut firsts = vec![NOBODY; carriers.len()];
    let mut forwards = vec![0u64; usize::from(index.target_hosts())];
    let mut runs = Runs::new(order.len(), forwards.len());
    let mut take = |e: u32, own: &TargetSet| {
        if let Some(t) = runs.next(own.iter(), &forwards) {
            let (_, needed) = index.view(e, &input.sources);
            firsts[e as usize] = t.0;
            forwards[usize::from(t.0)] += needed.len() as u64 - 1;
        }
    };
    let mut choices = Vec::new();
    for e in order.iter().map(|&key| entry_of(key)) {
        let carrier = HostIx(carriers[e as usize]);
        match index.holders(e).find(|(h, _)| *h == carrier) {
            Some((_, own)) if own.len() > 1 => choices.push((e, own)),
            Some((_, own)) => take(e, own),
            None => {}
        }
    }
    choices.into_iter().for_each(|(e, own)| take(e, own));
    (firsts, forwards)
}

/// Whether no host of the set carries two contents' weight more than another.
fn level(loads: &[u64], hosts: &HostSet) -> bool {
    let mine = || hosts.iter().filter_map(|h| loads.get(usize::from(h.0)));
    let (Some(least), Some(most)) = (mine().min(), mine().max()) else { return true };
    most - least <= SHARED
}

/// The host with the smallest load, the lowest number among equals.
fn least(hosts: impl Iterator<Item = HostIx>, loads: &[u64]) -> Option<HostIx> {
    hosts.min_by_key(|h| (loads.get(usize::from(h.0)).copied().unwrap_or(u64::MAX), *h))
}

/// Gives contents out to hosts that can have them, in runs.
struct Runs {
    most: usize,
    /// Hosts that can have this content, and those that could have the one before; ascending.
    now: Vec<HostIx>,
    hosts: Vec<HostIx>,
    /// Who got that one, and how many in a row.
    host: Option<HostIx>,
    len: usize,
}

impl Runs {
    fn new(contents: usize, hosts: usize) -> Self {
        let most = (contents / (hosts.max(1) * RUNS)).clamp(1, RUN);
        Self { most, now: Vec::new(), hosts: Vec::new(), host: None, len: 0 }
    }

    /// Who gets the next content: who got the last one, if the same hosts could have it and the run is not over, else
    /// the one with the smallest load.
    fn next(&mut self, hosts: impl Iterator<Item = HostIx>, loads: &[u64]) -> Option<HostIx> {
        self.now.clear();
        self.now.extend(hosts);
        self.now.sort_unstable();
        if self.len >= self.most || self.now != self.hosts {
            std::mem::swap(&mut self.now, &mut self.hosts);
            self.len = 0;
            self.host = least(self.hosts.iter().copied(), loads);
        }
        self.len += 1;
        self.host
    }
}

/// Holders, then the entry: sorts into the order in which contents are given out.
fn sort_key(holders: u16, entry: u32) -> u64 {
    u64::from(holders) << 32 | u64::from(entry)
}

fn entry_of(key: u64) -> u32 {
    key as u32
}

fn holders_of(key: u64) -> u16 {
    (key >> 32) as u16
}

impl Plan {
    /// Source hosts that take part.
    #[must_use]
    pub fn sources(&self) -> &HostSet {
        &self.sources
    }

    /// Contents with a carrier.
    #[must_use]
    pub fn shared(&self) -> u64 {
        self.shared
    }

    /// By source host: pages it sends over the core link if no guest writes.
    #[must_use]
    pub fn loads(&self) -> &[u64] {
        &self.loads
    }

    /// By target host: pages it passes on to others.
    #[must_use]
    pub fn forwards(&self) -> &[u64] {
        &self.forwards
    }

    /// Contents in the host's part; `None` if it takes no part.
    #[must_use]
    pub fn part_len(&self, host: HostIx) -> Option<usize> {
        self.parts.get(usize::from(host.0)).filter(|_| self.sources.contains(host)).map(Vec::len)
    }

    /// The whole part of one source host; `None` if it takes no part. `index` is the one the plan was made from.
    #[must_use]
    pub fn host_plan(&self, index: &Index, host: HostIx) -> Option<HostPlan> {
        let all = self.part_len(host)?;
        Some(self.piece(index, host, 0, all))
    }

    /// Contents `from` to `from + count` of a host's part; less, or nothing, past its end.
    #[must_use]
    pub fn piece(&self, index: &Index, host: HostIx, from: usize, count: usize) -> HostPlan {
        let mut out = HostPlan::default();
        let Some(part) = self.parts.get(usize::from(host.0)) else { return out };
        let Some(rest) = part.get(from..) else { return out };
        for &e in &rest[..count.min(rest.len())] {
            let (digest, id) = (index.digest(e), index.id(e));
            let carrier = HostIx(self.carriers[e as usize]);
            if carrier == host {
                let first = HostIx(self.firsts[e as usize]);
                let (_, mut forward) = index.view(e, &self.sources);
                forward.remove(first);
                out.carry.push(Carry { digest, id, first, forward });
            } else if let Some((_, targets)) = index.holders(e).find(|(h, _)| *h == host) {
                out.remote.push(Remote { digest, id, carrier, targets: targets.clone() });
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;
