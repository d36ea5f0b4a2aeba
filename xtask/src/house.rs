//! The points of `evidence house`: what is counted in the text. What is not measured yet says so, and does not hold.

use crate::ctx::Ctx;
use crate::point::{Measure, Point, at_most, not_measured};
use crate::rust_text::{code_only, without_tests};
use crate::{circles, task_tidy};
use anyhow::{Context as _, Result};

/// All of them.
pub(crate) const POINTS: &[Measure] = &[
    ("1-tidy", tidy),
    ("1-circles", in_circles),
    ("1-strings", strings),
    ("2-decodes", decodes),
    ("2-proxy", |_| Ok(not_measured("2-proxy", "processor time a page, by what it was before"))),
    ("3-bytes", |_| {
        Ok(not_measured("3-bytes", "bytes and time of `evidence bytes`, by what they were before"))
    }),
    ("4-mechanisms", |_| {
        Ok(not_measured("4-mechanisms", "mechanisms of which nobody knows what they are worth"))
    }),
    ("6-times", |_| {
        Ok(not_measured("6-times", "seconds of builds and of all tests, by what they were before"))
    }),
];

/// Most results whose error is a text.
const STRINGS: f64 = 15.0;
/// Where code that ships is.
const SHIPS: [&str; 3] = ["irlm-user/src/", "irlm-user/core/src/", "irlm-common/src/"];

/// Code that ships, without its tests: name and text.
fn shipped(ctx: &Ctx) -> Result<Vec<(String, String)>> {
    let mine =
        |f: &String| SHIPS.iter().any(|s| f.starts_with(s)) && f.ends_with(".rs") && !f.contains("/tests");
    let read = |f: String| {
        let text = std::fs::read_to_string(ctx.root.join(&f)).with_context(|| format!("read {f}"))?;
        Ok((f, without_tests(&code_only(&text)).to_owned()))
    };
    task_tidy::files(ctx)?.into_iter().filter(mine).map(read).collect()
}

fn tidy(ctx: &Ctx) -> Result<Point> {
    let (warnings, errors) = task_tidy::findings(ctx)?;
    let all = warnings.len() + errors.len();
    let what =
        "findings of cargo xtask tidy, warnings too: floors, circles, bounds, columns, sentences, folders";
    let first = errors.first().or(warnings.first()).cloned().unwrap_or_else(|| "none".to_owned());
    Ok(at_most("1-tidy", what, (all as f64, 0.0), format!("cargo xtask tidy; the first: {first}")))
}

fn in_circles(ctx: &Ctx) -> Result<Point> {
    let read = |f: String| Some((f.clone(), std::fs::read_to_string(ctx.root.join(&f)).ok()?));
    let sources: Vec<_> =
        task_tidy::files(ctx)?.into_iter().filter(|f| f.ends_with(".rs")).filter_map(read).collect();
    let found = circles::check(&sources);
    let how = found.iter().map(|f| &*f.0).collect::<Vec<_>>().join("; ");
    let what = "circles of files, and files of source and arrival that name each other";
    Ok(at_most("1-circles", what, (found.len() as f64, 0.0), format!("xtask/src/circles.rs: {how}")))
}

/// Whether a line has a `Result` whose error is a text.
fn says_text(line: &str) -> bool {
    line.match_indices(", String>").any(|(end, _)| {
        let before = &line[..end];
        before.rfind("Result<").is_some_and(|start| {
            let inside = &before[start + "Result<".len()..];
            inside.matches(['<', '(']).count() == inside.replace("->", "").matches(['>', ')']).count()
        })
    })
}

fn strings(ctx: &Ctx) -> Result<Point> {
    let files = shipped(ctx)?;
    let count: usize = files.iter().map(|(_, t)| t.lines().filter(|l| says_text(l)).count()).sum();
    let what = "results of shipped code whose error is a text";
    Ok(at_most("1-strings", what, (count as f64, STRINGS), "Result<_, String> outside of tests".to_owned()))
}

fn decodes(ctx: &Ctx) -> Result<Point> {
    let files = shipped(ctx)?;
    let sites: Vec<&str> = files
        .iter()
        .filter(|(f, _)| f.starts_with("irlm-user/src/flow/arrival/"))
        .flat_map(|(f, t)| ["Records::new", "batch.read("].map(|call| t.matches(call).map(|_| f.as_str())))
        .flatten()
        .collect();
    let what = "places of the target where a frame's records are decoded";
    Ok(at_most(
        "2-decodes",
        what,
        (sites.len() as f64, 1.0),
        format!("Records::new or PageBatch::read in {}", sites.join(", ")),
    ))
}

#[cfg(test)]
mod tests {
    use super::says_text;

    #[test]
    fn a_result_whose_error_is_a_text_is_counted_and_no_map_of_texts() {
        assert!(says_text("fn a() -> Result<(), String> {"));
        assert!(says_text("    work: impl FnOnce() -> Result<Vec<(u8, u16)>, String>,"));
        assert!(!says_text("fn a() -> Result<BTreeMap<u8, String>, Error> {"));
        assert!(!says_text("let m: HashMap<String, String> = x;"));
    }
}
