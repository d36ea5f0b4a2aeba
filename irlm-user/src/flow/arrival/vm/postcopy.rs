//! The part of an arrival that runs its VM while pages still come; `super::super::fetch` places them.

use super::super::error::ArrivalError;
use super::super::fetch::{Fetch, FetchError, held_ms};
use super::super::intake::Intake;
use super::super::{TargetNote, back, contents};
use super::Vm;
use super::post::CALM;
use crate::core::handover::TargetState;
use crate::core::handover::arrival::Input as Event;
use crate::core::page_set::PageSet;
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::messages::decode_entries;
use crate::core::wire::paging::{decode_set, encode_set};
use crate::flow::squeeze::Landing;
use crate::flow::{HEARTBEAT, Tagged, lock, now};
use crate::net::conn::{Frame, FrameBuf};
use crate::net::connection::Connection;

/// Runs of lost pages that are named one by one.
const MOST_NAMED: usize = 64;

/// "slot 0: 16-31, 4096; slot 1: 0", cut where it gets long.
fn named(set: &PageSet) -> String {
    let mut text = String::new();
    let mut block = None;
    for (n, run) in set.runs().enumerate() {
        if n == MOST_NAMED {
            text.push_str(&format!(", and {} runs more", set.runs().count() - n));
            break;
        }
        if block != Some(run.addr.block) {
            block = Some(run.addr.block);
            let semicolon = if n == 0 { "" } else { "; " };
            text.push_str(&format!("{semicolon}slot {}: ", run.addr.block.0));
        } else {
            text.push_str(", ");
        }
        let (first, last) = (run.addr.page, run.addr.page + (run.count - 1));
        text.push_str(&if first == last { format!("{first}") } else { format!("{first}-{last}") });
    }
    text
}

impl Vm<'_> {
    /// Whether the VM is this side's, or about to be, while pages still come.
    pub(super) fn fetching(&self) -> bool {
        matches!(self.driver.state(), TargetState::Ready | TargetState::Fetching)
    }

    /// The source names pages that are still to come.
    pub(super) fn switch(&mut self, meta: &[u8]) -> Result<(), ArrivalError> {
        if !self.stream.listed || self.stream.ram_over || self.list.ended() || self.post.switched() {
            return Err(WireError::Unexpected(Kind::Switch).into());
        }
        let (due, whole) = self.post.due.get_or_insert_with(|| (PageSet::empty(&self.stream.pages), false));
        *whole = decode_set(Kind::Switch, meta, due)?;
        Ok(())
    }

    /// The state has been loaded: from here on the VM could run.
    pub(super) fn prepare(&mut self) -> Event {
        let due = self.post.due.as_ref().map(|(due, _)| due.clone()).unwrap_or_default();
        tracing::debug!("{}: loaded; {} pages are still to come", self.spec.name, due.len());
        let waiting = self.list.take_waiting();
        // Those that wait were sent, and are not there: what is there is not all that was sent.
        let all = waiting.iter().all(|(addr, _)| due.contains(*addr));
        let begun = self
            .loader
            .catch_faults(Some(&due))
            .and_then(|faults| Ok(Fetch::begin(self.group, self.spec, faults, due, waiting)?));
        match begun {
            Ok(mut fetch) => {
                if let Some((conn, frames, tag)) = self.post.early.take() {
                    fetch.called(conn, frames, tag);
                }
                self.post.fetch = Some(fetch);
                Event::Prepared(self.loader.tally().filter(|_| all))
            }
            Err(e) => Event::Failed(e.to_string()),
        }
    }

    /// After a restart of the agent: the VM, or the copy that may become it, still waits for pages.
    pub(super) fn prepare_again(&mut self) {
        let faults = self.loader.catch_faults(None);
        let begun = faults.and_then(|f| Ok(Fetch::again(self.group, self.spec, f)?));
        match begun {
            Ok(fetch) => self.post.fetch = Some(fetch),
            Err(e) => {
                tracing::error!("{}: {e}", self.spec.name);
                lock(&self.shared.status).reason = format!("its pages cannot be filled in: {e}");
            }
        }
    }

    /// A demand connection.
    pub(super) fn demand(&mut self, conn: Connection, frames: FrameBuf, tag: Tagged) {
        match &mut self.post.fetch {
            Some(fetch) => fetch.called(conn, frames, tag),
            None => self.post.early = Some((conn, frames, tag)),
        }
    }

    /// On a new connection: what is lacking is what is left to send.
    pub(super) fn say_lacks(&mut self) {
        self.post.plain = true;
        self.intake = Intake::new(Landing::default());
        self.link.taken = 0;
        let Some(fetch) = &mut self.post.fetch else { return };
        for meta in encode_set(&fetch.reconnected()) {
            if let Err(e) = back::say(&self.link.sender, Kind::Lacks, &meta, &[]) {
                tracing::debug!("{}: {e}", self.spec.name);
            }
        }
    }

    /// A frame that comes while pages are fetched.
    pub(super) fn fetched(&mut self, frame: &Frame<'_>) -> Result<(), ArrivalError> {
        let Some(fetch) = &mut self.post.fetch else { return Ok(()) };
        match frame.kind {
            Kind::Pages => {
                let intake = if self.post.plain { &mut self.post.bare } else { &mut self.intake };
                let made = intake.pages(self.group, self.spec, &self.shared.work, frame)?;
                fetch.pages(self.group, self.spec, &made)?;
                Ok(())
            }
            // What was asked for before the switch.
            Kind::Contents => {
                let entries = decode_entries(Kind::Contents, frame.meta)?;
                let Intake { landing, laps, .. } = &mut self.intake;
                let pages = landing.contents(frame, entries.len(), &self.shared.work, laps)?;
                let hasher = &self.group.hashers[usize::from(self.spec.domain)];
                if !hasher.vouches(pages, entries.iter().map(|e| e.digest)) {
                    return Err(ArrivalError::Digest);
                }
                let (mut wakes, mut owed) = (Vec::new(), Vec::new());
                {
                    let mut host = lock(&self.group.host);
                    for (e, p) in entries.iter().zip(pages) {
                        if let Some(id) = e.id {
                            host.bind(self.spec.source, id, e.digest, &mut wakes)?;
                        }
                        owed.push((e.digest, host.content(false, e.digest, p, &mut wakes)));
                    }
                }
                self.group.wake(&wakes);
                for (digest, hosts) in owed {
                    contents::serve_owed(self.group, self.spec.domain, digest, &hosts);
                }
                Ok(())
            }
            // Its page is among those still to come.
            Kind::Gone => Ok(()),
            kind => Err(WireError::Unexpected(kind).into()),
        }
    }

    /// Faults, frames of the demand connection, what came from other hosts; and who is asked for what.
    pub(super) fn fetch_step(&mut self, faults: bool, demand: bool) {
        if self.post.fetch.is_none() || !self.fetching() {
            return;
        }
        if let Err(e) = self.try_step(faults, demand) {
            self.fetch_failed(&e);
        }
        let complete = self.post.fetch.as_ref().is_some_and(Fetch::complete);
        if complete {
            self.tell(Event::Filled);
        }
        if self.post.published.elapsed() >= CALM || complete {
            self.post.published = std::time::Instant::now();
            if self.post.plain && self.post.beat.elapsed() >= HEARTBEAT / 2 {
                // Whoever beat before may have ended with the connection, or with an agent before this one.
                self.post.beat = self.post.published;
                let _ = back::say(&self.link.sender, Kind::Heartbeat, &[], &[]);
            }
            self.publish_fetch();
        }
    }

    fn try_step(&mut self, faults: bool, demand: bool) -> Result<(), FetchError> {
        let held = held_ms(self.patience());
        let Some(fetch) = &mut self.post.fetch else { return Ok(()) };
        if faults {
            fetch.hear_faults(self.group)?;
        }
        if demand || fetch.busy(self.group) {
            fetch.read_demand();
        }
        if let Some(mut frames) = fetch.take_frames() {
            let result = self.demanded(&mut frames);
            if let Some(fetch) = &mut self.post.fetch {
                fetch.give_back(frames);
            }
            if let Err(e) = result {
                self.fetch_disturbed(e);
            }
        }
        let Some(fetch) = &mut self.post.fetch else { return Ok(()) };
        if let Some(demand) = fetch.step(self.group, held)? {
            let _ = back::say(&self.link.sender, Kind::Demand, &demand.encode(), &[]);
        }
        if !self.post.plain {
            self.say_taken();
        }
        Ok(())
    }

    fn demanded(&mut self, frames: &mut FrameBuf) -> Result<(), ArrivalError> {
        while let Some(frame) = frames.next()? {
            if frame.kind != Kind::Pages {
                return Err(WireError::Unexpected(frame.kind).into());
            }
            let Some(fetch) = &mut self.post.fetch else { return Ok(()) };
            let work = &self.shared.work;
            let made = self.post.bare.pages(self.group, self.spec, work, &frame)?;
            fetch.pages(self.group, self.spec, &made)?;
        }
        Ok(())
    }

    /// A frame could not be taken in. If the VM's memory is not at fault the connection goes, and on the next the source hears
    /// what is lacking: it believes that it has sent it.
    pub(super) fn fetch_disturbed(&mut self, e: ArrivalError) {
        match e {
            ArrivalError::Fetch(e @ FetchError::Place(_)) => self.fetch_failed(&e),
            e => self.lost(&e.to_string()),
        }
    }

    /// The VM's own process is the only one that can lose it now, so there is nothing to take back.
    pub(super) fn fetch_failed(&mut self, e: &FetchError) {
        tracing::error!("{}: {e}", self.spec.name);
        if self.driver.state() == TargetState::Ready {
            self.fail(&e.to_string());
            return;
        }
        let why = self.with_what_lacks(e.to_string());
        self.tell(Event::Failed(why));
        if let Some(mut fetch) = self.post.fetch.take() {
            fetch.leave(self.group);
        }
    }

    /// Why a VM ended, and how many pages it had not got, if it ran before they came.
    pub(super) fn with_what_lacks(&self, why: String) -> String {
        match self.post.fetch.as_ref().map(Fetch::lacking) {
            Some(lacking) if self.driver.state() != TargetState::Ready => {
                format!("{why}; {lacking} of its pages had not come")
            }
            _ => why,
        }
    }

    /// The source will send no page any more: which are lost.
    pub(super) fn say_missing(&self) {
        let Some(fetch) = self.post.fetch.as_ref().filter(|_| self.driver.pages_lost()) else { return };
        let lacks = fetch.lacks();
        let reason = format!(
            "the memory of {} at its source is gone, and {} of its pages with it; `irlm settle --run-at target` lets it go on \
             without: {}",
            self.spec.name,
            lacks.len(),
            named(&lacks)
        );
        let mut st = lock(&self.shared.status);
        if st.reason != reason {
            tracing::error!("{reason}");
            st.reason = reason;
        }
    }

    fn publish_fetch(&self) {
        let Some(fetch) = &self.post.fetch else { return };
        let mut st = lock(&self.shared.status);
        st.waiting = fetch.lacking();
        st.fill = fetch.stats();
        st.faults = fetch.waits();
    }

    /// Every page is there: faults end, and what they needed goes.
    pub(super) fn fetch_over(&mut self) {
        let Some(mut fetch) = self.post.fetch.take() else { return };
        fetch.end(self.group);
        if self.driver.state() != TargetState::Filled {
            return;
        }
        {
            let mut st = lock(&self.shared.status);
            st.waiting = 0;
            st.fill = fetch.stats();
            st.faults = fetch.waits();
            st.filled_ns = crate::flow::unix_ns();
        }
        if let Err(e) = self.loader.end_faults() {
            tracing::warn!("{}: {e}; its guest goes on with a fault for each page", self.spec.name);
        }
        if let Err(e) = (self.journal)(TargetNote::Settled) {
            tracing::warn!("{}: {e}", self.spec.name);
        }
        tracing::debug!("{}: filled at {}", self.spec.name, now().0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::page_set::Run;
    use crate::core::units::{BlockIx, PageAddr};

    #[test]
    fn lost_pages_are_named_and_a_long_list_is_cut() {
        let mut set = PageSet::empty(&[1000, 10]);
        let mut add = |block, page, count| {
            set.insert_run(Run { addr: PageAddr { block: BlockIx(block), page }, count });
        };
        add(0, 16, 16);
        add(0, 999, 1);
        add(1, 0, 2);
        assert_eq!(named(&set), "slot 0: 16-31, 999; slot 1: 0-1");
        (0..300).for_each(|n| {
            set.insert(PageAddr { block: BlockIx(0), page: 100 + 2 * n });
        });
        let text = named(&set);
        assert!(text.ends_with(", and 239 runs more") && text.len() < 600, "{text}");
    }
}
