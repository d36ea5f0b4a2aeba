//! Damaged and spliced copies of inputs, the same for the same seed, so that tests need no libFuzzer.

/// Largest mutated input, so that a run's speed does not drift.
const MAX_INPUT: usize = 64 << 10;
/// Numbers at which readers of lengths and counts tend to break.
const WORDS: [u64; 7] = [0, u64::MAX, 0x10, 0x28, 0x22, 1 << 44, 0x7fff_ffff_ffff_f008];

/// SplitMix64: enough to pick places and bytes, and the same everywhere.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }
}

/// One input with one to eight wounds: bits, bytes, boundary words, cuts, repeats, and pieces of another input.
#[must_use]
pub fn mutate(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(8) {
        // Headers stand at the front and are a small part of the whole: aim there every other time.
        let reach = if random.number() & 1 == 0 { data.len() } else { data.len().min(400) };
        let at = random.below(reach);
        match random.below(7) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.number() as u8,
            2 => {
                let word = WORDS[random.below(WORDS.len())];
                let end = data.len().min(at + 8);
                data[at..end].copy_from_slice(&word.to_be_bytes()[..end - at]);
            }
            3 => data.truncate(at),
            4 => {
                let end = data.len().min(at + 1 + random.below(32));
                data.drain(at..end);
            }
            5 => {
                let end = data.len().min(at + 1 + random.below(5000));
                let piece = data[at..end].to_vec();
                data.splice(at..at, piece);
            }
            _ => {
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len());
                let end = other.len().min(from + random.below(6000));
                data.splice(at..at, other[from..end].iter().copied());
            }
        }
    }
    data.truncate(MAX_INPUT);
    data
}
