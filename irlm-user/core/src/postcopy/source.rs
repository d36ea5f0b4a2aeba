//! The source side of post-copy: what leaves next. Pages that a vCPU waits for go before pages the target expects to
//! be touched, and those before the filling. The filling starts with a list that the caller gives (the order in which
//! shared contents are forwarded), and then goes on from where the guest last faulted, because what it touches next
//! mostly lies there.
//!
//! Each page's content leaves once after the switch, or once after each lost connection that it may have been lost
//! with. A page that left as a reference leaves as content too if the target then asks for it.

use super::{PageSet, Run};
use crate::page_set::after;
use crate::units::{BlockIx, PageAddr};
use crate::wire::paging::Demand;
use std::collections::VecDeque;

/// A target asks for what does not exist.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
#[error("the target asks for page {page} of block {block}, which this VM does not have")]
pub struct NoSuchPage {
    /// Block number.
    pub block: u16,
    /// Page number.
    pub page: u32,
}

/// What is still to be sent of one VM that stands still here and runs at its target.
#[derive(Debug)]
pub struct Serve {
    /// Nothing has been sent for it since the switch.
    left: PageSet,
    /// Its content has been sent since the switch, or since the target last said what it lacks.
    sent: PageSet,
    /// In the queues. Bound of each: the VM's pages, each at most once.
    urgent: VecDeque<PageAddr>,
    is_urgent: PageSet,
    soon: VecDeque<PageAddr>,
    is_soon: PageSet,
    first: VecDeque<PageAddr>,
    cursor: PageAddr,
}

impl Serve {
    /// The pages still to come, as the target is told at the switch.
    #[must_use]
    pub fn new(to_come: PageSet) -> Self {
        let none = PageSet::empty(to_come.pages());
        Self {
            left: to_come,
            sent: none.clone(),
            urgent: VecDeque::new(),
            is_urgent: none.clone(),
            soon: VecDeque::new(),
            is_soon: none,
            first: VecDeque::new(),
            cursor: PageAddr { block: BlockIx(0), page: 0 },
        }
    }

    /// These go first when nothing is asked for, in this order (the forward order of shared contents).
    pub fn begin_with(&mut self, order: impl IntoIterator<Item = PageAddr>) {
        self.first = order.into_iter().filter(|a| self.left.contains(*a)).collect();
    }

    /// Pages that nothing has been sent for.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.len()
    }

    /// Whether something is asked for.
    #[must_use]
    pub fn wanted(&self) -> bool {
        !self.urgent.is_empty() || !self.soon.is_empty()
    }

    /// The target asks.
    pub fn demand(&mut self, demand: &Demand) -> Result<(), NoSuchPage> {
        if let Some(a) = demand.pages.iter().find(|a| !self.left.covers(**a)) {
            return Err(NoSuchPage { block: a.block.0, page: a.page });
        }
        for (i, addr) in demand.pages.iter().enumerate() {
            if self.sent.contains(*addr) {
                continue;
            }
            if i < demand.urgent {
                if self.is_urgent.insert(*addr) {
                    self.urgent.push_back(*addr);
                }
                self.cursor = *addr;
            } else if !self.is_urgent.contains(*addr) && self.is_soon.insert(*addr) {
                self.soon.push_back(*addr);
            }
        }
        Ok(())
    }

    /// The next page that was asked for, and whether a vCPU waits for it. The caller sends its content now.
    pub fn next_wanted(&mut self) -> Option<(PageAddr, bool)> {
        while let Some(addr) = self.urgent.pop_front() {
            self.is_urgent.remove(addr);
            if self.take(addr) {
                return Some((addr, true));
            }
        }
        while let Some(addr) = self.soon.pop_front() {
            self.is_soon.remove(addr);
            if self.take(addr) {
                return Some((addr, false));
            }
        }
        None
    }

    /// At most `most` pages of the filling, appended to `out`. The caller sends all of them now, and says of which only a
    /// reference left ([`Self::left_by_name`]).
    pub fn fill(&mut self, most: usize, out: &mut Vec<PageAddr>) {
        let until = out.len() + most;
        while out.len() < until {
            let Some(addr) = self.first.pop_front() else { break };
            if self.left.contains(addr) && self.take(addr) {
                out.push(addr);
            }
        }
        while out.len() < until {
            let Some(next) = self
                .left
                .next(self.cursor)
                .or_else(|| self.left.next(PageAddr { block: BlockIx(0), page: 0 }))
            else {
                break;
            };
            let run = self.left.run_at(next, (until - out.len()) as u32);
            for addr in run.pages() {
                self.take(addr);
                out.push(addr);
            }
            self.cursor = PageAddr { page: next.page + run.count, ..next };
        }
    }

    /// Pages that nothing has been sent for, from `from` on, at most `most`, appended to `out`; where to go on, if there may be
    /// more.
    pub fn peek(&self, from: PageAddr, most: usize, out: &mut Vec<PageAddr>) -> Option<PageAddr> {
        let mut at = from;
        for _ in 0..most {
            let next = self.left.next(at)?;
            out.push(next);
            at = after(next)?;
        }
        Some(at)
    }

    /// A reference leaves for this page now, ahead of the filling: its content may still be asked for.
    pub fn by_name(&mut self, addr: PageAddr) {
        self.left.remove(addr);
    }

    fn take(&mut self, addr: PageAddr) -> bool {
        self.left.remove(addr);
        self.sent.insert(addr)
    }

    /// Only a reference left for this page of the filling: its content may be asked for.
    pub fn left_by_name(&mut self, addr: PageAddr) {
        self.sent.remove(addr);
    }

    /// The target lost the connection, and says what it still has no content for: that is what is left.
    pub fn resume(&mut self, lacks: PageSet) {
        *self = Self { cursor: self.cursor, ..Self::new(lacks) };
    }

    /// The pages nothing has been sent for, as runs.
    pub fn runs_left(&self) -> impl Iterator<Item = Run> {
        self.left.runs()
    }
}
