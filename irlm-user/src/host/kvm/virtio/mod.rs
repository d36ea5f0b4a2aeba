//! Virtio devices behind memory-mapped registers (virtio 1.2, section 4.2): what a Linux guest needs for a disk, a network
//! card and a balloon. Queues are `virtio-queue`'s; here are the registers, the interrupt and the state of one device.
//!
//! A disk or a balloon does what a guest asks for within the guest's write to the notification register, so a VM that stands
//! still has nothing under way. A card's frames come on a thread of its own, which writes nothing while the VM stands still. What
//! devices write into guest memory is noted as the VMM's own writes (`memory`), and a page that is not there yet is waited for
//! like by a vCPU.

use super::memory::Memory;
use super::{KvmError, Result, call};
use kvm_ioctls::VmFd;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

// Pages that the guest gives back.
mod balloon;
// Sectors of a file.
mod block;
// The thread of a card.
pub(super) mod bring;
// Frames of a TAP device.
mod net;
// What every device does with a queue.
mod queue;
// A device as bytes.
mod state;

use queue::Broken;
use state::State;
pub(super) use state::is_state;
#[cfg(test)]
pub(super) use state::made_up;

/// Registers of the first device: in the hole that guest memory leaves for devices. Each has a page.
pub(super) const BASE: u64 = 0xd000_0000;
/// Length of a device's registers.
pub(super) const WINDOW: u64 = 0x1000;
/// Interrupt lines that nothing else has, one a device.
const LINES: [u32; 7] = [5, 6, 7, 9, 10, 11, 15];
/// Most devices of one VM.
pub(super) const MAX_DEVICES: usize = LINES.len();

/// What registers say of themselves: "virt", and the version without legacy registers.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Whose devices they are: "IRLM".
const VENDOR: u32 = 0x4d4c_5249;

/// Feature bits of every device (section 6): indirect descriptors, notifications only where they are wanted, and no legacy.
const INDIRECT: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// Bits of the status register (section 2.1).
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 0x40;
/// Bits of the interrupt status.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// Entries of a queue.
const QUEUE_SIZE: u16 = 256;

/// A device to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceSpec {
    /// A disk in a raw image file. A VM that is moved needs the same file at both hosts.
    Disk {
        /// The image; whole sectors of 512 bytes.
        path: PathBuf,
        /// The guest cannot write to it.
        read_only: bool,
    },
    /// A network card on a TAP device.
    Net {
        /// The TAP device's name; made if it does not exist.
        tap: String,
        /// Its address.
        mac: [u8; 6],
    },
    /// A balloon, of which one makes sense.
    Balloon,
}

/// What a balloon is about, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BalloonStatus {
    /// What the guest shall give.
    pub asked: u64,
    /// What it says it has given.
    pub given: u64,
    /// What was taken out of its memory since the start of the VMM, free pages that it reported included.
    pub released: u64,
}

/// What a device does with its queues.
enum Kind {
    Block(block::Block),
    Net(net::Net),
    Balloon(balloon::Balloon),
}

impl Kind {
    /// The device's number (section 5).
    fn number(&self) -> u32 {
        match self {
            Self::Net(_) => 1,
            Self::Block(_) => 2,
            Self::Balloon(_) => 5,
        }
    }
    fn features(&self) -> u64 {
        let own = match self {
            Self::Net(n) => n.features(),
            Self::Block(b) => b.features(),
            Self::Balloon(b) => b.features(),
        };
        own | INDIRECT | EVENT_IDX | VERSION_1
    }
    fn queues(&self) -> usize {
        match self {
            Self::Net(_) => 2,
            Self::Block(_) => 1,
            Self::Balloon(_) => balloon::QUEUES,
        }
    }
    fn config(&self) -> [u8; block::CONFIG] {
        match self {
            Self::Net(n) => n.config(),
            Self::Block(b) => b.config(),
            Self::Balloon(b) => b.config(),
        }
    }
}

/// What the driver has set, and what it cannot see.
struct Inner {
    kind: Kind,
    status: u32,
    features: u64,
    features_sel: u32,
    driver_sel: u32,
    queue_sel: u32,
    interrupt: u32,
    generation: u32,
    queues: Vec<Queue>,
    /// The VM stands still: nothing of it may change.
    still: bool,
}

/// One device.
pub(super) struct Device {
    gsi: u32,
    line: EventFd,
    memory: Arc<Memory>,
    /// Wakes the thread that brings a card's frames.
    wake: OwnedFd,
    /// Of a balloon, to be seen while the device waits for an agent.
    figures: Option<Arc<balloon::Figures>>,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device(line {})", self.gsi)
    }
}

impl Device {
    /// Device `n` of `vm`; it stands still.
    pub(super) fn new(spec: &DeviceSpec, n: usize, vm: Option<&VmFd>, memory: &Arc<Memory>) -> Result<Self> {
        let kind = match spec {
            DeviceSpec::Disk { path, read_only } => Kind::Block(block::Block::open(path, *read_only)?),
            DeviceSpec::Net { tap, mac } => Kind::Net(net::Net::open(tap, *mac)?),
            DeviceSpec::Balloon => Kind::Balloon(balloon::Balloon::new(memory)),
        };
        Self::of(kind, n, vm, memory)
    }

    fn of(kind: Kind, n: usize, vm: Option<&VmFd>, memory: &Arc<Memory>) -> Result<Self> {
        let gsi = *LINES.get(n).ok_or_else(|| KvmError::Not {
            what: format!("{} devices: up to {MAX_DEVICES} are possible", n + 1),
        })?;
        let fail = |source| KvmError::Call { what: "cannot make a device's interrupt", source };
        let line = EventFd::new(EFD_NONBLOCK).map_err(fail)?;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = eventfd(0, flags).map_err(|e| fail(e.into()))?;
        if let Some(vm) = vm {
            call("cannot connect a device's interrupt", vm.register_irqfd(&line, gsi))?;
        }
        let figures = match &kind {
            Kind::Balloon(b) => Some(Arc::clone(&b.figures)),
            _ => None,
        };
        let inner = Mutex::new(Inner::new(kind)?);
        Ok(Self { gsi, line, memory: Arc::clone(memory), wake, figures, inner })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a kernel's command line says of device `n` (Documentation/admin-guide/kernel-parameters: `virtio_mmio.device`).
    pub(super) fn parameter(n: usize) -> String {
        format!("virtio_mmio.device=4K@{:#x}:{}", BASE + n as u64 * WINDOW, LINES[n])
    }

    /// The guest reads a register.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.inner();
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            let config = inner.kind.config();
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            for (i, b) in data.iter_mut().enumerate() {
                *b = config.get(at.saturating_add(i)).copied().unwrap_or(0);
            }
        } else if data.len() == 4 {
            data.copy_from_slice(&inner.register(offset).to_le_bytes());
        } else {
            data.fill(0xff);
        }
    }

    /// The guest writes to a register.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else { return };
        let mut inner = self.inner();
        match offset {
            reg::NOTIFY => self.notified(&mut inner, word as usize),
            reg::STATUS if word == 0 => inner.reset(),
            // The configuration of the others is not the driver's to write.
            reg::CONFIG.. => {
                if let Kind::Balloon(b) = &inner.kind {
                    b.configure(offset - reg::CONFIG, word);
                }
            }
            _ => inner.set(offset, word),
        }
    }

    fn notified(&self, inner: &mut Inner, queue: usize) {
        if inner.still || inner.status & DRIVER_OK == 0 || inner.status & NEEDS_RESET != 0 {
            return;
        }
        let guest = self.memory.guest();
        let Inner { kind, queues, .. } = &mut *inner;
        let done = match (kind, queue) {
            (Kind::Block(b), 0) => b.serve(&mut queues[0], guest),
            (Kind::Net(n), net::SEND) => n.send(&mut queues[net::SEND], guest),
            (Kind::Balloon(b), balloon::INFLATE) => b.inflate(&mut queues[balloon::INFLATE], guest),
            (Kind::Balloon(b), balloon::DEFLATE) => b.deflate(&mut queues[balloon::DEFLATE], guest),
            (Kind::Balloon(b), balloon::REPORT) => b.report(&mut queues[balloon::REPORT], guest),
            (Kind::Net(_), net::RECEIVE) => {
                // There are buffers again.
                self.wake();
                return;
            }
            _ => return,
        };
        self.answer(inner, done);
    }

    /// Wakes the thread that brings a card's frames; a full counter means that it is awake.
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// After a queue was served: interrupts the driver if it wants that, or tells it that it has broken the rules.
    fn answer(&self, inner: &mut Inner, done: std::result::Result<bool, Broken>) {
        match done {
            Ok(false) => return,
            Ok(true) => inner.interrupt |= USED_BUFFER,
            Err(e) => {
                tracing::debug!("virtio device on line {}: the driver broke its queue: {e}", self.gsi);
                inner.status |= NEEDS_RESET;
                inner.interrupt |= CONFIG_CHANGE;
            }
        }
        // A full counter means that an interrupt is on its way already.
        let _ = self.line.write(1);
    }

    /// As [`Self::inner`], unless the device still waits for a page after `within`.
    fn inner_within(&self, within: Duration) -> Option<MutexGuard<'_, Inner>> {
        let until = Instant::now() + within;
        loop {
            match self.inner.try_lock() {
                Ok(inner) => return Some(inner),
                Err(TryLockError::Poisoned(p)) => return Some(p.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// The VM stands still, or no longer; `false` if the device still waits for a page after `within`.
    pub(super) fn stand_still(&self, still: bool, within: Duration) -> bool {
        let Some(mut inner) = self.inner_within(within) else { return false };
        inner.still = still;
        if still && let Kind::Block(b) = &inner.kind {
            b.flush();
        }
        if !still {
            self.wake();
        }
        true
    }

    /// Of a balloon: how much the guest shall give. Says why not, if it cannot be told.
    pub(super) fn ask_for(&self, bytes: u64, within: Duration) -> Result<()> {
        let Some(figures) = &self.figures else { return Err(not("the device is no balloon")) };
        let pages = u32::try_from(bytes / balloon::PAGE).ok();
        let pages = pages.filter(|_| bytes.is_multiple_of(balloon::PAGE) && bytes <= self.memory.bytes());
        let Some(pages) = pages else {
            let all = self.memory.bytes();
            return Err(not(format!(
                "{bytes} bytes: whole pages of 4 KiB are given, and all memory is {all} bytes"
            )));
        };
        let Some(mut inner) = self.inner_within(within) else {
            return Err(not("the balloon waits for a page, or for an agent that reads of pages given away"));
        };
        if inner.still {
            return Err(not("the VM stands still"));
        }
        figures.asked.store(pages, Ordering::Relaxed);
        inner.generation = inner.generation.wrapping_add(1);
        if inner.status & DRIVER_OK != 0 {
            inner.interrupt |= CONFIG_CHANGE;
            // A full counter means that an interrupt is on its way already.
            let _ = self.line.write(1);
        }
        Ok(())
    }

    /// Of a balloon: how it stands. Never waits.
    pub(super) fn balloon(&self) -> Option<BalloonStatus> {
        let f = self.figures.as_ref()?;
        let bytes = |pages: u64| pages * balloon::PAGE;
        Some(BalloonStatus {
            asked: bytes(f.asked.load(Ordering::Relaxed).into()),
            given: bytes(f.given.load(Ordering::Relaxed).into()),
            released: bytes(f.released.load(Ordering::Relaxed)),
        })
    }

    /// Whether frames come for it.
    pub(super) fn is_net(&self) -> bool {
        matches!(self.inner().kind, Kind::Net(_))
    }

    /// All that the guest has set, as bytes.
    pub(super) fn save(&self) -> Vec<u8> {
        self.inner().save()
    }

    /// As it was saved; an error leaves it as it is.
    pub(super) fn load(&self, bytes: &[u8]) -> Result<()> {
        let mut inner = self.inner();
        let state = State::of(bytes).ok_or_else(|| not("no device has such a state"))?;
        let (there, here) = ((state.number, state.identity), (inner.kind.number(), inner.identity()));
        let balloon = matches!(inner.kind, Kind::Balloon(_));
        if there != here && !(balloon && there.0 == here.0) {
            let name = |(number, id): (u32, u64)| match number {
                1 => format!("a card with address {:02x?}", &id.to_le_bytes()[..6]),
                5 => "a balloon".to_owned(),
                _ => format!("a disk of {id} sectors"),
            };
            return Err(not(format!("it is of {}, and here is {}", name(there), name(here))));
        }
        if state.queues.len() != inner.kind.queues() {
            return Err(not("it has another number of queues"));
        }
        let queue = |q: &QueueState| Queue::try_from(*q).map_err(|e| not(format!("a queue: {e}")));
        inner.queues = state.queues.iter().map(queue).collect::<Result<_>>()?;
        (inner.status, inner.features) = (state.status, state.features);
        [inner.features_sel, inner.driver_sel, inner.queue_sel, inner.interrupt, inner.generation] =
            state.words;
        if let Kind::Balloon(b) = &inner.kind {
            b.set_numbers(state.identity);
        }
        drop(inner);
        Ok(())
    }
}

fn not(what: impl Into<String>) -> KvmError {
    KvmError::Not { what: what.into() }
}

impl Inner {
    fn new(kind: Kind) -> Result<Self> {
        let queue =
            |_| Queue::new(QUEUE_SIZE).map_err(|e| KvmError::Not { what: format!("a device's queue: {e}") });
        let queues = (0..kind.queues()).map(queue).collect::<Result<_>>()?;
        Ok(Self {
            kind,
            status: 0,
            features: 0,
            features_sel: 0,
            driver_sel: 0,
            queue_sel: 0,
            interrupt: 0,
            generation: 0,
            queues,
            still: true,
        })
    }

    fn reset(&mut self) {
        self.queues.iter_mut().for_each(QueueT::reset);
        (self.status, self.features, self.interrupt) = (0, 0, 0);
        (self.features_sel, self.driver_sel, self.queue_sel) = (0, 0, 0);
        if let Kind::Balloon(b) = &self.kind {
            b.set_given(0);
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE => self.kind.number(),
            reg::VENDOR => VENDOR,
            reg::FEATURES => {
                self.kind.features().checked_shr(self.features_sel.saturating_mul(32)).unwrap_or(0) as u32
            }
            reg::QUEUE_MAX => self.queue().map_or(0, |q| u32::from(q.max_size())),
            reg::QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.ready())),
            reg::INTERRUPT => self.interrupt,
            reg::STATUS => self.status,
            reg::GENERATION => self.generation,
            // No shared memory: a length and an address of all ones.
            reg::SHM_FIRST..=reg::SHM_LAST => u32::MAX,
            _ => 0,
        }
    }

    fn set(&mut self, offset: u64, word: u32) {
        // Queues and features are set before the driver says that it is ready (section 3.1.1).
        let negotiating = self.status & FEATURES_OK == 0;
        let settling = self.status & DRIVER_OK == 0;
        match offset {
            reg::FEATURES_SEL => self.features_sel = word,
            reg::DRIVER_SEL => self.driver_sel = word,
            reg::DRIVER if negotiating => match self.driver_sel {
                0 => self.features = self.features & !0xffff_ffff | u64::from(word),
                1 => self.features = self.features & 0xffff_ffff | u64::from(word) << 32,
                _ => {}
            },
            reg::QUEUE_SEL => self.queue_sel = word,
            reg::ACK => self.interrupt &= !word,
            reg::STATUS => {
                // Features that the device does not have, or none but legacy ones, are not taken: the bit stays clear.
                let taken = self.features & !self.kind.features() == 0 && self.features & VERSION_1 != 0;
                self.status |= if taken { word } else { word & !FEATURES_OK };
            }
            _ if settling => {
                let events = self.features & EVENT_IDX != 0;
                let Some(q) = self.queues.get_mut(self.queue_sel as usize) else { return };
                match offset {
                    reg::QUEUE_NUM => q.set_size(u16::try_from(word).unwrap_or(0)),
                    reg::QUEUE_READY => {
                        q.set_event_idx(events);
                        q.set_ready(word == 1);
                    }
                    reg::DESC_LOW => q.set_desc_table_address(Some(word), None),
                    reg::DESC_HIGH => q.set_desc_table_address(None, Some(word)),
                    reg::AVAIL_LOW => q.set_avail_ring_address(Some(word), None),
                    reg::AVAIL_HIGH => q.set_avail_ring_address(None, Some(word)),
                    reg::USED_LOW => q.set_used_ring_address(Some(word), None),
                    reg::USED_HIGH => q.set_used_ring_address(None, Some(word)),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// What must be the same wherever the guest goes on; of a balloon what it is asked for and has given.
    fn identity(&self) -> u64 {
        match &self.kind {
            Kind::Net(n) => n.mac(),
            Kind::Block(b) => b.sectors(),
            Kind::Balloon(b) => b.numbers(),
        }
    }

    fn save(&self) -> Vec<u8> {
        let words = [self.features_sel, self.driver_sel, self.queue_sel, self.interrupt, self.generation];
        let queues = self.queues.iter().map(Queue::state).collect();
        let (number, identity) = (self.kind.number(), self.identity());
        State { number, identity, status: self.status, features: self.features, words, queues }.bytes()
    }
}

/// Registers by their offset (section 4.2.2).
mod reg {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE: u64 = 0x008;
    pub(super) const VENDOR: u64 = 0x00c;
    pub(super) const FEATURES: u64 = 0x010;
    pub(super) const FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER: u64 = 0x020;
    pub(super) const DRIVER_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT: u64 = 0x060;
    pub(super) const ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const DESC_LOW: u64 = 0x080;
    pub(super) const DESC_HIGH: u64 = 0x084;
    pub(super) const AVAIL_LOW: u64 = 0x090;
    pub(super) const AVAIL_HIGH: u64 = 0x094;
    pub(super) const USED_LOW: u64 = 0x0a0;
    pub(super) const USED_HIGH: u64 = 0x0a4;
    pub(super) const SHM_FIRST: u64 = 0x0b0;
    pub(super) const SHM_LAST: u64 = 0x0bc;
    pub(super) const GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

#[cfg(test)]
mod tests;
