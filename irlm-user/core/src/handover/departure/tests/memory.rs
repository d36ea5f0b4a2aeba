//! The memory of the stopped VM, compared before the target may run it.

use super::*;
use crate::ram::{Block, PageAt, Stripes};

/// One block, of which these pages hold something.
fn memory(pages: &[(u32, u128)]) -> Ram {
    let mut sums = Stripes::default();
    for (page, mark) in pages {
        let s = &mut sums[*page as usize % sums.len()];
        s.marks += mark;
        s.placed += mark * (u128::from(*page) + 1);
    }
    Ram { blocks: vec![Block { name: "m0".to_owned(), pages: 100, sums }], unread: 0, took_ms: 5 }
}

fn ours() -> Ram {
    memory(&[(1, 11), (2, 22), (50, 33)])
}

/// Page 2 is another one.
fn other() -> Ram {
    memory(&[(1, 11), (2, 23), (50, 33)])
}

fn asked() -> Departure {
    let mut d = Departure::new();
    d.compares_memory();
    d.handle(Input::Stopped, NOW);
    d
}

fn hears(d: &mut Departure, ram: Ram) {
    d.handle(Input::Word(Word::Memory(ram)), NOW);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
}

fn gives_up(done: &[Action]) -> bool {
    done.iter().any(|a| matches!(a, Action::LetComplete | Action::Say(Word::GivenUp(..))))
}

/// As whoever carries its actions out: this is known of the pages that differ.
fn looks(d: &mut Departure, clocks: &[u32]) {
    if !d.odd().is_empty() {
        let at = |page: &u32| PageAt { block: "m0".to_owned(), page: *page };
        d.handle(Input::Clocks(clocks.iter().map(at).collect()), NOW);
    }
}

#[test]
fn a_vm_is_given_up_only_once_both_ends_were_found_to_hold_the_same() {
    for here_first in [true, false] {
        let mut d = asked();
        if here_first {
            d.handle(Input::Memory(ours()), NOW);
            assert!(works(&mut d, Standing::Completed).is_empty());
            hears(&mut d, ours());
        } else {
            hears(&mut d, ours());
            assert!(works(&mut d, Standing::Completed).is_empty(), "nobody has read it here yet");
            d.handle(Input::Memory(ours()), NOW);
        }
        assert!(gives_up(&works(&mut d, Standing::Completed)));
        let (compared, clocks, theirs) = d.same_memory().unwrap();
        assert_eq!((compared.pages, clocks, theirs.took_ms), (100, 0, 5));
    }
}

#[test]
fn a_vm_whose_memory_was_loaded_as_another_one_stays() {
    for here_first in [true, false] {
        let mut d = asked();
        if here_first {
            d.handle(Input::Memory(ours()), NOW);
        }
        d.handle(Input::Word(Word::Memory(other())), NOW);
        d.handle(Input::Word(Word::Loaded(None)), NOW);
        if !here_first {
            d.handle(Input::Memory(ours()), NOW);
        }
        assert_eq!(d.odd(), [PageAt { block: "m0".to_owned(), page: 2 }]);
        assert!(
            works(&mut d, Standing::Completed).is_empty(),
            "it is not known yet whether KVM has a clock there"
        );
        looks(&mut d, &[]);
        let done = works(&mut d, Standing::Back(RUN));
        assert!(!gives_up(&done) && d.is_back() && d.same_memory().is_none(), "{done:?}");
        assert!(d.reason().contains("page 0x2 of m0"), "{}", d.reason());
        assert!(d.differs().is_some());
    }
    // A clock of KVM is let pass, and counted. It is no leave for anything else.
    for (clocks, theirs, goes) in [
        (&[2][..], other(), true),
        (&[3], other(), false),
        (&[2], memory(&[(1, 11), (2, 23), (50, 34)]), false),
        // Two of one stripe: they cannot be named.
        (&[2, 50], memory(&[(1, 11), (18, 22), (50, 33)]), false),
    ] {
        let mut d = asked();
        d.handle(Input::Memory(ours()), NOW);
        hears(&mut d, theirs);
        looks(&mut d, clocks);
        assert_eq!(gives_up(&works(&mut d, Standing::Completed)), goes, "{clocks:?}");
        assert_eq!(d.same_memory().map(|s| s.1), goes.then_some(1));
    }
}

#[test]
fn a_vm_of_which_one_end_says_nothing_stays() {
    // The target does not.
    let mut d = asked();
    d.handle(Input::Memory(ours()), NOW);
    d.handle(Input::Word(Word::Loaded(None)), NOW);
    assert!(!gives_up(&works(&mut d, Standing::Back(RUN))) && d.is_back());
    assert!(d.reason().contains("does not say what its memory comes to"), "{}", d.reason());
    // This one cannot, told before or after.
    for first in [true, false] {
        let mut d = asked();
        let cannot = Input::NoMemory("no leave to read it".to_owned());
        if first {
            d.handle(cannot.clone(), NOW);
        }
        hears(&mut d, ours());
        d.handle(cannot, NOW);
        assert!(!gives_up(&works(&mut d, Standing::Back(RUN))) && d.is_back());
        assert!(d.reason().contains("no leave to read it"), "{}", d.reason());
    }
    // Nobody asked.
    let mut d = Departure::new();
    d.handle(Input::Stopped, NOW);
    d.handle(Input::NoMemory("no leave to read it".to_owned()), NOW);
    hears(&mut d, other());
    assert!(gives_up(&works(&mut d, Standing::Completed)) && d.same_memory().is_none());
}

/// Its QEMU streams to the target's: it is let go before the target has loaded it.
fn let_go() -> Departure {
    let mut d = asked();
    d.handle(Input::Source(Standing::Waits), NOW);
    let done = works(&mut d, Standing::Completed);
    assert_eq!(done.last(), Some(&Action::Write(SourceState::GaveUp, RUN)), "nothing is said yet");
    d
}

#[test]
fn a_vm_that_was_let_go_is_given_up_by_word_only_once_it_was_compared() {
    for here_first in [true, false] {
        let mut d = let_go();
        if here_first {
            d.handle(Input::Memory(ours()), NOW);
        }
        hears(&mut d, ours());
        d.handle(Input::Connected, NOW);
        if !here_first {
            assert!(works(&mut d, Standing::Completed).is_empty());
            d.handle(Input::Memory(ours()), NOW);
        }
        assert_eq!(works(&mut d, Standing::Completed), [Action::Say(Word::GivenUp(RUN, None))]);
    }
    // Compared before its QEMU has completed.
    let mut d = asked();
    d.handle(Input::Source(Standing::Waits), NOW);
    assert!(works(&mut d, Standing::UnderWay).iter().any(|a| matches!(a, Action::LetComplete)));
    d.handle(Input::Memory(ours()), NOW);
    hears(&mut d, ours());
    d.handle(Input::Source(Standing::Completed), NOW);
    let said = [Action::Write(SourceState::GaveUp, RUN), Action::Say(Word::GivenUp(RUN, None))];
    assert_eq!(works(&mut d, Standing::Completed), said);
}

#[test]
fn a_vm_that_was_let_go_and_differs_is_taken_back_as_nobody_was_told_to_run_it() {
    let ends: [fn(&mut Departure); 5] = [
        |d| {
            d.handle(Input::Memory(ours()), NOW);
            hears(d, other());
            looks(d, &[]);
        },
        |d| {
            hears(d, other());
            d.handle(Input::NoMemory("no leave to read it".to_owned()), NOW);
        },
        |d| d.handle(Input::Lost("the link is cut".to_owned()), NOW),
        |d| d.handle(Input::Word(Word::Aborted("it cannot be read".to_owned())), NOW),
        |d| d.handle(Input::Decided(Decision::Source), NOW),
    ];
    for (n, end) in ends.into_iter().enumerate() {
        let mut d = let_go();
        end(&mut d);
        let done = works(&mut d, Standing::Completed);
        assert!(!gives_up(&done), "{n}: {done:?}");
        let back = done.iter().position(|a| matches!(a, Action::TakeBack(_)));
        let wrote =
            |a: &Action| matches!(a, Action::Write(SourceState::TakingBack | SourceState::Aborted, _));
        assert!(back.is_some_and(|at| done[..at].iter().any(wrote)), "{n}: written before: {done:?}");
        assert!(d.is_back(), "{n}: {d:?}");
        d.handle(Input::Connected, NOW);
        let said = works(&mut d, Standing::Back(RUN));
        assert!(
            done.iter().chain(&said).any(|a| matches!(a, Action::Say(Word::Aborted(_)))),
            "{n}: {done:?}"
        );
    }
}

/// Its QEMU completes all the same.
#[test]
fn a_vm_whose_target_is_lost_while_it_is_let_go_is_taken_back() {
    let mut d = asked();
    d.handle(Input::Source(Standing::Waits), NOW);
    assert!(works(&mut d, Standing::UnderWay).contains(&Action::LetComplete));
    d.handle(Input::Lost("the link is cut".to_owned()), NOW);
    d.handle(Input::Source(Standing::Completed), NOW);
    let done = works(&mut d, Standing::Completed);
    assert!(done.contains(&Action::TakeBack(RUN)) && !gives_up(&done) && d.is_back(), "{done:?}");
}

#[test]
fn a_target_copy_that_differs_is_not_run_because_the_source_is_gone_and_one_that_nobody_could_compare_is() {
    // Seen to differ: an operator's.
    for gone_first in [true, false] {
        let mut d = let_go();
        if gone_first {
            d.handle(Input::Source(Standing::Gone), NOW);
        }
        d.handle(Input::Memory(ours()), NOW);
        hears(&mut d, other());
        looks(&mut d, &[]);
        while let Some(action) = d.poll(NOW) {
            assert!(
                !matches!(action, Action::Say(Word::GivenUp(..) | Word::Gone)),
                "{gone_first}: {action:?}"
            );
            let took = matches!(action, Action::TakeBack(_));
            d.done(if took { Outcome::Took(Took::Gone) } else { Outcome::Done }, NOW);
        }
        assert!(d.in_doubt() && d.differs().is_some(), "{gone_first}: {d:?}");
        d.handle(Input::Connected, NOW);
        let done = works(&mut d, Standing::Gone);
        assert!(!done.iter().any(|a| matches!(a, Action::Say(_))), "{done:?}");
        d.handle(Input::Decided(Decision::Target), NOW);
        assert_eq!(d.state(), SourceState::Done);
    }
    // Its memory went with its process: there is no other copy.
    for (late, first) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut d = let_go();
        let cannot = Input::NoMemory("no such process".to_owned());
        if !late {
            d.handle(Input::Source(Standing::Gone), NOW);
        }
        if first {
            d.handle(cannot.clone(), NOW);
        }
        hears(&mut d, other());
        d.handle(cannot, NOW);
        while let Some(action) = d.poll(NOW) {
            let took = matches!(action, Action::TakeBack(_));
            d.done(if took { Outcome::Took(Took::Gone) } else { Outcome::Done }, NOW);
            if matches!(action, Action::Say(Word::GivenUp(..))) {
                d.handle(Input::Word(Word::Runs), NOW);
            }
        }
        assert_eq!((d.state(), d.same_memory()), (SourceState::Done, None), "{late} {first}: {d:?}");
    }
}
