//! `irlm-lab evidence`: measures the points that an issue must show, afresh, and prints one JSON line a point on
//! standard output; what it does meanwhile goes to standard error.

// Issue topics, one module each; `ebpf`'s parts measure what their names say.
mod bytes;
mod ebpf;
mod foundation;
mod kvm;
mod ownership;
mod security;

use anyhow::{Result, bail};
use irlm_tests::irlm::beside;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which points
    #[arg(value_enum)]
    topic: Topic,
    /// Only points whose name begins with this, e.g. `2-time`; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// The program under test [default: `irlm` beside this one]
    #[arg(long)]
    irlm: Option<PathBuf>,
    /// Runs of the random campaign (topic `ownership`); fewer than a thousand are said to be too few
    #[arg(long, default_value_t = ownership::RUNS, value_name = "N")]
    runs: u64,
    /// Where the results are kept
    #[arg(long, default_value = "target/lab")]
    out: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Topic {
    /// Bytes, times, identity and downtime of all methods under QEMU 7.2, 10.0, and from 7.2 to 10.0; the proxy's tax
    Foundation,
    /// Bytes, times and processor time of all methods at several link speeds, in the small rack and in the paper's
    Bytes,
    /// Tagging, shaping, the group's budget, dirty-page sampling, and what each costs
    Ebpf,
    /// Our own VMM: identity while guests write, pre-hashed pages, groups of both kinds
    Kvm,
    /// Who owns a VM: operators' ordinary afternoons as cases, the random campaign, and what other topics show of it
    Ownership,
    /// Who may ask for what, over real connections; what TLS costs
    Security,
}

/// Which points are asked for. Points that need the same runs are measured together, so that more may be printed.
pub(crate) struct Only(Vec<String>);

impl Only {
    /// Whether the point of this name is asked for.
    pub(crate) fn wants(&self, id: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|p| id.starts_with(p.as_str()))
    }

    /// Whether any point is asked for whose name begins with this.
    pub(crate) fn wants_some(&self, beginning: &str) -> bool {
        self.wants(beginning) || self.0.iter().any(|p| p.starts_with(beginning))
    }
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
    let only = Only(a.only.clone());
    let points = match a.topic {
        Topic::Foundation => foundation::points(&irlm, &a.out, &only)?,
        Topic::Bytes => bytes::points(&irlm, &a.out, &only)?,
        Topic::Ebpf => ebpf::points(&irlm, &a.out, &only)?,
        Topic::Kvm => kvm::points(&irlm, &a.out, &only)?,
        Topic::Security => security::points(&irlm, &only)?,
        Topic::Ownership => ownership::points(&irlm, &a.out, &only, a.runs)?,
    };
    if points.is_empty() {
        bail!("there is no point whose name begins with {}", a.only.join(" or "));
    }
    match points.iter().filter(|p| !p.holds).count() {
        0 => Ok(()),
        n => bail!("{n} of {} points do not hold", points.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::Only;

    #[test]
    fn points_are_chosen_by_the_beginning_of_their_names() {
        let of = |p: &[&str]| Only(p.iter().map(|&p| p.to_owned()).collect());
        assert!(of(&[]).wants("1-bytes") && of(&[]).wants_some("1-"));
        assert!(of(&["6-"]).wants("6-failures-10.0") && !of(&["6-"]).wants("1-bytes"));
        // A point is not asked for by the name of another that begins like it.
        assert!(!of(&["1-others-irlm-bbr"]).wants("1-others-irlm"));
        // A group of points is measured if one of them is asked for.
        assert!(of(&["2-dscp-v6"]).wants_some("2-") && !of(&["2-dscp-v6"]).wants_some("3-"));
        assert!(of(&["8", "5"]).wants("5-proxy-tax"));
    }
}
