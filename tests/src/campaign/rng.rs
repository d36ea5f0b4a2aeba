//! The campaign's own random numbers (SplitMix64): a seed must mean the same schedule for as long as the draws stay the
//! same, whatever version of whatever library is built in.

/// A stream of numbers.
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// One of 0 to `n - 1`; 0 if there is nothing to choose from.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { ((u128::from(self.next()) * u128::from(n)) >> 64) as u64 }
    }

    /// An index into something of this length.
    pub(super) fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// True once in `n` times.
    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// From `low` to `high`, each power of the quotient as likely, and short ones twice as much: most of what stops on a
    /// real host stops for a moment.
    pub(super) fn mostly_short(&mut self, low: f64, high: f64) -> u32 {
        let u = self.below(1 << 32) as f64 / (1u64 << 32) as f64;
        (low * (high / low).powf(u * u)) as u32
    }

    /// One of these.
    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())]
    }
}

/// The seed of run `n` of a campaign.
#[must_use]
pub(super) fn seed_of(campaign: u64, n: u64) -> u64 {
    mix(mix(campaign ^ 0x6972_6c6d).wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_same_for_ever() {
        let mut rng = Rng::new(7);
        assert_eq!([rng.next(), rng.next()], [7_191_089_600_892_374_487, 309_689_372_594_955_804]);
        assert_ne!(seed_of(1, 0), seed_of(1, 1));
        assert_ne!(seed_of(1, 1), seed_of(2, 1));
    }

    #[test]
    fn lengths_keep_their_bounds_and_most_are_short() {
        let mut rng = Rng::new(1);
        let all: Vec<u32> = (0..1000).map(|_| rng.mostly_short(100.0, 20_000.0)).collect();
        assert!(all.iter().all(|ms| (100..20_000).contains(ms)));
        let short = all.iter().filter(|ms| **ms < 1000).count();
        assert!((550..800).contains(&short), "{short} of 1000 below a second");
        assert!(all.iter().any(|ms| *ms > 10_000));
    }
}
