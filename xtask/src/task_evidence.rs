//! Measures afresh what an issue must show, so that no figure in the documentation is older than the code.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::task_lab;
use anyhow::{Context as _, Result};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which points, e.g. `foundation`; `irlm-lab evidence --help` lists them
    topic: String,
    /// Only points whose name begins with this, e.g. `2-time`; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
}

/// `cargo xtask evidence TOPIC`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let mut lab = task_lab::ready(ctx)?.context(NO_ROOT)?;
    lab.args(["evidence", &args.topic]);
    for prefix in &args.only {
        lab.args(["--only", prefix]);
    }
    ctx::show(&mut lab)
}
