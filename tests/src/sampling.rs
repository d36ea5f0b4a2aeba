//! Sampling measured on a guest whose writes are known ([`crate::payload`]): what each mode costs it, and whether what
//! is seen is what it does. The sampler is IRLM's own; the truth is the guest's count.

use crate::payload::{COUNTER, Payload};
use crate::qmp::Qmp;
use anyhow::{Context as _, Result, bail};
use irlm_user::core::units::{BlockIx, PAGE_SIZE, PageAddr};
use irlm_user::flow::Front;
use irlm_user::flow::source::observe::{self, Observation, Observed, Options, Subject};
use irlm_user::flow::source::prepare::Opened;
use irlm_user::host::dirty::{Sampler, Tracer};
use irlm_user::host::ram::GuestRam;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Guest memory, MiB: all that the payloads here write to is below.
const MIB: u32 = 144;
const WAIT: Duration = Duration::from_secs(60);

/// Every page once in a round that takes longer than the second in which QEMU clears a dirty ring.
#[must_use]
pub fn sweep() -> Payload {
    Payload { cold: 1024..33_000, hot: 0..0, ticks: 200_000, spin: 0 }
}

/// As many writes a second as the guest can do, but for an empty loop between them.
#[must_use]
pub fn full_speed(spin: u32) -> Payload {
    Payload { ticks: 0, spin, ..sweep() }
}

/// What a KVM is given that cannot do with a full dirty ring: fewer pages in the second between two clearings than fit.
const SAFE_RATE: f64 = 40_000.0;

/// The fastest guest that this machine's KVM can log, and a word on it. A software KVM was seen to let the ring overflow
/// when it fills, after which the guest never runs again.
pub fn fastest(qemu: &Path) -> Result<(Guest, String)> {
    let guest = Guest::start(qemu, &full_speed(0))?;
    let rate = guest.rate(Duration::from_secs(1))?;
    guest.log(2)?;
    std::thread::sleep(Duration::from_millis(1500));
    let logged = guest.rate(Duration::from_millis(500))?;
    if logged > 0.0 {
        guest.log_is_over()?;
        return Ok((guest, format!("full speed: {rate:.0} pages/s unlogged")));
    }
    drop(guest);
    let mut spin = 16;
    loop {
        let guest = Guest::start(qemu, &full_speed(spin))?;
        let slow = guest.rate(Duration::from_secs(1))?;
        if slow <= SAFE_RATE {
            let why = "this KVM does not survive a full dirty ring, so the guest is slowed by an empty loop";
            return Ok((guest, format!("{why} to {slow:.0} pages/s unlogged, from {rate:.0}")));
        }
        spin = (f64::from(spin) * (slow / SAFE_RATE).max(1.2)) as u32;
    }
}

/// 300 pages, each written several times a second, among others whose turn comes once.
#[must_use]
pub fn hot_set() -> Payload {
    Payload { cold: 1024..16_000, hot: 16_384..16_684, ticks: 1_500_000, spin: 0 }
}

/// Why sampling by the kernel cannot be measured here; the tracer if it can.
pub fn tracer() -> Result<Tracer, String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".into());
    }
    let tracer = Tracer::load(None);
    if tracer.best(true) != Sampler::Content {
        return Ok(tracer);
    }
    Err(tracer.tried().iter().find_map(|t| t.refused.clone()).unwrap_or_default())
}

/// A running payload with a KVM dirty ring; ends with the value.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    dir: PathBuf,
    ram: Arc<GuestRam>,
    block: usize,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

impl Guest {
    /// Starts `payload` under `qemu`; returns once it writes.
    pub fn start(qemu: &Path, payload: &Payload) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("irlm-payload-{}-{}", std::process::id(), payload.ticks));
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let (bios, socket) = (dir.join("bios"), dir.join("qmp"));
        std::fs::write(&bios, payload.image())?;
        // Whatever ends this program, ^C included, ends the guest.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(qemu)
            .args([
                "-accel",
                "kvm,dirty-ring-size=65536",
                "-M",
                "pc,memory-backend=m0",
                "-m",
                &MIB.to_string(),
            ])
            .args(["-object", &format!("memory-backend-memfd,id=m0,size={MIB}M,share=on")])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-serial",
                "none",
                "-monitor",
                "none",
            ])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .arg("-bios")
            .arg(&bios)
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("start {}", qemu.display()))?;
        let ram = Qmp::connect(&socket, WAIT).and_then(|mut qmp| {
            let mut hmp = |line: &str| -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
                let answer = qmp.run("human-monitor-command", &json!({ "command-line": line }))?;
                Ok(answer.as_str().unwrap_or_default().to_owned())
            };
            Ok(GuestRam::open(child.id(), &mut hmp)?)
        });
        // From here on dropping it cleans up.
        let nothing = Arc::new(GuestRam::default());
        let mut guest = Self { child, dir, ram: nothing, block: 0 };
        guest.ram = Arc::new(ram?);
        guest.block = guest.ram.find("m0").context("the guest has no memory m0")?;
        let until = Instant::now() + WAIT;
        while guest.written()? < 10_000 {
            if Instant::now() > until {
                bail!("the payload has written {} times in {WAIT:?}", guest.written()?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(guest)
    }

    /// How often it has written, by its own count.
    pub fn written(&self) -> Result<u32> {
        let mut page = [0; PAGE_SIZE];
        let at = COUNTER as usize;
        self.ram.read_at(self.block, (at / PAGE_SIZE) as u32, &mut page)?;
        let count = page.get(at % PAGE_SIZE..at % PAGE_SIZE + 4).and_then(|b| b.try_into().ok());
        count.map(u32::from_le_bytes).context("the counter is not in one page")
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// One of its pages, as the samplers name it.
    #[must_use]
    pub fn page(&self, page: u32) -> PageAddr {
        PageAddr { block: BlockIx(u16::try_from(self.block).unwrap_or(u16::MAX)), page }
    }

    /// Its writes a second, by its own count.
    fn rate(&self, time: Duration) -> Result<f64> {
        let (before, began) = (self.written()?, Instant::now());
        std::thread::sleep(time);
        Ok(f64::from(self.written()?.wrapping_sub(before)) / began.elapsed().as_secs_f64())
    }

    /// Turns its dirty log on for so many seconds.
    fn log(&self, seconds: u64) -> Result<()> {
        let how = json!({ "calc-time": seconds, "mode": "dirty-ring" });
        self.monitor()?.run("calc-dirty-rate", &how).map(drop)
    }

    /// Waits until the log is off again.
    fn log_is_over(&self) -> Result<()> {
        let mut qmp = self.monitor()?;
        let until = Instant::now() + WAIT;
        while qmp.run("query-dirty-rate", &json!({}))?["status"] != "measured" {
            if Instant::now() > until {
                bail!("QEMU does not end its measurement");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.join("qmp"), WAIT)
    }

    /// Watches it for `seconds`; its own writes a second meanwhile, and what was seen.
    pub fn observe(&self, tracer: &Tracer, seconds: u64, one_in: u32) -> Result<(f64, Arc<Observation>)> {
        let subject = Subject {
            name: "payload".into(),
            front: Front::Qmp(self.dir.join("qmp")),
            opened: Opened { ram: Some(self.ram.clone()), guest: None },
        };
        let options = Options { time: Duration::from_secs(seconds), one_in, log: true, setup: WAIT };
        let out = Observed::default();
        let (before, began) = (self.written()?, Instant::now());
        observe::observe(tracer, &[subject], &options, &AtomicBool::new(false), &out);
        let truth = f64::from(self.written()? - before) / began.elapsed().as_secs_f64();
        let seen = out.get(0).context("nothing was seen")?.map_err(anyhow::Error::msg)?;
        Ok((truth, seen))
    }
}

/// What the sampler does while the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No program is attached.
    Off,
    /// Attached for another VM.
    Other,
    /// Totals only.
    Totals,
    /// By region.
    Regions,
    /// By region, and each page one by one.
    Pages,
    /// One dirtying in 64 by region and page.
    OneIn64,
}

impl Mode {
    /// All, the cheapest first.
    pub const ALL: [Self; 6] =
        [Self::Off, Self::Other, Self::Totals, Self::Regions, Self::Pages, Self::OneIn64];

    /// For tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Other => "attached, another VM",
            Self::Totals => "totals",
            Self::Regions => "regions",
            Self::Pages => "regions and pages, 1 in 1",
            Self::OneIn64 => "regions and pages, 1 in 64",
        }
    }

    fn rate(self) -> (u32, bool) {
        match self {
            Self::Off | Self::Other | Self::Totals => (0, false),
            Self::Regions => (1, false),
            Self::Pages => (1, true),
            Self::OneIn64 => (64, true),
        }
    }
}

/// What a mode costs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Pages a second that the guest dirties.
    pub rate: f64,
    /// Nanoseconds a run of the program, by the kernel's own clock.
    pub nanos: f64,
    /// Dirtyings whose place was lost.
    pub lost: u64,
}

/// What a mode costs a guest whose dirty log is on.
pub fn cost(guest: &Guest, tracer: &Tracer, mode: Mode, time: Duration) -> Result<Cost> {
    guest.log(time.as_secs() + 2)?;
    let (one_in, pages) = mode.rate();
    tracer.set_rate(one_in, pages)?;
    let watched = match mode {
        Mode::Off => None,
        Mode::Other => Some(std::process::id()),
        _ => Some(guest.pid()),
    };
    if let Some(pid) = watched {
        tracer.watch(pid, tracer.best(true))?;
    }
    let over = AtomicBool::new(false);
    let runs = || tracer.runs().unwrap_or_default();
    let measured = std::thread::scope(|s| {
        s.spawn(|| {
            while pages && !over.load(Ordering::Relaxed) {
                tracer.drain(|_| {});
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        // The log is on everywhere, and the first writes after that are over.
        std::thread::sleep(Duration::from_millis(500));
        let before = runs();
        let rate = guest.rate(time);
        let after = runs();
        over.store(true, Ordering::Relaxed);
        rate.map(|rate| (rate, after.0 - before.0, after.1 - before.1))
    });
    let lost = tracer.totals(guest.pid()).map_or(0, |t| t.page_lost + t.region_lost);
    if let Some(pid) = watched {
        tracer.unwatch(pid);
    }
    guest.log_is_over()?;
    let (rate, count, nanos) = measured?;
    anyhow::ensure!(rate > 0.0, "the guest does not run any more");
    let nanos = if count == 0 { 0.0 } else { nanos.as_nanos() as f64 / count as f64 };
    Ok(Cost { rate, nanos, lost })
}
