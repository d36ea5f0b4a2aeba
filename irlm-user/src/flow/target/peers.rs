//! Forwarding to the other target hosts: one sender thread per peer host and trust domain, behind a bounded queue.
//!
//! Bound: [`QUEUE`] batches of at most 256 KiB a peer. A full queue blocks the push connection that fills it. A peer
//! that cannot be reached costs bandwidth only: its VMs ask their own sources when their patience ends.

use super::TargetGroup;
use crate::core::digest::Digest;
use crate::core::units::{HostIx, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{ContentEntry, Hello, Purpose, encode_entries};
use crate::flow::{FlowTags, NOTSENT_LOWAT, Tagged, Timeouts, Traffic, lock};
use crate::net::conn::{FrameBuf, dial, send_while, wait_hello_ok};
use std::collections::HashMap;
use std::io::IoSlice;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Batches that may wait for one peer.
pub const QUEUE: usize = 8;
/// Contents in one batch.
const BATCH: usize = 64;
/// Pause before a peer that could not be reached is tried again; what comes meanwhile is dropped.
const AGAIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Batch {
    kind: Kind,
    entries: Vec<ContentEntry>,
    bytes: Vec<u8>,
}

/// Senders to the other target hosts of a group, made when first needed.
#[derive(Debug)]
pub struct Peers {
    addrs: Vec<SocketAddr>,
    senders: Mutex<HashMap<(HostIx, u16), SyncSender<Batch>>>,
}

impl Peers {
    /// Data address of each target host of the group.
    #[must_use]
    pub fn new(addrs: Vec<SocketAddr>) -> Self {
        Self { addrs, senders: Mutex::default() }
    }

    /// Forwards contents to `target`; blocks while its queue is full.
    pub(super) fn contents<'a>(
        &self,
        group: &TargetGroup,
        target: HostIx,
        domain: u16,
        contents: impl Iterator<Item = (Digest, &'a PageBytes)>,
    ) {
        let fresh = || Batch { kind: Kind::Contents, entries: Vec::new(), bytes: Vec::new() };
        let mut batch = fresh();
        for (digest, bytes) in contents {
            batch.entries.push(ContentEntry { id: None, digest, forward: Vec::new() });
            batch.bytes.extend_from_slice(bytes);
            if batch.entries.len() == BATCH {
                self.queue(group, target, domain, std::mem::replace(&mut batch, fresh()));
            }
        }
        if !batch.entries.is_empty() {
            self.queue(group, target, domain, batch);
        }
    }

    /// Passes a void on to `target`.
    pub(super) fn void(&self, group: &TargetGroup, target: HostIx, domain: u16, entry: ContentEntry) {
        self.queue(
            group,
            target,
            domain,
            Batch { kind: Kind::Voids, entries: vec![entry], bytes: Vec::new() },
        );
    }

    fn queue(&self, group: &TargetGroup, target: HostIx, domain: u16, batch: Batch) {
        let Some(addr) = self.addrs.get(usize::from(target.0)).copied().filter(|_| target != group.me) else {
            tracing::warn!(
                "a peer asks to forward to target host {}, which is not another of the group",
                target.0
            );
            return;
        };
        let sender = {
            let mut senders = lock(&self.senders);
            senders
                .entry((target, domain))
                .or_insert_with(|| {
                    let (tx, rx) = sync_channel(QUEUE);
                    let hello =
                        Hello::new(&group.name, group.token, Purpose::Peer { target: group.me, domain });
                    let (timeouts, tags) = (group.timeouts, group.tags.clone());
                    let name = format!("irlm-peer-{}", target.0);
                    let run = move || Link { addr, hello, timeouts, tags, conn: None, retry: None }.run(&rx);
                    if let Err(e) = std::thread::Builder::new().name(name).spawn(run) {
                        tracing::error!("no thread for target host {}: {e}", target.0);
                    }
                    tx
                })
                .clone()
        };
        // Fails only if the thread could not be made: then waiting VMs ask their own sources.
        let _ = sender.send(batch);
    }

    /// Lets the sender threads end when their queues are empty.
    pub fn close(&self) {
        lock(&self.senders).clear();
    }
}

struct Link {
    addr: SocketAddr,
    hello: Hello,
    timeouts: Timeouts,
    tags: Arc<dyn FlowTags>,
    conn: Option<(TcpStream, Tagged)>,
    retry: Option<Instant>,
}

impl Link {
    fn run(mut self, batches: &Receiver<Batch>) {
        let mut meta = Vec::new();
        for batch in batches {
            if self.conn.is_none() && self.retry.is_none_or(|at| Instant::now() >= at) {
                match self.connect() {
                    Ok(c) => self.conn = Some(c),
                    Err(e) => {
                        tracing::warn!("forwarding: {e}");
                        self.retry = Some(Instant::now() + AGAIN);
                    }
                }
            }
            let Some((conn, _)) = &self.conn else { continue };
            meta.clear();
            encode_entries(batch.entries.iter(), &mut meta);
            let started = Instant::now();
            let go_on = || started.elapsed() < self.timeouts.peer;
            if let Err(e) = send_while(conn, batch.kind, &meta, &[IoSlice::new(&batch.bytes)], go_on) {
                tracing::warn!("forwarding to {}: {e}", self.addr);
                self.conn = None;
                self.retry = Some(Instant::now() + AGAIN);
            }
        }
    }

    fn connect(&self) -> Result<(TcpStream, Tagged), String> {
        let conn = dial(self.addr, &self.hello, self.timeouts.peer).map_err(|e| e.to_string())?;
        let tag = Tagged::new(&self.tags, &conn, Traffic::Peer);
        crate::host::sockopt::set_notsent_lowat(&conn, NOTSENT_LOWAT).map_err(|e| e.to_string())?;
        wait_hello_ok(&conn, &mut FrameBuf::new(), self.timeouts.peer).map_err(|e| e.to_string())?;
        Ok((conn, tag))
    }
}
