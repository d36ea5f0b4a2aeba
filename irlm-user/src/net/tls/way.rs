//! The way to a file: whether somebody else could put another file in its place. Each directory is looked at that the
//! path leads through, and those that its links lead through.

use super::files::TlsError;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

/// Most links on one way, as the kernel has it.
const MAX_LINKS: usize = 40;
/// Entries of a directory with this bit are their owners' alone, whoever else may make some: /tmp.
const STICKY: u32 = 0o1000;

/// Refuses a file that others could exchange. The directory that it lies in is root's or this program's user's, and nobody
/// else writes there. In those above nobody else may rename what is on the way.
///
/// # Errors
/// The first directory or link that others can change.
pub(super) fn safe(path: &Path) -> Result<(), TlsError> {
    let unreadable = |at: &Path, e| TlsError::new(at, format!("cannot be looked at: {e}"));
    let whole = std::path::absolute(path).map_err(|e| unreadable(path, e))?;
    let (mut at, mut todo, mut links) = (PathBuf::from("/"), parts(&whole), 0);
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let here = at.symlink_metadata().map_err(|e| unreadable(&at, e))?;
        let next = at.join(&name);
        let there = match next.symlink_metadata() {
            Ok(m) => Some(m),
            // Whoever reads it says so.
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            Err(e) => return Err(unreadable(&next, e)),
        };
        let wrong = if todo.is_empty() { holds_it(&here) } else { above_it(&here, there.as_ref(), &next) };
        if let Some(what) = wrong {
            let leads =
                if whole.starts_with(&at) { String::new() } else { format!(" ({})", leads_there(path)) };
            return Err(TlsError::new(at, what + &leads));
        }
        let Some(there) = there else { return Ok(()) };
        if !there.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(TlsError::new(path, "leads through too many links"));
        }
        let to = next.read_link().map_err(|e| unreadable(&next, e))?;
        if to.is_absolute() {
            at = PathBuf::from("/");
        }
        let mut rest = parts(&to);
        rest.append(&mut todo);
        todo = rest;
    }
    Ok(())
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = |c: &Component<'_>| matches!(c, Component::Normal(_) | Component::ParentDir);
    path.components().filter(named).map(|c| c.as_os_str().to_owned()).collect()
}

fn leads_there(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    format!("{} leads there", Path::new(name).display())
}

fn is_trusted(meta: &Metadata) -> bool {
    meta.uid() == 0 || meta.uid() == rustix::process::geteuid().as_raw()
}

/// Whether somebody may write there who is not its owner, nor of a group among `groups`.
fn others_write(meta: &Metadata, groups: &[u32]) -> bool {
    meta.mode() & 0o002 != 0 || (meta.mode() & 0o020 != 0 && !groups.contains(&meta.gid()))
}

/// What is wrong with the directory that the file itself, or a link to it, lies in.
fn holds_it(dir: &Metadata) -> Option<String> {
    if !is_trusted(dir) {
        let who = dir.uid();
        return Some(format!("belongs to user {who}, who can put other files there: chown it to root"));
    }
    let mode = dir.mode() & 0o7777;
    others_write(dir, &[0])
        .then(|| format!("others than its owner may put other files there (mode {mode:04o}): chmod go-w"))
}

/// What is wrong with a directory further up, of which `next` is on the way.
fn above_it(dir: &Metadata, there: Option<&Metadata>, next: &Path) -> Option<String> {
    // A group of the program's own is often that of one user.
    if !others_write(dir, &[0, rustix::process::getegid().as_raw()]) {
        return None;
    }
    let (mode, name) = (dir.mode() & 0o7777, next.display());
    if mode & STICKY == 0 {
        return Some(format!(
            "others than its owner may put something else in the place of {name} (mode {mode:04o}): chmod go-w"
        ));
    }
    // There everybody has only what is his.
    let stranger = there.filter(|m| !is_trusted(m))?;
    Some(format!("{name} in it belongs to user {}, who can exchange it: chown it to root", stranger.uid()))
}
