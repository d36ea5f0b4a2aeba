//! Forwarding to the other target hosts: one sender thread per peer host and trust domain, behind a queue of *names*.
//! The bytes stay in the store until their turn comes, so a slow peer holds up nobody: not the push that brought the
//! contents, not the VMs that arrive beside it. A frame of which a peer gets all contents goes on *as it came*, compressed
//! by its carrier (decision 0012): it is held in the queue, for all its peers once.
//!
//! Two hosts that forward to each other share one connection: acknowledgements then travel with the contents of the
//! other direction, and not as packets of their own on the very edge link that is the bottleneck (a fortieth of the bytes
//! forwarded). Of two hosts the one with the lower number calls; the other calls too if it is kept waiting.
//!
//! Bounds: [`MAX_HELD`] bytes of frames; beyond it their names are queued. [`MAX_QUEUED`] names a peer. At the bound, and for contents that the store has evicted meanwhile, nothing is
//! sent: the peer's VMs ask their own sources when their patience ends, which costs bandwidth only.

use super::TargetGroup;
use super::contents::{self, From};
use crate::core::digest::Digest;
use crate::core::units::{HostIx, PAGE_SIZE, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{ContentEntry, Purpose, encode_entries};
use crate::core::wire::paging::encode_digests;
use crate::flow::squeeze::{Body, Landing, Lane, Window};
use crate::flow::{MoveError, NOTSENT_LOWAT, Tagged, Timeouts, Traffic, lock};
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

// What waits, and what stands.
mod queues;

use queues::{Item, Packed, Queue, Waiting};
pub use queues::{MAX_HELD, MAX_QUEUED, Peers};

/// Contents in one batch.
const BATCH: usize = 64;
/// Pause before a peer that could not be reached is tried again; what comes meanwhile is dropped.
const AGAIN: Duration = Duration::from_secs(2);
/// How long the host with the higher number waits to be called before it calls.
const CALLED_WITHIN: Duration = Duration::from_millis(300);

/// Contents in one batch of those a vCPU waits for.
const URGENT: usize = 4;

impl Peers {
    /// Serves a peer connection, and has this host's own sender use its other direction meanwhile.
    pub(in crate::flow) fn serve(
        &self,
        group: &Arc<TargetGroup>,
        peer: Line,
        stream: &Arc<Connection>,
        frames: FrameBuf,
    ) {
        let key = (peer.host, peer.domain);
        // Contents go to the host that the group names, whoever says to be it.
        let named = self.addrs.get(usize::from(peer.host.0)).map(SocketAddr::ip);
        let is_named = stream
            .peer_addr()
            .is_ok_and(|a| Some(a.ip().to_canonical()) == named.map(|ip| ip.to_canonical()));
        {
            // Nothing that stands after the close would ever be taken down.
            let senders = lock(&self.senders);
            if senders.closed {
                return;
            }
            if is_named {
                lock(&self.lines).insert(key, stream.clone());
                self.called.notify_all();
            }
        }
        contents::serve(group, stream, frames, From::Peer(peer.host), peer.domain, Landing::default());
        // The other end has closed or lost it: what is still to be sent needs a new one.
        let _ = stream.shutdown(Shutdown::Both);
        self.hang_up(key, stream);
    }

    fn hang_up(&self, key: (HostIx, u16), stream: &Arc<Connection>) {
        let mut lines = lock(&self.lines);
        if lines.get(&key).is_some_and(|s| Arc::ptr_eq(s, stream)) {
            lines.remove(&key);
        }
    }

    /// The connection that stands, or the one that comes within `wait`.
    fn line(&self, key: (HostIx, u16), wait: Duration) -> Option<Arc<Connection>> {
        let until = Instant::now() + wait;
        let mut lines = lock(&self.lines);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let Some(line) = lines.get(&key) {
                return Some(line.clone());
            }
            if left.is_zero() {
                return None;
            }
            lines = self.called.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Forwards contents of the store to `target`. Never blocks.
    pub(super) fn contents(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = Digest>,
    ) {
        self.queue(group, target, domain, false, contents.map(Item::Content));
    }

    /// Holds a frame to be passed on as it came; none if too many bytes are held by now.
    pub(super) fn hold(&self, digests: Vec<Digest>, body: Body) -> Option<Arc<Packed>> {
        let fits = |n: usize| n.checked_add(body.len()).filter(|n| *n <= MAX_HELD);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Arc::new(Packed { digests, body, held: self.held.clone() }))
    }

    /// Forwards a frame of contents to `target` as it came. Never blocks.
    pub(super) fn packed(&self, group: &Arc<TargetGroup>, target: HostIx, domain: u16, frame: Arc<Packed>) {
        self.queue(group, target, domain, false, std::iter::once(Item::Packed(frame)));
    }

    /// Forwards contents that a vCPU at `target` waits for, before all others.
    pub(super) fn hurried(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = Digest>,
    ) {
        self.queue(group, target, domain, true, contents.map(Item::Content));
    }

    /// A vCPU here waits for these contents, which `target` may have.
    pub(super) fn hurry(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = Digest>,
    ) {
        self.queue(group, target, domain, true, contents.map(Item::Hurry));
    }

    /// `target` asked for these contents, and they are not here.
    pub(super) fn not_here(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = Digest>,
    ) {
        self.queue(group, target, domain, true, contents.map(Item::NotHere));
    }

    /// Target hosts that a group has beside this one.
    pub(super) fn others(&self, me: HostIx) -> Vec<HostIx> {
        let all = (0..self.addrs.len()).filter_map(|n| u16::try_from(n).ok()).map(HostIx);
        all.filter(|h| *h != me).collect()
    }

    /// Whether this is another target host of the group than `me`.
    pub(in crate::flow) fn knows(&self, host: HostIx, me: HostIx) -> bool {
        host != me && usize::from(host.0) < self.addrs.len()
    }

    /// Passes a void on to `target`.
    pub(super) fn void(&self, group: &Arc<TargetGroup>, target: HostIx, domain: u16, entry: ContentEntry) {
        self.queue(group, target, domain, false, std::iter::once(Item::Void(entry)));
    }

    fn queue(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        urgent: bool,
        items: impl Iterator<Item = Item>,
    ) {
        let Some(addr) = self.addrs.get(usize::from(target.0)).copied().filter(|_| target != group.me) else {
            tracing::warn!(
                "a peer asks to forward to target host {}, which is not another of the group",
                target.0
            );
            return;
        };
        if usize::from(domain) >= group.hashers.len() {
            tracing::warn!(
                "a peer asks to forward contents of trust domain {domain}, which the group has not"
            );
            return;
        }
        let Some(queue) = self.sender(group, addr, Line { host: target, domain }) else { return };
        let mut waiting = lock(&queue.waiting);
        let list = if urgent { &mut waiting.urgent } else { &mut waiting.items };
        for item in items {
            if list.len() < MAX_QUEUED {
                list.push_back(item);
            }
        }
        drop(waiting);
        queue.bell.notify_one();
    }

    /// The queue of whoever sends to this peer; none after the close, or if there is no thread for it: who waits there asks
    /// its own source.
    fn sender(&self, group: &Arc<TargetGroup>, addr: SocketAddr, peer: Line) -> Option<Arc<Queue>> {
        let mut senders = lock(&self.senders);
        if senders.closed {
            return None;
        }
        let key = (peer.host, peer.domain);
        if let Some(queue) = senders.queues.get(&key) {
            return Some(queue.clone());
        }
        let queue = Arc::new(Queue::default());
        let purpose = Purpose::Peer { target: group.me, domain: peer.domain };
        let hello = Greeting::new(&group.name, group.token, purpose);
        let (timeouts, source) = (group.timeouts, Arc::downgrade(group));
        let link = Link { addr, peer, hello, timeouts, source, conn: None, retry: None };
        let (name, own) = (format!("irlm-peer-{}", peer.host.0), queue.clone());
        if let Err(e) = std::thread::Builder::new().name(name).spawn(move || link.run(&own)) {
            tracing::error!("no thread for target host {}: {e}", peer.host.0);
            return None;
        }
        senders.queues.insert(key, queue.clone());
        Some(queue)
    }

    /// Lets the sender threads end when their queues are empty, for good.
    pub fn close(&self) {
        let mut senders = lock(&self.senders);
        senders.closed = true;
        for (_, q) in senders.queues.drain() {
            lock(&q.waiting).closed = true;
            q.bell.notify_one();
        }
        drop(senders);
        // The other end sees the end when all has been read; its sender, if any, then needs no answer from here.
        for (_, line) in lock(&self.lines).drain() {
            let _ = line.shutdown(Shutdown::Both);
        }
    }
}

/// Whom a peer connection leads to, and for which trust domain.
#[derive(Clone, Copy, Debug)]
pub(in crate::flow) struct Line {
    pub(in crate::flow) host: HostIx,
    pub(in crate::flow) domain: u16,
}

struct Link {
    addr: SocketAddr,
    peer: Line,
    hello: Greeting,
    timeouts: Timeouts,
    source: Weak<TargetGroup>,
    conn: Option<Arc<Connection>>,
    retry: Option<Instant>,
}

/// The next batch of like items; `None` when the queue is closed and empty.
fn next(queue: &Queue) -> Option<Vec<Item>> {
    let mut waiting = lock(&queue.waiting);
    while waiting.urgent.is_empty() && waiting.items.is_empty() {
        if waiting.closed {
            return None;
        }
        waiting = queue.bell.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
    let Waiting { urgent, items, .. } = &mut *waiting;
    let (list, most) = if urgent.is_empty() { (items, BATCH) } else { (urgent, URGENT) };
    // A frame is a batch of its own.
    let most = if matches!(list.front(), Some(Item::Packed(_))) { 1 } else { most };
    let kind = list.front().map(std::mem::discriminant);
    let like = list.iter().take(most).take_while(|i| Some(std::mem::discriminant(*i)) == kind).count();
    Some(list.drain(..like).collect())
}

impl Link {
    fn run(mut self, queue: &Queue) {
        let (mut meta, mut bytes) = (Vec::new(), Vec::new());
        let mut lane = None;
        while let Some(batch) = next(queue) {
            let Some(group) = self.source.upgrade() else { continue };
            if self.conn.is_none() && self.retry.is_none_or(|at| Instant::now() >= at) {
                match self.connect(&group) {
                    Ok(c) => self.conn = Some(c),
                    Err(e) => {
                        tracing::warn!("forwarding: {e}");
                        self.retry = Some(Instant::now() + AGAIN);
                    }
                }
            }
            let Some(conn) = &self.conn else { continue };
            let started = Instant::now();
            let go_on = || started.elapsed() < self.timeouts.peer;
            let work = &group.counts.work;
            // No window: peers' contents are short runs of what many VMs have, each frame by itself.
            let lane =
                lane.get_or_insert_with(|| Lane::new(group.options.compress, Window::default(), &group.edge));
            let (kind, sent) = if let [Item::Packed(frame)] = &batch[..] {
                let entry = |d: &Digest| ContentEntry { id: None, digest: *d, forward: Vec::new() };
                let entries: Vec<ContentEntry> = frame.digests.iter().map(entry).collect();
                meta.clear();
                encode_entries(entries.iter(), &mut meta);
                (Kind::Contents, lane.pass_on(conn, (Kind::Contents, &meta), &frame.body, work, go_on))
            } else {
                bytes.clear();
                let Some(kind) = gather(&group, batch, &mut bytes, &mut meta) else { continue };
                let contents: Vec<&PageBytes> = bytes.as_chunks::<PAGE_SIZE>().0.iter().collect();
                (kind, lane.send(conn, (kind, &meta), &contents, work, go_on))
            };
            if kind == Kind::Contents
                && let Ok(n) = sent
            {
                group.counts.forwarded_wire.fetch_add(n as u64, Ordering::Relaxed);
            }
            if let Err(e) = sent {
                tracing::warn!("forwarding to {}: {e}", self.addr);
                let _ = conn.shutdown(Shutdown::Both);
                group.peers.hang_up((self.peer.host, self.peer.domain), conn);
                self.conn = None;
                self.retry = Some(Instant::now() + AGAIN);
            }
        }
    }

    fn connect(&self, group: &Arc<TargetGroup>) -> Result<Arc<Connection>, MoveError> {
        let key = (self.peer.host, self.peer.domain);
        let wait = if group.me < self.peer.host { Duration::ZERO } else { CALLED_WITHIN };
        if let Some(line) = group.peers.line(key, wait) {
            crate::host::sockopt::set_notsent_lowat(&line, NOTSENT_LOWAT)?;
            return Ok(line);
        }
        let tag = |ends| Tagged::of(&group.tags, ends, Traffic::Forward);
        let (conn, tag) = dial(self.addr, &self.hello, self.timeouts.peer, &group.options.security, tag)?;
        crate::host::sockopt::set_notsent_lowat(&conn, NOTSENT_LOWAT)?;
        let (_, frames) = wait_hello_ok(&conn, self.timeouts.peer)?;
        let conn = Arc::new(conn);
        let (group, peer, reading) = (group.clone(), self.peer, conn.clone());
        let read = move || {
            let _tag = tag;
            group.peers.serve(&group, peer, &reading, frames);
        };
        std::thread::Builder::new().name("irlm-data".into()).spawn(read)?;
        Ok(conn)
    }
}

/// The frame for a batch, if anything is left of it: contents that the store no longer has are left out.
fn gather(group: &TargetGroup, batch: Vec<Item>, bytes: &mut Vec<u8>, meta: &mut Vec<u8>) -> Option<Kind> {
    let host = lock(&group.host);
    let mut kind = Kind::Voids;
    let mut entries = Vec::with_capacity(batch.len());
    let mut digests = Vec::new();
    for item in batch {
        match item {
            Item::Void(e) => entries.push(e),
            Item::Content(digest) => {
                kind = Kind::Contents;
                if let Some(b) = host.store.get(&digest) {
                    bytes.extend_from_slice(b);
                    entries.push(ContentEntry { id: None, digest, forward: Vec::new() });
                }
            }
            Item::Hurry(d) => {
                kind = Kind::Hurry;
                digests.push(d);
            }
            Item::NotHere(d) => {
                kind = Kind::NotHere;
                digests.push(d);
            }
            // Never among others (`next`).
            Item::Packed(_) => {}
        }
    }
    drop(host);
    meta.clear();
    match kind {
        Kind::Hurry | Kind::NotHere => meta.extend(encode_digests(&digests)),
        _ if entries.is_empty() => return None,
        _ => encode_entries(entries.iter(), meta),
    }
    debug_assert!(kind != Kind::Contents || bytes.len() == entries.len() * PAGE_SIZE);
    Some(kind)
}

#[cfg(test)]
mod tests;
