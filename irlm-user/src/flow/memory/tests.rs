//! Memory of real files: its pages count, its holes are left, and what cannot be read whole counts as nothing.

use super::*;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

fn memfd(bytes: u64) -> File {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(bytes).unwrap();
    file
}

fn page(n: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

fn read_it(blocks: &[(&str, &File)]) -> Ram {
    let bytes = |f: &File| f.metadata().unwrap().len();
    let blocks = blocks.iter().map(|(n, f)| ((*n).to_owned(), bytes(f), f.try_clone().unwrap())).collect();
    let (tx, rx) = channel();
    let memory = (Arc::new(GuestRam::of_files(blocks)), Marker::new(&[1; 32]));
    let reading = Reading::start("v", memory, || (), move |r| tx.send(r).unwrap()).unwrap();
    let read = rx.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    drop(reading);
    read
}

#[test]
fn memory_comes_to_what_its_pages_do_and_holes_stay_holes() {
    use std::os::unix::fs::MetadataExt as _;
    // 64 MiB, of which a few pieces are there, cut by holes at places that are no piece's.
    let (bytes, at) = (64u64 << 20, [0u32, 1, 255, 256, 700, 5000, 5001, 16383]);
    let (one, other) = (memfd(bytes), memfd(bytes));
    let second = memfd(2 << 20);
    second.write_all_at(&page(7), 4096).unwrap();
    for n in at {
        one.write_all_at(&page(n), u64::from(n) * 4096).unwrap();
        other.write_all_at(&page(n), u64::from(n) * 4096).unwrap();
    }
    // Zero pages that are there are as good as holes.
    other.write_all_at(&[0; 4096], 77 * 4096).unwrap();
    let blocks_before = one.metadata().unwrap().blocks();
    let (a, b) = (read_it(&[("m0", &one), ("m1", &second)]), read_it(&[("m0", &other), ("m1", &second)]));
    assert_eq!(one.metadata().unwrap().blocks(), blocks_before, "memory was made of holes");
    assert_eq!(a.blocks, b.blocks);
    let mut sums = Stripes::default();
    for n in at {
        ram::add(&mut sums, &Marker::new(&[1; 32]), n, &[page(n)]);
    }
    assert_eq!(a.blocks[0], Block { name: "m0".into(), pages: 16384, sums });
    assert_ne!(a.blocks[1].sums, Stripes::default());
    other.write_all_at(&[1], 5000 * 4096 + 4095).unwrap();
    let c = read_it(&[("m0", &other), ("m1", &second)]);
    let found = a.compare(&c);
    assert_eq!((found.odd.len(), found.odd[0].page, found.more), (1, 5000, false));
}

#[test]
fn memory_that_cannot_be_read_whole_comes_to_nothing() {
    let file = memfd(4 << 20);
    file.write_all_at(&page(1), 0).unwrap();
    let (tx, rx) = channel();
    // The file ends before the block does.
    let memory = GuestRam::of_files(vec![("m0".into(), 4 << 20, file.try_clone().unwrap())]);
    file.set_len(2048).unwrap();
    let memory = (Arc::new(memory), Marker::new(&[1; 32]));
    let reading = Reading::start("v", memory, || (), move |r| tx.send(r).unwrap()).unwrap();
    assert!(rx.recv_timeout(Duration::from_secs(60)).unwrap().is_err());
    drop(reading);
}
