//! How long vCPUs waited for pages, by where the page came from.

use crate::core::postcopy::Origin;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest wait that is told from longer ones, microseconds: an hour.
const LONGEST: u64 = 3_600_000_000;

/// Waits for pages of one origin, microseconds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Waits {
    /// How many.
    pub count: u64,
    /// Half of them took at most so long.
    pub p50_us: u64,
    /// Nine of ten.
    pub p90_us: u64,
    /// Of a hundred, 99.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
    /// Upper bound in microseconds, and waits that took at most that and more than the bound before.
    pub histogram: Vec<(u64, u64)>,
}

/// Faults of one VM while its pages came.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FaultWaits {
    /// The page was there, or nothing was to come for it.
    pub here: Waits,
    /// Its content was in this host's store.
    pub store: Waits,
    /// Another target host sent its content.
    pub forward: Waits,
    /// The VM's source sent it.
    pub source: Waits,
    /// All of them.
    pub all: Waits,
    /// Those of them whose page was to come from another target host when it was touched, whoever sent it in the end.
    #[serde(default)]
    pub held: Waits,
    /// Beside them: pages that no vCPU waited for, from the reference until the content came from another target host.
    #[serde(default)]
    pub behind: Waits,
}

/// Gathers them.
#[derive(Debug)]
pub(super) struct Latency {
    vcpus: [Histogram<u64>; 4],
    held: Histogram<u64>,
    behind: Histogram<u64>,
}

impl Latency {
    pub(super) fn new() -> Self {
        let one = || {
            Histogram::new_with_bounds(1, LONGEST, 2)
                .unwrap_or_else(|_| unreachable!("bounds and digits are valid"))
        };
        Self { vcpus: [one(), one(), one(), one()], held: one(), behind: one() }
    }

    pub(super) fn record(&mut self, origin: Origin, ns: u64) {
        let at = match origin {
            Origin::Here => 0,
            Origin::Store => 1,
            Origin::Forward => 2,
            Origin::Source => 3,
        };
        self.vcpus[at].saturating_record(ns / 1000);
    }

    /// A wait, already recorded, for a page that was to come from another target host.
    pub(super) fn record_held(&mut self, ns: u64) {
        self.held.saturating_record(ns / 1000);
    }

    /// A page that no vCPU waited for.
    pub(super) fn record_behind(&mut self, ns: u64) {
        self.behind.saturating_record(ns / 1000);
    }

    pub(super) fn waits(&self) -> FaultWaits {
        let mut all = self.vcpus[0].clone();
        for h in &self.vcpus[1..] {
            // Equal shapes add up.
            let _ = all.add(h);
        }
        let [here, store, forward, source] = self.vcpus.each_ref().map(summary);
        FaultWaits {
            here,
            store,
            forward,
            source,
            all: summary(&all),
            held: summary(&self.held),
            behind: summary(&self.behind),
        }
    }
}

fn summary(h: &Histogram<u64>) -> Waits {
    let at = |q| h.value_at_quantile(q);
    Waits {
        count: h.len(),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        max_us: h.max(),
        histogram: h
            .iter_log(16, 2.0)
            .map(|v| (v.value_iterated_to(), v.count_since_last_iteration()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wait_is_in_one_origin_and_in_all() {
        let mut l = Latency::new();
        for us in 1..=1000 {
            l.record(Origin::Source, us * 1000);
        }
        l.record(Origin::Store, 5_000);
        l.record(Origin::Here, u64::MAX);
        l.record_behind(7_000_000);
        let w = l.waits();
        assert_eq!(
            (w.source.count, w.store.count, w.forward.count, w.here.count, w.all.count),
            (1000, 1, 0, 1, 1002)
        );
        assert!((495..=505).contains(&w.source.p50_us) && (985..=1000).contains(&w.source.p99_us), "{w:?}");
        assert!((1000..1010).contains(&w.source.max_us), "{}", w.source.max_us);
        assert_eq!(w.source.histogram.iter().map(|(_, n)| n).sum::<u64>(), 1000);
        assert_eq!(w.behind.count, 1, "beside the others");
        assert!(w.forward.histogram.iter().all(|(_, n)| *n == 0));
    }
}
