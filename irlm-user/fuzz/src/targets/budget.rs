//! A group's budget, divided by one who may be replaced, among hosts that are far away: whatever is lost, doubled, late or
//! made up, what the honest hosts may use together is never above the budget.

use crate::ops::Ops;
use irlm_user::core::budget::{Divider, Need, Order, Share, equal_share};
use irlm_user::core::units::Nanos;

const HOSTS: usize = 4;

pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let budget = u64::from(ops.word()) << (ops.byte() % 48);
    let mut divider = Divider::new(budget, HOSTS);
    let mut shares = [Share::first(equal_share(budget, HOSTS)); HOSTS];
    // Some hosts may say anything.
    let liars = if ops.rarely() { ops.byte() } else { 0 };
    let lies = |host: usize| liars >> host & 1 == 1;
    let mut under_way: Vec<Order> = Vec::new();
    let mut now = Nanos(0);
    while !ops.is_over() {
        now = now.plus_ms(u64::from(ops.byte()) * 10);
        match ops.below(6) {
            0 => {
                let need = |ops: &mut Ops<'_>| Need {
                    remaining: u64::from(ops.byte()) << (ops.byte() % 56),
                    limit: u64::from(ops.byte()) << (ops.byte() % 56),
                };
                let needs: Vec<Need> = (0..HOSTS).map(|_| need(&mut ops)).collect();
                divider.needs(now, &needs);
            }
            1 => under_way.extend(divider.orders()),
            // An order arrives, and stays on its way: it may come twice. Its answer may be lost.
            2 if !under_way.is_empty() => {
                let order = under_way[ops.below(under_way.len().min(256))];
                shares[order.host].hear(order.seq, order.bits);
                if ops.byte() & 1 == 0 && shares[order.host].seq == order.seq {
                    divider.confirmed(order.host, order.seq);
                }
            }
            3 => divider.unanswered(ops.below(HOSTS + 1)),
            // Somebody takes over, and asks all hosts what they have.
            4 => {
                divider = Divider::take_over(budget, HOSTS, divider.term().saturating_add(1));
                for (host, share) in shares.iter_mut().enumerate() {
                    if share.claim(divider.term()) {
                        let lie = u64::from(ops.byte()) << (ops.byte() % 64);
                        divider.claimed(host, if lies(host) { lie } else { share.bits });
                    }
                }
            }
            _ => divider.confirmed(ops.below(HOSTS + 1), ops.byte().into()),
        }
        let honest = shares.iter().enumerate().filter(|(h, _)| !lies(*h));
        let used: u128 = honest.map(|(_, s)| u128::from(s.bits)).sum();
        assert!(used <= u128::from(budget), "{used} of {budget} bit/s are in use");
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let turn = [9, 0, 200, 20, 255, 40, 100, 20, 255, 40, 0, 0, 255, 40, 7, 10, 9, 30, 120, 1, 3, 2, 0, 0, 3, 2, 1, 0];
    let mut plain = vec![0xe8, 3, 20, 0];
    plain.extend(turn.repeat(3));
    let mut taken = vec![0xe8, 3, 20, 3, 0b1100];
    taken.extend(turn);
    taken.extend([1, 4, 1, 1, 1, 1, 255, 56, 255, 56]);
    taken.extend(turn);
    vec![plain, taken]
}
