//! `irlm status`: what agents are doing, once or live.

use super::caller;
use super::common::{Agents, CALL_TIMEOUT, interrupts, runtime, write_json};
use super::show::{Show, print_keys, print_report, print_status};
use super::show_sampling::print_samplers;
use crate::control::api::{KeysStatus, Reply, Request, SamplerStatus};
use crate::control::client::AgentClient;
use crate::control::coordinator::watch::AgentView;
use crate::control::coordinator::{self, DOUBT_WAIT, Options, STALL_WAIT};
use clap::Args;
use std::net::SocketAddr;
use std::path::Path;
use tokio::task::JoinSet;

/// Arguments of `irlm status`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 every agent answered, 2 some did not; with --follow as `irlm evacuate`."
)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    agents: Agents,
    /// Watch the group until every VM is settled, and report as evacuate does; ^C stops watching, nothing else
    #[arg(long, requires = "group", conflicts_with = "agent")]
    follow: bool,
    /// JSON on standard output instead of tables
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<u8> {
    let (agents, plan) = args.agents.resolve()?;
    let runtime = runtime()?;
    if let (true, Some(plan)) = (args.follow, &plan) {
        let options = Options {
            leave_paused: false,
            call_timeout: CALL_TIMEOUT,
            doubt_wait: DOUBT_WAIT,
            stall_wait: STALL_WAIT,
            open_index: None,
        };
        let report = runtime.block_on(async {
            let mut show = Show::new(plan, args.json);
            let report = coordinator::attach(plan, &options, interrupts(), &mut |s| show.scene(&s)).await;
            show.end();
            report
        });
        match args.json {
            true => write_json(Path::new("-"), &report)?,
            false => print_report(&report),
        }
        return Ok(report.outcome.exit_code());
    }
    let group = plan.map(|p| p.config.name);
    let (views, told): (Vec<AgentView>, Vec<Told>) =
        runtime.block_on(ask_once(&agents, group.as_deref())).into_iter().unzip();
    if args.json {
        let all: Vec<_> = views
            .iter()
            .zip(&told)
            .map(|(v, t)| {
                serde_json::json!({
                    "host": v.name, "agent": v.addr, "error": v.error, "groups": v.groups,
                    "samplers": t.samplers, "keys": t.keys
                })
            })
            .collect();
        write_json(Path::new("-"), &all)?;
    } else {
        print_status(&views);
        for (v, t) in views.iter().zip(&told) {
            print_samplers(&v.name, &t.samplers);
            if v.error.is_none() {
                print_keys(&v.name, t.keys.as_ref());
            }
        }
    }
    Ok(if views.iter().any(|v| v.error.is_some()) { 2 } else { 0 })
}

/// What an agent says of itself beside its groups.
#[derive(Default)]
struct Told {
    samplers: Vec<SamplerStatus>,
    keys: Option<KeysStatus>,
}

/// Asks every agent once, all at the same time.
async fn ask_once(agents: &[(String, SocketAddr)], group: Option<&str>) -> Vec<(AgentView, Told)> {
    let mut calls = JoinSet::new();
    for (i, (name, addr)) in agents.iter().enumerate() {
        let (name, addr) = (name.clone(), *addr);
        let request = Request::Status { group: group.map(str::to_owned) };
        calls.spawn(async move {
            let answer = AgentClient::new(caller::at(addr), CALL_TIMEOUT).call(&request).await;
            let (groups, told, error) = match answer {
                Ok(Reply::Status { groups, samplers, keys, .. }) => (groups, Told { samplers, keys }, None),
                Ok(_) => {
                    (vec![], Told::default(), Some(format!("agent {addr}: an answer to another question")))
                }
                Err(e) => (vec![], Told::default(), Some(e.to_string())),
            };
            let view =
                AgentView { name, addr, heard: None, answers: error.is_none(), error, groups, facts: vec![] };
            (i, (view, told))
        });
    }
    let mut views = calls.join_all().await;
    views.sort_by_key(|(i, _)| *i);
    views.into_iter().map(|(_, v)| v).collect()
}
