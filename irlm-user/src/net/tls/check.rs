//! Looking at certificates: whether a CA's key is its own, and what a peer that believes some CAs would say of a
//! certificate.

use super::files::{self, TlsError};
use super::way;
use super::words::{certificate, day};
use crate::core::identity::CertFacts;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{Error, RootCertStore};
use std::path::Path;
use std::sync::Arc;

/// The certificates of a file, one or more.
///
/// # Errors
/// If it is missing, damaged, too large, or could be changed by others.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    files::certificates(path)?.ok_or_else(|| TlsError::new(path, "is not there"))
}

/// The certificate of a CA among `certs`, and its key's text.
///
/// # Errors
/// If the key is missing, not safe, or none of them has it.
pub fn authority(
    certs: &[CertificateDer<'static>],
    key_path: &Path,
) -> Result<(CertificateDer<'static>, String), TlsError> {
    let fail = |what: String| TlsError::new(key_path, what);
    way::safe(key_path)?;
    let text =
        files::key_text(key_path)?.ok_or_else(|| fail("is not there: `irlm cert init` makes a CA".into()))?;
    let key = PrivateKeyDer::from_pem_slice(text.as_bytes());
    let key = key.map_err(|_| fail("holds no private key in PEM form that is not encrypted".into()))?;
    let provider = rustls::crypto::ring::default_provider();
    let key =
        provider.key_provider.load_private_key(key).map_err(|e| fail(format!("cannot be used: {e}")))?;
    let own = |cert: &&CertificateDer<'static>| {
        CertifiedKey::new(vec![(*cert).clone()], Arc::clone(&key)).keys_match().is_ok()
    };
    match certs.iter().find(own) {
        Some(cert) => Ok((cert.clone(), text)),
        None => Err(fail(format!("is the key of no certificate in {} beside it", files::CA))),
    }
}

/// Why a peer would not take a certificate, in words about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotTaken(pub String);

/// Whether a peer that believes the CAs among `cas` would take a chain, on either side of a connection, as of `now`.
///
/// # Errors
/// What it would say.
pub fn verdict(
    chain: &[CertificateDer<'static>],
    cas: &[CertificateDer<'static>],
    now: UnixTime,
) -> Result<(), NotTaken> {
    let not = |why: String| Err(NotTaken(why));
    let leaf = chain.first().ok_or_else(|| NotTaken("there is no certificate".into()))?;
    let facts = CertFacts::parse(leaf).map_err(|e| NotTaken(e.to_string()))?;
    let seconds = now.as_secs().cast_signed();
    if seconds > facts.not_after {
        return not(format!("it expired on {}", day(facts.not_after)));
    }
    if seconds < facts.not_before {
        return not(format!("it is valid from {} on", day(facts.not_before)));
    }
    if facts.ca {
        return if cas.contains(leaf) { Ok(()) } else { not("it is a CA that is not believed here".into()) };
    }
    let mut roots = RootCertStore::empty();
    let believed = |der: &CertificateDer<'_>| {
        CertFacts::parse(der).is_ok_and(|f| f.ca && (f.not_before..=f.not_after).contains(&seconds))
    };
    cas.iter().filter(|der| believed(der)).cloned().for_each(|der| {
        let _ = roots.add(der);
    });
    if roots.is_empty() {
        return not("there is no valid CA to compare it with".into());
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::ring::default_provider()));
    let words = |e: Error| match e {
        Error::InvalidCertificate(e) => NotTaken(certificate(&e)),
        e => NotTaken(e.to_string()),
    };
    if facts.server {
        let parsed = ParsedCertificate::try_from(leaf).map_err(words)?;
        let algorithms = provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &roots, &chain[1..], now, algorithms)
            .map_err(words)?;
    }
    if facts.client {
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        let clients = clients.map_err(|e| NotTaken(e.to_string()))?;
        clients.verify_client_cert(leaf, &chain[1..], now).map_err(words)?;
    }
    if facts.server || facts.client {
        return Ok(());
    }
    not("it may be used on neither side of a connection (extended key usage)".into())
}
