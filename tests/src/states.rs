//! Guests are booted once: their state is saved to a file, and every later start restores it in a second or two.
//! The name of the file is a digest of all that the state depends on.

use crate::cache::Cache;
use crate::qemu::{Guest, MACHINE, Place, Vm, accelerator};
use anyhow::{Context as _, Result};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Guests booted at the same time; more only slow each other down on small machines.
const BOOTS_AT_ONCE: usize = 2;
/// The version that boots and saves; any later QEMU restores it.
const BOOT_QEMU: &str = "7.2";

/// A saved guest.
#[derive(Debug, Clone)]
pub struct State {
    file: PathBuf,
    /// The answer its service gave to `check` before it was saved.
    pub check: String,
}

impl State {
    /// Where it is.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// The saved states of `guests`, in order; those that are not there yet are booted and saved, with `say` told so.
pub fn ensure(
    cache: &Cache,
    dir: &Path,
    guests: &[Guest],
    say: &(dyn Fn(&str) + Sync),
) -> Result<Vec<State>> {
    prune(cache)?;
    let keys: Vec<PathBuf> = guests.iter().map(|g| key(cache, g)).collect::<Result<_>>()?;
    let missing: Vec<usize> = (0..guests.len()).filter(|&i| load(&keys[i]).is_none()).collect();
    if !missing.is_empty() {
        say(&format!(
            "booting {} guests once, {BOOTS_AT_ONCE} at a time; later runs restore them",
            missing.len()
        ));
        let next = Mutex::new(missing.into_iter());
        std::thread::scope(|s| {
            let workers: Vec<_> = (0..BOOTS_AT_ONCE)
                .map(|_| {
                    s.spawn(|| -> Result<()> {
                        while let Some(i) = next.lock().ok().and_then(|mut n| n.next()) {
                            let start = Instant::now();
                            boot(cache, dir, &guests[i], &keys[i])
                                .with_context(|| format!("boot guest {}", guests[i].name()))?;
                            say(&format!("{} booted and saved in {:.0?}", guests[i].name(), start.elapsed()));
                        }
                        Ok(())
                    })
                })
                .collect();
            workers
                .into_iter()
                .try_for_each(|w| w.join().unwrap_or_else(|_| anyhow::bail!("a boot thread panicked")))
        })?;
    }
    keys.iter().map(|k| load(k).with_context(|| format!("{} vanished", k.display()))).collect()
}

/// The file in which a guest is saved; an error if it has not been booted yet.
pub fn saved(cache: &Cache, guest: &Guest) -> Result<PathBuf> {
    let file = key(cache, guest)?;
    let name = guest.name();
    let why = || format!("{name} is not saved yet: a lab that has it boots and saves it");
    Ok(load(&file).with_context(why)?.file)
}

/// Loads a saved state into a QEMU that was started to wait for one; the guest stays paused.
pub fn restore(vm: &mut Vm, state: &State) -> Result<()> {
    // An unlimited rate: this is a file, not the network under test.
    vm.qmp.run("migrate-incoming", &json!({"uri": format!("exec:cat {}", state.file.display())}))?;
    vm.qmp.migrated(Duration::from_secs(60)).with_context(|| format!("restore {}", state.file.display()))?;
    Ok(())
}

/// The directory of the present image's states.
fn dir_of(cache: &Cache) -> Result<PathBuf> {
    let id = std::fs::read_to_string(cache.guest("id")).context("read the guest image's id")?;
    Ok(cache.states().join(id.get(..16).context("the guest image's id is too short")?))
}

/// Makes the present image's directory, and removes those of earlier images: nothing can restore them.
fn prune(cache: &Cache) -> Result<()> {
    let present = dir_of(cache)?;
    std::fs::create_dir_all(&present).context("make the directory of saved states")?;
    for e in std::fs::read_dir(cache.states())?.flatten().filter(|e| e.path() != present) {
        let gone = if e.path().is_dir() {
            std::fs::remove_dir_all(e.path())
        } else {
            std::fs::remove_file(e.path())
        };
        gone.with_context(|| format!("remove the old {}", e.path().display()))?;
    }
    Ok(())
}

fn key(cache: &Cache, guest: &Guest) -> Result<PathBuf> {
    let of = format!(
        "{} {} {MACHINE} {} {}",
        cache.qemu_version(BOOT_QEMU)?,
        guest.command_line(),
        guest.mem_kib(),
        accelerator()
    );
    let digest = blake3::hash(of.as_bytes()).to_hex();
    Ok(dir_of(cache)?.join(format!("{}-{}", guest.name(), &digest[..16])))
}

fn load(file: &Path) -> Option<State> {
    let check = std::fs::read_to_string(file.with_extension("check")).ok()?;
    file.is_file().then(|| State { file: file.to_path_buf(), check })
}

fn boot(cache: &Cache, dir: &Path, guest: &Guest, file: &Path) -> Result<()> {
    let qemu = cache.qemu(BOOT_QEMU);
    let mut vm = Vm::start(cache, guest, Place { net: None, dir, qemu: &qemu }, false)?;
    let mut service = vm.service()?;
    let until = Instant::now() + Duration::from_secs(300);
    while let Err(e) = service.ask("ping", Duration::from_secs(1)) {
        if Instant::now() > until || !vm.alive() {
            return Err(e.context(format!("the guest did not come up; QEMU said: {}", vm.said())));
        }
    }
    let check = service.ask("check", Duration::from_secs(120))?;
    vm.qmp.run("stop", &json!({}))?;
    vm.qmp.run("migrate-set-parameters", &json!({"max-bandwidth": 10_000_000_000u64}))?;
    let part = file.with_extension(format!("part{}", std::process::id()));
    vm.qmp.run("migrate", &json!({"uri": format!("exec:cat > {}", part.display())}))?;
    vm.qmp.migrated(Duration::from_secs(120)).context("save the state")?;
    std::fs::write(file.with_extension("check"), check)?;
    std::fs::rename(&part, file).context("put the state in place")?;
    Ok(())
}
