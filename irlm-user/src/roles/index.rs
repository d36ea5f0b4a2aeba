//! `irlm index`: the source rack's index server; and the coordinator's hand on it.

use super::common::runtime;
use crate::control::config::{Plaintext, check_reach, load_roles};
use crate::control::coordinator::plan::Plan;
use crate::control::coordinator::{GroupIndex, OpenIndex};
use crate::core::index::HostSet;
use crate::core::wire::keys;
use crate::flow::index::client::IndexOpener;
use crate::flow::index::server::{ServerOptions, serve};
use crate::host::descriptors;
use crate::net::connection::{Endpoint, Security};
use crate::net::gate::Sizes;
use crate::net::tls::{Credentials, Use};
use anyhow::Context as _;
use clap::Args;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest wait for the index to answer the coordinator.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often certificates are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// Longest wait for the share plan: some seconds for ten million contents.
const PLAN_TIMEOUT: Duration = Duration::from_secs(120);

/// Arguments of `irlm index`.
#[derive(Debug, Args)]
#[command(after_help = "\
Keeps everything in memory (about 75 bytes a content with one holder; 52 more for a time, and up to 120 for seconds, \
for contents that are compared with other hosts', 4 Mi of them a group at most); losing it costs bandwidth, never a VM. \
^C or SIGTERM ends it.")]
pub(super) struct IndexArgs {
    /// Where agents and `irlm evacuate` reach it
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Take callers in plain text on an address that is not only loopback's
    #[arg(long, value_name = "WHY")]
    plaintext: Option<Plaintext>,
    /// Roles for certificates that do not name one: a file with the keys of `[roles]` in agent.toml
    #[arg(long, value_name = "FILE")]
    roles: Option<PathBuf>,
    /// Groups at a time
    #[arg(long, value_name = "N", default_value_t = ServerOptions::default().max_groups)]
    max_groups: usize,
    /// Distinct contents a group may register; further ones are deduplicated on their host only
    #[arg(long, value_name = "N", default_value_t = ServerOptions::default().limits.max_entries)]
    max_contents: u32,
}

pub(super) fn run(args: &IndexArgs, tls: Option<&Path>) -> anyhow::Result<u8> {
    check_reach(&[args.listen], tls.is_some(), args.plaintext).map_err(|e| anyhow::anyhow!(e.0))?;
    let keys = tls.map(|dir| Credentials::open(dir, Use::Server)).transpose()?;
    let security = keys.clone().map_or(Security::Plain, |k| Security::Tls(Arc::new(k)));
    let listener = TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen on {} (is an index running there already?)", args.listen))?;
    let sizes = Sizes::of(descriptors::raise());
    let roles = args.roles.as_deref().map(load_roles).transpose()?.unwrap_or_default();
    let mut options =
        ServerOptions { max_groups: args.max_groups, security, roles, ..ServerOptions::default() };
    options.max_connections = options.max_connections.min(sizes.data);
    options.max_strangers = sizes.strangers;
    options.limits.max_entries = args.max_contents;
    tracing::info!(listen = %listener.local_addr().unwrap_or(args.listen), "index server ready");
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let runtime = runtime()?;
    if let Some(keys) = keys {
        runtime.spawn(look_at(keys));
    }
    runtime.spawn(async move {
        if until_told().await.is_ok() {
            told.store(true, Ordering::Release);
        }
    });
    serve(listener, options, stop).with_context(|| format!("index server on {} failed", args.listen))?;
    Ok(0)
}

/// Says what expires also where nobody connects.
async fn look_at(keys: Credentials) {
    loop {
        let looking = keys.clone();
        // It reads files.
        let _ = tokio::task::spawn_blocking(move || looking.look()).await;
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits for ^C or SIGTERM.
pub(super) async fn until_told() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        r = tokio::signal::ctrl_c() => r,
        _ = term.recv() => Ok(()),
    }
}

struct Opened(IndexOpener);

impl GroupIndex for Opened {
    fn plan_now(&mut self) -> anyhow::Result<String> {
        let p = self.0.plan_now(&HostSet::new(), PLAN_TIMEOUT)?;
        Ok(format!(
            "share plan: {} distinct contents registered, {} of them carried for others",
            p.digests, p.shared
        ))
    }

    fn close(self: Box<Self>) -> anyhow::Result<()> {
        Ok(self.0.close()?)
    }
}

/// How the coordinator opens its group at the index server.
pub(super) fn opener() -> OpenIndex {
    Arc::new(|plan: &Plan| {
        let c = &plan.config;
        let addr = c.index.context("the group file names no index")?;
        let count = |n: usize| u16::try_from(n).ok().with_context(|| format!("{n} hosts are too many"));
        let (sources, targets) = (count(c.source.len())?, count(c.target.len())?);
        let at = Endpoint { addr, security: plan.security.clone() };
        let opened = IndexOpener::open(at, &c.name, &keys::index(&plan.token.0), sources, targets, TIMEOUT);
        Ok(Box::new(Opened(opened?)) as Box<dyn GroupIndex>)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::GroupConfig;

    #[test]
    fn the_coordinator_opens_plans_and_closes_a_group_at_a_real_server() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let server = {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || serve(listener, ServerOptions::default(), stop))
        };
        let example =
            include_str!("../../../docs/examples/group.toml").replace("10.1.0.1:7710", &addr.to_string());
        let plan = Plan::new(GroupConfig::parse(&example).unwrap(), None).unwrap();
        let mut open = opener()(&plan).unwrap();
        let line = open.plan_now().unwrap();
        assert!(line.contains("0 distinct"), "{line}");
        open.close().unwrap();
        stop.store(true, Ordering::Release);
        server.join().unwrap().unwrap();
        let gone = opener()(&plan).err().unwrap();
        assert!(gone.to_string().contains(&addr.to_string()), "{gone}");
    }
}
