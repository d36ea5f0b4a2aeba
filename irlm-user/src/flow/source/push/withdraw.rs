//! What the share plan promised and this host cannot carry: the plan came when the group had left, a target host is not
//! reached, the group is cancelled here while others' VMs go on. Each target host concerned is told, as for a content
//! that changed (`Voids`), so that its VMs ask their own sources at once instead of when their patience ends.
//!
//! The first host of a content's list hears of it and tells the next ones; a host that is not reached is left out. Each
//! is tried once.

use super::super::prepare::PreparedVm;
use super::super::{SourceGroup, SourceSpec};
use crate::core::digest::Digest;
use crate::core::plan::Carry;
use crate::core::units::HostIx;
use crate::core::wire::frame::Kind;
use crate::core::wire::messages::{ContentEntry, Purpose, encode_entries};
use crate::flow::{MoveError, Tagged, Traffic};
use crate::net::conn::send_while;
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Shutdown;
use std::time::Instant;

/// Contents in one frame.
const BATCH: usize = 1024;

/// By the next host to be told: contents, and the hosts after it.
type ToTell = BTreeMap<HostIx, Vec<(Digest, Vec<HostIx>)>>;

/// Withdraws contents of VMs of any trust domain.
pub fn all(group: &SourceGroup, vms: &[(&SourceSpec, &PreparedVm)], carry: &[Carry]) {
    let mut domains: HashMap<Digest, u16> = carry.iter().map(|c| (c.digest, 0)).collect();
    for (spec, vm) in vms {
        for (_, _, digest) in vm.digests() {
            if let Some(domain) = domains.get_mut(&digest) {
                *domain = spec.domain;
            }
        }
    }
    let mut by_domain: BTreeMap<u16, Vec<&Carry>> = BTreeMap::new();
    for c in carry {
        by_domain.entry(domains[&c.digest]).or_default().push(c);
    }
    for (domain, carry) in by_domain {
        some(group, domain, &carry);
    }
}

/// Withdraws contents of one trust domain.
pub(super) fn some(group: &SourceGroup, domain: u16, carry: &[&Carry]) {
    let (mut rest, mut gone) = (ToTell::new(), BTreeSet::new());
    for c in carry {
        let hosts = std::iter::once(c.first).chain(c.forward.iter());
        queue(&mut rest, &gone, c.digest, hosts);
    }
    while let Some((host, contents)) = rest.pop_first() {
        let Err(e) = tell(group, host, domain, &contents) else { continue };
        tracing::warn!("group {}: target host {} is not told what does not come: {e}", group.name, host.0);
        gone.insert(host);
        for (digest, hosts) in contents {
            queue(&mut rest, &gone, digest, hosts.into_iter());
        }
    }
}

fn queue(rest: &mut ToTell, gone: &BTreeSet<HostIx>, digest: Digest, hosts: impl Iterator<Item = HostIx>) {
    let mut hosts = hosts.filter(|h| !gone.contains(h));
    if let Some(next) = hosts.next() {
        rest.entry(next).or_default().push((digest, hosts.collect()));
    }
}

fn tell(
    group: &SourceGroup,
    host: HostIx,
    domain: u16,
    contents: &[(Digest, Vec<HostIx>)],
) -> Result<(), MoveError> {
    let addr = group.targets.get(usize::from(host.0));
    let addr = *addr.ok_or_else(|| MoveError::refused("the group has no such target host"))?;
    let hello = Greeting::new(&group.name, group.token, Purpose::Push { source: group.me, domain });
    let patience = group.timeouts.peer;
    let tag = |ends| Tagged::of(&group.tags, ends, Traffic::Bulk);
    let (conn, _tag) = dial(addr, &hello, patience, &group.options.security, tag)?;
    let (_, mut frames) = wait_hello_ok(&conn, patience)?;
    let mut meta = Vec::new();
    for batch in contents.chunks(BATCH) {
        let entry = |(digest, hosts): &(Digest, Vec<HostIx>)| ContentEntry {
            id: None,
            digest: *digest,
            forward: hosts.clone(),
        };
        let entries: Vec<ContentEntry> = batch.iter().map(entry).collect();
        meta.clear();
        encode_entries(entries.iter(), &mut meta);
        let began = Instant::now();
        send_while(&conn, Kind::Voids, &meta, &[], || began.elapsed() < patience)?;
    }
    // The peer reads to the end and closes; waiting for that keeps the last bytes from being cut off.
    let _ = conn.shutdown(Shutdown::Write);
    let _ = frames.wait(&conn, patience);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{PushProgress, push};
    use super::*;
    use crate::core::index::TargetSet;
    use crate::core::pair::{PairTable, Verdict};
    use crate::core::plan::HostPlan;
    use crate::core::units::PageId;
    use crate::core::wire::messages::{HelloOk, VERSIONS, decode_entries};
    use crate::flow::{Timeouts, lock};
    use crate::net::conn::FrameBuf;
    use crate::net::connection::{Connection, End};
    use crate::net::greeting::send_hello_ok;
    use std::net::{SocketAddr, TcpListener};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    /// What a target host that answers hears of voids.
    fn hear(listener: &TcpListener) -> Vec<(Digest, Vec<HostIx>)> {
        let mut heard = Vec::new();
        let until = Instant::now() + Duration::from_secs(10);
        listener.set_nonblocking(true).unwrap();
        // A push that is given up says nothing; voids come on a connection of their own.
        while heard.is_empty() && Instant::now() < until {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            let stream = Connection::from(stream);
            let mut frames = FrameBuf::new();
            let hello = frames.wait(&stream, Duration::from_secs(5)).unwrap();
            assert_eq!(hello.kind, Kind::Hello);
            stream.said_hello([1; 32], hello.meta.to_vec(), End::Taker);
            send_hello_ok(&stream, HelloOk { version: VERSIONS[0], window_log: 0, slots: 0 }).unwrap();
            while let Ok(f) = frames.wait(&stream, Duration::from_secs(5)) {
                assert_eq!(f.kind, Kind::Voids, "no content is sent");
                let entries = decode_entries(f.kind, f.meta).unwrap();
                heard.extend(entries.into_iter().map(|e| (e.digest, e.forward)));
            }
        }
        heard
    }

    fn group(targets: Vec<SocketAddr>) -> SourceGroup {
        let tables = targets.iter().map(|_| Mutex::new(PairTable::new(HostIx(0), 100))).collect();
        let timeouts = Timeouts { peer: Duration::from_secs(2), ..Timeouts::default() };
        SourceGroup { targets, tables, timeouts, ..SourceGroup::bare() }
    }

    fn carry(n: u8, first: u16, then: &[u16]) -> Carry {
        let mut forward = TargetSet::default();
        then.iter().for_each(|h| assert!(forward.insert(HostIx(*h))));
        let id = PageId { bucket: 1, index: n.into() };
        Carry { digest: Digest([n; 20]), id, first: HostIx(first), forward }
    }

    /// A target host that answers, and one that does not.
    fn hosts() -> (TcpListener, Vec<SocketAddr>) {
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let addrs = vec![gone, here.local_addr().unwrap()];
        (here, addrs)
    }

    #[test]
    fn a_withdrawn_content_is_told_to_the_first_host_of_its_list_that_is_reached() {
        let (here, addrs) = hosts();
        let group = group(addrs);
        let carry = [carry(1, 0, &[1]), carry(2, 1, &[0]), carry(3, 0, &[])];
        let mut heard = std::thread::scope(|s| {
            let heard = s.spawn(|| hear(&here));
            all(&group, &[], &carry);
            heard.join().unwrap()
        });
        heard.sort();
        assert_eq!(heard[0], (Digest([1; 20]), vec![]));
        assert_eq!(heard[1].0, Digest([2; 20]));
        assert_eq!(heard.len(), 2, "{heard:?}");
    }

    #[test]
    fn a_push_that_is_cancelled_or_reaches_nobody_is_withdrawn() {
        let (here, addrs) = hosts();
        for cancelled in [true, false] {
            let group = group(addrs.clone());
            // Cancelled on the way to a host that answers; or its first host is not reached.
            let plan = HostPlan { carry: vec![carry(1, u16::from(cancelled), &[1])], remote: Vec::new() };
            lock(&group.tables[1]).planned(Digest([1; 20]), plan.carry[0].id);
            let progress = PushProgress { cancel: AtomicBool::new(cancelled), ..PushProgress::default() };
            let heard = std::thread::scope(|s| {
                let heard = s.spawn(|| hear(&here));
                push(&group, &[], (&[], &plan), &progress);
                heard.join().unwrap()
            });
            assert_eq!(heard.iter().map(|(d, _)| *d).collect::<Vec<_>>(), [Digest([1; 20])]);
            assert_eq!(progress.failed.load(Ordering::Relaxed), 1);
            let next = lock(&group.tables[1]).leave(&Digest([1; 20]));
            assert!(matches!(next, Verdict::Shared(_)), "this host's own VMs send it: {next:?}");
        }
    }
}
