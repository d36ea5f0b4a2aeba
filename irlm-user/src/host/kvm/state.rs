//! Saved state, taken from KVM and given to it. The order is KVM's: fetching the MP state delivers pending INITs and
//! SIPIs, the LAPIC needs the APIC base of the special registers, a deadline needs the time stamp counter, and
//! pending events would be lost if anything came after them.

use super::snapshot::{MIN_XSAVE, MSR_TSC, MSR_TSC_DEADLINE, VcpuState};
use super::{KvmError, Result, call};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, Xsave, kvm_clock_data,
    kvm_irqchip, kvm_msr_entry, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use zerocopy::IntoBytes as _;

/// MSRs that fit one call.
const CHUNK: usize = 256;
/// CPUID leaves asked for: KVM's own bound.
const CPUID_LEAVES: usize = 256;

/// Bytes of a vCPU's vector registers on this host.
pub(super) fn xsave_bytes(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(MIN_XSAVE)
}

/// All state of a vCPU that stands still.
pub(super) fn save_vcpu(fd: &VcpuFd, msrs: &[u32], xsave_bytes: usize) -> Result<VcpuState> {
    let mp_state = call("cannot read a vCPU's MP state", fd.get_mp_state())?;
    let regs = call("cannot read a vCPU's registers", fd.get_regs())?;
    let sregs = call("cannot read a vCPU's special registers", fd.get_sregs())?;
    let xsave = get_xsave(fd, xsave_bytes)?;
    let xcrs = call("cannot read a vCPU's XCRs", fd.get_xcrs())?;
    let debug_regs = call("cannot read a vCPU's debug registers", fd.get_debug_regs())?;
    let lapic = call("cannot read a vCPU's LAPIC", fd.get_lapic())?;
    // 0 where the host's own counter is not steady: then there is nothing to compare with.
    let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
    let cpuid = call("cannot read a vCPU's CPUID", fd.get_cpuid2(CPUID_LEAVES))?;
    let msrs = get_msrs(fd, msrs)?;
    let events = call("cannot read a vCPU's pending events", fd.get_vcpu_events())?;
    let cpuid = cpuid.as_slice().to_vec();
    Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, cpuid, msrs, events })
}

/// Gives a vCPU that has never run the state of another.
pub(super) fn load_vcpu(fd: &VcpuFd, vcpu: u32, s: &VcpuState, xsave_bytes: usize) -> Result<()> {
    let refused = |what: String| KvmError::Refused { vcpu, what };
    let cpuid = CpuId::from_entries(&s.cpuid).map_err(|e| refused(format!("CPUID: {e:?}")))?;
    call("cannot set a vCPU's CPUID", fd.set_cpuid2(&cpuid))?;
    let here = fd.get_tsc_khz().unwrap_or(0);
    if s.tsc_khz != 0 && here != 0 && s.tsc_khz.abs_diff(here) > s.tsc_khz / 4000 {
        fd.set_tsc_khz(s.tsc_khz).map_err(|e| {
            refused(format!(
                "its time stamp counter runs at {} kHz, this host's at {here} kHz, and KVM cannot change that: {e}",
                s.tsc_khz
            ))
        })?;
    }
    call("cannot set a vCPU's MP state", fd.set_mp_state(s.mp_state))?;
    call("cannot set a vCPU's registers", fd.set_regs(&s.regs))?;
    call("cannot set a vCPU's special registers", fd.set_sregs(&s.sregs))?;
    if s.xsave.len() != xsave_bytes {
        return Err(refused(format!(
            "{} bytes of vector registers, and this host's CPU has {xsave_bytes}",
            s.xsave.len()
        )));
    }
    set_xsave(fd, &s.xsave)?;
    call("cannot set a vCPU's XCRs", fd.set_xcrs(&s.xcrs))?;
    call("cannot set a vCPU's debug registers", fd.set_debug_regs(&s.debug_regs))?;
    call("cannot set a vCPU's LAPIC", fd.set_lapic(&s.lapic))?;
    set_msrs(fd, vcpu, &s.msrs)?;
    call("cannot set a vCPU's pending events", fd.set_vcpu_events(&s.events))
}

/// A buffer of exactly the length that KVM copies.
fn xsave_buffer(bytes: usize) -> Result<Xsave> {
    let extra = (bytes - MIN_XSAVE).div_ceil(4);
    Xsave::new(extra).map_err(|e| KvmError::Not { what: format!("vector registers of {bytes} bytes: {e:?}") })
}

fn get_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>> {
    let mut x = xsave_buffer(bytes)?;
    if bytes == MIN_XSAVE {
        // KVM copies exactly these; the older call is there on every kernel.
        return Ok(call("cannot read a vCPU's vector registers", fd.get_xsave())?.region.as_bytes().to_vec());
    }
    // SAFETY: `bytes` is what KVM_CAP_XSAVE2 says (`xsave_bytes`), and the buffer has that many; this process never
    // asks for dynamic features (arch_prctl), which alone could make it more.
    call("cannot read a vCPU's vector registers", unsafe { fd.get_xsave2(&mut x) })?;
    let mut out = x.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    out.extend_from_slice(x.as_slice().as_bytes());
    out.truncate(bytes);
    Ok(out)
}

/// `bytes` are as many as KVM copies here: the caller has compared.
fn set_xsave(fd: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let mut x = xsave_buffer(bytes.len())?;
    let words = |b: &[u8]| -> Vec<u32> {
        b.chunks_exact(4).map(|w| w.try_into().map_or(0, u32::from_le_bytes)).collect()
    };
    let (region, extra) = (words(&bytes[..MIN_XSAVE]), words(&bytes[MIN_XSAVE..]));
    // SAFETY: only the registers are written, not the length of the flexible array.
    unsafe { x.as_mut_fam_struct() }.xsave.region.copy_from_slice(&region);
    x.as_mut_slice()[..extra.len()].copy_from_slice(&extra);
    // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says KVM copies (the caller compared with `xsave_bytes`).
    call("cannot set a vCPU's vector registers", unsafe { fd.set_xsave2(&x) })
}

/// Those of `list` that this vCPU has. KVM lists some that it does not read back; the call stops there.
fn get_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut out = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(CHUNK)];
        let entries: Vec<_> =
            part.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = msrs_of(&entries)?;
        let got = call("cannot read a vCPU's MSRs", fd.get_msrs(&mut msrs))?.min(part.len());
        out.extend_from_slice(&msrs.as_slice()[..got]);
        rest = &rest[(got + usize::from(got < part.len())).min(rest.len())..];
    }
    Ok(out)
}

fn set_msrs(fd: &VcpuFd, vcpu: u32, msrs: &[kvm_msr_entry]) -> Result<()> {
    let mut order = msrs.to_vec();
    order.sort_by_key(|m| match m.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut rest = order.as_slice();
    while let Some(first) = rest.first() {
        let part = &rest[..rest.len().min(CHUNK)];
        let done = call("cannot set a vCPU's MSRs", fd.set_msrs(&msrs_of(part)?))?.min(part.len());
        if done == 0 && get_msrs(fd, &[first.index])?.first().is_none_or(|m| m.data != first.data) {
            let what = format!("KVM does not take {:#x} for MSR {:#x}", first.data, first.index);
            return Err(KvmError::Refused { vcpu, what });
        }
        // One that cannot be written and has that value anyway is right.
        rest = &rest[done.max(1)..];
    }
    Ok(())
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| KvmError::Not { what: format!("{} MSRs: {e:?}", entries.len()) })
}

/// Interrupt controllers, timer and clock of the VM.
pub(super) fn save_vm(vm: &VmFd) -> Result<([kvm_irqchip; 3], kvm_pit_state2, kvm_clock_data)> {
    let mut chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
        .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    for chip in &mut chips {
        call("cannot read an interrupt controller", vm.get_irqchip(chip))?;
    }
    let pit = call("cannot read the timer", vm.get_pit2())?;
    let mut clock = call("cannot read the clock", vm.get_clock())?;
    // What KVM knew about it when it was read is not for another host.
    clock.flags = 0;
    Ok((chips, pit, clock))
}

/// The same, to a VM that has never run.
pub(super) fn load_vm(
    vm: &VmFd,
    chips: &[kvm_irqchip; 3],
    pit: &kvm_pit_state2,
    clock: &kvm_clock_data,
) -> Result<()> {
    for chip in chips {
        call("cannot set an interrupt controller", vm.set_irqchip(chip))?;
    }
    call("cannot set the timer", vm.set_pit2(pit))?;
    let clock = kvm_clock_data { clock: clock.clock, ..Default::default() };
    call("cannot set the clock", vm.set_clock(&clock))
}
