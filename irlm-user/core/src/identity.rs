//! Who a peer is, by its certificate, and what it may ask for. A certificate says so itself by URIs (`irlm:operator/ann`),
//! or its names are mapped by patterns of agent.toml, for a PKI that knows nothing of IRLM (docs/identity.md).
//! Whether the certificate can be believed is decided before, by TLS.

// What is read of a certificate.
mod cert;
// Who may ask for what.
mod may;
// Names that are mapped to roles.
mod mapping;
// Roles and identities.
mod role;
// Roles as URIs.
mod uri;

pub use cert::{CertError, CertFacts, MAX_CERT, MAX_NAMES, MAX_TEXT};
pub use mapping::{Mapping, Pattern, Tenanted};
pub use may::{Ask, Refused, Subject, may};
pub use role::{Identity, MAX_HOST_NAME, MAX_PERSON_NAME, MAX_TENANT_NAME, MAX_TENANTS, Role, Tenants};
pub use uri::{RoleUri, SCHEME, UriError};

/// A certificate that gives its owner no role here.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoIdentity {
    /// There is none.
    #[error("it shows no certificate")]
    Absent,
    /// It cannot be read.
    #[error("its certificate cannot be read: {0}")]
    Cert(#[from] CertError),
    /// It makes a claim in IRLM's words that cannot be read.
    #[error("the certificate of {who} claims {claim:?}: {why}")]
    Claim {
        /// Its subject.
        who: String,
        /// The URI.
        claim: String,
        /// What is wrong.
        why: UriError,
    },
    /// Nobody here knows its names.
    #[error(
        "the certificate of {who} gives no role here: issue it with an {SCHEME} URI, or map one of its names ({names}) in \
         [roles]"
    )]
    NoRole {
        /// Its subject.
        who: String,
        /// Its names, the first few.
        names: String,
    },
}

/// Who the owner of a certificate is.
///
/// # Errors
/// If the certificate cannot be read, makes a claim that cannot be read, or gives no role.
pub fn identify(der: &[u8], mapping: &Mapping) -> Result<Identity, NoIdentity> {
    let facts = CertFacts::parse(der)?;
    let mut roles = Vec::new();
    let mut name = None;
    for text in facts.uris.iter().filter(|u| mapping.uris && uri::is_ours(u)) {
        let found = RoleUri::parse(text).map_err(|why| NoIdentity::Claim {
            who: facts.who(),
            claim: text.clone(),
            why,
        })?;
        name.get_or_insert(found.name);
        roles.push(found.role);
    }
    mapping.add_to(&facts, &mut roles);
    if roles.is_empty() {
        return Err(NoIdentity::NoRole { who: facts.who(), names: facts.some_names() });
    }
    Ok(Identity { name: name.unwrap_or_else(|| facts.who()), roles })
}

#[cfg(test)]
mod tests;
