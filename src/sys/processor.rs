//! The hypervisor that the processor names.

use std::arch::x86_64::__cpuid;

/// The leaf with the hypervisor's signature (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const SIGNATURE: u32 = 0x4000_0000;

/// Returns the signature of the hypervisor that this program runs on, such as `KVMKVMKVM`. Meaningless without one.
pub fn hypervisor_signature() -> String {
    // SAFETY: every x86-64 processor has CPUID. Recent compilers declare it safe.
    #[allow(unused_unsafe)]
    let leaf = unsafe { __cpuid(SIGNATURE) };
    let bytes = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}
