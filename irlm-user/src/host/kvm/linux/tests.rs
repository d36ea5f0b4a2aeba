//! The boot path against a kernel of a few instructions that looks at what it was given and says it on the serial port.

use super::super::boot::Boot;
use super::super::machine::{DeviceSpec, Dirty, Machine, Spec, Standing};
use super::super::memory::{HostPages, MemorySpec};
use super::*;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A 64-bit kernel: prints its command line, the first byte of its initrd and the number of memory ranges, and ends; it says
/// nothing if the boot parameters are none.
const KERNEL: &[u8] = &[
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0x81, 0xbe, 0x02, 0x02, 0x00, 0x00, 0x48, 0x64, 0x72, 0x53, // cmp dword [rsi + 0x202], "HdrS"
    0x75, 0x2a, // jne end
    0x8b, 0x9e, 0x28, 0x02, 0x00, 0x00, // mov ebx, [rsi + 0x228]: command line
    0x8a, 0x03, // again: mov al, [rbx]
    0x84, 0xc0, // test al, al
    0x74, 0x06, // jz over
    0xee, // out dx, al
    0x48, 0xff, 0xc3, // inc rbx
    0xeb, 0xf4, // jmp again
    0x8b, 0x9e, 0x18, 0x02, 0x00, 0x00, // over: mov ebx, [rsi + 0x218]: initrd
    0x8a, 0x03, // mov al, [rbx]
    0xee, // out dx, al
    0x8a, 0x86, 0xe8, 0x01, 0x00, 0x00, // mov al, [rsi + 0x1e8]: number of memory ranges
    0x04, 0x30, // add al, '0'
    0xee, // out dx, al
    0xba, 0xf4, 0x00, 0x00, 0x00, // end: mov edx, 0xf4
    0xee, // out dx, al
    0xf4, // hlt
];

const MIB: u64 = 1 << 20;

#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The kernel as a vmlinux with one segment at 1 MiB.
fn elf() -> Vec<u8> {
    elf_of(KERNEL)
}

fn elf_of(image: &[u8]) -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(&[2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    put(&HIGH.to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes());
    put(&[0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    put(&[1, 0, 0, 0, 5, 0, 0, 0]); // load
    for word in [120, HIGH, HIGH, image.len() as u64, image.len() as u64, 4096] {
        put(&word.to_le_bytes());
    }
    put(image);
    out
}

/// The kernel as a bzImage: two sectors of setup, then the part that is loaded at 1 MiB.
fn bzimage() -> Vec<u8> {
    let mut out = vec![0; 1024];
    out[0x1f1] = 1; // sectors of setup, besides the first
    out[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
    out[0x202..0x206].copy_from_slice(&HDRS.to_le_bytes());
    out[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    out[0x211] = 1; // loaded high
    out[0x214..0x218].copy_from_slice(&(HIGH as u32).to_le_bytes());
    out[0x236..0x238].copy_from_slice(&XLF_KERNEL_64.to_le_bytes());
    out.resize(1024 + ENTRY_64 as usize, 0xf4);
    out.extend_from_slice(KERNEL);
    out
}

/// A machine that boots such a file, and what it says; `None` where there is no KVM.
fn boot(kernel: &[u8], mib: u64, cmdline: &str) -> Option<(Result<Machine>, Said)> {
    boot_with(kernel, mib, cmdline, Vec::new())
}

fn boot_with(
    kernel: &[u8],
    mib: u64,
    cmdline: &str,
    devices: Vec<DeviceSpec>,
) -> Option<(Result<Machine>, Said)> {
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, initrd) = (dir.path().join("kernel"), dir.path().join("initrd"));
    std::fs::write(&path, kernel).unwrap();
    std::fs::write(&initrd, b"?initrd").unwrap();
    let said = Said::default();
    let machine = Machine::new(Spec {
        vcpus: 2,
        memory: MemorySpec { bytes: mib * MIB, slot_bytes: None, pages: HostPages::Small },
        dirty: Dirty::Bitmap,
        boot: Boot::Linux { kernel: path, initrd: Some(initrd), cmdline: cmdline.into() },
        serial: Box::new(said.clone()),
        devices,
        faults: Default::default(),
    });
    Some((machine, said))
}

#[test]
fn a_kernel_finds_command_line_initrd_and_memory_map() {
    for (kernel, mib, ranges) in [(elf(), 16, '2'), (bzimage(), 16, '2'), (elf(), 4096, '3')] {
        let Some((machine, said)) = boot(&kernel, mib, "console=ttyS0 x=1") else { return };
        let machine = machine.unwrap();
        machine.resume().unwrap();
        let end = machine.wait_end(Duration::from_secs(20)).expect("the kernel ends itself");
        assert!(end.wanted, "{}", end.why);
        assert_eq!(machine.standing(), Standing::Ended(end));
        let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
        assert_eq!(said, format!("console=ttyS0 x=1?{ranges}"));
    }
}

#[test]
fn what_cannot_be_booted_is_said_with_its_name() {
    let mut short = bzimage();
    short[0x236] = 0;
    for (kernel, cmdline, why) in [
        (b"no kernel at all, just text".to_vec(), "", "kernel"),
        (short, "", "64-bit entry"),
        (elf(), "x".repeat(CMDLINE_MAX).leak() as &str, "command line"),
        (elf()[..100].to_vec(), "", "kernel"),
    ] {
        let Some((machine, _)) = boot(&kernel, 16, cmdline) else { return };
        let e = machine.err().unwrap().to_string();
        assert!(e.contains(why) && e.contains("cannot boot") && !e.contains('\n'), "{e}");
    }
}

/// A 64-bit kernel: writes a table of words to the registers of the first virtio device, then says what is in its buffer.
fn disk_reader() -> Vec<u8> {
    let at = |offset: u64| ((HIGH + offset) as u32).to_le_bytes();
    const SAYS: u32 = 16;
    const DATA: u64 = 0x5000;
    let code = [
        &[0xbb, 0x00, 0x00, 0x00, 0xd0][..], // mov ebx, 0xd0000000
        &[0xbe],
        &at(0x1000),               // mov esi, table
        &[0x8b, 0x0e],             // again: mov ecx, [rsi]
        &[0x8b, 0x46, 0x04],       // mov eax, [rsi + 4]
        &[0x83, 0xf9, 0xff],       // cmp ecx, -1
        &[0x74, 0x09],             // je over
        &[0x89, 0x04, 0x0b],       // mov [rbx + rcx], eax
        &[0x48, 0x83, 0xc6, 0x08], // add rsi, 8
        &[0xeb, 0xed],             // jmp again
        &[0xbe],
        &at(DATA), // over: mov esi, data
        &[0xb9],
        &SAYS.to_le_bytes(),             // mov ecx, how much it says
        &[0xba, 0xf8, 0x03, 0x00, 0x00], // mov edx, 0x3f8
        &[0xac, 0xee, 0xe2, 0xfc],       // lodsb; out dx, al; loop
        &[0xba, 0xf4, 0x00, 0x00, 0x00], // mov edx, 0xf4
        &[0xee, 0xf4],                   // out dx, al; hlt
    ]
    .concat();
    let mut image = vec![0; 0x6000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &code);
    let low = |offset: u64| (HIGH + offset) as u32;
    // As Linux begins: acknowledged, driver, modern features, a queue of eight, ready, and there is something in it.
    let table: &[(u32, u32)] = &[
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 0),
        (0x20, 0),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 8),
        (0x80, low(0x2000)),
        (0x90, low(0x3000)),
        (0xa0, low(0x4000)),
        (0x44, 1),
        (0x70, 15),
        (0x50, 0),
        (u32::MAX, 0),
    ];
    let table: Vec<u8> =
        table.iter().flat_map(|(r, w)| [r.to_le_bytes(), w.to_le_bytes()].concat()).collect();
    put(0x1000, &table);
    // Header, a sector, the status.
    let chain = [(0x5800, 16u32, 1u16, 1u16), (DATA, 512, 3, 2), (0x5900, 1, 2, 0)];
    for (n, (offset, len, flags, next)) in chain.into_iter().enumerate() {
        let d = [
            &(HIGH + offset).to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        put(0x2000 + 16 * n, &d.concat());
    }
    put(0x3002, &1u16.to_le_bytes());
    put(0x5808, &3u64.to_le_bytes());
    image
}

#[test]
fn a_guest_is_told_of_its_devices_and_reads_its_disk() {
    let mut disk = tempfile::NamedTempFile::new().unwrap();
    let mut sectors = vec![b'-'; 8 * 512];
    sectors[3 * 512..][..16].copy_from_slice(b"the third sector");
    disk.write_all(&sectors).unwrap();
    let device = DeviceSpec::Disk { path: disk.path().to_owned(), read_only: true };
    let says = [
        (elf_of(&disk_reader()), "the third sector"),
        (elf(), "x=1 virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6?2"),
    ];
    for (kernel, what) in says {
        let devices = vec![device.clone(), device.clone()];
        let Some((machine, said)) = boot_with(&kernel, 16, "x=1", devices) else { return };
        let machine = machine.unwrap();
        machine.resume().unwrap();
        let end = machine.wait_end(Duration::from_secs(20)).expect("the kernel ends itself");
        assert!(end.wanted, "{}", end.why);
        assert_eq!(String::from_utf8_lossy(&said.0.lock().unwrap()), what);
    }
}
