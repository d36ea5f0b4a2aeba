//! Everything the lab makes carries the lab's process number in its name, so that one rule removes it all: at the
//! end, at a panic, at ^C, and at the next start after a crash. Nothing else is ever touched.

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Name of the lab's program, by which a live owner of leftovers is recognised.
const PROGRAM: &str = "irlm-lab";

/// A signal has come, and what the lab made is being removed.
static STOPPING: AtomicBool = AtomicBool::new(false);

/// Whether a signal has come: what fails from now on fails because the lab is being removed.
#[must_use]
pub fn is_stopping() -> bool {
    STOPPING.load(Ordering::Acquire)
}

/// One lab's name and directory; dropping it removes all that carries the name.
#[derive(Debug)]
pub struct Run {
    id: String,
    dir: PathBuf,
}

impl Run {
    /// Removes what crashed labs left, makes this lab's directory, and sees to it that signals clean up as well.
    pub fn start() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!("the lab needs root (network namespaces): run it with `cargo xtask lab`, or as root");
        }
        sweep()?;
        let id = format!("irlm{}", std::process::id());
        clean(&id);
        on_signals(&id)?;
        let dir = dir_of(&id);
        std::fs::create_dir(&dir).with_context(|| format!("make the lab's directory {}", dir.display()))?;
        Ok(Self { id, dir })
    }

    /// The prefix of every name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Sockets, logs and configuration files; short, because socket paths must be below 108 bytes.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        clean(&self.id);
    }
}

fn dir_of(id: &str) -> PathBuf {
    std::env::temp_dir().join(id)
}

/// Finds and removes what labs that no longer live have left.
pub fn sweep() -> Result<()> {
    let mut ids: Vec<String> = namespaces().iter().filter_map(|n| owner(n.split('-').next()?)).collect();
    for e in std::fs::read_dir(std::env::temp_dir()).context("read the temporary directory")? {
        ids.extend(owner(&e?.file_name().to_string_lossy()));
    }
    ids.sort();
    ids.dedup();
    for id in ids {
        let pid = id.trim_start_matches("irlm");
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if comm.trim_end() != PROGRAM {
            eprintln!("removing what an earlier lab ({id}) left behind");
            clean(&id);
        }
    }
    Ok(())
}

/// Whether anything is left of the lab whose process number is `pid`.
#[must_use]
pub fn leftovers(pid: u32) -> bool {
    let id = format!("irlm{pid}");
    dir_of(&id).exists() || namespaces().iter().any(|n| n.split('-').next() == Some(&id))
}

/// `name` if it is a lab's prefix: "irlm" and a process number.
fn owner(name: &str) -> Option<String> {
    let digits = name.strip_prefix("irlm")?;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then(|| name.to_owned())
}

fn namespaces() -> Vec<String> {
    let out = Command::new("ip").args(["netns", "list"]).stderr(Stdio::null()).output();
    let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().filter_map(|l| Some(l.split_whitespace().next()?.to_owned())).collect()
}

/// Ends every process in the lab's namespaces, removes the namespaces (with them go links and qdiscs) and the
/// directory. Errors are ignored: a thing that is already gone is what is wanted.
fn clean(id: &str) {
    let mine = |n: &String| n.strip_prefix(id).is_some_and(|r| r.starts_with('-'));
    let names: Vec<String> = namespaces().into_iter().filter(mine).collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    for n in &names {
        while Instant::now() < deadline {
            let out = Command::new("ip").args(["netns", "pids", n]).stderr(Stdio::null()).output();
            let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            let pids: Vec<Pid> = text.lines().filter_map(|l| Pid::from_raw(l.trim().parse().ok()?)).collect();
            if pids.is_empty() {
                break;
            }
            for p in pids {
                let _ = kill_process(p, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = Command::new("ip").args(["netns", "del", n]).stderr(Stdio::null()).status();
    }
    let dir = dir_of(id);
    // A host's BPF file system is mounted below the directory.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for at in mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| Path::new(m).starts_with(&dir)) {
        let _ = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH);
    }
    let _ = std::fs::remove_dir_all(dir);
}

/// ^C, SIGTERM and SIGHUP clean up and end the program.
fn on_signals(id: &str) -> Result<()> {
    static ONCE: Once = Once::new();
    let mut made = Ok(());
    ONCE.call_once(|| made = watch(id.to_owned()));
    made
}

fn watch(id: String) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().context("signal watcher")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let which = rt.block_on(async {
            let (Ok(mut int), Ok(mut term), Ok(mut hup)) = (
                signal(SignalKind::interrupt()),
                signal(SignalKind::terminate()),
                signal(SignalKind::hangup()),
            ) else {
                return None;
            };
            Some(tokio::select! { _ = int.recv() => 2, _ = term.recv() => 15, _ = hup.recv() => 1 })
        });
        if let Some(n) = which {
            STOPPING.store(true, Ordering::Release);
            eprintln!("\nstopped by signal {n}: removing the lab");
            // The main thread may be making something at this very moment: go over it twice.
            clean(&id);
            std::thread::sleep(Duration::from_millis(100));
            clean(&id);
            std::process::exit(128 + n);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn only_a_labs_own_names_are_touched() {
        assert_eq!(owner("irlm123").as_deref(), Some("irlm123"));
        for other in ["irlm", "irlmx", "irlm12x", "xirlm12", "docker0", ""] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
