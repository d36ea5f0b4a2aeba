//! Sketches come in, models go out: when all have asked, and when somebody does not, is gone, or there is no plan.

use super::super::TICK;
use super::super::client::{IndexClient, IndexError};
use super::super::server::ServerOptions;
use super::{PATIENCE, Running, code, soon};
use super::{digest, reg};
use crate::core::index::{HostSet, Registration};
use crate::core::models::{HostModels, SketchItem};
use crate::core::sketch::Sketch;
use crate::core::units::HostIx;
use crate::core::wire::index_msg::ErrorCode;
use std::net::Shutdown;
use std::time::Instant;

/// What host `h` alone has, of 3 kinds by turns, `n` of each; it needs them at target `h`.
pub(super) fn alone(h: u16, n: u64) -> (Vec<Registration>, Vec<SketchItem>) {
    let numbers = || (0..3 * n).map(|i| (i, u64::from(h + 1) << 32 | i));
    let regs = numbers().map(|(_, d)| reg(d, &[h])).collect();
    let sketch = |i: u64| Sketch::from_features([i as u32 % 3 + 1; 8]);
    let item = |(i, d)| SketchItem { digest: digest(d), target: HostIx(h), sketch: sketch(i) };
    (regs, numbers().map(item).collect())
}

/// Joined, registered and done, with contents of its own; and what to say of those.
fn with_own_contents(server: &Running, h: u16, n: u64) -> (IndexClient, Vec<SketchItem>) {
    let (regs, items) = alone(h, n);
    let mut client = server.join(h);
    client.register(&regs).unwrap();
    client.done(0).unwrap();
    (client, items)
}

fn set(h: &[u16]) -> HostSet {
    h.iter().copied().map(HostIx).collect()
}

#[test]
fn models_are_chosen_when_all_have_asked() {
    let server = Running::new(ServerOptions::default());
    let opener = server.open(3);
    let n = 4000;
    let joined: Vec<_> = (0..3).map(|h| with_own_contents(&server, h, n)).collect();
    let started = Instant::now();
    let got: Vec<(HostModels, IndexClient)> = std::thread::scope(|s| {
        let threads: Vec<_> = joined
            .into_iter()
            .map(|(mut client, items)| {
                s.spawn(move || {
                    client.plan(soon()).unwrap();
                    // More than a message holds.
                    client.sketches(7, &items).unwrap();
                    (client.models(2, soon()).unwrap(), client)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(started.elapsed() < PATIENCE, "nobody waited for the deadline");
    let [first, second, third] = [0, 1, 2].map(|i: usize| &got[i].0);
    let (_, items) = alone(0, 1);
    // The third kind found no room.
    assert_eq!(
        first.lend.iter().map(|l| l.carry.digest).collect::<Vec<_>>(),
        [items[0].digest, items[1].digest]
    );
    for l in &first.lend {
        assert_eq!((l.carry.first, &l.carry.forward, &l.to), (HostIx(0), &set(&[1, 2]), &set(&[1, 2])));
    }
    assert_eq!((first.borrows, second, third), (0, second, second));
    assert_eq!((second.borrows, second.lend.len()), (2, 0));

    // Any number of times; what is reported now changes nothing.
    let (again, mut client) = got.into_iter().next().unwrap();
    client.sketches(7, &items).unwrap();
    assert_eq!(client.models(2, soon()).unwrap(), again);
    let mut back = server.join(0);
    assert!(
        matches!(back.models(2, soon()), Err(IndexError::Unexpected { .. })),
        "more than it has reported"
    );
    let mut back = server.join(0);
    back.assume_sketched(3);
    assert_eq!(back.models(2, soon()).unwrap(), again);
    let mut back = server.join(1);
    assert!(
        matches!(back.models(1, soon()), Err(IndexError::Unexpected { .. })),
        "more than it has room for"
    );
    opener.close().unwrap();
    assert_eq!(code(&client.models(2, soon()).unwrap_err()), ErrorCode::Closed);
}

#[test]
fn who_does_not_ask_for_models_holds_nobody_up_for_long() {
    let server = Running::new(ServerOptions::default());
    let _opener = server.open(3);
    let mut joined: Vec<_> = (0..3).map(|h| with_own_contents(&server, h, 2)).collect();
    for (client, items) in &mut joined {
        client.plan(soon()).unwrap();
        client.sketches(0, items).unwrap();
    }
    let (mut silent, _) = joined.remove(0);
    let (second, third) = std::thread::scope(|s| {
        let mut each = joined.iter_mut();
        let (Some((a, _)), Some((b, _))) = (each.next(), each.next()) else { panic!() };
        // Whose time is over first chooses for both.
        let a = s.spawn(|| a.models(9, Instant::now() + TICK * 5).unwrap());
        let started = Instant::now();
        let b = b.models(9, soon()).unwrap();
        assert!(started.elapsed() < PATIENCE / 2);
        (a.join().unwrap(), b)
    });
    assert_eq!((second.lend.len(), second.borrows), (3, 0));
    assert_eq!((third.lend.len(), third.borrows), (0, 3));
    assert!(second.lend.iter().all(|l| l.to == set(&[2]) && l.carry.forward == set(&[2])));
    assert_eq!(silent.models(9, soon()).unwrap(), HostModels::default(), "too late");
}

#[test]
fn who_has_asked_for_models_and_is_gone_is_counted() {
    let server = Running::new(ServerOptions::default());
    let _opener = server.open(2);
    let (mut here, mine) = with_own_contents(&server, 0, 1);
    let (mut dying, theirs) = with_own_contents(&server, 1, 1);
    dying.sketches(0, &theirs).unwrap();
    here.plan(soon()).unwrap();
    here.sketches(0, &mine).unwrap();
    let stream = dying.stream();
    std::thread::scope(|s| {
        let asks = s.spawn(move || dying.models(9, soon()).is_err());
        std::thread::sleep(TICK * 2);
        stream.shutdown(Shutdown::Both).unwrap();
        assert!(asks.join().unwrap());
    });
    let started = Instant::now();
    assert_eq!(here.models(9, soon()).unwrap().lend.len(), 3);
    assert!(started.elapsed() < PATIENCE / 2);
    let mut back = server.join(1);
    assert_eq!(back.models(9, soon()).unwrap().borrows, 3);
}

#[test]
fn who_is_gone_before_it_asks_for_models_is_not_waited_for() {
    let server = Running::new(ServerOptions::default());
    let _opener = server.open(3);
    let mut joined: Vec<_> = (0..3).map(|h| with_own_contents(&server, h, 2)).collect();
    for (client, items) in &mut joined {
        client.plan(soon()).unwrap();
        client.sketches(0, items).unwrap();
    }
    // One agent has ended by now, and another ends while others wait.
    drop(joined.remove(0));
    let (ending, _) = joined.remove(1);
    let (mut here, _) = joined.remove(0);
    let started = Instant::now();
    std::thread::scope(|s| {
        let asks = s.spawn(|| here.models(9, soon()).unwrap());
        std::thread::sleep(TICK * 2);
        assert!(!asks.is_finished(), "who is there is waited for");
        drop(ending);
        assert_eq!(asks.join().unwrap(), HostModels::default());
    });
    assert!(started.elapsed() < PATIENCE / 2);
}

#[test]
fn there_are_no_models_without_a_plan() {
    let server = Running::new(ServerOptions::default());
    let mut opener = server.open(3);
    let (mut here, items) = with_own_contents(&server, 0, 1);
    let (mut given_up, _) = with_own_contents(&server, 1, 1);
    here.sketches(0, &items).unwrap();
    let e = here.models(9, Instant::now() + TICK).unwrap_err();
    assert_eq!(code(&e), ErrorCode::NotReady);
    assert!(!here.is_lost(), "asking again is fine");
    opener.plan_now(&HostSet::one(HostIx(1)), PATIENCE).unwrap();
    assert_eq!(code(&given_up.models(9, soon()).unwrap_err()), ErrorCode::NotInPlan);
    assert_eq!(here.models(9, soon()).unwrap(), HostModels::default());
}
