//! Debian packages without touching the system: a private apt (own sources, own state, empty package database)
//! downloads a package with everything it depends on, and the files are unpacked below the cache. So the lab's two
//! QEMU versions and its guest are the same on every machine, whatever that machine has installed.

use crate::ctx::{self, Ctx};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The release everything comes from; its backports carry the newer QEMU.
pub(crate) const RELEASE: &str = "bookworm";
/// Signs the archive's lists.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A private apt below the cache.
pub(crate) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Makes the directories and the sources file, and fetches the package lists if there are none yet.
    pub(crate) fn new(ctx: &Ctx) -> Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            bail!(
                "the lab's QEMU and guests are amd64 packages, and this machine is not: nothing to unpack them for"
            );
        }
        let apt = Self { dir: ctx.cache.join("apt") };
        for d in ["etc/none", "state/lists/partial", "cache"] {
            fs::create_dir_all(apt.dir.join(d))
                .with_context(|| format!("make {d} in {}", apt.dir.display()))?;
        }
        fs::write(apt.dir.join("state/status"), "")?;
        let m = mirror();
        let sources = format!(
            "deb [signed-by={KEYRING}] {m} {RELEASE} main\ndeb [signed-by={KEYRING}] {m} {RELEASE}-backports main\n"
        );
        let file = apt.dir.join("etc/sources.list");
        if fs::read_to_string(&file).ok().as_deref() != Some(&sources) {
            fs::write(&file, sources)?;
            let _ = fs::remove_file(apt.dir.join("state/fresh"));
        }
        if !apt.dir.join("state/fresh").exists() {
            ctx::output(apt.get().arg("update"))?;
            fs::write(apt.dir.join("state/fresh"), "")?;
        }
        Ok(apt)
    }

    /// Unpacks `packages` and all they depend on, except `without`, below `into`.
    pub(crate) fn unpack(
        &self,
        name: &str,
        packages: &[&str],
        backports: bool,
        without: &[&str],
        into: &Path,
    ) -> Result<()> {
        let archives = self.dir.join(format!("archives-{name}"));
        fs::create_dir_all(archives.join("partial"))?;
        let mut get = self.get();
        get.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
        get.args(["install", "-y", "--download-only", "--no-install-recommends"]);
        if backports {
            get.arg("-t").arg(format!("{RELEASE}-backports"));
        }
        if let Err(first) = ctx::output(get.args(packages)) {
            // Lists grow old: packages they name are replaced in the archive. Fetch them again, once.
            ctx::output(self.get().arg("update"))?;
            ctx::output(&mut get)
                .with_context(|| format!("even after `apt-get update`; before it: {first:#}"))?;
        }
        let mut debs: Vec<PathBuf> = fs::read_dir(&archives)?.filter_map(|e| Some(e.ok()?.path())).collect();
        debs.retain(|d| {
            let file = d.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let package = file.split('_').next().unwrap_or_default();
            file.ends_with(".deb") && !without.contains(&package)
        });
        debs.sort();
        // Debian's merged /usr, which the packages themselves take for granted.
        for d in ["bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(into.join("usr").join(d))?;
            std::os::unix::fs::symlink(format!("usr/{d}"), into.join(d))?;
        }
        for deb in &debs {
            unpack_one(deb, into).with_context(|| format!("unpack {}", deb.display()))?;
        }
        fs::remove_dir_all(&archives)?;
        Ok(())
    }

    fn get(&self) -> Command {
        let d = self.dir.display();
        let mut c = Command::new("apt-get");
        c.arg("-q");
        for o in [
            format!("Dir::State={d}/state"),
            format!("Dir::State::status={d}/state/status"),
            format!("Dir::Cache={d}/cache"),
            format!("Dir::Etc::SourceList={d}/etc/sources.list"),
            format!("Dir::Etc::SourceParts={d}/etc/none"),
            // The `_apt` user cannot read root's cache directory; the archive's signature is checked all the same.
            "APT::Sandbox::User=root".into(),
            "APT::Architecture=amd64".into(),
            "APT::Architectures=amd64".into(),
            "Acquire::Languages=none".into(),
        ] {
            c.args(["-o", &o]);
        }
        c.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        c
    }
}

/// Where Debian's archive is: `$IRLM_DEBIAN_MIRROR`, the system's own mirror, or Debian's general address.
fn mirror() -> String {
    if let Ok(m) = std::env::var("IRLM_DEBIAN_MIRROR") {
        return m;
    }
    let mut c = Command::new("apt-get");
    c.args(["indextargets", "--format", "$(ORIGIN)|$(RELEASE)|$(REPO_URI)", "Created-By: Packages"]);
    let known = ctx::output(&mut c).unwrap_or_default();
    known
        .lines()
        .filter_map(|l| {
            let mut f = l.split('|');
            let (origin, release, uri) = (f.next()?, f.next()?, f.next()?);
            (origin == "Debian" && !release.contains("security") && uri.starts_with("http"))
                .then(|| uri.to_owned())
        })
        .next()
        .unwrap_or_else(|| "http://deb.debian.org/debian".into())
}

fn unpack_one(deb: &Path, into: &Path) -> Result<()> {
    let mut from = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb")?;
    let tar = from.stdout.take().context("dpkg-deb has no output")?;
    let mut to = Command::new("tar");
    to.args(["-x", "--keep-directory-symlink", "-C"]).arg(into).stdin(tar);
    ctx::show(&mut to)?;
    if !from.wait()?.success() {
        bail!("dpkg-deb could not read the package; remove it and run again");
    }
    Ok(())
}

/// Installs system packages with the system's own apt.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let get = |args: &[&str]| -> Result<String> {
        let mut c = match ctx::root() {
            ctx::Root::Am => Command::new("apt-get"),
            ctx::Root::Sudo => {
                let mut c = Command::new("sudo");
                c.args(["-n", "apt-get"]);
                c
            }
            ctx::Root::No => bail!("needs root: install {} by hand, or allow `sudo -n`", packages.join(" ")),
        };
        ctx::output(c.arg("-q").args(args).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(packages);
    if get(&args).is_err() {
        get(&["update"])?;
        get(&args)?;
    }
    Ok(())
}
