//! vCPU threads: each runs its vCPU in KVM until it is told to stand still, and the gate through which they all pass.
//!
//! A vCPU is called out of the guest by two things together: `immediate_exit` in its kvm_run, for a thread that is about to
//! enter, and a signal, for one that is in. Before a thread counts as standing still it enters once more with
//! `immediate_exit` set, so that KVM finishes the port or memory access that the last exit was about: state saved before
//! that would repeat or lose it.

use super::devices::{Devices, Wrote};
use super::dirty::DirtyLog;
use super::{KvmError, Result, last, raw};
use crate::core::units::PAGE_SIZE;
use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::mem::offset_of;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a called vCPU is waited for before it is called again.
const CALL_AGAIN: Duration = Duration::from_millis(10);

/// Locks, also after a panic of another holder: what is behind these locks is valid at every moment.
pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One vCPU. Its thread holds `fd` while it is in the guest.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) index: u32,
    pub(super) fd: Mutex<VcpuFd>,
    flag: ImmediateExit,
    /// Its thread, once that has begun.
    tid: AtomicI32,
}

impl Vcpu {
    pub(super) fn new(index: u32, fd: VcpuFd) -> Result<Self> {
        let flag = ImmediateExit::map(&fd)?;
        Ok(Self { index, fd: Mutex::new(fd), flag, tid: AtomicI32::new(0) })
    }

    /// Calls it out of the guest.
    fn call_out(&self) {
        self.flag.set(1);
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 {
            // SAFETY: no memory is involved. The number names a thread of this process only; should the vCPU's thread
            // have ended, whoever has its number now runs the same empty handler.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }
}

/// The `immediate_exit` byte of a vCPU, mapped a second time, because its thread has the first mapping while it runs.
#[derive(Debug)]
struct ImmediateExit(NonNull<u8>);

// SAFETY: the mapping belongs to this value alone, and is only touched as one atomic byte.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn map(fd: &VcpuFd) -> Result<Self> {
        // SAFETY: a fresh mapping of the first page of kvm_run at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED) {
            Some(at) => Ok(Self(at)),
            None => Err(last("cannot map a vCPU's kvm_run")),
        }
    }

    fn set(&self, to: u8) {
        // SAFETY: the byte is within the mapped page, which lives as long as `self`.
        let byte = unsafe { self.0.add(offset_of!(kvm_run, immediate_exit)).cast::<AtomicU8>().as_ref() };
        byte.store(to, Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; nothing refers into it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE_SIZE) };
    }
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the signal that calls vCPUs out interrupt their call, and nothing else.
pub(super) fn take_signal() -> Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), nothing)
        .map_err(|e| KvmError::Call { what: "cannot take a signal for vCPUs", source: e.into() })
}

/// Why a guest does not run any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct End {
    /// In words.
    pub why: String,
    /// Whether the guest wanted it.
    pub wanted: bool,
}

#[derive(Debug, Default)]
struct Inside {
    run: bool,
    quit: bool,
    /// Which vCPUs stand still.
    still: Vec<bool>,
    end: Option<End>,
}

/// What all vCPU threads pass before they enter the guest.
#[derive(Debug, Default)]
pub(super) struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
    /// Told to stand still: for vCPU threads to see without the lock.
    stop: AtomicBool,
}

/// How all vCPUs are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Motion {
    /// Told to run.
    Running,
    /// Told to stand still, and some does not yet.
    Stopping,
    /// All stand still.
    Still,
    /// For good.
    Ended(End),
}

impl Gate {
    pub(super) fn new(vcpus: u32) -> Self {
        let still = vec![false; vcpus as usize];
        let inside = Mutex::new(Inside { still, ..Inside::default() });
        Self { inside, changed: Condvar::new(), stop: AtomicBool::new(true) }
    }

    pub(super) fn motion(&self) -> Motion {
        let g = lock(&self.inside);
        match &g.end {
            Some(end) => Motion::Ended(end.clone()),
            None if g.run => Motion::Running,
            None if g.still.iter().all(|s| *s) => Motion::Still,
            None => Motion::Stopping,
        }
    }

    /// A vCPU's thread waits here until it may run; `false`: it is to end.
    fn pass(&self, vcpu: &Vcpu) -> bool {
        let mut g = lock(&self.inside);
        let i = vcpu.index as usize;
        while !g.run && !g.quit {
            if !g.still[i] {
                g.still[i] = true;
                self.changed.notify_all();
            }
            g = self.changed.wait(g).unwrap_or_else(PoisonError::into_inner);
        }
        if g.quit {
            return false;
        }
        g.still[i] = false;
        // Whoever stops it takes this lock first, so a call that is on its way is not wiped out.
        vcpu.flag.set(0);
        true
    }

    /// Lets all run.
    pub(super) fn open(&self) {
        let mut g = lock(&self.inside);
        if g.end.is_none() {
            g.run = true;
            self.stop.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Stops all; returns when the last has left the guest.
    pub(super) fn close(&self, vcpus: &[Vcpu], within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        let mut g = lock(&self.inside);
        g.run = false;
        self.stop.store(true, Ordering::SeqCst);
        loop {
            let Some(late) = g.still.iter().position(|s| !s) else { return Ok(()) };
            if Instant::now() >= until {
                return Err(KvmError::Stuck { vcpu: late as u32, ms: within.as_millis() });
            }
            for v in vcpus.iter().filter(|v| !g.still[v.index as usize]) {
                v.call_out();
            }
            g = self.changed.wait_timeout(g, CALL_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest does not run any more; all others are called out.
    fn end(&self, vcpus: &[Vcpu], end: End) {
        let mut g = lock(&self.inside);
        g.run = false;
        g.end.get_or_insert(end);
        self.stop.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        drop(g);
        vcpus.iter().for_each(Vcpu::call_out);
    }

    /// All threads are to end.
    pub(super) fn quit(&self, vcpus: &[Vcpu]) {
        let mut g = lock(&self.inside);
        (g.run, g.quit) = (false, true);
        self.stop.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        drop(g);
        vcpus.iter().for_each(Vcpu::call_out);
    }

    /// Waits at most so long; whether threads are to end.
    pub(super) fn quitting(&self, within: Duration) -> bool {
        let g = lock(&self.inside);
        let (g, _) =
            self.changed.wait_timeout_while(g, within, |g| !g.quit).unwrap_or_else(PoisonError::into_inner);
        g.quit
    }

    /// Waits until the guest has ended, or threads are to end (then `None`), or the time is over.
    pub(super) fn wait_end(&self, within: Duration) -> Option<End> {
        let g = lock(&self.inside);
        let done = |g: &mut Inside| g.end.is_none() && !g.quit;
        let (g, _) = self.changed.wait_timeout_while(g, within, done).unwrap_or_else(PoisonError::into_inner);
        g.end.clone()
    }
}

/// What a vCPU's thread works with.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) gate: Gate,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) devices: Devices,
    pub(super) dirty: Mutex<DirtyLog>,
    /// How often a ring was full.
    pub(super) ring_full: AtomicU64,
    /// Rings are to be emptied now and then.
    pub(super) rings_on: AtomicBool,
}

/// How often rings are emptied while writes are noted: far more seldom than an honest KVM fills a large one, and often
/// enough that one that looks at the limit late has not yet overflowed it.
const EMPTY_RINGS: Duration = Duration::from_millis(20);

/// The thread that calls vCPUs out so that each empties its ring.
pub(super) fn empty_rings(s: &Surroundings) {
    while !s.gate.quitting(EMPTY_RINGS) {
        if s.rings_on.load(Ordering::Acquire) && s.gate.motion() == Motion::Running {
            s.vcpus.iter().for_each(Vcpu::call_out);
        }
    }
}

/// A vCPU's thread.
pub(super) fn thread(s: &Surroundings, index: usize) {
    let vcpu = &s.vcpus[index];
    vcpu.tid.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    while s.gate.pass(vcpu) {
        let end = guest(s, vcpu, &mut lock(&vcpu.fd));
        if let Some(end) = end {
            s.gate.end(&s.vcpus, end);
        }
    }
    vcpu.tid.store(0, Ordering::Release);
}

fn broken(why: String) -> Option<End> {
    Some(End { why, wanted: false })
}

fn wanted(why: &str) -> Option<End> {
    Some(End { why: why.into(), wanted: true })
}

/// Runs the guest until it ends (then how), or until it is to stand still and nothing is left half done.
fn guest(s: &Surroundings, vcpu: &Vcpu, fd: &mut VcpuFd) -> Option<End> {
    loop {
        match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                if let Wrote::End(why) = s.devices.write(port, data) {
                    return wanted(why);
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => s.devices.read(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => s.devices.read_address(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => s.devices.write_address(address, data),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {}
            Ok(VcpuExit::Unsupported(raw::EXIT_RING_FULL)) => {
                s.ring_full.fetch_add(1, Ordering::Relaxed);
                if let Err(e) = lock(&s.dirty).drain(vcpu.index as usize, true) {
                    return broken(e.to_string());
                }
            }
            Ok(VcpuExit::Shutdown) => return wanted("the guest shut down by a triple fault"),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return wanted(&format!("the guest shut down (event {kind})"));
            }
            Ok(VcpuExit::Hlt) => return wanted("the guest halted for good"),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return broken(format!("KVM cannot enter the guest (hardware reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => return broken(internal_error(fd)),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return broken(format!("the host has no memory for guest address {gpa:#x}"));
            }
            Ok(other) => return broken(format!("an exit nobody here knows: {other:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                // In this order: whoever stops it says so first, and calls then.
                vcpu.flag.set(0);
                if s.gate.stop.load(Ordering::SeqCst) {
                    return None;
                }
                if s.rings_on.load(Ordering::Acquire)
                    && let Err(e) = lock(&s.dirty).drain(vcpu.index as usize, false)
                {
                    return broken(e.to_string());
                }
            }
            Err(e) => return broken(format!("KVM_RUN: {}", std::io::Error::from(e))),
        }
    }
}

/// What KVM says when it cannot go on, with the instruction it cannot emulate if it tells.
fn internal_error(fd: &mut VcpuFd) -> String {
    let rip = fd.get_regs().map_or(0, |r| r.rip);
    // SAFETY: after KVM_EXIT_INTERNAL_ERROR this is the member of the union that KVM has filled; all are plain numbers.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let data: Vec<String> =
        internal.data.iter().take(internal.ndata as usize).map(|d| format!("{d:#x}")).collect();
    format!("KVM cannot go on at {rip:#x} (internal error {}: {})", internal.suberror, data.join(" "))
}
