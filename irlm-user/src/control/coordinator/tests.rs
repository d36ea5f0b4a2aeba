//! The coordinator against agents that are scripts on real sockets: what it tells whom, in which order, and
//! what it concludes when they fail, refuse, fall silent or die.

use super::watch::AgentView;
use super::*;
use crate::control::api::{
    Code, GroupStatus, HostCounters, Incoming, Method, PageCounts, Phase, Preflight, PreparePhase, Refusal,
    Role, VmFacts, VmStatus, Work, encode_reply,
};
use crate::control::api::{PrepareStatus, Reply};
use crate::control::config::GroupConfig;
use crate::control::lines::Lines;
use crate::flow::unix_ns;
use report::Outcome;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

// What follows from words, silence and clocks.
mod conclusions;
mod deaths;

const T: Duration = Duration::from_secs(2);

type Script = Box<dyn FnMut(&Request) -> Option<Result<Reply, Refusal>> + Send>;

/// Serves `script` on a port of its own; `None` from it closes the connection and the port for good.
async fn agent(script: Script) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    agent_at("127.0.0.1:0".parse().unwrap(), script).await
}

async fn agent_at(addr: SocketAddr, script: Script) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind(addr).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let script = Arc::new(Mutex::new(script));
    let task = tokio::spawn(async move {
        let mut conns = JoinSet::new();
        loop {
            tokio::select! {
                s = listener.accept() => {
                    let script = Arc::clone(&script);
                    let mut lines = Lines::new(s.unwrap().0);
                    conns.spawn(async move {
                        while let Ok(Some(line)) = lines.read(T).await {
                            let r = crate::control::api::heard::decode_request(&line.text).unwrap();
                            let reply = script.lock().unwrap()(&r);
                            let Some(reply) = reply else { return false };
                            if lines.write(encode_reply(&reply), T).await.is_err() {
                                break;
                            }
                        }
                        true
                    });
                }
                Some(ended) = conns.join_next() => {
                    if !ended.unwrap() {
                        return;
                    }
                }
            }
        }
    });
    (addr, task)
}

fn vm(ix: u16, name: &str, role: Role, phase: Phase) -> VmStatus {
    VmStatus {
        ix,
        name: name.into(),
        role,
        phase,
        stream_bytes: 100,
        wire_bytes: 40,
        ram_total: 1000,
        ram_remaining: 0,
        pages: PageCounts { unique: 3, ..PageCounts::default() },
        work: Work { raw_bytes: 8, wire_bytes: 2, ..Work::default() },
        waiting: 0,
        started_ns: 2_900_000_000,
        stopped_ns: 3_000_000_000,
        ready_ns: if role == Role::Target { 3_250_000_000 } else { 0 },
        running_ns: 0,
        total_ns: None,
        fill_ns: None,
        state: match phase {
            Phase::Running => "running",
            Phase::LeftPaused => "paused",
            _ => "",
        }
        .to_owned(),
        filled_ns: 0,
        faults: None,
        downtime_ns: (role == Role::Source && phase == Phase::Done).then_some(260_000_000),
        hash_ns: 0,
        verified: None,
        error: matches!(phase, Phase::Failed | Phase::InDoubt).then(|| "because".to_owned()),
    }
}

fn status(vms: Vec<VmStatus>) -> Reply {
    let group = GroupStatus {
        share: None,
        group: "g".into(),
        method: Method::Oc,
        prepare: ready(),
        vms,
        host: HostCounters { push_bytes: 5, forwarded_bytes: 7, ..HostCounters::default() },
        started_ns: 1,
    };
    Reply::Status { name: "x".into(), now_ns: 0, groups: vec![group], samplers: vec![], keys: None }
}

fn ready() -> PrepareStatus {
    PrepareStatus {
        phase: PreparePhase::Ready,
        pages_total: 1,
        pages_done: 1,
        distinct: 1,
        hot: 0,
        planning: false,
        direct: None,
        incoming: vec![],
        problem: None,
    }
}

fn hello() -> Reply {
    Reply::Hello {
        name: "x".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        now_ns: unix_ns(),
        data: None,
        you: None,
    }
}

/// Two VMs from one source host to one target host.
fn plan(source: SocketAddr, target: SocketAddr) -> Plan {
    let text = format!(
        "name='g'\nmethod='oc'\n[[source]]\nname='s'\nagent='{source}'\n[[target]]\nname='t'\nagent='{target}'\n\
         data='{target}'\n[[vm]]\nname='v0'\nsource='s'\ntarget='t'\nsource_qmp='/a'\ntarget_qmp='/b'\n\
         [[vm]]\nname='v1'\nsource='s'\ntarget='t'\nsource_qmp='/c'\ntarget_qmp='/d'\n"
    );
    Plan::new(GroupConfig::parse(&text).unwrap(), None).unwrap()
}

fn options() -> Options {
    Options {
        leave_paused: true,
        call_timeout: T,
        doubt_wait: Duration::from_millis(600),
        stall_wait: Duration::from_secs(60),
        open_index: None,
    }
}

type Log = Arc<Mutex<Vec<String>>>;

fn note(log: &Log, who: &str, r: &Request) {
    let what = match r {
        Request::Hello => "hello".to_owned(),
        Request::Preflight { vms_only: false, .. } => "preflight".to_owned(),
        Request::Route { direct, .. } => format!("route {direct}"),
        Request::Prepare { spec } => format!("prepare {} VMs", spec.vms.len()),
        Request::PrepareStatus { .. } => "prepare-status".into(),
        Request::Start { leave_paused, incoming, part, .. } => {
            format!("start {part:?} {leave_paused} {}", incoming.len())
        }
        Request::Cancel { .. } => "cancel".into(),
        Request::Forget { .. } => "forget".into(),
        _ => return,
    };
    log.lock().unwrap().push(format!("{who} {what}"));
}

/// What an agent sees that has nothing to refuse.
fn seen(spec: &crate::control::api::GroupSpec) -> Reply {
    let at = |v: &crate::control::api::VmSpec, role| VmFacts {
        state: if role == Role::Source { "running" } else { "inmigrate" }.into(),
        ..VmFacts::new(v.ix, &v.name, role)
    };
    let role = if spec.my_source.is_some() { Role::Source } else { Role::Target };
    let vms = spec.vms.iter().map(|v| at(v, role)).collect();
    Reply::Preflight(Box::new(Preflight { vms, ..Preflight::default() }))
}

/// A script that notes what it is told and answers well; `phases` are its VMs' phases, one set a status.
fn good(who: &'static str, log: &Log, role: Role, phases: Vec<[Phase; 2]>) -> Script {
    let log = Arc::clone(log);
    let mut phases = phases.into_iter();
    let mut now = phases.next();
    let mut asked = 0;
    Box::new(move |r| {
        note(&log, who, r);
        Some(Ok(match r {
            Request::Hello => hello(),
            Request::Preflight { spec, .. } => seen(spec),
            Request::Prepare { spec } => {
                assert_eq!((spec.method, spec.vms.len()), (Method::Oc, 2));
                Reply::Prepare(PrepareStatus { phase: PreparePhase::Preparing, ..ready() })
            }
            Request::PrepareStatus { .. } => {
                let incoming = match role {
                    Role::Target => vec![Incoming { vm: 0, addr: "127.0.0.1:9".parse().unwrap() }],
                    Role::Source => vec![],
                };
                Reply::Prepare(PrepareStatus { incoming, ..ready() })
            }
            Request::Status { .. } => {
                asked += 1;
                if asked % 2 == 0 {
                    now = phases.next().or(now);
                }
                let [a, b] = now.unwrap();
                status(vec![vm(0, "v0", role, a), vm(1, "v1", role, b)])
            }
            _ => Reply::Done,
        }))
    })
}

fn never() -> (tokio::sync::watch::Sender<u32>, Interrupts) {
    tokio::sync::watch::channel(0)
}

#[tokio::test]
async fn all_moved_in_the_right_order_and_the_figures_add_up() {
    use Phase::{Done, GaveUp, LeftPaused, Loaded, Migrating, Prepared, Running};
    let log = Log::default();
    let source =
        good("s", &log, Role::Source, vec![[Prepared; 2], [Migrating; 2], [GaveUp, Done], [Done; 2]]);
    let target =
        good("t", &log, Role::Target, vec![[Prepared; 2], [Migrating, Loaded], [LeftPaused, Running]]);
    let (s, _s) = agent(source).await;
    let (t, _t) = agent(target).await;
    let (_tx, rx) = never();
    let mut scenes = 0;
    let r = run(&plan(s, t), &options(), rx, &mut |_| scenes += 1).await;
    assert_eq!((r.outcome, r.outcome.exit_code()), (Outcome::AllMoved, 0), "{r:?}");
    assert!(scenes > 5);
    assert_eq!(r.vms[0].phase, "left paused");
    assert_eq!((r.vms[1].downtime_ms, r.vms[1].total_ms), (Some(260.0), Some(350.0)));
    assert_eq!((r.totals.wire_bytes, r.totals.forwarded_bytes), (2 * 40 + 2 * 5, 14));
    assert_eq!((r.totals.pages.unique, r.totals.median_downtime_ms), (6, Some(260.0)));
    let mut log = log.lock().unwrap().clone();
    let at =
        |what: &str| log.iter().position(|l| l == what).unwrap_or_else(|| panic!("no {what} in {log:?}"));
    assert!(at("s prepare 2 VMs") > at("t hello") && at("t start Targets true 1") > at("s prepare-status"));
    assert!(at("s start Sources true 1") > at("t start Targets true 1"), "{log:?}");
    log.retain(|l| l.contains("cancel") || l.contains("forget"));
    assert!(log.is_empty(), "{log:?}");
    serde_json::to_string(&r).unwrap();
}

#[tokio::test]
async fn a_dead_agent_or_a_failed_preparation_starts_nothing() {
    let log = Log::default();
    let (t, _t) = agent(good("t", &log, Role::Target, vec![[Phase::Prepared; 2]])).await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (_tx, rx) = never();
    let r = run(&plan(dead, t), &options(), rx.clone(), &mut |_| {}).await;
    assert_eq!((r.outcome.exit_code(), r.problems.len()), (4, 1), "{r:?}");
    assert!(r.problems[0].contains("host s") && r.problems[0].contains("irlm agent"), "{:?}", r.problems);
    let noted = Arc::clone(&log);
    let refuses: Script = Box::new(move |r| {
        note(&noted, "s", r);
        Some(match r {
            Request::Hello => Ok(hello()),
            Request::Preflight { spec, .. } => Ok(seen(spec)),
            Request::Prepare { .. } => Ok(Reply::Prepare(PrepareStatus {
                phase: PreparePhase::Failed,
                problem: Some("QMP /a: nobody there".into()),
                ..ready()
            })),
            Request::Cancel { .. } => Err(Refusal::new(Code::UnknownGroup, "no")),
            _ => Ok(Reply::Done),
        })
    });
    let (s, _s) = agent(refuses).await;
    let r = run(&plan(s, t), &options(), rx, &mut |_| {}).await;
    assert_eq!(r.outcome, Outcome::NothingStarted);
    assert_eq!(r.problems, ["host s: QMP /a: nobody there"]);
    let log = log.lock().unwrap();
    assert!(log.contains(&"t cancel".into()) && log.contains(&"t forget".into()), "{log:?}");
    assert!(!log.iter().any(|l| l.contains("start ")), "{log:?}");
}

#[tokio::test]
async fn a_group_of_that_name_that_someone_else_started_is_left_alone() {
    let log = Log::default();
    let noted = Arc::clone(&log);
    let busy: Script = Box::new(move |r| {
        note(&noted, "s", r);
        Some(match r {
            Request::Hello => Ok(hello()),
            Request::Preflight { spec, .. } => Ok(seen(spec)),
            Request::Prepare { .. } => Err(Refusal::new(Code::Conflict, "group g is under way")),
            _ => Ok(Reply::Done),
        })
    });
    let (s, _s) = agent(busy).await;
    let (t, _t) = agent(good("t", &log, Role::Target, vec![[Phase::Prepared; 2]])).await;
    let (_tx, rx) = never();
    let r = run(&plan(s, t), &options(), rx, &mut |_| {}).await;
    assert_eq!(r.outcome, Outcome::NothingStarted);
    assert!(r.problems[0].contains("under way"), "{:?}", r.problems);
    let log = log.lock().unwrap();
    assert!(log.contains(&"t cancel".into()) && !log.contains(&"s cancel".into()), "{log:?}");
}

#[tokio::test]
async fn the_index_is_opened_before_anyone_prepares_and_its_failure_starts_nothing() {
    let log = Log::default();
    let (s, _s) = agent(good("s", &log, Role::Source, vec![[Phase::Prepared; 2]])).await;
    let (t, _t) = agent(good("t", &log, Role::Target, vec![[Phase::Prepared; 2]])).await;
    let mut p = plan(s, t);
    assert!(Plan::new(p.config.clone(), Some(Method::Irlm)).is_err(), "no index in the file");
    p.config.index = Some("127.0.0.1:9".parse().unwrap());
    let p = Plan::new(p.config, Some(Method::Irlm)).unwrap();
    let mut o = options();
    o.open_index = Some(Arc::new(|p: &Plan| anyhow::bail!("{} is closed", p.config.index.unwrap())));
    let (_tx, rx) = never();
    let r = run(&p, &o, rx, &mut |_| {}).await;
    assert_eq!((r.outcome.exit_code(), r.problems.join("")), (4, "index: 127.0.0.1:9 is closed".into()));
    assert!(!log.lock().unwrap().iter().any(|l| l.contains("prepare")));
}

#[tokio::test]
async fn a_lost_plan_is_said_and_the_group_goes_on_without_it() {
    struct Fails(Log);
    impl GroupIndex for Fails {
        fn plan_now(&mut self) -> anyhow::Result<String> {
            self.0.lock().unwrap().push("plan".into());
            anyhow::bail!("hung up")
        }
        fn close(self: Box<Self>) -> anyhow::Result<()> {
            anyhow::bail!("it was lost")
        }
    }
    let log = Log::default();
    let moved = vec![[Phase::Done; 2]];
    let script = |who, log: &Log, role, phases| {
        let mut inner = good(who, log, role, phases);
        let wrapped: Script = Box::new(move |r| match r {
            Request::Prepare { spec } => {
                assert_eq!(spec.recipe.rack().unwrap().index, "127.0.0.1:9".parse().unwrap());
                Some(Ok(Reply::Prepare(ready())))
            }
            r => inner(r),
        });
        wrapped
    };
    let (s, _s) = agent(script("s", &log, Role::Source, moved)).await;
    let (t, _t) = agent(script("t", &log, Role::Target, vec![[Phase::Running; 2]])).await;
    let mut p = plan(s, t);
    p.config.index = Some("127.0.0.1:9".parse().unwrap());
    let p = Plan::new(p.config, Some(Method::Irlm)).unwrap();
    let mut o = options();
    let seen = Arc::clone(&log);
    o.open_index =
        Some(Arc::new(move |_: &Plan| Ok(Box::new(Fails(Arc::clone(&seen))) as Box<dyn GroupIndex>)));
    let (_tx, rx) = never();
    let r = run(&p, &o, rx, &mut |_| {}).await;
    assert_eq!((r.outcome, r.problems.join("")), (Outcome::AllMoved, "index: no share plan: hung up".into()));
    let log = log.lock().unwrap().clone();
    let at = |what: &str| log.iter().position(|l| l.starts_with(what)).unwrap();
    assert!(at("plan") < at("t start"), "{log:?}");
    // Watching again what is over ends at once, and with the same verdicts.
    let (_tx, rx) = never();
    let r = attach(&p, &o, rx, &mut |_| {}).await;
    assert_eq!(r.outcome, Outcome::AllMoved);
}

#[tokio::test]
async fn watching_a_group_that_nobody_starts_ends_and_says_so() {
    let prepared = |who, role, pushed| {
        let mut inner = good(who, &Log::default(), role, vec![[Phase::Prepared; 2]]);
        let script: Script = Box::new(move |r| {
            let mut reply = inner(r);
            if let Some(Ok(Reply::Status { groups, .. })) = &mut reply {
                groups[0].host.push_bytes = pushed;
            }
            reply
        });
        script
    };
    let (t, _t) = agent(prepared("t", Role::Target, 0)).await;
    let (_tx, rx) = never();
    let (s, _s) = agent(prepared("s", Role::Source, 1)).await;
    let p = Plan::to_watch(plan(s, t).config);
    let pushing = tokio::time::timeout(T, attach(&p, &options(), rx.clone(), &mut |_| {})).await;
    assert!(pushing.is_err(), "a push is under way");
    let (s, _s) = agent(prepared("s", Role::Source, 0)).await;
    let p = Plan::to_watch(plan(s, t).config);
    let r = attach(&p, &options(), rx, &mut |_| {}).await;
    assert_eq!((r.outcome, r.problems.len()), (Outcome::NothingStarted, 1));
}

/// An agent with a share of the budget that nobody has divided for `silent_ms`; its VMs are done once it
/// has been given more.
fn divided(log: &Log, silent_ms: u64) -> Script {
    use crate::control::api::{ShareStatus, Token};
    let log = Arc::clone(log);
    let (mut seq, mut bits, mut divider) = (7, 50_000_000, None::<Token>);
    let mut done = false;
    Box::new(move |r| {
        Some(Ok(match r {
            Request::Status { .. } => {
                // What needs nothing any more is given less.
                done |= bits > 50_000_000;
                let phase = if done { Phase::Done } else { Phase::Migrating };
                let mut reply =
                    status(vec![vm(0, "v0", Role::Source, phase), vm(1, "v1", Role::Source, phase)]);
                let silent_ms = if divider.is_some() { 0 } else { silent_ms };
                if let Reply::Status { groups, .. } = &mut reply {
                    groups[0].share = Some(ShareStatus { seq, bits, limit: None, tree: true, silent_ms });
                }
                reply
            }
            Request::BudgetClaim { token, term, .. } => {
                if divider.is_none() {
                    log.lock().unwrap().push(format!("claim {term}"));
                    seq = u64::from(*term) << 32;
                }
                divider = Some(*token);
                Reply::Share { seq, bits }
            }
            Request::BudgetShare { token, seq: s, bits: b, .. } => {
                assert_eq!(Some(*token), divider);
                log.lock().unwrap().push(format!("share {:#x} {b}", *s));
                (seq, bits) = (*s, *b);
                Reply::Share { seq, bits }
            }
            _ => Reply::Done,
        }))
    })
}

#[tokio::test]
async fn who_follows_divides_the_budget_when_nobody_else_does() {
    for (silent_ms, taken) in [(0, false), (4000, true)] {
        let log = Log::default();
        let (s, _s) = agent(divided(&log, silent_ms)).await;
        let target = good("t", &Log::default(), Role::Target, vec![[Phase::Migrating; 2]]);
        let (t, _t) = agent(target).await;
        let (_tx, rx) = never();
        let mut config = plan(s, t).config;
        config.budget_mbit = Some(100);
        let p = Plan::to_watch(config);
        // A busy machine takes its time; that nothing happens is waited for as long as it takes elsewhere.
        let wait = if taken { 15 * T } else { T };
        let ended = tokio::time::timeout(wait, attach(&p, &options(), rx, &mut |_| {})).await;
        let log = log.lock().unwrap().clone();
        assert_eq!(ended.is_ok(), taken, "{log:?}");
        // All that the other hosts do not need, and there are none.
        let expected = ["claim 1", "share 0x100000001 100000000"];
        assert_eq!(log.get(..2).unwrap_or(&log), if taken { &expected[..] } else { &[] });
    }
}

/// An index that notes when it is closed.
struct Noting(Log);

impl GroupIndex for Noting {
    fn plan_now(&mut self) -> anyhow::Result<String> {
        Ok("planned".into())
    }
    fn close(self: Box<Self>) -> anyhow::Result<()> {
        self.0.lock().unwrap().push("index closed".into());
        Ok(())
    }
}

fn with_index(p: Plan, log: &Log) -> (Plan, Options) {
    let mut config = p.config;
    config.index = Some("127.0.0.1:9".parse().unwrap());
    let seen = Arc::clone(log);
    let open: OpenIndex =
        Arc::new(move |_: &Plan| Ok(Box::new(Noting(Arc::clone(&seen))) as Box<dyn GroupIndex>));
    (Plan::new(config, Some(Method::Irlm)).unwrap(), Options { open_index: Some(open), ..options() })
}

#[tokio::test]
async fn whatever_fails_before_the_streams_the_index_is_closed_and_everybody_let_go() {
    // At which word the source's agent fails, and whether the target had been prepared.
    for (fails_at, prepared) in
        [("preflight", false), ("prepare", true), ("prepare-status", true), ("start", true)]
    {
        let log = Log::default();
        let script = |who: &'static str, role: Role, bad: &'static str| {
            let log = Arc::clone(&log);
            let script: Script = Box::new(move |r| {
                note(&log, who, r);
                let no = || Err(Refusal::new(Code::NotNow, "it was restarted"));
                Some(match r {
                    Request::Hello => Ok(hello()),
                    Request::Preflight { .. } if bad == "preflight" => no(),
                    Request::Preflight { spec, .. } => Ok(seen(spec)),
                    Request::Prepare { .. } if bad == "prepare" => no(),
                    Request::PrepareStatus { .. } if bad == "prepare-status" => no(),
                    Request::Start { .. } if bad == "start" => no(),
                    Request::Prepare { .. } => {
                        Ok(Reply::Prepare(PrepareStatus { phase: PreparePhase::Preparing, ..ready() }))
                    }
                    Request::PrepareStatus { .. } => Ok(Reply::Prepare(ready())),
                    Request::Status { .. } => Ok(status(vec![vm(0, "v0", role, Phase::Prepared)])),
                    _ => Ok(Reply::Done),
                })
            });
            script
        };
        let (s, _s) = agent(script("s", Role::Source, fails_at)).await;
        let (t, _t) = agent(script("t", Role::Target, "")).await;
        let (p, o) = with_index(plan(s, t), &log);
        let (_tx, rx) = never();
        let r = run(&p, &o, rx, &mut |_| {}).await;
        assert_eq!(r.outcome, Outcome::NothingStarted, "{fails_at}: {r:?}");
        let log = log.lock().unwrap().clone();
        let has = |what: &str| log.iter().any(|l| l == what);
        assert!(has("index closed"), "{fails_at}: {log:?}");
        assert_eq!((has("t cancel"), has("t forget")), (prepared, prepared), "{fails_at}: {log:?}");
    }
}

#[tokio::test]
async fn a_group_whose_vms_have_all_moved_is_left_alone_and_done() {
    let log = Log::default();
    let script = |role: Role| {
        let log = Arc::clone(&log);
        let script: Script = Box::new(move |r| {
            note(&log, "x", r);
            let Request::Preflight { spec, .. } = r else { return Some(Ok(hello())) };
            let to = spec.targets[0].data;
            let vms = spec.vms.iter().map(|v| {
                let moved = crate::control::api::Moved { group: "g".into(), to, at_ns: 1 };
                let process = crate::host::sched::Process::of(std::process::id()).ok();
                let f = VmFacts { state: "paused".into(), ..VmFacts::new(v.ix, &v.name, role) };
                match role {
                    Role::Source => VmFacts { moved: Some(moved), refusals: vec!["postmigrate".into()], ..f },
                    Role::Target => {
                        let identity =
                            crate::control::api::Identity { name: v.name.clone(), ..Default::default() };
                        VmFacts { arrived: Some("g".into()), process, identity: Some(identity), ..f }
                    }
                }
            });
            let vms = vms.collect();
            Some(Ok(Reply::Preflight(Box::new(Preflight { vms, ..Preflight::default() }))))
        });
        script
    };
    let (s, _s) = agent(script(Role::Source)).await;
    let (t, _t) = agent(script(Role::Target)).await;
    let (p, o) = with_index(plan(s, t), &log);
    let (_tx, rx) = never();
    let r = run(&p, &o, rx, &mut |_| {}).await;
    assert_eq!((r.outcome, r.vms.len()), (Outcome::AllMoved, 2), "{r:?}");
    assert_eq!((r.vms[0].phase, &*r.vms[0].state), ("already moved", "paused"));
    let log = log.lock().unwrap().clone();
    assert!(!log.iter().any(|l| l.contains("prepare") || l.contains("start")), "{log:?}");
    assert!(log.contains(&"index closed".to_owned()), "{log:?}");
}
