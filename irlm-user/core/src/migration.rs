//! When a VM is run at its target: after its last page has come, or before.

use std::fmt;
use std::str::FromStr;

/// How a group's VMs move, as far as whoever runs them can do it: stock QEMU is moved by pre-copy, whatever is asked
/// for, because its post-copy cannot be steered from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Migration {
    /// Rounds of pages while the VM runs at its source; it is stopped for the last one.
    #[default]
    PreCopy,
    /// The VM is stopped at once, runs at its target as soon as its state is there, and its pages follow.
    PostCopy,
    /// One round while the VM runs at its source, then [`Migration::PostCopy`] for what it wrote meanwhile.
    Hybrid,
}

const NAMES: [(&str, Migration); 3] =
    [("pre-copy", Migration::PreCopy), ("post-copy", Migration::PostCopy), ("hybrid", Migration::Hybrid)];

/// A way to move that there is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no migration {0:?}: pre-copy, post-copy, or hybrid")]
pub struct UnknownMigration(String);

impl fmt::Display for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, m)| m == self).map_or("", |(n, _)| n);
        f.write_str(name)
    }
}

impl FromStr for Migration {
    type Err = UnknownMigration;

    fn from_str(s: &str) -> Result<Self, UnknownMigration> {
        NAMES.iter().find(|(n, _)| *n == s).map(|(_, m)| *m).ok_or_else(|| UnknownMigration(s.to_owned()))
    }
}

impl serde::Serialize for Migration {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Migration {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        s.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, m) in NAMES {
            assert_eq!(m.to_string(), name);
            assert_eq!(name.parse(), Ok(m));
            assert_eq!(serde_json::from_str::<Migration>(&serde_json::to_string(&m).unwrap()).unwrap(), m);
        }
        let e = "postcopy".parse::<Migration>().unwrap_err();
        assert_eq!(e.to_string(), "no migration \"postcopy\": pre-copy, post-copy, or hybrid");
    }
}
