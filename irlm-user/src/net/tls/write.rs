//! Certificates and keys as files: whole or not at all, and never over others unless asked.

use super::files::TlsError;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Secret {
    /// Its owner: 0600.
    Yes,
    /// Everybody: 0644.
    No,
}

/// Makes a directory that only its owner may enter, unless it is there.
///
/// # Errors
/// If it cannot be made, or is something else.
pub fn directory(dir: &Path) -> Result<(), TlsError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(TlsError::new(dir, format!("cannot be made: {e}"))),
    }
}

/// Writes a file beside its place, syncs it, and puts it there.
///
/// # Errors
/// If it cannot be written, or is there and may not be replaced: then nothing has changed.
pub fn file(dir: &Path, name: &str, text: &str, secret: Secret, replace: bool) -> Result<(), TlsError> {
    let path = dir.join(name);
    let beside = dir.join(format!(".{name}.{}", std::process::id()));
    let done = write(&beside, text, secret).and_then(|()| {
        let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        renameat_with(CWD, &beside, CWD, &path, flags)?;
        File::open(dir)?.sync_all()
    });
    done.map_err(|e| {
        let _ = std::fs::remove_file(&beside);
        if e.raw_os_error() == Some(Errno::EXIST.raw_os_error()) {
            return TlsError::new(path, "is there already, and is not replaced");
        }
        TlsError::new(path, format!("cannot be written: {e}"))
    })
}

fn write(path: &Path, text: &str, secret: Secret) -> io::Result<()> {
    let mode = if secret == Secret::Yes { 0o600 } else { 0o644 };
    // What a run that was killed has left.
    let _ = std::fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    // The umask may have taken more away.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
