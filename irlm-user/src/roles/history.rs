//! `irlm history`: what became of VMs, also of groups that their agents do not keep any more.

use super::caller;
use super::common::{Agents, CALL_TIMEOUT, group_name, runtime, write_json};
use super::tables::table;
use crate::control::api::{Code, HistoryRow, Reply, Request, Role};
use crate::control::client::{AgentClient, CallError};
use crate::flow::unix_ns;
use crate::obs::say::outln;
use clap::Args;
use std::net::SocketAddr;
use std::path::Path;
use tokio::task::JoinSet;

/// Arguments of `irlm history`.
#[derive(Debug, Args)]
#[command(after_help = "\
An agent forgets a group by itself a minute after it is over; what became of its VMs is kept, for 90 days and of 10,000 at \
most, and longer of a VM whose process lives.\n\n\
Exit codes: 0 every agent answered, 2 some did not.")]
pub(super) struct HistoryArgs {
    #[command(flatten)]
    agents: Agents,
    /// Only the group of this name, with --agent
    #[arg(long, value_parser = group_name, requires = "agent", conflicts_with = "group")]
    name: Option<String>,
    /// JSON on standard output instead of a table
    #[arg(long)]
    json: bool,
}

/// What one agent said.
#[derive(Debug, serde::Serialize)]
struct Said {
    host: String,
    agent: SocketAddr,
    error: Option<String>,
    rows: Vec<HistoryRow>,
    left_off: u64,
}

pub(super) fn run(args: &HistoryArgs) -> anyhow::Result<u8> {
    let (agents, plan) = args.agents.resolve()?;
    let group = plan.map(|p| p.config.name).or_else(|| args.name.clone());
    let all = runtime()?.block_on(ask(agents, group));
    if args.json {
        write_json(Path::new("-"), &all)?;
    } else {
        print(&all);
    }
    Ok(if all.iter().any(|s| s.error.is_some()) { 2 } else { 0 })
}

/// Asks every agent once, all at the same time.
async fn ask(agents: Vec<(String, SocketAddr)>, group: Option<String>) -> Vec<Said> {
    let mut calls = JoinSet::new();
    for (i, (host, agent)) in agents.into_iter().enumerate() {
        let request = Request::History { group: group.clone() };
        calls.spawn(async move {
            let answer = AgentClient::new(caller::at(agent), CALL_TIMEOUT).call(&request).await;
            let (rows, left_off, error) = match answer {
                Ok(Reply::History { rows, left_off, .. }) => (rows, left_off, None),
                Ok(_) => (vec![], 0, Some(format!("agent {agent}: an answer to another question"))),
                // It had no part in it, which is an answer.
                Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => {
                    (vec![], 0, None)
                }
                Err(e) => (vec![], 0, Some(e.to_string())),
            };
            (i, Said { host, agent, error, rows, left_off })
        });
    }
    let mut all = calls.join_all().await;
    all.sort_by_key(|(i, _)| *i);
    all.into_iter().map(|(_, said)| said).collect()
}

/// A time span in its largest unit.
fn age(ns: u64) -> String {
    let s = ns / 1_000_000_000;
    match s {
        0..120 => format!("{s} s"),
        120..7200 => format!("{} min", s / 60),
        7200..172_800 => format!("{} h", s / 3600),
        _ => format!("{} days", s / 86_400),
    }
}

fn print(all: &[Said]) {
    let mut t = table(&["host", "group", "run", "VM", "role", "outcome", "other side", "when", "process"]);
    let now = unix_ns();
    let mut notes = Vec::new();
    for s in all {
        match &s.error {
            Some(e) => notes.push(format!("! {}: {e}", s.host)),
            None if s.rows.is_empty() => notes.push(format!("{}: nothing", s.host)),
            None => {}
        }
        for r in &s.rows {
            let role = if r.role == Role::Source { "source" } else { "target" };
            let process = match r.alive {
                Some(true) => "alive",
                Some(false) => "ended",
                None => "?",
            };
            t.add_row([
                s.host.clone(),
                format!("{} ({})", r.group, r.method),
                r.run.clone(),
                r.vm.clone(),
                role.to_owned(),
                r.outcome.clone(),
                r.peer.to_string(),
                format!("{} ago", age(now.saturating_sub(r.at_ns))),
                process.to_owned(),
            ]);
            if let Some(why) = r.why.as_ref().filter(|_| r.outcome != "moved") {
                notes.push(format!("{} {}: {}: {why}", s.host, r.group, r.vm));
            }
        }
        if s.left_off > 0 {
            notes.push(format!("{}: and {} older ones", s.host, s.left_off));
        }
    }
    if !t.is_empty() {
        outln!("{t}");
    }
    for n in notes {
        outln!("{n}");
    }
}

#[cfg(test)]
mod tests {
    use super::age;

    #[test]
    fn ages_are_said_in_their_largest_unit() {
        let s = 1_000_000_000;
        let said: Vec<String> = [5, 119, 120, 7199, 7200, 172_800].iter().map(|n| age(n * s)).collect();
        assert_eq!(said, ["5 s", "119 s", "2 min", "119 min", "2 h", "2 days"]);
    }
}
