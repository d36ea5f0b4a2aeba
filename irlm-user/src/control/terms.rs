//! What files, the control protocol and records have in common: names and their bounds, methods, a group's secret.

use crate::core::policy::MAX_MBIT;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};

/// Longest name of a group, host or VM, bytes.
pub const MAX_NAME: usize = 64;
/// Most hosts on either side of a group.
pub const MAX_HOSTS: usize = 1024;
/// Most VMs in a group.
pub const MAX_VMS: usize = 8192;
/// Longest trust-domain label, bytes.
pub const MAX_TENANT: usize = 64;
/// Longest path of a UNIX socket, bytes (`sockaddr_un`).
pub const MAX_SOCKET_PATH: usize = 107;
/// What is wrong in a text, where, and what to do: one line. Nothing was done with it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistake(pub String);

impl From<String> for Mistake {
    fn from(what: String) -> Self {
        Self(what)
    }
}

impl From<&str> for Mistake {
    fn from(what: &str) -> Self {
        Self(what.to_owned())
    }
}

/// How a group is moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Plain QEMU pre-copy, IRLM not in the path.
    Oc,
    /// Plain QEMU with two zstd-compressed channels.
    QemuMultifdZstd,
    /// Gang migration: each content once per source host.
    Gm,
    /// Each content once per rack.
    #[default]
    Irlm,
}

impl Method {
    /// Whether pages pass through the agents (as opposed to plain QEMU).
    #[must_use]
    pub fn in_path(self) -> bool {
        matches!(self, Self::Gm | Self::Irlm)
    }

    /// The name used in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Oc => "oc",
            Self::QemuMultifdZstd => "qemu-multifd-zstd",
            Self::Gm => "gm",
            Self::Irlm => "irlm",
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The group's secret: keys its digests and opens its connections. Drawn by the coordinator; 64 hex digits on the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use std::fmt::Write as _;
        let hex = self.0.iter().fold(String::with_capacity(64), |mut out, b| {
            let _ = write!(out, "{b:02x}");
            out
        });
        s.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        let mut out = [0; 32];
        if s.len() != 64 || !s.is_ascii() {
            return Err(serde::de::Error::custom("a token is 64 hex digits"));
        }
        for (i, b) in out.iter_mut().enumerate() {
            *b = u8::from_str_radix(&s[2 * i..2 * i + 2], 16)
                .map_err(|_| serde::de::Error::custom("a token is 64 hex digits"))?;
        }
        Ok(Self(out))
    }
}

/// `[timeouts]` of GROUP.toml; goes to every agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupTimeouts {
    /// A remote reference unresolved for so long is asked of the VM's own source, milliseconds.
    pub wait_ms: u64,
    /// Longest preparation before the group gives up, milliseconds.
    pub prepare_ms: u64,
    /// Longest time from the start of a VM's stream until it is stopped, milliseconds; then it stays at its source.
    pub move_ms: u64,
}

impl Default for GroupTimeouts {
    fn default() -> Self {
        Self { wait_ms: 2000, prepare_ms: 600_000, move_ms: 3_600_000 }
    }
}

/// `[multicast]` of GROUP.toml; goes to every agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct MulticastConfig {
    /// Multicast address and port, one that nobody else in the rack uses.
    pub group: SocketAddr,
    /// Largest IP packet that every target host and the switch between them take, bytes.
    #[serde(default = "mtu")]
    pub mtu: u16,
    /// Least that a target host sends whatever is lost, Mbit/s.
    #[serde(default = "floor_mbit")]
    pub floor_mbit: u64,
    /// Most that a target host sends, Mbit/s; none: half of what its port is said to have.
    #[serde(default)]
    pub ceiling_mbit: Option<u64>,
}

impl MulticastConfig {
    /// Checks what serde cannot.
    pub fn check(&self) -> Result<(), Mistake> {
        let local = match self.group.ip() {
            // Administratively scoped (RFC 2365), and link-local to site-local: no router passes them on.
            IpAddr::V4(ip) => ip.octets()[0] == 239,
            IpAddr::V6(ip) => ip.octets()[0] == 0xff && (1..=5).contains(&(ip.octets()[1] & 15)),
        };
        if !local || self.group.port() == 0 {
            return Err(format!(
                "multicast.group = {:?}: give an address of 239.0.0.0/8, or of ff02::/16 to ff05::/16, and a port",
                self.group.to_string()
            ).into());
        }
        check_range("multicast.mtu", self.mtu.into(), 1280..=9000)?;
        check_range("multicast.floor_mbit", self.floor_mbit, 1..=MAX_MBIT)?;
        let most = self.ceiling_mbit.unwrap_or(MAX_MBIT);
        check_range("multicast.ceiling_mbit", most, self.floor_mbit..=MAX_MBIT)
    }
}

fn mtu() -> u16 {
    1500
}

fn floor_mbit() -> u64 {
    5
}

/// Whether `name` can name a group, host or VM: 1 to [`MAX_NAME`] of `a-z 0-9 - _ .`, so that it is safe in a file
/// name and on a terminal.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b))
}

/// A number of a file within its range.
pub(super) fn check_range(
    key: &str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<(), Mistake> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(format!("{key} is {value}: it must be {} to {}", range.start(), range.end()).into())
}
