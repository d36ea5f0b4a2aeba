//! Certificates for the lab's hosts: one small CA a lab, and a directory a host as `irlm cert issue` makes it.

use crate::net::Host;
use anyhow::{Context as _, Result};
use irlm_user::core::identity::{Role, RoleUri};
use irlm_user::net::tls::make::{Authority, Holder, Side, Validity};
use irlm_user::net::tls::write::{Secret, directory, file};
use irlm_user::net::tls::{CA, CLIENT, CLIENT_KEY, SERVER, SERVER_KEY};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long before and after now they are valid.
const VALID: (Duration, Duration) = (Duration::from_secs(3600), Duration::from_secs(90 * 86_400));

/// Makes one directory for each host, of its name, in `dir`.
pub(crate) fn make(dir: &Path, hosts: &[Host]) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?;
    let valid = Validity {
        from: (now - VALID.0).as_secs().cast_signed(),
        to: (now + VALID.1).as_secs().cast_signed(),
    };
    let (ca, own) = Authority::create("IRLM lab", valid)?;
    directory(dir)?;
    for host in hosts.iter().filter(|h| !h.is_other()) {
        let (name, place) = (host.name(), dir.join(host.name()));
        directory(&place)?;
        file(&place, CA, &own.cert, Secret::No, false)?;
        // The coordinator's host is also where operators sit, and the index runs.
        let roles = if *host == Host::Ctl {
            vec![Role::Operator, Role::Index]
        } else {
            vec![Role::Agent(name.clone())]
        };
        let roles: Result<Vec<RoleUri>, _> = roles.into_iter().map(|r| RoleUri::new(r, &name)).collect();
        let (roles, ips) = (roles?, [host.ip().parse()?]);
        let holder = Holder { name: &name, dns: &[], ips: &ips, roles: &roles };
        for (side, cert, key) in [(Side::Server, SERVER, SERVER_KEY), (Side::Client, CLIENT, CLIENT_KEY)] {
            let pems = ca.issue(&holder, side, valid)?;
            file(&place, cert, &pems.cert, Secret::No, false)?;
            file(&place, key, &pems.key, Secret::Yes, false)?;
        }
    }
    Ok(())
}
