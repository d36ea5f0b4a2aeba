//! docs/wire.md carries a fingerprint of the code it describes, so that one cannot change without the other.

use crate::ctx::Ctx;
use crate::rust_text::without_tests;
use anyhow::{Context as _, Result};
use std::fs;
use std::path::Path;

const WIRE_DOC: &str = "docs/wire.md";
const WIRE_CODE: &str = "irlm-user/core/src/wire";
/// The bodies that the page describes.
const BODY_CODE: &str = "irlm-user/core/src/squeeze/body.rs";
const MARK: &str = "Fingerprint of the wire code: ";

/// What is wrong with the page's fingerprint; with `bless`, writes today's instead.
pub(crate) fn check(ctx: &Ctx, files: &[String], bless: bool) -> Result<Option<String>> {
    let mut code: Vec<&String> = files
        .iter()
        .filter(|f| {
            f.starts_with(&format!("{WIRE_CODE}/")) || **f == format!("{WIRE_CODE}.rs") || *f == BODY_CODE
        })
        .filter(|f| f.ends_with(".rs") && !f.ends_with("tests.rs") && !f.contains("/tests/"))
        .collect();
    code.sort();
    if code.is_empty() {
        println!("tidy: there is no {WIRE_CODE} yet, so {WIRE_DOC} is not checked against it");
        return Ok(None);
    }
    let mut hash = blake3::Hasher::new();
    for f in code {
        let text = fs::read_to_string(ctx.root.join(f)).with_context(|| format!("read {f}"))?;
        // Comments and layout may change without the wire changing.
        hash.update(
            without_tests(&without_comments(&text)).split_whitespace().collect::<String>().as_bytes(),
        );
    }
    let now = format!("{MARK}`{}`", &hash.finalize().to_hex()[..16]);
    let doc = ctx.root.join(WIRE_DOC);
    let text = fs::read_to_string(&doc).unwrap_or_default();
    let said = text.lines().find(|l| l.starts_with(MARK));
    if said == Some(now.as_str()) {
        return Ok(None);
    }
    if bless {
        bless_doc(&doc, &text, said, &now)?;
        return Ok(None);
    }
    let what = "the wire code has changed: bring the page up to date, then run `cargo xtask tidy --bless`";
    Ok(Some(format!("{WIRE_DOC}: {what}")))
}

/// Line comments cut off; literals stay, because they are on the wire.
fn without_comments(text: &str) -> String {
    text.lines().filter(|l| !l.trim_start().starts_with("//")).flat_map(|l| [l, "\n"]).collect()
}

fn bless_doc(doc: &Path, text: &str, said: Option<&str>, now: &str) -> Result<()> {
    let new = match said {
        Some(old) => text.replace(old, now),
        None => format!("{}\n\n{now}\n", text.trim_end()),
    };
    fs::write(doc, new).with_context(|| format!("write {}", doc.display()))?;
    println!("tidy: {WIRE_DOC} now carries today's fingerprint");
    Ok(())
}
