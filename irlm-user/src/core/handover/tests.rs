//! Every transition of the handover and every journal state to recover from, written out as tables: what is done, and
//! in which order, is what keeps a VM from running twice or not at all.

use super::*;
use SourceState as S;
use SourceStep as Do;
use TargetState as T;
use TargetStep as To;

fn aborted(why: &str) -> Word {
    Word::Aborted(why.to_owned())
}
fn stop() -> SourceEvent {
    SourceEvent::Abort("stop".to_owned())
}
fn heard(w: Word) -> SourceEvent {
    SourceEvent::Word(w)
}
fn gave_up() -> Vec<Do> {
    vec![Do::Write(S::GaveUp), Do::Say(Word::GivenUp), Do::Call]
}
fn abort(why: &str) -> Vec<Do> {
    vec![Do::Write(S::Aborted), Do::TakeBack, Do::Say(aborted(why)), Do::Call]
}

/// A source brought into `state` by the events a real one takes.
fn source(state: S) -> SourceHandover {
    let mut h = SourceHandover::new();
    let path: &[SourceEvent] = match state {
        S::Streaming => &[],
        S::GivingUp => &[heard(Word::Loaded)],
        S::GaveUp => &[heard(Word::Loaded), SourceEvent::QemuCompleted],
        S::Done => &[heard(Word::Loaded), SourceEvent::QemuCompleted, heard(Word::Runs)],
        S::Aborted => &[SourceEvent::Abort("first".to_owned())],
        S::Serving => &[SourceEvent::Switched, heard(Word::Ready)],
    };
    for e in path {
        h.on(e.clone());
    }
    assert_eq!(h.state(), state);
    h
}

#[test]
fn every_source_transition() {
    let lost = "the connection to the target was lost";
    let ended = "the source QEMU ended the migration";
    let taken_back = vec![Do::Write(S::Aborted), Do::TakeBack, Do::Finish];
    let table: Vec<(S, SourceEvent, S, Vec<Do>)> = vec![
        (S::Streaming, heard(Word::Loaded), S::GivingUp, vec![Do::Write(S::GivingUp), Do::LetComplete]),
        // QEMUs that stream to each other: the source's waits before the target's can have loaded all.
        (S::Streaming, SourceEvent::QemuWaits, S::GivingUp, vec![Do::Write(S::GivingUp), Do::LetComplete]),
        (S::GivingUp, SourceEvent::QemuWaits, S::GivingUp, vec![]),
        (S::GaveUp, SourceEvent::QemuWaits, S::GaveUp, vec![]),
        (S::Aborted, SourceEvent::QemuWaits, S::Aborted, vec![]),
        (S::Streaming, heard(Word::Runs), S::Streaming, vec![]),
        (S::Streaming, heard(Word::GivenUp), S::Streaming, vec![]),
        (S::Streaming, heard(Word::Discarded), S::Streaming, vec![]),
        (S::Streaming, heard(aborted("disk full")), S::Aborted, abort("disk full")),
        (S::Streaming, SourceEvent::QemuCompleted, S::Streaming, vec![]),
        (S::Streaming, SourceEvent::QemuRuns, S::Aborted, abort(ended)),
        (S::Streaming, SourceEvent::QemuDied, S::GaveUp, vec![Do::Write(S::GaveUp), Do::Say(Word::GivenUp)]),
        (S::Streaming, SourceEvent::Lost, S::Aborted, abort(lost)),
        (S::Streaming, SourceEvent::Reconnected, S::Streaming, vec![]),
        (S::Streaming, stop(), S::Aborted, abort("stop")),
        (S::GivingUp, heard(Word::Loaded), S::GivingUp, vec![]),
        (S::GivingUp, heard(aborted("x")), S::GivingUp, vec![]),
        (S::GivingUp, SourceEvent::QemuCompleted, S::GaveUp, gave_up()),
        (S::GivingUp, SourceEvent::QemuDied, S::GaveUp, gave_up()),
        (S::GivingUp, SourceEvent::QemuRuns, S::Aborted, abort(ended)),
        (S::GivingUp, SourceEvent::Lost, S::GivingUp, vec![]),
        (S::GivingUp, SourceEvent::Reconnected, S::GivingUp, vec![]),
        (S::GivingUp, stop(), S::GivingUp, vec![]),
        (S::GaveUp, SourceEvent::Reconnected, S::GaveUp, vec![Do::Say(Word::GivenUp)]),
        (S::GaveUp, heard(Word::Loaded), S::GaveUp, vec![Do::Say(Word::GivenUp)]),
        (S::GaveUp, heard(Word::Runs), S::Done, vec![Do::Write(S::Done), Do::Finish]),
        (S::GaveUp, heard(Word::Discarded), S::Aborted, taken_back.clone()),
        (S::GaveUp, heard(aborted("x")), S::GaveUp, vec![Do::Say(Word::GivenUp)]),
        (S::GaveUp, SourceEvent::Lost, S::GaveUp, vec![Do::Call]),
        (S::GaveUp, SourceEvent::QemuDied, S::GaveUp, vec![]),
        (S::GaveUp, SourceEvent::QemuRuns, S::GaveUp, vec![]),
        (S::GaveUp, stop(), S::GaveUp, vec![]),
        (S::Aborted, SourceEvent::Reconnected, S::Aborted, vec![Do::Say(aborted("first"))]),
        (S::Aborted, heard(Word::Loaded), S::Aborted, vec![Do::Say(aborted("first"))]),
        (S::Aborted, heard(Word::Discarded), S::Aborted, vec![Do::Finish]),
        (S::Aborted, SourceEvent::Lost, S::Aborted, vec![Do::Call]),
        (S::Aborted, SourceEvent::QemuCompleted, S::Aborted, vec![]),
        (S::Aborted, stop(), S::Aborted, vec![]),
        (S::Done, SourceEvent::Lost, S::Done, vec![]),
        (S::Done, SourceEvent::Reconnected, S::Done, vec![]),
        (S::Done, heard(Word::Runs), S::Done, vec![]),
        (S::Done, heard(Word::Discarded), S::Done, vec![]),
        (S::Done, stop(), S::Done, vec![]),
        // Only who has sent the switch is ready to be left.
        (S::Streaming, heard(Word::Ready), S::Streaming, vec![]),
        (S::Streaming, heard(Word::Filled), S::Streaming, vec![]),
        (S::Streaming, SourceEvent::Switched, S::Streaming, vec![]),
        (S::Streaming, SourceEvent::PagesLost, S::Aborted, abort("the memory of the VM is gone")),
        (S::GaveUp, heard(Word::Filled), S::GaveUp, vec![]),
        (S::Serving, SourceEvent::Reconnected, S::Serving, vec![Do::Say(Word::GivenUp)]),
        (S::Serving, heard(Word::Ready), S::Serving, vec![Do::Say(Word::GivenUp)]),
        (S::Serving, heard(aborted("x")), S::Serving, vec![Do::Say(Word::GivenUp)]),
        (S::Serving, heard(Word::Runs), S::Serving, vec![]),
        (S::Serving, heard(Word::Filled), S::Done, vec![Do::Write(S::Done), Do::Finish]),
        (S::Serving, heard(Word::Discarded), S::Aborted, taken_back.clone()),
        (S::Serving, SourceEvent::Lost, S::Serving, vec![Do::Call]),
        (S::Serving, SourceEvent::PagesLost, S::Serving, vec![Do::Say(Word::PagesLost)]),
        (S::Serving, SourceEvent::QemuDied, S::Serving, vec![]),
        (S::Serving, SourceEvent::QemuRuns, S::Serving, vec![]),
        (S::Serving, stop(), S::Serving, vec![]),
        (S::Serving, SourceEvent::Decided, S::Aborted, taken_back.clone()),
        (S::Done, SourceEvent::Decided, S::Done, vec![]),
        (S::Streaming, SourceEvent::Decided, S::Streaming, vec![]),
        (S::Aborted, heard(Word::Ready), S::Aborted, vec![Do::Say(aborted("first"))]),
        (S::Done, heard(Word::Filled), S::Done, vec![]),
    ];
    for (from, event, to, steps) in table {
        let mut h = source(from);
        assert_eq!(h.on(event.clone()), steps, "{from:?} on {event:?}");
        assert_eq!(h.state(), to, "{from:?} on {event:?}");
    }
}

#[test]
fn the_source_settles_and_doubts_where_it_should() {
    assert!(source(S::GaveUp).in_doubt() && !source(S::GaveUp).settled());
    assert!(source(S::Done).settled() && !source(S::Done).in_doubt());
    let mut h = source(S::Aborted);
    assert!(!h.settled() && h.reason() == "first");
    h.on(heard(Word::Discarded));
    assert!(h.settled());
    assert_eq!(h.on(SourceEvent::Lost), vec![], "nobody is called about a settled outcome");
    let mut h = source(S::GaveUp);
    h.on(heard(Word::Discarded));
    assert!(h.settled() && h.state() == S::Aborted && !h.in_doubt());
}

#[test]
fn recovering_every_source_state() {
    let restarted = "the source agent was restarted";
    let table: Vec<(S, Option<bool>, S, Vec<Do>)> = vec![
        (S::Streaming, Some(false), S::Aborted, abort(restarted)),
        (S::Streaming, None, S::Aborted, abort(restarted)),
        (S::GivingUp, Some(false), S::Aborted, abort(restarted)),
        (S::GivingUp, Some(true), S::GaveUp, gave_up()),
        (S::GivingUp, None, S::GaveUp, gave_up()),
        (S::GaveUp, Some(true), S::GaveUp, vec![Do::Call]),
        (S::GaveUp, None, S::GaveUp, vec![Do::Call]),
        (S::Done, Some(true), S::Done, vec![Do::Finish]),
        (S::Done, None, S::Done, vec![Do::Finish]),
        (S::Serving, Some(true), S::Serving, vec![Do::Call]),
        (S::Serving, None, S::Serving, vec![Do::Call]),
    ];
    for (journal, completed, to, steps) in table {
        let (h, got) = SourceHandover::recover(journal, completed);
        assert_eq!(got, steps, "{journal:?}, completed {completed:?}");
        assert_eq!(h.state(), to);
        assert_eq!(h.settled(), journal == S::Done);
    }
}

#[test]
fn a_crash_between_writing_aborted_and_taking_back_still_takes_back() {
    let (_, steps) = SourceHandover::recover(S::Aborted, Some(true));
    assert_eq!(steps, vec![Do::TakeBack, Do::Call]);
}

#[test]
fn a_dead_source_qemu_never_costs_a_loaded_target_copy() {
    let dead = || {
        let mut h = source(S::Streaming);
        assert_eq!(h.on(SourceEvent::QemuDied), vec![Do::Write(S::GaveUp), Do::Say(Word::GivenUp)]);
        h
    };
    let say = vec![Do::Say(Word::GivenUp)];
    assert_eq!(dead().on(heard(Word::Loaded)), say);
    assert_eq!(dead().on(SourceEvent::Lost), vec![Do::Call]);
    assert_eq!(dead().on(stop()), vec![]);
    assert_eq!(dead().on(heard(Word::Runs)), vec![Do::Write(S::Done), Do::Finish]);
    // The target could not load a stream that broke off: it is asked, answers Discarded, and that is the end.
    let mut h = dead();
    assert_eq!(h.on(heard(aborted("stream ended early"))), say);
    h.on(heard(Word::Discarded));
    assert_eq!((h.state(), h.reason(), h.settled()), (S::Aborted, "the source QEMU is gone", true));
}

#[test]
fn a_target_that_hears_of_giving_up_before_it_has_seen_all_loaded_runs_once_it_has() {
    let mut s = SourceHandover::new();
    s.on(SourceEvent::QemuWaits);
    assert_eq!(s.on(SourceEvent::QemuCompleted), gave_up());
    let mut t = TargetHandover::new();
    assert_eq!(t.on(TargetEvent::Word(Word::GivenUp)), vec![To::EndStream]);
    assert_eq!(t.on(TargetEvent::QemuLoaded), vec![To::Write(T::Loaded), To::Say(Word::Loaded)]);
    assert_eq!(s.on(heard(Word::Loaded)), vec![Do::Say(Word::GivenUp)]);
    let run = vec![To::Write(T::Running), To::Run, To::Say(Word::Runs), To::Finish];
    assert_eq!(t.on(TargetEvent::Word(Word::GivenUp)), run);
    assert_eq!(s.on(heard(Word::Runs)), vec![Do::Write(S::Done), Do::Finish]);
}

fn target(state: T) -> TargetHandover {
    let mut h = TargetHandover::new();
    let path: &[TargetEvent] = match state {
        T::Filling => &[],
        T::Loaded => &[TargetEvent::QemuLoaded],
        T::Running => &[TargetEvent::QemuLoaded, TargetEvent::Word(Word::GivenUp)],
        T::Discarded => &[TargetEvent::Lost],
        T::Ready => &[TargetEvent::Prepared],
        T::Fetching => &[TargetEvent::Prepared, TargetEvent::Word(Word::GivenUp)],
        T::Filled => &[TargetEvent::Prepared, TargetEvent::Word(Word::GivenUp), TargetEvent::Filled],
    };
    for e in path {
        h.on(e.clone());
    }
    assert_eq!(h.state(), state);
    h
}

#[test]
fn every_target_transition() {
    let word = TargetEvent::Word;
    let why = || "why".to_owned();
    let discard = || vec![To::Write(T::Discarded), To::Discard, To::Finish];
    let discard_and = |w: Word| vec![To::Write(T::Discarded), To::Discard, To::Say(w), To::Finish];
    let run = vec![To::Write(T::Running), To::Run, To::Say(Word::Runs), To::Finish];
    let fetch = vec![To::Write(T::Fetching), To::Run, To::Say(Word::Runs)];
    let filled = vec![To::Write(T::Filled), To::Say(Word::Filled), To::Finish];
    let table: Vec<(T, TargetEvent, T, Vec<To>)> = vec![
        (T::Filling, TargetEvent::QemuLoaded, T::Loaded, vec![To::Write(T::Loaded), To::Say(Word::Loaded)]),
        (T::Filling, word(Word::GivenUp), T::Filling, vec![To::EndStream]),
        (T::Filling, word(aborted("x")), T::Discarded, discard_and(Word::Discarded)),
        (T::Filling, TargetEvent::QemuFailed(why()), T::Discarded, discard_and(aborted("why"))),
        (T::Filling, TargetEvent::Abort(why()), T::Discarded, discard_and(aborted("why"))),
        (T::Filling, TargetEvent::Lost, T::Discarded, discard()),
        (T::Loaded, TargetEvent::QemuLoaded, T::Loaded, vec![]),
        (T::Loaded, word(Word::GivenUp), T::Running, run.clone()),
        (T::Loaded, word(aborted("x")), T::Discarded, discard_and(Word::Discarded)),
        (T::Loaded, TargetEvent::QemuFailed(why()), T::Discarded, discard_and(aborted("why"))),
        (T::Loaded, TargetEvent::Abort(why()), T::Loaded, vec![]),
        (T::Loaded, TargetEvent::Lost, T::Loaded, vec![]),
        (T::Running, word(Word::GivenUp), T::Running, vec![To::Say(Word::Runs)]),
        (T::Running, word(aborted("x")), T::Running, vec![]),
        (T::Running, TargetEvent::QemuFailed(why()), T::Running, vec![]),
        (T::Running, TargetEvent::Abort(why()), T::Running, vec![]),
        (T::Running, TargetEvent::Lost, T::Running, vec![]),
        (T::Running, TargetEvent::NeverRan, T::Discarded, discard_and(Word::Discarded)),
        (T::Discarded, TargetEvent::QemuLoaded, T::Discarded, vec![]),
        (T::Discarded, word(Word::GivenUp), T::Discarded, vec![To::Say(Word::Discarded)]),
        (T::Discarded, word(aborted("x")), T::Discarded, discard_and(Word::Discarded)),
        (T::Discarded, TargetEvent::Lost, T::Discarded, vec![]),
        (T::Loaded, TargetEvent::Decided, T::Running, run),
        (T::Filling, TargetEvent::Prepared, T::Ready, vec![To::Write(T::Ready), To::Say(Word::Ready)]),
        (T::Filling, TargetEvent::Filled, T::Filling, vec![]),
        (T::Filling, TargetEvent::Decided, T::Filling, vec![]),
        (T::Ready, word(Word::GivenUp), T::Fetching, fetch.clone()),
        (T::Ready, TargetEvent::Decided, T::Fetching, fetch),
        (T::Ready, word(aborted("x")), T::Discarded, discard_and(Word::Discarded)),
        (T::Ready, TargetEvent::QemuFailed(why()), T::Discarded, discard_and(aborted("why"))),
        (T::Ready, TargetEvent::Abort(why()), T::Ready, vec![]),
        (T::Ready, TargetEvent::Lost, T::Ready, vec![]),
        (T::Ready, TargetEvent::Filled, T::Ready, vec![]),
        (T::Fetching, word(Word::GivenUp), T::Fetching, vec![To::Say(Word::Runs)]),
        (T::Fetching, word(aborted("x")), T::Fetching, vec![]),
        (T::Fetching, TargetEvent::QemuFailed(why()), T::Fetching, vec![]),
        (T::Fetching, TargetEvent::Abort(why()), T::Fetching, vec![]),
        (T::Fetching, TargetEvent::Lost, T::Fetching, vec![]),
        (T::Fetching, word(Word::PagesLost), T::Fetching, vec![]),
        (T::Fetching, TargetEvent::NeverRan, T::Discarded, discard_and(Word::Discarded)),
        (T::Fetching, TargetEvent::Filled, T::Filled, filled),
        (T::Filled, word(Word::GivenUp), T::Filled, vec![To::Say(Word::Filled)]),
        (T::Filled, word(aborted("x")), T::Filled, vec![]),
        (T::Filled, TargetEvent::Lost, T::Filled, vec![]),
    ];
    for (from, event, to, steps) in table {
        let mut h = target(from);
        assert_eq!(h.on(event.clone()), steps, "{from:?} on {event:?}");
        assert_eq!(h.state(), to, "{from:?} on {event:?}");
    }
}

#[test]
fn recovering_every_target_state() {
    let table: Vec<(T, T, Vec<To>)> = vec![
        (T::Filling, T::Discarded, vec![To::Write(T::Discarded), To::Discard, To::Finish]),
        (T::Loaded, T::Loaded, vec![]),
        (T::Running, T::Running, vec![To::Run, To::Finish]),
        (T::Discarded, T::Discarded, vec![To::Discard, To::Finish]),
        (T::Ready, T::Ready, vec![]),
        (T::Fetching, T::Fetching, vec![To::Run]),
        (T::Filled, T::Filled, vec![To::Finish]),
    ];
    for (journal, to, steps) in table {
        let (h, got) = TargetHandover::recover(journal);
        assert_eq!(got, steps, "{journal:?}");
        assert_eq!(h.state(), to);
        assert_eq!(h.in_doubt(), matches!(journal, T::Loaded | T::Ready));
    }
}

#[test]
fn a_loaded_target_doubts_until_it_hears_a_word() {
    let mut h = target(T::Loaded);
    assert!(!h.in_doubt());
    h.on(TargetEvent::Lost);
    assert!(h.in_doubt());
    h.on(TargetEvent::Word(Word::GivenUp));
    assert!(!h.in_doubt());
}

#[test]
fn a_source_that_serves_doubts_only_until_it_hears_that_the_target_runs() {
    let mut h = source(S::Serving);
    assert!(h.in_doubt() && h.serving() && !h.settled());
    h.on(heard(Word::Runs));
    assert!(!h.in_doubt() && h.serving() && !h.settled());
    assert_eq!(h.on(heard(Word::Discarded)), vec![], "what has run is never taken back");
    let mut decided = h.clone();
    decided.on(SourceEvent::Decided);
    assert_eq!(decided.state(), S::Aborted, "but an operator may");
    h.on(heard(Word::Filled));
    assert!(h.settled() && !h.serving());
}

#[test]
fn a_target_that_lacks_pages_nobody_has_stays_paused_unless_an_operator_says_so() {
    let given = || TargetEvent::Word(Word::GivenUp);
    let mut h = target(T::Ready);
    h.on(TargetEvent::Word(Word::PagesLost));
    assert!(h.pages_lost());
    assert_eq!((h.on(given()), h.state()), (vec![], T::Ready));
    let mut whole = h.clone();
    whole.on(TargetEvent::Filled);
    assert!(!whole.pages_lost(), "nothing is lacking");
    whole.on(given());
    assert_eq!(whole.state(), T::Fetching);
    h.on(TargetEvent::Decided);
    assert_eq!(h.state(), T::Fetching);

    let (mut s, _) = SourceHandover::recover(S::Serving, None);
    let say = |w| Do::Say(w);
    assert_eq!(s.on(SourceEvent::Reconnected), vec![say(Word::PagesLost), say(Word::GivenUp)]);
}
