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

/// `cargo xtask lab ARGS`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut lab = ready(ctx)?.context(NO_ROOT)?;
    ctx::show(lab.args(&args.args))
}

/// The lab's program, built, with everything it needs there; `None` if this user cannot become root.
pub(crate) fn ready(ctx: &Ctx) -> Result<Option<Command>> {
    let outcome = setup::ensure(ctx, setup::LAB)?;
    if !outcome.missing.is_empty() {
        bail!("the lab cannot run without: {}", outcome.missing.join("; "));
    }
    if let Err(e) = ebpf::object(ctx) {
        // Losing eBPF costs counting, never packets (invariant 5): the lab runs without it and says so.
        println!("ebpf: not built, so flows are not counted by eBPF: {e:#}");
    }
    build(ctx)?;
    Ok(program(ctx))
}

/// The lab's program as [`ready`] has built it, for another run.
pub(crate) fn program(ctx: &Ctx) -> Option<Command> {
    ctx.as_root(&ctx.target().join("release/irlm-lab"))
}

/// Builds `irlm` and the lab, optimised: what they move and compare is gigabytes.
pub(crate) fn build(ctx: &Ctx) -> Result<()> {
    println!("building irlm and the lab (release)");
    ctx::show(ctx.cargo().args(["build", "--release", "--quiet", "-p", "irlm-user", "-p", "irlm-tests"]))
}
