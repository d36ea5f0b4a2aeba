//! How a group moves. What its file and its command ask for is resolved once, at the coordinator, into a [`Recipe`];
//! agents are sent that, and below it is only matched on. What has no meaning together cannot be said with it.

use super::config::{GroupConfig, VmConfig};
use super::terms::{Method, MulticastConfig};
use crate::core::account::Pages;
use crate::core::digest::Algorithm;
use crate::core::direct::Direct;
use crate::core::migration::Migration;
use crate::core::squeeze::Mode;
use crate::flow::Front;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;

/// How a group moves.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// Plain QEMU's own pre-copy; the agents only drive the monitors.
    Plain {
        /// Over several channels, each compressed by zstd.
        multifd: bool,
    },
    /// Pages pass the agents, which know contents again.
    Proxied(Proxied),
}

/// A group whose pages pass the agents.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Proxied {
    /// The page digest.
    pub digest: Algorithm,
    /// In which form contents travel.
    pub contents: Contents,
    /// Whether pages that are written all the time are held back while a VM runs, so that only their last version is
    /// sent.
    pub hold_back: bool,
    /// Whether every page is accounted for at both ends, and memory is compared.
    pub verify: Pages,
    /// How VMs move that our own VMM runs.
    pub migration: Migration,
    /// How far contents are shared.
    pub sharing: Sharing,
}

/// In which form contents travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contents {
    /// As they are.
    Raw,
    /// As they are over the core link, and compressed between target hosts: for whoever compares what sharing alone
    /// saves.
    Forwarded,
    /// Compressed.
    Squeezed {
        /// The level of zstd; none: as it pays.
        level: Option<i32>,
        /// Similar contents leave as differences.
        differences: bool,
    },
}

/// How far contents are shared.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// Each content leaves each source host once (gang migration).
    Host,
    /// Each content crosses the core link once.
    Rack(Rack),
}

/// What sharing over a whole rack takes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rack {
    /// The index server.
    pub index: SocketAddr,
    /// Whether source hosts lend each other contents that stand for many similar ones.
    pub models: bool,
    /// Whether QEMUs may stream to each other, past the agents.
    pub direct: Direct,
    /// IP multicast in the target rack; none: contents are forwarded to each host on its own.
    pub multicast: Option<MulticastConfig>,
}

/// A group file asks for what cannot be had together.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// `irlm` without an index server.
    #[error("group {group}: method irlm needs `index = \"IP:PORT\"` (or choose --method gm)")]
    NoIndex {
        /// The group.
        group: String,
    },
    /// A plain method for a VM that no QEMU runs.
    #[error(
        "vm {vm}: {method} is plain QEMU's own migration, and an `irlm vmm` runs this VM: choose --method irlm or gm"
    )]
    NotQemu {
        /// The VM.
        vm: String,
        /// The method.
        method: Method,
    },
    /// Memory compared that is not all there.
    #[error(
        "[verify] pages = \"ram\" compares the memory of a stopped VM, and by migration = \"{migration}\" vm {vm} runs before its \
         memory is there: choose migration = \"pre-copy\", or pages = \"stream\""
    )]
    RamNeedsPreCopy {
        /// The VM.
        vm: String,
        /// The way.
        migration: Migration,
    },
    /// A budget that nobody would keep.
    #[error("direct = \"always\" has nobody in the path who keeps budget_mbit: leave one of them out")]
    NobodyKeepsBudget,
}

impl Recipe {
    /// What `config` and the method of its command come to.
    pub fn resolve(config: &GroupConfig, method: Method) -> Result<Self, RecipeError> {
        let sharing = match method {
            Method::Oc | Method::QemuMultifdZstd => {
                if let Some(vm) = config.vm.iter().find(|v| v.source_vmm.is_some()) {
                    return Err(RecipeError::NotQemu { vm: vm.name.clone(), method });
                }
                return Ok(Self::Plain { multifd: method == Method::QemuMultifdZstd });
            }
            Method::Gm => Sharing::Host,
            Method::Irlm => Sharing::Rack(Rack::resolve(config)?),
        };
        let early =
            config.vm.iter().find(|v| v.source_vmm.is_some() && config.migration != Migration::PreCopy);
        if let Some(vm) = early.filter(|_| config.verify.pages == Pages::Ram) {
            let (vm, migration) = (vm.name.clone(), config.migration);
            return Err(RecipeError::RamNeedsPreCopy { vm, migration });
        }
        Ok(Self::Proxied(Proxied {
            digest: config.digest,
            contents: Contents::resolve(config),
            hold_back: config.hold_back,
            verify: config.verify.pages,
            migration: config.migration,
            sharing,
        }))
    }

    /// What an agent knows of it that takes a group up from its records: nothing is begun any more by it.
    #[must_use]
    pub fn of_records(method: Method) -> Self {
        match method {
            Method::Oc | Method::QemuMultifdZstd => {
                Self::Plain { multifd: method == Method::QemuMultifdZstd }
            }
            Method::Gm | Method::Irlm => Self::Proxied(Proxied {
                digest: Algorithm::default(),
                contents: Contents::Raw,
                hold_back: false,
                verify: Pages::default(),
                migration: Migration::default(),
                sharing: Sharing::Host,
            }),
        }
    }

    /// What passes the agents, if anything does.
    #[must_use]
    pub fn proxied(&self) -> Option<&Proxied> {
        match self {
            Self::Proxied(p) => Some(p),
            Self::Plain { .. } => None,
        }
    }

    /// What is shared over the whole rack, if anything is.
    #[must_use]
    pub fn rack(&self) -> Option<&Rack> {
        match &self.proxied()?.sharing {
            Sharing::Rack(r) => Some(r),
            Sharing::Host => None,
        }
    }

    /// Whether QEMUs may stream to each other, past the agents.
    #[must_use]
    pub fn direct(&self) -> Direct {
        self.rack().map_or(Direct::Never, |r| r.direct)
    }

    /// Whether this VM can be moved so.
    #[must_use]
    pub fn takes(&self, front: &Front) -> bool {
        front.is_qemu() || self.proxied().is_some()
    }

    /// What it does not use of what `config` asks for, and why, a line each.
    #[must_use]
    pub fn unused(&self, config: &GroupConfig) -> Vec<String> {
        let mut out = Vec::new();
        let mut say = |asked: bool, used: bool, what: &str, why: &str| {
            if asked && !used {
                out.push(format!("{what} is not used: {why}"));
            }
        };
        let agents = self.proxied();
        let plain = "plain QEMU moves the VMs";
        let compress = config.compress != Mode::default();
        say(compress, agents.is_some(), "compress", plain);
        let ram = config.verify.pages == Pages::Ram;
        say(ram, agents.is_some(), "[verify] pages = \"ram\"", &format!("{plain}, and nothing is verified"));
        let vmm = config.vm.iter().any(|v| v.source_vmm.is_some());
        let migration = config.migration != Migration::default();
        say(
            migration,
            agents.is_some() && vmm,
            "migration",
            "VMs of QEMU move by pre-copy, and no `irlm vmm` runs one of the group",
        );
        let always = config.direct == Direct::Always;
        say(always, self.direct() == Direct::Always, "direct", "only method irlm decides that");
        let multicast = self.rack().is_some_and(|r| r.multicast.is_some());
        let why = "nothing is forwarded to more than one target host";
        say(config.multicast.is_some(), multicast, "multicast", why);
        out
    }
}

/// VMs that one line names.
const NAMED: usize = 8;

impl Recipe {
    /// Of which VMs no page is verified though `config` wants that, and why.
    #[must_use]
    pub fn unverified(&self, config: &GroupConfig) -> Option<String> {
        let agents = match self {
            // More was asked for, and `unused` says so.
            Self::Plain { .. } if config.verify.pages != Pages::Stream => return None,
            Self::Plain { .. } => {
                return Some(
                    "not verified: all VMs (plain QEMU moves them, and no agent sees a page)".into(),
                );
            }
            Self::Proxied(p) => p,
        };
        if agents.verify != Pages::Stream || self.direct() == Direct::Never {
            return None;
        }
        // A host goes direct only if QEMUs run all that leaves it; unless that was asked for, only if all hosts do.
        let is_vmm = |v: &&VmConfig| v.source_vmm.is_some();
        let always = self.direct() == Direct::Always;
        let stays =
            |v: &&VmConfig| config.vm.iter().filter(is_vmm).any(|other| !always || other.source == v.source);
        let names: Vec<&str> = config.vm.iter().filter(|v| !stays(v)).map(|v| v.name.as_str()).collect();
        if names.is_empty() {
            return None;
        }
        let more = names.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let names = names[..names.len().min(NAMED)].join(", ");
        let when = if always { "" } else { ", if the link is faster than the agents" };
        Some(format!(
            "not verified{when}: {names}{more} (their QEMUs stream to each other, and no agent sees a page: [verify] pages = \
             \"ram\" compares their memory)"
        ))
    }
}

impl Contents {
    fn resolve(config: &GroupConfig) -> Self {
        let differences = config.differences;
        match config.compress {
            // Differences are a kind of compression.
            Mode::Off => Self::Raw,
            Mode::Forwarded => Self::Forwarded,
            Mode::Auto => Self::Squeezed { level: None, differences },
            Mode::Level(n) => Self::Squeezed { level: Some(n), differences },
        }
    }

    /// How a source host compresses.
    #[must_use]
    pub fn across(self) -> Mode {
        match self {
            Self::Raw | Self::Forwarded => Mode::Off,
            Self::Squeezed { level, .. } => level.map_or(Mode::Auto, Mode::Level),
        }
    }

    /// How a target host compresses what it passes on.
    #[must_use]
    pub fn passed_on(self) -> Mode {
        if self == Self::Forwarded { Mode::Auto } else { self.across() }
    }

    /// Whether similar contents leave as differences.
    #[must_use]
    pub fn differences(self) -> bool {
        matches!(self, Self::Squeezed { differences: true, .. })
    }
}

impl Rack {
    fn resolve(config: &GroupConfig) -> Result<Self, RecipeError> {
        let index = config.index.ok_or_else(|| RecipeError::NoIndex { group: config.name.clone() })?;
        let budget = config.budget_mbit.is_some();
        let direct = match config.direct {
            Direct::Always if budget => return Err(RecipeError::NobodyKeepsBudget),
            // Whoever gives a budget, or says how contents are to be compressed, means bytes to be saved.
            Direct::Auto if budget || config.compress != Mode::Auto => Direct::Never,
            direct => direct,
        };
        Ok(Self {
            index,
            // They are only worth anything as what others differ from.
            models: config.models && Contents::resolve(config).differences() && config.source.len() > 1,
            direct,
            // Of two target hosts one sends to the other.
            multicast: config.multicast.filter(|_| config.target.len() > 2),
        })
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain { multifd: false } => f.write_str("by plain QEMU"),
            Self::Plain { multifd: true } => f.write_str("by plain QEMU, over compressed channels"),
            Self::Proxied(p) => p.fmt(f),
        }
    }
}

impl fmt::Display for Proxied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.sharing {
            Sharing::Host => write!(f, "each content once per source host")?,
            Sharing::Rack(r) => write!(f, "each content once per rack (index {})", r.index)?,
        }
        write!(f, ", digest {}, {}", self.digest, self.contents)?;
        if self.hold_back {
            f.write_str(", busy pages held back")?;
        }
        match self.verify {
            Pages::Off => f.write_str(", pages not verified")?,
            Pages::Stream => {}
            Pages::Ram => f.write_str(", memory compared while a VM is stopped")?,
        }
        if let Sharing::Rack(r) = &self.sharing {
            if r.models {
                f.write_str(", models lent")?;
            }
            if let Some(m) = r.multicast {
                write!(f, ", multicast {}", m.group)?;
            }
            match r.direct {
                Direct::Auto => f.write_str(", past the agents where the link is faster")?,
                Direct::Always => f.write_str(", past the agents")?,
                Direct::Never => {}
            }
        }
        write!(f, "; VMs of irlm vmm by {}", self.migration)
    }
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("contents as they are"),
            Self::Forwarded => f.write_str("contents compressed when they are passed on"),
            Self::Squeezed { level, differences } => {
                match level {
                    None => f.write_str("contents compressed as it pays")?,
                    Some(n) => write!(f, "contents compressed (zstd:{n})")?,
                }
                if *differences { f.write_str(" and as differences") } else { Ok(()) }
            }
        }
    }
}

#[cfg(test)]
mod tests;
