//! Re-makes the RAM sections at the target: QEMU's loader takes pages in any order and in sections of any size
//! (docs/qemu-stream.md), so what the emitter keeps is only what the loader itself remembers: whether a section is
//! open, and the block named last on this connection.

use super::BlockList;
use super::format;
use crate::units::{BlockIx, PAGE_BITS, PageAddr};
use std::sync::Arc;

/// Why a record cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmitError {
    /// No such page in this VM's block list.
    #[error("page {} of RAM block {} is not in the VM's block list; the sender is at fault", addr.page, addr.block.0)]
    NoSuchPage {
        /// The page.
        addr: PageAddr,
    },
    /// RAM was ended already.
    #[error("page {} of RAM block {} comes after the end of RAM; the sender is at fault", addr.page, addr.block.0)]
    AfterEnd {
        /// The page.
        addr: PageAddr,
    },
}

/// Writes the RAM sections of one stream. Before bytes of another kind go out (a verbatim command), the open
/// section must be closed with [`close_section`](Self::close_section).
#[derive(Debug)]
pub struct Emitter {
    blocks: Arc<BlockList>,
    /// Named last on this connection; sections do not reset it.
    last: Option<BlockIx>,
    open: bool,
    ended: bool,
}

impl Emitter {
    /// An emitter for the VM with these blocks; the verbatim bytes up to the START section come before its first.
    #[must_use]
    pub fn new(blocks: Arc<BlockList>) -> Self {
        Self { blocks, last: None, open: false, ended: false }
    }

    /// The VM's blocks.
    #[must_use]
    pub fn blocks(&self) -> &Arc<BlockList> {
        &self.blocks
    }

    /// Whether a PART section is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Appends to `out` what must precede the page's 4096 bytes, at most
    /// [`MAX_RECORD_HEADER`](super::MAX_RECORD_HEADER) bytes; the caller must send the content right after it.
    /// After an error nothing was appended.
    pub fn page_header(&mut self, addr: PageAddr, out: &mut Vec<u8>) -> Result<(), EmitError> {
        self.word(addr, format::PAGE, out)
    }

    /// Appends a zero-page record to `out`. After an error nothing was appended.
    pub fn zero(&mut self, addr: PageAddr, out: &mut Vec<u8>) -> Result<(), EmitError> {
        self.word(addr, format::ZERO, out)?;
        // QEMU 10 refuses any other fill byte.
        out.push(0);
        Ok(())
    }

    fn word(&mut self, addr: PageAddr, kind: u64, out: &mut Vec<u8>) -> Result<(), EmitError> {
        if self.ended {
            return Err(EmitError::AfterEnd { addr });
        }
        let block = self
            .blocks
            .get(addr.block)
            .filter(|b| addr.page < b.pages())
            .ok_or(EmitError::NoSuchPage { addr })?;
        if !self.open {
            self.open = true;
            out.push(format::PART);
            out.extend_from_slice(&self.blocks.section_id().to_be_bytes());
        }
        let word = (u64::from(addr.page) << PAGE_BITS) | kind;
        if self.last == Some(addr.block) {
            out.extend_from_slice(&(word | format::CONTINUE).to_be_bytes());
        } else {
            self.last = Some(addr.block);
            out.extend_from_slice(&word.to_be_bytes());
            // BlockList holds names to MAX_NAME bytes.
            out.push(block.name.len() as u8);
            out.extend_from_slice(block.name.as_bytes());
        }
        Ok(())
    }

    /// Closes the open PART section, if there is one.
    pub fn close_section(&mut self, out: &mut Vec<u8>) {
        if self.open {
            self.open = false;
            self.close(out);
        }
    }

    /// Closes an open PART section and writes the END section, empty; the verbatim tail comes after it. Once only:
    /// a second call writes nothing.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        if self.ended {
            return;
        }
        self.close_section(out);
        self.ended = true;
        out.push(format::END);
        out.extend_from_slice(&self.blocks.section_id().to_be_bytes());
        self.close(out);
    }

    fn close(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&format::EOS.to_be_bytes());
        if self.blocks.footers() {
            out.push(format::FOOTER);
            out.extend_from_slice(&self.blocks.section_id().to_be_bytes());
        }
    }
}
