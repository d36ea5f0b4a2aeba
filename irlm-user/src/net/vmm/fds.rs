//! Descriptors that come over a socket are looked at before they are used: a VMM that a stranger has taken over may send
//! anything.

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// What the kernel calls a userfaultfd (`fs/userfaultfd.c`).
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// Why a descriptor is not what it is said to be. One line.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    /// It cannot be looked at.
    #[error("its descriptor cannot be looked at: {0}")]
    Unseen(#[from] io::Error),
    /// A pipe, device or socket: reading it may block for ever.
    #[error("its descriptor is no regular file")]
    Kind,
    /// Whoever has it may make it shorter, and whoever has mapped it dies then.
    #[error("its length is not sealed")]
    Unsealed,
    /// Something else.
    #[error("its descriptor is {0}, not a userfaultfd")]
    NoUserfault(String),
}

/// A file that can be read without waiting for anybody; its length.
pub fn regular(fd: impl AsFd) -> Result<u64, Wrong> {
    let stat = fstat(fd).map_err(io::Error::from)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Wrong::Kind);
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// Memory that stays as long as it is (memfd_create(2), `F_SEAL_SHRINK`); its length.
pub fn memory(fd: impl AsFd) -> Result<u64, Wrong> {
    let bytes = regular(&fd)?;
    // Of a file that knows no seals this is an error.
    let seals = fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
    if seals.contains(SealFlags::SHRINK) { Ok(bytes) } else { Err(Wrong::Unsealed) }
}

/// What answers faults.
pub fn userfault(fd: impl AsFd) -> Result<(), Wrong> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let is = std::fs::read_link(path)?.to_string_lossy().into_owned();
    if is == USERFAULTFD { Ok(()) } else { Err(Wrong::NoUserfault(is)) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use std::fs::File;

    /// Memory as a VMM hands it over.
    pub(crate) fn sealed(bytes: u64) -> File {
        let file = File::from(memfd_create("m", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(bytes).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        file
    }

    #[test]
    fn only_what_cannot_hurt_is_taken() {
        let file = File::from(memfd_create("m", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(8192).unwrap();
        assert_eq!(regular(&file).unwrap(), 8192);
        assert!(matches!(memory(&file), Err(Wrong::Unsealed)));
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert_eq!(memory(&file).unwrap(), 8192);
        assert!(matches!(userfault(&file), Err(Wrong::NoUserfault(_))));
        let (pipe, _other) = io::pipe().unwrap();
        assert!(matches!(regular(&pipe), Err(Wrong::Kind)) && matches!(memory(&pipe), Err(Wrong::Kind)));
        let disk = tempfile::tempfile().unwrap();
        assert!(matches!(memory(&disk), Err(Wrong::Unsealed)));
        assert!(matches!(regular(File::open("/dev/zero").unwrap()), Err(Wrong::Kind)));
    }
}
