//! `irlm-lab evidence`: measures the points that an issue must show, afresh, and prints one JSON line a point on
//! standard output; what it does meanwhile goes to standard error.

// Issue topics, one module each; `ebpf`'s parts measure what their names say.
mod ebpf;
mod foundation;

use anyhow::{Result, bail};
use irlm_tests::irlm::beside;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which points
    #[arg(value_enum)]
    topic: Topic,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Where the results are kept
    #[arg(long, default_value = "target/lab")]
    out: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Topic {
    /// Bytes, times, identity and downtime of all methods under QEMU 7.2, 10.0, and from 7.2 to 10.0; the proxy's tax
    Foundation,
    /// Tagging, shaping, the group's budget, dirty-page sampling, and what each costs
    Ebpf,
}

/// What was measured of one point.
#[derive(serde::Serialize)]
pub(crate) struct Point {
    pub(crate) id: String,
    pub(crate) what: String,
    /// None: it was not measured.
    pub(crate) value: Option<f64>,
    /// The value must not be above it; none if there is nothing to compare.
    pub(crate) bound: Option<f64>,
    pub(crate) holds: bool,
    pub(crate) how: String,
}

impl Point {
    pub(crate) fn print(self, points: &mut Vec<Self>) -> Result<()> {
        println!("{}", serde_json::to_string(&self)?);
        points.push(self);
        Ok(())
    }
}

/// A measured value and the most it may be.
pub(crate) fn at_most(
    points: &mut Vec<Point>,
    id: &str,
    what: &str,
    how: &str,
    value: f64,
    bound: f64,
) -> Result<()> {
    let (id, what, how) = (id.to_owned(), what.to_owned(), how.to_owned());
    Point { id, what, value: Some(value), bound: Some(bound), holds: value <= bound, how }.print(points)
}

/// A point that this program does not measure: it does not hold here.
pub(crate) fn unmeasured(points: &mut Vec<Point>, id: &str, what: &str, how: &str) -> Result<()> {
    let (id, what, how) = (id.to_owned(), what.to_owned(), format!("not measured here: {how}"));
    Point { id, what, value: None, bound: None, holds: false, how }.print(points)
}

pub(crate) fn run(a: &Args) -> Result<()> {
    let irlm = a.irlm.clone().map_or_else(beside, Ok)?;
    let points = match a.topic {
        Topic::Foundation => foundation::points(&irlm, &a.out)?,
        Topic::Ebpf => ebpf::points(&irlm, &a.out)?,
    };
    match points.iter().filter(|p| !p.holds).count() {
        0 => Ok(()),
        n => bail!("{n} of {} points do not hold", points.len()),
    }
}
