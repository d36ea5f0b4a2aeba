//! The source host's dedup table towards one target host: which contents that target host has, will have, or should
//! get a name for. Shared by all VMs that go from this host to that one (the paper's host-level hash table).
//!
//! Bound: one entry per distinct digest seen, at most [`PairTable::new`]'s `max_entries`; at the bound unknown
//! contents travel as unique and are not remembered, which costs bandwidth only.

use super::digest::Digest;
use super::units::{HostIx, PageId};
use std::collections::HashMap;

/// What the table says about a content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Preparation saw it once on this host; not sent yet.
    HintOnce,
    /// Preparation saw it on several pages; the first to leave goes as shared.
    HintTwice,
    /// Sent once as unique: the target host has it in a guest, not in its store.
    SentUnique,
    /// Others carry it, or this host pushes it: will be in the target's store; the target does not know our id yet.
    Planned(PageId),
    /// The target host has been told this id (content, push or remote reference).
    Bound(PageId),
}

/// How a page with a given digest is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Content, no name.
    Unique,
    /// Content, with the name that later references will use.
    Shared(PageId),
    /// Only the name.
    Ref(PageId),
    /// Name and digest: another host carries the content.
    Remote(PageId),
}

/// Dedup table of one (source host, target host) pair.
#[derive(Debug)]
pub struct PairTable {
    host: HostIx,
    map: HashMap<Digest, State>,
    next_local: u32,
    max_entries: usize,
    /// Contents that no preparation and no plan knew, for the index; none while nobody takes them.
    fresh: Option<Vec<Fresh>>,
}

/// A content that appeared after the plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fresh {
    /// The content.
    pub digest: Digest,
    /// Whether it was sent with a name, so that the target's store keeps it.
    pub kept: bool,
}

/// Fresh contents kept until somebody takes them; more are forgotten, which costs bandwidth only.
pub const MAX_FRESH: usize = 1 << 16;

impl PairTable {
    /// An empty table of source host `host`.
    #[must_use]
    pub fn new(host: HostIx, max_entries: usize) -> Self {
        Self { host, map: HashMap::new(), next_local: 0, max_entries, fresh: None }
    }

    /// Preparation saw a page with this digest.
    pub fn note(&mut self, digest: Digest) {
        let full = self.map.len() >= self.max_entries;
        match self.map.get_mut(&digest) {
            Some(s @ State::HintOnce) => *s = State::HintTwice,
            Some(_) => {}
            None if full => {}
            None => {
                self.map.insert(digest, State::HintOnce);
            }
        }
    }

    /// The plan says the content will be in the target's store under `id`. A name that the target was told already
    /// stays: pages that wait under it are answered by it.
    pub fn planned(&mut self, digest: Digest, id: PageId) {
        let full = self.map.len() >= self.max_entries;
        match self.map.get_mut(&digest) {
            Some(State::Bound(_)) => {}
            Some(s) => *s = State::Planned(id),
            None if full => {}
            None => {
                self.map.insert(digest, State::Planned(id));
            }
        }
    }

    /// From now on notes contents that appear after the plan, for [`Self::take_fresh`].
    pub fn note_fresh(&mut self) {
        self.fresh.get_or_insert_default();
    }

    /// Contents that appeared since the last call, to be asked of the index; what it knows is told by
    /// [`Self::planned`].
    pub fn take_fresh(&mut self) -> Vec<Fresh> {
        self.fresh.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn is_fresh(fresh: &mut Option<Vec<Fresh>>, digest: &Digest, kept: bool) {
        if let Some(list) = fresh.as_mut().filter(|l| l.len() < MAX_FRESH) {
            list.push(Fresh { digest: *digest, kept });
        }
    }

    /// This host has pushed the content towards this target host, which makes the id known there.
    pub fn pushed(&mut self, digest: &Digest) {
        if let Some(s) = self.map.get_mut(digest)
            && let State::Planned(id) = *s
        {
            *s = State::Bound(id);
        }
    }

    /// The plan's promise does not hold: the next page with this content carries it itself.
    pub fn void(&mut self, digest: &Digest) {
        if let Some(s) = self.map.get_mut(digest)
            && matches!(s, State::Planned(_))
        {
            *s = State::HintTwice;
        }
    }

    /// Whether preparation saw this content on one page of this host only, and no plan names it: such a page needs
    /// no digest when it leaves.
    #[must_use]
    pub fn is_lone(&self, digest: &Digest) -> bool {
        matches!(self.map.get(digest), Some(State::HintOnce))
    }

    /// The id under which the target host knows, or was promised, this content.
    #[must_use]
    pub fn id_of(&self, digest: &Digest) -> Option<PageId> {
        match self.map.get(digest)? {
            State::Planned(id) | State::Bound(id) => Some(*id),
            _ => None,
        }
    }

    /// A page with this digest leaves now: how to send it. The table counts it as sent so; if it never arrives, pages
    /// that refer to it are answered from their own VM.
    pub fn leave(&mut self, digest: &Digest) -> Verdict {
        let full = self.map.len() >= self.max_entries;
        let Some(s) = self.map.get_mut(digest) else {
            if !full {
                self.map.insert(*digest, State::SentUnique);
                Self::is_fresh(&mut self.fresh, digest, false);
            }
            return Verdict::Unique;
        };
        match *s {
            State::HintOnce => {
                *s = State::SentUnique;
                Verdict::Unique
            }
            State::HintTwice | State::SentUnique => {
                // What preparation saw twice the index knows; a host's own content is nobody else's.
                if *s == State::SentUnique {
                    Self::is_fresh(&mut self.fresh, digest, true);
                }
                let id = PageId::local(self.host, self.next_local);
                self.next_local = self.next_local.wrapping_add(1);
                *s = State::Bound(id);
                Verdict::Shared(id)
            }
            State::Planned(id) => {
                *s = State::Bound(id);
                Verdict::Remote(id)
            }
            State::Bound(id) => Verdict::Ref(id),
        }
    }

    /// Distinct digests known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }
    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn d(n: u8) -> Digest {
        Digest([n; 20])
    }

    #[test]
    fn each_content_crosses_once_and_then_travels_as_its_name() {
        let mut t = PairTable::new(HostIx(1), 100);
        t.note(d(1));
        t.note(d(2));
        t.note(d(2));
        assert!(t.is_lone(&d(1)) && !t.is_lone(&d(2)) && !t.is_lone(&d(9)));
        assert_eq!(t.leave(&d(1)), Verdict::Unique);
        let Verdict::Shared(a) = t.leave(&d(2)) else { panic!("seen twice: shared") };
        assert_eq!(t.leave(&d(2)), Verdict::Ref(a));
        assert_eq!(t.leave(&d(3)), Verdict::Unique);
        let Verdict::Shared(b) = t.leave(&d(3)) else { panic!("second sight: shared") };
        assert_ne!(a, b);
        assert_eq!(t.leave(&d(3)), Verdict::Ref(b));
    }

    #[test]
    fn a_planned_content_is_a_remote_reference_once_and_carried_again_when_void() {
        let mut t = PairTable::new(HostIx(0), 100);
        let id = PageId { bucket: 5, index: 1 };
        t.planned(d(1), id);
        t.planned(d(2), id);
        t.planned(d(3), id);
        t.pushed(&d(2));
        t.void(&d(3));
        assert_eq!(t.leave(&d(1)), Verdict::Remote(id));
        assert_eq!(t.leave(&d(1)), Verdict::Ref(id));
        assert_eq!(t.leave(&d(2)), Verdict::Ref(id));
        assert!(matches!(t.leave(&d(3)), Verdict::Shared(_)));
    }

    #[test]
    fn at_its_bound_it_forgets_new_contents_and_keeps_old_ones() {
        let mut t = PairTable::new(HostIx(0), 1);
        assert_eq!(t.leave(&d(1)), Verdict::Unique);
        for _ in 0..3 {
            assert_eq!(t.leave(&d(2)), Verdict::Unique);
        }
        assert!(matches!(t.leave(&d(1)), Verdict::Shared(_)));
        t.planned(d(3), PageId { bucket: 0, index: 0 });
        assert_eq!((t.len(), t.id_of(&d(3))), (1, None));
    }

    #[test]
    fn contents_that_no_plan_knew_are_asked_about_and_then_referred_to() {
        let mut t = PairTable::new(HostIx(0), 100);
        t.leave(&d(9));
        assert!(t.take_fresh().is_empty(), "nobody asks");
        t.note_fresh();
        t.note(d(1));
        t.note(d(1));
        for n in [1, 2, 2, 3] {
            t.leave(&d(n));
        }
        let fresh = |n, kept| Fresh { digest: d(n), kept };
        assert_eq!(t.take_fresh(), [fresh(2, false), fresh(2, true), fresh(3, false)]);
        assert!(t.take_fresh().is_empty());
        // The index knows that others bring both to this target host.
        let id = PageId { bucket: 5, index: 1 };
        t.planned(d(2), id);
        t.planned(d(3), id);
        assert!(matches!(t.leave(&d(2)), Verdict::Ref(own) if own != id), "told under its own name already");
        assert_eq!(t.leave(&d(3)), Verdict::Remote(id));
        for n in 0..u32::try_from(MAX_FRESH).unwrap() + 50 {
            let mut bytes = [0; 20];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            bytes[19] = 1;
            PairTable::is_fresh(&mut t.fresh, &Digest(bytes), false);
        }
        assert_eq!(t.take_fresh().len(), MAX_FRESH);
    }

    #[test]
    fn a_name_once_told_never_changes() {
        let mut t = PairTable::new(HostIx(0), 100);
        t.note(d(1));
        t.note(d(1));
        let Verdict::Shared(told) = t.leave(&d(1)) else { panic!("seen twice: shared") };
        t.planned(d(1), PageId { bucket: 1, index: 1 });
        t.void(&d(1));
        assert_eq!(t.leave(&d(1)), Verdict::Ref(told));
    }
}
