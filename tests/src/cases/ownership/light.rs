//! Guests without an operating system, which start in a fraction of a second: a firmware of a few instructions, memory full of
//! bytes of their own, and a disk image that only one QEMU may write to at a time.

use anyhow::{Context as _, Result, bail, ensure};
use irlm_tests::lab::Lab;
use irlm_tests::net::Host;
use irlm_tests::payload::{Payload, image_of};
use irlm_tests::qemu::{MACHINE, Place, Vm};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Memory of each, KiB; not a multiple of 256, which QEMU 7.2 needs under TCG ([`irlm_tests::qemu::Guest::mem_kib`]).
const MEM_KIB: u32 = 32 * 1024 - 8;
/// Size of a disk image.
const DISK: u64 = 1 << 20;

/// Has KVM keep the time at which the VM began, and the vCPU's time, in pages 0x600 and 0x601, and halts.
const ASKS_FOR_CLOCKS: [u8; 31] = [
    0x31, 0xd2, // xor edx, edx
    0xb9, 0x00, 0x4d, 0x56, 0x4b, // mov ecx, MSR_KVM_WALL_CLOCK_NEW
    0xb8, 0x00, 0x00, 0x60, 0x00, // mov eax, 0x600000
    0x0f, 0x30, // wrmsr
    0xb9, 0x01, 0x4d, 0x56, 0x4b, // mov ecx, MSR_KVM_SYSTEM_TIME_NEW
    0xb8, 0x01, 0x10, 0x60, 0x00, // mov eax, 0x601001
    0x0f, 0x30, // wrmsr
    0xf4, 0x90, 0x90, 0xeb, 0xfb, // hlt; jmp back to it
];

/// Tells apart a QEMU that is there only to hold a disk image.
pub(super) const LOCKER: &str = "-locker";

/// One such guest.
#[derive(Clone, Debug)]
pub(super) struct Light {
    /// Its name, from which its uuid follows.
    pub(super) name: String,
    /// MiB of its memory that are filled, from 1 MiB on.
    pub(super) fill: u64,
    /// Whether it writes all its filled memory again and again, as fast as it can; otherwise it halts.
    pub(super) busy: bool,
    /// Whether each QEMU has a disk image of its own, so that none is kept from running by another's lock.
    pub(super) own_disk: bool,
    /// Whether it has a network card, whose packets each QEMU writes to a file ([`Light::packets`]).
    pub(super) card: bool,
    /// Whether it runs on KVM, which it has asked for both of its clocks.
    pub(super) clocks: bool,
    /// Further arguments of both QEMUs.
    pub(super) args: Vec<&'static str>,
}

/// How a QEMU begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Begin {
    /// Its guest runs.
    Runs,
    /// It waits for a migration, and then for `cont`.
    Waits,
    /// It waits for a migration: `-S` was forgotten.
    WaitsToRun,
}

impl Light {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            fill: 4,
            busy: false,
            own_disk: true,
            card: false,
            clocks: false,
            args: Vec::new(),
        }
    }

    /// A copy that starts by itself only if its image can be had; `tag` tells several QEMUs of one host apart.
    pub(super) fn start(&self, lab: &Lab, qemu: &Path, host: Host, tag: &str, begin: Begin) -> Result<Vm> {
        let dir = lab.dir(host);
        let name = format!("{}{tag}", self.name);
        let file = |what: &str| dir.join(format!("{name}.{what}"));
        for what in ["lab", "qmp", "eye"] {
            let _ = std::fs::remove_file(file(what));
        }
        let mut c = lab.net.command(host, qemu);
        let accel = if self.clocks { "kvm" } else { "tcg,thread=single" };
        c.args(["-name", &self.name, "-uuid", &self.uuid(), "-accel", accel, "-cpu", "qemu64"]);
        c.args(["-machine", &format!("{MACHINE},memory-backend=m0"), "-m", &format!("size={MEM_KIB}K")]);
        c.args(["-object", &format!("memory-backend-memfd,id=m0,size={MEM_KIB}K,share=on")]);
        c.args(["-nodefaults", "-no-user-config", "-display", "none", "-bios"]).arg(self.firmware(lab)?);
        let disk = self.disk(lab, host, tag)?;
        let drive = format!("if=none,id=d0,file={},format=raw,file.locking=on", disk.display());
        c.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]);
        for what in ["lab", "qmp", "eye"] {
            c.args(["-qmp", &format!("unix:{},server=on,wait=off", file(what).display())]);
        }
        if self.card {
            let packets = self.packets(lab, host, tag);
            let _ = std::fs::remove_file(&packets);
            c.args(["-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-pci,netdev=n0,romfile="]);
            c.arg("-object").arg(format!("filter-dump,id=f0,netdev=n0,file={}", packets.display()));
        }
        match begin {
            Begin::Runs => &mut c,
            Begin::Waits => c.args(["-S", "-incoming", "defer"]),
            Begin::WaitsToRun => c.args(["-incoming", "defer"]),
        };
        c.args(&self.args);
        let place = Place { net: Some((&lab.net, host)), dir: &dir, qemu };
        let vm = Vm::launch(c, place, &name)?;
        if begin == Begin::Runs {
            self.fill(&vm)?;
        }
        Ok(vm)
    }

    /// Where the poller looks at such a copy.
    pub(super) fn eye(&self, lab: &Lab, host: Host, tag: &str) -> PathBuf {
        lab.dir(host).join(format!("{}{tag}.eye", self.name))
    }

    /// Where such a copy's packets are (pcap).
    fn packets(&self, lab: &Lab, host: Host, tag: &str) -> PathBuf {
        lab.dir(host).join(format!("{}{tag}.pcap", self.name))
    }

    /// How often its card has announced itself at a host (RFC 903; QEMU's `announce-self`).
    pub(super) fn announced(&self, lab: &Lab, host: Host) -> Result<usize> {
        const REVERSE_ARP: [u8; 2] = [0x80, 0x35];
        let file = std::fs::read(self.packets(lab, host, "")).context("the card's packets")?;
        // A header of 24 bytes, then packets of 16 bytes of header, whose third word is their length.
        let (mut at, mut count) = (24, 0);
        while let Some(packet) = file.get(at + 16..) {
            let length = u32::from_le_bytes(file[at + 8..at + 12].try_into()?) as usize;
            count += usize::from(packet.get(12..14) == Some(&REVERSE_ARP[..]));
            at += 16 + length;
        }
        Ok(count)
    }

    /// The image, made if it is not there: one for all QEMUs, or one for each. A locker takes that of the QEMU without a tag.
    fn disk(&self, lab: &Lab, host: Host, tag: &str) -> Result<PathBuf> {
        let whose = match self.own_disk {
            true => format!("-{}{}", host.name(), tag.trim_start_matches(LOCKER)),
            false => String::new(),
        };
        let path = lab.top().join(format!("{}{whose}.img", self.name));
        if !path.is_file() {
            File::create(&path)?.set_len(DISK)?;
        }
        Ok(path)
    }

    fn uuid(&self) -> String {
        let h = blake3::hash(self.name.as_bytes()).to_hex();
        format!("{}-{}-4{}-8{}-{}", &h[..8], &h[8..12], &h[13..16], &h[17..20], &h[20..32])
    }

    fn firmware(&self, lab: &Lab) -> Result<PathBuf> {
        let path = lab.top().join(format!("{}.bin", self.name));
        let end = 256 + u32::try_from(self.fill * 256)?;
        let image = match self.busy {
            _ if self.clocks => image_of(&ASKS_FOR_CLOCKS),
            true => Payload { cold: 256..end, hot: 0..0, ticks: 0, spin: 0 }.image(),
            // hlt; jmp back to it
            false => image_of(&[0xf4, 0xeb, 0xfd]),
        };
        std::fs::write(&path, image)?;
        Ok(path)
    }

    /// Bytes that no other guest has.
    fn fill(&self, vm: &Vm) -> Result<()> {
        let memory = vm.memory_for_writing()?;
        let mut bytes = blake3::Hasher::new_derive_key(&self.name).finalize_xof();
        let mut chunk = vec![0; 1 << 20];
        for mib in 1..=self.fill {
            bytes.fill(&mut chunk);
            memory.write_all_at(&chunk, mib << 20)?;
        }
        Ok(())
    }
}

/// What QEMU says of its VM; "ended" if its process has.
pub(super) fn state(vm: &mut Vm) -> String {
    if !vm.alive() {
        return "ended".into();
    }
    let said = vm.qmp.status();
    // It may end while it is asked.
    let grace = Instant::now() + Duration::from_millis(200);
    while said.is_err() && vm.alive() && Instant::now() < grace {
        std::thread::sleep(Duration::from_millis(5));
    }
    match said {
        Ok(state) => state,
        Err(_) if !vm.alive() => "ended".into(),
        Err(e) => format!("mute: {e:#}"),
    }
}

/// The status of its migration: "none" if it never had one.
pub(super) fn migration(vm: &mut Vm) -> Result<String> {
    let said = vm.qmp.run("query-migrate", &json!({}))?;
    Ok(said["status"].as_str().unwrap_or("none").to_owned())
}

/// A write to its disk succeeds, and QEMU lives on.
pub(super) fn disk_works(vm: &mut Vm) -> Result<()> {
    let said = vm.qmp.human("qemu-io d0 \"write 0 4k\"").context("write to the disk image")?;
    std::thread::sleep(Duration::from_millis(50));
    ensure!(vm.alive(), "a write to its disk ended QEMU: {}", vm.said().trim());
    ensure!(said.contains("wrote 4096") || said.trim().is_empty(), "its disk does not work: {}", said.trim());
    Ok(())
}

/// Capabilities and parameters as QEMU tells them, in one order.
pub(super) fn settings(vm: &mut Vm) -> Result<Value> {
    let mut all = vm.qmp.run("query-migrate-parameters", &json!({}))?;
    let capabilities = vm.qmp.run("query-migrate-capabilities", &json!({}))?;
    for c in capabilities.as_array().context("capabilities")? {
        all[c["capability"].as_str().context("a capability without a name")?] = c["state"].clone();
    }
    Ok(all)
}

/// How two such sets differ, a line a setting.
pub(super) fn changed(found: &Value, left: &Value) -> Vec<String> {
    let keys = found.as_object().into_iter().chain(left.as_object()).flat_map(serde_json::Map::keys);
    let mut lines: Vec<String> = keys
        .filter(|k| found[k.as_str()] != left[k.as_str()])
        .map(|k| format!("{k}: {} became {}", found[k.as_str()], left[k.as_str()]))
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

/// Waits until it is so.
pub(super) fn until(what: &str, wait: Duration, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + wait;
    while !so().with_context(|| what.to_owned())? {
        if Instant::now() > end {
            bail!("not so after {wait:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
