//! What this machine must have, as one table: each need says why, how it is checked and how it is met. Checks are
//! quick, so that every task can go through the table each time; `--no-install` only reports.

use crate::apt::{self, Apt};
use crate::ctx::{self, Ctx};
use crate::guest;
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::path::Path;

/// One thing a task needs.
pub(crate) struct Need {
    pub(crate) name: &'static str,
    pub(crate) why: &'static str,
    pub(crate) how: &'static str,
    pub(crate) check: fn(&Ctx) -> bool,
    pub(crate) meet: fn(&Ctx) -> Result<()>,
}

/// What the rack lab needs.
pub(crate) const LAB: &[Need] = &[
    Need {
        name: "tools",
        why: "namespaces, bridges and shaping (iproute2), other people's traffic (iperf3), the guest's root file system (e2fsprogs), unpacking (tar)",
        how: "apt-get install, only those that are missing",
        check: |_| TOOLS.iter().all(|(t, _)| ctx::has_tool(t)),
        meet: |_| apt(TOOLS),
    },
    Need {
        name: "archive keyring",
        why: "checks the signature of the packages that are unpacked into the cache",
        how: "apt-get install debian-archive-keyring",
        check: |_| Path::new(apt::KEYRING).is_file(),
        meet: |_| apt::install(&["debian-archive-keyring"]),
    },
    Need {
        name: "QEMU 7.2",
        why: "the older of the two stock QEMU versions that the lab migrates",
        how: "Debian packages unpacked into the cache (about 160 MB); nothing is installed on the system",
        check: |c| qemu_works(c, "7.2"),
        meet: |c| qemu(c, "7.2", false),
    },
    Need {
        name: "QEMU 10.0",
        why: "the newer of the two stock QEMU versions that the lab migrates",
        how: "packages of Debian's backports unpacked into the cache (about 150 MB); nothing is installed",
        check: |c| qemu_works(c, "10.0"),
        meet: |c| qemu(c, "10.0", true),
    },
    Need {
        name: "guest image",
        why: "kernel, initramfs and root file system (nginx, redis) of the lab's guests",
        how: "Debian packages unpacked into the cache (about 300 MB while building, 350 MB kept)",
        check: guest::is_current,
        meet: guest::build,
    },
];

/// What tests on real QEMU need: the part of [`LAB`] up to the QEMUs.
pub(crate) const QEMUS: &[Need] = LAB.split_at(4).0;

const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("iperf3", "iperf3"),
    ("mke2fs", "e2fsprogs"),
    ("setpriv", "util-linux"),
    ("tar", "tar"),
    ("dpkg-deb", "dpkg"),
];

/// What a table came to.
pub(crate) struct Outcome {
    /// Needs that are not met, each with the reason.
    pub(crate) missing: Vec<String>,
}

/// `cargo xtask setup`: the whole table.
pub(crate) fn run(ctx: &Ctx) -> Result<()> {
    let outcome = ensure(ctx, LAB)?;
    crate::ebpf::object(ctx)?;
    match outcome.missing.len() {
        0 => println!("setup: everything is there"),
        _ if !ctx.install => {
            println!("setup: {} missing (not installed: --no-install)", outcome.missing.join("; "));
        }
        _ => bail!("missing: {}", outcome.missing.join("; ")),
    }
    Ok(())
}

/// Goes through `needs` in order and meets what is missing, saying what and why before it does.
pub(crate) fn ensure(ctx: &Ctx, needs: &[Need]) -> Result<Outcome> {
    let mut missing = Vec::new();
    if needs.iter().all(|n| (n.check)(ctx)) {
        return Ok(Outcome { missing });
    }
    fs::create_dir_all(&ctx.cache).with_context(|| format!("make the cache {}", ctx.cache.display()))?;
    // Two tasks at once must not build the same thing into the same place.
    let lock = fs::File::create(ctx.cache.join("setup.lock")).context("make the cache's lock file")?;
    lock.lock().context("lock the cache")?;
    for n in needs.iter().filter(|n| !(n.check)(ctx)) {
        println!("setup: {} is missing. It is needed for: {}. How: {}", n.name, n.why, n.how);
        if !ctx.install {
            missing.push(n.name.to_owned());
            continue;
        }
        match (n.meet)(ctx) {
            Ok(()) if (n.check)(ctx) => println!("setup: {} is there now", n.name),
            Ok(()) => missing.push(format!("{} (its check still fails after the installation)", n.name)),
            Err(e) => missing.push(format!("{} ({e:#})", n.name)),
        }
    }
    Ok(Outcome { missing })
}

/// Installs the packages of those tools that are missing.
fn apt(tools: &[(&'static str, &'static str)]) -> Result<()> {
    let mut packages: Vec<&str> = tools.iter().filter(|(t, _)| !ctx::has_tool(t)).map(|&(_, p)| p).collect();
    packages.dedup();
    apt::install(&packages)
}

/// Whether the unpacked QEMU is there and starts on this machine.
fn qemu_works(ctx: &Ctx, version: &str) -> bool {
    let dir = ctx.cache.join(format!("qemu-{version}"));
    dir.join("version").is_file() && dir.join("qemu").is_file()
}

/// Unpacks QEMU with its libraries, and writes the script that starts it there.
fn qemu(ctx: &Ctx, version: &str, backports: bool) -> Result<()> {
    let name = format!("qemu-{version}");
    let (dir, new) = (ctx.cache.join(&name), ctx.cache.join(format!("{name}.new")));
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(new.join("root"))?;
    // The C library must be the one the dynamic loader belongs to: the system's. Its newer versions run older programs.
    let without = ["libc6", "libc-bin"];
    Apt::new(ctx)?.unpack(&name, &["qemu-system-x86"], backports, &without, &new.join("root"))?;
    let script = new.join("qemu");
    fs::write(&script, QEMU_SCRIPT)?;
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let says = ctx::output(std::process::Command::new(&script).arg("--version"))?;
    let line = says.lines().next().unwrap_or_default();
    if !line.contains(&format!("version {version}.")) {
        bail!("the archive's QEMU says `{line}`, not {version}.x");
    }
    fs::write(new.join("version"), line)?;
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&new, &dir).with_context(|| format!("put {} in place", dir.display()))
}

/// The unpacked QEMU of a version.
pub(crate) fn qemu_path(ctx: &Ctx, version: &str) -> std::path::PathBuf {
    ctx.cache.join(format!("qemu-{version}")).join("qemu")
}

/// Starts the unpacked QEMU. `exec`, so that the process the caller started is QEMU itself.
const QEMU_SCRIPT: &str = r#"#!/bin/sh
# Runs this directory's QEMU with its own libraries, modules and firmware; written by `cargo xtask setup`.
here=$(dirname "$(readlink -f "$0")")/root
lib=$here/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="$lib" QEMU_MODULE_DIR="$lib/qemu"
exec "$here/usr/bin/qemu-system-x86_64" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" \
    -L "$here/usr/lib/ipxe/qemu" "$@"
"#;

#[cfg(test)]
mod tests {
    use super::{LAB, QEMUS};

    #[test]
    fn the_part_for_qemu_tests_ends_with_the_qemus() {
        let rest = &LAB[QEMUS.len()..];
        assert_eq!(QEMUS.last().map(|n| n.name), Some("QEMU 10.0"));
        assert!(rest.iter().all(|n| !n.name.starts_with("QEMU")));
    }
}
