//! Roles as URIs in a certificate: `irlm:ROLE/NAME`, a coordinator's with `?tenant=LABEL&tenant=LABEL`.
//!
//! A path without an authority (RFC 3986, 3.3 `path-rootless`): RFC 5280, 4.2.1.6 wants a domain name or an address in an
//! authority, and a role is neither.

use super::role::{MAX_TENANT_NAME, MAX_TENANTS, Role, Tenants, valid_host, valid_person};
use std::fmt::{self, Write as _};

/// What such a URI begins with. Schemes do not know case.
pub const SCHEME: &str = "irlm:";
/// In place of a list of labels: all of them. A label that is a star is written `%2A`.
const ALL: &str = "*";

/// A URI of ours that says nothing usable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UriError {
    /// Of another scheme.
    #[error("it does not begin with {SCHEME}")]
    Scheme,
    /// Not `ROLE/NAME`.
    #[error("it is not irlm:ROLE/NAME")]
    Form,
    /// None of the five.
    #[error("the role is none of operator, coordinator, viewer, agent, index")]
    Role,
    /// A name that is not allowed.
    #[error("the name is not 1 to 64 of letters, digits, - _ . @ (of an agent and an index: a-z 0-9 - _ .)")]
    Name,
    /// Something behind `?` or `#` that has no meaning.
    #[error("only a coordinator has ?tenant=LABEL&tenant=LABEL")]
    Query,
    /// A list of trust domains that is empty or not allowed.
    #[error("a coordinator lists 1 to 32 tenants, each of at most 64 bytes, or tenant=* alone")]
    Tenants,
}

/// Whether the URI makes a claim in our words.
pub(super) fn is_ours(uri: &str) -> bool {
    uri.get(..SCHEME.len()).is_some_and(|s| s.eq_ignore_ascii_case(SCHEME))
}

/// One role, and the name it goes with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RoleUri {
    /// The role.
    pub role: Role,
    /// The name; an agent's is its host's.
    pub name: String,
}

impl RoleUri {
    /// With a checked name and list.
    ///
    /// # Errors
    /// If the name or a label cannot be written so.
    pub fn new(role: Role, name: &str) -> Result<Self, UriError> {
        let good = match &role {
            Role::Agent(host) => host == name && valid_host(name),
            Role::Index => valid_host(name),
            Role::Operator | Role::Viewer | Role::Coordinator(_) => valid_person(name),
        };
        if !good {
            return Err(UriError::Name);
        }
        if let Role::Coordinator(Tenants::Listed(list)) = &role {
            let fits = list.iter().all(|t| t.len() <= MAX_TENANT_NAME && !t.contains(char::is_control));
            if !(1..=MAX_TENANTS).contains(&list.len()) || !fits {
                return Err(UriError::Tenants);
            }
        }
        Ok(Self { role, name: name.to_owned() })
    }

    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(uri: &str) -> Result<Self, UriError> {
        if !is_ours(uri) {
            return Err(UriError::Scheme);
        }
        let rest = &uri[SCHEME.len()..];
        if rest.contains('#') {
            return Err(UriError::Query);
        }
        let (path, query) = rest.split_once('?').map_or((rest, None), |(p, q)| (p, Some(q)));
        let (role, name) = path.split_once('/').ok_or(UriError::Form)?;
        let role = match role {
            "operator" => Role::Operator,
            "viewer" => Role::Viewer,
            "index" => Role::Index,
            "agent" => Role::Agent(name.to_owned()),
            "coordinator" => Role::Coordinator(tenants(query.unwrap_or_default())?),
            _ => return Err(UriError::Role),
        };
        if query.is_some() && !matches!(role, Role::Coordinator(_)) {
            return Err(UriError::Query);
        }
        Self::new(role, name)
    }
}

impl fmt::Display for RoleUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role.name(), self.name)?;
        match &self.role {
            Role::Coordinator(Tenants::All) => write!(f, "?tenant={ALL}"),
            Role::Coordinator(Tenants::Listed(list)) => {
                for (i, label) in list.iter().enumerate() {
                    f.write_char(if i == 0 { '?' } else { '&' })?;
                    f.write_str("tenant=")?;
                    write_escaped(f, label)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// RFC 3986, 2.3: these stand for themselves.
fn unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"-._~".contains(&b)
}

fn write_escaped(f: &mut fmt::Formatter<'_>, label: &str) -> fmt::Result {
    for b in label.bytes() {
        if unreserved(b) {
            f.write_char(char::from(b))?;
        } else {
            write!(f, "%{b:02X}")?;
        }
    }
    Ok(())
}

fn unescaped(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        out.push(match b {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b if unreserved(b) => b,
            _ => return None,
        });
    }
    String::from_utf8(out).ok()
}

fn tenants(query: &str) -> Result<Tenants, UriError> {
    let mut list = Vec::new();
    for part in query.split('&') {
        let value = part.strip_prefix("tenant=").ok_or(UriError::Tenants)?;
        if value == ALL && query == part {
            return Ok(Tenants::All);
        }
        if list.len() == MAX_TENANTS {
            return Err(UriError::Tenants);
        }
        list.push(unescaped(value).ok_or(UriError::Tenants)?);
    }
    Ok(Tenants::Listed(list))
}
