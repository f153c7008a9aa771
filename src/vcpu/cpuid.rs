//! What a vCPU says it is: KVM's supported CPUID leaves, made to tell one socket of single-threaded cores.
//!
//! Leaves are changed where KVM's answer describes the host's processor instead of the guest's (KVM API,
//! KVM_GET_SUPPORTED_CPUID: topology and APIC ids are the caller's to fill in), and where KVM offers what this machine does
//! not have. What KVM leaves out stays out. Each change says why; what the others do was read from QEMU's `-cpu host` and from
//! Firecracker, with its templates T2 and T2A.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

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

/// Whose design a processor is, as far as its leaves differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// Intel.
    Intel,
    /// AMD, and Hygon, whose processors are of AMD's design.
    Amd,
    /// Somebody else, whose processors follow Intel's leaves.
    Other,
}

/// A guest's processor: how many there are, and what they can do beside what the leaves say.
#[derive(Debug, Clone, Copy)]
pub struct Processor {
    /// vCPUs in the machine.
    pub cpus: u32,
    /// Whether KVM has TSC deadline mode, which its CPUID leaves do not say.
    pub tsc_deadline: bool,
    /// Whether the guest may run virtual machines of its own.
    pub nested: bool,
}

impl Processor {
    /// Bits of an APIC id that tell the cores of the package apart.
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

/// Whether KVM lets a guest run virtual machines, going by the leaves that it supports.
pub fn can_nest(supported: &CpuId) -> bool {
    let amd = vendor(supported) == Vendor::Amd;
    supported.as_slice().iter().any(|leaf| match leaf.function {
        0x1 => !amd && leaf.ecx & VMX != 0,
        0x8000_0001 => amd && leaf.ecx & SVM != 0,
        _ => false,
    })
}

/// The leaves of vCPU `index`, made from those that KVM supports.
pub fn for_vcpu(supported: &CpuId, processor: Processor, index: u32) -> CpuId {
    let vendor = vendor(supported);
    let mut cpuid = supported.clone();
    cpuid.retain(|leaf| {
        !matches!(
            leaf.function,
            // Extended topology, Intel's and AMD's (0x80000026): the host's. The guest's is added below.
            0xb | 0x1f | 0x8000_0026
        // SGX's sizes: see below.
        | 0x12
        )
    });
    let max_leaf = cpuid.as_slice().iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for leaf in cpuid.as_mut_slice() {
        tell_topology(leaf, vendor, processor, index);
        withhold(leaf, vendor, processor);
    }
    // Extended topology: the cores, and a last level that says there is no further one. Pushing fails only beyond
    // KVM_MAX_CPUID_ENTRIES, and two to six leaves were taken out above or never there.
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

/// Has `leaf` tell of the guest's processors, where it would tell of the host's.
fn tell_topology(leaf: &mut kvm_cpuid_entry2, vendor: Vendor, processor: Processor, index: u32) {
    let cpus = processor.cpus;
    let amd = vendor == Vendor::Amd;
    match leaf.function {
        0x1 => {
            // EBX: APIC id, logical processors in the package, CLFLUSH size, brand.
            leaf.ebx = (leaf.ebx & 0xffff) | (cpus << 16) | (index << 24);
            // Not every KVM says it of itself; kernels look for kvm-clock only where it is set.
            leaf.ecx |= HYPERVISOR;
            // KVM has the mode and leaves the bit out, since it needs the in-kernel local APIC.
            leaf.ecx = if processor.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
            leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
        }
        // Deterministic cache parameters (Intel), cache topology (AMD): EAX bits 14 to 25 count who shares a cache.
        0x4 | 0x8000_001d if leaf.eax & 0x1f != 0 => {
            let level = (leaf.eax >> 5) & 0x7;
            let sharing = if level >= 3 { cpus } else { 1 };
            leaf.eax = (leaf.eax & !(0xfff << 14)) | ((sharing - 1) << 14);
            if leaf.function == 0x4 {
                // EAX bits 26 to 31: addressable cores in the package, less one.
                leaf.eax = (leaf.eax & !(0x3f << 26)) | (((1 << processor.core_bits()) - 1) << 26);
            }
        }
        // Reserved on others: Linux before 6.9 takes the bit as the word that there are no threads, whoever's processor it is,
        // and counts no cores then.
        0x8000_0001 if amd => leaf.ecx = if cpus > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY },
        // ECX: cores in the package less one, and the width of the APIC id's part that tells them apart. Reserved on others.
        0x8000_0008 if amd => leaf.ecx = (leaf.ecx & !0xf0ff) | (processor.core_bits() << 12) | (cpus - 1),
        // Extended APIC id; one thread a core; one node. There is no such leaf on others.
        0x8000_001e if amd => {
            leaf.eax = index;
            leaf.ebx = index & 0xff;
            leaf.ecx = 0;
        }
        _ => {}
    }
}

/// Takes from `leaf` what KVM offers and this machine does not have.
fn withhold(leaf: &mut kvm_cpuid_entry2, vendor: Vendor, processor: Processor) {
    match (leaf.function, leaf.index) {
        // Virtual machines in the guest, on Intel and on AMD: much of KVM that a guest would else reach unasked. T2 and T2A
        // clear VMX, QEMU wants them asked for by machines that are to be moved.
        (0x1, _) if !processor.nested => leaf.ecx &= !VMX,
        (0x8000_0001, _) if !processor.nested => leaf.ecx &= !SVM,
        (0x8000_000a, _) if !processor.nested => clear(leaf),
        (0x7, 0) => {
            // There is no enclave memory: a kernel would look for it, and complain. T2 clears it, QEMU without a size for it.
            leaf.ebx &= !SGX;
            leaf.ecx &= !SGX_LC;
            // By these a program in the guest puts the host's processor to sleep. Firecracker and QEMU (`cpu-pm=off`) clear it.
            leaf.ecx &= !WAITPKG;
            // KVM makes it up for every processor. AMD's have no such MSR: kernels believe what it says of Intel's faults, and
            // Windows stops. Firecracker clears it, and so did QEMU 10.1.
            if vendor == Vendor::Amd {
                leaf.edx &= !ARCH_CAPABILITIES;
            }
        }
        // Memory encryption (AMD's SME and SEV): the host's, and not this guest's. QEMU clears it for machines without SEV.
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
