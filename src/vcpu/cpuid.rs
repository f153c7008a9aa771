//! What a vCPU says it is: KVM's supported CPUID leaves, made to tell one socket of single-threaded cores.
//!
//! Leaves are changed where KVM's answer describes the host's processor instead of the guest's (KVM API,
//! KVM_GET_SUPPORTED_CPUID: topology and APIC ids are the caller's to fill in). What KVM leaves out stays out.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1 ECX bit 24: the local APIC timer's TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX bit 31: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX bit 28: the package may hold more than one logical processor, as EBX bits 16 to 23 say.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001 ECX bit 1: several logical processors are several cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0xb level types (Intel SDM volume 2, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// A guest's processor: how many there are, and what KVM can do for their timers.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// vCPUs in the machine.
    pub cpus: u32,
    /// Whether KVM has TSC deadline mode, which its CPUID leaves do not say.
    pub tsc_deadline: bool,
}

impl Topology {
    /// Bits of an APIC id that tell the cores of the package apart.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// The leaves of vCPU `index`, made from those that KVM supports.
pub fn for_vcpu(supported: &CpuId, topology: Topology, index: u32) -> CpuId {
    let mut cpuid = supported.clone();
    cpuid.retain(|leaf| leaf.function != 0xb && leaf.function != 0x1f);
    let max_leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for leaf in cpuid.as_mut_slice() {
        adjust(leaf, topology, index);
    }
    // Extended topology: the cores, and a last level that says there is no further one. Pushing fails only beyond
    // KVM_MAX_CPUID_ENTRIES, and two to six leaves were taken out above or never there.
    if max_leaf >= 0xb {
        for level in extended_topology(0xb, topology, index) {
            let _ = cpuid.push(level);
        }
    }
    if max_leaf >= 0x1f {
        for level in extended_topology(0x1f, topology, index) {
            let _ = cpuid.push(level);
        }
    }
    cpuid
}

fn adjust(leaf: &mut kvm_cpuid_entry2, topology: Topology, index: u32) {
    let cpus = topology.cpus;
    match leaf.function {
        0x1 => {
            // EBX: APIC id, logical processors in the package, CLFLUSH size, brand.
            leaf.ebx = (leaf.ebx & 0xffff) | (cpus << 16) | (index << 24);
            leaf.ecx |= HYPERVISOR;
            leaf.ecx = if topology.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
            leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
        }
        // Deterministic cache parameters (Intel), cache topology (AMD): EAX bits 14 to 25 count who shares a cache.
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 0x7;
            let sharing = if level >= 3 { cpus } else { 1 };
            leaf.eax = (leaf.eax & !(0xfff << 14)) | ((sharing - 1) << 14);
            if leaf.function == 0x4 {
                // EAX bits 26 to 31: addressable cores in the package, less one.
                leaf.eax = (leaf.eax & !(0x3f << 26)) | (((1 << topology.core_bits()) - 1) << 26);
            }
        }
        0x8000_0001 => leaf.ecx = if cpus > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY },
        // ECX: cores in the package less one, and the width of the APIC id's part that tells them apart (AMD).
        0x8000_0008 => leaf.ecx = (leaf.ecx & !0xf0ff) | (topology.core_bits() << 12) | (cpus - 1),
        // Extended APIC id; one thread a core; one node (AMD).
        0x8000_001e => {
            leaf.eax = index;
            leaf.ebx = index & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

fn extended_topology(function: u32, topology: Topology, index: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index: subleaf,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: (kind << 8) | subleaf,
        edx: index,
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, topology.core_bits(), topology.cpus, LEVEL_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf =
            |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
        CpuId::from_entries(&[
            leaf(0x0, 0x1f, 0, 0, 0),
            leaf(0x1, 0, 0x3f20_0800, TSC_DEADLINE, HTT),
            leaf(0x4, 0xfc1f_c163, 0, 0, 0),
            leaf(0xb, 1, 2, 0x100, 63),
            leaf(0x8000_0001, 0, 0, 0, 0),
            leaf(0x8000_0008, 0x3030, 0, 0x703f, 0),
            leaf(0x8000_001e, 63, 0x11f, 0x300, 0),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|l| l.function == function && l.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it() {
        let topology = Topology { cpus: 4, tsc_deadline: true };
        for index in 0..4 {
            let cpuid = for_vcpu(&supported(), topology, index);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
            assert_eq!(find(&cpuid, 0xb, 0).edx, index);
            assert_eq!(find(&cpuid, 0x1f, 1).edx, index);
            assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, index);
        }
    }

    #[test]
    fn three_cores_are_one_package_of_three() {
        let cpuid = for_vcpu(&supported(), Topology { cpus: 3, tsc_deadline: true }, 0);
        assert_eq!((find(&cpuid, 1, 0).ebx >> 16) & 0xff, 3);
        let cores = find(&cpuid, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx), (2, 3), "two bits of APIC id, three processors");
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 0x2002);
        assert_eq!(cpuid.as_slice().iter().filter(|l| l.function == 0xb).count(), 3, "the host's leaves are gone");
    }

    #[test]
    fn a_single_cpu_claims_no_siblings() {
        let cpuid = for_vcpu(&supported(), Topology { cpus: 1, tsc_deadline: false }, 0);
        let leaf = find(&cpuid, 1, 0);
        assert_eq!(leaf.edx & HTT, 0);
        assert_eq!(leaf.ecx & (TSC_DEADLINE | HYPERVISOR), HYPERVISOR);
        assert_eq!((find(&cpuid, 4, 0).eax >> 14) & 0xfff, 0);
    }
}
