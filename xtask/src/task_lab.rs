//! Builds the rack lab and `irlm`, and runs the lab as root.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::{ebpf, setup};
use anyhow::{Context as _, Result, bail};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What `irlm-lab` is told, e.g. `run --hosts 3 --guests 2`, `selftest`, `test core-cut`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// How the lab and `irlm` are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Optimised: for everything that measures.
    Release,
    /// As the unit tests, which have compiled all of it but two programs; arithmetic that overflows panics.
    Tests,
}

/// `cargo xtask lab ARGS`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut lab = ready(ctx, Profile::Release)?.context(NO_ROOT)?;
    ctx::show(lab.args(&args.args))
}

/// The lab's program, built, with everything it needs there; `None` if this user cannot become root.
pub(crate) fn ready(ctx: &Ctx, profile: Profile) -> Result<Option<Command>> {
    let outcome = setup::ensure(ctx, setup::LAB)?;
    if !outcome.missing.is_empty() {
        bail!("the lab cannot run without: {}", outcome.missing.join("; "));
    }
    if let Err(e) = ebpf::object(ctx) {
        // Losing eBPF costs counting, never packets (invariant 5): the lab runs without it and says so.
        println!("ebpf: not built, so flows are not counted by eBPF: {e:#}");
    }
    build(ctx, profile)?;
    Ok(program(ctx, profile))
}

/// The lab's program as [`ready`] has built it, for another run.
pub(crate) fn program(ctx: &Ctx, profile: Profile) -> Option<Command> {
    let folder = match profile {
        Profile::Release => "release",
        Profile::Tests => "debug",
    };
    ctx.as_root(&ctx.target().join(folder).join("irlm-lab"))
}

/// Builds `irlm` and the lab.
fn build(ctx: &Ctx, profile: Profile) -> Result<()> {
    let (what, args): (_, &[&str]) = match profile {
        Profile::Release => ("release", &["--release", "-p", "irlm-user", "-p", "irlm-tests"]),
        // The whole workspace and one test with it, so that dependencies have the features that `cargo test` gives them.
        // With other features nearly everything would be compiled once more.
        Profile::Tests => {
            ("as the tests are", &["--workspace", "--bin", "irlm", "--bin", "irlm-lab", "--test", "plain"])
        }
    };
    println!("building irlm and the lab ({what})");
    ctx::show(ctx.cargo().args(["build", "--quiet"]).args(args))
}
