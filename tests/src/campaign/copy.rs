//! One copy of one VM: a process of QEMU or of our own VMM with a small guest whose memory can be predicted, a disk that both
//! sides share, and monitors of the campaign's own.

use super::linux;
use super::schedule::{Kind, Schedule, Side};
use crate::cache::Cache;
use crate::irlm::{Proc, spawn};
use crate::net::{Host, Net};
use crate::qemu::MACHINE;
use crate::qmp::Qmp;
use crate::steps::{CONTROL, Page, Steps};
use anyhow::{Context as _, Result, bail, ensure};
use irlm_user::net::vmm::{State, Vmm};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const WAIT: Duration = Duration::from_secs(40);
/// Pages that the guest writes, round and round.
const WORK: u32 = 509;

/// What a VM's guest does and has in its memory; the same for all of its copies.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) name: String,
    pub(super) steps: Steps,
    /// Guest memory, bytes.
    pub(super) bytes: u64,
    /// Tells its content from other guests'; a part of it they have in common.
    pub(super) seed: u64,
    /// It is this booted Linux instead.
    pub(super) linux: Option<crate::qemu::Guest>,
}

impl Guest {
    pub(super) fn new(s: &Schedule, vm: usize) -> Self {
        // An emulating KVM takes microseconds for an instruction, TCG nanoseconds: about a thousand steps a second each.
        let slow = s.kvm || !s.kind.is_qemu();
        let spin = if slow { 60 } else { 300_000 };
        let steps = Steps { vcpus: 1, first: 256, pages: WORK, stride: 7, spin };
        // 8 KiB less than whole MiB for QEMU, as the lab's guests have (`qemu::Guest::mem_kib`).
        let less = if s.kind.is_qemu() { 8 << 10 } else { 0 };
        let bytes = (u64::from(s.mib) << 20) - less;
        let linux = (s.kind == Kind::Linux).then(|| linux::guest(s.mib));
        Self { name: format!("vm{vm}"), steps, bytes, seed: vm as u64 + 1, linux }
    }

    /// What a page behind the work holds from the beginning: a third zero, a third what all guests have, a third its own.
    fn content(&self, page: u32, into: &mut Page) {
        let seed = match page % 10 {
            0..=2 => return into.fill(0),
            3..=6 => 0,
            _ => self.seed,
        };
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes()).update(&page.to_le_bytes());
        // Half of each page can be compressed.
        into.fill(page as u8);
        hash.finalize_xof().fill(&mut into[..2048]);
    }

    fn own_pages(&self) -> std::ops::Range<u32> {
        (self.steps.memory() / PAGE) as u32..(self.bytes / PAGE) as u32
    }
}

/// The front's own side of a copy.
#[derive(Debug)]
enum Front {
    Qemu {
        /// Its owner's monitor.
        own: PathBuf,
        /// The serial port of a guest that answers questions.
        service: Option<PathBuf>,
    },
    Vmm,
}

/// A running copy. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) proc: Proc,
    pub(super) guest: Guest,
    /// Where the agent reaches it.
    pub(super) control: PathBuf,
    /// Where the thread that looks at it all the time does.
    pub(super) watched: PathBuf,
    front: Front,
    ram: Ram,
}

/// A guest's memory, read and written from outside.
#[derive(Debug)]
struct Ram(Vec<(u64, File)>);

impl Ram {
    fn at(&self, page: u32) -> Result<(&File, u64)> {
        let (mut base, at) = (0, u64::from(page) * PAGE);
        for (len, file) in &self.0 {
            if (base..base + len).contains(&at) {
                return Ok((file, at - base));
            }
            base += len;
        }
        bail!("there is no page {page:#x}")
    }

    fn read(&self, page: u32, into: &mut Page) -> Result<()> {
        let (file, at) = self.at(page)?;
        Ok(file.read_exact_at(into, at)?)
    }

    fn again(&self) -> Result<Self> {
        Ok(Self(self.0.iter().map(|(n, f)| Ok((*n, f.try_clone()?))).collect::<Result<_>>()?))
    }

    /// The guest's count of its steps.
    fn count(&self) -> Option<u32> {
        let (file, at) = self.at(CONTROL).ok()?;
        let mut word = [0; 4];
        file.read_exact_at(&mut word, at).ok()?;
        Some(u32::from_le_bytes(word))
    }
}

/// Where copies are started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) net: &'a Net,
    pub(super) host: Host,
    pub(super) dir: &'a Path,
    /// `irlm`.
    pub(super) irlm: &'a Path,
    /// QEMU.
    pub(super) qemu: &'a Path,
    /// Where images and disks are that both sides see.
    pub(super) shared: &'a Path,
    /// Where booted guests are.
    pub(super) cache: &'a Cache,
}

impl Copy {
    /// Starts a copy; `number` makes its sockets' names its own. A source is filled, and waits to be continued.
    pub(super) fn start(s: &Schedule, guest: &Guest, place: Place<'_>, number: usize) -> Result<Self> {
        let side = if number == 0 { Side::Source } else { Side::Target };
        let stem = format!("{}-{number}", guest.name);
        let payload = place.shared.join(format!("{}.payload", guest.name));
        if !payload.is_file() {
            std::fs::write(&payload, guest.steps.image())?;
        }
        let copy = if s.kind.is_qemu() {
            Self::qemu(s, guest, place, &stem, &payload, side)?
        } else {
            Self::vmm(guest, place, &stem, &payload, side)?
        };
        if side == Side::Source && guest.linux.is_none() {
            let mut page = [0; PAGE as usize];
            for n in guest.own_pages() {
                guest.content(n, &mut page);
                if page.iter().any(|b| *b != 0) {
                    let (file, at) = copy.ram.at(n)?;
                    file.write_all_at(&page, at)?;
                }
            }
        }
        Ok(copy)
    }

    fn vmm(guest: &Guest, place: Place<'_>, stem: &str, payload: &Path, side: Side) -> Result<Self> {
        let control = place.dir.join(format!("{stem}.vmm"));
        let _ = std::fs::remove_file(&control);
        let (irlm, socket) = (place.irlm.display().to_string(), control.display().to_string());
        let (memory, payload) = (guest.bytes.to_string(), payload.display().to_string());
        // Its guest never rests; what is tested must not wait for it.
        let mut args = vec!["-n", "10", &irlm, "vmm", "--control", &socket, "--memory", &memory];
        args.extend(["--serial", "none"]);
        if side == Side::Target {
            args.push("--incoming");
        } else {
            args.extend(["--payload", &payload, "--paused"]);
        }
        let mut proc = spawn((place.net, place.host, place.dir), "nice".as_ref(), stem, &args)?;
        let mut vmm = until(&mut proc, || Ok(Vmm::connect(&control, WAIT)?))?;
        let slots = vmm.memory()?;
        let ram = Ram(slots.into_iter().map(|s| (s.bytes, File::from(s.fd))).collect());
        let (watched, guest) = (control.clone(), guest.clone());
        Ok(Self { proc, guest, control, watched, front: Front::Vmm, ram })
    }

    fn qemu(
        s: &Schedule,
        guest: &Guest,
        place: Place<'_>,
        stem: &str,
        payload: &Path,
        side: Side,
    ) -> Result<Self> {
        let name = &guest.name;
        let file = |what: &str| place.dir.join(format!("{stem}.{what}"));
        let [control, watched, own] = ["qmp", "watch", "own"].map(file);
        let kib = guest.bytes >> 10;
        let mut c = place.net.command(place.host, "nice".as_ref());
        c.args(["-n", "10"]).arg(place.qemu);
        c.args(["-name", &format!("{name},debug-threads=on"), "-nodefaults", "-no-user-config"]);
        let kvm = s.kvm && guest.linux.is_none();
        c.args(["-accel", if kvm { "kvm" } else { "tcg,thread=single" }, "-display", "none", "-S"]);
        c.args(["-machine", &format!("{MACHINE},memory-backend=m0"), "-m", &format!("size={kib}K")]);
        c.args(["-object", &format!("memory-backend-memfd,id=m0,size={kib}K,share=on")]);
        c.args(["-uuid", &uuid(guest.seed)]);
        let service = guest.linux.as_ref().map(|_| file("svc"));
        match (&guest.linux, &service) {
            (Some(l), Some(service)) => linux::arguments(&mut c, l, place.cache, service),
            _ => {
                // Both sides have the file, and QEMU's own locks on it see to it that one of them writes at a time.
                let drive =
                    format!("if=none,id=d0,format=raw,file={},file.locking=on", disk(place.shared, name)?);
                c.arg("-bios").arg(payload).args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]);
            }
        }
        for socket in [&control, &watched, &own] {
            let _ = std::fs::remove_file(socket);
            c.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        }
        if side == Side::Target || guest.linux.is_some() {
            c.args(["-incoming", "defer"]);
        }
        let log = place.dir.join(format!("{stem}.log"));
        let out = File::options().append(true).create(true).open(&log)?;
        c.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let mut proc = Proc::spawn(c, stem, log)?;
        until(&mut proc, || Ok(std::os::unix::net::UnixStream::connect(&own)?))?;
        // Connected and closed again: this socket takes one client at a time.
        let mut qmp = Qmp::connect(&own, WAIT)?;
        if let Some(l) = guest.linux.as_ref().filter(|_| side == Side::Source) {
            linux::restore(&mut qmp, l, place.cache)?;
        }
        drop(qmp);
        let ram = qemu_ram(proc.pid())?;
        let guest = guest.clone();
        let front = Front::Qemu { own, service };
        Ok(Self { proc, guest, control, watched, front, ram })
    }

    /// The guest's own count.
    pub(super) fn count(&self) -> Option<u32> {
        self.ram.count()
    }

    /// Whether the process still runs.
    pub(super) fn alive(&mut self) -> bool {
        matches!(self.proc.ended(), Ok(None))
    }

    /// The owner's own hand on it.
    pub(super) fn owner(&self) -> Owner {
        match &self.front {
            Front::Qemu { own, .. } => Owner::Qemu(own.clone()),
            Front::Vmm => Owner::Vmm(self.control.clone()),
        }
    }

    /// For a thread that looks at it.
    pub(super) fn eye(&self) -> Result<Eye> {
        let ram = self.ram.again()?;
        let counts = self.guest.linux.is_none();
        Ok(Eye { pid: self.proc.pid(), watched: self.watched.clone(), qemu: self.is_qemu(), counts, ram })
    }

    pub(super) fn is_qemu(&self) -> bool {
        matches!(self.front, Front::Qemu { .. })
    }

    /// Holds its memory against what its own count says it must be, and, if it runs, looks whether it runs on. It is stopped
    /// for that, and continued.
    pub(super) fn check_guest(&self, runs: bool, cache: &Cache) -> Result<()> {
        if let (Some(l), Front::Qemu { service: Some(s), .. }) = (&self.guest.linux, &self.front) {
            return if runs { linux::check(s, l, cache) } else { Ok(()) };
        }
        let mut owner = self.owner().connect()?;
        if runs {
            owner.stop()?;
        }
        let guest = &self.guest;
        let seen = guest.steps.check(0, |n, page| self.ram.read(n, page)).map_err(anyhow::Error::msg)?;
        let (mut is, mut want) = ([0; PAGE as usize], [0; PAGE as usize]);
        for n in guest.own_pages() {
            guest.content(n, &mut want);
            self.ram.read(n, &mut is)?;
            ensure!(is == want, "page {n:#x} is not what the guest had there");
        }
        if !runs {
            return Ok(());
        }
        owner.cont()?;
        let until = Instant::now() + WAIT;
        while self.ram.count() == Some(seen.step) {
            ensure!(Instant::now() < until, "its guest does not go on from step {}", seen.step);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Writes to its disk, as its guest would at its next write; only for a copy that runs.
    pub(super) fn check_disk(&mut self, shared: &Path) -> Result<()> {
        let Front::Qemu { own, service: None } = &self.front else { return Ok(()) };
        let path = disk(shared, &self.guest.name)?;
        let mut byte = [0];
        File::open(&path)?.read_exact_at(&mut byte, 0)?;
        let next = byte[0].wrapping_add(1).max(1);
        let mut qmp = Qmp::connect(own, WAIT)?;
        // What it says of the write goes to QEMU's standard output; the file tells as much.
        let said = qmp.human(&format!("qemu-io d0 \"write -P {next} 0 4096\""));
        // A disk that is not this QEMU's to write to ends it.
        std::thread::sleep(Duration::from_millis(20));
        ensure!(self.alive(), "QEMU ended at a write to its disk: {}", self.proc.said());
        let said = said?;
        File::open(&path)?.read_exact_at(&mut byte, 0)?;
        ensure!(byte[0] == next, "a write to its disk did not arrive: {}; {}", said.trim(), self.proc.said());
        Ok(())
    }

    /// QEMU's migration capabilities and parameters, to be found again.
    pub(super) fn settings(&self) -> Result<Value> {
        let Front::Qemu { own, .. } = &self.front else { return Ok(Value::Null) };
        let mut qmp = Qmp::connect(own, WAIT)?;
        let capabilities = qmp.run("query-migrate-capabilities", &json!({}))?;
        let mut parameters = qmp.run("query-migrate-parameters", &json!({}))?;
        // Without a value they are left out until they are set; the empty text is their default.
        if let Some(p) = parameters.as_object_mut() {
            p.retain(|_, v| v.as_str() != Some("") && !v.is_null());
        }
        Ok(json!({ "capabilities": capabilities, "parameters": parameters }))
    }
}

/// A hand on a copy that knows nothing of any move.
#[derive(Debug, Clone)]
pub(super) enum Owner {
    Qemu(PathBuf),
    Vmm(PathBuf),
}

impl Owner {
    pub(super) fn connect(&self) -> Result<Hand> {
        Ok(match self {
            Self::Qemu(path) => Hand::Qemu(Box::new(Qmp::connect(path, Duration::from_secs(1))?)),
            Self::Vmm(path) => Hand::Vmm(Vmm::connect(path, WAIT)?),
        })
    }
}

/// The same, connected.
pub(super) enum Hand {
    Qemu(Box<Qmp>),
    Vmm(Vmm),
}

impl Hand {
    pub(super) fn state(&mut self) -> Result<String> {
        match self {
            Self::Qemu(q) => q.status(),
            Self::Vmm(v) => Ok(word(v.status()?.state).to_owned()),
        }
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        match self {
            Self::Qemu(q) => q.run("stop", &json!({})).map(drop),
            Self::Vmm(v) => Ok(v.pause()?),
        }
    }

    pub(super) fn cont(&mut self) -> Result<()> {
        match self {
            Self::Qemu(q) => q.run("cont", &json!({})).map(drop),
            Self::Vmm(v) => Ok(v.resume()?),
        }
    }

    /// Whether QEMU has a migration that has stopped its guest, or soon will; our VMM cannot tell.
    pub(super) fn migrates(&mut self) -> Result<bool> {
        let Self::Qemu(q) = self else { return Ok(false) };
        let v = q.run("query-migrate", &json!({}))?;
        Ok(!matches!(v["status"].as_str(), None | Some("none" | "failed" | "cancelled" | "active")))
    }
}

/// The word for a VMM's state.
fn word(state: State) -> &'static str {
    match state {
        State::Running => "running",
        State::Pausing => "pausing",
        State::Paused => "paused",
        State::GivenUp => "postmigrate",
        State::Incoming => "incoming",
        State::Ended => "ended",
    }
}

/// What a thread needs that looks at a copy.
#[derive(Debug)]
pub(super) struct Eye {
    pid: u32,
    watched: PathBuf,
    qemu: bool,
    counts: bool,
    ram: Ram,
}

impl Eye {
    /// A connection to look through; an error if there is none now.
    pub(super) fn open(&self) -> Result<Hand> {
        let owner =
            if self.qemu { Owner::Qemu(self.watched.clone()) } else { Owner::Vmm(self.watched.clone()) };
        owner.connect()
    }

    /// The guest's own count, if it is one that counts.
    pub(super) fn count(&self) -> Option<u32> {
        self.counts.then(|| self.ram.count()).flatten()
    }

    /// Whether the process has ended; nobody else may have waited for it if this is to be true at once.
    pub(super) fn gone(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
    }
}

fn qemu_ram(pid: u32) -> Result<Ram> {
    let dir = format!("/proc/{pid}/fd");
    for e in std::fs::read_dir(&dir).with_context(|| dir.clone())? {
        let at = e?.path();
        let link = std::fs::read_link(&at).unwrap_or_default();
        if link.to_string_lossy().starts_with("/memfd:memory-backend-memfd") {
            let file = File::options().read(true).write(true).open(&at)?;
            return Ok(Ram(vec![(file.metadata()?.len(), file)]));
        }
    }
    bail!("process {pid} has no memory-backend-memfd")
}

/// A VM's disk, made if it is not there.
fn disk(shared: &Path, name: &str) -> Result<String> {
    let path = shared.join(format!("{name}.disk"));
    if !path.is_file() {
        File::create(&path)?.set_len(1 << 20)?;
    }
    Ok(path.display().to_string())
}

fn uuid(seed: u64) -> String {
    format!("6972_6c6d-0000-4000-8000-{seed:012x}").replace('_', "")
}

/// Calls `done` until it gives something; an error if the process ends before.
fn until<T>(proc: &mut Proc, mut done: impl FnMut() -> Result<T>) -> Result<T> {
    let until = Instant::now() + WAIT;
    loop {
        match done() {
            Ok(t) => return Ok(t),
            Err(e) => {
                if let Some(code) = proc.ended()? {
                    bail!("it ended with {code}: {}", proc.said());
                }
                if Instant::now() > until {
                    return Err(e.context(proc.said()));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(4));
    }
}

/// Whether a schedule of this kind can be had with these copies.
pub(super) fn lacks(s: &Schedule, cache: &Cache) -> Option<String> {
    if s.kind == Kind::Linux && linux::saved(&linux::guest(s.mib), cache).is_err() {
        return Some("no saved Linux guest (a lab with web0 boots and saves it)".into());
    }
    if s.kind.is_qemu() {
        for v in [s.versions.0, s.versions.1] {
            if !cache.qemu(v).is_file() {
                return Some(format!("no QEMU {v}"));
            }
        }
    }
    let kvm = !s.kind.is_qemu() || s.kvm && s.kind != Kind::Linux;
    let open = File::options().read(true).write(true).open("/dev/kvm");
    kvm.then_some(open).and_then(|o| o.err()).map(|e| format!("no /dev/kvm: {e}"))
}
