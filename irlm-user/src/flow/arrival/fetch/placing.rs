//! Pages are placed while the guest may give pages away. The kernel places nothing as long as somebody waits to be read of,
//! so placing reads events by itself, and what has been given away meanwhile is not placed.

use super::place::{self, Place, PlaceError};
use super::{Fetch, FetchError, TargetGroup, addr_of};
use crate::core::page_set::Run;
use crate::core::postcopy::Origin;
use crate::core::units::{PAGE_SIZE, PageAddr};
use crate::flow::{lock, now};
use crate::host::uffd::Event;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two tries while the memory's layout is being changed.
const PAUSE: Duration = Duration::from_micros(100);

impl Fetch {
    /// Whether the event is of pages that were given away; then nothing is to come for them any more.
    pub(super) fn removed(&mut self, group: &Arc<TargetGroup>, event: Event) -> bool {
        let Event::Removed { slot, page, count } = event else { return false };
        let run = Run { addr: addr_of(slot, page), count };
        self.zeros.extend(self.fill.removed(&mut lock(&group.host), run));
        self.stale.get_or_insert_with(Instant::now);
        true
    }

    /// Who waits for a page that was given away gets zeros.
    pub(super) fn zero_removed(&mut self, group: &Arc<TargetGroup>) -> Result<(), FetchError> {
        while let Some(addr) = self.zeros.pop() {
            self.show(group, addr, Place::zero)?;
            let ns = self.fill.answered(addr, now());
            self.waited(Origin::Here, ns);
        }
        Ok(())
    }

    /// The memory's layout is being changed, `since` then. What is told of that is read first, because whoever changes it waits for
    /// that; what else is read is answered later.
    fn changing(&mut self, group: &Arc<TargetGroup>, since: Instant) -> Result<(), FetchError> {
        let mut read = std::mem::take(&mut self.unheard);
        let from = read.len();
        let result = self.place.events(&mut read);
        let mut at = from;
        while let Some(event) = read.get(at) {
            if self.removed(group, *event) {
                read.remove(at);
            } else {
                at += 1;
            }
        }
        let heard = read.len() > from;
        self.unheard = read;
        result?;
        if since.elapsed() > place::PATIENCE {
            return Err(PlaceError::Changing.into());
        }
        if !heard {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// One page that needs no content.
    pub(super) fn show(
        &mut self,
        group: &Arc<TargetGroup>,
        addr: PageAddr,
        how: fn(&Place, PageAddr) -> Result<bool, PlaceError>,
    ) -> Result<(), FetchError> {
        let since = Instant::now();
        while !how(&self.place, addr)? {
            self.changing(group, since)?;
        }
        Ok(())
    }

    /// How many of `most` pages from `addr` on still want content.
    fn wanted(&self, addr: PageAddr, most: usize) -> usize {
        let wants = |n: &usize| self.fill.wants(PageAddr { page: addr.page + *n as u32, ..addr });
        (0..most).take_while(wants).count()
    }

    /// Places pages that follow each other, but for those that the guest has given away meanwhile.
    pub(super) fn put(
        &mut self,
        group: &Arc<TargetGroup>,
        addr: PageAddr,
        bytes: &[u8],
        origin: Origin,
    ) -> Result<(), FetchError> {
        let mut at = 0;
        while at < bytes.len() {
            let next = PageAddr { page: addr.page + (at / PAGE_SIZE) as u32, ..addr };
            let run = self.wanted(next, (bytes.len() - at) / PAGE_SIZE) * PAGE_SIZE;
            if run == 0 {
                self.fill.stats.late += 1;
                at += PAGE_SIZE;
                continue;
            }
            self.put_run(group, next, &bytes[at..at + run], origin)?;
            at += run;
        }
        Ok(())
    }

    /// No event may be read between the look whether pages are wanted and the first line of this: the kernel takes pages away
    /// only after it has told of it, so what is written before that goes with them.
    fn put_run(
        &mut self,
        group: &Arc<TargetGroup>,
        addr: PageAddr,
        bytes: &[u8],
        origin: Origin,
    ) -> Result<(), FetchError> {
        self.place.store(addr, bytes)?;
        let (mut at, mut since) = (0, None);
        while at < bytes.len() {
            let next = PageAddr { page: addr.page + (at / PAGE_SIZE) as u32, ..addr };
            // All of them, until something was read.
            let run = match since {
                None => bytes.len() - at,
                Some(_) => self.wanted(next, (bytes.len() - at) / PAGE_SIZE) * PAGE_SIZE,
            };
            if run == 0 {
                at += PAGE_SIZE;
                continue;
            }
            let done = self.place.reveal(next, &bytes[at..at + run])? as usize * PAGE_SIZE;
            at += done;
            if done < run {
                let began = since.filter(|_| done == 0).unwrap_or_else(Instant::now);
                since = Some(began);
                self.changing(group, began)?;
            }
        }
        let (at, mut host) = (now(), lock(&group.host));
        for n in 0..(bytes.len() / PAGE_SIZE) as u32 {
            let addr = PageAddr { page: addr.page + n, ..addr };
            if since.is_some() && !self.fill.wants(addr) {
                continue;
            }
            if let Some(since) = self.fill.held_behind(addr).filter(|_| origin == Origin::Forward) {
                self.latency.record_behind(at.0.saturating_sub(since.0));
            }
            let ns = self.fill.placed(&mut host, addr, at);
            if let Some(ns) = ns {
                self.latency.record(origin, ns);
                if self.pressed.remove(&addr) {
                    self.latency.record_held(ns);
                }
            }
        }
        Ok(())
    }
}
