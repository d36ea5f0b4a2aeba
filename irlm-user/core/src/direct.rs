//! Whether a host's QEMUs stream to their targets themselves (decision 0014). The way through two agents saves bytes and costs
//! processor time, so it is the slower one where a link takes a VM's pages faster than the agents do.

use serde::{Deserialize, Serialize};

/// What a group wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direct {
    /// Where the link was measured to be faster than the agents.
    #[default]
    Auto,
    /// Nowhere: bytes count, whatever the time.
    Never,
    /// Everywhere.
    Always,
}

/// Bytes of guest memory a second that one processor brings to the wire with an agent in the path, measured with 2x2 guests of
/// 256 MiB and nothing but the processors in the way: 592 MB of pages that are not uniform in 1.8 s on two processors, of
/// which each does the work of one source and of one target host.
pub const AGENT_RATE: f64 = 250e6;

/// Bytes a second that a link must give one of `hosts` source hosts, which has `vms` to move and so many `processors`, for its
/// agent to be in the way. The others may all send over the same core link at the same time, which is taken to be no wider than
/// what one of them was seen to get; half of the processors are the guests'.
#[must_use]
pub fn needed(hosts: usize, vms: usize, processors: usize) -> f64 {
    AGENT_RATE * (processors / 2).min(vms).max(1) as f64 * hosts.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_processors_or_hosts_are_faster_than_a_link_and_few_are_not() {
        let gbit = |n: f64| n * 1e9 / 8.0;
        // The 2x2 lab: two processors for everybody.
        assert!((gbit(1.0)..gbit(10.0)).contains(&needed(2, 2, 2)));
        // One VM leaves a large host of a quiet rack, and forty leave each of twenty.
        assert!(needed(1, 1, 64) < gbit(25.0));
        assert!(needed(20, 40, 64) > gbit(400.0));
        assert!(needed(0, 0, 0) > 0.0);
    }
}
