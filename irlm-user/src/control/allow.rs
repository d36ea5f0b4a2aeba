//! What an agent touches for a caller, whatever his certificate says (`[allow]` of agent.toml): which sockets it opens on its
//! own host, where it sends guests' memory, and whose VMs it takes. An agent runs as root, and a group's file comes from another
//! machine.

use glob::{MatchOptions, Pattern};
use ipnet::IpNet;
use serde::Deserialize;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Where users have numbers (passwd(5)). Users of a directory service are given by number.
const PASSWD: &str = "/etc/passwd";
/// Users that QEMU runs as under libvirt; who is not on this host is left out.
const QEMU_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];
/// IRLM's own sockets, libvirt's and those of the examples.
const SOCKETS: [&str; 5] =
    ["/run/irlm/**", "/run/vm/**", "/run/libvirt/qemu/**", "/var/lib/libvirt/qemu/**", "/run/qemu/**"];
/// Loopback, link-local and private addresses (RFC 1918, RFC 4193, RFC 6598).
const NETWORKS: [&str; 9] = [
    "127.0.0.0/8",
    "::1/128",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "fc00::/7",
    "fe80::/10",
];
/// A `*` stands for one name of a path, `**` for any number of them.
const GLOBS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// Why something is not touched for a caller. One line: what, and which key allows it.
#[derive(Debug, thiserror::Error)]
pub enum NotAllowed {
    /// A path outside of all that is listed.
    #[error("{path} is not among the sockets that callers may name: add it to allow.sockets of agent.toml")]
    Socket {
        /// Which.
        path: PathBuf,
    },
    /// A listed path that leads outside.
    #[error(
        "{path} leads to {to}, which is not among the sockets that callers may name (allow.sockets of agent.toml)"
    )]
    Leads {
        /// As it was named.
        path: PathBuf,
        /// Where it is.
        to: PathBuf,
    },
    /// Something that is no socket.
    #[error("{path} is no socket: name the monitor's or control socket of the VM")]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// Somebody else's socket.
    #[error("{path} belongs to user {uid}: add that user to allow.owners of agent.toml if QEMU runs as such")]
    Owner {
        /// Which.
        path: PathBuf,
        /// Whose.
        uid: u32,
    },
    /// It cannot be looked at.
    #[error("{path} cannot be looked at: {source}")]
    Unseen {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An address outside of all that is listed.
    #[error(
        "{what} {addr} is not in a network that callers may name: add it to allow.networks of agent.toml"
    )]
    Network {
        /// What is there.
        what: String,
        /// Where.
        addr: SocketAddr,
    },
    /// A trust domain that is not listed.
    #[error(
        "tenant {tenant:?} is not among those whose VMs this host takes: add it to allow.tenants of agent.toml"
    )]
    Tenant {
        /// Which.
        tenant: String,
    },
}

/// `[allow]` as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    sockets: Vec<String>,
    owners: Option<Vec<Owner>>,
    networks: Vec<IpNet>,
    tenants: Vec<String>,
}

/// A user by name or number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Owner {
    Number(u32),
    Name(String),
}

impl Default for Written {
    fn default() -> Self {
        Self {
            sockets: SOCKETS.map(str::to_owned).to_vec(),
            owners: None,
            networks: NETWORKS.iter().filter_map(|n| n.parse().ok()).collect(),
            tenants: vec!["*".into()],
        }
    }
}

/// A key of `[allow]` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadAllow {
    /// No glob.
    #[error("allow.{key}: {text:?} is no pattern: {why}")]
    Pattern {
        /// The key.
        key: &'static str,
        /// What it holds.
        text: String,
        /// What is wrong.
        why: glob::PatternError,
    },
    /// A pattern that no absolute path fits.
    #[error("allow.sockets: {0:?} must begin with /")]
    Relative(String),
    /// A user that this host does not know.
    #[error("allow.owners: there is no user {0:?} in {PASSWD}: give the number")]
    Owner(String),
}

/// `[allow]` of agent.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Written")]
pub struct Allow {
    /// Sockets that callers may name, on this host.
    sockets: Vec<Pattern>,
    /// Users, beside root and the agent's own, whose sockets these may be.
    owners: Vec<u32>,
    /// Networks to which callers may have this host connect.
    networks: Vec<IpNet>,
    /// Trust domains whose VMs this host takes.
    tenants: Vec<Pattern>,
}

impl Default for Allow {
    fn default() -> Self {
        let text = |s: &str| Pattern::new(s).ok();
        let w = Written::default();
        Self {
            sockets: w.sockets.iter().filter_map(|s| text(s)).collect(),
            owners: QEMU_USERS.iter().filter_map(|name| uid_of(name)).collect(),
            networks: w.networks,
            tenants: w.tenants.iter().filter_map(|s| text(s)).collect(),
        }
    }
}

impl TryFrom<Written> for Allow {
    type Error = BadAllow;

    fn try_from(w: Written) -> Result<Self, BadAllow> {
        let patterns = |key, all: Vec<String>| -> Result<Vec<Pattern>, BadAllow> {
            let one = |text: String| {
                Pattern::new(&text).map_err(|why| BadAllow::Pattern { key, text: text.clone(), why })
            };
            all.into_iter().map(one).collect()
        };
        if let Some(s) = w.sockets.iter().find(|s| !s.starts_with('/')) {
            return Err(BadAllow::Relative(s.clone()));
        }
        let owners = match w.owners {
            None => Self::default().owners,
            Some(all) => {
                let number = |o: Owner| match o {
                    Owner::Number(n) => Ok(n),
                    Owner::Name(name) => uid_of(&name).ok_or(BadAllow::Owner(name)),
                };
                all.into_iter().map(number).collect::<Result<_, _>>()?
            }
        };
        Ok(Self {
            sockets: patterns("sockets", w.sockets)?,
            owners,
            networks: w.networks,
            tenants: patterns("tenants", w.tenants)?,
        })
    }
}

/// The number of a user of this host.
fn uid_of(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(PASSWD).ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

impl Allow {
    /// A socket of this host. One that is not there is refused by whoever opens it.
    pub(super) fn socket(&self, path: &Path) -> Result<(), NotAllowed> {
        let named = || path.to_owned();
        // What is called `..` is somewhere else than the pattern says.
        if !self.listed(path) || path.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(NotAllowed::Socket { path: named() });
        }
        let unseen = |source| NotAllowed::Unseen { path: named(), source };
        let to = match path.canonicalize() {
            Ok(to) => to,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(unseen(e)),
        };
        if !self.listed(&to) {
            return Err(NotAllowed::Leads { path: named(), to });
        }
        let meta = std::fs::symlink_metadata(&to).map_err(unseen)?;
        if !meta.file_type().is_socket() {
            return Err(NotAllowed::Kind { path: named() });
        }
        let own = rustix::process::geteuid().as_raw();
        if ![0, own].contains(&meta.uid()) && !self.owners.contains(&meta.uid()) {
            return Err(NotAllowed::Owner { path: named(), uid: meta.uid() });
        }
        Ok(())
    }

    fn listed(&self, path: &Path) -> bool {
        self.sockets.iter().any(|p| p.matches_path_with(path, GLOBS))
    }

    pub(super) fn network(&self, what: String, addr: SocketAddr) -> Result<(), NotAllowed> {
        if self.takes(addr) { Ok(()) } else { Err(NotAllowed::Network { what, addr }) }
    }

    /// Whether an address is in a network that may be used.
    pub(super) fn takes(&self, addr: SocketAddr) -> bool {
        let ip: IpAddr = addr.ip().to_canonical();
        self.networks.iter().any(|n| n.contains(&ip))
    }

    pub(super) fn tenant(&self, tenant: &str) -> Result<(), NotAllowed> {
        // A VM of no trust domain is in one that has no name.
        let known = self.tenants.iter().any(|p| p.matches(tenant));
        if known { Ok(()) } else { Err(NotAllowed::Tenant { tenant: tenant.to_owned() }) }
    }
}

#[cfg(test)]
mod tests;
