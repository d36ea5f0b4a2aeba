//! One QEMU process with its files, started the same way on both sides, so that nothing but the version can differ.

use crate::cache::Cache;
use crate::net::{Host, Net};
use crate::qmp::Qmp;
use crate::service::Service;
use anyhow::{Context as _, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A machine type that QEMU 7.2 and 10.0 both know, so that guests can move from one to the other.
pub const MACHINE: &str = "pc-q35-7.2";
/// MiB of `/usr` that a guest reads into its page cache.
const WARM_MIB: u32 = 70;

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// nginx with a few pages.
    Web,
    /// redis with keys made from the guest's seed.
    Db,
    /// Nothing but the question-and-answer script.
    Idle,
}

impl Role {
    /// "web", "db", "idle".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Db => "db",
            Self::Idle => "idle",
        }
    }
}

/// A guest, wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// What it does.
    pub role: Role,
    /// Tells guests of one role apart; each boots on its own, because the kernel draws its addresses at boot.
    pub seed: u32,
    /// Memory.
    pub mem_mib: u32,
}

impl Guest {
    /// The guest that [`Self::name`] calls so.
    pub fn named(name: &str, mem_mib: u32) -> Result<Self> {
        let found = [Role::Web, Role::Db, Role::Idle]
            .into_iter()
            .find_map(|role| Some((role, name.strip_prefix(role.name())?.parse().ok()?)));
        let (role, seed) = found.with_context(|| format!("{name:?} is no guest: web0, db3, idle1"))?;
        Ok(Self { role, seed, mem_mib })
    }

    /// "web0".
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}{}", self.role.name(), self.seed)
    }

    /// Memory in KiB: 8 KiB less than asked for. QEMU before 9.0 loses guest writes when it migrates under TCG, because
    /// its bitmap's fast path forgets to reset the TLBs ("physmem: Fix migration dirty bitmap coherency with TCG memory
    /// access"); that path is taken only where a block's length is a multiple of 256 KiB. Seen here with 7.2: up to 65
    /// stale pages on the target of a plain migration, none with this size.
    #[must_use]
    pub fn mem_kib(&self) -> u32 {
        self.mem_mib * 1024 - 8
    }

    /// The kernel's command line; the role is told there.
    #[must_use]
    pub fn command_line(&self) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 irlm.role={} irlm.seed={} irlm.warm={WARM_MIB}",
            self.role.name(),
            self.seed
        )
    }
}

/// A running QEMU. Dropping it ends the process.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    /// The lab's control connection.
    pub qmp: Qmp,
    /// The control socket kept free for the agent.
    pub agent_qmp: PathBuf,
    service: PathBuf,
    log: PathBuf,
}

/// Where and how a QEMU starts.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The network it runs in.
    pub net: Option<(&'a Net, Host)>,
    /// Directory for its sockets and logs.
    pub dir: &'a Path,
    /// The program.
    pub qemu: &'a Path,
}

impl Vm {
    /// Starts QEMU. `incoming`: paused, and waiting for `migrate-incoming`.
    pub fn start(cache: &Cache, guest: &Guest, place: Place<'_>, incoming: bool) -> Result<Self> {
        let name = guest.name();
        let file = |what: &str| place.dir.join(format!("{name}.{what}"));
        for what in ["lab", "qmp", "svc"] {
            let _ = std::fs::remove_file(file(what));
        }
        let mut c = match place.net {
            Some((net, host)) => net.command(host, place.qemu),
            None => Command::new(place.qemu),
        };
        let socket = |what: &str| format!("unix:{},server=on,wait=off", file(what).display());
        let mem = guest.mem_kib();
        // Threads by their names, so that the guest's own time can be told from QEMU's.
        let named = format!("{name},debug-threads=on");
        c.args(["-name", &named, "-accel", accelerator(), "-cpu", "qemu64", "-smp", "1"]);
        c.args(["-machine", &format!("{MACHINE},memory-backend=m0"), "-m", &format!("size={mem}K")]);
        c.args(["-object", &format!("memory-backend-memfd,id=m0,size={mem}K,share=on")]);
        c.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        c.arg("-kernel").arg(cache.guest("vmlinuz")).arg("-initrd").arg(cache.guest("initrd"));
        c.args(["-append", &guest.command_line()]);
        let disk = format!("if=none,id=d0,file={},format=raw,readonly=on", cache.guest("root.img").display());
        c.args(["-drive", &disk, "-device", "virtio-blk-pci,drive=d0"]);
        c.args([
            "-chardev",
            &format!("file,id=c0,path={}", file("console").display()),
            "-serial",
            "chardev:c0",
        ]);
        let service = format!("socket,id=c1,path={},server=on,wait=off", file("svc").display());
        c.args(["-chardev", &service, "-serial", "chardev:c1"]);
        c.args(["-qmp", &socket("lab"), "-qmp", &socket("qmp")]);
        if incoming {
            c.args(["-S", "-incoming", "defer"]);
        }
        Self::launch(c, place, &name)
    }

    /// Starts a QEMU whose monitors `lab` and `qmp` and whose log are named after `name` in the place's directory.
    pub fn launch(mut c: Command, place: Place<'_>, name: &str) -> Result<Self> {
        let file = |what: &str| place.dir.join(format!("{name}.{what}"));
        let log = file("log");
        let out = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let mut child = c
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {}", place.qemu.display()))?;
        match Qmp::connect(&file("lab"), Duration::from_secs(30)) {
            Ok(qmp) => Ok(Self { child, qmp, agent_qmp: file("qmp"), service: file("svc"), log }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                Err(e.context(format!("QEMU for {name} does not answer; it said: {}", said.trim())))
            }
        }
    }

    /// QEMU's process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends the process at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What QEMU printed.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The guest's service.
    pub fn service(&self) -> Result<Service> {
        Service::open(&self.service)
    }

    /// The guest's main memory.
    pub fn memory(&self) -> Result<File> {
        self.open_memory(File::options().read(true))
    }

    /// The guest's main memory, to be changed behind its back.
    pub fn memory_for_writing(&self) -> Result<File> {
        self.open_memory(File::options().read(true).write(true))
    }

    fn open_memory(&self, how: &std::fs::OpenOptions) -> Result<File> {
        let dir = format!("/proc/{}/fd", self.pid());
        for e in std::fs::read_dir(&dir).with_context(|| format!("read {dir}"))? {
            let at = e?.path();
            let link = std::fs::read_link(&at).unwrap_or_default();
            if link.to_string_lossy().starts_with("/memfd:memory-backend-memfd") {
                return how.open(&at).with_context(|| format!("open {}", at.display()));
            }
        }
        bail!("process {} has no memory-backend-memfd", self.pid())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// TCG, single-threaded, which boots Linux anywhere; `IRLM_ACCEL=kvm` where KVM can boot Linux in time. A machine
/// with `/dev/kvm` but without hardware virtualisation cannot, so its presence alone decides nothing.
#[must_use]
pub fn accelerator() -> &'static str {
    match std::env::var("IRLM_ACCEL").as_deref() {
        Ok("kvm") => "kvm",
        _ => "tcg,thread=single",
    }
}
