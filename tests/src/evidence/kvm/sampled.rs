//! What the eBPF sampler on the dirty ring sees, held against what the ring itself reports.

use super::super::{Point, at_most, unmeasured};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::steps::Steps;
use irlm_user::host::dirty::{Sampler, Tracer};
use irlm_user::net::vmm::Vmm;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(10);
/// Looks at both, a third of a second each.
const LOOKS: usize = 6;
const LOOK: Duration = Duration::from_millis(300);

/// Ends the VMM with everything it made.
struct Guest {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    fn start(irlm: &Path) -> Result<(Self, Vmm)> {
        let dir = tempfile::tempdir()?;
        let (socket, payload) = (dir.path().join("control"), dir.path().join("payload"));
        let work = Steps { vcpus: 2, first: 4096, pages: 2003, stride: 701, spin: 2000 };
        std::fs::write(&payload, work.image())?;
        // Whatever ends this program, ^C included, ends the guest.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(irlm)
            .args(["vmm", "--memory", "64M", "--vcpus", "2", "--serial", "none", "--dirty", "ring=4096"])
            .arg("--control")
            .arg(&socket)
            .arg("--payload")
            .arg(&payload)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start irlm vmm")?;
        let guest = Self { child, dir };
        let until = Instant::now() + WAIT;
        loop {
            match Vmm::connect(guest.dir.path().join("control"), WAIT) {
                Ok(vmm) => return Ok((guest, vmm)),
                Err(e) if Instant::now() > until => return Err(e).context("the VMM's control socket"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Pages that only one of the two saw, of all that the ring reported.
pub(super) fn same_set(points: &mut Vec<Point>, irlm: &Path) -> Result<()> {
    let what = "pages that the ring or the sampler alone saw, by those that the ring reported";
    let tracer = Tracer::load(None);
    if let Some(why) =
        tracer.tried().iter().find(|t| t.sampler == Sampler::Ring).and_then(|t| t.refused.clone())
    {
        return unmeasured(points, "7-sampling", what, &why);
    }
    tracer.set_rate(1, true)?;
    let (guest, mut vmm) = Guest::start(irlm)?;
    let pid = guest.child.id();
    let (mut ring, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let mut apart = 0;
    tracer.watch(pid, Sampler::Ring)?;
    vmm.dirty_start()?;
    for _ in 0..LOOKS {
        let until = Instant::now() + LOOK;
        let mut now = BTreeSet::new();
        let drain = |now: &mut BTreeSet<u64>| {
            tracer.drain(|e| {
                if e.tgid == pid {
                    now.insert(e.page);
                }
            });
        };
        while Instant::now() < until {
            drain(&mut now);
            std::thread::sleep(Duration::from_millis(5));
        }
        // Nothing is written between the end of one look and the end of the other.
        vmm.pause()?;
        let mut bits = Vec::new();
        vmm.dirty_harvest(&mut bits)?;
        drain(&mut now);
        ensure!(bits.len() == 1, "{} slots", bits.len());
        let pages: BTreeSet<u64> = (0..)
            .zip(bits.iter().flatten())
            .flat_map(|(i, w): (u64, &u64)| {
                (0..64).filter(move |b| w & (1 << b) != 0).map(move |b| i * 64 + b)
            })
            .collect();
        apart += pages.symmetric_difference(&now).count();
        ring.extend(pages);
        seen.extend(now);
        vmm.resume()?;
    }
    let lost = tracer.totals(pid).map_or(0, |t| t.page_lost);
    tracer.unwatch(pid);
    let lost_by_ring = vmm.status()?.ring_lost;
    let how = format!(
        "irlm vmm with 2 vCPUs that write pages in no order and a ring of 4096, {LOOKS} looks of {} ms at both: the ring reported {} \
         different pages, the sampler {}; the sampler lost {lost} events, the ring overflowed {lost_by_ring} times",
        LOOK.as_millis(),
        ring.len(),
        seen.len()
    );
    ensure!(!ring.is_empty(), "the guest wrote nothing");
    at_most(points, "7-sampling", what, &how, apart as f64 / ring.len() as f64, 0.0)
}
