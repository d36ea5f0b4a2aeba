//! Lines from the programs, taken to the log of this process on a thread of their own. Both ends keep a budget: the
//! programs per CPU (`Events::log_suppressed` counts what they held back), this end over all.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Map, MapData, PerCpuArray};
use aya_log::EbpfLogger;
use irlm_common::{EVENTS_MAP, Events};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Lines a second; with many CPUs the programs' own budgets add up to more.
const LINES_A_SECOND: u32 = 10;

/// A running reader of the programs' lines. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Reader {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Must be called before the programs are loaded, with their maps still in `ebpf`.
    pub(super) fn start(ebpf: &mut Ebpf, iface: &str) -> std::io::Result<Self> {
        let events = suppressed_by(ebpf);
        let logger = EbpfLogger::init_with_logger(ebpf, Budget::new(iface));
        let logger = logger.map_err(std::io::Error::other)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let told = stop.try_clone()?;
        let iface = iface.to_owned();
        let thread = thread::Builder::new()
            .name("irlm-bpf-lines".into())
            .spawn(move || read(logger, &told, events.as_ref(), &iface))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// A handle of its own to the counters that say what the programs held back.
fn suppressed_by(ebpf: &Ebpf) -> Option<PerCpuArray<MapData, Events>> {
    let Map::PerCpuArray(map) = ebpf.map(EVENTS_MAP)? else { return None };
    PerCpuArray::try_from(super::tables::by_id(map.info().ok()?.id()).ok()?).ok()
}

fn read(
    mut logger: EbpfLogger<Budget>,
    stop: &OwnedFd,
    events: Option<&PerCpuArray<MapData, Events>>,
    iface: &str,
) {
    let held_back = || {
        let cpus = events?.get(&0, 0).ok()?;
        Some(cpus.iter().map(|cpu| cpu.log_suppressed).sum::<u64>())
    };
    let mut said = held_back().unwrap_or(0);
    let mut recent = false;
    loop {
        let (lines, stopped) = {
            let mut both =
                [PollFd::new(&logger, PollFlags::IN), PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
            // After a line there may be more to say of those that were held back.
            let pause = Timespec { tv_sec: 1, tv_nsec: 0 };
            match poll(&mut both, recent.then_some(&pause)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            (!both[0].revents().is_empty(), !both[1].revents().is_empty())
        };
        if stopped {
            return;
        }
        recent = lines;
        if lines {
            logger.flush();
            // The programs wake us for each line; a pause makes a batch of what comes together.
            thread::sleep(Duration::from_millis(100));
        }
        let now = held_back().unwrap_or(said);
        if now > said {
            tracing::warn!(iface, "eBPF: {} more lines held back by the programs' own budget", now - said);
            said = now;
        }
    }
}

/// Passes lines on to `tracing`, so many a second.
#[derive(Debug)]
struct Budget {
    iface: String,
    state: Mutex<Second>,
}

#[derive(Debug)]
struct Second {
    since: Instant,
    lines: u32,
    dropped: u64,
}

impl Second {
    /// Whether a line may go now, and how many did not since the last second with any.
    fn take(&mut self, now: Instant) -> (bool, u64) {
        let mut dropped = 0;
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            dropped = std::mem::take(&mut self.dropped);
            (self.since, self.lines) = (now, 0);
        }
        let may = self.lines < LINES_A_SECOND;
        if may {
            self.lines += 1;
        } else {
            self.dropped += 1;
        }
        (may, dropped)
    }
}

impl Budget {
    fn new(iface: &str) -> Self {
        let state = Mutex::new(Second { since: Instant::now(), lines: 0, dropped: 0 });
        Self { iface: iface.to_owned(), state }
    }
}

impl log::Log for Budget {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let (may, dropped) = self.state.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        let iface = &*self.iface;
        if dropped > 0 {
            tracing::warn!(iface, "eBPF: {dropped} lines of the programs not shown");
        }
        if !may {
            return;
        }
        match record.level() {
            log::Level::Error => tracing::error!(iface, "eBPF: {}", record.args()),
            log::Level::Warn => tracing::warn!(iface, "eBPF: {}", record.args()),
            log::Level::Info => tracing::info!(iface, "eBPF: {}", record.args()),
            _ => tracing::debug!(iface, "eBPF: {}", record.args()),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::{LINES_A_SECOND, Second};
    use std::time::{Duration, Instant};

    #[test]
    fn lines_beyond_the_budget_are_counted_and_said_in_the_next_second() {
        let start = Instant::now();
        let mut second = Second { since: start, lines: 0, dropped: 0 };
        for n in 0..LINES_A_SECOND + 7 {
            assert_eq!(second.take(start), (n < LINES_A_SECOND, 0));
        }
        assert_eq!(second.take(start + Duration::from_millis(999)), (false, 0));
        assert_eq!(second.take(start + Duration::from_millis(1001)), (true, 8));
        assert_eq!(second.take(start + Duration::from_millis(1002)), (true, 0));
    }
}
