//! Why a handshake failed, in words that name what to do: the same for both sides, about "it", the peer.

use rustls::server::VerifierBuilderError;
use rustls::{AlertDescription, CertRevocationListError, CertificateError, Error};
use std::io;
use time::OffsetDateTime;

/// A moment, Unix seconds, for people; to the minute.
#[must_use]
pub fn day(unix: i64) -> String {
    match OffsetDateTime::from_unix_timestamp(unix) {
        Ok(t) => format!(
            "{:04}-{:02}-{:02} {:02}:{:02} UTC",
            t.year(),
            u8::from(t.month()),
            t.day(),
            t.hour(),
            t.minute()
        ),
        Err(_) => format!("second {unix}"),
    }
}

fn seconds(t: rustls::pki_types::UnixTime) -> String {
    day(i64::try_from(t.as_secs()).unwrap_or(i64::MAX))
}

/// Why a connection could not be made safe, about the peer.
#[must_use]
pub fn why(e: &Error) -> String {
    match e {
        Error::InvalidCertificate(e) => certificate(e),
        Error::NoCertificatesPresented => {
            "it shows no certificate: give it client-cert.pem and client-key.pem".to_owned()
        }
        Error::AlertReceived(alert) => refused(*alert),
        Error::PeerIncompatible(what) => {
            format!("it does not speak TLS 1.3 as this side does ({})", spaced(&format!("{what:?}")))
        }
        Error::InvalidMessage(_) => "it does not speak TLS: is one side set to plain text?".to_owned(),
        Error::DecryptError => "bytes on the way were changed".to_owned(),
        e => e.to_string(),
    }
}

/// As [`why`], of an error of a stream; `None` if the connection itself broke.
#[must_use]
pub fn why_io(e: &io::Error) -> Option<String> {
    e.get_ref()?.downcast_ref::<Error>().map(why)
}

pub(super) fn certificate(e: &CertificateError) -> String {
    use CertificateError as C;
    match e {
        C::ExpiredContext { not_after, .. } => {
            format!("its certificate expired on {}: issue a new one", seconds(*not_after))
        }
        C::NotValidYetContext { not_before, .. } => {
            format!("its certificate is valid from {} on: compare the clocks", seconds(*not_before))
        }
        C::UnknownIssuer | C::BadSignature => {
            "its certificate was issued by somebody else than the CAs in ca-cert.pem".to_owned()
        }
        C::Revoked => "its certificate has been revoked (ca-crl.pem)".to_owned(),
        C::NotValidForNameContext { expected, presented } => {
            let names: Vec<String> = presented.iter().map(|n| name(n)).collect();
            let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
            format!("its certificate is not that of {}; it names {names}", expected.to_str())
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "its certificate may not be used on that side of a connection (extended key usage)".to_owned()
        }
        C::BadEncoding => "its certificate is damaged".to_owned(),
        C::Other(e) => format!("its certificate is not usable ({})", spaced(&e.to_string())),
        e => format!("its certificate is not usable ({})", spaced(&format!("{e:?}"))),
    }
}

/// A name of a certificate, of which the library says also of which kind it is: `DnsName("s1")`, `IpAddress(10.1.0.1)`.
/// Whoever made the certificate chose its bytes.
fn name(said: &str) -> String {
    let plain = |n: &str| n.escape_default().to_string();
    let inner = said.split_once('(').and_then(|(kind, rest)| Some((kind, rest.strip_suffix(')')?)));
    match inner {
        Some(("DnsName" | "IpAddress" | "UniformResourceIdentifier", n)) => plain(n.trim_matches('"')),
        _ => "a name of another kind".to_owned(),
    }
}

/// A word of the library's, such as `PathLenConstraintViolated`, as people write it.
fn spaced(word: &str) -> String {
    let mut out = String::new();
    for c in word.chars().take_while(char::is_ascii_alphanumeric) {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push(' ');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// Why revocation lists cannot be used, and what to do.
pub(super) fn lists(e: &VerifierBuilderError) -> String {
    use CertRevocationListError as C;
    let what = match e {
        VerifierBuilderError::InvalidCrl(C::ParseError | C::Other(_)) => {
            "is damaged, or no X.509 revocation list".to_owned()
        }
        VerifierBuilderError::InvalidCrl(C::UnsupportedCrlVersion) => {
            "is a list of version 1, and 2 is wanted".to_owned()
        }
        VerifierBuilderError::InvalidCrl(C::UnsupportedDeltaCrl) => {
            "holds only the changes since another list".to_owned()
        }
        VerifierBuilderError::InvalidCrl(e) => format!("cannot be used ({})", spaced(&format!("{e:?}"))),
        e => format!("cannot be used ({})", spaced(&format!("{e:?}"))),
    };
    format!("{what}: put the CA's whole list there")
}

/// What the peer says of this side.
fn refused(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let what = match alert {
        A::CertificateExpired => "it has expired, or is not valid yet by its clock",
        A::UnknownCA | A::DecryptError => "it was issued by somebody else than its CAs",
        A::CertificateRevoked => "it has been revoked",
        A::CertificateRequired => "this side has shown none",
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate | A::AccessDenied => {
            "its log says why"
        }
        A::ProtocolVersion => return "it does not speak TLS 1.3".to_owned(),
        A::DecodeError | A::UnexpectedMessage | A::HandshakeFailure => {
            return "it ends the handshake: its log says why".to_owned();
        }
        other => return format!("it ends the connection (TLS alert {})", u8::from(other)),
    };
    format!("it refuses this side's certificate: {what}")
}
