//! `irlm-lab test`: named tests on real guests. Each makes its own lab, and says in one line how it ended; what cannot
//! run here is skipped with the reason. Tests that mostly wait for a link run several at a time, each in a process of its
//! own, because a lab is named by its process.

use crate::opts;
use anyhow::{Context as _, Result, bail};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::beside;
use irlm_tests::kvm;
use irlm_tests::lab::LabSpec;
use irlm_tests::unmet;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains one of these
    filter: Vec<String>,
    /// And of those, none whose name begins with this
    #[arg(long, value_name = "PREFIX")]
    without: Vec<String>,
    /// Name them and what they need, and run none
    #[arg(long)]
    list: bool,
    /// QEMU on both sides of tests whose name tells no version: 7.2, 10.0, or the path of a program
    #[arg(long, default_value = "7.2")]
    qemu: String,
    /// QEMU on the target side of those tests, if another one
    #[arg(long)]
    qemu_target: Option<String>,
    /// Labs at the same time, for tests whose speed is that of their links
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Run just this test, and end if the process that asked for it does
    #[arg(long, hide = true)]
    exact: Option<String>,
}

/// What a test may need beyond the guest image and root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The unpacked QEMU of this version.
    Qemu(&'static str),
    /// The QEMU that `--qemu` chooses.
    ChosenQemu,
    /// A working `irlm`.
    Irlm,
    /// A KVM on which `irlm vmm` can run small guests.
    Kvm,
}

impl Need {
    /// Why it is not met here, if it is not.
    fn lacks(self, bench: &Bench) -> Option<String> {
        let there = |q: PathBuf| {
            (!q.is_file()).then(|| format!("no QEMU at {}: run `cargo xtask setup`", q.display()))
        };
        match self {
            Self::Qemu(v) => there(bench.cache.qemu(v)),
            Self::ChosenQemu => there(bench.qemu.clone()).or_else(|| there(bench.qemu_target.clone())),
            Self::Kvm => kvm::usable(&bench.irlm).err(),
            Self::Irlm => {
                let irlm = &bench.irlm;
                // A program that ends well but knows no `evacuate` is not the program under test.
                match Command::new(irlm).args(["evacuate", "--help"]).output() {
                    Ok(o) if String::from_utf8_lossy(&o.stdout).contains("--method") => None,
                    Ok(o) => Some(format!("{} has no `evacuate --method` ({})", irlm.display(), o.status)),
                    Err(e) => Some(format!("{}: {e}", irlm.display())),
                }
            }
        }
    }
}

/// What a test works with.
#[derive(Debug)]
pub(crate) struct Bench {
    /// Guest image, QEMUs and saved states.
    pub(crate) cache: Cache,
    /// The program under test.
    pub(crate) irlm: PathBuf,
    /// QEMU where a test does not say another one.
    pub(crate) qemu: PathBuf,
    /// The same on the target side.
    pub(crate) qemu_target: PathBuf,
}

impl Bench {
    /// `hosts` × `guests` guests of 256 MiB under the chosen QEMU.
    pub(crate) fn spec(&self, hosts: usize, guests: usize) -> LabSpec {
        let mut spec = LabSpec::new(&self.cache, hosts, guests, 256);
        spec.qemu_source.clone_from(&self.qemu);
        spec.qemu_target.clone_from(&self.qemu_target);
        spec.hurry = true;
        spec
    }
}

/// How much of the machine a test takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Takes {
    /// All of it: it measures, or looks at what is left on the machine.
    Alone,
    /// Real guests, which TCG runs: `--jobs` at a time.
    Heavy,
    /// It waits most of the time: it has room beside heavy ones (`Room::most`).
    Light,
}

/// One named test.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    /// Its name, by which it is chosen.
    pub(crate) name: &'static str,
    /// What it needs.
    pub(crate) needs: &'static [Need],
    /// What may run beside it.
    pub(crate) takes: Takes,
    /// An error is a failure.
    pub(crate) run: fn(&Bench) -> Result<()>,
}

/// How tests ended.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Tests whose moment did not come at first, and that were begun anew.
    again: usize,
}

/// How often a test is begun whose moment does not come: after the first time with the machine to itself.
const TRIES: u32 = 3;

pub(crate) fn run(a: &Args) -> Result<()> {
    let all = crate::cases::all();
    let chosen: Vec<&Case> = all.iter().filter(|c| wanted(a, c.name)).collect();
    if a.list {
        for c in chosen {
            println!("{} {:?}", c.name, c.needs);
        }
        return Ok(());
    }
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let cache = Cache::open()?;
    let qemu = opts::qemu(&cache, &a.qemu);
    let qemu_target = opts::qemu(&cache, a.qemu_target.as_deref().unwrap_or(&a.qemu));
    let bench = Bench { cache, irlm, qemu, qemu_target };
    let mut tally = Tally::default();
    if a.exact.is_some() {
        // The lab is removed by the signal's handler, as at ^C.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        for c in &chosen {
            one(c, &bench, &mut tally);
        }
        return if tally.failed > 0 { bail!("it failed") } else { Ok(()) };
    }
    if a.jobs > 1 {
        beside_each_other(a, &bench, &chosen, &mut tally)?;
    } else {
        for c in &chosen {
            let mut left = TRIES;
            while one(c, &bench, &mut tally) == End::Unmet {
                left -= 1;
                tally.unmet(c.name, left);
                if left == 0 {
                    break;
                }
            }
        }
    }
    if tally.again > 0 {
        println!("lab: begun anew, because their moment had not come: {}", tally.again);
    }
    println!("lab: {} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    if tally.failed > 0 {
        bail!("{} tests failed", tally.failed);
    }
    Ok(())
}

/// Whether the test of this name is to run.
fn wanted(a: &Args, name: &str) -> bool {
    match &a.exact {
        Some(exact) => name == exact,
        None => {
            (a.filter.is_empty() || a.filter.iter().any(|f| name.contains(f.as_str())))
                && !a.without.iter().any(|p| name.starts_with(p.as_str()))
        }
    }
}

/// Whether a test has shown what it is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// It is counted.
    Counted,
    /// Its moment did not come, and nothing is counted.
    Unmet,
}

impl Tally {
    /// A test's moment did not come, and it may be begun so many times more.
    fn unmet(&mut self, name: &str, left: u32) {
        if left == 0 {
            println!("test {name} ... FAILED: its moment did not come in {TRIES} tries");
            self.failed += 1;
        } else if left == TRIES - 1 {
            self.again += 1;
        }
    }
}

/// Runs one test in this process.
fn one(case: &Case, bench: &Bench, tally: &mut Tally) -> End {
    if let Some(why) = case.needs.iter().find_map(|n| n.lacks(bench)) {
        println!("test {} ... skipped: {why}", case.name);
        tally.skipped += 1;
        return End::Counted;
    }
    let (start, worked) = (Instant::now(), processor_s());
    // A panic is a failure of this test only; its lab is removed while it unwinds.
    let ended = catch_unwind(AssertUnwindSafe(|| (case.run)(bench)));
    let took = start.elapsed().as_secs_f64();
    let worked = processor_s() - worked;
    match ended {
        Ok(Ok(())) => {
            println!("test {} ... ok ({took:.1} s, {worked:.1} s of processor)", case.name);
            tally.passed += 1;
        }
        Ok(Err(e)) => {
            if let Some(why) = unmet::reason(&e) {
                println!("test {} ... unmet: {why} ({took:.1} s)", case.name);
                return End::Unmet;
            }
            println!("test {} ... FAILED: {} ({took:.1} s)", case.name, one_line(&e));
            println!("{e:#}");
            tally.failed += 1;
        }
        Err(_) => {
            println!("test {} ... FAILED: it panicked ({took:.1} s)", case.name);
            tally.failed += 1;
        }
    }
    End::Counted
}

/// Processor time of this process and of those of its children that have ended, seconds (proc(5), `stat`).
fn processor_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name may hold anything but a further parenthesis at its end.
    let fields = stat.rsplit_once(')').map_or("", |s| s.1).split_whitespace();
    let ticks: u64 = fields.skip(11).take(4).filter_map(|f| f.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// What is to run, and what there is room for.
struct Room {
    /// Not begun, in the order in which they are looked through; how often each may be begun.
    waiting: VecDeque<(Case, u32)>,
    /// `--jobs`.
    jobs: usize,
    /// Under way.
    running: usize,
    /// Of those, the heavy ones.
    heavy: usize,
}

impl Room {
    /// What wants the machine for itself comes first, or it would wait for a moment that never comes; what is light
    /// comes last, and fills what the heavy ones leave.
    fn new(jobs: usize, cases: &[&Case]) -> Self {
        let mut waiting: Vec<(Case, u32)> = cases.iter().map(|c| (**c, TRIES)).collect();
        waiting.sort_by_key(|(c, _)| match c.takes {
            Takes::Alone => 0,
            Takes::Heavy => 1,
            Takes::Light => 2,
        });
        Self { waiting: waiting.into(), jobs, running: 0, heavy: 0 }
    }

    /// Tests at the same time, at most.
    fn most(&self) -> usize {
        2 * self.jobs + 1
    }

    fn fits(&self, takes: Takes) -> bool {
        match takes {
            Takes::Alone => self.running == 0,
            Takes::Heavy => self.running < self.most() && self.heavy < self.jobs + self.spare(),
            Takes::Light => self.running < self.most(),
        }
    }

    /// Room for one more heavy test, where there are no light ones left: heavy ones wait for links half of their time.
    fn spare(&self) -> usize {
        let light = self.running > self.heavy || self.waiting.iter().any(|(c, _)| c.takes == Takes::Light);
        usize::from(self.jobs > 1 && !light)
    }

    fn begins(&mut self, takes: Takes) {
        // Nothing fits beside one that is alone.
        self.running += if takes == Takes::Alone { self.most() } else { 1 };
        self.heavy += usize::from(takes == Takes::Heavy);
    }

    fn ends(&mut self, takes: Takes) {
        self.running -= if takes == Takes::Alone { self.most() } else { 1 };
        self.heavy -= usize::from(takes == Takes::Heavy);
    }

    /// A test whose moment did not come is begun once more, when the machine is its own.
    fn anew(&mut self, mut case: Case, left: u32) {
        case.takes = Takes::Alone;
        self.waiting.push_back((case, left));
    }

    /// How many threads can ever have something to do.
    fn workers(&self) -> usize {
        self.waiting.len().min(self.most())
    }

    /// The next test that there is room for; none if all have begun.
    fn next(room: &Mutex<Self>, changed: &Condvar) -> Option<(Case, u32)> {
        let mut r = room.lock().ok()?;
        while !r.waiting.is_empty() {
            if let Some(i) = r.waiting.iter().position(|(c, _)| r.fits(c.takes)) {
                let (case, left) = r.waiting.remove(i)?;
                r.begins(case.takes);
                return Some((case, left));
            }
            r = changed.wait(r).ok()?;
        }
        None
    }
}

/// Runs tests in processes of their own, as many at a time as there is room for. What one prints comes out in one piece
/// when it ends.
fn beside_each_other(a: &Args, bench: &Bench, cases: &[&Case], tally: &mut Tally) -> Result<()> {
    let me = std::env::current_exe().context("find the lab's own program")?;
    let room = Room::new(a.jobs, cases);
    let workers = room.workers();
    let room = Mutex::new(room);
    let changed = Condvar::new();
    let tally = Mutex::new(tally);
    let work = || -> Result<()> {
        while let Some((case, left)) = Room::next(&room, &changed) {
            let out = Command::new(&me)
                .args(["test", "--exact", case.name, "--qemu", &a.qemu])
                .args(["--qemu-target", a.qemu_target.as_ref().unwrap_or(&a.qemu), "--irlm"])
                .arg(&bench.irlm)
                .stdin(Stdio::null())
                .stderr(Stdio::inherit())
                .output();
            let text = out.as_ref().map(|o| String::from_utf8_lossy(&o.stdout)).unwrap_or_default();
            let unmet = text.lines().find_map(ended).is_some_and(|(_, how)| how == "unmet");
            if let Ok(mut r) = room.lock() {
                r.ends(case.takes);
                if unmet && left > 1 {
                    r.anew(case, left - 1);
                }
            }
            changed.notify_all();
            let out = out.as_ref().map_err(|e| anyhow::anyhow!("start the lab's own program again: {e}"))?;
            let mut tally = tally.lock().map_err(|_| anyhow::anyhow!("another test's thread panicked"))?;
            print!("{text}");
            match text.lines().find_map(ended) {
                Some((_, "ok")) if out.status.success() => tally.passed += 1,
                Some((_, "skipped")) => tally.skipped += 1,
                Some((_, "FAILED")) => tally.failed += 1,
                Some((_, "unmet")) => tally.unmet(case.name, left - 1),
                _ => {
                    println!("test {} ... FAILED: its process ended with {}", case.name, out.status);
                    tally.failed += 1;
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..workers).map(|_| s.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a test's thread panicked")))
    })
}

/// Name and end ("ok", "FAILED", "skipped", "unmet") of a test, from the line that says it.
pub(crate) fn ended(line: &str) -> Option<(&str, &str)> {
    let (name, how) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    Some((name, how.split([' ', ':']).next()?))
}

/// The reason itself, in a line: what was said around it may be a whole log, and comes after it.
fn one_line(e: &anyhow::Error) -> String {
    let text = e.root_cause().to_string();
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::{Args, Case, Room, Takes, ended, one_line, wanted};

    #[test]
    fn tests_are_chosen_by_a_part_of_their_name_and_left_out_by_its_beginning() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let chosen = |line: &[&str], name| {
            wanted(
                &<Line as clap::Parser>::try_parse_from([&["test"][..], line].concat()).unwrap().args,
                name,
            )
        };
        let newer: &[&str] = &["--without", "kvm-", "--", "fail-cancel", "void-"];
        assert!(chosen(newer, "fail-cancel") && chosen(newer, "direct-fail-cancel"));
        assert!(!chosen(newer, "kvm-fail-cancel") && !chosen(newer, "own-paused"));
        assert!(chosen(&[], "kvm-fail-cancel") && !chosen(&["--without", "kvm-"], "kvm-fail-cancel"));
        assert!(chosen(&["--exact", "fail-cancel"], "fail-cancel"));
        assert!(!chosen(&["--exact", "fail-cancel"], "direct-fail-cancel"));
    }

    #[test]
    fn the_machine_is_filled_and_who_wants_it_alone_has_it_alone() {
        let case = |name, takes| Case { name, needs: &[], takes, run: |_| Ok(()) };
        let all = [
            case("light 1", Takes::Light),
            case("heavy 1", Takes::Heavy),
            case("alone", Takes::Alone),
            case("heavy 2", Takes::Heavy),
            case("heavy 3", Takes::Heavy),
            case("light 2", Takes::Light),
            case("light 3", Takes::Light),
            case("light 4", Takes::Light),
            case("light 5", Takes::Light),
            case("heavy 4", Takes::Heavy),
        ];
        let mut room = Room::new(2, &all.each_ref());
        let mut begin = |ends: &[Takes]| {
            ends.iter().for_each(|l| room.ends(*l));
            let mut names = Vec::new();
            while let Some(i) = room.waiting.iter().position(|(c, _)| room.fits(c.takes)) {
                let (c, _) = room.waiting.remove(i).unwrap();
                room.begins(c.takes);
                names.push(c.name);
            }
            names.join(", ")
        };
        assert_eq!(begin(&[]), "alone");
        assert_eq!(begin(&[Takes::Alone]), "heavy 1, heavy 2, light 1, light 2, light 3");
        assert_eq!(begin(&[Takes::Light; 2]), "light 4, light 5");
        assert_eq!(begin(&[Takes::Light; 2]), "");
        // The last light one ends, and a third heavy one has room.
        assert_eq!(begin(&[Takes::Light]), "heavy 3");
        assert_eq!(begin(&[Takes::Heavy]), "heavy 4");
        // One whose moment did not come waits until the machine is its own.
        room.anew(case("heavy 3", Takes::Heavy), 2);
        let mut begin = |ends: Takes| {
            room.ends(ends);
            let i = room.waiting.iter().position(|(c, _)| room.fits(c.takes))?;
            let (c, left) = room.waiting.remove(i)?;
            room.begins(c.takes);
            Some((c.name, left))
        };
        assert_eq!([begin(Takes::Heavy), begin(Takes::Heavy)], [None; 2]);
        assert_eq!(begin(Takes::Heavy), Some(("heavy 3", 2)));
    }

    #[test]
    fn the_line_of_a_failure_gives_its_reason_and_not_a_log() {
        let e = anyhow::anyhow!("web0: nobody runs\nat all").context("--- index\nlistening");
        assert_eq!(one_line(&e), "web0: nobody runs");
    }

    #[test]
    fn the_end_of_a_test_is_found_in_its_output() {
        let lines = ["  160000000 bytes had passed after 11.6s", "test fail-cancel ... ok (28.3 s)"];
        assert_eq!(lines.iter().find_map(|l| ended(l)), Some(("fail-cancel", "ok")));
        assert_eq!(ended("test a ... FAILED: it panicked (1.0 s)"), Some(("a", "FAILED")));
        assert_eq!(ended("test a ... skipped: no QEMU"), Some(("a", "skipped")));
        assert_eq!(ended("lab: 1 passed, 0 failed, 0 skipped"), None);
    }
}
