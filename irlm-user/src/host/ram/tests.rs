//! Guest RAM readers against texts of both QEMU generations, and against this process's own memory as the guest's.
//! Real QEMU: tests/qmp.rs.

use super::layout::*;
use super::*;
use std::os::fd::AsFd;

const R72: &str = "              Block Name    PSize              Offset               Used              Total\r\n\
                      m0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n   \
   0000:00:02.0/vga.vram    4 KiB  0x0000000004080000 0x0000000001000000 0x0000000001000000\r\n    \
    /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000\r\n";
const R100: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
   pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fe303e00000  rw\n\
   a name that is long and has blanks    2 MiB  0x0 0x200000 0x200000 0x0000000000000000  ro\n";
const MTREE: &str = "\nFlatView #0\n AS \"I/O\", root: io\n  0000000000000000-0000000000000007 (prio 0, ram): m0\n\n\
FlatView #1\n AS \"memory\", root: system\n AS \"cpu-memory-0\", root: system\n Root memory region: system\n  \
0000000000000000-000000000009ffff (prio 0, ram): m0\n  \
00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\n  \
00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000\n  \
0000000000100000-0000000003ffffff (prio 0, ram): m0 @0000000000100000 KVM\n";

#[test]
fn the_monitor_tables_of_both_generations_are_read_by_their_headers() {
    let b = ramblocks(R72).unwrap();
    let of = |name: &str, bytes, hva| Block { name: name.into(), bytes, hva };
    assert_eq!(b[0], of("m0", 64 << 20, None));
    assert_eq!(b[1], of("0000:00:02.0/vga.vram", 16 << 20, None));
    assert_eq!(b[2], of("/rom@etc/acpi/tables", 0x20000, None));
    assert!(b[1].is_region("vga.vram") && b[0].is_region("m0") && !b[0].is_region("0"));
    let b = ramblocks(R100).unwrap();
    assert_eq!(b[0], of("pc.ram", 64 << 20, Some(0x7fe3_03e0_0000)));
    assert_eq!(b[1], of("a name that is long and has blanks", 2 << 20, None));
    for bad in
        ["", "nothing", "Block Name Size\nx 1", "Block Name PSize Offset Used Total\nx 4 KiB 0x0 zz 0x0"]
    {
        assert!(ramblocks(bad).is_err(), "{bad}");
    }
    let r = mtree(MTREE);
    assert_eq!(r.len(), 3, "{r:?}");
    assert_eq!(r[2], Region { gpa: 0x10_0000, bytes: 0x3f0_0000, offset: 0x10_0000, name: "m0".into() });
    assert_eq!((r[1].name.as_str(), r[1].offset), ("pc.bios", 0x20000));
    assert_eq!(
        gpa2hva("Host virtual address for 0x100000 (m0) is 0x7f81fc0ff000\r\n"),
        Some(0x7f81_fc0f_f000)
    );
    assert_eq!(gpa2hva("No memory is mapped at address 0xfff0000000\r\n"), None);
}

fn page(n: u8) -> Vec<u8> {
    vec![n; PAGE_SIZE]
}

/// Opens `blocks` (name, bytes, address) of this process as if they were a guest's.
fn own(blocks: &[(&str, usize, usize)]) -> GuestRam {
    let list: Vec<Block> = blocks
        .iter()
        .map(|(n, bytes, at)| Block { name: (*n).into(), bytes: *bytes as u64, hva: Some(*at as u64) })
        .collect();
    GuestRam::from_blocks(std::process::id(), &list).unwrap()
}

const MIB: usize = 1 << 20;

/// A mapping of this process, unmapped at the end.
struct Map(*mut core::ffi::c_void, usize);

impl Map {
    fn new(bytes: usize, fd: Option<std::os::fd::BorrowedFd<'_>>, flags: rustix::mm::MapFlags) -> Self {
        use rustix::mm::ProtFlags;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let at = unsafe {
            match fd {
                Some(fd) => rustix::mm::mmap(std::ptr::null_mut(), bytes, prot, flags, fd, 0),
                None => rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, prot, flags),
            }
        };
        Self(at.unwrap(), bytes)
    }

    fn write(&self, page_no: usize, with: &[u8]) {
        assert!(page_no * PAGE_SIZE + with.len() <= self.1);
        // SAFETY: in bounds of the mapping (asserted), which no reference points into.
        unsafe {
            std::ptr::copy_nonoverlapping(
                with.as_ptr(),
                self.0.cast::<u8>().add(page_no * PAGE_SIZE),
                with.len(),
            );
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nothing points into it.
        unsafe { rustix::mm::munmap(self.0, self.1) }.unwrap();
    }
}

fn memfd(bytes: usize) -> std::os::fd::OwnedFd {
    let fd = rustix::fs::memfd_create("irlm-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, bytes as u64).unwrap();
    fd
}

#[test]
fn a_shared_memfd_is_read_through_its_descriptor_and_holes_are_skipped() {
    let fd = memfd(8 * MIB);
    let map = Map::new(8 * MIB, Some(fd.as_fd()), rustix::mm::MapFlags::SHARED);
    map.write(3, &page(1));
    map.write(4, &page(2));
    map.write(2047, &page(3));
    let ram = own(&[("m0", 8 * MIB, map.0 as usize), ("tiny", 4096, map.0 as usize)]);
    assert_eq!(ram.blocks()[0].way, Way::File);
    assert!(!ram.blocks()[1].readable());
    assert_eq!((ram.find("m0"), ram.find("nope")), (Some(0), None));
    let seen: Vec<u32> = ram.data_ranges(0).flatten().collect();
    for p in [3, 4, 2047] {
        assert!(seen.contains(&p), "{seen:?}");
    }
    assert!(seen.len() < 1600, "holes must be skipped, saw {} pages", seen.len());
    let mut two = vec![0; 2 * PAGE_SIZE];
    ram.read_at(0, 3, &mut two).unwrap();
    assert_eq!(two, [page(1), page(2)].concat());
    assert!(ram.read_at(0, 2047, &mut two).is_err(), "beyond the end");
    assert!(ram.read_at(1, 0, &mut two[..PAGE_SIZE]).is_err());
    assert!(ram.read_at(9, 0, &mut two).is_err());
    assert_eq!((ram.data_ranges(1).count(), ram.data_ranges(9).count()), (0, 0));
}

#[test]
fn a_block_inside_a_larger_file_keeps_its_offset_also_without_a_descriptor() {
    let fd = memfd(8 * MIB);
    let map = Map::new(8 * MIB, Some(fd.as_fd()), rustix::mm::MapFlags::SHARED);
    map.write(1024 + 7, &page(9));
    drop(fd); // Only the map entry is left.
    let ram = own(&[("half", 4 * MIB, map.0 as usize + 4 * MIB)]);
    if ram.blocks()[0].way == Way::Process {
        println!("no CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN here: read through the process instead");
    }
    let mut p = page(0);
    ram.read_at(0, 7, &mut p).unwrap();
    assert_eq!(p, page(9));
    assert!(ram.data_ranges(0).flatten().any(|p| p == 7));
}

#[test]
fn anonymous_memory_is_read_through_the_process_and_untouched_pages_are_skipped() {
    let map = Map::new(40 * MIB, None, rustix::mm::MapFlags::PRIVATE);
    map.write(0, &page(1));
    map.write(9000, &page(2)); // Beyond the first window of page-table entries.
    let ram = own(&[("ram", 40 * MIB, map.0 as usize)]);
    assert_eq!(ram.blocks()[0].way, Way::Process);
    let seen: Vec<u32> = ram.data_ranges(0).flatten().collect();
    assert!(seen.contains(&0) && seen.contains(&9000), "{seen:?}");
    assert!(seen.len() < 2048, "untouched pages must be skipped, saw {}", seen.len());
    let mut p = page(0);
    ram.read_at(0, 9000, &mut p).unwrap();
    assert_eq!(p, page(2));
    // Many readers at once.
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..100 {
                    let mut p = page(0);
                    ram.read_at(0, 0, &mut p).unwrap();
                    assert_eq!((p == page(1), ram.data_ranges(0).flatten().count() >= 2), (true, true));
                }
            });
        }
    });
}

#[test]
fn a_private_file_mapping_shows_the_guests_own_writes_and_has_no_known_holes() {
    let fd = memfd(4 * MIB);
    let map = Map::new(4 * MIB, Some(fd.as_fd()), rustix::mm::MapFlags::PRIVATE);
    map.write(5, &page(7));
    let ram = own(&[("p", 4 * MIB, map.0 as usize)]);
    assert_eq!(ram.blocks()[0].way, Way::Process);
    assert!(ram.data_ranges(0).flatten().eq(0..1024));
    let mut p = page(0);
    ram.read_at(0, 5, &mut p).unwrap();
    assert_eq!(p, page(7));
}

#[test]
fn what_is_not_mapped_is_marked_and_a_dead_process_is_an_error() {
    let map = Map::new(4 * MIB, None, rustix::mm::MapFlags::PRIVATE);
    let ram =
        own(&[("gap", 4 * MIB, 0x1000), ("end", 4 * MIB, usize::MAX - 5), ("ok", 4 * MIB, map.0 as usize)]);
    assert!(!ram.blocks()[0].readable() && ram.blocks()[0].why_not.is_some());
    assert!(!ram.blocks()[1].readable());
    assert!(ram.blocks()[2].readable());
    // Above pid_max.
    let e = GuestRam::open(u32::MAX >> 2, &mut |_| Ok(R100.to_owned())).unwrap_err().to_string();
    assert!(e.contains("/proc/") && e.contains("CAP_SYS_PTRACE"), "{e}");
    let e = GuestRam::open(1, &mut |_| Err("closed".into())).unwrap_err().to_string();
    assert!(e.contains("info ramblock") && e.contains("closed"), "{e}");
}

#[test]
fn without_host_addresses_they_are_asked_for_by_guest_address() {
    let map = Map::new(64 * MIB, None, rustix::mm::MapFlags::PRIVATE);
    map.write(1, &page(4));
    let hva = map.0 as usize;
    let mut asked = vec![];
    let ram = GuestRam::open(std::process::id(), &mut |c| {
        asked.push(c.to_owned());
        Ok(match c {
            "info ramblock" => R72.to_owned(),
            "info mtree -f" => MTREE.to_owned(),
            "gpa2hva 0x0" => "No memory is mapped at address 0x0".to_owned(),
            "gpa2hva 0x100000" => format!("Host virtual address for 0x100000 (m0) is {:#x}\r\n", hva + MIB),
            other => return Err(other.into()),
        })
    })
    .unwrap();
    assert_eq!(asked, ["info ramblock", "info mtree -f", "gpa2hva 0x0", "gpa2hva 0x100000"]);
    let mut p = page(0);
    ram.read_at(0, 1, &mut p).unwrap();
    assert_eq!(p, page(4));
    assert_eq!(ram.blocks()[1].why_not, Some("QEMU tells no host address for it"));
}
