//! The meta parts of every frame but `Pages`: small, typed, checked on decode, so that a decoded value is a valid one.

use super::frame::{Kind, MetaReader, WireError, put_string, put_varint};
use super::keys;
use super::limits::{
    MAX_BLOCK_NAME, MAX_BLOCKS, MAX_FORWARD, MAX_FRAME_PAGES, MAX_GROUP_NAME, MAX_NEEDS, MAX_REASON,
    MAX_UNKEPT, MAX_VERSIONS, MIN_WINDOW_LOG, WINDOW_LOG,
};
use crate::account::Tally;
use crate::digest::{DIGEST_LEN, Digest};
use crate::handover::GuestState;
use crate::ram::{Block, MAX_TOLD, Ram, STRIPES, Sums};
use crate::units::{BlockIx, HostIx, PageAddr, PageId, VmIx};

/// Wire versions this build speaks, newest first. Versions before are not spoken any more. By the words of version 1 two agents
/// could not keep rule 1. An agent of version 2 neither seals frames nor accounts for pages, so that a flipped bit would run.
pub const VERSIONS: &[u16] = &[3];
const MAGIC: &[u8; 4] = b"IRLM";

/// Bytes drawn at random for each Hello and each HelloOk, so that no two connections are sealed alike ([`keys::seals`]).
pub const NONCE_LEN: usize = 16;

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// One VM's stream, from source host `source`.
    Vm {
        /// The source host.
        source: HostIx,
        /// The VM.
        vm: VmIx,
    },
    /// Planned contents of source host `source`, all of one trust domain.
    Push {
        /// The source host.
        source: HostIx,
        /// The trust domain's number in the group, whose key the contents are hashed with.
        domain: u16,
    },
    /// Contents forwarded by target host `target`, all of one trust domain.
    Peer {
        /// The target host that forwards.
        target: HostIx,
        /// The trust domain's number in the group.
        domain: u16,
    },
    /// Settles the handover of a VM whose connection was lost.
    Settle {
        /// The source host.
        source: HostIx,
        /// The VM.
        vm: VmIx,
    },
    /// Pages that a VM which already runs at its target waits for, beside its VM connection.
    Demand {
        /// The source host.
        source: HostIx,
        /// The VM.
        vm: VmIx,
    },
    /// As `Vm`, of a VM whose QEMUs stream to each other: no pages come on it.
    Direct {
        /// The source host.
        source: HostIx,
        /// The VM.
        vm: VmIx,
    },
    /// Measures the link from a source host, before the group begins: Verbatim frames of no meaning, each answered by a
    /// Heartbeat.
    Probe {
        /// The source host.
        source: HostIx,
    },
    /// Between source hosts: contents that source host `source` lends, all of one trust domain, for pages that resemble them
    /// (`core::models`).
    Lend {
        /// The source host that lends.
        source: HostIx,
        /// The trust domain's number in the group.
        domain: u16,
    },
    /// After HelloOk this connection is the two QEMUs', beside a `Direct` one.
    Stream {
        /// The source host.
        source: HostIx,
        /// The VM.
        vm: VmIx,
    },
}

impl Purpose {
    /// Whether frames are sealed where there is no TLS: not where two QEMUs talk, which know nothing of seals, and not where
    /// frames mean nothing and only their speed counts.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        !matches!(self, Self::Stream { .. } | Self::Probe { .. })
    }
}

/// First frame of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Versions on offer, in order of preference.
    pub versions: Vec<u16>,
    /// Group name.
    pub group: String,
    /// What only the group's agents know ([`keys::pass`]).
    pub pass: [u8; 32],
    /// What the connection is for.
    pub purpose: Purpose,
}

impl Hello {
    /// A hello that offers all of [`VERSIONS`], of somebody who knows the group's secret.
    #[must_use]
    pub fn new(group: &str, secret: &[u8; 32], purpose: Purpose) -> Self {
        Self { versions: VERSIONS.to_vec(), group: group.to_owned(), pass: keys::pass(secret), purpose }
    }
    /// Its meta part, with a number drawn for it.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; NONCE_LEN]) -> Vec<u8> {
        let mut m = MAGIC.to_vec();
        put_varint(&mut m, self.versions.len() as u32);
        for v in &self.versions {
            m.extend_from_slice(&v.to_le_bytes());
        }
        put_string(&mut m, &self.group);
        m.extend_from_slice(&self.pass);
        m.extend_from_slice(nonce);
        let (tag, host, vm) = match self.purpose {
            Purpose::Vm { source, vm } => (1u8, source, vm),
            Purpose::Push { source, domain } => (2, source, VmIx(domain)),
            Purpose::Peer { target, domain } => (3, target, VmIx(domain)),
            Purpose::Settle { source, vm } => (4, source, vm),
            Purpose::Demand { source, vm } => (5, source, vm),
            Purpose::Direct { source, vm } => (6, source, vm),
            Purpose::Stream { source, vm } => (7, source, vm),
            Purpose::Probe { source } => (8, source, VmIx(0)),
            Purpose::Lend { source, domain } => (9, source, VmIx(domain)),
        };
        m.push(tag);
        m.extend_from_slice(&host.0.to_le_bytes());
        m.extend_from_slice(&vm.0.to_le_bytes());
        m
    }
    /// Reads a meta part.
    pub fn decode(meta: &[u8]) -> Result<Self, WireError> {
        let mut r = MetaReader::new(Kind::Hello, meta);
        if &r.array::<4>()? != MAGIC {
            return Err(r.bad("magic"));
        }
        let n = r.count("versions", MAX_VERSIONS)?;
        let versions = (0..n).map(|_| r.u16()).collect::<Result<_, _>>()?;
        let group = r.string("group name", MAX_GROUP_NAME)?.to_owned();
        let pass = r.array()?;
        // It counts as a part of the whole.
        r.array::<NONCE_LEN>()?;
        let tag = r.u8()?;
        let (host, vm) = (HostIx(r.u16()?), VmIx(r.u16()?));
        let purpose = match tag {
            1 => Purpose::Vm { source: host, vm },
            2 => Purpose::Push { source: host, domain: vm.0 },
            3 => Purpose::Peer { target: host, domain: vm.0 },
            4 => Purpose::Settle { source: host, vm },
            5 => Purpose::Demand { source: host, vm },
            6 => Purpose::Direct { source: host, vm },
            7 => Purpose::Stream { source: host, vm },
            8 if vm.0 == 0 => Purpose::Probe { source: host },
            9 => Purpose::Lend { source: host, domain: vm.0 },
            _ => return Err(r.bad("purpose")),
        };
        r.end()?;
        Ok(Self { versions, group, pass, purpose })
    }
    /// The newest common version.
    pub fn choose(&self) -> Result<u16, WireError> {
        VERSIONS
            .iter()
            .copied()
            .find(|v| self.versions.contains(v))
            .ok_or_else(|| WireError::NoVersion { offered: self.versions.clone(), spoken: VERSIONS.to_vec() })
    }
}

/// What the taker of a connection grants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HelloOk {
    /// The version chosen.
    pub version: u16,
    /// The taker unpacks a zstd stream with a window of two to this power; 0: none, only frames compressed one by one.
    pub window_log: u8,
    /// On a VM connection: contents that the taker keeps for this source host and trust domain, for pages that refer to
    /// them; 0: none.
    pub slots: u32,
}

impl HelloOk {
    /// Its meta part, with a number drawn for it.
    #[must_use]
    pub fn encode(self, nonce: &[u8; NONCE_LEN]) -> Vec<u8> {
        let mut m = self.version.to_le_bytes().to_vec();
        m.push(self.window_log);
        m.extend_from_slice(&self.slots.to_le_bytes());
        m.extend_from_slice(nonce);
        m
    }
    /// Reads a meta part: the version must be one of ours, and the window one that this side may use.
    pub fn decode(meta: &[u8]) -> Result<Self, WireError> {
        let mut r = MetaReader::new(Kind::HelloOk, meta);
        let (version, window_log, slots) = (r.u16()?, r.u8()?, r.u32()?);
        r.array::<NONCE_LEN>()?;
        r.end()?;
        if !VERSIONS.contains(&version) {
            return Err(r.bad("version"));
        }
        if window_log != 0 && !(MIN_WINDOW_LOG..=WINDOW_LOG).contains(&window_log) {
            return Err(r.bad("window"));
        }
        Ok(Self { version, window_log, slots })
    }
}

/// The block list as it travels: what the target's emitter needs to write RAM sections of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// QEMU's section id of `ram` in this stream.
    pub section_id: u32,
    /// Whether sections end with a footer.
    pub footers: bool,
    /// Name and used bytes of each block, in stream order.
    pub blocks: Vec<(String, u64)>,
}

impl Blocks {
    /// Its meta part.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut m = self.section_id.to_le_bytes().to_vec();
        m.push(u8::from(self.footers));
        put_varint(&mut m, self.blocks.len() as u32);
        for (name, used) in &self.blocks {
            put_string(&mut m, name);
            m.extend_from_slice(&used.to_le_bytes());
        }
        m
    }
    /// Reads a meta part.
    pub fn decode(meta: &[u8]) -> Result<Self, WireError> {
        let mut r = MetaReader::new(Kind::Blocks, meta);
        let section_id = r.u32()?;
        let footers = match r.u8()? {
            0 => false,
            1 => true,
            _ => return Err(r.bad("footer flag")),
        };
        let n = r.count("blocks", MAX_BLOCKS)?;
        let mut blocks = Vec::new();
        for _ in 0..n {
            let name = r.string("block name", MAX_BLOCK_NAME)?.to_owned();
            blocks.push((name, r.u64()?));
        }
        r.end()?;
        Ok(Self { section_id, footers, blocks })
    }
}

fn put_hosts(m: &mut Vec<u8>, hosts: &[HostIx]) {
    put_varint(m, hosts.len() as u32);
    for h in hosts {
        put_varint(m, h.0.into());
    }
}

fn read_hosts(r: &mut MetaReader<'_>) -> Result<Vec<HostIx>, WireError> {
    let n = r.count("forward list", MAX_FORWARD)?;
    (0..n).map(|_| u16::try_from(r.varint()?).map(HostIx).map_err(|_| r.bad("host number"))).collect()
}

/// Announces one content of a `Contents` frame (its 4096 bytes stand in the body, in order), or, in a `Voids` frame,
/// one that will not come from its carrier.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContentEntry {
    /// The name the sending source host uses for it towards this target host; none when a target host forwards.
    pub id: Option<PageId>,
    /// What the bytes must hash to.
    pub digest: Digest,
    /// Target hosts that the receiver passes it on to.
    pub forward: Vec<HostIx>,
}

/// Encodes the entries of a `Contents` or `Voids` frame.
pub fn encode_entries<'a>(entries: impl ExactSizeIterator<Item = &'a ContentEntry>, m: &mut Vec<u8>) {
    put_varint(m, entries.len() as u32);
    for e in entries {
        match e.id {
            Some(id) => {
                m.push(1);
                m.extend_from_slice(&id.bucket.to_le_bytes());
                m.extend_from_slice(&id.index.to_le_bytes());
            }
            None => m.push(0),
        }
        m.extend_from_slice(&e.digest.0);
        put_hosts(m, &e.forward);
    }
}

/// Decodes the entries of a `Contents` or `Voids` frame.
pub fn decode_entries(kind: Kind, meta: &[u8]) -> Result<Vec<ContentEntry>, WireError> {
    let mut r = MetaReader::new(kind, meta);
    let n = r.count("contents", MAX_FRAME_PAGES)?;
    let mut out = Vec::with_capacity(n);
    for _ in 0..n {
        let id = match r.u8()? {
            0 => None,
            1 => Some(PageId { bucket: r.u32()?, index: r.u32()? }),
            _ => return Err(r.bad("id flag")),
        };
        let digest = Digest(r.array::<DIGEST_LEN>()?);
        out.push(ContentEntry { id, digest, forward: read_hosts(&mut r)? });
    }
    r.end()?;
    Ok(out)
}

/// How a waiting page names the content it waits for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Want {
    /// By digest.
    Digest(Digest),
    /// By the source host's id, whose digest the target has not learnt.
    Id(PageId),
}

/// One page whose content the target asks the VM's own source for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NeedEntry {
    /// The guest page.
    pub addr: PageAddr,
    /// The content wanted.
    pub want: Want,
}

pub(super) fn put_addr(m: &mut Vec<u8>, a: PageAddr) {
    m.extend_from_slice(&a.block.0.to_le_bytes());
    m.extend_from_slice(&a.page.to_le_bytes());
}

pub(super) fn read_addr(r: &mut MetaReader<'_>) -> Result<PageAddr, WireError> {
    Ok(PageAddr { block: BlockIx(r.u16()?), page: r.u32()? })
}

/// Meta part of a `Need` or `Gone` frame.
#[must_use]
pub fn encode_needs(needs: &[NeedEntry]) -> Vec<u8> {
    let mut m = Vec::new();
    put_varint(&mut m, needs.len() as u32);
    for n in needs {
        put_addr(&mut m, n.addr);
        match n.want {
            Want::Digest(d) => {
                m.push(0);
                m.extend_from_slice(&d.0);
            }
            Want::Id(id) => {
                m.push(1);
                m.extend_from_slice(&id.bucket.to_le_bytes());
                m.extend_from_slice(&id.index.to_le_bytes());
            }
        }
    }
    m
}

/// Reads a `Need` or `Gone` frame. A `Gone` repeats what was wanted: the page may wait for something newer by now.
pub fn decode_needs(kind: Kind, meta: &[u8]) -> Result<Vec<NeedEntry>, WireError> {
    let mut r = MetaReader::new(kind, meta);
    let n = r.count("needs", MAX_NEEDS)?;
    let mut out = Vec::new();
    for _ in 0..n {
        let addr = read_addr(&mut r)?;
        let want = match r.u8()? {
            0 => Want::Digest(Digest(r.array()?)),
            1 => Want::Id(PageId { bucket: r.u32()?, index: r.u32()? }),
            _ => return Err(r.bad("want")),
        };
        out.push(NeedEntry { addr, want });
    }
    r.end()?;
    Ok(out)
}

/// Meta part of a `Waiting` or `Taken` frame.
#[must_use]
pub fn encode_number(n: u32) -> Vec<u8> {
    n.to_le_bytes().to_vec()
}

/// Reads a `Waiting` (pages) or `Taken` frame (frames; counted on beyond the greatest number from 0).
pub fn decode_number(kind: Kind, meta: &[u8]) -> Result<u32, WireError> {
    let mut r = MetaReader::new(kind, meta);
    let n = r.u32()?;
    r.end()?;
    Ok(n)
}

/// Meta part of an `Unkept` frame.
#[must_use]
pub fn encode_slots(slots: &[u32]) -> Vec<u8> {
    let mut m = Vec::new();
    put_varint(&mut m, slots.len() as u32);
    slots.iter().for_each(|slot| put_varint(&mut m, *slot));
    m
}

/// Reads an `Unkept` frame.
pub fn decode_slots(meta: &[u8]) -> Result<Vec<u32>, WireError> {
    let mut r = MetaReader::new(Kind::Unkept, meta);
    let n = r.count("slots", MAX_UNKEPT)?;
    let slots = (0..n).map(|_| r.varint()).collect::<Result<_, _>>()?;
    r.end()?;
    Ok(slots)
}

/// The words of the handover (`core::handover`), spoken on the VM connection or on a settle connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Word {
    /// T→S: the target QEMU has loaded everything; the target waits. With what the pages come to that it was given, if they
    /// were accounted for.
    Loaded(Option<Tally>),
    /// S→T: the source stays paused for good; the target may run. With what the VM's owner had made of it: only one that
    /// ran is continued. And with what the pages come to that were sent, if that is known.
    GivenUp(GuestState, Option<Tally>),
    /// T→S: the target is the running copy.
    Runs,
    /// Either: this attempt is over; the source keeps the VM. With one line of why.
    Aborted(String),
    /// T→S: the target copy has been discarded.
    Discarded,
    /// T→S, post-copy: the device state is loaded, and pages that are still to come will be waited for. With what the others
    /// come to, if none of them waits for its content.
    Ready(Option<Tally>),
    /// T→S, post-copy: every page is there; the source's copy is no longer needed.
    Filled,
    /// S→T, post-copy: the source's memory is gone; what the target lacks will never come from it.
    PagesLost,
    /// T→S: everything is loaded, but QEMU refuses to run it. It never runs here unless the source says `Gone`.
    Refused(String),
    /// S→T: the process of the source's copy has ended; the target's is the only one.
    Gone,
    /// T→S: the process of the target's copy has ended when it was not whole, or was never seen to run.
    Lost(String),
    /// T→S, before Loaded, only where the group asks for it: what the memory comes to of whoever has loaded the VM.
    Memory(Ram),
}

impl Word {
    /// Its meta part.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Loaded(made) => with_tally(vec![1], *made),
            Self::GivenUp(guest, sent) => with_tally(vec![2, guest.code()], *sent),
            Self::Runs => vec![3],
            Self::Aborted(why) => with_reason(4, why),
            Self::Discarded => vec![5],
            Self::Ready(made) => with_tally(vec![6], *made),
            Self::Filled => vec![7],
            Self::PagesLost => vec![8],
            Self::Refused(why) => with_reason(9, why),
            Self::Gone => vec![10],
            Self::Lost(why) => with_reason(11, why),
            Self::Memory(ram) => with_memory(vec![12], ram),
        }
    }
    /// Reads a meta part.
    pub fn decode(meta: &[u8]) -> Result<Self, WireError> {
        let mut r = MetaReader::new(Kind::Word, meta);
        let w = match r.u8()? {
            1 => Self::Loaded(read_tally(&mut r)?),
            2 => {
                let guest = GuestState::from_code(r.u8()?).ok_or_else(|| r.bad("run state"))?;
                Self::GivenUp(guest, read_tally(&mut r)?)
            }
            3 => Self::Runs,
            4 => Self::Aborted(read_reason(&mut r)?),
            5 => Self::Discarded,
            6 => Self::Ready(read_tally(&mut r)?),
            7 => Self::Filled,
            8 => Self::PagesLost,
            9 => Self::Refused(read_reason(&mut r)?),
            10 => Self::Gone,
            11 => Self::Lost(read_reason(&mut r)?),
            12 => Self::Memory(read_memory(&mut r)?),
            _ => return Err(r.bad("word")),
        };
        r.end()?;
        Ok(w)
    }
}

/// A word with what pages come to.
fn with_tally(mut word: Vec<u8>, tally: Option<Tally>) -> Vec<u8> {
    word.push(u8::from(tally.is_some()));
    word.extend(tally.iter().flat_map(Tally::encode));
    word
}

fn read_tally(r: &mut MetaReader<'_>) -> Result<Option<Tally>, WireError> {
    match r.u8()? {
        0 => Ok(None),
        1 => Ok(Some(Tally::decode(&r.array()?))),
        _ => Err(r.bad("tally flag")),
    }
}

/// A word with what a VM's memory comes to; of more blocks than may be told the last ones are not.
fn with_memory(mut word: Vec<u8>, ram: &Ram) -> Vec<u8> {
    let told = &ram.blocks[..ram.blocks.len().min(MAX_TOLD)];
    word.extend(ram.unread.to_le_bytes());
    word.extend(ram.took_ms.to_le_bytes());
    put_varint(&mut word, told.len() as u32);
    for b in told {
        put_string(&mut word, &b.name);
        word.extend(b.pages.to_le_bytes());
        for s in &b.sums {
            word.extend(s.marks.to_le_bytes());
            word.extend(s.placed.to_le_bytes());
        }
    }
    word
}

fn read_memory(r: &mut MetaReader<'_>) -> Result<Ram, WireError> {
    let (unread, took_ms) = (r.u64()?, r.u32()?);
    let mut blocks = Vec::new();
    for _ in 0..r.count("blocks of memory", MAX_TOLD)? {
        let name = r.string("block name", MAX_BLOCK_NAME)?.chars().map(printable).collect();
        let pages = r.u32()?;
        let mut sums = [Sums::default(); STRIPES];
        for s in &mut sums {
            *s = Sums { marks: u128::from_le_bytes(r.array()?), placed: u128::from_le_bytes(r.array()?) };
        }
        blocks.push(Block { name, pages, sums });
    }
    Ok(Ram { blocks, unread, took_ms })
}

/// A word with one line of why, as much of it as may travel.
fn with_reason(word: u8, why: &str) -> Vec<u8> {
    let mut end = why.len().min(MAX_REASON);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    let mut m = vec![word];
    put_string(&mut m, &why[..end]);
    m
}

fn read_reason(r: &mut MetaReader<'_>) -> Result<String, WireError> {
    Ok(r.string("reason", MAX_REASON)?.chars().map(printable).collect())
}

/// A peer's words end up on a terminal: control characters do not.
fn printable(c: char) -> char {
    if c.is_control() { ' ' } else { c }
}
