//! Division, and the promise that the sum holds at every moment, under a virtual clock with lost, late and doubled
//! messages and a divider that dies.

use super::*;
use proptest::prelude::*;

const MBIT: u64 = 1_000_000;

fn need(remaining: u64, limit: u64) -> Need {
    Need { remaining, limit }
}

#[test]
fn shares_follow_what_remains_and_what_can_be_used() {
    let any = u64::MAX;
    let by = |needs: &[Need]| divide(100 * MBIT, needs).iter().map(|b| b / MBIT).collect::<Vec<_>>();
    assert_eq!(by(&[need(5, any), need(5, any)]), [50, 50]);
    assert_eq!(by(&[need(30, any), need(10, any)]), [75, 25]);
    assert_eq!(by(&[need(30, 40 * MBIT), need(10, any)]), [40, 60]);
    assert_eq!(by(&[need(1, any), need(1_000_000, any)]), [5, 94]);
    // A host that has finished keeps next to nothing, and nobody is given what nobody can use.
    assert_eq!(divide(100 * MBIT, &[need(0, any), need(7, any)]), [MBIT / 2, 99 * MBIT + MBIT / 2]);
    assert_eq!(by(&[need(1, 10 * MBIT), need(1, 10 * MBIT)]), [10, 10]);
    assert_eq!(by(&[]), [0u64; 0]);
}

#[test]
fn hosts_that_claim_more_than_there_is_leave_nothing_for_others() {
    let mut d = Divider::take_over(100 * MBIT, 3, 1);
    d.claimed(0, u64::MAX);
    d.claimed(1, u64::MAX);
    d.claimed(2, 10 * MBIT);
    d.needs(Nanos(0), &[need(1, u64::MAX), need(1, u64::MAX), need(1, u64::MAX)]);
    let orders = d.orders();
    assert!(orders.iter().all(|o| o.host < 2 && o.bits < 34 * MBIT), "they shrink first: {orders:?}");
    for o in &orders {
        d.confirmed(o.host, o.seq);
    }
    assert_eq!(d.orders().iter().map(|o| o.host).collect::<Vec<_>>(), [2]);
}

fn any_needs(n: usize) -> impl Strategy<Value = Vec<Need>> {
    let remaining = prop_oneof![Just(0u64), 1..1u64 << 40, Just(u64::MAX)];
    let limit = prop_oneof![Just(u64::MAX), 1..200 * MBIT];
    proptest::collection::vec((remaining, limit).prop_map(|(r, l)| need(r, l)), n)
}

/// A message on its way: when it arrives, and what it is.
#[derive(Clone, Copy, Debug)]
enum Mail {
    Order(Order),
    /// Host, number.
    Confirm(usize, u64),
    /// The caller waits no longer.
    Timeout(usize),
}

#[derive(Clone, Debug)]
struct Fate {
    lost: bool,
    doubled: bool,
    delay: u64,
}

fn any_fate() -> impl Strategy<Value = Fate> {
    (0..10u8, 0..10u8, 1..400u64).prop_map(|(l, d, delay)| Fate { lost: l < 3, doubled: d < 2, delay })
}

proptest! {
    #[test]
    fn no_division_exceeds_the_budget_or_a_limit(needs in (0..9usize).prop_flat_map(any_needs), mbit in 1..10_000u64) {
        let shares = divide(mbit * MBIT, &needs);
        prop_assert!(shares.iter().sum::<u64>() <= mbit * MBIT);
        let idle = mbit * MBIT / 100;
        for (s, n) in shares.iter().zip(&needs) {
            prop_assert!(*s <= n.limit.max(idle));
        }
        // What can be used is used, but for rounding and the idle hosts' part.
        let usable = needs.iter().filter(|n| n.remaining > 0).fold(0u64, |a, n| a.saturating_add(n.limit));
        let active = needs.iter().any(|n| n.remaining > 0);
        prop_assert!(!active || shares.iter().sum::<u64>() + idle + 8 >= usable.min(mbit * MBIT));
    }

    #[test]
    fn the_sum_in_force_is_never_above_the_budget(
        script in (1..6usize).prop_flat_map(|n| proptest::collection::vec(any_needs(n), 1..12)),
        fates in proptest::collection::vec(any_fate(), 200),
        dies_at in proptest::option::of(0..6000u64),
    ) {
        let n = script[0].len();
        let budget = 97 * MBIT;
        let mut divider = Divider::new(budget, n);
        let mut hosts = vec![Share::first(equal_share(budget, n)); n];
        let mut mail: Vec<(u64, Mail)> = Vec::new();
        let mut fates = fates.into_iter().cycle();
        for ms in 0..6000u64 {
            let dead = dies_at.is_some_and(|t| ms >= t);
            let (now, later): (Vec<_>, Vec<_>) = mail.into_iter().partition(|m| m.0 <= ms);
            mail = later;
            for (_, m) in now {
                match m {
                    Mail::Order(o) => {
                        hosts[o.host].hear(o.seq, o.bits);
                        let fate = fates.next().unwrap();
                        if !fate.lost {
                            mail.push((ms + fate.delay, Mail::Confirm(o.host, hosts[o.host].seq)));
                        }
                    }
                    Mail::Confirm(h, seq) if !dead => divider.confirmed(h, seq),
                    Mail::Timeout(h) if !dead => divider.unanswered(h),
                    Mail::Confirm(..) | Mail::Timeout(_) => {}
                }
                let sum: u64 = hosts.iter().map(|h| h.bits).sum();
                prop_assert!(sum <= budget, "{sum} in force at {ms} ms");
            }
            if dead || ms % 100 != 0 {
                continue;
            }
            let step = (ms as usize * script.len() / 6000).min(script.len() - 1);
            divider.needs(Nanos(ms * 1_000_000), &script[step]);
            for o in divider.orders() {
                let fate = fates.next().unwrap();
                for _ in 0..1 + u32::from(fate.doubled) {
                    if !fate.lost {
                        mail.push((ms + fate.delay, Mail::Order(o)));
                    }
                }
                mail.push((ms + 300, Mail::Timeout(o.host)));
            }
        }
    }

    #[test]
    fn the_sum_holds_while_another_divider_takes_over_from_one_that_may_be_alive(
        script in (1..6usize).prop_flat_map(|n| proptest::collection::vec(any_needs(n), 2..12)),
        fates in proptest::collection::vec(any_fate(), 200),
        second_at in 0..3000u64,
        dies_at in proptest::option::of(0..6000u64),
    ) {
        let n = script[0].len();
        let budget = 97 * MBIT;
        let mut dividers = [Divider::new(budget, n), Divider::take_over(budget, n, 1)];
        let mut hosts = vec![Share::first(equal_share(budget, n)); n];
        // When, which divider, and a claim (host, its share once answered) or a share.
        #[derive(Clone, Copy)]
        enum Post { Claim(usize), Claimed(usize, u64), Mail(Mail) }
        let mut mail: Vec<(u64, usize, Post)> = Vec::new();
        let mut fates = fates.into_iter().cycle();
        for ms in 0..6000u64 {
            let (now, later): (Vec<_>, Vec<_>) = mail.into_iter().partition(|m| m.0 <= ms);
            mail = later;
            for (_, who, post) in now {
                let d = &mut dividers[who];
                let mut back = |ms: u64, post| {
                    let fate = fates.next().unwrap();
                    if !fate.lost {
                        mail.push((ms + fate.delay, who, post));
                    }
                };
                match post {
                    Post::Claim(h) => if hosts[h].claim(d.term()) {
                        back(ms, Post::Claimed(h, hosts[h].bits));
                    },
                    Post::Claimed(h, bits) => d.claimed(h, bits),
                    Post::Mail(Mail::Order(o)) => {
                        hosts[o.host].hear(o.seq, o.bits);
                        back(ms, Post::Mail(Mail::Confirm(o.host, hosts[o.host].seq)));
                    }
                    Post::Mail(Mail::Confirm(h, seq)) => d.confirmed(h, seq),
                    Post::Mail(Mail::Timeout(h)) => d.unanswered(h),
                }
                let sum: u64 = hosts.iter().map(|h| h.bits).sum();
                prop_assert!(sum <= budget, "{sum} in force at {ms} ms");
            }
            if ms % 100 != 0 {
                continue;
            }
            let step = (ms as usize * script.len() / 6000).min(script.len() - 1);
            for (who, d) in dividers.iter_mut().enumerate() {
                if (who == 1 && ms < second_at) || (who == 0 && dies_at.is_some_and(|t| ms >= t)) {
                    continue;
                }
                d.needs(Nanos(ms * 1_000_000), &script[step]);
                let orders = d.orders();
                let claims = (0..n).filter(|_| who == 1).map(Post::Claim);
                for post in claims.chain(orders.iter().map(|o| Post::Mail(Mail::Order(*o)))) {
                    let fate = fates.next().unwrap();
                    if !fate.lost {
                        mail.push((ms + fate.delay, who, post));
                    }
                }
                mail.extend(orders.iter().map(|o| (ms + 300, who, Post::Mail(Mail::Timeout(o.host)))));
            }
        }
    }

    #[test]
    fn with_a_working_network_the_shares_arrive_within_a_second(
        needs in (1..6usize).prop_flat_map(any_needs),
    ) {
        let budget = 97 * MBIT;
        let mut divider = Divider::new(budget, needs.len());
        let mut hosts = vec![Share::first(equal_share(budget, needs.len())); needs.len()];
        // Ten rounds of 100 ms.
        for round in 0..10u64 {
            divider.needs(Nanos(round * 100_000_000), &needs);
            for o in divider.orders() {
                hosts[o.host].hear(o.seq, o.bits);
                divider.confirmed(o.host, o.seq);
            }
        }
        for (h, want) in hosts.iter().zip(divide(budget, &needs)) {
            prop_assert!(h.bits.abs_diff(want) <= budget / 50, "{hosts:?} and {want}");
        }
    }
}

#[test]
fn one_host_finishes_and_the_others_have_its_share_after_one_confirmation() {
    let mut d = Divider::new(100 * MBIT, 2);
    d.needs(Nanos(0), &[need(10, u64::MAX), need(10, u64::MAX)]);
    assert_eq!(d.orders(), []);
    // Well before the next second.
    d.needs(Nanos(200_000_000), &[need(0, u64::MAX), need(5, u64::MAX)]);
    let shrink = d.orders();
    assert_eq!(shrink, [Order { host: 0, seq: 1, bits: MBIT / 2 }]);
    assert_eq!(d.orders(), []);
    d.unanswered(0);
    assert_eq!(d.orders(), shrink);
    d.confirmed(0, 1);
    assert_eq!(d.orders(), [Order { host: 1, seq: 1, bits: 99 * MBIT + MBIT / 2 }]);
    assert_eq!(d.confirmed_shares(), [MBIT / 2, 50 * MBIT]);
}

#[test]
fn who_takes_over_first_learns_what_is_in_force_and_is_then_obeyed_alone() {
    let mut hosts = [Share { seq: 7, bits: 70 * MBIT }, Share { seq: 5, bits: 30 * MBIT }];
    let mut d = Divider::take_over(100 * MBIT, 2, 1);
    let needs = [need(0, u64::MAX), need(10, u64::MAX)];
    d.needs(Nanos(0), &needs);
    assert!(hosts[0].claim(1));
    d.claimed(0, hosts[0].bits);
    assert_eq!(d.orders(), [], "host 1 may have been given more");
    assert!(hosts[1].claim(1));
    d.claimed(1, hosts[1].bits);
    let first = d.orders();
    assert_eq!(first, [Order { host: 0, seq: (1 << 32) + 1, bits: MBIT / 2 }]);
    hosts[0].hear(first[0].seq, first[0].bits);
    // What the silent one had sent comes now, and is not heard.
    hosts[0].hear(8, 90 * MBIT);
    assert!(!hosts[0].claim(0));
    assert_eq!((hosts[0].bits, term_of(hosts[0].seq)), (MBIT / 2, 1));
    d.confirmed(0, first[0].seq);
    assert_eq!(d.orders(), [Order { host: 1, seq: (1 << 32) + 1, bits: 99 * MBIT + MBIT / 2 }]);
}
