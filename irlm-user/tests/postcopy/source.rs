//! The source agent: the switch, then pages as they are asked for and filled.

use crate::guest::{Run_, SHARED, page};
use crate::world::{Ev, MS, SOURCE, World};
use irlm_user::core::handover::departure::{Action, Departure, Input, Outcome};
use irlm_user::core::handover::{GuestState, SourceState, Standing, Took};
use irlm_user::core::postcopy::{PageSet, Serve};
use irlm_user::core::units::{Nanos, PageAddr, PageId};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::Word;
use irlm_user::core::wire::pages::PagesBuilder;
use irlm_user::core::wire::paging::{Demand, decode_set, encode_set};
use std::collections::HashMap;

pub(crate) struct SourceAgent {
    pub(crate) h: Departure,
    busy: bool,
    pub(crate) serve: Option<Serve>,
    lacks: Option<PageSet>,
    pub(crate) conn: Option<usize>,
    /// Contents sent since the target last said what it lacks.
    sent: HashMap<PageAddr, u32>,
}

impl SourceAgent {
    pub(crate) fn new(h: Departure) -> Self {
        Self { h, busy: false, serve: None, lacks: None, conn: None, sent: HashMap::new() }
    }
}

impl World {
    /// The VM is stopped: which pages are still to come, and its state.
    pub(crate) fn switch(&mut self) {
        self.source_run = Run_::Paused;
        for meta in encode_set(&self.due.clone()) {
            self.send(SOURCE, Kind::Switch, meta, vec![]);
        }
        self.send(SOURCE, Kind::Verbatim, vec![], b"state".to_vec());
        let due = self.due.clone();
        if let Some(s) = &mut self.s {
            s.serve = Some(Serve::new(due));
        }
        self.source_event(Input::Stopped);
        self.source_event(Input::Switched);
        self.after(0, MS, Ev::Pump);
    }

    pub(crate) fn source_event(&mut self, e: Input) {
        let now = Nanos(self.now);
        let Some(s) = &mut self.s else { return };
        s.h.handle(e, now);
        self.drive_source();
    }

    /// The departure is looked at soon.
    pub(crate) fn drive_source(&mut self) {
        let life = self.s_life;
        let Some(s) = &mut self.s else { return };
        if !std::mem::replace(&mut s.busy, true) {
            self.after(0, 2 * MS, Ev::SourceStep(life));
        }
    }

    /// One action; a crash may come before it, and after it and before its driver hears of it.
    pub(crate) fn source_step(&mut self, life: u32) {
        let now = Nanos(self.now);
        let Some(s) = self.s.as_mut().filter(|_| self.s_life == life) else { return };
        s.busy = false;
        let Some(action) = s.h.poll(now) else {
            if let Some(at) = s.h.wake() {
                self.after_ns(at.0.saturating_sub(self.now).max(1), Ev::SourceStep(life));
            }
            return;
        };
        if self.dies_between_steps() {
            return self.source_dies();
        }
        self.say(|| format!("source does {action:?}"));
        let outcome = self.source_does(action);
        if self.journal_s == Some(SourceState::Serving) {
            self.gave_up = true;
        }
        if self.dies_between_steps() {
            return self.source_dies();
        }
        if let Some(s) = &mut self.s {
            s.h.done(outcome, now);
        }
        self.drive_source();
    }

    fn source_does(&mut self, action: Action) -> Outcome {
        let (undone, unheard) = match action {
            Action::Finish | Action::Serve | Action::Call => (false, false),
            _ => self.fails(),
        };
        let failed = || Outcome::Failed("it failed".into());
        if undone {
            if matches!(action, Action::Say(_)) {
                self.cut();
            }
            if matches!(action, Action::Write(..)) && self.rng.one_in(2) {
                return Outcome::NotWritten("the disk is full".into());
            }
            return failed();
        }
        let outcome = match action {
            Action::Write(state, _) => {
                self.journal_s = Some(state);
                Outcome::Done
            }
            Action::Say(word) => {
                self.send(SOURCE, Kind::Word, word.encode(), vec![]);
                Outcome::Done
            }
            Action::TakeBack(_) => {
                assert!(!self.vm.ran, "rule 1: a VM that ran at its target is taken back");
                if self.gave_up {
                    self.tally.given_back += 1;
                }
                if self.source_run == Run_::Dead {
                    Outcome::Took(Took::Gone)
                } else {
                    self.source_run = Run_::Running;
                    Outcome::Took(Took::Stands(GuestState::Running))
                }
            }
            Action::Serve if self.memory_lost => failed(),
            Action::Serve => Outcome::Done,
            Action::Ask if self.memory_lost => Outcome::Stands(Standing::Gone),
            Action::Ask => Outcome::Stands(Standing::Completed),
            Action::Call => {
                self.call();
                Outcome::Done
            }
            Action::Finish => {
                let s = self.s.as_ref().expect("it acts");
                if s.h.state() == SourceState::Done {
                    assert!(
                        self.whole || self.vm.run == Run_::Dead,
                        "the copy is dropped before the target is whole"
                    );
                    self.source_run = Run_::Dead;
                }
                Outcome::Done
            }
            Action::LetComplete => panic!("a VM of this front has nothing to complete"),
        };
        if unheard { failed() } else { outcome }
    }

    /// Calls the target.
    fn call(&mut self) {
        let Some(s) = &mut self.s else { return };
        self.tally.doubts += u64::from(s.h.in_doubt());
        if s.conn.is_none() && self.link_up && self.t.is_some() {
            self.connect();
        }
    }

    pub(crate) fn source_hears(&mut self, kind: Kind, meta: &[u8]) {
        match kind {
            Kind::Word => self.source_event(Input::Word(Word::decode(meta).expect("a word"))),
            Kind::Demand => {
                let demand = Demand::decode(meta).expect("a demand");
                if let Some(serve) = self.s.as_mut().and_then(|s| s.serve.as_mut()) {
                    serve.demand(&demand).expect("pages that exist");
                }
            }
            Kind::Lacks => {
                let none = PageSet::empty(&self.sizes);
                let Some(s) = &mut self.s else { return };
                let last = decode_set(kind, meta, s.lacks.get_or_insert(none)).expect("a set");
                if last && let Some(lacks) = s.lacks.take() {
                    s.sent.clear();
                    match &mut s.serve {
                        Some(serve) => serve.resume(lacks),
                        None => s.serve = Some(Serve::new(lacks)),
                    }
                }
            }
            kind => panic!("the source hears {kind:?}"),
        }
    }

    /// Sends a few pages, those asked for first.
    pub(crate) fn pump(&mut self) {
        self.after(MS / 4, 2 * MS, Ev::Pump);
        if self.memory_lost || !self.s.as_ref().is_some_and(|s| s.h.serving() && s.conn.is_some()) {
            return;
        }
        let Some(s) = &mut self.s else { return };
        let Some(serve) = &mut s.serve else { return };
        let (mut frame, mut body) = (PagesBuilder::default(), Vec::new());
        let mut filling = Vec::new();
        for _ in 0..4 {
            let Some((addr, _)) = serve.next_wanted() else { break };
            let n = self.source_memory.get(&addr).copied().unwrap_or(0);
            let times = s.sent.entry(addr).or_default();
            *times += 1;
            assert_eq!(*times, 1, "{addr:?} leaves twice");
            if n == 0 {
                frame.uniform(addr, 0);
            } else {
                frame.unique(addr, None);
                body.extend_from_slice(&page(n));
            }
        }
        if frame.is_empty() {
            serve.fill(self.rng.range(1, 6) as usize, &mut filling);
        }
        for addr in filling {
            let n = self.source_memory.get(&addr).copied().unwrap_or(0);
            if n < 2 {
                frame.uniform(addr, n as u8);
            } else if n < SHARED {
                serve.left_by_name(addr);
                frame.remote(addr, PageId { bucket: 0, index: n }, &self.hasher.page(&page(n)));
                continue;
            } else {
                frame.unique(addr, None);
                body.extend_from_slice(&page(n));
            }
            let times = s.sent.entry(addr).or_default();
            *times += 1;
            assert_eq!(*times, 1, "{addr:?} leaves twice");
        }
        if !frame.is_empty() {
            let meta = frame.meta().to_vec();
            self.send(SOURCE, Kind::Pages, meta, body);
        }
    }

    pub(crate) fn source_dies(&mut self) {
        if self.s.take().is_some() {
            self.say(|| "the source agent dies".into());
            self.s_life += 1;
            self.cut();
            self.tally.restarts += 1;
            self.after(50 * MS, 400 * MS, Ev::SourceBack);
        }
    }

    pub(crate) fn source_back(&mut self) {
        let Some(state) = self.journal_s else { return };
        self.say(|| format!("the source agent is back in {state:?}"));
        let h = Departure::recover(state, GuestState::Running, Nanos(self.now));
        self.s = Some(SourceAgent::new(h));
        self.drive_source();
    }
}
