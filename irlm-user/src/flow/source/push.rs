//! Sends the contents this host carries, once each, ahead of its VMs' streams: read from guest RAM, hashed again, and
//! put on a push connection to the first target host of each, which forwards them. A content that no page of this
//! host holds any more becomes a void, so that nobody waits for it (invariant 4). Pages of VMs whose dirty log is on
//! need no second hash: after a batch is read, the log says which of them were written meanwhile.
//!
//! What was promised and cannot be sent is withdrawn ([`withdraw`]).
//!
//! One thread and one connection per target host and trust domain; no queue between reading and sending.

// Telling target hosts what does not come.
pub mod withdraw;

use super::kvm::guest::Guest;
use super::prepare::PreparedVm;
use super::{SourceGroup, SourceSpec};
use crate::core::digest::{Digest, Hasher};
use crate::core::plan::{Carry, HostPlan};
use crate::core::units::{BlockIx, HostIx, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{ContentEntry, Purpose, encode_entries};
use crate::flow::squeeze::{Lane, Window};
use crate::flow::work::Stage;
use crate::flow::{MoveError, NOTSENT_LOWAT, Tagged, Traffic, lock};
use crate::host::sched::thread_cpu;
use crate::net::conn::{FrameBuf, frame_len, send_while};
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Contents in one frame: 512 KiB, because each frame is compressed by itself, so that a target host can pass it on as it
/// came (decision 0012).
const BATCH: usize = 128;
/// A frame shorter than this goes on with contents for other hosts.
const LEAST: usize = 32;

/// Counted while the push runs.
#[derive(Debug, Default)]
pub struct PushProgress {
    /// Contents to carry.
    pub total: AtomicU64,
    /// Contents sent.
    pub sent: AtomicU64,
    /// Contents that had changed everywhere on this host.
    pub void: AtomicU64,
    /// Contents not sent because their target host could not be reached.
    pub failed: AtomicU64,
    /// Bytes sent.
    pub bytes: AtomicU64,
    /// Pages hashed again before they were sent.
    pub hashed: AtomicU64,
    /// Contents sent under a digest kept from preparation.
    pub kept: AtomicU64,
    /// Processor time of the hashing, nanoseconds.
    pub hash_ns: AtomicU64,
    /// Set to end it.
    pub cancel: AtomicBool,
    /// Set when it has ended, or could not begin.
    pub over: AtomicBool,
}

impl PushProgress {
    /// Contents still to be sent.
    #[must_use]
    pub fn left(&self) -> u64 {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        if self.over.load(Ordering::Relaxed) {
            return 0;
        }
        get(&self.total).saturating_sub(get(&self.sent) + get(&self.void))
    }
}

/// Where a content was seen.
type Place = (VmIx, usize, u32);

/// Pushes everything that is this host's to carry, `models` first, because the streams are to refer to them; returns when all
/// is sent or has failed. A failure costs bandwidth only: who waits is told, and asks its own source.
pub fn push(
    group: &SourceGroup,
    vms: &[(&SourceSpec, &PreparedVm)],
    (models, plan): (&[Carry], &HostPlan),
    progress: &PushProgress,
) {
    let total = models.len() + plan.carry.len();
    progress.total.store(total as u64, Ordering::Relaxed);
    let all = || models.iter().chain(&plan.carry);
    let by_vm: HashMap<VmIx, (&SourceSpec, &PreparedVm)> =
        vms.iter().map(|(s, p)| (s.vm, (*s, *p))).collect();
    let mut places: HashMap<Digest, Vec<Place>> = all().map(|c| (c.digest, Vec::new())).collect();
    for (spec, vm) in vms {
        for (block, page, d) in vm.digests() {
            if let Some(p) = places.get_mut(&d) {
                p.push((spec.vm, block, page));
            }
        }
    }
    let mut pairs: BTreeMap<(HostIx, u16), Vec<(bool, &Carry)>> = BTreeMap::new();
    let later = std::iter::repeat_n(false, models.len()).chain(std::iter::repeat(true));
    for (later, c) in later.zip(all()) {
        let domain = places[&c.digest].first().map_or(0, |(vm, ..)| by_vm[vm].0.domain);
        pairs.entry((c.first, domain)).or_default().push((later, c));
    }
    std::thread::scope(|s| {
        for ((target, domain), carry) in &mut pairs {
            // What the same hosts get together, so that whole frames go on. Then in guest order, so that reading is
            // sequential and neighbours are compressed together.
            carry.sort_by_key(|(later, c)| (*later, &c.forward, places[&c.digest].first().copied()));
            let carry: Vec<&Carry> = carry.iter().map(|(_, c)| *c).collect();
            let pair =
                Pair { group, target: *target, domain: *domain, progress, places: &places, by_vm: &by_vm };
            let name = format!("irlm-push-{}", target.0);
            let (own, all) = (pair.clone(), carry.clone());
            if let Err(e) = std::thread::Builder::new().name(name).spawn_scoped(s, move || own.carry(&all)) {
                tracing::warn!("push to target host {}: no thread, so the others wait for it: {e}", target.0);
                pair.carry(&carry);
            }
        }
    });
    let done = progress.sent.load(Ordering::Relaxed) + progress.void.load(Ordering::Relaxed);
    progress.failed.store((total as u64).saturating_sub(done), Ordering::Relaxed);
    progress.over.store(true, Ordering::Relaxed);
}

/// What leaves together: contents for the same hosts, but for frames that would be too short.
fn frames<'a, 'b>(carry: &'b [&'a Carry]) -> impl Iterator<Item = &'b [&'a Carry]> {
    let mut rest = carry;
    std::iter::from_fn(move || {
        let most = &rest[..rest.len().min(BATCH)];
        let ends = |n: &usize| *n >= LEAST && most[*n].forward != most[*n - 1].forward;
        let (frame, then) = rest.split_at((1..most.len()).find(ends).unwrap_or(most.len()));
        rest = then;
        (!frame.is_empty()).then_some(frame)
    })
}

/// Whether a page holds a content, by what is known without hashing.
enum Found<'a> {
    /// This one, which was read, if its log does not name it.
    Kept(&'a Arc<Guest>, PageAddr),
    No,
}

#[derive(Clone)]
struct Pair<'a> {
    group: &'a SourceGroup,
    target: HostIx,
    domain: u16,
    progress: &'a PushProgress,
    places: &'a HashMap<Digest, Vec<Place>>,
    by_vm: &'a HashMap<VmIx, (&'a SourceSpec, &'a PreparedVm)>,
}

impl Pair<'_> {
    /// Sends all, or withdraws what could not be sent.
    fn carry(&self, carry: &[&Carry]) {
        let mut done = 0;
        if let Err(e) = self.run(carry, &mut done) {
            tracing::warn!("push to target host {}: {e}", self.target.0);
            self.give_up(&carry[done..]);
        }
    }

    fn run(&self, carry: &[&Carry], done: &mut usize) -> Result<(), MoveError> {
        let t = &self.group.timeouts;
        let purpose = Purpose::Push { source: self.group.me, domain: self.domain };
        let hello = Greeting::new(&self.group.name, self.group.token, purpose);
        let addr = self.group.targets.get(usize::from(self.target.0)).copied();
        let addr =
            addr.ok_or_else(|| MoveError::refused("the plan names a target host that the group has not"))?;
        let tag = |ends| Tagged::of(&self.group.tags, ends, Traffic::Bulk);
        let (conn, _tag) = dial(addr, &hello, t.peer, &self.group.options.security, tag)?;
        let _paced = self.group.pacer.join(conn.socket());
        crate::host::sockopt::set_notsent_lowat(&conn, NOTSENT_LOWAT)?;
        wait_hello_ok(&conn, t.setup)?;
        let mut lane = Lane::new(self.group.options.compress, Window::default(), &self.group.squeezing.edge);
        let work = &self.group.work;
        let mut bytes: Vec<PageBytes> = vec![[0; PAGE_SIZE]; BATCH];
        let mut meta = Vec::new();
        for batch in frames(carry) {
            lane.lap(work, Stage::Other);
            let found = self.find_all(batch, &mut bytes)?;
            let (mut contents, mut voids) = (Vec::new(), Vec::new());
            let mut body = Vec::with_capacity(BATCH);
            for ((c, found), bytes) in batch.iter().zip(found).zip(&bytes) {
                let forward = c.forward.iter().collect();
                let entry = ContentEntry { id: Some(c.id), digest: c.digest, forward };
                if found {
                    contents.push(entry);
                    body.push(bytes);
                } else {
                    voids.push(entry);
                }
            }
            lane.lap(work, Stage::Hash);
            let started = Instant::now();
            let go_on = || started.elapsed() < t.stall && !self.progress.cancel.load(Ordering::Relaxed);
            if self.progress.cancel.load(Ordering::Relaxed) {
                return Err(MoveError::refused("cancelled"));
            }
            if !contents.is_empty() {
                meta.clear();
                encode_entries(contents.iter(), &mut meta);
                let sent = lane.send(&conn, (Kind::Contents, &meta), &body, work, go_on);
                let n = sent?;
                self.progress.bytes.fetch_add(n as u64, Ordering::Relaxed);
            }
            if !voids.is_empty() {
                meta.clear();
                encode_entries(voids.iter(), &mut meta);
                send_while(&conn, Kind::Voids, &meta, &[], go_on)?;
                self.progress.bytes.fetch_add(frame_len(&conn, meta.len(), 0) as u64, Ordering::Relaxed);
            }
            self.tell_tables(&contents, &voids);
            self.progress.sent.fetch_add(contents.len() as u64, Ordering::Relaxed);
            self.progress.void.fetch_add(voids.len() as u64, Ordering::Relaxed);
            *done += batch.len();
        }
        // The peer reads to the end and closes; waiting for that keeps the last bytes from being cut off.
        let _ = conn.shutdown(std::net::Shutdown::Write);
        let _ = FrameBuf::new().wait(&conn, t.stall.max(Duration::from_secs(1)));
        Ok(())
    }

    /// Reads pages that hold these contents *now*, each to its place in `bytes`; says which there are.
    fn find_all(&self, batch: &[&Carry], bytes: &mut [PageBytes]) -> Result<Vec<bool>, MoveError> {
        let mut found: Vec<Found> =
            batch.iter().zip(&mut *bytes).map(|(c, out)| self.find_kept(&c.digest, out)).collect();
        // All has been read: what the logs do not name now was what its digest says.
        let mut guests: Vec<&Arc<Guest>> = Vec::new();
        for f in &found {
            if let Found::Kept(guest, _) = f
                && !guests.iter().any(|g| Arc::ptr_eq(g, guest))
            {
                guests.push(guest);
            }
        }
        let lost = guests.into_iter().find_map(|g| g.harvest().err());
        let began = thread_cpu();
        let mut out = Vec::with_capacity(batch.len());
        let mut read = Vec::with_capacity(batch.len());
        for (n, ((c, f), page)) in batch.iter().zip(&mut found).zip(&mut *bytes).enumerate() {
            let still = match f {
                Found::Kept(guest, addr) => lost.is_none() && !guest.is_stale(*addr),
                Found::No => false,
            };
            if still {
                self.progress.kept.fetch_add(1, Ordering::Relaxed);
                let hasher = self.hasher(&c.digest);
                if self.group.options.drill.prove_digests && hasher.is_some_and(|h| h.page(page) != c.digest)
                {
                    return Err(MoveError::refused(
                        "drill: a digest kept from preparation is stale: a page changed and its VM's dirty \
                                log did not say so",
                    ));
                }
            }
            out.push(still);
            if !still {
                let first = self.places[&c.digest].first();
                read.extend(first.filter(|place| self.read(place, page)).map(|_| n));
            }
        }
        // Most pages are as they were: their first places at once, the others one by one.
        if let Some(hasher) = self.group.hashers.get(usize::from(self.domain)) {
            let mut numbers = read.iter();
            hasher.pages(read.iter().map(|n| &bytes[*n]), |d| {
                if let Some(n) = numbers.next() {
                    out[*n] = d == batch[*n].digest;
                }
            });
        }
        self.progress.hashed.fetch_add(read.len() as u64, Ordering::Relaxed);
        for ((c, found), page) in batch.iter().zip(&mut out).zip(&mut *bytes) {
            if !*found {
                *found = self.find(&c.digest, page);
            }
        }
        self.progress.hash_ns.fetch_add((thread_cpu() - began).as_nanos() as u64, Ordering::Relaxed);
        Ok(out)
    }

    fn hasher(&self, digest: &Digest) -> Option<&Hasher> {
        let (vm, ..) = self.places[digest].first()?;
        self.group.hashers.get(usize::from(self.by_vm[vm].0.domain))
    }

    /// Reads a page of a VM whose log has not named it since its digest was taken.
    fn find_kept(&self, digest: &Digest, out: &mut PageBytes) -> Found<'_> {
        for (vm, block, page) in &self.places[digest] {
            let (_, prepared) = self.by_vm[vm];
            if let Some(guest) = &prepared.guest
                && let Ok(b) = u16::try_from(*block)
                && let addr = (PageAddr { block: BlockIx(b), page: *page })
                && !guest.is_stale(addr)
                && guest.ram().read_at(*block, *page, out).is_ok()
            {
                return Found::Kept(guest, addr);
            }
        }
        Found::No
    }

    /// Reads a page that holds this content *now* into `out`, other than where it was looked for first, and hashes it to be sure.
    fn find(&self, digest: &Digest, out: &mut PageBytes) -> bool {
        let Some(hasher) = self.group.hashers.get(usize::from(self.domain)) else { return false };
        self.places[digest].iter().skip(1).any(|place| {
            self.progress.hashed.fetch_add(1, Ordering::Relaxed);
            self.read(place, out) && hasher.page(out) == *digest
        })
    }

    fn read(&self, (vm, block, page): &Place, out: &mut PageBytes) -> bool {
        let (_, prepared) = self.by_vm[vm];
        prepared.ram.as_ref().is_some_and(|ram| ram.read_at(*block, *page, out).is_ok())
    }

    /// The rest cannot be carried: this host's own VMs send it themselves; others' are told to ask their sources.
    fn give_up(&self, rest: &[&Carry]) {
        for c in rest {
            for t in std::iter::once(c.first).chain(c.forward.iter()) {
                if let Some(table) = self.group.tables.get(usize::from(t.0)) {
                    lock(table).void(&c.digest);
                }
            }
        }
        withdraw::some(self.group, self.domain, rest);
    }

    /// The first target host has been told the id; the others get the content without it, so their tables keep the
    /// promise (`planned`) and bind at the first remote reference.
    fn tell_tables(&self, sent: &[ContentEntry], voids: &[ContentEntry]) {
        let table = |t: HostIx| self.group.tables.get(usize::from(t.0)).map(lock);
        if let Some(mut table) = table(self.target) {
            sent.iter().for_each(|e| table.pushed(&e.digest));
            voids.iter().for_each(|e| table.void(&e.digest));
        }
        for e in voids {
            for t in &e.forward {
                if let Some(mut table) = table(*t) {
                    table.void(&e.digest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::index::TargetSet;
    use crate::core::units::PageId;

    #[test]
    fn frames_end_where_other_hosts_begin_unless_they_would_be_short() {
        let carry = |hosts: &[u16]| {
            let mut forward = TargetSet::default();
            hosts.iter().for_each(|h| assert!(forward.insert(HostIx(*h))));
            Carry { digest: Digest([0; 20]), id: PageId { bucket: 0, index: 0 }, first: HostIx(0), forward }
        };
        let lens = |groups: &[(usize, &[u16])]| {
            let all: Vec<Carry> =
                groups.iter().flat_map(|(n, hosts)| std::iter::repeat_n(carry(hosts), *n)).collect();
            let all: Vec<&Carry> = all.iter().collect();
            frames(&all).map(<[_]>::len).collect::<Vec<_>>()
        };
        assert_eq!(lens(&[]), [0usize; 0]);
        assert_eq!(lens(&[(300, &[1])]), [128, 128, 44]);
        assert_eq!(lens(&[(50, &[]), (200, &[1]), (40, &[1, 2])]), [50, 128, 72, 40]);
        let short: Vec<(usize, &[u16])> = vec![(1, &[1]), (1, &[2]), (31, &[3]), (2, &[4])];
        assert_eq!(lens(&short), [33, 2]);
    }
}
