//! Breaks on purpose, one at a time, what was mended, and sees that a test turns red each time: a test that
//! nothing can turn red proves nothing (docs/testing.md).

use crate::ctx::Ctx;
use crate::mutate::patch::{self, Patch, Red};
use crate::mutate::seen::Seen;
use crate::mutate::tree::Tree;
use anyhow::{Result, bail};
use serde::Serialize;
use std::time::Instant;

#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Only patches of `tests/mutations` whose name contains one of these
    names: Vec<String>,
    /// One JSON line a patch
    #[arg(long)]
    pub(crate) json: bool,
    /// Leave out patches that only the lab can see (they need root, and a release build each)
    #[arg(long)]
    no_lab: bool,
}

/// What became of a patch.
#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    kind: &'a str,
    breaks: &'a str,
    /// What is to turn red.
    test: String,
    red: bool,
    /// The tests that failed.
    failed: Vec<String>,
    /// Why it was not seen red.
    why: Option<String>,
    seconds: f64,
}

/// How many patches there were, and how many of them were seen red.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Count {
    pub(crate) all: usize,
    pub(crate) red: usize,
}

/// `cargo xtask mutate`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let count = count(ctx, args)?;
    if !args.json {
        println!("mutate: {} of {} patches were seen red", count.red, count.all);
    }
    if count.red < count.all {
        bail!("{} of {} patches were not seen red", count.all - count.red, count.all);
    }
    Ok(())
}

/// Tries all patches that are asked for, and prints a line for each.
pub(crate) fn count(ctx: &Ctx, args: &Args) -> Result<Count> {
    let mut patches = patch::all(ctx)?;
    patches.retain(|p| args.names.is_empty() || args.names.iter().any(|n| p.name.contains(n.as_str())));
    patches.retain(|p| !args.no_lab || matches!(p.red, Red::Cargo(_)));
    if patches.is_empty() {
        bail!("no patch in {} has such a name", patch::FOLDER);
    }
    let tree = Tree::new(ctx)?;
    let sound = unpatched(ctx, &tree, &patches, args.json);
    let mut count = Count { all: patches.len(), red: 0 };
    for p in &patches {
        let began = Instant::now();
        let seen = match sound.iter().find(|(red, _)| *red == p.red) {
            Some((_, Err(why))) => Err(format!("without the patch: {why}")),
            _ => mutated(ctx, &tree, p)?,
        };
        let (failed, why) = match seen {
            Ok(failed) => (failed, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let line = Line {
            name: &p.name,
            kind: &p.kind,
            breaks: &p.breaks,
            test: p.red.text(),
            red: why.is_none(),
            failed,
            why,
            seconds: began.elapsed().as_secs_f64(),
        };
        count.red += usize::from(line.red);
        print(&line, args.json)?;
    }
    Ok(count)
}

/// What each test comes to without any patch: one that fails already shows nothing.
fn unpatched(ctx: &Ctx, tree: &Tree, patches: &[Patch], quiet: bool) -> Vec<(Red, Result<(), String>)> {
    let mut out: Vec<(Red, Result<(), String>)> = Vec::new();
    for p in patches {
        if out.iter().any(|(red, _)| *red == p.red) {
            continue;
        }
        let end = match test(ctx, tree, &p.red) {
            Ok(Seen::Passed(_)) => Ok(()),
            Ok(Seen::Failed(tests)) => Err(format!("{} failed", tests.join(", "))),
            Ok(Seen::Nothing(why)) => Err(why),
            Err(e) => Err(format!("{e:#}")),
        };
        if let (Err(why), false) = (&end, quiet) {
            println!("mutate: unpatched: {}: {why}", p.red.text());
        }
        out.push((p.red.clone(), end));
    }
    if !quiet {
        let good = out.iter().filter(|(_, end)| end.is_ok()).count();
        println!("mutate: unpatched: {good} of {} sets of tests pass", out.len());
    }
    out
}

/// The tests that fail with the patch, or why that was not seen. An error: the copy is not as it was.
fn mutated(ctx: &Ctx, tree: &Tree, p: &Patch) -> Result<Result<Vec<String>, String>> {
    if let Err(e) = p.apply(&tree.at) {
        return Ok(Err(format!("{e:#}")));
    }
    let seen = test(ctx, tree, &p.red);
    p.undo(&tree.at)?;
    Ok(match seen {
        Ok(Seen::Failed(tests)) => Ok(tests),
        Ok(Seen::Passed(n)) => Err(format!("nothing noticed it: {n} tests pass")),
        Ok(Seen::Nothing(why)) => Err(why),
        Err(e) => Err(format!("{e:#}")),
    })
}

fn test(ctx: &Ctx, tree: &Tree, red: &Red) -> Result<Seen> {
    match red {
        Red::Cargo(args) => tree.cargo_test(ctx, args),
        Red::Lab(names) => tree.lab_test(ctx, names),
    }
}

fn print(line: &Line<'_>, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(line)?);
        return Ok(());
    }
    let what = match &line.why {
        None => line.failed.join(", "),
        Some(why) => why.clone(),
    };
    let word = if line.red { "red" } else { "NOT RED" };
    println!("{word:<8}{:<44}{:>5.0} s  {what}", line.name, line.seconds);
    Ok(())
}
