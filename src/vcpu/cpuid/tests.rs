//! CPUID leaves of real processors, as KVM reports them on such hosts, and the expected leaves of a guest.

use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// Leaf 0 of a processor with leaves up to `max`.
fn name(max: u32, vendor: &[u8; 12]) -> kvm_cpuid_entry2 {
    let [ebx, edx, ecx] = [0, 4, 8].map(|at| u32::from_le_bytes(*vendor[at..].first_chunk().unwrap()));
    leaf(0, 0, [max, ebx, ecx, edx])
}

/// A Xeon of the Ice Lake generation: family 6 model 106, SGX, VMX, WAITPKG (from its successor), leaf 0x1f.
fn xeon() -> CpuId {
    CpuId::from_entries(&[
        name(0x1f, b"GenuineIntel"),
        leaf(0x1, 0, [0x606a6, 0x2f40_0800, 0x76fa_3223, 0x1fab_fbff]),
        leaf(0x4, 0, [0xfc00_4121, 0x2c0_003f, 0x3f, 0]),
        leaf(0x4, 2, [0xfc00_4143, 0x4c0_003f, 0x3ff, 0]),
        leaf(0x4, 3, [0xfc1f_c163, 0x2c0_003f, 0x1_1fff, 4]),
        leaf(0x7, 0, [0, 0xf1bf_27ef, 0x405f_4fee, 0xbc04_0412]),
        leaf(0xa, 0, [0x830_0805, 0, 0xf, 0x8604]),
        leaf(0xb, 0, [1, 2, 0x100, 47]),
        leaf(0x12, 0, [1, 0, 0, 0x241f]),
        leaf(0x1f, 0, [1, 2, 0x100, 47]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x3934, 0x0100_d000, 0, 0]),
    ])
    .unwrap()
}

/// An EPYC of the Milan generation: family 25 model 1, SVM, SEV, and the Intel MSR that KVM emulates.
fn epyc(vendor: &[u8; 12]) -> CpuId {
    CpuId::from_entries(&[
        name(0x10, vendor),
        leaf(0x1, 0, [0xa0_0f11, 0x3f40_0800, 0xfed8_3203, 0x178b_fbff]),
        leaf(0x7, 0, [0, 0x219c_97a9, 0x40_0684, 0x2c00_0010]),
        leaf(0xb, 0, [1, 2, 0x100, 63]),
        leaf(0x8000_0001, 0, [0xa0_0f11, 0x4000_0000, 0x40_2035 | SVM, 0x2fd3_fbff]),
        leaf(0x8000_0008, 0, [0x3030, 0x191_ef657, 0x703f, 0]),
        leaf(0x8000_000a, 0, [1, 8, 0, 0x1119_b9ff]),
        leaf(0x8000_001d, 0, [0x4121, 0x1c0_003f, 0x3f, 0]),
        leaf(0x8000_001d, 3, [0x3c163, 0x3c0_003f, 0x7fff, 1]),
        leaf(0x8000_001e, 0, [63, 0x11f, 0x300, 0]),
        leaf(0x8000_001f, 0, [0x1_0e0f, 0x33, 0x1fd, 0x1]),
        leaf(0x8000_0026, 0, [0, 0, 0, 63]),
    ])
    .unwrap()
}

const ONE: Processor = Processor { cpus: 1, tsc_deadline: true, nested: false };

fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    *cpuid.as_slice().iter().find(|l| l.function == function && l.index == index).unwrap()
}

#[derive(Debug, Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

fn read(cpuid: &CpuId, (function, index, register): (u32, u32, Register)) -> u32 {
    let leaf = find(cpuid, function, index);
    match register {
        Eax => leaf.eax,
        Ebx => leaf.ebx,
        Ecx => leaf.ecx,
        Edx => leaf.edx,
    }
}

/// The position of a bit, whether KVM supports it, whether the guest should see it, and which other VMMs agree.
type Row = ((u32, u32, Register), u32, bool, bool, &'static str);

#[track_caller]
fn check(supported: &CpuId, processor: Processor, rows: &[Row]) {
    let cpuid = for_vcpu(supported, processor, 0);
    for (place, bit, offered, given, reason) in rows {
        assert_eq!(read(supported, *place) & (1 << bit) != 0, *offered, "offered: {place:x?} bit {bit}");
        assert_eq!(read(&cpuid, *place) & (1 << bit) != 0, *given, "{place:x?} bit {bit}: {reason}");
    }
}

#[test]
fn a_guest_on_intel_has_the_same_features_as_under_other_vmms() {
    let rows: &[Row] = &[
        ((0x1, 0, Ecx), 5, true, false, "VMX: T2 clears it; QEMU gives it where it is asked for"),
        ((0x1, 0, Ecx), 15, false, false, "PDCM: KVM's word"),
        ((0x1, 0, Ecx), 17, true, true, "PCID: all pass it"),
        ((0x1, 0, Ecx), 24, false, true, "TSC deadline: all set it with the in-kernel APIC"),
        ((0x1, 0, Ecx), 31, false, true, "hypervisor: all set it"),
        ((0x1, 0, Edx), 21, true, true, "DS: T2 clears it, QEMU passes it; IA32_MISC_ENABLE says what there is of it"),
        ((0x1, 0, Edx), 28, true, false, "HTT: all clear it for one processor"),
        ((0x7, 0, Ebx), 2, true, false, "SGX: T2 clears it, QEMU too without enclave memory"),
        ((0x7, 0, Ebx), 16, true, true, "AVX-512: T2 clears it, so as to be the same everywhere; QEMU passes it"),
        ((0x7, 0, Ecx), 5, true, false, "WAITPKG: Firecracker and QEMU clear it"),
        ((0x7, 0, Ecx), 30, true, false, "SGX_LC: as SGX"),
        ((0x7, 0, Edx), 29, true, true, "ARCH_CAPABILITIES: Intel's own, all pass it"),
        ((0x7, 0, Edx), 31, true, true, "SSBD: all pass it"),
        ((0xa, 0, Eax), 0, true, true, "PMU: Firecracker clears it, QEMU passes it, so that perf works"),
        ((0x8000_0001, 0, Ecx), 1, false, false, "CMP_LEGACY: AMD's"),
        ((0x8000_0008, 0, Ebx), 12, true, true, "IBPB by AMD's bit: KVM's word, all pass it"),
    ];
    check(&xeon(), ONE, rows);
}

#[test]
fn a_guest_on_amd_has_the_same_features_as_under_other_vmms() {
    let rows: &[Row] = &[
        (
            (0x7, 0, Edx),
            29,
            true,
            false,
            "ARCH_CAPABILITIES: made up by KVM; Firecracker clears it, and so did QEMU 10.1",
        ),
        ((0x7, 0, Edx), 4, true, true, "FSRM: T2A clears it, so as to be the same everywhere; QEMU passes it"),
        ((0x7, 0, Ebx), 0, true, true, "FSGSBASE: all pass it"),
        ((0x8000_0001, 0, Ecx), 2, true, false, "SVM: QEMU gives it where it is asked for"),
        (
            (0x8000_0001, 0, Ecx),
            22,
            true,
            true,
            "topology extensions: Firecracker sets it; 0x8000001d and 0x8000001e are there",
        ),
        ((0x8000_000a, 0, Edx), 0, true, false, "nested paging and all else of SVM: as SVM"),
        ((0x8000_001f, 0, Eax), 0, true, false, "SME: QEMU clears it for a machine without SEV"),
        ((0x8000_001f, 0, Eax), 1, true, false, "SEV: as SME"),
        ((0x8000_0008, 0, Ebx), 12, true, true, "IBPB: all pass it"),
    ];
    for vendor in [b"AuthenticAMD", b"HygonGenuine"] {
        check(&epyc(vendor), ONE, rows);
    }
}

#[test]
fn nesting_is_available_on_request_if_kvm_supports_it() {
    let asked = Processor { nested: true, ..ONE };
    assert_eq!(read(&for_vcpu(&xeon(), asked, 0), (0x1, 0, Ecx)) & VMX, VMX);
    let amd = epyc(b"AuthenticAMD");
    let given = for_vcpu(&amd, asked, 0);
    assert_eq!(read(&given, (0x8000_0001, 0, Ecx)) & SVM, SVM);
    assert_eq!(find(&given, 0x8000_000a, 0), find(&amd, 0x8000_000a, 0));
    for supported in [xeon(), amd] {
        assert!(can_nest(&supported));
        assert!(!can_nest(&for_vcpu(&supported, ONE, 0)), "as on a host whose KVM has it not");
    }
}

#[test]
fn topology_is_reported_in_the_vendors_leaves() {
    let four = Processor { cpus: 4, ..ONE };
    let intel = for_vcpu(&xeon(), four, 2);
    assert_eq!(read(&intel, (0x8000_0001, 0, Ecx)), 0x121, "CMP_LEGACY is reserved");
    assert_eq!(read(&intel, (0x8000_0008, 0, Ecx)), 0, "and so is all of ECX");
    let amd = for_vcpu(&epyc(b"AuthenticAMD"), four, 2);
    assert_eq!(read(&amd, (0x8000_0001, 0, Ecx)) & CMP_LEGACY, CMP_LEGACY);
    assert_eq!(read(&amd, (0x8000_0008, 0, Ecx)), 0x2003);
    let apic_id = find(&amd, 0x8000_001e, 0);
    assert_eq!((apic_id.eax, apic_id.ebx, apic_id.ecx), (2, 2, 0));
    assert_eq!((read(&amd, (0x8000_001d, 0, Eax)) >> 14) & 0xfff, 0, "a first-level cache is one core's");
    assert_eq!((read(&amd, (0x8000_001d, 3, Eax)) >> 14) & 0xfff, 3, "the last level is everybody's");
    let host_levels = amd.as_slice().iter().chain(intel.as_slice());
    assert!(!host_levels.into_iter().any(|leaf| matches!(leaf.function, 0x8000_0026 | 0x12)));
}

#[test]
fn each_vcpu_has_its_own_apic_id_in_every_leaf() {
    for index in 0..4 {
        let cpuid = for_vcpu(&xeon(), Processor { cpus: 4, ..ONE }, index);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
        assert_eq!(find(&cpuid, 0xb, 0).edx, index);
        assert_eq!(find(&cpuid, 0x1f, 1).edx, index);
    }
}

#[test]
fn three_cores_are_one_package_of_three() {
    let three = Processor { cpus: 3, ..ONE };
    for supported in [xeon(), epyc(b"AuthenticAMD")] {
        let cpuid = for_vcpu(&supported, three, 0);
        assert_eq!((find(&cpuid, 1, 0).ebx >> 16) & 0xff, 3);
        assert_eq!(find(&cpuid, 1, 0).edx & HTT, HTT);
        let cores = find(&cpuid, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx), (2, 3), "two bits of APIC id, three processors");
        assert_eq!(cpuid.as_slice().iter().filter(|l| l.function == 0xb).count(), 3, "the host's leaves are gone");
    }
    assert_eq!(find(&for_vcpu(&xeon(), three, 0), 4, 3).eax >> 26, 3, "room for four cores");
}

#[test]
fn a_single_cpu_claims_no_siblings() {
    let cpuid = for_vcpu(&xeon(), Processor { tsc_deadline: false, ..ONE }, 0);
    let leaf = find(&cpuid, 1, 0);
    assert_eq!(leaf.edx & HTT, 0);
    assert_eq!(leaf.ecx & (TSC_DEADLINE | HYPERVISOR), HYPERVISOR);
    assert_eq!((find(&cpuid, 4, 3).eax >> 14) & 0xfff, 0);
}

#[test]
fn an_unknown_vendor_has_no_amd_leaves() {
    let supported =
        CpuId::from_entries(&[name(0xd, b"CentaurHauls"), leaf(0x8000_0008, 0, [0x3930, 0, 0, 0])]).unwrap();
    assert_eq!((vendor(&supported), vendor(&CpuId::new(0).unwrap())), (Vendor::Other, Vendor::Other));
    assert_eq!(find(&for_vcpu(&supported, Processor { cpus: 4, ..ONE }, 0), 0x8000_0008, 0).ecx, 0);
}
