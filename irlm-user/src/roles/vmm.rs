//! `irlm vmm`: one virtual machine in a process of its own, for an agent that moves it page by page.

use super::common::runtime;
use crate::control::vmm::{listen, serve};
use crate::host::kvm::machine::{
    DeviceSpec, Dirty, FaultChoice, FaultMode, Machine, RING_ENTRIES, Spec, Standing, What,
};
use crate::host::kvm::memory::{HostPages, MemorySpec};
use anyhow::{Context as _, bail};
use clap::Args;
use std::fs::OpenOptions;
use std::io::{Read as _, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Arguments of `irlm vmm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Needs /dev/kvm; for post-copy also CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1. It ends when the guest shuts down, by \
`quit` on its control socket, ^C or SIGTERM. docs/vmm.md has the control socket's commands.

EXIT CODES
  0  the guest shut down, or the VM was told to end
  1  it could not be started
  2  it was told to end after KVM could not go on with its guest (the reason is in the log and in `status`)")]
// bounds: a record of the command line, one field an option
pub(super) struct VmmArgs {
    /// Where agents reach it: a UNIX socket of this user's own
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    memory: u64,
    /// Length of each memory slot but the last [default: as long as can be]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    slot: Option<u64>,
    /// Host pages behind it: `2M` and `1G` come from the host's pool of huge pages
    #[arg(long, value_name = "4K|2M|1G", default_value = "4K", value_parser = host_pages)]
    pages: HostPages,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// How writes are noted: `bitmap`, `ring`, or `ring=ENTRIES`
    #[arg(long, value_name = "HOW", default_value = "bitmap", value_parser = dirty)]
    dirty: Dirty,
    /// A flat real-mode image that ends at 1 MiB, as for QEMU's -bios
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "incoming"])]
    payload: Option<PathBuf>,
    /// A Linux kernel: bzImage or ELF
    #[arg(long, value_name = "FILE", conflicts_with = "incoming")]
    kernel: Option<PathBuf>,
    /// Its initrd
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with_all = ["payload", "incoming"])]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(
        long,
        value_name = "TEXT",
        requires = "kernel",
        default_value = "console=ttyS0 reboot=k panic=1 pci=off acpi=off"
    )]
    cmdline: String,
    /// Start nothing: another VM's memory and state will come
    #[arg(long)]
    incoming: bool,
    /// Do not run before `resume`
    #[arg(long, conflicts_with = "incoming")]
    paused: bool,
    /// Where the guest's serial console goes: `stdio` (standard output and input), `stdout`, `none`, or a file
    #[arg(long, value_name = "WHERE", default_value = "stdout")]
    serial: PathBuf,
    /// A disk in a raw image file (virtio); `ro`: the guest cannot write to it. May be given several times
    #[arg(long, value_name = "FILE[,ro]", value_parser = disk)]
    disk: Vec<DeviceSpec>,
    /// A network card on a TAP device (virtio), which is made if it does not exist. May be given several times
    #[arg(long, value_name = "TAP[,mac=ADDRESS]", value_parser = net)]
    net: Vec<DeviceSpec>,
    /// A balloon (virtio): the guest gives free pages back to the host, and more when `balloon` on the control socket asks
    #[arg(long)]
    balloon: bool,
    /// How missing pages are asked for while they still come: `minor` (written into memory's file), `missing` (copied in by the
    /// kernel), or `probe`, the first of them that the kernel has
    #[arg(long, value_name = "HOW", default_value = "probe", value_parser = faults)]
    faults: FaultChoice,
}

fn faults(s: &str) -> Result<FaultChoice, String> {
    match s {
        "probe" => Ok(FaultChoice::Probe),
        "minor" => Ok(FaultChoice::Only(FaultMode::Minor)),
        "missing" => Ok(FaultChoice::Only(FaultMode::Missing)),
        _ => Err("missing pages are asked for by minor, missing or probe".into()),
    }
}

fn disk(s: &str) -> Result<DeviceSpec, std::convert::Infallible> {
    let (path, read_only) = s.strip_suffix(",ro").map_or((s, false), |p| (p, true));
    Ok(DeviceSpec::Disk { path: path.into(), read_only })
}

fn net(s: &str) -> Result<DeviceSpec, String> {
    let (tap, mac) = s.split_once(",mac=").map_or((s, None), |(t, m)| (t, Some(m)));
    // Of the range that everybody may use (bit 1 of the first byte), with the device's name in it: the same at both hosts.
    let own = || {
        let [a, b, c, d, e, ..] = *blake3::hash(tap.as_bytes()).as_bytes();
        [0x52, a, b, c, d, e]
    };
    let mac = match mac {
        None => own(),
        Some(m) => {
            let bytes: Option<Vec<u8>> = m.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
            let bytes = bytes.and_then(|b| <[u8; 6]>::try_from(b).ok());
            bytes
                .filter(|b| b[0] & 1 == 0)
                .ok_or_else(|| format!("{m} is no address of one card, as 52:54:00:12:34:56 is"))?
        }
    };
    Ok(DeviceSpec::Net { tap: tap.to_owned(), mac })
}

fn size(s: &str) -> Result<u64, String> {
    let (number, unit) = match s.strip_suffix(['M', 'G']) {
        Some(n) if s.ends_with('M') => (n, 1 << 20),
        Some(n) => (n, 1 << 30),
        None => (s, 1),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| "a size is a number of bytes, or of MiB with M, or of GiB with G".into())
}

fn host_pages(s: &str) -> Result<HostPages, String> {
    match s {
        "4K" => Ok(HostPages::Small),
        "2M" => Ok(HostPages::Huge2M),
        "1G" => Ok(HostPages::Huge1G),
        _ => Err("host pages are 4K, 2M or 1G".into()),
    }
}

fn dirty(s: &str) -> Result<Dirty, String> {
    let entries = |n: &str| n.parse().ok().map(Dirty::Ring);
    match s.split_once('=') {
        None if s == "bitmap" => Ok(Dirty::Bitmap),
        None if s == "ring" => Ok(Dirty::Ring(RING_ENTRIES)),
        Some(("ring", n)) => entries(n).ok_or_else(|| format!("{n} is no number of entries")),
        _ => Err("writes are noted by bitmap, ring or ring=ENTRIES".into()),
    }
}

impl VmmArgs {
    fn devices(&self) -> Vec<DeviceSpec> {
        let balloon = self.balloon.then_some(DeviceSpec::Balloon);
        self.disk.iter().chain(&self.net).cloned().chain(balloon).collect()
    }

    fn boot(&self) -> anyhow::Result<What> {
        match (&self.payload, &self.kernel, self.incoming) {
            (Some(path), None, false) => Ok(What::Payload(path.clone())),
            (None, Some(kernel), false) => Ok(What::Linux {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
            }),
            (None, None, true) => Ok(What::Incoming),
            _ => bail!("say what it starts: --payload FILE, --kernel FILE or --incoming"),
        }
    }

    fn serial(&self) -> anyhow::Result<Box<dyn Write + Send>> {
        match self.serial.to_str() {
            Some("stdio" | "stdout") => Ok(Box::new(std::io::stdout())),
            Some("none") => Ok(Box::new(std::io::sink())),
            _ => {
                let file = OpenOptions::new().create(true).append(true).open(&self.serial);
                Ok(Box::new(file.with_context(|| format!("cannot write {}", self.serial.display()))?))
            }
        }
    }
}

/// ^C and SIGTERM set `stop`, from before anybody can know that the VM is there.
fn end_when_told(runtime: &Runtime, stop: Arc<AtomicBool>) -> anyhow::Result<()> {
    let _inside = runtime.enter();
    let hear = |kind| signal(kind).context("cannot take signals");
    let (mut term, mut int) = (hear(SignalKind::terminate())?, hear(SignalKind::interrupt())?);
    runtime.spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        stop.store(true, Ordering::Release);
    });
    Ok(())
}

/// Standard input becomes what is typed on the guest's console, until it ends.
fn type_on(machine: &Arc<Machine>) -> anyhow::Result<()> {
    let machine = Arc::downgrade(machine);
    let typing = std::thread::Builder::new().name("vmm-console".into());
    let typing = typing.spawn(move || {
        let mut typed = [0; 64];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut typed) {
            match machine.upgrade() {
                Some(m) => m.console_input(&typed[..n]),
                None => return,
            }
        }
    });
    typing.map(drop).context("cannot start the console's thread")
}

pub(super) fn run(args: &VmmArgs) -> anyhow::Result<u8> {
    let machine = Arc::new(Machine::new(Spec {
        vcpus: args.vcpus,
        memory: MemorySpec { bytes: args.memory, slot_bytes: args.slot, pages: args.pages },
        dirty: args.dirty,
        boot: args.boot()?,
        serial: args.serial()?,
        devices: args.devices(),
        faults: args.faults,
    })?);
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = runtime()?;
    end_when_told(&runtime, Arc::clone(&stop))?;
    let listener = listen(&args.control).with_context(|| {
        format!("cannot listen on {} (does a VM run there already?)", args.control.display())
    })?;
    if args.serial.as_os_str() == "stdio" {
        type_on(&machine)?;
    }
    if !args.incoming && !args.paused {
        machine.resume()?;
    }
    tracing::info!(
        control = %args.control.display(),
        vcpus = args.vcpus,
        mib = args.memory >> 20,
        slots = machine.memory().slots().len(),
        "VM ready"
    );
    let served = serve(&listener, Arc::clone(&machine), stop);
    // Whoever comes now shall find nobody, not somebody who does not answer.
    let _ = std::fs::remove_file(&args.control);
    served.with_context(|| format!("control socket {} failed", args.control.display()))?;
    match machine.standing() {
        Standing::Ended(end) if !end.wanted => {
            tracing::error!("the VM was told to end after its guest could not go on: {}", end.why);
            Ok(2)
        }
        Standing::Ended(end) => {
            tracing::info!("the VM has ended: {}", end.why);
            Ok(0)
        }
        _ => {
            tracing::info!("the VM was told to end");
            Ok(0)
        }
    }
}
