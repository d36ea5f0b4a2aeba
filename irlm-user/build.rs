//! Puts the eBPF objects, if they have been built, where the library embeds them from; empty files if not, so that a
//! plain `cargo build` needs no eBPF toolchain (docs/bpf.md).

use std::path::{Path, PathBuf};
use std::time::SystemTime;
use std::{env, fs, io};

/// The objects: the name `cargo xtask` builds it by in `target/ebpf`, and what overrides where it is taken from.
const OBJECTS: [(&str, &str); 2] = [("irlm-ebpf", "IRLM_EBPF_OBJECT"), ("irlm-dirty", "IRLM_DIRTY_OBJECT")];

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(io::ErrorKind::NotFound);
    for (name, overriding) in OBJECTS {
        println!("cargo:rerun-if-env-changed={overriding}");
        let object = match env::var_os(overriding) {
            Some(path) => PathBuf::from(path),
            None => {
                let built = variable("CARGO_MANIFEST_DIR")?.join("../target/ebpf").join(name);
                place_holder(&built);
                built
            }
        };
        println!("cargo:rerun-if-changed={}", object.display());
        let bytes = match fs::read(&object) {
            Ok(bytes) => bytes,
            Err(error) if env::var_os(overriding).is_some() => {
                let text = format!("{overriding}={}: {error}", object.display());
                return Err(io::Error::new(error.kind(), text));
            }
            Err(_) => Vec::new(),
        };
        fs::write(variable("OUT_DIR")?.join(name), bytes)?;
    }
    Ok(())
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
