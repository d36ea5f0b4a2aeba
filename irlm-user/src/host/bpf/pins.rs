//! Pins: a directory in bpffs that shows an agent's maps and links to operators and tools, keeps the programs counting
//! while no agent lives, and is gone when the agent ends in order. A lock on the directory tells a dead owner's
//! leftovers from a living owner's.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock, statfs};

use super::error::{BpfError, MAX_NAME};

/// Where every Linux distribution has its bpffs.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Parent of every agent's pin directory.
pub const PIN_ROOT: &str = "/sys/fs/bpf/irlm";

/// The pin directory of the agent called `name`: `/sys/fs/bpf/irlm/<name>`, with `_` for each dot,
/// which bpffs refuses.
pub fn default_pin_dir(name: &str) -> Result<PathBuf, BpfError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(BpfError::Name(name.to_owned()));
    }
    Ok(Path::new(PIN_ROOT).join(name.replace('.', "_")))
}

/// A locked pin directory. Dropping it removes the pins of the names it was opened with, and the directory.
#[derive(Debug)]
pub(in crate::host) struct Pins {
    dir: PathBuf,
    names: Vec<String>,
    // Held for the lock: the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl Pins {
    /// Makes and locks `dir` for pins called `names`. Nothing else in the directory is ever touched.
    pub(in crate::host) fn open(dir: &Path, names: impl IntoIterator<Item = String>) -> io::Result<Self> {
        if dir.starts_with(BPFFS) {
            mount_bpffs()?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if !is_bpffs(dir)? {
            return Err(io::Error::other("not on a bpffs: mount one (`mount -t bpf bpf DIR`)"));
        }
        let lock = directory(dir)?;
        if lock.metadata()?.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("belongs to another user"));
        }
        // Somebody who looks (`irlm bpf show`) holds the lock for a moment only.
        let mut tries = 0;
        while !locked(&lock, FlockOperation::NonBlockingLockExclusive)? {
            tries += 1;
            if tries > 5 {
                return Err(io::Error::other("in use by a running agent: give this one another name"));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { dir: dir.to_owned(), names: names.into_iter().collect(), _lock: lock })
    }

    /// The path of a pin.
    pub(in crate::host) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether any pin of a dead owner is there.
    pub(super) fn any(&self) -> bool {
        self.names.iter().any(|name| self.path(name).exists())
    }

    /// Removes all pins.
    pub(in crate::host) fn clear(&self) -> io::Result<()> {
        for name in &self.names {
            match fs::remove_file(self.path(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.clear().ok();
        // Stays if somebody else pinned something here; that is theirs to remove.
        fs::remove_dir(&self.dir).ok();
    }
}

fn directory(dir: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir)
}

/// Tries to lock it: false if somebody else has.
fn locked(dir: &File, how: FlockOperation) -> io::Result<bool> {
    match flock(dir, how) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether a living agent owns the directory.
pub(super) fn owned(dir: &Path) -> io::Result<bool> {
    Ok(!locked(&directory(dir)?, FlockOperation::NonBlockingLockShared)?)
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    let kind = statfs(path)?.f_type;
    // The field is signed on some targets; the magic number is 32 bits wide, compared as bits.
    let kind = kind as u64 & u64::from(u32::MAX);
    Ok(kind == BPF_FS_MAGIC)
}

/// Mounts the bpffs at its usual place if nobody has, as `tc` and `bpftool` do. A mount namespace with a fresh
/// `/sys` (`ip netns exec`) has none.
fn mount_bpffs() -> io::Result<()> {
    if is_bpffs(Path::new(BPFFS))? {
        return Ok(());
    }
    // SAFETY: all arguments are NUL-terminated literals that outlive the call; mount reads them and nothing else.
    let result = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            c"/sys/fs/bpf".as_ptr(),
            c"bpf".as_ptr(),
            0,
            c"mode=0700".as_ptr().cast(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
