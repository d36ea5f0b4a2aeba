//! Who is asked for what, and when: other target hosts for contents that they are to forward, the
//! source for all else, those pages first that a vCPU waits for.

use super::asked::{Asked, Hurry};
use super::{Asks, Fill};
use crate::arrival::{Key, TargetHost};
use crate::units::{Nanos, PageAddr};
use crate::wire::limits::{MAX_DEMAND, MAX_HURRY};
use crate::wire::paging::Demand;

/// Pages asked for ahead of a touch that may be on their way at once: a tenth of a second of a 100
/// Mbit/s link.
const MAX_AHEAD: usize = 256;
/// Pages asked for after a faulting one when faults follow each other, and when they do not.
const WINDOW_MAX: u32 = 64;
const WINDOW_MIN: u32 = 2;

impl Fill {
    /// The source is asked for this page before all others, unless it has been.
    pub(super) fn urge(&mut self, addr: PageAddr) {
        if self.asking.asked.get(&addr).is_none_or(|a| !a.urgent) {
            self.asking.urgent.push_back(addr);
        }
    }

    /// The content of a held page is wanted now: who is to forward it is asked to hurry, else the
    /// source is asked.
    pub(super) fn press(&mut self, addr: PageAddr, key: Key, now: Nanos) {
        match key {
            Key::Digest(d) if !self.asking.holders.is_empty() => {
                self.asking.hurries.entry(d).or_insert(Hurry { next: 0, asked: None, until: now });
            }
            _ => self.urge(addr),
        }
    }

    /// Asks for what the guest is likely to touch next.
    pub(super) fn look_ahead(&mut self, addr: PageAddr) {
        let reach = 1..=2 * self.asking.window + 1;
        let follows = self
            .asking
            .last
            .is_some_and(|l| l.block == addr.block && reach.contains(&addr.page.wrapping_sub(l.page)));
        self.asking.last = Some(addr);
        self.asking.window = if follows {
            (self.asking.window * 2).min(WINDOW_MAX)
        } else {
            (self.asking.window / 2).max(WINDOW_MIN)
        };
        let end = addr.page.saturating_add(1).saturating_add(self.asking.window);
        let mut at = PageAddr { page: addr.page.saturating_add(1), ..addr };
        while let Some(next) = self.due.next(at).filter(|n| n.block == addr.block && n.page < end) {
            if self.asking.asked.len() + self.asking.ahead.len() >= MAX_AHEAD {
                break;
            }
            if !self.asking.asked.contains_key(&next) && !self.faults.contains_key(&next) {
                self.asking.ahead.push_back(next);
            }
            at = PageAddr { page: next.page + 1, ..next };
        }
    }

    /// What is to be asked now. `held_ms` is how long pages that nobody waits for are held at
    /// present. Call it after faults and frames, and at least every `Patience::hurry_ms`.
    pub fn asks(&mut self, host: &mut TargetHost, now: Nanos, held_ms: u64) -> Asks {
        let mut asks = Asks::default();
        self.hurry_on(host, now, &mut asks);
        while let Some((since, addr)) = self.held.waits.front().copied() {
            if now < since.plus_ms(held_ms) {
                break;
            }
            self.held.waits.pop_front();
            if self.held.pages.get(&addr).is_some_and(|h| !h.ready) && self.asking.connected {
                self.fall_back(host, addr);
            }
        }
        if !self.asking.connected {
            return asks;
        }
        while let Some((at, addr)) = self.asking.asked_order.front().copied() {
            let current = self.asking.asked.get(&addr).is_some_and(|a| a.at == at);
            if current && now < at.plus_ms(self.patience.again_ms) {
                break;
            }
            self.asking.asked_order.pop_front();
            if current {
                self.asking.asked.remove(&addr);
                if self.faults.contains_key(&addr) {
                    self.asking.urgent.push_back(addr);
                } else {
                    self.asking.ahead.push_back(addr);
                }
            }
        }
        self.demand(now, &mut asks.demand);
        asks
    }

    fn hurry_on(&mut self, host: &mut TargetHost, now: Nanos, asks: &mut Asks) {
        let mut over = Vec::new();
        for (digest, h) in &mut self.asking.hurries {
            if now < h.until || asks.hurry.len() >= MAX_HURRY {
                continue;
            }
            self.stats.passed_over += u64::from(h.asked.is_some());
            match self.asking.holders.get(h.next) {
                Some(holder) => {
                    asks.hurry.push((*holder, *digest));
                    self.stats.hurried += 1;
                    *h = Hurry {
                        next: h.next + 1,
                        asked: Some(*holder),
                        until: now.plus_ms(self.patience.hurry_ms),
                    };
                }
                // Without the source there is nobody else: they are asked once more, in turn.
                None if !self.asking.connected => {
                    *h = Hurry { next: 0, asked: None, until: now.plus_ms(self.patience.hurry_ms) }
                }
                None => over.push(*digest),
            }
        }
        for digest in over {
            self.asking.hurries.remove(&digest);
            let list = self.held.keys.get(&Key::Digest(digest)).cloned().unwrap_or_default();
            for addr in list.into_iter().filter(|a| self.faults.contains_key(a)).collect::<Vec<_>>() {
                self.fall_back(host, addr);
            }
        }
    }

    fn demand(&mut self, now: Nanos, demand: &mut Demand) {
        while demand.pages.len() < MAX_DEMAND
            && let Some(addr) = self.asking.urgent.pop_front()
        {
            if self.wants(addr) && self.asking.asked.get(&addr).is_none_or(|a| !a.urgent) {
                self.ask(addr, now, true);
                demand.pages.push(addr);
                self.stats.demanded += 1;
            }
        }
        demand.urgent = demand.pages.len();
        while demand.pages.len() < MAX_DEMAND
            && self.asking.asked.len() < MAX_AHEAD
            && let Some(addr) = self.asking.ahead.pop_front()
        {
            if self.wants(addr) && !self.asking.asked.contains_key(&addr) {
                self.ask(addr, now, false);
                demand.pages.push(addr);
                self.stats.ahead += 1;
            }
        }
    }

    fn ask(&mut self, addr: PageAddr, now: Nanos, urgent: bool) {
        self.asking.asked.insert(addr, Asked { at: now, urgent });
        self.asking.asked_order.push_back((now, addr));
    }
}
