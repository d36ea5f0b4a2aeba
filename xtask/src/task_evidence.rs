//! Measures afresh what an issue must show, so that no figure in the documentation is older than the code.

use crate::ctx::{self, Ctx, NO_ROOT};
use crate::point::Measure;
use crate::task_lab::{self, Profile};
use crate::{house, ownership, security};
use anyhow::{Context as _, Result, bail};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which points, e.g. `foundation`; `irlm-lab evidence --help` lists them
    topic: String,
    /// Only points whose name begins with this, e.g. `2-time`; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// Topic `ownership`: runs of the random campaign; fewer than its thousand are said to be too few
    #[arg(long, value_name = "N")]
    runs: Option<u64>,
}

/// The topics that are measured in part without the lab.
const OWNERSHIP: &str = "ownership";
const SECURITY: &str = "security";
/// The topic that is counted in the text.
const HOUSE: &str = "house";

/// Those of the points whose name begins with one of these; all, if there are none.
fn named(points: &'static [Measure], only: &[String]) -> Vec<&'static Measure> {
    let wanted = |m: &&Measure| only.is_empty() || only.iter().any(|p| m.0.starts_with(p.as_str()));
    points.iter().filter(wanted).collect()
}

/// `cargo xtask evidence TOPIC`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let (lab, here) = match &*args.topic {
        OWNERSHIP => ownership::parts(&args.only),
        SECURITY => security::parts(&args.only),
        HOUSE => (None, named(house::POINTS, &args.only)),
        _ => return by_the_lab(ctx, args, &args.only),
    };
    let mut wrong = Vec::new();
    for (id, measure) in here {
        let point = measure(ctx).with_context(|| format!("measure {id}"))?;
        println!("{}", serde_json::to_string(&point)?);
        if !point.holds {
            wrong.push(*id);
        }
    }
    if let Some(only) = lab {
        by_the_lab(ctx, args, &only)?;
    }
    if !wrong.is_empty() {
        bail!("{} do not hold", wrong.join(", "));
    }
    Ok(())
}

fn by_the_lab(ctx: &Ctx, args: &Args, only: &[String]) -> Result<()> {
    let mut lab = task_lab::ready(ctx, Profile::Release)?.context(NO_ROOT)?;
    lab.args(["evidence", &args.topic]);
    for prefix in only {
        lab.args(["--only", prefix]);
    }
    if let Some(runs) = args.runs {
        lab.args(["--runs", &runs.to_string()]);
    }
    ctx::show(&mut lab)
}
