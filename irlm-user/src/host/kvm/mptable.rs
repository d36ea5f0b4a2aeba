//! The MultiProcessor Specification's tables (version 1.4), by which a kernel without ACPI learns of its processors and
//! of where interrupts go.

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryResult};

/// In the firmware's range, where kernels look for it.
const AT: u64 = 0xf_0000;
const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;
/// Interrupt lines of the ISA bus.
const LINES: u8 = 16;
const POINTER: usize = 16;

/// Writes pointer and table.
pub(super) fn write(guest: &impl GuestMemoryBackend, vcpus: u32) -> GuestMemoryResult<()> {
    guest.write_slice(&table(vcpus as u8), GuestAddress(AT))
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..vcpus {
        // Enabled; the first is the one that boots.
        let flags = if id == 0 { 3 } else { 1 };
        entries.extend_from_slice(&[0, id, 0x14, flags, 0, 6, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    entries.extend_from_slice(&[1, 0]);
    entries.extend_from_slice(b"ISA   ");
    let ioapic = vcpus;
    entries.extend_from_slice(&[2, ioapic, 0x11, 1]);
    entries.extend_from_slice(&IOAPIC.to_le_bytes());
    for line in 0..LINES {
        entries.extend_from_slice(&[3, 0, 0, 0, 0, line, ioapic, line]);
    }
    // Every processor: the old controllers on its first local line, NMIs on its second.
    entries.extend_from_slice(&[4, 3, 0, 0, 0, 0, 0xff, 0]);
    entries.extend_from_slice(&[4, 1, 0, 0, 0, 0, 0xff, 1]);
    let count = u16::from(vcpus) + 2 + u16::from(LINES) + 2;

    let mut header = b"PCMP".to_vec();
    header.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    header.extend_from_slice(&[4, 0]);
    header.extend_from_slice(b"IRLM    VMM         ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LAPIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    header[7] = complement(&header);

    let mut out = b"_MP_".to_vec();
    out.extend_from_slice(&(AT as u32 + POINTER as u32).to_le_bytes());
    out.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    out[10] = complement(&out);
    out.extend_from_slice(&header);
    out
}

/// What makes the sum of all bytes zero.
fn complement(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_lengths_and_counts_are_right() {
        for vcpus in [1, 4, 64] {
            let t = table(vcpus);
            let (pointer, config) = t.split_at(POINTER);
            assert_eq!((complement(pointer), complement(config)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
            let mut rest = &config[44..];
            let (mut count, mut processors) = (0, 0);
            while let Some(kind) = rest.first() {
                rest = &rest[if *kind == 0 { 20 } else { 8 }..];
                count += 1;
                processors += u8::from(*kind == 0);
            }
            assert_eq!((u16::from_le_bytes([config[34], config[35]]), processors), (count, vcpus));
        }
    }
}
