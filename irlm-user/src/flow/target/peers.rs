//! Forwarding to the other target hosts: one sender thread per peer host and trust domain, behind a queue of *names*.
//! The bytes stay in the store until their turn comes, so a slow peer holds up nobody: not the push that brought the
//! contents, not the VMs that arrive beside it.
//!
//! Bound: [`MAX_QUEUED`] names a peer. At the bound, and for contents that the store has evicted meanwhile, nothing is
//! sent: the peer's VMs ask their own sources when their patience ends, which costs bandwidth only.

use super::TargetGroup;
use crate::core::digest::Digest;
use crate::core::units::{HostIx, PAGE_SIZE};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{ContentEntry, Hello, Purpose, encode_entries};
use crate::flow::{FlowTags, NOTSENT_LOWAT, Tagged, Timeouts, Traffic, lock};
use crate::net::conn::{FrameBuf, dial, send_while, wait_hello_ok};
use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Names that may wait for one peer: 16 GiB of contents, some 200 MiB of queue.
pub const MAX_QUEUED: usize = 1 << 22;
/// Contents in one batch.
const BATCH: usize = 64;
/// Pause before a peer that could not be reached is tried again; what comes meanwhile is dropped.
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum Item {
    Content(Digest),
    Void(ContentEntry),
}

#[derive(Debug, Default)]
struct Queue {
    items: Mutex<(VecDeque<Item>, bool)>,
    bell: Condvar,
}

/// Senders to the other target hosts of a group, made when first needed.
#[derive(Debug)]
pub struct Peers {
    addrs: Vec<SocketAddr>,
    queues: Mutex<HashMap<(HostIx, u16), Arc<Queue>>>,
}

impl Peers {
    /// Data address of each target host of the group.
    #[must_use]
    pub fn new(addrs: Vec<SocketAddr>) -> Self {
        Self { addrs, queues: Mutex::default() }
    }

    /// Forwards contents of the store to `target`. Never blocks.
    pub(super) fn contents(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = Digest>,
    ) {
        self.queue(group, target, domain, contents.map(Item::Content));
    }

    /// Passes a void on to `target`.
    pub(super) fn void(&self, group: &Arc<TargetGroup>, target: HostIx, domain: u16, entry: ContentEntry) {
        self.queue(group, target, domain, std::iter::once(Item::Void(entry)));
    }

    fn queue(
        &self,
        group: &Arc<TargetGroup>,
        target: HostIx,
        domain: u16,
        items: impl Iterator<Item = Item>,
    ) {
        let Some(addr) = self.addrs.get(usize::from(target.0)).copied().filter(|_| target != group.me) else {
            tracing::warn!(
                "a peer asks to forward to target host {}, which is not another of the group",
                target.0
            );
            return;
        };
        let queue = lock(&self.queues)
            .entry((target, domain))
            .or_insert_with(|| {
                let queue = Arc::new(Queue::default());
                let hello = Hello::new(&group.name, group.token, Purpose::Peer { target: group.me, domain });
                let (timeouts, tags, source) = (group.timeouts, group.tags.clone(), Arc::downgrade(group));
                let link = Link { addr, hello, timeouts, tags, source, conn: None, retry: None };
                let (name, own) = (format!("irlm-peer-{}", target.0), queue.clone());
                if let Err(e) = std::thread::Builder::new().name(name).spawn(move || link.run(&own)) {
                    tracing::error!("no thread for target host {}: {e}", target.0);
                }
                queue
            })
            .clone();
        let mut waiting = lock(&queue.items);
        for item in items {
            if waiting.0.len() < MAX_QUEUED {
                waiting.0.push_back(item);
            }
        }
        drop(waiting);
        queue.bell.notify_one();
    }

    /// Lets the sender threads end when their queues are empty.
    pub fn close(&self) {
        for (_, q) in lock(&self.queues).drain() {
            lock(&q.items).1 = true;
            q.bell.notify_one();
        }
    }
}

struct Link {
    addr: SocketAddr,
    hello: Hello,
    timeouts: Timeouts,
    tags: Arc<dyn FlowTags>,
    source: Weak<TargetGroup>,
    conn: Option<(TcpStream, Tagged)>,
    retry: Option<Instant>,
}

/// The next batch of like items; `None` when the queue is closed and empty.
fn next(queue: &Queue) -> Option<Vec<Item>> {
    let mut waiting = lock(&queue.items);
    while waiting.0.is_empty() {
        if waiting.1 {
            return None;
        }
        waiting = queue.bell.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
    let kind = waiting.0.front().map(std::mem::discriminant);
    let like = waiting.0.iter().take(BATCH).take_while(|i| Some(std::mem::discriminant(*i)) == kind).count();
    Some(waiting.0.drain(..like).collect())
}

impl Link {
    fn run(mut self, queue: &Queue) {
        let (mut meta, mut bytes) = (Vec::new(), Vec::new());
        while let Some(batch) = next(queue) {
            if self.conn.is_none() && self.retry.is_none_or(|at| Instant::now() >= at) {
                match self.connect() {
                    Ok(c) => self.conn = Some(c),
                    Err(e) => {
                        tracing::warn!("forwarding: {e}");
                        self.retry = Some(Instant::now() + AGAIN);
                    }
                }
            }
            let (Some((conn, _)), Some(group)) = (&self.conn, self.source.upgrade()) else { continue };
            bytes.clear();
            let (kind, entries) = gather(&group, batch, &mut bytes);
            if entries.is_empty() {
                continue;
            }
            meta.clear();
            encode_entries(entries.iter(), &mut meta);
            let started = Instant::now();
            let go_on = || started.elapsed() < self.timeouts.peer;
            if let Err(e) = send_while(conn, kind, &meta, &[IoSlice::new(&bytes)], go_on) {
                tracing::warn!("forwarding to {}: {e}", self.addr);
                self.conn = None;
                self.retry = Some(Instant::now() + AGAIN);
            }
        }
    }

    fn connect(&self) -> Result<(TcpStream, Tagged), String> {
        let tag = |ends| Tagged::of(&self.tags, ends, Traffic::Forward);
        let (conn, tag) = dial(self.addr, &self.hello, self.timeouts.peer, tag).map_err(|e| e.to_string())?;
        crate::host::sockopt::set_notsent_lowat(&conn, NOTSENT_LOWAT).map_err(|e| e.to_string())?;
        wait_hello_ok(&conn, &mut FrameBuf::new(), self.timeouts.peer).map_err(|e| e.to_string())?;
        Ok((conn, tag))
    }
}

/// The frame for a batch; contents that the store no longer has are left out.
fn gather(group: &TargetGroup, batch: Vec<Item>, bytes: &mut Vec<u8>) -> (Kind, Vec<ContentEntry>) {
    let host = lock(&group.host);
    let mut kind = Kind::Voids;
    let mut entries = Vec::with_capacity(batch.len());
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
        }
    }
    debug_assert!(kind == Kind::Voids || bytes.len() == entries.len() * PAGE_SIZE);
    (kind, entries)
}
