//! The arrival driver, state by state.

use super::*;

const NOW: Nanos = Nanos(1_000_000_000_000);
const RUN: GuestState = GuestState::Running;

/// Does what it wants, all of which works, except that `cont` comes to what `ran` says; only as long as something is due now.
fn works(a: &mut Arrival, now: Nanos, ran: &Ran) -> Vec<Action> {
    let mut done = Vec::new();
    while let Some(action) = a.poll(now) {
        let outcome = match &action {
            Action::Run(_) => Outcome::Ran(ran.clone()),
            Action::Look => Outcome::Looked(Some(true)),
            _ => Outcome::Done,
        };
        a.done(outcome, now);
        done.push(action);
    }
    done
}

fn loaded() -> Arrival {
    let mut a = Arrival::new();
    a.handle(Input::Loaded(None), NOW);
    let done = works(&mut a, NOW, &Ran::Runs);
    assert_eq!(done, [Action::Write(TargetState::Loaded, RUN), Action::Say(Word::Loaded(None))]);
    a
}

/// Given up to it, and its QEMU refuses to run it for as long as is waited; what was done in that time.
fn refused(a: &mut Arrival) -> (Nanos, Vec<Action>) {
    let (mut now, mut done) = (NOW, Vec::new());
    for _ in 0..20 {
        done.extend(works(a, now, &Ran::Refused("locked".into())));
        now = a.wake().unwrap_or(now);
    }
    (now, done)
}

#[test]
fn it_runs_once_its_source_has_given_it_up_and_that_is_written() {
    let mut a = loaded();
    a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
    let expected = [
        Action::Write(TargetState::Running, RUN),
        Action::Run(RUN),
        Action::Say(Word::Runs),
        Action::Settle,
        Action::Finish,
    ];
    assert_eq!(works(&mut a, NOW, &Ran::Runs), expected);
    assert!(a.ran() && a.finished());
}

/// It may be older than what the source's copy did last.
#[test]
fn a_copy_whose_source_ended_before_it_gave_up_waits_for_an_operator() {
    let mut a = loaded();
    assert!(!a.in_doubt());
    a.handle(Input::Word(Word::Gone), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), []);
    assert!(a.in_doubt() && a.may_be_decided(), "{a:?}");
    a.handle(Input::Decided(Decision::Target), NOW);
    assert!(works(&mut a, NOW, &Ran::Runs).contains(&Action::Run(RUN)), "{a:?}");
}

#[test]
fn it_is_to_be_as_its_owner_left_it() {
    let mut a = loaded();
    a.handle(Input::Word(Word::GivenUp(GuestState::Paused, None)), NOW);
    let done = works(&mut a, NOW, &Ran::Paused);
    let (write, run) =
        (Action::Write(TargetState::Running, GuestState::Paused), Action::Run(GuestState::Paused));
    assert!(done.starts_with(&[write, run]), "{done:?}");
    assert!(a.ran());
}

#[test]
fn a_loaded_copy_is_thrown_away_on_its_source_s_word_only() {
    for input in [Input::Lost, Input::Abort("cancelled".into())] {
        let mut a = loaded();
        a.handle(input.clone(), NOW);
        assert_eq!((works(&mut a, NOW, &Ran::Runs), a.state()), (vec![], TargetState::Loaded), "{input:?}");
    }
    let mut a = loaded();
    a.handle(Input::Word(Word::Aborted("taken back".into())), NOW);
    let done = works(&mut a, NOW, &Ran::Runs);
    assert_eq!(done[0], Action::Write(TargetState::Discarded, RUN), "{done:?}");
    assert!(done.contains(&Action::Discard) && done.contains(&Action::Say(Word::Discarded)), "{done:?}");
}

/// Its QEMU may load all, and tell the source's so, in the very moment in which the connection is lost.
#[test]
fn what_a_qemu_loads_from_another_is_not_thrown_away_before_the_source_says_so() {
    for input in [Input::Lost, Input::Abort("cancelled".into())] {
        let mut a = Arrival::new();
        a.goes_direct();
        a.handle(input.clone(), NOW);
        let done = works(&mut a, NOW, &Ran::Runs);
        assert!(!done.contains(&Action::Discard) && a.state() == TargetState::Filling, "{input:?}: {done:?}");
        a.handle(Input::Loaded(None), NOW);
        a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
        assert!(works(&mut a, NOW, &Ran::Runs).contains(&Action::Run(RUN)), "{input:?}");
    }
    // In the path of an agent nobody else feeds it.
    let mut a = Arrival::new();
    a.handle(Input::Lost, NOW);
    assert!(works(&mut a, NOW, &Ran::Runs).contains(&Action::Discard));
}

/// Nobody brings what is lacking, and the VM runs: only a person can end that.
#[test]
fn a_vm_that_lacks_pages_which_nobody_has_is_in_doubt_until_an_operator_lets_it_go_on_without() {
    let mut a = Arrival::new();
    a.handle(Input::Prepared(None), NOW);
    works(&mut a, NOW, &Ran::Runs);
    a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
    works(&mut a, NOW, &Ran::Runs);
    assert!(a.state() == TargetState::Fetching && a.ran() && !a.in_doubt());
    a.handle(Input::Word(Word::PagesLost), NOW);
    assert!(a.in_doubt() && a.may_be_decided());
    a.handle(Input::Decided(Decision::Target), NOW);
    let done = works(&mut a, NOW, &Ran::Runs);
    assert!(a.state() == TargetState::Filled && !a.in_doubt(), "{done:?}");
    assert!(done.contains(&Action::Say(Word::Filled)), "{done:?}");
}

#[test]
fn what_cannot_be_written_is_not_run() {
    let mut a = loaded();
    a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
    assert_eq!(a.poll(NOW), Some(Action::Write(TargetState::Running, RUN)));
    a.done(Outcome::Failed("no space".into()), NOW);
    assert_eq!(a.poll(NOW), None);
    assert!(a.in_doubt() && a.trouble() == Some("no space"));
    let later = a.wake().unwrap();
    assert_eq!(a.poll(later), Some(Action::Write(TargetState::Running, RUN)));
}

#[test]
fn refused_it_says_so_and_never_runs_unless_the_source_s_copy_is_gone() {
    let mut a = loaded();
    a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
    let (now, done) = refused(&mut a);
    assert_eq!(a.state(), TargetState::Refused);
    let write = done.iter().position(|a| matches!(a, Action::Write(TargetState::Refused, _))).unwrap();
    let say = done.iter().position(|a| matches!(a, Action::Say(Word::Refused(_)))).unwrap();
    assert!(write < say, "{done:?}");
    a.handle(Input::Word(Word::GivenUp(RUN, None)), now);
    assert_eq!(works(&mut a, now, &Ran::Runs), [Action::Say(Word::Refused("locked".into()))]);
    a.handle(Input::Word(Word::Gone), now);
    let done = works(&mut a, now, &Ran::Runs);
    assert!(done.contains(&Action::Run(RUN)) && a.ran(), "{done:?}");
}

#[test]
fn settled_by_an_operator_it_is_tried_for_as_long_as_something_stands_in_its_way() {
    let decide_first = |a: &mut Arrival| a.handle(Input::Decided(Decision::Target), NOW);
    let given_up_first = |a: &mut Arrival| {
        a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
        works(a, NOW, &Ran::Refused("locked".into()));
        a.handle(Input::Decided(Decision::Target), NOW);
    };
    for decide in [&decide_first as &dyn Fn(&mut Arrival), &given_up_first] {
        let mut a = loaded();
        decide(&mut a);
        let (now, done) = refused(&mut a);
        assert_eq!(a.state(), TargetState::Running, "{done:?}");
        assert!(!done.iter().any(|a| matches!(a, Action::Say(Word::Refused(_)))), "{done:?}");
        assert!(works(&mut a, now, &Ran::Runs).contains(&Action::Say(Word::Runs)));
    }
}

#[test]
fn a_process_that_ended_before_it_was_told_to_run_gives_the_vm_back_and_one_after_that_is_lost() {
    for (told, end) in [(false, TargetState::Discarded), (true, TargetState::Lost)] {
        let mut a = loaded();
        a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
        let done = works(&mut a, NOW, &Ran::Gone { told });
        assert_eq!(a.state(), end, "{done:?}");
        let said = |w: &Word| matches!((w, told), (Word::Discarded, false) | (Word::Lost(_), true));
        assert!(done.iter().any(|a| matches!(a, Action::Say(w) if said(w))), "{done:?}");
    }
    // What an agent before this one has told it nobody knows.
    let mut a = Arrival::recover(TargetState::Running, RUN, false);
    works(&mut a, NOW, &Ran::Gone { told: false });
    assert_eq!(a.state(), TargetState::Lost);
}

#[test]
fn a_restarted_agent_runs_what_was_to_run_and_nothing_else() {
    for (state, settled, runs) in [
        (TargetState::Filling, false, false),
        (TargetState::Loaded, false, false),
        (TargetState::Refused, false, false),
        (TargetState::Discarded, false, false),
        (TargetState::Lost, false, false),
        (TargetState::Running, false, true),
        (TargetState::Running, true, false),
        (TargetState::Fetching, false, true),
    ] {
        let mut a = Arrival::recover(state, RUN, settled);
        let done = works(&mut a, NOW, &Ran::Runs);
        assert_eq!(done.contains(&Action::Run(RUN)), runs, "{state:?}: {done:?}");
    }
}

#[test]
fn a_copy_is_run_only_if_it_is_what_its_source_has_sent() {
    let (made, other) = (Tally { sum: 1, pages: 2 }, Tally { sum: 2, pages: 2 });
    let loaded = || {
        let mut a = Arrival::new();
        a.handle(Input::Loaded(Some(made)), NOW);
        let done = works(&mut a, NOW, &Ran::Runs);
        assert_eq!(done.last(), Some(&Action::Say(Word::Loaded(Some(made)))));
        a
    };
    for (sent, runs) in [(Some(made), true), (None, true), (Some(other), false)] {
        let mut a = loaded();
        a.handle(Input::Word(Word::GivenUp(RUN, sent)), NOW);
        let done = works(&mut a, NOW, &Ran::Runs);
        assert_eq!(done.contains(&Action::Run(RUN)), runs, "{sent:?}: {done:?}");
        assert_eq!(a.in_doubt(), !runs);
    }
    // Told so while it was being filled, because its source's QEMU had ended; and told again by one that does not know any more.
    let mut a = Arrival::new();
    a.handle(Input::Word(Word::GivenUp(RUN, Some(other))), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), [Action::EndStream]);
    a.handle(Input::Loaded(Some(made)), NOW);
    works(&mut a, NOW, &Ran::Runs);
    a.handle(Input::Word(Word::GivenUp(RUN, None)), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), [], "it would be told the same again, for ever");
    a.handle(Input::Word(Word::GivenUp(RUN, Some(other))), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), [Action::Say(Word::Loaded(Some(made)))]);
    assert!(a.differs() && a.may_be_decided());
    let mut discarded = a.clone();
    discarded.handle(Input::Word(Word::Aborted("settled".into())), NOW);
    assert!(works(&mut discarded, NOW, &Ran::Runs).contains(&Action::Discard));
    a.handle(Input::Decided(Decision::Target), NOW);
    assert!(works(&mut a, NOW, &Ran::Runs).contains(&Action::Run(RUN)), "an operator may");
}

#[test]
fn what_its_memory_comes_to_is_said_before_it_is_loaded_and_again_with_that() {
    let (made, ram) = (Some(Tally { sum: 1, pages: 2 }), Ram { unread: 7, ..Ram::default() });
    let mut a = Arrival::new();
    a.handle(Input::Memory(ram.clone()), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), [], "it is not loaded yet");
    a.handle(Input::Loaded(made), NOW);
    let said = [Action::Say(Word::Memory(ram)), Action::Say(Word::Loaded(made))];
    let done = works(&mut a, NOW, &Ran::Runs);
    assert_eq!(done, [&[Action::Write(TargetState::Loaded, RUN)], &said[..]].concat());
    let other = Tally { sum: 2, pages: 2 };
    a.handle(Input::Word(Word::GivenUp(RUN, Some(other))), NOW);
    assert_eq!(works(&mut a, NOW, &Ran::Runs), said);
}

#[test]
fn what_cannot_be_written_is_not_said_either_however_often_the_source_speaks() {
    let (made, other) = (Tally { sum: 1, pages: 2 }, Tally { sum: 2, pages: 2 });
    let mut a = Arrival::new();
    a.handle(Input::Loaded(Some(made)), NOW);
    assert_eq!(a.poll(NOW), Some(Action::Write(TargetState::Loaded, RUN)));
    a.done(Outcome::Failed("no space".into()), NOW);
    a.handle(Input::Word(Word::GivenUp(RUN, Some(other))), NOW);
    let said = works(&mut a, NOW, &Ran::Runs);
    assert!(matches!(said[..], [Action::Say(Word::Aborted(_))]), "{said:?}");
    let later = a.wake().unwrap();
    let done = works(&mut a, later, &Ran::Runs);
    assert_eq!(done, [Action::Write(TargetState::Loaded, RUN), Action::Say(Word::Loaded(Some(made)))]);
}
