//! The bytes of saved state: everything of a VM but its RAM. They travel between hosts, so they are hostile: nothing is
//! allocated by a length in them, every section has exactly its length and its place, and a hash over all of it comes
//! last. docs/vmm.md has the table.

use super::MAX_VCPUS;
use super::devices::serial_state;
use super::memory::MAX_SLOTS;
use super::virtio::{MAX_DEVICES, is_state};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

// Why bytes are refused.
mod error;

pub use error::{SnapshotError, VERSION};

/// What it begins with.
pub const MAGIC: [u8; 8] = *b"IRLMVMST";
/// Longest state taken; `net::vmm::words` has the same bound.
pub const MAX_BYTES: usize = 64 << 20;
/// MSRs of a vCPU; KVM lists some 150.
const MAX_MSRS: usize = 4096;
/// CPUID leaves of a vCPU (KVM's own bound).
const MAX_CPUID: usize = 256;
/// Vector registers: KVM's own bound is far below.
const MAX_XSAVE: usize = 1 << 20;
/// What every vCPU has at least.
pub(super) const MIN_XSAVE: usize = 4096;

const HEADER: usize = 24;
const HASH: usize = 32;
const SECTION: usize = 8;
/// For sections of the whole VM.
const NO_VCPU: u16 = u16::MAX;

/// The time stamp counter and its deadline: they go on while a VM is moved.
pub(super) const MSR_TSC: u32 = 0x10;
/// See [`MSR_TSC`].
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// What two machines must have in common for one to take over the other's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest address and length of each slot.
    pub slots: Vec<(u64, u64)>,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = self.slots.iter().map(|s| s.1).sum::<u64>() >> 20;
        write!(f, "{} vCPUs and {mib} MiB in {} slots", self.vcpus, self.slots.len())
    }
}

/// One vCPU, in the order in which it is read.
#[derive(Clone)]
pub(super) struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xsave: Vec<u8>,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug_regs: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    pub(super) tsc_khz: u32,
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) events: kvm_vcpu_events,
}

/// A VM but its RAM.
#[derive(Clone)]
pub struct Snapshot {
    /// What it is of.
    pub shape: Shape,
    pub(super) irqchips: [kvm_irqchip; 3],
    pub(super) pit: kvm_pit_state2,
    pub(super) clock: kvm_clock_data,
    pub(super) serial: Vec<u8>,
    /// Disks and network cards, in the order of their addresses.
    pub(super) virtio: Vec<Vec<u8>>,
    pub(super) vcpus: Vec<VcpuState>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({})", self.shape)
    }
}

/// Sections, by their number in the file.
mod kind {
    pub(super) const SHAPE: u16 = 1;
    pub(super) const IRQCHIP: [u16; 3] = [2, 3, 4];
    pub(super) const PIT: u16 = 5;
    pub(super) const CLOCK: u16 = 6;
    pub(super) const SERIAL: u16 = 7;
    pub(super) const VIRTIO: u16 = 8;
    pub(super) const MP_STATE: u16 = 16;
    pub(super) const REGS: u16 = 17;
    pub(super) const SREGS: u16 = 18;
    pub(super) const XSAVE: u16 = 19;
    pub(super) const XCRS: u16 = 20;
    pub(super) const DEBUG_REGS: u16 = 21;
    pub(super) const LAPIC: u16 = 22;
    pub(super) const TSC_KHZ: u16 = 23;
    pub(super) const CPUID: u16 = 24;
    pub(super) const MSRS: u16 = 25;
    pub(super) const EVENTS: u16 = 26;
}

/// One section as it lies in the file: its number, its vCPU, its bytes.
type Section<'a> = (u16, u16, &'a [u8]);

impl Snapshot {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 << 10);
        let mut put = |kind: u16, vcpu: u16, bytes: &[u8]| {
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(&vcpu.to_le_bytes());
            out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        let mut shape = self.shape.vcpus.to_le_bytes().to_vec();
        for (at, bytes) in &self.shape.slots {
            shape.extend_from_slice(&at.to_le_bytes());
            shape.extend_from_slice(&bytes.to_le_bytes());
        }
        put(kind::SHAPE, NO_VCPU, &shape);
        for (kind, chip) in kind::IRQCHIP.into_iter().zip(&self.irqchips) {
            put(kind, NO_VCPU, chip.as_bytes());
        }
        put(kind::PIT, NO_VCPU, self.pit.as_bytes());
        put(kind::CLOCK, NO_VCPU, self.clock.as_bytes());
        put(kind::SERIAL, NO_VCPU, &self.serial);
        for device in &self.virtio {
            put(kind::VIRTIO, NO_VCPU, device);
        }
        for (i, v) in (0u16..).zip(&self.vcpus) {
            put(kind::MP_STATE, i, v.mp_state.as_bytes());
            put(kind::REGS, i, v.regs.as_bytes());
            put(kind::SREGS, i, v.sregs.as_bytes());
            put(kind::XSAVE, i, &v.xsave);
            put(kind::XCRS, i, v.xcrs.as_bytes());
            put(kind::DEBUG_REGS, i, v.debug_regs.as_bytes());
            put(kind::LAPIC, i, v.lapic.as_bytes());
            put(kind::TSC_KHZ, i, &v.tsc_khz.to_le_bytes());
            put(kind::CPUID, i, v.cpuid.as_bytes());
            put(kind::MSRS, i, v.msrs.as_bytes());
            put(kind::EVENTS, i, v.events.as_bytes());
        }
        seal(&out)
    }

    /// From bytes; whatever they are, either this is exactly what was saved, or an error says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let mut r = Reader { rest: body(bytes)? };
        let shape = r.shape()?;
        let irqchips = [
            r.whole(kind::IRQCHIP[0], NO_VCPU)?,
            r.whole(kind::IRQCHIP[1], NO_VCPU)?,
            r.whole(kind::IRQCHIP[2], NO_VCPU)?,
        ];
        let (pit, clock) = (r.whole(kind::PIT, NO_VCPU)?, r.whole(kind::CLOCK, NO_VCPU)?);
        let serial = r.section(kind::SERIAL, NO_VCPU)?;
        if serial_state(serial).is_none() {
            return Err(wrong(kind::SERIAL, NO_VCPU, "no serial port has such a state"));
        }
        let serial = serial.to_vec();
        let virtio = r.devices()?;
        let vcpus = (0..shape.vcpus as u16).map(|i| r.vcpu(i)).collect::<Result<Vec<_>, _>>()?;
        if !r.rest.is_empty() {
            return Err(wrong(0, NO_VCPU, "there is more after the last section"));
        }
        Ok(Self { shape, irqchips, pit, clock, serial, virtio, vcpus })
    }

    /// Where two states differ, in words; not counting clocks, which go on between them.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let still = |s: &Self| {
            let mut s = s.clone();
            s.clock = kvm_clock_data::default();
            s.pit.channels.iter_mut().for_each(|c| c.count_load_time = 0);
            for v in &mut s.vcpus {
                v.msrs.retain(|m| m.index != MSR_TSC && m.index != MSR_TSC_DEADLINE);
            }
            s.encode()
        };
        let (a, b) = (still(self), still(other));
        let (Ok(a), Ok(b)) = (body(&a), body(&b)) else { return vec!["one of them is damaged".into()] };
        let (a, b) = (sections(a), sections(b));
        let mut out = Vec::new();
        for (x, y) in a.iter().zip(&b) {
            if x == y {
                continue;
            }
            let at = x.2.iter().zip(y.2).position(|(p, q)| p != q);
            let at = at.unwrap_or_else(|| x.2.len().min(y.2.len()));
            out.push(format!("section {} of {} from byte {at} on", x.0, owner(x.1)));
        }
        if a.len() != b.len() {
            out.push(format!("{} sections and {}", a.len(), b.len()));
        }
        out
    }
}

/// Sections, whatever they are, between a right header and a right hash.
#[must_use]
pub fn seal(sections: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + sections.len() + HASH);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&u64::from(VERSION).to_le_bytes());
    out.extend_from_slice(&((HEADER + sections.len() + HASH) as u64).to_le_bytes());
    out.extend_from_slice(sections);
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    out
}

/// The sections between header and hash, once length and hash have been found right.
fn body(bytes: &[u8]) -> Result<&[u8], SnapshotError> {
    let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    if bytes.len() < MAGIC.len() || bytes[..8] != MAGIC {
        return Err(SnapshotError::Magic);
    }
    let has = bytes.len() as u64;
    if bytes.len() < HEADER + HASH {
        return Err(SnapshotError::Length { said: (HEADER + HASH) as u64, has });
    }
    let found = word(8);
    if found != u64::from(VERSION) {
        return Err(SnapshotError::Version { found });
    }
    let said = word(16);
    if said != has || bytes.len() > MAX_BYTES {
        return Err(SnapshotError::Length { said, has });
    }
    let (all, hash) = bytes.split_at(bytes.len() - HASH);
    if blake3::hash(all).as_bytes() != hash {
        return Err(SnapshotError::Hash);
    }
    Ok(&all[HEADER..])
}

/// All sections of a body, as far as they are whole.
fn sections(body: &[u8]) -> Vec<Section<'_>> {
    let mut r = Reader { rest: body };
    std::iter::from_fn(|| r.next()).collect()
}

fn owner(vcpu: u16) -> String {
    if vcpu == NO_VCPU { "the machine".into() } else { format!("vCPU {vcpu}") }
}

fn wrong(kind: u16, vcpu: u16, what: &'static str) -> SnapshotError {
    SnapshotError::Section { kind, of: owner(vcpu), what }
}

/// Takes sections in their order.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Option<Section<'a>> {
        let (head, rest) = self.rest.split_first_chunk::<SECTION>()?;
        let &[k0, k1, v0, v1, l0, l1, l2, l3] = head;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let (bytes, rest) = rest.split_at_checked(len)?;
        self.rest = rest;
        Some((u16::from_le_bytes([k0, k1]), u16::from_le_bytes([v0, v1]), bytes))
    }

    /// The bytes of the section that must come now.
    fn section(&mut self, kind: u16, vcpu: u16) -> Result<&'a [u8], SnapshotError> {
        match self.next() {
            Some((k, v, bytes)) if (k, v) == (kind, vcpu) => Ok(bytes),
            _ => Err(wrong(kind, vcpu, "it is not where it must be")),
        }
    }

    /// A section that is one value.
    fn whole<T: FromBytes>(&mut self, kind: u16, vcpu: u16) -> Result<T, SnapshotError> {
        T::read_from_bytes(self.section(kind, vcpu)?).map_err(|_| wrong(kind, vcpu, "it has another length"))
    }

    /// A section that is a list of at most so many values; there are as many as bytes for them.
    fn list<T: FromBytes + Immutable>(
        &mut self,
        kind: u16,
        vcpu: u16,
        most: usize,
    ) -> Result<Vec<T>, SnapshotError> {
        let bytes = self.section(kind, vcpu)?;
        let each = size_of::<T>();
        if bytes.len() % each != 0 || bytes.len() / each > most {
            return Err(wrong(kind, vcpu, "it has an impossible length"));
        }
        let read = |b| T::read_from_bytes(b).map_err(|_| wrong(kind, vcpu, "it has another length"));
        bytes.chunks_exact(each).map(read).collect()
    }

    fn shape(&mut self) -> Result<Shape, SnapshotError> {
        let bytes = self.section(kind::SHAPE, NO_VCPU)?;
        let odd = wrong(kind::SHAPE, NO_VCPU, "no machine has such a shape");
        let Some((vcpus, slots)) = bytes.split_first_chunk::<4>() else { return Err(odd) };
        let vcpus = u32::from_le_bytes(*vcpus);
        if vcpus == 0 || vcpus > MAX_VCPUS || slots.len() % 16 != 0 || slots.len() / 16 > MAX_SLOTS {
            return Err(odd);
        }
        let pair = |b: &[u8]| {
            let word = |b: &[u8]| b.try_into().map_or(0, u64::from_le_bytes);
            (word(&b[..8]), word(&b[8..]))
        };
        Ok(Shape { vcpus, slots: slots.chunks_exact(16).map(pair).collect() })
    }

    fn devices(&mut self) -> Result<Vec<Vec<u8>>, SnapshotError> {
        let mut out = Vec::new();
        loop {
            let before = self.rest;
            match self.next() {
                Some((kind::VIRTIO, NO_VCPU, bytes)) => {
                    if out.len() == MAX_DEVICES || !is_state(bytes) {
                        return Err(wrong(kind::VIRTIO, NO_VCPU, "no device has such a state"));
                    }
                    out.push(bytes.to_vec());
                }
                _ => {
                    self.rest = before;
                    return Ok(out);
                }
            }
        }
    }

    fn vcpu(&mut self, i: u16) -> Result<VcpuState, SnapshotError> {
        let (mp_state, regs) = (self.whole(kind::MP_STATE, i)?, self.whole(kind::REGS, i)?);
        let sregs = self.whole(kind::SREGS, i)?;
        let xsave = self.section(kind::XSAVE, i)?;
        if xsave.len() < MIN_XSAVE || xsave.len() > MAX_XSAVE || xsave.len() % 4 != 0 {
            return Err(wrong(kind::XSAVE, i, "it has an impossible length"));
        }
        let xsave = xsave.to_vec();
        let (xcrs, debug_regs) = (self.whole(kind::XCRS, i)?, self.whole(kind::DEBUG_REGS, i)?);
        let (lapic, tsc_khz) = (self.whole(kind::LAPIC, i)?, self.whole(kind::TSC_KHZ, i)?);
        let (cpuid, msrs) = (self.list(kind::CPUID, i, MAX_CPUID)?, self.list(kind::MSRS, i, MAX_MSRS)?);
        let events = self.whole(kind::EVENTS, i)?;
        Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, cpuid, msrs, events })
    }
}

#[cfg(test)]
mod tests;
