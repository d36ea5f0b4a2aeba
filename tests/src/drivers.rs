//! Instructions by which a payload drives virtio devices of `irlm vmm`: a disk that it writes to and reads again, a network
//! card that it is heard and spoken to by, a balloon into which it gives pages. All without interrupts, now and then between two
//! writes of the payload's own work; what it came to is counted in guest memory, and can be held against the devices.

use crate::payload::Code;
use anyhow::{Context as _, Result, ensure};
use std::net::Ipv4Addr;
use std::ops::Range;

/// What a payload drives. Devices have addresses in this order, as `irlm vmm` gives them.
#[derive(Clone, Debug, Default)]
pub struct Drivers {
    /// A disk of at least [`SECTORS`] sectors, zeros at first.
    pub disk: bool,
    /// A network card.
    pub net: bool,
    /// A balloon: these guest pages are given, from the first on, as many as it is asked for.
    pub balloon: Option<Range<u32>>,
}

/// Registers of the first device, and how far apart devices are.
const FIRST: u32 = 0xd000_0000;
const WINDOW: u32 = 0x1000;
const FEATURES: u32 = 0x20;
const FEATURES_SEL: u32 = 0x24;
const QUEUE_SEL: u32 = 0x30;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const NOTIFY: u32 = 0x50;
const STATUS: u32 = 0x70;
const DESC: u32 = 0x80;
const AVAIL: u32 = 0x90;
const USED: u32 = 0xa0;
const CONFIG: u32 = 0x100;
/// Entries of a queue.
const SIZE: u32 = 8;

/// Where the payload counts: pages given; requests of the disk, and how many did not come out right; frames sent, taken, and what
/// the last one said.
const COUNTS: u32 = 0x3_0000;
const GIVEN: u32 = COUNTS;
const WRITES: u32 = COUNTS + 4;
const ERRORS: u32 = COUNTS + 8;
const SENT: u32 = COUNTS + 12;
const TAKEN: u32 = COUNTS + 16;
const HEARD: u32 = COUNTS + 20;

/// Sectors that are written round and round; each then holds the number of its write.
pub const SECTORS: u32 = 16;
/// The card's address, the guest's on its network, and the port that it sends to and hears on.
pub const MAC: &str = "52:54:00:00:00:0b";
/// See [`MAC`].
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
/// See [`MAC`].
pub const PORT: u16 = 8800;
/// Bytes of a frame: before it what the device wants, then Ethernet, IPv4, UDP; and what it says.
const HEADER: u32 = 12;
const SAID: u32 = HEADER + 14 + 20 + 8;
const FRAME: u32 = SAID + 18;

/// What the payload counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Pages given.
    pub given: u32,
    /// Sectors written.
    pub writes: u32,
    /// Requests that did not come out right.
    pub errors: u32,
    /// Frames sent.
    pub sent: u32,
    /// Frames taken in.
    pub taken: u32,
}

/// Where a queue's parts lie in guest memory: a page each.
fn ring(device: u32, queue: u32, part: u32) -> u32 {
    0x4_0000 + device * 0x1_0000 + queue * 0x4000 + part * 0x1000
}

/// Buffers of a device: sixteen of half a page.
fn buffer(device: u32, n: u32) -> u32 {
    0x4_8000 + device * 0x1_0000 + n * 0x800
}

/// mov dword [at], value
fn set(c: &mut Code, at: u32, value: u32) {
    c.with(&[0xc7, 0x05], at).put(&value.to_le_bytes());
}

/// Puts up one more chain of a queue and has the device work on it.
fn put_up(c: &mut Code, device: u32, queue: u32) {
    c.with(&[0x66, 0xff, 0x05], ring(device, queue, 1) + 2); // inc word [index of the available ring]
    set(c, FIRST + device * WINDOW + NOTIFY, queue);
}

/// Copies a word of memory to another place.
fn copy(c: &mut Code, from: u32, to: &[u32]) {
    c.with(&[0x8b, 0x05], from); // mov eax, [from]
    to.iter().for_each(|to| {
        c.with(&[0x89, 0x05], *to); // mov [to], eax
    });
}

/// Writes bytes to guest memory, from the code.
fn data(c: &mut Code, at: u32, bytes: &[u8]) {
    for (n, word) in (0u32..).zip(bytes.chunks(4)) {
        let mut whole = [0; 4];
        whole[..word.len()].copy_from_slice(word);
        set(c, at + 4 * n, u32::from_le_bytes(whole));
    }
}

/// `code`, unless the flags say what the short jump `over` (its opcode) stands for.
fn unless(c: &mut Code, over: u8, code: &Code) {
    c.put(&[over, u8::try_from(code.0.len()).expect("a short jump")]).put(&code.0);
}

impl Drivers {
    fn net_device(&self) -> u32 {
        self.disk.into()
    }

    fn balloon_device(&self) -> u32 {
        u32::from(self.disk) + u32::from(self.net)
    }

    /// What is done once: every device is found as the standard says, and gets its queues.
    #[must_use]
    pub fn begin(&self) -> Vec<u8> {
        let mut c = Code::default();
        if self.disk {
            begin_device(&mut c, 0, 0, 1);
            // A write by descriptors 0 to 2, a read by 3 to 5: header, sector, status.
            for (n, kind, from_device) in [(0, 1, 0), (3, 0, 2)] {
                set(&mut c, buffer(0, n), kind);
                let chain = [(16, 1, n + 1), (512, 1 | from_device, n + 2), (1, 2, 0)];
                for (i, (len, flags, next)) in (0u32..).zip(chain) {
                    describe(&mut c, ring(0, 0, 0), n + i, (buffer(0, n + i), len), flags | next << 16);
                }
            }
            // They take turns.
            (0..SIZE / 2).for_each(|n| set(&mut c, ring(0, 0, 1) + 4 + 4 * n, 3 << 16));
        }
        if self.net {
            let n = self.net_device();
            begin_device(&mut c, n, 1 << 5, 2);
            describe(&mut c, ring(n, 0, 0), 0, (buffer(n, 0), 0x800), 2);
            describe(&mut c, ring(n, 1, 0), 0, (buffer(n, 1), FRAME), 0);
            data(&mut c, buffer(n, 1) + HEADER, &frame());
            put_up(&mut c, n, 0);
        }
        if self.balloon.is_some() {
            let n = self.balloon_device();
            begin_device(&mut c, n, 0, 2);
            describe(&mut c, ring(n, 0, 0), 0, (buffer(n, 0), 4), 0);
        }
        c.0
    }

    /// What is done now and then. It may use eax, ecx, edx and esi.
    #[must_use]
    pub fn turn(&self) -> Vec<u8> {
        let mut c = Code::default();
        if self.disk {
            disk_turn(&mut c);
        }
        if self.net {
            net_turn(&mut c, self.net_device());
        }
        if let Some(pages) = &self.balloon {
            balloon_turn(&mut c, self.balloon_device(), pages.start);
        }
        c.0
    }

    /// What the payload of this memory has counted.
    pub fn counts(memory: &[u8]) -> Result<Counts> {
        let word = |at: u32| -> Result<u32> {
            let bytes = memory[at as usize..].first_chunk().context("memory ends early")?;
            Ok(u32::from_le_bytes(*bytes))
        };
        Ok(Counts {
            given: word(GIVEN)?,
            writes: word(WRITES)?,
            errors: word(ERRORS)?,
            sent: word(SENT)?,
            taken: word(TAKEN)?,
        })
    }

    /// Guest pages that must be zeros by now, and the one that may be.
    pub fn zeros(&self, memory: &[u8]) -> Result<(Range<u32>, Option<u32>)> {
        let Some(pages) = &self.balloon else { return Ok((0..0, None)) };
        let end = pages.start + Self::counts(memory)?.given;
        ensure!(end <= pages.end, "it gave pages up to {end:#x}, and has only {pages:#x?}");
        Ok((pages.start..end, Some(end)))
    }

    /// Looks whether a disk holds exactly what the payload says it wrote.
    pub fn check_disk(counts: Counts, sectors: &[u8]) -> Result<()> {
        ensure!(counts.errors == 0, "{} requests to the disk did not come out right", counts.errors);
        for (n, sector) in (0u32..SECTORS).zip(sectors.chunks(512)) {
            let is = u32::from_le_bytes(*sector.first_chunk().context("the disk ends early")?);
            // The last write whose number ends so.
            let back = counts.writes.wrapping_sub(n) % SECTORS;
            let last = counts.writes.saturating_sub(back);
            let want = if last % SECTORS == n { last } else { 0 };
            // It may stand between counting a write and doing it.
            let before = want == counts.writes && is == want.saturating_sub(SECTORS);
            ensure!(is == want || before, "sector {n} is of write {is}, not {want} of {}", counts.writes);
        }
        Ok(())
    }
}

/// Section 3.1.1 of the standard: these features and a modern device; queues; then it goes.
fn begin_device(c: &mut Code, device: u32, features: u32, queues: u32) {
    let at = FIRST + device * WINDOW;
    for status in [0, 1, 3] {
        set(c, at + STATUS, status);
    }
    for (half, bits) in [(0, features), (1, 1)] {
        set(c, at + FEATURES_SEL, half);
        set(c, at + FEATURES, bits);
    }
    set(c, at + STATUS, 11);
    for queue in 0..queues {
        set(c, at + QUEUE_SEL, queue);
        set(c, at + QUEUE_NUM, SIZE);
        for (part, low) in [(0, DESC), (1, AVAIL), (2, USED)] {
            set(c, at + low, ring(device, queue, part));
            set(c, at + low + 4, 0);
        }
        set(c, at + QUEUE_READY, 1);
    }
    set(c, at + STATUS, 15);
}

/// Descriptor `n`: where, how long, flags and the next one.
fn describe(c: &mut Code, table: u32, n: u32, (at, len): (u32, u32), flags: u32) {
    for (i, word) in (0u32..).zip([at, 0, len, flags]) {
        set(c, table + 16 * n + 4 * i, word);
    }
}

/// Writes the next number to its sector; reads the sector that was written longest ago, whoever wrote it, and looks whether it
/// holds that number.
fn disk_turn(c: &mut Code) {
    let (header, sector, status) = (buffer(0, 0), buffer(0, 1), buffer(0, 2));
    let (read_header, read, read_status) = (buffer(0, 3), buffer(0, 4), buffer(0, 5));
    c.with(&[0xff, 0x05], WRITES); // inc dword [WRITES]
    copy(c, WRITES, &[sector]);
    c.with(&[0x25], SECTORS - 1).with(&[0x89, 0x05], header + 8); // and eax, SECTORS - 1; mov [header + 8], eax
    c.put(&[0x40]).with(&[0x25], SECTORS - 1).with(&[0x89, 0x05], read_header + 8); // inc eax; and …; mov …, eax
    set(c, status, 0xff);
    set(c, read_status, 0xff);
    put_up(c, 0, 0);
    put_up(c, 0, 0);
    c.with(&[0x8b, 0x05], WRITES) // mov eax, [WRITES]
        .with(&[0x2d], SECTORS - 1) // sub eax, SECTORS - 1
        .put(&[0x73, 2, 0x31, 0xc0]) // jae over; xor eax, eax
        .with(&[0x33, 0x05], read) // xor eax, [read]
        .with(&[0x0b, 0x05], status) // or eax, [status]
        .with(&[0x0b, 0x05], read_status); // or eax, [read_status]
    let mut wrong = Code::default();
    wrong.with(&[0xff, 0x05], ERRORS); // inc dword [ERRORS]
    unless(c, 0x74, &wrong); // jz
}

/// Takes a frame in if one is there and is for it; sends one that says how many it has sent, and what it heard last.
fn net_turn(c: &mut Code, device: u32) {
    let (heard, said) = (buffer(device, 0), buffer(device, 1) + SAID);
    let mut ours = Code::default();
    copy(&mut ours, heard + SAID, &[HEARD]);
    ours.with(&[0xff, 0x05], TAKEN); // inc dword [TAKEN]
    let mut some = Code::default();
    some.with(&[0x66, 0x81, 0x3d], heard + SAID - 6).put(&PORT.to_be_bytes()); // cmp word [the port], PORT
    unless(&mut some, 0x75, &ours); // jne
    put_up(&mut some, device, 0);
    // The one buffer that is put up at a time has been used.
    c.with(&[0x66, 0x8b, 0x05], ring(device, 0, 2) + 2) // mov ax, [index of the used ring]
        .with(&[0x66, 0x3b, 0x05], ring(device, 0, 1) + 2); // cmp ax, [index of the available ring]
    unless(c, 0x75, &some); // jne
    c.with(&[0xff, 0x05], SENT); // inc dword [SENT]
    copy(c, SENT, &[said]);
    copy(c, HEARD, &[said + 4]);
    put_up(c, device, 1);
}

/// Gives pages as long as more are asked for, one by one.
fn balloon_turn(c: &mut Code, device: u32, first: u32) {
    let config = FIRST + device * WINDOW + CONFIG;
    let mut more = Code::default();
    more.with(&[0x8b, 0x05], GIVEN) // mov eax, [GIVEN]
        .with(&[0x05], first) // add eax, first
        .with(&[0x89, 0x05], buffer(device, 0)); // mov [buffer], eax
    put_up(&mut more, device, 0);
    more.with(&[0xff, 0x05], GIVEN); // inc dword [GIVEN]
    copy(&mut more, GIVEN, &[config + 4]);
    let from = c.0.len();
    c.with(&[0x8b, 0x05], config) // mov eax, [config]
        .with(&[0x3b, 0x05], GIVEN); // cmp eax, [GIVEN]
    let back = c.0.len() - from + 2 + more.0.len() + 2;
    more.put(&[0xeb, u8::try_from(256 - back).expect("a short jump")]); // jmp again
    unless(c, 0x76, &more); // jbe
}

/// Ethernet, IPv4 and UDP of what the payload sends to all.
fn frame() -> Vec<u8> {
    let [port_high, port_low] = PORT.to_be_bytes();
    let udp = (FRAME - SAID + 8) as u8;
    let mut ip = [0x45, 0, 0, udp + 20, 0, 0, 0, 0, 64, 17, 0, 0];
    let ends = [GUEST.octets(), Ipv4Addr::BROADCAST.octets()].concat();
    let words = ip.chunks(2).chain(ends.chunks(2)).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mac: Vec<u8> = MAC.split(':').filter_map(|b| u8::from_str_radix(b, 16).ok()).collect();
    let udp = [port_high, port_low, port_high, port_low, 0, udp, 0, 0];
    [&[0xff; 6][..], &mac, &[8, 0], &ip, &ends, &udp].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_s_model_takes_what_was_written_and_nothing_else() {
        for writes in [0u32, 1, 5, 15, 16, 17, 100] {
            let mut disk = vec![0; SECTORS as usize * 512];
            for n in 1..=writes {
                let at = (n % SECTORS) as usize * 512;
                disk[at..at + 4].copy_from_slice(&n.to_le_bytes());
            }
            let counts = Counts { given: 0, writes, errors: 0, sent: 0, taken: 0 };
            Drivers::check_disk(counts, &disk).unwrap();
            Drivers::check_disk(Counts { writes: writes + 1, ..counts }, &disk).unwrap();
            assert!(Drivers::check_disk(Counts { writes: writes + 2, ..counts }, &disk).is_err());
            assert!(Drivers::check_disk(Counts { errors: 1, ..counts }, &disk).is_err());
            if writes > 0 {
                assert!(Drivers::check_disk(Counts { writes: writes - 1, ..counts }, &disk).is_err());
            }
        }
    }

    #[test]
    fn the_frame_s_header_adds_up() {
        let frame = frame();
        assert_eq!(frame.len() as u32, SAID - HEADER);
        let sum: u32 = frame[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
