//! The lab's guest: Debian's cloud kernel, a small initramfs and a read-only root file system with nginx, redis and
//! the question-and-answer script, all made from packages that are unpacked, never installed.

use crate::apt::Apt;
use crate::ctx::{self, Ctx};
use anyhow::{Context as _, Result, bail};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the root file system is made of. python3 is there to be read into the page cache, as on any real machine.
const PACKAGES: &[&str] = &[
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "linux-image-cloud-amd64",
    "nginx-light",
    "perl",
    "python3",
    "redis-server",
];
/// Kernel modules the disk needs, in loading order.
const MODULES: &[&str] =
    &["virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];
/// Files put into the root file system, with their modes.
const FILES: &[(&str, &str, u32)] = &[
    ("srv/init", include_str!("../../tests/guest/init.sh"), 0o755),
    ("srv/agent.pl", include_str!("../../tests/guest/agent.pl"), 0o644),
    ("srv/nginx.conf", include_str!("../../tests/guest/nginx.conf"), 0o644),
];
const INITRAMFS_INIT: &str = include_str!("../../tests/guest/initramfs.sh");
/// Counted up when this file makes another image from the same inputs.
const RECIPE: u32 = 2;

/// Whether the cache holds an image made from today's scripts and package list.
pub(crate) fn is_current(ctx: &Ctx) -> bool {
    fs::read_to_string(dir(ctx).join("made-from")).is_ok_and(|s| s == made_from())
}

/// Builds the image into the cache.
pub(crate) fn build(ctx: &Ctx) -> Result<()> {
    let (dir, new) = (dir(ctx), ctx.cache.join("guest.new"));
    let _ = fs::remove_dir_all(&new);
    let tree = new.join("tree");
    fs::create_dir_all(&tree)?;
    Apt::new(ctx)?.unpack("guest", PACKAGES, false, &[], &tree)?;
    let kernels = tree.join("lib/modules");
    let release = one_entry(&kernels)?;
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), new.join("vmlinuz")).context("copy the kernel")?;
    fs::write(new.join("initrd"), initramfs(&tree, &kernels.join(&release))?)?;
    // The guest has its drivers from the initramfs; the rest of them would only fill the page cache.
    fs::remove_dir_all(kernels)?;
    fs::remove_dir_all(tree.join("boot"))?;
    for d in ["proc", "sys", "dev", "run", "tmp", "srv/www", "var/log", "var/lib/redis", "var/lib/nginx"] {
        fs::create_dir_all(tree.join(d))?;
    }
    for (path, text, mode) in FILES {
        fs::write(tree.join(path), text)?;
        fs::set_permissions(tree.join(path), fs::Permissions::from_mode(*mode))?;
    }
    let mut warm = Vec::new();
    for d in ["usr/bin", "usr/sbin", "usr/lib"] {
        large_files(&tree.join(d), &mut warm)?;
    }
    warm.sort();
    let listed: Vec<String> =
        warm.iter().filter_map(|f| Some(format!("/{}\n", f.strip_prefix(&tree).ok()?.display()))).collect();
    fs::write(tree.join("srv/warm"), listed.concat())?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/tmp:/bin/bash\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\n")?;
    for n in 0..8 {
        fs::write(tree.join(format!("srv/www/p{n}.html")), web_page(n))?;
    }
    let mut mke2fs = Command::new(tool("mke2fs"));
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "root_owner=0:0"]);
    mke2fs.arg("-d").arg(&tree).arg(new.join("root.img")).arg("400M");
    ctx::output(&mut mke2fs)?;
    fs::remove_dir_all(&tree)?;
    let mut id = blake3::Hasher::new();
    for f in ["vmlinuz", "initrd", "root.img"] {
        std::io::copy(&mut fs::File::open(new.join(f))?, &mut id)?;
    }
    fs::write(new.join("id"), id.finalize().to_hex().as_str())?;
    fs::write(new.join("made-from"), made_from())?;
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&new, &dir).with_context(|| format!("put {} in place", dir.display()))
}

fn dir(ctx: &Ctx) -> PathBuf {
    ctx.cache.join("guest")
}

/// What the image depends on, as one word.
fn made_from() -> String {
    let mut h = blake3::Hasher::new();
    h.update(format!("{RECIPE} {PACKAGES:?} {MODULES:?} {FILES:?} {INITRAMFS_INIT}").as_bytes());
    h.finalize().to_hex().to_string()
}

fn one_entry(dir: &Path) -> Result<String> {
    let mut names =
        fs::read_dir(dir)?.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
    match (names.next(), names.next()) {
        (Some(one), None) => Ok(one),
        _ => bail!("{} should hold exactly one kernel release", dir.display()),
    }
}

fn tool(name: &str) -> PathBuf {
    [format!("/usr/sbin/{name}"), format!("/sbin/{name}")]
        .iter()
        .map(PathBuf::from)
        .find(|p| p.is_file())
        .unwrap_or_else(|| name.into())
}

/// Programs and libraries that a guest reads into its page cache. Thousands of small files would fill its memory with
/// inodes instead, which is not what a guest in service looks like.
fn large_files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for e in fs::read_dir(dir)? {
        let e = e?;
        let kind = e.file_type()?;
        if kind.is_dir() {
            large_files(&e.path(), found)?;
        } else if kind.is_file() && e.metadata()?.len() >= 64 << 10 {
            found.push(e.path());
        }
    }
    Ok(())
}

/// Text of 3 to 60 KB that differs from page to page.
fn web_page(n: u32) -> String {
    let mut out = format!("<html><title>page {n}</title>\n");
    for line in 0..60 << (n % 5) {
        let word = blake3::hash(format!("{n} {line}").as_bytes()).to_hex();
        out.push_str(&format!("<p>{n}.{line}: {}</p>\n", &word[..32]));
    }
    out + "</html>\n"
}

/// A cpio archive ("newc", the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
fn initramfs(tree: &Path, modules: &Path) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for d in ["bin", "proc", "sys", "dev", "root", "modules"] {
        entry(&mut out, d, 0o040_755, (0, 0), &[])?;
    }
    // The kernel opens it for the first program before anything is mounted.
    entry(&mut out, "dev/console", 0o020_600, (5, 1), &[])?;
    entry(&mut out, "init", 0o100_755, (0, 0), INITRAMFS_INIT.as_bytes())?;
    entry(&mut out, "bin/busybox", 0o100_755, (0, 0), &fs::read(tree.join("bin/busybox"))?)?;
    let builtin = fs::read_to_string(modules.join("modules.builtin"))?;
    let mut order = String::new();
    for m in MODULES {
        let file = format!("{m}.ko");
        if builtin.lines().any(|l| l.ends_with(&format!("/{file}"))) {
            continue;
        }
        let Some(found) = find(modules, &file)? else { bail!("the kernel package has no module {file}") };
        entry(&mut out, &format!("modules/{file}"), 0o100_644, (0, 0), &fs::read(found)?)?;
        order.push_str(&file);
        order.push('\n');
    }
    entry(&mut out, "modules/order", 0o100_644, (0, 0), order.as_bytes())?;
    entry(&mut out, "TRAILER!!!", 0, (0, 0), &[])?;
    Ok(out)
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
    let size = u32::try_from(data.len()).context("a file too large for an initramfs")?;
    let inode = u32::try_from(out.len() / 4 + 1)?;
    let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
    let name_len = u32::try_from(name.len() + 1)?;
    write!(out, "070701")?;
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_len, 0] {
        write!(out, "{field:08x}")?;
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

fn find(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    for e in fs::read_dir(dir)? {
        let e = e?;
        if e.file_type()?.is_dir() {
            if let Some(hit) = find(&e.path(), name)? {
                return Ok(Some(hit));
            }
        } else if e.file_name().to_string_lossy() == name {
            return Ok(Some(e.path()));
        }
    }
    Ok(None)
}
