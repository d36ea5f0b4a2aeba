//! `irlm-lab test`: named tests on real guests. Each makes its own lab, and says in one line how it ended; what cannot
//! run here is skipped with the reason.

use anyhow::Result;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::beside;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Name them and what they need, and run none
    #[arg(long)]
    list: bool,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
}

/// What a test may need beyond the guest image and root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// The unpacked QEMU of this version.
    Qemu(&'static str),
    /// A working `irlm`.
    Irlm,
}

impl Need {
    /// Why it is not met here, if it is not.
    fn lacks(self, cache: &Cache, irlm: &PathBuf) -> Option<String> {
        match self {
            Self::Qemu(v) => {
                let q = cache.qemu(v);
                (!q.is_file()).then(|| format!("no QEMU {v} at {}: run `cargo xtask setup`", q.display()))
            }
            Self::Irlm => {
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
}

/// One named test.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    /// Its name, by which it is chosen.
    pub(crate) name: &'static str,
    /// What it needs.
    pub(crate) needs: &'static [Need],
    /// An error is a failure.
    pub(crate) run: fn(&Bench) -> Result<()>,
}

pub(crate) fn run(a: &Args) -> Result<()> {
    let chosen = crate::cases::all();
    let chosen: Vec<&Case> =
        chosen.iter().filter(|c| a.filter.as_ref().is_none_or(|f| c.name.contains(f))).collect();
    if a.list {
        for c in chosen {
            println!("{} {:?}", c.name, c.needs);
        }
        return Ok(());
    }
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let bench = Bench { cache: Cache::open()?, irlm };
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in chosen {
        if let Some(why) = case.needs.iter().find_map(|n| n.lacks(&bench.cache, &bench.irlm)) {
            println!("test {} ... skipped: {why}", case.name);
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        // A panic is a failure of this test only; its lab is removed while it unwinds.
        let ended = catch_unwind(AssertUnwindSafe(|| (case.run)(&bench)));
        let took = start.elapsed().as_secs_f64();
        match ended {
            Ok(Ok(())) => {
                println!("test {} ... ok ({took:.1} s)", case.name);
                passed += 1;
            }
            Ok(Err(e)) => {
                println!("test {} ... FAILED: {} ({took:.1} s)", case.name, one_line(&e));
                println!("{e:#}");
                failed += 1;
            }
            Err(_) => {
                println!("test {} ... FAILED: it panicked ({took:.1} s)", case.name);
                failed += 1;
            }
        }
    }
    println!("lab: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 {
        anyhow::bail!("{failed} tests failed");
    }
    Ok(())
}

fn one_line(e: &anyhow::Error) -> String {
    let text = format!("{e:#}");
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}
