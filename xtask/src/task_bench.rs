//! Runs one benchmark of the lab with the optimised program.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::task_lab::{self, Profile};
use anyhow::{Context as _, Result};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which benchmark, e.g. `proxy`; `irlm-lab bench --help` lists them
    name: String,
    /// Its own options, e.g. `--times 3`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// `cargo xtask bench NAME`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut lab = task_lab::ready(ctx, Profile::Release)?.context(NO_ROOT)?;
    ctx::show(lab.args(["bench", &args.name]).args(&args.options))
}
