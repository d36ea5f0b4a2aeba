//! The handover of a VM whose QEMUs stream to each other (decision 0014): the two real state machines, two model QEMUs, and
//! whatever may go wrong between any two steps. Never do two copies run, never does a copy run that the source's guest has left
//! behind, and when all that died is back there is one that runs, unless a QEMU died with the only one.
//!
//! `IRLM_SIM_RUNS` sets the schedules, `IRLM_SIM_SEED` the first seed.

#[path = "sim/rng.rs"]
mod rng;

use irlm_user::core::handover::{
    SourceEvent, SourceHandover, SourceState, SourceStep, TargetEvent, TargetHandover, TargetState,
    TargetStep,
};
use irlm_user::core::wire::messages::Word;
use rng::Rng;
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

#[derive(Default, Debug)]
struct Tally {
    moved: u64,
    stayed: u64,
    lost: u64,
    early: u64,
    resumed_after_waiting: u64,
    recovered: u64,
}

struct World {
    rng: Rng,
    source: Source,
    target: Target,
    /// The QEMUs' connection holds; SHUT is on its way back.
    stream: bool,
    shut: bool,
    /// The guest ran at its source after it had been stopped there.
    left_behind: bool,
    s: Option<SourceHandover>,
    t: Option<TargetHandover>,
    journal: (SourceState, TargetState),
    todo: (VecDeque<SourceStep>, VecDeque<TargetStep>),
    /// What the agents have not heard yet.
    heard: (VecDeque<SourceEvent>, VecDeque<TargetEvent>),
    words: (VecDeque<Word>, VecDeque<Word>),
    connected: bool,
    net: bool,
    calling: bool,
    faults: u32,
    killed: (bool, bool),
    /// The source's QEMU let its guest run on and died, and no agent was there to see it: nobody can know any more that the
    /// target's copy is behind. The same may happen with an agent in the path.
    unseen: bool,
    tally: Tally,
}

impl World {
    fn new(seed: u64, faults: u32) -> Self {
        Self {
            rng: Rng::new(seed),
            source: Source::Active,
            target: Target::Incoming,
            stream: true,
            shut: false,
            left_behind: false,
            s: Some(SourceHandover::new()),
            t: Some(TargetHandover::new()),
            journal: (SourceState::Streaming, TargetState::Filling),
            todo: Default::default(),
            heard: Default::default(),
            words: Default::default(),
            connected: true,
            net: true,
            calling: false,
            faults,
            killed: (false, false),
            unseen: false,
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
                self.heard.0.push_back(SourceEvent::Lost);
            }
            if self.t.is_some() {
                self.heard.1.push_back(TargetEvent::Lost);
            }
        }
    }

    fn source_step(&mut self) -> bool {
        let Some(step) = self.todo.0.pop_front() else { return false };
        match step {
            SourceStep::Write(state) => self.journal.0 = state,
            SourceStep::LetComplete => {
                if self.source == Source::Waits {
                    self.source = Source::Device;
                }
            }
            SourceStep::TakeBack => {
                if self.source != Source::Dead && self.source != Source::Runs {
                    self.resumes();
                }
            }
            SourceStep::Say(w) => {
                if self.connected {
                    self.words.0.push_back(w);
                }
            }
            SourceStep::Call => self.calling = true,
            SourceStep::Finish => {}
        }
        true
    }

    fn target_step(&mut self) -> bool {
        let Some(step) = self.todo.1.pop_front() else { return false };
        match step {
            TargetStep::Write(state) => self.journal.1 = state,
            TargetStep::Say(w) => {
                if self.connected {
                    self.words.1.push_back(w);
                }
            }
            TargetStep::Run => match self.target {
                Target::Loaded => {
                    assert!(
                        !self.left_behind || self.unseen,
                        "a copy runs that the source's guest has left behind"
                    );
                    self.target = Target::Runs;
                }
                Target::Runs => {}
                _ => {
                    self.todo.1.clear();
                    self.heard.1.push_front(TargetEvent::NeverRan);
                }
            },
            // Nothing of it is in this agent's hands.
            TargetStep::EndStream => self.tally.early += 1,
            TargetStep::Discard => {
                assert!(self.target != Target::Runs, "a running copy is thrown away");
                self.target = Target::Gone;
                self.stream = false;
            }
            TargetStep::Finish => {}
        }
        true
    }

    fn source_hears(&mut self) -> bool {
        let event = match (self.heard.0.pop_front(), self.words.1.pop_front()) {
            (Some(e), w) => {
                w.into_iter().for_each(|w| self.words.1.push_front(w));
                e
            }
            (None, Some(w)) => SourceEvent::Word(w),
            (None, None) => return false,
        };
        let Some(h) = &mut self.s else { return false };
        self.todo.0 = h.on(event).into();
        true
    }

    fn target_hears(&mut self) -> bool {
        let Some(h) = &mut self.t else { return false };
        // What its QEMU says may come later than what the source does.
        let later = !self.words.0.is_empty() && self.rng.one_in(3);
        let event = match if later { None } else { self.heard.1.pop_front() } {
            Some(e) => e,
            None => match self.words.0.pop_front() {
                // It is looked at before it becomes the VM.
                Some(Word::GivenUp) if h.state() == TargetState::Loaded && self.target == Target::Gone => {
                    self.words.0.push_front(Word::GivenUp);
                    TargetEvent::QemuFailed("gone".into())
                }
                Some(w) => TargetEvent::Word(w),
                None => return false,
            },
        };
        self.todo.1 = h.on(event).into();
        true
    }

    fn say(&mut self, event: SourceEvent) {
        if self.s.is_some() {
            self.heard.0.push_back(event);
        }
    }

    /// One thing that the QEMUs do by themselves.
    fn qemus(&mut self) -> bool {
        match self.source {
            Source::Active if self.stream => {
                self.source = Source::Waits;
                self.say(SourceEvent::QemuWaits);
            }
            // One that waits notices nothing.
            Source::Device if self.shut && (self.stream || self.rng.one_in(2)) => {
                self.source = Source::Completed;
                self.say(SourceEvent::QemuCompleted);
            }
            Source::Active | Source::Device if !self.stream => {
                self.resumes();
                self.say(SourceEvent::QemuRuns);
            }
            Source::Device if !self.shut && self.target == Target::Incoming => {
                (self.target, self.shut) = (Target::Loaded, true);
                if self.t.is_some() {
                    self.heard.1.push_back(TargetEvent::QemuLoaded);
                }
            }
            _ => {
                if self.target == Target::Incoming && !self.stream {
                    self.target = Target::Gone;
                    self.heard.1.extend(self.t.is_some().then(|| TargetEvent::QemuFailed("broken".into())));
                    return true;
                }
                return false;
            }
        }
        true
    }

    fn reconnect(&mut self) -> bool {
        if !(self.calling && self.net && !self.connected && self.s.is_some() && self.t.is_some()) {
            return false;
        }
        (self.connected, self.calling) = (true, false);
        self.heard.0.push_back(SourceEvent::Reconnected);
        true
    }

    fn start_source(&mut self) {
        self.tally.recovered += 1;
        let completed = (self.source != Source::Dead).then_some(self.source == Source::Completed);
        let (h, steps) = SourceHandover::recover(self.journal.0, completed);
        (self.s, self.todo.0) = (Some(h), steps.into());
    }

    fn start_target(&mut self) {
        self.tally.recovered += 1;
        let (h, steps) = TargetHandover::recover(self.journal.1);
        (self.t, self.todo.1) = (Some(h), steps.into());
    }

    fn fault(&mut self) {
        let all =
            [Fault::Stream, Fault::Link, Fault::Words, Fault::SourceAgent, Fault::TargetAgent, Fault::Cancel];
        let rare = [Fault::SourceQemu, Fault::TargetQemu];
        let fault = if self.rng.one_in(16) { *self.rng.pick(&rare) } else { *self.rng.pick(&all) };
        match fault {
            Fault::Stream => self.stream = false,
            Fault::Link => {
                (self.net, self.stream) = (false, false);
                self.disconnect();
            }
            Fault::Words => self.disconnect(),
            Fault::SourceAgent => match self.s.take() {
                Some(_) => {
                    self.todo.0.clear();
                    self.heard.0.clear();
                    self.calling = false;
                    self.disconnect();
                }
                None => self.start_source(),
            },
            Fault::TargetAgent => match self.t.take() {
                Some(_) => {
                    self.todo.1.clear();
                    self.heard.1.clear();
                    self.disconnect();
                }
                None => self.start_target(),
            },
            Fault::SourceQemu => {
                self.killed.0 = true;
                self.unseen |= self.left_behind && self.s.is_none();
                (self.source, self.stream) = (Source::Dead, false);
                self.say(SourceEvent::QemuDied);
            }
            Fault::TargetQemu => {
                self.killed.1 = true;
                let loading = self.target == Target::Incoming;
                (self.target, self.stream) = (Target::Gone, false);
                // One that dies later is found when it is to run.
                if loading && self.t.is_some() {
                    self.heard.1.push_back(TargetEvent::QemuFailed("died".into()));
                }
            }
            Fault::Cancel => self.say(SourceEvent::Abort("cancelled".into())),
        }
    }

    fn go(&mut self) -> bool {
        // An agent takes the next thing in when it is done with the last.
        let begun = self.rng.index(6);
        for n in 0..6 {
            let did = match (begun + n) % 6 {
                0 => self.source_step(),
                1 => self.target_step(),
                2 => self.todo.0.is_empty() && self.source_hears(),
                3 => self.todo.1.is_empty() && self.target_hears(),
                4 => self.qemus(),
                _ => self.reconnect(),
            };
            if did {
                return true;
            }
        }
        false
    }

    fn run(mut self) -> Tally {
        for n in 0..self.rng.range(200, 400) {
            if self.faults > 0 && self.rng.one_in(8) {
                self.faults -= 1;
                self.fault();
            }
            self.go();
            self.check(&format!("step {n}"));
        }
        // Whoever died is back, and the link too.
        self.net = true;
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
                self.killed.1 || self.target != Target::Loaded || self.left_behind,
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

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn schedules(runs: u64, faults: u32) -> Tally {
    let mut sum = Tally::default();
    let first = number("IRLM_SIM_SEED", 1);
    for seed in first..first + number("IRLM_SIM_RUNS", runs) {
        let world = World::new(seed, faults);
        let t = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run())).unwrap_or_else(|e| {
            eprintln!("schedule {seed} with {faults} faults");
            std::panic::resume_unwind(e)
        });
        sum.moved += t.moved;
        sum.stayed += t.stayed;
        sum.lost += t.lost;
        sum.early += t.early;
        sum.resumed_after_waiting += t.resumed_after_waiting;
        sum.recovered += t.recovered;
    }
    println!("{faults} faults at most: {sum:?}");
    sum
}

#[test]
fn a_vm_moves_if_nothing_happens() {
    let t = schedules(500, 0);
    assert!(t.moved == number("IRLM_SIM_RUNS", 500) && t.stayed == 0 && t.lost == 0, "{t:?}");
    assert!(t.early > 0, "no target heard of giving up before it saw all loaded: {t:?}");
}

#[test]
fn one_copy_runs_whatever_happens() {
    for faults in [1, 2, 4, 8] {
        let t = schedules(20_000, faults);
        assert!(t.moved > 0 && t.stayed > 0 && t.recovered > 0 && t.resumed_after_waiting > 0, "{t:?}");
        assert!(t.lost < t.moved + t.stayed, "{t:?}");
    }
}
