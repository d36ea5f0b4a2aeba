//! What each frame of a VM connection does to the arrival, and what the source is told of it.

use super::super::error::{ArrivalError, MAX_HELD};
use super::super::intake::Intake;
use super::super::{back, contents};
use super::{LOOK, PATIENCE_FACTOR, Vm};
use crate::core::arrival::{Key, Patience};
use crate::core::handover::TargetState;
use crate::core::handover::arrival::Input as Event;
use crate::core::qemu::{BlockList, RamBlock};
use crate::core::units::Nanos;
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::messages::{Blocks, Word, decode_entries, decode_needs, encode_needs, encode_number};
use crate::flow::{Traffic, lock, now};
use crate::net::conn::Frame;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Vm<'_> {
    pub(super) fn frame(&mut self, frame: &Frame<'_>) -> Result<(), ArrivalError> {
        let filling = self.driver.state() == TargetState::Filling;
        match frame.kind {
            Kind::Heartbeat | Kind::Stopped => Ok(()),
            Kind::Word => {
                let word = Word::decode(frame.meta)?;
                self.tell(Event::Word(word));
                self.say_missing();
                Ok(())
            }
            _ if self.fetching() => self.fetched(frame),
            // What was under way when this side gave up.
            _ if !filling => Ok(()),
            Kind::Blocks => self.blocks(&Blocks::decode(frame.meta)?),
            Kind::Pages => self.pages(frame),
            Kind::Switch => self.switch(frame.meta),
            Kind::Verbatim => self.verbatim(frame.body),
            Kind::RamEnd => {
                self.list.ram_end(now())?;
                // Its source has been stopped: what this side still says and asks for is downtime too.
                if let Some(tag) = &self.link.tag {
                    tag.change(Traffic::Switchover);
                }
                tracing::debug!("{}: RAM ended, {} pages wait", self.spec.name, self.list.waiting());
                self.end_if_complete()
            }
            Kind::Gone => {
                for entry in decode_needs(Kind::Gone, frame.meta)? {
                    let pass = self.list.gone(&mut lock(&self.group.host), entry)?;
                    if let Some((digest, rest)) = pass {
                        contents::pass_on(self.group, digest, &rest, self.spec.domain);
                    }
                }
                Ok(())
            }
            Kind::Contents => self.answers(frame),
            kind => Err(WireError::Unexpected(kind).into()),
        }
    }

    pub(super) fn blocks(&mut self, b: &Blocks) -> Result<(), ArrivalError> {
        if self.stream.listed {
            return Err(WireError::Unexpected(Kind::Blocks).into());
        }
        let blocks = b
            .blocks
            .iter()
            .map(|(name, used)| RamBlock { name: name.as_str().into(), used_bytes: *used })
            .collect();
        let list = BlockList::new(b.section_id, b.footers, blocks)?;
        self.stream.pages = list.blocks().iter().map(RamBlock::pages).collect();
        self.loader.blocks(list)?;
        self.stream.listed = true;
        Ok(())
    }

    pub(super) fn pages(&mut self, frame: &Frame<'_>) -> Result<(), ArrivalError> {
        if !self.stream.listed || self.stream.ram_over {
            return Err(WireError::Unexpected(Kind::Pages).into());
        }
        let made = self.intake.pages(self.group, self.spec, &self.shared.work, frame)?;
        let mut wakes = Vec::new();
        let mut content = 0;
        let at = now();
        {
            let mut host = lock(&self.group.host);
            for p in made.records {
                let bytes = made.content(content);
                let out = self.loader.pages()?;
                self.list.record(&mut host, p.record, &mut content, bytes, at, out, &mut wakes)?;
            }
        }
        self.group.wake(&wakes);
        for (digest, hosts) in self.list.take_owed() {
            contents::serve_owed(self.group, self.spec.domain, digest, &hosts);
        }
        Ok(self.loader.write(made.contents.as_flattened())?)
    }

    /// Contents this VM's needs have asked for: what waits for them here is loaded at once, however small the store.
    pub(super) fn answers(&mut self, frame: &Frame<'_>) -> Result<(), ArrivalError> {
        if !self.stream.listed || self.stream.ram_over {
            return Ok(());
        }
        let entries = decode_entries(Kind::Contents, frame.meta)?;
        let Intake { landing, laps, .. } = &mut self.intake;
        let pages = landing.contents(frame, entries.len(), &self.shared.work, laps)?;
        let hasher = &self.group.hashers[usize::from(self.spec.domain)];
        if !hasher.vouches(pages, entries.iter().map(|e| e.digest)) {
            return Err(ArrivalError::Digest);
        }
        let mut wakes = Vec::new();
        let mut owed = Vec::new();
        {
            let mut host = lock(&self.group.host);
            for (e, p) in entries.iter().zip(pages) {
                let out = self.loader.pages()?;
                let hosts = self.list.answered(&mut host, e.id, e.digest, p, now(), out, &mut wakes)?;
                owed.push((e.digest, hosts));
            }
        }
        self.group.wake(&wakes);
        for (digest, hosts) in owed {
            contents::serve_owed(self.group, self.spec.domain, digest, &hosts);
        }
        self.loader.write(&[])?;
        self.end_if_complete()
    }

    pub(super) fn woken(&mut self, key: Key) -> Result<(), ArrivalError> {
        if let Some(fetch) = &mut self.post.fetch {
            fetch.woken(self.group, key);
            return Ok(());
        }
        if !self.stream.listed || self.driver.state() != TargetState::Filling {
            return Ok(());
        }
        self.list.woken(&mut lock(&self.group.host), key, now(), self.loader.pages()?)?;
        self.loader.write(&[])?;
        self.end_if_complete()
    }

    pub(super) fn verbatim(&mut self, bytes: &[u8]) -> Result<(), ArrivalError> {
        if self.stream.ram_over || self.post.switched() {
            return Ok(self.loader.state(bytes)?);
        }
        if self.list.ended() {
            // State while pages still wait: QEMU's loaders read guest RAM, so it waits too.
            if self.stream.held.len() + bytes.len() > MAX_HELD {
                return Err(ArrivalError::Held);
            }
            self.stream.held.extend_from_slice(bytes);
            return Ok(());
        }
        Ok(self.loader.verbatim(bytes)?)
    }

    pub(super) fn end_if_complete(&mut self) -> Result<(), ArrivalError> {
        if self.stream.ram_over || !self.stream.listed || !self.list.complete() {
            return Ok(());
        }
        self.loader.end_ram();
        self.stream.ram_over = true;
        tracing::debug!("{}: RAM complete", self.spec.name);
        self.loader.write(&[])?;
        let held = std::mem::take(&mut self.stream.held);
        if held.is_empty() { Ok(()) } else { Ok(self.loader.state(&held)?) }
    }

    /// While contents keep coming from pushes and peers, a wait is likely to end by itself, and asking would carry the
    /// content over the core link twice: patience is [`PATIENCE_FACTOR`] times as long then.
    pub(super) fn patience(&self) -> Patience {
        let p = self.group.options.patience;
        let last = Nanos(self.group.counts.last_content.load(Ordering::Relaxed));
        let flowing = now() < last.plus_ms(p.running_ms);
        let factor = if flowing { PATIENCE_FACTOR } else { 1 };
        Patience { running_ms: p.running_ms.saturating_mul(factor), ..p }
    }

    /// Asks the source for what has waited long enough.
    pub(super) fn look(&mut self) {
        if self.driver.state() != TargetState::Filling || self.looked.elapsed() < LOOK {
            return;
        }
        self.looked = Instant::now();
        let needs = self.list.due(now(), self.patience());
        if !needs.is_empty() {
            let _ = back::say(&self.link.sender, Kind::Need, &encode_needs(&needs), &[]);
        }
        let awaited = u32::try_from(self.list.awaited()).unwrap_or(u32::MAX);
        if awaited != self.link.told {
            self.link.told = awaited;
            let _ = back::say(&self.link.sender, Kind::Waiting, &encode_number(awaited), &[]);
        }
        self.say_taken();
        let mut st = lock(&self.shared.status);
        st.stats = self.list.stats;
        st.waiting = self.list.waiting() as u64;
    }

    /// Tells the source what was taken in, and before that what of it could not be kept.
    pub(super) fn say_taken(&mut self) {
        if let Some(meta) = self.intake.take_unkept() {
            let _ = back::say(&self.link.sender, Kind::Unkept, &meta, &[]);
        }
        let taken = self.intake.taken;
        if taken != self.link.taken {
            self.link.taken = taken;
            let _ = back::say(&self.link.sender, Kind::Taken, &encode_number(taken), &[]);
        }
    }
}
