//! Models: contents that one source host has alone and that pages of *other* source hosts resemble. Each host reports
//! sketches of such contents after the plan; the index, which alone sees them all, picks those that stand for many.
//! Their holder carries them like planned contents and lends their bytes to the hosts whose pages resemble them, so
//! that these can send differences.
//!
//! Contents are gone through once, in runs of each host by turns, which spreads models over the hosts and leaves
//! neighbours together. One joins the *leader* that it shares most of its sketch with, or becomes a leader. Leaders with
//! followers on other hosts are models, and those with most such followers are given out first, as far as the
//! borrowers have room.
//!
//! Cost: O(n), but for a sort of the models. While reports come, 44 bytes a content, up to 8 of its host's list and a bit
//! for every content in the index: 230 MiB at the bound of 4 Mi. Choosing takes up to 120 bytes more for each (twelve for
//! a leader in a doubling list, and eight hash tables of 5 bytes a place, about two places a content): 700 MiB in all, if nothing
//! resembles anything. What stays is 12 bytes a model and 8 a follower.

use super::digest::Digest;
use super::index::{HostSet, Index, Slab, TargetSet, hash_number};
use super::plan::Carry;
use super::sketch::{FEATURES, Sketch};
use super::units::HostIx;
use hashbrown::HashTable;
use std::cmp::Reverse;

/// Numbers that two sketches must have in common.
pub const MIN_SHARED: usize = 2;
/// Sketches of a group, by default.
pub const MAX_SKETCHES: u32 = 4 << 20;

/// Contents of one host that are gone through before the next host's turn: a frame of a push.
const RUN: usize = 64;
/// No further member, no leader.
const NONE: u32 = u32::MAX;

/// What a source host reports of one content that nobody else has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SketchItem {
    /// The content.
    pub digest: Digest,
    /// The target host that the host's VMs take it to.
    pub target: HostIx,
    /// What it looks like.
    pub sketch: Sketch,
}

/// A content this host lends: how it is carried, and to whom it is lent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lend {
    /// Carried like a planned content: `forward` are the target hosts of the pages that resemble it.
    pub carry: Carry,
    /// Source hosts that get its bytes: never none, never the lender.
    pub to: HostSet,
}

/// One source host's part.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostModels {
    /// What it lends, in the order in which it reported them.
    pub lend: Vec<Lend>,
    /// Contents that others lend to it.
    pub borrows: u32,
}

#[derive(Debug)]
struct Item {
    entry: u32,
    source: u16,
    domain: u16,
    target: u16,
    features: [u32; FEATURES],
}
const _: () = assert!(size_of::<Item>() == 44);

/// What the hosts of one group have reported.
#[derive(Debug)]
pub struct Sketches {
    seed: u64,
    max: u32,
    items: Slab<Item>,
    /// By source host: its items, in the order of its reports.
    by_host: Vec<Vec<u32>>,
    /// By index entry: whether it was reported; what is reported twice counts once.
    seen: Vec<u64>,
    ignored: u64,
}

impl Sketches {
    /// Room for `max` sketches. `seed`: the index's random number for its hash tables.
    #[must_use]
    pub fn new(max: u32, seed: u64) -> Self {
        let (by_host, seen) = (Vec::new(), Vec::new());
        Self { seed, max: max.min(NONE - 1), items: Slab::default(), by_host, seen, ignored: 0 }
    }

    /// Takes a report of `source` on contents of one trust domain. Ignored are contents that are not `source`'s alone by the
    /// plan, or go elsewhere, have no sketch, were reported before, or find no room.
    pub fn add(&mut self, index: &Index, source: HostIx, domain: u16, report: &[SketchItem]) {
        for item in report {
            let known = index.lone(&item.digest).filter(|(_, h, t)| *h == source && *t == item.target);
            let taken = known.is_some_and(|(entry, ..)| self.take(entry, source, domain, item));
            self.ignored += u64::from(!taken);
        }
    }

    fn take(&mut self, entry: u32, source: HostIx, domain: u16, item: &SketchItem) -> bool {
        if item.sketch.is_empty() || self.items.len() >= self.max {
            return false;
        }
        let (word, bit) = ((entry / 64) as usize, 1u64 << (entry % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            return false;
        }
        self.seen[word] |= bit;
        let features = item.sketch.features();
        let number =
            self.items.push(Item { entry, source: source.0, domain, target: item.target.0, features });
        let host = usize::from(source.0);
        if self.by_host.len() <= host {
            self.by_host.resize_with(host + 1, Vec::new);
        }
        self.by_host[host].push(number);
        true
    }

    /// Sketches that will be compared.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.items.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reported contents that were ignored.
    #[must_use]
    pub fn ignored(&self) -> u64 {
        self.ignored
    }
}

/// A content that others may resemble.
#[derive(Debug)]
struct Leader {
    item: u32,
    /// Its members on other hosts: the last one, and how many.
    head: u32,
    members: u32,
}
const _: () = assert!(size_of::<Leader>() == 12);

/// A content of another host than its leader's.
#[derive(Clone, Copy, Debug)]
struct Member {
    next: u32,
    source: u16,
    target: u16,
}
const _: () = assert!(size_of::<Member>() == 8);

/// Leaders and what follows them, while they are looked for.
struct Clusters<'a> {
    sketches: &'a Sketches,
    /// By place in the sketch: the first leader that had a number there, in its domain.
    tables: [HashTable<u32>; FEATURES],
    leaders: Vec<Leader>,
    members: Vec<Member>,
}

/// Chooses among what was reported. `rooms`: by source host how many contents it can borrow, if it has asked; who has
/// not neither lends nor borrows.
#[must_use]
pub fn choose(sketches: &Sketches, rooms: &[Option<u32>]) -> Models {
    let asked = sketches.by_host.iter().zip(rooms).filter(|(_, room)| room.is_some());
    let mut hosts: Vec<&[u32]> = asked.map(|(items, _)| items.as_slice()).collect();
    // A table that grows reads its leaders' sketches again: where little is alike, that took most of the time.
    let most = hosts.iter().map(|items| items.len()).sum();
    let tables = std::array::from_fn(|_| HashTable::with_capacity(most));
    let mut clusters = Clusters { sketches, tables, leaders: Vec::new(), members: Vec::new() };
    while !hosts.is_empty() {
        for rest in &mut hosts {
            let (run, left) = rest.split_at(rest.len().min(RUN));
            run.iter().for_each(|&i| clusters.add(i));
            *rest = left;
        }
        hosts.retain(|rest| !rest.is_empty());
        // Hosts of like guests report the like in the same order: not the same one is to lead always.
        if !hosts.is_empty() {
            hosts.rotate_left(1);
        }
    }
    let Clusters { leaders, members, .. } = clusters;
    grant(sketches, leaders, members, rooms)
}

impl Clusters<'_> {
    /// Has an item join the leader it is most like, the first among equals, or makes it one.
    fn add(&mut self, number: u32) {
        let Self { sketches, tables, leaders, members } = self;
        let of = |l: u32| sketches.items.at(leaders[l as usize].item);
        let place = |domain: u16, feature: u32| {
            hash_number(sketches.seed, u64::from(domain) << 32 | u64::from(feature))
        };
        let item = sketches.items.at(number);
        let mut found = [NONE; FEATURES];
        for (i, (table, &f)) in tables.iter().zip(&item.features).enumerate().filter(|(_, (_, f))| **f != 0) {
            let same = |l: &u32| of(*l).domain == item.domain && of(*l).features[i] == f;
            found[i] = table.find(place(item.domain, f), same).copied().unwrap_or(NONE);
        }
        let like = found.iter().filter(|l| **l != NONE).map(|&l| (shared(item, of(l)), Reverse(l))).max();
        if let Some((_, Reverse(l))) = like.filter(|(shared, _)| *shared >= MIN_SHARED) {
            if of(l).source != item.source {
                let leader = &mut leaders[l as usize];
                let me = members.len() as u32;
                members.push(Member { next: leader.head, source: item.source, target: item.target });
                leader.head = me;
                leader.members += 1;
            }
            return;
        }
        // No more leaders than items, of which there are fewer than NONE.
        let me = leaders.len() as u32;
        leaders.push(Leader { item: number, head: NONE, members: 0 });
        let of = |l: u32| sketches.items.at(leaders[l as usize].item);
        for (i, (table, &f)) in tables.iter_mut().zip(&item.features).enumerate() {
            if f != 0 && found[i] == NONE {
                let again = |l: &u32| place(of(*l).domain, of(*l).features[i]);
                table.insert_unique(place(item.domain, f), me, again);
            }
        }
    }
}

/// Numbers in common.
fn shared(a: &Item, b: &Item) -> usize {
    a.features.iter().zip(&b.features).filter(|(a, b)| **a != 0 && a == b).count()
}

/// Gives models out, those with most members on other hosts first, as long as who would borrow has room.
fn grant(
    sketches: &Sketches,
    mut leaders: Vec<Leader>,
    mut members: Vec<Member>,
    rooms: &[Option<u32>],
) -> Models {
    let mut left: Vec<u32> = rooms.iter().map(|r| r.unwrap_or(0)).collect();
    let mut borrows = vec![0; rooms.len()];
    // By host: for which leader it was asked last whether it has room, and the answer.
    let mut asked = vec![(NONE, false); rooms.len()];
    let mut order: Vec<u32> = (0u32..).zip(&leaders).filter(|(_, l)| l.members > 0).map(|(n, _)| n).collect();
    order.sort_unstable_by_key(|&n| (Reverse(leaders[n as usize].members), n));
    for n in order {
        let leader = &mut leaders[n as usize];
        let mut at = std::mem::replace(&mut leader.head, NONE);
        while at != NONE {
            let m = members[at as usize];
            let host = usize::from(m.source);
            if asked[host].0 != n {
                let room = left[host] > 0;
                asked[host] = (n, room);
                left[host] -= u32::from(room);
                borrows[host] += u32::from(room);
            }
            // Neighbours are often of the same host: one of them is enough from here on.
            let known = members.get(leader.head as usize).map(|k| (k.source, k.target));
            if asked[host].1 && known != Some((m.source, m.target)) {
                members[at as usize].next = leader.head;
                leader.head = at;
            }
            at = m.next;
        }
    }
    // Leaders of one host are in the order in which it reported them.
    let mut lend = vec![Vec::new(); rooms.len()];
    for l in leaders.iter().filter(|l| l.head != NONE) {
        let item = sketches.items.at(l.item);
        lend[usize::from(item.source)].push(Model { entry: item.entry, head: l.head, first: item.target });
    }
    Models { lend, members, borrows }
}

#[derive(Clone, Debug)]
struct Model {
    entry: u32,
    /// Its members whose hosts have room.
    head: u32,
    first: u16,
}
const _: () = assert!(size_of::<Model>() == 12);

/// All models of a group, as numbers beside its index.
#[derive(Debug)]
pub struct Models {
    lend: Vec<Vec<Model>>,
    members: Vec<Member>,
    borrows: Vec<u32>,
}

impl Models {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lend.iter().map(Vec::len).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many the host lends.
    #[must_use]
    pub fn lends(&self, host: HostIx) -> usize {
        self.lend.get(usize::from(host.0)).map_or(0, Vec::len)
    }

    /// How many others lend to the host.
    #[must_use]
    pub fn borrows(&self, host: HostIx) -> u32 {
        self.borrows.get(usize::from(host.0)).copied().unwrap_or(0)
    }

    /// The whole part of one host. `index` is the one that the sketches were reported beside.
    #[must_use]
    pub fn of(&self, index: &Index, host: HostIx) -> HostModels {
        HostModels { lend: self.piece(index, host, 0, usize::MAX), borrows: self.borrows(host) }
    }

    /// What the host lends, from the `from`-th on, at most `count`.
    #[must_use]
    pub fn piece(&self, index: &Index, host: HostIx, from: usize, count: usize) -> Vec<Lend> {
        let part = self.lend.get(usize::from(host.0)).into_iter().flatten();
        part.skip(from).take(count).map(|m| self.lend(index, m)).collect()
    }

    fn lend(&self, index: &Index, model: &Model) -> Lend {
        let (mut to, mut forward) = (HostSet::new(), TargetSet::new());
        let mut at = model.head;
        while let Some(m) = self.members.get(at as usize) {
            to.insert(HostIx(m.source));
            forward.insert(HostIx(m.target));
            at = m.next;
        }
        let first = HostIx(model.first);
        forward.remove(first);
        let (digest, id) = (index.digest(model.entry), index.id(model.entry));
        Lend { carry: Carry { digest, id, first, forward }, to }
    }
}

#[cfg(test)]
mod tests;
