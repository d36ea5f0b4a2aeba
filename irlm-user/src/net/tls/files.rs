//! The files of one directory: read once, with bounds, and refused if others could read a key or change anything.

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Certificates of the CAs that are believed, one or more.
pub const CA: &str = "ca-cert.pem";
/// The CA's key; only where certificates are issued, and never read by a daemon.
pub const CA_KEY: &str = "ca-key.pem";
/// Certificates that CAs have revoked; may be absent.
pub const CRL: &str = "ca-crl.pem";
/// This host's certificate for connections that it takes, and what leads from it to the CA.
pub const SERVER: &str = "server-cert.pem";
/// Its key.
pub const SERVER_KEY: &str = "server-key.pem";
/// This host's certificate for connections that it makes, and what leads from it to the CA.
pub const CLIENT: &str = "client-cert.pem";
/// Its key.
pub const CLIENT_KEY: &str = "client-key.pem";

/// All that a daemon looks at.
const WATCHED: [&str; 6] = [CA, CRL, SERVER, SERVER_KEY, CLIENT, CLIENT_KEY];
/// Largest file, bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most certificates or lists in one file.
const MAX_ITEMS: usize = 64;
/// Most of the name of a part of a file that is cited.
const MAX_MARKER: usize = 60;

/// Certificates that cannot be used. One line: which file, what is wrong with it, what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {what}", file.display())]
pub struct TlsError {
    /// The file or directory.
    pub file: PathBuf,
    /// What is wrong, and what to do.
    pub what: String,
}

impl TlsError {
    pub(super) fn new(file: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self { file: file.into(), what: what.into() }
    }
}

/// What tells that files were replaced: of each the device, inode, size, and times of its last changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stamp([Option<[i64; 7]>; WATCHED.len()]);

impl Stamp {
    pub(super) fn of(dir: &Path) -> Self {
        Self(WATCHED.map(|name| {
            let m = std::fs::metadata(dir.join(name)).ok()?;
            Some([
                m.dev().cast_signed(),
                m.ino().cast_signed(),
                m.size().cast_signed(),
                m.mtime(),
                m.mtime_nsec(),
                m.ctime(),
                m.ctime_nsec(),
            ])
        }))
    }
}

/// Whether what a file holds is a secret.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Certificates,
    Key,
}

/// One file's bytes; `None`: it is not there.
fn read(path: &Path, holds: Holds) -> Result<Option<Vec<u8>>, TlsError> {
    let fail = |what: String| TlsError::new(path, what);
    // A pipe in its place must not hold up whoever opens it.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        // A link that leads to nothing stands for a file that was lost, not for none.
        Err(e) if e.kind() == ErrorKind::NotFound && path.symlink_metadata().is_ok() => {
            return Err(fail(
                "is a link, and what it leads to is not there: put that back, or remove the link".into(),
            ));
        }
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(format!("cannot be read: {e}"))),
    };
    let meta = file.metadata().map_err(|e| fail(format!("cannot be read: {e}")))?;
    safe(path, &meta, holds)?;
    bounded(path, &file).map(Some)
}

/// Nobody but its owner and root may change a file, and strangers may not read a key. A group may: QEMU's, for one.
fn safe(path: &Path, meta: &Metadata, holds: Holds) -> Result<(), TlsError> {
    let fail = |what: String| Err(TlsError::new(path, what));
    let mode = meta.mode() & 0o7777;
    if !meta.is_file() {
        return fail("is no file".into());
    }
    if meta.uid() != 0 && meta.uid() != rustix::process::geteuid().as_raw() {
        return fail(format!("belongs to user {}, who can change it: chown it to root", meta.uid()));
    }
    if holds == Holds::Key && mode & 0o007 != 0 {
        return fail(format!("is a key that everybody on this host may use (mode {mode:04o}): chmod 0600"));
    }
    if mode & 0o022 != 0 {
        return fail(format!("may be changed by others than its owner (mode {mode:04o}): chmod go-w"));
    }
    Ok(())
}

fn bounded(path: &Path, file: &File) -> Result<Vec<u8>, TlsError> {
    let fail = |what: String| TlsError::new(path, what);
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| fail(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(format!("is larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

/// What is wrong with a text that should be PEM, and what to do.
fn damage(e: &pem::Error) -> String {
    let what = match e {
        pem::Error::MissingSectionEnd { end_marker } => {
            let of: String = String::from_utf8_lossy(end_marker).escape_default().take(MAX_MARKER).collect();
            format!("the line -----END {of}----- is missing")
        }
        pem::Error::IllegalSectionStart { .. } => "a line that begins a part of it is not whole".to_owned(),
        pem::Error::Base64Decode(_) => "there is something else in it than base64 (RFC 7468)".to_owned(),
        _ => "it cannot be read as PEM".to_owned(),
    };
    format!("is damaged: {what}: copy it from where it was made again")
}

/// The items of one kind in a file.
fn items<T: PemObject>(path: &Path, bytes: &[u8], what: &str) -> Result<Vec<T>, TlsError> {
    let mut out = Vec::new();
    for item in T::pem_slice_iter(bytes) {
        if out.len() == MAX_ITEMS {
            return Err(TlsError::new(path, format!("holds more than {MAX_ITEMS} {what}s")));
        }
        out.push(item.map_err(|e| TlsError::new(path, damage(&e)))?);
    }
    if out.is_empty() {
        return Err(TlsError::new(path, format!("holds no {what} in PEM form")));
    }
    Ok(out)
}

/// The certificates of a file; `None`: it is not there.
pub(super) fn certificates(path: &Path) -> Result<Option<Vec<CertificateDer<'static>>>, TlsError> {
    read(path, Holds::Certificates)?.map(|bytes| items(path, &bytes, "certificate")).transpose()
}

/// The key of a file; `None`: it is not there.
pub(super) fn key(path: &Path) -> Result<Option<PrivateKeyDer<'static>>, TlsError> {
    let Some(bytes) = read(path, Holds::Key)? else { return Ok(None) };
    match PrivateKeyDer::from_pem_slice(&bytes) {
        Ok(key) => Ok(Some(key)),
        Err(_) if bytes.windows(9).any(|w| w == b"ENCRYPTED") => {
            Err(TlsError::new(path, "is encrypted, and a daemon has nobody to ask: decrypt it, mode 0600"))
        }
        Err(_) => Err(TlsError::new(path, "holds no private key in PEM form")),
    }
}

/// The text of a key's file; `None`: it is not there.
pub(super) fn key_text(path: &Path) -> Result<Option<String>, TlsError> {
    let Some(bytes) = read(path, Holds::Key)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|_| TlsError::new(path, "is no text"))
}

/// The lists of revoked certificates of a file; none if it is not there.
pub(super) fn lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    match read(path, Holds::Certificates)? {
        Some(bytes) => items(path, &bytes, "revocation list"),
        None => Ok(Vec::new()),
    }
}
