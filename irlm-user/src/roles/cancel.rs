//! `irlm cancel` and `irlm forget`: one word to every agent of a group. Cancelling says what it came to: what
//! stays at its source, and what goes on because it had been given up.

use super::caller;
use super::common::{Agents, CALL_TIMEOUT, group_name, runtime};
use crate::control::api::{Code, Phase, Reply, Request, VmStatus};
use crate::control::client::{AgentClient, CallError};
use crate::obs::say::outln;
use clap::Args;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long is waited to see VMs stopped, and how often they are looked at.
const WAIT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(200));
/// VMs of one agent that are named.
const NAMED: usize = 20;

/// Exit code: an agent did not do it.
const SOME_DID_NOT: u8 = 2;
/// Exit code: some VM goes on.
const GOES_ON: u8 = 3;

/// Arguments of `irlm cancel` and `irlm forget`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 every agent did it (or has nothing of the group to do it to), 2 some did not. cancel also \
says 3: some VM was past cancelling (given up, fetching its pages, moved meanwhile, or in doubt), or was not \
seen to have stopped yet: it is named. One that has been given up ends at its target by itself; one in doubt \
when its agents hear each other, or by `irlm settle`.")]
pub(super) struct GroupArgs {
    #[command(flatten)]
    agents: Agents,
    /// The group's name, with --agent
    #[arg(long, value_parser = group_name, requires = "agent")]
    name: Option<String>,
}

/// What is said to the agents.
#[derive(Clone, Copy, Debug)]
enum Word {
    Cancel,
    Forget,
}

/// Lines to print, and an exit code.
type Said = (Vec<String>, u8);

pub(super) fn cancel(args: &GroupArgs) -> anyhow::Result<u8> {
    say(args, Word::Cancel)
}

pub(super) fn forget(args: &GroupArgs) -> anyhow::Result<u8> {
    say(args, Word::Forget)
}

/// Says it to all agents at the same time, and prints in their order what came of it.
fn say(args: &GroupArgs, word: Word) -> anyhow::Result<u8> {
    let (agents, plan) = args.agents.resolve()?;
    let group = plan.map(|p| p.config.name).or_else(|| args.name.clone());
    let group = group.ok_or_else(|| anyhow::anyhow!("with --agent give the group's --name"))?;
    let all: Vec<Said> = runtime()?.block_on(async {
        let spawn = |(name, agent): (String, SocketAddr)| {
            let group = group.clone();
            tokio::spawn(async move {
                match word {
                    Word::Cancel => cancel_at(&name, agent, &group).await,
                    Word::Forget => forget_at(&name, agent, &group).await,
                }
            })
        };
        let calls: Vec<_> = agents.into_iter().map(spawn).collect();
        let mut all = Vec::new();
        for call in calls {
            all.extend(call.await);
        }
        all
    });
    for line in all.iter().flat_map(|(lines, _)| lines) {
        outln!("{line}");
    }
    Ok(worst(all.iter().map(|(_, code)| *code)))
}

/// The exit code of all: an agent that did not do it counts before a VM that goes on.
fn worst(codes: impl Iterator<Item = u8>) -> u8 {
    codes.max_by_key(|code| [0, GOES_ON, SOME_DID_NOT].iter().position(|c| c == code)).unwrap_or(0)
}

async fn forget_at(name: &str, agent: SocketAddr, group: &str) -> Said {
    let request = Request::Forget { group: group.to_owned() };
    match AgentClient::new(caller::at(agent), CALL_TIMEOUT).call(&request).await {
        Ok(_) => (vec![format!("{name}: group {group} forgotten")], 0),
        Err(e) => not_done(name, group, &e),
    }
}

async fn cancel_at(name: &str, agent: SocketAddr, group: &str) -> Said {
    let mut client = AgentClient::new(caller::at(agent), CALL_TIMEOUT);
    let before = match vms(&mut client, group).await {
        Ok(vms) => vms,
        Err(e) => return not_done(name, group, &e),
    };
    let why = match client.call(&Request::Cancel { group: group.to_owned() }).await {
        Ok(_) => None,
        // It is over there: there was nothing to do, which is no failure.
        Err(CallError::Refused { refusal, .. }) if refusal.code == Code::NotNow => Some(refusal.msg),
        Err(e) => return not_done(name, group, &e),
    };
    let until = Instant::now() + WAIT.0;
    loop {
        let after = match vms(&mut client, group).await {
            Ok(vms) => vms,
            // Dropped with all that was in it.
            Err(CallError::Refused { refusal, .. }) if refusal.code == Code::UnknownGroup => Vec::new(),
            Err(e) => return not_done(name, group, &e),
        };
        let came = Came::of(&before, &after);
        if why.is_some() || came.stopping.is_empty() || Instant::now() > until {
            return came.said(name, group, why);
        }
        tokio::time::sleep(WAIT.1).await;
    }
}

async fn vms(client: &mut AgentClient, group: &str) -> Result<Vec<VmStatus>, CallError> {
    match client.call(&Request::Status { group: Some(group.to_owned()) }).await? {
        Reply::Status { groups, .. } => Ok(groups.into_iter().flat_map(|g| g.vms).collect()),
        _ => {
            let what = "an answer to another question".to_owned();
            Err(CallError::Grammar { agent: client.addr(), what })
        }
    }
}

fn not_done(name: &str, group: &str, e: &CallError) -> Said {
    match e {
        CallError::Refused { refusal, .. } if refusal.code == Code::UnknownGroup => {
            (vec![format!("{name}: does not know group {group}")], 0)
        }
        e => (vec![format!("! {name}: {e}")], SOME_DID_NOT),
    }
}

/// What a cancel came to at one agent.
#[derive(Debug, Default, PartialEq)]
struct Came {
    /// VMs that it ended the move of.
    stopped: usize,
    /// VMs that were over before.
    over: usize,
    /// VMs that were past cancelling, or became so, with their phases now.
    past: Vec<(String, Phase)>,
    /// VMs that have not come to their end yet.
    stopping: Vec<(String, Phase)>,
}

impl Came {
    /// By how the VMs of an agent stood before, and after.
    fn of(before: &[VmStatus], after: &[VmStatus]) -> Self {
        let mut came = Self::default();
        for was in before {
            if was.phase.is_final() {
                came.over += 1;
                continue;
            }
            let now = after.iter().find(|v| v.name == was.name && v.role == was.role).map(|v| v.phase);
            match now {
                None | Some(Phase::Failed | Phase::Cancelled) => came.stopped += 1,
                Some(p) if p.is_final() || p.is_past_cancelling() => came.past.push((was.name.clone(), p)),
                Some(p) => came.stopping.push((was.name.clone(), p)),
            }
        }
        came
    }

    /// `why`: the agent had nothing to do, in its words.
    fn said(self, name: &str, group: &str, why: Option<String>) -> Said {
        let vms = |n: usize| if n == 1 { "1 VM".to_owned() } else { format!("{n} VMs") };
        let goes_on = !(self.past.is_empty() && self.stopping.is_empty());
        let first = match why {
            Some(why) => format!("{name}: {why}"),
            None => {
                let mark = if goes_on { "! " } else { "" };
                let over = match self.over {
                    0 => String::new(),
                    n => format!(", {} over before", vms(n)),
                };
                format!("{mark}{name}: group {group}: {} stopped{over}", vms(self.stopped))
            }
        };
        let mut lines = vec![first];
        let mut tell = |of: Vec<(String, Phase)>, what: fn(Phase) -> &'static str| {
            let more = of.len().saturating_sub(NAMED);
            for (vm, phase) in of.into_iter().take(NAMED) {
                lines.push(format!("! {name} {vm} ({}): {}", phase.name(), what(phase)));
            }
            if more > 0 {
                lines.push(format!("! {name}: and {}", vms(more)));
            }
        };
        tell(self.past, advice);
        tell(self.stopping, |_| "not seen to have stopped yet; see `irlm status`");
        (lines, if goes_on { GOES_ON } else { 0 })
    }
}

/// What is to be done about a VM that a cancel came too late for.
fn advice(phase: Phase) -> &'static str {
    match phase {
        Phase::GaveUp => {
            "past cancelling, its target has it: wait; if that is dead, see `irlm settle --help`"
        }
        Phase::Fetching => "past cancelling, it runs here and its pages come: wait",
        Phase::InDoubt => {
            "past cancelling: its agents settle it when they hear each other, else `irlm settle`"
        }
        Phase::Lost => "past cancelling: it is lost, see `irlm settle --help`",
        _ => "had moved before it could be stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Role;

    fn vm(name: &str, phase: Phase) -> VmStatus {
        let v = serde_json::json!({ "ix": 0, "name": name, "role": Role::Source, "phase": phase });
        serde_json::from_value(v).unwrap()
    }

    #[test]
    fn what_goes_on_is_not_called_cancelled() {
        use Phase as P;
        let all = |phases: &[Phase]| -> Vec<VmStatus> {
            phases.iter().enumerate().map(|(n, p)| vm(&format!("v{n}"), *p)).collect()
        };
        let before =
            all(&[P::Migrating, P::Prepared, P::GaveUp, P::InDoubt, P::Done, P::Stopped, P::Stopped]);
        let after = all(&[P::Cancelled, P::Failed, P::GaveUp, P::InDoubt, P::Done, P::Done, P::Stopped]);
        let came = Came::of(&before, &after);
        assert_eq!((came.stopped, came.over), (2, 1));
        let names = |of: &[(String, Phase)]| of.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
        assert_eq!(names(&came.past), ["v2", "v3", "v5"]);
        assert_eq!(names(&came.stopping), ["v6"]);
        let (lines, code) = came.said("s1", "g", None);
        assert_eq!(code, GOES_ON);
        assert!(lines[0].contains("2 VMs stopped, 1 VM over before"), "{lines:?}");
        assert!(lines[1].contains("v2 (gave up)") && lines[1].contains("wait"), "{lines:?}");
        assert!(lines[2].contains("v3 (in doubt)") && lines[2].contains("irlm settle"), "{lines:?}");
        assert!(lines[3].contains("v5 (done): had moved"), "{lines:?}");
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn what_is_stopped_or_was_over_is_no_failure() {
        let before = [vm("a", Phase::Migrating), vm("b", Phase::Done)];
        // The agent has dropped the group.
        let (lines, code) = Came::of(&before, &[]).said("s1", "g", None);
        assert_eq!((code, &*lines), (0, &["s1: group g: 1 VM stopped, 1 VM over before".to_owned()][..]));
        let over = Came::of(&before[1..], &before[1..]);
        let (lines, code) = over.said("s1", "g", Some("it is over".into()));
        assert_eq!((code, &*lines), (0, &["s1: it is over".to_owned()][..]));
    }

    #[test]
    fn an_agent_that_did_not_do_it_counts_before_a_vm_that_goes_on() {
        assert_eq!(worst([0, GOES_ON, SOME_DID_NOT, 0].into_iter()), SOME_DID_NOT);
        assert_eq!(worst([0, GOES_ON].into_iter()), GOES_ON);
        assert_eq!(worst([].into_iter()), 0);
    }
}
