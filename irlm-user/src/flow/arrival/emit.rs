//! Records into QEMU's stream: headers and stored contents are gathered in a scratch buffer, contents of the frame are
//! written from where they were received, all in one vectored write a frame, outside the host's lock.
//!
//! Bound: the scratch buffer holds one frame's expansion, at most 4096 records of a stored page plus the uniform pages
//! that `core::wire::limits` allows (17 MiB and 17 MiB); typically some hundred KiB.

use crate::core::account::{Account, Tally};
use crate::core::arrival::{Output, TargetError};
use crate::core::qemu::{EmitError, Emitter};
use crate::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use crate::net::conn::write_all_vectored;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::net::UnixStream;

/// Why pages could not be emitted.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutError {
    #[error("{0}")]
    Emit(#[from] EmitError),
    #[error("{0}")]
    Target(#[from] TargetError),
    #[error("pages came before the list of the VM's blocks")]
    NoBlocks,
    #[error("the VM has no page {} in block {}", .0.page, .0.block.0)]
    NoPage(PageAddr),
}

#[derive(Debug, Clone)]
enum Piece {
    Scratch(Range<usize>),
    Body(usize),
}

/// Where a page's bytes are.
#[derive(Debug, Clone, Copy)]
enum Bytes {
    /// In the scratch buffer, from there on.
    Scratch(usize),
    /// In the frame's body.
    Body(usize),
    /// So many pages, each all this byte.
    Fill(u32, u8),
}

/// What is to be written to QEMU next. Reused from frame to frame.
#[derive(Debug)]
pub(super) struct Gather {
    pub(super) emitter: Emitter,
    scratch: Vec<u8>,
    pieces: Vec<Piece>,
    /// Where the scratch bytes not yet in a piece begin.
    open: usize,
    /// Of all that was written, and the pages that are written next.
    account: Option<Account>,
    pages: Vec<(PageAddr, Bytes)>,
}

impl Gather {
    pub(super) fn new(emitter: Emitter, account: Option<Account>) -> Self {
        Self { emitter, scratch: Vec::new(), pieces: Vec::new(), open: 0, account, pages: Vec::new() }
    }

    /// What the pages come to that were written.
    pub(super) fn tally(&mut self) -> Option<Tally> {
        self.account.as_mut().map(Account::tally)
    }

    fn note(&mut self, addr: PageAddr, bytes: Bytes) {
        if self.account.is_some() {
            self.pages.push((addr, bytes));
        }
    }

    /// Accounts for what is written now, from the very bytes that QEMU gets. Without the host's lock.
    fn account_for(&mut self, body: &[u8]) {
        let Some(account) = &mut self.account else { return };
        for (addr, bytes) in self.pages.drain(..) {
            let from = match bytes {
                Bytes::Fill(count, fill) => {
                    account.uniform(addr, count, fill);
                    continue;
                }
                Bytes::Scratch(at) => self.scratch.get(at..),
                Bytes::Body(n) => body.get(n * PAGE_SIZE..),
            };
            if let Some(page) = from.and_then(|b| b.first_chunk()) {
                account.page(addr, page);
            }
        }
        self.pages.shrink_to(4096);
    }

    /// Bytes that go out as they are, after the open section was closed.
    pub(super) fn verbatim(&mut self, bytes: &[u8]) {
        self.emitter.close_section(&mut self.scratch);
        self.scratch.extend_from_slice(bytes);
    }

    /// The END section.
    pub(super) fn end(&mut self) {
        self.emitter.end(&mut self.scratch);
    }

    fn cut(&mut self) {
        if self.open < self.scratch.len() {
            self.pieces.push(Piece::Scratch(self.open..self.scratch.len()));
            self.open = self.scratch.len();
        }
    }

    /// Writes everything gathered; `body` is the frame's body that the pieces refer to. Returns the bytes written.
    pub(super) fn write(
        &mut self,
        qemu: &UnixStream,
        body: &[u8],
        go_on: impl FnMut() -> bool,
    ) -> io::Result<u64> {
        self.cut();
        self.account_for(body);
        let mut n = 0u64;
        let mut iov = Vec::with_capacity(self.pieces.len());
        for p in &self.pieces {
            let s = match p {
                Piece::Scratch(r) => &self.scratch[r.clone()],
                Piece::Body(i) => &body[i * PAGE_SIZE..(i + 1) * PAGE_SIZE],
            };
            n += s.len() as u64;
            iov.push(IoSlice::new(s));
        }
        let result = write_all_vectored(&mut &*qemu, &mut iov, go_on);
        self.pieces.clear();
        self.scratch.clear();
        self.open = 0;
        // A rare giant frame must not be paid for ever after.
        self.scratch.shrink_to(1 << 20);
        result.map(|()| n)
    }
}

impl Output for Gather {
    type Error = OutError;

    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), OutError> {
        self.note(addr, Bytes::Fill(count, fill));
        for i in 0..count {
            let addr = PageAddr { block: addr.block, page: addr.page + i };
            if fill == 0 {
                self.emitter.zero(addr, &mut self.scratch)?;
            } else {
                self.emitter.page_header(addr, &mut self.scratch)?;
                self.scratch.resize(self.scratch.len() + PAGE_SIZE, fill);
            }
        }
        Ok(())
    }

    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), OutError> {
        self.emitter.page_header(addr, &mut self.scratch)?;
        self.note(addr, Bytes::Body(content));
        self.cut();
        self.pieces.push(Piece::Body(content));
        Ok(())
    }

    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), OutError> {
        self.emitter.page_header(addr, &mut self.scratch)?;
        self.note(addr, Bytes::Scratch(self.scratch.len()));
        self.scratch.extend_from_slice(bytes);
        Ok(())
    }
}
