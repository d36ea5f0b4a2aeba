//! Who may ask an agent for what, tried over real connections, and what TLS costs a move. Point 5 is the fuzzers', which
//! `cargo xtask evidence` runs itself.

// What TLS costs a move, and what QEMU's own costs.
mod cost;
// Hostile clients beside a running move.
mod hostile;
// Certificates replaced while a group moves.
mod rolling;
// What a man in the middle achieves.
mod tampered;

use super::{Only, Point, at_most};
use anyhow::{Context as _, Result};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{CONTROL, Irlm};
use irlm_tests::keys::Keys;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::{Host, Rates};
use irlm_user::control::api::{Code, Decision, Request, StartPart, Token};
use irlm_user::control::client::{AgentClient, CallError};
use irlm_user::control::config::GroupConfig;
use irlm_user::control::coordinator::plan;
use irlm_user::core::handover::GuestState;
use irlm_user::core::identity::{Role, Tenants};
use irlm_user::net::connection::{Endpoint, Security};
use irlm_user::net::tls::{Credentials, Use};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn points(irlm: &Path, only: &Only) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    if only.wants("1-table") {
        table(&mut points, irlm)?;
    }
    cost::points(&mut points, irlm, only)?;
    if only.wants_some("3-") {
        tampered::points(&mut points, irlm, only)?;
    }
    for tls in [false, true] {
        if only.wants_some(hostile::name(tls)) {
            hostile::points(&mut points, irlm, tls)?;
        }
    }
    if only.wants_some("6-") {
        rolling::points(&mut points, irlm)?;
    }
    Ok(points)
}

/// What somebody is to be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// The request is looked at, whatever it comes to.
    Heard,
    /// Refused for the certificate's sake.
    NotAllowed,
    /// No connection is to be had.
    NotLetIn,
}

/// Requests of one kind: who may ask for one may ask for all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Greet,
    Look,
    /// Of a group that the agent does not know.
    Move,
    /// With a description of a group of tenant `shop`.
    MoveShop,
    Port,
    Between,
}

/// All requests that there are.
fn requests() -> Result<Vec<(Kind, Request)>> {
    let group = || "no-such-group".to_owned();
    let token = Token([7; 32]);
    let example = include_str!("../../../docs/examples/group.toml").replace("tenant = \"", "# tenant = \"");
    let mut config = GroupConfig::parse(&example).map_err(|e| anyhow::anyhow!(e.0))?;
    config.vm.iter_mut().for_each(|v| v.tenant = "shop".into());
    let of_shop = plan::Plan::new(config, None)?.agents.remove(0).spec;
    // Nothing of it is here, so that nothing comes of it.
    let spec = || Box::new(of_shop.clone());
    use Kind::{Between, Greet, Look, Move, MoveShop, Port};
    Ok(vec![
        (Greet, Request::Hello),
        (Look, Request::Status { group: None }),
        (Look, Request::PrepareStatus { group: group() }),
        (Look, Request::History { group: None }),
        (Look, Request::PolicyShow),
        (MoveShop, Request::Preflight { spec: spec(), vms_only: true }),
        (MoveShop, Request::Observe { spec: spec(), seconds: 0, one_in: 1 }),
        (Move, Request::Route { group: group(), token, direct: false }),
        (
            Move,
            Request::Start { group: group(), leave_paused: false, incoming: vec![], part: StartPart::Both },
        ),
        (Move, Request::Cancel { group: group() }),
        (Move, Request::Settle { group: group(), vm: "v".into(), decision: Decision::Run }),
        (Move, Request::Forget { group: group() }),
        (Move, Request::BudgetShare { group: group(), token, seq: 1, bits: 1 }),
        (Move, Request::BudgetClaim { group: group(), token, term: 1 }),
        (Port, Request::PolicySet { text: "no policy".into() }),
        (Between, Request::Released { group: group(), token, vm: 0, guest: GuestState::Running }),
    ])
}

/// Whoever tries, by name, how its connection is secured, and what it is to be answered.
type Actor = (&'static str, Security, fn(Kind) -> Answer);

fn actors(ca: &Keys, foreign: &Keys) -> Result<Vec<Actor>> {
    let keys = |dir: &Path| -> Result<Security> {
        Ok(Security::Tls(Arc::new(Credentials::open(dir, Use::Client)?)))
    };
    let with = |name: &str, role: Role| keys(&ca.somebody(name, role, 30)?);
    let stranger = foreign.somebody("stranger", Role::Operator, 30)?;
    // It believes the agents; they do not believe it.
    ca.believed_by(&stranger)?;
    let listed = |tenant: &str| Role::Coordinator(Tenants::Listed(vec![tenant.to_owned()]));
    Ok(vec![
        ("operator", with("ann", Role::Operator)?, |k| said(k != Kind::Between)),
        ("coordinator of all", with("robot", Role::Coordinator(Tenants::All))?, |k| {
            said(!matches!(k, Kind::Between | Kind::Port))
        }),
        ("coordinator of shop", with("shop-robot", listed("shop"))?, |k| {
            said(!matches!(k, Kind::Between | Kind::Port))
        }),
        ("coordinator of bank", with("bank-robot", listed("bank"))?, |k| {
            said(!matches!(k, Kind::Between | Kind::Port | Kind::MoveShop))
        }),
        ("viewer", with("grafana", Role::Viewer)?, |k| said(matches!(k, Kind::Greet | Kind::Look))),
        ("agent of a source host", keys(&ca.of("s0"))?, |k| said(k == Kind::Greet)),
        ("agent of a host of no group", with("s9", Role::Agent("s9".into()))?, |k| said(k == Kind::Greet)),
        ("index", with("index", Role::Index)?, |_| Answer::NotAllowed),
        ("operator of another CA", keys(&stranger)?, |_| Answer::NotLetIn),
        ("nobody, in plain text", Security::Plain, |_| Answer::NotLetIn),
    ])
}

fn said(heard: bool) -> Answer {
    if heard { Answer::Heard } else { Answer::NotAllowed }
}

/// Point 1.
fn table(points: &mut Vec<Point>, irlm: &Path) -> Result<()> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 1, 1, 128);
    (spec.hosts, spec.rates) = (vec![vec![]], Rates::NONE);
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    let daemons = Irlm::daemons(&lab, irlm, Vec::new(), "bpf = false\n")?;
    let (ca, foreign) = (lab.net.ca().context("the lab speaks TLS")?, Keys::new()?);
    let (requests, actors) = (requests()?, actors(ca, &foreign)?);
    let mut wrong = Vec::new();
    for (name, security, want) in &actors {
        let got = lab.net.within(Host::Ctl, || ask(security, &requests))?;
        for ((kind, request), got) in requests.iter().zip(got) {
            if got != want(*kind) {
                wrong.push(format!("{name}: {:?}: {got:?}, not {:?}", request.ask(), want(*kind)));
            }
        }
    }
    drop(daemons);
    wrong.iter().for_each(|w| eprintln!("{w}"));
    let pairs = requests.len() * actors.len();
    let how = format!(
        "{pairs} pairs: {} requests by {} actors ({}) over real connections to an agent; {}",
        requests.len(),
        actors.len(),
        actors.iter().map(|a| a.0).collect::<Vec<_>>().join(", "),
        if wrong.is_empty() { "all as docs/identity.md says".to_owned() } else { wrong.join("; ") }
    );
    at_most(
        points,
        "1-table",
        "pairs of actor and request that are not answered as they must be",
        &how,
        wrong.len() as f64,
        0.0,
    )
}

fn ask(security: &Security, requests: &[(Kind, Request)]) -> Result<Vec<Answer>> {
    let addr = format!("{}:{CONTROL}", Host::Source(0).ip()).parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(async {
        let mut out = Vec::new();
        for (_, request) in requests {
            let at = Endpoint { addr, security: security.clone() };
            // A connection for each: who is refused one thing may still ask for another.
            out.push(match AgentClient::new(at, Duration::from_secs(10)).call(request).await {
                Ok(_) => Answer::Heard,
                Err(CallError::Refused { refusal, .. }) if refusal.code == Code::NotAllowed => {
                    Answer::NotAllowed
                }
                Err(CallError::Refused { .. }) => Answer::Heard,
                Err(CallError::Unreachable { .. } | CallError::Grammar { .. }) => Answer::NotLetIn,
            });
        }
        out
    }))
}
