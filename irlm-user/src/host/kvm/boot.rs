//! What is in memory before the first instruction, and where that is: a flat image in the firmware's place, a Linux
//! kernel, or nothing, for a machine that takes over another's state.

use super::error::cannot;
use super::memory::Memory;
use super::virtio::Device;
use super::{Result, call, linux};
use kvm_ioctls::VcpuFd;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes as _, GuestAddress};

/// A flat image ends here, as firmware does below 1 MiB.
const IMAGE_END: u64 = 1 << 20;
/// Largest one.
const MAX_IMAGE: u64 = 128 << 10;
/// What a processor does first: the last 16 bytes below 1 MiB.
const RESET_SEGMENT: u16 = 0xf000;
const RESET_OFFSET: u64 = 0xfff0;
/// Bit 1 of the flags is always set.
const FLAGS: u64 = 2;

/// What a machine starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Boot {
    /// A flat real-mode image of at most 128 KiB, as for QEMU's `-bios`: it ends at 1 MiB and starts in its last 16 bytes.
    Payload(PathBuf),
    /// A Linux kernel: bzImage or ELF (vmlinux).
    Linux {
        /// The kernel.
        kernel: PathBuf,
        /// Its first root file system.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// Nothing: the state of another VM comes.
    Incoming,
}

/// How the first vCPU begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Start {
    /// At the reset vector below 1 MiB.
    Reset,
    /// In long mode, at a 64-bit Linux kernel's entry.
    Linux {
        /// Where.
        entry: u64,
    },
    /// As the state that comes says.
    Later,
}

/// Fills memory. `devices`: how many virtio devices a kernel is told of.
pub(super) fn prepare(boot: &Boot, memory: &Memory, vcpus: u32, devices: usize) -> Result<Start> {
    match boot {
        Boot::Payload(path) => {
            let image = read(path, MAX_IMAGE)?;
            if image.len() < 16 {
                return Err(cannot(path, "an image has at least the 16 bytes of the reset vector"));
            }
            let at = GuestAddress(IMAGE_END - image.len() as u64);
            memory.guest().write_slice(&image, at).map_err(|e| cannot(path, &e.to_string()))?;
            Ok(Start::Reset)
        }
        Boot::Linux { kernel, initrd, cmdline } => {
            let more = (0..devices).map(|n| format!(" {}", Device::parameter(n)));
            let cmdline =
                cmdline.chars().chain(more.flat_map(|m| m.chars().collect::<Vec<_>>())).collect::<String>();
            let entry = linux::load(memory, vcpus, kernel, initrd.as_deref(), &cmdline)?;
            Ok(Start::Linux { entry })
        }
        Boot::Incoming => Ok(Start::Later),
    }
}

impl Start {
    /// Sets the first vCPU's registers; all others wait for it to start them.
    pub(super) fn apply(self, fd: &VcpuFd) -> Result<()> {
        let mut regs = call("cannot read a vCPU's registers", fd.get_regs())?;
        let mut sregs = call("cannot read a vCPU's special registers", fd.get_sregs())?;
        match self {
            Self::Reset => {
                sregs.cs.selector = RESET_SEGMENT;
                sregs.cs.base = u64::from(RESET_SEGMENT) << 4;
                (regs.rip, regs.rflags) = (RESET_OFFSET, FLAGS);
            }
            Self::Linux { entry } => {
                linux::long_mode(&mut sregs);
                (regs.rip, regs.rsi, regs.rflags) = (entry, linux::BOOT_PARAMS, FLAGS);
            }
            Self::Later => return Ok(()),
        }
        call("cannot set a vCPU's special registers", fd.set_sregs(&sregs))?;
        call("cannot set a vCPU's registers", fd.set_regs(&regs))
    }
}

/// A whole file of at most so many bytes.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let file = File::open(path).map_err(|e| cannot(path, &e.to_string()))?;
    file.take(most + 1).read_to_end(&mut out).map_err(|e| cannot(path, &e.to_string()))?;
    if out.len() as u64 > most {
        return Err(cannot(path, &format!("it has more than {} KiB", most >> 10)));
    }
    Ok(out)
}
