//! The port's policy as control requests see it, and this host's shares of its groups' budgets: held by the class
//! tree where there is one, else by TCP's pacing; plain QEMU, whose packets nobody here tags, is given a limit of its own.

use super::{Group, Refusal, Reply, Shared, Token, Work};
use crate::control::api::{Code, ShareStatus};
use crate::control::shape::{Tagger, error::ShapeError};
use crate::core::budget::{SILENCE_NS, Share, term_of};
use crate::core::policy::{Mark, Marks};
use crate::flow::lock;
use crate::host::bpf::{Classifier, Marking, TagPolicy};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often shares are fitted to who has something to send, and given back by groups that are over.
const LOOK: Duration = Duration::from_millis(100);

/// A group's share at this host, who may change it, and when that one was last heard.
#[derive(Debug)]
pub(super) struct Held(Mutex<Hold>);

#[derive(Debug)]
struct Hold {
    share: Share,
    divider: Token,
    heard: Instant,
}

impl Held {
    pub(super) fn first(bits: u64, token: Token) -> Self {
        Self(Mutex::new(Hold { share: Share::first(bits), divider: token, heard: Instant::now() }))
    }

    fn get(&self) -> Share {
        lock(&self.0).share
    }

    fn silent(&self) -> Duration {
        lock(&self.0).heard.elapsed()
    }

    /// False: somebody else divides.
    fn hear(&self, token: Token, seq: u64, bits: u64) -> bool {
        let mut h = lock(&self.0);
        if h.divider == token {
            h.share.hear(seq, bits);
            h.heard = Instant::now();
        }
        h.divider == token
    }

    /// False: somebody else divides.
    fn claim(&self, token: Token, term: u32) -> bool {
        let mut h = lock(&self.0);
        let gone = h.heard.elapsed() >= Duration::from_nanos(SILENCE_NS);
        let may = h.divider == token || (gone && term > term_of(h.share.seq));
        if may && h.share.claim(term) {
            h.divider = token;
            h.heard = Instant::now();
        }
        h.divider == token
    }
}

/// The eBPF classifier as the shaper sees it.
#[derive(Debug)]
pub(super) struct PortTags(pub(super) Classifier);

impl Tagger for PortTags {
    fn off(&self) -> Option<String> {
        self.0.disabled_reason().map(str::to_owned)
    }

    fn set(&mut self, marks: &Marks, racks: &[(IpAddr, u8)]) -> Result<(), ShapeError> {
        let of = |m: &Mark| Marking { dscp: m.dscp, priority: m.priority, mark: m.mark };
        let mut racks = racks.to_vec();
        if !racks.is_empty() {
            // The target rack's multicast leaves it no more than what goes to its hosts.
            racks
                .extend([([239, 0, 0, 0].into(), 8), (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8)]);
        }
        let policy = TagPolicy { classes: marks.core.map(|m| of(&m)), rack_prefixes: racks };
        let taken = self.0.set_policy_by_scope(&policy, &marks.rack.map(|m| of(&m)));
        taken.map_err(|e| ShapeError::Tags(e.to_string()))
    }
}

impl Shared {
    pub(super) fn set_policy(&self, text: &str) -> Result<Reply, Refusal> {
        let at =
            |e| Refusal::new(Code::BadRequest, format!("policy not set at agent {}: {e}", self.config.name));
        self.shaper.set_policy(text).map_err(at)?;
        Ok(self.policy())
    }

    pub(super) fn policy(&self) -> Reply {
        let mut st = self.shaper.status();
        let groups: Vec<Arc<Group>> = lock(&self.groups).values().cloned().collect();
        let shares: Vec<u64> =
            groups.iter().filter(|g| moves(g)).filter_map(|g| Some(g.share.as_ref()?.get().bits)).collect();
        if !shares.is_empty() {
            st.share = Some(shares.into_iter().fold(0, u64::saturating_add));
            st.shared_by = Some(if self.shaper.has_tree() { "tree" } else { "pacing" }.to_owned());
        }
        Reply::Policy(Box::new(st))
    }

    pub(super) fn take_share(&self, name: &str, token: Token, seq: u64, bits: u64) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let share = self.held(&group)?;
        if !share.hear(token, seq, bits) {
            return Err(somebody_else(name));
        }
        // A share that is not in force must not be given to others.
        self.share_out().map_err(|e| Refusal::new(Code::Failed, e.to_string()))?;
        let now = share.get();
        tracing::debug!("group {name}: share {} bit/s (number {})", now.bits, now.seq);
        Ok(Reply::Share { seq: now.seq, bits: now.bits })
    }

    pub(super) fn claim_share(&self, name: &str, token: Token, term: u32) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        let share = self.held(&group)?;
        if !share.claim(token, term) {
            return Err(somebody_else(name));
        }
        let now = share.get();
        Ok(Reply::Share { seq: now.seq, bits: now.bits })
    }

    /// Bit/s that the group may use from here, if that is known: the link, or its share of the budget.
    pub(super) fn bandwidth(&self, group: &Group) -> Option<u64> {
        let link = self.link_mbit().map(|mbit| mbit.saturating_mul(1_000_000));
        link.into_iter().chain(group.share.as_ref().map(|s| s.get().bits)).min()
    }

    fn held<'a>(&self, group: &'a Group) -> Result<&'a Held, Refusal> {
        group.share.as_ref().ok_or_else(|| {
            let what = format!("group {:?} has no budget at agent {}", group.spec.name, self.config.name);
            Refusal::new(Code::NotNow, what)
        })
    }

    pub(super) fn share_status(&self, group: &Group) -> Option<ShareStatus> {
        let held = group.share.as_ref()?;
        let share = held.get();
        let silent_ms = u64::try_from(held.silent().as_millis()).unwrap_or(u64::MAX);
        let (limit, tree) = (self.shaper.limit(), self.shaper.has_tree());
        Some(ShareStatus { seq: share.seq, bits: share.bits, limit, tree, silent_ms })
    }

    /// Puts the shares in force.
    pub(super) fn share_out(&self) -> Result<(), ShapeError> {
        let mut said = lock(&self.sharing);
        let groups: Vec<Arc<Group>> = lock(&self.groups).values().cloned().collect();
        let tree = self.shaper.has_tree();
        let mut sum = Some(0u64);
        for g in &groups {
            let moves = moves(g);
            let share = g.share.as_ref().filter(|_| moves).map(|s| s.get().bits);
            if moves {
                // A group without a budget may use all that the policy gives.
                sum = sum.zip(share).map(|(a, b)| a.saturating_add(b));
            }
            match &g.work {
                Work::InPath(_) => g.pacer.set(share.filter(|_| !tree).map(|bits| bits / 8)),
                Work::Plain(w) => w.set_rate(share.map(|bits| bits / 8)),
            }
            g.pacer.look();
        }
        let any = groups.iter().any(|g| moves(g));
        let end = self.shaper.set_budget(sum.filter(|_| any));
        let problem = end.as_ref().err().map(|e| format!("the share of the core link is not in force: {e}"));
        if let Some(e) = problem.as_ref().filter(|_| problem != *said) {
            tracing::warn!("{e}");
        }
        *said = problem;
        end
    }

    /// Until the agent ends.
    pub(super) fn keep_shares(&self, halt: &AtomicBool) {
        while !halt.load(Ordering::Relaxed) {
            // What fails is said in there, and tried again.
            let _ = self.share_out();
            std::thread::sleep(LOOK);
        }
    }
}

fn somebody_else(group: &str) -> Refusal {
    Refusal::new(Code::NotNow, format!("somebody else divides the budget of group {group:?}"))
}

/// Whether the group may be sending from this host.
fn moves(group: &Group) -> bool {
    if group.spec.my_source.is_none() || !group.started.load(Ordering::Acquire) {
        return false;
    }
    let pushes = matches!(&group.work, Work::InPath(w) if w.pushes());
    pushes || !group.is_over()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_divides_and_only_a_silent_one_is_taken_over_from() {
        let (first, second, third) = (Token([1; 32]), Token([2; 32]), Token([3; 32]));
        let held = Held::first(50, first);
        assert!(held.claim(first, 0) && held.hear(first, 1, 60));
        assert!(!held.claim(second, 1) && !held.hear(second, (1 << 32) + 1, 70), "the first is alive");
        lock(&held.0).heard -= Duration::from_nanos(SILENCE_NS);
        assert!(!held.claim(third, 0), "of no later term");
        assert!(held.claim(second, 1), "the first is silent");
        assert_eq!(held.get(), Share { seq: 1 << 32, bits: 60 });
        assert!(!held.claim(first, 0) && !held.hear(first, 2, 90), "too late");
        assert!(held.hear(second, (1 << 32) + 1, 40) && held.silent() < Duration::from_secs(1));
        assert_eq!(held.get().bits, 40);
    }
}
