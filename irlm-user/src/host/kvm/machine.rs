//! One virtual machine: made, run, stopped, saved, taken over, ended. All of it may be called from any thread.

use super::boot::{self, Boot};
use super::devices::Devices;
use super::dirty::{DirtyKind, DirtyLog};
use super::memory::{Memory, MemorySpec};
use super::snapshot::{Shape, Snapshot, SnapshotError};
use super::userfault::{Choice, Mode, Userfault};
use super::vcpu::{self, End, Gate, Motion, Surroundings, Vcpu, lock};
use super::virtio::{self, Device};
use super::{KvmError, MAX_VCPUS, Result, call, state};
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub use super::boot::Boot as What;
pub use super::dirty::{DirtyKind as Dirty, RING_ENTRIES};
pub use super::userfault::{Choice as FaultChoice, Mode as FaultMode};
pub use super::vcpu::End as Ending;
pub use super::virtio::{BalloonStatus, DeviceSpec};

/// How long a pause waits for vCPUs. They leave within a millisecond unless one waits for a page that does not come.
const PAUSE: Duration = Duration::from_secs(5);
/// How long a look at the rings waits for vCPUs; one that waits for a page writes nothing meanwhile.
const LOOK_AT_RINGS: Duration = Duration::from_millis(100);
/// Where KVM keeps three pages of its own on some processors: below the interrupt controllers, in the hole.
const KVM_PAGES: usize = 0xfffb_d000;

/// What machine to make.
pub struct Spec {
    /// From 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Its memory.
    pub memory: MemorySpec,
    /// How writes are noted.
    pub dirty: DirtyKind,
    /// What it starts.
    pub boot: Boot,
    /// Where its serial port's output goes.
    pub serial: Box<dyn Write + Send>,
    /// Disks, network cards, a balloon.
    pub devices: Vec<DeviceSpec>,
    /// How missing pages are to be answered.
    pub faults: Choice,
}

impl std::fmt::Debug for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spec({} vCPUs, {:?}, {:?}, {:?})", self.vcpus, self.memory, self.dirty, self.boot)
    }
}

/// Where a machine stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Its vCPUs run.
    Running,
    /// They were told to stop and have not all done so.
    Pausing,
    /// They stand still.
    Paused,
    /// They stand still for good: the VM goes on elsewhere.
    GivenUp,
    /// It waits for another's state.
    Incoming,
    /// It will not run again.
    Ended(End),
}

/// How writes are noted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyStatus {
    /// By what.
    pub kind: DirtyKind,
    /// Whether they are now.
    pub on: bool,
    /// How often a vCPU came out because its ring was full.
    pub ring_full: u64,
    /// How often a ring had overflowed, and all pages were reported instead.
    pub ring_lost: u64,
}

/// Taken by whatever changes how the machine stands; never by who only looks.
#[derive(Debug, Default)]
struct Control {
    /// Has run: its memory is in use.
    has_run: bool,
    userfault: Option<Userfault>,
}

// bounds: flags of one VM, each of which another command sets
/// A virtual machine. Its threads end with the value.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    s: Arc<Surroundings>,
    threads: Vec<JoinHandle<()>>,
    control: Mutex<Control>,
    /// Taken by whatever stops vCPUs or needs them to stand still.
    motion: Mutex<()>,
    /// They stand still for a moment, and nobody asked for that.
    brief: AtomicBool,
    /// Waits for another's state.
    incoming: AtomicBool,
    /// Its VM goes on elsewhere.
    given_up: AtomicBool,
    /// Its owner has it stand still; whoever stops it for a move does not count.
    by_owner: AtomicBool,
    /// Its state was saved; it has run since.
    saved: AtomicBool,
    ran_on: AtomicBool,
    asks: AtomicBool,
    faults: Choice,
    msrs: Vec<u32>,
    xsave_bytes: usize,
}

impl Machine {
    /// Makes it, with everything in memory that it needs to start; it stands still.
    pub fn new(spec: Spec) -> Result<Self> {
        if spec.vcpus == 0 || spec.vcpus > MAX_VCPUS {
            let what = format!("{} vCPUs: from 1 to {MAX_VCPUS} are possible", spec.vcpus);
            return Err(KvmError::Not { what });
        }
        vcpu::take_signal()?;
        let kvm = Kvm::new().map_err(|e| KvmError::NoKvm { source: e.into() })?;
        let memory = Arc::new(Memory::new(&spec.memory)?);
        let vm = Arc::new(call("cannot make a VM", kvm.create_vm())?);
        call("cannot reserve KVM's own pages", vm.set_tss_address(KVM_PAGES))?;
        call("cannot make interrupt controllers", vm.create_irq_chip())?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        call("cannot make a timer", vm.create_pit2(pit))?;
        let mut dirty = DirtyLog::new(Arc::clone(&vm), Arc::clone(&memory), spec.dirty)?;
        let devices = Devices::new(&vm, spec.serial, &spec.devices, &memory)?;
        let start = boot::prepare(&spec.boot, &memory, spec.vcpus, spec.devices.len())?;
        let leaves = call("cannot ask for CPU features", kvm.get_supported_cpuid(256))?;
        let mut vcpus = Vec::new();
        for i in 0..spec.vcpus {
            let fd = call("cannot make a vCPU", vm.create_vcpu(i.into()))?;
            let leaves = cpuid_of(&kvm, &leaves, i, spec.vcpus);
            call("cannot set a vCPU's CPUID", fd.set_cpuid2(&leaves))?;
            dirty.add_vcpu(&fd)?;
            if i == 0 {
                start.apply(&fd)?;
            }
            vcpus.push(Vcpu::new(i, fd)?);
        }
        let list = call("cannot ask for MSRs", kvm.get_msr_index_list())?;
        let xsave_bytes = state::xsave_bytes(&vm);
        let gate = Gate::new(spec.vcpus);
        let dirty = Mutex::new(dirty);
        let (ring_full, rings_on) = (AtomicU64::new(0), AtomicBool::new(false));
        let s = Arc::new(Surroundings { gate, vcpus, devices, dirty, ring_full, rings_on });
        let mut out = Self {
            vm,
            memory,
            s,
            threads: Vec::new(),
            control: Mutex::default(),
            motion: Mutex::default(),
            brief: AtomicBool::new(false),
            incoming: AtomicBool::new(spec.boot == Boot::Incoming),
            given_up: AtomicBool::new(false),
            by_owner: AtomicBool::new(true),
            saved: AtomicBool::new(false),
            ran_on: AtomicBool::new(false),
            asks: AtomicBool::new(false),
            faults: spec.faults,
            msrs: list.as_slice().to_vec(),
            xsave_bytes,
        };
        for i in 0..spec.vcpus as usize {
            out.spawn(format!("vcpu-{i}"), move |s| vcpu::thread(s, i))?;
        }
        for n in 0..spec.devices.len() {
            if out.s.devices.virtio()[n].is_net() {
                out.spawn(format!("vmm-net-{n}"), move |s| {
                    let over = || s.gate.quitting(Duration::ZERO);
                    virtio::bring::receive(&s.devices.virtio()[n], over);
                })?;
            }
        }
        if matches!(spec.dirty, DirtyKind::Ring(_)) {
            out.spawn("vmm-rings".into(), vcpu::empty_rings)?;
        }
        // All have come to the gate: from here on "still" is what it says.
        out.s.gate.close(&out.s.vcpus, PAUSE)?;
        Ok(out)
    }

    fn spawn(&mut self, name: String, work: impl FnOnce(&Surroundings) + Send + 'static) -> Result<()> {
        let s = Arc::clone(&self.s);
        let thread = std::thread::Builder::new().name(name).spawn(move || work(&s));
        let failed = |source| KvmError::Call { what: "cannot start a thread", source };
        self.threads.push(thread.map_err(failed)?);
        Ok(())
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.s.vcpus.len() as u32
    }

    /// Where it stands; never waits for a vCPU.
    #[must_use]
    pub fn standing(&self) -> Standing {
        match self.s.gate.motion() {
            Motion::Ended(end) => Standing::Ended(end),
            Motion::Stopping | Motion::Still if self.brief.load(Ordering::Acquire) => Standing::Running,
            Motion::Running => Standing::Running,
            Motion::Stopping => Standing::Pausing,
            Motion::Still if self.is_incoming() => Standing::Incoming,
            Motion::Still if self.given_up.load(Ordering::Acquire) => Standing::GivenUp,
            Motion::Still => Standing::Paused,
        }
    }

    /// Lets it run.
    pub fn resume(&self) -> Result<()> {
        let mut c = lock(&self.control);
        let _motion = lock(&self.motion);
        self.not_ended()?;
        if self.is_incoming() {
            return Err(not("it has no state yet: send load-state first"));
        }
        if self.given_up.load(Ordering::Acquire) {
            return Err(not(
                "its VM was given up to another host, where it goes on; `irlm settle` takes it back",
            ));
        }
        if self.s.gate.motion() == Motion::Still && c.has_run {
            for v in &self.s.vcpus {
                // Tells a guest with a KVM clock that it stood still; others have none to tell, which is an error.
                let _ = lock(&v.fd).kvmclock_ctrl();
            }
        }
        self.by_owner.store(false, Ordering::Release);
        c.has_run = true;
        self.ran_on.store(true, Ordering::Release);
        self.devices_still(false)?;
        self.s.gate.open();
        Ok(())
    }

    /// Stops it; returns when every vCPU has left the guest. After an error they still will.
    pub fn pause(&self) -> Result<()> {
        let _motion = lock(&self.motion);
        self.by_owner.store(true, Ordering::Release);
        self.stand_still()
    }

    /// The same, for a move: [`Self::release`] lets it run again.
    pub fn pause_for_move(&self) -> Result<()> {
        let _motion = lock(&self.motion);
        self.stand_still()
    }

    /// Lets it run that was stopped for a move, unless its owner has stopped it since.
    pub fn release(&self) -> Result<()> {
        if self.by_owner.load(Ordering::Acquire) { self.not_ended() } else { self.resume() }
    }

    fn stand_still(&self) -> Result<()> {
        self.not_ended()?;
        self.s.gate.close(&self.s.vcpus, PAUSE)?;
        self.devices_still(true)?;
        self.not_ended()
    }

    /// Its VM goes on elsewhere: it does not run here again unless it is taken back. It must stand still.
    pub fn give_up(&self) -> Result<()> {
        let _still = (lock(&self.control), lock(&self.motion));
        match self.standing() {
            // What was saved is older than what is here, and somebody else would go on from that.
            Standing::Paused if self.saved.load(Ordering::Acquire) && self.ran_on.load(Ordering::Acquire) => {
                Err(not("it has run since its state was saved"))
            }
            Standing::Paused => {
                self.given_up.store(true, Ordering::Release);
                Ok(())
            }
            // Told before, or it never runs again anyway.
            Standing::GivenUp | Standing::Ended(_) => Ok(()),
            _ => Err(not("it does not stand still with a state of its own: send pause first")),
        }
    }

    /// Its VM is here after all, and stands still.
    pub fn take_back(&self) {
        let _still = (lock(&self.control), lock(&self.motion));
        self.given_up.store(false, Ordering::Release);
    }

    /// Devices stand still, or go on. vCPUs stand still.
    fn devices_still(&self, still: bool) -> Result<()> {
        for (n, d) in self.s.devices.virtio().iter().enumerate() {
            if !d.stand_still(still, PAUSE) {
                let ms = PAUSE.as_millis();
                return Err(not(&format!(
                    "device {n} has not finished after {ms} ms (it may wait for a page)"
                )));
            }
        }
        Ok(())
    }

    /// Everything written from here on is noted.
    pub fn dirty_start(&self) -> Result<()> {
        self.with_log(DirtyLog::start)
    }

    /// ORs what was written since the last harvest into one bitmap a slot ([`super::memory::Slot::words`] long each). What is
    /// read of those pages from here on is either final or in the next harvest.
    pub fn dirty_harvest(&self, slot_bits: &mut [Vec<u64>]) -> Result<()> {
        self.with_log(|log| log.harvest(slot_bits))
    }

    /// Nothing is noted any more.
    pub fn dirty_stop(&self) -> Result<()> {
        self.with_log(DirtyLog::stop)
    }

    /// Does something with the log. Rings are looked at while their vCPUs are out of the guest: that is a moment, and the
    /// guest goes on as before.
    fn with_log<T>(&self, work: impl FnOnce(&mut DirtyLog) -> Result<T>) -> Result<T> {
        let _motion = lock(&self.motion);
        let rings = matches!(lock(&self.s.dirty).kind(), DirtyKind::Ring(_));
        let moving = rings && self.s.gate.motion() == Motion::Running;
        if moving {
            self.brief.store(true, Ordering::Release);
            if let Err(e) = self.s.gate.close(&self.s.vcpus, LOOK_AT_RINGS) {
                tracing::debug!("looking at dirty rings: {e}");
            }
        }
        let mut log = lock(&self.s.dirty);
        let done = work(&mut log);
        self.s.rings_on.store(rings && log.is_on(), Ordering::Release);
        drop(log);
        if moving {
            self.s.gate.open();
            self.brief.store(false, Ordering::Release);
        }
        done
    }

    /// How writes are noted.
    #[must_use]
    pub fn dirty_status(&self) -> DirtyStatus {
        let log = lock(&self.s.dirty);
        let ring_full = self.s.ring_full.load(Ordering::Relaxed);
        DirtyStatus { kind: log.kind(), on: log.is_on(), ring_full, ring_lost: log.lost() }
    }

    fn shape(&self) -> Shape {
        let slots = self.memory.slots().iter().map(|s| (s.guest_phys, s.bytes)).collect();
        Shape { vcpus: self.vcpus(), slots }
    }

    /// Everything but its memory; it must stand still.
    pub fn save_state(&self) -> Result<Vec<u8>> {
        let _still = (lock(&self.control), lock(&self.motion));
        self.not_ended()?;
        if self.is_incoming() || self.s.gate.motion() != Motion::Still {
            return Err(not("it is not paused: send pause first"));
        }
        let save = |v: &Vcpu| state::save_vcpu(&lock(&v.fd), &self.msrs, self.xsave_bytes);
        let vcpus = self.s.vcpus.iter().map(save).collect::<Result<Vec<_>>>()?;
        self.saved.store(true, Ordering::Release);
        self.ran_on.store(false, Ordering::Release);
        let (irqchips, pit, clock) = state::save_vm(&self.vm)?;
        let serial = self.s.devices.save();
        let virtio = self.s.devices.virtio().iter().map(Device::save).collect();
        Ok(Snapshot { shape: self.shape(), irqchips, pit, clock, serial, virtio, vcpus }.encode())
    }

    /// Takes over another's state; afterwards it is paused. An error leaves it as it was, or half taken over and still waiting
    /// for state; it cannot run before one was taken whole.
    pub fn load_state(&self, bytes: &[u8]) -> Result<()> {
        let snapshot = Snapshot::decode(bytes)?;
        let _still = lock(&self.control);
        if !self.is_incoming() || self.s.gate.motion() != Motion::Still {
            return Err(not("it does not wait for state: start it with --incoming"));
        }
        let here = self.shape();
        if snapshot.shape != here {
            let (there, here) = (snapshot.shape.to_string(), here.to_string());
            return Err(SnapshotError::Shape { there, here }.into());
        }
        let (there, here) = (snapshot.virtio.len(), self.s.devices.virtio().len());
        if there != here {
            return Err(not(&format!(
                "the state is of a VM with {there} virtio devices, and this one has {here}: start it with the same disks, network cards and balloon"
            )));
        }
        for (n, (d, state)) in self.s.devices.virtio().iter().zip(&snapshot.virtio).enumerate() {
            d.load(state).map_err(|e| not(&format!("state of device {n}: {e}")))?;
        }
        for (v, state) in self.s.vcpus.iter().zip(&snapshot.vcpus) {
            state::load_vcpu(&lock(&v.fd), v.index, state, self.xsave_bytes)?;
        }
        state::load_vm(&self.vm, &snapshot.irqchips, &snapshot.pit, &snapshot.clock)?;
        if !self.s.devices.load(&snapshot.serial) {
            return Err(not("its serial port's state is not taken"));
        }
        self.incoming.store(false, Ordering::Release);
        Ok(())
    }

    /// From here on its missing pages are asked for. The descriptor that answers, how, and where each slot is mapped; the same
    /// again for whoever asks again.
    pub fn userfault(&self) -> Result<(OwnedFd, Mode, Vec<u64>)> {
        let mut c = lock(&self.control);
        if c.userfault.is_none() {
            if c.has_run {
                return Err(not("its memory is in use already: only one that has not run can ask for pages"));
            }
            c.userfault = Some(Userfault::new(&self.memory, self.faults)?);
            self.asks.store(true, Ordering::Release);
        }
        let Some(u) = &c.userfault else { return Err(not("it asks for no pages")) };
        let fd = duplicate(u.fd())?;
        Ok((fd, u.mode, self.memory.slots().iter().map(|s| s.base).collect()))
    }

    /// Whether missing pages are asked for.
    #[must_use]
    pub fn asks_for_pages(&self) -> bool {
        self.asks.load(Ordering::Acquire)
    }

    /// All pages are there.
    pub fn userfault_end(&self) -> Result<()> {
        let mut c = lock(&self.control);
        match c.userfault.take() {
            Some(u) => {
                self.asks.store(false, Ordering::Release);
                u.end(&self.memory)
            }
            None => Err(not("it asks for no pages")),
        }
    }

    /// How much of its memory the guest shall give back; a driver in it does that in its own time.
    pub fn balloon(&self, bytes: u64) -> Result<()> {
        self.not_ended()?;
        let balloon = self.s.devices.virtio().iter().find(|d| d.balloon().is_some());
        let Some(balloon) = balloon else { return Err(not("it has no balloon: start it with --balloon")) };
        balloon.ask_for(bytes, PAUSE)
    }

    /// How its balloon stands, if it has one; never waits.
    #[must_use]
    pub fn balloon_status(&self) -> Option<BalloonStatus> {
        self.s.devices.virtio().iter().find_map(Device::balloon)
    }

    /// What somebody typed on its serial console.
    pub fn console_input(&self, bytes: &[u8]) {
        self.s.devices.input(bytes);
    }

    /// Waits at most so long for its end.
    #[must_use]
    pub fn wait_end(&self, within: Duration) -> Option<End> {
        self.s.gate.wait_end(within)
    }

    fn is_incoming(&self) -> bool {
        self.incoming.load(Ordering::Acquire)
    }

    fn not_ended(&self) -> Result<()> {
        match self.s.gate.motion() {
            Motion::Ended(end) => Err(not(&format!("it has ended: {}", end.why))),
            _ => Ok(()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.s.gate.quit(&self.s.vcpus);
        // A vCPU that waits for a page must not wait any longer: what it would do with it no longer matters.
        let userfault = lock(&self.control).userfault.take();
        if let Some(u) = &userfault {
            let _ = u.end(&self.memory);
        }
        for t in self.threads.drain(..) {
            while !t.is_finished() {
                self.s.gate.quit(&self.s.vcpus);
                // It may have been about to give pages away.
                userfault.iter().for_each(Userfault::let_go);
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = t.join();
        }
    }
}

fn not(what: &str) -> KvmError {
    KvmError::Not { what: what.into() }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    fd.try_clone_to_owned()
        .map_err(|source| KvmError::Userfault { what: "cannot duplicate the descriptor", source })
}

/// The host's features, with this vCPU's number and the VM's topology: one socket of single-threaded cores.
fn cpuid_of(kvm: &Kvm, supported: &CpuId, vcpu: u32, vcpus: u32) -> CpuId {
    let mut out = supported.clone();
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let bits = vcpus.next_power_of_two().trailing_zeros();
    for e in out.as_mut_slice() {
        match (e.function, e.index) {
            (1, _) => {
                e.ebx = (e.ebx & 0xffff) | vcpus.min(255) << 16 | vcpu << 24;
                e.ecx |= u32::from(deadline) << 24;
                // More than one logical processor in the package.
                e.edx = (e.edx & !(1 << 28)) | u32::from(vcpus > 1) << 28;
            }
            (0xb | 0x1f, level) => {
                (e.eax, e.ebx, e.ecx) = match level {
                    0 => (0, 1, 1 << 8),
                    1 => (bits, vcpus, 2 << 8 | 1),
                    n => (0, 0, n),
                };
                e.edx = vcpu;
            }
            _ => {}
        }
    }
    out
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Machine>();
    shared::<VcpuFd>();
};
