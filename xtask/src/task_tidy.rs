//! House rules that the compiler does not check. Each finding names the file, the line and what to do.

use crate::bounds;
use crate::circles;
use crate::ctx::{self, Ctx};
use crate::mutate::patch;
use crate::rust_text::{code_only, without_tests};
use crate::wire_doc;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write today's fingerprint of the wire code into docs/wire.md (after you have brought that page up to date)
    #[arg(long)]
    pub(crate) bless: bool,
}

/// The floors of irlm-user, lowest first; a file may name its own floor and lower ones (ARCHITECTURE.md).
const FLOORS: &[(&str, u32)] =
    &[("core", 0), ("host", 1), ("net", 1), ("flow", 2), ("control", 3), ("roles", 4), ("main", 5)];
/// Usable by all but core; itself names nothing above the pure floor.
const OBS: &str = "obs";
const USER: &str = "irlm-user/src/";
const CORE: &str = "irlm-user/core/src/";
/// What a pure floor must not name.
const IMPURE: &[&str] = &[
    "std::fs",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "std::env",
    "std::process",
    "std::thread",
    "std::io",
    "std::os",
    "tokio",
    "rustix",
    "libc",
    "socket2",
    "Instant::now",
    "SystemTime",
    "rand::rng",
];
/// Where unsafe code may be: the host floor, the eBPF programs, and the marker that tells aya a type is plain bytes,
/// which only the type's own crate can give.
const UNSAFE: &[&str] =
    &["irlm-user/src/host/", "irlm-user/src/host.rs", "irlm-ebpf/", "irlm-common/src/pod.rs"];
const MAX_LINES: usize = 1000;
const LONG: usize = 600;

/// `cargo xtask tidy`.
pub(crate) fn run(ctx: &Ctx, args: &Args) -> Result<()> {
    let files = files(ctx)?;
    let doers = interpreters(&files, |name| fs::read_to_string(ctx.root.join(name)).ok());
    let (warnings, mut errors) = look(ctx, &files, args.bless)?;
    match crate::crates::check(ctx) {
        Ok(found) => errors.extend(found),
        Err(why) => println!("tidy: others' crates (licences, bans, sources): skipped: {why}"),
    }
    for text in warnings {
        println!("tidy: warning: {text}");
    }
    for text in &errors {
        println!("tidy: {text}");
    }
    match errors.len() {
        0 => {
            println!("tidy: files outside tests that interpret the handover's actions: {}", doers.join(", "));
            let places = unsafe_places(&files, |name| fs::read_to_string(ctx.root.join(name)).ok());
            let places: Vec<_> = places.iter().map(|(floor, n)| format!("{floor} {n}")).collect();
            println!("tidy: {} files are in order; unsafe code: {}", files.len(), places.join(", "));
        }
        n => bail!("tidy: {n} findings"),
    }
    Ok(())
}

/// Warnings, and what is wrong.
type Findings = (Vec<String>, Vec<String>);

/// All that is found, with nothing printed.
pub(crate) fn findings(ctx: &Ctx) -> Result<Findings> {
    look(ctx, &files(ctx)?, false)
}

fn look(ctx: &Ctx, files: &[String], bless: bool) -> Result<Findings> {
    let mut findings = Vec::new();
    let mut sources = Vec::new();
    for name in files {
        let Ok(text) = fs::read_to_string(ctx.root.join(name)) else { continue };
        leftovers(name, &text, &mut findings);
        if name.ends_with(".rs") {
            rust(name, &text, &mut findings);
            let open = bounds::open(name);
            bounds::check(name, &text, &mut |line, what| {
                findings.push((format!("{name}:{line}: {what}"), open));
            });
            sources.push((name.clone(), text));
        } else if name.ends_with(".md") {
            crate::prose::check(&text, &mut |line, what| {
                findings.push((format!("{name}:{line}: {what}"), false));
            });
        }
        if name.contains("/target/") || name.starts_with("target/") {
            let what = "half the world's tools skip a folder called target: call it something else";
            findings.push((format!("{name}: {what}"), false));
        }
    }
    findings.extend(circles::check(&sources));
    let doers = interpreters(files, |name| fs::read_to_string(ctx.root.join(name)).ok());
    if doers.len() != 1 {
        let what = format!("the handover's actions are interpreted in {doers:?}: only flow/drive.rs may");
        findings.push((what, false));
    }
    if let Some(what) = wire_doc::check(ctx, files, bless)? {
        findings.push((what, false));
    }
    mutations(ctx, &mut findings);
    let (warnings, errors): (Vec<_>, Vec<_>) = findings.into_iter().partition(|f: &Finding| f.1);
    let texts = |found: Vec<Finding>| found.into_iter().map(|f| f.0).collect();
    Ok((texts(warnings), texts(errors)))
}

/// Files outside of tests that interpret what a driver of the handover wants done (decision 0019).
pub(crate) fn interpreters(files: &[String], text: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let pure = |f: &str| f.starts_with("irlm-user/core/src/handover");
    let mine = |f: &&String| f.starts_with(USER) && f.ends_with(".rs") && !f.ends_with("tests.rs");
    let acts = |line: &str| {
        ["departure::", "arrival::"].iter().any(|m| line.contains(m)) && has_word(line, "Action")
    };
    files
        .iter()
        .filter(|f| mine(f) && !pure(f) && !f.contains("/tests/"))
        .filter(|f| text(f).is_some_and(|t| without_tests(&code_only(&t)).lines().any(acts)))
        .cloned()
        .collect()
}

/// How often code is unsafe, by floor or crate.
fn unsafe_places(files: &[String], text: impl Fn(&str) -> Option<String>) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for name in files.iter().filter(|f| f.ends_with(".rs")) {
        let Some(text) = text(name) else { continue };
        let n = code_only(&text).lines().filter(|l| !is_attribute(l) && has_word(l, "unsafe")).count();
        if n > 0 {
            let floor = name.strip_prefix(USER).unwrap_or(name).split(['/', '.']).next().unwrap_or(name);
            *out.entry(floor.to_owned()).or_default() += n;
        }
    }
    out
}

fn is_attribute(line: &str) -> bool {
    line.trim_start().starts_with("#[") || line.trim_start().starts_with("#![")
}

/// A finding, and whether it is only a warning.
type Finding = (String, bool);

/// All files of the tree, from its directory: those that git has, and new ones that it does not ignore.
pub(crate) fn files(ctx: &Ctx) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(&ctx.root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    Ok(ctx::output(&mut git)?.split('\0').filter(|f| !f.is_empty()).map(str::to_owned).collect())
}

/// Whether each patch that breaks something on purpose still fits the code, so that `cargo xtask mutate` can use it.
fn mutations(ctx: &Ctx, findings: &mut Vec<Finding>) {
    match patch::all(ctx) {
        Ok(all) => {
            let bad = all.iter().filter_map(|p| p.fits(&ctx.root).err());
            findings.extend(bad.map(|e| (format!("{e:#}"), false)));
        }
        Err(e) => findings.push((format!("{e:#}"), false)),
    }
}

/// Notes to oneself are issues, not text.
fn leftovers(name: &str, text: &str, findings: &mut Vec<Finding>) {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:"), concat!("HA", "CK:")];
    for (n, line) in text.lines().enumerate() {
        if let Some(w) = words.iter().find(|w| line.contains(**w)) {
            findings
                .push((format!("{name}:{}: {w} left in the text: do it, or open an issue", n + 1), false));
        }
    }
}

fn rust(name: &str, text: &str, findings: &mut Vec<Finding>) {
    let mut fail = |line: usize, what: String| findings.push((format!("{name}:{line}: {what}"), false));
    if !text.starts_with("//!") {
        fail(1, "open the file with a `//!` that says why it exists".into());
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        fail(lines, format!("{lines} lines; at most {MAX_LINES}: split it"));
    }
    let code = code_only(text);
    let may = UNSAFE.iter().any(|place| name.starts_with(place));
    let source: Vec<&str> = text.lines().collect();
    for (n, line) in code.lines().enumerate() {
        if is_attribute(line) || !has_word(line, "unsafe") {
            continue;
        }
        if !may {
            fail(n + 1, "unsafe code belongs under irlm-user/src/host or irlm-ebpf".into());
        } else if !argued(&source, n) {
            fail(n + 1, "say in a `// SAFETY:` comment above why this is sound".into());
        }
    }
    if let Some(path) = name.strip_prefix(USER) {
        floors(path, &code, &mut fail);
    }
    // A crate of its own names no other floor: the compiler sees to that. What the standard library has is left.
    if name.starts_with(CORE) && !name.ends_with("tests.rs") && !name.contains("/tests/") {
        for (n, line) in without_tests(&code).lines().enumerate() {
            if let Some(w) = IMPURE.iter().find(|w| line.contains(**w)) {
                fail(n + 1, format!("core is pure, and {w} is not: move it to another floor"));
            }
        }
    }
    if lines > LONG && lines <= MAX_LINES {
        findings.push((format!("{name}: {lines} lines; above {LONG}, think of splitting it"), true));
    }
}

/// Whether the line, or the comment directly above its statement, argues for the unsafe code.
fn argued(source: &[&str], at: usize) -> bool {
    let says = |l: &str| l.contains("SAFETY:") || l.contains("# Safety");
    if says(source[at]) {
        return true;
    }
    // A statement may span lines above the keyword; comments and attributes belong to what they precede.
    source[..at]
        .iter()
        .rev()
        .take(12)
        .take_while(|l| !l.trim().is_empty() && !l.trim().ends_with(';'))
        .any(|l| says(l))
}

fn floor(module: &str) -> Option<u32> {
    FLOORS.iter().find(|f| f.0 == module).map(|f| f.1)
}

fn floors(path: &str, code: &str, fail: &mut impl FnMut(usize, String)) {
    let modules: Vec<&str> = path.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect();
    let own = modules[0];
    if own == "lib" || (own != OBS && floor(own).is_none()) {
        return;
    }
    for (n, line) in code.lines().enumerate() {
        let named = paths(line, "crate::")
            .into_iter()
            .chain(paths(line, "irlm_user::"))
            .chain(climbed(line, modules.len()));
        for other in named {
            let ok = match (floor(own), floor(&other)) {
                _ if other == own => true,
                (Some(own), Some(other)) => other < own,
                // obs names the pure floor only, and core does not name obs.
                (None, Some(other)) => other == 0,
                (Some(own), None) => other != OBS || own > 0,
                (None, None) => true,
            };
            if !ok {
                fail(n + 1, format!("floor `{own}` must not name `{other}`: imports point only downward"));
            }
        }
    }
}

/// First module of every path in `line` that starts with `root`; `root{a, b::c}` gives both.
fn paths(line: &str, root: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (at, _) in line.match_indices(root) {
        let before = line[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &line[at + root.len()..];
        match rest.strip_prefix('{') {
            None => out.push(word(rest)),
            Some(list) => {
                let (mut depth, mut start) = (0, true);
                for (i, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && !c.is_whitespace() => {
                            out.push(word(&list[i..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    out
}

/// Modules of the crate's root that `super::super::…` reaches from a module `depth` levels deep.
fn climbed(line: &str, depth: usize) -> Vec<String> {
    let chain = "super::".repeat(depth);
    line.match_indices(&chain)
        .filter(|(at, _)| !line[..*at].ends_with("super::"))
        .map(|(at, _)| word(&line[at + chain.len()..]))
        .filter(|w| floor(w).is_some() || w == OBS)
        .collect()
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn has_word(line: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word)
        .any(|(at, _)| !part(line[..at].chars().next_back()) && !part(line[at + word.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, text: &str) -> Vec<String> {
        let mut f = Vec::new();
        rust(name, text, &mut f);
        f.into_iter().map(|f| f.0).collect()
    }

    #[test]
    fn imports_point_downward() {
        let ok = "//! Why.\nuse crate::core::x;\nuse crate::{host::a, net::{b, c}, obs};\nuse super::y;\n";
        assert_eq!(found("irlm-user/src/flow/a.rs", ok), Vec::<String>::new());
        for (name, line) in [
            ("flow/a.rs", "use crate::control::x;"),
            ("host/a.rs", "use crate::net::x;"),
            ("obs/mod.rs", "use crate::flow::x;"),
            ("net/a.rs", "use crate::{core::x, roles::{a, b}};"),
            ("host/a.rs", "use super::super::flow::x;"),
        ] {
            let f = found(&format!("irlm-user/src/{name}"), &format!("//! Why.\n{line}\n"));
            assert_eq!(f.len(), 1, "{name} {line}: {f:?}");
        }
    }

    #[test]
    fn who_interprets_the_handover_s_actions_is_found() {
        let files: Vec<String> =
            ["flow/drive.rs", "flow/other.rs", "handover/departure.rs", "flow/x/tests.rs"]
                .map(|f| format!("{}{f}", if f.starts_with("handover") { CORE } else { USER }))
                .into();
        let text = |f: &str| {
            let says =
                if f.ends_with("other.rs") { "use departure::Action;" } else { "use arrival::{Action, B};" };
            Some(format!("//! Why.\n{says}\n"))
        };
        assert_eq!(interpreters(&files, text).len(), 2);
        let quiet =
            |_: &str| Some("//! departure::Action\n#[cfg(test)]\nmod t { use arrival::Action; }\n".into());
        assert_eq!(interpreters(&files, quiet), Vec::<String>::new());
    }

    #[test]
    fn unsafe_code_has_its_place_and_its_reason() {
        let bare = "//! Why.\nfn f() {\n    unsafe { g() }\n}\n";
        let argued = "//! Why.\nfn f() {\n    // SAFETY: g has no rules.\n    unsafe { g() }\n}\n";
        assert_eq!(found("irlm-user/src/host/a.rs", argued).len(), 0);
        assert_eq!(found("irlm-user/src/host/a.rs", bare).len(), 1);
        assert_eq!(found("irlm-user/src/net/a.rs", argued).len(), 1);
        assert_eq!(
            found("irlm-user/src/net/a.rs", "//! unsafe\n#![forbid(unsafe_code)]\n// unsafe\n").len(),
            0
        );
    }

    #[test]
    fn unsafe_code_is_counted_by_floor() {
        let files = ["irlm-user/src/host/a.rs", "irlm-user/src/host.rs", "irlm-ebpf/src/b.rs", "README.md"];
        let text = "//! unsafe\n#![deny(unsafe_code)]\nunsafe fn f() {\n    unsafe { g() }\n}\n";
        let found = unsafe_places(&files.map(str::to_owned), |_| Some(text.to_owned()));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [("host".into(), 4), ("irlm-ebpf".into(), 2)]);
    }

    #[test]
    fn the_pure_floor_stays_pure_outside_its_tests() {
        let text = "//! Why.\n#[cfg(test)]\nmod tests { use std::fs; }\n";
        assert_eq!(found("irlm-user/core/src/a.rs", text).len(), 0);
        assert_eq!(found("irlm-user/core/src/a.rs", "//! Why.\nuse std::net::TcpStream;\n").len(), 1);
    }
}
