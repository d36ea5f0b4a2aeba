//! Byte counters of ports in the lab, read every few milliseconds without starting a program each time: rates over short
//! windows.

use crate::net::{Host, Net};
use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a counter is read.
const EVERY: Duration = Duration::from_millis(25);

/// One port's counter over time: seconds since the common start, bytes sent.
#[derive(Debug, Clone, Default)]
pub struct Trace(pub Vec<(f64, u64)>);

impl Trace {
    /// Bytes sent by `at`, between two readings in proportion.
    #[must_use]
    pub fn bytes_at(&self, at: f64) -> f64 {
        let after = self.0.partition_point(|s| s.0 <= at);
        match (after.checked_sub(1).and_then(|i| self.0.get(i)), self.0.get(after)) {
            (Some(a), Some(b)) => a.1 as f64 + (b.1 - a.1) as f64 * (at - a.0) / (b.0 - a.0).max(1e-9),
            (Some(a), None) => a.1 as f64,
            (None, Some(b)) => b.1 as f64,
            (None, None) => 0.0,
        }
    }

    /// Bit/s between two times.
    #[must_use]
    pub fn rate(&self, from: f64, to: f64) -> f64 {
        (self.bytes_at(to) - self.bytes_at(from)) * 8.0 / (to - from).max(1e-9)
    }
}

/// Which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// The core link's end in the source rack: what crosses to the target rack.
    Core,
    /// A host's `eth0`.
    Host(Host),
}

/// Readers of a set of ports.
#[derive(Debug)]
pub struct Ports {
    stop: Arc<AtomicBool>,
    readers: Vec<JoinHandle<Result<Trace>>>,
}

impl Ports {
    /// Starts reading; all traces count from `start`.
    pub fn watch(net: &Net, ports: &[Port], start: Instant) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut readers = Vec::new();
        for port in ports {
            let (name, device) = match port {
                Port::Core => ("ssw".to_owned(), "core"),
                Port::Host(h) => (h.name(), "eth0"),
            };
            let file = net.namespace_file(&name);
            let namespace = File::open(&file).with_context(|| format!("open {}", file.display()))?;
            let halt = stop.clone();
            let read = move || -> Result<Trace> {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .context("enter a host's network")?;
                let mut out = Trace::default();
                while !halt.load(Ordering::Relaxed) {
                    out.0.push((start.elapsed().as_secs_f64(), sent(device)?));
                    std::thread::sleep(EVERY);
                }
                Ok(out)
            };
            readers.push(std::thread::Builder::new().name("ports".into()).spawn(read)?);
        }
        Ok(Self { stop, readers })
    }

    /// Stops, and gives the traces in the ports' order.
    pub fn end(self) -> Result<Vec<Trace>> {
        self.stop.store(true, Ordering::Relaxed);
        let all = self.readers.into_iter().map(|r| r.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        all.collect()
    }
}

/// Bytes sent by `device`, in the network of this thread.
fn sent(device: &str) -> Result<u64> {
    let text =
        std::fs::read_to_string("/proc/thread-self/net/dev").context("read /proc/thread-self/net/dev")?;
    let line = text.lines().find_map(|l| l.trim().strip_prefix(device)?.strip_prefix(':'));
    // Eight columns received, then bytes sent (proc_net_dev).
    let field =
        line.and_then(|l| l.split_whitespace().nth(8)).with_context(|| format!("no device {device}"))?;
    field.parse().with_context(|| format!("{device}: {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_between_readings_are_in_proportion() {
        let t = Trace(vec![(0.0, 0), (1.0, 1000), (2.0, 1000), (3.0, 4000)]);
        assert!((t.bytes_at(0.5) - 500.0).abs() < 1e-6);
        assert!((t.bytes_at(9.0) - 4000.0).abs() < 1e-6);
        assert!((t.rate(0.5, 2.5) - (2500.0 - 500.0) * 8.0 / 2.0).abs() < 1e-6);
        assert!(t.rate(4.0, 5.0).abs() < 1e-6);
        assert!(sent("lo").is_ok() && sent("nowhere0").is_err());
    }
}
