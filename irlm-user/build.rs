//! Puts the eBPF object, if it has been built, where the library embeds it from; an empty file if not, so that a
//! plain `cargo build` needs no eBPF toolchain (docs/bpf.md).

use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs, io};

/// Overrides where the object is taken from.
const OVERRIDE: &str = "IRLM_EBPF_OBJECT";
/// Where `cargo xtask` puts it, seen from the workspace root.
const BUILT: &str = "target/ebpf/irlm-ebpf";

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={OVERRIDE}");
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    let out = variable("OUT_DIR")?.join("irlm-ebpf");
    let object = match env::var_os(OVERRIDE) {
        Some(path) => PathBuf::from(path),
        None => {
            let built = variable("CARGO_MANIFEST_DIR")?.join("..").join(BUILT);
            place_holder(&built);
            built
        }
    };
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if env::var_os(OVERRIDE).is_some() => {
            return Err(io::Error::new(error.kind(), format!("{OVERRIDE}={}: {error}", object.display())));
        }
        Err(_) => Vec::new(),
    };
    fs::write(out, bytes)
}

/// cargo takes a watched file that is missing for a changed one and would build the crate anew each time. So an
/// empty one stands in, as old as can be; where it cannot be made, only that comfort is lost.
fn place_holder(path: &Path) {
    if path.exists() {
        return;
    }
    if let Some(folder) = path.parent()
        && fs::create_dir_all(folder).is_ok()
        && let Ok(file) = fs::OpenOptions::new().write(true).create_new(true).open(path)
    {
        file.set_modified(SystemTime::UNIX_EPOCH).ok();
    }
}
