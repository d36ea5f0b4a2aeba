//! The random campaign: moves of random shapes with one to three faults at random moments of the whole evacuation, and
//! what must be true afterwards whatever happened. `irlm-lab campaign` is its command; [`measure`] is for whoever wants
//! its counts.
//!
//! Everything that happens in a run follows from its seed, so a run is repeated with `--only-run SEED`. Clocks are not set:
//! a time namespace shifts the monotonic clock of processes that are started in it, and CLOCK_REALTIME is the machine's.

// One run as it goes.
mod act;
// Whether what was said is true.
mod checks;
// One copy of one VM.
mod copy;
// What was seen of a VM's copies.
mod history;
// Booted Linux guests.
mod linux;
// One run from its first process to its verdict.
mod one;
// The campaign's random numbers.
mod rng;
// What is done in a run, drawn from its seed.
mod schedule;
// A VM, its copies, and who looks at them.
mod vm;
// Namespaces, links, daemons.
mod world;

pub use one::{Bad, Outcome};
pub use schedule::{Schedule, Weights};

use crate::irlm::beside;
use crate::janitor::is_stopping;
use anyhow::{Context as _, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};
use world::World;

/// Of each kind of move, runs that CI does every time.
const FIXED_OF_A_KIND: usize = 2;
/// All bad verdicts that a run can have.
pub const VERDICTS: &[&str] =
    &["two", "lost", "settled", "guest", "report", "leftover", "again", "theirs", "lab"];

/// Longest that something may last in them, milliseconds.
const FIXED_LASTS: u32 = 3000;
/// Runs with new seeds that CI adds.
const NEW: u64 = 5;

/// `irlm-lab campaign`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Each run moves one to four VMs (QEMU through the agents or directly, our own VMM by pre-copy, post-copy or hybrid) with one \
to three faults at random moments: processes killed or stopped, links cut, slowed or lossy, agents' disks full, and what \
operators and owners do. Every copy of every VM is looked at all the time. Verdicts: two (two copies ran, or an old one \
again), lost, settled, guest, report, leftover, again (the next evacuation), theirs (an owner's own save was ended), lab \
(the run itself failed).

Not done here: clocks set (a time namespace cannot shift CLOCK_REALTIME, and the machine's clock is everybody's), and loss \
by netem (the kernel may lack it; a queue of three packets loses instead).

Exit code 0 if no verdict is bad.")]
pub struct Args {
    /// How many runs; those that the state file has already are not done again
    #[arg(long, default_value_t = 100)]
    runs: u64,
    /// The campaign's seed, from which each run's follows
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do just this run, by the seed in its line
    #[arg(long, value_name = "SEED", value_parser = hex)]
    only_run: Option<u64>,
    /// For CI: ten fixed seeds and five new ones
    #[arg(long)]
    fixed: bool,
    /// Where results are appended, a JSON line a run
    #[arg(long, value_name = "FILE", default_value = "target/lab/campaign/runs.jsonl")]
    state: PathBuf,
    /// Where the story and the logs of bad runs go, a directory a seed
    #[arg(long, value_name = "DIR", default_value = "target/lab/campaign")]
    out: PathBuf,
    /// One run in so many has booted Linux guests, if they are saved already; 0: none
    #[arg(long, value_name = "N", default_value_t = 20)]
    linux_one_in: u64,
    /// Faults come over so many percent of the expected length of a move, for slower or faster machines
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=1000))]
    stretch: u32,
    /// Runs at the same time, each in a lab of its own
    #[arg(long, value_name = "N", default_value_t = 2)]
    jobs: usize,
    /// Only print the schedules
    #[arg(long)]
    list: bool,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Do the runs whose number, campaign and seed come on standard input, and print a JSON line each
    #[arg(long, hide = true)]
    worker: bool,
}

/// A campaign.
#[derive(Debug, Clone)]
pub struct Options {
    /// The program under test.
    pub irlm: PathBuf,
    /// Runs in all, those done before included.
    pub runs: u64,
    /// The campaign's seed.
    pub seed: u64,
    /// Where results are appended and found again; none are kept without it.
    pub state: Option<PathBuf>,
    /// Where logs of bad runs go.
    pub out: PathBuf,
    /// What is drawn how often.
    pub weights: Weights,
    /// Runs at the same time.
    pub jobs: usize,
}

impl Options {
    /// A campaign of so many runs with this seed, its results below `out`.
    #[must_use]
    pub fn new(irlm: &Path, out: &Path, runs: u64, seed: u64) -> Self {
        let out = out.join("campaign");
        let state = Some(out.join("runs.jsonl"));
        Self { irlm: irlm.to_owned(), runs, seed, state, out, weights: Weights::default(), jobs: 2 }
    }
}

/// What a campaign came to.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Counts {
    /// Runs that were done.
    pub runs: u64,
    /// Runs that cannot be done here, by why.
    pub skipped: BTreeMap<String, u64>,
    /// VMs at their target.
    pub moved: u64,
    /// VMs at their source.
    pub stayed: u64,
    /// VMs in doubt at the end.
    pub in_doubt: u64,
    /// VMs gone with a process that the schedule killed.
    pub died: u64,
    /// Runs with at least one bad verdict.
    pub bad_runs: u64,
    /// Runs by each bad verdict.
    pub bad: BTreeMap<String, u64>,
    /// Their seeds.
    pub seeds: BTreeMap<String, Vec<String>>,
    /// Seconds of all runs together.
    pub seconds: f64,
}

impl Counts {
    /// Counts one run.
    pub fn add(&mut self, o: &Outcome) {
        self.seconds += o.seconds;
        if let Some(why) = &o.skipped {
            *self.skipped.entry(why.clone()).or_default() += 1;
            return;
        }
        self.runs += 1;
        let [moved, stayed, doubt, died] = o.vms;
        self.moved += moved;
        self.stayed += stayed;
        self.in_doubt += doubt;
        self.died += died;
        let kinds: BTreeSet<&str> = o.bad.iter().map(|b| b.verdict.as_str()).collect();
        self.bad_runs += u64::from(!kinds.is_empty());
        for kind in kinds {
            *self.bad.entry(kind.to_owned()).or_default() += 1;
            self.seeds.entry(kind.to_owned()).or_default().push(o.seed.clone());
        }
    }

    /// Runs with this bad verdict.
    #[must_use]
    pub fn of(&self, verdict: &str) -> u64 {
        self.bad.get(verdict).copied().unwrap_or(0)
    }

    /// For people, some lines.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { runs, moved, stayed, in_doubt, died, bad_runs, seconds, .. } = self;
        let mut text = format!(
            "campaign: {runs} runs, VMs: {moved} moved, {stayed} stayed, {in_doubt} in doubt, {died} lost by their own \
             death; {bad_runs} runs bad; {:.1} s a run\n",
            seconds / (*runs).max(1) as f64
        );
        for (kind, n) in &self.bad {
            let seeds = self.seeds.get(kind).map(|s| s.iter().take(5).cloned().collect::<Vec<_>>().join(" "));
            text.push_str(&format!("  {kind}: {n} runs, first {}\n", seeds.unwrap_or_default()));
        }
        for (why, n) in &self.skipped {
            text.push_str(&format!("  skipped {n}: {why}\n"));
        }
        text.push_str("  not done here: clocks set (CLOCK_REALTIME cannot be shifted for a process)\n");
        text
    }
}

/// Does a campaign, or the rest of one, and counts it whole. `say` is told of each run as it ends.
pub fn measure(options: &Options, say: &(dyn Fn(&Outcome) + Sync)) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut done = BTreeSet::new();
    if let Some(file) = &options.state {
        for o in results(file)?.iter().filter(|o| o.campaign == options.seed && o.n < options.runs) {
            if done.insert(o.n) {
                counts.add(o);
            }
        }
    }
    let left = (0..options.runs).filter(|n| !done.contains(n));
    let runs: Vec<(u64, u64)> = left.map(|n| (n, rng::seed_of(options.seed, n))).collect();
    for o in spread(options, &runs, say)? {
        counts.add(&o);
    }
    Ok(counts)
}

/// Results of earlier calls. A line that was cut by a crash is not counted.
fn results(file: &Path) -> Result<Vec<Outcome>> {
    match File::open(file) {
        Ok(f) => {
            let lines = BufReader::new(f).lines().collect::<std::io::Result<Vec<_>>>();
            let lines = lines.with_context(|| file.display().to_string())?;
            Ok(lines.iter().filter_map(|l| serde_json::from_str(l).ok()).collect())
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| file.display().to_string()),
    }
}

/// Does runs (number and seed) in processes of their own, `jobs` at a time: a lab is named by its process, and one that
/// dies takes just one run with it.
fn spread(options: &Options, runs: &[(u64, u64)], say: &(dyn Fn(&Outcome) + Sync)) -> Result<Vec<Outcome>> {
    std::fs::create_dir_all(&options.out).with_context(|| options.out.display().to_string())?;
    let open = |f: &PathBuf| File::options().append(true).create(true).open(f);
    let state = options.state.as_ref().map(open).transpose().context("open the state file")?;
    let (next, ended) = (Mutex::new(runs.iter()), Mutex::new((Vec::new(), state)));
    let work = || -> Result<()> {
        let mut worker: Option<Worker> = None;
        while let Some(&(n, seed)) = next.lock().ok().and_then(|mut i| i.next()) {
            let mut w = match worker.take() {
                Some(w) => w,
                None => Worker::start(options)?,
            };
            let outcome = match w.run(n, options.seed, seed) {
                Ok(Some(o)) => {
                    worker = Some(w);
                    o
                }
                Ok(None) => bail!("stopped; the same call goes on where this one was"),
                Err(e) => died(options, n, seed, &e),
            };
            let mut ended = ended.lock().map_err(|_| anyhow::anyhow!("another thread panicked"))?;
            if let Some(f) = &mut ended.1 {
                f.write_all(format!("{}\n", serde_json::to_string(&outcome)?).as_bytes())?;
            }
            say(&outcome);
            ended.0.push(outcome);
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..options.jobs.clamp(1, runs.len().max(1))).map(|_| s.spawn(work)).collect();
        all.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })?;
    let (all, _) = ended.into_inner().map_err(|_| anyhow::anyhow!("another thread panicked"))?;
    Ok(all)
}

fn died(options: &Options, n: u64, seed: u64, e: &anyhow::Error) -> Outcome {
    let line = Schedule::draw(seed, options.weights).to_string();
    let bad = vec![Bad { verdict: "lab".into(), what: format!("the lab's process ended: {e:#}") }];
    Outcome {
        n,
        seed: format!("{seed:016x}"),
        campaign: options.seed,
        line,
        bad,
        skipped: None,
        vms: [0; 4],
        seconds: 0.0,
        kept: None,
    }
}

/// A process that does runs.
struct Worker {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Worker {
    fn start(options: &Options) -> Result<Self> {
        let me = std::env::current_exe().context("find the lab's own program")?;
        let mut child = Command::new(me)
            .args(["campaign", "--worker", "--irlm"])
            .arg(&options.irlm)
            .arg("--out")
            .arg(&options.out)
            .args(["--linux-one-in", &options.weights.linux_one_in.to_string()])
            .args(["--stretch", &options.weights.stretch.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the lab's own program again")?;
        let out = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, out })
    }

    /// None: it was stopped by a signal.
    fn run(&mut self, n: u64, campaign: u64, seed: u64) -> Result<Option<Outcome>> {
        let input = self.child.stdin.as_mut().context("no input")?;
        input.write_all(format!("{n} {campaign} {seed:016x}\n").as_bytes())?;
        let mut line = String::new();
        if self.out.read_line(&mut line)? == 0 {
            let ended = self.child.wait()?;
            // As the lab's handler of signals ends it.
            if ended.code().is_some_and(|code| matches!(code, 129 | 130 | 143)) {
                return Ok(None);
            }
            bail!("{ended}");
        }
        serde_json::from_str(&line).map(Some).with_context(|| format!("it said {line:?}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Its lab is removed when there is nothing more to read.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The other side of [`Worker`].
fn worker(irlm: PathBuf, out: &Path, weights: Weights) -> Result<()> {
    // The lab is removed by the signal's handler, as at ^C.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    let world = World::new(irlm)?;
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let [n, campaign, seed] = words[..] else { bail!("not a run: {line:?}") };
        let s = Schedule::draw(hex(seed)?, weights);
        let o = one::run(&world, &s, n.parse()?, campaign.parse()?, out);
        if is_stopping() {
            // Its lab was taken away: that was no run. This process ends at any moment.
            std::thread::sleep(Duration::from_secs(60));
            bail!("stopped by a signal");
        }
        // Whoever reads may be gone: an error, not a panic.
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&o)?)?;
    }
    Ok(())
}

/// The first seeds that give two moves of each kind, each of which begins with another kind of fault.
fn fixed() -> Vec<u64> {
    let (mut seeds, mut seen) = (Vec::new(), BTreeMap::<String, usize>::new());
    for seed in 0..10_000 {
        let s = Schedule::draw(seed, Weights::default());
        let first = s.events.first().map(|e| e.fault.kind()).unwrap_or_default();
        let short = s.events.iter().all(|e| e.fault.lasts() <= FIXED_LASTS);
        let wanted = s.kind != schedule::Kind::Linux && short && !seen.contains_key(&first);
        let of_kind = seen.entry(s.kind.name().to_owned()).or_default();
        if wanted && *of_kind < FIXED_OF_A_KIND {
            *of_kind += 1;
            seen.insert(first, 1);
            seeds.push(seed);
        }
    }
    seeds
}

/// A run's seed as its line has it.
fn hex(s: &str) -> Result<u64> {
    u64::from_str_radix(s, 16)
        .with_context(|| format!("{s:?} is no seed of a run: up to 16 hexadecimal digits"))
}

/// `irlm-lab campaign`.
pub fn run(a: &Args) -> Result<()> {
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let weights = Weights { linux_one_in: a.linux_one_in, stretch: a.stretch };
    if a.worker {
        return worker(irlm, &a.out, weights);
    }
    let (state, out, jobs) = (Some(a.state.clone()), a.out.clone(), a.jobs);
    let mut options = Options { irlm, runs: a.runs, seed: a.seed, state, out, weights, jobs };
    if a.list {
        let seeds = if a.fixed { fixed() } else { (0..a.runs).map(|n| rng::seed_of(a.seed, n)).collect() };
        for (n, seed) in seeds.into_iter().enumerate() {
            let s = Schedule::draw(seed, weights);
            println!("run {n} seed {:016x} {s}", s.seed);
        }
        return Ok(());
    }
    let say = |o: &Outcome| println!("{}", o.text());
    let mut counts = Counts::default();
    if a.fixed || a.only_run.is_some() {
        options.state = None;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let new = (0..NEW).map(|n| rng::seed_of(now.as_millis() as u64, n));
        let seeds = a.only_run.map_or_else(|| fixed().into_iter().chain(new).collect(), |s| vec![s]);
        let runs: Vec<(u64, u64)> = (0..).zip(seeds).collect();
        spread(&options, &runs, &say)?.iter().for_each(|o| counts.add(o));
    } else {
        counts = measure(&options, &say)?;
    }
    print!("{}", counts.text());
    if counts.bad_runs > 0 {
        bail!("{} of {} runs are bad", counts.bad_runs, counts.runs);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(n: u64, bad: &[&str]) -> Outcome {
        let bad = bad.iter().map(|v| Bad { verdict: (*v).into(), what: "seen".into() }).collect();
        Outcome {
            n,
            seed: format!("{n:016x}"),
            campaign: 7,
            line: "1x1 pre-copy".into(),
            bad,
            skipped: None,
            vms: [1, 2, 0, 0],
            seconds: 2.0,
            kept: None,
        }
    }

    #[test]
    fn runs_are_counted_by_verdict_and_found_again_in_the_state_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runs.jsonl");
        let all = [outcome(0, &[]), outcome(1, &["two", "report", "report"]), outcome(2, &["report"])];
        let mut text: String = all.iter().map(|o| serde_json::to_string(o).unwrap() + "\n").collect();
        text.push_str("{\"n\":3,\"seed\":");
        std::fs::write(&file, text).unwrap();
        let found = results(&file).unwrap();
        assert_eq!(found.len(), 3, "the line that was cut is not counted");
        let mut counts = Counts::default();
        found.iter().for_each(|o| counts.add(o));
        counts.add(&Outcome { skipped: Some("no QEMU 10.0".into()), ..outcome(3, &[]) });
        assert_eq!((counts.runs, counts.moved, counts.stayed, counts.bad_runs), (3, 3, 6, 2));
        assert_eq!((counts.of("two"), counts.of("report"), counts.of("lost")), (1, 2, 0));
        assert_eq!(counts.skipped["no QEMU 10.0"], 1);
        assert!(counts.text().contains("report: 2 runs, first 0000000000000001 0000000000000002"));
        assert!(results(&dir.path().join("none")).unwrap().is_empty());
    }

    #[test]
    fn the_fixed_runs_are_two_of_each_kind_of_move_with_ten_kinds_of_fault() {
        let all: Vec<Schedule> = fixed().iter().map(|s| Schedule::draw(*s, Weights::default())).collect();
        let kinds: BTreeSet<&str> = all.iter().map(|s| s.kind.name()).collect();
        let faults: BTreeSet<String> = all.iter().map(|s| s.events[0].fault.kind()).collect();
        assert_eq!((all.len(), kinds.len(), faults.len()), (10, 5, 10), "{kinds:?} {faults:?}");
    }

    #[test]
    fn a_seed_is_read_as_it_is_printed() {
        assert_eq!(hex(&format!("{:016x}", u64::MAX)).unwrap(), u64::MAX);
        assert_eq!(hex("1f").unwrap(), 31);
        assert!(hex("no").is_err() && hex("").is_err());
    }
}
