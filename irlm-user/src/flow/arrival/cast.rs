//! Multicast to the other target hosts (docs/multicast.md): a thread that sends (`irlm-cast-tx`) and one that hears
//! (`irlm-cast-rx`); what to do is decided by `core::cast`. Contents that fewer than two of their hosts would hear go to
//! the peers' queues (`peers`), as all do where there is no multicast.
//!
//! ```text
//! contents ─► queue a set of hosts ─► compressed block ─► Sender ─► datagrams ═► Receiver ─► block ─► contents
//!                                                          ▲ reports ◄══════════════┘
//! ```
//!
//! Bound: [`MAX_QUEUED`](super::peers::MAX_QUEUED) names. At the bound nothing is sent, as there.

use super::TargetGroup;
use super::contents::{From, Taker};
use crate::core::cast::HELD_BYTES;
use crate::core::cast::block::{open, seal};
use crate::core::cast::rate::Rate;
use crate::core::cast::receiver::Receiver;
use crate::core::cast::sender::{Sender, Step};
use crate::core::digest::Digest;
use crate::core::index::HostSet;
use crate::core::squeeze::{Control, Mode};
use crate::core::units::{HostIx, PAGE_SIZE, PageBytes};
use crate::core::wire::cast::{Cast as Datagram, CastKey, MAX_DATAGRAM, decode, encode};
use crate::core::wire::frame::{HEADER_LEN, Header, Kind};
use crate::core::wire::messages::{ContentEntry, encode_entries};
use crate::flow::inbox::wait_readable;
use crate::flow::squeeze::{Landing, Packer};
use crate::flow::{Traffic, lock, now};
use crate::net::conn::Frame;
use crate::net::mcast::{Sockets, Way};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

// What it holds.
mod state;

pub use state::{Cast, CastConfig, CastCounts};
use state::{Counts, Lanes, State};

/// How long it may take until all hosts have heard each other; what comes earlier waits for so long at most.
const PROBE: u64 = 400_000_000;
/// Datagrams taken from a socket before the clock is looked at again.
const AT_ONCE: usize = 64;
/// Longest nap of either thread: it ends within that time.
const NAP: Duration = Duration::from_millis(100);

impl TargetGroup {
    /// Multicasts from now on what two or more other target hosts need.
    pub fn multicast(self: &Arc<Self>, config: CastConfig, hosts: &[SocketAddr]) -> io::Result<()> {
        let cast = Cast::start(self, config, hosts)?;
        if let Err(second) = self.cast.set(cast) {
            second.close();
        }
        Ok(())
    }
}

fn add(to: &AtomicU64, n: u64) {
    to.fetch_add(n, Ordering::Relaxed);
}

/// Bytes of a datagram that fits an IP packet of `mtu` bytes.
fn payload(group: SocketAddr, mtu: u16) -> usize {
    usize::from(mtu).saturating_sub(if group.is_ipv4() { 28 } else { 48 }).min(MAX_DATAGRAM)
}

impl Cast {
    /// Joins the group and begins to announce this host. `hosts`: the data address of each target host.
    pub fn start(
        group: &Arc<TargetGroup>,
        config: CastConfig,
        hosts: &[SocketAddr],
    ) -> io::Result<Arc<Self>> {
        let me = group.me;
        let ips: Vec<IpAddr> = hosts.iter().map(|a| a.ip().to_canonical()).collect();
        let local = *ips.get(usize::from(me.0)).ok_or(io::ErrorKind::InvalidInput)?;
        let sockets = Sockets::open(local, config.group, config.looped)?;
        let (key, begun) = (CastKey::new(&group.token), now());
        let rate = Rate::new(config.floor, config.ceiling, begun);
        let number = u16::try_from(ips.len()).unwrap_or(u16::MAX);
        let sender = Sender::new(me, number, key.clone(), payload(config.group, config.mtu), rate, begun);
        let cast = Arc::new(Self {
            me,
            config,
            key,
            sockets,
            ips,
            places: Mutex::default(),
            state: Mutex::new(State { sender, lanes: Lanes::default() }),
            bell: Condvar::new(),
            stop: AtomicBool::new(false),
            begun,
            counts: Counts::default(),
            tags: group.tags.clone(),
        });
        if let Ok(local) = cast.sockets.local() {
            cast.tags.add_datagrams(local, cast.sockets.group(), Traffic::Forward);
        }
        let spawn = |name: &str, run: fn(&Self, &Weak<TargetGroup>)| {
            let (own, weak) = (cast.clone(), Arc::downgrade(group));
            std::thread::Builder::new().name(name.into()).spawn(move || run(&own, &weak)).map(drop)
        };
        let begun = spawn("irlm-cast-rx", Self::hear).and_then(|()| spawn("irlm-cast-tx", Self::speak));
        begun.inspect_err(|_| cast.close())?;
        Ok(cast)
    }

    /// Lets both threads end.
    pub(super) fn close(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.bell.notify_all();
    }

    /// Takes a content that `forward` need, if that is for multicast at all.
    pub(super) fn offer(&self, domain: u16, digest: Digest, forward: &[HostIx]) -> bool {
        let others = forward.iter().filter(|h| **h != self.me && usize::from(h.0) < self.ips.len());
        let hosts: HostSet = others.copied().collect();
        if hosts.len() < 2 || self.stop.load(Ordering::Relaxed) {
            return false;
        }
        lock(&self.state).lanes.put(domain, hosts, digest);
        self.bell.notify_one();
        true
    }

    /// Counters.
    #[must_use]
    pub fn counts(&self) -> CastCounts {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let (sent, hearers, rate) = {
            let s = lock(&self.state);
            (s.sender.stats, s.sender.hearers().len(), s.sender.rate())
        };
        CastCounts {
            sent,
            heard: *lock(&self.counts.heard),
            report_bytes: get(&self.counts.report_bytes),
            received_bytes: get(&self.counts.received_bytes),
            contents: get(&self.counts.contents),
            unheard: get(&self.counts.unheard),
            dropped: get(&self.counts.dropped),
            foreign: get(&self.counts.foreign),
            hearers,
            rate,
        }
    }

    /// Whether it is known which hosts hear, or will not be known any better.
    fn probed(&self, hearers: &HostSet) -> bool {
        hearers.len() + 1 >= self.ips.len() || now().0 >= self.begun.0 + PROBE
    }

    fn speak(&self, group: &Weak<TargetGroup>) {
        let Some(compress) = group.upgrade().map(|g| g.options.compress) else { return };
        let mut batcher = Batcher::new(compress);
        let mut out = Vec::with_capacity(MAX_DATAGRAM);
        let mut complained = None;
        while !self.stop.load(Ordering::Relaxed) {
            let mut state = lock(&self.state);
            let hearers = state.sender.hearers();
            let handed = state.sender.take_handed();
            let batch = (state.sender.takes() && self.probed(&hearers)).then(|| state.lanes.take()).flatten();
            if !handed.is_empty() || batch.is_some() {
                drop(state);
                let Some(group) = group.upgrade() else { return };
                for h in handed {
                    group.peers.contents(&group, h.host, h.domain, h.digests.into_iter());
                }
                if let Some((domain, hosts, digests)) = batch {
                    self.send_batch(&group, &mut batcher, domain, &hosts, &hearers, digests);
                }
                continue;
            }
            match state.sender.step(now(), &mut out) {
                Step::Wait(until) => {
                    let nap = Duration::from_nanos(until.0.saturating_sub(now().0)).min(NAP);
                    drop(self.bell.wait_timeout(state, nap).unwrap_or_else(PoisonError::into_inner));
                }
                step => {
                    drop(state);
                    let to = match step {
                        Step::To(host) => match lock(&self.places).get(&host) {
                            Some(place) => Some(*place),
                            // It asks again.
                            None => continue,
                        },
                        _ => None,
                    };
                    if let Err(e) = self.sockets.send(&out, to)
                        && complained.is_none_or(|at: Instant| at.elapsed() > Duration::from_secs(10))
                    {
                        complained = Some(Instant::now());
                        tracing::warn!("multicast to {}: {e}", to.unwrap_or(self.sockets.group()));
                    }
                }
            }
        }
        // What may not have arrived is not repaired any more.
        let handed = {
            let mut state = lock(&self.state);
            state.sender.give_up();
            state.sender.take_handed()
        };
        if let Some(group) = group.upgrade() {
            for h in handed {
                group.peers.contents(&group, h.host, h.domain, h.digests.into_iter());
            }
        }
    }

    /// One block to those of `hosts` that hear, if they are two or more; the rest is for the peers' queues.
    fn send_batch(
        &self,
        group: &Arc<TargetGroup>,
        batcher: &mut Batcher,
        domain: u16,
        hosts: &HostSet,
        hearers: &HostSet,
        digests: Vec<Digest>,
    ) {
        let mut mine: HostSet = hosts.iter().filter(|h| hearers.contains(*h)).collect();
        if mine.len() < 2 {
            mine = HostSet::new();
        }
        for h in hosts.iter().filter(|h| !mine.contains(*h)) {
            add(&self.counts.unheard, digests.len() as u64);
            group.peers.contents(group, h, domain, digests.iter().copied());
        }
        if mine.is_empty() {
            return;
        }
        let rate = lock(&self.state).sender.rate();
        // Contents that the store has let go meanwhile are left out: who needs them asks its own source.
        if let Some((digests, block)) = batcher.block(group, domain, digests, rate) {
            lock(&self.state).sender.push(domain, digests, mine, block, now());
        }
    }

    fn hear(&self, group: &Weak<TargetGroup>) {
        let number = u16::try_from(self.ips.len()).unwrap_or(u16::MAX);
        let mut receiver = Receiver::new(self.me, number, HELD_BYTES, rand::random());
        let mut buf = vec![0; MAX_DATAGRAM + 1];
        let mut taker = Taker::new(From::Cast, 0, Landing::default());
        let (mut out, mut reports) = (Vec::new(), Vec::new());
        while !self.stop.load(Ordering::Relaxed) {
            let until = receiver.wake_at().map_or(u64::MAX, |t| t.0.saturating_sub(now().0));
            let ways = [Way::Group, Way::Own];
            let ready =
                wait_readable(ways.map(|w| Some(self.sockets.by(w))), Duration::from_nanos(until).min(NAP));
            let ready = ready.unwrap_or_else(|e| {
                tracing::error!("multicast: poll: {e}");
                std::thread::sleep(NAP);
                [false, false]
            });
            for way in ways.into_iter().zip(ready).filter(|x| x.1).map(|x| x.0) {
                for _ in 0..AT_ONCE {
                    let (n, from) = match self.sockets.take(way, &mut buf) {
                        Ok(Some(x)) => x,
                        Ok(None) => break,
                        Err(e) => {
                            // What a host's kernel says to a report that came after its socket was closed.
                            tracing::debug!("multicast: {e}");
                            break;
                        }
                    };
                    if let Some(block) = self.take(&mut receiver, &mut buf[..n], from, way) {
                        let Some(group) = group.upgrade() else { return };
                        self.store(&group, &block, &mut taker);
                    }
                }
            }
            receiver.reports(now(), &mut reports);
            for (host, r) in reports.drain(..) {
                let Some(place) = lock(&self.places).get(&host).copied() else { continue };
                encode(&self.key, self.me, &Datagram::Report(r), &mut out);
                add(&self.counts.report_bytes, out.len() as u64);
                if let Err(e) = self.sockets.send(&out, Some(place)) {
                    tracing::debug!("multicast: report to {place}: {e}");
                }
            }
            *lock(&self.counts.heard) = receiver.stats;
        }
    }

    /// One datagram. Returns a block that it completed.
    fn take(&self, receiver: &mut Receiver, bytes: &mut [u8], from: SocketAddr, way: Way) -> Option<Vec<u8>> {
        let drill = self.config.drop_per_mille;
        if drill > 0 && rand::random_range(0..1000) < drill {
            add(&self.counts.dropped, 1);
            return None;
        }
        let length = bytes.len() as u64;
        let (host, said) = match decode(&self.key, bytes) {
            Ok((host, _)) if host == self.me => return None,
            Ok(x) if self.ips.get(usize::from(x.0.0)) == Some(&from.ip().to_canonical()) => x,
            _ => {
                add(&self.counts.foreign, 1);
                return None;
            }
        };
        add(&self.counts.received_bytes, length);
        match said {
            Datagram::Data(d) => return receiver.data(host, &d, now()),
            // Only who hears the group's address may be counted on to hear it.
            Datagram::Announce { count, next } if way == Way::Group => {
                self.learn(host, from);
                receiver.announce(host, count, next, now());
            }
            Datagram::Announce { .. } => add(&self.counts.foreign, 1),
            Datagram::Report(r) => {
                self.learn(host, from);
                lock(&self.state).sender.report(host, &r, now());
                self.bell.notify_one();
            }
            Datagram::Skip(blocks) => receiver.skip(host, &blocks, now()),
        }
        None
    }

    /// Where a host's own socket is.
    fn learn(&self, host: HostIx, place: SocketAddr) {
        let Some(old) = lock(&self.places).insert(host, place) else {
            return self.tag(place, true);
        };
        if old != place {
            self.tag(old, false);
            self.tag(place, true);
        }
    }

    /// What goes between this host and another one, and what comes from there to the group.
    fn tag(&self, place: SocketAddr, comes: bool) {
        let Ok(local) = self.sockets.local() else { return };
        for here in [local, self.sockets.group()] {
            if comes {
                self.tags.add_datagrams(here, place, Traffic::Forward);
            } else {
                self.tags.remove_datagrams(here, place);
            }
        }
    }

    /// A whole block: its contents are taken as a peer's are. No block needs another one, so one taker is enough.
    fn store(&self, group: &Arc<TargetGroup>, block: &[u8], taker: &mut Taker) {
        let taken = open(block).and_then(|o| {
            let frame = Frame { kind: o.header.kind, codec: o.header.codec, meta: o.meta, body: o.body };
            taker.domain = o.domain;
            taker.take(group, &frame)
        });
        match taken {
            Ok(n) => add(&self.counts.contents, n as u64),
            Err(e) => tracing::warn!("multicast: {e}"),
        }
    }
}

impl Drop for Cast {
    fn drop(&mut self) {
        for place in std::mem::take(&mut *lock(&self.places)).into_values() {
            self.tag(place, false);
        }
        if let Ok(local) = self.sockets.local() {
            self.tags.remove_datagrams(local, self.sockets.group());
        }
    }
}

/// Makes blocks; its buffers are used again.
struct Batcher {
    meta: Vec<u8>,
    bytes: Vec<u8>,
    packer: Packer,
}

impl Batcher {
    fn new(compress: Mode) -> Self {
        // No window: a block may be lost, or be for other hosts than the one before.
        Self { meta: Vec::new(), bytes: Vec::new(), packer: Packer::new(Control::new(compress), 0) }
    }

    /// What the store still has of `digests`, and the block of it, compressed where that gets more through at `rate`.
    fn block(
        &mut self,
        group: &TargetGroup,
        domain: u16,
        mut digests: Vec<Digest>,
        rate: u64,
    ) -> Option<(Vec<Digest>, Vec<u8>)> {
        self.bytes.clear();
        {
            let host = lock(&group.host);
            digests.retain(|d| host.store.get(d).inspect(|b| self.bytes.extend_from_slice(*b)).is_some());
        }
        if digests.is_empty() {
            return None;
        }
        let entry = |d: &Digest| ContentEntry { id: None, digest: *d, forward: Vec::new() };
        let entries: Vec<ContentEntry> = digests.iter().map(entry).collect();
        self.meta.clear();
        encode_entries(entries.iter(), &mut self.meta);
        let work = &group.counts.work;
        let contents: Vec<&PageBytes> = self.bytes.as_chunks::<PAGE_SIZE>().0.iter().collect();
        let mut body: Vec<&[u8]> = Vec::with_capacity(contents.len() + 2);
        let (codec, mut sample) = self.packer.pack(&contents, work, &mut body);
        let length = body.iter().map(|b| b.len()).sum::<usize>();
        let header = Header::new(Kind::Contents, self.meta.len(), length).coded(codec);
        let mut block = Vec::with_capacity(self.meta.len() + length + 2 * HEADER_LEN);
        seal(domain, header, &self.meta, &body, &mut block);
        // The pace is the link: a block leaves while the next is made.
        sample.wire = block.len();
        sample.cycle = sample.work.max(block.len() as f64 / rate.max(1) as f64);
        sample.held = sample.cycle - sample.work;
        self.packer.sent(&sample, length, work);
        Some((digests, block))
    }
}

#[cfg(test)]
mod tests;
