//! `irlm policy`: what is in force on the hosts' core-facing ports, and changing it while they run.

use super::caller;
use super::common::{Agents, CALL_TIMEOUT, Named, runtime, write_json};
use super::tables::{right, table};
use crate::control::api::{PolicyStatus, Reply, Request};
use crate::control::client::AgentClient;
use crate::control::policy;
use crate::obs::human::{bytes, rate};
use crate::obs::say::outln;
use clap::{Args, Subcommand};
use comfy_table::Cell;
use std::path::{Path, PathBuf};
use tokio::task::JoinSet;

/// Arguments of `irlm policy`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit codes: 0 every agent did it, 1 the policy is wrong, 2 some agent did not do it."
)]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Change the policy of running agents; no flow is dropped. It lasts until an agent ends: then its file counts
    Set {
        /// The policy file (docs/examples/policy.toml explains every key)
        policy: PathBuf,
        #[command(flatten)]
        agents: Agents,
    },
    /// Show classes, rates, ceilings and what the kernel counted of each
    Show {
        #[command(flatten)]
        agents: Agents,
        /// JSON on standard output instead of tables
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: &PolicyArgs) -> anyhow::Result<u8> {
    let (request, agents, json) = match &args.what {
        What::Set { policy, agents } => {
            // A bad file is this command's error, not one of every agent.
            let (_, text) = policy::load(policy)?;
            (Request::PolicySet { text }, agents, false)
        }
        What::Show { agents, json } => (Request::PolicyShow, agents, *json),
    };
    let answers = runtime()?.block_on(ask(&agents.resolve()?.0, &request));
    if json {
        let all: Vec<_> = answers
            .iter()
            .map(|(host, answer)| match answer {
                Ok(status) => serde_json::json!({ "host": host, "error": null, "policy": status }),
                Err(e) => serde_json::json!({ "host": host, "error": e.to_string(), "policy": null }),
            })
            .collect();
        write_json(Path::new("-"), &all)?;
    } else {
        for (host, answer) in &answers {
            match answer {
                Ok(status) => print(host, status),
                Err(e) => outln!("! {host}: {e}"),
            }
        }
    }
    Ok(if answers.iter().any(|a| a.1.is_err()) { 2 } else { 0 })
}

type Answer = anyhow::Result<PolicyStatus>;

/// Asks all agents at the same time; answers in their order.
async fn ask(agents: &[Named], request: &Request) -> Vec<(String, Answer)> {
    let mut calls = JoinSet::new();
    for (i, (name, addr)) in agents.iter().enumerate() {
        let (name, addr, request) = (name.clone(), *addr, request.clone());
        calls.spawn(async move {
            let answer = match AgentClient::new(caller::at(addr), CALL_TIMEOUT).call(&request).await {
                Ok(Reply::Policy(status)) => Ok(*status),
                Ok(_) => Err(anyhow::anyhow!("agent {addr}: an answer to another question")),
                Err(e) => Err(e.into()),
            };
            (i, name, answer)
        });
    }
    let mut all = calls.join_all().await;
    all.sort_by_key(|a| a.0);
    all.into_iter().map(|(_, name, answer)| (name, answer)).collect()
}

fn print(host: &str, s: &PolicyStatus) {
    let iface = s.iface.as_deref().unwrap_or("no port");
    let source = if s.live { ", set live" } else { "" };
    outln!("{host}: {iface}: {} ({}){source}", s.mode, s.why);
    if let (Some(link), Some(others), Some(migration)) = (s.link, s.others, s.migration) {
        outln!(
            "{host}: link {}, others always {}, migration never above {}",
            rate(link),
            rate(others),
            rate(migration)
        );
    }
    if let (Some(share), Some(by)) = (s.share, &s.shared_by) {
        outln!("{host}: share of the core link {}, kept by {by}", rate(share));
    }
    if s.classes.is_empty() {
        return;
    }
    let mut t = table(&[
        "class",
        "id",
        "below",
        "prio",
        "guaranteed",
        "at most",
        "DSCP",
        "mark",
        "priority",
        "sent",
        "packets",
        "dropped",
        "waits",
    ]);
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    for c in &s.classes {
        t.add_row(vec![
            Cell::new(&c.name),
            Cell::new(&c.id),
            Cell::new(dash(c.parent.clone())),
            right(dash(c.prio.map(|p| p.to_string()))),
            right(rate(c.rate)),
            right(rate(c.ceil)),
            right(dash(c.dscp.map(|d| d.to_string()))),
            right(dash(c.mark.map(|m| m.to_string()))),
            right(dash(c.priority.clone())),
            right(bytes(c.bytes)),
            right(c.packets),
            right(c.dropped),
            right(bytes(c.backlog)),
        ]);
    }
    outln!("{t}");
}
