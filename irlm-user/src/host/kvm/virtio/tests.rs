//! A driver as Linux has one, against the registers and queues of a device: no guest and no KVM in between.

use super::super::memory::{HostPages, MemorySpec};
use super::*;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use vm_memory::{Bytes as _, GuestAddress};

const RINGS: u64 = 0x10_000;
const BUFFERS: u64 = 0x40_000;
const SIZE: u16 = 8;
const STILL: Duration = Duration::from_secs(1);

fn memory() -> Arc<Memory> {
    let spec = MemorySpec { bytes: 4 << 20, slot_bytes: None, pages: HostPages::Small };
    Arc::new(Memory::new(&spec).unwrap())
}

/// A driver and what it has told the device.
struct Driver {
    device: Device,
    memory: Arc<Memory>,
    avail: Vec<u16>,
    used: Vec<u16>,
}

impl Driver {
    fn new(kind: Kind) -> Self {
        Self::with(memory(), |_| kind)
    }
    fn with(memory: Arc<Memory>, kind: impl FnOnce(&Arc<Memory>) -> Kind) -> Self {
        let device = Device::of(kind(&memory), 0, None, &memory).unwrap();
        assert!(device.stand_still(false, STILL));
        Self { device, memory, avail: vec![0; 3], used: vec![0; 3] }
    }
    fn read(&self, at: u64) -> u32 {
        let mut b = [0; 4];
        self.device.read(at, &mut b);
        u32::from_le_bytes(b)
    }
    fn write(&self, at: u64, word: u32) {
        self.device.write(at, &word.to_le_bytes());
    }
    fn ring(queue: usize, part: u64) -> u64 {
        RINGS + queue as u64 * 0x3000 + part * 0x1000
    }

    /// Section 3.1.1, with these features; the status at its end.
    fn begin(&self, features: u64) -> u32 {
        self.write(reg::STATUS, 0);
        self.write(reg::STATUS, 1);
        self.write(reg::STATUS, 3);
        for half in 0..2 {
            self.write(reg::DRIVER_SEL, half);
            self.write(reg::DRIVER, (features >> (32 * half)) as u32);
        }
        self.write(reg::STATUS, 3 | FEATURES_OK);
        for q in 0..3 {
            self.write(reg::QUEUE_SEL, q);
            if self.read(reg::QUEUE_MAX) == 0 {
                continue;
            }
            self.write(reg::QUEUE_NUM, SIZE.into());
            for (part, low) in [(0, reg::DESC_LOW), (1, reg::AVAIL_LOW), (2, reg::USED_LOW)] {
                self.write(low, Self::ring(q as usize, part) as u32);
                self.write(low + 4, 0);
            }
            self.write(reg::QUEUE_READY, 1);
        }
        self.write(reg::STATUS, 3 | FEATURES_OK | DRIVER_OK);
        self.read(reg::STATUS)
    }

    /// Puts up a chain: (address, length, whether the device writes there).
    fn put(&mut self, queue: usize, chain: &[(u64, u32, bool)]) {
        let guest = self.memory.guest();
        for (i, (at, len, writes)) in (0u16..).zip(chain) {
            let last = usize::from(i) + 1 == chain.len();
            let flags = u16::from(!last) | u16::from(*writes) << 1;
            let desc = Self::ring(queue, 0) + 16 * u64::from(i);
            guest.write_obj(*at, GuestAddress(desc)).unwrap();
            guest.write_obj(*len, GuestAddress(desc + 8)).unwrap();
            guest.write_obj([flags, i + 1], GuestAddress(desc + 12)).unwrap();
        }
        let avail = Self::ring(queue, 1);
        let slot = u64::from(self.avail[queue] % SIZE);
        guest.write_obj(0u16, GuestAddress(avail + 4 + 2 * slot)).unwrap();
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        guest.write_obj(self.avail[queue], GuestAddress(avail + 2)).unwrap();
    }
    fn notify(&self, queue: usize) {
        self.write(reg::NOTIFY, queue as u32);
    }
    /// Bytes that the device says it wrote for the next chain, if it is done with it.
    fn done(&mut self, queue: usize) -> Option<u32> {
        let (guest, used) = (self.memory.guest(), Self::ring(queue, 2));
        let idx: u16 = guest.read_obj(GuestAddress(used + 2)).unwrap();
        if idx == self.used[queue] {
            return None;
        }
        let slot = u64::from(self.used[queue] % SIZE);
        self.used[queue] = self.used[queue].wrapping_add(1);
        Some(guest.read_obj(GuestAddress(used + 4 + 8 * slot + 4)).unwrap())
    }
    fn interrupted(&self) -> bool {
        self.device.line.read().is_ok()
    }
    /// One request of a disk; its status.
    fn disk(&mut self, kind: u32, sector: u64, data: u64, len: u32) -> u8 {
        let (header, status) = (BUFFERS, BUFFERS + 0x100);
        let guest = self.memory.guest();
        guest.write_obj([kind, 0, sector as u32, (sector >> 32) as u32], GuestAddress(header)).unwrap();
        guest.write_obj(0xeeu8, GuestAddress(status)).unwrap();
        let writes = kind != 1;
        let mut chain = vec![(header, 16, false), (data, len, writes), (status, 1, true)];
        chain.retain(|c| c.1 > 0);
        self.put(0, &chain);
        self.notify(0);
        self.done(0).expect("done within the notification");
        self.memory.guest().read_obj(GuestAddress(status)).unwrap()
    }
}

fn image(sectors: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
    let bytes: Vec<u8> = (0..sectors * 512).map(|n| (n / 512 * 7 + n % 251) as u8).collect();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

fn balloon() -> Driver {
    Driver::with(memory(), |memory| Kind::Balloon(balloon::Balloon::new(memory)))
}

fn disk(file: &tempfile::NamedTempFile, read_only: bool) -> Driver {
    Driver::new(Kind::Block(block::Block::open(file.path(), read_only).unwrap()))
}

const DATA: u64 = BUFFERS + 0x1000;

#[test]
fn a_driver_finds_the_device_and_only_features_it_has_are_taken() {
    let (file, _) = image(100);
    let d = disk(&file, false);
    assert_eq!([reg::MAGIC, reg::VERSION, reg::DEVICE].map(|r| d.read(r)), [MAGIC, 2, 2]);
    d.write(reg::FEATURES_SEL, 1);
    assert_eq!(d.read(reg::FEATURES), 1, "a modern device");
    d.write(reg::FEATURES_SEL, 7);
    assert_eq!(d.read(reg::FEATURES), 0);
    assert_eq!((d.read(reg::CONFIG), d.read(reg::CONFIG + 4)), (100, 0));
    assert_eq!(d.read(reg::SHM_FIRST), u32::MAX);
    assert_eq!(d.begin(VERSION_1) & FEATURES_OK, FEATURES_OK);
    assert_eq!(d.begin(VERSION_1 | 1 << 40) & FEATURES_OK, 0, "a feature that it does not have");
    assert_eq!(d.begin(0) & FEATURES_OK, 0, "a legacy driver");
    assert_eq!(Device::parameter(1), "virtio_mmio.device=4K@0xd0001000:6");
}

#[test]
fn sectors_are_read_written_and_flushed_and_nothing_beyond_the_disk() {
    let (file, bytes) = image(300);
    let mut d = disk(&file, false);
    d.begin(VERSION_1 | EVENT_IDX | INDIRECT);
    // More than is read at a time.
    assert_eq!(d.disk(0, 10, DATA, 200 * 512), 0);
    let mut got = vec![0; 200 * 512];
    d.memory.guest().read_slice(&mut got, GuestAddress(DATA)).unwrap();
    assert!(got == bytes[10 * 512..210 * 512]);
    assert!(d.interrupted());
    assert_eq!(d.read(reg::INTERRUPT), USED_BUFFER);
    d.write(reg::ACK, USED_BUFFER);
    assert_eq!(d.read(reg::INTERRUPT), 0);
    d.memory.guest().write_slice(&[0xab; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(d.disk(1, 298, DATA, 1024), 0);
    assert_eq!(d.disk(4, 0, 0, 0), 0, "flushed");
    let mut end = [0; 1024];
    file.as_file().read_exact_at(&mut end, 298 * 512).unwrap();
    assert_eq!(end, [0xab; 1024]);
    assert_eq!(d.disk(8, 0, DATA, 20), 0);
    assert_eq!(d.memory.guest().read_obj::<[u8; 9]>(GuestAddress(DATA)).unwrap(), *b"irlm-disk");
    for (kind, sector, len, status) in
        [(0, 299, 1024, 1), (1, 300, 512, 1), (0, u64::MAX, 512, 1), (0, 0, 100, 1), (77, 0, 512, 2)]
    {
        assert_eq!(d.disk(kind, sector, DATA, len), status, "{kind} {sector} {len}");
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 300 * 512);
    // What the device wrote is in the VMM's own notes: status, data, used ring.
    let mut bits: Vec<Vec<u64>> = d.memory.slots().iter().map(|s| vec![0; s.words()]).collect();
    d.memory.take_own(&mut bits);
    let noted = |at: u64| bits[0][at as usize / 4096 / 64] >> (at / 4096 % 64) & 1 == 1;
    assert!(noted(DATA + 0x10000) && noted(BUFFERS) && noted(Driver::ring(0, 2)));
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let (file, bytes) = image(4);
    let mut d = disk(&file, true);
    d.write(reg::FEATURES_SEL, 0);
    assert_eq!(d.read(reg::FEATURES) >> 5 & 1, 1);
    d.begin(VERSION_1 | 1 << 5);
    assert_eq!(d.disk(1, 0, DATA, 512), 1);
    assert!(std::fs::read(file.path()).unwrap() == bytes);
    assert_eq!(d.disk(0, 0, DATA, 512), 0);
}

#[test]
fn files_that_are_no_disks_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd.img");
    std::fs::write(&odd, [0; 700]).unwrap();
    for (path, why) in
        [(odd.as_path(), "whole sectors"), (dir.path(), ""), (&dir.path().join("none"), "No such")]
    {
        let e = block::Block::open(path, true).err().unwrap().to_string();
        assert!(e.contains(why) && e.contains(&*path.to_string_lossy()) && !e.contains('\n'), "{e}");
    }
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_to_reset_and_can_go_on_then() {
    let (file, _) = image(4);
    let mut d = disk(&file, false);
    d.begin(VERSION_1);
    // No room for the status, and a header that is cut.
    for chain in [vec![(BUFFERS, 16, false)], vec![(BUFFERS, 7, false), (DATA, 1, true)]] {
        d.put(0, &chain);
        d.notify(0);
        assert_eq!(d.read(reg::STATUS) & NEEDS_RESET, NEEDS_RESET, "{chain:?}");
        assert!(d.interrupted());
        d.notify(0);
        assert_eq!(d.begin(VERSION_1) & NEEDS_RESET, 0);
        (d.avail, d.used) = (vec![0; 3], vec![0; 3]);
        d.memory.guest().write_obj(0u16, GuestAddress(Driver::ring(0, 2) + 2)).unwrap();
    }
    // Rings that are not in memory.
    d.write(reg::STATUS, 0);
    d.begin(VERSION_1);
    d.write(reg::STATUS, 0);
    d.write(reg::STATUS, 3);
    for half in 0..2 {
        d.write(reg::DRIVER_SEL, half);
        d.write(reg::DRIVER, half);
    }
    d.write(reg::STATUS, 11);
    d.write(reg::QUEUE_SEL, 0);
    d.write(reg::DESC_HIGH, 0xffff);
    d.write(reg::QUEUE_READY, 1);
    d.write(reg::STATUS, 15);
    d.notify(0);
    assert_eq!(d.read(reg::STATUS) & NEEDS_RESET, NEEDS_RESET);
    // Registers that are not words, queues that are not there: nothing happens.
    d.device.write(reg::STATUS, &[0]);
    d.notify(55);
    d.device.read(reg::STATUS, &mut [0; 2]);
    d.device.read(u64::MAX, &mut [0; 8]);
}

#[test]
fn a_disk_goes_on_at_another_host_where_it_was() {
    let (file, bytes) = image(64);
    let mut d = disk(&file, false);
    d.begin(VERSION_1 | EVENT_IDX);
    for n in 0..5 {
        assert_eq!(d.disk(0, n, DATA, 512), 0);
    }
    assert!(d.device.stand_still(true, STILL));
    let (state, memory) = (d.device.save(), Arc::clone(&d.memory));
    assert!(is_state(&state) && State::of(&state).unwrap().bytes() == state);
    // Standing still it does nothing.
    d.notify(0);
    let there =
        Device::of(Kind::Block(block::Block::open(file.path(), false).unwrap()), 0, None, &memory).unwrap();
    there.load(&state).unwrap();
    assert_eq!(there.save(), state);
    let mut moved = Driver { device: there, memory, avail: d.avail, used: d.used };
    assert!(moved.device.stand_still(false, STILL));
    for n in 5..12 {
        assert_eq!(moved.disk(0, n, DATA, 512), 0);
        let mut got = [0; 512];
        moved.memory.guest().read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert!(got[..] == bytes[n as usize * 512..][..512]);
    }
    // Another disk, or none that has such a state.
    let (other, _) = image(63);
    let e = disk(&other, false).device.load(&state).unwrap_err().to_string();
    assert!(e.contains("64 sectors") && e.contains("63"), "{e}");
    for cut in 0..state.len() {
        assert!(moved.device.load(&state[..cut]).is_err());
    }
}

impl Driver {
    /// Puts up page numbers to be given; the device hears of it with [`Self::notify`].
    fn give(&mut self, pages: &[u32]) {
        for (n, page) in pages.iter().enumerate() {
            self.memory.guest().write_obj(*page, GuestAddress(DATA + 4 * n as u64)).unwrap();
        }
        self.put(balloon::INFLATE, &[(DATA, 4 * pages.len() as u32, false)]);
    }
    /// The first byte of a guest page.
    fn at(&self, page: u64) -> u8 {
        self.memory.guest().read_obj(GuestAddress(page * 4096)).unwrap()
    }
}

/// Given away in the tests; nothing of the driver's is there.
const GIVEN: u64 = 0x200;

#[test]
fn pages_that_are_given_and_reported_are_zeros_and_noted_and_no_others() {
    let mut d = balloon();
    assert_eq!((d.read(reg::DEVICE), d.read(reg::CONFIG), d.read(reg::CONFIG + 4)), (5, 0, 0));
    assert_eq!(d.read(reg::FEATURES), (INDIRECT | EVENT_IDX) as u32 | 1 << 2 | 1 << 5);
    assert_eq!(d.begin(VERSION_1 | 1 << 2 | 1 << 5) & FEATURES_OK, FEATURES_OK);
    // Told what to give, by interrupt, and only whole pages that there are.
    for bad in [1, 4 << 20 | 4096, u64::MAX] {
        assert!(d.device.ask_for(bad, STILL).is_err(), "{bad}");
    }
    assert!(!d.interrupted());
    d.device.ask_for(16 << 12, STILL).unwrap();
    assert!(d.interrupted());
    assert_eq!(
        (d.read(reg::INTERRUPT), d.read(reg::CONFIG), d.read(reg::GENERATION)),
        (CONFIG_CHANGE, 16, 1)
    );
    d.write(reg::ACK, CONFIG_CHANGE);
    d.memory.guest().write_slice(&vec![7; 64 << 12], GuestAddress(GIVEN << 12)).unwrap();
    let mut bits: Vec<Vec<u64>> = d.memory.slots().iter().map(|s| vec![0; s.words()]).collect();
    d.memory.take_own(&mut bits);
    // In any order, twice, alone, and one that is no page at all.
    let given = [0x203, 0x201, 0x202, 0x201, 0x20a, 0xffff_ffff, 0x400];
    d.give(&given);
    d.notify(balloon::INFLATE);
    assert_eq!(d.done(balloon::INFLATE), Some(0));
    assert!(d.interrupted());
    d.write(reg::CONFIG + 4, 4);
    let is_given = |page: u64| matches!(page, 0x201..=0x203 | 0x20a);
    for page in 0..64 {
        let page = GIVEN + page;
        assert_eq!(d.at(page), if is_given(page) { 0 } else { 7 }, "{page:#x}");
    }
    bits[0].fill(0);
    d.memory.take_own(&mut bits);
    assert_eq!(bits[0][8], 0b100_0000_1110, "given pages count as written");
    // Free pages are the report's own buffers.
    d.put(balloon::REPORT, &[((GIVEN + 0x10) << 12, 4 << 12, true), ((GIVEN + 0x20) << 12, 1 << 12, true)]);
    d.notify(balloon::REPORT);
    assert_eq!(d.done(balloon::REPORT), Some(0));
    assert_eq!([0x0f, 0x10, 0x13, 0x14, 0x20, 0x21].map(|n| d.at(GIVEN + n)), [7, 0, 0, 7, 0, 7]);
    let status = d.device.balloon().unwrap();
    assert_eq!([status.asked, status.given, status.released].map(|b| b >> 12), [16, 4, 9]);
    // Taken back.
    d.memory.guest().write_obj(0x201u32, GuestAddress(DATA)).unwrap();
    d.put(balloon::DEFLATE, &[(DATA, 4, false)]);
    d.notify(balloon::DEFLATE);
    assert_eq!(d.done(balloon::DEFLATE), Some(0));
    d.memory.guest().write_obj(9u8, GuestAddress(0x201 << 12)).unwrap();
    assert_eq!(d.at(0x201), 9);

    // It goes on elsewhere with what it was asked for and has given.
    assert!(d.device.stand_still(true, STILL));
    assert!(d.device.ask_for(0, STILL).is_err(), "nothing changes while it stands still");
    let state = d.device.save();
    assert!(is_state(&state));
    let mut there = balloon();
    there.device.load(&state).unwrap();
    assert_eq!(there.device.save(), state);
    let status = there.device.balloon().unwrap();
    assert_eq!([status.asked, status.given, status.released].map(|b| b >> 12), [16, 4, 0]);
    (there.avail, there.used) = (d.avail, d.used);
    let (image, _) = image(4);
    let e = disk(&image, false).device.load(&state).unwrap_err().to_string();
    assert!(e.contains("a balloon") && e.contains("a disk of 4 sectors"), "{e}");
    // A driver that begins anew has given nothing.
    there.begin(VERSION_1);
    assert_eq!(there.read(reg::CONFIG + 4), 0);
}

/// While pages still come, who gives pages away waits until the agent has read of it: whatever else is asked of the VMM is
/// answered meanwhile, and the end of faults lets it go.
#[test]
fn pages_given_away_while_others_come_are_told_of_over_userfaultfd() {
    use super::super::userfault::{Choice, Userfault};
    use crate::host::uffd::{Event, Uffd};
    let mut d = balloon();
    d.begin(VERSION_1);
    // What the driver and the device need is there already.
    d.memory.guest().write_slice(&vec![7; 64 << 12], GuestAddress(GIVEN << 12)).unwrap();
    d.give(&[0x23f]);
    d.notify(balloon::INFLATE);
    let u = match Userfault::new(&d.memory, Choice::Probe) {
        Ok(u) => u,
        Err(e) => {
            println!("skipped: {e}");
            return;
        }
    };
    d.give(&[0x210, 0x211, 0x220]);
    let ranges: Vec<(u64, u64)> = d.memory.slots().iter().map(|s| (s.base, s.bytes)).collect();
    let agent = Uffd::new(u.fd().try_clone_to_owned().unwrap(), &ranges).unwrap();
    let next = |want: usize| {
        let (mut events, until) = (Vec::new(), Instant::now() + Duration::from_secs(10));
        while events.len() < want {
            assert!(Instant::now() < until, "no event");
            agent.read(&mut events).unwrap();
            std::thread::sleep(Duration::from_micros(100));
        }
        events
    };
    std::thread::scope(|s| {
        let d = &d;
        let vcpu = s.spawn(|| d.notify(balloon::INFLATE));
        assert_eq!(next(1), [Event::Removed { slot: 0, page: 0x210, count: 2 }]);
        // The second waits; nothing else does, but for what needs the device.
        std::thread::sleep(Duration::from_millis(50));
        assert!(!vcpu.is_finished());
        assert_eq!(d.device.balloon().unwrap().released >> 12, 1 + 2);
        let short = Duration::from_millis(20);
        assert!(!d.device.stand_still(true, short));
        assert!(d.device.ask_for(0, short).unwrap_err().to_string().contains("agent"));
        assert_eq!(next(1), [Event::Removed { slot: 0, page: 0x220, count: 1 }]);
        vcpu.join().unwrap();
        // Touched again such a page is asked for, and what it held is gone.
        let touch = s.spawn(|| d.at(0x211));
        assert!(matches!(next(1)[..], [Event::Fault { slot: 0, page: 0x211, minor: false, .. }]));
        agent.zero(0, 0x211, 1).unwrap();
        assert_eq!(touch.join().unwrap(), 0);
    });
    d.give(&[0x230]);
    std::thread::scope(|s| {
        let vcpu = s.spawn(|| d.notify(balloon::INFLATE));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!vcpu.is_finished(), "nobody has read of it");
        u.end(&d.memory).unwrap();
        vcpu.join().unwrap();
    });
    assert_eq!((d.at(0x230), d.at(0x231)), (0, 7));
}

/// A card with its wire's other end.
fn card() -> (Driver, File) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    // Keeps frames apart, as a TAP device does.
    let (a, b): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Driver::new(Kind::Net(net::Net::on(File::from(a), [0x52, 1, 2, 3, 4, 5]))), File::from(b))
}

#[test]
fn frames_go_out_and_come_in_whole() {
    let (mut d, mut wire) = card();
    assert_eq!([d.read(reg::CONFIG), d.read(reg::CONFIG + 4) & 0xffff], [0x0302_0152, 0x0504]);
    d.begin(VERSION_1 | 1 << 5);
    d.memory.guest().write_slice(&[9; 12], GuestAddress(DATA)).unwrap();
    d.memory.guest().write_slice(&[7; 60], GuestAddress(DATA + 100)).unwrap();
    d.put(net::SEND, &[(DATA, 12, false), (DATA + 100, 60, false)]);
    d.notify(net::SEND);
    assert_eq!(d.done(net::SEND), Some(0));
    let mut frame = [1; 200];
    assert_eq!(wire.read(&mut frame).unwrap(), 72);
    assert_eq!(
        (&frame[..12], &frame[12..72]),
        (&[0; 12][..], &[7; 60][..]),
        "no offloads, whatever the driver says"
    );
    // Nothing comes before the driver has a buffer.
    wire.write_all(&[3; 90]).unwrap();
    d.device.bring();
    assert_eq!(d.done(net::RECEIVE), None);
    d.put(net::RECEIVE, &[(DATA, 2000, true)]);
    d.notify(net::RECEIVE);
    d.device.bring();
    assert_eq!(d.done(net::RECEIVE), Some(90));
    assert!(d.interrupted());
    let got: [u8; 14] = d.memory.guest().read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!(got, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3, 3], "one buffer");
    // A frame without room for it is lost, and the next one comes.
    d.put(net::RECEIVE, &[(DATA, 50, true)]);
    wire.write_all(&[4; 90]).unwrap();
    wire.write_all(&[5; 40]).unwrap();
    d.device.bring();
    assert_eq!(d.done(net::RECEIVE), Some(40));
    // While the VM stands still nothing comes; then it does.
    d.put(net::RECEIVE, &[(DATA, 2000, true)]);
    wire.write_all(&[6; 64]).unwrap();
    assert!(d.device.stand_still(true, STILL));
    d.device.bring();
    assert_eq!(d.done(net::RECEIVE), None);
    assert!(d.device.stand_still(false, STILL));
    d.device.bring();
    assert_eq!(d.done(net::RECEIVE), Some(64));
}

/// The kernel of this machine answers an ARP request that the card sent, over a TAP device in a network of its own.
#[test]
fn the_kernel_answers_over_a_tap_device() {
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: needs root and /dev/net/tun");
        return;
    }
    // The network namespace ends with this thread, and the device with it.
    let alone = std::thread::spawn(|| {
        // SAFETY: only this thread's network namespace changes, and nothing else runs on it.
        let alone = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        if let Err(e) = alone {
            println!("skipped: no network namespace: {e}");
            return;
        }
        let mac = [0x52, 0, 0, 0, 0, 9];
        let mut d = Driver::new(Kind::Net(net::Net::open("irlmtest0", mac).unwrap()));
        let up = std::process::Command::new("ip")
            .args(["-batch", "-"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .and_then(|mut c| {
                let lines = b"link set irlmtest0 up\naddr add 10.99.0.1/24 dev irlmtest0\n";
                c.stdin.take().map_or(Ok(()), |mut i| i.write_all(lines))?;
                c.wait()
            });
        assert!(up.unwrap().success());
        d.begin(VERSION_1 | 1 << 5);
        let request = [
            &[0xff; 6][..],
            &mac,
            &[8, 6],                   // to all, ARP
            &[0, 1, 8, 0, 6, 4, 0, 1], // Ethernet, IPv4, request
            &mac,
            &[10, 99, 0, 2],
            &[0; 6],
            &[10, 99, 0, 1],
        ]
        .concat();
        d.memory.guest().write_slice(&[0; 12], GuestAddress(DATA)).unwrap();
        d.memory.guest().write_slice(&request, GuestAddress(DATA + 12)).unwrap();
        d.put(net::SEND, &[(DATA, 12 + request.len() as u32, false)]);
        d.notify(net::SEND);
        assert_eq!(d.done(net::SEND), Some(0));
        // Whatever else the kernel says on a new link comes as well.
        for n in 0..200 {
            d.put(net::RECEIVE, &[(DATA, 2000, true)]);
            while d.done(net::RECEIVE).is_none() {
                d.device.bring();
                assert!(n < 199, "no answer");
            }
            let mut got = [0; 54];
            d.memory.guest().read_slice(&mut got, GuestAddress(DATA)).unwrap();
            let frame = &got[12..];
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                assert_eq!((&frame[..6], &frame[28..32]), (&mac[..], &[10, 99, 0, 1][..]));
                return;
            }
        }
        panic!("no answer among 200 frames");
    });
    alone.join().unwrap();
}
