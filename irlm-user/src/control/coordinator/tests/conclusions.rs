//! What is concluded from the agents' words, from their silence and from their clocks, without any agent.

use super::super::follow::{Looking, Stalls, words_to_come};
use super::super::plan::AlreadyMoved;
use super::super::prepare::route;
use super::super::watch::{Word, judge, vm_views};
use super::*;
use crate::control::api::LEFT_AGAIN;

fn facts(state: &str) -> VmFacts {
    VmFacts { state: state.into(), ..VmFacts::new(0, "v", Role::Source) }
}

fn view(source: Word, target: Word) -> VmView {
    let verdict = judge(&source, &target);
    let (source_host, target_host) = ("s".to_owned(), "t".to_owned());
    let name = "v".to_owned();
    VmView { name, source_host, target_host, source, target, verdict, already: None, reason: None }
}

#[test]
fn verdicts_follow_the_owner_and_never_guess() {
    let s = |p| Word::Now(vm(0, "v", Role::Source, p));
    let t = |p| Word::Now(vm(0, "v", Role::Target, p));
    let sees = |state: &str| Word::Absent(Some(Box::new(facts(state))));
    let ended = |p| Word::Now(VmStatus { state: "ended".into(), ..vm(0, "v", Role::Source, p) });
    let gone = |w: Word| match w {
        Word::Now(s) => Word::Last(s),
        other => other,
    };
    use Phase::{Cancelled, Done, Failed, GaveUp, InDoubt, LeftPaused, Loaded, Migrating, Prepared, Running};
    use Verdict::{Moved, Open, Stayed};
    let doubt = Verdict::InDoubt;
    let cases = [
        (s(Migrating), t(Migrating), Open),
        (s(GaveUp), t(Loaded), Open),
        (s(GaveUp), t(Running), Moved),
        (s(Migrating), t(LeftPaused), Moved),
        (gone(s(Migrating)), t(Running), Moved),
        (Word::Absent(None), t(Running), Moved),
        (s(Done), gone(t(Loaded)), Moved),
        (s(Failed), t(Migrating), Stayed),
        (s(Cancelled), gone(t(Loaded)), Stayed),
        // That its agent knows nothing says nothing; what that agent sees does.
        (Word::Absent(None), t(Migrating), Open),
        (sees("running"), t(Migrating), Stayed),
        (sees("paused"), Word::Absent(None), Stayed),
        (sees("postmigrate"), t(Loaded), Open),
        (sees(""), t(Migrating), Open),
        (sees("ended"), t(Prepared), Verdict::Lost),
        (ended(Failed), t(Failed), Verdict::Lost),
        (ended(Failed), t(Running), Moved),
        (s(GaveUp), t(Phase::Lost), Verdict::Lost),
        // Discarded at the target, but the source has not said yet that it goes on.
        (s(Migrating), t(Failed), Open),
        (gone(s(Migrating)), t(Failed), Stayed),
        (gone(s(GaveUp)), gone(t(Loaded)), doubt),
        // One that is silent is waited for, and no doubt yet.
        (s(GaveUp), gone(t(Loaded)), Open),
        (gone(s(Migrating)), t(Loaded), Open),
        (gone(s(Prepared)), t(Prepared), Open),
        (s(InDoubt), t(Loaded), doubt),
        (s(GaveUp), t(Failed), doubt),
        (gone(s(GaveUp)), t(Failed), doubt),
        (s(GaveUp), t(InDoubt), doubt),
        (s(Migrating), gone(t(Migrating)), Open),
        (gone(s(Migrating)), t(Migrating), Open),
        (Word::Silent, Word::Silent, doubt),
        (Word::Pending, Word::Pending, Open),
    ];
    for (source, target, want) in cases {
        assert_eq!(judge(&source, &target), want, "{source:?} {target:?}");
    }
}

#[test]
fn a_group_that_its_agents_have_forgotten_is_told_by_what_they_wrote() {
    let moved =
        crate::control::api::Moved { group: "g".into(), to: "127.0.0.1:3".parse().unwrap(), at_ns: 1 };
    let source = VmFacts { moved: Some(moved), ..facts("postmigrate") };
    let arrived = |group: Option<&str>| VmFacts { arrived: group.map(str::to_owned), ..facts("running") };
    let v = |group| {
        view(Word::Absent(Some(Box::new(source.clone()))), Word::Absent(Some(Box::new(arrived(group)))))
    };
    assert_eq!((v(Some("g")).verdict, v(Some("g")).state().to_owned()), (Verdict::Moved, "running".into()));
    assert_eq!((v(None).verdict, v(Some("other")).verdict), (Verdict::Open, Verdict::Open));
}

#[test]
fn a_vm_whose_target_was_never_called_stayed_if_its_source_agent_died() {
    use Phase::{Loaded, Migrating, Prepared};
    let concluded = |source: Phase, target: Phase| {
        let source = Word::Last(vm(0, "v", Role::Source, source));
        let mut v = view(source, Word::Now(vm(0, "v", Role::Target, target)));
        v.conclude();
        (v.verdict, v.error(), v.state().to_owned())
    };
    let why = Some("the source agent cannot be reached".to_owned());
    assert_eq!(concluded(Prepared, Prepared), (Verdict::Stayed, why, String::new()));
    assert_eq!(concluded(Migrating, Loaded), (Verdict::Open, None, String::new()));
}

#[test]
fn a_row_says_what_the_owner_s_process_says_and_never_guesses_running() {
    let now =
        |role, phase, state: &str| Word::Now(VmStatus { state: state.into(), ..vm(0, "v", role, phase) });
    let shown = |v: VmView| (v.verdict, v.phase_name(), v.state().to_owned());
    let (s, t) = (Role::Source, Role::Target);
    let v = view(now(s, Phase::Done, "postmigrate"), Word::Silent);
    assert!(v.error().unwrap().contains("was not seen"), "{:?}", v.error());
    assert_eq!(shown(v), (Verdict::Moved, "moved", String::new()), "nobody has seen it run");
    let v = view(now(s, Phase::Done, "postmigrate"), now(t, Phase::Running, "paused"));
    assert_eq!(shown(v), (Verdict::Moved, "running", "paused".into()));
    let v = view(now(s, Phase::Failed, "shutdown"), now(t, Phase::Failed, ""));
    assert_eq!(shown(v), (Verdict::Stayed, "failed", "shutdown".into()));
    let v = view(now(s, Phase::Failed, "ended"), now(t, Phase::Failed, ""));
    let error = v.error().unwrap();
    assert!(error.starts_with("its QEMU has ended at the source"), "{error}");
    assert_eq!(shown(v), (Verdict::Lost, "lost", "ended".into()));
    // What was said before the agent fell silent need not hold any more.
    let v =
        view(Word::Last(VmStatus { state: "running".into(), ..vm(0, "v", s, Phase::Failed) }), Word::Silent);
    assert_eq!(shown(v).2, "");
    let v = view(Word::Absent(Some(Box::new(facts("running")))), now(t, Phase::Prepared, ""));
    assert!(v.error().unwrap().contains("restarted"));
    assert_eq!(shown(v), (Verdict::Stayed, "stayed", "running".into()));
}

#[test]
fn every_wait_has_an_end_and_a_reason() {
    let o =
        Options { doubt_wait: Duration::from_secs(30), stall_wait: Duration::from_secs(300), ..options() };
    let now = |role, phase| Word::Now(vm(0, "v", role, phase));
    let at = |source: Word, target: Word, seconds: u64| {
        let began = Instant::now();
        let mut stalls = Stalls::new(began);
        let mut vms = [view(source, target)];
        stalls.look(&mut vms, &o, began);
        assert!(vms[0].is_awaited());
        stalls.look(&mut vms, &o, began + Duration::from_secs(seconds));
        let [v] = vms;
        v.reason
    };
    let (s, t) = (Role::Source, Role::Target);
    // A target whose VMM was killed: nothing comes any more, and its agent says "fetching" for ever.
    let fetching = || (now(s, Phase::GaveUp), now(t, Phase::Fetching));
    assert_eq!(at(fetching().0, fetching().1, 299), None);
    assert!(at(fetching().0, fetching().1, 300).unwrap().contains("nothing of it has moved for 300 s"));
    let silent = |phase| (now(s, phase), Word::Last(vm(0, "v", t, Phase::Migrating)));
    // What was given up waits for its target's word; before, the source ends the move by itself, as late as it may.
    for (phase, longest) in
        [(Phase::GaveUp, 30), (Phase::Stopped, 300), (Phase::Migrating, 300), (Phase::Prepared, 300)]
    {
        assert_eq!(at(silent(phase).0, silent(phase).1, longest - 1), None);
        let why = at(silent(phase).0, silent(phase).1, longest).unwrap();
        let waited = format!("waited for {longest} s");
        assert!(why.contains("target agent (t) does not answer") && why.contains(&waited), "{why}");
    }
    let why = at(Word::Absent(None), now(t, Phase::Loaded), 31).unwrap();
    assert!(why.contains("source agent (s) knows nothing of it"), "{why}");
    // One that waits for its turn waits as long as anything moves at all.
    let mut stalls = Stalls::new(Instant::now());
    let began = Instant::now();
    for minute in 0..20 {
        let mut busy = vm(1, "busy", s, Phase::Migrating);
        busy.stream_bytes = minute;
        let busy = VmView { name: "busy".into(), ..view(Word::Now(busy), now(t, Phase::Migrating)) };
        let mut vms = [view(now(s, Phase::Prepared), now(t, Phase::Prepared)), busy];
        stalls.look(&mut vms, &o, began + Duration::from_secs(60 * minute));
        assert!(vms.iter().all(VmView::is_awaited), "minute {minute}");
    }
}

/// A coordinator that was stopped for an hour finds its agents as it left them: it has to ask first.
#[test]
fn who_was_stopped_concludes_nothing_from_that_time() {
    let began = Instant::now();
    let mut clock = Looking::new(began);
    assert_eq!(clock.look(began + Duration::from_millis(200)) - began, Duration::from_millis(200));
    let hour = began + Duration::from_secs(3600);
    assert!(clock.look(hour) - began < Duration::from_secs(2));
    let before = clock.look(hour);
    assert_eq!(clock.look(hour + Duration::from_millis(300)) - before, Duration::from_millis(300));
}

#[test]
fn a_stepped_clock_gives_no_time_that_cannot_be() {
    let p = plan("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
    const DAY: u64 = 86_400_000_000_000;
    let moved = |downtime: Option<u64>, total: Option<u64>| {
        let mut source = vm(0, "v0", Role::Source, Phase::Done);
        (source.downtime_ns, source.total_ns, source.running_ns) = (downtime, total, DAY + 3_000_000_000);
        let mut target = vm(0, "v0", Role::Target, Phase::Running);
        target.ready_ns = DAY + 3_250_000_000;
        view(Word::Now(source), Word::Now(target))
    };
    let report = |v: VmView, whole| {
        let watched = Duration::from_secs(20);
        let times = Times { prepare: Some(Duration::ZERO), told: Duration::ZERO, watched, whole };
        Report::new(&p, &[v], &[], times, vec![])
    };
    let r = report(moved(None, None), true);
    assert_eq!(
        (r.vms[0].downtime_ms, r.vms[0].total_ms, r.group_ms),
        (None, None, Some(20_000.0)),
        "a day is too long"
    );
    let r = report(moved(Some(DAY), None), true);
    assert_eq!(r.vms[0].downtime_ms, None);
    let r = report(moved(Some(334_000_000), Some(2_000_000_000)), true);
    assert_eq!((r.vms[0].downtime_ms, r.vms[0].total_ms), (Some(334.0), Some(2000.0)));
    assert!(!r.vms[0].wall_clock, "one clock that does not step");
    let r = report(moved(None, None), false);
    assert!(r.vms[0].wall_clock, "where nothing better is known it is said");
}

#[test]
fn the_group_goes_direct_only_if_all_its_source_hosts_can() {
    let mut p = plan("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
    let source = p.agents.iter().find(|a| a.name == "s").unwrap().clone();
    p.agents = vec![source.clone(), source];
    let says = |direct, phase| Some(PrepareStatus { direct, phase, ..ready() });
    use PreparePhase::{Preparing, Ready};
    for (a, b, want) in [
        (says(Some(true), Preparing), says(None, Preparing), None),
        (says(Some(true), Preparing), says(Some(true), Preparing), Some(true)),
        (says(Some(true), Preparing), says(Some(false), Preparing), Some(false)),
        (says(Some(true), Preparing), says(None, Ready), Some(false)),
        (says(None, Ready), says(None, Ready), None),
        (says(Some(true), Preparing), None, None),
    ] {
        assert_eq!(route(&p, &[a.clone(), b.clone()]), want, "{a:?} {b:?}");
    }
}

/// The report of one VM, as its two agents see it.
fn report_of(v: VmView) -> Report {
    let p = plan("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
    let times = Times { prepare: None, told: Duration::ZERO, watched: Duration::ZERO, whole: false };
    Report::new(&p, &[v], &[], times, vec![])
}

fn says(role: Role, phase: Phase, state: &str) -> Word {
    Word::Now(VmStatus { state: state.into(), ..vm(0, "v", role, phase) })
}

#[test]
fn left_paused_is_said_only_of_a_vm_that_is_paused() {
    let now = |phase, state| {
        let v = view(says(Role::Source, Phase::Done, ""), says(Role::Target, phase, state));
        (v.now().to_owned(), v.phase_name())
    };
    for state in ["internal-error", "io-error", "guest-panicked", "shutdown", "suspended", "watchdog"] {
        assert_eq!(now(Phase::LeftPaused, state), (state.to_owned(), "left paused"));
    }
    assert_eq!(now(Phase::LeftPaused, "paused").0, "left paused");
    assert_eq!(
        (now(Phase::LeftPaused, "").0, now(Phase::Running, "ended").0),
        ("moved".into(), "ended".into())
    );
}

#[test]
fn an_old_copy_that_runs_beside_the_moved_one_is_said_and_no_success() {
    use Phase::{Done, Failed, GaveUp, LeftPaused, Migrating, Running, Stopped};
    let (s, t) = (Role::Source, Role::Target);
    let sees = Word::Absent(Some(Box::new(facts("running"))));
    for source in [says(s, Done, "running"), says(s, GaveUp, "running"), says(s, Failed, "running"), sees] {
        let r = report_of(view(source, says(t, Running, "running")));
        assert_eq!((r.outcome, r.vms[0].verdict), (Outcome::InDoubt, Verdict::Moved), "{r:?}");
        assert_eq!(serde_json::to_value(&r).unwrap()["vms"][0]["old_copy_runs"], true);
        let why = r.vms[0].error.as_deref().unwrap();
        let want = "two copies of it run: one at t, where it belongs, and its old one at s";
        assert!(why.starts_with(want), "{why}");
    }
    let r = report_of(view(says(s, Done, "running"), says(t, LeftPaused, "paused")));
    let why = "its old copy runs at s, and it belongs to t (paused there)";
    assert_eq!((r.outcome, r.vms[0].error.as_deref()), (Outcome::InDoubt, Some(why)));
    let r = report_of(view(says(s, Done, "running"), says(t, Running, "ended")));
    assert_eq!(r.outcome, Outcome::InDoubt, "one copy runs, and it is the wrong one");
    // A word from before the handover, and one that need not hold any more.
    let before = Word::Last(VmStatus { state: "running".into(), ..vm(0, "v", s, Done) });
    for source in
        [says(s, Migrating, "running"), says(s, Stopped, "running"), says(s, Done, "postmigrate"), before]
    {
        let r = report_of(view(source, says(t, Running, "running")));
        assert_eq!((r.outcome, r.vms[0].error.as_deref()), (Outcome::AllMoved, None), "{r:?}");
    }
}

#[test]
fn a_vm_that_has_ended_since_it_moved_is_said_and_no_success() {
    let v = || view(says(Role::Source, Phase::Done, ""), says(Role::Target, Phase::Running, "ended"));
    let already = VmView {
        already: Some("ended".into()),
        verdict: Verdict::Moved,
        ..view(Word::Pending, Word::Pending)
    };
    for v in [v(), already] {
        let r = report_of(v);
        assert_eq!((r.outcome, r.outcome.exit_code()), (Outcome::SomeLost, 5));
        let json = &serde_json::to_value(&r).unwrap()["vms"][0];
        assert_eq!((&json["verdict"], &json["state"]), (&"moved".into(), &"ended".into()));
        assert_eq!(json["error"], "its process has ended since it moved");
    }
    // As its agent tells it, and of one that moved on with another group.
    let said = |why: &str| {
        let ended = VmStatus { state: "ended".into(), ..vm(0, "v", Role::Target, Phase::Running) };
        let target = Word::Now(VmStatus { error: Some(why.into()), ..ended });
        let r = report_of(view(says(Role::Source, Phase::Done, ""), target));
        assert_eq!(r.vms[0].error.as_deref(), Some(why));
        r.outcome
    };
    assert_eq!(said("its process has ended after it had moved here"), Outcome::SomeLost);
    assert_eq!(said(LEFT_AGAIN), Outcome::AllMoved);
}

/// Of two agents that are asked one after the other the second may have said less.
#[test]
fn the_target_s_last_word_of_a_moved_vm_is_waited_for() {
    let done = || says(Role::Source, Phase::Done, "");
    let target = |phase| view(done(), says(Role::Target, phase, "running"));
    assert_eq!(target(Phase::Fetching).verdict, Verdict::Moved);
    assert!(words_to_come(&target(Phase::Fetching)) && !words_to_come(&target(Phase::Running)));
    let already = VmView { already: Some(String::new()), ..view(Word::Pending, Word::Pending) };
    assert!(!words_to_come(&VmView { verdict: Verdict::Moved, ..already }), "no agent is asked for it");
}

/// What an agent says that knows both VMs, of a run that is over.
fn knows(a: &plan::AgentPlan) -> AgentView {
    let (role, phase) = match a.spec.my_source {
        Some(_) => (Role::Source, Phase::Done),
        None => (Role::Target, Phase::Running),
    };
    let Reply::Status { groups, .. } = status(vec![vm(0, "v0", role, phase), vm(1, "v1", role, phase)])
    else {
        unreachable!()
    };
    let (name, addr) = (a.name.clone(), a.addr);
    let heard = Some(Instant::now());
    AgentView { name, addr, heard, answers: true, error: None, groups, facts: vec![] }
}

#[test]
fn a_run_has_no_figures_of_an_earlier_one() {
    let mut p = plan("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
    let agents: Vec<AgentView> = p.agents.iter().map(knows).collect();
    let report = |p: &Plan| {
        let watched = Duration::from_secs(20);
        let times = Times { prepare: Some(Duration::ZERO), told: Duration::ZERO, watched, whole: true };
        Report::new(p, &vm_views(p, &agents), &agents, times, vec![])
    };
    p.moved = vec![AlreadyMoved { ix: 0, state: "running".into() }];
    let r = report(&p);
    assert_eq!((r.vms[0].phase, &*r.vms[0].state, &r.vms[0].error), ("already moved", "running", &None));
    assert_eq!((r.vms[0].total_ms, r.vms[0].downtime_ms, r.vms[0].ram_bytes), (None, None, 0));
    assert!(r.vms[0].source_status.is_none() && r.vms[0].wire_bytes == 0 && r.vms[1].wire_bytes == 40);
    assert_eq!((r.totals.stream_bytes, r.totals.wire_bytes, r.totals.pages.unique), (100, 40 + 2 * 5, 3));
    p.moved.push(AlreadyMoved { ix: 1, state: "paused".into() });
    let r = report(&p);
    assert_eq!((r.outcome, r.group_ms), (Outcome::AllMoved, Some(0.0)));
    assert_eq!(
        serde_json::to_value(&r.totals).unwrap(),
        serde_json::to_value(report::Totals::default()).unwrap()
    );
    assert!(r.hosts.iter().all(|h| h.counters.push_bytes == 0), "pushed by the earlier run");
}

#[tokio::test]
async fn of_a_group_that_no_agent_knows_nothing_else_is_told() {
    let knows_nothing = || {
        let script: Script = Box::new(|r| {
            Some(match r {
                Request::Status { .. } => Err(Refusal::new(Code::UnknownGroup, "no")),
                Request::Preflight { .. } => Ok(Reply::Preflight(Box::default())),
                _ => Ok(Reply::Done),
            })
        });
        script
    };
    let ((s, _s), (t, _t)) = (agent(knows_nothing()).await, agent(knows_nothing()).await);
    let (_tx, rx) = never();
    let r = attach(&Plan::to_watch(plan(s, t).config), &options(), rx, &mut |_| {}).await;
    assert_eq!((r.outcome, r.problems.len(), r.vms.len()), (Outcome::NothingStarted, 1, 0), "{r:?}");
    assert_eq!((r.prepare_ms, r.group_ms), (None, None), "who only follows has seen neither");
}

#[test]
fn a_lost_vm_s_copy_at_its_source_is_told_only_if_its_agent_has_one() {
    use Phase::{Failed, GaveUp, Lost};
    let (s, t) = (Role::Source, Role::Target);
    let left = |source: Word, target: Word| report_of(view(source, target)).vms[0].copy_at_source;
    assert!(left(says(s, GaveUp, ""), says(t, Lost, "ended")));
    assert!(!left(says(s, GaveUp, "ended"), says(t, Lost, "ended")));
    assert!(!left(says(s, Failed, "ended"), says(t, Failed, "")), "it ended at its source");
    assert!(!left(Word::Silent, says(t, Lost, "ended")), "nobody has seen it");
}
