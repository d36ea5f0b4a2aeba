//! What QEMU says of itself and of its migration, as far as IRLM looks at it.

use serde_json::Value;

/// QEMU's version, from its greeting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// 7 of 7.2.22.
    pub major: u32,
    /// 2 of 7.2.22.
    pub minor: u32,
    /// 22 of 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something QEMU tells unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `STOP`, `RESUME`, `MIGRATION`, …
    pub name: String,
    /// Its arguments.
    pub data: Value,
    /// When it happened by QEMU's clock, in Unix nanoseconds (microsecond steps); 0 if QEMU could not tell.
    pub at_ns: u64,
}

impl Event {
    /// The status a `MIGRATION` event carries (only sent with the `events` capability).
    #[must_use]
    pub fn migration_status(&self) -> Option<MigrateStatus> {
        (self.name == "MIGRATION").then(|| MigrateStatus::parse(self.data["status"].as_str().unwrap_or("")))
    }
}

/// QEMU's migration states, as far as IRLM tells them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MigrateStatus {
    /// Never migrated since QEMU started (or the field is missing, as QEMU does then).
    None,
    /// Listening or connecting.
    Setup,
    /// Pages move, the guest runs.
    Active,
    /// Stopped, last pages to come (pause-before-switchover).
    PreSwitchover,
    /// Stopped, device state moves.
    Device,
    /// Over, and well.
    Completed,
    /// Over, and not well.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Any of the states of post-copy, COLO or later versions; `failing` of QEMU 11 is none that lasts.
    Other,
}

impl MigrateStatus {
    pub(super) fn parse(s: &str) -> Self {
        match s {
            "" | "none" => Self::None,
            "setup" | "wait-unplug" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            _ => Self::Other,
        }
    }

    /// Whether no further change comes by itself.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Whether one is under way.
    #[must_use]
    pub fn is_busy(self) -> bool {
        self != Self::None && !self.is_final()
    }
}

/// `query-migrate`, the fields IRLM uses; what QEMU leaves out is 0 or empty.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrateInfo {
    /// Where it stands.
    pub status: MigrateStatus,
    /// The same in QEMU's own word; `none` if there was none.
    pub word: String,
    /// Why this VM cannot be migrated at all, if it cannot.
    pub blocked: Vec<String>,
    /// Total time so far or in all, milliseconds.
    pub total_ms: u64,
    /// Downtime by the source's reckoning, milliseconds; only once completed.
    pub downtime_ms: Option<u64>,
    /// Downtime QEMU expects now, milliseconds; only while active.
    pub expected_downtime_ms: Option<u64>,
    /// Why it failed; QEMU 7.2 often leaves it empty.
    pub error_desc: Option<String>,
    /// Guest RAM in all, bytes.
    pub ram_total: u64,
    /// Guest RAM still to be sent, bytes, as of the last bitmap sync.
    pub ram_remaining: u64,
    /// Bytes sent so far (on all channels).
    pub transferred: u64,
    /// Pages sent as zero pages.
    pub zero_pages: u64,
    /// Pages sent in full.
    pub normal_pages: u64,
    /// Bitmap syncs so far: the number of rounds.
    pub sync_count: u64,
    /// The port of an `inet` socket-address: where a target with `tcp:…:0` really listens.
    pub listen_port: Option<u16>,
}

impl MigrateInfo {
    pub(super) fn parse(v: &Value) -> Self {
        let n = |v: &Value| v.as_u64().unwrap_or(0);
        let ram = &v["ram"];
        let port = v["socket-address"].as_array().and_then(|a| a.iter().find(|s| s["type"] == "inet"));
        let blocked = v["blocked-reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
        let word = v["status"].as_str().unwrap_or("none");
        Self {
            status: MigrateStatus::parse(word),
            word: word.to_owned(),
            blocked: blocked.iter().filter_map(|r| r.as_str().map(str::to_owned)).collect(),
            total_ms: n(&v["total-time"]),
            downtime_ms: v["downtime"].as_u64(),
            expected_downtime_ms: v["expected-downtime"].as_u64(),
            error_desc: v["error-desc"].as_str().map(str::to_owned),
            ram_total: n(&ram["total"]),
            ram_remaining: n(&ram["remaining"]),
            transferred: n(&ram["transferred"]),
            zero_pages: n(&ram["duplicate"]),
            normal_pages: n(&ram["normal"]),
            sync_count: n(&ram["dirty-sync-count"]),
            listen_port: port.and_then(|p| p["port"].as_str()).and_then(|p| p.parse().ok()),
        }
    }
}

/// `query-status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// Whether the guest's CPUs run.
    pub running: bool,
    /// QEMU's word: `running`, `paused`, `inmigrate`, `postmigrate`, …
    pub status: String,
}
