//! Fuzz targets: every parser of bytes from outside, and what decides, under any sequence of operations. A target is a
//! function of bytes that panics when something is wrong. Three programs call it: the test `corpus` (the kept inputs
//! and mutations of them, on any compiler), `irlm-fuzz` (one file again), and libFuzzer (`cargo xtask fuzz`).

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

// Damaged copies of inputs, from a seed.
mod mutate;
// Choices read from an input.
mod ops;
// The targets, a file each.
mod targets;

pub use mutate::{Random, mutate};
pub use targets::ALL;

/// What a target looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Something that reads bytes from outside.
    Parser,
    /// Something that decides: the input is a list of operations.
    States,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As files and commands call it.
    pub name: &'static str,
    /// What it looks at.
    pub kind: Kind,
    /// Takes any bytes, and panics if something is wrong.
    pub run: fn(&[u8]),
    /// Golden bytes and real examples, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Mutations that a test tries.
    pub tries: u32,
}

/// The target of this name.
#[must_use]
pub fn named(name: &str) -> Option<&'static Target> {
    ALL.iter().find(|t| t.name == name)
}

/// Where inputs of the target are kept.
#[must_use]
pub fn corpus_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name)
}

/// The kept inputs of a target, in the order of their names.
pub fn kept(name: &str) -> io::Result<Vec<Vec<u8>>> {
    let mut files = match fs::read_dir(corpus_dir(name)) {
        Ok(entries) => entries.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    files.sort();
    files.iter().map(fs::read).collect()
}

const USAGE: &str = "usage: irlm-fuzz list | irlm-fuzz seeds TARGET DIR | irlm-fuzz TARGET FILE...
list: all targets, each with what it looks at. seeds: writes what a target begins with into a directory.
TARGET FILE...: runs the target once on each file; a panic is a finding. `cargo xtask fuzz` looks for more.";

/// What the program does without libFuzzer.
pub fn replay(args: impl Iterator<Item = String>) -> ExitCode {
    let args: Vec<String> = args.collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &[String]) -> io::Result<()> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    let target = |name: &str| named(name).ok_or_else(|| bad(&format!("no target {name}")));
    match args {
        [word] if word == "list" => {
            for t in ALL {
                println!("{} {}", t.name, if t.kind == Kind::Parser { "parser" } else { "states" });
            }
        }
        [word, name, dir] if word == "seeds" => {
            for (n, seed) in (target(name)?.seeds)().iter().enumerate() {
                fs::write(Path::new(dir).join(format!("seed-{n:02}")), seed)?;
            }
        }
        [name, files @ ..] if !files.is_empty() => {
            let target = target(name)?;
            for f in files {
                (target.run)(&fs::read(f)?);
                println!("{f}: nothing found");
            }
        }
        _ => return Err(bad("what is to be done?")),
    }
    Ok(())
}

/// libFuzzer's part: the target that the environment names. `list` and `seeds` are heard there too, a word a
/// line, so that one build is enough.
pub fn named_by_environment() -> fn(&[u8]) {
    static TARGET: std::sync::OnceLock<fn(&[u8])> = std::sync::OnceLock::new();
    *TARGET.get_or_init(|| {
        let said = std::env::var("IRLM_FUZZ").unwrap_or_default();
        match named(&said) {
            Some(t) => t.run,
            None => {
                let words: Vec<String> = said.lines().map(str::to_owned).collect();
                let done = run(&words).map_err(|e| eprintln!("IRLM_FUZZ={said:?}: {e}\n{USAGE}"));
                std::process::exit(if done.is_ok() { 0 } else { 2 });
            }
        }
    })
}
