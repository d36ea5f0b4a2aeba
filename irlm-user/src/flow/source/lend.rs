//! Models: contents that one source host has and pages of others resemble (`core::models`). This host says what its pages
//! that nobody else has look like; the index chooses; who holds a model sends it to the source hosts that resemble it, inside
//! their rack, so that they can send differences from it, and carries it over the core link like any planned content.
//!
//! All this is over, or given up, before the group starts. Whatever fails costs bandwidth only: a content that did not come
//! is not referred to, and one that changed since is found out by its digest at both ends.
//!
//! Memory: 52 bytes a sketch until it is reported; what is borrowed is bounded by [`super::similar::Similar::room`].

use super::prepare::{PreparedVm, pace};
use super::{SourceGroup, SourceSpec};
use crate::core::digest::Digest;
use crate::core::models::{Lend, SketchItem};
use crate::core::sketch::Sketch;
use crate::core::squeeze::{Mode, Squeezer};
use crate::core::units::{HostIx, PAGE_SIZE, PageBytes};
use crate::core::wire::frame::{CODEC_RAW, Header, Kind, WireError};
use crate::core::wire::messages::{ContentEntry, Purpose, decode_entries, encode_entries};
use crate::flow::squeeze::Landing;
use crate::flow::work::Laps;
use crate::flow::{Lowat, MoveError, Tagged, Traffic, lock};
use crate::net::conn::{FrameBuf, NetError, frame_len, peer_name, send_frame_while};
use crate::net::connection::Connection;
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::collections::{BTreeMap, HashMap};
use std::io::IoSlice;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

// What it comes to.
mod counts;

pub use counts::Lending;

/// Contents in one frame.
const BATCH: usize = 128;
/// Sketches that one host reports. Of more pages a part is compared: those whose sketches begin alike, so that pages which
/// resemble each other are all left out, or all in.
pub const MAX_SKETCHES: usize = 1 << 20;
/// zstd's level: a rack's own links are faster than any that pays.
const LEVEL: i32 = 1;
/// A lender that says nothing for so long has nothing more.
const IDLE: Duration = Duration::from_secs(60);

/// What this host's pages look like that nobody else has, by trust domain, in guest order. Reads them again, at `rate` bytes a
/// second at most, as long as `go_on`.
pub fn sketches(
    group: &SourceGroup,
    vms: &[(&SourceSpec, &PreparedVm)],
    rate: u64,
    go_on: &dyn Fn() -> bool,
) -> BTreeMap<u16, Vec<SketchItem>> {
    let lone: Vec<Vec<(usize, u32, Digest)>> = vms
        .iter()
        .map(|(spec, vm)| {
            let Some(table) = group.tables.get(usize::from(spec.target.0)) else { return Vec::new() };
            let table = lock(table);
            vm.digests().filter(|(_, _, d)| table.is_lone(d)).collect()
        })
        .collect();
    let one_in = lone.iter().map(Vec::len).sum::<usize>().div_ceil(MAX_SKETCHES).max(1);
    let mut out: BTreeMap<u16, Vec<SketchItem>> = BTreeMap::new();
    let mut page = [0; PAGE_SIZE];
    let (started, mut read) = (Instant::now(), 0);
    for ((spec, vm), pages) in vms.iter().zip(lone) {
        let Some(ram) = &vm.ram else { continue };
        let items = out.entry(spec.domain).or_default();
        for (block, number, digest) in pages {
            if !go_on() {
                return out;
            }
            // A page that was written since looks like something else now; whoever lends it will notice.
            if ram.read_at(block, number, &mut page).is_err() {
                continue;
            }
            read += PAGE_SIZE as u64;
            pace(started, read, rate);
            let sketch = Sketch::of(&page);
            if !sketch.is_empty() && is_in(&sketch, one_in) {
                items.push(SketchItem { digest, target: spec.target, sketch });
            }
        }
    }
    out
}

/// Whether a page takes part of which one in so many does.
fn is_in(sketch: &Sketch, one_in: usize) -> bool {
    let first = sketch.features().into_iter().find(|f| *f != 0).unwrap_or_default();
    // The lowest bit says only that there is a number.
    ((first >> 1) as usize).is_multiple_of(one_in)
}

/// Sends what this host lends to whom it resembles, and keeps a copy for its own VMs.
pub fn lend(
    group: &SourceGroup,
    vms: &[(&SourceSpec, &PreparedVm)],
    lends: &[Lend],
    go_on: &dyn Fn() -> bool,
) {
    let wanted: HashMap<&Digest, &Lend> = lends.iter().map(|l| (&l.carry.digest, l)).collect();
    let mut loans: Vec<Loan<'_>> = Vec::with_capacity(lends.len());
    for (n, (spec, vm)) in vms.iter().enumerate() {
        for (block, page, digest) in vm.digests() {
            if let Some(lend) = wanted.get(&digest) {
                loans.push(Loan { lend, domain: spec.domain, vm: n, block, page });
            }
        }
    }
    // What the same hosts get together; then in guest order, in which neighbours are compressed together.
    loans.sort_by_key(|l| (l.domain, &l.lend.to, l.vm, l.block, l.page));
    let mut lines = Lines { group, open: BTreeMap::new() };
    let mut squeezer = if group.options.compress == Mode::Off { None } else { Squeezer::new(0) };
    let mut rest = &loans[..];
    while let Some(first) = rest.first().filter(|_| go_on()) {
        let together = |l: &&Loan<'_>| l.domain == first.domain && l.lend.to == first.lend.to;
        let (batch, then) = rest.split_at(rest.iter().take(BATCH).take_while(together).count());
        rest = then;
        send(group, vms, batch, &mut lines, squeezer.as_mut(), go_on);
    }
    lines.close();
}

/// A model, and where it was seen.
struct Loan<'a> {
    lend: &'a Lend,
    domain: u16,
    vm: usize,
    block: usize,
    page: u32,
}

/// Reads models and sends them, all of one trust domain, to the same hosts.
fn send(
    group: &SourceGroup,
    vms: &[(&SourceSpec, &PreparedVm)],
    batch: &[Loan<'_>],
    lines: &mut Lines<'_>,
    squeezer: Option<&mut Squeezer>,
    go_on: &dyn Fn() -> bool,
) {
    let Some((first, hasher)) =
        batch.first().and_then(|f| Some((f, group.hashers.get(usize::from(f.domain))?)))
    else {
        return;
    };
    let (mut contents, mut voids) = (Vec::new(), Vec::new());
    let mut pages: Vec<PageBytes> = Vec::with_capacity(batch.len());
    for l in batch {
        let (carry, mut page) = (&l.lend.carry, [0; PAGE_SIZE]);
        let ram = vms.get(l.vm).and_then(|(_, vm)| vm.ram.as_ref());
        let read = ram.is_some_and(|ram| ram.read_at(l.block, l.page, &mut page).is_ok());
        let forward = std::iter::once(carry.first).chain(carry.forward.iter()).collect();
        let entry = ContentEntry { id: None, digest: carry.digest, forward };
        if read && hasher.page(&page) == carry.digest {
            group.similar.model(l.domain, carry.digest, &entry.forward, &page);
            contents.push(entry);
            pages.push(page);
        } else {
            voids.push(entry);
        }
    }
    group.lending.lent.fetch_add(contents.len() as u64, Ordering::Relaxed);
    let refs: Vec<&PageBytes> = pages.iter().collect();
    let mut body: Vec<&[u8]> = Vec::with_capacity(refs.len() + 2);
    let squeezed = squeezer.and_then(|s| s.squeeze(&refs, LEVEL, &mut body));
    if squeezed.is_none() {
        body.extend(refs.iter().map(|p| &p[..]));
    }
    let body: Vec<IoSlice<'_>> = body.into_iter().map(IoSlice::new).collect();
    let codec = squeezed.map_or(CODEC_RAW, |s| s.codec);
    for (kind, entries) in [(Kind::Contents, &contents), (Kind::Voids, &voids)] {
        if entries.is_empty() {
            continue;
        }
        let mut meta = Vec::new();
        encode_entries(entries.iter(), &mut meta);
        let (body, codec) = if kind == Kind::Contents { (&body[..], codec) } else { (&[][..], CODEC_RAW) };
        let len = body.iter().map(|b| b.len()).sum();
        let header = Header::new(kind, meta.len(), len).coded(codec);
        for host in first.lend.to.iter() {
            lines.send(host, first.domain, header, &meta, body, go_on);
        }
    }
}

/// The connections to those that borrow.
struct Lines<'a> {
    group: &'a SourceGroup,
    /// None: it could not be made, or was lost.
    open: BTreeMap<(HostIx, u16), Option<(Connection, Tagged)>>,
}

impl Lines<'_> {
    fn send(
        &mut self,
        host: HostIx,
        domain: u16,
        header: Header,
        meta: &[u8],
        body: &[IoSlice<'_>],
        go_on: &dyn Fn() -> bool,
    ) {
        let group = self.group;
        let line = self.open.entry((host, domain)).or_insert_with(|| match connect(group, host, domain) {
            Ok(line) => Some(line),
            Err(e) => {
                tracing::warn!("group {}: nothing is lent to source host {}: {e}", group.name, host.0);
                None
            }
        });
        let Some((conn, _)) = line else { return };
        let began = Instant::now();
        let patient = || began.elapsed() < group.timeouts.peer && go_on();
        match send_frame_while(conn, header, meta, body, patient) {
            Ok(()) => {
                let bytes = frame_len(conn, meta.len(), body.iter().map(|b| b.len()).sum());
                group.lending.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            Err(e) => {
                tracing::warn!(
                    "group {}: no more is lent to source host {} ({}): {e}",
                    group.name,
                    host.0,
                    peer_name(conn)
                );
                *line = None;
            }
        }
    }

    /// Each peer reads to the end and closes; waiting for that keeps the last bytes from being cut off.
    fn close(self) {
        for (conn, _tag) in self.open.into_values().flatten() {
            let _ = conn.shutdown(std::net::Shutdown::Write);
            let _ = FrameBuf::new().wait(&conn, self.group.timeouts.peer);
        }
    }
}

fn connect(group: &SourceGroup, host: HostIx, domain: u16) -> Result<(Connection, Tagged), MoveError> {
    let addr = group.lending.sources.get(usize::from(host.0)).copied().flatten();
    let addr =
        addr.ok_or_else(|| MoveError::refused("its data address is not known: give `data` in [[source]]"))?;
    let hello = Greeting::new(&group.name, group.token, Purpose::Lend { source: group.me, domain });
    let tag = |ends| Tagged::of(&group.tags, ends, Traffic::Forward);
    let (conn, tag) = dial(addr, &hello, group.timeouts.peer, &group.options.security, tag)?;
    wait_hello_ok(&conn, group.timeouts.peer)?;
    Ok((conn, tag))
}

/// Takes what source host `from` lends, until it has no more.
pub(in crate::flow) fn serve(
    group: &SourceGroup,
    stream: &Connection,
    mut frames: FrameBuf,
    from: HostIx,
    domain: u16,
) {
    let (mut landing, mut lowat, mut laps) = (Landing::default(), Lowat::default(), Laps::begin());
    loop {
        let end = match frames.wait_asking(stream, IDLE, |lacks| lowat.wants(stream, lacks)) {
            Ok(frame) => {
                let taken = match frame.kind {
                    Kind::Heartbeat => Ok(0),
                    Kind::Contents => decode_entries(frame.kind, frame.meta).and_then(|entries| {
                        let contents = landing.contents(&frame, entries.len(), &group.work, &mut laps)?;
                        take(group, domain, &entries, contents)
                    }),
                    Kind::Voids => decode_entries(frame.kind, frame.meta).map(|e| e.len()),
                    kind => Err(WireError::Unexpected(kind)),
                };
                match taken {
                    Ok(n) => {
                        group.lending.came.fetch_add(n as u64, Ordering::Relaxed);
                        continue;
                    }
                    Err(source) => NetError::Wire { peer: peer_name(stream), source },
                }
            }
            Err(NetError::Closed { .. }) => return,
            Err(e) => e,
        };
        tracing::warn!("group {}: source host {} lends no more: {end}", group.name, from.0);
        return;
    }
}

/// Keeps contents that are what they claim to be.
fn take(
    group: &SourceGroup,
    domain: u16,
    entries: &[ContentEntry],
    contents: &[PageBytes],
) -> Result<usize, WireError> {
    let hasher = group.hashers.get(usize::from(domain));
    let hasher = hasher.ok_or(WireError::Bad { kind: Kind::Contents, what: "trust domain" })?;
    let mut claims = entries.iter().zip(contents);
    let mut kept = 0;
    hasher.pages(contents, |d| {
        if let Some((e, page)) = claims.next()
            && e.digest == d
            && group.similar.model(domain, d, &e.forward, page)
        {
            kept += 1;
        }
    });
    group.lending.borrowed.fetch_add(kept, Ordering::Relaxed);
    Ok(entries.len())
}

/// Waits until so many contents have come, or will not, as long as `go_on`. Whether they have.
pub fn wait_borrowed(group: &SourceGroup, borrows: u32, go_on: &dyn Fn() -> bool) -> bool {
    while group.lending.came.load(Ordering::Relaxed) < u64::from(borrows) {
        if !go_on() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[cfg(test)]
mod tests;
