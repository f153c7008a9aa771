//! The hypervisor that the processor names.

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// The leaf with the hypervisor's signature (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const SIGNATURE: u32 = 0x4000_0000;

/// The leaves with the processor's identity and features: vendor, family, features, extended features
/// (Intel SDM volume 2, CPUID).
const IDENTITY: [(u32, u32); 6] = [(0, 0), (1, 0), (7, 0), (7, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
/// The leaf whose EBX has the ID of the processor that executes the instruction.
const WITH_APIC_ID: u32 = 1;

/// The identity and the features of the processor, the same on all of the host's, in hexadecimal.
pub fn identity() -> String {
    let words = IDENTITY.iter().flat_map(|&(number, index)| {
        // SAFETY: as below.
        #[allow(unused_unsafe)]
        let leaf = unsafe { __cpuid_count(number, index) };
        [leaf.eax, if number == WITH_APIC_ID { 0 } else { leaf.ebx }, leaf.ecx, leaf.edx]
    });
    words.map(|word| format!("{word:x}")).collect::<Vec<_>>().join(" ")
}

/// Returns the signature of the hypervisor that this program runs on, such as `KVMKVMKVM`. Meaningless without one.
pub fn hypervisor_signature() -> String {
    // SAFETY: every x86-64 processor has CPUID. Recent compilers declare it safe.
    #[allow(unused_unsafe)]
    let leaf = unsafe { __cpuid(SIGNATURE) };
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}
