//! A copy of the tree as it is now, in which patches are applied and tests run, so that the tree itself is never
//! changed.

use super::seen::{Run, Seen};
use crate::ctx::{self, Ctx};
use crate::{setup, task_tidy};
use anyhow::{Context as _, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What a build, and what a run of tests may take. Both are far above what either takes on two loaded processors.
const BUILD: Duration = Duration::from_secs(30 * 60);
const TESTS: Duration = Duration::from_secs(5 * 60);

/// The eBPF objects that a build embeds, and what tells it where they are (`irlm-user/build.rs`).
const OBJECTS: [(&str, &str); 2] = [("irlm-ebpf", "IRLM_EBPF_OBJECT"), ("irlm-dirty", "IRLM_DIRTY_OBJECT")];

/// The copy.
pub(crate) struct Tree {
    /// Where it is. What is in it stays as it is found, whatever is done to the tree meanwhile.
    pub(crate) at: PathBuf,
    target: PathBuf,
}

impl Tree {
    /// The copy, brought up to date.
    pub(crate) fn new(ctx: &Ctx) -> Result<Self> {
        let home = ctx.target().join("mutate");
        let this = Self { at: home.join("tree"), target: home.join("target") };
        fs::create_dir_all(&this.at).with_context(|| format!("make {}", this.at.display()))?;
        this.bring_up_to_date(ctx)?;
        Ok(this)
    }

    /// Makes the copy what the tree is. Only files that differ are written, so that only they are built again.
    fn bring_up_to_date(&self, ctx: &Ctx) -> Result<()> {
        let mut names = task_tidy::files(ctx)?;
        names.retain(|n| ctx.root.join(n).is_file());
        names.sort();
        for name in &names {
            let (from, to) = (ctx.root.join(name), self.at.join(name));
            let now = fs::read(&from).with_context(|| format!("read {}", from.display()))?;
            if fs::read(&to).is_ok_and(|was| was == now) {
                continue;
            }
            fs::create_dir_all(to.parent().unwrap_or(&self.at))?;
            fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
        }
        self.clear(&self.at, &names)
    }

    /// Removes files that the tree does not have, but nothing that was built.
    fn clear(&self, folder: &Path, names: &[String]) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(&self.at).unwrap_or(&path).to_string_lossy().into_owned();
            if path.is_dir() {
                // One of that name may hold sources, too.
                if path.file_name().is_some_and(|n| n != "target") || holds(names, &name) {
                    self.clear(&path, names)?;
                }
            } else if names.binary_search(&name).is_err() && name != "Cargo.lock" {
                fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// `cargo` in the copy, for so long at most.
    fn cargo(&self, ctx: &Ctx, most: Duration) -> Command {
        let cargo = ctx.cargo();
        let mut c = bounded(most);
        c.arg(cargo.get_program()).current_dir(&self.at).env("CARGO_TARGET_DIR", &self.target);
        // Nearly all of the time goes into building; the tests themselves are short.
        c.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0");
        for (name, variable) in OBJECTS {
            let object = ctx.target().join("ebpf").join(name);
            if std::env::var_os(variable).is_none() && object.is_file() {
                c.env(variable, object);
            }
        }
        c
    }

    /// Builds and runs these tests: arguments for `cargo test`, of which those after `--` are the tests' own.
    pub(crate) fn cargo_test(&self, ctx: &Ctx, args: &[String]) -> Result<Seen> {
        let cut = args.iter().position(|a| a == "--").unwrap_or(args.len());
        let (build, own) = args.split_at(cut);
        let mut builds = self.cargo(ctx, BUILD);
        builds.args(["test", "--quiet", "--no-run"]).args(build);
        if let Some(why) = Run::of(&mut builds)?.not_built() {
            return Ok(Seen::Nothing(why));
        }
        let mut tests = self.cargo(ctx, TESTS);
        // A test that cannot run here says so in its output, which is not shown otherwise.
        tests.args(["test", "--no-fail-fast"]).args(build).arg("--").args(own.iter().skip(1));
        tests.arg("--show-output");
        let qemu = setup::qemu_path(ctx, "7.2");
        if std::env::var_os("IRLM_QEMU").is_none() && qemu.is_file() {
            tests.env("IRLM_QEMU", qemu);
        }
        Ok(Run::of(&mut tests)?.seen())
    }

    /// Builds the copy's lab and runs these of its tests.
    pub(crate) fn lab_test(&self, ctx: &Ctx, names: &[String]) -> Result<Seen> {
        let mut builds = self.cargo(ctx, BUILD);
        builds.args(["build", "--release", "--quiet", "-p", "irlm-user", "-p", "irlm-tests"]);
        if let Some(why) = Run::of(&mut builds)?.not_built() {
            return Ok(Seen::Nothing(why));
        }
        let program = self.target.join("release/irlm-lab");
        let Some(lab) = ctx.as_root(&program) else { return Ok(Seen::Nothing(ctx::NO_ROOT.to_owned())) };
        let mut tests = bounded(TESTS);
        tests.arg(lab.get_program()).args(lab.get_args()).arg("test").args(names);
        tests.env("IRLM_CACHE", &ctx.cache).current_dir(&self.at);
        Ok(Run::of(&mut tests)?.seen())
    }
}

/// Whether any of these files, which are in order, is in the folder.
fn holds(names: &[String], folder: &str) -> bool {
    let inside = format!("{folder}/");
    names.get(names.partition_point(|n| *n < inside)).is_some_and(|n| n.starts_with(&inside))
}

/// Coreutils' `timeout`, which also ends what the command has started.
fn bounded(most: Duration) -> Command {
    let mut c = Command::new("timeout");
    c.args(["--kill-after=20", &most.as_secs().to_string()]);
    c
}

#[cfg(test)]
mod tests {
    use super::holds;

    #[test]
    fn a_folder_of_the_name_that_builds_have_is_looked_through_if_it_holds_sources() {
        let mut names = ["a/target.rs", "a/target/vm.rs", "a/targets/x.rs", "b/z.rs"].map(str::to_owned);
        names.sort();
        assert!(holds(&names, "a/target") && holds(&names, "a") && holds(&names, "b"));
        assert!(!holds(&names, "target") && !holds(&names, "b/target") && !holds(&names, "c"));
    }
}
