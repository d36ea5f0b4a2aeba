//! What an action comes to is what its driver is told: hands of which one thing fails, and what they are asked
//! for then.

use super::*;
use crate::core::handover::{arrival, departure};

const RUN: GuestState = GuestState::Running;

/// Hands that note what they are asked for; what is named in `fails` does.
struct Hands<D> {
    driver: D,
    fails: &'static str,
    asked: Vec<&'static str>,
}

impl<D> Hands<D> {
    fn of(driver: D, fails: &'static str) -> Self {
        Self { driver, fails, asked: Vec::new() }
    }

    fn does(&mut self, what: &'static str) -> Result<(), MoveError> {
        self.asked.push(what);
        if self.fails == what { Err(MoveError::Unsettled(format!("no {what}"))) } else { Ok(()) }
    }
}

impl Departs for Hands<Departure> {
    fn driver(&mut self) -> &mut Departure {
        &mut self.driver
    }
    fn write(&mut self, _: SourceState, _: GuestState) -> Result<(), MoveError> {
        self.does("write")
    }
    fn let_complete(&mut self) -> Result<Standing, MoveError> {
        self.does("let go").map(|()| Standing::Completed)
    }
    fn ask(&mut self) -> Result<Standing, MoveError> {
        self.does("ask").map(|()| Standing::Completed)
    }
    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        self.does("take back").map(|()| Took::Stands(guest))
    }
    fn say(&mut self, _: &Word) -> Result<(), MoveError> {
        self.does("say")
    }
    fn serve(&mut self) -> Result<(), MoveError> {
        self.does("serve")
    }
    fn call(&mut self) -> Result<(), MoveError> {
        self.does("call")
    }
    fn finish(&mut self) {
        self.asked.push("finish");
    }
}

impl Arrives for Hands<Arrival> {
    fn driver(&mut self) -> &mut Arrival {
        &mut self.driver
    }
    fn write(&mut self, _: TargetState, _: GuestState) -> Result<(), MoveError> {
        self.does("write")
    }
    fn say(&mut self, _: &Word) -> Result<(), MoveError> {
        self.does("say")
    }
    fn look(&mut self) -> Result<Option<bool>, MoveError> {
        self.does("look").map(|()| Some(true))
    }
    fn run(&mut self, _: GuestState) -> Result<Ran, MoveError> {
        self.does("run").map(|()| Ran::Runs)
    }
    fn settle(&mut self) -> Result<(), MoveError> {
        self.does("settle")
    }
    fn end_stream(&mut self) {
        self.asked.push("end stream");
    }
    fn discard(&mut self) -> Result<(), MoveError> {
        self.does("discard")
    }
    fn finish(&mut self) {
        self.asked.push("finish");
    }
}

fn leaves(fails: &'static str) -> Hands<Departure> {
    let mut hands = Hands::of(Departure::new(), fails);
    hands.driver.handle(departure::Input::Stopped, now());
    hands.driver.handle(departure::Input::Word(Word::Loaded(None)), now());
    depart(&mut hands);
    hands
}

#[test]
fn a_source_whose_action_failed_does_not_go_on_as_if_it_had_worked() {
    assert_eq!(leaves("").asked, ["write", "let go", "write", "say"]);
    let full = leaves("write");
    assert_eq!(full.driver.state(), SourceState::Aborted, "{:?}", full.asked);
    assert!(!full.asked.contains(&"let go") && full.asked.contains(&"take back"), "{:?}", full.asked);
    let mute = leaves("let go");
    assert_eq!((&mute.asked[..], mute.driver.state()), (&["write", "let go"][..], SourceState::GivingUp));
    assert_eq!(mute.driver.trouble(), Some("no let go"));
    // Nor is one back that could not be continued.
    let mut hands = Hands::of(Departure::new(), "take back");
    hands.driver.handle(departure::Input::Abort("cancelled".into()), now());
    depart(&mut hands);
    assert!(!hands.driver.is_back() && !hands.asked.contains(&"say"), "{:?}", hands.asked);
}

#[test]
fn a_target_whose_action_failed_does_not_go_on_as_if_it_had_worked() {
    let arrives = |fails| {
        let mut hands = Hands::of(Arrival::new(), "");
        hands.driver.handle(arrival::Input::Loaded(None), now());
        arrive(&mut hands);
        assert_eq!(std::mem::take(&mut hands.asked), ["write", "say"]);
        hands.fails = fails;
        hands.driver.handle(arrival::Input::Word(Word::GivenUp(RUN, None)), now());
        arrive(&mut hands);
        hands
    };
    assert_eq!(arrives("").asked, ["write", "run", "say", "settle", "finish"]);
    let full = arrives("write");
    assert_eq!((&full.asked[..], full.driver.ran()), (&["write"][..], false));
    assert_eq!(full.driver.trouble(), Some("no write"));
    let mute = arrives("run");
    assert_eq!((&mute.asked[..], mute.driver.ran()), (&["write", "run"][..], false));
}
