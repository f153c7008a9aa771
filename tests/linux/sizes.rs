//! Every kernel in every format, with various memory sizes and vCPU counts.

use std::path::Path;

use crate::{boot, guests, is_lab};

/// Boots a kernel in one format with every memory size and every vCPU count. The two are independent, so not all
/// combinations are tested.
fn boots_at_every_size(guests: &Path, kernel: &str, image: &str) {
    // The stock kernel takes 46 MiB, and runs out of memory with 64.
    let smallest_mib = if kernel == "stock" { 96 } else { 64 };
    let mut sizes = vec![(1, smallest_mib), (2, 6144), (1, 512), (2, 512), (4, 512)];
    // An unpacked kernel is the same in both formats; where boots take seconds, only the extremes are tested.
    if image == "bzImage" && is_lab() {
        sizes.truncate(2);
    }
    for (cpus, memory_mib) in sizes {
        let what = format!("{kernel}/{image}, {cpus} vCPUs, {memory_mib} MiB");
        let flags = ["--cpus", &cpus.to_string(), "--memory", &format!("{memory_mib}M")];
        let ended = boot(&guests.join(kernel), image, "report", &flags);
        let values = ended.expect(0, &what).values();
        assert_eq!(values["cpus"], cpus.to_string(), "{what}");
        let seen_mib = values["memory_kib"].parse::<u64>().unwrap() / 1024;
        // The kernel excludes its own text, data and page structures.
        let least_mib = memory_mib - memory_mib / 20 - 40;
        assert!((least_mib..=memory_mib).contains(&seen_mib), "{what}: the guest sees {seen_mib} MiB");
        let apic_ids: Vec<String> = (0..cpus).map(|id| id.to_string()).collect();
        assert_eq!(values["apic_ids"], apic_ids.join(","), "{what}");
        assert_eq!(values["siblings"], "0", "{what}: one thread a core");
        let package = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
        assert_eq!(values["package"], package, "{what}: all cores in one package");
        // With an invariant TSC, the kernel prefers it.
        assert!(["kvm-clock", "tsc"].contains(&values["clock"]), "{what}: {}", values["clock"]);
        assert_eq!(values["random"], "64", "{what}: random bytes from the host");
    }
}

#[test]
fn a_stock_vmlinux_boots_at_every_size() {
    boots_at_every_size(&guests!(), "stock", "vmlinux");
}

#[test]
fn a_stock_bzimage_boots_at_every_size() {
    boots_at_every_size(&guests!(), "stock", "bzImage");
}

#[test]
fn a_micro_vmlinux_boots_at_every_size() {
    boots_at_every_size(&guests!(), "micro", "vmlinux");
}

#[test]
fn a_micro_bzimage_boots_at_every_size() {
    boots_at_every_size(&guests!(), "micro", "bzImage");
}
