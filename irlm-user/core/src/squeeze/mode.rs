//! What a group wants of compression, as its file says it.

use std::fmt;
use std::str::FromStr;

/// Levels of zstd that may be asked for; 0, zstd's name for its default, is not one of them.
pub const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;

/// What a group wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// While it gets more through, as hard as it does.
    #[default]
    Auto,
    /// Never.
    Off,
    /// What crosses the core link never, what target hosts pass on as [`Mode::Auto`] (decision
    /// 0006): for whoever compares what sharing alone saves.
    Forwarded,
    /// Always, at this zstd level.
    Level(i32),
}

impl Mode {
    /// For contents that a source host sends.
    #[must_use]
    pub fn across(self) -> Self {
        if self == Self::Forwarded { Self::Off } else { self }
    }

    /// For contents that a target host passes on.
    #[must_use]
    pub fn passed_on(self) -> Self {
        if self == Self::Forwarded { Self::Auto } else { self }
    }
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let level = |n: &str| n.parse().ok().filter(|n| *n != 0 && LEVELS.contains(n)).map(Self::Level);
        match s {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "forwarded" => Ok(Self::Forwarded),
            _ => s.strip_prefix("zstd:").and_then(level).ok_or_else(|| {
                let (least, most) = (LEVELS.start(), LEVELS.end());
                format!("compress = {s:?}: give \"auto\", \"off\", \"forwarded\" or \"zstd:N\" with N from {least} to {most}, but not 0")
            }),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Forwarded => f.write_str("forwarded"),
            Self::Level(n) => write!(f, "zstd:{n}"),
        }
    }
}

impl serde::Serialize for Mode {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Mode {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}
