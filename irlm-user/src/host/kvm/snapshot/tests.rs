//! Saved state as bytes: there and back, and nothing else than what was saved.

use super::*;
use kvm_bindings::kvm_msr_entry;
use proptest::prelude::*;

/// A state with something in every field, as no KVM gave it.
fn made_up(vcpus: u32) -> Snapshot {
    let vcpu = |i: u32| VcpuState {
        mp_state: kvm_mp_state { mp_state: i },
        regs: kvm_regs { rax: 1, rip: u64::from(i) << 12, ..Default::default() },
        sregs: kvm_sregs { cr0: 0x11, ..Default::default() },
        xsave: vec![i as u8; MIN_XSAVE + 64],
        xcrs: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
        debug_regs: kvm_debugregs { dr6: 0xffff_0ff0, ..Default::default() },
        lapic: kvm_lapic_state::default(),
        tsc_khz: 2_500_000,
        cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: i, ..Default::default() }; 30],
        msrs: (0..150)
            .map(|n| kvm_msr_entry { index: n, data: u64::from(n * i), ..Default::default() })
            .collect(),
        events: kvm_vcpu_events::default(),
    };
    Snapshot {
        shape: Shape { vcpus, slots: vec![(0, 32 << 20), (32 << 20, 32 << 20)] },
        irqchips: [0, 1, 2].map(|n| kvm_irqchip { chip_id: n, ..Default::default() }),
        pit: kvm_pit_state2::default(),
        clock: kvm_clock_data { clock: 77, ..Default::default() },
        serial: vec![12, 0, 0, 1, 3, 0x60, 8, 0xb0, 0, b'x'],
        virtio: (1..vcpus.min(4)).map(crate::host::kvm::virtio::made_up).collect(),
        vcpus: (0..vcpus).map(vcpu).collect(),
    }
}

#[test]
fn there_and_back() {
    for vcpus in [1, 2, 4, MAX_VCPUS] {
        let s = made_up(vcpus);
        let bytes = s.encode();
        let back = Snapshot::decode(&bytes).unwrap();
        assert_eq!((back.shape.clone(), back.encode()), (s.shape.clone(), bytes));
        assert_eq!(s.differences(&back), Vec::<String>::new());
    }
}

#[test]
fn a_state_of_this_layout_from_a_file_is_read_and_written_as_it_is() {
    let file = include_bytes!("../../../../tests/data/vmm/2-vcpus.state");
    let s = Snapshot::decode(file).unwrap();
    assert_eq!(s.shape, Shape { vcpus: 2, slots: vec![(0, 34 << 20)] });
    assert!(s.encode() == file);
    assert!(s.vcpus.iter().all(|v| v.msrs.len() > 10 && v.cpuid.len() > 10 && v.regs.rip >= 0xf_0000));
}

#[test]
fn differences_are_named_and_clocks_are_none() {
    let a = made_up(2);
    let mut b = a.clone();
    b.clock.clock += 1;
    b.vcpus[1].msrs[MSR_TSC as usize].data += 1;
    assert!(a.differences(&b).is_empty());
    b.vcpus[1].regs.rbx += 1;
    assert_eq!(a.differences(&b), ["section 17 of vCPU 1 from byte 8 on"]);
}

#[test]
fn every_cut_is_refused() {
    let bytes = made_up(2).encode();
    for n in 0..bytes.len() {
        assert!(Snapshot::decode(&bytes[..n]).is_err(), "{n} bytes of {}", bytes.len());
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(matches!(Snapshot::decode(&longer), Err(SnapshotError::Length { .. })));
}

#[test]
fn what_is_refused_says_why_on_one_line() {
    let good = made_up(1).encode();
    let mut version = good.clone();
    version[8] = 9;
    let mut hash = good.clone();
    hash[100] ^= 1;
    let cases: [(&[u8], &str); 5] = [
        (b"", "no saved state"),
        (b"QEVMxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "no saved state"),
        (&version, "version 9"),
        (&hash, "checksum"),
        (&good[..good.len() - 1], "cut"),
    ];
    for (bytes, word) in cases {
        let e = Snapshot::decode(bytes).unwrap_err().to_string();
        assert!(e.contains(word) && !e.contains('\n'), "{e}");
    }
}

proptest! {
    /// A sealed file proves that a program of this version wrote it, not that it is right.
    #[test]
    fn sealed_nonsense_is_refused_or_is_exactly_what_it_says(
        vcpus in 1u32..3, at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<Option<prop::sample::Index>>(),
    ) {
        let good = made_up(vcpus).encode();
        let mut body = body(&good).unwrap().to_vec();
        let at = at.index(body.len());
        body[at] ^= flip;
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len()));
        }
        let bytes = seal(&body);
        if let Ok(s) = Snapshot::decode(&bytes) {
            prop_assert_eq!(s.encode(), bytes);
        }
    }

    #[test]
    fn every_flipped_byte_is_refused(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = made_up(2).encode();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(Snapshot::decode(&bytes).is_err());
    }

    #[test]
    fn no_bytes_panic(body in proptest::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(Snapshot::decode(&body).is_err());
        prop_assert!(Snapshot::decode(&seal(&body)).is_err());
    }
}
