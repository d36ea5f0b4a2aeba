//! Guests of our own VMM that drive a disk, a network card or a balloon while they are moved.

use super::kvm::{NEEDS, WAIT, lab, like};
use super::postcopy::{fetch, whole};
use super::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::drivers::{Drivers, GUEST, MAC, PORT, SECTORS};
use irlm_tests::kvm::{Image, KvmGuest};
use irlm_tests::lab::Lab;
use irlm_tests::mixed::Mixed;
use irlm_tests::net::Host;
use irlm_tests::qemu::Role;
use irlm_tests::workload::Workload;
use irlm_user::net::vmm::State;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "kvm-disk-and-net",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| disk_and_net(b, "pre-copy"),
    },
    Case {
        name: "kvm-postcopy-disk-and-net",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| disk_and_net(b, "post-copy"),
    },
    Case { name: "kvm-precopy-balloon", needs: NEEDS, takes: Takes::Heavy, run: precopy_balloon },
    Case { name: "kvm-postcopy-balloon", needs: NEEDS, takes: Takes::Heavy, run: |b| balloon(b, false) },
    Case {
        name: "kvm-postcopy-balloon-target-agent-killed",
        needs: NEEDS,
        takes: Takes::Heavy,
        run: |b| balloon(b, true),
    },
];

/// The guests' network card, on whichever host they are, and the host's own end of it.
const TAP: &str = "vm0";
const OWN: &str = "10.88.0.1/24";
const TO_ALL: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 255);
/// Pages that a guest gives before it is moved, and in all.
const BEFORE: u32 = 32;
const GIVEN: u32 = 512;

/// A guest that drives devices.
fn driven(b: &Bench, lab: &Lab, drivers: Drivers, args: &[&str]) -> Result<Image> {
    let mut guest = KvmGuest::new(like(Role::Db, 0), 2_000_000);
    if let Workload::Rounds(payload) = guest.work {
        guest.work = Workload::Driven(payload, drivers);
    }
    guest.args = args.iter().map(|s| (*s).to_owned()).collect();
    guest.image(lab, &b.cache, &say)
}

/// The host's end of a guest's network.
struct Wire(UdpSocket);

impl Wire {
    fn new(lab: &Lab, host: Host) -> Result<Self> {
        lab.net.tap_up(host, TAP, OWN)?;
        let socket = lab.net.within(host, || Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
        socket.set_broadcast(true)?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self(socket))
    }

    /// The next that the guest says, if it says something soon: the number of its frame, and what it heard last.
    fn hear(&self) -> Option<(u32, u32)> {
        let mut frame = [0; 64];
        let (n, from) = self.0.recv_from(&mut frame).ok()?;
        let word = |at: usize| frame[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        (from.ip() == IpAddr::V4(GUEST) && n >= 8).then(|| (word(0), word(4)))
    }

    /// Says a number to the guest until it says it back; gives the number of the guest's frame.
    fn talk(&self, number: u32) -> Result<u32> {
        let until = Instant::now() + WAIT;
        let mut said = Instant::now();
        self.0.send_to(&number.to_le_bytes(), (TO_ALL, PORT))?;
        while Instant::now() < until {
            if let Some((n, _)) = self.hear().filter(|(_, heard)| *heard == number) {
                return Ok(n);
            }
            if said.elapsed() > Duration::from_secs(1) {
                said = Instant::now();
                self.0.send_to(&number.to_le_bytes(), (TO_ALL, PORT))?;
            }
        }
        anyhow::bail!("the guest does not say {number} back")
    }

    /// Whether the guest says nothing here.
    fn is_silent(&self, within: Duration) -> bool {
        self.0.set_nonblocking(true).is_ok_and(|()| {
            while self.0.recv_from(&mut [0; 64]).is_ok() {}
            std::thread::sleep(within);
            let silent = self.hear().is_none();
            let _ = self.0.set_nonblocking(false);
            silent
        })
    }
}

/// Writes to the disk, as the guest has counted them; the guest stands still, and its disk holds just them.
fn disk_is_right(m: &Mixed<'_>, disk: &Path) -> Result<u32> {
    let counts = Drivers::counts(&m.kvm[0].target.memory()?.bytes()?)?;
    Drivers::check_disk(counts, &std::fs::read(disk)?)?;
    Ok(counts.writes)
}

/// A guest that writes to its disk and reads it all the time, and talks over its card, moves: it finds at the target what it
/// wrote at the source, is spoken to there, and its source touches neither any more.
fn disk_and_net(b: &Bench, migration: &str) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    // Both hosts see it, as they would see shared storage.
    let disk = lab.top().join("shared.disk");
    std::fs::File::create_new(&disk)?.set_len(u64::from(SECTORS) * 512)?;
    let drivers = Drivers { disk: true, net: true, balloon: None };
    let card = format!("{TAP},mac={MAC}");
    let image = driven(b, &lab, drivers, &["--disk", &disk.display().to_string(), "--net", &card])?;
    let images = [(0, image)];
    let extra = format!("migration = {migration:?}");
    let mut m = Mixed::start(&lab, &b.irlm, &images, &extra, Vec::new())?;
    let (here, there) = (Wire::new(&lab, Host::Source(0))?, Wire::new(&lab, Host::Target(0))?);
    let before = here.talk(1001)?;
    let until = Instant::now() + WAIT;
    // Often enough that each sector has been read again.
    let written = loop {
        let counts = Drivers::counts(&m.kvm[0].source.memory()?.bytes()?)?;
        ensure!(counts.errors == 0 && Instant::now() < until, "at its source: {counts:?}");
        if counts.writes > 2 * SECTORS {
            break counts;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let mut evacuate = m.evacuate(false)?;
    let code = evacuate.wait(WAIT).with_context(|| m.said())?;
    ensure!(code == 0, "irlm evacuate ended with {code}: {}\n{}", evacuate.said(), m.said());
    let by_source = m.kvm[0].source.written()?;

    let after = there.talk(2002)?;
    ensure!(after > before, "frame {after} at the target, after {before} at the source");
    ensure!(here.is_silent(Duration::from_secs(1)), "the guest still talks at its source");
    m.kvm[0].target.vmm()?.pause()?;
    let first = disk_is_right(&m, &disk)?;
    ensure!(first > written.writes, "nothing was written at the target");
    m.kvm[0].target.vmm()?.resume()?;
    let last = there.talk(3003)?;
    m.kvm[0].check_running(&images[0].1)?;
    m.kvm[0].target.vmm()?.pause()?;
    let second = disk_is_right(&m, &disk)?;
    ensure!(second > first && last > after, "{first} and {second} writes, frames {after} and {last}");
    ensure!(m.kvm[0].source.state() == Some(State::GivenUp), "the source does not stand still");
    let now = m.kvm[0].source.written()?;
    ensure!(now == by_source, "the source wrote {} bytes after its guest had left", now - by_source);
    println!(
        "  {} writes before, {first} and {second} after the move; frames {before}, {after}, {last}; downtime {} ms",
        written.writes,
        m.report()?["vms"][0]["downtime_ms"]
    );
    Ok(())
}

/// A guest that may give `run` away, and has not yet.
fn with_balloon(b: &Bench, lab: &Lab) -> Result<(Range<u32>, Image)> {
    let run = driven(b, lab, Drivers::default(), &[])?.quiet_run(GIVEN)?;
    let drivers = Drivers { balloon: Some(run.clone()), ..Drivers::default() };
    Ok((run, driven(b, lab, drivers, &["--balloon"])?))
}

/// A guest gives pages away, some now and some then, from its preparation to its stop: what has been hashed of them or sent is
/// forgotten. Its target goes on with giving.
fn precopy_balloon(b: &Bench) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let images = [(0, with_balloon(b, &lab)?.1)];
    let args = vec!["--drill-prove-digests".to_owned()];
    let mut m = Mixed::start(&lab, &b.irlm, &images, "", args)?;
    let mut evacuate = m.evacuate(true)?;
    let (mut asked, begun) = (0, Instant::now());
    let code = loop {
        if let Some(code) = evacuate.ended()? {
            break code;
        }
        ensure!(begun.elapsed() < WAIT, "the move does not end: {}", m.said());
        // Refused once the guest stands still.
        asked = GIVEN.min(asked + 3);
        let _ = m.kvm[0].source.vmm()?.balloon(u64::from(asked) * 4096);
        std::thread::sleep(Duration::from_millis(100));
    };
    ensure!(code == 0, "irlm evacuate ended with {code}: {}\n{}", evacuate.said(), m.said());
    let given = Drivers::counts(&m.kvm[0].target.memory()?.bytes()?)?.given;
    ensure!(given > BEFORE, "only {given} pages were given while the guest was moved");
    m.kvm[0].check_moved(&images[0].1)?;
    let all = m.kvm[0].target.inflated(GIVEN, WAIT)?;
    ensure!(all == u64::from(GIVEN), "{all} pages are given at the target");
    m.kvm[0].check_running(&images[0].1)?;
    let took = begun.elapsed().as_secs_f64();
    println!("  {given} pages were given in {took:.1} s of moving, {}", m.report()?["vms"][0]["pages"]);
    Ok(())
}

/// A guest gives pages away whose contents have not come yet: they are zeros then, whatever was on its way for them, and all other
/// pages are what they must be. With `killed` nobody reads of it for a while: the guest waits, and nothing else does.
fn balloon(b: &Bench, killed: bool) -> Result<()> {
    let lab = lab(b, vec![vec![]])?;
    let (run, image) = with_balloon(b, &lab)?;
    let images = [(0, image)];
    let (mut m, mut evacuate) = {
        let m = Mixed::start(&lab, &b.irlm, &images, "migration = \"post-copy\"", Vec::new())?;
        ensure!(
            m.kvm[0].source.inflated(BEFORE, WAIT)? == u64::from(BEFORE),
            "nothing was given at the source"
        );
        fetch(m)?
    };
    let late = run.start + BEFORE..run.end;
    if killed {
        evacuate.kill();
        m.irlm.kill_agent(Host::Target(0))?;
    }
    let held = m.kvm[0].target.memory()?.held(late.clone())?;
    ensure!(held < late.len() / 2, "{held} of {} pages have come already", late.len());
    let begun = Instant::now();
    if killed {
        let given = m.kvm[0].target.inflated(GIVEN, Duration::from_secs(2))?;
        ensure!(given <= u64::from(BEFORE), "the guest gave {given} pages, of which nobody read");
        m.irlm.start_agent(Host::Target(0))?;
    }
    let given = m.kvm[0].target.inflated(GIVEN, WAIT).with_context(|| m.said())?;
    ensure!(given == u64::from(GIVEN), "the guest gave {given} of {GIVEN} pages: {}", m.said());
    let took = begun.elapsed().as_secs_f64();
    if killed {
        whole(&mut m, 1)?;
    } else {
        let code = evacuate.wait(WAIT).with_context(|| m.said())?;
        ensure!(code == 0, "irlm evacuate ended with {code}: {}\n{}", evacuate.said(), m.said());
    }
    m.kvm[0].check_running(&images[0].1)?;
    m.kvm[0].target.vmm()?.pause()?;
    let memory = m.kvm[0].target.memory()?;
    ensure!(memory.held(run.clone())? == 0, "the host does not have all the pages that were given");
    let counts = Drivers::counts(&memory.bytes()?)?;
    ensure!(counts.given == GIVEN, "the guest counted {counts:?}");
    println!(
        "  {} pages of which {held} had come were given in {took:.2} s while others came; {} pages in all",
        late.len(),
        run.len()
    );
    Ok(())
}
