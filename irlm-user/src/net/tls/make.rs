//! A small CA, for whoever has none: ECDSA P-256 keys, certificates that QEMU's `tls-creds-x509` takes as well.

use crate::core::identity::RoleUri;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use std::net::IpAddr;
use time::OffsetDateTime;

/// The extension `keyUsage` (2.5.29.15) with digitalSignature alone, not critical: QEMU 10.0.2 refuses a critical one
/// without keyEncipherment, which RFC 8813 does not allow for keys of this kind.
const KEY_USAGE: (&[u64], &[u8]) = (&[2, 5, 29, 15], &[0x03, 0x02, 0x07, 0x80]);

/// A certificate that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The library refuses.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// A name that no certificate can hold.
    #[error("{0:?} cannot be a name in a certificate")]
    Name(String),
    /// A moment that no certificate can hold.
    #[error("it would be valid to a day that cannot be written")]
    Time,
}

/// A certificate and its key, in PEM form.
#[derive(Clone)]
pub struct Pems {
    /// The certificate.
    pub cert: String,
    /// The key, PKCS #8.
    pub key: String,
}

impl std::fmt::Debug for Pems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pems").field("cert", &self.cert).finish_non_exhaustive()
    }
}

/// Which side of a connection a certificate is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// It takes connections.
    Server,
    /// It makes them.
    Client,
}

/// From when to when, Unix seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    /// The first second.
    pub from: i64,
    /// The last one.
    pub to: i64,
}

/// Whom a certificate is for.
#[derive(Clone, Debug)]
pub struct Holder<'a> {
    /// Common name.
    pub name: &'a str,
    /// DNS names.
    pub dns: &'a [String],
    /// Addresses.
    pub ips: &'a [IpAddr],
    /// Roles.
    pub roles: &'a [RoleUri],
}

/// A CA with its key.
#[derive(Debug)]
pub struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    /// Makes a CA that issues hosts' certificates, and no further CAs.
    ///
    /// # Errors
    /// If no key can be made, or the name or time cannot be written.
    pub fn create(name: &str, valid: Validity) -> Result<(Self, Pems), MakeError> {
        let key = KeyPair::generate()?;
        let mut params = params(name, valid)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pems = Pems { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() };
        Ok((Self(Issuer::new(params, key)), pems))
    }

    /// A CA that exists, also one that other programs made.
    ///
    /// # Errors
    /// If key or certificate cannot be read.
    pub fn open(cert: &CertificateDer<'_>, key_pem: &str) -> Result<Self, MakeError> {
        Ok(Self(Issuer::from_ca_cert_der(cert, KeyPair::from_pem(key_pem)?)?))
    }

    /// Issues a certificate with a key of its own.
    ///
    /// # Errors
    /// If a name or time cannot be written.
    pub fn issue(&self, holder: &Holder<'_>, side: Side, valid: Validity) -> Result<Pems, MakeError> {
        let key = KeyPair::generate()?;
        let mut params = params(holder.name, valid)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = vec![match side {
            Side::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Side::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.custom_extensions = vec![CustomExtension::from_oid_content(KEY_USAGE.0, KEY_USAGE.1.to_vec())];
        let name = |text: &str| text.try_into().map_err(|_| MakeError::Name(text.to_owned()));
        for dns in holder.dns {
            params.subject_alt_names.push(SanType::DnsName(name(dns)?));
        }
        params.subject_alt_names.extend(holder.ips.iter().copied().map(SanType::IpAddress));
        for role in holder.roles {
            params.subject_alt_names.push(SanType::URI(name(&role.to_string())?));
        }
        Ok(Pems { cert: params.signed_by(&key, &self.0)?.pem(), key: key.serialize_pem() })
    }
}

#[cfg(test)]
impl Authority {
    /// A list with these certificates of its own.
    pub(super) fn list(&self, revoked: &[CertificateDer<'_>], valid: Validity) -> Result<String, MakeError> {
        let at = |unix| OffsetDateTime::from_unix_timestamp(unix).map_err(|_| MakeError::Time);
        let mut list = rcgen::CertificateRevocationListParams {
            this_update: at(valid.from)?,
            next_update: at(valid.to)?,
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        for der in revoked {
            let hex = crate::core::identity::CertFacts::parse(der).map_err(|_| MakeError::Time)?.serial;
            let byte = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap_or_default();
            let serial_number = (0..hex.len()).step_by(2).map(byte).collect::<Vec<u8>>().into();
            let revocation_time = at(valid.from)?;
            let (reason_code, invalidity_date) = (None, None);
            list.revoked_certs.push(rcgen::RevokedCertParams {
                serial_number,
                revocation_time,
                reason_code,
                invalidity_date,
            });
        }
        Ok(list.signed_by(&self.0)?.pem()?)
    }
}

fn params(name: &str, valid: Validity) -> Result<CertificateParams, MakeError> {
    let at = |unix| OffsetDateTime::from_unix_timestamp(unix).map_err(|_| MakeError::Time);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = at(valid.from)?;
    params.not_after = at(valid.to)?;
    Ok(params)
}

/// A certificate in PEM form.
#[must_use]
pub fn pem(cert: &CertificateDer<'_>) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", cert.to_vec()), lines)
}
