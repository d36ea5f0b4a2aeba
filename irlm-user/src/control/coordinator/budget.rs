//! Divides the group's budget among its source hosts while the group moves: looks at what the agents say remains, and
//! sends shares. `core::budget` sees to it that the sum holds; if this dies the agents keep their last shares until
//! somebody follows the group (`irlm status --follow`) and takes over.

use super::plan::Plan;
use super::watch::AgentView;
use crate::control::api::{Code, GroupStatus, Reply, Request, Role, ShareStatus, Token};
use crate::control::client::{AgentClient, CallError};
use crate::core::budget::{Divider, Need, Order, SILENCE_NS, term_of};
use crate::core::units::PAGE_SIZE;
use crate::flow::now;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// How often needs are looked at; the agents are asked about as often.
const LOOK: Duration = Duration::from_millis(100);
/// A share that is not confirmed within this is sent again.
const ANSWER: Duration = Duration::from_secs(2);
/// How often each host hears that somebody divides, whether its share changes or not.
const SIGN: Duration = Duration::from_secs(1);

/// The dividing task; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Dividing {
    _task: JoinSet<()>,
}

/// Who divides at first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum First {
    /// This coordinator, which starts the group.
    This,
    /// Another, as long as the hosts hear it.
    Other,
}

/// What was said to a host.
#[derive(Clone, Copy, Debug)]
enum Said {
    Claim,
    Share(Order),
}

/// Starts it; nothing to do for a group without a budget.
pub(super) fn divide_while_it_moves(
    plan: &Plan,
    look: impl Fn() -> Vec<AgentView> + Send + 'static,
    first: First,
) -> Option<Dividing> {
    let budget = plan.config.budget_mbit? * 1_000_000;
    let hosts: Option<Vec<usize>> = plan.config.source.iter().map(|h| plan.source_agent(&h.name)).collect();
    let mut d = Division::new(plan.clone(), hosts?, budget, first);
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = tick.tick() => d.look(&look()),
                Some(Ok(answered)) = d.calls.join_next() => d.answered(answered),
            }
            d.speak();
        }
    });
    Some(Dividing { _task: task })
}

type Answered = (AgentClient, usize, Said, Result<Reply, CallError>);

struct Division {
    plan: Plan,
    hosts: Vec<usize>,
    budget: u64,
    /// What this divider's words bear.
    token: Token,
    /// None while somebody else divides.
    divider: Option<Divider>,
    /// None while a call is under way: one at a time a host, so that words do not overtake each other.
    clients: Vec<Option<AgentClient>>,
    /// When each host last heard that somebody divides.
    signs: Vec<Option<Instant>>,
    calls: JoinSet<Answered>,
}

impl Division {
    fn new(plan: Plan, hosts: Vec<usize>, budget: u64, first: First) -> Self {
        Self {
            budget,
            token: plan.token,
            divider: (first == First::This).then(|| Divider::new(budget, hosts.len())),
            clients: hosts.iter().map(|i| Some(AgentClient::new(plan.at(*i), ANSWER))).collect(),
            signs: vec![None; hosts.len()],
            calls: JoinSet::new(),
            plan,
            hosts,
        }
    }

    fn look(&mut self, views: &[AgentView]) {
        let name = &self.plan.config.name;
        let status = |i: &usize| views.get(*i).and_then(|v| v.group(name));
        if self.divider.is_none() {
            let shares = self.hosts.iter().filter_map(|i| {
                let heard = views.get(*i).is_some_and(|v| v.answers);
                status(i).filter(|_| heard)?.share
            });
            let Some(term) = next_term(shares) else { return };
            tracing::info!("whoever divided the budget is not heard any more: doing it from here on");
            self.token = Token(rand::random());
            self.divider = Some(Divider::take_over(self.budget, self.hosts.len(), term));
            self.signs.fill(None);
        }
        if let Some(divider) = &mut self.divider {
            let needs: Vec<Need> = self.hosts.iter().map(|i| need(status(i))).collect();
            divider.needs(now(), &needs);
        }
    }

    fn answered(&mut self, (client, host, said, answer): Answered) {
        self.clients[host] = Some(client);
        let Some(divider) = &mut self.divider else { return };
        match (said, answer) {
            (Said::Claim, Ok(Reply::Share { seq, bits })) if term_of(seq) == divider.term() => {
                divider.claimed(host, bits);
            }
            (_, Err(CallError::Refused { refusal, .. })) if refusal.code == Code::NotNow => {
                tracing::info!("{}", refusal.msg);
                self.divider = None;
            }
            (Said::Share(order), Ok(Reply::Share { seq, .. })) if seq == order.seq => {
                divider.confirmed(host, seq);
            }
            (Said::Share(_), answer) => {
                tracing::debug!("share not confirmed: {answer:?}");
                divider.unanswered(host);
            }
            (Said::Claim, answer) => tracing::debug!("not heard as the divider: {answer:?}"),
        }
    }

    fn speak(&mut self) {
        let Some(divider) = &mut self.divider else { return };
        let (group, token, term) = (&self.plan.config.name, self.token, divider.term());
        let mut say = |host: usize, said: Said| {
            let Some(mut client) = self.clients[host].take() else { return false };
            let group = group.clone();
            let request = match said {
                Said::Claim => Request::BudgetClaim { group, token, term },
                Said::Share(Order { seq, bits, .. }) => Request::BudgetShare { group, token, seq, bits },
            };
            self.calls.spawn(async move {
                let answer = client.call(&request).await;
                (client, host, said, answer)
            });
            true
        };
        for order in divider.orders() {
            if !say(order.host, Said::Share(order)) {
                divider.unanswered(order.host);
            }
        }
        for (host, sign) in self.signs.iter_mut().enumerate() {
            if sign.is_none_or(|s| s.elapsed() >= SIGN) && say(host, Said::Claim) {
                *sign = Some(Instant::now());
            }
        }
    }
}

/// The term to take over under, if every host that answers has been without a divider for long enough.
fn next_term(shares: impl Iterator<Item = ShareStatus>) -> Option<u32> {
    let mut last = None;
    for s in shares {
        if s.silent_ms < SILENCE_NS / 1_000_000 {
            return None;
        }
        last = last.max(Some(term_of(s.seq)));
    }
    last?.checked_add(1)
}

/// What a source host still has to send, by what its agent said last. A host never heard of has much.
fn need(status: Option<&GroupStatus>) -> Need {
    let Some(g) = status else { return Need { remaining: u64::MAX, limit: u64::MAX } };
    let page = PAGE_SIZE as u64;
    let limit = g.share.and_then(|s| s.limit).unwrap_or(u64::MAX);
    let push = g.host.push_left * page;
    let open: Vec<_> = g.vms.iter().filter(|v| v.role == Role::Source && !v.phase.is_final()).collect();
    if open.is_empty() {
        // It may still carry contents for others.
        return Need { remaining: push, limit };
    }
    let guessed = g.prepare.pages_total * page / g.vms.len().max(1) as u64;
    let of = |v: &&crate::control::api::VmStatus| match v.started_ns {
        0 => v.ram_total.max(guessed),
        _ => v.ram_remaining,
    };
    let streams: u64 = open.iter().map(of).sum();
    // What is planned to be pushed by this host or another is not in the streams; which, nobody counts.
    Need { remaining: streams.max(push).max(1), limit }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{
        HostCounters, Method, Phase, PreparePhase, PrepareStatus, ShareStatus, VmStatus,
    };

    fn vm(phase: Phase, started_ns: u64, ram_remaining: u64) -> VmStatus {
        serde_json::from_value(serde_json::json!({
            "ix": 0, "name": "v", "role": "source", "phase": phase,
            "started_ns": started_ns, "ram_remaining": ram_remaining,
        }))
        .unwrap()
    }

    fn group(vms: Vec<VmStatus>, push_left: u64) -> GroupStatus {
        GroupStatus {
            started_ns: 0,
            group: "g".into(),
            method: Method::Irlm,
            prepare: PrepareStatus {
                phase: PreparePhase::Ready,
                pages_total: 1000,
                pages_done: 1000,
                distinct: 0,
                hot: 0,
                planning: false,
                direct: None,
                incoming: vec![],
                problem: None,
            },
            vms,
            host: HostCounters { push_left, ..HostCounters::default() },
            share: Some(ShareStatus { seq: 0, bits: 1, limit: Some(77), tree: true, silent_ms: 0 }),
        }
    }

    #[test]
    fn needs_follow_what_agents_say() {
        let left = |g: &GroupStatus| need(Some(g)).remaining;
        assert_eq!(need(None).remaining, u64::MAX);
        // Not begun: what preparation has found.
        assert_eq!(left(&group(vec![vm(Phase::Prepared, 0, 0)], 0)), 4_096_000);
        assert_eq!(left(&group(vec![vm(Phase::Migrating, 5, 9000)], 0)), 9000);
        assert_eq!(left(&group(vec![vm(Phase::Migrating, 5, 9000)], 50)), 50 * 4096);
        assert_eq!(left(&group(vec![vm(Phase::Stopped, 5, 0)], 0)), 1);
        let over = || vec![vm(Phase::Done, 5, 9000), vm(Phase::Failed, 0, 0)];
        assert_eq!(left(&group(over(), 0)), 0);
        assert_eq!(left(&group(over(), 3)), 3 * 4096);
        assert_eq!(need(Some(&group(vec![], 0))).limit, 77);
    }

    #[test]
    fn who_follows_takes_over_when_no_host_hears_a_divider() {
        let share = |term: u64, silent_ms| ShareStatus {
            seq: (term << 32) + 5,
            bits: 1,
            limit: None,
            tree: true,
            silent_ms,
        };
        let long = SILENCE_NS / 1_000_000;
        assert_eq!(next_term([share(0, long), share(0, long + 9)].into_iter()), Some(1));
        assert_eq!(next_term([share(2, long), share(1, long)].into_iter()), Some(3));
        assert_eq!(next_term([share(0, long), share(0, long - 1)].into_iter()), None);
        assert_eq!(next_term([].into_iter()), None, "no host answers");
        assert_eq!(next_term([share(u64::from(u32::MAX), long)].into_iter()), None);
    }
}
