//! Paths and programs, so that every task finds the same cache, says which command failed, and knows whether it may
//! become root.

use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What every task is handed.
pub(crate) struct Ctx {
    /// The workspace's directory.
    pub(crate) root: PathBuf,
    /// Where slow things are kept: `$IRLM_CACHE`, or `irlm` in the user's cache directory.
    pub(crate) cache: PathBuf,
    /// False with `--no-install`.
    pub(crate) install: bool,
}

/// How a task can get root's rights.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Root {
    /// Already root.
    Am,
    /// Through `sudo -n`, without asking for a password.
    Sudo,
    /// Not at all.
    No,
}

impl Ctx {
    /// Finds the workspace and the cache.
    pub(crate) fn new(install: bool) -> Result<Self> {
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no workspace around it")?;
        let cache = match (std::env::var_os("IRLM_CACHE"), std::env::var_os("XDG_CACHE_HOME")) {
            (Some(c), _) => PathBuf::from(c),
            (None, Some(x)) => PathBuf::from(x).join("irlm"),
            (None, None) => {
                PathBuf::from(std::env::var_os("HOME").context("neither IRLM_CACHE nor HOME is set")?)
                    .join(".cache/irlm")
            }
        };
        Ok(Self { root: root.to_path_buf(), cache, install })
    }

    /// A `cargo` command in the workspace, with the cargo that runs us.
    pub(crate) fn cargo(&self) -> Command {
        let mut c = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        c.current_dir(&self.root);
        c
    }

    /// The directory cargo builds into.
    pub(crate) fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }

    /// `program` run as root, keeping the environment the lab reads; `None` if this user cannot become root.
    pub(crate) fn as_root(&self, program: &Path) -> Option<Command> {
        let mut c = match root() {
            Root::Am => Command::new(program),
            Root::Sudo => {
                let mut c = Command::new("sudo");
                c.args(["-n", "-E"]).arg(program);
                c
            }
            Root::No => return None,
        };
        c.env("IRLM_CACHE", &self.cache).current_dir(&self.root);
        Some(c)
    }
}

/// Whether and how we can act as root.
pub(crate) fn root() -> Root {
    // The owner of our own /proc entry is our effective user; no unsafe call is needed to learn it.
    let me = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    if matches!(me, Ok(0)) {
        return Root::Am;
    }
    let sudo = Command::new("sudo").args(["-n", "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if sudo.is_ok_and(|s| s.success()) { Root::Sudo } else { Root::No }
}

/// Why a task that needs root is skipped.
pub(crate) const NO_ROOT: &str = "needs root (network namespaces): run as root or allow `sudo -n`";

/// Runs a command with its output shown; the error names it.
pub(crate) fn show(c: &mut Command) -> Result<()> {
    let status = c.status().with_context(|| format!("start {}", name(c)))?;
    if !status.success() {
        bail!("{} ended with {status}", name(c));
    }
    Ok(())
}

/// Runs a command quietly and gives its output; the error carries the end of what it printed.
pub(crate) fn output(c: &mut Command) -> Result<String> {
    let out = c.stdin(Stdio::null()).output().with_context(|| format!("start {}", name(c)))?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        let skip = text.lines().count().saturating_sub(12);
        let tail: Vec<&str> = text.lines().skip(skip).collect();
        bail!("{} ended with {}:\n{}", name(c), out.status, tail.join("\n"));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The program and its arguments, cut to one readable line.
pub(crate) fn name(c: &Command) -> String {
    let words: Vec<_> = std::iter::once(c.get_program())
        .chain(c.get_args())
        .map(|w| w.to_string_lossy().into_owned())
        .collect();
    let mut line = words.join(" ");
    if line.len() > 200 {
        let cut = (0..=200).rev().find(|&i| line.is_char_boundary(i)).unwrap_or(0);
        line.truncate(cut);
        line.push('…');
    }
    line
}

/// Whether `tool` is on the search path, or in the places where Debian keeps root's tools.
pub(crate) fn has_tool(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|d| d.join(tool).is_file())
}
