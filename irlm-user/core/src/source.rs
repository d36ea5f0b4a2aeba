//! The source side of dedup, without sockets: decides for each page that leaves a VM how it travels, and answers the
//! target's needs. Mirror of `core::arrival`.

use super::delta::less;
use super::digest::{Digest, Hasher, uniform};
use super::pair::{PairTable, Verdict};
use super::sketch::{Lane, References, Sketch};
use super::units::{BlockIx, Nanos, PageAddr, PageBytes, PageId};
use super::wire::messages::Want;
use super::wire::pages::{Form, PagesBuilder};

/// A page on its way out, before the host's table has been asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leaving {
    /// All bytes alike.
    Uniform(u8),
    /// Content that takes no part in dedup: its block cannot be read from outside (so a need for it could not be
    /// answered), or preparation saw it nowhere else.
    Plain,
    /// Content with this digest.
    Hashed(Digest),
}

/// A page on its way out: how it leaves, once that is known, and its content, if it has any that may be needed.
pub type Outgoing<'p> = (PageAddr, Option<Leaving>, Option<&'p PageBytes>);

/// How a page travels, as the host's table has decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// All bytes alike.
    Uniform(u8),
    /// Content without a name; its digest, if the page was hashed.
    Unique(Option<Digest>),
    /// Content with a name.
    Shared(PageId, Digest),
    /// A reference.
    Ref(PageId),
    /// A remote reference.
    Remote(PageId, Digest),
}

impl Way {
    /// Whether the page's content follows in the body.
    #[must_use]
    pub fn has_content(self) -> bool {
        matches!(self, Self::Unique(_) | Self::Shared(..))
    }

    /// Puts the page into the frame, its content, if it has any, in the form given.
    pub fn put(self, addr: PageAddr, form: Form, frame: &mut PagesBuilder) {
        match (self, form) {
            (Self::Uniform(fill), _) => frame.uniform(addr, fill),
            (Self::Unique(Some(digest)), Form::Less(slot)) => frame.named(addr, &digest, slot),
            (Self::Unique(_), Form::Kept(slot)) => frame.unique(addr, Some(slot)),
            (Self::Unique(_), _) => frame.unique(addr, None),
            (Self::Shared(id, digest), form) => frame.shared(addr, id, &digest, form),
            (Self::Ref(id), _) => frame.reference(addr, id),
            (Self::Remote(id, digest), _) => frame.remote(addr, id, &digest),
        }
    }
}

/// Counters of one VM's departure, in pages unless the name says otherwise.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VmStats {
    /// Post-copy: sent because a vCPU at the target waits for them, or soon would.
    #[serde(default)]
    pub demanded: u64,
    /// Uniform pages, zero pages among them.
    pub uniform: u64,
    /// Sent as content without a name.
    pub unique: u64,
    /// Sent as content with a name.
    pub shared: u64,
    /// References.
    pub references: u64,
    /// Remote references.
    pub remote_references: u64,
    /// Needs answered with content.
    pub answered: u64,
    /// Needs answered with "gone".
    pub gone: u64,
    /// Pages hashed as they left.
    pub hashed: u64,
    /// Pages that left under a digest kept from preparation, not hashed again.
    #[serde(default)]
    pub kept: u64,
    /// Processor time of the hashing, nanoseconds.
    #[serde(default)]
    pub hash_ns: u64,
    /// How often a page was held back because it was being written to.
    #[serde(default)]
    pub held: u64,
    /// Versions of held pages that were never sent, because a newer one came.
    #[serde(default)]
    pub spared: u64,
    /// Contents sent as their difference from another one.
    #[serde(default)]
    pub differences: u64,
    /// Of them, from contents that other hosts carry.
    #[serde(default)]
    pub modelled: u64,
}

/// A growable bit per page of one block.
#[derive(Debug, Default, Clone)]
struct Bits(Vec<u64>);

impl Bits {
    fn set(&mut self, n: u32) {
        let at = n as usize / 64;
        if at >= self.0.len() {
            self.0.resize(at + 1, 0);
        }
        self.0[at] |= 1 << (n % 64);
    }
    fn has(&self, n: u32) -> bool {
        self.0.get(n as usize / 64).is_some_and(|w| w & (1 << (n % 64)) != 0)
    }
    fn take(&mut self, n: u32) -> bool {
        match self.0.get_mut(n as usize / 64) {
            Some(w) if *w & (1 << (n % 64)) != 0 => {
                *w &= !(1 << (n % 64));
                true
            }
            _ => false,
        }
    }
}

/// What is known of one block of the VM.
#[derive(Debug, Default, Clone)]
pub struct BlockInfo {
    readable: bool,
    lone: Bits,
    hot: Bits,
}

impl BlockInfo {
    /// A block whose pages can (not) be read from outside.
    #[must_use]
    pub fn new(readable: bool) -> Self {
        Self { readable, ..Self::default() }
    }
    /// Preparation found this page's content nowhere else in the group: no digest is needed when it first leaves.
    pub fn set_lone(&mut self, page: u32) {
        self.lone.set(page);
    }
    /// Sampling found that this page is written all the time.
    pub fn set_hot(&mut self, page: u32) {
        self.hot.set(page);
    }
}

/// One VM's departure.
#[derive(Debug)]
pub struct SourceVm {
    hasher: Hasher,
    blocks: Vec<BlockInfo>,
    /// Of the batch at hand.
    digests: Vec<Digest>,
    /// Counters.
    pub stats: VmStats,
}

impl SourceVm {
    /// The departure of a VM whose blocks, in stream order, are `blocks`.
    #[must_use]
    pub fn new(hasher: Hasher, blocks: Vec<BlockInfo>) -> Self {
        Self { hasher, blocks, digests: Vec::new(), stats: VmStats::default() }
    }

    /// The blocks became known.
    pub fn set_blocks(&mut self, blocks: Vec<BlockInfo>) {
        self.blocks = blocks;
    }

    /// Looks at the bytes of pages as they leave, where it is not known yet how they do. Never trusts a hash made earlier ; a hint may only save the
    /// hash of a page that is sent as content anyway.
    pub fn look(&mut self, pages: &mut [Outgoing<'_>]) {
        for (addr, leaving, bytes) in pages.iter_mut() {
            if let (None, Some(bytes)) = (&leaving, bytes) {
                *leaving = self.glance(*addr, bytes);
            }
        }
        let wait = |p: &&Outgoing<'_>| p.1.is_none();
        self.digests.clear();
        self.hasher.pages(pages.iter().filter(wait).filter_map(|p| p.2), |d| self.digests.push(d));
        self.stats.hashed += self.digests.len() as u64;
        let hashed = pages.iter_mut().filter(|p| p.1.is_none() && p.2.is_some());
        for ((_, leaving, _), digest) in hashed.zip(&self.digests) {
            *leaving = Some(Leaving::Hashed(*digest));
        }
    }

    /// How a page leaves that needs no digest.
    fn glance(&mut self, addr: PageAddr, bytes: &PageBytes) -> Option<Leaving> {
        if let Some(fill) = uniform(bytes) {
            return Some(Leaving::Uniform(fill));
        }
        match self.blocks.get_mut(usize::from(addr.block.0)) {
            Some(b) if b.readable => b.lone.take(addr.page).then_some(Leaving::Plain),
            _ => Some(Leaving::Plain),
        }
    }

    /// A page whose content is known to have `digest` without looking at it (`core::kept`).
    pub fn known(&mut self, digest: Digest) -> Leaving {
        self.stats.kept += 1;
        Leaving::Hashed(digest)
    }

    /// Asks the host's table how a page travels, and counts it.
    pub fn decide(&mut self, table: &mut PairTable, leaving: Leaving) -> Way {
        let digest = match leaving {
            Leaving::Uniform(fill) => {
                self.stats.uniform += 1;
                return Way::Uniform(fill);
            }
            Leaving::Plain => {
                self.stats.unique += 1;
                return Way::Unique(None);
            }
            Leaving::Hashed(d) => d,
        };
        match table.leave(&digest) {
            Verdict::Unique => {
                self.stats.unique += 1;
                Way::Unique(Some(digest))
            }
            Verdict::Shared(id) => {
                self.stats.shared += 1;
                Way::Shared(id, digest)
            }
            Verdict::Ref(id) => {
                self.stats.references += 1;
                Way::Ref(id)
            }
            Verdict::Remote(id) => {
                self.stats.remote_references += 1;
                Way::Remote(id, digest)
            }
        }
    }

    /// In which form the content of a page leaves on connection `lane` (`core::sketch`); of a difference `out` is the
    /// content's body. What the frame must tell the target host of what slots hold is put into `tell`. Only pages that can be asked for leave as differences, so that a target that has not got the
    /// reference is never at a loss.
    // bounds: one call a content on the hot path; a struct would only rename them
    #[expect(clippy::too_many_arguments, reason = "see the bounds")]
    pub fn form(
        &mut self,
        references: &mut References,
        (lane, now): (Lane, Nanos),
        addr: PageAddr,
        way: &mut Way,
        sketch: Sketch,
        bytes: &PageBytes,
        out: &mut PageBytes,
        tell: &mut Vec<(u32, Digest)>,
    ) -> Form {
        let found = if self.readable(addr.block) { references.find(&sketch, lane, now) } else { None };
        let Some(slot) = found.and_then(|(slot, reference)| less(bytes, reference, out).then_some(slot))
        else {
            return references.keep(sketch, bytes, lane, now).map_or(Form::Whole, Form::Kept);
        };
        tell.extend(references.used(slot, lane, now).map(|digest| (slot, digest)));
        self.stats.modelled += u64::from(references.is_model(slot));
        if let Way::Unique(digest @ None) = way {
            *digest = Some(self.hasher.page(bytes));
            self.stats.hashed += 1;
        }
        self.stats.differences += 1;
        Form::Less(slot)
    }

    /// Whether sampling found that this page is written all the time.
    #[must_use]
    pub fn is_hot(&self, addr: PageAddr) -> bool {
        self.blocks.get(usize::from(addr.block.0)).is_some_and(|b| b.hot.has(addr.page))
    }

    /// Whether pages of this block may be asked for.
    #[must_use]
    pub fn readable(&self, block: BlockIx) -> bool {
        self.blocks.get(usize::from(block.0)).is_some_and(|b| b.readable)
    }

    /// The target needs a page's content; `now` is what guest RAM holds there now, read from outside. Returns the
    /// digest if that still is the content wanted. If not, the guest has written the page since it was sent, so QEMU
    /// sends it anew before RAM ends.
    pub fn answer(&mut self, table: &PairTable, want: Want, now: Option<&PageBytes>) -> Option<Digest> {
        let answer = now.map(|b| self.hasher.page(b)).filter(|d| match want {
            Want::Digest(w) => w == *d,
            Want::Id(id) => table.id_of(d) == Some(id),
        });
        match answer {
            Some(_) => self.stats.answered += 1,
            None => self.stats.gone += 1,
        }
        answer
    }
}

#[cfg(test)]
mod tests;
