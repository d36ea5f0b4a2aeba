//! A balloon (virtio 1.2, section 5.5): pages that the guest gives are taken out of its memory files and the host has them;
//! touched again they are zeros. Inflation, deflation (nothing to do: a page comes with its touch) and reports of free pages.
//!
//! Pages go by madvise on the VMM's own mapping, because only that is told of on a userfaultfd: while pages still come
//! the vCPU that gives waits until the agent has read of it, as for a page that is lacking.

use super::super::memory::Memory;
use super::block;
use super::queue::{Broken, Guest, serve};
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use virtio_queue::Queue;

/// The queues' numbers. Without statistics and hints the queue of reports is the third, as Linux counts them.
pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;
pub(super) const REPORT: usize = 2;
pub(super) const QUEUES: usize = 3;

/// Features: the guest may take pages back before it runs out of memory; free pages are reported.
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;
/// Of the unit in which the device counts, whatever the host's pages are.
pub(super) const PAGE: u64 = 4096;
/// Page numbers that are taken in at a time; Linux puts up 256.
const AT_ONCE: usize = 1024;
/// Where the driver says in the configuration how many pages it has given.
const ACTUAL: u64 = 4;

/// What whoever runs the VM may see and say at any time.
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// Pages that the guest shall give.
    pub(super) asked: AtomicU32,
    /// Pages that it says it has given.
    pub(super) given: AtomicU32,
    /// Pages taken out of its memory since the start, by either way.
    pub(super) released: AtomicU64,
}

pub(super) struct Balloon {
    memory: Arc<Memory>,
    pub(super) figures: Arc<Figures>,
    numbers: Vec<u32>,
}

impl Balloon {
    pub(super) fn new(memory: &Arc<Memory>) -> Self {
        Self { memory: Arc::clone(memory), figures: Arc::default(), numbers: Vec::new() }
    }

    pub(super) fn features(&self) -> u64 {
        DEFLATE_ON_OOM | REPORTING
    }

    pub(super) fn config(&self) -> [u8; block::CONFIG] {
        let mut out = [0; block::CONFIG];
        out[..4].copy_from_slice(&self.figures.asked.load(Ordering::Relaxed).to_le_bytes());
        out[4..8].copy_from_slice(&self.figures.given.load(Ordering::Relaxed).to_le_bytes());
        out
    }

    /// The driver writes to the configuration.
    pub(super) fn configure(&self, offset: u64, word: u32) {
        if offset == ACTUAL {
            self.set_given(word);
        }
    }

    pub(super) fn set_given(&self, pages: u32) {
        self.figures.given.store(pages, Ordering::Relaxed);
    }

    /// What goes where the VM goes, in eight bytes.
    pub(super) fn numbers(&self) -> u64 {
        let of = |n: &AtomicU32| u64::from(n.load(Ordering::Relaxed));
        of(&self.figures.asked) | of(&self.figures.given) << 32
    }

    pub(super) fn set_numbers(&self, numbers: u64) {
        self.figures.asked.store(numbers as u32, Ordering::Relaxed);
        self.set_given((numbers >> 32) as u32);
    }

    /// Takes all pages whose numbers the driver has put up; whether it wants to hear of it.
    pub(super) fn inflate(&mut self, queue: &mut Queue, guest: &Guest) -> Result<bool, Broken> {
        serve(queue, guest, |chain| {
            let mut from = chain.reader(guest)?;
            while from.available_bytes() >= 4 {
                self.numbers.clear();
                while self.numbers.len() < AT_ONCE && from.available_bytes() >= 4 {
                    let mut number = [0; 4];
                    from.read_exact(&mut number).map_err(|_| Broken::InvalidChain)?;
                    self.numbers.push(u32::from_le_bytes(number));
                }
                // Neighbours go together: each call may wait for the agent.
                self.numbers.sort_unstable();
                for run in self.numbers.chunk_by(|a, b| b - a <= 1) {
                    let [first, .., last] = run else {
                        self.release(u64::from(run[0]) * PAGE, PAGE);
                        continue;
                    };
                    self.release(u64::from(*first) * PAGE, u64::from(last - first + 1) * PAGE);
                }
            }
            Ok(0)
        })
    }

    /// Pages that the guest takes back are there when it touches them.
    pub(super) fn deflate(&mut self, queue: &mut Queue, guest: &Guest) -> Result<bool, Broken> {
        serve(queue, guest, |_| Ok(0))
    }

    /// The buffers of a report are the free pages themselves, which the guest does not use until it is answered.
    pub(super) fn report(&mut self, queue: &mut Queue, guest: &Guest) -> Result<bool, Broken> {
        serve(queue, guest, |chain| {
            for part in chain {
                self.release(part.addr().0, part.len().into());
            }
            Ok(0)
        })
    }

    fn release(&self, at: u64, bytes: u64) {
        match self.memory.release(at, bytes) {
            Ok(pages) => {
                self.figures.released.fetch_add(pages, Ordering::Relaxed);
            }
            // The guest has lost nothing by it.
            Err(e) => tracing::debug!("balloon: {bytes} bytes at {at:#x}: {e}"),
        }
    }
}
