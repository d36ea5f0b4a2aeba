//! Divides the group's budget among its source hosts while the group moves: looks at what the agents say remains, and
//! sends shares. `core::budget` sees to it that the sum holds; if this dies the agents keep their last shares.

use super::plan::Plan;
use super::watch::AgentView;
use crate::control::api::{GroupStatus, Reply, Request, Role};
use crate::control::client::AgentClient;
use crate::core::budget::{Divider, Need, Order};
use crate::core::units::PAGE_SIZE;
use crate::flow::now;
use std::time::Duration;
use tokio::task::JoinSet;

/// How often needs are looked at; the agents are asked about as often.
const LOOK: Duration = Duration::from_millis(100);
/// A share that is not confirmed within this is sent again.
const ANSWER: Duration = Duration::from_secs(2);

/// The dividing task; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Dividing {
    _task: JoinSet<()>,
}

/// Starts it; nothing to do for a group without a budget.
pub(super) fn divide_while_it_moves(
    plan: &Plan,
    look: impl Fn() -> Vec<AgentView> + Send + 'static,
) -> Option<Dividing> {
    let budget = plan.config.budget_mbit? * 1_000_000;
    let hosts: Option<Vec<usize>> = plan.config.source.iter().map(|h| plan.source_agent(&h.name)).collect();
    let (hosts, plan) = (hosts?, plan.clone());
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut clients: Vec<Option<AgentClient>> =
            hosts.iter().map(|i| Some(AgentClient::new(plan.agents[*i].addr, ANSWER))).collect();
        let mut divider = Divider::new(budget, hosts.len());
        let mut calls: JoinSet<(AgentClient, Order, bool)> = JoinSet::new();
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    let views = look();
                    let status = |i: &usize| views.get(*i).and_then(|v| v.group(&plan.config.name));
                    let needs: Vec<Need> = hosts.iter().map(|i| need(status(i))).collect();
                    divider.needs(now(), &needs);
                }
                Some(Ok((client, order, heard))) = calls.join_next() => {
                    clients[order.host] = Some(client);
                    match heard {
                        true => divider.confirmed(order.host, order.seq),
                        // Again, but not at once.
                        false => {
                            divider.unanswered(order.host);
                            continue;
                        }
                    }
                }
            }
            for order in divider.orders() {
                // One call at a time a host: the divider has no second order for it before the first is confirmed.
                let Some(mut client) = clients[order.host].take() else { continue };
                let (group, token) = (plan.config.name.clone(), plan.token);
                calls.spawn(async move {
                    let Order { seq, bits, .. } = order;
                    let answer = client.call(&Request::BudgetShare { group, token, seq, bits }).await;
                    let heard = matches!(answer, Ok(Reply::Share { seq: s, .. }) if s == seq);
                    if let Err(e) = answer {
                        tracing::debug!("share not confirmed: {e}");
                    }
                    (client, order, heard)
                });
            }
        }
    });
    Some(Dividing { _task: task })
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
                incoming: vec![],
                problem: None,
            },
            vms,
            host: HostCounters { push_left, ..HostCounters::default() },
            share: Some(ShareStatus { seq: 0, bits: 1, limit: Some(77), tree: true }),
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
}
