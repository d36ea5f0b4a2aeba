//! Finds what `cargo xtask setup` made, by the same rule, so that the lab itself never downloads or builds.

use anyhow::{Context as _, Result, bail};
use std::path::PathBuf;

/// The directory of slow things.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// `$IRLM_CACHE`, or `irlm` in the user's cache directory. Fails if the guest image is not there.
    pub fn open() -> Result<Self> {
        let dir = match (std::env::var_os("IRLM_CACHE"), std::env::var_os("XDG_CACHE_HOME")) {
            (Some(c), _) => PathBuf::from(c),
            (None, Some(x)) => PathBuf::from(x).join("irlm"),
            (None, None) => {
                PathBuf::from(std::env::var_os("HOME").context("neither IRLM_CACHE nor HOME is set")?)
                    .join(".cache/irlm")
            }
        };
        let cache = Self { dir };
        for f in ["id", "vmlinuz", "initrd", "root.img"] {
            if !cache.guest(f).is_file() {
                bail!("{} is missing: run `cargo xtask setup` first", cache.guest(f).display());
            }
        }
        Ok(cache)
    }

    /// The start script of the unpacked QEMU `version` ("7.2", "10.0").
    #[must_use]
    pub fn qemu(&self, version: &str) -> PathBuf {
        self.dir.join(format!("qemu-{version}/qemu"))
    }

    /// What the unpacked QEMU says about its version.
    pub fn qemu_version(&self, version: &str) -> Result<String> {
        let file = self.dir.join(format!("qemu-{version}/version"));
        std::fs::read_to_string(&file)
            .with_context(|| format!("read {}; run `cargo xtask setup`", file.display()))
    }

    /// A file of the guest image.
    #[must_use]
    pub fn guest(&self, file: &str) -> PathBuf {
        self.dir.join("guest").join(file)
    }

    /// Where booted guests are kept.
    #[must_use]
    pub fn states(&self) -> PathBuf {
        self.dir.join("states")
    }
}
