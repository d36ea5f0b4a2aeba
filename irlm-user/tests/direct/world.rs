//! The world of two model QEMUs and two agents, and one schedule of what may go wrong in it. The tests draw schedules; the
//! fuzz target `handover` reads them from its input.

use super::rng::Rng;
use irlm_user::core::handover::arrival::{
    Action as TargetAction, Arrival, Input as TargetInput, Outcome as TargetOutcome,
};
use irlm_user::core::handover::departure::{
    Action as SourceAction, Departure, Input as SourceInput, Outcome as SourceOutcome,
};
use irlm_user::core::handover::{GuestState, Ran, SourceState, Standing, TargetState, Took};
use irlm_user::core::ram::{Block, Ram, Stripes, Sums};
use irlm_user::core::units::Nanos;
use irlm_user::core::wire::messages::Word;
use std::collections::VecDeque;

/// The source's QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// Streams; its guest runs.
    Active,
    /// Has stopped the guest and waits for leave.
    Waits,
    /// Sends the last pages and the state, then waits for SHUT.
    Device,
    Completed,
    /// The migration is over without success; the guest runs on.
    Runs,
    Dead,
}

/// The target's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Incoming,
    Loaded,
    Runs,
    Gone,
}

/// What comes of comparing the memory of the stopped VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Memory {
    /// Nobody asked.
    Unasked,
    Same,
    /// What the target has loaded is another one.
    Other,
    /// The source's cannot be read.
    Unread,
}

/// A memory of one page that holds something.
fn memory(mark: u128) -> Ram {
    let mut sums = Stripes::default();
    sums[0] = Sums { marks: mark, placed: mark };
    Ram { blocks: vec![Block { name: "m0".to_owned(), pages: 1, sums }], ..Ram::default() }
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The QEMUs' connection breaks.
    Stream,
    /// Nothing passes any more.
    Link,
    /// The agents' connection breaks.
    Words,
    /// An agent dies, or is started again.
    SourceAgent,
    TargetAgent,
    SourceQemu,
    TargetQemu,
    /// Somebody cancels.
    Cancel,
}

/// How often something happened.
#[derive(Default, Debug)]
pub(crate) struct Tally {
    pub(crate) moved: u64,
    pub(crate) stayed: u64,
    pub(crate) lost: u64,
    pub(crate) early: u64,
    pub(crate) resumed_after_waiting: u64,
    pub(crate) recovered: u64,
    pub(crate) failed: u64,
}

fn direct() -> Arrival {
    let mut a = Arrival::new();
    a.goes_direct();
    a
}

pub(crate) struct World {
    rng: Rng,
    source: Source,
    target: Target,
    /// The QEMUs' connection holds; SHUT is on its way back.
    stream: bool,
    shut: bool,
    /// The guest ran at its source after it had been stopped there.
    left_behind: bool,
    s: Option<Departure>,
    t: Option<Arrival>,
    journal: (SourceState, TargetState),
    settled: bool,
    now: u64,
    /// What the agents have not heard yet.
    heard: (VecDeque<SourceInput>, VecDeque<TargetInput>),
    words: (VecDeque<Word>, VecDeque<Word>),
    connected: bool,
    net: bool,
    narrate: bool,
    /// The target's QEMU has been told to run it.
    told: bool,
    /// One action in so many fails; 0: none.
    failing: u64,
    faults: u32,
    killed: (bool, bool),
    memory: Memory,
    /// The source's agent reads it.
    reading: bool,
    /// The agent that asked has died, and whoever came after it compares nothing.
    forgotten: bool,
    tally: Tally,
}

impl World {
    pub(crate) fn new(seed: u64, faults: u32) -> Self {
        let failing = if faults > 0 { [0, 5, 20][seed as usize % 3] } else { 0 };
        let mut world = Self::with(Rng::new(seed), faults, failing);
        let all = [Memory::Unasked, Memory::Same, Memory::Other, Memory::Unread];
        world.memory = all[(seed / 3) as usize % if faults > 0 { 4 } else { 2 }];
        if let (Some(s), true) = (&mut world.s, world.memory != Memory::Unasked) {
            s.compares_memory();
        }
        world
    }

    /// One action in `failing` fails; 0: none.
    pub(crate) fn with(rng: Rng, faults: u32, failing: u64) -> Self {
        Self {
            rng,
            source: Source::Active,
            target: Target::Incoming,
            stream: true,
            shut: false,
            left_behind: false,
            s: Some(Departure::new()),
            t: Some(direct()),
            journal: (SourceState::Streaming, TargetState::Filling),
            settled: false,
            now: 0,
            narrate: number("IRLM_SIM_STORY", 0) == 1,
            told: false,
            failing,
            heard: Default::default(),
            words: Default::default(),
            connected: true,
            net: true,
            faults,
            killed: (false, false),
            memory: Memory::Unasked,
            reading: false,
            forgotten: false,
            tally: Tally::default(),
        }
    }

    fn check(&self, what: &str) {
        let here = matches!(self.source, Source::Active | Source::Runs);
        assert!(!(here && self.target == Target::Runs), "two copies run after {what}");
    }

    fn resumes(&mut self) {
        self.left_behind |= self.source != Source::Active;
        self.tally.resumed_after_waiting += u64::from(self.source == Source::Waits);
        self.source = Source::Runs;
        self.stream = false;
    }

    fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            self.words.0.clear();
            self.words.1.clear();
            if self.s.is_some() {
                self.heard.0.push_back(SourceInput::Lost("cut".into()));
            }
            if self.t.is_some() {
                self.heard.1.push_back(TargetInput::Lost);
            }
        }
    }

    /// Whether the next action is not done, or is done and nobody says so.
    fn fails(&mut self) -> (bool, bool) {
        if self.failing == 0 || !self.rng.one_in(self.failing) {
            return (false, false);
        }
        self.tally.failed += 1;
        let undone = self.rng.one_in(2);
        (undone, !undone)
    }

    fn source_step(&mut self) -> bool {
        let now = Nanos(self.now);
        let Some(action) = self.s.as_mut().and_then(|s| s.poll(now)) else { return false };
        self.story(|| format!("source does {action:?}"));
        let outcome = self.source_does(action);
        self.story(|| format!("  which comes to {outcome:?}; {:?}", self.source));
        // It may die before it hears.
        if let Some(s) = &mut self.s {
            s.done(outcome, now);
        }
        true
    }

    fn source_does(&mut self, action: SourceAction) -> SourceOutcome {
        let (undone, unheard) = match action {
            SourceAction::Finish | SourceAction::Call => (false, false),
            _ => self.fails(),
        };
        let failed = || SourceOutcome::Failed("it failed".into());
        if undone {
            if matches!(action, SourceAction::Say(_)) {
                self.disconnect();
            }
            return failed();
        }
        let outcome = match action {
            SourceAction::Write(state, _) => {
                self.journal.0 = state;
                SourceOutcome::Done
            }
            SourceAction::LetComplete => {
                if self.source == Source::Waits {
                    self.source = Source::Device;
                }
                SourceOutcome::Stands(self.standing())
            }
            SourceAction::Ask => SourceOutcome::Stands(self.standing()),
            SourceAction::TakeBack(_) => {
                if self.source != Source::Dead && self.source != Source::Runs {
                    self.resumes();
                }
                SourceOutcome::Took(match self.source {
                    Source::Dead => Took::Gone,
                    _ => Took::Stands(GuestState::Running),
                })
            }
            SourceAction::Say(w) => {
                if self.connected {
                    self.words.0.push_back(w);
                }
                SourceOutcome::Done
            }
            SourceAction::Call => {
                if self.net && !self.connected && self.s.is_some() && self.t.is_some() {
                    self.connected = true;
                    self.heard.0.push_back(SourceInput::Connected);
                }
                SourceOutcome::Done
            }
            SourceAction::Serve => panic!("nothing here runs before its pages came"),
            SourceAction::Finish => SourceOutcome::Done,
        };
        if unheard { failed() } else { outcome }
    }

    fn standing(&self) -> Standing {
        match self.source {
            Source::Active | Source::Device => Standing::UnderWay,
            Source::Waits => Standing::Waits,
            Source::Completed => Standing::Completed,
            Source::Runs => Standing::Back(GuestState::Running),
            Source::Dead => Standing::Gone,
        }
    }

    fn target_step(&mut self) -> bool {
        let now = Nanos(self.now);
        let Some(action) = self.t.as_mut().and_then(|t| t.poll(now)) else { return false };
        self.story(|| format!("target does {action:?}"));
        let outcome = self.target_does(action);
        self.story(|| format!("  which comes to {outcome:?}; {:?}", self.target));
        if let Some(t) = &mut self.t {
            t.done(outcome, now);
        }
        true
    }

    fn target_does(&mut self, action: TargetAction) -> TargetOutcome {
        let (undone, unheard) = match action {
            TargetAction::Finish | TargetAction::EndStream => (false, false),
            _ => self.fails(),
        };
        let failed = || TargetOutcome::Failed("it failed".into());
        if undone {
            if matches!(action, TargetAction::Say(_)) {
                self.disconnect();
            }
            return failed();
        }
        let outcome = match action {
            TargetAction::Write(state, _) => {
                self.journal.1 = state;
                TargetOutcome::Done
            }
            TargetAction::Say(w) => {
                if self.connected {
                    self.words.1.push_back(w);
                }
                TargetOutcome::Done
            }
            TargetAction::Look => TargetOutcome::Looked(match self.target {
                Target::Gone => None,
                t => Some(t != Target::Incoming),
            }),
            TargetAction::Run(_) => {
                let told = std::mem::replace(&mut self.told, true);
                TargetOutcome::Ran(match self.target {
                    Target::Loaded => {
                        assert!(!self.left_behind, "a copy runs that the source's guest has left behind");
                        let known = self.memory != Memory::Other || self.forgotten || self.killed.0;
                        assert!(known, "a copy runs that is not what its source held");
                        self.target = Target::Runs;
                        Ran::Runs
                    }
                    Target::Runs => Ran::Runs,
                    Target::Incoming => Ran::Refused("it is not loaded".into()),
                    Target::Gone => Ran::Gone { told },
                })
            }
            TargetAction::Settle => {
                self.settled = true;
                TargetOutcome::Done
            }
            // Nothing of it is in this agent's hands.
            TargetAction::EndStream => {
                self.tally.early += 1;
                TargetOutcome::Done
            }
            TargetAction::Discard => {
                assert!(self.target != Target::Runs, "a running copy is thrown away");
                (self.target, self.stream) = (Target::Gone, false);
                TargetOutcome::Done
            }
            TargetAction::Finish => TargetOutcome::Done,
        };
        if unheard { failed() } else { outcome }
    }

    fn source_hears(&mut self) -> bool {
        let event = match (self.heard.0.pop_front(), self.words.1.pop_front()) {
            (Some(e), w) => {
                w.into_iter().for_each(|w| self.words.1.push_front(w));
                e
            }
            (None, Some(w)) => SourceInput::Word(w),
            (None, None) => return false,
        };
        let Some(h) = &mut self.s else { return false };
        h.handle(event, Nanos(self.now));
        if !h.odd().is_empty() {
            h.handle(SourceInput::Clocks(Vec::new()), Nanos(self.now));
        }
        true
    }

    fn target_hears(&mut self) -> bool {
        let Some(h) = &mut self.t else { return false };
        // What its QEMU says may come later than what the source does.
        let later = !self.words.0.is_empty() && self.rng.one_in(3);
        let event = match if later { None } else { self.heard.1.pop_front() } {
            Some(e) => e,
            None => match self.words.0.pop_front() {
                Some(w) => TargetInput::Word(w),
                None => return false,
            },
        };
        h.handle(event, Nanos(self.now));
        true
    }

    fn say(&mut self, event: SourceInput) {
        if self.s.is_some() {
            self.heard.0.push_back(event);
        }
    }

    /// One thing that the QEMUs do by themselves, or whoever reads their memory.
    fn qemus(&mut self) -> bool {
        if self.reading && self.rng.one_in(3) {
            self.reading = false;
            self.say(match (self.memory, self.source) {
                (Memory::Unread, _) | (_, Source::Dead) => SourceInput::NoMemory("it cannot be read".into()),
                _ => SourceInput::Memory(memory(5)),
            });
            return true;
        }
        match self.source {
            Source::Active if self.stream => {
                self.source = Source::Waits;
                self.say(SourceInput::Stopped);
                self.say(SourceInput::Source(Standing::Waits));
                self.reading = self.s.is_some() && self.memory != Memory::Unasked;
            }
            // One that waits notices nothing.
            Source::Device if self.shut && (self.stream || self.rng.one_in(2)) => {
                self.source = Source::Completed;
                self.say(SourceInput::Source(Standing::Completed));
            }
            Source::Active | Source::Device if !self.stream => {
                self.resumes();
                self.say(SourceInput::Source(Standing::Back(GuestState::Running)));
            }
            Source::Device if !self.shut && self.target == Target::Incoming => {
                (self.target, self.shut) = (Target::Loaded, true);
                if self.t.is_some() {
                    if self.memory != Memory::Unasked {
                        let mark = if self.memory == Memory::Other { 7 } else { 5 };
                        self.heard.1.push_back(TargetInput::Memory(memory(mark)));
                    }
                    self.heard.1.push_back(TargetInput::Loaded(None));
                }
            }
            _ => {
                if self.target == Target::Incoming && !self.stream {
                    self.target = Target::Gone;
                    self.heard.1.extend(self.t.is_some().then(|| TargetInput::Failed("broken".into())));
                    return true;
                }
                return false;
            }
        }
        true
    }

    fn start_source(&mut self) {
        self.tally.recovered += 1;
        self.s = Some(Departure::recover(self.journal.0, GuestState::Running, Nanos(self.now)));
    }

    fn start_target(&mut self) {
        self.tally.recovered += 1;
        self.t = Some(Arrival::recover(self.journal.1, GuestState::Running, self.settled));
        if self.target == Target::Gone {
            self.heard.1.push_back(TargetInput::Failed("gone".into()));
        }
    }

    /// `IRLM_SIM_STORY=1` with `IRLM_SIM_SEED` and `IRLM_SIM_RUNS=1`: what happens, as it happens.
    fn story(&self, what: impl FnOnce() -> String) {
        if self.narrate {
            println!("{:6} ms  {}", self.now / 1_000_000, what());
        }
    }

    fn fault(&mut self) {
        let all =
            [Fault::Stream, Fault::Link, Fault::Words, Fault::SourceAgent, Fault::TargetAgent, Fault::Cancel];
        let rare = [Fault::SourceQemu, Fault::TargetQemu];
        let fault = if self.rng.one_in(16) { *self.rng.pick(&rare) } else { *self.rng.pick(&all) };
        self.story(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::Stream => self.stream = false,
            Fault::Link => {
                (self.net, self.stream) = (false, false);
                self.disconnect();
            }
            Fault::Words => self.disconnect(),
            Fault::SourceAgent => match self.s.take() {
                Some(_) => {
                    (self.forgotten, self.reading) = (true, false);
                    self.heard.0.clear();
                    self.disconnect();
                }
                None => self.start_source(),
            },
            Fault::TargetAgent => match self.t.take() {
                Some(_) => {
                    self.heard.1.clear();
                    self.disconnect();
                }
                None => self.start_target(),
            },
            Fault::SourceQemu => {
                self.killed.0 = true;
                (self.source, self.stream) = (Source::Dead, false);
                self.say(SourceInput::Source(Standing::Gone));
            }
            Fault::TargetQemu => {
                self.killed.1 = true;
                let loading = self.target == Target::Incoming;
                (self.target, self.stream) = (Target::Gone, false);
                // One that dies later is found when it is to run.
                if loading && self.t.is_some() {
                    self.heard.1.push_back(TargetInput::Failed("died".into()));
                }
            }
            Fault::Cancel => self.say(SourceInput::Abort("cancelled".into())),
        }
    }

    fn go(&mut self) -> bool {
        self.now += 10_000_000;
        let begun = self.rng.index(6);
        for n in 0..6 {
            let did = match (begun + n) % 6 {
                0 => self.source_step(),
                1 => self.target_step(),
                2 => self.source_hears(),
                3 => self.target_hears(),
                4 => self.qemus(),
                _ => false,
            };
            if did {
                return true;
            }
        }
        // Nothing happens before one of the drivers tries again.
        let wakes = [self.s.as_ref().and_then(Departure::wake), self.t.as_ref().and_then(Arrival::wake)];
        let next = wakes.into_iter().flatten().map(|at| at.0).min();
        next.is_some_and(|at| {
            self.now = self.now.max(at);
            true
        })
    }

    /// The whole schedule; a rule that is broken panics.
    pub(crate) fn run(mut self) -> Tally {
        for n in 0..self.rng.range(200, 400) {
            if self.faults > 0 && self.rng.one_in(8) {
                self.faults -= 1;
                self.fault();
            }
            self.go();
            self.check(&format!("step {n}"));
        }
        // Whoever died is back, and the link too. From here on actions fail now and then, and not by choice for ever.
        self.net = true;
        self.rng.draw();
        if self.s.is_none() {
            self.start_source();
        }
        if self.t.is_none() {
            self.start_target();
        }
        let mut left = 1000;
        while self.go() {
            self.check("all is back");
            left -= 1;
            assert!(left > 0, "it never ends");
        }
        let here = matches!(self.source, Source::Active | Source::Runs);
        let there = self.target == Target::Runs;
        if !here && !there {
            assert!(
                self.killed.0 || self.killed.1,
                "no copy runs: source {:?}, target {:?}, journal {:?}",
                self.source,
                self.target,
                self.journal
            );
            // A loaded copy that is not behind is never let go because the other QEMU died.
            assert!(
                self.killed.1
                    || self.target != Target::Loaded
                    || self.left_behind
                    || self.memory == Memory::Other
                    // It may have run on before it ended, unseen or while it was taken back: an operator's.
                    || self.s.as_ref().is_some_and(Departure::behind),
                "the last copy stays paused: journal {:?}",
                self.journal
            );
        }
        self.tally.moved += u64::from(there);
        self.tally.stayed += u64::from(here);
        self.tally.lost += u64::from(!here && !there);
        self.tally
    }
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}
