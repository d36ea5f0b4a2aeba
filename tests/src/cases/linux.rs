//! A distribution's kernel under our own VMM, as far as this machine's KVM takes it.

use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::vmlinux::unpack;
use irlm_user::net::vmm::{State, Vmm};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) const CASES: &[Case] =
    &[Case { name: "kvm-linux", needs: &[Need::Irlm, Need::Kvm], takes: Takes::Light, run: linux }];

/// The kernel's command line. An emulating KVM knows neither `cmpxchg16b` nor `xrstor`: the kernel is to do without.
const CMDLINE: &str = "earlyprintk=ttyS0,115200 console=ttyS0 nokaslr pci=off acpi=off noapictimer tsc=reliable \
                       lpj=1000000 clearcpuid=141 noxsave root=/dev/vda ro";
/// What it says when it has found its memory, by when it knows its devices from the command line.
const FAR: &str = "] Memory: ";
/// What it says when it starts the first process, with its disk's driver long loaded.
const INIT: &str = "Run /init";
/// On an emulating KVM the first takes half a minute, and there is no second.
const WAIT: Duration = Duration::from_secs(600);
const FURTHER: Duration = Duration::from_secs(20);

/// Ends the VMM however the test ends.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn linux(b: &Bench) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (kernel, said, socket) =
        (dir.path().join("vmlinux"), dir.path().join("said"), dir.path().join("vmm"));
    std::fs::write(&kernel, unpack(&b.cache.guest("vmlinuz"))?)?;
    let disk = format!("{},ro", b.cache.guest("root.img").display());
    // It is waited for, and waits for nobody: it gets what tests beside it leave.
    let child = Command::new("nice")
        .args(["-n", "10"])
        .arg(&b.irlm)
        .args(["vmm", "--memory", "256M", "--cmdline", CMDLINE, "--disk", &disk])
        .arg("--control")
        .arg(&socket)
        .arg("--kernel")
        .arg(&kernel)
        .arg("--initrd")
        .arg(b.cache.guest("initrd"))
        .arg("--serial")
        .arg(&said)
        .stdin(Stdio::null())
        .spawn()
        .context("start irlm vmm")?;
    let _ends = Ends(child);
    let text = || std::fs::read(&said).map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default();
    let ended = || ended(&socket);
    let until = Instant::now() + WAIT;
    while !text().contains(FAR) {
        if let Some(why) = ended() {
            anyhow::bail!("the kernel got no further than {:?}: {why}", last(&text()));
        }
        ensure!(Instant::now() < until, "after {} s it is at {:?}", WAIT.as_secs(), last(&text()));
        std::thread::sleep(Duration::from_millis(200));
    }
    let begun = text();
    ensure!(begun.contains("Linux version"), "it does not say what it is");
    ensure!(begun.contains(" virtio_mmio.device=4K@0xd0000000:5"), "it was not told of its disk");
    let until = Instant::now() + FURTHER;
    let mut why = None;
    while why.is_none() && Instant::now() < until && !text().contains(INIT) {
        why = ended();
        std::thread::sleep(Duration::from_millis(200));
    }
    if text().contains(INIT) {
        ensure!(text().contains("virtio_blk"), "its first process starts, and its disk is not there");
    }
    let why = why.unwrap_or_else(|| "it was ended there".to_owned());
    println!("  the kernel got as far as {:?}; {why}", last(&text()));
    Ok(())
}

/// The last whole line.
fn last(text: &str) -> &str {
    text.trim_end().lines().next_back().unwrap_or("")
}

/// Why the guest has ended, if it has.
fn ended(socket: &Path) -> Option<String> {
    let status = Vmm::connect(socket, Duration::from_secs(5)).ok()?.status().ok()?;
    (status.state == State::Ended).then(|| status.why.unwrap_or_default())
}
