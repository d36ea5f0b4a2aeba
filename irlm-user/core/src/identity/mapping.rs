//! `[roles]` of agent.toml: which names of certificates mean which role, for a PKI that knows nothing of IRLM.

use super::cert::CertFacts;
use super::role::{Role, Tenants, valid_host};
use serde::Deserialize;

/// Which field of a certificate a pattern is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Field {
    Dns,
    Uri,
    CommonName,
}

/// A name of a certificate: `dns:*.hosts.example.org`, `cn:Ann Operator`, `uri:spiffe://example.org/irlm/*`; without a
/// prefix a DNS name. One `*` may stand for letters, digits, `-` and `_`; never for a dot or a slash.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern {
    field: Field,
    before: String,
    /// What follows the star; none: there is no star.
    after: Option<String>,
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (field, rest) = match text.split_once(':') {
            Some(("dns", rest)) => (Field::Dns, rest.to_ascii_lowercase()),
            Some(("uri", rest)) => (Field::Uri, rest.to_owned()),
            Some(("cn", rest)) => (Field::CommonName, rest.to_owned()),
            Some(_) => {
                return Err(format!("{text:?}: a pattern begins with dns:, uri: or cn:, or is a DNS name"));
            }
            None => (Field::Dns, text.to_ascii_lowercase()),
        };
        if rest.is_empty() || rest == "*" {
            return Err(format!("{text:?} would be everybody: write more of the name"));
        }
        let (before, after) = match rest.split_once('*') {
            Some((_, after)) if after.contains('*') => {
                return Err(format!("{text:?}: only one * is allowed"));
            }
            Some((before, after)) => (before.to_owned(), Some(after.to_owned())),
            None => (rest, None),
        };
        Ok(Self { field, before, after })
    }
}

impl Pattern {
    /// The names of the certificate that it means, and what the star stands for in each.
    fn matches<'a>(&'a self, facts: &'a CertFacts) -> impl Iterator<Item = (&'a str, Option<&'a str>)> {
        let names = match self.field {
            Field::Dns => facts.dns.as_slice(),
            Field::Uri => facts.uris.as_slice(),
            Field::CommonName => facts.common_name.as_slice(),
        };
        names.iter().filter_map(|name| match &self.after {
            None => (*name == self.before).then_some((name.as_str(), None)),
            Some(after) => {
                let star = name.strip_prefix(&self.before)?.strip_suffix(after.as_str())?;
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
                (!star.is_empty() && star.bytes().all(plain)).then_some((name.as_str(), Some(star)))
            }
        })
    }

    /// Hosts that the certificate's names mean: what the star stands for, else the name's first label (of a URI: what
    /// follows its last slash).
    fn hosts<'a>(&'a self, facts: &'a CertFacts) -> impl Iterator<Item = String> {
        self.matches(facts).filter_map(|(name, star)| {
            let host = star.unwrap_or_else(|| match self.field {
                Field::Uri => name.rsplit('/').next().unwrap_or(name),
                Field::Dns | Field::CommonName => name.split('.').next().unwrap_or(name),
            });
            Some(host.to_ascii_lowercase()).filter(|h| valid_host(h))
        })
    }
}

/// A coordinator of some trust domains.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenanted {
    /// Who.
    pub name: Pattern,
    /// Labels, of which `"*"` alone means all.
    pub tenants: Vec<String>,
}

/// `[roles]`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mapping {
    /// Whether `irlm:` URIs count; `false` where others may have any URI certified.
    pub uris: bool,
    /// Who may ask for everything.
    pub operator: Vec<Pattern>,
    /// Who may move VMs of which trust domains.
    pub coordinator: Vec<Tenanted>,
    /// Who may look.
    pub viewer: Vec<Pattern>,
    /// Hosts.
    pub agent: Vec<Pattern>,
    /// Index servers.
    pub index: Vec<Pattern>,
}

impl Default for Mapping {
    /// URIs only.
    fn default() -> Self {
        Self {
            uris: true,
            operator: Vec::new(),
            coordinator: Vec::new(),
            viewer: Vec::new(),
            agent: Vec::new(),
            index: Vec::new(),
        }
    }
}

impl Mapping {
    /// Adds the roles that the certificate's names have here.
    pub(super) fn add_to(&self, facts: &CertFacts, roles: &mut Vec<Role>) {
        let any = |of: &[Pattern]| of.iter().any(|p| p.matches(facts).next().is_some());
        let mut add = |role: Role| {
            if !roles.contains(&role) {
                roles.push(role);
            }
        };
        if any(&self.operator) {
            add(Role::Operator);
        }
        for c in self.coordinator.iter().filter(|c| c.name.matches(facts).next().is_some()) {
            let all = c.tenants.len() == 1 && c.tenants[0] == "*";
            add(Role::Coordinator(if all { Tenants::All } else { Tenants::Listed(c.tenants.clone()) }));
        }
        if any(&self.viewer) {
            add(Role::Viewer);
        }
        self.agent.iter().flat_map(|p| p.hosts(facts)).for_each(|h| add(Role::Agent(h)));
        if any(&self.index) {
            add(Role::Index);
        }
    }
}
