//! Compares the features of a saved guest's processor with those of this host: a guest does not look again what it has, and would
//! execute instructions that fault, or rely on parts of KVM that do not exist.

use anyhow::{Result, ensure};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// A register of a leaf.
type Register = fn(&kvm_cpuid_entry2) -> u32;

/// A register whose bits are features.
struct Word {
    function: u32,
    index: u32,
    register: Register,
    register_name: &'static str,
    /// Bits that KVM changes while the guest runs.
    dynamic: u32,
    /// Of each bit, from 0: as in Linux's /proc/cpuinfo, or `-`.
    names: &'static str,
}

const EAX: (Register, &str) = (|leaf| leaf.eax, "EAX");
const EBX: (Register, &str) = (|leaf| leaf.ebx, "EBX");
const ECX: (Register, &str) = (|leaf| leaf.ecx, "ECX");
const EDX: (Register, &str) = (|leaf| leaf.edx, "EDX");

const fn word(
    function: u32,
    index: u32,
    (register, register_name): (Register, &'static str),
    dynamic: u32,
    names: &'static str,
) -> Word {
    Word { function, index, register, register_name, dynamic, names }
}

/// Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.
const WORDS: &[Word] = &[
    // MONITOR and OSXSAVE.
    word(
        0x1,
        0,
        ECX,
        1 << 3 | 1 << 27,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
        sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    // APIC.
    word(
        0x1,
        0,
        EDX,
        1 << 9,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr sse \
        sse2 ss ht tm ia64 pbe",
    ),
    word(
        0x7,
        0,
        EBX,
        0,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
        avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    // OSPKE.
    word(
        0x7,
        0,
        ECX,
        1 << 4,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
        avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        0x7,
        0,
        EDX,
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
        tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl \
        intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    word(
        0x7,
        1,
        EAX,
        0,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - - - - - amx_fp16 - avx_ifma - - lam",
    ),
    // The parts of the state that XSAVE saves.
    word(0xd, 0, EAX, 0, ""),
    word(0xd, 0, EDX, 0, ""),
    word(0xd, 1, EAX, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x4000_0001,
        0,
        EAX,
        0,
        "kvmclock_old kvm_nopiodelay - kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush \
        kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id",
    ),
    word(
        0x8000_0001,
        0,
        ECX,
        0,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
        fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(
        0x8000_0001,
        0,
        EDX,
        0,
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0008,
        0,
        EBX,
        0,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
        stibp_always_on - - - - - - amd_ssbd virt_ssbd amd_ssb_no - amd_psfd",
    ),
    word(0x8000_0021, 0, EAX, 0, ""),
];

/// The most features that an error lists.
const LISTED_MAX: usize = 8;

/// Fails if a guest whose processor was `saved` needs another one than `offered`, what a guest of this host gets, with a line that
/// says which.
pub fn ensure_compatible(saved: &[kvm_cpuid_entry2], offered: &CpuId) -> Result<()> {
    let offered = offered.as_slice();
    let [theirs, ours] = [saved, offered].map(vendor);
    ensure!(theirs == ours, "the guest was saved on a processor of {theirs}, and this host has one of {ours}");
    let missing: Vec<String> = WORDS.iter().flat_map(|word| word.missing(saved, offered)).collect();
    let more = match missing.len().saturating_sub(LISTED_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let listed = missing.iter().take(LISTED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    ensure!(
        missing.is_empty(),
        "this host's processor or its KVM lacks features that the guest had when it was saved: {listed}{more}"
    );
    Ok(())
}

impl Word {
    fn value(&self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        let leaf = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (self.function, self.index));
        leaf.map_or(0, self.register)
    }

    fn missing(&self, saved: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Vec<String> {
        let missing = self.value(saved) & !self.value(offered) & !self.dynamic;
        (0..u32::BITS).filter(|bit| missing & 1 << bit != 0).map(|bit| self.name(bit)).collect()
    }

    fn name(&self, bit: u32) -> String {
        match self.names.split_whitespace().nth(bit as usize) {
            Some(name) if name != "-" => name.to_owned(),
            _ => format!("CPUID {:#x}.{} {} bit {bit}", self.function, self.index, self.register_name),
        }
    }
}

/// The vendor's name, for a message.
fn vendor(leaves: &[kvm_cpuid_entry2]) -> String {
    let leaf = leaves.iter().find(|leaf| leaf.function == 0);
    let name = leaf.map_or(Vec::new(), |leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat());
    let printable = |byte: &u8| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' };
    name.iter().map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn processor(name: &[u8; 12], features: &[kvm_cpuid_entry2]) -> CpuId {
        let [ebx, edx, ecx] = [0, 4, 8].map(|at| u32::from_le_bytes(name[at..at + 4].try_into().unwrap()));
        CpuId::from_entries(&[&[leaf(0, 0, [7, ebx, ecx, edx])], features].concat()).unwrap()
    }

    fn refusal(saved: &CpuId, offered: &CpuId) -> String {
        ensure_compatible(saved.as_slice(), offered).unwrap_err().to_string()
    }

    #[test]
    fn missing_features_are_named() {
        let saved =
            processor(b"AuthenticAMD", &[leaf(7, 0, [0, 1 << 16 | 1 << 5, 0, 1]), leaf(0xd, 0, [0b111, 0, 0, 0])]);
        let offered = processor(b"AuthenticAMD", &[leaf(7, 0, [0, 1 << 5, 0, 0]), leaf(0xd, 0, [0b011, 0, 0, 0])]);
        assert_eq!(
            refusal(&saved, &offered),
            "this host's processor or its KVM lacks features that the guest had when it was saved: avx512f, CPUID 0x7.0 EDX bit 0, \
             CPUID 0xd.0 EAX bit 2"
        );
        ensure_compatible(offered.as_slice(), &saved).unwrap();
        let all = processor(b"AuthenticAMD", &[leaf(1, 0, [0, 0, !0, !0])]);
        assert!(refusal(&all, &offered).ends_with(" and 53 more"), "{}", refusal(&all, &offered));
    }

    #[test]
    fn what_kvm_changes_while_the_guest_runs_does_not_count() {
        let offered = processor(b"GenuineIntel", &[]);
        let running = [leaf(1, 0, [0, 0, 1 << 27, 1 << 9]), leaf(7, 0, [0, 0, 1 << 4, 0])];
        ensure_compatible(processor(b"GenuineIntel", &running).as_slice(), &offered).unwrap();
    }

    #[test]
    fn another_vendor_is_refused() {
        let [intel, amd] = [b"GenuineIntel", b"AuthenticAMD"].map(|name| processor(name, &[]));
        let expected = "the guest was saved on a processor of GenuineIntel, and this host has one of AuthenticAMD";
        assert_eq!(refusal(&intel, &amd), expected);
        assert!(refusal(&CpuId::from_entries(&[]).unwrap(), &amd).contains("processor of , and"));
    }

    #[test]
    fn no_register_has_more_names_than_bits() {
        for word in WORDS {
            assert!(word.names.split_whitespace().count() <= 32, "{:#x} {}", word.function, word.register_name);
        }
        let name = |function, register_name: &str, bit| {
            WORDS
                .iter()
                .find(|word| (word.function, word.register_name) == (function, register_name))
                .unwrap()
                .name(bit)
        };
        assert_eq!(
            [name(1, "ECX", 31), name(1, "EDX", 31), name(7, "EBX", 31), name(7, "ECX", 31)],
            ["hypervisor", "pbe", "avx512vl", "pks"]
        );
        assert_eq!(
            [name(7, "EDX", 31), name(0x8000_0001, "EDX", 31), name(0x8000_0001, "ECX", 29)],
            ["ssbd", "3dnow", "mwaitx"]
        );
        assert_eq!(
            [name(7, "EAX", 26), name(0x8000_0008, "EBX", 28), name(0x4000_0001, "EAX", 15)],
            ["lam", "amd_psfd", "kvm_msi_ext_dest_id"]
        );
    }
}
