//! `irlm cancel` and `irlm forget`: one word to every agent of a group.

use super::{Agents, CALL_TIMEOUT, group_name, runtime};
use crate::control::api::{Code, Request};
use crate::control::client::{AgentClient, CallError};
use clap::Args;

/// Arguments of `irlm cancel` and `irlm forget`.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 every agent did it (or does not know the group), 2 some did not.")]
pub(super) struct GroupArgs {
    #[command(flatten)]
    agents: Agents,
    /// The group's name, with --agent
    #[arg(long, value_parser = group_name, requires = "agent")]
    name: Option<String>,
}

pub(super) fn cancel(args: &GroupArgs) -> anyhow::Result<u8> {
    say(args, "cancelled", |group| Request::Cancel { group })
}

pub(super) fn forget(args: &GroupArgs) -> anyhow::Result<u8> {
    say(args, "forgotten", |group| Request::Forget { group })
}

fn say(args: &GroupArgs, done: &str, request: impl Fn(String) -> Request) -> anyhow::Result<u8> {
    let (agents, plan) = args.agents.resolve()?;
    let group = plan.map(|p| p.config.name).or_else(|| args.name.clone());
    let group = group.ok_or_else(|| anyhow::anyhow!("with --agent give the group's --name"))?;
    let request = request(group.clone());
    let results = runtime()?.block_on(async {
        let mut out = Vec::new();
        let calls: Vec<_> = agents
            .into_iter()
            .map(|(name, addr)| {
                let request = request.clone();
                tokio::spawn(async move { (name, AgentClient::new(addr, CALL_TIMEOUT).call(&request).await) })
            })
            .collect();
        for c in calls {
            out.extend(c.await);
        }
        out
    });
    let mut code = 0;
    for (name, result) in results {
        match result {
            Ok(_) => println!("{name}: group {group} {done}"),
            Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => {
                println!("{name}: does not know group {group}");
            }
            Err(e) => {
                println!("! {name}: {e}");
                code = 2;
            }
        }
    }
    Ok(code)
}
