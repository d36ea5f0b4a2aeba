//! `irlm evacuate GROUP.toml`: moves a group, shows it live, ends with a table, a JSON file and an exit code.

use super::caller;
use super::common::{CALL_TIMEOUT, describe, interrupts, runtime, write_json};
use super::show::{Show, print_report};
use super::show_sampling::print_forecast;
use crate::control::api::Method;
use crate::control::config::GroupConfig;
use crate::control::coordinator::plan::Plan;
use crate::control::coordinator::{self, DOUBT_WAIT, Options, STALL_WAIT, forecast, preflight};
use crate::core::migration::Migration;
use crate::core::squeeze::Mode;
use crate::obs::say::{errln, outln};
use anyhow::Context as _;
use clap::Args;
use std::path::{Path, PathBuf};

/// Arguments of `irlm evacuate`.
#[derive(Debug, Args)]
#[command(after_help = "\
^C cancels: what has not been given up yet runs on at its source; ^C again stops watching. This program may also be \
killed: the agents go on, and `irlm status GROUP.toml --follow` watches again.\n\n\
Before anything is prepared both ends of every VM are looked at, and all that would fail is said, a line a reason: exit \
code 4, and no QEMU was touched. `--dry-run` does the same and stops there. A VM that an earlier run has moved is left as \
it is and counts as moved.\n\n\
Exit codes: 0 every VM is at its target, 1 usage or configuration, 2 some VM stayed at its source, 3 some VM is in \
doubt or was not watched to its end, or its old copy runs beside the one that moved, 4 nothing was started, 5 some VM is lost: \
its QEMU has ended, at its source or since it moved, and no copy of it runs.")]
pub(super) struct EvacuateArgs {
    /// The group file (docs/examples/group.toml)
    group: PathBuf,
    /// How to move it; overrides the group file
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// How page contents are compressed: auto, off, forwarded, or zstd:N; overrides the group file
    #[arg(long)]
    compress: Option<Mode>,
    /// When VMs of `irlm vmm` run at their target: pre-copy, post-copy, or hybrid; overrides the group file. VMs of QEMU
    /// always move by pre-copy
    #[arg(long)]
    migration: Option<Migration>,
    /// Leave arrived VMs paused; they belong to their targets, and someone else lets them run
    #[arg(long)]
    leave_paused: bool,
    /// Write the report as JSON to FILE, or to standard output for -
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Look at everything that a move looks at first, watch how the VMs write, forecast how each would move; move nothing
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: watch for so many seconds, 0 to 60; 0 forecasts nothing. A VM's dirty log may be on meanwhile
    #[arg(long, value_name = "SECONDS", default_value_t = 3, requires = "dry_run",
        value_parser = clap::value_parser!(u32).range(0..=60))]
    observe: u32,
    /// With --dry-run: forecast for this bandwidth instead of the source hosts' own, Mbit/s
    #[arg(long, value_name = "N", requires = "dry_run", value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    mbit: Option<u64>,
    /// No progress, only the result
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn run(args: &EvacuateArgs) -> anyhow::Result<u8> {
    let mut config = GroupConfig::load(&args.group)?;
    config.compress = args.compress.unwrap_or(config.compress);
    config.migration = args.migration.unwrap_or(config.migration);
    let plan = caller::of(Plan::new(config, args.method)?)?;
    let runtime = runtime()?;
    if let Some(path) = &args.json {
        may_be_written(path)?;
    }
    if args.dry_run {
        return runtime.block_on(dry_run(&plan, args));
    }
    let options = Options {
        leave_paused: args.leave_paused,
        call_timeout: CALL_TIMEOUT,
        doubt_wait: DOUBT_WAIT,
        stall_wait: STALL_WAIT,
        open_index: Some(super::index::opener()),
    };
    let report = runtime.block_on(async {
        let mut show = Show::new(&plan, args.quiet);
        let report = coordinator::run(&plan, &options, interrupts(), &mut |s| show.scene(&s)).await;
        show.end();
        report
    });
    // Programs that read standard output get nothing but the JSON.
    if args.json.as_ref().is_none_or(|p| p.as_os_str() != "-") {
        print_report(&report);
    }
    let written = args.json.as_ref().map_or(Ok(()), |path| write_json(path, &report));
    // The exit code says what became of the VMs.
    if let Err(e) = written {
        errln!("irlm: {e:#}: the report is not kept");
    }
    Ok(report.outcome.exit_code())
}

/// Sees, before anything is done, that the report can be kept there.
fn may_be_written(path: &Path) -> anyhow::Result<()> {
    if path.as_os_str() == "-" {
        return Ok(());
    }
    let new = !path.exists();
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
    opened.map(drop).with_context(|| format!("cannot write {}; nothing was started", path.display()))?;
    if new {
        // Nobody is to read an empty one.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

async fn dry_run(plan: &Plan, args: &EvacuateArgs) -> anyhow::Result<u8> {
    let c = &plan.config;
    // Programs that read standard output get nothing but the JSON.
    if args.json.as_ref().is_some_and(|p| p.as_os_str() == "-") {
        if let Err(problems) = preflight(plan, CALL_TIMEOUT, Some(super::index::opener())).await {
            problems.iter().for_each(|p| errln!("! {p}"));
            errln!("it would not start");
            return Ok(4);
        }
        let found = forecast::observe(plan, CALL_TIMEOUT, args.observe.max(1), args.mbit).await;
        write_json(Path::new("-"), &found)?;
        return Ok(0);
    }
    outln!(
        "group {}: {} VMs from {} source hosts to {} target hosts, method {} ({})",
        c.name,
        c.vm.len(),
        c.source.len(),
        c.target.len(),
        plan.method,
        describe(plan.method)
    );
    outln!("  {}", plan.recipe);
    let said = plan.recipe.unused(c).into_iter().chain(plan.recipe.unverified(c));
    said.for_each(|line| outln!("  {line}"));
    for v in &c.vm {
        let Some((from, to)) = v.fronts() else { continue };
        let by = if from.is_qemu() { "" } else { ", irlm vmm" };
        outln!("  {}: {} ({from}) to {} ({to}){by}", v.name, v.source, v.target);
    }
    match preflight(plan, CALL_TIMEOUT, Some(super::index::opener())).await {
        Ok(notes) => {
            for n in notes {
                outln!("! {n}");
            }
            if args.observe > 0 {
                outln!("watching how the VMs write, for {} s", args.observe);
                let found = forecast::observe(plan, CALL_TIMEOUT, args.observe, args.mbit).await;
                print_forecast(&found);
                if let Some(path) = &args.json {
                    write_json(path, &found)?;
                }
            }
            outln!("all {} agents are ready for it; nothing was moved", plan.agents.len());
            Ok(0)
        }
        Err(problems) => {
            for p in problems {
                outln!("! {p}");
            }
            outln!("it would not start");
            Ok(4)
        }
    }
}
