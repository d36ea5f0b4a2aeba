//! Who owns the VM (DESIGN rule 1): the two sides of one VM's handover as pure state machines. Each event returns the
//! steps to take, *in order*; a step must be done before the next begins, and a crash may come between any two. What
//! has to outlive a crash goes through [`SourceStep::Write`] and [`TargetStep::Write`] before it is acted on.
//!
//! ```text
//! source                                             target
//! Streaming ── VM stops, RAM and state are sent ───► Filling
//!     │                     ◄── Loaded ───────────── QEMU has loaded all: write Loaded, say it
//! write GivingUp, let QEMU complete (return path SHUT 0)
//!     │ QEMU: completed
//! write GaveUp, say it ── GivenUp ─────────────────► write Running, continue the VM
//!     │                     ◄── Runs ─────────────── say it
//! write Done
//! ```
//!
//! With post-copy (`core::postcopy`) the VM runs at the target before its pages are all there, and the source's copy is
//! needed until they are:
//!
//! ```text
//! source                                             target
//! Streaming ── stopped; which pages are due, state ► Filling
//!     │                     ◄── Ready ────────────── state loaded, faults are caught: write Ready, say it
//! write Serving, say it ── GivenUp ────────────────► write Fetching, run the VM
//!     │                     ◄── Runs ─────────────── say it
//!     │ sends pages         ◄── Filled ───────────── the last page is there: write Filled, say it
//! write Done
//! ```
//!
//! Where the two QEMUs stream to each other (`docs/decisions/0014-direct.md`) the source gives up as soon as its QEMU has stopped
//! the VM and waits (`pause-before-switchover`): that QEMU completes only when the target's has said SHUT 0, so the target's agent
//! may hear `GivenUp` before it has seen *loaded*.
//!
//! Stock QEMU resumes the source by itself if its migration stream breaks before SHUT 0 arrived (facts: return path),
//! so up to *QEMU: completed* every failure leaves the VM with the source; the source says `GivenUp` only after its QEMU
//! has confirmed that it stays stopped, or has died. A side that hears nothing after its last word is *in doubt*: it keeps its VM
//! paused and keeps asking (the source calls, on a settle connection) until the other side answers.

use super::wire::messages::Word;
use serde::{Deserialize, Serialize};

/// What the source's journal holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The VM is the source's; its stream may be under way.
    Streaming,
    /// The target has loaded everything, or the two QEMUs see to it that it has before the source's completes; QEMU is
    /// being told that it may complete.
    GivingUp,
    /// QEMU has completed: the VM stays paused here for good; the target may run it.
    GaveUp,
    /// The target runs it and we know.
    Done,
    /// The attempt failed; the VM is the source's.
    Aborted,
    /// Post-copy: the VM stays paused here for good and the target may run it, but its pages are still needed.
    Serving,
}

/// What the target's journal holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, Hash)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// The target QEMU is being filled.
    Filling,
    /// Everything is loaded; the VM is paused, and the source's until it says otherwise.
    Loaded,
    /// This is the running copy.
    Running,
    /// The target copy has been discarded.
    Discarded,
    /// Post-copy: the state is loaded and faults are caught; the VM is paused, and the source's until it says otherwise.
    Ready,
    /// Post-copy: this is the running copy, and some of its pages are still at the source.
    Fetching,
    /// Post-copy: this is the running copy, and it is whole.
    Filled,
}

/// What the source learns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// A word from the target.
    Word(Word),
    /// QEMU streams to the target's QEMU itself, has stopped the VM, and waits for leave to hand it over. It completes only
    /// when the target's has loaded everything, and else runs the VM again.
    QemuWaits,
    /// QEMU says that the migration is completed: it will not run the VM again.
    QemuCompleted,
    /// QEMU runs (or can run) the VM: the migration failed or was cancelled.
    QemuRuns,
    /// QEMU is gone for good, and all that it wrote has been sent.
    QemuDied,
    /// The connection to the target is lost.
    Lost,
    /// A settle connection to the target stands.
    Reconnected,
    /// Post-copy: the VM is stopped, and the target has been told which pages are still to come.
    Switched,
    /// Post-copy: the memory of the stopped VM is gone, so that no page of it can be sent any more.
    PagesLost,
    /// An operator has decided that this copy is the VM, whatever ran at the target.
    Decided,
    /// Somebody wants the attempt to end, with the reason.
    Abort(String),
}

/// What the source must do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceStep {
    /// Put this into the journal, durably.
    Write(SourceState),
    /// Give QEMU the return path's SHUT 0, then report [`SourceEvent::QemuCompleted`] or `QemuRuns`.
    LetComplete,
    /// End QEMU's migration so that it resumes the VM, and see that it runs. May come twice, and finds nothing to do
    /// if QEMU is gone.
    TakeBack,
    /// Say this to the target, if it can be heard.
    Say(Word),
    /// Call the target on a settle connection until it answers.
    Call,
    /// Over; the VM's outcome is final.
    Finish,
}

/// The source side of one VM's handover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceHandover {
    state: SourceState,
    settled: bool,
    reason: String,
    /// The switch of post-copy has been sent.
    switched: bool,
    /// The target has said that it runs the VM.
    runs: bool,
    pages_lost: bool,
}

impl SourceHandover {
    /// A new attempt.
    #[must_use]
    pub fn new() -> Self {
        Self::at(SourceState::Streaming, String::new())
    }

    fn at(state: SourceState, reason: String) -> Self {
        Self { state, settled: false, reason, switched: false, runs: false, pages_lost: false }
    }

    /// After a restart: the journal's state, and what QEMU says of itself (`completed`: it has given the VM up;
    /// `None`: it cannot be asked because it is gone).
    #[must_use]
    pub fn recover(state: SourceState, qemu_completed: Option<bool>) -> (Self, Vec<SourceStep>) {
        let reason = "the source agent was restarted".to_owned();
        let mut h = Self::at(state, reason);
        let steps = match state {
            SourceState::Done => {
                h.settled = true;
                vec![SourceStep::Finish]
            }
            // Even if QEMU is gone: our death made it resume the VM, which may have run on, so that the target's copy,
            // if it has one, is out of date.
            SourceState::Streaming => h.abort(),
            SourceState::GivingUp => match qemu_completed {
                Some(false) => h.abort(),
                // Gone or completed: it can never run here again, so the loaded target is the one copy.
                Some(true) | None => h.gave_up(),
            },
            SourceState::GaveUp => vec![SourceStep::Call],
            SourceState::Serving => {
                h.pages_lost = qemu_completed.is_none();
                vec![SourceStep::Call]
            }
            // Written before the VM was taken back: taking it back twice is harmless.
            SourceState::Aborted => vec![SourceStep::TakeBack, SourceStep::Call],
        };
        (h, steps)
    }

    /// The journal's state.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }
    /// Whether the outcome is known to both sides.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.settled
    }
    /// Paused here, and not known whether the target runs it.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        matches!(self.state, SourceState::GaveUp | SourceState::Serving) && !self.settled && !self.runs
    }
    /// Given up, and the target still needs pages.
    #[must_use]
    pub fn serving(&self) -> bool {
        self.state == SourceState::Serving
    }
    /// Why the attempt was aborted, if it was.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What is said when it is not certain that the target heard it: the last word.
    fn given_up_again(&self) -> Vec<SourceStep> {
        let mut steps = vec![SourceStep::Say(Word::GivenUp)];
        if self.pages_lost {
            steps.insert(0, SourceStep::Say(Word::PagesLost));
        }
        steps
    }

    /// Takes an event in.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceStep> {
        use SourceState::{Aborted, Done, GaveUp, GivingUp, Serving, Streaming};
        match (self.state, event) {
            (Streaming, SourceEvent::Switched) => {
                self.switched = true;
                vec![]
            }
            // Nobody but this side could run the VM here again, so nothing has to be waited for.
            (Streaming, SourceEvent::Word(Word::Ready)) if self.switched => {
                self.state = Serving;
                vec![SourceStep::Write(Serving), SourceStep::Say(Word::GivenUp), SourceStep::Call]
            }
            (Streaming, SourceEvent::PagesLost) => {
                self.because("the memory of the VM is gone");
                self.abort()
            }
            (Serving, SourceEvent::Reconnected | SourceEvent::Word(Word::Ready | Word::Aborted(_))) => {
                self.given_up_again()
            }
            (Serving, SourceEvent::Word(Word::Runs)) => {
                self.runs = true;
                vec![]
            }
            (Serving, SourceEvent::Word(Word::Filled)) => {
                self.state = Done;
                self.settled = true;
                vec![SourceStep::Write(Done), SourceStep::Finish]
            }
            // Of a copy that has run nothing can be taken back: the one here is older than what it did.
            (Serving, SourceEvent::Word(Word::Discarded)) if !self.runs => self.given_back(),
            (Serving | GaveUp, SourceEvent::Decided) => {
                self.because("settled by an operator: the copy at the source is the VM");
                self.given_back()
            }
            (Serving, SourceEvent::PagesLost) => {
                self.pages_lost = true;
                vec![SourceStep::Say(Word::PagesLost)]
            }
            (Serving, SourceEvent::Lost) => vec![SourceStep::Call],
            (Streaming, SourceEvent::Word(Word::Loaded) | SourceEvent::QemuWaits) => {
                self.state = GivingUp;
                vec![SourceStep::Write(GivingUp), SourceStep::LetComplete]
            }
            (GivingUp, SourceEvent::QemuCompleted | SourceEvent::QemuDied) => self.gave_up(),
            (Streaming | GivingUp, SourceEvent::QemuRuns) => {
                self.because("the source QEMU ended the migration");
                self.abort()
            }
            // Nobody can run it here again. If its last byte was out, the target may still load everything; if not,
            // GivenUp, said after the last byte, tells the target that no more will come.
            (Streaming, SourceEvent::QemuDied) => {
                self.because("the source QEMU is gone");
                self.state = GaveUp;
                vec![SourceStep::Write(GaveUp), SourceStep::Say(Word::GivenUp)]
            }
            (Streaming, SourceEvent::Lost) => {
                self.because("the connection to the target was lost");
                self.abort()
            }
            // SHUT has been given to QEMU: whether it completed decides, not the connection.
            (GivingUp, SourceEvent::Lost | SourceEvent::Reconnected) => vec![],
            (Streaming, SourceEvent::Abort(why) | SourceEvent::Word(Word::Aborted(why))) => {
                self.because(&why);
                self.abort()
            }
            // SHUT cannot be undone: QEMU's answer comes first. If the target has dropped its copy, it will answer
            // GivenUp with Discarded, and the VM is taken back then.
            (GivingUp, SourceEvent::Abort(_) | SourceEvent::Word(_)) => vec![],
            // Both come after GivenUp if QEMU died in the middle: the target has loaded what it had, or could not.
            (GaveUp, SourceEvent::Reconnected | SourceEvent::Word(Word::Loaded | Word::Aborted(_))) => {
                vec![SourceStep::Say(Word::GivenUp)]
            }
            (GaveUp, SourceEvent::Word(Word::Runs)) => {
                self.state = Done;
                self.settled = true;
                vec![SourceStep::Write(Done), SourceStep::Finish]
            }
            // The target copy is gone before it ever ran, and never will: the paused VM here is the one copy.
            (GaveUp, SourceEvent::Word(Word::Discarded)) => self.given_back(),
            (GaveUp, SourceEvent::Lost) => vec![SourceStep::Call],
            (Aborted, SourceEvent::Reconnected) => vec![SourceStep::Say(Word::Aborted(self.reason.clone()))],
            (Aborted, SourceEvent::Word(Word::Discarded)) => {
                self.settled = true;
                vec![SourceStep::Finish]
            }
            (Aborted, SourceEvent::Word(Word::Loaded | Word::Ready)) => {
                vec![SourceStep::Say(Word::Aborted(self.reason.clone()))]
            }
            (Aborted, SourceEvent::Lost) if !self.settled => vec![SourceStep::Call],
            _ => vec![],
        }
    }

    fn because(&mut self, why: &str) {
        if self.reason.is_empty() {
            why.clone_into(&mut self.reason);
        }
    }

    fn abort(&mut self) -> Vec<SourceStep> {
        self.state = SourceState::Aborted;
        vec![
            SourceStep::Write(SourceState::Aborted),
            SourceStep::TakeBack,
            SourceStep::Say(Word::Aborted(self.reason.clone())),
            SourceStep::Call,
        ]
    }

    fn given_back(&mut self) -> Vec<SourceStep> {
        self.because("the target copy was lost before it ran");
        self.state = SourceState::Aborted;
        self.settled = true;
        vec![SourceStep::Write(SourceState::Aborted), SourceStep::TakeBack, SourceStep::Finish]
    }

    fn gave_up(&mut self) -> Vec<SourceStep> {
        self.state = SourceState::GaveUp;
        vec![SourceStep::Write(SourceState::GaveUp), SourceStep::Say(Word::GivenUp), SourceStep::Call]
    }
}

impl Default for SourceHandover {
    fn default() -> Self {
        Self::new()
    }
}

/// What the target learns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetEvent {
    /// A word from the source.
    Word(Word),
    /// The target QEMU said SHUT 0: all is loaded.
    QemuLoaded,
    /// The target QEMU failed or died.
    QemuFailed(String),
    /// The connection to the source is lost.
    Lost,
    /// Something on this side makes the attempt impossible.
    Abort(String),
    /// Post-copy: the device state is loaded, faults are caught, and which pages are still to come is on disk.
    Prepared,
    /// Post-copy: every page is there.
    Filled,
    /// An operator has decided that this copy is the VM.
    Decided,
    /// [`TargetStep::Run`] could not be done, and the VM surely has not run here: its QEMU was gone before it was told
    /// to continue. The steps after it are dropped.
    NeverRan,
}

/// What the target must do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetStep {
    /// Put this into the journal, durably.
    Write(TargetState),
    /// Say this to the source, if it can be heard.
    Say(Word),
    /// Continue the VM (unless the group is to stay paused). If QEMU is gone before it was told to, report
    /// [`TargetEvent::NeverRan`] and drop the steps after this one.
    Run,
    /// The source QEMU died: once all that came has been written, close the target QEMU's stream, then report
    /// [`TargetEvent::QemuLoaded`] or `QemuFailed`.
    EndStream,
    /// Quit the target QEMU.
    Discard,
    /// Over.
    Finish,
}

/// The target side of one VM's handover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetHandover {
    state: TargetState,
    connected: bool,
    /// The source has said that its memory of the VM is gone.
    pages_lost: bool,
    /// Every page is there.
    whole: bool,
}

impl TargetHandover {
    /// A new attempt.
    #[must_use]
    pub fn new() -> Self {
        Self { state: TargetState::Filling, connected: true, pages_lost: false, whole: false }
    }

    /// After a restart, with the journal's state.
    #[must_use]
    pub fn recover(state: TargetState) -> (Self, Vec<TargetStep>) {
        let mut h = Self { state, connected: false, pages_lost: false, whole: false };
        let steps = match state {
            TargetState::Filling => h.discard(),
            TargetState::Loaded | TargetState::Ready => vec![],
            TargetState::Fetching => vec![TargetStep::Run],
            TargetState::Filled => vec![TargetStep::Finish],
            // Written before the VM was continued: continuing twice is harmless.
            TargetState::Running => vec![TargetStep::Run, TargetStep::Finish],
            TargetState::Discarded => vec![TargetStep::Discard, TargetStep::Finish],
        };
        (h, steps)
    }

    /// The journal's state.
    #[must_use]
    pub fn state(&self) -> TargetState {
        self.state
    }
    /// Loaded, and the source cannot be heard.
    #[must_use]
    pub fn in_doubt(&self) -> bool {
        matches!(self.state, TargetState::Loaded | TargetState::Ready) && !self.connected
    }
    /// The source will send no page any more: what is lacking is lost, and a copy that has not run stays paused.
    #[must_use]
    pub fn pages_lost(&self) -> bool {
        self.pages_lost && !self.whole
    }

    /// Takes an event in.
    pub fn on(&mut self, event: TargetEvent) -> Vec<TargetStep> {
        use TargetState::{Discarded, Fetching, Filled, Filling, Loaded, Ready, Running};
        if matches!(event, TargetEvent::Word(_)) {
            self.connected = true;
        }
        match (self.state, event) {
            (Filling, TargetEvent::Prepared) => {
                self.state = Ready;
                vec![TargetStep::Write(Ready), TargetStep::Say(Word::Ready)]
            }
            (Ready | Fetching, TargetEvent::Word(Word::PagesLost)) => {
                self.pages_lost = true;
                vec![]
            }
            // It would run into a page that nobody has. An operator may still let it.
            (Ready, TargetEvent::Word(Word::GivenUp)) if self.pages_lost && !self.whole => vec![],
            (Ready, TargetEvent::Filled) => {
                self.whole = true;
                vec![]
            }
            (Ready, TargetEvent::Word(Word::GivenUp) | TargetEvent::Decided) => {
                self.state = Fetching;
                vec![TargetStep::Write(Fetching), TargetStep::Run, TargetStep::Say(Word::Runs)]
            }
            (Fetching, TargetEvent::Word(Word::GivenUp)) => vec![TargetStep::Say(Word::Runs)],
            (Fetching, TargetEvent::Filled) => {
                self.state = Filled;
                vec![TargetStep::Write(Filled), TargetStep::Say(Word::Filled), TargetStep::Finish]
            }
            (Filled, TargetEvent::Word(Word::GivenUp)) => vec![TargetStep::Say(Word::Filled)],
            (Filling, TargetEvent::QemuLoaded) => {
                self.state = Loaded;
                vec![TargetStep::Write(Loaded), TargetStep::Say(Word::Loaded)]
            }
            (Filling, TargetEvent::Lost) => self.discard(),
            (Filling, TargetEvent::Word(Word::GivenUp)) => vec![TargetStep::EndStream],
            // A loaded copy may be dropped too: the source, if it has given up, hears Discarded and takes its VM back.
            (Filling | Loaded | Ready, TargetEvent::QemuFailed(why)) | (Filling, TargetEvent::Abort(why)) => {
                let mut steps = self.discard();
                steps.insert(2, TargetStep::Say(Word::Aborted(why)));
                steps
            }
            (Discarded, TargetEvent::Word(Word::GivenUp)) => vec![TargetStep::Say(Word::Discarded)],
            // Told on a settle connection that the source keeps (or kept) its VM.
            (Filling | Loaded | Ready | Discarded, TargetEvent::Word(Word::Aborted(_))) => {
                let mut steps = self.discard();
                steps.insert(2, TargetStep::Say(Word::Discarded));
                steps
            }
            // Never on its own: the source may have given up.
            (Loaded | Ready | Fetching, TargetEvent::Lost) => {
                self.connected = false;
                vec![]
            }
            (Loaded, TargetEvent::Word(Word::GivenUp) | TargetEvent::Decided) => {
                self.state = Running;
                vec![
                    TargetStep::Write(Running),
                    TargetStep::Run,
                    TargetStep::Say(Word::Runs),
                    TargetStep::Finish,
                ]
            }
            (Running, TargetEvent::Word(Word::GivenUp)) => vec![TargetStep::Say(Word::Runs)],
            // The source has not heard Runs: its paused VM is the one copy, and Discarded gives it back.
            (Running | Fetching, TargetEvent::NeverRan) => {
                let mut steps = self.discard();
                steps.insert(2, TargetStep::Say(Word::Discarded));
                steps
            }
            _ => vec![],
        }
    }

    fn discard(&mut self) -> Vec<TargetStep> {
        self.state = TargetState::Discarded;
        vec![TargetStep::Write(TargetState::Discarded), TargetStep::Discard, TargetStep::Finish]
    }
}

impl Default for TargetHandover {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
