//! Why a handshake failed, in words that name what to do: the same for both sides, about "it", the peer.

use rustls::{AlertDescription, CertificateError, Error};
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
        Error::PeerIncompatible(what) => format!("it does not speak TLS 1.3 as this side does ({what:?})"),
        Error::InvalidMessage(what) => {
            format!("it does not speak TLS ({what:?}): is one side set to plain text?")
        }
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
            let names = if presented.is_empty() { "nobody".to_owned() } else { presented.join(", ") };
            format!("its certificate is not that of {}; it names {names}", expected.to_str())
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "its certificate may not be used on that side of a connection (extended key usage)".to_owned()
        }
        e => format!("its certificate is not usable: {e}"),
    }
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
            return format!("it ends the handshake ({alert:?}): its log says why");
        }
        other => return format!("it ends the connection ({other:?})"),
    };
    format!("it refuses this side's certificate: {what}")
}
