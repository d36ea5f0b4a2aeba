//! The target side of one VM's handover: a driver without I/O and without a clock; mirror of [`super::departure`].
//!
//! The copy here is the VM only after the source has given it up, and runs only then. It is thrown away only if it never was
//! the VM: because the source says that its own is, or because it could not be loaded. If its QEMU refuses to run it, it
//! says so and never runs, unless the source's copy is gone: two that cannot both be continued must not both be.

use super::agenda::{Agenda, after};
use super::{Decision, GuestState, Ran, TargetState};
use crate::account::Tally;
use crate::ram::Ram;
use crate::units::Nanos;
use crate::wire::messages::Word;

/// What an arrival is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// A word from the source.
    Word(Word),
    /// The target QEMU has loaded everything. With what the pages come to that it was given, if they were accounted for.
    Loaded(Option<Tally>),
    /// Before [`Input::Loaded`]: what the memory comes to of whoever has loaded it, where that is to be compared.
    Memory(Ram),
    /// Post-copy: the device state is loaded, faults are caught, and which pages are still to come is on disk. With what the
    /// others come to, if they were accounted for and are all there.
    Prepared(Option<Tally>),
    /// The target QEMU could not load it, or has ended.
    Failed(String),
    /// The connection to the source is lost.
    Lost,
    /// Post-copy: every page is there.
    Filled,
    /// An operator's word on a VM in doubt.
    Decided(Decision),
    /// Something on this side wants the attempt to end.
    Abort(String),
}

/// What an arrival wants done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Put this into the journal, durably, with the state in which the VM is to be.
    Write(TargetState, GuestState),
    /// Say this to the source, if it can be heard.
    Say(Word),
    /// After a restart: see whether the QEMU has loaded everything by itself.
    Look,
    /// Let the VM run, if it is to.
    Run(GuestState),
    /// Note that it runs, so that a restart does not run it again.
    Settle,
    /// The source's QEMU is gone: once all that came has been written, close the target QEMU's stream, which then says
    /// that it has loaded everything or that it cannot.
    EndStream,
    /// End what waits for the VM, and see that it is gone.
    Discard,
    /// What was held for the arrival can go. Words are still answered.
    Finish,
}

/// What came of an action. `Failed`: it was not done, or that is not known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is done.
    Done,
    /// It could not be done, or what came of it is not known; a write may be on disk or not. With the reason.
    Failed(String),
    /// [`Action::Run`]: what was seen.
    Ran(Ran),
    /// [`Action::Look`]: whether everything is loaded. `None`: the process has ended.
    Looked(Option<bool>),
}

/// First and longest pause between two tries of the same action.
const AGAIN: (u64, u64) = (100_000_000, 2_000_000_000);
/// For how long a QEMU that refuses to run the VM is asked again before that is said: a lock on an image may be let go.
const REFUSED: u64 = 2_000_000_000;

/// What the pages come to that were given to QEMU, and those that the source says it has sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Proof {
    made: Option<Tally>,
    sent: Option<Tally>,
    /// What it holds in memory.
    memory: Option<Ram>,
}

// bounds: what decides about one copy of a VM; each field is one thing that was seen, or said
/// The driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    state: TargetState,
    /// What a restart would surely find.
    written: TargetState,
    agenda: Agenda<Action>,
    /// What is only done for order's sake, and when.
    later: Option<(Action, Nanos)>,
    /// Whether the two QEMUs stream to each other, so that the source may give up before it hears that all is loaded.
    direct: bool,
    connected: bool,
    guest: GuestState,
    /// It was seen to run, or to stand as it is to stand.
    ran: bool,
    /// It may have been told to run by an agent before this one.
    told: bool,
    refused_since: Option<Nanos>,
    /// The source's copy is gone.
    only: bool,
    /// The source has said that its memory of the VM is gone.
    pages_lost: bool,
    /// Every page is there.
    whole: bool,
    finished: bool,
    proof: Proof,
    reason: String,
}

impl Arrival {
    /// A new attempt, of which the journal holds that it began.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: TargetState::Filling,
            written: TargetState::Filling,
            agenda: Agenda::new(AGAIN),
            later: None,
            direct: false,
            connected: true,
            guest: GuestState::Running,
            ran: false,
            told: false,
            refused_since: None,
            only: false,
            pages_lost: false,
            whole: false,
            finished: false,
            proof: Proof::default(),
            reason: String::new(),
        }
    }

    /// After a restart, by what the journal holds; `settled`: it was noted that the VM runs.
    #[must_use]
    pub fn recover(state: TargetState, guest: GuestState, settled: bool) -> Self {
        let mut a = Self {
            state,
            written: state,
            connected: false,
            guest,
            told: true,
            ran: settled,
            // Whoever streamed to its QEMU may have gone on.
            direct: true,
            reason: "the target agent was restarted".into(),
            ..Self::new()
        };
        match state {
            TargetState::Filling => a.then([Action::Look]),
            TargetState::Loaded | TargetState::Ready | TargetState::Refused => {}
            TargetState::Running if settled => a.then([Action::Finish]),
            TargetState::Running => a.then([Action::Run(guest), Action::Settle, Action::Finish]),
            TargetState::Fetching => a.then([Action::Run(guest)]),
            TargetState::Discarded if settled => a.then([Action::Finish]),
            TargetState::Discarded => a.then([Action::Discard, Action::Finish]),
            TargetState::Filled | TargetState::Lost => a.then([Action::Finish]),
        }
        a
    }

    /// From here on the two QEMUs stream to each other.
    pub fn goes_direct(&mut self) {
        self.direct = true;
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> TargetState {
        self.state
    }
    /// In which state the VM is to be here.
    #[must_use]
    pub fn guest(&self) -> GuestState {
        self.guest
    }
    /// Whether it was seen to run here, or to stand as it is to stand.
    #[must_use]
    pub fn ran(&self) -> bool {
        self.ran
    }
    /// What was held for it is no longer needed.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.finished
    }
    /// It may be the VM, and that is not known; or it is, and cannot be seen to run, or lacks pages that nobody has.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        match self.state {
            TargetState::Loaded | TargetState::Ready => !self.connected || self.differs() || self.only,
            TargetState::Refused => true,
            TargetState::Running => !self.ran && self.agenda.trouble.is_some(),
            TargetState::Fetching => self.pages_lost() || !self.ran && self.agenda.trouble.is_some(),
            _ => false,
        }
    }
    /// Whether an operator's word would be heard.
    #[must_use]
    pub fn may_be_decided(&self) -> bool {
        let waits = matches!(self.state, TargetState::Loaded | TargetState::Ready);
        let waits = waits && (!self.connected || self.differs() || self.only);
        waits || matches!(self.state, TargetState::Refused | TargetState::Fetching)
    }
    /// The source will send no page any more: what is lacking is lost, and a copy that has not run stays paused.
    #[must_use]
    pub fn pages_lost(&self) -> bool {
        self.pages_lost && !self.whole
    }
    /// Whether what was loaded is not what the source says it has sent. Only an operator can let that run.
    #[must_use]
    pub fn differs(&self) -> bool {
        self.proof.made.zip(self.proof.sent).is_some_and(|(made, sent)| made != sent)
    }
    /// Why it ended, if it did.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }
    /// What is being tried again, and why it does not succeed.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.agenda.trouble.as_deref()
    }

    /// When [`Self::poll`] may have something to do though nothing is heard.
    #[must_use]
    pub fn wake(&self) -> Option<Nanos> {
        if self.agenda.is_busy() {
            return None;
        }
        [self.agenda.wake(), self.later.as_ref().map(|l| l.1)].into_iter().flatten().min()
    }

    /// What is to be done now. [`Self::done`] must be called before the next.
    pub fn poll(&mut self, now: Nanos) -> Option<Action> {
        if self.agenda.is_busy() {
            return None;
        }
        let action = if self.agenda.is_due(now) {
            self.agenda.take()
        } else {
            self.later.take_if(|l| l.1 <= now).map(|l| l.0)
        };
        self.agenda.begin(action)
    }

    /// What came of the action that [`Self::poll`] gave last.
    pub fn done(&mut self, outcome: Outcome, now: Nanos) {
        let Some(action) = self.agenda.end() else { return };
        match (&action, outcome) {
            (Action::Write(state, guest), Outcome::Failed(why)) => self.unwritten((*state, *guest), why, now),
            (Action::Write(state, _), _) => {
                let late = self.agenda.trouble.is_some() && *state == self.state;
                self.written = *state;
                self.agenda.went();
                match state {
                    TargetState::Loaded | TargetState::Ready if late => self.say_made(),
                    _ => {}
                }
            }
            (Action::Run(_) | Action::Look | Action::Discard, _) if !self.still_wants(&action) => {}
            (Action::Run(_), Outcome::Ran(ran)) => self.run_came_to(ran, now),
            (Action::Run(_) | Action::Look, Outcome::Failed(why)) => self.agenda.try_again(action, why, now),
            (Action::Look, Outcome::Looked(loaded)) => {
                self.agenda.went();
                match loaded {
                    Some(true) => self.loaded(),
                    _ => self.discard(None),
                }
            }
            (Action::Settle, Outcome::Failed(_)) => self.later = Some((Action::Settle, after(now, AGAIN.1))),
            (Action::Discard, Outcome::Failed(why)) => {
                // Written down, it will not run, whoever holds it up.
                if self.written == TargetState::Discarded {
                    self.later = Some((Action::Discard, after(now, AGAIN.1)));
                } else {
                    self.agenda.try_again(Action::Discard, why, now);
                }
            }
            (Action::Discard, _) => self.agenda.went(),
            (Action::Finish, _) => self.finished = true,
            _ => {}
        }
    }

    /// Whether what was asked for before something else happened is still to be done.
    fn still_wants(&self, action: &Action) -> bool {
        match action {
            Action::Run(_) => matches!(self.state, TargetState::Running | TargetState::Fetching),
            Action::Look => self.state == TargetState::Filling,
            _ => self.state == TargetState::Discarded,
        }
    }

    /// A write that failed may be on disk or not.
    fn unwritten(&mut self, (state, guest): (TargetState, GuestState), why: String, now: Nanos) {
        use TargetState::{Discarded, Filling, Loaded, Ready};
        if state != self.state {
            // A newer one follows.
            return;
        }
        let write = Action::Write(state, guest);
        match state {
            // The guest stands still meanwhile, so its source had better go on; but a loaded copy is not thrown away
            // before the source says that its own is the VM.
            Loaded | Ready => {
                self.agenda.clear();
                self.say(Word::Aborted(format!("the journal cannot be written: {why}")));
                self.agenda.trouble = Some(why);
                self.later = Some((write, after(now, AGAIN.1)));
            }
            // Seen to be gone it cannot run, whatever the disk says.
            Discarded => {
                self.agenda.trouble = Some(why);
                let at = if self.written == Filling { AGAIN.1 } else { AGAIN.0 };
                self.later = Some((write, after(now, at)));
            }
            _ => self.agenda.try_again(write, why, now),
        }
    }

    /// What came of letting the VM run.
    fn run_came_to(&mut self, ran: Ran, now: Nanos) {
        match ran {
            Ran::Runs | Ran::Paused => {
                self.agenda.went();
                self.ran = true;
                self.refused_since = None;
                self.say(Word::Runs);
                if self.state == TargetState::Running {
                    self.then([Action::Settle, Action::Finish]);
                } else if self.whole {
                    self.filled();
                }
            }
            Ran::Refused(why) => {
                let since = *self.refused_since.get_or_insert(now);
                // Alone it goes on asking: there is no other copy that could run instead. So does one whose pages come.
                let alone = self.only || self.state == TargetState::Fetching;
                if !alone && now.0 >= since.0.saturating_add(REFUSED) {
                    self.refused_since = None;
                    self.reason.clone_from(&why);
                    self.instead(TargetState::Refused);
                    self.say(Word::Refused(why));
                } else {
                    self.agenda.try_again(Action::Run(self.guest), why, now);
                }
            }
            Ran::Gone { told } if told || self.told => {
                self.lose("its process has ended, and nobody knows whether it had run here");
            }
            // The source has not heard Runs: its paused VM is the one copy, and Discarded gives it back.
            Ran::Gone { .. } => {
                "its process had ended before it could run".clone_into(&mut self.reason);
                self.discard(Some(Word::Discarded));
            }
        }
    }

    /// Takes in what happened.
    pub fn handle(&mut self, input: Input, _now: Nanos) {
        use TargetState::{Fetching, Filled, Filling, Loaded, Ready, Refused, Running};
        match (self.state, input) {
            (_, Input::Word(word)) => {
                self.connected = true;
                self.hears(word);
            }
            (Filling, Input::Memory(ram)) => self.proof.memory = Some(ram),
            (Filling, Input::Loaded(made)) => {
                self.proof.made = made;
                self.loaded();
            }
            (Filling, Input::Prepared(made)) => {
                self.proof.made = made;
                self.instead(Ready);
                self.say_made();
            }
            // Never on its own: the source may have given up.
            (Filling, Input::Lost) if !self.direct => {
                self.because("the connection to the source was lost");
                self.discard(None);
            }
            (_, Input::Lost) => self.connected = false,
            (Filling, Input::Abort(why)) if self.direct => self.say(Word::Aborted(why)),
            (Filling | Loaded | Ready, Input::Failed(why)) | (Filling, Input::Abort(why)) => {
                self.because(&why);
                self.discard(Some(Word::Aborted(why)));
            }
            (Refused, Input::Failed(why)) => {
                self.reason = why;
                self.discard(Some(Word::Discarded));
            }
            (Fetching, Input::Failed(why)) if self.ran => self.lose(&why),
            (Ready | Fetching, Input::Filled) => {
                self.whole = true;
                if self.state == Fetching && self.ran {
                    self.filled();
                }
            }
            (Loaded | Ready | Refused, Input::Decided(Decision::Target)) => {
                // No source takes it back: it is tried until it runs.
                self.only = true;
                self.own();
            }
            // Its `cont` is refused, and it would give it back.
            (Running, Input::Decided(Decision::Target)) => self.only = true,
            (Loaded | Ready | Refused, Input::Decided(Decision::Source)) => {
                "settled by an operator: the source's copy is the VM".clone_into(&mut self.reason);
                self.discard(Some(Word::Discarded));
            }
            // It is to run with what it has.
            (Fetching, Input::Decided(Decision::Target)) if self.pages_lost => {
                self.whole = true;
                if self.ran {
                    self.filled();
                }
            }
            (Running | Filled, _) | (_, _) => {}
        }
    }

    fn hears(&mut self, word: Word) {
        use TargetState::{Discarded, Fetching, Filled, Filling, Loaded, Lost, Ready, Refused, Running};
        match (self.state, word) {
            (Filling, Word::GivenUp(guest, sent)) => {
                self.guest = guest;
                self.proof.sent = sent.or(self.proof.sent);
                self.agenda.once(Action::EndStream);
            }
            (Ready | Fetching, Word::PagesLost) => self.pages_lost = true,
            // It would run into a page that nobody has. An operator may still let it.
            (Ready, Word::GivenUp(..)) if self.pages_lost && !self.whole => {}
            (Loaded | Ready, Word::GivenUp(guest, sent)) => {
                self.guest = guest;
                self.proof.sent = sent.or(self.proof.sent);
                // Its source compared them before it gave up, unless it had lost its copy by then. One that was started anew
                // does not know what it sent: it would only say the same again.
                match (self.differs(), sent) {
                    (false, _) => self.own(),
                    (true, Some(_)) => self.say_made(),
                    (true, None) => {}
                }
            }
            (Running | Fetching, Word::GivenUp(..)) if self.ran => self.say(Word::Runs),
            // Before it was given up: it may be older than what the other one did, so an operator chooses.
            (Loaded | Ready | Running | Fetching, Word::Gone) => self.only = true,
            (Refused, Word::Gone) => {
                self.only = true;
                self.own();
            }
            (Refused, Word::GivenUp(..)) => self.say(Word::Refused(self.reason.clone())),
            (Filled, Word::GivenUp(..)) => self.say(Word::Filled),
            (Discarded, Word::GivenUp(..) | Word::Aborted(_) | Word::Gone) => self.say(Word::Discarded),
            (Lost, Word::GivenUp(..) | Word::Aborted(_) | Word::Gone) => {
                self.say(Word::Lost(self.reason.clone()));
            }
            // The source keeps (or has again) its VM.
            (Filling | Loaded | Ready | Refused, Word::Aborted(why)) => {
                self.because(&why);
                self.discard(Some(Word::Discarded));
            }
            _ => {}
        }
    }

    fn loaded(&mut self) {
        self.instead(TargetState::Loaded);
        self.say_made();
    }

    /// Says that it is loaded, and what its pages come to. What could not be written yet is said once it is.
    fn say_made(&mut self) {
        if self.later.is_some() {
            return;
        }
        let post_copy = self.state == TargetState::Ready;
        if let Some(ram) = self.proof.memory.clone() {
            self.say(Word::Memory(ram));
        }
        self.say(if post_copy { Word::Ready(self.proof.made) } else { Word::Loaded(self.proof.made) });
    }

    /// The copy here is the VM from now on.
    fn own(&mut self) {
        let post_copy = self.state == TargetState::Ready;
        self.instead(if post_copy { TargetState::Fetching } else { TargetState::Running });
        self.then([Action::Run(self.guest)]);
    }

    fn filled(&mut self) {
        self.instead(TargetState::Filled);
        self.say(Word::Filled);
        self.then([Action::Finish]);
    }

    fn lose(&mut self, why: &str) {
        why.clone_into(&mut self.reason);
        self.instead(TargetState::Lost);
        self.say(Word::Lost(why.to_owned()));
        self.then([Action::Finish]);
    }

    fn discard(&mut self, word: Option<Word>) {
        self.instead(TargetState::Discarded);
        self.then([Action::Discard]);
        if let Some(word) = word {
            self.say(word);
        }
        self.then([Action::Finish]);
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
    fn instead(&mut self, write: TargetState) {
        self.later = None;
        self.state = write;
        self.agenda.instead(Action::Write(write, self.guest));
    }

    /// Words are said after what was to be done before; one that is still to be said is not said twice.
    fn say(&mut self, word: Word) {
        self.agenda.once(Action::Say(word));
    }
}

impl Default for Arrival {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
