//! Push and peer connections: contents come in, are hashed, go to the store, wake who waits, and are forwarded.
//!
//! Forwarding never blocks the reading (`peers`), so a push connection is paced by the link alone.

use super::TargetGroup;
use crate::core::arrival::VoidAction;
use crate::core::digest::Digest;
use crate::core::units::HostIx;
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::messages::{ContentEntry, decode_entries};
use crate::core::wire::paging::decode_digests;
use crate::flow::squeeze::{Body, Landing};
use crate::flow::work::{Laps, Stage};
use crate::flow::{Lowat, lock, now};
use crate::net::conn::{Frame, FrameBuf, NetError, peer_name};
use crate::net::connection::Connection;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Idle time after which a push or peer connection is closed; it is opened anew when needed.
const IDLE: Duration = Duration::from_secs(600);

/// Whose connection brings contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::flow) enum From {
    /// A source host, which pushes what was planned.
    Push(HostIx),
    /// Another target host, which may also be asked for contents and ask for them.
    Peer(HostIx),
    /// Several target hosts, by multicast.
    Cast,
}

/// Serves one push or peer connection until its end.
pub(in crate::flow) fn serve(
    group: &Arc<TargetGroup>,
    stream: &Connection,
    mut frames: FrameBuf,
    from: From,
    domain: u16,
    landing: Landing,
) {
    let mut taker = Taker::new(from, domain, landing);
    let mut lowat = Lowat::default();
    loop {
        let result = match frames.wait_asking(stream, IDLE, |lacks| lowat.wants(stream, lacks)) {
            Ok(frame) => taker.take(group, &frame).map(drop),
            Err(NetError::Closed { .. }) => return,
            Err(e) => {
                tracing::warn!("contents: {e}");
                return;
            }
        };
        if let Err(source) = result {
            tracing::warn!("{}", NetError::Wire { peer: peer_name(stream), source });
            return;
        }
    }
}

/// Takes what one sender brings, in the order in which it was sent.
pub(super) struct Taker {
    from: From,
    /// Of the next frame.
    pub(super) domain: u16,
    landing: Landing,
    laps: Laps,
}

impl Taker {
    /// For the calling thread.
    pub(super) fn new(from: From, domain: u16, landing: Landing) -> Self {
        Self { from, domain, landing, laps: Laps::begin() }
    }

    /// Takes one `Contents`, `Voids` or `Heartbeat` frame. Returns how many contents it brought.
    pub(super) fn take(&mut self, group: &Arc<TargetGroup>, frame: &Frame<'_>) -> Result<usize, WireError> {
        match frame.kind {
            Kind::Heartbeat => Ok(0),
            Kind::Contents => self.contents(group, frame),
            Kind::Voids => {
                for e in decode_entries(Kind::Voids, frame.meta)? {
                    void(group, &e, self.domain);
                }
                Ok(0)
            }
            Kind::Hurry | Kind::NotHere => {
                let From::Peer(peer) = self.from else { return Err(WireError::Unexpected(frame.kind)) };
                let digests = decode_digests(frame.kind, frame.meta)?;
                if frame.kind == Kind::Hurry {
                    hurry(group, peer, self.domain, digests);
                } else {
                    group.not_here(peer, &digests);
                }
                Ok(0)
            }
            kind => Err(WireError::Unexpected(kind)),
        }
    }

    fn contents(&mut self, group: &Arc<TargetGroup>, frame: &Frame<'_>) -> Result<usize, WireError> {
        let Self { from, domain, landing, laps } = self;
        let (from, domain, work) = (*from, *domain, &group.counts.work);
        let entries = decode_entries(Kind::Contents, frame.meta)?;
        let pages = landing.contents(frame, entries.len(), work, laps)?;
        let hasher = group.hashers.get(usize::from(domain));
        let hasher = hasher.ok_or(WireError::Bad { kind: Kind::Contents, what: "trust domain" })?;
        // Hashed before the lock is taken; what does not hash to its digest never enters the store.
        laps.lap(work, Stage::Other);
        let mut good = Vec::with_capacity(entries.len());
        hasher.pages(pages, |d| good.push(entries.get(good.len()).is_some_and(|e| e.digest == d)));
        laps.lap(work, Stage::Hash);
        group.counts.last_content.store(now().0, Ordering::Relaxed);
        let mut wakes = Vec::new();
        let mut owed: Vec<(usize, Vec<HostIx>)> = Vec::new();
        let mut bind_error = None;
        {
            let mut host = lock(&group.host);
            for (i, (e, p)) in entries.iter().zip(pages).enumerate() {
                if let (From::Push(src), Some(id)) = (from, e.id)
                    && let Err(e) = host.bind(src, id, e.digest, &mut wakes)
                {
                    bind_error = Some(e);
                }
                if good[i] {
                    let hosts = host.content(!matches!(from, From::Push(_)), e.digest, p, &mut wakes);
                    if !hosts.is_empty() {
                        owed.push((i, hosts));
                    }
                }
            }
        }
        group.wake(&wakes);
        let bad = good.iter().filter(|g| !**g).count() as u64;
        if bad > 0 {
            group.counts.refused.fetch_add(bad, Ordering::Relaxed);
            tracing::warn!("{bad} contents did not hash to their digests and were refused");
        }
        if let Some(e) = bind_error {
            tracing::warn!("{e}");
        }
        let mut onward: BTreeMap<HostIx, Vec<usize>> = BTreeMap::new();
        for (i, e) in entries.iter().enumerate().filter(|(i, e)| good[*i] && !e.forward.is_empty()) {
            group.counts.to_forward.fetch_add(1, Ordering::Relaxed);
            if group.cast.get().is_some_and(|c| c.offer(domain, e.digest, &e.forward)) {
                group.counts.forwarded.fetch_add(e.forward.len() as u64, Ordering::Relaxed);
                continue;
            }
            for t in &e.forward {
                onward.entry(*t).or_default().push(i);
            }
        }
        for (i, hosts) in owed {
            for t in hosts {
                let list = onward.entry(t).or_default();
                if !list.contains(&i) {
                    list.push(i);
                }
            }
        }
        let mut as_it_came = None;
        for (target, list) in onward {
            group.counts.forwarded.fetch_add(list.len() as u64, Ordering::Relaxed);
            // A frame that can be unpacked by itself, and that all of is for this host, need not be packed again.
            if list.len() == entries.len() {
                let packed = as_it_came.get_or_insert_with(|| {
                    let body = Body::of(frame, entries.len())?;
                    group.peers.hold(entries.iter().map(|e| e.digest).collect(), body)
                });
                if let Some(packed) = packed {
                    group.peers.packed(group, target, domain, packed.clone());
                    continue;
                }
            }
            group.peers.contents(group, target, domain, list.iter().map(|i| entries[*i].digest));
        }
        Ok(entries.len())
    }
}

/// A vCPU at `peer` waits for these contents: those that are here go before all others, and it hears of the rest.
fn hurry(group: &Arc<TargetGroup>, peer: HostIx, domain: u16, digests: Vec<Digest>) {
    let (here, not): (Vec<_>, Vec<_>) = {
        let host = lock(&group.host);
        digests.into_iter().partition(|d| host.store.get(d).is_some())
    };
    if !here.is_empty() {
        group.counts.forwarded.fetch_add(here.len() as u64, Ordering::Relaxed);
        group.peers.hurried(group, peer, domain, here.into_iter());
    }
    if !not.is_empty() {
        group.peers.not_here(group, peer, domain, not.into_iter());
    }
}

/// A carrier cannot carry: `entry.forward` are the target hosts after this one.
fn void(group: &Arc<TargetGroup>, entry: &ContentEntry, domain: u16) {
    let mut wakes = Vec::new();
    let action = lock(&group.host).void(entry.digest, &entry.forward, &mut wakes);
    group.wake(&wakes);
    match action {
        VoidAction::Forward => {
            for t in &entry.forward {
                group.peers.contents(group, *t, domain, std::iter::once(entry.digest));
            }
        }
        VoidAction::Asking => {}
        VoidAction::PassOn => pass_on(group, entry.digest, &entry.forward, domain),
    }
}

/// The next target host in the list takes the void up, with those after it.
pub(super) fn pass_on(group: &Arc<TargetGroup>, digest: Digest, rest: &[HostIx], domain: u16) {
    if let Some((next, rest)) = rest.split_first() {
        group.peers.void(group, *next, domain, ContentEntry { id: None, digest, forward: rest.to_vec() });
    }
}

/// A content that this host owes to others, because its carrier voided it, is here now.
pub(super) fn serve_owed(group: &Arc<TargetGroup>, domain: u16, digest: Digest, hosts: &[HostIx]) {
    group.counts.forwarded.fetch_add(hosts.len() as u64, Ordering::Relaxed);
    for t in hosts {
        group.peers.contents(group, *t, domain, std::iter::once(digest));
    }
}
