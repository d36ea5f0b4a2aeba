//! Virtio devices behind memory-mapped registers (virtio 1.2, section 4.2): what a Linux guest needs for a disk and a
//! network card. Queues are `virtio-queue`'s; here are the registers, the interrupt and the state of one device.
//!
//! A disk does what a guest asks for within the guest's write to the notification register, so a VM that stands still has
//! nothing under way. A card's frames come on a thread of its own, which writes nothing while the VM stands still. What
//! devices write into guest memory is noted as the VMM's own writes (`memory`), and a page that is not there yet is waited for
//! like by a vCPU.

use super::memory::Memory;
use super::{KvmError, Result, call};
use kvm_ioctls::VmFd;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use virtio_queue::{DescriptorChain, Queue, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

// Sectors of a file.
mod block;
// Frames of a TAP device.
mod net;

pub(super) use net::receive;

/// Guest memory as devices see it.
type Guest = GuestMemoryMmap<AtomicBitmap>;

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
}

/// What a device does with its queues.
enum Kind {
    Block(block::Block),
    Net(net::Net),
}

impl Kind {
    /// The device's number (section 5).
    fn number(&self) -> u32 {
        match self {
            Self::Net(_) => 1,
            Self::Block(_) => 2,
        }
    }
    fn features(&self) -> u64 {
        let own = match self {
            Self::Net(n) => n.features(),
            Self::Block(b) => b.features(),
        };
        own | INDIRECT | EVENT_IDX | VERSION_1
    }
    fn queues(&self) -> usize {
        match self {
            Self::Net(_) => 2,
            Self::Block(_) => 1,
        }
    }
    fn config(&self) -> [u8; block::CONFIG] {
        match self {
            Self::Net(n) => n.config(),
            Self::Block(b) => b.config(),
        }
    }
}

/// Why a queue cannot go on: the driver has broken the rules.
type Broken = virtio_queue::Error;

/// Does `work` with all that the driver has put up: the bytes written for each chain. Whether the driver wants to hear of it.
fn serve<'a>(
    queue: &mut Queue,
    guest: &'a Guest,
    mut work: impl FnMut(DescriptorChain<&'a Guest>) -> std::result::Result<u32, Broken>,
) -> std::result::Result<bool, Broken> {
    if !queue.is_valid(guest) {
        return Err(Broken::QueueNotReady);
    }
    let mut done = false;
    loop {
        queue.disable_notification(guest)?;
        while let Some(chain) = queue.pop_descriptor_chain(guest) {
            let head = chain.head_index();
            let written = work(chain)?;
            queue.add_used(guest, head, written)?;
            done = true;
        }
        // What came before notifications were on again is not told.
        if !queue.enable_notification(guest)? {
            break;
        }
    }
    Ok(done && queue.needs_notification(guest)?)
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
        let inner = Inner::new(kind)?;
        Ok(Self { gsi, line, memory: Arc::clone(memory), wake, inner: Mutex::new(inner) })
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
        // The configuration of these devices is not the driver's to write.
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else { return };
        let mut inner = self.inner();
        match offset {
            reg::NOTIFY => self.notified(&mut inner, word as usize),
            reg::STATUS if word == 0 => inner.reset(),
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

    /// The VM stands still, or no longer; `false` if the device still waits for a page after `within`.
    pub(super) fn stand_still(&self, still: bool, within: Duration) -> bool {
        let until = Instant::now() + within;
        loop {
            let mut inner = match self.inner.try_lock() {
                Ok(inner) => inner,
                Err(TryLockError::Poisoned(p)) => p.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(TryLockError::WouldBlock) => return false,
            };
            inner.still = still;
            if still && let Kind::Block(b) = &inner.kind {
                b.flush();
            }
            if !still {
                self.wake();
            }
            return true;
        }
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
    pub(super) fn load(&self, bytes: &[u8]) -> std::result::Result<(), String> {
        let mut inner = self.inner();
        let state = State::of(bytes).ok_or("no device has such a state")?;
        let (there, here) = ((state.number, state.identity), (inner.kind.number(), inner.identity()));
        if there != here {
            let name = |(number, id): (u32, u64)| match number {
                1 => format!("a card with address {:02x?}", &id.to_le_bytes()[..6]),
                _ => format!("a disk of {id} sectors"),
            };
            return Err(format!("it is of {}, and here is {}", name(there), name(here)));
        }
        if state.queues.len() != inner.kind.queues() {
            return Err("it has another number of queues".into());
        }
        let queue = |q: &QueueState| Queue::try_from(*q).map_err(|e| format!("a queue: {e}"));
        inner.queues = state.queues.iter().map(queue).collect::<std::result::Result<_, _>>()?;
        (inner.status, inner.features) = (state.status, state.features);
        [inner.features_sel, inner.driver_sel, inner.queue_sel, inner.interrupt, inner.generation] =
            state.words;
        drop(inner);
        Ok(())
    }
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

    /// What must be the same wherever the guest goes on.
    fn identity(&self) -> u64 {
        match &self.kind {
            Kind::Net(n) => n.mac(),
            Kind::Block(b) => b.sectors(),
        }
    }

    fn save(&self) -> Vec<u8> {
        let words = [self.features_sel, self.driver_sel, self.queue_sel, self.interrupt, self.generation];
        let queues = self.queues.iter().map(Queue::state).collect();
        let (number, identity) = (self.kind.number(), self.identity());
        State { number, identity, status: self.status, features: self.features, words, queues }.bytes()
    }
}

/// A device's state as it is saved (docs/vmm.md).
#[derive(PartialEq, Debug)]
struct State {
    number: u32,
    identity: u64,
    status: u32,
    features: u64,
    words: [u32; 5],
    queues: Vec<QueueState>,
}

/// Bytes before the queues, and of each.
const STATE: usize = 44;
const STATE_QUEUE: usize = 34;
/// Most queues a device has.
const MAX_QUEUES: usize = 2;

impl State {
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(STATE + STATE_QUEUE * MAX_QUEUES);
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.identity.to_le_bytes());
        out.extend_from_slice(&self.status.to_le_bytes());
        out.extend_from_slice(&self.features.to_le_bytes());
        self.words.iter().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
        for q in &self.queues {
            for n in [q.max_size, q.size, q.next_avail, q.next_used] {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.extend_from_slice(&[u8::from(q.ready), u8::from(q.event_idx_enabled)]);
            for at in [q.desc_table, q.avail_ring, q.used_ring] {
                out.extend_from_slice(&at.to_le_bytes());
            }
        }
        out
    }

    fn of(bytes: &[u8]) -> Option<Self> {
        let (head, queues) = bytes.split_at_checked(STATE)?;
        let (queues, rest) = queues.as_chunks::<STATE_QUEUE>();
        if !rest.is_empty() || queues.is_empty() || queues.len() > MAX_QUEUES {
            return None;
        }
        let word = |b: &[u8], at: usize| Some(u32::from_le_bytes(*b[at..].first_chunk()?));
        let long = |b: &[u8], at: usize| Some(u64::from_le_bytes(*b[at..].first_chunk()?));
        let short = |b: &[u8], at: usize| Some(u16::from_le_bytes(*b[at..].first_chunk()?));
        let flag = |b: u8| (b < 2).then_some(b == 1);
        let queue = |q: &[u8; STATE_QUEUE]| {
            Some(QueueState {
                max_size: short(q, 0)?,
                size: short(q, 2)?,
                next_avail: short(q, 4)?,
                next_used: short(q, 6)?,
                ready: flag(q[8])?,
                event_idx_enabled: flag(q[9])?,
                desc_table: long(q, 10)?,
                avail_ring: long(q, 18)?,
                used_ring: long(q, 26)?,
            })
        };
        let mut words = [0; 5];
        for (i, w) in words.iter_mut().enumerate() {
            *w = word(head, 24 + 4 * i)?;
        }
        Some(Self {
            number: word(head, 0)?,
            identity: long(head, 4)?,
            status: word(head, 12)?,
            features: long(head, 16)?,
            words,
            queues: queues.iter().map(queue).collect::<Option<_>>()?,
        })
    }
}

/// Whether bytes are a saved device.
pub(super) fn is_state(bytes: &[u8]) -> bool {
    State::of(bytes).is_some()
}

/// A state as no driver made it.
#[cfg(test)]
pub(super) fn made_up(n: u32) -> Vec<u8> {
    let queue =
        QueueState { max_size: QUEUE_SIZE, size: 64, ready: true, next_used: 7, ..QueueState::default() };
    let queues = vec![QueueState { desc_table: u64::from(n) << 12, ..queue }; n as usize % 2 + 1];
    State { number: 2, identity: n.into(), status: 15, features: 1 << 32, words: [0, 1, 0, 1, 0], queues }
        .bytes()
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
