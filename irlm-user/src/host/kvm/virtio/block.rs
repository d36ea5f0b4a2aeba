//! A disk (virtio 1.2, section 5.2): reads, writes, flushes and the disk's name, on a raw image file.

use super::super::{KvmError, Result};
use super::queue::{Broken, Guest, serve};
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use virtio_queue::{DescriptorChain, Queue, Reader, Writer};

/// Bytes of a device's configuration that is not all zeros.
pub(super) const CONFIG: usize = 16;
/// Of a sector, whatever the file has.
const SECTOR: u64 = 512;
/// Read and written at a time.
const PIECE: usize = 64 << 10;
/// The disk's name, as a guest may ask for it; 20 bytes.
const NAME: &[u8; 20] = b"irlm-disk\0\0\0\0\0\0\0\0\0\0\0";

/// Features: a most of segments is told; the disk cannot be written; flushes are understood.
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
/// Segments of a request besides its header and status.
const SEGMENTS: u32 = 254;

/// Kinds of requests, and how they end.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_OUT: u32 = 4;
const GET_ID: u32 = 8;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNKNOWN: u8 = 2;

pub(super) struct Block {
    file: File,
    sectors: u64,
    read_only: bool,
    piece: Vec<u8>,
}

impl Block {
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self> {
        let fail = |what: String| KvmError::Device { name: path.display().to_string(), what };
        let file =
            OpenOptions::new().read(true).write(!read_only).open(path).map_err(|e| fail(e.to_string()))?;
        let meta = file.metadata().map_err(|e| fail(e.to_string()))?;
        if !meta.is_file() {
            return Err(fail("a disk is a raw image file".into()));
        }
        if meta.len() == 0 || meta.len() % SECTOR != 0 {
            return Err(fail(format!("{} bytes are no whole sectors of {SECTOR}", meta.len())));
        }
        Ok(Self { file, sectors: meta.len() / SECTOR, read_only, piece: vec![0; PIECE] })
    }

    pub(super) fn features(&self) -> u64 {
        FLUSH | SEG_MAX | if self.read_only { READ_ONLY } else { 0 }
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn config(&self) -> [u8; CONFIG] {
        let mut out = [0; CONFIG];
        out[..8].copy_from_slice(&self.sectors.to_le_bytes());
        out[12..].copy_from_slice(&SEGMENTS.to_le_bytes());
        out
    }

    /// What was written is where another host finds it.
    pub(super) fn flush(&self) {
        if !self.read_only
            && let Err(e) = self.file.sync_data()
        {
            tracing::warn!("disk: flushing its image: {e}");
        }
    }

    /// Does all that is asked for; whether the driver wants to hear of it.
    pub(super) fn serve(&mut self, queue: &mut Queue, guest: &Guest) -> std::result::Result<bool, Broken> {
        serve(queue, guest, |chain| self.request(chain, guest))
    }

    /// One request; the bytes that were written into the guest's memory.
    fn request(&mut self, chain: DescriptorChain<&Guest>, guest: &Guest) -> std::result::Result<u32, Broken> {
        let mut from = chain.clone().reader(guest)?;
        let mut to = chain.writer(guest)?;
        let room = to.available_bytes().checked_sub(1).ok_or(Broken::InvalidChain)?;
        let mut status = to.split_at(room).map_err(|_| Broken::InvalidChain)?;
        let mut header = [0; 16];
        from.read_exact(&mut header).map_err(|_| Broken::InvalidChain)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let answer = match u32::from_le_bytes([k0, k1, k2, k3]) {
            IN => self.read(sector, &mut to),
            OUT => self.write(sector, &mut from),
            FLUSH_OUT => self.file.sync_data(),
            GET_ID => to.write_all(&NAME[..room.min(NAME.len())]),
            _ => {
                let _ = status.write_all(&[UNKNOWN]);
                return Ok(1);
            }
        };
        let said = answer.as_ref().map_or(FAILED, |()| OK);
        if let Err(e) = answer {
            tracing::debug!("disk: {e}");
        }
        status.write_all(&[said]).map_err(|_| Broken::InvalidChain)?;
        Ok(u32::try_from(to.bytes_written() + 1).unwrap_or(u32::MAX))
    }

    /// Where a request's bytes lie in the file.
    fn place(&self, sector: u64, bytes: usize) -> io::Result<u64> {
        let (whole, count) = ((bytes as u64).is_multiple_of(SECTOR), bytes as u64 / SECTOR);
        let fits = sector.checked_add(count).is_some_and(|end| end <= self.sectors);
        if whole && fits {
            return Ok(sector * SECTOR);
        }
        Err(io::Error::other(format!("{bytes} bytes at sector {sector} of {}", self.sectors)))
    }

    fn read(
        &mut self,
        sector: u64,
        to: &mut Writer<'_, impl vm_memory::bitmap::BitmapSlice>,
    ) -> io::Result<()> {
        let mut at = self.place(sector, to.available_bytes())?;
        while to.available_bytes() > 0 {
            let n = to.available_bytes().min(PIECE);
            self.file.read_exact_at(&mut self.piece[..n], at)?;
            to.write_all(&self.piece[..n])?;
            at += n as u64;
        }
        Ok(())
    }

    fn write(
        &mut self,
        sector: u64,
        from: &mut Reader<'_, impl vm_memory::bitmap::BitmapSlice>,
    ) -> io::Result<()> {
        let mut at = self.place(sector, from.available_bytes())?;
        if self.read_only {
            return Err(io::Error::other("it cannot be written to"));
        }
        while from.available_bytes() > 0 {
            let n = from.available_bytes().min(PIECE);
            from.read_exact(&mut self.piece[..n])?;
            self.file.write_all_at(&self.piece[..n], at)?;
            at += n as u64;
        }
        Ok(())
    }
}
