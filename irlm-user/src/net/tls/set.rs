//! One set of certificates, checked as a whole, as configurations for both sides.

use super::files::{self, CA, CLIENT, CLIENT_KEY, CRL, SERVER, SERVER_KEY, TlsError};
use super::way;
use super::words::{certificate, day, lists};
use crate::core::identity::CertFacts;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, Error, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

/// Which sides of connections a program needs certificates for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// It takes connections: an index.
    Server,
    /// It makes connections: a command.
    Client,
    /// Both: an agent.
    Both,
}

impl Use {
    fn server(self) -> bool {
        self != Self::Client
    }

    fn client(self) -> bool {
        self != Self::Server
    }

    /// What is read for it.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Server => &[CA, CRL, SERVER, SERVER_KEY],
            Self::Client => &[CA, CRL, CLIENT, CLIENT_KEY],
            Self::Both => &[CA, CRL, SERVER, SERVER_KEY, CLIENT, CLIENT_KEY],
        }
    }
}

/// Until when one certificate can be used.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Expiry {
    /// Its file's name in the directory.
    pub file: String,
    /// Its subject.
    pub subject: String,
    /// Valid to, Unix seconds.
    pub not_after: i64,
    /// [`fingerprint`].
    pub fingerprint: String,
}

/// SHA-256 of a certificate's DER, hexadecimal.
#[must_use]
pub fn fingerprint(der: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, der);
    digest.as_ref().iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// A set that was found good.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) server: Option<Arc<ServerConfig>>,
    pub(super) client: Option<Arc<ClientConfig>>,
    /// What this host shows to those it calls.
    pub(super) client_leaf: Option<CertificateDer<'static>>,
    /// How many revocation lists it has.
    pub(super) lists: usize,
    /// Its certificates; of chains only the first.
    pub(super) expiry: Vec<Expiry>,
    /// What is worth a look, a line each.
    pub(super) remarks: Vec<String>,
    /// When what it is made of changes by the clock alone, Unix seconds.
    pub(super) redo_at: Option<i64>,
}

/// What certificates are checked against.
struct Trust {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    now: UnixTime,
}

/// The suites of TLS 1.3, the one that costs least first; each is far beyond what anybody breaks.
fn provider() -> CryptoProvider {
    use rustls::crypto::ring::{cipher_suite as suites, default_provider};
    let cipher_suites = vec![
        suites::TLS13_AES_128_GCM_SHA256,
        suites::TLS13_AES_256_GCM_SHA384,
        suites::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..default_provider() }
}

impl Set {
    /// Reads and checks the directory as of `now`.
    pub(super) fn load(dir: &Path, wants: Use, now: UnixTime) -> Result<Self, TlsError> {
        wants.files().iter().try_for_each(|name| way::safe(&dir.join(name)))?;
        let provider = Arc::new(provider());
        let mut set = Self {
            server: None,
            client: None,
            client_leaf: None,
            lists: 0,
            expiry: vec![],
            remarks: vec![],
            redo_at: None,
        };
        let roots = set.take_roots(&dir.join(CA), now)?;
        let crls = files::lists(&dir.join(CRL))?;
        set.lists = crls.len();
        let trust = Trust { provider, roots: Arc::new(roots), crls, now };
        let clients = trust.client_verifier(dir)?;
        if wants.server() {
            let (chain, key) = trust.pair(dir, SERVER, SERVER_KEY, &mut set.expiry)?;
            trust.check_server(dir, &chain)?;
            set.server = Some(trust.server_config(dir, Arc::clone(&clients), chain, key)?);
        }
        if wants.client() {
            let (chain, key) = trust.pair(dir, CLIENT, CLIENT_KEY, &mut set.expiry)?;
            let checked = clients.verify_client_cert(&chain[0], &chain[1..], now);
            checked.map_err(|e| own(&dir.join(CLIENT), &e))?;
            set.client_leaf = chain.first().cloned();
            set.client = Some(trust.client_config(dir, chain, key)?);
        }
        Ok(set)
    }

    /// The CAs that are believed now. Nobody would look at their own validity afterwards: a trust anchor is a name and a key.
    fn take_roots(&mut self, path: &Path, now: UnixTime) -> Result<RootCertStore, TlsError> {
        let fail = |what: String| TlsError::new(path, what);
        let certs = files::certificates(path)?.ok_or_else(|| {
            fail("is not there: put the CA's certificate there (`irlm cert init` makes a CA)".into())
        })?;
        let now = now.as_secs().cast_signed();
        let mut roots = RootCertStore::empty();
        for (n, der) in certs.into_iter().enumerate() {
            let nth = n + 1;
            let facts = CertFacts::parse(&der).map_err(|e| fail(format!("certificate {nth}: {e}")))?;
            if !facts.ca {
                return Err(fail(format!("certificate {nth} ({}) is not a CA's", facts.who())));
            }
            self.expiry.push(expiry(CA, &facts, &der));
            if now > facts.not_after || now < facts.not_before {
                self.remarks.push(format!(
                    "{}: the CA {} is not believed: it is valid from {} to {}",
                    path.display(),
                    facts.who(),
                    day(facts.not_before),
                    day(facts.not_after)
                ));
            } else {
                roots.add(der).map_err(|e| fail(format!("certificate {nth}: {e}")))?;
            }
            let changes = [facts.not_before, facts.not_after + 1];
            self.redo_at = changes.into_iter().filter(|at| *at > now).chain(self.redo_at).min();
        }
        if roots.is_empty() {
            return Err(fail("no CA in it is valid today: add the certificate of one that is".into()));
        }
        Ok(roots)
    }
}

impl Trust {
    fn client_verifier(&self, dir: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let builder =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider));
        // A CA that has published no list has revoked nothing.
        let builder = builder.with_crls(self.crls.clone()).allow_unknown_revocation_status();
        builder.build().map_err(|e| TlsError::new(dir.join(CRL), lists(&e)))
    }

    /// A certificate, what leads from it to its CA, and its key.
    fn pair(
        &self,
        dir: &Path,
        cert: &'static str,
        key: &str,
        seen: &mut Vec<Expiry>,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let path = dir.join(cert);
        let fail = |what: String| TlsError::new(&path, what);
        let missing = |name: &str| {
            TlsError::new(dir.join(name), "is not there: `irlm cert issue` makes it, or your own CA")
        };
        let chain = files::certificates(&path)?.ok_or_else(|| missing(cert))?;
        let private = files::key(&dir.join(key))?.ok_or_else(|| missing(key))?;
        let leaf = chain.first().ok_or_else(|| fail("holds no certificate".into()))?;
        let facts = CertFacts::parse(leaf).map_err(|e| fail(e.to_string()))?;
        let now = self.now.as_secs().cast_signed();
        if now > facts.not_after {
            return Err(fail(format!("expired on {}: issue a new one", day(facts.not_after))));
        }
        if now < facts.not_before {
            let what = format!("is valid from {} on: look at this host's clock", day(facts.not_before));
            return Err(fail(what));
        }
        if facts.ca {
            return Err(fail("is a CA's: put the host's own certificate first".into()));
        }
        let signer = self.provider.key_provider.load_private_key(private.clone_key());
        let signer = signer.map_err(|e| TlsError::new(dir.join(key), format!("cannot be used: {e}")))?;
        match rustls::sign::CertifiedKey::new(chain.clone(), signer).keys_match() {
            Ok(()) | Err(Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
            Err(_) => return Err(fail(format!("does not belong to {key}: put both of one issue there"))),
        }
        seen.push(expiry(cert, &facts, leaf));
        Ok((chain, private))
    }

    /// How servers are checked.
    fn server_verifier(&self, dir: &Path) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
        let builder =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider));
        let builder = builder.with_crls(self.crls.clone()).allow_unknown_revocation_status();
        builder.build().map_err(|e| TlsError::new(dir.join(CRL), lists(&e)))
    }

    /// Whether others with the same CAs and lists would believe this server, by whatever name they call it.
    fn check_server(&self, dir: &Path, chain: &[CertificateDer<'static>]) -> Result<(), TlsError> {
        // Which names it has is looked at last, and nobody has this address.
        let nobody = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        let verifier = self.server_verifier(dir)?;
        match verifier.verify_server_cert(&chain[0], &chain[1..], &nobody, &[], self.now) {
            Ok(_) => Ok(()),
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            Err(e) => Err(own(&dir.join(SERVER), &e)),
        }
    }

    fn server_config(
        &self,
        dir: &Path,
        clients: Arc<dyn ClientCertVerifier>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Arc<ServerConfig>, TlsError> {
        let fail = |e: Error| TlsError::new(dir.join(SERVER), e.to_string());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.provider));
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(fail)?;
        let mut config =
            builder.with_client_cert_verifier(clients).with_single_cert(chain, key).map_err(fail)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Arc::new(config))
    }

    fn client_config(
        &self,
        dir: &Path,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Arc<ClientConfig>, TlsError> {
        let fail = |e: Error| TlsError::new(dir.join(CLIENT), e.to_string());
        let servers = self.server_verifier(dir)?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider));
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(fail)?;
        let mut config =
            builder.with_webpki_verifier(servers).with_client_auth_cert(chain, key).map_err(fail)?;
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        // The name would cross the network in clear, and every port has one certificate.
        config.enable_sni = false;
        Ok(Arc::new(config))
    }
}

fn expiry(file: &str, facts: &CertFacts, der: &[u8]) -> Expiry {
    Expiry {
        file: file.to_owned(),
        subject: facts.subject.clone(),
        not_after: facts.not_after,
        fingerprint: fingerprint(der),
    }
}

/// What a peer would say of this host's own certificate.
fn own(path: &Path, e: &Error) -> TlsError {
    let what = match e {
        Error::InvalidCertificate(e) => certificate(e),
        e => e.to_string(),
    };
    TlsError::new(path, format!("no peer would take it: {what}"))
}
