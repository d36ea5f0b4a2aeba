//! What a VM connection brings, up to where it may be believed: decompressed, made of what it is a difference from, and
//! hashed where it has a name. Without the host's lock.

use super::vm::ArrivalError;
use super::{TargetGroup, TargetSpec};
use crate::core::delta::{Missing, restore};
use crate::core::digest::Digest;
use crate::core::units::PageBytes;
use crate::core::wire::pages::{Form, Record, Records};
use crate::flow::lock;
use crate::flow::squeeze::Landing;
use crate::flow::work::{Laps, Stage, Work};
use crate::net::conn::Frame;

/// Of one connection.
pub(super) struct Intake {
    pub(super) landing: Landing,
    pub(super) laps: Laps,
    /// Contents of the frame at hand, made of differences.
    restored: Vec<PageBytes>,
    /// Of the frame at hand: which contents have which names.
    named: Vec<(usize, Digest)>,
    /// `Pages` frames taken in.
    pub(super) taken: u32,
}

impl Intake {
    pub(super) fn new(landing: Landing) -> Self {
        Self { landing, laps: Laps::begin(), restored: Vec::new(), named: Vec::new(), taken: 0 }
    }

    /// The contents of a `Pages` frame, and which of them could not be made of what they refer to. The whole frame is valid,
    /// and contents with a name are what they claim to be.
    pub(super) fn pages<'s>(
        &'s mut self,
        group: &TargetGroup,
        spec: &TargetSpec,
        work: &Work,
        frame: &'s Frame<'_>,
    ) -> Result<(&'s [PageBytes], Missing), ArrivalError> {
        let mut records = Records::new(frame.meta);
        records.by_ref().try_for_each(|r| r.map(drop))?;
        let body = self.landing.contents(frame, records.contents(), work, &mut self.laps)?;
        let hasher = &group.hashers[usize::from(spec.domain)];
        let (mut body, mut missing) = (body, Missing::default());
        let slots = group.slots(spec.source, spec.domain);
        let restored = slots.is_some();
        if let Some(slots) = slots {
            let mut slots = lock(slots);
            (body, missing) = restore(frame.meta, body, &mut slots, hasher, &mut self.restored)?;
            drop(slots);
            self.taken = self.taken.wrapping_add(1);
            self.laps.lap(work, Stage::Similar);
        }
        let mut records = Records::new(frame.meta);
        self.laps.lap(work, Stage::Other);
        self.named.clear();
        while let Some(record) = records.next() {
            let at = records.contents().wrapping_sub(1);
            match (record?, records.form()) {
                // Made above of what it refers to, and compared with its digest there.
                (Record::Shared { .. } | Record::Named { .. }, Form::Less(_)) if restored => {}
                (Record::Shared { digest, .. } | Record::Named { digest, .. }, _) => {
                    self.named.push((at, digest));
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
        Ok((body, missing))
    }
}
