//! What a departing VM's pages come to, as they are read and before anything is done with them (`core::account`).

use crate::core::account::{Account, Marker, Tally};
use crate::core::page_set::PageSet;
use crate::core::units::{PageAddr, PageBytes};

/// The account of a departing VM, if one is kept.
pub(super) struct Book {
    /// Until its blocks are known.
    marker: Option<Marker>,
    /// Until all was sent that the target must have before it may run the VM.
    account: Option<Account>,
    tally: Option<Tally>,
}

impl Book {
    /// Nothing is kept without a marker.
    pub(super) fn new(marker: Option<Marker>) -> Self {
        Self { marker, account: None, tally: None }
    }

    /// Its blocks have so many pages each.
    pub(super) fn begin(&mut self, pages: impl IntoIterator<Item = u32>) {
        self.account = self.marker.take().map(|m| Account::new(m, pages));
    }

    /// This was read; `fill` if all of it is this byte.
    pub(super) fn page(&mut self, addr: PageAddr, fill: Option<u8>, bytes: &PageBytes) {
        match (&mut self.account, fill) {
            (None, _) => {}
            (Some(account), Some(fill)) => account.uniform(addr, 1, fill),
            (Some(account), None) => account.page(addr, bytes),
        }
    }

    /// A zero page, of which no bytes were read.
    pub(super) fn zero(&mut self, addr: PageAddr) {
        if let Some(account) = &mut self.account {
            account.uniform(addr, 1, 0);
        }
    }

    /// All was sent, but for `due`: those pages come while the VM runs.
    pub(super) fn end(&mut self, due: Option<&PageSet>) {
        let Some(mut account) = self.account.take() else { return };
        due.into_iter().for_each(|due| account.forget(due));
        self.tally = Some(account.tally());
    }

    /// What it came to, since then.
    pub(super) fn tally(&self) -> Option<Tally> {
        self.tally
    }
}
