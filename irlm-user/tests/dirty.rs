//! The samplers against guests whose writes are known: a real QEMU on KVM with a dirty ring, its firmware replaced by a
//! payload that counts its own writes (`tests/src/payload.rs`). And the loader on kernels that refuse.
//!
//! `IRLM_QEMU` names the QEMU; else `qemu-system-x86_64` in PATH, else one from the cache. Without QEMU, KVM, the object
//! or the kernel's leave the reason is printed and the test passes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

#[path = "../../tests/src/payload.rs"]
#[expect(unreachable_pub, reason = "the lab has it as a public module")]
mod payload;

use irlm_user::core::units::{BlockIx, PAGE_SIZE, PageAddr};
use irlm_user::flow::Front;
use irlm_user::flow::source::observe::{self, Observation, Observed, Options, Subject};
use irlm_user::flow::source::prepare::Opened;
use irlm_user::host::dirty::{OBJECT, Sampler, Tracer};
use irlm_user::host::ram::GuestRam;
use irlm_user::net::qmp::Qmp;
use payload::{COUNTER, Payload};
use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Guest memory, MiB.
const MIB: u32 = 144;
const WAIT: Duration = Duration::from_secs(20);

fn qemu() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("IRLM_QEMU") {
        return Some(named.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cache = std::env::var_os("IRLM_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/irlm")));
    std::env::split_paths(&path)
        .map(|d| d.join("qemu-system-x86_64"))
        .chain(cache.map(|c| c.join("qemu-10.0/qemu")))
        .find(|p| p.exists())
}

/// One at a time: a software KVM shares few processors, and the rates are measured.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running payload; dies with the value.
struct Guest {
    child: Child,
    dir: tempfile::TempDir,
    ram: Arc<GuestRam>,
    block: usize,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Guest {
    /// `None`, with the reason printed, where it cannot run.
    fn start(accel: &str, payload: &Payload) -> Option<Self> {
        let Some(qemu) = qemu() else {
            println!("skipped: no QEMU in PATH or the cache, and IRLM_QEMU is not set");
            return None;
        };
        if accel.starts_with("kvm") && !std::path::Path::new("/dev/kvm").exists() {
            println!("skipped: no /dev/kvm");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let bios = dir.path().join("bios");
        std::fs::write(&bios, payload.image()).unwrap();
        let qmp = dir.path().join("qmp");
        let memory = format!("memory-backend-memfd,id=m0,size={MIB}M,share=on");
        let mut child = Command::new(qemu)
            .args(["-accel", accel, "-M", "pc,memory-backend=m0", "-m", &MIB.to_string(), "-object", &memory])
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-serial",
                "none",
                "-monitor",
                "none",
                "-no-user-config",
            ])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .arg("-bios")
            .arg(bios)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let until = Instant::now() + WAIT;
        let mut monitor = loop {
            if let Some(status) = child.try_wait().unwrap() {
                let mut said = String::new();
                std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
                println!("skipped: QEMU does not start with -accel {accel}: {status}: {}", said.trim());
                return None;
            }
            match Qmp::connect(&qmp, Duration::from_secs(2)) {
                Ok(m) => break m,
                Err(e) => assert!(Instant::now() < until, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let ram = GuestRam::open(child.id(), &mut |line| monitor.hmp(line).map_err(Into::into)).unwrap();
        let block = ram.find("m0").expect("the guest's memory");
        let guest = Self { child, dir, ram: Arc::new(ram), block };
        // Under way; where its writes are slow, not all of its memory is there yet.
        let all = 10_000;
        let until = Instant::now() + 6 * WAIT;
        while guest.written() < all {
            assert!(Instant::now() < until, "the payload has written {} of {all} times", guest.written());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(guest)
    }

    /// How often it has written, by its own count.
    fn written(&self) -> u32 {
        let mut page = [0; PAGE_SIZE];
        let at = COUNTER as usize;
        self.ram.read_at(self.block, (at / PAGE_SIZE) as u32, &mut page).unwrap();
        u32::from_le_bytes(page[at % PAGE_SIZE..][..4].try_into().unwrap())
    }

    fn subject(&self) -> Subject {
        Subject {
            name: "payload".into(),
            front: Front::Qmp(self.dir.path().join("qmp")),
            opened: Opened { ram: Some(self.ram.clone()), guest: None },
        }
    }

    fn page(&self, page: u32) -> PageAddr {
        PageAddr { block: BlockIx(self.block as u16), page }
    }
}

fn options(seconds: u64, one_in: u32) -> Options {
    Options { time: Duration::from_secs(seconds), one_in, log: true, setup: WAIT }
}

/// Observes one guest; its own rate, writes a second, beside what was seen.
fn watch(tracer: &Tracer, guest: &Guest, o: &Options) -> (f64, Arc<Observation>) {
    let out = Observed::default();
    let (before, began) = (guest.written(), Instant::now());
    observe::observe(tracer, &[guest.subject()], o, &AtomicBool::new(false), &out);
    let rate = f64::from(guest.written() - before) / began.elapsed().as_secs_f64();
    (rate, out.get(0).expect("an interval is over").expect("it is observed"))
}

/// The tracer, if the kernel has a sampler for VMs with a dirty ring.
fn tracer() -> Option<Tracer> {
    let tracer = Tracer::load(None);
    for t in tracer.tried() {
        println!("{}: {}", t.sampler.name(), t.refused.as_deref().unwrap_or("works"));
    }
    if tracer.best(true) == Sampler::Content {
        let why = tracer.tried().iter().find_map(|t| t.refused.clone()).unwrap_or_default();
        println!("skipped: no sampler in this kernel: {why}");
        return None;
    }
    Some(tracer)
}

const KVM: &str = "kvm,dirty-ring-size=4096";
/// Every page once in a round that is longer than the second in which QEMU clears the ring.
fn sweep() -> Payload {
    Payload { cold: 1024..33_000, hot: 0..0, ticks: 200_000, spin: 0 }
}

#[test]
fn the_kernel_s_count_is_the_guest_s_own() {
    let _alone = alone();
    let Some(tracer) = tracer() else { return };
    let Some(guest) = Guest::start(KVM, &sweep()) else { return };
    for one_in in [1, 16] {
        let (truth, seen) = watch(&tracer, &guest, &options(5, one_in));
        let rate = seen.heat.dirty_rate();
        println!("1 in {one_in}: guest {truth:.0}/s, {} {rate:.0}/s, {:?}", seen.sampler.name(), seen.totals);
        assert!((rate / truth - 1.0).abs() < 0.10, "{rate} instead of {truth}");
        assert_eq!((seen.totals.region_lost, seen.totals.page_lost, seen.unplaced), (0, 0, 0));
        let t = seen.totals;
        let wanted = t.seen as f64 / f64::from(one_in);
        assert!((t.sampled as f64 - wanted).abs() <= 5.0 * wanted.sqrt() + 2.0, "{t:?}");
        // All that was written to lies where the payload writes, or where it counts.
        for (r, _) in seen.heat.hot_regions() {
            let from = r.region * 512;
            assert!((from + 512 > 1024 && from < 33_000) || from == 0, "{r:?}");
        }
        if one_in == 1 {
            let w = seen.writes();
            println!("distinct {:.0}, {w:?}", seen.heat.distinct());
            // It writes to each page once before it comes to the first again, and its counter is one more.
            let most = f64::from(sweep().cold.end - sweep().cold.start) + 1.0;
            let distinct = (truth * seen.heat.observed()).min(most);
            assert!((seen.heat.distinct() / distinct - 1.0).abs() < 0.10, "not {distinct}");
        }
    }
    assert_eq!(tracer.missed().unwrap_or(0), 0);
    // Nobody is watched any more.
    assert_eq!(tracer.totals(guest.child.id()), None);
}

#[test]
fn the_hot_set_is_found() {
    let _alone = alone();
    let Some(tracer) = tracer() else { return };
    let hot = 16_384..16_684;
    // A cold page's turn comes once in the observation, a hot one's several times a second.
    let payload = Payload { cold: 1024..16_000, hot: hot.clone(), ticks: 1_500_000, spin: 0 };
    let Some(guest) = Guest::start(KVM, &payload) else { return };
    let (truth, seen) = watch(&tracer, &guest, &options(8, 1));
    let found: HashSet<PageAddr> = seen.heat.hot_pages().into_iter().collect();
    let hit = hot.clone().filter(|p| found.contains(&guest.page(*p))).count();
    let recall = hit as f64 / hot.len() as f64;
    println!(
        "guest {truth:.0} writes/s; {} hot pages found, {hit} of {} that are (recall {recall:.3})",
        found.len(),
        hot.len()
    );
    // Each hot page must have been written often enough to be one.
    assert!(truth / 2.0 / hot.len() as f64 > 0.5, "the guest is too slow here");
    assert!(recall >= 0.95, "{recall}");
    assert!(hit as f64 / found.len() as f64 > 0.8, "{} of {} are not hot", found.len() - hit, found.len());
}

#[test]
fn what_does_not_fit_is_counted() {
    let _alone = alone();
    let Some(tracer) = tracer() else { return };
    if tracer.best(true) != Sampler::Ring {
        println!("skipped: another sampler than the dirty ring's comes first here");
        return;
    }
    // As fast as a dirty ring of the largest size takes with one clearing a second. (A ring that fills is too much for
    // some software KVMs.)
    let payload = Payload { ticks: 40_000, ..sweep() };
    let Some(guest) = Guest::start("kvm,dirty-ring-size=65536", &payload) else { return };
    let pid = guest.child.id();
    // Nobody takes events out of the ring buffer while the guest writes.
    let mut qmp = Qmp::connect(guest.dir.path().join("qmp"), WAIT).unwrap();
    tracer.set_rate(1, true).unwrap();
    tracer.watch(pid, Sampler::Ring).unwrap();
    let calc = serde_json::json!({ "calc-time": 25, "mode": "dirty-ring" });
    qmp.execute("calc-dirty-rate", calc).unwrap();
    let until = Instant::now() + Duration::from_secs(25);
    while tracer.totals(pid).unwrap().page_lost == 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    // The guest stands still, so that counts and events can be compared.
    qmp.execute("stop", serde_json::Value::Null).unwrap();
    let totals = tracer.totals(pid).unwrap();
    let mut events = 0;
    tracer.drain(|e| events += u64::from(e.tgid == pid));
    println!("{totals:?}, {events} events");
    assert!(totals.seen > 1000);
    assert_eq!(totals.sampled, totals.seen);
    assert_eq!(events + totals.page_lost, totals.sampled, "every event is there or counted as lost");
    if totals.page_lost == 0 {
        println!("skipped: the guest is too slow here to fill the ring buffer");
    }
    let by_region: u64 = tracer.regions(pid).unwrap().iter().map(|r| r.count).sum();
    assert_eq!(by_region + totals.region_lost, totals.sampled);
    // At once, for a running observation: no further samples.
    tracer.set_rate(0, false).unwrap();
    tracer.unwatch(pid);
    assert!(tracer.regions(pid).unwrap().is_empty() && tracer.slots(pid).unwrap().is_empty());
}

#[test]
fn contents_tell_of_guests_that_no_kernel_sees() {
    let _alone = alone();
    let payload = Payload { cold: 1024..17_408, hot: 17_408..17_920, ticks: 2_000_000, spin: 0 };
    let Some(guest) = Guest::start("tcg", &payload) else { return };
    let tracer = Tracer::disabled("a test asks for it");
    let (truth, seen) = watch(&tracer, &guest, &options(6, 1));
    let rate = seen.heat.dirty_rate();
    println!("guest {truth:.0}/s, {} {rate:.0}/s, {:?}", seen.sampler.name(), seen.writes());
    assert_eq!(seen.sampler, Sampler::Content);
    assert!(!seen.note.is_empty());
    // A page counts once a look, however often it was written: the truth is what it dirties in a second.
    let cold = truth / 2.0;
    let expected = cold.min(16_384.0) + cold.min(512.0);
    assert!((rate / expected - 1.0).abs() < 0.25, "{rate} instead of {expected}");
    // The hot region is one, as a whole; the cold ones are not, if the guest needs longer for a round than is watched.
    assert!(seen.heat.is_hot(guest.page(17_500)));
    assert!(cold > 8_000.0 || !seen.heat.is_hot(guest.page(5_000)));
}

#[test]
fn a_kernel_that_refuses_leaves_the_reason() {
    let none = Tracer::load_object(&[], None);
    assert_eq!(none.best(true), Sampler::Content);
    assert!(none.tried().iter().all(|t| t.refused.as_ref().is_some_and(|r| r.contains("cargo xtask"))));
    let strange = Tracer::load_object(b"no object at all", None);
    assert!(strange.tried()[0].refused.as_ref().unwrap().contains("another version"));
    assert!(none.watch(1, Sampler::Ring).is_err() && none.totals(1).is_none());
    assert!(none.regions(1).unwrap().is_empty() && none.set_rate(3, true).is_ok());
    if OBJECT.is_empty() {
        println!("skipped: this build has no dirty-page object; `cargo xtask test` makes it");
        return;
    }
    // Whatever this kernel says, it says it for each of the three, and names no sampler that it refused.
    let here = Tracer::load(None);
    assert_eq!(here.tried().len(), 3);
    for t in here.tried().iter().filter(|t| t.refused.is_some()) {
        let e = here.watch(std::process::id(), t.sampler).unwrap_err().to_string();
        assert!(e.contains(t.sampler.name()) && !e.contains('\n'), "{e}");
        assert_ne!(here.best(true), t.sampler);
    }
}

#[test]
fn what_an_ending_agent_pinned_is_gone_though_a_thread_still_has_its_tracer() {
    let dir =
        irlm_user::host::bpf::default_pin_dir(&format!("irlm-test-{}-ends", std::process::id())).unwrap();
    let tracer = Arc::new(Tracer::load(Some(&dir)));
    if !dir.exists() {
        let why = tracer.tried().iter().find_map(|t| t.refused.clone()).unwrap_or_default();
        println!("skipped: nothing is pinned here: {why}");
        return;
    }
    let lives_on = tracer.clone();
    tracer.shut_down();
    assert!(!dir.exists());
    tracer.shut_down();
    let best = lives_on.best(true);
    assert!(lives_on.watch(std::process::id(), best).is_err(), "nothing is watched any more");
    drop((tracer, lives_on));
    assert!(!dir.exists());
}
