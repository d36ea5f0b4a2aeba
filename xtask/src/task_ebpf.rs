//! Builds the eBPF objects. They need a Rust compiler with the sources of its library and a linker for BPF, which few
//! machines have; so this finds aya's usual set-up or makes an equivalent one from Debian's packages, once.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The bpf-linker that is built for the Debian way; links against the LLVM of [`LLVM_MAJOR`].
const LINKER_VERSION: &str = "0.13.0";
/// The LLVM of Debian's `rustc-web`, and the bpf-linker feature and packages that go with it.
const LLVM_MAJOR: &str = "22";
/// Debian's packages: a compiler new enough for aya, the sources of `core`, its cargo, and LLVM to link with.
const PACKAGES: [&str; 4] = ["rustc-web", "rust-web-src", "cargo-web", "llvm-22-dev"];
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
/// What the object is made from, seen from the workspace root. The root manifest is there for what irlm-common
/// inherits from it.
const SOURCES: [&str; 6] = [
    "Cargo.toml",
    "irlm-common/Cargo.toml",
    "irlm-common/src",
    "irlm-ebpf/Cargo.toml",
    "irlm-ebpf/Cargo.lock",
    "irlm-ebpf/src",
];

/// The objects that are built: the classifiers, and the dirty-page programs.
const OBJECTS: [&str; 2] = ["irlm-ebpf", "irlm-dirty"];

/// A way to build, all parts present.
enum Toolchain {
    /// Nightly with rust-src by rustup, bpf-linker on the path: how aya's own projects build.
    Aya,
    /// Debian's compiler, told to take unstable options; the linker from the cache.
    Debian { linker: PathBuf },
}

/// Makes sure that the objects in `target/ebpf` are there and made from the present sources; returns that path.
/// Installs what is missing, unless `no_install`: then it fails and says what it would have done.
///
/// # Errors
/// When the toolchain is missing and may not or cannot be installed, and when the build fails. irlm builds and runs
/// without the object; it counts nothing then.
pub(crate) fn ensure(no_install: bool) -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?;
    let out = root.join("target/ebpf");
    let stamp_path = out.join("stamp");
    let stamp = stamp(root)?;
    let built = OBJECTS.iter().all(|o| fs::metadata(out.join(o)).is_ok_and(|meta| meta.len() > 0));
    if built && fs::read_to_string(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(out);
    }
    fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    let made = match find_aya() {
        Ok(()) => {
            say("building with nightly, rust-src and bpf-linker, aya's usual set-up");
            build(root, &out, &Toolchain::Aya).or_else(|error| {
                say(&format!("that failed ({error:#}); trying Debian's toolchain"));
                build(root, &out, &debian(no_install)?)
            })
        }
        Err(why) => {
            let toolchain = debian(no_install)
                .with_context(|| format!("aya's usual set-up is not complete ({why}), nor is Debian's"))?;
            say(&format!("building with Debian's rustc-web and bpf-linker, because {why}"));
            build(root, &out, &toolchain)
        }
    }?;
    for object in OBJECTS {
        install_object(&made.join(object), &out.join(object))?;
    }
    fs::write(&stamp_path, stamp).with_context(|| format!("writing {}", stamp_path.display()))?;
    say(&format!("built {} in {}", OBJECTS.join(", "), out.display()));
    Ok(out)
}

fn say(text: &str) {
    println!("ebpf: {text}");
}

/// Hash over the names and contents of all sources and over how this file builds. std's hasher is stable for one
/// compiler; a new compiler costs one build.
fn stamp(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    include_str!("task_ebpf.rs").hash(&mut hasher);
    for file in files {
        file.strip_prefix(root).unwrap_or(&file).hash(&mut hasher);
        fs::read(&file).with_context(|| format!("reading {}", file.display()))?.hash(&mut hasher);
    }
    Ok(format!("{:016x}\n", hasher.finish()))
}

/// All files at or below `path`.
fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let read =
        || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect() };
    match read() {
        Ok(entries) => entries.iter().try_for_each(|entry| collect(entry, files)),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            files.push(path.to_owned());
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// Standard output of a command that succeeds; the error says why there is none.
fn output(program: impl AsRef<Path>, arguments: &[&str]) -> Result<String> {
    let program = program.as_ref();
    let mut command = Command::new(program);
    clean(&mut command);
    let result = command.args(arguments).stdin(Stdio::null()).output();
    let output = result.with_context(|| format!("running {}", program.display()))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        let first = error.lines().next().unwrap_or_default();
        bail!("{} {}: {}: {first}", program.display(), arguments.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Does the compiler's sysroot hold the sources of `core`?
fn has_source(sysroot: &str) -> bool {
    Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

/// Checks aya's usual set-up; the error is the part that lacks.
fn find_aya() -> Result<(), String> {
    let sysroot = output("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])
        .map_err(|_| "there is no nightly toolchain".to_owned())?;
    if !has_source(&sysroot) {
        return Err("the nightly toolchain has no rust-src".to_owned());
    }
    output("bpf-linker", &["--version"]).map_err(|_| "bpf-linker is not on the path".to_owned())?;
    Ok(())
}

/// Debian's way; installs what lacks, or says what it would install.
fn debian(no_install: bool) -> Result<Toolchain> {
    let cache = cache()?;
    let linker = cache.join("bin/bpf-linker");
    let linker_ready = output(&linker, &["--version"])
        .is_ok_and(|version| version.split_whitespace().nth(1) == Some(LINKER_VERSION));
    let llvm_ready = linker_ready || Path::new(LLVM_PREFIX).join("bin/llvm-config").exists();
    let packages_ready = llvm_ready && debian_compiler().is_ok();
    let install = install_linker(&cache);
    if no_install && !(packages_ready && linker_ready) {
        let mut steps = String::new();
        if !packages_ready {
            steps += &format!("\n  apt-get install {}", PACKAGES.join(" "));
        }
        if !linker_ready {
            steps += &format!("\n  LLVM_PREFIX={LLVM_PREFIX} {}", shown(&install));
        }
        bail!("would install (not done: --no-install):{steps}");
    }
    if !packages_ready {
        say(&format!("installing Debian packages {}", PACKAGES.join(" ")));
        say(
            "why: the programs need a compiler with the sources of its library, and the LLVM it was built with",
        );
        apt_install()?;
        debian_compiler()?;
    }
    if !linker_ready {
        say(&format!(
            "building bpf-linker {LINKER_VERSION} into {} (a minute or two, once)",
            cache.display()
        ));
        say("why: rustc leaves BPF linking to it, and it must match the compiler's LLVM");
        run(install).context("bpf-linker was not built")?;
    }
    Ok(Toolchain::Debian { linker })
}

/// Is Debian's compiler there, with sources and of the LLVM that the linker has?
fn debian_compiler() -> Result<()> {
    if !has_source(&output(DEBIAN_RUSTC, &["--print", "sysroot"])?) {
        bail!("{DEBIAN_RUSTC} has no library sources");
    }
    output(DEBIAN_CARGO, &["--version"])?;
    let version = output(DEBIAN_RUSTC, &["-vV"])?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: ")).unwrap_or("none");
    if llvm.split('.').next() != Some(LLVM_MAJOR) {
        bail!("{DEBIAN_RUSTC} is built with LLVM {llvm}, not {LLVM_MAJOR}");
    }
    Ok(())
}

/// `$IRLM_CACHE`, or `irlm` in the user's cache.
fn cache() -> Result<PathBuf> {
    if let Some(cache) = env::var_os("IRLM_CACHE").filter(|cache| !cache.is_empty()) {
        return Ok(PathBuf::from(cache));
    }
    let home =
        env::var_os("HOME").context("neither IRLM_CACHE nor HOME is set: nowhere to keep bpf-linker")?;
    Ok(PathBuf::from(home).join(".cache/irlm"))
}

fn apt_install() -> Result<()> {
    let root = output("id", &["-u"])?.trim() == "0";
    let apt = |arguments: &[&str]| {
        let mut command = Command::new(if root { "apt-get" } else { "sudo" });
        if !root {
            command.args(["--", "apt-get"]);
        }
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        run(command)
    };
    apt(&["update", "-q"])
        .context("updating the package lists (needs a Debian machine, and root or sudo)")?;
    // --no-remove: where another rustc of Debian's is in use, stop instead of replacing it.
    let install = ["install", "-q", "-y", "--no-install-recommends", "--no-remove"];
    apt(&[&install[..], &PACKAGES].concat()).context(
        "installing Debian packages; elsewhere install nightly with rust-src and bpf-linker, aya's usual set-up",
    )
}

fn install_linker(cache: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--no-default-features"])
        .args(["--features", &format!("llvm-{LLVM_MAJOR}"), "--root"])
        .arg(cache)
        .env("LLVM_PREFIX", LLVM_PREFIX)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Builds in a folder of its own below `out`; returns the folder with the linked objects.
fn build(root: &Path, out: &Path, toolchain: &Toolchain) -> Result<PathBuf> {
    // BTF comes from debug information, in which the place of this clone has no business.
    let mut flags = format!("-C debuginfo=2 -C link-arg=--btf --remap-path-prefix={}=.", root.display());
    let mut command = match toolchain {
        Toolchain::Aya => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]);
            clean(&mut command);
            command
        }
        Toolchain::Debian { linker } => {
            flags += &format!(" -C linker={}", linker.display());
            let mut command = Command::new(DEBIAN_CARGO);
            clean(&mut command);
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            command
        }
    };
    let folder = out.join("build");
    command
        .current_dir(root.join("irlm-ebpf"))
        .args(["build", "--release", "--locked", "--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", flags);
    run(command).context("the eBPF programs did not build")?;
    Ok(folder.join(TARGET).join("release"))
}

/// Takes away what the cargo that runs xtask has set for itself: another compiler must not inherit it.
fn clean(command: &mut Command) {
    for name in [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ] {
        command.env_remove(name);
    }
}

/// Puts the object in place in one step. One with the same bytes is left alone, so that irlm is not built anew.
fn install_object(made: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(made).with_context(|| format!("reading {}", made.display()))?;
    if fs::read(object).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let new = object.with_extension("new");
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, object))
        .with_context(|| format!("writing {}", object.display()))
}

fn shown(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn run(mut command: Command) -> Result<()> {
    let what = shown(&command);
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("running `{what}`"))?;
    if !status.success() {
        bail!("`{what}` ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{SOURCES, install_object, stamp};
    use std::fs;

    #[test]
    fn the_stamp_follows_contents_and_names() {
        let root = std::env::temp_dir().join(format!("irlm-xtask-stamp-{}", std::process::id()));
        for source in SOURCES {
            let path = root.join(source);
            let path = if source.ends_with("src") { path.join("lib.rs") } else { path };
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, source).unwrap();
        }
        let first = stamp(&root).unwrap();
        assert_eq!(first, stamp(&root).unwrap());
        fs::write(root.join("irlm-common/src/lib.rs"), "changed").unwrap();
        let second = stamp(&root).unwrap();
        fs::rename(root.join("irlm-common/src/lib.rs"), root.join("irlm-common/src/other.rs")).unwrap();
        let third = stamp(&root).unwrap();
        fs::remove_file(root.join("irlm-ebpf/Cargo.lock")).unwrap();
        let missing = stamp(&root);
        fs::remove_dir_all(&root).unwrap();
        assert!(first != second && second != third && first != third);
        assert!(missing.is_err());
    }

    #[test]
    fn an_unchanged_object_keeps_its_time() {
        let root = std::env::temp_dir().join(format!("irlm-xtask-object-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let (made, object) = (root.join("made"), root.join("object"));
        fs::write(&made, "one").unwrap();
        install_object(&made, &object).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&object).unwrap().set_modified(old).unwrap();
        install_object(&made, &object).unwrap();
        let kept = fs::metadata(&object).unwrap().modified().unwrap();
        fs::write(&made, "two").unwrap();
        install_object(&made, &object).unwrap();
        let now = fs::read(&object).unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(kept, old);
        assert_eq!(now, b"two");
    }
}
