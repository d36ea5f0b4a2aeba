//! `irlm-lab run`: the rack is moved once by every method, and one table says what each cost.

use crate::opts::SpecArgs;
use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressStyle};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{Method, beside};
use irlm_tests::lab::Lab;
use irlm_tests::report;
use irlm_tests::round::{self, Plan, Round};
use irlm_user::core::squeeze::Mode;
use std::path::PathBuf;
use std::time::Duration;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    spec: SpecArgs,
    /// Only these methods
    #[arg(long, value_enum, num_args = 1..)]
    method: Vec<Method>,
    /// Pages a second that each guest writes while it is moved
    #[arg(long, default_value_t = 0)]
    writers: u32,
    /// How `gm` and `irlm` compress: auto, off, forwarded, or zstd:N
    #[arg(long, default_value_t = Mode::Auto)]
    compress: Mode,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Also write the result here
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the result and the picture are kept
    #[arg(long, default_value = "target/lab")]
    out: PathBuf,
}

pub(crate) fn run(a: &Args) -> Result<()> {
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let methods = if a.method.is_empty() { Method::ALL.to_vec() } else { a.method.clone() };
    let cache = Cache::open()?;
    let spec = a.spec.spec(&cache)?;
    let lab = Lab::new(cache, spec, &|line| println!("{line}"))?;
    let rounds = rounds(&lab, &methods, &irlm, a.writers, a.compress)?;
    println!("{}", report::table(&rounds));
    if let Some(c) = rounds.first().map(|r| r.census) {
        let share = |n: u64| n as f64 / c.content.max(1) as f64;
        println!(
            "{} of {} pages had content; sharing on each host leaves {:.3} of them, in the whole rack {:.3}",
            c.content,
            c.pages,
            share(c.per_host),
            share(c.rack)
        );
    }
    report::json(&rounds, &a.out.join("run.json"))?;
    if let Some(f) = &a.json {
        report::json(&rounds, f)?;
    }
    report::picture(&rounds, &a.out.join("run.svg"))?;
    println!("written: {} and {}", a.out.join("run.json").display(), a.out.join("run.svg").display());
    Ok(())
}

/// One round for each method, with live progress.
pub(crate) fn rounds(
    lab: &Lab,
    methods: &[Method],
    irlm: &std::path::Path,
    writers: u32,
    compress: Mode,
) -> Result<Vec<Round>> {
    let extra = format!("compress = \"{compress}\"");
    let mut rounds = Vec::new();
    for &method in methods {
        let bar = ProgressBar::new_spinner();
        bar.set_style(ProgressStyle::with_template("{spinner} {prefix} {wide_msg}")?);
        bar.set_prefix(method.name());
        bar.set_message("restoring guests");
        bar.enable_steady_tick(Duration::from_millis(200));
        let plan =
            Plan { method, irlm, writers, extra: &extra, wait: Duration::from_secs(900), others: None };
        let r = round::run(lab, &plan, &|bytes, time| {
            bar.set_message(format!(
                "{:.1} MB on the core link in {:.0} s",
                bytes as f64 / 1e6,
                time.as_secs_f64()
            ));
        })
        .with_context(|| format!("method {}", method.name()));
        bar.finish_and_clear();
        let r = r?;
        eprintln!(
            "{}: {:.1} MB on the core link, group {:.1} s, {} guests identical and in service",
            r.method,
            r.core.forward as f64 / 1e6,
            r.group_ms / 1e3,
            r.services
        );
        rounds.push(r);
    }
    Ok(rounds)
}
