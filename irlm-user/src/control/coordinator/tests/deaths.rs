//! Agents that die while a group moves, and what is said of it then.

use super::*;

#[tokio::test]
async fn a_source_agent_that_dies_is_concluded_from_its_targets() {
    use Phase::{Failed, Migrating, Running};
    let log = Log::default();
    let mut inner = good("s", &log, Role::Source, vec![[Migrating; 2]]);
    let mut statuses = 0;
    let dies: Script = Box::new(move |r| {
        statuses += usize::from(matches!(r, Request::Status { .. }));
        if statuses > 2 { None } else { inner(r) }
    });
    let (s, _s) = agent(dies).await;
    let target = good("t", &log, Role::Target, vec![[Migrating; 2], [Running, Migrating], [Running, Failed]]);
    let (t, _t) = agent(target).await;
    let (_tx, rx) = never();
    let r = run(&plan(s, t), &options(), rx, &mut |_| {}).await;
    assert_eq!(r.outcome.exit_code(), 2, "{r:?}");
    assert_eq!((r.vms[0].verdict, r.vms[1].verdict), (Verdict::Moved, Verdict::Stayed));
    let why = r.vms[1].error.as_deref();
    assert_eq!(why, Some("because; the source agent cannot be reached"));
    assert_eq!(r.vms[1].state, "", "nobody has seen what it does there");
    assert!(r.hosts.iter().any(|h| h.name == "s" && !h.answers));
}

#[tokio::test]
async fn a_target_agent_that_dies_after_the_handover_is_given_time_to_say_how_its_vms_stand() {
    use Phase::{Done, Loaded, Migrating, Running};
    let log = Log::default();
    let (s, _s) = agent(good("s", &log, Role::Source, vec![[Migrating; 2], [Done; 2]])).await;
    let mut inner = good("t", &log, Role::Target, vec![[Migrating; 2], [Loaded; 2]]);
    let mut statuses = 0;
    let dies: Script = Box::new(move |r| {
        statuses += usize::from(matches!(r, Request::Status { .. }));
        if statuses > 3 { None } else { inner(r) }
    });
    let (t, first) = agent(dies).await;
    let mut inner = good("t", &log, Role::Target, vec![[Running; 2]]);
    // By its journal they run; it has to be asked to look.
    let recovered: Script = Box::new(move |r| {
        if let Request::Preflight { spec, vms_only: true } = r {
            let Reply::Preflight(mut p) = seen(spec) else { unreachable!() };
            p.vms.iter_mut().for_each(|v| v.state = "paused".into());
            return Some(Ok(Reply::Preflight(p)));
        }
        let mut reply = inner(r);
        if let Some(Ok(Reply::Status { groups, .. })) = &mut reply {
            groups.iter_mut().flat_map(|g| &mut g.vms).for_each(|v| v.state.clear());
        }
        reply
    });
    tokio::spawn(async move {
        first.await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        agent_at(t, recovered).await.1.await
    });
    let (_tx, rx) = never();
    let r = run(&plan(s, t), &options(), rx, &mut |_| {}).await;
    assert_eq!(r.outcome, Outcome::AllMoved, "{r:?}");
    assert!(r.vms.iter().all(|v| v.state == "paused" && v.error.is_none()), "{r:?}");
}

#[tokio::test]
async fn doubt_is_reported_after_its_time_and_a_cancel_reaches_every_agent() {
    use Phase::{Cancelled, Done, InDoubt, Migrating, Running};
    let log = Log::default();
    let (s, _s) = agent(good("s", &log, Role::Source, vec![[InDoubt, Done]])).await;
    let (t, _t) = agent(good("t", &log, Role::Target, vec![[InDoubt, Running]])).await;
    let (tx, rx) = never();
    let r = run(&plan(s, t), &options(), rx, &mut |_| {}).await;
    assert_eq!(
        (r.outcome.exit_code(), r.vms[0].verdict, r.vms[1].verdict),
        (3, Verdict::InDoubt, Verdict::Moved)
    );

    let log = Log::default();
    let source = good("s", &log, Role::Source, vec![[Migrating; 2], [Migrating; 2], [Cancelled; 2]]);
    let (s, _s) = agent(source).await;
    let (t, _t) =
        agent(good("t", &log, Role::Target, vec![[Migrating; 2], [Migrating; 2], [Cancelled; 2]])).await;
    let rx = tx.subscribe();
    let r = run(&plan(s, t), &options(), rx, &mut |scene| {
        if matches!(scene, Scene::Moving(..)) {
            tx.send_replace(1);
        }
    })
    .await;
    assert_eq!(r.outcome, Outcome::SomeStayed, "{r:?}");
    let log = log.lock().unwrap();
    assert_eq!(log.iter().filter(|l| l.ends_with("cancel")).count(), 2, "{log:?}");
}
