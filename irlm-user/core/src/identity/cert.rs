//! What is read of an X.509 certificate: names, validity, what it may be used for. Signatures are checked elsewhere.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate, X509Name};

/// Largest certificate that is read, bytes of DER.
pub const MAX_CERT: usize = 16 << 10;
/// Most alternative names of one certificate.
pub const MAX_NAMES: usize = 64;
/// Longest single name, bytes; longer subjects are cut where they are shown.
pub const MAX_TEXT: usize = 512;

/// A certificate that is not read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CertError {
    /// Larger than [`MAX_CERT`].
    #[error("it has {0} bytes, and {MAX_CERT} are the most")]
    Size(usize),
    /// No X.509.
    #[error("it is no X.509 certificate")]
    Grammar,
    /// Bytes behind it.
    #[error("something follows it")]
    Trailing,
    /// More than [`MAX_NAMES`].
    #[error("it has more than {MAX_NAMES} names")]
    Names,
    /// A name with control characters, or one longer than [`MAX_TEXT`].
    #[error("one of its names is longer than {MAX_TEXT} bytes or cannot be printed")]
    Text,
}

/// What a certificate says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertFacts {
    /// Its subject, printable and at most [`MAX_TEXT`] bytes; may be empty.
    pub subject: String,
    /// The common name, if there is exactly one.
    pub common_name: Option<String>,
    /// Its issuer, as `subject`.
    pub issuer: String,
    /// Its serial number, hexadecimal.
    pub serial: String,
    /// DNS names, in lower case.
    pub dns: Vec<String>,
    /// URIs.
    pub uris: Vec<String>,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Valid from, Unix seconds.
    pub not_before: i64,
    /// Valid to, Unix seconds.
    pub not_after: i64,
    /// It may issue others.
    pub ca: bool,
    /// It may be a TLS server's (extended key usage).
    pub server: bool,
    /// It may be a TLS client's (extended key usage).
    pub client: bool,
}

impl CertFacts {
    /// Reads one certificate.
    ///
    /// # Errors
    /// If it is none, or is out of bounds.
    pub fn parse(der: &[u8]) -> Result<Self, CertError> {
        if der.len() > MAX_CERT {
            return Err(CertError::Size(der.len()));
        }
        let (rest, cert) = X509Certificate::from_der(der).map_err(|_| CertError::Grammar)?;
        if !rest.is_empty() {
            return Err(CertError::Trailing);
        }
        let usage = cert.extended_key_usage().map_err(|_| CertError::Grammar)?;
        let allows = |f: fn(&x509_parser::extensions::ExtendedKeyUsage<'_>) -> bool| {
            usage.as_ref().is_none_or(|u| u.value.any || f(u.value))
        };
        let mut facts = Self {
            subject: shown(cert.subject()),
            common_name: common_name(cert.subject())?,
            issuer: shown(cert.issuer()),
            serial: cert.raw_serial().iter().take(20).fold(String::new(), |mut out, b| {
                let _ = write!(out, "{b:02x}");
                out
            }),
            dns: Vec::new(),
            uris: Vec::new(),
            ips: Vec::new(),
            not_before: cert.validity().not_before.timestamp(),
            not_after: cert.validity().not_after.timestamp(),
            ca: cert.is_ca(),
            server: allows(|u| u.server_auth),
            client: allows(|u| u.client_auth),
        };
        if let Some(names) = cert.subject_alternative_name().map_err(|_| CertError::Grammar)? {
            facts.take_names(&names.value.general_names)?;
        }
        Ok(facts)
    }

    fn take_names(&mut self, names: &[GeneralName<'_>]) -> Result<(), CertError> {
        if names.len() > MAX_NAMES {
            return Err(CertError::Names);
        }
        for name in names {
            match name {
                GeneralName::DNSName(n) => self.dns.push(text(n)?.to_ascii_lowercase()),
                GeneralName::URI(n) => self.uris.push(text(n)?.to_owned()),
                GeneralName::IPAddress(bytes) => self.ips.push(address(bytes).ok_or(CertError::Grammar)?),
                GeneralName::Invalid(..) => return Err(CertError::Text),
                // Mail addresses and directory names give nobody a role.
                _ => {}
            }
        }
        Ok(())
    }

    /// For people: its subject, else its first name, else its number.
    #[must_use]
    pub fn who(&self) -> String {
        if !self.subject.is_empty() {
            return format!("{:?}", self.subject);
        }
        let first = self.uris.first().or_else(|| self.dns.first());
        first.map_or_else(|| format!("serial number {}", self.serial), |n| format!("{n:?}"))
    }

    /// For people: its alternative names, the first few.
    #[must_use]
    pub fn some_names(&self) -> String {
        const SHOWN: usize = 6;
        let all = self.uris.iter().chain(&self.dns).cloned().chain(self.ips.iter().map(ToString::to_string));
        let mut some: Vec<String> = all.take(SHOWN).collect();
        if some.is_empty() {
            some.push("it has none".into());
        }
        if self.uris.len() + self.dns.len() + self.ips.len() > SHOWN {
            some.push("…".into());
        }
        some.join(", ")
    }
}

/// A name that can be shown and compared as it is.
fn text(name: &str) -> Result<&str, CertError> {
    let good = name.len() <= MAX_TEXT && name.bytes().all(|b| (b' '..=b'~').contains(&b));
    if good { Ok(name) } else { Err(CertError::Text) }
}

fn common_name(subject: &X509Name<'_>) -> Result<Option<String>, CertError> {
    let mut all = subject.iter_common_name();
    match (all.next(), all.next()) {
        (Some(one), None) => match one.as_str() {
            Ok(name) if name.len() > MAX_TEXT || name.contains(char::is_control) => Err(CertError::Text),
            Ok(name) => Ok(Some(name.to_owned())),
            // In a character set of its own: no pattern can mean it.
            Err(_) => Ok(None),
        },
        _ => Ok(None),
    }
}

/// Printable, and cut.
fn shown(name: &X509Name<'_>) -> String {
    let mut out = String::new();
    for c in name.to_string().chars() {
        let start = out.len();
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() > MAX_TEXT {
            out.truncate(start);
            break;
        }
    }
    out
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}
