//! Reads the memory of a VM that stands still, and says what it comes to (`core::ram`), at memory speed: it is downtime.
//!
//! Some threads take pieces of 1 MiB in turn, read each into a buffer of their own, and sum it up. Holes are passed over, so
//! memory that the guest never touched is neither read nor made. Nothing is allocated a page.
//!
//! Bound: [`THREADS`] threads and as many MiB a VM, for as long as it is read.

use super::{HEARTBEAT, MoveError, lock};
use crate::core::account::Marker;
use crate::core::ram::{self, Block, Ram, Stripes};
use crate::core::units::PAGE_SIZE;
use crate::host::ram::{DataRanges, GuestRam};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Most threads that read one VM.
const THREADS: usize = 8;
/// Pages of a piece.
const PIECE: u32 = 256;

/// A VM that is being read; dropping it ends the reading.
#[derive(Debug)]
pub(super) struct Reading(Arc<AtomicBool>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Reading {
    /// Reads on threads of its own, of which `done` is told at the end; `meanwhile` is called at least each [`HEARTBEAT`].
    pub(super) fn start(
        name: &str,
        (memory, marker): (Arc<GuestRam>, Marker),
        meanwhile: impl Fn() + Send + 'static,
        done: impl FnOnce(Result<Ram, MoveError>) + Send + 'static,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let own = stop.clone();
        std::thread::Builder::new()
            .name(format!("irlm-ram-{name}"))
            .spawn(move || done(read(&memory, &marker, &own, &meanwhile)))?;
        Ok(Self(stop))
    }
}

/// What the pieces are taken from.
struct Pieces<'a> {
    memory: &'a GuestRam,
    block: usize,
    ranges: DataRanges<'a>,
    left: Range<u32>,
}

impl<'a> Pieces<'a> {
    fn new(memory: &'a GuestRam) -> Self {
        Self { memory, block: 0, ranges: memory.data_ranges(0), left: 0..0 }
    }
}

impl Iterator for Pieces<'_> {
    type Item = (usize, Range<u32>);

    fn next(&mut self) -> Option<Self::Item> {
        while self.left.is_empty() {
            match self.ranges.next() {
                Some(range) => self.left = range,
                None if self.block < self.memory.blocks().len() => {
                    self.block += 1;
                    self.ranges = self.memory.data_ranges(self.block);
                }
                None => return None,
            }
        }
        let end = self.left.end.min(self.left.start + PIECE);
        let piece = self.left.start..end;
        self.left.start = end;
        Some((self.block, piece))
    }
}

/// Reads all that can be read.
fn read(
    memory: &GuestRam,
    marker: &Marker,
    stop: &AtomicBool,
    meanwhile: &impl Fn(),
) -> Result<Ram, MoveError> {
    let started = Instant::now();
    let mut sums = vec![Stripes::default(); memory.blocks().len()];
    let pieces = Mutex::new(Pieces::new(memory));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let (tx, rx) = channel();
    std::thread::scope(|s| {
        for _ in 0..threads {
            let (pieces, tx) = (&pieces, tx.clone());
            s.spawn(move || work(memory, marker, pieces, stop, &tx));
        }
        drop(tx);
        loop {
            match rx.recv_timeout(HEARTBEAT / 2) {
                Ok(Ok(parts)) => sums.iter_mut().zip(&parts).for_each(|(sum, part)| ram::merge(sum, part)),
                Ok(Err(e)) => {
                    stop.store(true, Ordering::Relaxed);
                    break Err(e);
                }
                Err(RecvTimeoutError::Timeout) => meanwhile(),
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
            }
        }
    })?;
    let mut out = Ram::default();
    for (info, sums) in memory.blocks().iter().zip(sums) {
        if info.readable() {
            out.blocks.push(Block { name: info.name.clone(), pages: info.pages(), sums });
        } else {
            out.unread += u64::from(info.pages());
        }
    }
    out.took_ms = u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX);
    tracing::debug!("read {} blocks in {} ms with {threads} threads", out.blocks.len(), out.took_ms);
    Ok(out)
}

fn work(
    memory: &GuestRam,
    marker: &Marker,
    pieces: &Mutex<Pieces<'_>>,
    stop: &AtomicBool,
    tell: &Sender<Result<Vec<Stripes>, MoveError>>,
) {
    let mut sums = vec![Stripes::default(); memory.blocks().len()];
    let mut buf = vec![0; PIECE as usize * PAGE_SIZE];
    loop {
        if stop.load(Ordering::Relaxed) {
            let _ = tell.send(Err(MoveError::refused("its reading was ended")));
            return;
        }
        // The lock is not held over the reading.
        let next = lock(pieces).next();
        let Some((block, piece)) = next else { break };
        let bytes = &mut buf[..piece.len() * PAGE_SIZE];
        if let Err(e) = memory.read_at(block, piece.start, bytes) {
            let _ = tell.send(Err(MoveError::from(e)));
            return;
        }
        ram::add(&mut sums[block], marker, piece.start, bytes.as_chunks().0);
    }
    let _ = tell.send(Ok(sums));
}

#[cfg(test)]
mod tests;
