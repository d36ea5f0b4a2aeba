//! The set of pages still to come, on disk, for the agent that comes after this one. What the memory's file holds has come,
//! so the set is written once. It need not be synced: it must survive the agent, and the VM does not survive the host.
//!
//! Layout: for each frame of the set as the wire has it (`docs/wire.md`) u32 length and its metadata, then the first 8 bytes
//! of the BLAKE3 of all that.

use crate::core::page_set::PageSet;
use crate::core::wire::frame::Kind;
use crate::core::wire::paging::{decode_set, encode_set};
use std::io;
use std::path::{Path, PathBuf};

/// Where it is.
#[derive(Debug)]
pub(super) struct DueFile(pub(super) PathBuf);

impl DueFile {
    pub(super) fn new(dir: &Path, group: &str, vm: &str) -> Self {
        Self(dir.join(format!("{group}@{vm}.due")))
    }

    pub(super) fn write(&self, set: &PageSet) -> io::Result<()> {
        let mut bytes = Vec::new();
        for frame in encode_set(set) {
            bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&frame);
        }
        bytes.extend_from_slice(&blake3::hash(&bytes).as_bytes()[..8]);
        let tmp = self.0.with_extension("new");
        std::fs::write(&tmp, &bytes)?;
        std::fs::rename(&tmp, &self.0)
    }

    /// The set, of a VM whose blocks have so many pages.
    pub(super) fn read(&self, pages: &[u32]) -> io::Result<PageSet> {
        let bytes = std::fs::read(&self.0)?;
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let (all, sum) = bytes.split_last_chunk::<8>().ok_or_else(|| bad("it is too short"))?;
        if blake3::hash(all).as_bytes()[..8] != *sum {
            return Err(bad("its checksum is wrong"));
        }
        let (mut set, mut rest, mut last) = (PageSet::empty(pages), all, false);
        while let Some((len, more)) = rest.split_first_chunk::<4>() {
            let len = u32::from_le_bytes(*len) as usize;
            let frame = more.get(..len).ok_or_else(|| bad("it ends in the middle"))?;
            last = decode_set(Kind::Switch, frame, &mut set).map_err(|e| bad(&e.to_string()))?;
            rest = &more[len..];
        }
        if last { Ok(set) } else { Err(bad("it ends in the middle")) }
    }

    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::units::{BlockIx, PageAddr};

    #[test]
    fn a_set_comes_back_and_a_damaged_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = DueFile::new(dir.path(), "g", "vm");
        let pages = [3000, 0, 70];
        let mut set = PageSet::empty(&pages);
        for (block, page) in [(0, 0), (0, 1), (0, 2999), (2, 69)] {
            set.insert(PageAddr { block: BlockIx(block), page });
        }
        file.write(&set).unwrap();
        assert_eq!(file.read(&pages).unwrap(), set);
        assert!(file.read(&[3000, 0, 69]).is_err(), "another VM's");
        let whole = std::fs::read(&file.0).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&file.0, &bytes).unwrap();
            assert!(file.read(&pages).is_err(), "byte {at}");
            std::fs::write(&file.0, &whole[..at]).unwrap();
            assert!(file.read(&pages).is_err(), "{at} bytes");
        }
        file.remove();
        assert_eq!(file.read(&pages).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
