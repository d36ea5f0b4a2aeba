//! Plain QEMU migration of all guests at once, driven by the lab itself: it proves the lab before IRLM is in it, and
//! gives the baseline that does not depend on IRLM's code.

use crate::lab::{Guests, Lab};
use crate::net::Host;
use crate::qemu::Vm;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// What one guest's migration took, by QEMU's own account.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Moved {
    /// The guest.
    pub name: String,
    /// From `migrate` to completed, in ms.
    pub total_ms: u64,
    /// Stopped at the source until completed there, in ms.
    pub downtime_ms: u64,
}

/// Has every pair migrate under QEMU's own TLS: each side shows its host's certificate and checks the other's.
pub fn encrypt(lab: &Lab, guests: &mut Guests) -> Result<()> {
    let keys = |host| lab.net.keys(host).context("the lab has no certificates");
    for p in &mut guests.pairs {
        let (from, to) = (Host::Source(p.host), Host::Target(p.host));
        certify(&mut p.source, &keys(from)?, "own", Some(to))?;
        certify(&mut p.target, &keys(to)?, "own", None)?;
    }
    Ok(())
}

/// Has a QEMU migrate with the certificates of this directory, which it calls `id`: to `to`, or, without one, to itself.
pub fn certify(vm: &mut Vm, dir: &Path, id: &str, to: Option<Host>) -> Result<()> {
    let endpoint = if to.is_some() { "client" } else { "server" };
    let object = json!({
        "qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint, "verify-peer": true
    });
    vm.qmp.run("object-add", &object).with_context(|| format!("QEMU said: {}", vm.said().trim()))?;
    let mut parameters = json!({"tls-creds": id});
    if let Some(to) = to {
        parameters["tls-hostname"] = to.ip().into();
    }
    vm.qmp.run("migrate-set-parameters", &parameters)?;
    Ok(())
}

/// Migrates every pair at once over TCP, and leaves the targets paused. `multifd`: two channels with zstd.
pub fn migrate(
    lab: &Lab,
    guests: &mut Guests,
    multifd: bool,
    wait: Duration,
) -> Result<(Vec<Moved>, Duration)> {
    let start = Instant::now();
    for (n, p) in guests.pairs.iter_mut().enumerate() {
        for vm in [&mut p.source, &mut p.target] {
            let caps = json!({"capabilities": [{"capability": "multifd", "state": multifd}]});
            vm.qmp.run("migrate-set-capabilities", &caps)?;
            let mut parameters = json!({"max-bandwidth": 10_000_000_000u64});
            if multifd {
                parameters["multifd-compression"] = "zstd".into();
                parameters["multifd-channels"] = 2.into();
            }
            vm.qmp.run("migrate-set-parameters", &parameters)?;
        }
        let uri = format!("tcp:{}:{}", Host::Target(p.host).ip(), 4400 + n);
        p.target.qmp.run("migrate-incoming", &json!({"uri": uri}))?;
        p.source.qmp.run("migrate", &json!({"uri": uri}))?;
    }
    let mut moved = Vec::new();
    for p in &mut guests.pairs {
        let v: Value = p.source.qmp.migrated(wait).with_context(|| {
            format!("{} in {}; the target said: {}", p.name, lab.top().display(), p.target.said().trim())
        })?;
        p.target.qmp.migrated(wait).with_context(|| p.name.clone())?;
        let ms = |k: &str| v[k].as_u64().unwrap_or_default();
        moved.push(Moved { name: p.name.clone(), total_ms: ms("total-time"), downtime_ms: ms("downtime") });
    }
    Ok((moved, start.elapsed()))
}
