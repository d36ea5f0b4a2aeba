//! Booted Linux guests as copies of a campaign's VM: restored from what a lab has saved before, never booted here.

use crate::cache::Cache;
use crate::qemu::{Guest, Role};
use crate::qmp::Qmp;
use crate::service::Service;
use crate::states;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const ANSWER: Duration = Duration::from_secs(60);

/// The guest that every lab has.
pub(super) fn guest(mem_mib: u32) -> Guest {
    Guest { role: Role::Web, seed: 0, mem_mib }
}

/// Where it is saved.
pub(super) fn saved(guest: &Guest, cache: &Cache) -> Result<PathBuf> {
    states::saved(cache, guest)
}

/// What QEMU is told beside its memory and its monitors: as `qemu::Vm` has it, or the state would not fit.
pub(super) fn arguments(c: &mut Command, guest: &Guest, cache: &Cache, service: &Path) {
    c.args(["-cpu", "qemu64", "-smp", "1"]);
    c.arg("-kernel").arg(cache.guest("vmlinuz")).arg("-initrd").arg(cache.guest("initrd"));
    c.args(["-append", &guest.command_line()]);
    let disk = format!("if=none,id=d0,file={},format=raw,readonly=on", cache.guest("root.img").display());
    c.args(["-drive", &disk, "-device", "virtio-blk-pci,drive=d0"]);
    c.args(["-chardev", "null,id=c0", "-serial", "chardev:c0"]);
    let service = format!("socket,id=c1,path={},server=on,wait=off", service.display());
    c.args(["-chardev", &service, "-serial", "chardev:c1"]);
}

/// Loads the saved state; the guest stays paused.
pub(super) fn restore(qmp: &mut Qmp, guest: &Guest, cache: &Cache) -> Result<()> {
    let file = saved(guest, cache)?;
    qmp.run("migrate-incoming", &json!({ "uri": format!("exec:cat {}", file.display()) }))?;
    qmp.migrated(ANSWER).with_context(|| format!("restore {}", file.display()))?;
    Ok(())
}

/// Its service answers as it did before it was saved.
pub(super) fn check(service: &Path, guest: &Guest, cache: &Cache) -> Result<()> {
    let want = std::fs::read_to_string(saved(guest, cache)?.with_extension("check"))?;
    let is = Service::open(service)?.ask("check", ANSWER)?;
    ensure!(is == want, "its service answers `{is}`, not `{want}`");
    Ok(())
}
