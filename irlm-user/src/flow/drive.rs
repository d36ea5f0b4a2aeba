//! Carries out what the drivers of the handover want done (`core::handover`), for a departure and for an arrival: the one
//! place outside of tests where their actions are interpreted. Whatever an action comes to, its driver is told.

use super::now;
use crate::core::handover::arrival::{self, Arrival};
use crate::core::handover::departure::{self, Departure};
use crate::core::handover::{GuestState, Ran, SourceState, Standing, TargetState, Took};
use crate::core::wire::messages::Word;

/// What a departure's driver may ask for. An error: it was not done, or that is not known.
pub(super) trait Departs {
    /// The driver.
    fn driver(&mut self) -> &mut Departure;
    /// Writes the state down, with how the VM's owner has left it; on return it is on disk.
    fn write(&mut self, state: SourceState, guest: GuestState) -> Result<(), String>;
    /// Lets the VM go.
    fn let_complete(&mut self) -> Result<Standing, String>;
    /// How the VM's QEMU or VMM stands.
    fn ask(&mut self) -> Result<Standing, String>;
    /// Ends the migration and sees that the VM is as its owner left it.
    fn take_back(&mut self, guest: GuestState) -> Result<Took, String>;
    /// Says it to the target.
    fn say(&mut self, word: &Word) -> Result<(), String>;
    /// Post-copy: from now on the VM's pages are sent.
    fn serve(&mut self) -> Result<(), String>;
    /// Calls the target on a settle connection.
    fn call(&mut self) -> Result<(), String>;
    /// The outcome is final, and both sides know it.
    fn finish(&mut self);
}

/// Does all that the driver wants done now.
pub(super) fn depart(hands: &mut impl Departs) {
    use departure::{Action, Outcome};
    let plain = |result: Result<(), String>| result.map_or_else(Outcome::Failed, |()| Outcome::Done);
    let standing = |result: Result<Standing, String>| result.map_or_else(Outcome::Failed, Outcome::Stands);
    while let Some(action) = hands.driver().poll(now()) {
        let outcome = match action {
            Action::Write(state, guest) => plain(hands.write(state, guest)),
            Action::LetComplete => standing(hands.let_complete()),
            Action::Ask => standing(hands.ask()),
            Action::TakeBack(guest) => hands.take_back(guest).map_or_else(Outcome::Failed, Outcome::Took),
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

/// What an arrival's driver may ask for. An error: it was not done, or that is not known.
pub(super) trait Arrives {
    /// The driver.
    fn driver(&mut self) -> &mut Arrival;
    /// Writes the state down, with the state in which the VM is to be; on return it is on disk.
    fn write(&mut self, state: TargetState, guest: GuestState) -> Result<(), String>;
    /// Says it to the source.
    fn say(&mut self, word: &Word) -> Result<(), String>;
    /// Whether everything is loaded; `None`: its process has ended.
    fn look(&mut self) -> Result<Option<bool>, String>;
    /// Lets the VM run, if it is to.
    fn run(&mut self, guest: GuestState) -> Result<Ran, String>;
    /// Notes that it runs.
    fn settle(&mut self) -> Result<(), String>;
    /// Closes the stream once all that came has been written.
    fn end_stream(&mut self);
    /// Ends what waits for the VM, and sees that it is gone.
    fn discard(&mut self) -> Result<(), String>;
    /// What was held for the arrival can go.
    fn finish(&mut self);
}

/// Does all that the driver wants done now.
pub(super) fn arrive(hands: &mut impl Arrives) {
    use arrival::{Action, Outcome};
    let plain = |result: Result<(), String>| result.map_or_else(Outcome::Failed, |()| Outcome::Done);
    while let Some(action) = hands.driver().poll(now()) {
        let outcome = match action {
            Action::Write(state, guest) => plain(hands.write(state, guest)),
            Action::Say(word) => plain(hands.say(&word)),
            Action::Look => hands.look().map_or_else(Outcome::Failed, Outcome::Looked),
            Action::Run(guest) => hands.run(guest).map_or_else(Outcome::Failed, Outcome::Ran),
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
