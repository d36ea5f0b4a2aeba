//! How fast a sender may send: paced in bursts that a switch with small buffers takes, at a rate that grows by equal
//! steps and falls by a share when the worst receiver loses more than a little (AIMD), between a floor and a ceiling.
//!
//! A little loss is borne (`BORNE`): links and cards lose some packets whatever the rate, and one receiver of many
//! that loses a few must not stop the others. What keeps room for other people's TCP is the ceiling, half the port
//! unless the group says otherwise, and the class of the packets (docs/multicast.md).

use super::{MS, since};
use crate::units::Nanos;

/// Loss at the worst receiver that is no sign of a full link.
const BORNE: f64 = 0.03;
/// What is left of the rate after more than that.
const LEFT: f64 = 0.7;
/// Growth an interval before the first such loss.
const START: f64 = 1.5;
/// Steps after it: this share of the rate at the last fall.
const STEP: f64 = 0.05;
/// The rate is looked at this often, if so many fragments were sent meanwhile.
const INTERVAL: u64 = 100 * MS;
const SAMPLE: u64 = 150;
/// Longest burst, bytes.
const BURST: f64 = 32.0 * 1024.0;
/// First rate, bytes a second: 20 Mbit/s.
const FIRST: f64 = 2.5e6;

/// A sender's rate.
#[derive(Clone, Debug)]
pub struct Rate {
    floor: f64,
    ceiling: f64,
    rate: f64,
    step: Option<f64>,
    tokens: f64,
    last: Nanos,
    looked: Nanos,
    fragments: u64,
    bytes: u64,
}

impl Rate {
    /// Between `floor` and `ceiling`, bytes a second.
    #[must_use]
    pub fn new(floor: u64, ceiling: u64, now: Nanos) -> Self {
        let (floor, ceiling) = (floor.max(1) as f64, ceiling.max(floor).max(1) as f64);
        Self {
            floor,
            ceiling,
            rate: FIRST.clamp(floor, ceiling),
            step: None,
            tokens: BURST,
            last: now,
            looked: now,
            fragments: 0,
            bytes: 0,
        }
    }

    /// Bytes a second now.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate as u64
    }

    /// When the next fragment may leave; none: now.
    pub fn wait(&mut self, now: Nanos) -> Option<Nanos> {
        let dt = since(now, self.last) as f64 / 1e9;
        self.last = now.max(self.last);
        self.tokens = (self.tokens + self.rate * dt).min(BURST);
        // The clock counts whole nanoseconds: a debt of less than a byte is none.
        (self.tokens < -1.0).then(|| Nanos(now.0 + (-self.tokens / self.rate * 1e9).ceil() as u64))
    }

    /// A fragment of so many bytes on the wire left.
    pub fn sent(&mut self, bytes: usize) {
        self.tokens -= bytes as f64;
        self.fragments += 1;
        self.bytes += bytes as u64;
    }

    /// `lost`: fragments that the worst receiver said it missed since the last look that came to something. Returns
    /// whether this one did.
    pub fn look(&mut self, lost: u64, now: Nanos) -> bool {
        let dt = since(now, self.looked);
        if dt < INTERVAL || (self.fragments < SAMPLE && dt < 10 * INTERVAL) {
            return false;
        }
        let limited = self.bytes as f64 > 0.5 * self.rate * (dt as f64 / 1e9);
        // Few fragments say little: three that are lost of twenty are no share.
        let share = lost as f64 / self.fragments.max(SAMPLE) as f64;
        if share > BORNE {
            self.step = Some(self.rate * STEP);
            self.rate = (self.rate * LEFT).max(self.floor);
        } else if limited {
            // A rate that was not used says nothing of a higher one.
            self.rate = self.step.map_or(self.rate * START, |s| self.rate + s).min(self.ceiling);
        }
        (self.looked, self.fragments, self.bytes) = (now, 0, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends 1,500-byte fragments as fast as allowed for so many seconds over a link that loses what is too much, and a
    /// share in any case. Bytes a second over the last half.
    fn settle(link: f64, loss: f64, floor: u64, ceiling: u64, seconds: u64) -> f64 {
        let mut r = Rate::new(floor, ceiling, Nanos(0));
        let (mut now, mut sent, mut lost, mut late, mut queue) = (Nanos(0), 0u64, 0.0, 0u64, 0.0f64);
        let mut at = Nanos(0);
        while now.0 < seconds * 1000 * MS {
            if let Some(t) = r.wait(now) {
                now = t;
                continue;
            }
            r.sent(1500);
            sent += 1;
            queue = (queue - link * since(now, at) as f64 / 1e9).max(0.0) + 1500.0;
            at = now;
            if queue > 250_000.0 {
                queue -= 1500.0;
                lost += 1.0;
            } else {
                lost += loss;
            }
            if r.look(lost as u64, now) {
                lost = 0.0;
            }
            late += if now.0 > seconds * 500 * MS { 1500 } else { 0 };
        }
        assert!(sent > 0);
        late as f64 / (seconds as f64 / 2.0)
    }

    #[test]
    fn it_finds_the_link_and_stays_within_its_bounds() {
        let mbit = 1e6 / 8.0;
        // A link of 100 Mbit/s is found and used whatever the ceiling, also with 1 % of random loss.
        for loss in [0.0, 0.01] {
            let got = settle(100.0 * mbit, loss, (mbit) as u64, (5000.0 * mbit) as u64, 20);
            assert!((80.0 * mbit..115.0 * mbit).contains(&got), "{} Mbit/s at {loss}", got / mbit);
        }
        // Never above the ceiling, however fast the link; never below the floor, however much is lost.
        let got = settle(1e12, 0.0, mbit as u64, (50.0 * mbit) as u64, 20);
        assert!((49.0 * mbit..50.2 * mbit).contains(&got), "{} Mbit/s", got / mbit);
        let got = settle(1e12, 0.5, (4.0 * mbit) as u64, (50.0 * mbit) as u64, 20);
        assert!((3.9 * mbit..4.1 * mbit).contains(&got), "{} Mbit/s", got / mbit);
    }

    #[test]
    fn bursts_are_small_also_after_a_pause() {
        let mut r = Rate::new(1, 1_000_000_000, Nanos(0));
        let now = Nanos(3_600_000 * MS);
        let mut burst = 0;
        while r.wait(now).is_none() {
            r.sent(1500);
            burst += 1500;
        }
        assert!(burst as f64 <= BURST + 1501.0);
    }
}
