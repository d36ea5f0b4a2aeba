//! What moving pages costs: processor time by stage, contents before and after compression, and at which levels. Counted
//! where the work is done, with one reading of the thread's clock where a stage ends, so that counting costs nothing to
//! speak of.

use crate::core::squeeze::LEVELS;
use crate::host::sched::thread_cpu;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where processor time goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Digests of pages.
    Hash,
    /// Compressing, the look at what is worth it included.
    Compress,
    /// Unpacking.
    Decompress,
    /// Finding similar pages and making differences from them, or pages of differences.
    Similar,
    /// Everything else: parsing, tables, sockets.
    Other,
}

const STAGES: usize = 5;
/// Places for raw and for each level.
const PLACES: usize = (*LEVELS.end() - *LEVELS.start() + 1) as usize;

/// Counters; shared by the threads that do the work.
#[derive(Debug)]
pub struct Work {
    cpu_ns: [AtomicU64; STAGES],
    /// Contents sent by level, bytes as they were; the place of level 0 is for raw ones.
    by_level: [AtomicU64; PLACES],
    /// Contents sent as they came from another host, bytes as they once were.
    passed_on: AtomicU64,
    /// What all of them came to on the wire.
    wire: AtomicU64,
    /// Nanoseconds that connections with contents were used by their senders, and of them those that the link held these up.
    used_ns: AtomicU64,
    held_ns: AtomicU64,
}

impl Default for Work {
    fn default() -> Self {
        let (cpu_ns, by_level) = ([const { AtomicU64::new(0) }; _], [const { AtomicU64::new(0) }; _]);
        let none = || AtomicU64::new(0);
        Self { cpu_ns, by_level, passed_on: none(), wire: none(), used_ns: none(), held_ns: none() }
    }
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Worked {
    /// Contents sent, bytes as they were.
    pub raw_bytes: u64,
    /// What they came to on the wire.
    pub wire_bytes: u64,
    /// `raw_bytes` by zstd level; 0: not compressed. The rest was passed on as it came.
    pub by_level: BTreeMap<i32, u64>,
    /// Of `raw_bytes`, what another host had compressed and was passed on as it came.
    pub passed_on: u64,
    /// Processor time by stage, in the order of [`Stage`].
    pub cpu: [Duration; STAGES],
}

impl Work {
    /// Contents of a frame went out: `squeezed` bytes of them at `level`, the rest raw, in `wire` bytes.
    pub fn sent(&self, level: i32, squeezed: usize, raw: usize, wire: usize) {
        let place = |level: i32| &self.by_level[(level - LEVELS.start()) as usize];
        place(level).fetch_add(squeezed as u64, Ordering::Relaxed);
        place(0).fetch_add((raw - squeezed) as u64, Ordering::Relaxed);
        self.wire.fetch_add(wire as u64, Ordering::Relaxed);
    }

    /// Contents of a frame that another host made went out as it came, in `wire` bytes.
    pub fn passed_on(&self, raw: usize, wire: usize) {
        self.passed_on.fetch_add(raw as u64, Ordering::Relaxed);
        self.wire.fetch_add(wire as u64, Ordering::Relaxed);
    }

    /// Another thread's processor time, for `stage`.
    pub fn spent(&self, stage: Stage, time: Duration) {
        self.cpu_ns[stage as usize].fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// A frame took so many seconds, of which the link held its sender up.
    pub fn took(&self, seconds: f64, held: f64) {
        let ns = |s: f64| Duration::try_from_secs_f64(s).unwrap_or_default().as_nanos() as u64;
        self.used_ns.fetch_add(ns(seconds), Ordering::Relaxed);
        self.held_ns.fetch_add(ns(held), Ordering::Relaxed);
    }

    /// Time that senders have used so far, and of it that which the link held them up.
    #[must_use]
    pub fn held(&self) -> (Duration, Duration) {
        let get = |n: &AtomicU64| Duration::from_nanos(n.load(Ordering::Relaxed));
        (get(&self.used_ns), get(&self.held_ns))
    }

    /// Contents sent so far: bytes as they were, and on the wire.
    #[must_use]
    pub fn contents(&self) -> (u64, u64) {
        let raw: u64 = self.by_level.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        (raw + self.passed_on.load(Ordering::Relaxed), self.wire.load(Ordering::Relaxed))
    }

    /// A snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Worked {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let by_level = LEVELS.zip(self.by_level.iter().map(get)).filter(|(_, n)| *n > 0).collect();
        let (raw_bytes, wire_bytes) = self.contents();
        let cpu = self.cpu_ns.each_ref().map(|n| Duration::from_nanos(get(n)));
        Worked { raw_bytes, wire_bytes, by_level, passed_on: get(&self.passed_on), cpu }
    }
}

/// One thread's clock.
#[derive(Debug)]
pub struct Laps(Duration);

impl Laps {
    /// Begins now, on the calling thread; only that thread may go on with it.
    #[must_use]
    pub fn begin() -> Self {
        Self(thread_cpu())
    }

    /// All of this thread's processor time since the last lap was for `stage`. Returns it.
    pub fn lap(&mut self, work: &Work, stage: Stage) -> Duration {
        let now = thread_cpu();
        let used = now.saturating_sub(std::mem::replace(&mut self.0, now));
        work.spent(stage, used);
        used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_divide_all_of_a_threads_time() {
        let work = Work::default();
        let (began, mut laps) = (thread_cpu(), Laps::begin());
        let mut spend = |stage, rounds: u64| {
            let mut x = rounds;
            for i in 0..rounds * 100_000 {
                x = std::hint::black_box(x.wrapping_mul(31).wrapping_add(i));
            }
            laps.lap(&work, stage)
        };
        spend(Stage::Hash, 20);
        spend(Stage::Compress, 200);
        let all = thread_cpu() - began;
        let [hash, compress, decompress, similar, other] = work.snapshot().cpu;
        assert!(compress > hash && hash > Duration::ZERO);
        assert_eq!((decompress, similar, other), Default::default());
        assert!(hash + compress <= all && (hash + compress) * 10 > all * 9);
    }

    #[test]
    fn levels_are_counted_where_they_belong() {
        let work = Work::default();
        work.sent(3, 8192, 12288, 5000);
        work.sent(-7, 4096, 4096, 4000);
        work.sent(19, 4096, 4096, 1000);
        work.passed_on(8192, 3000);
        let w = work.snapshot();
        assert_eq!((w.raw_bytes, w.wire_bytes, w.passed_on), (28672, 13000, 8192));
        assert_eq!(w.by_level, BTreeMap::from([(-7, 4096), (0, 4096), (3, 8192), (19, 4096)]));
    }
}
