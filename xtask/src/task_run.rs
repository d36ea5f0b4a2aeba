//! The main job: a rack of real guests is evacuated by every method, and what it cost is shown. With arguments it is
//! the usual short way to build and run the program.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::ebpf;
use crate::task_lab::{self, Profile};
use anyhow::{Context as _, Result};
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build `irlm` and run it with these arguments instead, as root where this user can
    #[arg(last = true)]
    args: Vec<String>,
}

/// `cargo xtask run [-- ARGS]`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    if args.args.is_empty() {
        let mut lab = task_lab::ready(ctx, Profile::Release)?.context(NO_ROOT)?;
        return ctx::show(lab.arg("run"));
    }
    if let Err(e) = ebpf::object(ctx) {
        println!("ebpf: not built, so flows are not counted by eBPF: {e:#}");
    }
    ctx::show(ctx.cargo().args(["build", "--release", "--quiet", "-p", "irlm-user"]))?;
    let irlm = ctx.target().join("release/irlm");
    let mut c = ctx.as_root(&irlm).unwrap_or_else(|| {
        println!("{NO_ROOT}; going on as this user");
        Command::new(&irlm)
    });
    ctx::show(c.args(&args.args))
}
