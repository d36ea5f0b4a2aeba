//! `irlm agent`: the per-host daemon, source and target role in one.

use crate::control::agent;
use crate::control::config::AgentConfig;
use crate::flow::source::Drill;
use clap::Args;
use std::path::{Path, PathBuf};

/// Arguments of `irlm agent`.
#[derive(Debug, Args)]
#[command(after_help = "\
Needs: access to the VMs' monitor or control sockets and to the QEMUs' memory (root, or the QEMUs' user with \
CAP_SYS_PTRACE); for counting packets CAP_NET_ADMIN and CAP_BPF (without them it runs on and says so). ^C or SIGTERM ends it: VMs that are \
being moved stay at their source. After a crash start it again: it settles what its journal holds.")]
pub(super) struct AgentArgs {
    /// Configuration file (docs/examples/agent.toml explains every key)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Drill: hold each departing VM so many milliseconds between the target's "loaded" and giving up
    #[arg(long, value_name = "MS", default_value_t = 0, hide_short_help = true)]
    drill_before_give_up: u64,
    /// Drill: hold each departing VM so many milliseconds between giving up and telling the target
    #[arg(long, value_name = "MS", default_value_t = 0, hide_short_help = true)]
    drill_after_give_up: u64,
    /// Drill: let so many of a thousand multicast datagrams go that arrive
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000), hide_short_help = true)]
    drill_drop_multicast: u32,
    /// Drill: hash every page that leaves under a digest kept from preparation, and end its VM's move if one was stale
    #[arg(long, hide_short_help = true)]
    drill_prove_digests: bool,
    /// Drill: with post-copy, send only what is asked for, for so many milliseconds after a VM was given up
    #[arg(long, value_name = "MS", default_value_t = 0, hide_short_help = true)]
    drill_hold_filling: u64,
    /// Drill: with post-copy, for so many milliseconds place pages from the store only where a vCPU waits for them
    #[arg(long, value_name = "MS", default_value_t = 0, hide_short_help = true)]
    drill_hold_placing: u64,
    /// Audit: keep a digest of the newest version sent of every page, and write it to FILE.<VM> when RAM ends
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    audit: Option<PathBuf>,
}

pub(super) fn run(args: AgentArgs, tls: Option<&Path>) -> anyhow::Result<u8> {
    let config = AgentConfig::load(&args.config, tls)?;
    let drill = Drill {
        before_give_up_ms: args.drill_before_give_up,
        after_give_up_ms: args.drill_after_give_up,
        audit: args.audit,
        drop_multicast: args.drill_drop_multicast,
        prove_digests: args.drill_prove_digests,
        hold_filling_ms: args.drill_hold_filling,
        hold_placing_ms: args.drill_hold_placing,
    };
    agent::run(config, drill)?;
    Ok(0)
}
