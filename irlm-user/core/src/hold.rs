//! Pages of a QEMU stream that are written again and again: each version but the last is sent for nothing, so they are *held
//! back* and leave as they are when the VM has stopped, or when they have calmed down. Mirror of `core::precopy`, which can
//! do this without a copy, because it decides itself what is read when; a stream brings what it brings.
//!
//! Which pages: those that sampling found hot before the move, from their first version on, and those that QEMU has sent
//! in two of the last four rounds, the first not counted. A round ends where page addresses start over; within one QEMU sends no page twice.
//!
//! What is held when the VM stops is sent while it stands still, so it is bounded by a share of the downtime limit
//! ([`allowance`]) besides [`MAX_HELD`]. That QEMU then stops the VM at all needs no more: what it counts as remaining is
//! at least what it keeps sending, and that much goes into the rest of the limit.

use super::units::{PAGE_SIZE, PageAddr, PageBytes};
use std::collections::HashMap;

/// Most pages of a VM that are held: 16 MiB.
pub const MAX_HELD: usize = 4096;
/// Before the link is known: 1 MiB.
const AT_FIRST: usize = 256;
/// Of the downtime limit, what sending the held pages may take. As long as this is not more than half, a set of pages that
/// fits is also one that QEMU stops for.
pub const SHARE: f64 = 0.25;
/// Of so many rounds …
const RECENT: u32 = 4;
/// … a page sent in so many, the first not counted, is hot.
const MOST: u32 = 2;
/// Rounds without a new version after which a page has calmed down.
const CALM: u32 = 2;
/// Most pages whose rounds are kept: 1 GiB of pages sent more than once.
const MAX_RESENT: usize = 1 << 18;

/// Pages that may be held where content goes at `rate` bytes a second and the VM may stand still for `downtime` seconds.
#[must_use]
pub fn allowance(rate: f64, downtime: f64) -> usize {
    ((rate * downtime * SHARE / PAGE_SIZE as f64) as usize).min(MAX_HELD)
}

/// In which of the last rounds a page came, the first not counted.
#[derive(Clone, Copy, Debug)]
struct Resent {
    history: u32,
    round: u32,
}

impl Resent {
    fn at(self, round: u32) -> u32 {
        self.history.checked_shl(round - self.round).unwrap_or(0) & ((1 << RECENT) - 1)
    }
}

#[derive(Debug)]
struct Held {
    content: Box<PageBytes>,
    /// In which its newest version came.
    round: u32,
}

/// One VM's held pages.
#[derive(Debug)]
pub struct Hold {
    on: bool,
    allowed: usize,
    round: u32,
    last: Option<PageAddr>,
    resent: HashMap<PageAddr, Resent>,
    held: HashMap<PageAddr, Held>,
    /// Buffers to be used again.
    spare: Vec<Box<PageBytes>>,
    times: u64,
    spared: u64,
}

impl Hold {
    /// Holds nothing yet; nothing ever, unless `on`.
    #[must_use]
    pub fn new(on: bool) -> Self {
        Self {
            on,
            allowed: AT_FIRST,
            round: 1,
            last: None,
            resent: HashMap::new(),
            held: HashMap::new(),
            spare: Vec::new(),
            times: 0,
            spared: 0,
        }
    }

    /// No more pages than this may be held from now on; what is too much is due.
    pub fn allow(&mut self, pages: usize) {
        self.allowed = pages.min(MAX_HELD);
    }

    /// The VM has stopped: what comes now is the last version.
    pub fn stop(&mut self) {
        self.on = false;
    }

    /// Pages held now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no page is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// How often a page was held back.
    #[must_use]
    pub fn times(&self) -> u64 {
        self.times
    }

    /// Versions of pages that were never sent, because a newer one came.
    #[must_use]
    pub fn spared(&self) -> u64 {
        self.spared
    }

    /// The stream brought this page: whether it is held. Whatever was held of it is void: it is replaced, or forgotten because
    /// this version leaves. `hot`: sampling found it so. `content`: none if all bytes are alike, which costs nothing to send.
    pub fn page(&mut self, addr: PageAddr, content: Option<&PageBytes>, hot: bool) -> bool {
        if self.last.is_some_and(|last| addr <= last) {
            self.turn();
        }
        self.last = Some(addr);
        let hot = self.on && (self.came(addr) || hot);
        let Some(content) = content.filter(|_| hot) else {
            if !self.held.is_empty()
                && let Some(held) = self.held.remove(&addr)
            {
                self.spare.push(held.content);
                self.spared += 1;
            }
            return false;
        };
        if let Some(held) = self.held.get_mut(&addr) {
            held.content.copy_from_slice(content);
            held.round = self.round;
            self.spared += 1;
            return true;
        }
        if self.held.len() >= self.allowed {
            return false;
        }
        let mut buffer = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
        buffer.copy_from_slice(content);
        self.held.insert(addr, Held { content: buffer, round: self.round });
        self.times += 1;
        true
    }

    /// Notes that a page came, and says whether it comes all the time.
    fn came(&mut self, addr: PageAddr) -> bool {
        if self.round == 1 || !self.on {
            return false;
        }
        let full = self.resent.len() >= MAX_RESENT;
        let history = match self.resent.get_mut(&addr) {
            Some(r) => {
                *r = Resent { history: r.at(self.round) | 1, round: self.round };
                r.history
            }
            None if full => 0,
            None => {
                self.resent.insert(addr, Resent { history: 1, round: self.round });
                1
            }
        };
        history.count_ones() >= MOST
    }

    /// The next round.
    fn turn(&mut self) {
        self.round = self.round.saturating_add(1);
        if self.resent.len() >= MAX_RESENT / 2 {
            let round = self.round;
            self.resent.retain(|_, r| r.at(round) != 0);
        }
    }

    /// Takes out what is not to be held any longer, by address: what has calmed down, and of what is more than allowed the
    /// least recent. Give the buffers back with [`Self::reuse`].
    pub fn due(&mut self) -> Vec<(PageAddr, Box<PageBytes>)> {
        let calm = |round: u32| self.round - round > CALM;
        let mut due: Vec<PageAddr> =
            self.held.iter().filter(|(_, h)| calm(h.round)).map(|(addr, _)| *addr).collect();
        let surplus = (self.held.len() - due.len()).saturating_sub(self.allowed);
        if surplus > 0 {
            let mut rest: Vec<(u32, PageAddr)> =
                self.held.iter().filter(|(_, h)| !calm(h.round)).map(|(a, h)| (h.round, *a)).collect();
            rest.sort_unstable();
            due.extend(rest.iter().take(surplus).map(|(_, addr)| *addr));
        }
        self.take(due)
    }

    /// Takes out all that is held, by address.
    pub fn all(&mut self) -> Vec<(PageAddr, Box<PageBytes>)> {
        let all = self.held.keys().copied().collect();
        self.take(all)
    }

    fn take(&mut self, mut which: Vec<PageAddr>) -> Vec<(PageAddr, Box<PageBytes>)> {
        which.sort_unstable();
        which.iter().filter_map(|a| self.held.remove(a).map(|h| (*a, h.content))).collect()
    }

    /// What was taken out has left.
    pub fn reuse(&mut self, taken: Vec<(PageAddr, Box<PageBytes>)>) {
        self.spare.extend(taken.into_iter().map(|(_, content)| content));
    }
}

#[cfg(test)]
mod tests;
