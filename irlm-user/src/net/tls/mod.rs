//! What TLS connections stand on: a directory of certificates in the layout that QEMU and libvirt use, made into
//! configurations that demand a certificate of the peer, replaced while connections stand, and watched for their expiry.
//!
//! TLS 1.3 only; no resumption and no early data, so that every connection checks the peer anew and no byte can be
//! replayed. A server believes a client whose certificate one of the CAs issued, for clients, and that is neither expired
//! nor revoked; who that client is and what it may do is said by [`peer_identity`] and `core::identity`. A client
//! believes a server on the same terms if its certificate also names the address or the name that was dialled
//! ([`server_name`]).

// What a peer would say of a certificate.
pub mod check;
// The handle that swaps them.
mod credentials;
// Files of one directory.
mod files;
// A small CA.
pub mod make;
// One set of certificates as configurations.
mod set;
// Who could exchange a file.
mod way;

/// Refuses a file in whose place others could put another one: one line that says where.
///
/// # Errors
/// The first directory or link on the way that others can change.
pub fn in_safe_place(path: &std::path::Path) -> Result<(), TlsError> {
    way::safe(path)
}

// Errors in words.
mod words;
// New files.
pub mod write;

pub use credentials::Credentials;
pub use files::{CA, CA_KEY, CLIENT, CLIENT_KEY, CRL, SERVER, SERVER_KEY, TlsError};
pub use set::{Expiry, Use, fingerprint};
pub use words::{day, why, why_io};

use crate::core::identity::{Identity, Mapping, NoIdentity, identify};
use rustls::CommonState;
use rustls::pki_types::ServerName;
use std::net::IpAddr;

/// Who is at the other end, once the handshake is complete (a server has no certificate of its client before).
///
/// # Errors
/// If its certificate gives no role here: say so to the log, count it, and end the connection.
pub fn peer_identity(tls: &CommonState, mapping: &Mapping) -> Result<Identity, NoIdentity> {
    let leaf = tls.peer_certificates().and_then(|chain| chain.first()).ok_or(NoIdentity::Absent)?;
    identify(leaf, mapping)
}

/// What the server's certificate must name: the DNS name that the configuration gives for it, else the address that is
/// dialled.
///
/// # Errors
/// If `name` is no DNS name.
pub fn server_name(addr: IpAddr, name: Option<&str>) -> Result<ServerName<'static>, TlsError> {
    match name {
        None => Ok(ServerName::IpAddress(addr.into())),
        Some(name) => ServerName::try_from(name.to_owned())
            .map_err(|_| TlsError::new(name, "is no DNS name that a certificate could have")),
    }
}

#[cfg(test)]
mod tests;
