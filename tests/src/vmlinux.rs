//! A distribution's kernel, unpacked as its own first instructions would do it: a KVM that emulates a guest's instructions
//! takes minutes for that. The layout of a bzImage is in the kernel's Documentation/arch/x86/boot.rst, that of its payload in
//! LZ4's "legacy frame" format.

use anyhow::{Context as _, Result, ensure};
use std::path::Path;

/// Where a bzImage says how many sectors its setup has, and where behind it the payload is and how long.
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR: usize = 512;
/// What the payload begins with, and the most that a block of it unpacks to.
const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const BLOCK: usize = 8 << 20;

/// The vmlinux in a bzImage.
pub fn unpack(kernel: &Path) -> Result<Vec<u8>> {
    let file = std::fs::read(kernel).with_context(|| format!("read {}", kernel.display()))?;
    let payload =
        payload(&file).with_context(|| format!("{} is no bzImage with a payload", kernel.display()))?;
    let mut rest = payload.strip_prefix(&MAGIC).with_context(|| {
        format!("{} is not packed with LZ4: its payload begins {:02x?}", kernel.display(), payload.get(..4))
    })?;
    let mut out = Vec::new();
    // Behind the last block is the length of it all, which no block is as long as.
    while let Some((head, more)) = rest.split_first_chunk::<4>() {
        let Some((block, more)) = more.split_at_checked(u32::from_le_bytes(*head) as usize) else { break };
        out.extend(lz4_flex::block::decompress(block, BLOCK).context("unpack a block")?);
        rest = more;
    }
    ensure!(out.starts_with(b"\x7fELF"), "{}: what was packed is no ELF file", kernel.display());
    Ok(out)
}

fn payload(file: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?) as usize);
    let setup = (usize::from(*file.get(SETUP_SECTORS)?) + 1) * SECTOR;
    let at = setup.checked_add(word(PAYLOAD_OFFSET)?)?;
    file.get(at..at.checked_add(word(PAYLOAD_LENGTH)?)?)
}
