//! The departure driver, state by state.

use super::*;

// The memory of the stopped VM.
mod memory;

const NOW: Nanos = Nanos(1_000_000_000_000);
const RUN: GuestState = GuestState::Running;

/// Does what it wants, all of which works; QEMU stands as `s` says once it was let go. Gives what was done.
fn works(d: &mut Departure, s: Standing) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = d.poll(NOW) {
        let outcome = match &action {
            Action::LetComplete | Action::Ask => Outcome::Stands(s),
            Action::TakeBack(guest) => Outcome::Took(Took::Stands(*guest)),
            _ => Outcome::Done,
        };
        d.done(outcome, NOW);
        done.push(action);
    }
    done
}

fn given_up() -> Departure {
    let mut d = Departure::new();
    d.handle(Input::Stopped, NOW);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    works(&mut d, Standing::Completed);
    assert_eq!(d.state(), SourceState::GaveUp);
    d
}

#[test]
fn it_is_written_that_a_vm_may_go_before_it_may_and_that_it_went_before_that_is_said() {
    let mut d = Departure::new();
    d.handle(Input::Stopped, NOW);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    let expected = [
        Action::Write(SourceState::GivingUp, RUN),
        Action::LetComplete,
        Action::Write(SourceState::GaveUp, RUN),
        Action::Say(Word::GivenUp(RUN, None)),
    ];
    assert_eq!(works(&mut d, Standing::Completed), expected);
    d.handle(Input::Word(Word::Runs), NOW);
    assert_eq!(works(&mut d, Standing::Completed), [Action::Write(SourceState::Done, RUN), Action::Finish]);
    assert!(d.settled() && d.finished());
}

/// The stop is told first, because what it was takes QEMU a moment to say.
#[test]
fn an_owner_s_pause_in_the_middle_goes_with_the_vm() {
    let mut d = Departure::new();
    for guest in [RUN, GuestState::Paused] {
        if guest == GuestState::Paused {
            d.handle(Input::Stopped, NOW);
        }
        d.handle(Input::Guest(guest), NOW);
    }
    // QEMU's own stop of a paused VM is no event.
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    let done = works(&mut d, Standing::Completed);
    assert_eq!(done.last(), Some(&Action::Say(Word::GivenUp(GuestState::Paused, None))));
    // A restarted agent says what was written.
    assert!(done.contains(&Action::Write(SourceState::GaveUp, GuestState::Paused)), "{done:?}");

    let mut d = Departure::new();
    d.handle(Input::Stopped, NOW);
    d.handle(Input::Guest(GuestState::Paused), NOW);
    d.handle(Input::Guest(RUN), NOW);
    d.handle(Input::Stopped, NOW);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    assert_eq!(works(&mut d, Standing::Completed).last(), Some(&Action::Say(Word::GivenUp(RUN, None))));
}

#[test]
fn what_cannot_be_written_is_not_done() {
    let mut d = Departure::new();
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    assert_eq!(d.poll(NOW), Some(Action::Write(SourceState::GivingUp, RUN)));
    d.done(Outcome::Failed("no space".into()), NOW);
    let done = works(&mut d, Standing::UnderWay);
    assert!(!done.contains(&Action::LetComplete), "{done:?}");
    assert!(done.contains(&Action::TakeBack(RUN)) && d.reason().contains("no space"), "{done:?}");
    assert_eq!(d.state(), SourceState::Aborted);
}

#[test]
fn given_up_it_is_not_taken_back_for_anything_that_is_not_the_target_s_word() {
    for input in [
        Input::Lost("cut".into()),
        Input::Abort("cancelled".into()),
        Input::Mute,
        Input::Word(Word::Aborted("no".into())),
        Input::Word(Word::Loaded(None)),
        Input::Source(Standing::Gone),
    ] {
        let mut d = given_up();
        d.handle(input.clone(), NOW);
        let done = works(&mut d, Standing::Completed);
        assert!(!done.iter().any(|a| matches!(a, Action::TakeBack(_))), "{input:?}: {done:?}");
        assert_eq!(d.state(), SourceState::GaveUp, "{input:?}");
    }
}

#[test]
fn a_vm_that_the_target_may_not_run_is_taken_back_before_that_is_said() {
    let mut d = given_up();
    d.handle(Input::Word(Word::Refused("locked".into())), NOW);
    assert_eq!(d.poll(NOW), Some(Action::Write(SourceState::TakingBack, RUN)));
    d.done(Outcome::Done, NOW);
    assert_eq!(d.poll(NOW), Some(Action::TakeBack(RUN)));
    // The lock is here too: in doubt, not back, and asked again later.
    d.done(Outcome::Failed("locked here".into()), NOW);
    assert!(d.in_doubt() && !d.is_back() && d.trouble() == Some("locked here"));
    assert_eq!(d.poll(NOW), None);
    let later = d.wake().unwrap();
    assert_eq!(d.poll(later), Some(Action::TakeBack(RUN)));
    d.done(Outcome::Took(Took::Stands(RUN)), later);
    assert_eq!(d.poll(later), Some(Action::Write(SourceState::Aborted, RUN)));
    d.done(Outcome::Done, later);
    assert!(matches!(d.poll(later), Some(Action::Say(Word::Aborted(_)))));
    d.done(Outcome::Done, later);
    assert!(d.is_back());
}

/// The target throws its copy away when it hears that.
#[test]
fn a_vm_that_goes_back_is_seen_to_stand_before_that_is_said() {
    let mut d = Departure::new();
    d.handle(Input::Abort("cancelled".into()), NOW);
    assert_eq!(d.poll(NOW), Some(Action::Write(SourceState::Aborted, RUN)));
    d.done(Outcome::Done, NOW);
    assert_eq!(d.poll(NOW), Some(Action::TakeBack(RUN)));
    d.done(Outcome::Failed("its disk is locked".into()), NOW);
    assert!(d.poll(NOW).is_none() && !d.is_back(), "{d:?}");
    let later = d.wake().unwrap();
    assert_eq!(d.poll(later), Some(Action::TakeBack(RUN)));
    d.done(Outcome::Took(Took::Stands(RUN)), later);
    assert_eq!(d.poll(later), Some(Action::Say(Word::Aborted("cancelled".into()))));
}

#[test]
fn a_refused_vm_whose_source_has_ended_is_the_target_s_for_good() {
    let mut d = given_up();
    d.handle(Input::Word(Word::Refused("locked".into())), NOW);
    assert_eq!(d.poll(NOW), Some(Action::Write(SourceState::TakingBack, RUN)));
    d.done(Outcome::Done, NOW);
    assert!(matches!(d.poll(NOW), Some(Action::TakeBack(_))));
    d.done(Outcome::Took(Took::Gone), NOW);
    let done = works(&mut d, Standing::Gone);
    assert_eq!(done[0], Action::Write(SourceState::GaveUp, RUN), "{done:?}");
    assert!(done.contains(&Action::Say(Word::Gone)), "{done:?}");
}

/// `cont` may have worked although its answer was lost, so what the guest then did is in no copy.
#[test]
fn a_copy_that_may_have_run_on_and_ended_is_an_operator_s_to_choose() {
    let mut d = given_up();
    d.handle(Input::Word(Word::Refused("locked".into())), NOW);
    assert!(d.poll(NOW).is_some());
    d.done(Outcome::Done, NOW);
    assert!(matches!(d.poll(NOW), Some(Action::TakeBack(_))));
    d.done(Outcome::Failed("no answer".into()), NOW);
    let later = d.wake().unwrap();
    assert!(matches!(d.poll(later), Some(Action::TakeBack(_))));
    d.done(Outcome::Took(Took::Gone), later);
    assert!(d.behind() && d.in_doubt(), "{d:?}");
    d.handle(Input::Decided(Decision::Target), later);
    assert_eq!(d.state(), SourceState::GaveUp);
}

/// It may have run the guest on while no agent was there, and the guest may have written to its disks since.
#[test]
fn a_copy_that_ended_while_no_agent_saw_it_is_an_operator_s_to_choose() {
    let mut d = Departure::recover(SourceState::GivingUp, RUN, NOW);
    let done = works(&mut d, Standing::Gone);
    // Nothing is written: a restart asks again, and finds the same.
    assert_eq!(done[..2], [Action::Ask, Action::Say(Word::Gone)]);
    assert!(
        !done.iter().any(|a| matches!(a, Action::Say(Word::GivenUp(..)) | Action::Write(..))),
        "{done:?}"
    );
    assert!(d.behind() && d.in_doubt() && d.may_be_decided(), "{d:?}");
    assert!(d.reason().contains("no agent saw"), "{}", d.reason());
    let mut chosen = d.clone();
    chosen.handle(Input::Decided(Decision::Target), NOW);
    assert_eq!((chosen.state(), chosen.settled()), (SourceState::Done, true));
    // A target that has not loaded it, and has seen its end, has nothing that could be chosen.
    for word in [Word::Aborted("the stream broke".into()), Word::Discarded] {
        d.handle(Input::Word(word), NOW);
    }
    let done = works(&mut d, Standing::Gone);
    assert_eq!(done.last(), Some(&Action::Finish), "{done:?}");
    assert!(!d.in_doubt() && d.gone() && d.is_back(), "{d:?}");
}

#[test]
fn a_restarted_agent_asks_before_it_believes() {
    for (state, s, end) in [
        (SourceState::Streaming, Standing::UnderWay, SourceState::Aborted),
        (SourceState::GivingUp, Standing::Waits, SourceState::Aborted),
        (SourceState::GivingUp, Standing::Back(RUN), SourceState::Aborted),
        (SourceState::GivingUp, Standing::Completed, SourceState::GaveUp),
        (SourceState::GaveUp, Standing::Completed, SourceState::GaveUp),
        (SourceState::TakingBack, Standing::Completed, SourceState::Aborted),
        (SourceState::Done, Standing::Completed, SourceState::Done),
    ] {
        let mut d = Departure::recover(state, RUN, NOW);
        works(&mut d, s);
        assert_eq!(d.state(), end, "{state:?} {s:?}");
    }
}

/// Somebody's `cont` by hand while the target could not be heard.
#[test]
fn a_vm_that_runs_here_again_is_not_said_to_be_given_up() {
    for recovered in [false, true] {
        let mut d = match recovered {
            true => Departure::recover(SourceState::GaveUp, RUN, NOW),
            false => {
                let mut d = given_up();
                d.handle(Input::Lost("the link is cut".into()), NOW);
                d
            }
        };
        works(&mut d, Standing::Back(RUN));
        d.handle(Input::Connected, NOW);
        d.handle(Input::Word(Word::Loaded(None)), NOW);
        let done = works(&mut d, Standing::Back(RUN));
        assert!(done.contains(&Action::Ask), "{done:?}");
        assert!(!done.iter().any(|a| matches!(a, Action::Say(_))), "{done:?}");
        assert_eq!((d.claimed(), d.in_doubt(), d.state()), (Some(RUN), true, SourceState::GaveUp));
        // It cannot be the target's while it runs here; and it can be the source's.
        d.handle(Input::Decided(Decision::Target), NOW);
        let done = works(&mut d, Standing::Back(RUN));
        assert!(!done.iter().any(|a| matches!(a, Action::Say(_) | Action::Write(..))), "{done:?}");
        d.handle(Input::Decided(Decision::Source), NOW);
        let done = works(&mut d, Standing::Back(RUN));
        assert!(matches!(done.last(), Some(Action::Say(Word::Aborted(_)))), "{done:?}");
        assert!(d.is_back() && !d.settled(), "the target has to hear it");
        d.handle(Input::Word(Word::Discarded), NOW);
        assert_eq!(works(&mut d, Standing::Back(RUN)), [Action::Finish]);
    }
    // Stopped again, it is still ahead of what was sent: an operator may choose the target's all the same.
    let mut d = given_up();
    d.handle(Input::Lost("the link is cut".into()), NOW);
    d.handle(Input::Connected, NOW);
    works(&mut d, Standing::Back(GuestState::Paused));
    assert!(d.in_doubt() && d.claimed().is_some());
    d.handle(Input::Decided(Decision::Target), NOW);
    assert!(works(&mut d, Standing::Completed).contains(&Action::Say(Word::GivenUp(RUN, None))));
    // The counterpart: it stands still.
    let mut d = given_up();
    d.handle(Input::Lost("the link is cut".into()), NOW);
    d.handle(Input::Connected, NOW);
    assert_eq!(works(&mut d, Standing::Completed), [Action::Ask, Action::Say(Word::GivenUp(RUN, None))]);
}

#[test]
fn a_vm_that_both_sides_have_lost_is_over() {
    let mut d = given_up();
    d.handle(Input::Word(Word::Lost("its VMM has ended".into())), NOW);
    works(&mut d, Standing::Completed);
    assert!(d.in_doubt() && !d.settled(), "an operator may continue the copy here");
    d.handle(Input::Source(Standing::Gone), NOW);
    while let Some(action) = d.poll(NOW) {
        let outcome = match action {
            Action::TakeBack(_) => Outcome::Took(Took::Gone),
            _ => Outcome::Done,
        };
        d.done(outcome, NOW);
    }
    assert!(d.settled() && d.finished() && d.gone());
}

const SENT: Tally = Tally { sum: 77, pages: 3 };
const OTHER: Tally = Tally { sum: 78, pages: 3 };

/// All of it has been sent.
fn sent() -> Departure {
    let mut d = Departure::new();
    d.handle(Input::Stopped, NOW);
    d.handle(Input::Sent(SENT), NOW);
    d
}

#[test]
fn a_vm_is_given_up_only_to_a_target_that_has_the_very_pages_that_were_sent() {
    let mut d = sent();
    d.handle(Input::Word(Word::Loaded(Some(SENT))), NOW);
    let done = works(&mut d, Standing::Completed);
    assert_eq!(done.last(), Some(&Action::Say(Word::GivenUp(RUN, Some(SENT)))));
    assert_eq!((d.proven(), d.differs()), (Some(SENT), None));
    for made in [Some(OTHER), Some(Tally { pages: 4, ..SENT }), None] {
        let mut d = sent();
        d.handle(Input::Word(Word::Loaded(made)), NOW);
        let done = works(&mut d, Standing::Back(RUN));
        assert!(!done.iter().any(|a| matches!(a, Action::LetComplete)), "{made:?}: {done:?}");
        assert_eq!(done[..2], [Action::Write(SourceState::Aborted, RUN), Action::TakeBack(RUN)], "{made:?}");
        assert!(matches!(done.last(), Some(Action::Say(Word::Aborted(_)))), "{made:?}: {done:?}");
        assert!(d.is_back() && d.proven().is_none(), "{made:?}: {d:?}");
        assert!(d.reason().contains("pages that"), "{made:?}: {}", d.reason());
        // Whatever it says after that.
        d.handle(Input::Word(Word::Loaded(Some(SENT))), NOW);
        assert!(!works(&mut d, Standing::Back(RUN)).iter().any(|a| matches!(a, Action::LetComplete)));
    }
    // With post-copy likewise, unless some pages still wait there.
    for (made, goes) in [(Some(SENT), true), (None, true), (Some(OTHER), false)] {
        let mut d = sent();
        d.handle(Input::Switched, NOW);
        d.handle(Input::Word(Word::Ready(made)), NOW);
        works(&mut d, Standing::Completed);
        assert_eq!(d.state() == SourceState::Serving, goes, "{made:?}");
        assert_eq!(d.proven().is_some(), made == Some(SENT), "{made:?}");
    }
}

#[test]
fn a_target_copy_with_other_pages_is_not_run_because_the_source_is_gone() {
    // Its source's QEMU ends in the very moment of the handover, so that it is given up before it was compared.
    let mut d = sent();
    d.handle(Input::Source(Standing::Gone), NOW);
    let done = works(&mut d, Standing::Gone);
    assert!(done.contains(&Action::Say(Word::GivenUp(RUN, Some(SENT)))), "the target compares: {done:?}");
    d.handle(Input::Word(Word::Loaded(Some(OTHER))), NOW);
    for input in [Input::Source(Standing::Gone), Input::Connected, Input::Word(Word::Loaded(Some(OTHER)))] {
        d.handle(input, NOW);
        let done = works(&mut d, Standing::Gone);
        assert!(!done.iter().any(|a| matches!(a, Action::Say(_))), "{done:?}");
    }
    assert!(d.in_doubt() && d.differs().is_some());
    let mut target = d.clone();
    target.handle(Input::Decided(Decision::Target), NOW);
    works(&mut target, Standing::Gone);
    assert_eq!(target.state(), SourceState::Done);
    d.handle(Input::Decided(Decision::Source), NOW);
    while let Some(action) = d.poll(NOW) {
        let outcome = match &action {
            Action::TakeBack(_) => Outcome::Took(Took::Gone),
            Action::Say(word) => {
                assert!(matches!(word, Word::Aborted(_)), "{word:?}");
                Outcome::Done
            }
            _ => Outcome::Done,
        };
        d.done(outcome, NOW);
    }
    assert_eq!((d.state(), d.gone()), (SourceState::Aborted, true));
    // One whose agent was started anew does not know any more what it was given: nothing shows a difference.
    let mut d = sent();
    d.handle(Input::Source(Standing::Gone), NOW);
    works(&mut d, Standing::Gone);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    assert!(works(&mut d, Standing::Gone).contains(&Action::Say(Word::GivenUp(RUN, Some(SENT)))));
}

/// Aborted because of a difference, and then the process turns out to be gone: the target's copy is not the VM all the same.
#[test]
fn a_difference_is_not_forgotten_when_nothing_can_be_taken_back() {
    let mut d = sent();
    d.handle(Input::Word(Word::Loaded(Some(OTHER))), NOW);
    while let Some(action) = d.poll(NOW) {
        assert!(!matches!(action, Action::Say(Word::GivenUp(..)) | Action::Say(Word::Gone)), "{action:?}");
        let outcome = match action {
            Action::TakeBack(_) => Outcome::Took(Took::Gone),
            _ => Outcome::Done,
        };
        d.done(outcome, NOW);
    }
    assert_eq!((d.state(), d.gone()), (SourceState::Aborted, true));
}
