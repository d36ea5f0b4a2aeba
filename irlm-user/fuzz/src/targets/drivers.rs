//! Each driver of the handover alone, told anything in any order, with actions that come to anything: a peer, a QEMU and
//! a disk of the worst kind. What may never happen does not: nothing is said or done that was not written before, a copy
//! that was given up is not let run here unless the target's is none, and one that runs is not thrown away.

use crate::ops::Ops;
use irlm_user::core::account::Tally;
use irlm_user::core::handover::arrival::{self, Arrival};
use irlm_user::core::handover::departure::{self, Departure};
use irlm_user::core::handover::{Decision, GuestState, Ran, SourceState, Standing, TargetState, Took};
use irlm_user::core::ram::{Block, Ram, Stripes, Sums};
use irlm_user::core::units::Nanos;
use irlm_user::core::wire::messages::Word;

const GUESTS: [GuestState; 3] = [GuestState::Running, GuestState::Paused, GuestState::Shutdown];

fn why() -> String {
    "why".to_owned()
}

/// What pages come to, if they were accounted for; two that differ.
fn tally(ops: &mut Ops<'_>) -> Option<Tally> {
    let of = |sum| Some(Tally { sum, ..Tally::default() });
    ops.pick(&[None, of(1), of(2)])
}

/// What memory comes to: two that differ in a page, and one in which nothing was read.
fn memory(ops: &mut Ops<'_>) -> Ram {
    let of = |mark: u128| {
        let mut sums = Stripes::default();
        sums[0] = Sums { marks: mark, placed: mark };
        Ram { blocks: vec![Block { name: "m".to_owned(), pages: 9, sums }], ..Ram::default() }
    };
    ops.pick(&[of(5), of(7), Ram::default()])
}

fn word(ops: &mut Ops<'_>) -> Word {
    let guest = ops.pick(&GUESTS);
    let all = [
        Word::Loaded(tally(ops)),
        Word::GivenUp(guest, tally(ops)),
        Word::Runs,
        Word::Aborted(why()),
        Word::Discarded,
        Word::Refused(why()),
        Word::Gone,
        Word::Ready(tally(ops)),
        Word::Filled,
        Word::PagesLost,
        Word::Lost(why()),
        Word::Memory(memory(ops)),
    ];
    ops.pick(&all)
}

fn standing(ops: &mut Ops<'_>) -> Standing {
    let back = Standing::Back(ops.pick(&GUESTS));
    ops.pick(&[Standing::UnderWay, Standing::Waits, Standing::Completed, back, Standing::Gone])
}

pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let first = ops.byte();
    if first & 1 == 0 { leaves(&mut ops, first & 2 != 0) } else { arrives(&mut ops) }
}

/// The disk as a restart would find it: what was surely written, and what may be there instead.
struct Disk<S> {
    sure: S,
    maybe: Vec<S>,
}

impl<S: Copy + PartialEq> Disk<S> {
    fn wrote(&mut self, state: S) {
        (self.sure, self.maybe) = (state, Vec::new());
    }
    fn any(&self, ops: &mut Ops<'_>) -> S {
        let n = ops.below(self.maybe.len().min(200) + 1);
        if n == 0 { self.sure } else { self.maybe[n - 1] }
    }
}

/// Anything that a departure may be told.
fn to_leave(ops: &mut Ops<'_>, d: &Departure) -> departure::Input {
    use departure::Input;
    let inputs = [
        Input::Word(word(ops)),
        Input::Guest(ops.pick(&GUESTS)),
        Input::Stopped,
        Input::Source(standing(ops)),
        Input::Mute,
        Input::Lost(why()),
        Input::Connected,
        Input::Switched,
        Input::Sent(tally(ops).unwrap_or_default()),
        Input::Memory(memory(ops)),
        Input::NoMemory(why()),
        Input::Clocks(d.odd().to_vec()),
        Input::Clocks(Vec::new()),
        Input::PagesLost,
        Input::Decided(ops.pick(&[Decision::Source, Decision::Target])),
        Input::Abort(why()),
    ];
    ops.pick(&inputs)
}

fn leaves(ops: &mut Ops<'_>, compares_memory: bool) {
    use SourceState::{Done, GaveUp, GivingUp, Serving, TakingBack};
    use departure::{Action, Outcome};
    let mut d = Departure::new();
    if compares_memory {
        d.compares_memory();
    }
    let mut disk = Disk { sure: SourceState::Streaming, maybe: Vec::new() };
    let mut now = Nanos(0);
    while !ops.is_over() {
        now = now.plus_ms(u64::from(ops.byte()) * 20);
        if ops.rarely() {
            if ops.rarely() {
                let found = disk.any(ops);
                disk.wrote(found);
                d = Departure::recover(found, ops.pick(&GUESTS), now);
            }
            d.handle(to_leave(ops, &d), now);
            continue;
        }
        let Some(action) = d.poll(now) else {
            now = d.wake().unwrap_or(now).max(now);
            continue;
        };
        assert!(d.poll(now).is_none(), "two actions at once");
        let written = disk.sure;
        match &action {
            Action::LetComplete => assert!(written == GivingUp, "let go, and the disk says {written:?}"),
            Action::Serve => assert_eq!(written, Serving),
            Action::Say(Word::GivenUp(..)) => {
                assert!(matches!(written, GaveUp | Serving), "given up by word, and the disk says {written:?}");
            }
            // That gives nothing away before it is given up.
            Action::Say(Word::Gone) => assert!(matches!(written, GivingUp | GaveUp | Serving), "{written:?}"),
            // It may run here again only where a restart would not give it away.
            Action::TakeBack(_) => {
                let spares = |s: &SourceState| !matches!(s, GaveUp | Serving | Done);
                let all = [disk.sure].into_iter().chain(disk.maybe.iter().copied());
                let given = all.filter(|s| !spares(s)).collect::<Vec<_>>();
                assert!(given.is_empty(), "taken back, and the disk may say {given:?}; {:?}", d.state());
            }
            Action::Finish => assert!(d.settled() || d.state() != TakingBack),
            _ => {}
        }
        let failed = ops.rarely();
        let outcome = match &action {
            Action::Write(state, _) if failed => {
                if ops.byte() & 1 == 0 {
                    Outcome::NotWritten(why())
                } else {
                    disk.maybe.push(*state);
                    Outcome::Failed(why())
                }
            }
            Action::Write(state, _) => {
                disk.wrote(*state);
                Outcome::Done
            }
            _ if failed => Outcome::Failed(why()),
            Action::LetComplete | Action::Ask => Outcome::Stands(standing(ops)),
            Action::TakeBack(guest) => {
                Outcome::Took(if ops.rarely() { Took::Gone } else { Took::Stands(*guest) })
            }
            _ => Outcome::Done,
        };
        d.done(outcome, now);
    }
}

/// The target's disk and its copy.
struct Place {
    disk: Disk<TargetState>,
    /// The copy runs, or may.
    runs: bool,
    settled: bool,
    thrown: bool,
}

fn arrives(ops: &mut Ops<'_>) {
    use arrival::Input;
    let mut a = Arrival::new();
    if ops.byte() & 1 == 0 {
        a.goes_direct();
    }
    let disk = Disk { sure: TargetState::Filling, maybe: Vec::new() };
    let mut place = Place { disk, runs: false, settled: false, thrown: false };
    let mut now = Nanos(0);
    while !ops.is_over() {
        now = now.plus_ms(u64::from(ops.byte()) * 20);
        if ops.rarely() {
            if ops.rarely() {
                let found = place.disk.any(ops);
                place.disk.wrote(found);
                a = Arrival::recover(found, ops.pick(&GUESTS), place.settled);
            }
            let inputs = [
                Input::Word(word(ops)),
                Input::Loaded(tally(ops)),
                Input::Memory(memory(ops)),
                Input::Prepared(tally(ops)),
                Input::Failed(why()),
                Input::Lost,
                Input::Filled,
                Input::Decided(ops.pick(&[Decision::Source, Decision::Target])),
                Input::Abort(why()),
            ];
            a.handle(ops.pick(&inputs), now);
            continue;
        }
        let Some(action) = a.poll(now) else {
            now = a.wake().unwrap_or(now).max(now);
            continue;
        };
        assert!(a.poll(now).is_none(), "two actions at once");
        place.may(&action, &a);
        let outcome = place.does(&action, ops);
        a.done(outcome, now);
    }
}

impl Place {
    /// What may be said and done by what is on disk.
    fn may(&self, action: &arrival::Action, a: &Arrival) {
        use TargetState::{Fetching, Filled, Loaded, Ready, Refused, Running};
        use arrival::Action;
        let written = self.disk.sure;
        match action {
            Action::Run(_) => assert!(matches!(written, Running | Fetching), "run, and it is {written:?}"),
            Action::Say(Word::Loaded(_)) => assert_eq!(written, Loaded),
            Action::Say(Word::Ready(_)) => assert_eq!(written, Ready),
            Action::Say(Word::Runs) => assert!(matches!(written, Running | Fetching | Filled) && a.ran()),
            Action::Say(Word::Refused(_)) => assert_eq!(written, Refused),
            Action::Say(Word::Filled) => assert_eq!(written, Filled),
            Action::Discard => assert!(!self.runs, "a copy that runs is thrown away; it is {written:?}"),
            _ => {}
        }
    }

    fn does(&mut self, action: &arrival::Action, ops: &mut Ops<'_>) -> arrival::Outcome {
        use arrival::{Action, Outcome};
        let failed = ops.rarely();
        match action {
            Action::Write(state, _) if failed => {
                self.disk.maybe.push(*state);
                Outcome::Failed(why())
            }
            Action::Write(state, _) => {
                self.disk.wrote(*state);
                Outcome::Done
            }
            // It may have been done all the same.
            Action::Run(_) if failed => {
                self.runs |= !self.thrown && ops.rarely();
                Outcome::Failed(why())
            }
            _ if failed => Outcome::Failed(why()),
            Action::Run(guest) => {
                let mut all = vec![Ran::Gone { told: self.runs }];
                // What was thrown away is gone, and what runs is not refused.
                if !self.thrown {
                    all.push(if guest.runs() { Ran::Runs } else { Ran::Paused });
                }
                if !self.thrown && !self.runs {
                    all.push(Ran::Refused(why()));
                }
                let ran = ops.pick(&all);
                self.runs |= matches!(ran, Ran::Runs | Ran::Paused);
                Outcome::Ran(ran)
            }
            Action::Look => Outcome::Looked(ops.pick(&[None, Some(false), Some(true)])),
            Action::Settle => {
                self.settled = true;
                Outcome::Done
            }
            Action::Discard => {
                self.thrown = true;
                Outcome::Done
            }
            _ => Outcome::Done,
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut random = crate::Random(3);
    let mut drawn = |first: u8| [first].into_iter().chain((0..300).map(|_| random.number() as u8)).collect();
    vec![drawn(0), drawn(1), drawn(0), drawn(1)]
}
