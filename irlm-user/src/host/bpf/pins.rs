//! Pinned maps: a directory in bpffs that shows an agent's maps to operators and tools, and that is gone when the
//! agent is. A lock on the directory tells a crashed owner's leftovers from a living owner's maps.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statfs};

/// Where every Linux distribution has its bpffs.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// A locked pin directory. Dropping it removes the pins made through it, and the directory.
#[derive(Debug)]
pub(in crate::host) struct Pins {
    dir: PathBuf,
    made: Vec<PathBuf>,
    // Held for the lock: the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl Pins {
    /// Makes and locks `dir`, and removes pins called `names` that a dead owner left there. Nothing else in the
    /// directory is touched.
    pub(in crate::host) fn open(dir: &Path, names: &[&str]) -> io::Result<Self> {
        if dir.starts_with(BPFFS) {
            mount_bpffs()?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if !is_bpffs(dir)? {
            return Err(io::Error::other("not on a bpffs: mount one (`mount -t bpf bpf DIR`)"));
        }
        let lock =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir)?;
        if lock.metadata()?.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other("belongs to another user"));
        }
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(io::Error::other("in use by a running agent: give this one another name"));
            }
            Err(error) => return Err(error.into()),
        }
        for name in names {
            match fs::remove_file(dir.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(Self { dir: dir.to_owned(), made: Vec::new(), _lock: lock })
    }

    /// The path that `name` is to be pinned at; from now on removed with the rest.
    pub(in crate::host) fn path(&mut self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        self.made.push(path.clone());
        path
    }

    pub(in crate::host) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for path in &self.made {
            fs::remove_file(path).ok();
        }
        // Stays if somebody else pinned something here; that is theirs to remove.
        fs::remove_dir(&self.dir).ok();
    }
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
