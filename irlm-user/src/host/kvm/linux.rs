//! A Linux kernel in memory, by its 64-bit boot protocol (Documentation/arch/x86/boot.rst): kernel, initrd, command
//! line, boot parameters with the memory map, processor tables, and page tables that map the first 4 GiB as they are.

use super::error::cannot;
use super::memory::{HOLE_END, Memory};
use super::{Result, mptable};
use kvm_bindings::{kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use vm_memory::{Bytes as _, GuestAddress};

/// Where the boot parameters lie.
pub(super) const BOOT_PARAMS: u64 = 0x7000;
const GDT: u64 = 0x500;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const CMDLINE_MAX: usize = 2048;
/// Conventional memory ends here, and memory for kernels begins at 1 MiB.
const LOW_END: u64 = 0x9_fc00;
const HIGH: u64 = 1 << 20;
/// Distance of a bzImage's 64-bit entry from its 32-bit one.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// A loader without a number of its own.
const LOADER: u8 = 0xff;
/// Highest address for an initrd unless the kernel says otherwise.
const INITRD_MAX: u64 = 0x37ff_ffff;
const E820_RAM: u32 = 1;
/// Largest kernel and initrd taken.
const MAX_KERNEL: u64 = 1 << 30;
const MAX_INITRD: u64 = 2 << 30;

/// Page table bits: present and writable, and of 2 MiB.
const PRESENT: u64 = 3;
const LARGE: u64 = 0x80;
const PAGE: u64 = 4096;

/// Puts everything where the kernel looks for it; its entry.
pub(super) fn load(
    memory: &Memory,
    vcpus: u32,
    kernel: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
) -> Result<u64> {
    let guest = memory.guest();
    let odd = |what: &str| cannot(kernel, what);
    let mut file = File::open(kernel).map_err(|e| odd(&e.to_string()))?;
    if file.metadata().map_err(|e| odd(&e.to_string()))?.len() > MAX_KERNEL {
        return Err(odd("it has more than 1 GiB"));
    }
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(|e| odd(&e.to_string()))?;
    file.rewind().map_err(|e| odd(&e.to_string()))?;
    let elf = magic == *b"\x7fELF";
    let high = Some(GuestAddress(HIGH));
    let loaded = if elf {
        Elf::load(guest, None, &mut file, high)
    } else {
        BzImage::load(guest, None, &mut file, high)
    };
    let loaded = loaded.map_err(|e| odd(&e.to_string()))?;
    let mut params =
        boot_params { hdr: loaded.setup_header.unwrap_or_else(elf_header), ..Default::default() };
    if !elf && params.hdr.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(odd("it has no 64-bit entry"));
    }
    let entry = loaded.kernel_load.0 + if elf { 0 } else { ENTRY_64 };
    params.hdr.type_of_loader = LOADER;

    if cmdline.len() >= CMDLINE_MAX || cmdline.contains('\0') {
        return Err(odd(&format!("its command line has {} bytes or a zero in it", cmdline.len())));
    }
    let line = [cmdline.as_bytes(), &[0]].concat();
    guest.write_slice(&line, GuestAddress(CMDLINE)).map_err(|e| odd(&e.to_string()))?;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;

    let low = memory.slots().iter().filter(|s| s.guest_phys < HOLE_END).map(|s| s.bytes).sum::<u64>();
    if let Some(path) = initrd {
        let most = match u64::from(params.hdr.initrd_addr_max) {
            0 => INITRD_MAX,
            n => n,
        };
        let (at, bytes) = place_initrd(path, memory, most.saturating_add(1).min(low), loaded.kernel_end)?;
        params.hdr.ramdisk_image = at as u32;
        params.hdr.ramdisk_size = bytes as u32;
    }
    let above = memory.bytes() - low;
    for (addr, size) in [(0, LOW_END), (HIGH, low.saturating_sub(HIGH)), (HOLE_END, above)] {
        if size > 0 {
            let entry = boot_e820_entry { addr, size, r#type: E820_RAM };
            params.e820_table[usize::from(params.e820_entries)] = entry;
            params.e820_entries += 1;
        }
    }
    let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, guest).map_err(|e| odd(&e.to_string()))?;
    mptable::write(guest, vcpus).and_then(|()| page_tables(guest)).map_err(|e| odd(&e.to_string()))?;
    Ok(entry)
}

/// What a bzImage brings along and a vmlinux does not.
fn elf_header() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HDRS, kernel_alignment: 0x100_0000, ..Default::default() }
}

/// As high as may be, so that the kernel has room to unpack itself.
fn place_initrd(path: &Path, memory: &Memory, end: u64, kernel_end: u64) -> Result<(u64, u64)> {
    let mut file = File::open(path).map_err(|e| cannot(path, &e.to_string()))?;
    let bytes = file.metadata().map_err(|e| cannot(path, &e.to_string()))?.len();
    let at = end.checked_sub(bytes).map(|at| at / PAGE * PAGE).filter(|at| *at >= kernel_end.max(HIGH));
    let Some(at) = at.filter(|_| bytes > 0 && bytes <= MAX_INITRD) else {
        return Err(cannot(path, &format!("an initrd of {bytes} bytes has no room above the kernel")));
    };
    memory
        .guest()
        .read_exact_volatile_from(GuestAddress(at), &mut file, bytes as usize)
        .map_err(|e| cannot(path, &e.to_string()))?;
    Ok((at, bytes))
}

/// The first 4 GiB as they are, in pages of 2 MiB; and a descriptor table.
fn page_tables(guest: &impl vm_memory::GuestMemoryBackend) -> vm_memory::GuestMemoryResult<()> {
    let put = |at: u64, word: u64| guest.write_obj(word, GuestAddress(at));
    let (directories, tables) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    put(PAGE_TABLES, directories | PRESENT)?;
    for g in 0..4 {
        put(directories + g * 8, (tables + g * PAGE) | PRESENT)?;
    }
    for n in 0..4 * 512 {
        put(tables + n * 8, (n << 21) | PRESENT | LARGE)?;
    }
    for (i, d) in (0..).zip([0, 0, descriptor(CODE), descriptor(DATA)]) {
        put(GDT + 8 * i, d)?;
    }
    Ok(())
}

/// Access byte and flags of a descriptor: 64-bit code that may be read, and data that may be written.
const CODE: (u8, u8) = (0x9b, 0xa);
const DATA: (u8, u8) = (0x93, 0xc);

/// A flat segment of 4 GiB.
fn descriptor((access, flags): (u8, u8)) -> u64 {
    0xffff | u64::from(access) << 40 | 0xf << 48 | u64::from(flags) << 52
}

fn segment(number: u16, (access, flags): (u8, u8)) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: number * 8,
        type_: access & 0xf,
        s: 1,
        present: 1,
        l: flags >> 1 & 1,
        db: flags >> 2 & 1,
        g: flags >> 3 & 1,
        ..Default::default()
    }
}

/// Long mode with the tables above; code and data are descriptors 2 and 3, as the protocol wants.
pub(super) fn long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 0x10;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 0x20;
    const EFER_LME: u64 = 0x100;
    const EFER_LMA: u64 = 0x400;
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 4 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cs = segment(2, CODE);
    let data = segment(3, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE | CR0_ET | CR0_PG, PAGE_TABLES, CR4_PAE);
    sregs.efer = EFER_LME | EFER_LMA;
}

#[cfg(test)]
mod tests;
