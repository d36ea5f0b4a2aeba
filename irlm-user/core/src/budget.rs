//! The group's budget on the core link, divided among the source hosts by need, and divided anew while they move.
//! The sum of what the hosts may use is never above the budget, also while shares change, whatever messages are lost,
//! late or doubled, and if the divider dies: a share counts as used until its host has confirmed a smaller one, and only
//! what is free by that count is given to others. Numbers of shares begin with a term, so that a divider that takes over
//! from one that fell silent is obeyed and the other is not any more, should it be alive after all.

use super::units::Nanos;

/// How often shares follow needs that drift. A host that has finished, or begun, is followed at once.
const DRIFT_NS: u64 = 1_000_000_000;
/// A change below this part of the budget is not worth a message.
const WORTH_PART: u64 = 400;
/// A host with something to send gets no less than this part of the neediest one's, because needs are estimates.
const LEAST_PART: u64 = 16;
/// All hosts that have nothing to send keep, of a hundred parts of the budget, this much between them: for their last
/// words.
const IDLE_PERCENT: u64 = 1;

/// A divider that hosts have not heard for so long is gone, and another may take over.
pub const SILENCE_NS: u64 = 4_000_000_000;

/// What one host has to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Need {
    /// Bytes, about; 0: it has finished.
    pub remaining: u64,
    /// Most it can use, bit/s.
    pub limit: u64,
}

/// A share for a host: to be sent, and sent again until it is confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    /// Which host.
    pub host: usize,
    /// The number to send it under.
    pub seq: u64,
    /// The share, bit/s.
    pub bits: u64,
}

/// What a host is given before anything is known of needs, bit/s: as much as each other.
#[must_use]
pub fn equal_share(budget: u64, hosts: usize) -> u64 {
    budget / hosts.max(1) as u64
}

/// Divides `budget` (bit/s) by need: in proportion to what remains, so that all finish together, none above its limit;
/// what a limited host cannot use goes to the others.
#[must_use]
pub fn divide(budget: u64, needs: &[Need]) -> Vec<u64> {
    let idle = (budget / 100 * IDLE_PERCENT) / needs.len().max(1) as u64;
    let mut out = vec![idle; needs.len()];
    let most = needs.iter().map(|n| n.remaining).max().unwrap_or(0);
    let weight = |n: &Need| u128::from(n.remaining.max(most / LEAST_PART).max(1));
    let mut open: Vec<usize> = (0..needs.len()).filter(|i| needs[*i].remaining > 0).collect();
    let mut left = budget - idle * (needs.len() - open.len()) as u64;
    // Water-filling: each turn fixes the hosts whose part is above their limit, and there are only so many hosts.
    while !open.is_empty() {
        let sum: u128 = open.iter().map(|i| weight(&needs[*i])).sum();
        let part = |i: usize| u64::try_from(u128::from(left) * weight(&needs[i]) / sum).unwrap_or(u64::MAX);
        let (full, rest): (Vec<_>, Vec<_>) = open.iter().copied().partition(|i| part(*i) >= needs[*i].limit);
        if full.is_empty() {
            for i in rest {
                out[i] = part(i);
            }
            return out;
        }
        for i in &full {
            out[*i] = needs[*i].limit;
            left -= needs[*i].limit;
        }
        open = rest;
    }
    out
}

/// The term of a share's number: its upper 32 bits.
#[must_use]
pub fn term_of(seq: u64) -> u32 {
    (seq >> 32) as u32
}

#[derive(Clone, Debug)]
struct Host {
    /// Whether it listens to this divider's term, so that what it has confirmed is all that it may use.
    claimed: bool,
    /// The last share it has confirmed, and its number.
    confirmed: (u64, u64),
    /// One sent and not confirmed: it may be in force or not.
    open: Option<(u64, u64)>,
    /// Whether the open one is to be sent (again).
    due: bool,
}

impl Host {
    /// The most it may be using.
    fn upper(&self) -> u64 {
        self.open.map_or(self.confirmed.1, |o| o.1.max(self.confirmed.1))
    }
}

/// Divides, and sees to it that the sum holds.
#[derive(Clone, Debug)]
pub struct Divider {
    budget: u64,
    term: u32,
    hosts: Vec<Host>,
    wanted: Vec<u64>,
    active: Vec<bool>,
    aimed: Option<Nanos>,
}

impl Divider {
    /// For hosts that have been told [`equal_share`] under number 0.
    #[must_use]
    pub fn new(budget: u64, hosts: usize) -> Self {
        let share = equal_share(budget, hosts);
        let host = Host { claimed: true, confirmed: (0, share), open: None, due: false };
        Self {
            budget,
            term: 0,
            hosts: vec![host; hosts],
            wanted: vec![share; hosts],
            active: vec![true; hosts],
            aimed: None,
        }
    }

    /// One that takes over from a divider that fell silent: under a term above all that hosts have heard. Until every
    /// host has been [claimed](Self::claimed), which shares are in force is not known, and none is changed.
    #[must_use]
    pub fn take_over(budget: u64, hosts: usize, term: u32) -> Self {
        let host =
            Host { claimed: false, confirmed: (u64::from(term) << 32, budget), open: None, due: false };
        Self { term, hosts: vec![host; hosts], ..Self::new(budget, hosts) }
    }

    /// The term of this divider's shares.
    #[must_use]
    pub fn term(&self) -> u32 {
        self.term
    }

    /// The host listens to this divider's term from now on, and to none below; it has this share.
    pub fn claimed(&mut self, host: usize, bits: u64) {
        if let Some(h) = self.hosts.get_mut(host).filter(|h| !h.claimed) {
            h.claimed = true;
            h.confirmed.1 = bits;
        }
    }

    /// What the hosts need now, in their order.
    pub fn needs(&mut self, now: Nanos, needs: &[Need]) {
        if needs.len() != self.hosts.len() {
            return;
        }
        let active: Vec<bool> = needs.iter().map(|n| n.remaining > 0).collect();
        let drifted = self.aimed.is_none_or(|t| now.0.saturating_sub(t.0) >= DRIFT_NS);
        if drifted || active != self.active {
            self.wanted = divide(self.budget, needs);
            self.active = active;
            self.aimed = Some(now);
        }
    }

    /// What to send now. Shares that shrink come before the others may grow.
    pub fn orders(&mut self) -> Vec<Order> {
        if self.hosts.iter().any(|h| !h.claimed) {
            return Vec::new();
        }
        let worth = (self.budget / WORTH_PART).max(1);
        for (h, wanted) in self.hosts.iter_mut().zip(&self.wanted) {
            if h.open.is_none() && h.confirmed.1 > *wanted && h.confirmed.1 - wanted >= worth {
                (h.open, h.due) = (Some((h.confirmed.0 + 1, *wanted)), true);
            }
        }
        // What a host claims to use is its own word.
        let used = self.hosts.iter().fold(0u64, |sum, h| sum.saturating_add(h.upper()));
        let mut free = self.budget.saturating_sub(used);
        for (h, wanted) in self.hosts.iter_mut().zip(&self.wanted) {
            let more = wanted.saturating_sub(h.confirmed.1).min(free);
            if h.open.is_none() && more >= worth {
                (h.open, h.due) = (Some((h.confirmed.0 + 1, h.confirmed.1 + more)), true);
                free -= more;
            }
        }
        let due = self.hosts.iter_mut().enumerate().filter(|(_, h)| h.due);
        due.filter_map(|(host, h)| {
            h.due = false;
            h.open.map(|(seq, bits)| Order { host, seq, bits })
        })
        .collect()
    }

    /// The host has share `seq` in force.
    pub fn confirmed(&mut self, host: usize, seq: u64) {
        let Some(h) = self.hosts.get_mut(host) else { return };
        if let Some(open) = h.open.filter(|o| o.0 == seq) {
            (h.confirmed, h.open, h.due) = (open, None, false);
        }
    }

    /// No answer came: the order may have been heard or not, and goes out again with the next ones.
    pub fn unanswered(&mut self, host: usize) {
        if let Some(h) = self.hosts.get_mut(host) {
            h.due = h.open.is_some();
        }
    }

    /// The shares as far as they are confirmed, bit/s.
    #[must_use]
    pub fn confirmed_shares(&self) -> Vec<u64> {
        self.hosts.iter().map(|h| h.confirmed.1).collect()
    }
}

/// A host's side: the share of the highest number heard counts, and stays if nobody speaks any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    /// Its number.
    pub seq: u64,
    /// Bit/s.
    pub bits: u64,
}

impl Share {
    /// What the host is told before the group starts.
    #[must_use]
    pub fn first(bits: u64) -> Self {
        Self { seq: 0, bits }
    }

    /// Listens to dividers of this term and above only; the share stays. False: to a later term already.
    pub fn claim(&mut self, term: u32) -> bool {
        self.seq = self.seq.max(u64::from(term) << 32);
        term_of(self.seq) == term
    }

    /// Takes a share, unless a later one was heard before.
    pub fn hear(&mut self, seq: u64, bits: u64) {
        if seq > self.seq {
            *self = Self { seq, bits };
        }
    }
}

#[cfg(test)]
mod tests;
