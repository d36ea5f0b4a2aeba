//! Guests that our own VMM runs (`irlm vmm`), beside QEMU's in the same racks. No Linux has to boot for them: the memory of
//! a real guest is put into theirs, and a small payload writes over it all the time. What each page must hold is known
//! at any moment from the payload's own count, so a target is not only compared with its source but with a model.

use crate::cache::Cache;
use crate::irlm::{Proc, spawn};
use crate::lab::Lab;
use crate::net::Host;
use crate::payload::Payload;
use crate::qemu::{Guest, Place, Vm};
use crate::states;
use crate::workload::{LOW, Workload};
use anyhow::{Context as _, Result, bail, ensure};
use irlm_user::host::kvm::snapshot::Snapshot;
use irlm_user::net::vmm::{Slot, State, Vmm};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;
const WAIT: Duration = Duration::from_secs(20);

/// Why guests of our own VMM cannot run here, if they cannot.
pub fn usable(program: &Path) -> Result<(), String> {
    if let Err(e) = File::options().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm: {e}"));
    }
    match Command::new(program).args(["vmm", "--help"]).output() {
        Ok(o) if o.status.success() => Ok(()),
        Ok(o) => Err(format!("{} has no `vmm` ({})", program.display(), o.status)),
        Err(e) => Err(format!("{}: {e}", program.display())),
    }
}

/// A guest of our own VMM, wherever it runs.
#[derive(Debug, Clone)]
pub struct KvmGuest {
    /// The real guest whose memory it has, and after which it is named.
    pub like: Guest,
    /// How it writes.
    pub work: Workload,
    /// Its memory, if not as much as the real guest has: less of it, or the same again and again.
    pub mib: Option<u32>,
    /// Further arguments of `irlm vmm`.
    pub args: Vec<String>,
}

impl KvmGuest {
    /// A guest with the memory of `like`, which writes `hot` pages again and again, and others in their turn.
    #[must_use]
    pub fn new(like: Guest, ticks: u32) -> Self {
        let payload = Payload { cold: 4096..12_000, hot: 1024..1056, ticks, spin: 0 };
        Self { like, work: Workload::Rounds(payload), mib: None, args: Vec::new() }
    }

    fn mib(&self) -> u32 {
        self.mib.unwrap_or(self.like.mem_mib)
    }

    /// "kvm-db0".
    #[must_use]
    pub fn name(&self) -> String {
        format!("kvm-{}", self.like.name())
    }

    /// The same without a real guest: memory whose pages are all different, for what is not about contents.
    pub fn bare_image(&self, lab: &Lab) -> Result<Image> {
        let memory = lab.top().join(format!("{}.memory", self.name()));
        let firmware = lab.top().join(format!("{}.payload", self.name()));
        std::fs::write(&firmware, self.work.image())?;
        let to = File::options().read(true).write(true).create(true).truncate(true).open(&memory)?;
        to.set_len(u64::from(self.mib()) << 20)?;
        let mut bytes = blake3::Hasher::new_derive_key(&self.name()).finalize_xof();
        let mut page = [0; PAGE];
        for number in (LOW..self.mib() * 256).filter(|n| !self.work.whole(*n)) {
            bytes.fill(&mut page);
            to.write_all_at(&page, u64::from(number) * PAGE as u64)?;
        }
        self.work.begin(&to)?;
        Ok(Image { guest: self.clone(), memory: File::open(&memory)?, firmware })
    }

    /// Writes the memory of the real guest into a file, and the payload's image into another; they serve many rounds.
    pub fn image(&self, lab: &Lab, cache: &Cache, say: &(dyn Fn(&str) + Sync)) -> Result<Image> {
        let memory = lab.top().join(format!("{}.memory", self.name()));
        let firmware = lab.top().join(format!("{}.payload", self.name()));
        std::fs::write(&firmware, self.work.image())?;
        if !memory.is_file() {
            let state = states::ensure(cache, lab.top(), std::slice::from_ref(&self.like), say)?;
            let place = Place { net: None, dir: lab.top(), qemu: &lab.spec.qemu_source };
            let mut vm = Vm::start(cache, &self.like, place, true)?;
            states::restore(&mut vm, state.first().context("no state")?)?;
            let from = vm.memory()?;
            let to = File::options().read(true).write(true).create_new(true).open(&memory)?;
            let len = from.metadata()?.len();
            let all = u64::from(self.mib()) << 20;
            to.set_len(all)?;
            let mut chunk = vec![0; CHUNK];
            for at in (0..len).step_by(CHUNK) {
                let n = CHUNK.min(usize::try_from(len - at)?);
                from.read_exact_at(&mut chunk[..n], at)?;
                // Holes stay holes.
                for again in (0..all).step_by(usize::try_from(len)?) {
                    for (page, at) in chunk[..n].chunks(PAGE).zip((again + at..all).step_by(PAGE)) {
                        let number = u32::try_from(at / PAGE as u64)?;
                        if number >= LOW && !self.work.whole(number) && page.iter().any(|b| *b != 0) {
                            to.write_all_at(page, at)?;
                        }
                    }
                }
            }
            self.work.begin(&to)?;
        }
        Ok(Image { guest: self.clone(), memory: File::open(&memory)?, firmware })
    }
}

/// What a guest is made of.
#[derive(Debug)]
pub struct Image {
    /// Which guest.
    pub guest: KvmGuest,
    memory: File,
    firmware: PathBuf,
}

impl Image {
    /// Pages with a content of the real guest's that the payload never writes.
    pub fn quiet_pages(&self, n: usize) -> Result<Vec<u32>> {
        let mut out = Vec::new();
        let mut page = [0; PAGE];
        for at in self.guest.work.end().. {
            if out.len() == n {
                break;
            }
            let read = self.memory.read_exact_at(&mut page, u64::from(at) * PAGE as u64);
            read.context("the guest has fewer pages with content")?;
            if page.iter().any(|b| *b != page[0]) {
                out.push(at);
            }
        }
        Ok(out)
    }
}

impl Image {
    /// So many pages behind each other, each with a content of the real guest's that the payload never writes.
    pub fn quiet_run(&self, n: u32) -> Result<Range<u32>> {
        let mut page = [0; PAGE];
        let mut start = self.guest.work.end();
        for at in start.. {
            let read = self.memory.read_exact_at(&mut page, u64::from(at) * PAGE as u64);
            read.with_context(|| format!("the guest has no {n} pages with content behind each other"))?;
            if page.iter().all(|b| *b == page[0]) {
                start = at + 1;
            } else if at + 1 - start == n {
                break;
            }
        }
        Ok(start..start + n)
    }
}

/// A running `irlm vmm`. Dropping it ends the process.
#[derive(Debug)]
pub struct KvmVm {
    proc: Proc,
    /// Its control socket.
    pub control: PathBuf,
}

impl KvmVm {
    /// Starts one, paused, or waiting for a guest.
    pub fn start(lab: &Lab, host: Host, program: &Path, image: &Image, incoming: bool) -> Result<Self> {
        let name = image.guest.name();
        let dir = lab.dir(host);
        let control = dir.join(format!("{name}.vmm"));
        let _ = std::fs::remove_file(&control);
        let (socket, payload) = (control.display().to_string(), image.firmware.display().to_string());
        let memory = format!("{}M", image.guest.mib());
        // Its guest never rests; what is tested must not wait for it.
        let irlm = program.display().to_string();
        let mut args = vec!["-n", "10", &irlm, "vmm"];
        args.extend(["--control", &socket, "--memory", &memory, "--serial", "none"]);
        if incoming {
            args.push("--incoming");
        } else {
            args.extend(["--payload", &payload, "--paused"]);
        }
        args.extend(image.guest.args.iter().map(String::as_str));
        let proc = spawn((&lab.net, host, &dir), "nice".as_ref(), &format!("vmm-{name}"), &args)?;
        let mut vm = Self { proc, control };
        let until = Instant::now() + WAIT;
        while let Err(e) = vm.vmm() {
            if let Some(code) = vm.proc.ended()? {
                bail!("irlm vmm of {name} ended with {code}: {}", vm.proc.said());
            }
            if Instant::now() > until {
                return Err(e.context(vm.proc.said()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if lab.spec.hurry {
            vm.stand_back()?;
        }
        Ok(vm)
    }

    /// Leaves its virtual processors what hardly anybody else wants: the guests of a few tests side by side, at their
    /// process's weight, take a third of each core.
    fn stand_back(&self) -> Result<()> {
        let mut found = false;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.proc.pid()))? {
            let task = task?;
            // Threads that answer control connections come and go; those of its processors stay.
            if std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("vcpu-")) {
                let number: i32 = task.file_name().to_string_lossy().parse()?;
                let pid = rustix::process::Pid::from_raw(number).context("a thread without number")?;
                rustix::process::setpriority_process(Some(pid), 19)?;
                found = true;
            }
        }
        ensure!(found, "irlm vmm has no thread for a virtual processor");
        Ok(())
    }

    /// A control connection of the lab's own.
    pub fn vmm(&self) -> Result<Vmm> {
        Vmm::connect(&self.control, Duration::from_secs(5))
            .with_context(|| self.control.display().to_string())
    }

    /// Whether it runs, is paused, …; `None` if its process is gone.
    pub fn state(&mut self) -> Option<State> {
        if !matches!(self.proc.ended(), Ok(None)) {
            return None;
        }
        self.vmm().ok()?.status().ok().map(|s| s.state)
    }

    /// Its state but for memory; it must stand still.
    fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot::decode(&self.vmm()?.save_state()?)?)
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        self.proc.kill();
    }

    /// Bytes that its process has written to files since it began.
    pub fn written(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/io", self.proc.pid()))?;
        let line = text.lines().find_map(|l| l.strip_prefix("wchar: "));
        Ok(line.context("no count of bytes written")?.parse()?)
    }

    /// Asks its guest for so many pages, and waits until it has given them; gives the number that it has by then.
    pub fn inflated(&self, pages: u32, wait: Duration) -> Result<u64> {
        let until = Instant::now() + wait;
        let mut vmm = self.vmm()?;
        vmm.balloon(u64::from(pages) * PAGE as u64)?;
        loop {
            let balloon = vmm.status()?.balloon.context("it has no balloon")?;
            if balloon.given >= balloon.asked || Instant::now() > until {
                return Ok(balloon.given / PAGE as u64);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it printed last.
    #[must_use]
    pub fn said(&self) -> String {
        self.proc.said()
    }

    /// Its memory.
    pub fn memory(&self) -> Result<Memory> {
        let slots = self.vmm()?.memory()?;
        Ok(Memory(slots.into_iter().map(|Slot { bytes, fd, .. }| (bytes, File::from(fd))).collect()))
    }
}

/// A guest's memory as one.
#[derive(Debug)]
pub struct Memory(Vec<(u64, File)>);

impl Memory {
    /// Runs `each` on every piece of it, with its guest address below the hole for devices.
    fn pieces(&self, mut each: impl FnMut(u64, &File, Range<u64>) -> Result<()>) -> Result<()> {
        let mut base = 0;
        for (bytes, file) in &self.0 {
            for at in (0..*bytes).step_by(CHUNK) {
                each(base + at, file, at..(at + CHUNK as u64).min(*bytes))?;
            }
            base += bytes;
        }
        Ok(())
    }

    fn fill(&self, image: &File) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        self.pieces(|at, file, part| {
            let chunk = &mut chunk[..usize::try_from(part.end - part.start)?];
            image.read_exact_at(chunk, at)?;
            for (page, at) in chunk.chunks(PAGE).zip(part.step_by(PAGE)) {
                if page.iter().any(|b| *b != 0) {
                    file.write_all_at(page, at)?;
                }
            }
            Ok(())
        })
    }

    /// One page.
    pub fn read(&self, page: u32, into: &mut [u8; PAGE]) -> Result<()> {
        let (mut base, at) = (0, u64::from(page) * PAGE as u64);
        for (len, file) in &self.0 {
            if (base..base + len).contains(&at) {
                return Ok(file.read_exact_at(into, at - base)?);
            }
            base += len;
        }
        bail!("there is no page {page}")
    }

    /// How many of these pages are in the memory's file at all.
    pub fn held(&self, pages: Range<u32>) -> Result<usize> {
        let mut held = 0;
        let mut base = 0;
        for (len, file) in &self.0 {
            for at in
                pages.clone().map(|p| u64::from(p) * PAGE as u64).filter(|at| (base..base + len).contains(at))
            {
                let next = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at - base));
                held += usize::from(next == Ok(at - base));
            }
            base += len;
        }
        Ok(held)
    }

    /// All of it.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        self.pieces(|_, file, part| {
            let from = all.len();
            all.resize(from + usize::try_from(part.end - part.start)?, 0);
            Ok(file.read_exact_at(&mut all[from..], part.start)?)
        })?;
        Ok(all)
    }

    /// Changes a page behind the back of everything that watches writes.
    pub fn change(&self, page: u32, bytes: &[u8]) -> Result<()> {
        let mut base = 0;
        let at = u64::from(page) * PAGE as u64;
        for (len, file) in &self.0 {
            if (base..base + len).contains(&at) {
                return Ok(file.write_all_at(bytes, at - base)?);
            }
            base += len;
        }
        bail!("there is no page {page}")
    }
}

/// A guest on its way: the running source and the waiting target.
#[derive(Debug)]
pub struct KvmPair {
    /// "kvm-db0".
    pub name: String,
    /// Number of its source host, and of its target host.
    pub host: usize,
    /// Where it runs.
    pub source: KvmVm,
    /// Where it shall run.
    pub target: KvmVm,
    work: Workload,
}

impl KvmPair {
    /// Starts both sides and runs the source.
    pub fn start(lab: &Lab, program: &Path, image: &Image, host: usize) -> Result<Self> {
        let source = KvmVm::start(lab, Host::Source(host), program, image, false)?;
        source.memory()?.fill(&image.memory)?;
        let target = KvmVm::start(lab, Host::Target(host), program, image, true)?;
        source.vmm()?.resume()?;
        Ok(Self { name: image.guest.name(), host, source, target, work: image.guest.work.clone() })
    }

    /// Its part of a group file.
    #[must_use]
    pub fn entry(&self) -> String {
        let (s, t) = (Host::Source(self.host).name(), Host::Target(self.host).name());
        format!(
            "[[vm]]\nname = {:?}\nsource = {s:?}\ntarget = {t:?}\nsource_vmm = {:?}\ntarget_vmm = {:?}\n",
            self.name, self.source.control, self.target.control
        )
    }

    /// Compares source and target, both paused, and the target with the model; then lets the target run on and looks
    /// whether it did not miss a step. Returns the bytes compared.
    pub fn check_moved(&mut self, image: &Image) -> Result<u64> {
        let sides =
            [("source", &mut self.source, State::GivenUp), ("target", &mut self.target, State::Paused)];
        for (side, vm, right) in sides {
            let state = vm.state();
            ensure!(state == Some(right), "{}: the {side} is {state:?}, not {right:?}", self.name);
        }
        // Nobody's word lets the copy that has left run again.
        let resumed = self.source.vmm()?.resume().map_err(|e| e.to_string());
        ensure!(
            resumed.as_ref().is_err_and(|e| e.contains("was given up")),
            "{}: the source that has left is told to run: {resumed:?}",
            self.name
        );
        let (source, target) = (self.source.memory()?.bytes()?, self.target.memory()?.bytes()?);
        let page = source.chunks(PAGE).zip(target.chunks(PAGE)).position(|(s, t)| s != t);
        if let Some(page) = page.filter(|_| source.len() == target.len()) {
            bail!("{}: page {page:#x} differs between source and target", self.name);
        }
        ensure!(source.len() == target.len(), "{}: memories of two sizes", self.name);
        let states = [self.source.snapshot()?, self.target.snapshot()?];
        let differences = states[0].differences(&states[1]);
        ensure!(differences.is_empty(), "{}: the state differs: {}", self.name, differences.join("; "));
        let before = self.work.model(&image.memory, &target);
        let before = before.with_context(|| format!("{} as it was moved", self.name))?;
        self.run_on(image, before)?;
        Ok(target.len() as u64)
    }

    /// Stops the target, which runs, compares its memory with the model, and lets it run on.
    pub fn check_running(&mut self, image: &Image) -> Result<u64> {
        let (source, target) = (self.source.state(), self.target.state());
        ensure!(target == Some(State::Running), "{}: the target is {target:?}", self.name);
        ensure!(matches!(source, Some(State::GivenUp) | None), "{}: the source is {source:?}", self.name);
        self.target.vmm()?.pause()?;
        let memory = self.target.memory()?.bytes()?;
        let before =
            self.work.model(&image.memory, &memory).with_context(|| format!("{} as it runs", self.name))?;
        self.run_on(image, before)?;
        Ok(memory.len() as u64)
    }

    /// Lets the target run for a moment and looks whether it went on from step `before` without missing one.
    fn run_on(&mut self, image: &Image, before: u64) -> Result<()> {
        let mut vmm = self.target.vmm()?;
        vmm.resume()?;
        let until = Instant::now() + WAIT;
        loop {
            std::thread::sleep(Duration::from_millis(200));
            vmm.pause()?;
            let now = self.work.model(&image.memory, &self.target.memory()?.bytes()?);
            let now = now.with_context(|| format!("{} after it ran on", self.name))?;
            if now > before {
                vmm.resume()?;
                return Ok(());
            }
            ensure!(Instant::now() < until, "{} does not run on from step {before}", self.name);
            vmm.resume()?;
        }
    }
}
