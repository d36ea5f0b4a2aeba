//! As whom this command calls agents and index: one process is one caller. Said once, before the first call, by `--tls`,
//! `IRLM_TLS` or the group file.

use crate::control::coordinator::plan::Plan;
use crate::net::connection::{Endpoint, Security};
use crate::net::tls::{Credentials, Use};
use anyhow::Context as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};

static CALLER: OnceLock<Security> = OnceLock::new();

/// Calls with the certificates of `dir` from now on, unless others were named before.
pub(super) fn is_in(dir: &Path) -> anyhow::Result<()> {
    if CALLER.get().is_none() {
        let keys = Credentials::open(dir, Use::Client).context("no certificates to call with")?;
        let _ = CALLER.set(Security::Tls(Arc::new(keys)));
    }
    Ok(())
}

/// How this command's calls are secured.
pub(super) fn security() -> Security {
    CALLER.get().cloned().unwrap_or_default()
}

/// Where an agent is called.
pub(super) fn at(addr: SocketAddr) -> Endpoint {
    Endpoint { addr, security: security() }
}

/// The plan, whose agents and index are called as this caller: as its file says, if the command line did not.
pub(super) fn of(mut plan: Plan) -> anyhow::Result<Plan> {
    if let Some(dir) = &plan.config.tls {
        is_in(dir)?;
    }
    plan.security = security();
    Ok(plan)
}
