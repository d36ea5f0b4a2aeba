//! The port's policy as control requests see it, and this host's shares of its groups' budgets: held by the class
//! tree where there is one, else by TCP's pacing; plain QEMU, whose packets nobody here tags, is given a limit of its own.

use super::{Group, Refusal, Reply, Shared, Token, Work};
use crate::control::api::{Code, ShareStatus};
use crate::control::shape::Tagger;
use crate::core::policy::{Mark, Marks};
use crate::flow::lock;
use crate::host::bpf::{Classifier, Marking, TagPolicy};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often shares are fitted to who has something to send, and given back by groups that are over.
const LOOK: Duration = Duration::from_millis(100);

/// The eBPF classifier as the shaper sees it.
#[derive(Debug)]
pub(super) struct PortTags(pub(super) Classifier);

impl Tagger for PortTags {
    fn off(&self) -> Option<String> {
        self.0.disabled_reason().map(str::to_owned)
    }

    fn set(&mut self, marks: &Marks, racks: &[(IpAddr, u8)]) -> Result<(), String> {
        let of = |m: &Mark| Marking { dscp: m.dscp, priority: m.priority, mark: m.mark };
        let mut racks = racks.to_vec();
        if !racks.is_empty() {
            // The target rack's multicast leaves it no more than what goes to its hosts.
            racks.extend([([239, 0, 0, 0].into(), 8), (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8)]);
        }
        let policy = TagPolicy { classes: marks.core.map(|m| of(&m)), rack_prefixes: racks };
        self.0.set_policy_by_scope(&policy, &marks.rack.map(|m| of(&m))).map_err(|e| e.to_string())
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
            groups.iter().filter(|g| moves(g)).filter_map(|g| Some(lock(g.share.as_ref()?).bits)).collect();
        if !shares.is_empty() {
            st.share = Some(shares.into_iter().fold(0, u64::saturating_add));
            st.shared_by = Some(if self.shaper.has_tree() { "tree" } else { "pacing" }.to_owned());
        }
        Reply::Policy(Box::new(st))
    }

    pub(super) fn take_share(&self, name: &str, token: Token, seq: u64, bits: u64) -> Result<Reply, Refusal> {
        let group = self.group(name)?;
        if group.spec.token != token {
            let what = format!("group {name:?} is not known by that token");
            return Err(Refusal::new(Code::UnknownGroup, what));
        }
        let Some(share) = &group.share else {
            let what = format!("group {name:?} has no budget at agent {}", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        };
        lock(share).hear(seq, bits);
        // A share that is not in force must not be given to others.
        self.share_out().map_err(|e| Refusal::new(Code::Failed, e))?;
        let now = *lock(share);
        tracing::debug!("group {name}: share {} bit/s (number {})", now.bits, now.seq);
        Ok(Reply::Share { seq: now.seq, bits: now.bits })
    }

    pub(super) fn share_status(&self, group: &Group) -> Option<ShareStatus> {
        let share = *lock(group.share.as_ref()?);
        let (limit, tree) = (self.shaper.limit(), self.shaper.has_tree());
        Some(ShareStatus { seq: share.seq, bits: share.bits, limit, tree })
    }

    /// Puts the shares in force.
    pub(super) fn share_out(&self) -> Result<(), String> {
        let mut said = lock(&self.sharing);
        let groups: Vec<Arc<Group>> = lock(&self.groups).values().cloned().collect();
        let tree = self.shaper.has_tree();
        let mut sum = Some(0u64);
        for g in &groups {
            let moves = moves(g);
            let share = g.share.as_ref().filter(|_| moves).map(|s| lock(s).bits);
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

/// Whether the group may be sending from this host.
fn moves(group: &Group) -> bool {
    if group.spec.my_source.is_none() || !group.started.load(Ordering::Acquire) {
        return false;
    }
    let pushes = matches!(&group.work, Work::InPath(w) if w.pushes());
    pushes || !group.is_over()
}
