//! The policy file: TOML into `core::policy`'s checked values (docs/examples/policy.toml explains every key). The same
//! text is what `irlm policy set` sends, so that both go through one door.

use crate::control::config::{ConfigError, Mistake, from_toml, load_with};
use crate::core::policy::{Class, ClassDraft, Draft, Policy, Shaping};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use std::net::IpAddr;
use std::path::Path;

/// Longest policy text, bytes: it travels in one control line.
pub const MAX_TEXT: usize = 64 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    port: Port,
    #[serde(default)]
    class: Classes,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    #[serde(default)]
    shaping: Word,
    link_mbit: u64,
    #[serde(default)]
    others_mbit: u64,
    #[serde(default)]
    rack_prefixes: Vec<Prefix>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Off,
    #[default]
    Own,
    TakeOver,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Classes {
    switchover: Option<OfClass>,
    demand: Option<OfClass>,
    control: Option<OfClass>,
    forward: Option<OfClass>,
    bulk: Option<OfClass>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OfClass {
    dscp: Option<Dscp>,
    min_mbit: Option<u64>,
    ceil_mbit: Option<u64>,
    mark: Option<u32>,
    priority: Option<ClassId>,
}

/// `46`, or `"keep"`.
struct Dscp(Option<u8>);

impl<'de> Deserialize<'de> for Dscp {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Dscp;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("0 to 63, or \"keep\" to leave each packet its own")
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<Dscp, E> {
                match u8::try_from(v) {
                    Ok(dscp @ 0..=63) => Ok(Dscp(Some(dscp))),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(v), &self)),
                }
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<Dscp, E> {
                match v {
                    "keep" => Ok(Dscp(None)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(v), &self)),
                }
            }
        }
        d.deserialize_any(Reader)
    }
}

/// `"1:10"`, as `tc` writes it: hexadecimal.
struct ClassId(u32);

impl<'de> Deserialize<'de> for ClassId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        let half = |h: &str| u16::from_str_radix(h, 16).ok();
        s.split_once(':')
            .and_then(|(major, minor)| Some(u32::from(half(major)?) << 16 | u32::from(half(minor)?)))
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("priority {s:?} is no class id such as \"1:10\"")))
    }
}

/// `"10.77.1.0/24"`.
struct Prefix(IpAddr, u8);

impl<'de> Deserialize<'de> for Prefix {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let s = String::deserialize(d)?;
        s.split_once('/')
            .and_then(|(addr, len)| Some(Self(addr.parse().ok()?, len.parse().ok()?)))
            .ok_or_else(|| de::Error::custom(format!("{s:?} is no prefix such as \"10.77.1.0/24\"")))
    }
}

/// Reads and checks the text of a policy file.
pub fn parse(text: &str) -> Result<Policy, Mistake> {
    if text.len() > MAX_TEXT {
        return Err(format!("{} bytes are too long for a policy (at most {MAX_TEXT})", text.len()).into());
    }
    let f: File = from_toml(text)?;
    let c = f.class;
    let said = [
        (Class::Switchover, c.switchover),
        (Class::Demand, c.demand),
        (Class::Control, c.control),
        (Class::Forward, c.forward),
        (Class::Bulk, c.bulk),
    ];
    let class = |(class, c): (Class, Option<OfClass>)| {
        let c = c?;
        let draft = ClassDraft {
            dscp: c.dscp.map(|d| d.0),
            min_mbit: c.min_mbit,
            ceil_mbit: c.ceil_mbit,
            mark: c.mark,
            priority: c.priority.map(|p| p.0),
        };
        Some((class, draft))
    };
    let draft = Draft {
        shaping: match f.port.shaping {
            Word::Off => Shaping::Off,
            Word::Own => Shaping::Own,
            Word::TakeOver => Shaping::TakeOver,
        },
        link_mbit: f.port.link_mbit,
        others_mbit: f.port.others_mbit,
        rack_prefixes: f.port.rack_prefixes.into_iter().map(|p| (p.0, p.1)).collect(),
        classes: said.into_iter().filter_map(class).collect(),
    };
    Policy::new(&draft).map_err(|e| e.to_string().into())
}

/// Reads and checks a policy file; gives its text too.
pub fn load(file: &Path) -> Result<(Policy, String), ConfigError> {
    load_with(file, |text| parse(text).map(|p| (p, text.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../docs/examples/policy.toml");

    #[test]
    fn the_example_is_valid_and_shows_the_defaults() {
        let shown = parse(EXAMPLE).unwrap();
        let least = "[port]\nlink_mbit = 10000\nothers_mbit = 3000\nrack_prefixes = [\"10.1.0.0/24\"]";
        assert_eq!(shown, parse(least).unwrap());
        let table = format!("{shown:?}");
        assert_eq!(shown.shaping, Shaping::Own, "{table}");
    }

    #[test]
    fn each_mistake_has_one_line_that_names_it() {
        let cases = [
            ("link_mbit = 10000", "", "link_mbit"),
            ("link_mbit = 10000", "link_mbit = -1", "line"),
            ("shaping = \"own\"", "shaping = \"mine\"", "mine"),
            ("others_mbit = 3000", "others_mbit = 9999", "leaves nothing for migration"),
            ("others_mbit = 3000", "other_mbit = 3000", "other_mbit"),
            ("\"10.1.0.0/24\"", "\"10.1.0.0\"", "no prefix such as"),
            ("\"10.1.0.0/24\"", "\"10.1.0.1/24\"", "bits after the first 24"),
            ("dscp = 46", "dscp = 64", "0 to 63"),
            ("dscp = 46", "dscp = \"ef\"", "keep"),
            ("[class.demand]", "[class.urgent]", "urgent"),
        ];
        for (good, bad, want) in cases {
            assert!(EXAMPLE.contains(good), "{good} is not in the example");
            let e = parse(&EXAMPLE.replacen(good, bad, 1)).unwrap_err();
            assert!(e.0.contains(want) && !e.0.contains('\n'), "{bad}: {e}");
        }
        let e = parse("[port]\nlink_mbit = 10\n[class.bulk]\npriority = \"10\"").unwrap_err();
        assert!(e.0.contains("class id such as"), "{e}");
        let p = parse("[port]\nlink_mbit = 10\n[class.bulk]\npriority = \"1:a0\"\ndscp = \"keep\"").unwrap();
        assert_eq!((p.class(Class::Bulk).priority, p.class(Class::Bulk).dscp), (Some(0x1_00a0), None));
        assert!(parse(&" ".repeat(MAX_TEXT + 1)).unwrap_err().0.contains("too long"));
    }
}
