//! Carries out what the drivers of the handover want done (`core::handover`), for a departure and for an arrival: the one
//! place outside of tests where their actions are interpreted. Whatever an action comes to, its driver is told.

use super::{MoveError, now};
use crate::core::handover::arrival::{self, Arrival};
use crate::core::handover::departure::{self, Departure};
use crate::core::handover::{GuestState, Ran, SourceState, Standing, TargetState, Took};
use crate::core::wire::messages::Word;

/// What a departure's driver may ask for. An error says by [`MoveError::after`] whether it was not done, or that is not
/// known. Whatever it says, the driver asks again or ends the attempt, and the VM stays whose it was by the journal.
pub(super) trait Departs {
    /// The driver.
    fn driver(&mut self) -> &mut Departure;
    /// Writes the state down, with how the VM's owner has left it.
    ///
    /// Success: it is on disk. Failure: it may be there or not, and nothing may be done that depends on it.
    fn write(&mut self, state: SourceState, guest: GuestState) -> Result<(), MoveError>;
    /// Lets the VM go.
    ///
    /// Success: how it stands now; only [`Standing::Completed`] and [`Standing::Gone`] mean that it cannot run here again.
    /// Failure: it may have been let go. It is asked about before anything else.
    fn let_complete(&mut self) -> Result<Standing, MoveError>;
    /// How the VM's QEMU or VMM stands.
    ///
    /// Success: what was seen. Failure: nothing was seen, and nothing changed.
    fn ask(&mut self) -> Result<Standing, MoveError>;
    /// Ends the migration and sees that the VM is as its owner left it. May come again.
    ///
    /// Success: it was seen to be so, or its process has ended. Failure: it may stand still; it is tried again.
    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError>;
    /// Says it to the target.
    ///
    /// Success: it was handed to the connection, which may lose it. Failure: it may have been heard all the same.
    fn say(&mut self, word: &Word) -> Result<(), MoveError>;
    /// Post-copy: from now on the VM's pages are sent.
    ///
    /// Success: its memory is held here, whoever else ends. Failure: the pages cannot be had from here.
    fn serve(&mut self) -> Result<(), MoveError>;
    /// Calls the target on a settle connection.
    ///
    /// Success: a connection stands, and the driver has heard of it. Failure: none does, and nothing was said.
    fn call(&mut self) -> Result<(), MoveError>;
    /// The outcome is final, and both sides know it.
    fn finish(&mut self);
}

/// Does all that the driver wants done now.
pub(super) fn depart(hands: &mut impl Departs) {
    use departure::{Action, Outcome};
    // The driver asks again, or ends the attempt; why it has to is for people.
    let failed = |e: MoveError| Outcome::Failed(e.to_string());
    let plain = |result: Result<(), MoveError>| result.map_or_else(failed, |()| Outcome::Done);
    let standing = |result: Result<Standing, MoveError>| result.map_or_else(failed, Outcome::Stands);
    while let Some(action) = hands.driver().poll(now()) {
        let outcome = match action {
            Action::Write(state, guest) => plain(hands.write(state, guest)),
            Action::LetComplete => standing(hands.let_complete()),
            Action::Ask => standing(hands.ask()),
            Action::TakeBack(guest) => hands.take_back(guest).map_or_else(failed, Outcome::Took),
            Action::Say(word) => plain(hands.say(&word)),
            Action::Serve => plain(hands.serve()),
            Action::Call => plain(hands.call()),
            Action::Finish => {
                hands.finish();
                Outcome::Done
            }
        };
        hands.driver().done(outcome, now());
    }
}

/// What an arrival's driver may ask for. Errors as of [`Departs`].
pub(super) trait Arrives {
    /// The driver.
    fn driver(&mut self) -> &mut Arrival;
    /// Writes the state down, with the state in which the VM is to be.
    ///
    /// Success: it is on disk. Failure: it may be there or not, and nothing may be done that depends on it.
    fn write(&mut self, state: TargetState, guest: GuestState) -> Result<(), MoveError>;
    /// Says it to the source.
    ///
    /// Success: it was handed to the connection, which may lose it. Failure: it may have been heard all the same.
    fn say(&mut self, word: &Word) -> Result<(), MoveError>;
    /// Whether everything is loaded; `None`: its process has ended.
    ///
    /// Failure: nothing was seen, and nothing changed.
    fn look(&mut self) -> Result<Option<bool>, MoveError>;
    /// Lets the VM run, if it is to.
    ///
    /// Success: it was seen to run, to be left paused, to be refused, or to be gone. Failure: it may run. It is tried again,
    /// here and nowhere else.
    fn run(&mut self, guest: GuestState) -> Result<Ran, MoveError>;
    /// Notes that it runs.
    ///
    /// Success: it is on disk. Failure: after a restart the VM may be continued once more, which does no harm.
    fn settle(&mut self) -> Result<(), MoveError>;
    /// Closes the stream once all that came has been written.
    fn end_stream(&mut self);
    /// Ends what waits for the VM, and sees that it is gone.
    ///
    /// Success: nothing is left here that could run as this VM. Failure: it may be there still; it is tried again.
    fn discard(&mut self) -> Result<(), MoveError>;
    /// What was held for the arrival can go.
    fn finish(&mut self);
}

/// Does all that the driver wants done now.
pub(super) fn arrive(hands: &mut impl Arrives) {
    use arrival::{Action, Outcome};
    // The driver asks again, or ends the attempt; why it has to is for people.
    let failed = |e: MoveError| Outcome::Failed(e.to_string());
    let plain = |result: Result<(), MoveError>| result.map_or_else(failed, |()| Outcome::Done);
    while let Some(action) = hands.driver().poll(now()) {
        let outcome = match action {
            Action::Write(state, guest) => plain(hands.write(state, guest)),
            Action::Say(word) => plain(hands.say(&word)),
            Action::Look => hands.look().map_or_else(failed, Outcome::Looked),
            Action::Run(guest) => hands.run(guest).map_or_else(failed, Outcome::Ran),
            Action::Settle => plain(hands.settle()),
            Action::EndStream => {
                hands.end_stream();
                Outcome::Done
            }
            Action::Discard => plain(hands.discard()),
            Action::Finish => {
                hands.finish();
                Outcome::Done
            }
        };
        hands.driver().done(outcome, now());
    }
}

#[cfg(test)]
mod tests;
