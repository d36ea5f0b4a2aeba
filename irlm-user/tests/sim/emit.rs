//! Pages into a target QEMU, accounted for as they are written; some of them harmed on purpose.

use crate::guest::{TargetQemu, content_of, page};
use crate::rng::Rng;
use crate::world::Vm;
use irlm_user::core::account::Account;
use irlm_user::core::arrival::{Output, TargetError};
use irlm_user::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use std::collections::HashMap;

/// Writes into a target QEMU's RAM, checking versions on the way (rule 2).
pub(crate) struct Emit<'a> {
    t: &'a mut TargetQemu,
    sent: &'a HashMap<PageAddr, Vec<u32>>,
    account: &'a mut Option<Account>,
    /// One page in so many is harmed.
    harm: (u64, &'a mut Rng),
    body: &'a [u8],
}
impl<'a> Emit<'a> {
    pub(crate) fn new(
        v: &'a mut Vm,
        account: &'a mut Option<Account>,
        harm: (u64, &'a mut Rng),
        body: &'a [u8],
    ) -> Self {
        Self { t: &mut v.t, sent: &v.sent, account, harm, body }
    }

    /// A page reaches QEMU, if all goes well.
    fn write(&mut self, addr: PageAddr, bytes: &PageBytes) {
        let (one_in, rng) = &mut self.harm;
        let harmed = *one_in > 0 && rng.one_in(*one_in);
        let bytes = match harmed.then(|| rng.below(3)) {
            None => {
                self.t.write(addr, content_of(bytes), self.sent);
                *bytes
            }
            // A bit is flipped.
            Some(0) => {
                let mut other = *bytes;
                other[rng.below(PAGE_SIZE as u64) as usize] ^= 1 << rng.below(8);
                self.t.harm(addr, content_of(&other));
                other
            }
            // An older version comes instead.
            Some(1) if let Some(older) = self.t.older(addr, self.sent) => {
                self.t.harm(addr, Some(older));
                page(older)
            }
            // It is lost.
            Some(_) => return,
        };
        if let Some(account) = self.account {
            account.page(addr, &bytes);
        }
    }
}
impl Output for Emit<'_> {
    type Error = TargetError;
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), TargetError> {
        for i in 0..count {
            self.write(PageAddr { page: addr.page + i, ..addr }, &[fill; PAGE_SIZE]);
        }
        Ok(())
    }
    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), TargetError> {
        let bytes = *nth(self.body, content);
        self.write(addr, &bytes);
        Ok(())
    }
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), TargetError> {
        self.write(addr, bytes);
        Ok(())
    }
}

pub(crate) fn nth(body: &[u8], n: usize) -> &PageBytes {
    body[n * PAGE_SIZE..].first_chunk().expect("the frame's length was checked")
}
