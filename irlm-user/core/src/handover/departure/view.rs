//! What is seen of a departure from outside: statuses, records and an operator's questions are made
//! of it.

use super::Departure;
use crate::account::Tally;
use crate::handover::{GuestState, SourceState};
use crate::ram::{Compared, PageAt, Ram};

impl Departure {
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
        self.here.left
    }
    /// Whether the process of the copy here was found to have ended.
    #[must_use]
    pub fn gone(&self) -> bool {
        self.here.gone
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
                SourceState::Serving => {
                    !self.target.runs || self.target.lost.is_some() || self.here.pages_lost
                }
                // QEMU was let go, and does not say what came of it.
                SourceState::GivingUp => self.here.behind || self.agenda.trouble.is_some(),
                _ => false,
            }
    }
    /// Given up, and pages that the target needs are lost.
    #[must_use]
    pub fn pages_lost(&self) -> bool {
        self.serving() && self.here.pages_lost
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
        self.agenda.trouble.as_deref()
    }
    /// The process of the copy here has ended, and may have run the VM after it was given up: the
    /// target's copy may be older.
    #[must_use]
    pub fn behind(&self) -> bool {
        self.here.behind
    }
    /// How the copy here stands, if somebody has continued it although it was given up.
    #[must_use]
    pub fn claimed(&self) -> Option<GuestState> {
        self.here.claimed
    }
    /// What the target was sent and has, if both have said so and it is the same.
    #[must_use]
    pub fn proven(&self) -> Option<Tally> {
        self.target.sent.filter(|_| self.target.proven)
    }
    /// What came of comparing the memory, if it was found to be the same: how, the clocks of KVM that were let pass, and what the
    /// target had said.
    #[must_use]
    pub fn same_memory(&self) -> Option<(&Compared, u32, &Ram)> {
        self.target.memory.same()
    }
    /// Pages that differ in memory: whether KVM has a clock in them is to be told ([`super::Input::Clocks`]).
    #[must_use]
    pub fn odd(&self) -> &[PageAt] {
        self.target.memory.odd()
    }
    /// Post-copy: the target was told which pages come after it runs.
    #[must_use]
    pub fn switched(&self) -> bool {
        self.switched
    }
    /// What the target has is not what it was sent: in one line. It is not let run there.
    #[must_use]
    pub fn differs(&self) -> Option<&str> {
        self.target.differs.as_deref()
    }
    /// Why the target has lost its copy, if it has.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.target.lost.as_deref()
    }
    /// Whether the copy here is again, or still, the VM, and stands as its owner left it (or its
    /// process has ended).
    #[must_use]
    pub fn is_back(&self) -> bool {
        self.state == SourceState::Aborted && (self.here.left.is_some() || self.here.gone)
    }
    /// Whether an operator's word would be heard.
    #[must_use]
    pub fn may_be_decided(&self) -> bool {
        self.in_doubt() || (self.serving() && !self.target.connected)
    }
}
