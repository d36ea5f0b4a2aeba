//! The source agent: the switch, then pages as they are asked for and filled.

use crate::guest::{Run_, SHARED, page};
use crate::world::{Ev, MS, SOURCE, World};
use irlm_user::core::handover::{SourceEvent, SourceHandover, SourceState, SourceStep};
use irlm_user::core::postcopy::{PageSet, Serve};
use irlm_user::core::units::{PageAddr, PageId};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::Word;
use irlm_user::core::wire::pages::PagesBuilder;
use irlm_user::core::wire::paging::{Demand, decode_set, encode_set};
use std::collections::{HashMap, VecDeque};

pub(crate) struct SourceAgent {
    pub(crate) h: SourceHandover,
    steps: VecDeque<SourceStep>,
    busy: bool,
    pub(crate) serve: Option<Serve>,
    lacks: Option<PageSet>,
    pub(crate) conn: Option<usize>,
    calling: bool,
    /// Contents sent since the target last said what it lacks.
    sent: HashMap<PageAddr, u32>,
}

impl SourceAgent {
    pub(crate) fn new(h: SourceHandover) -> Self {
        Self {
            h,
            steps: VecDeque::new(),
            busy: false,
            serve: None,
            lacks: None,
            conn: None,
            calling: false,
            sent: HashMap::new(),
        }
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
        self.source_event(SourceEvent::Switched);
        self.after(0, MS, Ev::Pump);
    }

    pub(crate) fn source_event(&mut self, e: SourceEvent) {
        let Some(s) = &mut self.s else { return };
        let steps = s.h.on(e);
        self.take_source_steps(steps);
    }

    pub(crate) fn take_source_steps(&mut self, steps: Vec<SourceStep>) {
        let life = self.s_life;
        let Some(s) = &mut self.s else { return };
        s.steps.extend(steps);
        if !s.steps.is_empty() && !std::mem::replace(&mut s.busy, true) {
            self.after(0, 2 * MS, Ev::SourceStep(life));
        }
    }

    /// One step; a crash may come before the next.
    pub(crate) fn source_step(&mut self, life: u32) {
        let Some(s) = self.s.as_mut().filter(|_| self.s_life == life) else { return };
        let Some(step) = s.steps.pop_front() else {
            s.busy = false;
            return;
        };
        if self.dies_between_steps() {
            return self.source_dies();
        }
        self.say(|| format!("source does {step:?}"));
        self.after(0, 2 * MS, Ev::SourceStep(life));
        match step {
            SourceStep::Write(state) => self.journal_s = Some(state),
            SourceStep::Say(word) => self.send(SOURCE, Kind::Word, word.encode(), vec![]),
            SourceStep::TakeBack => {
                assert!(!self.vm.ran, "rule 1: a VM that ran at its target is taken back");
                if self.journal_s == Some(SourceState::Aborted) && self.gave_up {
                    self.tally.given_back += 1;
                }
                if self.source_run != Run_::Dead {
                    self.source_run = Run_::Running;
                }
            }
            SourceStep::Call => {
                let s = self.s.as_mut().expect("just seen");
                if !std::mem::replace(&mut s.calling, true) {
                    self.after(10 * MS, 40 * MS, Ev::Call(life));
                }
            }
            SourceStep::Finish => {
                let s = self.s.as_ref().expect("just seen");
                if s.h.state() == SourceState::Done {
                    assert!(
                        self.whole || self.vm.run == Run_::Dead,
                        "the copy is dropped before the target is whole"
                    );
                    self.source_run = Run_::Dead;
                }
            }
            SourceStep::LetComplete => panic!("a VM of this front has nothing to complete"),
        }
        if self.journal_s == Some(SourceState::Serving) {
            self.gave_up = true;
        }
    }

    /// Calls the target until it answers.
    pub(crate) fn call(&mut self, life: u32) {
        let Some(s) = self.s.as_mut().filter(|_| self.s_life == life) else { return };
        if s.h.settled() {
            s.calling = false;
            return;
        }
        self.tally.doubts += u64::from(s.h.in_doubt());
        if s.conn.is_none() && self.link_up && self.t.is_some() {
            self.connect();
        }
        self.after(30 * MS, 80 * MS, Ev::Call(life));
    }

    pub(crate) fn source_hears(&mut self, kind: Kind, meta: &[u8]) {
        match kind {
            Kind::Word => self.source_event(SourceEvent::Word(Word::decode(meta).expect("a word"))),
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
        let there = (!self.memory_lost).then_some(true);
        let (h, steps) = SourceHandover::recover(state, there);
        self.s = Some(SourceAgent::new(h));
        self.take_source_steps(steps);
    }
}
