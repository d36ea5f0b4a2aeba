//! Names that certificates are issued for: such as people read and programs compare, and none that could mean others.

use std::net::IpAddr;

/// Longest common name, characters (X.520's bound).
const MAX_COMMON: usize = 64;
/// Longest DNS name, and longest part of it between dots (RFC 1035, 2.3.4).
const MAX_DNS: (usize, usize) = (253, 63);
/// Of a name that is cited.
const CITED: usize = 80;

/// A name for which no certificate is issued.
#[derive(PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum BadName {
    /// Of a CA.
    #[error("--name {0:?}: give 1 to {MAX_COMMON} characters that can be printed")]
    Common(String),
    /// Of a host, by itself or beside its name.
    #[error(
        "{0} {1:?} is no DNS name, which a host's certificate must have: give 1 to {len} of a-z 0-9 - _ . with 1 to {part} \
         between dots, and no *",
        len = MAX_DNS.0, part = MAX_DNS.1
    )]
    Dns(&'static str, String),
    /// An address where a name belongs.
    #[error("--dns {0}: that is an address: give --ip {0}")]
    Address(IpAddr),
    /// All, and some.
    #[error("--tenant \"*\" means all tenants: give it alone, or list them without it")]
    AllAndSome,
}

fn cited(name: &str) -> String {
    name.chars().take(CITED).collect()
}

/// A CA's name, which only people read.
pub(super) fn common(name: &str) -> Result<(), BadName> {
    let printed = !name.trim().is_empty() && !name.contains(char::is_control);
    if printed && name.chars().count() <= MAX_COMMON { Ok(()) } else { Err(BadName::Common(cited(name))) }
}

/// A DNS name, as `option` gives it.
pub(super) fn dns(option: &'static str, name: &str) -> Result<(), BadName> {
    if let Ok(ip) = name.parse() {
        return Err(BadName::Address(ip));
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    let part = |p: &str| {
        (1..=MAX_DNS.1).contains(&p.len()) && p.bytes().all(plain) && !p.starts_with('-') && !p.ends_with('-')
    };
    let good = name.len() <= MAX_DNS.0 && name.split('.').all(part);
    if good { Ok(()) } else { Err(BadName::Dns(option, cited(name))) }
}

/// Labels of trust domains.
pub(super) fn tenants(labels: &[String]) -> Result<(), BadName> {
    let all = labels.iter().any(|t| t == "*");
    if all && labels.iter().any(|t| t != "*") { Err(BadName::AllAndSome) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_or_mean_others_are_refused_in_one_line() {
        let long = format!("{}.x", "a".repeat(64));
        let longer = ["a"; 128].join(".");
        for bad in [
            "",
            "*",
            "*.example.org",
            "a..b",
            ".a",
            "a.",
            "a b",
            "a\nb",
            "a/b",
            "-a",
            "a-",
            "é",
            &long,
            &longer,
        ] {
            let e = dns("--dns", bad).unwrap_err().to_string();
            assert!(e.starts_with("--dns \"") && e.contains("is no DNS name"), "{e}");
            assert!(!e.contains(char::is_control) && e.len() < 300, "{e}");
        }
        for good in ["s1", "s1.example.org", "rack_7", "S1", &"a".repeat(63), &["a"; 127].join(".")] {
            assert_eq!(dns("--dns", good), Ok(()), "{good}");
        }
        let e = dns("--dns", "10.1.0.11").unwrap_err().to_string();
        assert!(e.ends_with("give --ip 10.1.0.11"), "{e}");
        for bad in ["", " ", "a\u{1b}[31m", &"a".repeat(65)] {
            let e = common(bad).unwrap_err().to_string();
            assert!(e.starts_with("--name \"") && !e.contains(char::is_control), "{e}");
        }
        assert_eq!(common("Rack 7, Zürich"), Ok(()));
        let labels = |all: &[&str]| tenants(&all.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
        assert_eq!(labels(&["*", "shop"]), Err(BadName::AllAndSome));
        for good in [&[][..], &["*"], &["*", "*"], &["shop", ""]] {
            assert_eq!(labels(good), Ok(()));
        }
    }
}
