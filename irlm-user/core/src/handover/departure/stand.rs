//! How the VM's QEMU or VMM at the source stands, as it was seen or asked, and what follows from
//! it.

use super::{ASK, Action, Departure, Input};
use crate::handover::agenda::after;
use crate::handover::{SourceState, Standing, Took};
use crate::units::Nanos;

impl Departure {
    /// What came of letting QEMU go is asked for until it is known, also after a restart what
    /// stands here.
    pub(super) fn ask_later(&mut self, now: Nanos) {
        let again = self.given() && (!self.here.seen || self.here.claimed.is_some());
        let served = self.recovered && self.state == SourceState::Serving;
        if self.state == SourceState::GivingUp || served || again {
            self.ask = Some(after(now, ASK));
        }
    }

    pub(super) fn look(&mut self) {
        self.agenda.once(Action::Ask);
    }

    /// How a QEMU that was asked stands.
    pub(super) fn answered(&mut self, s: Standing, now: Nanos) {
        match (self.state, s) {
            (_, Standing::Gone) if self.target.lost.is_some() => self.stands(s, now),
            // Somebody's `cont` by hand: it is not said again that it was given up, and nobody but
            // them can tell why.
            (SourceState::GaveUp | SourceState::Serving, Standing::Back(guest)) if self.given() => {
                self.here.ran_on = true;
                (self.here.claimed, self.agenda.trouble) = (Some(guest), None);
                self.ask_later(now);
            }
            (SourceState::GaveUp | SourceState::Serving, Standing::Completed) if self.given() => {
                self.agenda.trouble = None;
                if self.here.claimed.is_none()
                    && self.target.connected
                    && !std::mem::replace(&mut self.here.seen, true)
                {
                    self.say_again();
                }
            }
            // The memory of a VM that is served went with its process; what it holds is looked at
            // when it is asked for.
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
    pub(super) fn stands(&mut self, s: Standing, now: Nanos) {
        use SourceState::{Aborted, GaveUp, GivingUp, Streaming};
        self.here.gone |= s == Standing::Gone && self.state != SourceState::Serving;
        self.here.ran_on |= matches!(s, Standing::Back(g) if g.runs());
        match (self.state, s) {
            // Nobody saw what it did while no agent was there. It may have let the guest run on, and
            // then the target's copy is older than what the guest has written to its disks.
            (GivingUp, Standing::Gone) if self.recovered && self.here.ran_on => {
                self.reason = "the source agent was restarted, and the VM's process has ended: no agent saw whether the guest \
                               had run on there, so the target's copy may be older"
                    .into();
                (self.here.behind, self.ask) = (true, None);
                self.say_again();
                self.call_from(now);
            }
            (GaveUp | SourceState::Serving, Standing::Gone) if self.target.lost.is_some() => {
                // Nothing is left that could be taken back.
                (self.here.gone, self.settled, self.ask) = (true, true, None);
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
            // If its last byte was out, the target may still load everything; if not, GivenUp, said
            // after the last byte, tells the target that no more will come.
            (Streaming, Standing::Gone) => {
                self.because("the source QEMU is gone");
                self.gave_up(now);
            }
            (GaveUp, Standing::Gone) => self.say_again(),
            (Aborted, _) | (_, _) => {}
        }
    }

    /// What came of taking the VM back.
    pub(super) fn took(&mut self, took: Took, now: Nanos) {
        self.agenda.went();
        match took {
            Took::Stands(guest) => {
                self.here.left = Some(guest);
                if self.state == SourceState::TakingBack {
                    self.instead(SourceState::Aborted);
                    self.say_again();
                }
            }
            Took::Gone => {
                self.here.gone = true;
                // The target has the only copy, and nothing came after it: it cannot have run on
                // here.
                let whole = self.target.loaded && self.target.differs.is_none();
                let whole = whole && self.here.stopped && !self.here.ran_on && !self.settled;
                match self.state {
                    SourceState::TakingBack if self.here.ran_on => self.here.behind = true,
                    SourceState::TakingBack => self.gave_up(now),
                    _ if whole => self.gave_up(now),
                    _ => {}
                }
            }
        }
    }
}
