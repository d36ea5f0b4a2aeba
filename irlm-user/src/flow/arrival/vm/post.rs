//! What an arrival knows besides while pages come after its VM has begun to run.

use super::super::TargetGroup;
use super::super::fetch::Fetch;
use super::super::intake::Intake;
use crate::core::page_set::PageSet;
use crate::flow::Tagged;
use crate::flow::squeeze::Landing;
use crate::net::conn::FrameBuf;
use crate::net::connection::Connection;
use std::time::{Duration, Instant};

/// How often who waits for what is looked through while a vCPU waits, and otherwise.
const URGENT: Duration = Duration::from_millis(5);
pub(super) const CALM: Duration = Duration::from_millis(50);

/// Post-copy's part of a VM.
pub(super) struct PostCopy {
    /// The pages that are still to come, and whether all of them have been named.
    pub(super) due: Option<(PageSet, bool)>,
    /// Since faults are caught.
    pub(super) fetch: Option<Fetch>,
    /// A demand connection that came before that.
    pub(super) early: Option<(Connection, FrameBuf, Tagged)>,
    /// For its frames, which have nothing to do with those of the VM connection.
    pub(super) bare: Intake,
    /// On this connection the source sends nothing that refers to something before it.
    pub(super) plain: bool,
    pub(super) published: Instant,
    pub(super) beat: Instant,
}

impl PostCopy {
    pub(super) fn new() -> Self {
        Self {
            due: None,
            fetch: None,
            early: None,
            bare: Intake::new(Landing::default()),
            plain: false,
            published: Instant::now(),
            beat: Instant::now(),
        }
    }

    /// The source has named all pages that are still to come.
    pub(super) fn switched(&self) -> bool {
        self.due.as_ref().is_some_and(|(_, whole)| *whole)
    }

    /// How long may be slept; nothing if there is something to do.
    pub(super) fn pause(&self, group: &TargetGroup) -> Option<Duration> {
        let fetch = self.fetch.as_ref()?;
        Some(match (fetch.busy(group), fetch.faulting()) {
            (true, _) => Duration::ZERO,
            (false, true) => URGENT,
            (false, false) => CALM,
        })
    }
}
