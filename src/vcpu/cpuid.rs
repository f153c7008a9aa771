//! CPUID leaves of a vCPU: KVM's supported leaves, changed to describe one socket of single-threaded cores.
//!
//! Leaves are changed where KVM's answer describes the host's processor instead of the guest's (KVM API,
//! KVM_GET_SUPPORTED_CPUID: the caller must fill in topology and APIC IDs), and where KVM offers features that this
//! machine does not have. Leaves that KVM omits stay omitted. Each change states its reason; the behavior of QEMU's
//! `-cpu host` and of Firecracker with its T2 and T2A templates is cited from their sources.

mod features;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

pub use features::ensure_compatible;

/// Leaf 1 ECX bit 5: VMX (Intel).
const VMX: u32 = 1 << 5;
/// Leaf 1 ECX bit 24: the local APIC timer's TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX bit 31: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX bit 28: the package may hold more than one logical processor, as EBX bits 16 to 23 say.
const HTT: u32 = 1 << 28;
/// Leaf 7 EBX bit 2, and ECX bit 30: SGX, and that its launch key can be set.
const SGX: u32 = 1 << 2;
const SGX_LC: u32 = 1 << 30;
/// Leaf 7 ECX bit 5: UMONITOR, UMWAIT and TPAUSE.
const WAITPKG: u32 = 1 << 5;
/// Leaf 7 EDX bit 29: the MSR IA32_ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: u32 = 1 << 29;
/// Leaf 0x80000001 ECX bit 1: several logical processors are several cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0x80000001 ECX bit 2: SVM (AMD).
const SVM: u32 = 1 << 2;
/// Leaf 0xb level types (Intel SDM volume 2, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The designer of a processor, as far as leaves differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// Intel.
    Intel,
    /// AMD, and Hygon, whose processors are based on AMD's design.
    Amd,
    /// Another vendor, whose processors follow Intel's leaves.
    Other,
}

/// The guest's processor: the number of vCPUs, and features that the leaves do not describe.
#[derive(Debug, Clone, Copy)]
pub struct Processor {
    /// The number of vCPUs.
    pub cpus: u32,
    /// Whether KVM supports TSC deadline mode, which its CPUID leaves do not report.
    pub tsc_deadline: bool,
    /// Whether the guest may run nested virtual machines.
    pub nested: bool,
}

impl Processor {
    /// The number of APIC ID bits that distinguish the cores of the package.
    fn core_bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// The vendor that leaf 0 names.
pub fn vendor(cpuid: &CpuId) -> Vendor {
    let Some(leaf) = cpuid.as_slice().iter().find(|leaf| leaf.function == 0) else { return Vendor::Other };
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    match &*name {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// Whether a processor with these leaves can run virtual machines.
pub fn can_nest(cpuid: &CpuId) -> bool {
    let amd = vendor(cpuid) == Vendor::Amd;
    cpuid.as_slice().iter().any(|leaf| match leaf.function {
        0x1 => !amd && leaf.ecx & VMX != 0,
        0x8000_0001 => amd && leaf.ecx & SVM != 0,
        _ => false,
    })
}

/// Returns the leaves of vCPU `index`, based on those that KVM supports.
pub fn for_vcpu(supported: &CpuId, processor: Processor, index: u32) -> CpuId {
    let vendor = vendor(supported);
    let mut cpuid = supported.clone();
    cpuid.retain(|leaf| {
        !matches!(
            leaf.function,
            // Extended topology of the host, Intel's and AMD's (0x80000026). The guest's is added below.
            0xb | 0x1f | 0x8000_0026
        // SGX sizes, see below.
        | 0x12
        )
    });
    let max_leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for leaf in cpuid.as_mut_slice() {
        set_topology(leaf, vendor, processor, index);
        withhold(leaf, vendor, processor);
    }
    // Extended topology: the cores, followed by an invalid level that ends the list. Pushing fails only beyond
    // KVM_MAX_CPUID_ENTRIES, and two to six leaves were removed above or never present.
    if max_leaf >= 0xb {
        for level in extended_topology(0xb, processor, index) {
            let _ = cpuid.push(level);
        }
    }
    if max_leaf >= 0x1f {
        for level in extended_topology(0x1f, processor, index) {
            let _ = cpuid.push(level);
        }
    }
    cpuid
}

/// Makes `leaf` describe the guest's processors instead of the host's.
fn set_topology(leaf: &mut kvm_cpuid_entry2, vendor: Vendor, processor: Processor, index: u32) {
    let cpus = processor.cpus;
    let amd = vendor == Vendor::Amd;
    match leaf.function {
        0x1 => {
            // EBX: APIC id, logical processors in the package, CLFLUSH size, brand.
            leaf.ebx = (leaf.ebx & 0xffff) | (cpus << 16) | (index << 24);
            // Not every KVM sets it; kernels look for kvm-clock only if it is set.
            leaf.ecx |= HYPERVISOR;
            // KVM supports the mode but leaves the bit clear, because it depends on the in-kernel local APIC.
            leaf.ecx = if processor.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
            leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
        }
        // Deterministic cache parameters (Intel), cache topology (AMD): EAX bits 14 to 25 count the processors that
        // share a cache.
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 0x7;
            let sharing = if level >= 3 { cpus } else { 1 };
            leaf.eax = (leaf.eax & !(0xfff << 14)) | ((sharing - 1) << 14);
            if leaf.function == 0x4 {
                // EAX bits 26 to 31: addressable cores in the package, minus one.
                leaf.eax = (leaf.eax & !(0x3f << 26)) | (((1 << processor.core_bits()) - 1) << 26);
            }
        }
        // Reserved on other vendors: Linux before 6.9 interprets the bit as the absence of threads, regardless of the
        // vendor, and then does not count cores.
        0x8000_0001 if amd => leaf.ecx = if cpus > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY },
        // ECX: cores in the package minus one, and the width of the APIC ID part that distinguishes them. Reserved on
        // other vendors.
        0x8000_0008 if amd => leaf.ecx = (leaf.ecx & !0xf0ff) | (processor.core_bits() << 12) | (cpus - 1),
        // Extended APIC ID; one thread per core; one node. Other vendors have no such leaf.
        0x8000_001e if amd => {
            leaf.eax = index;
            leaf.ebx = index & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

/// Removes features from `leaf` that KVM offers but this machine does not have.
fn withhold(leaf: &mut kvm_cpuid_entry2, vendor: Vendor, processor: Processor) {
    match (leaf.function, leaf.index) {
        // Nested virtualization, on Intel and on AMD: it would expose a large part of KVM to guests that did not ask
        // for it. T2 and T2A clear VMX; QEMU requires an explicit option for machines that can be migrated.
        (0x1, _) if !processor.nested => leaf.ecx &= !VMX,
        (0x8000_0001, _) if !processor.nested => leaf.ecx &= !SVM,
        (0x8000_000a, _) if !processor.nested => clear(leaf),
        (0x7, 0) => {
            // There is no enclave memory, and a kernel would complain about that. T2 clears the bit, QEMU does so
            // without a configured size.
            leaf.ebx &= !SGX;
            leaf.ecx &= !SGX_LC;
            // These instructions put the host's processor to sleep. Firecracker and QEMU (`cpu-pm=off`) clear the bit.
            leaf.ecx &= !WAITPKG;
            // KVM emulates it for every processor. AMD processors have no such MSR: kernels would believe what it says
            // about Intel's vulnerabilities, and Windows fails to boot. Firecracker clears it, and so did QEMU 10.1.
            if vendor == Vendor::Amd {
                leaf.edx &= !ARCH_CAPABILITIES;
            }
        }
        // Memory encryption (AMD's SME and SEV) belongs to the host and is not available to the guest. QEMU clears it
        // for machines without SEV.
        (0x8000_001f, _) => clear(leaf),
        _ => {}
    }
}

fn clear(leaf: &mut kvm_cpuid_entry2) {
    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
}

fn extended_topology(function: u32, processor: Processor, index: u32) -> [kvm_cpuid_entry2; 3] {
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
    [level(0, 0, 1, LEVEL_THREAD), level(1, processor.core_bits(), processor.cpus, LEVEL_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests;
