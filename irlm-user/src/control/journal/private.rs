//! A directory that is its owner's alone: records and sockets in it let whoever has them run a VM a second time.

use crate::net::tls::in_safe_place;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Makes the directory, or takes one that is there, and lets nobody else in, whatever the umask.
///
/// # Errors
/// It cannot be made, or it is one that others use: then its mode is left as it is.
pub(in crate::control) fn directory(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let denied = |why: String| io::Error::new(ErrorKind::PermissionDenied, why);
    let meta = fs::metadata(dir)?;
    let (owner, me) = (meta.uid(), rustix::process::geteuid().as_raw());
    if owner != me {
        return Err(denied(format!("it belongs to user {owner}, and the agent runs as {me}: chown it")));
    }
    if meta.mode() & 0o077 == 0 {
        return in_safe_place(&dir.join("lock")).map_err(|e| denied(e.to_string()));
    }
    // An agent's of before, or one that nobody has used yet.
    let foreign = fs::read_dir(dir)?.filter_map(Result::ok).any(|e| !is_known(&e.file_name()));
    if foreign && !dir.join("lock").is_file() {
        let why = "others may use it, and it holds what is no agent's: give the agent a directory of its own";
        return Err(denied(why.to_owned()));
    }
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    in_safe_place(&dir.join("lock")).map_err(|e| denied(e.to_string()))
}

/// What an agent puts into its directory, and what a new file system has.
fn is_known(name: &OsStr) -> bool {
    let ending = Path::new(name).extension();
    ["lost+found", "lock", "sock"].iter().any(|n| name == *n)
        || ending.is_some_and(|e| e == "json" || e == "tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_its_owners_alone_and_one_of_others_is_left_alone() {
        let top = tempfile::tempdir().unwrap();
        let mode = |dir: &Path| fs::metadata(dir).unwrap().mode() & 0o7777;
        let open = |name: &str| {
            let dir = top.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
            dir
        };
        let new = top.path().join("a/b");
        directory(&new).unwrap();
        assert_eq!(mode(&new), 0o700);
        let (empty, old, others) = (open("empty"), open("old"), open("others"));
        let records = open("records");
        fs::write(records.join("g@v@source.json"), "").unwrap();
        directory(&records).unwrap();
        assert_eq!(mode(&records), 0o700);
        fs::write(old.join("lock"), "").unwrap();
        fs::write(others.join("letter"), "").unwrap();
        directory(&empty).unwrap();
        directory(&old).unwrap();
        assert_eq!((mode(&empty), mode(&old)), (0o700, 0o700));
        let why = directory(&others).unwrap_err().to_string();
        assert!(why.contains("of its own") && mode(&others) == 0o755, "{why}");
        // Whoever may rename it may put another one in its place.
        let anybodys = open("anybodys");
        fs::set_permissions(&anybodys, Permissions::from_mode(0o777)).unwrap();
        let why = directory(&anybodys.join("state")).unwrap_err().to_string();
        assert!(why.contains("in the place of") && why.contains("chmod go-w"), "{why}");
        let link = top.path().join("link");
        std::os::unix::fs::symlink(anybodys.join("state"), &link).unwrap();
        assert!(directory(&link).is_err());
    }
}
