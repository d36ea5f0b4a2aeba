//! The source side of one VM's handover: a driver without I/O and without a clock. It is told what happened
//! ([`Departure::handle`]), says what is to be done next ([`Departure::poll`]) and is told what came of it
//! ([`Departure::done`]). One action at a time; a crash may come before, in, or after each.
//!
//! Whatever outlives a crash is written before it is said or done. A write that fails is tried again, and nothing after it
//! happens meanwhile. There is one exception: a VM that was never given up goes back to its owner although that cannot be
//! written, because the disk still says that it is the source's.

use super::{Decision, GuestState, SourceState, Standing, Took};
use crate::units::Nanos;
use crate::wire::messages::Word;
use std::collections::VecDeque;

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
/// How often a QEMU that was let go is asked how it stands.
const ASK: u64 = 1_000_000_000;

/// The driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    state: SourceState,
    /// What a restart would find; or, instead, one of the writes that failed since and may have come to disk all the same.
    written: SourceState,
    maybe: Vec<SourceState>,
    queue: VecDeque<Action>,
    doing: Option<Action>,
    /// The first action of the queue is not tried before; and the pause after it.
    again: Option<Nanos>,
    pause: u64,
    /// A state that is only written for order's sake, and when.
    rewrite: Option<(SourceState, Nanos)>,
    /// When QEMU is asked how it stands.
    ask: Option<Nanos>,
    connected: bool,
    /// When the target is called next, and the pause after that.
    call: Option<(Nanos, u64)>,
    guest: GuestState,
    /// What was seen of the copy here when it was taken back.
    left: Option<GuestState>,
    /// The target has said that it has a copy.
    loaded: bool,
    /// The VM has been stopped for its last pages, and may have run on since.
    stopped: bool,
    ran_on: bool,
    /// The process of the copy here has ended.
    gone: bool,
    /// And may have run on after it was given up: the target's copy may be older. Only an operator can choose.
    behind: bool,
    /// Its copy here was seen to stand still since it was given up, and the target has been heard all the time. If not, it is
    /// looked at before it is said once more that it was given up.
    seen: bool,
    /// It was given up, and somebody has continued the copy here by hand: how that stands. Only an operator can choose.
    claimed: Option<GuestState>,
    /// Post-copy: the switch has been sent; the target runs the VM; pages are lost.
    switched: bool,
    runs: bool,
    pages_lost: bool,
    recovered: bool,
    settled: bool,
    finished: bool,
    reason: String,
    /// What is being tried again, and why.
    trouble: Option<String>,
    /// The target has lost its copy.
    lost: Option<String>,
}

impl Departure {
    /// A new attempt, of which the journal holds that it began.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: SourceState::Streaming,
            written: SourceState::Streaming,
            maybe: Vec::new(),
            queue: VecDeque::new(),
            doing: None,
            again: None,
            pause: AGAIN.0,
            rewrite: None,
            ask: None,
            connected: true,
            call: None,
            guest: GuestState::Running,
            left: None,
            loaded: false,
            stopped: false,
            ran_on: false,
            gone: false,
            behind: false,
            seen: true,
            claimed: None,
            switched: false,
            runs: false,
            pages_lost: false,
            recovered: false,
            settled: false,
            finished: false,
            reason: String::new(),
            trouble: None,
            lost: None,
        }
    }

    /// After a restart, by what the journal holds.
    #[must_use]
    pub fn recover(state: SourceState, guest: GuestState, now: Nanos) -> Self {
        let mut d = Self {
            state,
            written: state,
            connected: false,
            guest,
            // The old agent's death may have let QEMU run the VM on, unseen.
            ran_on: true,
            // Whatever the target said to the old agent.
            loaded: true,
            seen: false,
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

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }
    /// What the VM's owner had made of it when it was stopped.
    #[must_use]
    pub fn guest(&self) -> GuestState {
        self.guest
    }
    /// What was seen of the copy here when it had been taken back.
    #[must_use]
    pub fn left(&self) -> Option<GuestState> {
        self.left
    }
    /// Whether the process of the copy here was found to have ended.
    #[must_use]
    pub fn gone(&self) -> bool {
        self.gone
    }
    /// Whether the outcome is known to both sides.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.settled
    }
    /// Nothing is left to do.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.finished
    }
    /// Paused here, and not known whether the target runs it.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        !self.settled
            && match self.state {
                SourceState::GaveUp | SourceState::TakingBack => true,
                SourceState::Serving => !self.runs || self.lost.is_some(),
                // QEMU was let go, and does not say what came of it.
                SourceState::GivingUp => self.trouble.is_some(),
                _ => false,
            }
    }
    /// Given up, and the target still needs pages.
    #[must_use]
    pub fn serving(&self) -> bool {
        self.state == SourceState::Serving
    }
    /// Why the attempt ended, if it did.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
    /// What is being tried again, and why it does not succeed.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
    /// The process of the copy here has ended, and may have run the VM after it was given up: the target's copy may be older.
    #[must_use]
    pub fn behind(&self) -> bool {
        self.behind
    }
    /// How the copy here stands, if somebody has continued it although it was given up.
    #[must_use]
    pub fn claimed(&self) -> Option<GuestState> {
        self.claimed
    }
    /// Why the target has lost its copy, if it has.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }
    /// Whether the copy here is again, or still, the VM, and stands as its owner left it (or its process has ended).
    #[must_use]
    pub fn is_back(&self) -> bool {
        self.state == SourceState::Aborted && (self.left.is_some() || self.gone)
    }
    /// Whether an operator's word would be heard.
    #[must_use]
    pub fn may_be_decided(&self) -> bool {
        self.in_doubt() || (self.serving() && !self.connected)
    }

    /// When [`Self::poll`] may have something to do though nothing is heard.
    #[must_use]
    pub fn wake(&self) -> Option<Nanos> {
        if self.finished || self.doing.is_some() {
            return None;
        }
        let again = self.again.filter(|_| !self.queue.is_empty());
        let call = self.call.filter(|_| self.calls()).map(|c| c.0);
        [again, call, self.ask, self.rewrite.map(|r| r.1)].into_iter().flatten().min()
    }

    /// What is to be done now. [`Self::done`] must be called before the next.
    pub fn poll(&mut self, now: Nanos) -> Option<Action> {
        if self.finished || self.doing.is_some() {
            return None;
        }
        let due = |at: Nanos| at <= now;
        // The end waits until all is written.
        let last = self.rewrite.is_some() && self.queue.front() == Some(&Action::Finish);
        let action = if self.again.is_none_or(due) && !last && !self.queue.is_empty() {
            self.queue.pop_front()
        } else if let Some((state, _)) = self.rewrite.filter(|r| due(r.1)) {
            Some(Action::Write(state, self.guest))
        } else if self.ask.is_some_and(due) {
            self.ask = None;
            Some(Action::Ask)
        } else if self.calls() && self.call.is_some_and(|c| due(c.0)) {
            let pause = self.call.map_or(CALLS.0, |c| c.1);
            self.call = Some((after(now, pause), (pause * 2).min(CALLS.1)));
            Some(Action::Call)
        } else {
            None
        };
        self.doing.clone_from(&action);
        action
    }

    /// What came of the action that [`Self::poll`] gave last.
    pub fn done(&mut self, outcome: Outcome, now: Nanos) {
        let Some(action) = self.doing.take() else { return };
        match (action, outcome) {
            (Action::Write(state, _), Outcome::Failed(why)) => {
                if !self.maybe.contains(&state) {
                    self.maybe.push(state);
                }
                self.unwritten(state, why, now);
            }
            (Action::Write(state, _), Outcome::NotWritten(why)) => self.unwritten(state, why, now),
            (Action::Write(state, _), _) => {
                self.written = state;
                self.maybe.clear();
                self.rewrite = self.rewrite.filter(|r| r.0 != state);
                self.went();
            }
            (Action::LetComplete, Outcome::Stands(s)) => {
                self.went();
                self.ask_later(now);
                // One that still waits has not taken it up yet: asking will show.
                if s != Standing::Waits {
                    self.stands(s, now);
                }
            }
            (Action::LetComplete | Action::Ask, Outcome::Failed(why)) => {
                self.trouble = Some(why);
                self.ask_later(now);
            }
            (Action::Ask, Outcome::Stands(s)) => self.answered(s, now),
            // Who is given up, and cannot be told to anybody, is looked at from time to time: it may be continued by hand.
            (Action::Call, Outcome::Failed(_)) if self.given() => self.look(),
            (Action::TakeBack(_), Outcome::Took(took)) => self.took(took, now),
            (action @ Action::TakeBack(_), Outcome::Failed(why)) => {
                // It may have been continued all the same.
                self.ran_on = true;
                if matches!(self.state, SourceState::Aborted | SourceState::TakingBack) {
                    self.try_again(action, why, now);
                }
            }
            (Action::Serve, Outcome::Failed(_)) => self.handle(Input::PagesLost, now),
            (Action::Finish, _) => self.finished = true,
            _ => {}
        }
    }

    /// What came of letting QEMU go is asked for until it is known, also after a restart what stands here.
    fn ask_later(&mut self, now: Nanos) {
        let again = self.given() && (!self.seen || self.claimed.is_some());
        let served = self.recovered && self.state == SourceState::Serving;
        if self.state == SourceState::GivingUp || served || again {
            self.ask = Some(after(now, ASK));
        }
    }

    fn went(&mut self) {
        (self.again, self.pause, self.trouble) = (None, AGAIN.0, None);
    }

    fn try_again(&mut self, action: Action, why: String, now: Nanos) {
        self.trouble = Some(why);
        self.queue.push_front(action);
        self.again = Some(after(now, self.pause));
        self.pause = (self.pause * 2).min(AGAIN.1);
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
            Aborted if spares(&self.written) && self.maybe.iter().all(spares) => {
                self.trouble = Some(why);
                self.rewrite = Some((state, after(now, AGAIN.1)));
            }
            _ => self.try_again(Action::Write(state, self.guest), why, now),
        }
    }

    /// How a QEMU that was asked stands.
    fn answered(&mut self, s: Standing, now: Nanos) {
        match (self.state, s) {
            (_, Standing::Gone) if self.lost.is_some() => self.stands(s, now),
            // Somebody's `cont` by hand: it is not said again that it was given up, and nobody but them can tell why.
            (SourceState::GaveUp | SourceState::Serving, Standing::Back(guest)) if self.given() => {
                self.ran_on = true;
                (self.claimed, self.trouble) = (Some(guest), None);
                self.ask_later(now);
            }
            (SourceState::GaveUp | SourceState::Serving, Standing::Completed) if self.given() => {
                self.trouble = None;
                if self.claimed.is_none() && self.connected && !std::mem::replace(&mut self.seen, true) {
                    self.say_again();
                }
            }
            // The memory of a VM that is served went with its process; what it holds is looked at when it is asked for.
            (SourceState::Serving, Standing::Gone) => {
                self.handle(Input::PagesLost, now);
                self.say_again();
            }
            (SourceState::GivingUp, Standing::Waits) if self.recovered => {
                // Never told, so the target's QEMU cannot have loaded it.
                self.abort();
            }
            (SourceState::GivingUp, Standing::Waits) => self.then([Action::LetComplete]),
            (SourceState::GivingUp, Standing::UnderWay) => self.ask_later(now),
            _ => self.stands(s, now),
        }
    }

    /// Takes in how its QEMU stands.
    fn stands(&mut self, s: Standing, now: Nanos) {
        use SourceState::{Aborted, GaveUp, GivingUp, Streaming};
        self.gone |= s == Standing::Gone && self.state != SourceState::Serving;
        self.ran_on |= matches!(s, Standing::Back(g) if g.runs());
        match (self.state, s) {
            (GaveUp | SourceState::Serving, Standing::Gone) if self.lost.is_some() => {
                // Nothing is left that could be taken back.
                (self.gone, self.settled, self.ask) = (true, true, None);
                self.because("the target has lost it, and its process here has ended too");
                self.instead(Aborted);
                self.then([Action::Finish]);
            }
            (Streaming, Standing::Waits) => self.give_up(),
            // Completed without our leave: it has the target's word that all is loaded.
            (Streaming | GivingUp, Standing::Completed) | (GivingUp, Standing::Gone) => self.gave_up(now),
            (GivingUp, Standing::Waits) => self.ask = Some(now),
            (Streaming | GivingUp, Standing::Back(_)) => {
                self.because("the source QEMU ended the migration");
                self.abort();
            }
            // If its last byte was out, the target may still load everything; if not, GivenUp, said after the last byte,
            // tells the target that no more will come.
            (Streaming, Standing::Gone) => {
                self.because("the source QEMU is gone");
                self.gave_up(now);
            }
            (GaveUp, Standing::Gone) => self.say_again(),
            (Aborted, _) | (_, _) => {}
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
                    self.stopped &= !guest.runs();
                }
            }
            (_, Input::Stopped) => (self.stopped, self.ran_on) = (true, false),
            (_, Input::Source(s)) => self.stands(s, now),
            (_, Input::Word(word)) => self.hears(word, now),
            (_, Input::Connected) => {
                self.connected = true;
                self.give_again();
            }
            (Streaming, Input::Lost(why)) => {
                self.connected = false;
                self.because(&format!("the connection to the target was lost: {why}"));
                self.abort();
                self.call_from(now);
            }
            (_, Input::Lost(_)) => {
                (self.connected, self.seen) = (false, false);
                self.call_from(now);
            }
            (Streaming, Input::Switched) => self.switched = true,
            (Streaming, Input::PagesLost) => {
                self.because("the memory of the VM is gone");
                self.abort();
            }
            (Serving, Input::PagesLost) => {
                self.pages_lost = true;
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
                if self.claimed.is_some_and(GuestState::runs) => {}
            (GaveUp, Input::Decided(Decision::Target)) if self.claimed.take().is_some() && self.connected => {
                self.say_again();
            }
            (GivingUp | GaveUp | Serving, Input::Decided(Decision::Target)) => {
                self.reason = "settled by an operator: the copy at the target is the VM".into();
                self.moved();
            }
            (TakingBack, Input::Decided(Decision::Target)) if self.behind => {
                self.reason = "settled by an operator: the copy at the target is the VM".into();
                self.behind = false;
                self.gave_up(now);
            }
            (TakingBack, Input::Decided(Decision::Source)) if self.behind => {
                self.reason = "settled by an operator: the VM ended at its source".into();
                self.behind = false;
                self.instead(Aborted);
                self.say_again();
            }
            (Aborted, _) | (_, _) => {}
        }
    }

    fn hears(&mut self, word: Word, now: Nanos) {
        use SourceState::{Aborted, GaveUp, GivingUp, Serving, Streaming, TakingBack};
        self.loaded |= matches!(word, Word::Loaded | Word::Ready | Word::Refused(_));
        match (self.state, word) {
            // Nobody but this side could run the VM here again, so nothing has to be waited for.
            (Streaming, Word::Ready) if self.switched => {
                self.instead(Serving);
                self.then([Action::Serve, Action::Say(Word::GivenUp(self.guest))]);
                self.call_from(now);
            }
            (Streaming, Word::Loaded) => self.give_up(),
            (Streaming, Word::Aborted(why)) => {
                self.because(&why);
                self.abort();
            }
            // What was let go cannot be called back: QEMU's answer comes first. A target that has dropped its copy will
            // answer GivenUp with Discarded.
            (GivingUp, Word::Aborted(why)) => self.because(&why),
            (GivingUp, _) => {}
            (Serving, Word::Runs) => self.runs = true,
            (Serving, Word::Filled) | (GaveUp, Word::Runs) => self.moved(),
            (Serving | GaveUp, Word::Lost(why)) => {
                self.lost = Some(why);
                self.look();
            }
            // Of a copy that has run nothing can be taken back: the one here is older than what it did.
            (Serving, Word::Discarded | Word::Refused(_)) if self.runs => {}
            (Serving | GaveUp, Word::Discarded) => {
                self.because("the target copy was lost before it ran");
                self.given_back();
            }
            (GaveUp, Word::Refused(_)) if self.gone => self.say(Word::Gone),
            (Serving | GaveUp, Word::Refused(why)) => {
                self.because(&format!("the target's QEMU refuses to run it: {why}"));
                self.instead(TakingBack);
                self.take_back();
            }
            (Serving | GaveUp, Word::Aborted(why)) => {
                self.because(&why);
                self.give_again();
            }
            (Serving | GaveUp, Word::Ready | Word::Loaded) => self.give_again(),
            (Aborted, Word::Discarded | Word::Lost(_)) if !self.settled => {
                self.settled = true;
                self.then([Action::Finish]);
            }
            (Aborted, Word::Loaded | Word::Ready | Word::Refused(_)) if !self.settled => self.say_again(),
            _ => {}
        }
    }

    /// What came of taking the VM back.
    fn took(&mut self, took: Took, now: Nanos) {
        self.went();
        match took {
            Took::Stands(guest) => {
                self.left = Some(guest);
                if self.state == SourceState::TakingBack {
                    self.instead(SourceState::Aborted);
                    self.say_again();
                }
            }
            Took::Gone => {
                self.gone = true;
                // The target has the only copy, and nothing came after it: it cannot have run on here.
                let whole = self.loaded && self.stopped && !self.ran_on && !self.settled;
                match self.state {
                    SourceState::TakingBack if self.ran_on => self.behind = true,
                    SourceState::TakingBack => self.gave_up(now),
                    _ if whole => self.gave_up(now),
                    _ => {}
                }
            }
        }
    }

    fn because(&mut self, why: &str) {
        if self.reason.is_empty() {
            why.clone_into(&mut self.reason);
        }
    }

    fn then(&mut self, actions: impl IntoIterator<Item = Action>) {
        self.queue.extend(actions);
    }

    /// What was still to be done is not any more; this is.
    fn instead(&mut self, write: SourceState) {
        self.queue.clear();
        (self.again, self.pause, self.trouble, self.rewrite) = (None, AGAIN.0, None, None);
        self.state = write;
        self.queue.push_back(Action::Write(write, self.guest));
    }

    /// Words are said after what was to be done before; one that is still to be said is not said twice.
    fn say(&mut self, word: Word) {
        let say = Action::Say(word);
        if !self.queue.contains(&say) {
            self.queue.push_back(say);
        }
    }

    /// What is said when it is not certain that the target heard it: the last word.
    fn say_again(&mut self) {
        match self.state {
            SourceState::GaveUp | SourceState::Serving => {
                if self.pages_lost {
                    self.say(Word::PagesLost);
                }
                self.say(Word::GivenUp(self.guest));
                if self.gone {
                    self.say(Word::Gone);
                }
            }
            SourceState::Aborted => self.say(Word::Aborted(self.reason.clone())),
            _ => {}
        }
    }

    /// Given up, and the target has not said that it runs there.
    fn given(&self) -> bool {
        let runs = self.runs && self.lost.is_none();
        matches!(self.state, SourceState::GaveUp | SourceState::Serving) && !runs && !self.gone
    }

    /// Says the last word again, one that gives the VM away only once its copy here was seen to stand still.
    fn give_again(&mut self) {
        match self.state {
            SourceState::GaveUp | SourceState::Serving if self.given() && !self.seen => self.look(),
            SourceState::GaveUp | SourceState::Serving if self.claimed.is_some() => {}
            _ => self.say_again(),
        }
    }

    fn look(&mut self) {
        if !self.queue.contains(&Action::Ask) {
            self.queue.push_back(Action::Ask);
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
    }

    /// The VM was never given up: it goes back to its owner. The target is told once that was seen.
    fn abort(&mut self) {
        self.instead(SourceState::Aborted);
        self.ask = None;
        self.take_back();
        self.say_again();
        self.call = Some((Nanos(0), CALLS.0));
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
        use SourceState::{Aborted, GaveUp, Serving, TakingBack};
        !self.connected && !self.settled && matches!(self.state, GaveUp | Serving | Aborted | TakingBack)
    }

    fn call_from(&mut self, now: Nanos) {
        self.call = Some((after(now, CALLS.0), CALLS.0));
    }
}

impl Default for Departure {
    fn default() -> Self {
        Self::new()
    }
}

fn after(now: Nanos, pause: u64) -> Nanos {
    Nanos(now.0.saturating_add(pause))
}

#[cfg(test)]
mod tests;
