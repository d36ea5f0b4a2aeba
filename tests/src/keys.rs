//! Certificates for the lab: one small CA a lab, a directory for each host as `irlm cert issue` makes it, and for whoever
//! else is to try something.

use crate::net::Host;
use anyhow::{Context as _, Result};
use irlm_user::core::identity::{Role, RoleUri};
use irlm_user::net::tls::make::{Authority, Holder, Side, Validity};
use irlm_user::net::tls::write::{Secret, directory, file};
use irlm_user::net::tls::{CA, CLIENT, CLIENT_KEY, SERVER, SERVER_KEY};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const DAY: i64 = 86_400;

/// A CA, and the directories of those whom it has certified; they go with it.
pub struct Keys {
    dir: tempfile::TempDir,
    ca: Authority,
    /// The text of the CA's certificate.
    own: String,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.dir.path().display())
    }
}

/// Valid for so many days around today.
fn days(from: i64, to: i64) -> Result<Validity> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock stands before 1970")?;
    let now = now.as_secs().cast_signed();
    Ok(Validity { from: now + from * DAY, to: now + to * DAY })
}

impl Keys {
    /// A CA that has certified nobody.
    pub fn new() -> Result<Self> {
        let (ca, own) = Authority::create("IRLM lab", days(-100, 100)?)?;
        Ok(Self { dir: tempfile::tempdir()?, ca, own: own.cert })
    }

    /// The directory of this name.
    #[must_use]
    pub fn of(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Certifies the lab's hosts, each as its agent.
    pub fn hosts(&self, hosts: &[Host]) -> Result<()> {
        for host in hosts.iter().filter(|h| !h.is_other()) {
            let name = host.name();
            self.issue(&name, &[&host.ip()], Self::roles(*host), days(-1, 90)?, false)?;
        }
        Ok(())
    }

    /// Certifies somebody who is reached at this address.
    pub fn at(&self, ip: &str, name: &str, role: Role) -> Result<PathBuf> {
        self.issue(name, &[ip], vec![role], days(-1, 90)?, false)
    }

    fn roles(host: Host) -> Vec<Role> {
        // The coordinator's host is also where operators sit, and the index runs.
        if host == Host::Ctl { vec![Role::Operator, Role::Index] } else { vec![Role::Agent(host.name())] }
    }

    /// Certifies somebody, whose certificate expires so many days from now, or has expired then; gives the directory.
    pub fn somebody(&self, name: &str, role: Role, expires: i64) -> Result<PathBuf> {
        self.issue(name, &[&Host::Ctl.ip()], vec![role], days(-90, expires)?, false)
    }

    /// Certifies a host's agent anew, also for the address of another host.
    pub fn also(&self, host: Host, other: Host) -> Result<()> {
        let name = host.name();
        self.issue(&name, &[&host.ip(), &other.ip()], vec![Role::Agent(name.clone())], days(-1, 90)?, true)?;
        Ok(())
    }

    fn issue(
        &self,
        name: &str,
        ips: &[&str],
        roles: Vec<Role>,
        valid: Validity,
        replace: bool,
    ) -> Result<PathBuf> {
        let place = self.of(name);
        directory(&place)?;
        file(&place, CA, &self.own, Secret::No, replace)?;
        let roles: Result<Vec<RoleUri>, _> = roles.into_iter().map(|r| RoleUri::new(r, name)).collect();
        let roles = roles?;
        let ips = ips.iter().map(|ip| ip.parse()).collect::<Result<Vec<_>, _>>()?;
        let holder = Holder { name, dns: &[], ips: &ips, roles: &roles };
        for (side, cert, key) in [(Side::Server, SERVER, SERVER_KEY), (Side::Client, CLIENT, CLIENT_KEY)] {
            let pems = self.ca.issue(&holder, side, valid)?;
            file(&place, cert, &pems.cert, Secret::No, replace)?;
            file(&place, key, &pems.key, Secret::Yes, replace)?;
        }
        Ok(place)
    }

    /// Certifies a host anew in the directory that another CA has made for it; whom it believes stays as it is.
    pub fn takes_over(&self, other: &Self, host: Host) -> Result<()> {
        let place = other.of(&host.name());
        let before = std::fs::read_to_string(place.join(CA))?;
        let roles = Self::roles(host);
        let made = self.issue(&host.name(), &[&host.ip()], roles, days(-1, 90)?, true)?;
        for (name, secret) in
            [(CLIENT, Secret::No), (CLIENT_KEY, Secret::Yes), (SERVER, Secret::No), (SERVER_KEY, Secret::Yes)]
        {
            file(&place, name, &std::fs::read_to_string(made.join(name))?, secret, true)?;
        }
        Ok(file(&place, CA, &before, Secret::No, true)?)
    }

    /// Has the owner of a directory believe this CA, and no other.
    pub fn alone_believed_by(&self, place: &Path) -> Result<()> {
        Ok(file(place, CA, &self.own, Secret::No, true)?)
    }

    /// Has the owner of a directory believe this CA, too.
    pub fn believed_by(&self, place: &Path) -> Result<()> {
        let before = std::fs::read_to_string(place.join(CA))?;
        Ok(file(place, CA, &(before + &self.own), Secret::No, true)?)
    }
}
