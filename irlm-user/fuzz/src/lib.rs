//! What fuzz targets do where there is no libFuzzer: replay inputs, or mutate them from a seed, on a stable compiler.

use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

/// Largest mutated input, so that a run's speed does not drift.
const MAX_INPUT: usize = 256 << 10;

const USAGE: &str = "usage: TARGET [--mutate COUNT [--seed N]] FILE_OR_DIR...
Runs the target once on every file. With --mutate, then COUNT times on damaged and spliced copies of them.
A panic of the target is a finding; --seed prints and repeats a run. Under cargo-fuzz, libFuzzer takes over.";

/// The plain program around a fuzz target: takes the process's arguments, returns its exit code.
pub fn main(target: impl Fn(&[u8])) -> ExitCode {
    match run(env::args().skip(1), target) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(mut args: impl Iterator<Item = String>, target: impl Fn(&[u8])) -> Result<(), Error> {
    let bad = |what: &str| Error::new(ErrorKind::InvalidInput, what.to_owned());
    let (mut count, mut seed, mut files) = (0u64, 1u64, Vec::new());
    while let Some(arg) = args.next() {
        let mut number =
            || args.next().and_then(|n| n.parse().ok()).ok_or_else(|| bad("a number is missing"));
        match arg.as_str() {
            "--mutate" => count = number()?,
            "--seed" => seed = number()?,
            _ => collect(Path::new(&arg), &mut files)?,
        }
    }
    if files.is_empty() {
        return Err(bad("no input file"));
    }
    files.sort();
    let inputs: Vec<Vec<u8>> = files.iter().map(fs::read).collect::<Result<_, _>>()?;
    for input in &inputs {
        target(input);
    }
    println!("{} inputs replayed", inputs.len());
    if count > 0 {
        println!("{count} mutations from seed {seed}");
        let mut random = Random(seed);
        for _ in 0..count {
            target(&mutate(&inputs, &mut random));
        }
    }
    Ok(())
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        collect(&entry?.path(), files)?;
    }
    Ok(())
}

/// SplitMix64: enough to pick places and bytes, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, or 0.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One input with one to eight wounds: bits, bytes, boundary words, cuts, repeats, and pieces of another input.
fn mutate(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(8) {
        // Headers stand at the front and are a small part of the whole: aim there every other time.
        let reach = if random.next() & 1 == 0 { data.len() } else { data.len().min(400) };
        let at = random.below(reach);
        match random.below(7) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.next() as u8,
            2 => {
                let word = [0, u64::MAX, 0x10, 0x28, 0x22, 1 << 44, 0x7fff_ffff_ffff_f008][random.below(7)];
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
