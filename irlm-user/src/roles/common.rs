//! What several roles use: which agents are meant, a runtime, ^C, and reports for programs.

use super::caller;
use crate::control::api::Method;
use crate::control::config::{GroupConfig, valid_name};
use crate::control::coordinator::plan::Plan;
use crate::obs::say;
use anyhow::Context as _;
use clap::Args;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Longest wait for one answer of one agent.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A runtime for the roles that talk to agents.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    built.context("cannot start the asynchronous runtime")
}

/// Counts ^C for the coordinator; the third kills the program as usual.
pub(super) fn interrupts() -> tokio::sync::watch::Receiver<u32> {
    let (tx, rx) = tokio::sync::watch::channel(0);
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            tx.send_modify(|n| *n += 1);
            if *tx.borrow() > 2 {
                std::process::exit(130);
            }
        }
    });
    rx
}

/// A host's name and its agent's control address.
pub(super) type Named = (String, SocketAddr);

/// Agents, either those of a group file or by address.
#[derive(Debug, Args)]
pub(super) struct Agents {
    /// The group file
    pub(super) group: Option<PathBuf>,
    /// An agent's control address instead of a group file; may be repeated
    #[arg(long, value_name = "IP:PORT", conflicts_with = "group")]
    pub(super) agent: Vec<SocketAddr>,
}

impl Agents {
    /// Host names and control addresses, and the group's file if there is one.
    pub(super) fn resolve(&self) -> anyhow::Result<(Vec<Named>, Option<Plan>)> {
        match &self.group {
            Some(file) => {
                let plan = caller::of(Plan::to_watch(GroupConfig::load(file)?))?;
                Ok((plan.agents.iter().map(|a| (a.name.clone(), a.addr)).collect(), Some(plan)))
            }
            None if self.agent.is_empty() => {
                anyhow::bail!("give a group file, or --agent IP:PORT (see --help)")
            }
            None => Ok((self.agent.iter().map(|a| (a.to_string(), *a)).collect(), None)),
        }
    }
}

/// A group's name on the command line.
pub(super) fn group_name(s: &str) -> Result<String, String> {
    if valid_name(s) { Ok(s.to_owned()) } else { Err("a group's name is made of a-z 0-9 - _ .".into()) }
}

/// Writes a report for programs: to a file, or to standard output for `-`.
pub(super) fn write_json(path: &std::path::Path, value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value).context("cannot write the report as JSON")?;
    text.push('\n');
    if path.as_os_str() == "-" {
        say::out(format_args!("{text}"));
        return Ok(());
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// For messages: the method, and what it does.
pub(super) fn describe(method: Method) -> &'static str {
    match method {
        Method::Oc => "plain QEMU, IRLM not in the path",
        Method::QemuMultifdZstd => "plain QEMU with zstd-compressed channels, IRLM not in the path",
        Method::Gm => "each content once per source host",
        Method::Irlm => "each content once per rack",
    }
}
