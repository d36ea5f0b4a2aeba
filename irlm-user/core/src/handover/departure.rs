//! The source side of one VM's handover: a driver without I/O and without a clock. It is told what happened
//! ([`Departure::handle`]), says what is to be done next ([`Departure::poll`]) and is told what came of it
//! ([`Departure::done`]). One action at a time; a crash may come before, in, or after each.
//!
//! Whatever outlives a crash is written before it is said or done. A write that fails is tried again, and nothing after it
//! happens meanwhile. There is one exception: a VM that was never given up goes back to its owner although that cannot be
//! written, because the disk still says that it is the source's.

use super::agenda::{Agenda, after};
use super::{Decision, GuestState, SourceState, Standing, Took};
use crate::account::Tally;
use crate::ram::{PageAt, Ram};
use crate::units::Nanos;
use crate::wire::messages::Word;
use known::{Disk, Here, Target};

// What is known: the disk, the copy here, the target.
mod known;
// The stopped VM's memory at both ends.
mod memory;
// How the QEMU or VMM here stands, and what follows.
mod stand;
// What is seen from outside.
mod view;

/// What a departure is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A word from the target.
    Word(Word),
    /// What its owner, or the guest itself, has made of the VM; if it runs, it is not stopped any more.
    Guest(GuestState),
    /// The VM was stopped for its last pages.
    Stopped,
    /// How its QEMU or VMM stands to the migration, unasked. `Gone` only once all that it wrote has been sent.
    Source(Standing),
    /// Its monitor was closed, though its process may be there.
    Mute,
    /// The connection to the target is lost.
    Lost(String),
    /// A settle connection to the target stands.
    Connected,
    /// What the pages come to that were sent in all, those not counted that come after a switch. The target's must be the same.
    Sent(Tally),
    /// What the stopped VM's memory comes to here.
    Memory(Ram),
    /// Why that cannot be known.
    NoMemory(String),
    /// In these pages of those that differ ([`Departure::odd`]) KVM has a clock.
    Clocks(Vec<PageAt>),
    /// Post-copy: the VM is stopped, and the target has been told which pages are still to come.
    Switched,
    /// Post-copy: the memory of the stopped VM is gone, so that no page of it can be sent any more.
    PagesLost,
    /// An operator's word on a VM in doubt.
    Decided(Decision),
    /// Somebody wants the attempt to end, with the reason.
    Abort(String),
}

/// What a departure wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Put this into the journal, durably, with how the VM's owner has left it.
    Write(SourceState, GuestState),
    /// Give the VM up: let QEMU hand it over.
    LetComplete,
    /// Ask how the VM's QEMU or VMM stands.
    Ask,
    /// End the migration and see that the VM is as its owner left it. May come twice, also for one that was given up.
    TakeBack(GuestState),
    /// Say this to the target, if it can be heard.
    Say(Word),
    /// Post-copy: send the VM's pages from now on.
    Serve,
    /// Call the target on a settle connection.
    Call,
    /// Over; the outcome is final, and both sides know it.
    Finish,
}

/// What came of an action. `Failed`: it was not done, or that is not known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It could not be done, or what came of it is not known; with the reason.
    Failed(String),
    /// [`Action::Write`]: it is surely not on disk.
    NotWritten(String),
    /// [`Action::LetComplete`], [`Action::Ask`]: how it stands now.
    Stands(Standing),
    /// [`Action::TakeBack`]: what was seen.
    Took(Took),
}

/// First and longest pause between two tries of the same action.
const AGAIN: (u64, u64) = (250_000_000, 2_000_000_000);
/// First and longest pause between two calls of the target.
const CALLS: (u64, u64) = (200_000_000, 3_000_000_000);
/// Why the memory of a VM was not compared whose target was lost.
const LOST: &str = "the target was lost before its memory was compared";
/// How often a QEMU that was let go is asked how it stands.
const ASK: u64 = 1_000_000_000;

/// The driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    state: SourceState,
    agenda: Agenda<Action>,
    disk: Disk,
    here: Here,
    target: Target,
    /// When QEMU is asked how it stands.
    ask: Option<Nanos>,
    guest: GuestState,
    /// Post-copy: the switch has been sent.
    switched: bool,
    recovered: bool,
    settled: bool,
    finished: bool,
    reason: String,
}

impl Departure {
    /// A new attempt, of which the journal holds that it began.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: SourceState::Streaming,
            agenda: Agenda::new(AGAIN),
            disk: Disk::of(SourceState::Streaming),
            here: Here::new(),
            target: Target::new(),
            ask: None,
            guest: GuestState::Running,
            switched: false,
            recovered: false,
            settled: false,
            finished: false,
            reason: String::new(),
        }
    }

    /// After a restart, by what the journal holds.
    #[must_use]
    pub fn recover(state: SourceState, guest: GuestState, now: Nanos) -> Self {
        let mut d = Self {
            state,
            disk: Disk::of(state),
            // The old agent's death may have let QEMU run the VM on, unseen.
            here: Here { ran_on: true, seen: false, ..Here::new() },
            // Whatever the target said to the old agent.
            target: Target { connected: false, loaded: true, ..Target::new() },
            guest,
            recovered: true,
            reason: "the source agent was restarted".into(),
            ..Self::new()
        };
        match state {
            SourceState::Done => {
                d.settled = true;
                d.then([Action::Finish]);
            }
            SourceState::Streaming => d.abort(),
            SourceState::GivingUp | SourceState::Serving | SourceState::GaveUp => d.then([Action::Ask]),
            SourceState::TakingBack | SourceState::Aborted => d.take_back(),
        }
        d.call_from(now);
        d
    }

    /// The memory of the stopped VM is to be compared before the target may run it.
    pub fn compares_memory(&mut self) {
        self.target.memory.ask();
    }

    /// When [`Self::poll`] may have something to do though nothing is heard.
    #[must_use]
    pub fn wake(&self) -> Option<Nanos> {
        if self.finished || self.agenda.is_busy() {
            return None;
        }
        let call = self.target.call.filter(|_| self.calls()).map(|c| c.0);
        [self.agenda.wake(), call, self.ask, self.disk.rewrite.map(|r| r.1)].into_iter().flatten().min()
    }

    /// What is to be done now. [`Self::done`] must be called before the next.
    pub fn poll(&mut self, now: Nanos) -> Option<Action> {
        if self.finished || self.agenda.is_busy() {
            return None;
        }
        let due = |at: Nanos| at <= now;
        // The end waits until all is written.
        let last = self.disk.rewrite.is_some() && self.agenda.first() == Some(&Action::Finish);
        let action = if self.agenda.is_due(now) && !last {
            self.agenda.take()
        } else if let Some((state, _)) = self.disk.rewrite.filter(|r| due(r.1)) {
            Some(Action::Write(state, self.guest))
        } else if self.ask.is_some_and(due) {
            self.ask = None;
            Some(Action::Ask)
        } else if self.calls() && self.target.call.is_some_and(|c| due(c.0)) {
            let pause = self.target.call.map_or(CALLS.0, |c| c.1);
            self.target.call = Some((after(now, pause), (pause * 2).min(CALLS.1)));
            Some(Action::Call)
        } else {
            None
        };
        self.agenda.begin(action)
    }

    /// What came of the action that [`Self::poll`] gave last.
    pub fn done(&mut self, outcome: Outcome, now: Nanos) {
        let Some(action) = self.agenda.end() else { return };
        match (action, outcome) {
            (Action::Write(state, _), Outcome::Failed(why)) => {
                if !self.disk.maybe.contains(&state) {
                    self.disk.maybe.push(state);
                }
                self.unwritten(state, why, now);
            }
            (Action::Write(state, _), Outcome::NotWritten(why)) => self.unwritten(state, why, now),
            (Action::Write(state, _), _) => {
                self.disk.written = state;
                self.disk.maybe.clear();
                self.disk.rewrite = self.disk.rewrite.filter(|r| r.0 != state);
                self.agenda.went();
            }
            (Action::LetComplete, Outcome::Stands(s)) => {
                self.agenda.went();
                self.ask_later(now);
                // One that still waits has not taken it up yet: asking will show.
                if s != Standing::Waits {
                    self.stands(s, now);
                }
            }
            (Action::LetComplete | Action::Ask, Outcome::Failed(why)) => {
                self.agenda.trouble = Some(why);
                self.ask_later(now);
            }
            (Action::Ask, Outcome::Stands(s)) => self.answered(s, now),
            // Who is given up, and cannot be told to anybody, is looked at from time to time: it may be continued by hand.
            (Action::Call, Outcome::Failed(_)) if self.given() => self.look(),
            (Action::TakeBack(_), Outcome::Took(took)) => self.took(took, now),
            (action @ Action::TakeBack(_), Outcome::Failed(why)) => {
                // It may have been continued all the same.
                self.here.ran_on = true;
                if matches!(self.state, SourceState::Aborted | SourceState::TakingBack) {
                    self.agenda.try_again(action, why, now);
                }
            }
            (Action::Serve, Outcome::Failed(_)) => self.handle(Input::PagesLost, now),
            (Action::Finish, _) => self.finished = true,
            _ => {}
        }
    }

    fn unwritten(&mut self, state: SourceState, why: String, now: Nanos) {
        use SourceState::{Aborted, GivingUp, Serving, Streaming};
        // States in which a restart leaves the VM with its source, if that still has it.
        let spares = |s: &SourceState| matches!(s, Streaming | GivingUp | Aborted);
        if state != self.state {
            // A newer one follows.
            return;
        }
        match state {
            GivingUp | Serving => {
                self.because(&format!("the journal cannot be written: {why}"));
                self.abort();
            }
            // The disk says that it is the source's, or that QEMU is to be asked.
            Aborted if spares(&self.disk.written) && self.disk.maybe.iter().all(spares) => {
                self.agenda.trouble = Some(why);
                self.disk.rewrite = Some((state, after(now, AGAIN.1)));
            }
            _ => self.agenda.try_again(Action::Write(state, self.guest), why, now),
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, input: Input, now: Nanos) {
        use SourceState::{Aborted, GaveUp, GivingUp, Serving, Streaming, TakingBack};
        match (self.state, input) {
            (_, Input::Guest(guest)) => {
                // A stop by its owner is told as a stop first, and whose it was after that.
                if self.state == Streaming {
                    self.guest = guest;
                    self.here.stopped &= !guest.runs();
                }
            }
            (_, Input::Sent(tally)) => self.target.sent = Some(tally),
            (_, of @ (Input::Memory(_) | Input::NoMemory(_) | Input::Clocks(_))) => self.learns(of, now),
            (_, Input::Stopped) => (self.here.stopped, self.here.ran_on) = (true, false),
            (_, Input::Source(s)) => self.stands(s, now),
            (_, Input::Word(word)) => self.hears(word, now),
            (_, Input::Connected) => {
                self.target.connected = true;
                self.give_again();
            }
            (Streaming, Input::Lost(why)) => {
                self.target.connected = false;
                self.because(&format!("the connection to the target was lost: {why}"));
                self.abort();
                self.call_from(now);
            }
            (_, Input::Lost(_)) => {
                (self.target.connected, self.here.seen) = (false, false);
                self.call_from(now);
                self.parted(now);
            }
            (Streaming, Input::Switched) => self.switched = true,
            (Streaming, Input::PagesLost) => {
                self.because("the memory of the VM is gone");
                self.abort();
            }
            (Serving, Input::PagesLost) => {
                self.here.pages_lost = true;
                self.say(Word::PagesLost);
            }
            (Streaming, Input::Abort(why)) => {
                self.because(&why);
                self.abort();
            }
            (Streaming, Input::Mute) => {
                self.because("the source QEMU's monitor was closed");
                self.abort();
            }
            (GivingUp, Input::Mute) => self.ask = Some(now),
            (GivingUp | GaveUp | Serving, Input::Decided(Decision::Source)) => {
                self.reason = "settled by an operator: the copy at the source is the VM".into();
                // The target may come back with a copy of its own: it has to hear this.
                self.abort();
                self.call_from(now);
            }
            // It runs here: it cannot be the target's as well.
            (GaveUp | Serving, Input::Decided(Decision::Target))
                if self.here.claimed.is_some_and(GuestState::runs) => {}
            (GaveUp, Input::Decided(Decision::Target))
                if self.here.claimed.take().is_some() && self.target.connected =>
            {
                self.say_again();
            }
            (GivingUp | GaveUp | Serving, Input::Decided(Decision::Target)) => {
                self.reason = "settled by an operator: the copy at the target is the VM".into();
                self.moved();
            }
            (TakingBack, Input::Decided(Decision::Target)) if self.here.behind => {
                self.reason = "settled by an operator: the copy at the target is the VM".into();
                self.here.behind = false;
                self.gave_up(now);
            }
            (TakingBack, Input::Decided(Decision::Source)) if self.here.behind => {
                self.reason = "settled by an operator: the VM ended at its source".into();
                self.here.behind = false;
                self.instead(Aborted);
                self.say_again();
            }
            (Aborted, _) | (_, _) => {}
        }
    }

    /// Nobody says again what the target may have said of its memory, and was not heard.
    fn parted(&mut self, now: Nanos) {
        self.target.memory.unknown(LOST.to_owned());
        self.compared(now);
    }

    /// Something of the memory here.
    fn learns(&mut self, input: Input, now: Nanos) {
        let memory = &mut self.target.memory;
        match input {
            Input::Memory(ours) => memory.ours(ours),
            Input::NoMemory(why) => memory.unknown(format!("its memory cannot be compared: {why}")),
            Input::Clocks(pages) => memory.spare(&pages),
            _ => {}
        }
        self.compared(now);
    }

    fn hears(&mut self, word: Word, now: Nanos) {
        use SourceState::{Aborted, GaveUp, GivingUp, Serving, Streaming, TakingBack};
        if let Word::Memory(theirs) = word {
            self.target.memory.theirs(theirs);
            return self.compared(now);
        }
        let whole = matches!(word, Word::Loaded(_)) && self.target.memory.pending();
        if whole && self.state == Streaming && self.target.memory.has_theirs() {
            self.target.memory.loaded = Some(word);
            return;
        }
        let differs = self.target.differs_by(&word, self.state == Streaming);
        self.target.loaded |= !differs && matches!(word, Word::Loaded(_) | Word::Ready(_) | Word::Refused(_));
        match (self.state, word) {
            (Streaming, Word::Loaded(_) | Word::Ready(_)) if differs => {
                self.reason = self.target.differs.clone().unwrap_or_default();
                self.abort();
            }
            // Given up, because its copy here is gone: an operator's to choose.
            (Serving | GaveUp, Word::Loaded(_) | Word::Ready(_)) if differs => {}
            // Nobody but this side could run the VM here again, so nothing has to be waited for.
            (Streaming, Word::Ready(_)) if self.switched => {
                self.instead(Serving);
                self.then([Action::Serve, Action::Say(self.given_up())]);
                self.call_from(now);
            }
            (Streaming, Word::Loaded(_)) => self.give_up(),
            (Streaming, Word::Aborted(why)) => {
                self.because(&why);
                self.abort();
            }
            // What was let go cannot be called back: QEMU's answer comes first. A target that has dropped its copy will
            // answer GivenUp with Discarded.
            (GivingUp, Word::Aborted(_)) if self.here.behind => self.say_again(),
            (GivingUp, Word::Aborted(why)) => self.because(&why),
            // Nothing is left that could be chosen.
            (GivingUp, Word::Discarded | Word::Lost(_)) if self.here.behind => {
                (self.here.behind, self.settled) = (false, true);
                self.instead(Aborted);
                self.then([Action::Finish]);
            }
            (GivingUp, _) => {}
            (Serving, Word::Runs) => self.target.runs = true,
            (Serving, Word::Filled) | (GaveUp, Word::Runs) => self.moved(),
            (Serving | GaveUp, Word::Lost(why)) => {
                self.target.lost = Some(why);
                self.look();
            }
            // Of a copy that has run nothing can be taken back: the one here is older than what it did.
            (Serving, Word::Discarded | Word::Refused(_)) if self.target.runs => {}
            (Serving | GaveUp, Word::Discarded) => {
                self.because("the target copy was lost before it ran");
                self.given_back();
            }
            (GaveUp, Word::Refused(_)) if self.here.gone => self.say(Word::Gone),
            (Serving | GaveUp, Word::Refused(why)) => {
                self.because(&format!("the target's QEMU refuses to run it: {why}"));
                self.instead(TakingBack);
                self.take_back();
            }
            // It was not told that it has the VM, so it will not run it.
            (GaveUp, Word::Aborted(why)) if self.target.memory.pending() => self.uncompared(&why),
            (Serving | GaveUp, Word::Aborted(why)) => {
                self.because(&why);
                self.give_again();
            }
            (Serving | GaveUp, Word::Ready(_) | Word::Loaded(_)) => self.give_again(),
            (Aborted, Word::Discarded | Word::Lost(_)) if !self.settled => {
                self.settled = true;
                self.then([Action::Finish]);
            }
            (Aborted, Word::Loaded(_) | Word::Ready(_) | Word::Refused(_)) if !self.settled => {
                self.say_again();
            }
            _ => {}
        }
    }

    fn because(&mut self, why: &str) {
        if self.reason.is_empty() {
            why.clone_into(&mut self.reason);
        }
    }

    fn then(&mut self, actions: impl IntoIterator<Item = Action>) {
        self.agenda.then(actions);
    }

    /// What was still to be done is not any more; this is.
    fn instead(&mut self, write: SourceState) {
        self.disk.rewrite = None;
        self.state = write;
        self.agenda.instead(Action::Write(write, self.guest));
    }

    /// Words are said after what was to be done before; one that is still to be said is not said twice.
    fn say(&mut self, word: Word) {
        self.agenda.once(Action::Say(word));
    }

    /// What is said when it is not certain that the target heard it: the last word.
    fn say_again(&mut self) {
        match self.state {
            // What the target has is not the VM.
            SourceState::GaveUp | SourceState::Serving if self.target.differs.is_some() => {}
            // Nor is that known yet.
            SourceState::GaveUp if self.target.memory.withholds() => {}
            SourceState::GaveUp | SourceState::Serving => {
                if self.here.pages_lost {
                    self.say(Word::PagesLost);
                }
                self.say(self.given_up());
                if self.here.gone {
                    self.say(Word::Gone);
                }
            }
            SourceState::Aborted => self.say(Word::Aborted(self.reason.clone())),
            // A target that has no copy any more answers that.
            SourceState::GivingUp if self.here.behind => self.say(Word::Gone),
            _ => {}
        }
    }

    fn given_up(&self) -> Word {
        Word::GivenUp(self.guest, self.target.sent)
    }

    /// Given up, and the target has not said that it runs there.
    fn given(&self) -> bool {
        let runs = self.target.runs && self.target.lost.is_none();
        matches!(self.state, SourceState::GaveUp | SourceState::Serving) && !runs && !self.here.gone
    }

    /// Says the last word again, one that gives the VM away only once its copy here was seen to stand still.
    fn give_again(&mut self) {
        match self.state {
            SourceState::GaveUp | SourceState::Serving if self.given() && !self.here.seen => self.look(),
            SourceState::GaveUp | SourceState::Serving if self.here.claimed.is_some() => {}
            _ => self.say_again(),
        }
    }

    fn give_up(&mut self) {
        self.instead(SourceState::GivingUp);
        self.then([Action::LetComplete]);
    }

    fn gave_up(&mut self, now: Nanos) {
        self.instead(SourceState::GaveUp);
        self.ask = None;
        self.say_again();
        self.call_from(now);
        self.compared(now);
    }

    /// More is known of the memory at both ends: a VM whose memory was not compared in time has not been given up by word.
    fn compared(&mut self, now: Nanos) {
        if self.target.memory.pending() {
            return;
        }
        let loaded = self.target.memory.loaded.take();
        match (self.state, loaded) {
            (SourceState::Streaming, Some(word)) => self.hears(word, now),
            (SourceState::GaveUp, _) => match self.target.memory.fault().map(str::to_owned) {
                Some(why) => self.uncompared(&why),
                None if self.target.memory.same().is_some() => self.give_again(),
                None => {}
            },
            _ => {}
        }
    }

    /// Given up by its QEMU and not by word, and the target's copy is not known to be the VM.
    fn uncompared(&mut self, why: &str) {
        if self.here.gone {
            // Only the target has a copy by now. One that differs is an operator's to choose.
            if self.target.memory.is_other() {
                self.target.differs = Some(why.to_owned());
            } else {
                self.target.memory.go_without();
            }
            return self.say_again();
        }
        why.clone_into(&mut self.reason);
        self.instead(SourceState::TakingBack);
        self.take_back();
    }

    /// The VM was never given up: it goes back to its owner. The target is told once that was seen.
    fn abort(&mut self) {
        self.instead(SourceState::Aborted);
        self.ask = None;
        self.take_back();
        self.say_again();
        self.target.call = Some((Nanos(0), CALLS.0));
    }

    /// It was given up, and the target's copy is not and never was the VM.
    fn given_back(&mut self) {
        self.instead(SourceState::Aborted);
        self.settled = true;
        self.ask = None;
        self.take_back();
        self.then([Action::Finish]);
    }

    fn take_back(&mut self) {
        self.then([Action::TakeBack(self.guest)]);
    }

    fn moved(&mut self) {
        self.instead(SourceState::Done);
        self.settled = true;
        self.ask = None;
        self.then([Action::Finish]);
    }

    /// Whether the target is to be called while it cannot be heard.
    fn calls(&self) -> bool {
        use SourceState::{Aborted, GaveUp, GivingUp, Serving, TakingBack};
        let doubted = self.state == GivingUp && self.here.behind;
        !self.target.connected
            && !self.settled
            && (doubted || matches!(self.state, GaveUp | Serving | Aborted | TakingBack))
    }

    fn call_from(&mut self, now: Nanos) {
        self.target.call = Some((after(now, CALLS.0), CALLS.0));
    }
}

impl Default for Departure {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
