//! The patches in `tests/mutations`: how they are read, and whether they still fit the tree.

use crate::ctx::{self, Ctx};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where they are, from the workspace's directory.
pub(crate) const FOLDER: &str = "tests/mutations";
/// What is to be done with a patch that does not fit any more.
const REMAKE: &str = "make the same mistake in today's code and write the difference down anew";

/// What must turn red.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Red {
    /// `cargo test` with these arguments.
    Cargo(Vec<String>),
    /// These tests of the lab.
    Lab(Vec<String>),
}

/// A change that breaks one thing on purpose.
#[derive(Clone, Debug)]
pub(crate) struct Patch {
    /// The file's name without its ending.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// What goes wrong for an operator.
    pub(crate) breaks: String,
    /// The kind of fault that comes back.
    pub(crate) kind: String,
    pub(crate) red: Red,
}

/// All patches, by name.
pub(crate) fn all(ctx: &Ctx) -> Result<Vec<Patch>> {
    let folder = ctx.root.join(FOLDER);
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "patch"));
    paths.sort();
    paths.into_iter().map(read).collect()
}

fn read(path: PathBuf) -> Result<Patch> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    parse(name.clone(), path, &text).with_context(|| format!("{FOLDER}/{name}.patch"))
}

fn parse(name: String, path: PathBuf, text: &str) -> Result<Patch> {
    let head: Vec<&str> = text.lines().take_while(|l| !l.starts_with("diff --git ")).collect();
    let of = |key: &str| {
        let value = head.iter().find_map(|l| l.strip_prefix(key)?.strip_prefix(": "));
        let value = value.map(str::trim).filter(|v| !v.is_empty());
        value.map(str::to_owned).with_context(|| format!("no line `{key}: …` before the difference"))
    };
    let (breaks, kind, red) = (of("Breaks")?, of("Kind")?, words(&of("Red")?));
    if head.len() == text.lines().count() {
        bail!("no line `diff --git …`: nothing is changed");
    }
    let red = match red.split_first() {
        Some((first, rest)) if first == "lab" && !rest.is_empty() => Red::Lab(rest.to_vec()),
        Some(_) if red.contains(&"--".to_owned()) => Red::Cargo(red),
        _ => bail!("`Red:` is `lab NAME…`, or what `cargo test` is told, with `-- NAME…` at its end"),
    };
    Ok(Patch { name, path, breaks, kind, red })
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

impl Red {
    /// As it is written in the patch.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Cargo(args) => args.join(" "),
            Self::Lab(names) => format!("lab {}", names.join(" ")),
        }
    }
}

impl Patch {
    /// Applies it in `tree`.
    pub(crate) fn apply(&self, tree: &Path) -> Result<()> {
        self.git(tree, &[])
    }

    /// Takes it out of `tree` again.
    pub(crate) fn undo(&self, tree: &Path) -> Result<()> {
        self.git(tree, &["--reverse"])
    }

    /// Whether it applies in `tree`; changes nothing.
    pub(crate) fn fits(&self, tree: &Path) -> Result<()> {
        self.git(tree, &["--check"])
    }

    fn git(&self, tree: &Path, how: &[&str]) -> Result<()> {
        let mut git = Command::new("git");
        git.current_dir(tree).args(["apply"]).args(how).arg(&self.path).stdin(Stdio::null());
        // The copy lies inside a repository and is not of it: git would leave out what it takes for that one's.
        git.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env("GIT_CEILING_DIRECTORIES", above(tree));
        let why = |e| format!("{FOLDER}/{}.patch does not apply: {REMAKE}: {e:#}", self.name);
        ctx::output(&mut git).map(drop).map_err(|e| anyhow::anyhow!(why(e)))
    }
}

fn above(tree: &Path) -> PathBuf {
    tree.parent().unwrap_or(tree).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "Breaks: two copies run\nKind: same file again\n";
    const DIFF: &str = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n";

    fn of(text: &str) -> Result<Patch> {
        parse("01-x".into(), "01-x.patch".into(), text)
    }

    #[test]
    fn a_patch_says_what_it_breaks_and_what_turns_red() {
        let p = of(&format!("{HEAD}Red: -p irlm-user --lib -- name\n\n{DIFF}")).unwrap();
        assert_eq!((&*p.breaks, &*p.kind), ("two copies run", "same file again"));
        assert_eq!(p.red, Red::Cargo(words("-p irlm-user --lib -- name")));
        let p = of(&format!("{HEAD}Red: lab own-one own-two\n{DIFF}")).unwrap();
        assert_eq!(p.red, Red::Lab(words("own-one own-two")));
        assert_eq!(p.red.text(), "lab own-one own-two");
    }

    #[test]
    fn one_that_lacks_a_line_is_named_with_what_it_lacks() {
        for (text, word) in [
            (format!("{HEAD}{DIFF}"), "Red"),
            (format!("Kind: k\nRed: -- x\n{DIFF}"), "Breaks"),
            (format!("{HEAD}Red: -p irlm-user --lib\n{DIFF}"), "-- NAME"),
            (format!("{HEAD}Red: lab\n{DIFF}"), "lab NAME"),
            (format!("{HEAD}Red: -- x\n"), "diff --git"),
            // What a difference says is no head.
            (format!("{HEAD}{DIFF}Red: -- x\n"), "Red"),
        ] {
            let e = format!("{:#}", of(&text).unwrap_err());
            assert!(e.contains(word), "{e}");
        }
    }
}
