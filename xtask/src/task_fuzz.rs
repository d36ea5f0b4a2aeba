//! Looks for inputs that break something, guided by what they reach in the code: libFuzzer on the targets of
//! `irlm-user/fuzz`, two at a time. What it finds worth keeping stays below the cache; `--keep` brings a small part of
//! it into the tree, where the tests replay it (docs/testing.md).

use crate::ctx::{self, Ctx};
use crate::setup::{self, Need};
use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// For how many hours, all targets together
    #[arg(long, conflicts_with = "minutes")]
    hours: Option<u64>,
    /// For how many minutes, all targets together [default: 10]
    #[arg(long)]
    minutes: Option<u64>,
    /// Bring the smallest inputs that reach everything into the tree
    #[arg(long)]
    keep: bool,
    /// Only these targets; all, if none is named
    targets: Vec<String>,
}

/// What fuzzing needs besides the compiler that builds everything else.
const NEEDS: &[Need] = &[Need {
    name: "C++ compiler",
    why: "libFuzzer, which comes as source with the crate libfuzzer-sys",
    how: "apt-get install g++",
    check: |_| ctx::has_tool("c++"),
    meet: |_| crate::apt::install(&["g++"]),
}];

/// How long a round of all parsers takes where they are run until it is enough.
const ROUND: Duration = Duration::from_secs(5 * 60);
/// Targets at a time.
const AT_A_TIME: usize = 2;
/// Longest input that is tried, bytes: a frame with a few pages, or a whole small stream.
const MAX_LEN: usize = 64 << 10;
/// Of each target, what is kept in the tree: so many inputs and bytes at most, each of so many.
const KEPT: (usize, usize, usize) = (24, 16 << 10, 4 << 10);
/// What counts coverage and compares, as cargo-fuzz sets it.
const COVERAGE: [&str; 8] = [
    "--cfg",
    "fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=8",
];

/// What one target came to.
#[derive(Default, Debug)]
pub(crate) struct Came {
    pub(crate) executions: u64,
    pub(crate) seconds: u64,
    /// Inputs that broke something, and what was said first.
    pub(crate) findings: Vec<(PathBuf, String)>,
}

/// `cargo xtask fuzz`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let minutes = args.hours.map_or(args.minutes.unwrap_or(10), |h| h * 60);
    let fuzzer = Fuzzer::build(ctx)?;
    let all: Vec<String> = fuzzer.list()?.into_iter().map(|t| t.0).collect();
    if let Some(unknown) = args.targets.iter().find(|t| !all.contains(t)) {
        bail!("no target {unknown}: there are {}", all.join(", "));
    }
    let chosen = if args.targets.is_empty() { all } else { args.targets.clone() };
    let came = fuzzer.run(&chosen, Duration::from_secs(minutes * 60))?;
    if args.keep {
        for name in &chosen {
            fuzzer.keep(ctx, name)?;
        }
    }
    let total: u64 = came.values().map(|c| c.executions).sum();
    println!("fuzz: {total} executions of {} targets in all", came.len());
    let findings: usize = came.values().map(|c| c.findings.len()).sum();
    match findings {
        0 => Ok(()),
        n => bail!("{n} findings: mend each, with a test that fails without the mend"),
    }
}

/// All parsers, again and again until they were run so often, or found something, or so long: how many executions each
/// had, and what was found.
pub(crate) fn parsers(ctx: &Ctx, executions: u64, most: Duration) -> Result<BTreeMap<String, Came>> {
    let fuzzer = Fuzzer::build(ctx)?;
    let mine: Vec<String> = fuzzer.list()?.into_iter().filter(|t| t.1 == "parser").map(|t| t.0).collect();
    let (start, mut sum) = (Instant::now(), BTreeMap::<String, Came>::new());
    loop {
        for (name, came) in fuzzer.run(&mine, ROUND)? {
            let all = sum.entry(name).or_default();
            all.executions += came.executions;
            all.seconds += came.seconds;
            all.findings.extend(came.findings);
        }
        let done: u64 = sum.values().map(|c| c.executions).sum();
        let found = sum.values().any(|c| !c.findings.is_empty());
        if done >= executions || found || start.elapsed() + ROUND > most {
            return Ok(sum);
        }
    }
}

/// The built program, and where what it finds is kept.
struct Fuzzer {
    program: PathBuf,
    /// Below the cache, a folder a target.
    kept: PathBuf,
    tree: PathBuf,
}

impl Fuzzer {
    fn build(ctx: &Ctx) -> Result<Self> {
        let outcome = setup::ensure(ctx, NEEDS)?;
        if !outcome.missing.is_empty() {
            bail!("fuzzing needs: {}", outcome.missing.join("; "));
        }
        let said = ctx::output(Command::new("rustc").arg("-vV"))?;
        let host = said.lines().find_map(|l| l.strip_prefix("host: ")).context("rustc names no host")?;
        // Another target than the host's own by name, so that build scripts and macros count nothing.
        let folder = ctx.target().join("fuzz");
        println!("fuzz: building the targets (minutes, the first time)");
        let mut c = ctx.cargo();
        c.args(["build", "--quiet", "--profile", "fuzz", "-p", "irlm-fuzz", "--bin", "irlm-fuzz"]);
        c.args(["--target", host, "--target-dir"]).arg(&folder).env("RUSTFLAGS", COVERAGE.join(" "));
        ctx::show(&mut c)?;
        let program = folder.join(host).join("fuzz/irlm-fuzz");
        Ok(Self { program, kept: ctx.cache.join("fuzz"), tree: ctx.root.join("irlm-user/fuzz/corpus") })
    }

    /// What the program itself does, without libFuzzer.
    fn ask(&self, words: &[&str]) -> Result<String> {
        ctx::output(Command::new(&self.program).env("IRLM_FUZZ", words.join("\n")))
    }

    /// Every target, and what it looks at.
    fn list(&self) -> Result<Vec<(String, String)>> {
        let said = self.ask(&["list"])?;
        Ok(said
            .lines()
            .filter_map(|l| l.split_once(' '))
            .map(|(n, k)| (n.to_owned(), k.to_owned()))
            .collect())
    }

    /// A folder of the target's, made.
    fn folder(&self, name: &str, what: &str) -> Result<PathBuf> {
        let path = self.kept.join(name).join(what);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// What the target begins with: its seeds and what the tree keeps.
    fn begin(&self, name: &str) -> Result<Vec<PathBuf>> {
        let seeds = self.folder(name, "seeds")?;
        for old in inputs(&seeds)? {
            fs::remove_file(old)?;
        }
        self.ask(&["seeds", name, &seeds.display().to_string()])?;
        let tree = self.tree.join(name);
        Ok([Some(seeds), tree.is_dir().then_some(tree)].into_iter().flatten().collect())
    }

    /// The targets, each for its share of the time.
    fn run(&self, names: &[String], time: Duration) -> Result<BTreeMap<String, Came>> {
        let turns = names.len().div_ceil(AT_A_TIME).max(1);
        let each = (time.as_secs() / turns as u64).max(1);
        println!("fuzz: {} targets, {AT_A_TIME} at a time, {each} s each", names.len());
        let waiting = Mutex::new(names.iter());
        let came = Mutex::new(BTreeMap::new());
        let one = || -> Result<()> {
            while let Some(name) = waiting.lock().ok().and_then(|mut w| w.next()) {
                let c = self.one(name, each).with_context(|| format!("target {name}"))?;
                println!(
                    "fuzz: {name}: {} executions in {} s, {} findings",
                    c.executions,
                    c.seconds,
                    c.findings.len()
                );
                for (file, said) in &c.findings {
                    println!("fuzz: FINDING of {name}: {said}");
                    println!("    once more: cargo run -p irlm-fuzz -- {name} {}", file.display());
                }
                came.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?.insert(name.clone(), c);
            }
            Ok(())
        };
        std::thread::scope(|s| {
            let threads: Vec<_> = (0..AT_A_TIME).map(|_| s.spawn(one)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| bail!("a thread panicked")))
        })?;
        came.into_inner().map_err(|_| anyhow::anyhow!("a thread panicked"))
    }

    /// One target for so many seconds, or until it finds something.
    fn one(&self, name: &str, seconds: u64) -> Result<Came> {
        let start = Instant::now();
        let findings = self.folder(name, "findings")?;
        let before = inputs(&findings)?;
        let log = self.kept.join(name).join("log");
        let mut c = ended_with_us(&self.program);
        c.env("IRLM_FUZZ", name).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        c.args([&format!("-max_total_time={seconds}"), &format!("-max_len={MAX_LEN}")]);
        c.args(["-print_final_stats=1", "-timeout=20", "-rss_limit_mb=2048", "-close_fd_mask=1"]);
        // Nobody else fills its folder meanwhile.
        c.args(["-reload=0", &format!("-artifact_prefix={}/", findings.display())]);
        c.arg(self.folder(name, "corpus")?).args(self.begin(name)?);
        let status = c.status().with_context(|| format!("start {}", ctx::name(&c)))?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let found: Vec<_> = inputs(&findings)?.into_iter().filter(|f| !before.contains(f)).collect();
        let executions = executions(&said);
        if !status.success() && found.is_empty() {
            bail!("ended with {status} and left no input; see {}", log.display());
        }
        let why = said.lines().find(|l| l.contains("panicked at") || l.contains("ERROR: libFuzzer"));
        let why = why.unwrap_or("it says nothing").to_owned();
        Ok(Came {
            executions,
            seconds: start.elapsed().as_secs(),
            findings: found.into_iter().map(|f| (f, why.clone())).collect(),
        })
    }

    /// Brings the smallest inputs that reach everything into the tree, as many as are kept there.
    fn keep(&self, ctx: &Ctx, name: &str) -> Result<()> {
        let least = self.folder(name, "least")?;
        for old in inputs(&least)? {
            fs::remove_file(old)?;
        }
        let mut c = ended_with_us(&self.program);
        c.env("IRLM_FUZZ", name).args(["-merge=1", &format!("-max_len={}", KEPT.2)]).arg(&least);
        c.arg(self.folder(name, "corpus")?).args(self.begin(name)?);
        ctx::output(&mut c)?;
        let tree = self.tree.join(name);
        fs::create_dir_all(&tree)?;
        // Others were put there by hand, and have names.
        for old in inputs(&tree)?.iter().filter(|f| is_digest(f)) {
            fs::remove_file(old)?;
        }
        let mut sizes = Vec::new();
        for file in inputs(&least)? {
            sizes.push((fs::metadata(&file)?.len() as usize, file));
        }
        sizes.sort();
        let kept = spread(&sizes);
        for file in &kept {
            fs::copy(file, tree.join(file.file_name().context("a file has a name")?))?;
        }
        let shown = tree.strip_prefix(&ctx.root).unwrap_or(&tree);
        println!("fuzz: {name}: {} of {} inputs kept in {}", kept.len(), sizes.len(), shown.display());
        Ok(())
    }
}

/// A program that ends when this one does, however that ends, where that can be had; ^C reaches it anyway.
fn ended_with_us(program: &Path) -> Command {
    if !ctx::has_tool("setpriv") {
        return Command::new(program);
    }
    let mut c = Command::new("setpriv");
    c.args(["--pdeathsig", "TERM"]).arg(program);
    c
}

/// The files of a folder, by name; none, if there is no such folder.
fn inputs(folder: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut all = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

/// Whether libFuzzer has named the file.
fn is_digest(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Of inputs by size, as many from small to large as may be kept: the small ones alone would all look at the beginning.
fn spread(sizes: &[(usize, PathBuf)]) -> Vec<&PathBuf> {
    let most = KEPT.0.min(sizes.len());
    let mut room = KEPT.1;
    let chosen = (0..most).map(|n| &sizes[n * sizes.len() / most.max(1)]);
    chosen
        .filter(|(size, _)| {
            let fits = *size <= room;
            room -= if fits { *size } else { 0 };
            fits
        })
        .map(|(_, file)| file)
        .collect()
}

/// How often the target was run, by libFuzzer's last words.
fn executions(said: &str) -> u64 {
    let last = said.lines().rev().find_map(|l| l.strip_prefix("stat::number_of_executed_units:"));
    last.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{KEPT, executions, is_digest, spread};
    use std::path::{Path, PathBuf};

    #[test]
    fn executions_are_read_from_the_last_words() {
        let said =
            "#5 NEW\nDone 7 runs\nstat::number_of_executed_units: 1234\nstat::average_exec_per_sec: 9\n";
        assert_eq!((executions(said), executions("cut off")), (1234, 0));
    }

    #[test]
    fn what_is_kept_is_of_all_sizes_and_bounded() {
        let sizes: Vec<_> = (0..1000).map(|n| (n * 4, PathBuf::from(format!("{n}")))).collect();
        let kept = spread(&sizes);
        let bytes: usize = kept.iter().map(|f| f.to_str().unwrap().parse::<usize>().unwrap() * 4).sum();
        assert!(kept.len() <= KEPT.0 && bytes <= KEPT.1 && kept.len() > 8, "{kept:?}");
        assert_eq!(spread(&[]), Vec::<&PathBuf>::new());
    }

    #[test]
    fn files_that_people_have_named_stay() {
        assert!(is_digest(Path::new("a/0123456789abcdef0123456789abcdef01234567")));
        assert!(!is_digest(Path::new("a/certificate-of-a-host")));
    }
}
