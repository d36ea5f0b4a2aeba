//! `irlm settle`: an operator's decision about a VM in doubt. The side that must not run is told first, and only
//! when it has said yes (or the operator vouches for it) may the other one run: never two copies.

use super::{CALL_TIMEOUT, runtime};
use crate::control::api::{Decision, Request};
use crate::control::client::AgentClient;
use crate::control::config::GroupConfig;
use anyhow::Context as _;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Arguments of `irlm settle`.
#[derive(Debug, Args)]
#[command(after_help = "\
A VM is in doubt when its two agents lost each other between the words of its handover: both copies are paused, and \
the agents settle it themselves as soon as they can talk. Settle it by hand only if they will not talk again soon.\n\n\
The side that is not to run is told first and must agree. If it cannot be reached, make sure yourself that its copy \
cannot run (host powered off, QEMU killed), and say so with --other-side-is-dead.\n\n\
Exit codes: 0 settled, 1 usage, 2 an agent refused or did not answer (nothing runs that did not run before).")]
pub(super) struct SettleArgs {
    /// The group file
    group: PathBuf,
    /// The VM's name
    vm: String,
    /// Where it is to run
    #[arg(long, value_enum)]
    run_at: Side,
    /// The other side's copy cannot run, you have made sure of it
    #[arg(long)]
    other_side_is_dead: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Side {
    /// At its source host; the target's copy is thrown away
    Source,
    /// At its target host; the source's copy is given up
    Target,
}

pub(super) fn run(args: &SettleArgs) -> anyhow::Result<u8> {
    let config = GroupConfig::load(&args.group)?;
    let vm = config
        .vm
        .iter()
        .find(|v| v.name == args.vm)
        .with_context(|| format!("{}: no [[vm]] is named {:?}", args.group.display(), args.vm))?;
    let source = config.source.iter().find(|h| h.name == vm.source).map(|h| (&h.name, h.agent));
    let target = config.target.iter().find(|h| h.name == vm.target).map(|h| (&h.name, h.agent));
    let (Some(source), Some(target)) = (source, target) else {
        anyhow::bail!("{}: the hosts of {:?} are not in it", args.group.display(), args.vm)
    };
    let (stops, runs, decision) = match args.run_at {
        Side::Target => (source, target, Decision::Run),
        Side::Source => (target, source, Decision::Resume),
    };
    let word = |decision| Request::Settle { group: config.name.clone(), vm: vm.name.clone(), decision };
    runtime()?.block_on(async {
        if args.other_side_is_dead {
            println!("host {}: taken for dead on your word", stops.0);
        } else if let Err(e) = AgentClient::new(stops.1, CALL_TIMEOUT).call(&word(Decision::Discard)).await {
            println!("! host {}: {e}", stops.0);
            println!("nothing was changed; if that host's copy cannot run, say --other-side-is-dead");
            return Ok(2);
        } else {
            println!("host {}: its copy of {} is given up", stops.0, vm.name);
        }
        match AgentClient::new(runs.1, CALL_TIMEOUT).call(&word(decision)).await {
            Ok(_) => {
                println!("host {}: {} runs there", runs.0, vm.name);
                Ok(0)
            }
            Err(e) => {
                println!("! host {}: {e}", runs.0);
                println!("{} is paused on both sides; run this again when that agent answers", vm.name);
                Ok(2)
            }
        }
    })
}
