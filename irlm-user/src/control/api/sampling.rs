//! The control protocol's words about how VMs write.

use crate::core::forecast::Writes;
use crate::host::dirty::Sampler;
use serde::{Deserialize, Serialize};

/// Longest observation that can be asked for, seconds.
pub const MAX_SECONDS: u32 = 60;

/// One sampler at an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerStatus {
    /// Which.
    pub sampler: Sampler,
    /// Its name for people.
    pub name: String,
    /// What it can and cannot see.
    pub sees: String,
    /// Why it is not in force; absent: it is, for VMs that no earlier one in the list sees.
    #[serde(default)]
    pub refused: Option<String>,
}

/// What was seen of one VM's writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmWrites {
    /// Its number in the group.
    pub ix: u16,
    /// By which sampler.
    pub sampler: Sampler,
    /// Why by none that sees more.
    #[serde(default)]
    pub note: String,
    /// How long it was watched.
    pub seconds: f64,
    /// Its writes.
    pub writes: Writes,
    /// Different pages seen dirtied meanwhile.
    pub distinct_pages: f64,
    /// Pages that were dirtied again and again.
    pub hot_pages: u64,
    /// Guest RAM, pages.
    pub ram_pages: u64,
    /// Of them such as may hold something else than zeros.
    pub data_pages: u64,
    /// Dirtyings seen by the kernel's programs, and of them those whose place was lost for want of room.
    pub seen: u64,
    /// See `seen`.
    pub lost: u64,
}

/// What an agent has seen of its VMs' writes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostWrites {
    /// Mbit/s that the host has towards the core link, if that is known.
    pub link_mbit: Option<u64>,
    /// The VMs that could be watched.
    pub vms: Vec<VmWrites>,
    /// Why others could not.
    pub problems: Vec<String>,
}
