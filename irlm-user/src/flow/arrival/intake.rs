//! What a VM connection brings, up to where it may be believed: decompressed, made of what it is a difference from, and
//! hashed where it has a name. Without the host's lock.

use super::error::ArrivalError;
use super::verified::Verified;
use super::{TargetGroup, TargetSpec};
use crate::core::delta::{Missing, Slots, restore};
use crate::core::digest::Digest;
use crate::core::units::PageBytes;
use crate::core::wire::limits::MAX_UNKEPT;
use crate::core::wire::messages::encode_slots;
use crate::core::wire::pages::{Form, PageBatch, Record};
use crate::flow::lock;
use crate::flow::squeeze::Landing;
use crate::flow::work::{Laps, Stage, Work};
use crate::net::conn::Frame;
use std::sync::Mutex;

/// Of one connection.
pub(super) struct Intake {
    pub(super) landing: Landing,
    pub(super) laps: Laps,
    /// Of the frame at hand: its records.
    batch: PageBatch,
    /// Contents of the frame at hand, made of differences.
    restored: Vec<PageBytes>,
    /// Of the frame at hand: which contents have which names.
    named: Vec<(usize, Digest)>,
    /// `Pages` frames taken in.
    pub(super) taken: u32,
    /// Of the frame at hand: which slots are to hold which contents of the store, and copies of some.
    keeps: Vec<(u32, Digest)>,
    copies: Vec<(u32, PageBytes)>,
    /// Slots whose contents are not here, until the source is told.
    unkept: Vec<u32>,
}

/// Contents copied from the store under one lock.
const COPIES: usize = 16;

impl Intake {
    pub(super) fn new(landing: Landing) -> Self {
        Self {
            landing,
            laps: Laps::begin(),
            batch: PageBatch::default(),
            restored: Vec::new(),
            named: Vec::new(),
            taken: 0,
            keeps: Vec::new(),
            copies: Vec::new(),
            unkept: Vec::new(),
        }
    }

    /// What the source is to hear of the frames taken in, before it hears that they were: an `Unkept` frame, if any.
    pub(super) fn take_unkept(&mut self) -> Option<Vec<u8>> {
        let meta = (!self.unkept.is_empty()).then(|| encode_slots(&self.unkept));
        self.unkept.clear();
        meta
    }

    /// Puts contents of the store into slots. What the store loses later is not missed there.
    fn keep(&mut self, group: &TargetGroup, slots: &Mutex<Slots>) {
        for keeps in self.keeps.chunks(COPIES) {
            {
                let host = lock(&group.host);
                for (slot, digest) in keeps {
                    match host.store.get(digest) {
                        Some(bytes) => self.copies.push((*slot, *bytes)),
                        None if self.unkept.len() < MAX_UNKEPT => self.unkept.push(*slot),
                        None => {}
                    }
                }
            }
            let mut slots = lock(slots);
            self.copies.drain(..).for_each(|(slot, bytes)| slots.keep(slot, &bytes));
        }
    }

    /// A `Pages` frame that may be believed: all of it is valid, and contents with a name are what they claim to be.
    pub(super) fn pages<'s>(
        &'s mut self,
        group: &TargetGroup,
        spec: &TargetSpec,
        work: &Work,
        frame: &'s Frame<'_>,
    ) -> Result<Verified<'s>, ArrivalError> {
        self.batch.read(frame.meta)?;
        self.keeps.clear();
        self.keeps.extend(self.batch.records().iter().filter_map(|p| match p.record {
            Record::Keep { digest, slot } => Some((slot, digest)),
            _ => None,
        }));
        if let Some(slots) = group.slots(spec.source, spec.domain).filter(|_| !self.keeps.is_empty()) {
            self.keep(group, slots);
        }
        let body = self.landing.contents(frame, self.batch.contents(), work, &mut self.laps)?;
        let hasher = &group.hashers[usize::from(spec.domain)];
        let (mut body, mut missing) = (body, Missing::default());
        let slots = group.slots(spec.source, spec.domain);
        let restored = slots.is_some();
        if let Some(slots) = slots {
            let mut slots = lock(slots);
            (body, missing) = restore(&self.batch, body, &mut slots, hasher, &mut self.restored)?;
            drop(slots);
            self.taken = self.taken.wrapping_add(1);
            self.laps.lap(work, Stage::Similar);
        }
        self.laps.lap(work, Stage::Other);
        self.named.clear();
        for p in self.batch.records() {
            match (p.record, p.form) {
                // Made above of what it refers to, and compared with its digest there.
                (Record::Shared { .. } | Record::Named { .. }, Form::Less(_)) if restored => {}
                (Record::Shared { digest, .. } | Record::Named { digest, .. }, _) => {
                    self.named.push((p.first, digest));
                }
                _ => {}
            }
        }
        let contents = self.named.iter().filter_map(|(at, _)| body.get(*at));
        let good = hasher.vouches(contents, self.named.iter().map(|(_, digest)| *digest));
        self.laps.lap(work, Stage::Hash);
        if !good {
            return Err(ArrivalError::Digest);
        }
        Ok(Verified { records: self.batch.records(), contents: body, missing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::arrival::TargetHost;
    use crate::core::digest::{Algorithm, Hasher};
    use crate::core::units::{BlockIx, HostIx, PageAddr, VmIx};
    use crate::core::wire::frame::{CODEC_RAW, Kind};
    use crate::core::wire::messages::decode_slots;
    use crate::core::wire::pages::PagesBuilder;
    use crate::flow::arrival::peers::Peers;
    use crate::flow::arrival::{ArrivalOptions, Member};
    use crate::flow::{Front, NoTags, Timeouts};
    use std::sync::Arc;

    fn page(n: u8) -> PageBytes {
        std::array::from_fn(|i| (i as u8).wrapping_mul(n) ^ (i >> 8) as u8)
    }

    #[test]
    fn models_come_from_the_store_and_the_source_hears_of_those_that_are_not_there() {
        let hasher = Hasher::new(Algorithm::Blake3, &[3; 32], "t");
        let digest = |n: u8| hasher.page(&page(n));
        let mut group = TargetGroup::new(
            Member { name: "g".into(), token: [1; 32], me: HostIx(0), hashers: vec![hasher.clone()] },
            TargetHost::new(1000, 1000),
            Peers::new(vec!["127.0.0.1:1".parse().unwrap()]),
            Timeouts::default(),
            Arc::new(NoTags),
            ArrivalOptions { socket_dir: "/nowhere".into(), ..ArrivalOptions::default() },
        );
        group.keep([(HostIx(0), 0)], 100 << 12);
        // More than are copied at once.
        let here: Vec<u8> = (1..=40).map(|n| 2 * n + 1).collect();
        for n in &here {
            lock(&group.host).store.insert(digest(*n), &page(*n));
        }
        let spec = |source| TargetSpec {
            vm: VmIx(0),
            name: "vm".into(),
            source: HostIx(source),
            domain: 0,
            front: Front::Vmm("/nowhere".into()),
        };
        let mut near = page(5);
        near[9] ^= 1;
        let mut difference = [0; crate::core::units::PAGE_SIZE];
        assert!(crate::core::delta::less(&near, &page(5), &mut difference));
        let addr = |page| PageAddr { block: BlockIx(0), page };
        let mut records = PagesBuilder::default();
        records.named(addr(0), &hasher.page(&near), 5);
        here.iter().for_each(|n| records.keep(u32::from(*n), &digest(*n)));
        records.keep(60, &digest(200));
        records.named(addr(1), &hasher.page(&near), 60);
        records.keep(4000, &digest(5));
        let (meta, body) = (records.meta().to_vec(), [difference; 2]);
        let frame = Frame { kind: Kind::Pages, codec: CODEC_RAW, meta: &meta, body: body.as_flattened() };
        let mut intake = Intake::new(Landing::default());
        let made = intake.pages(&group, &spec(0), &Work::default(), &frame).unwrap();
        assert!(made.content(0) == Some(&near), "wherever in the frame the word stands");
        assert!(made.contents.len() == 2 && made.content(1).is_none());
        assert_eq!(intake.taken, 1);
        assert_eq!(intake.take_unkept().map(|m| decode_slots(&m)), Some(Ok(vec![60])));
        assert_eq!(intake.take_unkept(), None, "said once");
        let slots = lock(group.slots(HostIx(0), 0).unwrap());
        assert!(here.iter().all(|n| slots.get(u32::from(*n)) == Some(&page(*n))) && slots.get(60).is_none());
        drop(slots);
        // A source host for which nothing is kept: there is nothing to say.
        let mut records = PagesBuilder::default();
        records.keep(1, &digest(200));
        records.unique(addr(0), None);
        let meta = records.meta().to_vec();
        let frame = Frame { kind: Kind::Pages, codec: CODEC_RAW, meta: &meta, body: near.as_slice() };
        let made = intake.pages(&group, &spec(7), &Work::default(), &frame).unwrap();
        assert!(made.contents == [near] && made.missing.is_empty());
        assert_eq!((intake.take_unkept(), intake.taken), (None, 1));
    }
}
