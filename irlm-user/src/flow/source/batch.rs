//! Pages of a departing VM into `Pages` frames, wherever they come from: hashed where that is needed, decided for a
//! whole batch under one lock of the host's table, and sent with the contents from where they were read.

use super::tap::Out;
use crate::core::pair::PairTable;
use crate::core::source::{Leaving, SourceVm};
use crate::core::units::{PageAddr, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::pages::PagesBuilder;
use crate::flow::lock;
use crate::flow::work::Stage;
use std::io;
use std::sync::Mutex;

/// Contents in one frame: 256 KiB, so that a switchover never waits long behind a frame and caches are kept warm.
const BATCH_PAGES: usize = 64;
/// Pages of any kind in one batch.
const BATCH_EVENTS: usize = 1024;

/// Pages on their way out.
pub(super) struct Batch<'a, 'f> {
    /// Pages; how one leaves is known beforehand only if it is uniform.
    pages: Vec<(PageAddr, Option<Leaving>, Option<&'a PageBytes>)>,
    contents: usize,
    frame: &'f mut PagesBuilder,
}

impl<'a, 'f> Batch<'a, 'f> {
    pub(super) fn new(frame: &'f mut PagesBuilder) -> Self {
        Self { pages: Vec::with_capacity(BATCH_EVENTS), contents: 0, frame }
    }

    pub(super) fn add(&mut self, addr: PageAddr, leaving: Option<Leaving>, bytes: Option<&'a PageBytes>) {
        self.contents += usize::from(leaving.is_none());
        self.pages.push((addr, leaving, bytes));
    }

    /// Sends, if there is enough for a frame.
    pub(super) fn flush_if_full(
        &mut self,
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> io::Result<()> {
        if self.contents >= BATCH_PAGES || self.pages.len() >= BATCH_EVENTS {
            return self.flush(vm, table, out);
        }
        Ok(())
    }

    /// Hashes, decides under one lock, sends without it.
    pub(super) fn flush(
        &mut self,
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> io::Result<()> {
        if self.pages.is_empty() {
            return Ok(());
        }
        // Timed by the batch: a look at the clock costs as much as a good part of a page's hash.
        out.lane.lap(&out.shared.work, Stage::Other);
        for (addr, leaving, bytes) in &mut self.pages {
            if leaving.is_none() {
                *leaving = bytes.map(|b| vm.look(*addr, b));
            }
        }
        vm.stats.hash_ns += out.lane.lap(&out.shared.work, Stage::Hash).as_nanos() as u64;
        self.frame.clear();
        let mut contents = Vec::with_capacity(self.contents);
        {
            let mut table = lock(table);
            for (addr, leaving, bytes) in &self.pages {
                let Some(leaving) = leaving else { continue };
                let content = vm.resolve(&mut table, *addr, *leaving, self.frame);
                contents.extend(bytes.filter(|_| content));
            }
        }
        self.pages.clear();
        self.contents = 0;
        out.contents(Kind::Pages, self.frame.meta(), &contents)
    }
}
